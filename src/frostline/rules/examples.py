"""What the examples in the docstrings of rules begin with, written once.

The examples run with ``import keras, numpy as np, frostline as fl``. They define ``model``, where
the rule needs data also ``data``, and where it matters ``reference``. A line in braces stands for
others: ``{samples}`` for the lines of that name below, ``{network momentum=0.1}`` for a network
whose BN layer has these arguments, and ``{as above}``, in the second example of a rule, for the
first one up to its last empty line.
"""

from __future__ import annotations

import re

_SAMPLES = 'x = np.random.default_rng(0).normal(3, 2, (64, 4)).astype("float32")\n'

_LINES = {
    "samples": _SAMPLES + "data = (x, x[:, :2])",
    "pairs": _SAMPLES + "data = [(x[i:i + 2], x[i:i + 2, :2]) for i in range(0, 64, 2)]",
    "network": """\
model = keras.Sequential([
    keras.Input((4,)), keras.layers.BatchNormalization(%s), keras.layers.Dense(2)])""",
    "frozen": """\
norm = fl.layers.BatchNormalization(%s)
model = keras.Sequential([keras.Input((4,)), norm, keras.layers.Dense(2)])
norm.trainable = False""",
    "torch": """\
import torch

model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4%s))""",
}


def filled(documentation: str) -> str:
    """Return the documentation of a rule with every line in braces replaced."""
    text = re.sub(r"^\{(\w+)(.*)\}$", _lines, documentation, flags=re.MULTILINE)
    first, fence, rest = text.partition("\n```\n")
    above, gap, _ = first.partition("```python\n")[2].rpartition("\n\n")
    return first + fence + rest.replace("{as above}\n", above + gap)


def _lines(line: re.Match[str]) -> str:
    name, arguments = line[1], line[2].strip()
    if name == "network":
        arguments = arguments or 'name="bn"'
    return _LINES[name].replace("%s", arguments) if name in _LINES else line[0]
