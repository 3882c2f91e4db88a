"""Read tensors from a PyTorch checkpoint file, and nothing else.

A checkpoint's skeleton is a pickle, and unpickling runs whatever the file asks for. This reader
never unpickles: it steps through the opcodes that ``pickletools`` names and knows only the two
dozen that a dict of tensors needs. A global is a *word* here, compared with a short list and
never imported or called, so a hostile file can only be refused.

Both layouts of ``torch.save`` are read. ``L`` marks a little-endian int64::

    legacy   pickle(magic) pickle(1001) pickle(system) pickle(object) pickle([key, ...])
             then per key: L(number of elements) raw elements
    zip      <root>/data.pkl = pickle(object), <root>/data/<key> = raw elements, stored
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from frostline.types import Array, ModelError
from frostline.types.reasons import first_line

_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER
_PROTOCOL = 1001  # torch.serialization.PROTOCOL_VERSION

_DTYPES = {
    "torch FloatStorage": "<f4",
    "torch DoubleStorage": "<f8",
    "torch HalfStorage": "<f2",
    "torch LongStorage": "<i8",
    "torch IntStorage": "<i4",
    "torch ShortStorage": "<i2",
    "torch CharStorage": "<i1",
    "torch ByteStorage": "<u1",
    "torch BoolStorage": "?",
}
_ORDERED_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_DAMAGE = (
    ValueError,
    LookupError,
    OverflowError,
    RuntimeError,  # zipfile: encrypted, or a method it does not know
    DeprecationWarning,  # pickletools: a bad escape in a name, where warnings are errors
    EOFError,
    struct.error,
    zipfile.BadZipFile,
)
_GLOBALS = frozenset(_DTYPES) | {_ORDERED_DICT, _TENSOR, _PARAMETER}


@dataclass(frozen=True)
class _Global:
    """A name that the file mentions. Never resolved to an object."""

    name: str


@dataclass(frozen=True)
class _Storage:
    """A flat run of elements, still in the file."""

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True)
class _Tensor:
    """A strided window on a storage, in elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _RefusedError(Exception):
    """The file is not a dict of tensors; the text says what it is instead."""


def read_tensors(
    path: str | Path, *, reader: Literal["auto", "torch", "numpy"] = "auto"
) -> dict[str, Array]:
    """Return the arrays of a checkpoint that holds one flat dict of tensors (a ``state_dict``).

    Args:
        path: A ``.pth``/``.pt`` file written by ``torch.save``, legacy or zip layout.
        reader: ``"torch"`` is ``torch.load(weights_only=True)``; ``"numpy"`` is this module,
            which needs no torch; ``"auto"`` takes torch where the process has it loaded already
            (importing torch next to another backend costs seconds and buys nothing). Both give
            the same bits.

    Returns:
        Name -> array, in the file's order, with the file's dtypes. Copy before writing to one:
        it may be a read-only view.

    Raises:
        ModelError: The file is missing, damaged, or holds anything that is not a tensor.
    """
    path = Path(path)
    if reader not in ("auto", "torch", "numpy"):
        raise ModelError(f"reader must be 'auto', 'torch' or 'numpy'. Received: {reader!r}")
    if not path.is_file():
        raise ModelError(f"No checkpoint file at {path}")
    if reader == "torch" or (reader == "auto" and "torch" in sys.modules):
        return _read_with_torch(path)
    try:
        return _read_with_numpy(path.read_bytes())
    except _RefusedError as error:
        raise ModelError(f"{path.name} is not a checkpoint of plain tensors: {error}") from None
    # Whatever a damaged file makes the parsers stumble over is one error to its reader.
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{path.name} is damaged or truncated: {reason}") from None


def _read_with_torch(path: Path) -> dict[str, Array]:
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises pickle, zip, runtime and end-of-file errors for the same damage.
        reason = first_line(error)
        raise ModelError(f"{path.name} cannot be read as tensors: {reason}") from None
    if not isinstance(loaded, dict):
        kind = type(loaded).__name__
        raise ModelError(f"{path.name} holds no dict of tensors. Received: {kind}")
    arrays = {}
    for name, value in loaded.items():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            kind = type(value).__name__
            raise ModelError(f"{path.name}: entry {name!r} is no tensor. Received: {kind}")
        try:
            arrays[name] = value.detach().numpy()
        except TypeError:
            raise ModelError(
                f"{path.name}: tensor {name!r} has no NumPy dtype. Received: {value.dtype}"
            ) from None
    return arrays


def _read_with_numpy(content: bytes) -> dict[str, Array]:
    if content[:4] == b"PK\x03\x04":
        skeleton, storages = _open_zip(content)
    else:
        skeleton, storages = _open_legacy(content)
    if not isinstance(skeleton, dict):
        raise _RefusedError(f"it holds a {type(skeleton).__name__.lstrip('_')}, not a dict")
    return {name: _materialise(name, value, storages) for name, value in skeleton.items()}


def _open_legacy(content: bytes) -> tuple[Any, Mapping[str, Array]]:
    stream = io.BytesIO(content)
    if _interpret(stream) != _MAGIC:
        raise _RefusedError("it does not begin like a PyTorch file")
    if (protocol := _interpret(stream)) != _PROTOCOL:
        raise _RefusedError(f"its protocol must be {_PROTOCOL}. Received: {_brief(protocol)}")
    system = _interpret(stream)
    if not (isinstance(system, dict) and system.get("little_endian") is True):
        raise _RefusedError("it was written on a big-endian machine")
    skeleton = _interpret(stream)
    keys = _interpret(stream)
    declared = _storages_of(skeleton)
    storages: dict[str, Array] = {}
    for key in _expect(keys, list):
        (elements,) = struct.unpack("<q", stream.read(8))
        storage = declared.get(_expect(key, str))
        if storage is None or storage.elements != elements:
            raise _RefusedError(f"its storage {key!r} does not match the tensors that use it")
        size = elements * np.dtype(storage.dtype).itemsize
        storages[key] = _elements_of(stream.read(size), storage)
    return skeleton, storages


def _open_zip(content: bytes) -> tuple[Any, Mapping[str, Array]]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise _RefusedError(f"it must hold one data.pkl. Received: {len(pickles)}")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist():
            order = _stored(archive, f"{root}byteorder")
            if order != b"little":
                raise _RefusedError(f"its byte order must be little. Received: {order!r}")
        skeleton = _interpret(io.BytesIO(_stored(archive, pickles[0])))
        storages = {
            key: _elements_of(_stored(archive, f"{root}data/{key}"), storage)
            for key, storage in _storages_of(skeleton).items()
        }
    return skeleton, storages


def _stored(archive: zipfile.ZipFile, name: str) -> bytes:
    # torch stores without compression; refusing the rest also refuses decompression bombs.
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise _RefusedError(f"its record {name} is compressed")
    return archive.read(name)


def _storages_of(skeleton: Any) -> dict[str, _Storage]:
    """Return the storages that the tensors use, each one once, by their key."""
    values = skeleton.values() if isinstance(skeleton, dict) else ()
    return {value.storage.key: value.storage for value in values if isinstance(value, _Tensor)}


def _elements_of(raw: bytes, storage: _Storage) -> Array:
    expected = storage.elements * np.dtype(storage.dtype).itemsize
    if len(raw) != expected:
        raise ValueError(f"storage {storage.key} has {len(raw)} of {expected} bytes")
    return np.frombuffer(raw, dtype=storage.dtype)


def _materialise(name: str, value: Any, storages: Mapping[str, Array]) -> Array:
    """Return the window that ``value`` describes, after checking its bounds.

    A read-only view: a file that lays a million windows on one storage costs no memory.
    """
    if not isinstance(value, _Tensor):
        raise _RefusedError(
            f"its entry {name!r} is a {type(value).__name__.lstrip('_')}, no tensor"
        )
    flat = storages[value.storage.key]
    if flat.dtype != np.dtype(value.storage.dtype):
        raise _RefusedError(f"its tensor {name!r} reads a storage of another dtype")
    size = math.prod(value.shape)
    steps = zip(value.shape, value.strides, strict=True)
    last = value.offset + sum((length - 1) * stride for length, stride in steps)
    if size and last >= flat.size:
        raise _RefusedError(f"its tensor {name!r} reaches outside its storage")
    if not size:
        return np.empty(value.shape, dtype=flat.dtype)
    strides = tuple(stride * flat.itemsize for stride in value.strides)
    start = flat[value.offset :]
    return np.lib.stride_tricks.as_strided(start, value.shape, strides, writeable=False)


_MARK = object()
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "MARK": lambda: _MARK,
}
_LITERALS = frozenset(
    {"BINUNICODE", "SHORT_BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _interpret(stream: io.BytesIO) -> Any:
    """Run one pickle of ``stream`` on a stack of plain values; stop behind its ``STOP``."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[_integer(argument)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[_integer(argument)])
        elif name == "GLOBAL":
            stack.append(_global(str(argument)))
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            _combine(name, stack)
    raise EOFError("it ends in the middle of a pickle")


def _combine(name: str, stack: list[Any]) -> None:
    """Apply an opcode that takes values off the stack."""
    if name in _TUPLES:
        count = _TUPLES[name]
        if len(stack) < count:
            raise IndexError("stack underflow")
        stack[-count:] = [tuple(stack[-count:])]
    elif name == "TUPLE":
        stack.append(tuple(_pop_to_mark(stack)))
    elif name == "APPEND":
        value = stack.pop()
        _expect(stack[-1], list).append(value)
    elif name == "APPENDS":
        values = _pop_to_mark(stack)
        _expect(stack[-1], list).extend(values)
    elif name == "SETITEM":
        value, key = stack.pop(), stack.pop()
        _expect(stack[-1], dict)[_expect(key, str)] = value
    elif name == "SETITEMS":
        items = _pop_to_mark(stack)
        target = _expect(stack[-1], dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_expect(key, str)] = value
    elif name == "BUILD":
        stack.pop()  # a state_dict's `_metadata`: versions of modules, no tensors
        _expect(stack[-1], dict)
    elif name == "BINPERSID":
        stack.append(_storage(stack.pop()))
    elif name == "REDUCE":
        arguments, function = stack.pop(), stack.pop()
        stack.append(_reduce(_expect(function, _Global).name, _expect(arguments, tuple)))
    else:
        raise _RefusedError(f"it uses the pickle opcode {name}, which no tensor needs")


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    values = []
    while (value := stack.pop()) is not _MARK:
        values.append(value)
    return values[::-1]


def _global(argument: str) -> _Global:
    if argument not in _GLOBALS:
        raise _RefusedError(
            f"it asks for {argument.replace(' ', '.')}, which is no part of a tensor"
        )
    return _Global(argument)


def _reduce(function: str, arguments: tuple[Any, ...]) -> Any:
    """Stand in for the three calls that a dict of tensors consists of."""
    if function == _ORDERED_DICT and not arguments:
        return {}
    if function == _TENSOR and len(arguments) in (6, 7):
        storage, offset, shape, strides = arguments[:4]
        window = _Tensor(
            _expect(storage, _Storage), _integer(offset), _integers(shape), _integers(strides)
        )
        if len(window.shape) != len(window.strides):
            raise _RefusedError("a tensor has as many strides as dimensions")
        return window
    if function == _PARAMETER and len(arguments) == 3:
        return _expect(arguments[0], _Tensor)
    raise _RefusedError(f"it calls {function.replace(' ', '.')} in an unknown way")


def _storage(identity: Any) -> _Storage:
    kind, storage_type, key, _location, elements, *view = _expect(identity, tuple)
    dtype = _DTYPES.get(_expect(storage_type, _Global).name)
    if kind != "storage" or dtype is None or view not in ([], [None]):
        raise _RefusedError("it refers to data outside the file's storages")
    return _Storage(_expect(key, str), dtype, _integer(elements))


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        want, have = kind.__name__.lstrip("_"), type(value).__name__.lstrip("_")
        raise _RefusedError(f"a {want} was expected. Received: {have}")
    return value


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _RefusedError(
            f"sizes, strides and offsets are integers >= 0. Received: {_brief(value)}"
        )
    return value


def _brief(value: Any) -> str:
    """Describe a value of the file; never the ``repr`` of a container.

    Tuples that hold the one before twice, forty times over, have a ``repr`` of terabytes.
    """
    return repr(value)[:40] if isinstance(value, int | float | str) else type(value).__name__


def _integers(values: Any) -> tuple[int, ...]:
    return tuple(_integer(value) for value in _expect(values, tuple))
