"""The tables of README.md and docs/: each function makes one from the results of commands.

A table of kind ``name`` is made by the function that ``KINDS`` has for it. It gets the contents of
the named JSON files, in order, and returns Markdown; every number in it comes from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import cost_tables
import scale_tables


def overfit_table(results: Sequence[dict[str, Any]]) -> str:
    """One line per policy: loss, accuracy and AUC of the three phases."""
    found = results[0]
    lines = [
        "| policy | dynamic loss / acc | phase 0 loss / acc / AUC | phase 1 loss / acc / AUC |",
        "|---|---|---|---|",
    ]
    for row in found["rows"]:
        phases = row["phases"]
        cells = [_cell(phases["dynamic"], ("loss", "accuracy"))]
        cells += [_cell(phases[phase], ("loss", "accuracy", "auc")) for phase in ("0", "1")]
        lines.append(f"| `{row['name']}` | {' | '.join(cells)} |")
    settings, place = found["settings"], found["environment"]
    versions = place["versions"]
    caption = [
        f"{settings['backbone']} at {settings['image_size']}²",
        f"{' and '.join(settings['classes'])}, {settings['per_class']} images each",
        f"layers before `{found['rows'][0]['boundary']}` frozen",
        f"{settings['epochs']} epochs of {settings['optimizer'].upper()}",
        f"learning rate {settings['learning_rate']}, momentum {settings['momentum']}",
        f"batch {settings['batch_size']}",
        f"seed {settings['seed']}",
        "evaluated on the training images",
        f"Keras {versions['keras']} on {place['backend']}, {place['cores']} cores",
    ]
    lines += ["", "; ".join(caption) + "."]
    return "\n".join(lines)


def transfer_table(results: Sequence[dict[str, Any]]) -> str:
    """One line per row: test accuracy after the head, at the end, at best, and in training mode."""
    found = results[0]
    lines = [
        "| row | head | fine-tuned | best epoch | fine-tuned, phase 1 | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        figures = (
            row["test_accuracy"]["head"],
            row["test_accuracy"]["fine-tuning"],
            max(epoch["test_accuracy"] for epoch in row["epochs"]),
            row["phases"]["1"]["accuracy"],
        )
        cells = [f"{figure:.3f}" for figure in figures]
        lines.append(
            f"| `{row['name']}` | {' | '.join(cells)} | {sum(row['seconds'].values()):.0f} |"
        )
    settings, place = found["settings"], found["environment"]
    per_class = settings["train_per_class"]
    caption = [
        f"{settings['backbone']} at {settings['image_size']}²",
        ", ".join(found["selection"]["train"]["classes"]),
        f"{per_class or 'all'} training images each",
        f"{found['rows'][0]['samples']} test images",
        f"fine-tuned from `{found['rows'][0]['boundary']}`",
        f"{settings['head_epochs']} epochs of RMSprop {settings['head_learning_rate']}",
        f"{settings['epochs']} of SGD {settings['learning_rate']}, momentum {settings['momentum']}",
        f"batch {settings['batch_size']}",
        f"seed {settings['seed']}",
        f"Keras {place['versions']['keras']} on {place['backend']}, {place['cores']} cores",
    ]
    return "\n".join([*lines, "", "; ".join(caption) + "."])


def _cell(phase: dict[str, Any], names: Sequence[str]) -> str:
    return " / ".join(f"{phase[name]:.3f}" for name in names if name in phase)


def layer_table(results: Sequence[dict[str, Any]]) -> str:
    """One line per case: time of ours divided by time of the stock layer, per backend."""
    backends = [result["backend"] for result in results]
    lines = [
        "| ours / stock, median [quartiles] | " + " | ".join(backends) + " |",
        "|---|" + "---|" * len(backends),
    ]
    for case in results[0]["figures"]:
        cells = []
        for result in results:
            figure = result["figures"][case]
            low, high = figure["quartiles"]
            cells.append(f"{figure['ratio']:.3f} [{low:.3f}, {high:.3f}]")
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def peers_table(results: Sequence[dict[str, Any]], part: str = "recalibration") -> str:
    """One line per situation, one column per tool: right or wrong."""
    table: dict[str, dict[str, bool]] = results[0][part]
    lines = ["| situation | " + " | ".join(f"{tool}" for tool in table) + " |"]
    lines.append("|---|" + "---|" * len(table))
    for row in next(iter(table.values())):
        cells = ["right" if table[tool][row] else "**wrong**" for tool in table]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in results[0]["versions"].items())
    return "\n".join([*lines, "", f"Run with {versions}."])


def freezers_table(results: Sequence[dict[str, Any]]) -> str:
    """The same for what freezes a backbone."""
    return peers_table(results, part="freezing")


def treatments_table(results: Sequence[dict[str, Any]]) -> str:
    """One line per data set: what ``fl.compare`` says, and what full trainings say."""
    (found,) = results
    heads = ("data", "images", "`fl.compare`", "not told from it", "given up", "full trainings",
             "not told from it", "", "seconds of cpu")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in found["sets"]:
        cells = [f"{row['data']}", f"{row['train']} + {row['validation']}"]
        for part in (row["compare"], row["full"]):
            won = ", winner" if part["winner"] else ""
            accuracy = part["accuracy"][part["leader"]]
            cells.append(f"`{part['leader']}`, {accuracy:.1%}{won}")
            cells.append(", ".join(f"`{name}`" for name in part["tied"]) or "–")
            if "given up" in part:
                cells.append(", ".join(f"`{name}`" for name in part["given up"]) or "–")
        seconds = row["processor_s"]
        cells.append("same" if row["same"] else "**not the same**")
        cells.append(f"{seconds['compare']:.0f} / {seconds['full']:.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    caption = (
        f"{found['epochs']} epochs, {found['seeds']} seeds, PyTorch {found['torch']}; images: of "
        "training and of validation."
    )
    return "\n".join([*lines, "", caption])


def merge_table(results: Sequence[dict[str, Any]]) -> str:
    """Averages of two networks, measured here, beside what REPAIR reports for its own networks."""
    # Jordan et al. 2022: the aligned average, then with new statistics.
    published = {"MLP with BN, digits": "80.7% → 95.5%", "ResNet20, CIFAR-10": "12.5% → 67.0%"}
    rows = [
        f"| {row['name']} | {row['first']:.1%}, {row['second']:.1%} | {row['averaged']:.1%} | "
        f"{row['aligned']:.1%} | {row['recalibrated']:.1%} | {published[row['name']]} |"
        for row in results[0]["rows"]
    ]
    head = "| networks | alone | averaged | aligned and averaged | then `fl.recalibrate` | REPAIR |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def distributed_table(results: Sequence[dict[str, Any]]) -> str:
    """One line per tool: how far its statistics are from those of all the data."""
    lines = [
        "| tool | worst mean, standard deviations | worst variance | ranks equal |",
        "|---|---|---|---|",
    ]
    for row in results[0]["rows"]:
        cells = [f"{row[each]:.1e}" if row[each] < 1e-3 else f"{row[each]:.2f}"
                 for each in ("mean", "variance")]  # fmt: skip
        cells[1] += " relative"
        lines.append(f"| {row['tool']} | {' | '.join(cells)} | {'yes' if row['equal'] else 'no'} |")
    versions = ", ".join(f"{name} {version}" for name, version in results[0]["versions"].items())
    return "\n".join([*lines, "", f"Run with {versions}."])


def ranks_table(results: Sequence[list[dict[str, Any]]]) -> str:
    """One line per network and number of processes: how far they are from one process."""
    rows: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in results[0]:
        rows.setdefault((row["network"], row["processes"]), {})[row["method"]] = row
    lines = [
        "| network | processes | shards | ranks bit-identical | `sequential` | `batch` |",
        "|---|---|---|---|---|---|",
    ]
    for (network, processes), found in rows.items():
        one = next(iter(found.values()))
        same = all(row["all ranks bit-identical"] for row in found.values())
        cells = [f"{network}, {one['image side']}²", str(processes),
                 ", ".join(map(str, one["shards"])), "yes" if same else "**no**"]  # fmt: skip
        cells += [f"{found[m]['largest relative difference']:.1e}" for m in ("sequential", "batch")]
        lines.append(f"| {' | '.join(cells)} |")
    caption = "The last columns are the largest relative difference from one process, per method."
    return "\n".join([*lines, "", caption])


def casebook_table(results: Sequence[dict[str, Any]]) -> str:
    """One line per case of the casebook: expected and given causes, layers, and the remedy."""
    found = results[0]
    # Whether the cause is right, the row says itself.
    missed = {miss["number"] for miss in found["misses"] if miss["question"] != "cause"}
    lines = [
        "| case | expected | first | second | layers (IoU) | remedy | loss | closes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["cases"]:
        wrong = not row["right"] or row["blamed"] or row["number"] in missed
        answers = [f"`{code}`" for code in row["answers"][:2]] + ["", ""]
        cells = [
            f"{row['number']} {row['title']}" + (" **missed**" if wrong else ""),
            " + ".join(f"`{code}`" for code in row["expected"]),
            *answers[:2],
            "" if row["overlap"] is None else f"{row['overlap']:.2f}",
            row["remedy"] or "",
            _before_and_after(row),
            "" if row["closed"] is None else f"{row['closed']:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    place = found["environment"]
    versions = ", ".join(
        f"{name} {version}"
        for name, version in place["versions"].items()
        if name in ("keras", "frostline") or name.startswith(place["backend"])
    )
    run = f"{versions}, Python {place['python']}, seed {found['seed']}"
    return "\n".join([*lines, "", f"Run with {run}."])


def _before_and_after(row: Mapping[str, Any]) -> str:
    if row["before"] is None or row["after"] is None:
        return ""
    return f"{float(row['before']):.3g} → {float(row['after']):.3g}"


def casebook_scores(results: Sequence[dict[str, Any]]) -> str:
    """The scores over the cases, per backend where there are several runs."""
    backends = [found["backend"] for found in results] if len(results) > 1 else [""]
    lines = ["| score |" + "".join(f" {name} |".replace("  ", " ") for name in backends)]
    lines.append("|---|" + "---|" * len(backends))
    for name in results[0]["score"]:
        values = " | ".join(found["score"].get(name, "") for found in results)
        lines.append(f"| {name} | {values} |")
    return "\n".join(lines)


def casebook_first(results: Sequence[dict[str, Any]]) -> str:
    """Cases that nobody had seen: what was answered at first, and what is answered now."""
    first, now = ({row["number"]: row for row in found["cases"]} for found in results)
    lines = ["| case | expected | at first | now |", "|---|---|---|---|"]
    for number, row in first.items():
        cells = [f"{number} {row['title']}", " + ".join(f"`{code}`" for code in row["expected"])]
        for each in (row, now[number]):
            wrong = not each["right"] or each["blamed"]
            told = ", ".join(f"`{code}`" for code in each["answers"][:2])
            cells.append(told + (" **wrong**" if wrong else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def casebook_misses(results: Sequence[dict[str, Any]]) -> str:
    """What is answered wrongly, or not covered, and why."""
    found = results[0]
    lines = [
        f"- {miss['number']}, {miss['question']}: {miss['reason']}." for miss in found["misses"]
    ]
    lines += [f"- {number}, not covered: {why}." for number, why in found["not_covered"].items()]
    return "\n".join(lines) or "None."


def engines_table(results: Sequence[dict[str, Any]]) -> str:
    """One line per model and engine: how much faster than ``predict``, and how near, per backend.

    Where a backend has no figure, its cell says why the engine falls back.
    """
    backends = [result["backend"] for result in results]
    lines = ["| prefix of | engine | " + " | ".join(backends) + " |"]
    lines.append("|---|---|" + "---|" * len(backends))
    found = [{_measured(row): row for row in result["rows"]} for result in results]
    for key in dict.fromkeys(key for rows in found for key in rows):
        engines = dict.fromkeys(name for rows in found if key in rows for name in
                                rows[key]["engines"])  # fmt: skip
        for engine in engines:
            cells = [_engine_cell(rows[key]["engines"].get(engine)) if key in rows else ""
                     for rows in found]  # fmt: skip
            model = f"{key[0]} at {key[1]}², batch {key[2]}"
            lines.append(f"| {model} | {engine} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def precision_table(results: Sequence[dict[str, Any]]) -> str:
    """One line per model, backend and engine: what bfloat16 is worth, and what it costs."""
    heads = ("prefix of", "backend", "engine", "`predict` / float32", "`predict` / bfloat16",
             "float32 / bfloat16, median [smallest, largest]", "error")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for result in results:
        for row in result["rows"]:
            for name, found in row["engines"].items():
                if "over_float32" not in found:
                    continue
                engine = name.removesuffix(" in bfloat16")
                ratios = found["over_float32"]
                spread = f"{median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}]"
                lines.append(
                    f"| {row['model']} at {row['image_size']}², batch {row['batch_size']} | "
                    f"{result['backend']} | {engine} | {row['engines'][engine]['ratio']:.2f} | "
                    f"{found['ratio']:.2f} | {spread} | {found['error']:.1e} |"
                )
    return "\n".join(lines)


def _measured(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["model"], row["image_size"], row["batch_size"]


def _engine_cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if "reason" in found:
        return f"falls back: {found['reason']}".replace("|", "/")
    return f"{found['ratio']:.2f}× (error {found['error']:.0e})"


def overfit_diagnosis_table(results: Sequence[dict[str, Any]]) -> str:
    """One line per policy: causes with their shares, and what the first remedy gives."""
    lines = ["| policy | causes, share of the gap | first remedy | accuracy at inference |",
             "|---|---|---|---|"]  # fmt: skip
    for name, row in results[0]["rows"].items():
        causes = ", ".join(
            f"`{cause['code']}`" + ("" if cause["share"] is None else f" {cause['share']:.0%}")
            for cause in row["causes"]
        )
        first = next((each for each in row["remedies"] if each["recommended"]), None)
        before = row["inference_accuracy"]
        told = ("–", f"{before:.3f}")
        if first is not None:
            told = (first["name"], f"{before:.3f} → {first['after']['accuracy']:.3f}")
        lines.append(f"| `{name}` | {causes} | {' | '.join(told)} |")
    return "\n".join(lines)


def cached_fit_table(results: Sequence[list[dict[str, Any]]]) -> str:
    """One line per network, backend and optimizer: how far fl.fit and model.fit are apart."""
    heads = ("network", "dtype", "backend", "optimizer", "samples", "weights", "one rounding",
             "history", "one rounding", "")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    rows = sorted(
        (row for result in results for row in result),
        key=lambda row: (
            row["backbone"],
            row["dtype"],
            row["backend"],
            row["optimizer"] != "sgd",
        ),
    )
    for row in rows:
        cells = [row["backbone"], row["dtype"], row["backend"], row["optimizer"]]
        cells.append(f"{row['samples']}, batch {row['batch_size']}")
        for name in ("weights", "history"):
            rounded = row[f"{name}_one_rounding"]
            cells += [f"{row[name]:.1e}", f"{rounded:.1e}" if row["dtype"] == "float32" else ""]
        lines.append(f"| {' | '.join(cells)} | {'same' if row['same'] else '**differs**'} |")
    return "\n".join(lines)


def fold_table(results: Sequence[dict[str, Any]]) -> str:
    """One line per network and backend: where its BN layers went, and how far outputs moved."""
    rows: dict[tuple[str, bool, str], dict[str, dict[str, Any]]] = {}
    for row in (row for result in results for row in result["rows"]):
        key = (row["model"], row["backend"] != "tensorflow", row["backend"])
        rows.setdefault(key, {})[row["dtype"]] = row
    heads = ["network", "backend", "side", "BN", "absorbed", "alone", "left"]
    heads += ["difference", "one rounding", "from its file", "float64"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    folded: list[dict[str, Any]] = []
    for (name, _, backend), found in sorted(rows.items(), key=lambda item: item[0]):
        row = found.get("float32", {})
        cells = [name, backend, str(row.get("image_size", "")), str(row.get("sites", ""))]
        if "refused" in row:
            reason = row["refused"].partition(":")[0].replace("|", "/")
            cells += ["", "", "", f"refused: {reason}", "", "", ""]
        else:
            folded += found.values()
            cells += [str(row.get(each, "")) for each in ("absorbed", "replaced", "left")]
            cells += [_exponent(row, each) for each in ("difference", "one rounding", "file")]
            cells.append(_exponent(found.get("float64", {}), "difference"))
        lines.append(f"| {' | '.join(cells)} |")
    caption = []
    for dtype in ("float32", "float64"):
        made = [row for row in folded if row["dtype"] == dtype]
        if made:
            ratio = max(row["difference"] / row["one rounding"] for row in made)
            caption.append(
                f"{dtype}: {len(made)} folded, {sum(row['left'] for row in made)} BN layers left, "
                f"largest difference {max(row['difference'] for row in made):.1e}, at most "
                f"{ratio:.1f} times one rounding"
            )
    versions = results[0]["environment"]["versions"]
    return "\n".join([*lines, "", f"{'; '.join(caption)}. Keras {versions['keras']}."])


def _exponent(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.1e}" if name in row else ""


def killed_builds(results: Sequence[dict[str, Any]]) -> str:
    """What killing builds of a cache showed, in a line per question."""
    found = results[0]
    shards = f"{min(found['shards'])} to {max(found['shards'])}"
    rows = {
        "processes killed while they built": found["kills"],
        "caches that these built": found["caches"],
        "complete shards on disk after a kill": shards,
        "samples of complete shards computed again": found["again"],
        "files those of an undisturbed build": "yes" if found["identical"] else "**no**",
    }
    lines = ["| question | found |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    settings = f"{found['samples']} samples in batches of {found['batch_size']}"
    return "\n".join([*lines, "", f"{settings}, seed {found['seed']}."])


def prefix_pairs(results: Sequence[dict[str, Any]]) -> str:
    """What pairs of different prefixes showed, a line per framework."""
    columns = {
        "one key": "same_key", "of these, let pass": "passed",
        "let pass by the comparison alone": "forged_passed", "refused": "refused",
        "built again, not found": "not_shared",
        "in another process": "not_shared_elsewhere",
    }  # fmt: skip
    lines = [
        f"| framework | pairs | kept for one process | {' | '.join(columns)} |",
        "|---|" + "---:|" * (len(columns) + 2),
    ]
    for name, row in results[0].items():
        counts = [row["pairs"], row["private"], *(len(row[key]) for key in columns.values())]
        lines.append(f"| {name} | {' | '.join(map(str, counts))} |")
    kinds = sorted({kind for row in results[0].values() for kind in row["same_key"]})
    return "\n".join([*lines, "", f"Different, but with one key: {', '.join(kinds) or 'none'}."])


#: Exceptions after which a state of the code has a row of its own.
_OFTEN = 2500


def interruptions(results: Sequence[dict[str, Any]]) -> str:
    """What interrupting verbs showed, by framework and network; of `scripts/inject.py`.

    The state of the code of the last run, by the hash of the sources, has a row per model and their
    sum; earlier ones have a row where they were tried often, and the others one together.
    """
    tried: Counter[str] = Counter()
    for run in results[0]["runs"]:
        tried[run.get("sources", "")] += sum(
            counts.get("exceptions", 0) for counts in run["counts"].values()
        )
    last = results[0]["runs"][-1].get("sources", "")
    often = {state for state, number in tried.items() if state and number >= _OFTEN}
    others = len(tried) - len(often | {last})
    rows: dict[tuple[str, str], Counter[str]] = {}
    earlier: dict[tuple[str, str], Counter[str]] = {}
    for run in results[0]["runs"]:
        sources = run.get("sources", "")
        for counts in run["counts"].values():
            if sources == last:
                model = _interrupted(run["command"].split())
                rows.setdefault((sources, model), Counter()).update(counts)
            else:
                state = sources if sources in often else f"{others} earlier states"
                earlier.setdefault((state, "all of these"), Counter()).update(counts)
    rows[last, "all of these"] = sum(rows.values(), Counter())
    rows |= dict(reversed(earlier.items()))
    lines = [
        "| sources | model | exceptions: changed | clean-up: changed, broken | Ctrl-C: changed |",
        "|---|---|---|---|---|",
    ]
    for (sources, name), row in rows.items():
        exceptions, cleaning, signals = (
            sum(row[each] for each in names)
            for names in (
                ("changed", "around", "broken"),
                ("changed in clean-up",),
                ("signals changed", "signals around", "signals broken"),
            )
        )
        lines.append(
            f"| {sources} | {name} | {row['exceptions']:,}: {exceptions} | "
            f"{row['in clean-up']:,}: {cleaning}, {row['broken in clean-up']} | "
            f"{row['signals']:,}: {signals} |"
        )
    return "\n".join(lines)


def _interrupted(command: Sequence[str]) -> str:
    """The model of a run, as its row is called."""
    options = dict(zip(command[3::2], command[4::2], strict=False))
    on = f" on {command[0].partition('=')[2]}" if options["--framework"] == "keras" else ""
    return f"{options['--framework']}{on}, {options['--network']}"


#: Kind of a table -> what makes it from the contents of its files.
#: Kinds of `scripts/fuzz_cli.py`, with the words of the table.
_FUZZED = {
    "traceback": "traceback", "unexpected": "inner error", "escaped": "escaped exception",
    "crash": "crash", "hang": "over 30 s", "over 2 GB": "over 2 GB", "files left": "files left",
    "input changed": "input changed", "raw escape": "raw escape", "payload ran": "payload ran",
}  # fmt: skip


def fuzzed(results: Sequence[dict[str, Any]]) -> str:
    """One line per versions: lines of the fuzzer, and how many of each kind of failure.

    Runs of the state of the code of the last file have a row of their own.
    """
    columns = ("lines", "ended with 0 or 1", *_FUZZED.values(), "longest", "most")
    lines = [
        f"| versions | sources | {' | '.join(columns)} |",
        f"|---|---|{'---:|' * len(columns)}",
    ]
    last = results[-1].get("sources")
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for found in results:
        versions, backend = found["versions"], found["backend"]
        library = next(name for name in (backend, f"{backend}-cpu") if name in versions)
        state = last if found.get("sources") == last else "earlier states"
        named = f"Keras {versions['keras']}, {library} {versions[library]}"
        rows.setdefault((named, str(state)), []).append(found)
    for (named, state), runs in rows.items():
        done = sum(run["codes"].get(code, 0) for run in runs for code in ("0", "1"))
        counts = (str(sum(run["failures"].get(kind, 0) for run in runs)) for kind in _FUZZED)
        lines.append(
            f"| {named} | {state} | {sum(run['runs'] for run in runs):,} | {done:,} | "
            f"{' | '.join(counts)} | {max(run['longest_seconds'] for run in runs):.1f} s | "
            f"{max(run['most_megabytes'] for run in runs):,} MB |"
        )
    return "\n".join(lines)


def probed(results: Sequence[dict[str, Any]]) -> str:
    """One line per framework: calls with a wrong argument, and how they ended."""
    columns = ("calls", "worked", "refused in words", "of these, without the argument's name",
               "other errors, and hangs")  # fmt: skip
    lines = [f"| models | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for found in results:
        name = f"Keras on {found['backend']}" if found["framework"] == "keras" else "torch"
        lines.append(
            f"| {name} | {found['calls']:,} | {found['succeeded']:,} | {found['refused']:,} | "
            f"{len(found['unnamed'])} | {len(found['faults'])} |"
        )
    return "\n".join(lines)


KINDS: Mapping[str, Callable[[Sequence[Any]], str]] = {
    "overfit-diagnosis": overfit_diagnosis_table,
    "cached-fit": cached_fit_table,
    "killed-builds": killed_builds,
    "prefix-pairs": prefix_pairs,
    "interruptions": interruptions,
    "fuzzed": fuzzed,
    "probed": probed,
    "overfit": overfit_table,
    "layer": layer_table,
    "distributed": distributed_table,
    "ranks": ranks_table,
    "merge": merge_table,
    "peers": peers_table,
    "freezers": freezers_table,
    "engines": engines_table,
    "precision": precision_table,
    "fold": fold_table,
    "transfer": transfer_table,
    "treatments": treatments_table,
    "casebook": casebook_table,
    "casebook-scores": casebook_scores,
    "casebook-misses": casebook_misses,
    "casebook-first": casebook_first,
    **cost_tables.KINDS,
    **scale_tables.KINDS,
}
