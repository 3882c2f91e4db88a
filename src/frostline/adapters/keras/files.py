"""Read a Keras model from a file or a function, and write one, whole or not at all."""

from __future__ import annotations

import gc
import logging
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py  # type: ignore[import-untyped]
import keras
import numpy as np
from keras.src.legacy.saving.legacy_h5_format import (
    load_optimizer_weights_from_hdf5_group,
    save_model_to_hdf5,
)
from keras.src.saving import saving_lib

# Importing the layers registers them, so that files with converted models can be read.
from frostline import layers as layers
from frostline.adapters import room_of
from frostline.adapters.keras.file_checks import UnsafeFileError, check_h5_file, check_keras_file
from frostline.atomic import taken_back
from frostline.data import files
from frostline.data.import_string import built
from frostline.data.reading import require_file
from frostline.types import ModelError, OutputError
from frostline.types.reasons import first_line

SUFFIXES = (".keras", ".h5")

_WAY_OUT = (
    "For Lambda layers or layers of your own pass module:function, a function that returns the "
    "model"
)
_log = logging.getLogger("frostline")


def load_model(source: str) -> Any:
    """Load a Keras model.

    Args:
        source: Path of a ``.keras`` or ``.h5`` file, or ``module:function``: a function without
            arguments that returns a model; the module may be in the current folder.

    Returns:
        The model, with its compile state where the file has one; a torch module, where a function
        returns one. Keras cannot read every compile state that it wrote into an ``.h5`` file; such
        a model comes back not compiled, and the log says so. The optimizer state of an ``.h5``
        file, which Keras drops, is read here.

    Raises:
        ModelError: No such file or function, an unreadable file, or not a model.
    """
    path = Path(source)
    if not path.exists() and path.suffix not in SUFFIXES and ":" in source:
        model = built(source)
        if room_of(model) is not None and not isinstance(model, keras.Layer):
            return model  # of another framework
    else:
        model = read_model(path)
    if not isinstance(model, keras.Model):
        raise ModelError(f"{source}: not a keras.Model. Received: {type(model).__name__}")
    return model


def save_model(model: Any, path: Path, *, overwrite: bool = False) -> None:
    """Write a model under a temporary name in its folder and rename it.

    Args:
        model: A Keras model.
        path: Target; its suffix, ``.keras`` or ``.h5``, chooses the format.
        overwrite: Replace a file that is there.

    Raises:
        OutputError: The file exists, or cannot be written; nothing is left behind.
    """
    if path.suffix not in SUFFIXES:
        raise OutputError(f"a model is written as .keras or .h5. Received: {path}")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already")
    with files.replacing(path) as stream:
        if path.suffix == ".h5":
            stream.write(_as_h5(model))
        else:
            saving_lib.save_model(model, stream)


def _as_h5(model: Any) -> bytes:
    """Return an ``.h5`` file, made in memory: HDF5 ends the process where a disk is full."""
    with h5py.File("model.h5", "w", driver="core", backing_store=False) as file:
        save_model_to_hdf5(model, file)
        file.flush()
        image: bytes = file.id.get_file_image()
        return image


@contextmanager
def _found_in_use_once() -> Iterator[None]:
    """Let Python's collector of garbage leave alone what it has found in use.

    Loading 2,000 layers makes millions of objects, and each time that a quarter has been added it
    would go through all of them again.
    """

    def leave(phase: str, info: dict[str, int]) -> None:
        if phase == "stop" and info["generation"] == 2:
            gc.freeze()

    def back() -> None:
        if leave in gc.callbacks:
            gc.callbacks.remove(leave)
        gc.unfreeze()

    if gc.get_freeze_count():  # somebody else's, who would lose it
        yield
        return
    with taken_back(back):
        gc.callbacks.append(leave)
        yield


@_found_in_use_once()
def read_model(path: Path, custom_objects: Mapping[str, Any] | None = None) -> Any:
    """Read a model file; see :func:`load_model`.

    Args:
        path: A ``.keras`` or ``.h5`` file.
        custom_objects: Class name -> class, for classes that are not registered with Keras.

    Raises:
        ModelError: No such file, or an unreadable one.
    """
    if path.is_dir():
        raise ModelError(f"{path} is a folder; MODEL is a .keras or .h5 file, or module:function")
    if not os.path.lexists(path):
        raise ModelError(
            f"no such model file: {path}. MODEL is a .keras or .h5 file, or module:function"
        )
    require_file(path, kind=ModelError)
    if path.suffix not in SUFFIXES:
        raise ModelError(f"a model file ends in .keras or .h5. Received: {path}")
    if path.suffix == ".keras" and not zipfile.is_zipfile(path):
        # Keras says "File not found" of a file whose end, where a zip has its index, is missing.
        raise ModelError(f"{path}: not a whole .keras file; it is truncated or something else")
    try:
        if path.suffix == ".keras":
            check_keras_file(path, custom_objects)
            return keras.saving.load_model(path, custom_objects, safe_mode=True)
        if check_h5_file(path, custom_objects):
            model = keras.saving.load_model(path, custom_objects, safe_mode=True)
            return _with_optimizer_state(model, path)
        raise ModelError("its loss or a metric is not one of Keras' own")
    except UnsafeFileError as error:
        raise ModelError(f"{error}. {_WAY_OUT}") from None
    except (Exception, SystemExit) as error:  # zip, JSON, HDF5, deserialisation each their own
        if path.suffix == ".h5" and (model := _not_compiled(path, custom_objects)) is not None:
            _log.warning("%s: loaded without its compile state (%s)", path, first_line(error))
            return model
        way_out = "" if isinstance(error, OSError | ModelError) else f". {_WAY_OUT}"
        reason = first_line(error)
        if isinstance(error, ModelError) and str(path) in reason:
            raise
        raise ModelError(f"{path}: not a readable Keras model ({reason}){way_out}") from error


def _with_optimizer_state(model: Any, path: Path) -> Any:
    """Give a model from an ``.h5`` file an optimizer that knows its variables, with its slots.

    Keras 3 builds that optimizer for the variables of the outermost model alone, and there are
    none, and the first training step then fails with "Unknown variable".
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or not optimizer.built:
        return model
    with h5py.File(path) as file:
        if "optimizer_weights" not in file:
            return model
        values = [np.array(value) for value in load_optimizer_weights_from_hdf5_group(file)]
    fresh = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    fresh.build(model.trainable_variables)
    if [v.shape for v in values] == [tuple(v.shape) for v in fresh.variables]:
        for variable, value in zip(fresh.variables, values, strict=True):
            variable.assign(value)
    else:
        _log.warning("%s: its optimizer starts anew: its state fits other variables", path)
    model.optimizer = fresh
    return model


def _not_compiled(path: Path, custom_objects: Mapping[str, Any] | None) -> Any | None:
    try:
        check_h5_file(path, custom_objects)
        return keras.saving.load_model(path, custom_objects, safe_mode=True, compile=False)
    except Exception:  # the first complaint is the one to report
        return None
