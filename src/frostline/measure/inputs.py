"""What the inputs look like, and what inference would make of them in another encoding.

A wrong preprocessing is a map from one well-known encoding of pixels to another; there are few, so
each is tried.

References:
    - ``keras.applications.imagenet_utils.preprocess_input``: modes ``tf``, ``caffe``, ``torch``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import numpy as np

from frostline.data.arrays import leaves
from frostline.data.batch import Batch
from frostline.numerics.stats import Moments
from frostline.types import Array
from frostline.types.measured import InputMoments

#: Means of ImageNet in 0 to 255, blue first, as the ``caffe`` mode subtracts them.
CAFFE_MEAN = (103.939, 116.779, 123.68)

#: Means and standard deviations of ImageNet in 0 to 1, red first, as the ``torch`` mode uses them.
TORCH_MEAN = (0.485, 0.456, 0.406)
TORCH_DEVIATION = (0.229, 0.224, 0.225)

#: Inputs of at most this size are in the unit interval, apart from what augmentation adds.
_UNIT = 1.5

#: Sides of images that are halved, and of those that are doubled.
_SMALLEST = 8
_LARGEST = 256

#: Names of the transformations to another size, and how all of these begin.
SIZED = "x at "
HALF = f"{SIZED}half the size"
DOUBLE = f"{SIZED}double the size"

#: Quotients of sides that are tried where neither statistics nor half and double do well.
QUOTIENTS = ("1/4", "1/3", "2/3", "3/4", "4/3", "3/2")

#: Largest value of images of 8 bits; those of more bits are larger, those of fewer below half.
_BYTE = 255.0

Transform = Callable[[Any], Any]


def moments(batches: Iterable[Batch], *, axis: int = -1) -> InputMoments | None:
    """Moments of the inputs per channel.

    ``None`` for several inputs, for no numbers, and where a batch has more channels than another.

    Args:
        batches: Samples.
        axis: Of the channels: -1, or 1 where they come first.
    """
    total: Moments | None = None
    low: Array | None = None
    high: Array | None = None
    sizes: set[tuple[int, ...]] = set()
    samples = 0
    for batch in batches:
        found = leaves(batch.x)
        numbers = len(found) == 1 and isinstance(found[0][1], np.ndarray)
        if not numbers or found[0][1].dtype.kind not in "buif" or found[0][1].ndim < 2:
            return None
        values = np.moveaxis(found[0][1], axis, -1)
        sizes.add(values.shape[1:-1])
        samples += len(values)
        flat = values.reshape(-1, values.shape[-1])
        if low is not None and len(low) != flat.shape[1]:
            return None
        part = Moments.of(flat)
        total = part if total is None else total.merge(part)
        lowest, highest = flat.min(axis=0), flat.max(axis=0)
        low = lowest if low is None else np.minimum(low, lowest)
        high = highest if high is None else np.maximum(high, highest)
    if total is None or low is None or high is None:
        return None
    return InputMoments(
        mean=total.mean,
        deviation=np.sqrt(total.variance),
        low=np.asarray(low, np.float64),
        high=np.asarray(high, np.float64),
        size=sizes.pop() if len(sizes) == 1 else (),
        samples=samples,
    )


def transforms(seen: InputMoments, *, axis: int = -1) -> dict[str, Transform]:
    """Encodings that inputs of this range could have been meant to be in, by name.

    The names are written as functions of the inputs as given. Those of ImageNet's networks are
    tried on three channels; they start from 0 to 255 or from 0 to 1, whichever the range says.

    Args:
        seen: Moments of the inputs.
        axis: Of the channels: -1, or 1 where they come first.
    """
    found: dict[str, Transform] = {
        "x/255": lambda x: x / 255.0,
        "x*255": lambda x: x * 255.0,
        "x/127.5-1": lambda x: x / 127.5 - 1.0,
        "(x+1)*127.5": lambda x: (x + 1.0) * 127.5,
        "x*2-1": lambda x: x * 2.0 - 1.0,
        "(x+1)/2": lambda x: (x + 1.0) / 2.0,
    }
    top = _top(seen)
    found["-x" if top is None else f"{top:g}-x"] = lambda x: (top or 0.0) - x
    if len(seen.mean) == 3:
        found |= _colours(unit=float(seen.high.max()) <= _UNIT)
    return {name: _floating(change, axis) for name, change in found.items()}


def resolutions(shape: tuple[int, ...], *, axis: int = -1) -> dict[str, Transform]:
    """Other sizes that images could have been meant to have, by name: half and double.

    Half is the mean of two by two pixels, double repeats each.

    Args:
        shape: Of a batch of the inputs, with four axes.
        axis: Of the channels: -1, or 1 where they come first.
    """
    height, width = shape[1:3] if axis == -1 else shape[2:4]
    found: dict[str, Transform] = {}
    if not height % 2 and not width % 2 and min(height, width) >= _SMALLEST:
        found[HALF] = lambda x: x.reshape(
            len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, x.shape[3]
        ).mean(axis=(2, 4))
    if max(height, width) <= _LARGEST:
        found[DOUBLE] = lambda x: x.repeat(2, axis=1).repeat(2, axis=2)
    return {name: _floating(change, axis) for name, change in found.items()}


def other_sizes(shape: tuple[int, ...], *, axis: int = -1) -> dict[str, Transform]:
    """The rest of the sizes, each a quotient of the given one.

    Args:
        shape: As for :func:`resolutions`.
        axis: Of the channels: -1, or 1 where they come first.
    """
    sides = shape[1:3] if axis == -1 else shape[2:4]
    found: dict[str, Transform] = {}
    for quotient in QUOTIENTS:
        size = tuple(max(1, round(side * Fraction(quotient))) for side in sides)
        if min(size) >= _SMALLEST // 2 and max(size) <= 2 * _LARGEST:
            found[f"{SIZED}{quotient} of the size"] = resized(size, axis=axis)
    return found


def resized(size: tuple[int, ...], *, axis: int = -1) -> Transform:
    """Images in another size, linearly between pixels, and over as many as a smaller one joins.

    Args:
        size: Height and width.
        axis: Of the channels: -1, or 1 where they come first.
    """

    def change(x: Any) -> Any:
        rows, columns = map(_weights, x.shape[1:3], size)
        return np.einsum("ih,nhwc,jw->nijc", rows, x, columns, optimize=True)

    return _floating(change, axis)


def _weights(given: int, wanted: int) -> Array:
    """Weight of each given pixel in each wanted one: a triangle of the wider one's width."""
    step = given / wanted
    centres = (np.arange(wanted) + 0.5) * step - 0.5
    apart = np.abs(np.arange(given) - centres[:, None]) / max(1.0, step)
    weights = np.maximum(0.0, 1.0 - apart)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)


def _top(seen: InputMoments) -> float | None:
    """White, where black is 0; ``None`` where values are on both sides of 0."""
    low, high = float(seen.low.min()), float(seen.high.max())
    if low < 0:
        return None
    if high <= _UNIT:
        return 1.0
    return _BYTE if _BYTE / 2 < high <= _BYTE else high


def _colours(*, unit: bool) -> dict[str, Transform]:
    caffe, mean, deviation = map(np.asarray, (CAFFE_MEAN, TORCH_MEAN, TORCH_DEVIATION))
    raw, share = (255.0, 1.0) if unit else (1.0, 255.0)
    x = "255x" if unit else "x"
    return {
        "BGR": lambda x: x[..., ::-1],
        f"caffe({x})": lambda x: x[..., ::-1] * raw - caffe,
        f"torch({x})": lambda x: (x / share - mean) / deviation,
        "caffe⁻¹(x)": lambda x: (x + caffe)[..., ::-1],
        "caffe⁻¹(x)/255": lambda x: (x + caffe)[..., ::-1] / 255.0,
        "torch⁻¹(x)": lambda x: (x * deviation + mean) * 255.0,
        "torch⁻¹(x)/255": lambda x: x * deviation + mean,
    }


def written(name: str, *, axis: int = -1, constant: str = "np.array({values})") -> str:
    """Python that makes the encoding of a name of ``x``; see :func:`transforms`.

    Args:
        name: Of the transformation, but of none to another size.
        axis: Of the channels: -1, or 1 where they come first.
        constant: How an array of ``{values}`` is written.
    """

    def values(numbers: tuple[float, ...]) -> str:
        text = constant.format(values=list(numbers))
        return text if axis == -1 else f"{text}.reshape(3, 1, 1)"

    red_first = "[..., [2, 1, 0]]" if axis == -1 else "[:, [2, 1, 0]]"
    caffe, mean, deviation = map(values, (CAFFE_MEAN, TORCH_MEAN, TORCH_DEVIATION))
    return {
        "BGR": f"x{red_first}",
        "caffe(x)": f"x{red_first} - {caffe}",
        "caffe(255x)": f"255 * x{red_first} - {caffe}",
        "torch(x)": f"(x / 255 - {mean}) / {deviation}",
        "torch(255x)": f"(x - {mean}) / {deviation}",
        "caffe⁻¹(x)": f"(x + {caffe}){red_first}",
        "caffe⁻¹(x)/255": f"(x + {caffe}){red_first} / 255",
        "torch⁻¹(x)": f"(x * {deviation} + {mean}) * 255",
        "torch⁻¹(x)/255": f"x * {deviation} + {mean}",
    }.get(name, name)


def _floating(change: Transform, axis: int) -> Transform:
    """Apply to float32, whatever the inputs' own type, and give back a contiguous float32 array."""

    def apply(x: Any) -> Any:
        # A model with one input may be given a dict or list of one array.
        if isinstance(x, dict):
            return {key: apply(value) for key, value in x.items()}
        if isinstance(x, (list, tuple)):
            return type(x)(apply(value) for value in x)
        values = change(np.moveaxis(np.asarray(x, dtype=np.float32), axis, -1))
        return np.ascontiguousarray(np.moveaxis(values, -1, axis), dtype=np.float32)

    return apply
