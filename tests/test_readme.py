"""The README's example runs as it stands, on a smaller network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from frostline.experiments import backbones, datasets

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    data = datasets.load("digits", classes=["3", "8"], per_class=16, image_size=16)
    model = backbones.build("tiny", image_size=16, classes=2, weights=None)
    names: dict[str, Any] = {
        "model": model,
        "x": backbones.preprocess("tiny", data.images),
        "y": data.labels,
    }
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    before = model.get_weights()
    code = code.replace("block12_expand_conv", "block2a_conv").replace("epochs=10", "epochs=1")
    exec(code, names)
    assert "froze" in str(names["change"])
    moved = {
        weight.path
        for weight, old in zip(model.weights, before, strict=True)
        if not np.array_equal(weight, old)
    }
    assert not any("stem" in path or "block1" in path for path in moved)
    assert {"head/kernel", "block2a_bn/moving_mean"} <= moved
