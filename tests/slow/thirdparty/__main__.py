"""Ask every verb of every model: ``python -m tests.slow.thirdparty [NAME ...]``.

Each model runs in a process of its own, which may crash or hang without taking the others with it.
``--json FILE`` keeps the answers, beside those of models that are not asked now; ``--page FILE``
writes the table for the documentation. ``--verbs fold,split`` asks these alone, ``--blank`` those
that a model was not asked with before; its other answers stay. ``--together`` keeps to one process,
which is quicker where many small models of one framework are asked.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import textwrap
import time
import traceback
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from .program import ENTRIES, VERBS, Entry

ROOT = Path(__file__).parents[3]
LIMIT_S = 1200
#: What an answer may begin with, in the order of the summary.
OUTCOMES = ("works", "refused", "wrong", "crash")


def load() -> dict[str, Entry]:
    """The table; frameworks are imported here."""
    from . import (  # noqa: F401
        fresh,
        keras_fresh,
        keras_later,
        keras_programs,
        keras_unseen,
        keras_untried,
        later,
        situations,
        torch_programs,
        unseen,
        untried,
        untried_data,
    )

    return ENTRIES


def answers(entry: Entry, verbs: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Build one model and ask these verbs, in this process; an empty set: every one."""
    warnings.simplefilter("ignore")
    from frostline.types import FrostlineError

    from .judging import Wrong

    try:
        version = metadata.version(entry.library)
        program = entry.build()
    except (ImportError, metadata.PackageNotFoundError) as problem:
        return {"missing": f"{type(problem).__name__}: {problem}"}
    if entry.framework == "keras":
        from .keras_verbs import VERBS as known
    else:
        from .torch_verbs import VERBS as known, copied  # type: ignore[assignment]
    found: dict[str, Any] = {}
    for name, verb in known.items():
        if verbs and name not in verbs:
            continue
        begin = time.perf_counter()
        print(name, file=sys.stderr, flush=True)  # told where the process does not end
        try:
            again = entry.build() if entry.framework == "keras" else program
            model = again.model if entry.framework == "keras" else copied(program.model)
            told = f"works: {verb(again, model)}"
        except FrostlineError as refusal:
            wrong = any(words in str(refusal) for words in program.no_help)
            told = f"{'wrong' if wrong else 'refused'}: {refusal}"
        except Wrong as problem:
            told = f"wrong: {problem}"
        except Exception as problem:
            where = traceback.extract_tb(problem.__traceback__)[-1]
            told = (
                f"crash: {type(problem).__name__}: {problem} "
                f"({Path(where.filename).name}:{where.lineno})"
            )
        found[name] = [" ".join(told.split()), round(time.perf_counter() - begin, 2)]
    return {"version": version, "verbs": found}


def apart(name: str, verbs: frozenset[str]) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.slow.thirdparty", "--one", name]
    command += ["--verbs", ",".join(sorted(verbs))] if verbs else []
    try:
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as cut:
        last = (cut.stderr or b"").decode().strip().rpartition("\n")[2]
        return {"verbs": {last or "build": [f"crash: not ended in {LIMIT_S} s", LIMIT_S]}}
    lines = [line for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode or not lines:
        last = (run.stderr.strip().splitlines() or ["no word"])[-1]
        return {"verbs": {"all": [f"crash: exit {run.returncode}: {last}", 0.0]}}
    return dict(json.loads(lines[-1]))


def counted(results: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Outcome -> how many calls."""
    told = [t for r in results.values() for t, _ in r.get("verbs", {}).values()]
    return {outcome: sum(t.startswith(outcome) for t in told) for outcome in OUTCOMES}


def page(results: dict[str, dict[str, Any]], table: dict[str, Entry]) -> str:
    """The table as Markdown."""
    foreign = {n: r for n, r in results.items() if table[n].library not in ("torch", "keras")}
    verbs = list(dict.fromkeys(v for r in results.values() for v in r.get("verbs", {})))
    signs = {"works": "✓", "refused": "refused", "wrong": "**wrong**", "crash": "**crash**"}
    lines = [
        "# Models and loops of other libraries",
        "",
        "Made by `python -m tests.slow.thirdparty --page docs/compatibility.md`: each model is",
        "built small, with random weights, and asked with every verb. A check mark means that the",
        "answer agreed with something that is not ours: buffers bit for bit, inputs of normalising",
        "calls seen by a function mode of torch, the library's own loss in both phases. Exported",
        "programs are held to the module that they were made from. Cells are of the day on which",
        "they were asked last, not all of the newest code; an empty one was not asked.",
        "",
        f"{words(counted(results))}. Of these, models of other libraries than torch and Keras:",
        f"{words(counted(foreign))}.",
        "",
        f"| model | library | {' | '.join(verbs)} |",
        f"|---|---|{'---|' * len(verbs)}",
    ]
    notes = []
    for name, entry in table.items():
        result = results.get(name, {})
        if "verbs" not in result:
            continue
        cells = []
        for verb in verbs:
            told, _ = result["verbs"].get(verb, ["", 0.0])
            outcome = told.partition(":")[0]
            cells.append(signs.get(outcome, "" if verb in VERBS[entry.framework] else "–"))
            if outcome not in ("works", ""):
                notes.append(
                    f"- {name}, `{verb}`: {textwrap.shorten(told, 300, placeholder=' ...')}"
                )
        lines.append(
            f"| {name} | {entry.library} {result.get('version', '')} | {' | '.join(cells)} |"
        )
    absent = [name for name in table if "verbs" not in results.get(name, {})]
    if absent:
        lines += ["", f"Not asked this time: {', '.join(absent)}."]
    told = ["", "## What is refused, and why", "", *notes] if notes else []
    return "\n".join([*lines, *told, *beside(results)])


#: Programs that were asked before anything was mended for them: their file, what was answered.
FIRST = {
    "situations.py": "situations-first.json",
    "unseen.py` and `keras_unseen.py": "unseen-first.json",
    "untried.py`, `untried_data.py` and `keras_untried.py": "unseen-programs-first.json",
    "fresh.py` and `keras_fresh.py": "fresh-programs-first.json",
}


def answered_first(name: str) -> dict[str, Any]:
    """What small programs were answered before anything was mended."""
    first = ROOT / "docs" / "results" / name
    return dict(json.loads(first.read_text(encoding="utf-8"))) if first.exists() else {}


def words(counts: dict[str, int]) -> str:
    """Counts in words."""
    total = max(1, sum(counts.values()))
    told = ", ".join(f"{number} {word}" for word, number in counts.items())
    return f"{told} ({counts['works'] / total:.1%} work)" if "works" in counts else told


def still_wrong(asked: dict[str, dict[str, Any]]) -> list[str]:
    """Which answers are wrong now, by model and verb."""
    found: dict[str, list[str]] = {}
    for name, result in asked.items():
        for verb, (told, _) in result["verbs"].items():
            if told.startswith(("wrong", "crash")):
                found.setdefault(name, []).append(f"`{verb}`")
    lines = [f"- {name}: {', '.join(verbs)}" for name, verbs in found.items()]
    return ["", "Wrong still, with what was answered above:", "", *lines] if lines else []


def beside(results: dict[str, dict[str, Any]]) -> list[str]:
    """What the small programs were answered at first, and the sweep over timm."""
    lines: list[str] = []
    others = set(results)
    for source, name in FIRST.items():
        if not (first := answered_first(name)):
            continue
        asked = {n: results[n] for n in first["situations"] if n in results}
        others -= set(asked)
        written = "written, and what was answered was committed"
        if "commit" in first:
            written = f"written, and asked of commit {first['commit']}"
        lines += [
            "",
            f"{len(first['situations'])} rows are of `tests/slow/thirdparty/{source}`. They were",
            written,
            f"(`docs/results/{name}`), before anything was mended for",
            f"them: {words(first['score'])}. Now, {len(asked)} rows: {words(counted(asked))}.",
            *([first["note"]] if "note" in first else []),
            *still_wrong(asked),
        ]
    if lines:
        rest = counted({n: results[n] for n in others})
        lines = [
            "",
            "## Small programs",
            "",
            "Forms of batches, losses, loops and BN that libraries have in common; those of the",
            "second file are as people write them, a third of them healthy, in which nothing of BN",
            "may be blamed.",
            *lines,
            "",
            f"All other rows alone: {words(rest)}.",
        ]
    sweep = ROOT / "docs" / "results" / "timm-sweep.json"
    if sweep.exists():
        known = json.loads(sweep.read_text(encoding="utf-8"))
        lines += [
            "",
            "## timm, frozen and thawed",
            "",
            "`python -m tests.slow.timm_sweep` freezes networks that have BN and build within a",
            "second, asks `fl.assert_frozen(model, data=...)`, which must be silent, and again",
            "after a thaw of one layer, which must raise an error. Of the",
            f"{len(known['networks'])} networks of timm {known['timm']}: {words(known['counts'])}.",
            f"Left out: {words(left_out(known['networks']))}.",
        ]
    recalibrated = ROOT / "docs" / "results" / "recalibrate-models.json"
    if recalibrated.exists():
        found = json.loads(recalibrated.read_text(encoding="utf-8"))
        lines += [
            "",
            "## Recalibration",
            "",
            "`python -m tests.slow.thirdparty.recalibration`: processor time of `fl.recalibrate`",
            "on eight batches, in passes of the model at inference over them, and how far a second",
            "one moves what the first stored (deviations; relative for variances). Rows without a",
            "size: the batches of the table, four small images each (a detector's: two), where",
            "Python weighs as much as arithmetic; with one (`--usual`): as the model is used.",
            "",
            "| model | finite | moved by a second | passes |",
            "|---|---|---|---|",
            *(
                f"| {name} | {'yes' if row['finite'] else 'no'} | {row['moved_by_a_second']:.1g} "
                f"| {row['passes']} |"
                for name, row in found.items()
            ),
        ]
    lines += costs()
    return lines


def costs() -> list[str]:
    """The section on run times, of the frameworks that were measured."""
    results = ROOT / "docs" / "results"
    files = {
        "torch": "diagnose-models.json",
        "Keras on TensorFlow": "diagnose-keras-models.json",
        "Keras on torch": "diagnose-keras-torch-models.json",
    }
    found = {
        framework: json.loads((results / name).read_text(encoding="utf-8"))
        for framework, name in files.items()
        if (results / name).exists()
    }
    if not found:
        return []
    lines = [
        "",
        "## A diagnosis beside an evaluation",
        "",
        "`python -m tests.slow.thirdparty.diagnosing`: processor time of `fl.diagnose`, and of",
        "one evaluation as the program's user writes it (`--framework keras`: `model.evaluate`),",
        "by the same process. Most of these programs are a few small layers on some dozens of",
        "samples, where what a diagnosis costs beside its passes weighs most, and those of",
        "libraries have eight small images; [benchmarks.md](benchmarks.md) has networks of a usual",
        "size.",
        "",
    ]
    for framework, rows in found.items():
        passes = sorted(row["evaluations"] for row in rows.values())
        lines.append(
            f"Of {len(passes)} programs of {framework} it takes {passes[len(passes) // 2]:.0f} "
            f"evaluations in the middle, {passes[0]:.0f} at least, {passes[-1]:.0f} at most."
        )
    return [
        *lines,
        "",
        "| model | with | evaluation, ms | diagnosis, s | evaluations |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {framework.rpartition(' ')[2]} | {1000 * row['evaluation_s']:.1f} "
            f"| {row['diagnosis_s']:.2f} | {row['evaluations']:.0f} |"
            for framework, rows in found.items()
            for name, row in rows.items()
        ),
    ]


def left_out(networks: dict[str, str]) -> dict[str, int]:
    """Reason -> how many networks were left out for it."""
    told = [text.partition(": ")[2] for text in networks.values() if text.startswith("left out")]
    return {reason: told.count(reason) for reason in dict.fromkeys(told)}


def kept(path: Path | None, table: dict[str, Entry]) -> dict[str, Any]:
    """What earlier runs said."""
    if path is None or not path.exists():
        return {}
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {name: known[name] for name in known if name in table}


def main(arguments: list[str] | None = None) -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.slow.thirdparty", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names, or kinds; all without")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--verbs", default="", help="these alone, by commas")
    parser.add_argument("--blank", action="store_true", help="what was not asked before")
    parser.add_argument("--together", action="store_true", help="all models in this process")
    parser.add_argument("--but", nargs="*", default=(), help="parts of names to leave out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    given = parser.parse_args(arguments)
    table = load()
    asked = frozenset(given.verbs.split(",")) - {""}
    if given.one:
        print(json.dumps(answers(table[given.one], asked)))
        return 0
    chosen = [
        name
        for name, entry in table.items()
        if (not given.names or any(word in name or word == entry.kind for word in given.names))
        and not any(word in name for word in given.but)
    ]
    results = kept(given.json, table)
    for index, name in enumerate(chosen, 1):
        known = results.get(name, {}).get("verbs", {})
        verbs = asked
        if given.blank:
            verbs = frozenset(VERBS[table[name].framework]) - known.keys()
            if not verbs:
                continue
        result = answers(table[name], verbs) if given.together else apart(name, verbs)
        if "verbs" in result and verbs:
            result["verbs"] = {**known, **result["verbs"]}
            result = {**results.get(name, {}), **result}
        results[name] = result
        if "missing" in result:
            print(f"{index}/{len(chosen)} {name}: left out, {result['missing']}", flush=True)
            continue
        bad = {v: t for v, (t, _) in result["verbs"].items() if not t.startswith("works")}
        took = sum(seconds for _, seconds in result["verbs"].values())
        print(f"{index}/{len(chosen)} {name}: {took:.0f} s", *bad.items(), sep="\n    ", flush=True)
        if given.json:
            given.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    print(", ".join(f"{n} {word}" for word, n in counted(results).items()))
    if given.page:
        given.page.write_text(page(results, table) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
