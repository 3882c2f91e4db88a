"""Tables of work on Ray and by ranks, from ``benchmarks/bench_scale.py --json``.

As in ``tables.py``: contents of the file -> Markdown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def scale_table(results: Sequence[dict[str, Any]]) -> str:
    """Throughput: seconds by processes and actors in the order of their runs, then the ratios."""
    found = results[0]["throughput"]
    lines = ["| who | seconds | processor seconds | load of the machine |", "|---|---|---|---|"]
    for row in found["rows"]:
        who = "local process" if row["how"] == "processes" else "actor of Ray"
        plural = "" if row["count"] == 1 else "es" if row["how"] == "processes" else "s"
        name = who.replace("actor", f"actor{plural}") if "actor" in who else f"{who}{plural}"
        cells = [f"{row['count']} {name}", f"{row['seconds']:.0f}", f"{row['processor_s']:.0f}",
                 f"{row['load']:.0f}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    ratio, same = found["overhead at two"], found["byte for byte equal"]
    caption = (
        f"Two actors by two processes, median: {ratio['processor_s']:.2f} in processor time, "
        f"{ratio['seconds']:.2f} on the clock. {found['images']:,} images, "
        f"{found['features'][0]} features each, byte for byte those of one process: "
        f"{'yes' if same else '**no**'}."
    )
    peaks = results[0].get("memory", {}).get("driver MB by rows", {})
    if peaks:
        text = " and ".join(
            f"{peak:.0f} MB with {int(rows):,} rows" for rows, peak in peaks.items()
        )
        caption += f" Another driver, of small rows, peaked at {text}."
    return "\n".join([*lines, "", caption])


def kills_table(results: Sequence[dict[str, Any]]) -> str:
    """What kills of actors did, in a line per question."""
    found = results[0]["kills"]
    most = found["kills"] * found["rows of a batch"]
    rows = {
        "actors killed while they built": found["kills"],
        "samples lost": found["lost"],
        "duplicates after the merge": found["duplicates"],
        "features those of an undisturbed build": "yes" if found["all equal"] else "**no**",
        "samples computed again": f"{found['computed again']:,} of at most {most:,} in flight",
        "seconds lost per kill": f"{found['seconds lost per kill']:.0f}",
    }
    lines = ["| question | found |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    settings = f"{found['images']:,} images in batches of {found['rows of a batch']}, two actors."
    return "\n".join([*lines, "", settings])


def ranks_speed(results: Sequence[dict[str, Any]]) -> str:
    """Seconds of a recalibration by gloo ranks and by actors."""
    found = results[0]["ranks"]
    lines = ["| who | seconds | images per second |", "|---|---|---|"]
    for row in found["rows"]:
        speed = found["images"] / row["seconds"]
        who = row["how"] if row["count"] > 1 else row["how"].replace("s", "", 1)
        lines.append(f"| {row['count']} {who} | {row['seconds']:.1f} | {speed:.0f} |")
    return "\n".join(lines)


def paper_table(results: Sequence[dict[str, Any]]) -> str:
    """The model of a large job, from its assumptions."""
    found = results[0]["paper"]
    a, hours = found["assumed"], found["hours"]
    each = f"10{str(round(math.log10(a['images']))).translate(_RAISED)}"
    cores = a["gpus"] * a["cores_per_gpu"]
    network = found["network of a node, bytes per s"] / 1e9
    rows = {
        "read": (
            f"{found['read bytes'] / 1e12:.0f} TB",
            f"{each} × {a['jpeg_bytes'] / 1e3:.0f} kB",
        ),
        "decoded, moved between tasks inside a node": (
            f"{found['decoded bytes'] / 1e12:.0f} TB",
            f"{each} × {a['side']} × {a['side']} × 3 bytes uint8, through shared memory",
        ),
        "stored": (
            f"{found['stored bytes'] / 1e12:.1f} TB, half of it in 16 bits",
            f"{each} × {a['features']} × 4 bytes",
        ),
        "files": (
            f"{found['files'] / 1e6:.1f} million",
            f"{found['rows of a shard']} rows per shard, an array and a description each",
        ),
        "the driver's memory": (
            f"{found['driver bytes'] / 1e9:.0f} GB",
            f"{a['driver_bytes']:.0f} bytes per sample: ids, digests, places, copies to sort them",
        ),
        "forward passes": (
            f"{hours['forward passes']:.1f} hours",
            f"{a['gpus']} GPUs × {a['images_per_s']:.0f} images per second",
        ),
        "decoding": (
            f"{hours['decoding']:.1f} hours",
            f"{a['decode_s'] * 1e3:.1f} ms each on {cores:,} cores",
        ),
        "network": (
            f"{hours['network']:.1f} hours",
            f"{network:.1f} GB/s per node of {a['network_bytes_per_s'] / 1e9:.1f}",
        ),
        "a kill of one actor": (
            f"{found['seconds of a GPU that a kill costs']:.1f} seconds of one GPU, and its start",
            f"at most {found['rows of a shard']} samples in flight",
        ),
    }
    lines = ["| what | how much | follows from |", "|---|---|---|"]
    lines += [f"| {name} | {much} | {why} |" for name, (much, why) in rows.items()]
    return "\n".join([*lines, "", f"What saturates first: {found['saturates first']}."])


#: Kind of a table -> what makes it.
KINDS: Mapping[str, Callable[[Sequence[Any]], str]] = {
    "scale": scale_table, "scale-kills": kills_table, "scale-ranks": ranks_speed,
    "paper": paper_table,
}  # fmt: skip
