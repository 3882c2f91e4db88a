"""Run many command lines on broken, hostile and ordinary input, and count what must not happen.

    python scripts/fuzz_cli.py --runs 1000 --seed 0

Counted are tracebacks, errors that nobody foresaw ("unexpected"), runs over 30 seconds or 2 GB,
files left behind by a run that failed (in the folder for temporary files by any run), characters
that a terminal would obey, and payloads that ran. Each failure is printed as a command line; with
the same seed the inputs are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import random
import resource
import shlex
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

LONGEST = 30
MOST_KILOBYTES = 2 << 20
NASTY = "a\x1b[31mred\x1b]0;t\x07\u202eb\r[bold]"
TRAP = "trap"
TEMPORARY = "temporary"
#: TensorFlow writes such files while it traces and removes them when the process ends.
OF_TENSORFLOW = "__autograph_generated_file"


@dataclass
class Outcome:
    """What the runs showed: exit codes, and each kind of failure with its command lines."""

    runs: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    failures: dict[str, list[str]] = field(default_factory=dict)


def write_inputs(folder: Path) -> tuple[list[str], list[str]]:
    """Write models and data, whole and broken; return their names."""
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(2, 3, name="conv"),
            layers.BatchNormalization(name="bn"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax", name="head"),
        ]
    )
    net.save(folder / "bare.keras")
    net.compile("sgd", keras.losses.SparseCategoricalCrossentropy(), metrics=["accuracy"])
    net.save(folder / "net.keras")
    net.save(folder / "net.h5")
    net.compile("sgd", "categorical_crossentropy")
    net.save(folder / "onehot.keras")
    net.get_layer("conv").trainable = net.get_layer("bn").trainable = False
    net.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    net.save(folder / "frozen.keras")
    small = keras.Sequential(
        [keras.Input((4,)), layers.BatchNormalization(name="bn"), layers.Dense(1, name="out")]
    )
    small.compile("adam", "mse")
    small.save(folder / "regression.keras")
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    plain.save(folder / "plain.keras")
    whole = (folder / "net.keras").read_bytes()
    (folder / "half.keras").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.keras").write_bytes(b"")
    (folder / "half.h5").write_bytes((folder / "net.h5").read_bytes()[:3000])
    _renamed(folder / "net.keras", folder / "nasty.keras")
    (folder / f"{NASTY}.keras").write_bytes(whole)
    (folder / "leaves.py").write_text("import sys\ndef build():\n    sys.exit(0)\n")
    (folder / "modules.py").write_text(MODULES)
    _write_torch(folder)
    _write_hostile(folder)
    _write_reports(folder)
    kinds = (".keras", ".h5", ".pt", ".pt2", ".safetensors")
    models = [path.name for path in folder.iterdir() if path.suffix in kinds]
    models += ["leaves:build", "nowhere:build", "missing.keras", ".", "/dev/null", "/dev/zero", ""]
    models += [f"modules:{name}" for name in ("net", "lazy", "raises", "number", "absent", "Own")]
    return models, _write_data(folder)


MODULES = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(2, 3))

def lazy():
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))

def raises():
    raise KeyError("a\x1b[31m")

def number():
    return 7

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x):
        return {"logits": self.bn(x["x"])}
"""


class Payload:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (TRAP, "w"))


def _write_torch(folder: Path) -> None:
    """Write torch files, whole, broken, and with a payload inside."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3)
    ).eval()
    torch.save(net.state_dict(), folder / "state.pt")
    torch.save(net, folder / "whole.pt")
    torch.save(
        {**net.state_dict(), "1.running_var": torch.full((2,), torch.nan)}, folder / "nan.pt"
    )
    torch.save({"state_dict": net.state_dict(), "epoch": 3}, folder / "checkpoint.pt")
    torch.save({"a": Payload()}, folder / "payload.pt")
    (folder / "bare.pt").write_bytes(pickle.dumps(Payload()))
    (folder / "half.pt").write_bytes((folder / "state.pt").read_bytes()[:700])
    torch.export.save(torch.export.export(net, (torch.zeros(1, 3, 8, 8),)), folder / "net.pt2")
    with (
        zipfile.ZipFile(folder / "net.pt2") as old,
        zipfile.ZipFile(folder / "payload.pt2", "w") as new,
    ):
        for name in old.namelist():
            inputs = "sample_inputs" in name or "example_inputs" in name
            new.writestr(name, pickle.dumps(Payload()) if inputs else old.read(name))
    (folder / "half.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{}")


def _write_hostile(folder: Path) -> None:
    """Write what would fill memory, wait for ever, or run code."""
    os.mkfifo(folder / "fifo.keras")
    os.mkfifo(folder / "fifo.npz")
    (folder / "loop.keras").symlink_to(folder / "loop.keras")
    for suffix in ("keras", "npz"):
        with zipfile.ZipFile(folder / f"bomb.{suffix}", "w", zipfile.ZIP_DEFLATED) as bomb:
            bomb.writestr("config.json", b"0" * (64 << 20))
            bomb.writestr("x.npy", _header((1 << 40,)) + b"0" * 64)
            bomb.writestr("y.npy", _header((12,)) + b"0" * 96)
    for name, layer in HOSTILE_LAYERS.items():
        with (
            zipfile.ZipFile(folder / "plain.keras") as old,
            zipfile.ZipFile(folder / f"{name}.keras", "w") as new,
        ):
            for member in old.namelist():
                content = old.read(member)
                if member == "config.json":
                    config = json.loads(content)
                    config["config"]["layers"].append(layer)
                    content = json.dumps(config).encode()
                new.writestr(member, content)


def _write_reports(folder: Path) -> None:
    """Write a report, half of it, and one with other types and a name to be obeyed inside."""
    import keras

    import frostline as fl

    fl.lint(keras.models.load_model(folder / "net.keras")).save(folder / "report.json")
    text = (folder / "report.json").read_text()
    (folder / "half.json").write_text(text[: len(text) // 2])
    plain = json.loads(text)
    (folder / "odd.json").write_text(json.dumps(plain | {"findings": 3, "causes": [NASTY]}))
    for name in plain:  # each part in the place of another type
        (folder / f"odd_{name}.json").write_text(json.dumps(plain | {name: [NASTY]}))


def _header(shape: tuple[int, ...]) -> bytes:
    """Return the header of a .npy file that promises doubles of ``shape``."""
    text = repr({"descr": "<f8", "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


HOSTILE_LAYERS: dict[str, dict[str, Any]] = {
    "callable": {
        "module": "builtins", "class_name": "open", "registered_name": "open",
        "config": {"file": TRAP, "mode": "w"},
    },
    "function": {
        "module": "keras.layers", "class_name": "Lambda", "registered_name": None,
        "config": {"function": {"module": "os", "class_name": "function", "config": "system",
                                "registered_name": "system"}, "arguments": {"command": TRAP}},
    },
    "lambda": {
        "module": "keras.layers", "class_name": "Lambda", "registered_name": None,
        "config": {"name": "l", "function": {"class_name": "__lambda__", "config": {
            "code": "4wAAAAA=", "defaults": None, "closure": None}}},
    },
    "wrapper": {
        "module": "keras.utils.torch_utils", "class_name": "TorchModuleWrapper",
        "registered_name": None,
        "config": {"name": "t", "module": "gASVAAAAAAAAAACMCGJ1aWx0aW5zlIwEb3BlbpSTlC4="},
    },
}  # fmt: skip


def _renamed(source: Path, target: Path) -> None:
    """Write a model whose layer has a name that a terminal would obey."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                config = json.loads(content)
                for layer in config["config"]["layers"]:
                    if layer["config"].get("name") == "bn":
                        layer["config"]["name"] = NASTY
                content = json.dumps(config).encode()
            new.writestr(name, content)


def _write_data(folder: Path) -> list[str]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 8, 8, 3)).astype("float32")
    flat = rng.normal(size=(12, 4)).astype("float32")
    y = np.arange(12) % 3
    nan = np.where(y == 1, np.nan, y)
    arrays: dict[str, tuple[Any, Any]] = {
        "good": (x, y),
        "flat": (flat, flat[:, :1]),
        "big_endian": (x.astype(">f4"), y.astype(">i8")),
        "half": (x.astype("f2"), y.astype("u1")),
        "double": (x.astype("f8"), y.astype("f8")),
        "integers": ((x * 9).astype("i4"), y),
        "booleans": (x > 0, y > 0),
        "scalar": (x, np.int64(3)),
        "cube": (x, np.zeros((12, 2, 3), int)),
        "beyond": (x, y + 50),
        "negative": (x, y - 2),
        "nan_labels": (x, nan),
        "huge_labels": (x, y.astype("u8") + np.uint64(2**63)),
        "one_hot": (x, np.eye(3)[y]),
        "wide_one_hot": (x, np.eye(7)[y]),
        "grey": (x[..., :1], y),
        "five_channels": (np.concatenate([x, x[..., :2]], -1), y),
        "vectors": (x[:, 0, 0], y),
        "nan_inputs": (np.where(x > 2, np.nan, x), y),
        "infinite": (np.where(x > 2, np.inf, x), y),
        "none": (x[:0], y[:0]),
        "one": (x[:1], y[:1]),
        "unequal": (x, y[:5]),
        "texts": (x, np.array(list("abcabcabcabc"))),
        "complex": (x.astype("c8"), y),
        "dates": (x, y.astype("M8[s]")),
    }
    for name, (inputs, labels) in arrays.items():
        np.savez(folder / f"{name}.npz", x=inputs, y=labels)
    np.savez(folder / "other_names.npz", a=x)
    (folder / "broken.npz").write_bytes((folder / "good.npz").read_bytes()[:500])
    (folder / "bare.npy").write_bytes(b"\x93NUMPY")
    _write_images(folder / "images")
    np.savez(folder / "objects.npz", x=np.array([Payload()] * 12, dtype=object), y=y)
    hostile = [
        "images",
        "images/a",
        "images/a/wide.png",
        "digits",
        "missing.npz",
        NASTY,
        "/dev/zero",
    ]
    return [*(path.name for path in folder.glob("*.np?")), *hostile]


def _write_images(folder: Path) -> None:
    """Write an image folder in which one image claims to be huge, and one is a program."""
    from PIL import Image

    for name in ("a", "b", NASTY):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / name / "good.png")
    whole = (folder / "a" / "good.png").read_bytes()
    width = (1 << 31 - 1).to_bytes(4, "big")
    (folder / "a" / "wide.png").write_bytes(whole[:16] + width + width + whole[24:])
    (folder / "b" / "program.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(trap) (w) file closefile\n"
    )


def draw(rng: random.Random, models: list[str], data: list[str]) -> list[str]:
    """Return the words of one command line."""
    model = rng.choice(models) if rng.random() < 0.5 else rng.choice(models[:6])
    command = rng.choice(
        ["sites", "lint", "phases", "diagnose", "recalibrate", "set-momentum", "freeze", "convert",
         "fold", "fit", "rule", "cache", "env", "merge-statistics", "compare", "report",
         "experiment", NASTY]
    )  # fmt: skip
    words = [command]
    if command == "report":
        odd = sorted(path.name for path in Path().glob("odd*.json"))
        reports = ["report.json", "half.json", "missing.json", "fifo.npz", "/dev/zero", *odd]
        return [*words, "compare", rng.choice(reports), rng.choice(reports)]
    if command == "experiment":
        words += [rng.choice(["overfit", "transfer", NASTY]), "--data", rng.choice(data)]
        words += ["--classes", rng.choice(["0,no_such", NASTY]), "-o", "runs", "--weights", "none"]
        return [*words, "--image-size", rng.choice(["8", "9", "200000", "x"]), "--per-class", "1"]
    if command == "merge-statistics":
        words += rng.choices(models, k=rng.choice([1, 2, 2, 2, 3]))
        words += rng.choice([[], ["--weights", rng.choice(["1,2", "0,0", "-1,2", "nan,1", "x"])]])
        return [*words, "-o", rng.choice(["out.pt", "out.keras", "out.safetensors", "images"])]
    if command == "rule":
        return [*words, *rng.sample(["FL203", "FL999", NASTY, "--all", "--format", "json"], 2)]
    if command == "cache":
        return [*words, rng.choice(["ls", "verify", "rm"]), "--cache", rng.choice(["c", NASTY])]
    if command == "env":
        return words
    words.append(model)
    if command in ("phases", "diagnose", "recalibrate", "fit", "compare"):
        words.append(rng.choice(data))
    if command == "set-momentum":
        words.append(rng.choice(["0.9", "1", "0", "-1", "nan", "inf", "x", "1e-400"]))
    if command in ("recalibrate", "set-momentum", "freeze", "convert", "fold", "fit"):
        targets = ["out.keras", "out.h5", "out.txt", "no/out.keras", "images", NASTY + ".keras",
                   "out.pt", "/dev/full", "loop.keras", "net.keras"]  # fmt: skip
        words += ["-o", rng.choice(targets)]
    if command == "freeze":
        words += ["--until", rng.choice(["head", "bn", "0.5", "99", "-1", "nan", "inf", NASTY])]
    options = {
        "--batch-size": ["1", "2", "5", "100000000000", "0", "x"],
        "--seed": ["0", "7", "99999999999999999999", "-1"],
        "--sites": ["all", "frozen", "unfrozen", "bn", "*", NASTY, ""],
        "--method": ["batch", "sequential", "other"],
        "--loss": ["mse", "hinge", "no_such", NASTY, "sparse_categorical_crossentropy", "a:b", ""],
        "--format": ["text", "json", "html", "github", "x"],
        "--select": ["FL1", "FL204", "x", NASTY],
        "--ignore": ["FL2", "x"],
        "--max-samples": ["2", "5", "1", "99999999999"],
        "--per-class": ["1", "2", "999999999999"],
        "--image-size": ["8", "1", "200000"],
        "--classes": ["0", "1,2", "x", NASTY],
        "--preprocess": ["unit", "none", "resnet50", "x", NASTY],
        "--split": ["train", "test", "all", "x"],
        "--validation": ["good.npz", "one_hot.npz", "missing.npz"],
        "--reference": ["net.keras", "regression.keras", "half.keras"],
        "--history": ["leaves.py", "missing.csv", "."],
        "--version": ["2.2.4", "9.9", NASTY],
        "--policy": ["batch", "inference", "update", "x"],
        "--validation-split": ["0.1", "0.99", "nan", "-1"],
        "--learning-rate": ["0.1", "0", "nan", "inf", "-1"],
        "--epochs": ["1", "0"],
        "--dtype": ["float16", "bfloat16", "x"],
        "--engine": ["keras", "x", NASTY],
        "--max-gb": ["1", "0", "nan", "-1"],
        "--thaw-later": ["bn", "0", "9", NASTY],
    }
    options |= {
        "--until": ["head", "bn", "x", NASTY],
        "--treatments": ["thawed", "all-bn-frozen", "x", NASTY],
        "--seeds": ["1", "0", "99999999999"],
        "--metric": ["accuracy", "loss", "x"],
    }
    known = {
        "lint": ["--format", "--select", "--ignore"],
        "sites": ["--format"],
        "phases": ["--batch-size", "--seed", "--loss", "--format", "--per-class", "--image-size",
                   "--classes", "--preprocess", "--split"],
        "convert": ["--version", "--policy"],
        "set-momentum": ["--sites"],
        "freeze": ["--seed"],
        "fold": ["--format"],
    }  # fmt: skip
    known["recalibrate"] = [*known["phases"], "--sites", "--method"]
    known["diagnose"] = [*known["phases"], *known["lint"], "--max-samples", "--validation",
                         "--reference", "--history"]  # fmt: skip
    known["fit"] = ["--batch-size", "--seed", "--validation-split", "--learning-rate", "--epochs",
                    "--dtype", "--engine", "--max-gb", "--thaw-later"]  # fmt: skip
    known["compare"] = [*known["fit"][:5], "--loss", "--engine", "--until", "--treatments",
                        "--seeds", "--metric", "--format", "--validation"]  # fmt: skip
    allowed = known.get(command, [])
    if command == "compare":
        words += ["--epochs", "1", "--seeds", "1"]
    for option in rng.sample(allowed, min(len(allowed), rng.choice([0, 0, 1, 1, 2]))):
        words += [option, rng.choice(options[option])]
    if command in ("fit", "compare"):
        words += ["--cache", "c"]
    return words


def run(words: list[str], outcome: Outcome) -> None:
    """Run one command line in this process, in the current folder, and judge it."""
    from frostline import cli

    before = _files()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out, err = io.StringIO(), io.StringIO()
    started = time.perf_counter()
    code: int | None = None
    said: list[str] = []
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _limited():
            code = cli.main(words)
    except TimeoutError:
        said.append("hang")
    except BaseException as error:
        said.append(f"escaped: {type(error).__name__}")
    text = out.getvalue() + err.getvalue()
    left = _files() - before
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > max(peak, MOST_KILOBYTES):
        said.append("over 2 GB")
    if "Traceback" in text:
        said.append("traceback")
    if "(unexpected" in text:
        said.append("unexpected")
    if time.perf_counter() - started > LONGEST:
        said.append("hang")
    if any(not c.isprintable() and c not in "\n\xa0" for c in text):
        said.append("raw escape")
    cache = {name for name in left if Path(name).parts[0] == "c"}
    if (code not in (0, 1) and left - cache) or any(
        name.startswith(TEMPORARY) and OF_TENSORFLOW not in name for name in left
    ):
        said.append("files left")
    if TRAP in left:
        said.append("payload ran")
    outcome.runs += 1
    outcome.codes[-1 if code is None else code] += 1
    last = (err.getvalue().strip().splitlines() or [""])[-1]
    for kind in said:
        outcome.failures.setdefault(kind, []).append(f"{shlex.join(words)}\n      {last[:300]!r}")
    for name in left - cache:
        Path(name).unlink(missing_ok=True)


def _files() -> set[str]:
    """Return the files below the current folder, the temporary ones included."""
    return {os.path.relpath(Path(top, name)) for top, _, names in os.walk(".") for name in names}


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(runs: int, seed: int) -> Outcome:
    """Run ``runs`` command lines in a temporary folder; the same ones for the same seed."""
    outcome = Outcome()
    came_from, path = Path.cwd(), list(sys.path)
    with tempfile.TemporaryDirectory() as name:
        models, data = write_inputs(Path(name))
        os.chdir(name)
        try:
            rng = random.Random(seed)
            Path(TEMPORARY).mkdir()
            tempfile.tempdir = str(Path(TEMPORARY).resolve())
            for _ in range(runs):
                run(draw(rng, sorted(models), sorted(data)), outcome)
        finally:
            tempfile.tempdir = None
            os.chdir(came_from)
            sys.path[:] = path
    return outcome


def main() -> int:
    """Fuzz, print, and return 1 when anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcome = fuzz(options.runs, options.seed)
    print(f"{outcome.runs} runs, exit codes {dict(sorted(outcome.codes.items()))}")
    for kind, lines in outcome.failures.items():
        print(f"{kind}: {len(lines)}")
        for line in lines:
            print(f"    {line}")
    return int(bool(outcome.failures))


if __name__ == "__main__":
    sys.exit(main())
