"""Cost of ``fl.diagnose`` in evaluations: ``python -m tests.slow.thirdparty.diagnosing``.

Processor time of one diagnosis and of one evaluation as the program's user writes it: the loss of
every batch at inference, in Keras ``model.evaluate``. Both by the same process, one after the
other, each as the user calls it the second time: the first evaluation and the first diagnosis load
what they need. ``--framework keras`` asks those of Keras, on whatever backend runs; both frameworks
in one process would share its time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Files whose programs are asked where no name is given.
SMALL = ("later", "situations", "unseen", "keras_later", "keras_unseen")


def took(run: Callable[[], object]) -> float:
    """Processor time of a second run, in seconds."""
    run()
    begin = time.process_time()
    run()
    return time.process_time() - begin


def calls(program: Any) -> tuple[Callable[[], object], Callable[[], object]]:
    """An evaluation and a diagnosis of a program of torch."""
    import torch

    import frostline as fl

    model, batches = program.model, program.batches
    ask = program.ask or program.call

    def evaluation() -> None:
        with torch.no_grad():
            with contextlib.suppress(Exception):
                model.train(program.in_training_mode)
            for batch in batches:
                ask(model, batch)

    def diagnosis() -> None:
        fl.diagnose(model, batches, verbose=0, **program.options)

    return evaluation, diagnosis


def keras_calls(program: Any) -> tuple[Callable[[], object], Callable[[], object]]:
    """An evaluation and a diagnosis of a program of Keras."""
    import frostline as fl

    from .keras_verbs import given, ways

    data = program.batches[0]
    args, kwargs = given(data)
    return (
        lambda: program.model.evaluate(*args, verbose=0, **kwargs),
        lambda: fl.diagnose(program.model, data, verbose=0, **ways(program)),
    )


def measured(program: Any, framework: str) -> dict[str, Any]:
    """An evaluation, a diagnosis, and how many of the one are the other."""
    evaluation, diagnosis = (keras_calls if framework == "keras" else calls)(program)
    evaluated, diagnosed = took(evaluation), took(diagnosis)
    return {
        "evaluation_s": round(evaluated, 4),
        "diagnosis_s": round(diagnosed, 3),
        "evaluations": round(diagnosed / evaluated, 1),
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.slow.thirdparty.diagnosing", description=__doc__
    )
    parser.add_argument("names", nargs="*", help="parts of names; all small programs without")
    parser.add_argument("--framework", choices=("torch", "keras"), default="torch")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    from frostline.types import FrostlineError

    from .__main__ import load

    if given.framework == "torch":
        import torch

        torch.set_num_threads(1)
    known: dict[str, Any] = {}
    if given.json and given.json.exists():
        known = json.loads(given.json.read_text(encoding="utf-8"))
    for name, entry in load().items():
        small = entry.build.__module__.rpartition(".")[2] in SMALL
        chosen = any(n in name for n in given.names) if given.names else small
        if not chosen or entry.framework != given.framework:
            continue
        try:
            known[name] = measured(entry.build(), entry.framework)
        except (FrostlineError, ImportError) as refused:
            print(f"{name}: left out, {refused}", flush=True)  # noqa: T201
            continue
        print(name, known[name], flush=True)  # noqa: T201
        if given.json:
            text = json.dumps(known, indent=1, ensure_ascii=False)
            given.json.write_text(f"{text}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
