"""Let ``Model.fit`` train on features: the model itself runs, from the frontier on.

Nothing is rebuilt and nothing compiled anew. The data set hands Keras a dict of features in place
of the inputs, and while it lasts, ``model.call`` sends such a dict through the suffix and
everything else through the model as ever. So optimizer, metrics, losses, callbacks, saving and
history are the model's own, and a callback that predicts on images still can.

Batches are drawn by Keras' own adapters, so shuffling, padding and random numbers are those of
plain ``fit``: for arrays the adapter draws row numbers instead of rows; a data set of batches is
read as it is, and every sample is found by its content.
"""

from __future__ import annotations

import functools
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras.src.trainers.data_adapters import array_slicing, data_adapter_utils, get_data_adapter
from keras.src.trainers.data_adapters.array_data_adapter import can_convert_arrays
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from frostline.adapters.keras import edit as keras_edit, state as keras_state
from frostline.adapters.keras.cached_data import (
    randomness_kept as randomness_kept,
    untouched as untouched,
)
from frostline.adapters.keras.forward_pass import Collected, float32, inference, tensors
from frostline.adapters.keras.graph import resolve, walk
from frostline.adapters.keras.noise import noise_layers
from frostline.adapters.keras.overridden import overridden
from frostline.adapters.keras.pipeline import own, own_steps, prepares
from frostline.adapters.keras.prefix import layer_identity, weights_digest
from frostline.adapters.keras.rehearsal import (
    start_ramp as start_ramp,
    trains_anew as trains_anew,
)
from frostline.adapters.keras.split import peel as peel
from frostline.atomic import taken_back
from frostline.data.arrays import to_numpy
from frostline.graph.addresses import Place
from frostline.types import Array, ModelError

#: ``fetch(x)``: features of a batch, from what the inner adapter hands out in place of ``x``.
Fetch = Callable[[Any], Sequence[Array]]

_MARK = "frostline features"


class FeatureAdapter(DataAdapter):  # type: ignore[misc]
    """Batches of another adapter, with features in place of the inputs.

    Args:
        inner: Keras' adapter of row numbers, or of the user's data.
        fetch: Turns its ``x`` into features.
        shapes: ``(shape of a sample, dtype)`` per tensor of the frontier, as ``fetch`` gives them.
        frontier: Names this frontier; a step that was compiled for another one is not used again.
    """

    def __init__(
        self,
        inner: Any,
        fetch: Fetch,
        shapes: Sequence[tuple[tuple[int, ...], str]],
        frontier: str,
    ) -> None:
        self.inner = inner
        self.fetch = fetch
        self.shapes = shapes
        self.keys = feature_keys(frontier, len(shapes))
        self.problem: BaseException | None = None

    def get_numpy_iterator(self) -> Iterator[Any]:
        """Batches of numpy arrays."""
        return map(self._exchanged, self.inner.get_numpy_iterator())

    def get_jax_iterator(self) -> Iterator[Any]:
        """Batches that JAX takes."""
        return map(self._exchanged, self.inner.get_jax_iterator())

    def get_torch_dataloader(self) -> Any:
        """Batches of torch tensors, on Keras' device."""
        return _Loader(self.inner.get_torch_dataloader(), self._exchanged)

    def get_tf_dataset(self) -> Any:
        """Batches as a ``tf.data.Dataset``; features are read in its background thread."""
        import tensorflow as tf

        types = [tf.as_dtype(dtype) for _, dtype in self.shapes]

        def exchanged(*data: Any) -> Any:
            x, *rest = _unpacked(data[0] if len(data) == 1 else data)

            def read(*leaves: Any) -> Any:
                return self._fetched(keras.tree.pack_sequence_as(x, list(leaves)))

            features = tf.numpy_function(read, keras.tree.flatten(x), types)
            for feature, (shape, _) in zip(features, self.shapes, strict=True):
                feature.set_shape((None, *shape))
            return self._packed(features, rest)

        return self.inner.get_tf_dataset().map(exchanged).prefetch(tf.data.AUTOTUNE)

    def _exchanged(self, batch: Any) -> Any:
        x, *rest = _unpacked(batch)
        features: Sequence[Any] = self._fetched(x)
        if keras.backend.backend() == "torch":
            features = [keras.ops.convert_to_tensor(feature) for feature in features]
        return self._packed(features, rest)

    def _fetched(self, x: Any) -> list[Array]:
        try:
            return [np.asarray(feature) for feature in self.fetch(x)]
        except BaseException as error:
            self.problem = error  # TensorFlow turns it into an error of its own
            raise

    def _packed(self, features: Sequence[Any], rest: Sequence[Any]) -> tuple[Any, ...]:
        return (dict(zip(self.keys, features, strict=True)), *rest)

    @property
    def num_batches(self) -> Any:
        """As the inner adapter says."""
        return self.inner.num_batches

    @property
    def batch_size(self) -> Any:
        """As the inner adapter says."""
        return self.inner.batch_size

    @property
    def has_partial_batch(self) -> Any:
        """As the inner adapter says."""
        return self.inner.has_partial_batch

    @property
    def partial_batch_size(self) -> Any:
        """As the inner adapter says."""
        return self.inner.partial_batch_size

    def on_epoch_begin(self) -> None:
        """Tell the inner adapter, which tells a ``PyDataset``."""
        self.inner.on_epoch_begin()

    def on_epoch_end(self) -> None:
        """Tell the inner adapter, which tells a ``PyDataset``."""
        self.inner.on_epoch_end()


class _Loader:
    """A torch data loader seen through a function.

    Its iterator is made at once: making one draws from torch's generator, as in plain ``fit``.
    """

    def __init__(self, loader: Any, function: Callable[[Any], Any]) -> None:
        self.loader = loader
        self.function = function

    def __iter__(self) -> Iterator[Any]:
        return map(self.function, iter(self.loader))


def _unpacked(batch: Any) -> list[Any]:
    """``[x]``, ``[x, y]`` or ``[x, y, sample_weight]``, by Keras' own rule."""
    x, y, weight = data_adapter_utils.unpack_x_y_sample_weight(batch)
    given = len(batch) if isinstance(batch, (tuple, list)) and len(batch) <= 3 else 1
    return [x, y, weight][:given]


def feature_keys(frontier: str, count: int) -> tuple[str, ...]:
    """Keys of the dict that stands for inputs; sorted, as JAX sorts them."""
    return tuple(f"{_MARK} {frontier} {index:03d}" for index in range(count))


def is_arrays(x: Any, y: Any, sample_weight: Any) -> bool:
    """Whether Keras takes these as arrays."""
    return x is not None and bool(can_convert_arrays((x, y, sample_weight)))


def split_off(rows: Array, y: Any, sample_weight: Any, share: float) -> tuple[Any, Any]:
    """Keras' own ``validation_split``: (rows, y, weight) to train on, and to validate with."""
    train, held = array_slicing.train_validation_split(
        (rows, y, sample_weight), validation_split=share
    )
    return train, held


def unpack(data: Any) -> tuple[Any, Any, Any]:
    """``(x, y, sample_weight)`` of what stands in ``validation_data``, by Keras' own rule."""
    x, y, weight = data_adapter_utils.unpack_x_y_sample_weight(data)
    return x, y, weight


def adapter(
    x: Any,
    y: Any,
    sample_weight: Any,
    *,
    batch_size: int | None,
    steps: int | None,
    shuffle: Any = False,
    class_weight: Any = None,
) -> Any:
    """Keras' own adapter of data."""
    return get_data_adapter(
        x=x,
        y=y,
        sample_weight=sample_weight,
        batch_size=batch_size,
        steps_per_epoch=steps,
        shuffle=shuffle,
        class_weight=class_weight,
    )


def as_trained(x: Any) -> Any:
    """Inputs as numpy arrays in the dtype that Keras trains on: floats become floatx."""
    floatx = keras.config.floatx()

    def one(leaf: Any) -> Array:
        array = to_numpy(leaf)
        return array.astype(floatx) if array.dtype.kind == "f" else array

    return keras.tree.map_structure(one, x)


def why_plain(model: Any, *data: Any) -> str | None:
    """Say why a model trains without a cache; ``None`` when nothing speaks against one.

    Args:
        model: A Keras model.
        *data: Training and validation data.
    """
    weighty = [place.layer for place in walk(model) if place.leaf and place.layer.weights]
    if model.trainable and all(layer.trainable for layer in weighty):
        return "nothing in the model is frozen"
    if prepares(model):
        return (
            f"{type(model).__name__} prepares its data in fit: pass data that are prepared "
            "(model.preprocessor(x)) and set model.preprocessor = None"
        )
    if own(model, "fit") and not hasattr(model, "preprocess_samples"):
        return f"{type(model).__name__} has a fit of its own, which may do more than Keras' own"
    for name in own_steps(model):
        return f"{type(model).__name__} has a {name} of its own, which may read the inputs"
    if any(isinstance(item, types.GeneratorType) for item in data):
        return "a generator can be read only once"
    if getattr(model, "_distribute_strategy", None) or keras.distribution.distribution():
        return "the model is distributed over several devices"
    return None


class AtInference:
    """An augmentation as it is at inference, for validation data: ``(x, seed) -> x``.

    Args:
        augmentation: A Keras model.

    Attributes:
        name: Differs when what it computes does.
    """

    def __init__(self, augmentation: Any) -> None:
        self.augmentation = augmentation
        self.name = f"at inference: {layer_identity(augmentation).text}"

    def __call__(self, x: Any, seed: int) -> Any:  # noqa: ARG002 - nothing is random here
        """Inference outputs of a batch, as numpy arrays."""
        return keras.tree.map_structure(float32, inference(self.augmentation, tensors(x)))


def plain_fit(model: Any, data: Any, **arguments: Any) -> Any:
    """Keras' own ``fit``, which a ``fit`` that prepares data would keep from ours."""
    with keras_state.values_never_lost(model):
        return keras.Model.fit(model, data, **arguments)


def random_layers(augmentation: Any) -> str:
    """The random layers of an augmentation, as an error names them."""
    return ", ".join(map(repr, noise_layers(augmentation))) or repr(augmentation.name)


def as_loader(x: Any, batch_size: int | None, shuffle: Any) -> Any:
    """A torch ``Dataset``, or a list of ``(x, y)`` batches, as data that Keras takes."""
    if isinstance(x, list) and x and all(isinstance(item, tuple) for item in x):
        return Collected(x)
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.utils.data.Dataset) or not hasattr(x, "__len__"):
        return x
    return torch.utils.data.DataLoader(x, batch_size or 32, shuffle=bool(shuffle))


class EpochEnd(keras.callbacks.Callback):  # type: ignore[misc]
    """Call a function before the first epoch (number 0) and after each; ``True`` ends the training.

    Args:
        after: The function.
    """

    def __init__(self, after: Callable[[int], bool]) -> None:
        super().__init__()
        self.after = after

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002 - Keras'
        """Before the first epoch."""
        self.after(0)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """After an epoch; on JAX asking for the model brings the weights back."""
        model = self.model
        if self.after(epoch + 1):
            model.stop_training = True


def with_callback(given: Any, callback: Any) -> Any:
    """The callbacks of a ``fit`` call, and one more behind them."""
    if isinstance(given, keras.callbacks.CallbackList):
        given.append(callback)
        return given
    return [*keras.tree.flatten(given or []), callback]


def without_callback(given: Any, callback: Any) -> None:
    """Take a callback out of the user's own list again."""
    if isinstance(given, keras.callbacks.CallbackList) and callback in given.callbacks:
        given.callbacks.remove(callback)


def to_be_thawed(model: Any, given: Any) -> list[Place]:
    """Layers that callbacks will thaw, as far as they say so: ``GradualUnfreeze`` does."""
    if isinstance(given, keras.callbacks.CallbackList):
        given = given.callbacks
    every = keras.tree.flatten(given or [])
    return [
        place
        for callback in every
        if hasattr(callback, "will_thaw")
        for place in callback.will_thaw(model)
    ]


def behind(model: Any, since: Any) -> list[Place]:
    """Layers that ``fl.unfreeze(model, since)`` thaws."""
    return keras_edit.side(walk(model), resolve(model, since), before=False)


@contextmanager
def as_thawed(model: Any, places: Sequence[Place]) -> Iterator[None]:
    """Let these layers count as thawed for a block; flags come back as they were."""
    with taken_back(functools.partial(keras_edit.set_flags, keras_edit.flags(model))):
        for place in places:
            keras_edit.set_place(place, False, True, True)
        keras_edit.open_containers(model, walk(model), list(places))
        yield


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and the backend, as Keras does."""
    keras.utils.set_random_seed(seed)


class Guard(keras.callbacks.Callback):  # type: ignore[misc]
    """Watch that the prefix stays what the features were computed with, and count epochs.

    Args:
        prefix: The frozen part.
        beside: Callbacks that run beside it; without any, nobody could change weights, which are
            not looked at then, since hashing a large prefix takes a share of every short epoch.
    """

    def __init__(self, prefix: Any, beside: Any) -> None:
        super().__init__()
        self.prefix = prefix
        self.epoch = 0
        self.weights = weights_digest(prefix) if beside else None
        self.flags = self._flags()

    def _flags(self) -> list[tuple[str, bool]]:
        return [
            (place.path, bool(place.layer.trainable))
            for place in walk(self.prefix)
            if place.layer.weights
        ]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002 - Keras'
        """Note the epoch; refuse to go on with features that are no longer true.

        Raises:
            ModelError: A callback thawed a layer of the prefix, or changed its weights.
        """
        self.epoch = epoch
        self.check()

    def check(self) -> None:
        """Compare flags and weights with those of the start."""
        for (path, flag), (_, now) in zip(self.flags, self._flags(), strict=True):
            if now and not flag:
                raise ModelError(
                    f"'{path}' was thawed while training on cached features of it, which would "
                    "leave it untrained. Thaw between two fl.fit calls, or use model.fit."
                )
        if self.weights is not None and weights_digest(self.prefix) != self.weights:
            raise ModelError(
                "a callback changed weights or statistics of the frozen part while training on "
                "features that were computed with the old ones. Change them between two fl.fit "
                "calls, or use model.fit."
            )


@contextmanager
def features_accepted(model: Any, suffix: Any, keys: tuple[str, ...]) -> Iterator[None]:
    """While it lasts, ``model`` takes a dict of features for its inputs; on any exit no more."""
    call, check = model.call, model._assert_input_compatibility

    def is_features(inputs: Any) -> bool:
        return isinstance(inputs, dict) and set(inputs) == set(keys)

    def call_from_frontier(*args: Any, **kwargs: Any) -> Any:
        inputs = args[0] if args else kwargs.get("inputs")
        if inputs is None or not is_features(inputs):
            return call(*args, **kwargs)
        features = [inputs[key] for key in keys]
        training = args[1] if len(args) > 1 else kwargs.get("training")
        return suffix.call(features if len(features) > 1 else features[0], training=training)

    def check_inputs(inputs: Any) -> None:
        if not is_features(inputs):
            check(inputs)

    changes = {"call": call_from_frontier, "_assert_input_compatibility": check_inputs}
    with overridden((model, name, value) for name, value in changes.items()):
        yield


@contextmanager
def frozen_gradients_missing(prefix: Any) -> Iterator[None]:
    """Keep Keras from warning that our frozen BN layers, not run at all, have no gradient.

    ``frostline.layers.BatchNormalization`` can thaw at any time, so the optimizer owns variables
    of it while it is frozen; without a gradient they stay as they are, which is what frozen means.
    """
    with warnings.catch_warnings():
        if prefix.trainable_variables:
            warnings.filterwarnings("ignore", "Gradients do not exist for variables")
        yield
