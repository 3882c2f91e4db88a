"""Print what ``fl.diagnose`` says to each case: ``python -m tests.slow.casebook [CASE ...]``."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HEAD = ("case", "expected", "first", "second", "IoU", "remedy", "loss", "closed", "seconds")


def main() -> int:
    """Parse, run, print; 1 when a case is answered wrongly."""
    parser = argparse.ArgumentParser(prog="python -m tests.slow.casebook", description=__doc__)
    parser.add_argument("cases", nargs="*", help="numbers: 1 N6 C1; all by default")
    parser.add_argument(
        "--backend",
        choices=("tensorflow", "jax", "torch", "native"),
        default="tensorflow",
        help="of Keras; native: torch modules without Keras",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to a file")
    parser.add_argument("--verdicts", action="store_true", help="print the reports' sentences too")
    arguments = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    runner: Any
    if arguments.backend == "native":
        os.environ["KERAS_BACKEND"] = "torch"  # no Keras is imported; the record names its backend
        from . import torch_runner as runner
    else:
        os.environ["KERAS_BACKEND"] = arguments.backend
        from . import runner  # Keras reads its backend when it is imported

    rows = []
    for case in runner.chosen(arguments.cases, backend=arguments.backend):
        row = runner.run(case, seed=arguments.seed)
        rows.append(row)
        if arguments.verdicts:
            print(f"{row.number}: {row.verdict}", flush=True)
        else:
            mark = "right" if row.right else "WRONG"
            print(f"{row.number}: {mark}: {', '.join(row.answers)}", file=sys.stderr, flush=True)
        if arguments.json is not None:  # a run that is cut keeps what it has
            write(arguments.json, arguments, rows, runner)
    print(table(rows))
    scores = runner.score(rows)
    for name, value in scores.items():
        print(f"{name}: {value}")
    for number, reason in runner.NOT_COVERED.items():
        print(f"not covered: {number}: {reason}")
    if arguments.json is not None:
        print(f"wrote {arguments.json}")
    return 0 if all(row.right and not row.blamed for row in rows) else 1


def write(path: Path, arguments: argparse.Namespace, rows: Iterable, runner: Any) -> None:
    """Rows, scores, misses with their reasons, and where they were measured, as JSON."""
    from frostline import environment

    from .misses import MISSES

    rows = tuple(rows)
    numbers = {row.number for row in rows}
    content = {
        "backend": arguments.backend,
        "seed": arguments.seed,
        "environment": environment.facts(),
        "score": runner.score(rows),
        "misses": [
            {"number": miss.number, "question": miss.question, "reason": miss.reason}
            for miss in MISSES
            if miss.number in numbers and arguments.backend in miss.backends
        ],
        "not_covered": dict(runner.NOT_COVERED),
        "cases": [row.as_dict() for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(content), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Numbers that JSON has no word for become words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value


def table(rows: Iterable) -> str:
    """One line per case."""
    lines = [HEAD]
    for row in rows:
        answers = [*row.answers, "", ""]
        closing = (
            ""
            if row.before is None or row.after is None
            else f"{row.before:.3g} -> {row.after:.3g}"
        )
        lines.append(
            (
                row.number + ("" if row.right and not row.blamed else " WRONG"),
                "+".join(row.expected),
                answers[0],
                answers[1],
                "" if row.overlap is None else f"{row.overlap:.2f}",
                row.remedy or "",
                closing,
                "" if row.closed is None else f"{row.closed:.0%}",
                f"{row.seconds[0]:.1f}+{row.seconds[1]:.1f}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    raise SystemExit(main())
