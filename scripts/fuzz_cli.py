"""Run many command lines on broken, hostile and ordinary input, and count what must not happen.

    KERAS_BACKEND=torch python scripts/fuzz_cli.py --runs 10000 --seed 0 --json fuzz.json

Counted are tracebacks, errors that nobody foresaw ("unexpected"), runs over 30 seconds or 2 GB,
crashes, files left behind by a run that failed (in the folder for temporary files by any run),
inputs that were changed, characters that a terminal would obey, and payloads that ran. Each failure
is printed as a command line; with the same seed the inputs are the same.

Commands and options are read off the program, so that a new one is tried without being named here.
A third of the lines is sound, a third has something odd now and then, a third in every second
place. Each line runs in a process of its own, which is forked from one that has imported what
command lines import and has computed nothing: so a line costs what it does, its output is what a
terminal would get, C libraries' included, and memory, crashes and files are its own. Seconds are
those that the process ran or slept, not those that it waited for a processor.

``--again FILE`` runs the failures of an earlier record again instead of drawing lines.
``--found FOLDER`` shortens each line that failed, and writes it to a file there;
``tests/slow/hostile`` runs those in its folder ``found`` again.
"""

from __future__ import annotations

import argparse
import atexit
import hashlib
import importlib
import importlib.util
import json
import os
import pickle
import random
import select
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import weakref
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import source_state

LONGEST = 30
MOST_KILOBYTES = 2 << 20
NASTY = "a\x1b[31mred\x1b]0;t\x07\u202eb\r[bold]"
TRAP = "trap"
TEMPORARY = "temporary"
CACHE = "c"
#: TensorFlow writes such files while it traces and removes them when the process ends.
OF_TENSORFLOW = "__autograph_generated_file"
#: Exit code of a run that an exception left.
ESCAPED = 70


@dataclass
class Outcome:
    """What the runs showed: exit codes, costs, and each kind of failure with its command lines."""

    runs: int = 0
    seconds: float = 0.0
    codes: Counter[int] = field(default_factory=Counter)
    #: Command -> how many lines, and how many of these ended with 0 or 1.
    commands: Counter[str] = field(default_factory=Counter)
    completed: Counter[str] = field(default_factory=Counter)
    longest_seconds: float = 0.0
    most_megabytes: int = 0
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
    if importlib.util.find_spec("torch") is not None:
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
        "channels_first": (np.ascontiguousarray(x.transpose(0, 3, 1, 2)), y),
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


#: Models with data that they take.
PAIRS = (
    ("net.keras", "good.npz"),
    ("net.keras", "images"),
    ("frozen.keras", "good.npz"),
    ("net.h5", "good.npz"),
    ("onehot.keras", "one_hot.npz"),
    ("regression.keras", "flat.npz"),
    ("modules:net", "channels_first.npz"),
)

#: Option or argument -> values that are sound, and values that are not.
VALUES: dict[str, tuple[list[str], list[str]]] = {
    "--actors": (["1"], ["0", "x"]),
    "--at": (["bn", "0.5"], ["head", "x", NASTY]),
    "--backend": ([os.environ.get("KERAS_BACKEND", "torch")], ["x", NASTY]),
    "--batch-size": (["2", "5", "32"], ["1", "100000000000", "0", "x"]),
    "--boundaries": (["bn", "conv,bn"], ["x", NASTY, ""]),
    "--classes": (["0,1", "a,b"], ["0", "1,2", "x", NASTY]),
    "--data": (["digits"], ["images", "good.npz", "missing.npz", NASTY]),
    "--dtype": (["float32", "float16"], ["bfloat16", "x"]),
    "--engine": (["keras", "auto"], ["onnx", "openvino", "x", NASTY]),
    "--epochs": (["1"], ["0", "x"]),
    "--export": (["out.parquet"], ["no/out.parquet", "/dev/full", "net.keras", NASTY]),
    "--format": (["text", "json"], ["html", "github", "sarif", "x"]),
    "--history": ([], ["leaves.py", "missing.csv", ".", "report.json", "fifo.npz"]),
    "--ignore": (["FL2", "FL204"], ["x", NASTY]),
    "--image-size": (["8", "9"], ["1", "200000", "x"]),
    "--learning-rate": (["0.1"], ["0", "nan", "inf", "-1"]),
    "--loss": (
        ["sparse_categorical_crossentropy", "mse"],
        ["hinge", "no_such", NASTY, "a:b", "leaves:build", ""],
    ),
    "--max-gb": (["1"], ["0", "nan", "-1"]),
    "--max-samples": (["5", "12"], ["2", "1", "99999999999"]),
    "--method": (["batch", "sequential"], ["other"]),
    "--metric": (["accuracy", "loss"], ["x", NASTY]),
    "--optimizer": (["sgd", "adam"], ["x", NASTY, "leaves:build"]),
    "--per-class": (["2", "3"], ["1", "999999999999"]),
    "--policy": (["batch", "inference"], ["update", "x"]),
    "--preprocess": (["unit", "none"], ["resnet50", "x", NASTY]),
    "--reference": (["net.keras"], ["regression.keras", "half.keras", "payload.pt", "fifo.npz"]),
    "--rows": ([], ["x", NASTY]),
    "--seed": (["0", "7"], ["99999999999999999999", "-1"]),
    "--seeds": (["1"], ["0", "99999999999", "x"]),
    "--select": (["FL1", "FL204"], ["x", NASTY]),
    "--sites": (["all", "bn"], ["frozen", "unfrozen", "*", NASTY, ""]),
    "--split": (["all"], ["train", "test", "x"]),
    "--state": ([], ["state.pt", "payload.pt", "nan.pt", "net.keras", "/dev/zero", "missing.pt"]),
    "--thaw-later": ([], ["bn", "0", "9", NASTY]),
    "--treatments": (["thawed", "all-bn-frozen"], ["x", NASTY]),
    "--until": (["head", "bn"], ["0.5", "99", "-1", "nan", "inf", "x", NASTY]),
    "--validation": (["good.npz"], ["one_hot.npz", "missing.npz"]),
    "--validation-split": (["0.25", "0.5"], ["0.99", "nan", "-1"]),
    "--version": (["2.2.4", "2.15"], ["9.9", NASTY]),
    "--weights": (["1,2"], ["0,0", "-1,2", "nan,1", "x"]),
    "after": (["report.json"], ["half.json", "missing.json", "fifo.npz", "/dev/zero"]),
    "before": (["report.json"], ["half.json", "missing.json", "fifo.npz", "/dev/zero"]),
    "ids": (["x"], [NASTY, "..", "/", ""]),
    "momentum": (["0.9", "0.5"], ["1", "0", "-1", "nan", "inf", "x", "1e-400"]),
    "reference": (["FL203", "FL204"], ["FL999", NASTY, ""]),
}
#: What the two experiments are asked for: they stop before they train, which takes minutes.
OF_EXPERIMENTS = {
    "--classes": ([], ["0,no_such", NASTY]),
    "--weights": (["none"], ["missing.h5", NASTY]),
    "--backbone": ([], ["x", NASTY, "leaves:build"]),
}
#: What an option without values of its own is tried with.
ANY: tuple[list[str], list[str]] = ([], ["1", "0", "x", "-1", "nan", NASTY, ""])
#: Where commands write, by what they write.
OUTPUTS = {
    "model": ["out.keras", "out.h5", "out.pt"],
    "report": ["out.json", "out.html"],
    "folder": ["out"],
}
REPORTS = ("lint", "diagnose", "compare", "report compare")
FOLDERS = ("demo", "experiment overfit", "experiment transfer")
ODD_OUTPUTS = ["out.txt", "no/out.keras", "images", NASTY + ".keras", "out.safetensors",
               "/dev/full", "loop.keras", "net.keras", "half.json"]  # fmt: skip
#: Options of commands that start servers of their own, which outlive the line.
LEFT_OUT = ("--ray", "--help")
#: Command -> its share of the lines, where that is not 1: these train.
SHARES = {"compare": 0.5, "demo": 0.02, "experiment overfit": 0.3, "experiment transfer": 0.3}
#: What makes training short; an odd value may follow and win.
SHORT = {"fit": ["--epochs", "1"], "compare": ["--epochs", "1", "--seeds", "1"]}


@cache
def commands() -> dict[str, list[Any]]:
    """Command, as it is typed -> its parameters, read off the program."""
    import typer

    from frostline.cli import app

    def leaves(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, list[Any]]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield " ".join(path), list(command.params)
            return
        for name, each in sorted(inner.items()):
            yield from leaves(each, (*path, name))

    return dict(leaves(typer.main.get_command(app), ()))


def draw(rng: random.Random, models: list[str], data: list[str]) -> list[str]:
    """Return the words of one command line."""
    oddness = rng.choice([0.0, 0.1, 0.5])

    def odd() -> bool:
        return rng.random() < oddness

    def of(sound: list[str], strange: list[str]) -> str:
        return rng.choice(strange if not sound or (strange and odd()) else sound)

    names = sorted(commands())
    (command,) = rng.choices(names, [SHARES.get(name, 1.0) for name in names])
    if rng.random() < oddness / 10:
        return [NASTY, command]
    model, matching = rng.choice(PAIRS)
    if odd():
        model = rng.choice(models)
    if odd():
        matching = rng.choice(data)
    table = VALUES | (OF_EXPERIMENTS if command.startswith("experiment") else {})
    kind = "report" if command in REPORTS else "folder" if command in FOLDERS else "model"
    table["-o"] = (OUTPUTS[kind], ODD_OUTPUTS)
    table["model"] = ([model], [])
    table["data"] = ([matching], [])
    if command.startswith("report"):
        broken = sorted(path.name for path in Path().glob("odd*.json"))
        table["before"] = table["after"] = (["report.json"], [*table["before"][1], *broken])
    words = command.split()
    words += SHORT.get(command, [])
    options = []
    for each in commands()[command]:
        name = each.opts[0]
        if each.param_type_name == "argument":
            if name == "replicas":
                words += [of(["net.keras", "frozen.keras"], models) for _ in range(of_two(rng))]
            elif each.required or rng.random() < 0.5:
                words.append(of(*table.get(name, ANY)))
        elif each.required:
            words += [] if rng.random() < oddness / 5 else [name, of(*table.get(name, ANY))]
        elif name == "--cache":
            words += [name, of([CACHE], [NASTY, "images", "good.npz", "/dev/null"])]
        elif name not in LEFT_OUT:
            options.append(each)
    if command == "demo":  # into a file: what works takes minutes, as the help says
        words += ["-o", "net.keras"]
        options = [each for each in options if each.opts[0] != "-o"]
    if command.startswith("experiment"):
        words += ["--weights", "none", "-o", "out"]
        words += ["--classes", rng.choice(["0,no_such", NASTY])]
    for each in rng.sample(options, min(len(options), rng.choice([0, 0, 1, 1, 2, 3]))):
        name = each.opts[0]
        sound, strange = table.get(name, ANY)
        if getattr(each, "is_flag", False):
            words.append(name)
        elif sound or oddness:
            words += [name, of(sound, strange)]
    return words


def of_two(rng: random.Random) -> int:
    """How many files: mostly two."""
    return rng.choice([1, 2, 2, 2, 3])


# --- one line, in a process of its own ------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one line did."""

    code: int
    text: str
    last: str
    kinds: tuple[str, ...]
    seconds: float
    megabytes: int


def run(words: list[str]) -> Run:
    """Run one command line in the current folder, judge it, and remove what it wrote."""
    before = _files()
    with tempfile.TemporaryFile("w+b", dir="/tmp") as out, \
         tempfile.TemporaryFile("w+b", dir="/tmp") as err:  # fmt: skip
        process = _forked(lambda: _command(words), out.fileno(), err.fileno())
        status, seconds, kilobytes, late = _waited(process)
        said = []
        for stream in (out, err):
            stream.seek(0)
            said.append(stream.read().decode(errors="backslashreplace"))
    text = "".join(said)
    after = _files()
    left = {name for name in after if name not in before}
    changed = {name for name in before if after.get(name) != before[name]}
    code = os.waitstatus_to_exitcode(status)
    kinds = {
        "hang": late,
        "crash": code < 0 and not late,
        "escaped": code == ESCAPED,
        "over 2 GB": kilobytes > MOST_KILOBYTES,
        "traceback": "Traceback" in text,
        "unexpected": "(unexpected" in text,
        "raw escape": any(not c.isprintable() and c not in "\n\xa0" for c in text),
        "files left": bool(_not_wanted(left, code)),
        "input changed": any(Path(name).parts[0] != CACHE for name in changed)
        and "--force" not in words,
        "payload ran": TRAP in left,
    }
    _tidy(before)
    last = (said[1].strip().splitlines() or [""])[-1]
    found = tuple(kind for kind, there in kinds.items() if there)
    return Run(code, text, last[:300], found, seconds, kilobytes >> 10)


def _command(words: list[str]) -> int:
    from frostline.cli import application

    sys.argv = ["frostline", *words]
    return application.run()


def _forked(act: Callable[[], int], out: int, err: int) -> int:
    """Run ``act`` in a child whose output goes to two files, and return its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _ended(act, out, err)
    return child


def _ended(act: Callable[[], int], out: int, err: int) -> NoReturn:
    """In the child: act, clean up as the interpreter does when it ends, and end."""
    code = ESCAPED
    try:
        atexit._clear()  # what the parent has to clean up is not ours
        weakref.finalize._registry.clear()  # type: ignore[attr-defined]
        weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
        for number, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, err)):
            os.dup2(target, number)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        code = act()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        code = ESCAPED
        with suppress(Exception):
            os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _waited(process: int) -> tuple[int, float, int, bool]:
    """Wait for a process; return its status, seconds, kilobytes, and whether it was too late."""
    started = time.monotonic()
    descriptor = os.pidfd_open(process)
    seconds, late = 0.0, False
    try:
        while True:
            ended = select.select([descriptor], [], [], 1.0)[0]
            seconds = time.monotonic() - started - _unscheduled(process)
            if ended:
                break
            if seconds > LONGEST and not late:
                late = True
                os.kill(process, signal.SIGKILL)
    finally:
        os.close(descriptor)
    _, status, usage = os.wait4(process, 0)
    return status, seconds, usage.ru_maxrss, late or seconds > LONGEST


def _unscheduled(process: int) -> float:
    """Seconds that a process could have run, but others had the processor."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _files() -> dict[str, tuple[int, int]]:
    """Files below the current folder, with size and time of change; links are not followed."""
    found = {}
    for top, _, names in os.walk("."):
        for name in names:
            path = Path(top, name)
            with suppress(FileNotFoundError):
                facts = path.lstat()
                found[os.path.relpath(path)] = (facts.st_size, facts.st_mtime_ns)
    return found


def _not_wanted(left: set[str], code: int) -> set[str]:
    """Files that should not be there."""
    return {
        name
        for name in left
        if (name.startswith(TEMPORARY) and OF_TENSORFLOW not in name)
        or (code not in (0, 1) and Path(name).parts[0] != CACHE)
    }


def _tidy(before: dict[str, tuple[int, int]]) -> None:
    """Remove what a line wrote; the cache stays, so that the next line finds it."""
    for name in _files().keys() - before.keys():
        if Path(name).parts[0] != CACHE:
            Path(name).unlink(missing_ok=True)
    for top, folders, names in os.walk(".", topdown=False):
        if not folders and not names and Path(top).parts[:1] not in ((), (CACHE,), (TEMPORARY,)):
            shutil.rmtree(top, ignore_errors=True)


# --- many of them ---------------------------------------------------------------------------------


def fuzz(
    runs: int,
    seed: int,
    *,
    lines: Sequence[list[str]] | None = None,
    found: Path | None = None,
    told: Callable[[Outcome], None] = lambda _: None,
) -> Outcome:
    """Run ``runs`` command lines in a temporary folder; the same ones for the same seed.

    Args:
        runs: How many.
        seed: Of the lines.
        lines: Words of these lines instead, each once.
        found: Folder for lines that failed, shortened, one file each.
        told: Is given the outcome so far now and then, and at the end.
    """
    outcome = Outcome()
    with hostile_folder() as (models, data):
        rng = random.Random(seed)
        started = time.monotonic()
        drawn = (draw(rng, models, data) for _ in range(runs))
        for words in drawn if lines is None else lines:
            kept = {name: Path(name).read_bytes() for name in ("net.keras", "half.json")}
            ran = run(words)
            if "--force" in words:  # it may have replaced an input
                for name, content in kept.items():
                    Path(name).write_bytes(content)
            _count(outcome, words, ran)
            outcome.seconds = time.monotonic() - started
            if found is not None:
                for kind in ran.kinds:
                    _write_found(shortened(words, kind), kind, found)
            if outcome.runs % 50 == 0:
                told(outcome)
    told(outcome)
    return outcome


@contextmanager
def hostile_folder() -> Iterator[tuple[list[str], list[str]]]:
    """Be in a folder with models and data, whole and broken, which this process has not touched."""
    came_from = Path.cwd()
    caches = os.environ.get("FROSTLINE_CACHE_DIR")
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            listed = Path(name, "listed.json")
            modules = Path(name, "modules.json")
            _there(lambda: listed.write_text(json.dumps(write_inputs(Path()))) and 0)
            _there(lambda: modules.write_text(json.dumps(_imported())) and 0)
            for module in json.loads(modules.read_text()):
                with suppress(Exception):
                    importlib.import_module(module)
            models, data = json.loads(listed.read_text())
            listed.unlink()
            modules.unlink()
            Path(TEMPORARY).mkdir()
            os.environ["FROSTLINE_CACHE_DIR"] = str(Path(CACHE).resolve())
            tempfile.tempdir = str(Path(TEMPORARY).resolve())
            yield sorted(models), sorted(data)
        finally:
            tempfile.tempdir = None
            os.environ.pop("FROSTLINE_CACHE_DIR", None)
            if caches is not None:
                os.environ["FROSTLINE_CACHE_DIR"] = caches
            os.chdir(came_from)


def _there(act: Callable[[], int]) -> None:
    """Do something in a child, so that this process computes nothing."""
    with tempfile.TemporaryFile("w+") as said:
        _, status = os.waitpid(_forked(act, said.fileno(), said.fileno()), 0)
        if status:
            said.seek(0)
            code = os.waitstatus_to_exitcode(status)
            raise RuntimeError(f"could not prepare (exit code {code}): {said.read()[-2000:]}")


def _imported() -> list[str]:
    """Modules that usual lines import, in their order; the lines write nothing."""
    known = set(sys.modules)
    for words in (
        ["phases", "net.keras", "good.npz"], ["diagnose", "net.keras", "digits"],
        ["sites", "net.h5"], ["phases", "modules:net", "channels_first.npz"],
        ["sites", "net.pt2"], ["sites", "whole.pt"], ["lint", "modules:net"],
        ["fit", "missing.keras", "good.npz", "-o", "x.keras"], ["env"],
    ):  # fmt: skip
        _command(words)
    return [name for name in sys.modules if name not in known and name not in ("modules", "leaves")]


def _count(outcome: Outcome, words: list[str], ran: Run) -> None:
    outcome.runs += 1
    outcome.codes[ran.code] += 1
    name = next((each for each in commands() if words[: len(each.split())] == each.split()), "none")
    outcome.commands[name] += 1
    outcome.completed[name] += ran.code in (0, 1)
    outcome.longest_seconds = max(outcome.longest_seconds, round(ran.seconds, 2))
    outcome.most_megabytes = max(outcome.most_megabytes, ran.megabytes)
    for kind in ran.kinds:
        outcome.failures.setdefault(kind, []).append(f"{shlex.join(words)}\n      {ran.last!r}")


def failed(record: Path) -> list[list[str]]:
    """Words of the lines that failed in an earlier run."""
    kinds = json.loads(record.read_text())["lines"].values()
    return [shlex.split(line.split("\n")[0]) for lines in kinds for line in lines]


def shortened(words: list[str], kind: str) -> list[str]:
    """The line without every word, and pair of words, that the failure does not need."""
    for at in reversed(range(1, len(words))):
        for width in (2, 1):
            fewer = words[:at] + words[at + width :]
            if kind in run(fewer).kinds:
                words = fewer
                break
    return words


def _write_found(words: list[str], kind: str, folder: Path) -> None:
    text = json.dumps({"kind": kind, "words": words}, indent=2) + "\n"
    name = f"{kind.replace(' ', '-')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def main() -> int:
    """Fuzz, print, and return 1 when anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the counts, written while it runs")
    parser.add_argument("--again", type=Path, help="record whose failures to run again")
    parser.add_argument("--found", type=Path, help="folder for failures, shortened")
    options = parser.parse_args()
    found = None if options.found is None else options.found.resolve()
    place = None if options.json is None else options.json.resolve()

    def write(outcome: Outcome) -> None:
        if place is not None:
            place.write_text(json.dumps(_record(outcome, options.seed), indent=2) + "\n")

    again = None if options.again is None else failed(options.again)
    outcome = fuzz(options.runs, options.seed, lines=again, found=found, told=write)
    print(f"{outcome.runs} runs, exit codes {dict(sorted(outcome.codes.items()))}")
    print(f"longest {outcome.longest_seconds} s, largest {outcome.most_megabytes} MB")
    for kind, lines in outcome.failures.items():
        print(f"{kind}: {len(lines)}")
        for line in lines:
            print(f"    {line}")
    return int(bool(outcome.failures))


def _record(outcome: Outcome, seed: int) -> dict[str, Any]:
    from frostline import environment

    facts = environment.facts()
    return {
        "backend": os.environ.get("KERAS_BACKEND"),
        "python": facts["python"],
        "versions": facts["versions"],
        "sources": source_state.digest(),
        "runs": outcome.runs,
        "seed": seed,
        "seconds": round(outcome.seconds),
        "codes": {str(code): count for code, count in sorted(outcome.codes.items())},
        "commands": {
            name: {"lines": count, "ended with 0 or 1": outcome.completed[name]}
            for name, count in sorted(outcome.commands.items())
        },
        "longest_seconds": outcome.longest_seconds,
        "most_megabytes": outcome.most_megabytes,
        "failures": {kind: len(lines) for kind, lines in outcome.failures.items()},
        "lines": outcome.failures,
    }


if __name__ == "__main__":
    sys.exit(main())
