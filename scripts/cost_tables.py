"""Tables of what things cost, from the files that ``benchmarks/bench_*.py --json`` write.

As in ``tables.py``: contents of the files, in order -> Markdown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

#: Case of bench_cached_training.py -> what its ratio compares.
CACHED_CASES = {
    "schedule": "head and fine-tuning: `model.fit` / `fl.fit`",
    "head": "head alone: `model.fit` / `fl.fit`",
    "schedule / limit": "head and fine-tuning: `fl.fit` / its limit",
    "head / limit": "head alone: `fl.fit` / its limit",
    "epoch": "one cached epoch / the suffix on features in memory",
    "prefix resnet50": "prefix of ResNet50: `predict` / the engine taken",
    "prefix efficientnet-lite0": "prefix of EfficientNet-Lite0: `predict` / the engine taken",
    "memory": "peak memory of building a cache: four times the samples / once",
}


def diagnosis_cost(results: Sequence[dict[str, Any]]) -> str:
    """One line per backend and network: a diagnosis in units of ``evaluate``, and its memory."""
    lines = [
        "| backend | network | sites | `evaluate` | in `evaluate`s | of cpu | passes | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        what = f"{result['samples']} samples at {result['size']}²"
        for case, found in result["figures"].items():
            backend = result["backend"] + (" without fusion" if result.get("xla_flags") else "")
            processor = found.get("units_processor")
            cells = [
                backend, f"{case}, {what}", str(found["sites"]),
                f"{found['evaluate_s']:.2f} s", f"{found['units']:.0f}",
                "" if processor is None else f"{processor:.0f}", f"{found['passes']:.0f}",
                f"{found['memory']:.1f}×",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def recalibration_cost(results: Sequence[dict[str, Any]]) -> str:
    """One line per backend and method: time in units of ``predict``, and growth of the memory."""
    heads = ("backend", "method", "wall / `predict`", "processor / `predict`",
             "wall, compiling included", "peak memory, 16 batches instead of 4")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|---|---|"]
    for result in results:
        plain = result["figures"]["predict"]
        for method in ("batch", "sequential"):
            found = result["figures"][method]
            wall, processor = found["warm_ratio"]
            first = found["first_s"][0] / plain["first_s"][0]
            cells = [result["backend"], f"`{method}`", f"{wall:.2f}", f"{processor:.2f}",
                     f"{first:.2f}", f"{found['growth_mib']:+.0f} MiB"]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    settings = results[0]["settings"]
    caption = (
        f"MobileNetV2 (52 BN layers) at {settings['size']}², {settings['samples']} samples in "
        f"batches of {settings['batch']}, {settings['rounds']} rounds."
    )
    return "\n".join([*lines, "", caption])


def cached_training(results: Sequence[dict[str, Any]]) -> str:
    """One line per comparison, one column per backend: median ratio, smallest and largest."""
    backends = list(dict.fromkeys(result["backend"] for result in results))
    lines = ["| ratio, median [smallest, largest] | " + " | ".join(backends) + " |"]
    lines.append("|---|" + "---|" * len(backends))
    captions = []
    for result in results:
        settings = result["settings"]
        captions.append(
            f"{', '.join(result['figures'])}: {settings['train']} and "
            f"{settings['validation']} images at {settings['size']}², "
            f"{settings['head_epochs']} + {settings['epochs']} epochs, batch {settings['batch']}, "
            f"{result['cpus']} cores"
        )
    for case, meaning in CACHED_CASES.items():
        cells = []
        for backend in backends:
            found = [each["figures"][case] for each in results
                     if each["backend"] == backend and case in each["figures"]]  # fmt: skip
            cells.append(_ratio(found[0]) if found else "")
        if any(cells):
            lines.append(f"| {meaning} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "; ".join(dict.fromkeys(captions)) + "."])


def training_limits(results: Sequence[dict[str, Any]]) -> str:
    """One line per network and number of images: the essay's schedule / what it cannot go below."""
    columns = ("tensorflow", "jax", "torch", "native PyTorch")
    found: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        settings, figures = result["settings"], result["figures"]
        images = f"{settings['train']:,} + {settings['validation']:,}"
        row = found.setdefault((settings.get("backbone", "resnet50"), images), {})
        one = figures["schedule / limit"]
        seconds = f"{one['first']:.0f} s / {one['second']:.0f} s"
        row[result.get("backend", columns[-1])] = f"{one['ratio']:.2f} ({seconds})"
    lines = [f"| network | images | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for (network, images), cells in found.items():
        told = " | ".join(cells.get(column, "") for column in columns)
        lines.append(f"| {network} | {images} | {told} |")
    return "\n".join(lines)


def torch_prefix(results: Sequence[dict[str, Any]]) -> str:
    """One line per comparison of bench_torch_prefix.py."""
    (result,) = results
    lines = ["| native PyTorch | ratio, median [smallest, largest] | |", "|---|---|---|"]
    for case, found in result["figures"].items():
        taken = "taken by `auto`" if found.get("auto") else ""
        lines.append(f"| {case} | {_ratio(found)} | {taken} |")
    settings = result["settings"]
    card = result.get("device", "cpu")
    place = f"{result['cpus']} cores" + ("" if card == "cpu" else f" and one {card}")
    caption = (
        f"PyTorch {result['torch']} on {place}; {settings['size']}², batches of "
        f"{settings['batch']}; training: {settings['train']} images, {settings['epochs']} epochs; "
        f"a step has {settings['step_batch']} images."
    )
    return "\n".join([*lines, "", caption])


def cached_anywhere(results: Sequence[dict[str, Any]]) -> str:
    """One line per model and run of bench_cached_anywhere.py, with its settings."""
    heads = ("model", "run", "stock / ours", "ours / limit", "parameters, float64", "float32",
             "one bit moved")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for result in results:
        how = result["settings"]
        run = f"{how['samples']} images at {how['size']}², rounds: {how['rounds']}"
        for model, found in result["figures"].items():
            limit = f"{found['ours / limit']:.2f}" if "ours / limit" in found else ""
            apart = [f"{found[name]:.0e}" for name in ("float64", "float32")]
            moved = f"{found['float32, one bit moved']:.0e}"
            cells = [model, run, f"{found['stock / ours']:.2f}", limit, *apart, moved]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def guide_recipe(results: Sequence[dict[str, Any]]) -> str:
    """One line per run of bench_guide_recipe.py, with its settings and the accuracy per seed."""
    heads = ("backend", "run", "stock / ours, epoch", "ours / limit, epoch", "stock / ours, whole",
             "accuracy with `fit`", "with `fl.fit`")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for result in results:
        how = result["settings"]
        run = f"{2 * how['train']} + {2 * how['validation']} images at {how['size']}², "
        run += f"{how['epochs']} epochs"
        ratios = [f"{result[name]:.3g}" for name in heads[2:5]]
        accuracy = [" ".join(f"{a:.1%}" for a in result["accuracy"][k]) for k in ("stock", "ours")]
        lines.append(f"| {' | '.join([result['backend'], run, *ratios, *accuracy])} |")
    return "\n".join(lines)


def _ratio(found: Mapping[str, Any]) -> str:
    low, high = found["range"]
    engine = f" {found['engine']}" if "engine" in found else ""
    return f"{found['ratio']:.2f} [{low:.2f}, {high:.2f}]{engine}"


def many_layers(results: Sequence[Mapping[str, Any]]) -> str:
    """Seconds of looks at a file of many BN layers, beside those of the framework."""
    found = results[0]
    columns = ("framework's own process", "`sites`", "`lint`", "most beyond",
               "`fl.sites`, `fl.lint`", "report drawn in")  # fmt: skip
    lines = [f"| file | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for row in found["looks"]:
        calls = "-"
        if "api sites" in row:
            calls = f"{row['api sites']:.2f}, {row['api lint']:.2f}"
        beyond = max(row["sites"], row["lint"]) - row["framework"]
        drawn = f"{row['report']['seconds']:.1f}" if "seconds" in row["report"] else "-"
        lines.append(
            f"| `.{row['kind']}` | {row['framework']:.1f} | {row['sites']:.1f} | "
            f"{row['lint']:.1f} | {beyond:+.1f} | {calls} | {drawn} |"
        )
    place = found["environment"]
    layers = ", ".join(sorted({f"{row['layers']:,}" for row in found["looks"]}))
    rounds = ", ".join(sorted({str(row["rounds"]) for row in found["looks"]}))
    caption = (
        f"Seconds; {layers} BN layers; the smallest of {rounds} rounds; Keras "
        f"{place['versions']['keras']} on {place['backend']}, torch {place['versions']['torch']}, "
        f"{place['cores']} cores."
    )
    return "\n".join([*lines, "", caption])


def many_samples(results: Sequence[Mapping[str, Any]]) -> str:
    """Peak memory of a process by the number of samples that a generator gave."""
    rows = results[0]["memory"]
    counts = sorted({row["samples"] for row in rows})
    lines = [
        "| verb | " + " | ".join(f"{count:,} samples" for count in counts) + " |",
        "|---|" + "---:|" * len(counts),
    ]
    for framework, verb in dict.fromkeys((row["framework"], row["verb"]) for row in rows):
        peaks = {
            row["samples"]: f"{row['megabytes']:.0f} MB"
            for row in rows
            if (row["framework"], row["verb"]) == (framework, verb)
        }
        cells = " | ".join(peaks.get(count, "-") for count in counts)
        lines.append(f"| `{verb}`, {framework} | {cells} |")
    return "\n".join(lines)


#: Kind of a table -> what makes it from the contents of its files.
KINDS: Mapping[str, Callable[[Sequence[Any]], str]] = {
    "diagnosis-cost": diagnosis_cost,
    "recalibration-cost": recalibration_cost,
    "cached-training": cached_training,
    "torch-prefix": torch_prefix,
    "training-limits": training_limits,
    "cached-anywhere": cached_anywhere,
    "guide-recipe": guide_recipe,
    "many-layers": many_layers,
    "many-samples": many_samples,
}
