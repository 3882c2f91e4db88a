"""Files that were sent by someone else: nothing in them runs, nothing in them takes the machine.

Each payload would write a file named ``trap``. Sizes are declared, never there.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import stat
import struct
import subprocess
import sys
import time
import warnings
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import frostline as fl
from frostline import cli, environment

keras = pytest.importorskip("keras")
h5py = pytest.importorskip("h5py")

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in both forms, and data for it."""
    folder = tmp_path_factory.mktemp("sound")
    layers = keras.layers
    net = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(2, 3, name="conv"),
            layers.BatchNormalization(name="bn"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax", name="head"),
        ]
    )
    net.compile("sgd", keras.losses.SparseCategoricalCrossentropy())
    net.save(folder / "net.keras")
    net.save(folder / "net.h5")
    rng = np.random.default_rng(0)
    np.savez(folder / "data.npz", x=rng.normal(size=(12, 8, 8, 3)), y=np.arange(12) % 3)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """Run, and return the one line of complaint."""
    before = {path.name for path in Path.cwd().rglob("*")}
    started = time.perf_counter()
    code = cli.main([str(word) for word in words])
    took = time.perf_counter() - started
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), (out, err)
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert "unexpected" not in line
    assert line.isprintable()
    assert took < 5
    assert {path.name for path in Path.cwd().rglob("*")} == before
    return line


class Trap:
    """Unpickled, it writes a file."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("trap"),))


# --- no code from files ---------------------------------------------------------------------------


def edited(source: Path, target: Path, edit: Any) -> Path:
    """Write a copy of a ``.keras`` file whose configuration is changed by ``edit``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                config = json.loads(content)
                edit(config)
                content = json.dumps(config).encode()
            new.writestr(name, content)
    return target


def layer_of(config: dict[str, Any], name: str) -> dict[str, Any]:
    return next(x for x in config["config"]["layers"] if x["config"].get("name") == name)


def torch_wrapper() -> dict[str, Any]:
    stolen = {"class_name": "__bytes__", "config": {"value": pickle.dumps(Trap()).hex()}}
    return {
        "module": "keras.layers", "class_name": "TorchModuleWrapper", "registered_name": None,
        "config": {"name": "w", "module": stolen, "output_shape": None},
    }  # fmt: skip


PAYLOADS = {
    "function of another module": {
        "module": "pathlib", "class_name": "function", "config": "Path", "registered_name": "Path",
    },
    "callable as class": {
        "module": "os", "class_name": "mkdir", "config": {"path": "trap"}, "registered_name": "x",
    },
    "builtin as class": {
        "module": "builtins", "class_name": "open", "config": {"file": "trap", "mode": "w"},
        "registered_name": "open",
    },
    "download as layer": {
        "module": "keras.utils", "class_name": "get_file", "registered_name": "get_file",
        "config": {"fname": "trap", "origin": "file:///etc/hostname", "cache_dir": "."},
    },
    "safe mode off": {
        "module": "keras.config", "class_name": "enable_unsafe_deserialization", "config": {},
        "registered_name": "enable_unsafe_deserialization",
    },
    "lambda": {
        "module": "keras.layers", "class_name": "Lambda", "registered_name": None,
        "config": {"name": "l", "function": {"class_name": "__lambda__", "config": {"code": "4w"}}},
    },
    "saved model": {
        "module": "keras.layers", "class_name": "TFSMLayer", "registered_name": None,
        "config": {"name": "t", "filepath": "saved"},
    },
    "module that is not loaded": {
        "module": "planted", "class_name": "Layer", "config": {}, "registered_name": "p>Layer",
    },
    "tensorflow function": {
        "class_name": "__typespec__", "spec_name": "io.write_file", "module": "tensorflow",
        "config": ["trap", "x"], "registered_name": None,
    },
    "vocabulary of another file": {
        "module": "keras.layers", "class_name": "StringLookup", "registered_name": None,
        "config": {"name": "s", "vocabulary": "/etc/hostname"},
    },
    "torch module": torch_wrapper(),
}  # fmt: skip


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS.keys())
@pytest.mark.parametrize("place", ["layer", "activation", "compile"])
def test_keras_files_hold_no_code(
    payload: dict[str, Any], place: str, sound: Path, here: Path, capsys: Any
) -> None:
    (here / "planted.py").write_text("open('trap', 'w')")

    def edit(config: dict[str, Any]) -> None:
        if place == "layer":
            config["config"]["layers"].insert(1, payload)
        elif place == "activation":
            layer_of(config, "head")["config"]["activation"] = payload
        else:
            config["compile_config"]["loss"] = payload

    edited(sound / "net.keras", here / "bad.keras", edit)
    assert "bad.keras" in refused(capsys, "sites", "bad.keras")
    assert not (here / "trap").exists()


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS.keys())
def test_h5_files_hold_no_code(
    payload: dict[str, Any], sound: Path, here: Path, capsys: Any
) -> None:
    (here / "planted.py").write_text("open('trap', 'w')")
    (here / "bad.h5").write_bytes((sound / "net.h5").read_bytes())
    with h5py.File("bad.h5", "r+") as file:
        config = json.loads(file.attrs["model_config"])
        layer_of(config, "head")["config"]["activation"] = payload
        file.attrs["model_config"] = json.dumps(config)
    assert "bad.h5" in refused(capsys, "sites", "bad.h5")
    # In its compile state it costs the file that state, and no more.
    (here / "loss.h5").write_bytes((sound / "net.h5").read_bytes())
    with h5py.File("loss.h5", "r+") as file:
        config = json.loads(file.attrs["training_config"])
        config["loss"] = payload
        file.attrs["training_config"] = json.dumps(config)
    assert cli.main(["sites", "loss.h5"]) == 0
    assert not (here / "trap").exists()


@pytest.mark.parametrize("version", ["2.15.0", "3.8.0", "3.11.3"])
def test_a_keras_in_which_files_run_code_is_refused_at_the_door(
    version: str, sound: Path, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: version if name == "keras" else installed(name)
    )
    monkeypatch.setattr(
        keras.saving, "load_model", lambda *_, **__: Path("trap").touch() or pytest.fail("read")
    )
    data = sound / "data.npz"
    for words in (["sites"], ["lint"], ["phases", data], ["fit", data, "-o", "out.keras"]):
        line = refused(capsys, words[0], sound / "net.keras", *words[1:])
        assert f"Keras {version} is too old" in line
        assert "3.12 or newer" in line
    monkeypatch.undo()
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    monkeypatch.setattr(keras, "__version__", version)
    with pytest.raises(fl.BackendError, match=f"Keras {version} is too old"):
        fl.sites(model)


def test_the_oldest_keras_is_the_one_that_is_installed_with_frostline() -> None:
    wanted = ".".join(map(str, environment.OLDEST_KERAS))
    known = [line for line in metadata.requires("frostline") or () if line.startswith("keras")]
    assert known
    assert all(line.startswith(f"keras>={wanted};") for line in known)
    assert environment.refuse_old_keras(keras.__version__) is None


def test_weights_that_lie_elsewhere(sound: Path, here: Path, capsys: Any) -> None:
    (here / "secret").write_bytes(bytes(range(24)))
    for kind in ("external", "link", "soft"):
        path = here / f"{kind}.h5"
        path.write_bytes((sound / "net.h5").read_bytes())
        with h5py.File(path, "r+") as file:
            if kind == "external":
                file.create_dataset("x", (3,), "f8", external=[("secret", 0, 24)])
            elif kind == "link":
                file["x"] = h5py.ExternalLink("secret", "/")
            else:
                file["x"] = h5py.SoftLink("/model_weights")
        assert "not read" in refused(capsys, "sites", path)


def filled(file: Any, name: str, size: int, layout: str) -> None:
    """An array without storage, of a fill value, as a library other than Keras may write it."""
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made.set_fill_value(np.ones((), "f4"))
    if layout == "chunked":
        made.set_chunk((1 << 10,))
    else:
        made.set_layout(h5py.h5d.CONTIGUOUS)
    space = h5py.h5s.create_simple((size,))
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.IEEE_F32LE, space, made)


@pytest.mark.parametrize("way", ["chunked", "contiguous", "gzip", "attributes", "virtual", "rank"])
def test_arrays_that_declare_more_than_the_file(
    sound: Path, here: Path, capsys: Any, way: str
) -> None:
    path, most = here / "huge.h5", 1 << 40
    path.write_bytes((sound / "net.h5").read_bytes())
    with h5py.File(path, "r+") as file:
        if way in ("chunked", "contiguous"):
            filled(file, "x", most, way)
        elif way == "gzip":
            file.create_dataset("x", (most,), "f8", chunks=(1 << 10,), compression="gzip")
        elif way == "attributes":  # a header that is longer than those of Keras
            filled(file, "x", most, "contiguous")
            for number in range(40):
                file["x"].attrs[f"a{number}"] = "long" * 20
        elif way == "virtual":
            layout = h5py.VirtualLayout((most,), "f8")
            layout[:3] = h5py.VirtualSource("secret.h5", "y", (3,))
            file.create_virtual_dataset("x", layout)
        else:
            filled(file, "x", 1, "contiguous")
            file.create_dataset("y", (1 << 20,) * 3, "f4", chunks=(1 << 4,) * 3)
    line = refused(capsys, "sites", path)
    assert ("another file" if way == "virtual" else "declares") in line


@pytest.mark.parametrize("place", ["space", "layout", "both", "address"])
def test_headers_of_arrays_that_lie(sound: Path, here: Path, capsys: Any, place: str) -> None:
    content = bytearray((sound / "net.h5").read_bytes())
    with h5py.File(sound / "net.h5") as file:
        found = next(name for name in ("gamma", "beta") if name in str(_names(file)))
        name = next(name for name in _names(file) if name.endswith(found))
        header, start = h5py.h5o.get_info(file[name].id).addr, file[name].id.get_offset()
        size = file[name].id.get_storage_size()
    block = content[header : header + 300]
    shape = header + block.index(struct.pack("<Q", size // 4))
    layout = header + block.index(b"\x03\x01" + struct.pack("<QQ", start, size)) + 2
    if place in ("space", "both"):
        content[shape : shape + 8] = struct.pack("<Q", 1 << 40)
    if place in ("layout", "both"):
        content[layout + 8 : layout + 16] = struct.pack("<Q", 1 << 42)
    if place == "address":
        content[layout : layout + 8] = struct.pack("<Q", 1 << 50)
    path = here / "lies.h5"
    path.write_bytes(content)
    if place == "layout":  # more room than numbers: nothing larger is read
        assert cli.main(["sites", str(path)]) in (0, 2)
        return
    refused(capsys, "sites", path)


def _names(file: Any) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if hasattr(item, "shape") else None)
    return names


def test_groups_without_end(sound: Path, here: Path, capsys: Any) -> None:
    for way in ("root", "parent", "deep"):
        path = here / f"{way}.h5"
        path.write_bytes((sound / "net.h5").read_bytes())
        with h5py.File(path, "r+") as file:
            if way == "deep":
                group = file
                for _ in range(3000):
                    group = group.create_group("g")
            else:
                inner = file.create_group("a/b")
                inner["again"] = file["/" if way == "root" else "a"]
        line = refused(capsys, "sites", path)
        assert ("too deeply" if way == "deep" else "inside itself") in line


def test_sound_files_of_any_form(sound: Path, here: Path, capsys: Any) -> None:
    """A user's block at the start, and HDF5's newest form: what is not read here, HDF5 tells."""
    for name, more in (("block", {"userblock_size": 512}), ("latest", {"libver": "latest"})):
        with h5py.File(sound / "net.h5") as old, h5py.File(f"{name}.h5", "w", **more) as new:
            for key in old:
                old.copy(key, new)
            new.attrs.update(old.attrs)
        assert cli.main(["sites", f"{name}.h5"]) == 0
        capsys.readouterr()
        filled_path = here / f"{name}.h5"
        with h5py.File(filled_path, "r+") as file:
            filled(file, "x", 1 << 40, "contiguous")
        assert "declares" in refused(capsys, "sites", filled_path)


def test_npz_with_objects(sound: Path, here: Path, capsys: Any) -> None:
    np.savez("bad.npz", x=np.array([Trap()] * 3, dtype=object), y=np.zeros(3))
    line = refused(capsys, "phases", sound / "net.keras", "bad.npz")
    assert "pickled objects" in line
    assert not (here / "trap").exists()


def test_images_of_formats_that_run_programs(sound: Path, here: Path, capsys: Any) -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(trap) (w) file closefile showpage\n"
    for name in ("cat", "dog"):
        (here / "images" / name).mkdir(parents=True)
        (here / "images" / name / "0.png").write_bytes(eps)
    line = refused(capsys, "phases", sound / "net.keras", "images", "--split", "all")
    assert "0.png: not a readable image" in line
    assert not (here / "trap").exists()


# --- torch ----------------------------------------------------------------------------------------


def test_torchscript_that_runs_when_it_is_read(here: Path, capsys: Any) -> None:
    torch = pytest.importorskip("torch")

    class Sets(torch.nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.running_mean = torch.ones(2)
            self.running_var = torch.ones(2)

        def forward(self, x):  # type: ignore[no-untyped-def]
            return x

        @torch.jit.export
        def __getstate__(self):  # type: ignore[no-untyped-def]
            return self.running_mean

        @torch.jit.export
        def __setstate__(self, state: torch.Tensor):  # type: ignore[no-untyped-def]
            torch.save(state, "trap")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Sets()), "bad.pt")
        with pytest.raises(RuntimeError, match="uninitialized"):
            torch.jit.load("bad.pt")
    Path("trap").unlink()  # the payload is a live one
    assert "runs code when it is read" in refused(capsys, "sites", "bad.pt")
    assert not (here / "trap").exists()


# --- bounded before read --------------------------------------------------------------------------


def npy(shape: tuple[int, ...], content: bytes, descr: str = "<f8") -> bytes:
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    header += b" " * (63 - (len(header) + 10) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def test_headers_that_declare_more_than_is_there(sound: Path, here: Path, capsys: Any) -> None:
    for shape in ((1 << 40,), (1 << 62, 1 << 62), (-3, 8, 8, 3)):
        with zipfile.ZipFile("bad.npz", "w") as new:
            new.writestr("x.npy", npy(shape, b"\0" * 64))
            new.writestr("y.npy", npy((1,), b"\0" * 8))
        assert "declares" in refused(capsys, "phases", sound / "net.keras", "bad.npz")


def test_zip_members_that_declare_more_than_is_there(sound: Path, here: Path, capsys: Any) -> None:
    for name, source in (("bad.npz", "data.npz"), ("bad.keras", "net.keras")):
        with zipfile.ZipFile(sound / source) as old, zipfile.ZipFile(name, "w") as new:
            for member in old.namelist():
                new.writestr(member, old.read(member))
        content = bytearray(Path(name).read_bytes())
        at = content.index(b"PK\x01\x02")  # the first entry of the directory: its size
        content[at + 24 : at + 28] = struct.pack("<I", 0xFFFFFFF0)
        Path(name).write_bytes(content)
    assert "declares more" in refused(capsys, "phases", sound / "net.keras", "bad.npz")
    assert "declares more" in refused(capsys, "sites", "bad.keras")


def test_a_zip_bomb(sound: Path, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from frostline.data import reading

    with zipfile.ZipFile("bomb.npz", "w", zipfile.ZIP_DEFLATED) as new:
        new.writestr("x.npy", npy((1 << 20,), b"\0" * (8 << 20)))
        new.writestr("y.npy", npy((1,), b"\0" * 8))
    monkeypatch.setattr(reading, "available_memory", lambda: 1 << 20)
    line = refused(capsys, "phases", sound / "net.keras", "bomb.npz")
    assert "GiB of memory are free" in line


def png(width: int, height: int) -> bytes:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("size", [(1 << 31) - 1, 60_000, 9_000])
def test_images_of_too_many_pixels(size: int, sound: Path, here: Path, capsys: Any) -> None:
    for name in ("cat", "dog"):
        (here / "images" / name).mkdir(parents=True)
        (here / "images" / name / "0.png").write_bytes(png(size, size))
    assert "0.png" in refused(capsys, "phases", sound / "net.keras", "images", "--split", "all")


def test_devices_pipes_and_loops(sound: Path, here: Path, capsys: Any) -> None:
    os.mkfifo("pipe.npz")
    os.mkfifo("pipe.keras")
    os.mkfifo("pipe.json")
    Path("zero.npz").symlink_to("/dev/zero")
    Path("zero.keras").symlink_to("/dev/zero")
    Path("zero.pt2").symlink_to("/dev/zero")
    Path("zero.parquet").symlink_to("/dev/zero")
    Path("loop.keras").symlink_to("loop.keras")
    Path("loop.npz").symlink_to("loop.npz")
    net = sound / "net.keras"
    for data in ("pipe.npz", "zero.npz", "zero.parquet"):
        assert "not a regular file" in refused(capsys, "phases", net, data)
    for model in ("pipe.keras", "zero.keras", "zero.pt2"):
        assert "not a regular file" in refused(capsys, "sites", model)
    assert "loop" in refused(capsys, "sites", "loop.keras")
    assert "loop" in refused(capsys, "phases", net, "loop.npz")
    assert "loop" in refused(capsys, "fold", net, "-o", "loop.keras")
    history = ("diagnose", net, sound / "data.npz", "--history", "pipe.json")
    assert "not a regular file" in refused(capsys, *history)
    assert "8192" in refused(capsys, "phases", net, "digits", "--image-size", "200000")


# --- numbers and labels at the door ---------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(12, 8, 8, 3)).astype("float32")
Y = np.arange(12) % 3


@pytest.mark.parametrize(
    ("x", "y", "told"),
    [
        (X, Y + 50, "a label in y is 0 to 2. Received: 50 to 52"),
        (X, Y - 2, "a label in y is 0 to 2. Received: -2 to 0"),
        (X, np.where(Y == 1, np.nan, Y), "4 of 12 labels in y are NaN"),
        (X, Y + 0.5, "whole numbers. Received: 0.5"),
        (X, Y.astype("u8") + np.uint64(2**63), "beyond 2^63"),
        (X, np.int64(3), "one entry per sample"),
        (X, np.zeros((12, 2, 3)), "the number of a class. Received: y of shape (12, 2, 3)"),
        (X, np.eye(3)[Y], "as y.argmax(-1) gives it"),
        (X[..., :1], Y, "shape (8, 8, 1), and the model takes (8, 8, 3)"),
        (X[:, 0], Y, "shape (8, 3)"),
        (X[:5], Y, "equally many"),
    ],
)
def test_arrays_that_do_not_fit(
    x: Any, y: Any, told: str, sound: Path, here: Path, capsys: Any
) -> None:
    np.savez("bad.npz", x=x, y=y)
    assert told in refused(capsys, "phases", sound / "net.keras", "bad.npz")
    assert told in refused(capsys, "diagnose", sound / "net.keras", "bad.npz")
    fit = ("fit", sound / "net.keras", "bad.npz", "-o", "out.keras", "--cache", "cache")
    assert told in refused(capsys, *fit)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--engine", "x"),
        ("--max-gb", "-1"),
        ("--max-gb", "nan"),
        ("--learning-rate", "nan"),
        ("--validation-split", "nan"),
        ("--seed", str(2**32)),
        ("--dtype", "int8"),
        ("--epochs", "0"),
    ],
)
def test_options_that_cannot_be(
    option: str, value: str, sound: Path, here: Path, capsys: Any
) -> None:
    fit = ("fit", sound / "net.keras", sound / "data.npz", "-o", "out.keras", "--cache", "cache")
    assert option in refused(capsys, *fit, option, value)


@pytest.mark.parametrize("kind", [">f4", "f2", "f8", "i4", "?"])
@pytest.mark.parametrize("label", [">i8", "u1", "u2", "u8", "f4"])
def test_any_number_is_a_number(
    kind: str, label: str, sound: Path, here: Path, capsys: Any
) -> None:
    results = []
    for x, y in ((X.astype(kind), Y.astype(label)), (X.astype(kind).astype("f4"), Y)):
        np.savez("data.npz", x=x, y=y)
        code = cli.main(["phases", str(sound / "net.keras"), "data.npz", "--format", "json"])
        out, err = capsys.readouterr()
        assert code in (0, 1), err
        results.append(json.loads(out)["phases"])
    for phase in ("0", "1"):
        assert results[0][phase]["loss"] == pytest.approx(results[1][phase]["loss"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:fl.fit runs plain model.fit")
def test_a_training_that_ends_in_nan_is_an_error(sound: Path, here: Path, capsys: Any) -> None:
    np.savez("nan.npz", x=np.where(X > 2, np.nan, X), y=Y)
    words = ["fit", str(sound / "net.keras"), "nan.npz", "-o", "out.keras", "--cache", "cache"]
    assert cli.main(words) == 2
    assert "NaN or infinite; out.keras is not written" in capsys.readouterr().err
    assert not (here / "out.keras").exists()


# --- the terminal ---------------------------------------------------------------------------------

NASTY = "a\x1b[31mred\x1b]0;title\x07\u202eback\r[bold]b[/]"


def test_names_are_shown_not_obeyed(here: Path, capsys: Any) -> None:
    net = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
    net.save("net.keras")

    def edit(config: dict[str, Any]) -> None:
        layer_of(config, "bn")["config"]["name"] = NASTY

    edited(here / "net.keras", here / "nasty.keras", edit)
    np.savez("data.npz", x=np.ones((4, 4)), y=np.ones((4, 4)))
    for words in (
        ["sites", "nasty.keras"],
        ["lint", "nasty.keras"],
        ["lint", "nasty.keras", "--format", "github"],
        ["phases", "nasty.keras", "data.npz", "--loss", NASTY],
        ["freeze", "nasty.keras", "--until", NASTY + "x", "-o", "out.keras"],
        ["sites", NASTY],
        ["phases", "nasty.keras", NASTY],
        ["nasty" + NASTY],
        ["sites", "nasty.keras", "--" + NASTY],
    ):
        cli.main(words)
        out, err = capsys.readouterr()
        text = out + err
        assert out or err
        bad = {c for c in text if not c.isprintable() and c not in "\n\xa0"}
        assert not bad, (words, text)


@pytest.mark.filterwarnings("ignore:fl.fit runs plain model.fit")
def test_the_name_of_a_metric_is_shown_not_obeyed(here: Path, capsys: Any) -> None:
    net = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    net.compile("sgd", "mse", metrics=[keras.metrics.MeanSquaredError(name=NASTY)])
    net.save("net.keras")
    np.savez("data.npz", x=np.ones((4, 4)), y=np.ones((4, 4)))
    assert cli.main(["fit", "net.keras", "data.npz", "-o", "out.keras", "--cache", "c"]) == 0
    out, err = capsys.readouterr()
    assert "red\\x1b]0;title" in out
    assert not {c for c in out + err if not c.isprintable() and c not in "\n\xa0"}


# --- outputs --------------------------------------------------------------------------------------


def test_force_keeps_mode_and_link(sound: Path, here: Path) -> None:
    real = here / "real"
    real.mkdir()
    (real / "out.keras").write_bytes(b"old")
    (real / "out.keras").chmod(0o640)
    Path("link.keras").symlink_to("real/out.keras")
    words = ["set-momentum", str(sound / "net.keras"), "0.9", "-o", "link.keras"]
    assert cli.main(words) == 2
    assert (real / "out.keras").read_bytes() == b"old"
    assert cli.main([*words, "--force"]) == 0
    assert Path("link.keras").is_symlink()
    assert stat.S_IMODE((real / "out.keras").stat().st_mode) == 0o640
    assert zipfile.is_zipfile(real / "out.keras")
    assert [path.name for path in real.iterdir()] == ["out.keras"]


def test_a_new_file_has_the_mode_of_any_new_file(sound: Path, here: Path) -> None:
    Path("other").touch()
    assert cli.main(["fold", str(sound / "net.keras"), "-o", "out.keras"]) == 0
    assert Path("out.keras").stat().st_mode == Path("other").stat().st_mode


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_sigterm_while_writing_leaves_nothing(
    suffix: str, sound: Path, here: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from frostline.data import files

    def killed(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)

    monkeypatch.setattr(files, "_sync_folder", lambda folder: None)
    monkeypatch.setattr(Path, "replace", killed)
    handler = signal.getsignal(signal.SIGTERM)
    assert cli.main(["fold", str(sound / "net.keras"), "-o", f"out{suffix}"]) == 143
    assert capsys.readouterr().err == "error: ended by SIGTERM\n"
    assert list(here.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_module_that_ends_the_program(here: Path, capsys: Any) -> None:
    (here / "leaves_at_once.py").write_text("import sys\nsys.exit(0)\n")
    (here / "leaves_later.py").write_text("import sys\ndef build():\n    sys.exit(0)\n")
    before = list(sys.path)
    try:
        for source in ("leaves_at_once:build", "leaves_later:build"):
            code = cli.main(["sites", source])
            assert code == 2
            assert "SystemExit" in capsys.readouterr().err
    finally:
        sys.path[:] = before


@pytest.mark.parametrize("stream", ["closed", "full", "ascii", "gone"])
def test_standard_output(stream: str, here: Path) -> None:
    redirect = {"closed": ">&-", "full": "> /dev/full", "ascii": "", "gone": "| head -c 1"}[stream]
    command = f"{sys.executable} -m frostline rule FL203 {redirect}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"} if stream == "ascii" else os.environ
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=here,
        env=environment, check=False, timeout=120,
    )  # fmt: skip
    expected = {"closed": 0, "full": 2, "ascii": 0, "gone": done.returncode}[stream]
    assert done.returncode == expected, done.stderr
    assert stream != "gone" or done.returncode in (0, 141)  # 0: it was done before `head` was
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    if stream == "full":
        assert done.stderr == "error: cannot print the result (No space left on device)\n"
    if stream == "ascii":
        assert "## Use instead" in done.stdout
