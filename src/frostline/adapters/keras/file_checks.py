"""A model file's configuration and weights, checked before Keras sees them.

Keras builds what a configuration names. Its ``safe_mode`` has let through, in one release or
another, functions of any module, pickled torch modules and Lambda layers in ``.h5`` files. So
nothing is built here unless each name in the file is a class or function that a model consists of:
one of Keras' own, or one that this process has registered.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import math
import zipfile
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import keras

from frostline.data.reading import require_memory, require_sound_zip
from frostline.types import ModelError

#: Classes that run code of the file, or read other files, when they are built.
_REFUSED = frozenset(
    {"Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer", "FlaxModule"}
)
#: Plain values that a configuration writes as an object. ``__lambda__`` is code, ``__typespec__``
#: calls any function of TensorFlow.
_VALUES = frozenset(
    {"__tuple__", "__keras_tensor__", "__tensor__", "__numpy__", "__bytes__", "__ellipsis__",
     "__slice__"}
)  # fmt: skip
#: Where Keras keeps the functions that a configuration names.
_FUNCTION_ROOMS = (
    "activations", "losses", "metrics", "initializers", "regularizers", "constraints", "ops",
    "optimizers",
)  # fmt: skip
#: Layers whose ``vocabulary`` may be the path of another file, which they then read.
_PATHS = ("vocabulary", "idf_weights")
#: A compressed block of HDF5 shrinks this far at most.
_DEFLATE_LIMIT = 1032
_COMPRESSING = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SZIP, h5py.h5z.FILTER_LZF}
_CONFIG = "config.json"
_WEIGHTS = "model.weights.h5"


class UnsafeFileError(ModelError):
    """The file names something that is not a part of a model."""


def check_keras_file(path: Path, custom_objects: Mapping[str, Any] | None = None) -> None:
    """Check the configuration and the weights of a ``.keras`` file.

    Raises:
        ModelError: It names code, declares sizes that cannot be, or stores its weights in a form
            that is not read.
    """
    with zipfile.ZipFile(path) as archive:
        require_sound_zip(archive, str(path), kind=ModelError)
        names = archive.namelist()
        if _CONFIG not in names or _WEIGHTS not in names:
            missing = _CONFIG if _CONFIG not in names else _WEIGHTS
            raise ModelError(f"{path}: not a .keras file; it holds no {missing}")
        _check_config(json.loads(archive.read(_CONFIG)), str(path), custom_objects)
        # In memory, as Keras reads it: a member of an archive is read from its start at each step
        # back, and HDF5 goes back and forth.
        with h5py.File(io.BytesIO(archive.read(_WEIGHTS)), "r") as file:
            _check_weights(file, str(path))


def check_h5_file(path: Path, custom_objects: Mapping[str, Any] | None = None) -> bool:
    """Check the configuration and the weights of an ``.h5`` file.

    Returns:
        Whether its compile state can be read as well.

    Raises:
        ModelError: As :func:`check_keras_file`.
    """
    with h5py.File(path, "r") as file:
        _check_weights(file, str(path))
        config = file.attrs.get("model_config")
        if config is None:
            raise ModelError(f"{path}: holds weights, but no model; save it with model.save()")
        _check_config(json.loads(config), str(path), custom_objects)
        training = file.attrs.get("training_config")
        try:
            if training is not None:
                _check_config(json.loads(training), str(path), custom_objects)
        except UnsafeFileError:
            return False
    return True


def _check_config(config: Any, shown: str, custom_objects: Mapping[str, Any] | None) -> None:
    """Walk a configuration; a loop, since a recursion would end on a deep one."""
    known = {*keras.saving.get_custom_objects(), *(custom_objects or {})}
    rest = [config]
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            if "class_name" in value:
                _check_object(value, shown, known)
            rest.extend(value.values())
        elif isinstance(value, list):
            rest.extend(value)


def _check_object(config: Mapping[str, Any], shown: str, known: Set[str]) -> None:
    name, module = config["class_name"], config.get("module")
    if not isinstance(name, str):
        raise UnsafeFileError(f"{shown}: the name of a class must be text. Received: {name!r:.80}")
    inner = config.get("config")
    if name in _VALUES:
        return
    plain = name.rpartition(">")[2]
    if name.startswith("__") or plain in _REFUSED:
        raise UnsafeFileError(
            f"{shown}: a {plain} holds code or names another file, and neither is read"
        )
    if isinstance(inner, dict) and any(isinstance(inner.get(key), str) for key in _PATHS):
        raise UnsafeFileError(f"{shown}: a {plain} whose vocabulary is another file is not read")
    registered = config.get("registered_name")
    if name == "function":
        named = inner.get("config") if isinstance(inner, dict) else inner
        if not isinstance(named, str) or not (named in known or _is_function(named, module)):
            raise UnsafeFileError(
                f"{shown}: a function that is not Keras' own. Received: {named!r}"
            )
    elif name in known or registered in known:
        return
    elif module is not None and not _is_part(name, module):
        raise UnsafeFileError(
            f"{shown}: {module}.{name} is neither one of Keras' own parts of a model nor registered"
        )


def _is_part(name: str, module: Any) -> bool:
    """Whether it is a Keras class that models are made of."""
    return isinstance(module, str) and _is_class_of_models(name, module)


@functools.lru_cache(1024)
def _is_class_of_models(name: str, module: str) -> bool:
    found = getattr(_loaded(module), name, None)
    if not isinstance(found, type):
        return False
    parts = (
        keras.Layer, keras.Operation, keras.Initializer, keras.Regularizer, keras.Loss,
        keras.Metric, keras.Optimizer, keras.DTypePolicy, keras.constraints.Constraint,
        keras.optimizers.schedules.LearningRateSchedule, keras.random.SeedGenerator,
        keras.quantizers.Quantizer,
    )  # fmt: skip
    others = getattr(keras.dtype_policies, "DTypePolicyMap", keras.DTypePolicy)
    refused = tuple(getattr(keras.layers, name, ()) for name in _REFUSED)
    return issubclass(found, (*parts, others)) and not issubclass(found, refused)


def _is_function(name: str, module: Any) -> bool:
    if not isinstance(module, str | None) or (
        module is not None and module.partition(".")[0] not in ("builtins", "keras")
    ):
        return False
    return any(callable(getattr(getattr(keras, room), name, None)) for room in _FUNCTION_ROOMS)


def _loaded(module: str) -> Any:
    """Return a module of the installed Keras; ``None`` for any other."""
    if module.partition(".")[0] != "keras":
        return None
    try:
        return importlib.import_module(module)
    except ImportError:  # also a name that only the public interface has
        found: Any = keras
        for part in module.split(".")[1:]:
            found = getattr(found, part, None)
        return found if isinstance(found, type(keras)) else None


def _check_weights(file: Any, shown: str) -> None:
    """Refuse links to other files, and arrays larger than what is stored or what fits.

    A model of thousands of layers has tens of thousands of groups, so HDF5's own calls are made:
    those of h5py's classes take ten times as long. A loop, since groups may be nested deeply.
    """
    total = 0
    groups = [h5py.h5g.open(file.id, b"/")]
    seen = set(groups)
    while groups:
        group = groups.pop()
        links: list[tuple[bytes, int]] = []
        group.links.iterate(_noted_in(links), info=True)
        for name, kind in links:
            named = repr(name.decode(errors="backslashreplace"))
            if kind != h5py.h5l.TYPE_HARD:
                raise ModelError(f"{shown}: {named} is a link to another place, and is not read")
            value = h5py.h5o.open(group, name)
            if isinstance(value, h5py.h5g.GroupID):
                if value in seen:
                    raise ModelError(f"{shown}: its group {named} is inside itself")
                seen.add(value)
                groups.append(value)
            elif isinstance(value, h5py.h5d.DatasetID):
                total += _stored_bytes(value, f"{shown}: {named}")
    require_memory(total, f"{shown}: its weights", kind=ModelError)


def _noted_in(links: list[tuple[bytes, int]]) -> Callable[[bytes, Any], None]:
    return lambda name, info: links.append((name, info.type))


def _stored_bytes(dataset: Any, shown: str) -> int:
    stored = dataset.get_create_plist()
    if stored.get_external_count() or stored.get_layout() == h5py.h5d.VIRTUAL:
        raise ModelError(f"{shown} lies in another file, and is not read")
    space = dataset.get_space()
    if space.get_simple_extent_type() == h5py.h5s.NULL:
        return 0
    declared = int(math.prod(space.shape) * dataset.get_type().get_size())
    there = int(dataset.get_storage_size())
    if declared > there:
        filters = {stored.get_filter(place)[0] for place in range(stored.get_nfilters())}
        if declared > there * (_DEFLATE_LIMIT if filters & _COMPRESSING else 1):
            raise ModelError(f"{shown} declares {declared} bytes and holds {there}")
    return declared
