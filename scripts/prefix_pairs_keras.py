"""Networks of Keras for ``prefix_pairs.py``: small ones, with one thing changed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers as L, ops  # noqa: N812
from prefix_pairs import Augmented, Way, held, in_chain, pair, settings

import frostline as fl

SHAPE = (6, 6, 3)
#: Names of layers, moved on before a network is built again.
_number = [0]


class Holder(L.Layer):  # type: ignore[misc]
    """Multiplies by a number that a subclass holds."""

    def call(self, x: Any) -> Any:
        """Multiply."""
        return x * self.factor()

    def factor(self) -> Any:
        """The number."""
        return 1.0


class Lies(Holder):
    """A layer whose configuration says nothing."""

    def get_config(self) -> dict[str, Any]:
        """Nothing."""
        return {}


def _name(word: str) -> str:
    return f"{word}_{_number[0]}"


def _body(x: Any) -> Any:
    keras.utils.set_random_seed(0)
    x = L.Conv2D(4, 3, name=_name("conv"))(x)
    norm = L.BatchNormalization(name=_name("bn"))
    x = norm(x)
    some = np.random.default_rng(1)
    norm.set_weights([some.uniform(0.5, 1.5, 4).astype(np.float32) for _ in range(4)])
    return x


def _functional(part: Any, *, split: bool = False, nested: bool = False) -> Any:
    image = keras.Input(SHAPE)
    x = _body(image)
    if nested:
        inner = keras.Input(tuple(x.shape[1:]))
        part = keras.Model(inner, part(inner), name=_name("relu"))
    x = part(x)
    if not split:
        return keras.Model(image, x)
    x = L.Dense(2, name="head")(L.GlobalAveragePooling2D()(x))
    model = keras.Model(image, x)
    fl.freeze(model, until="head")
    return fl.split(model).prefix


class Subclassed(keras.Model):  # type: ignore[misc]
    """A model with a part, called by hand."""

    def __init__(self) -> None:
        super().__init__()
        keras.utils.set_random_seed(0)
        self.conv, self.bn = L.Conv2D(4, 3), L.BatchNormalization()

    def call(self, x: Any) -> Any:
        """One after the other."""
        return self.part(self.bn(self.conv(x)))


def _subclassed(part: Any) -> Any:
    model = Subclassed()
    model.part = part
    model(x(None))
    return model


def chain(draw: random.Random) -> Callable[[Any], Any]:
    """One of several ways to a prefix with a given layer in it."""
    ways = (
        lambda part: _functional(part()),
        lambda part: _functional(part(), split=True),
        lambda part: _functional(part(), nested=True),
        lambda part: _subclassed(part()),
    )
    return draw.choice(ways)


def after(*parts: Any) -> Any:
    """A prefix of a body and what follows it."""

    def run(x: Any) -> Any:
        for part in parts:
            x = part(x)
        return x

    return _functional(run)


# --- what can be changed --------------------------------------------------------------------------


def _in_chain(part: Callable[[float], Any]) -> Way:
    """A part that is made of a number, in one of the ways of :func:`chain`."""
    return in_chain(chain, part)


def _function(k: float) -> Callable[[Any], Any]:
    return lambda t: t * k


class Scale:
    """A function that is an object."""

    def __init__(self, k: float) -> None:
        self.k = k

    def __call__(self, x: Any) -> Any:
        """Multiply."""
        return x * self.k


class Weighted(L.Layer):  # type: ignore[misc]
    """Multiplies by a weight, or by a variable that it does not track."""

    def __init__(self, k: float, *, tracked: bool) -> None:
        super().__init__()
        made = keras.Variable(np.float32(k), trainable=False)
        self.held = made if tracked else (lambda: made)

    def call(self, x: Any) -> Any:
        """Multiply."""
        return x * (self.held() if callable(self.held) else self.held)


class Constant(L.Layer):  # type: ignore[misc]
    """Multiplies by a tensor."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = np.float32(k)
        self.tensor = ops.convert_to_tensor(self.k)

    def call(self, x: Any) -> Any:
        """Multiply."""
        return x * self.tensor


class Called(L.Layer):  # type: ignore[misc]
    """Takes a function when it is called."""

    def compute_output_spec(self, x: Any, function: Any = None) -> Any:  # noqa: ARG002
        """As what goes in; JAX cannot trace a function that is given."""
        return keras.KerasTensor(x.shape, x.dtype)

    def call(self, x: Any, function: Any = None) -> Any:
        """Apply it."""
        return function(x)


class Named(L.Layer):  # type: ignore[misc]
    """Computes what its name says."""

    def call(self, x: Any) -> Any:
        """Apply it."""
        return ops.tanh(x) if self.name.startswith("tanh") else ops.relu(x)


class Trains(L.Layer):  # type: ignore[misc]
    """Computes what its flag says."""

    def call(self, x: Any) -> Any:
        """Apply it."""
        return ops.tanh(x) if self.trainable else ops.relu(x)


class Power(keras.Operation):  # type: ignore[misc]
    """An operation of a user's."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k

    def call(self, x: Any) -> Any:
        """Multiply."""
        return x * self.k

    def compute_output_spec(self, x: Any) -> Any:
        """As what goes in."""
        return keras.KerasTensor(x.shape, x.dtype)

    def get_config(self) -> dict[str, Any]:
        """Nothing."""
        return {}


class Cell(L.Layer):  # type: ignore[misc]
    """A cell of a user's."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k, self.state_size, self.output_size = k, 4, 4

    def call(self, x: Any, states: Any) -> Any:
        """A leaky sum."""
        y = x * self.k + states[0] * 0.5
        return y, [y]

    def get_config(self) -> dict[str, Any]:
        """Nothing."""
        return {}


def _hundreds(dtype: str, *, autocast: bool = True) -> Any:
    class Casts(Lies):
        def call(self, x: Any) -> Any:
            return ops.cast(ops.sin(x * 3000.0), "float32")

    return after(Casts(dtype=dtype, autocast=autocast))


def _branches(how: str) -> Any:
    keras.utils.set_random_seed(0)
    image = keras.Input(SHAPE)
    a, b = L.Conv2D(4, 3, name=_name("a")), L.Conv2D(4, 3, name=_name("b"))
    one, other = a(image), (a if how == "shared" else b)(image * 0.5)
    if how == "other way":
        one, other = other, one
    made = L.Concatenate(1 if how == "axis" else -1)([one, other])
    return keras.Model(image, made)


def _two_inputs(way: int) -> Any:
    keras.utils.set_random_seed(0)
    a, b = keras.Input((6, 6, 3), name="a"), keras.Input((6, 6, 3), name="b")
    y = a - b * 0.5
    return keras.Model([a, b] if way == 0 else [b, a], L.ReLU()(y))


def _quantized(k: float) -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(SHAPE), L.Flatten(), L.Dense(8, name=_name("d"))])
    model.layers[-1].kernel.assign(model.layers[-1].kernel * k)
    model.quantize("int8")
    return model


def _bn(field: str) -> Callable[[float], Any]:
    def made(k: float) -> Any:
        model = after(L.Activation("linear"))
        norm = next(each for each in model.layers if isinstance(each, L.BatchNormalization))
        variable = getattr(norm, field)
        variable.assign(variable * k + 0.1 * k)
        return model

    return made


def _patched(k: float) -> Any:
    part = L.Activation("relu")
    call = part.call
    part.call = lambda x: call(x) * k
    return after(part)


def _dense(**ways: Any) -> Any:
    keras.utils.set_random_seed(0)
    return after(L.Dense(3, name=_name("same"), **ways))


def _masked(value: float) -> Any:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 3))
    x = L.Reshape((6, 18))(ops.round(inputs))
    return keras.Model(inputs, L.LSTM(3)(L.Masking(value)(x * 0.0 + ops.round(x[:, :, :1]))))


def _cells(k: float) -> Any:
    keras.utils.set_random_seed(0)
    return after(L.Reshape((4, 16)), L.Dense(4), L.RNN(Cell(k)))


def _of_package(k: float) -> Any:
    class Reads(L.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            return x * keras.of_a_test[id(self)]

    made = Reads()
    vars(keras).setdefault("of_a_test", {})[id(made)] = k
    vars(keras).setdefault("kept_by_a_test", []).append(made)
    return after(made)


def _vocabulary(way: int) -> Any:
    table = L.StringLookup(num_oov_indices=1)
    words = ["1", "2", "3"]
    table.set_vocabulary(words if way == 0 else words[::-1])
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), dtype="string")
    return keras.Model(inputs, L.Embedding(8, 3)(table(inputs)))


def ways() -> dict[str, Way]:
    """Kinds of difference; the first one is drawn half of the time."""
    names = ["relu", "tanh", "sigmoid", "silu", "gelu", "elu", "softplus", "linear", "softmax"]
    functions = [ops.relu, ops.tanh, ops.sin, ops.abs, ops.sigmoid, ops.square, ops.exp]
    kinds: dict[str, Way] = {
        "a held number": held(Holder, chain),
        "a held number, a layer whose configuration lies": held(Lies, chain),
        "activation of its layer's name": settings(
            lambda act: after(L.Activation(act, name=act)), act=names
        ),
        "activation": settings(lambda act: after(L.Activation(act, name=_name("relu"))), act=names),
        "activation of a dense layer": settings(lambda act: _dense(activation=act), act=names),
        "function of keras.ops": settings(lambda f: after(f), f=functions),
        "function of keras.ops in an activation": settings(
            lambda f: after(L.Activation(f)), f=functions
        ),
        "padding of its layer's name": settings(
            lambda p: after(L.AveragePooling2D(3, 1, padding=p, name=p), L.GlobalMaxPooling2D()),
            p=["same", "valid"],
        ),
        "padding mode": settings(
            _padded,
            mode=["constant", "reflect", "symmetric"],
        ),
        "data format": settings(
            lambda f: after(L.GlobalAveragePooling2D(data_format=f)),
            f=["channels_last", "channels_first"],
        ),
        "interpolation": settings(
            lambda i: after(L.UpSampling2D(2, interpolation=i)), i=["nearest", "bilinear"]
        ),
        "size of its interpolation": settings(
            lambda i: after(L.Resizing(5, 5, interpolation=i)), i=["nearest", "bilinear", "bicubic"]
        ),
        "eps": settings(_eps, eps=[1e-3, 0.1, 0.5, 2.0]),
        "groups": settings(lambda g: after(L.GroupNormalization(g)), g=[1, 2, 4]),
        "axis": settings(lambda a: after(L.Softmax(axis=a)), a=[1, 2, 3]),
        "slope": settings(lambda s: after(L.LeakyReLU(s)), s=[0.01, 0.1, 0.3]),
        "largest value": settings(lambda m: after(L.ReLU(max_value=m)), m=[0.3, 0.6, 6.0]),
        "two branches": settings(_branches, how=["one way", "other way", "shared", "axis"]),
        "order of inputs": settings(_two_inputs, way=[0, 1]),
        "dtype of its policy": settings(
            _hundreds,
            dtype=["float32", "mixed_bfloat16", "mixed_float16"],
        ),
        "autocast": settings(lambda a: _hundreds("mixed_bfloat16", autocast=a), a=[True, False]),
        "mask": settings(_masked, value=[0.0, 1.0]),
        "name that is read": settings(lambda n: after(Named(name=n)), n=["relu", "tanh"]),
        "flag that is read": settings(_flag, flag=[True, False]),
        "permutation": settings(lambda d: after(L.Permute(d)), d=[(1, 2, 3), (2, 1, 3)]),
        "operation on a constant": pair(lambda k: after(lambda t: t * k)),
        "operation on an array": pair(lambda k: after(lambda t: t + np.full(4, k, np.float32))),
        "clip": pair(lambda k: after(lambda t: ops.clip(t, -0.2 * k, 0.2 * k))),
        "operation of a user": pair(lambda k: after(Power(k))),
        "function in ops.map": pair(lambda k: after(lambda t: ops.map(_function(k), t))),
        "function in ops.vectorized_map": pair(
            lambda k: after(lambda t: ops.vectorized_map(_function(k), t))
        ),
        "function as an argument": pair(
            lambda k: after(lambda t: Called()(t, function=_function(k)))
        ),
        "object as an argument": pair(lambda k: after(lambda t: Called()(t, function=Scale(k)))),
        "body of a lambda": settings(_lambda, number=[0, 1, 2]),
        "closure of a lambda": pair(lambda k: after(L.Lambda(_function(k)))),
        "object in a lambda": pair(lambda k: after(L.Lambda(Scale(k)))),
        "polynomial in a lambda": pair(lambda k: _of_library(np.poly1d([k, 0.1]))),
        "arguments of a lambda": pair(
            lambda k: after(L.Lambda(lambda t, by: t * by, arguments={"by": k}))
        ),
        "function in an activation": pair(lambda k: after(L.Activation(_function(k)))),
        "object in an activation": pair(lambda k: after(L.Activation(Scale(k)))),
        "function in a dense layer": pair(lambda k: _dense(activation=_function(k))),
        "cell of a user": pair(_cells),
        "function in TimeDistributed": pair(
            lambda k: after(L.TimeDistributed(L.Lambda(_function(k))))
        ),
        "replaced method of a stock layer": pair(_patched),
        "weight": _in_chain(lambda k: Weighted(k, tracked=True)),
        "variable that is not tracked": _in_chain(lambda k: Weighted(k, tracked=False)),
        "tensor": _in_chain(Constant),
        "rescaling": pair(lambda k: after(L.Rescaling(k))),
        "mean of Normalization": pair(lambda k: after(L.Normalization(mean=k, variance=1.0))),
        "quantized": pair(_quantized),
        "augmentation": pair(lambda k: Augmented(after(ops.relu), lambda t, _: t * np.float32(k))),
        "global of an installed package": pair(_of_package),
    }
    for field in ("gamma", "beta", "moving_mean", "moving_variance"):
        kinds[f"{field} of BN"] = pair(_bn(field))
    if keras.backend.backend() == "torch":
        kinds["torch module in a wrapper"] = pair(_wrapped)
    if keras.backend.backend() == "jax":
        kinds["compiled function"] = pair(lambda k: after(L.Activation(_jitted(k))))
    if keras.backend.backend() == "tensorflow":
        kinds["compiled function"] = pair(lambda k: after(L.Activation(_traced(k))))
        kinds["vocabulary"] = settings(_vocabulary, way=[0, 1])
    return kinds


def _padded(mode: str) -> Any:
    return after(lambda t: ops.pad(t, ((0, 0), (1, 1), (1, 1), (0, 0)), mode=mode))


def _eps(eps: float) -> Any:
    return after(L.BatchNormalization(epsilon=eps), ops.copy)


def _flag(flag: bool) -> Any:
    part = Trains()
    part.trainable = flag
    return after(part)


def _lambda(number: int) -> Any:
    bodies = [lambda t: t * 1.5, lambda t: t * 2.5, lambda t: t + 1.5]
    return after(L.Lambda(bodies[number]))


def _of_library(polynomial: Any) -> Any:
    return after(L.Lambda(lambda t: t * float(polynomial(2.0))))


def _wrapped(k: float) -> Any:
    from prefix_pairs_torch import Tensor

    part = Tensor(np.poly1d([k]), _at_one)
    return after(keras.layers.TorchModuleWrapper(part, output_shape=(None, 4, 4, 4)))


def _at_one(polynomial: Any) -> float:
    return float(polynomial(1.0))


def _jitted(k: float) -> Any:
    import jax

    return jax.jit(lambda t: t * k)


def _traced(k: float) -> Any:
    import tensorflow as tf

    return tf.function(lambda t: t * k)


def x(prefix: Any) -> Any:
    """Samples for a prefix."""
    some = np.random.default_rng(0)
    inputs = getattr(prefix, "inputs", None) or ()
    if inputs and inputs[0].dtype == "string":
        return some.integers(0, 4, (8, 4)).astype(str)
    arrays = [some.normal(size=(8, *SHAPE)).astype(np.float32) for _ in inputs or [None]]
    return arrays[0] if len(arrays) == 1 else [(tuple(arrays), np.zeros(8))]


def features(prefix: Any, samples: Any) -> list[Any]:
    """What Keras itself gives at inference."""
    if isinstance(prefix, Augmented):
        prefix, samples = prefix.prefix, prefix.augment(samples, 0)
    samples = list(samples[0][0]) if isinstance(samples, list) else samples
    found = prefix(samples, training=False)
    found = found if isinstance(found, (tuple, list)) else [found]
    return [np.asarray(keras.ops.convert_to_numpy(each), np.float32) for each in found]


def rename() -> None:
    """Other names for all layers."""
    _number[0] += 1
    L.Conv2D(1, 1)
