"""Print what ``fl.diagnose`` says to each case: ``python -m tests.casebook [CASE ...]``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

HEAD = ("case", "expected", "first", "second", "IoU", "remedy", "loss", "closed", "seconds")


def main() -> int:
    """Parse, run, print; 1 when a case is answered wrongly."""
    parser = argparse.ArgumentParser(prog="python -m tests.casebook", description=__doc__)
    parser.add_argument("cases", nargs="*", help="numbers: 1 N6 C1; all by default")
    parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), default="tensorflow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="to docs/results/casebook-BACKEND.json")
    parser.add_argument("--verdicts", action="store_true", help="print the reports' sentences too")
    arguments = parser.parse_args()
    os.environ["KERAS_BACKEND"] = arguments.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
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
    print(table(rows))
    scores = runner.score(rows)
    for name, value in scores.items():
        print(f"{name}: {value}")
    for number, reason in runner.NOT_COVERED.items():
        print(f"not covered: {number}: {reason}")
    if arguments.json:
        path = Path("docs/results") / f"casebook-{arguments.backend}.json"
        content = {
            "backend": arguments.backend,
            "seed": arguments.seed,
            "score": scores,
            "not_covered": dict(runner.NOT_COVERED),
            "cases": [row.as_dict() for row in rows],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        print(f"wrote {path}")
    return 0 if all(row.right and not row.blamed for row in rows) else 1


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
