"""Read a program from a file without running anything that the file holds.

``torch.export.load`` unpickles the sample inputs of a ``.pt2`` file, whatever they are. What the
rules need is beside them as JSON and raw numbers, and that alone is read. TorchScript is read by
torch, which runs no Python, but would run a ``__setstate__`` of the file: such files are refused.
"""

from __future__ import annotations

import io
import json
import math
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from frostline.adapters.torch.program import OPERATORS, ExportedCall, ExportedFile, exported_call
from frostline.data.reading import require_sound_zip
from frostline.types import ModelError
from frostline.types.reasons import first_line

#: Numbers of dtypes in ``torch._export.serde.schema.ScalarType``.
_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64,
    6: torch.float16, 7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
_OLD_PROGRAM, _OLD_STATE = "serialized_exported_program.json", "serialized_state_dict.pt"


def read_exported(path: Path) -> ExportedFile:
    """Read the graph and the numbers of a ``.pt2`` file.

    Raises:
        ModelError: Not such a file, damaged, or with weights that are stored as a pickle of
            anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            require_sound_zip(archive, str(path), kind=ModelError)
            members = {name: name.partition("/")[2] for name in archive.namelist()}
            old = _OLD_PROGRAM in archive.namelist()
            graphs = [n for n, inner in members.items() if _is_graph(inner)]
            if old:
                graphs = [_OLD_PROGRAM]
            if len(graphs) != 1:
                raise ValueError(f"one exported program is expected, {len(graphs)} are in it")
            order = next((n for n, inner in members.items() if inner == "byteorder"), None)
            if order is not None and archive.read(order) != b"little":
                raise ValueError("it was written on a big-endian machine")
            module = json.loads(archive.read(graphs[0]))["graph_module"]
            if old:
                state = torch.load(io.BytesIO(archive.read(_OLD_STATE)), weights_only=True)
                tensor: Callable[[str], Any] = state.get
            else:
                root = graphs[0].partition("/")[0]
                name = graphs[0].rpartition("/")[2].removesuffix(".json")
                tensor = _weights(archive, root, name)
            return ExportedFile(tuple(_calls(module, tensor)))
    except ModelError:
        raise
    except Exception as error:  # whatever a damaged file makes of JSON, zip and lookups
        raise ModelError(f"{path}: not a readable .pt2 ({first_line(error)})") from None


def read_script(path: Path) -> Any:
    """Read a TorchScript file.

    Raises:
        ModelError: Not readable, or it runs code of its own when it is read.
    """
    with zipfile.ZipFile(path) as archive:
        require_sound_zip(archive, str(path), kind=ModelError)
        copy = io.BytesIO()
        # A clean copy: torch's reader of zip files must see what was checked, and nothing else.
        with zipfile.ZipFile(copy, "w") as clean:
            for name in archive.namelist():
                content = archive.read(name)
                if "/code/" in name and (b"__setstate__" in content or b"torch.classes" in content):
                    raise ModelError(
                        f"{path}: this TorchScript runs code when it is read, so it is not; pass "
                        "module:function, a function that returns the nn.Module"
                    )
                clean.writestr(name, content)
    copy.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return torch.jit.load(copy, map_location="cpu")
        except Exception as error:
            raise ModelError(f"{path}: not readable TorchScript ({first_line(error)})") from None


def _is_graph(inner: str) -> bool:
    return inner.startswith("models/") and inner.endswith(".json")


def _weights(archive: zipfile.ZipFile, root: str, name: str) -> Callable[[str], Any]:
    """Return a function from a weight's name to its tensor; ``None`` where there is none."""
    folder = f"{root}/data/weights/"
    listed = f"{folder}{name}_weights_config.json"
    if listed not in archive.namelist():
        whole = archive.read(f"{folder}{name}.pt")
        state: Mapping[str, Any] = torch.load(io.BytesIO(whole), weights_only=True)
        return state.get
    config = json.loads(archive.read(listed))["config"]

    def tensor(weight: str) -> Any:
        entry = config.get(weight)
        if entry is None:
            return None
        content = archive.read(folder + entry["path_name"])
        if entry["use_pickle"]:
            return torch.load(io.BytesIO(content), weights_only=True)
        meta = entry["tensor_meta"]
        dtype = _DTYPES[meta["dtype"]]
        sizes = [int(size["as_int"]) for size in meta["sizes"]]
        offset = int(meta["storage_offset"]["as_int"])
        count = math.prod(sizes)
        if min([offset, *sizes]) < 0 or len(sizes) > 1:
            raise ValueError(f"the statistics {weight!r} are not one number per channel")
        if count == 0:
            return torch.empty(sizes, dtype=dtype)
        flat = torch.frombuffer(bytearray(content), dtype=dtype, offset=offset * dtype.itemsize,
                                count=count)  # fmt: skip
        return flat.reshape(sizes)

    return tensor


def _calls(module: Mapping[str, Any], tensor: Callable[[str], Any]) -> Iterator[ExportedCall]:
    names: dict[str, str] = {}
    for entry in module["signature"]["input_specs"]:
        for kind, key in (("parameter", "parameter_name"), ("buffer", "buffer_name")):
            if kind in entry:
                names[entry[kind]["arg"]["name"]] = entry[kind][key]
    for node in module["graph"]["nodes"]:
        operator = str(node["target"]).removeprefix("torch.ops.aten.").partition(".")[0]
        if operator not in OPERATORS:
            continue
        given = {entry["name"]: entry["arg"] for entry in node["inputs"]}
        owned = [
            names.get(given.get(key, {}).get("as_tensor", {}).get("name"))
            for key in ("weight", "bias", "running_mean", "running_var")
        ]
        epsilon = given.get("eps", given.get("epsilon", {})).get("as_float", 1e-5)
        call = exported_call(owned, tensor, float(epsilon))
        if call is not None:
            yield call
