"""DATA as the model takes it: ``x`` with the channels where they belong, ``y`` for its loss."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from frostline.adapters import Adapter, adapter_of
from frostline.cli import targets
from frostline.cli.options import DataOptions, names
from frostline.cli.terminal import echo
from frostline.data import archive, image_sets
from frostline.types import Array


def read_samples(
    options: DataOptions, model: Any, *, loss: str | None = None, labelled: bool = True
) -> tuple[Array, Array]:
    """Return inputs and targets of DATA as the model wants them.

    Args:
        options: DATA, as typed.
        model: It says, as far as it knows, what shapes it takes and gives.
        loss: Name of the loss; ``None`` for the compiled one.
        labelled: Whether the labels are used, and therefore checked.

    An ``.npz`` with ``x`` and ``y``, and no option that only images know, is handed to the model
    as it is, unless the model takes its ``x`` with the channels on axis 1 only, which is then said;
    everything else is images, and these get the channels where the model wants them.
    """
    plain = not (options.classes or options.per_class or options.image_size or options.preprocess)
    if plain and Path(options.data).suffix == ".npz":
        arrays = archive.read_arrays(Path(options.data))
        if arrays is not None:
            x = targets.plain_numbers(arrays[0], f"{options.data}: x")
            y = targets.plain_numbers(arrays[1], f"{options.data}: y")
            x = _channels_moved(x, model, options.data)
            targets.check_inputs(x, model, options.data)
            return x, targets.checked(y, model, loss, options.data) if labelled else y
    found = image_sets.load(options.data, **_selection(options, model))
    x = _prepared(found.images, options.preprocess, adapter_of(model).channel_axis)
    targets.check_inputs(x, model, options.data)
    return x, targets.of_labels(found.labels, model, loss) if labelled else found.labels


def read_with_ray(options: DataOptions, model: Any) -> tuple[Array, Any, Array]:
    """The first two samples, a Ray data set of ``id`` and ``image``, and the labels by id.

    Images are read, resized and prepared by the workers, as :func:`read_samples` does it; an
    ``.npz`` is read here. An id is the number of the sample in the order of :func:`read_samples`.
    """
    from frostline.scale import sources

    if Path(options.data).suffix == ".npz":
        x, labels = read_samples(options, model, labelled=False)
        return x[:2], sources.of_arrays(x), labels
    chosen = image_sets.choose(options.data, **_selection(options, model))
    axis = adapter_of(model).channel_axis
    prepare = functools.partial(_prepared, how=options.preprocess, channel_axis=axis)
    first, dataset = sources.of_images(chosen, prepare)
    targets.check_inputs(first, model, options.data)
    return first, dataset, chosen.labels


def _selection(options: DataOptions, model: Any) -> dict[str, Any]:
    return {
        "split": options.split.value,
        "classes": names(options.classes) or None,
        "per_class": options.per_class,
        "image_size": options.image_size or _input_size(model),
        "seed": options.seed,
    }


def _prepared(images: Array, how: str | None, channel_axis: int) -> Array:
    x = _preprocessed(images, how)
    return _channels_first(x) if channel_axis == 1 else x


def _channels_first(x: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def _channels_moved(x: Array, model: Any, source: str) -> Array:
    """Return images of an ``.npz`` as the model takes them, and say so if an axis had to move.

    Nothing is guessed from the shape alone: the model must refuse it as it is and take it moved.
    """
    channels = (1, 3, 4)
    if x.ndim != 4 or x.shape[-1] not in channels or x.shape[1] in channels:
        return x
    adapter, moved = adapter_of(model), _channels_first(x[:1])
    if adapter.channel_axis != 1 or _takes(adapter, x[:1]) or not _takes(adapter, moved):
        return x
    height, width, count = x.shape[1:]
    echo(
        f"note: {source}: x has the channels last, {x.shape}, and the model takes them on axis 1: "
        f"read as (samples, {count}, {height}, {width})",
        err=True,
    )
    return _channels_first(x)


def _takes(adapter: Adapter, x: Array) -> bool:
    try:
        adapter.forward(x, training=False)
    except Exception:  # whatever a forward function of a user raises
        return False
    return True


def _input_size(model: Any) -> int | None:
    """Return the side of the images that the model takes; ``None`` when it takes any."""
    shape = getattr(model, "input_shape", None)
    if not isinstance(shape, tuple) or len(shape) != 4:
        return None
    height, width = (shape[1], shape[2]) if shape[3] in (1, 3) else (shape[2], shape[3])
    return height if height is not None and height == width else None


def _preprocessed(images: Array, how: str | None) -> Array:
    if how in (None, "none"):
        return images.astype(np.float32)
    if how == "unit":
        return images.astype(np.float32) / 255
    from frostline.experiments import backbones

    prepared: Array = np.asarray(backbones.preprocess(str(how), images), dtype=np.float32)
    return prepared
