"""A model file's configuration and weights, checked before Keras sees them.

Keras builds what a configuration names. Its ``safe_mode`` has let through, in one release or
another, functions of any module, pickled torch modules and Lambda layers in ``.h5`` files. So
nothing is built here unless each name in the file is a class or function that a model consists of:
one of Keras' own, or one that this process has registered.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import zipfile
from collections.abc import Mapping, Set
from contextlib import closing
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import keras

from frostline.adapters.keras.hdf5 import Stored, check_weights
from frostline.data.reading import require_sound_zip
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
        weights = archive.read(_WEIGHTS)
    stored = Stored(lambda start, most: weights[start : start + most], len(weights))
    with closing(h5py.h5f.open_file_image(weights)) as file:
        check_weights(file, stored, str(path))


def check_h5_file(path: Path, custom_objects: Mapping[str, Any] | None = None) -> bool:
    """Check the configuration and the weights of an ``.h5`` file.

    Returns:
        Whether its compile state can be read as well.

    Raises:
        ModelError: As :func:`check_keras_file`.
    """
    with h5py.File(path, "r") as file, path.open("rb", buffering=0) as stream:

        def read(start: int, most: int) -> bytes:
            stream.seek(start)
            return stream.read(most)

        check_weights(file.id, Stored(read, os.fstat(stream.fileno()).st_size), str(path))
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
