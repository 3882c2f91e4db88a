"""What other tools get wrong, as facts about ours on Keras models, on every backend.

Each test names the fact (``compare_peers.py`` runs the torch tools themselves). The oracle is
numpy in float64 on the weights of one small network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest

import frostline as fl
from frostline.adapters.keras.graph import walk

L = keras.layers
EPSILON, MOMENTUM = 0.02, 0.97
RNG = np.random.default_rng(0)
# Two sources, one after the other: batches differ from each other.
X = np.concatenate([RNG.normal(0, 1, (48, 6)), RNG.normal(3, 2, (48, 6))]).astype("float32")
Y = RNG.integers(0, 2, 96)
SIZES = (48, 40, 8)


def norm(name: str, **settings: Any) -> Any:
    return L.BatchNormalization(epsilon=EPSILON, momentum=MOMENTUM, name=name, **settings)


def network() -> Any:
    """Two BN layers with dropout between; the second one has neither gamma nor beta."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = L.ReLU()(norm("bn1")(L.Dense(5, name="d1")(inputs)))
    x = norm("bn2", scale=False, center=False)(L.Dense(5, name="d2")(L.Dropout(0.5)(x)))
    model = keras.Model(inputs, L.Dense(2, name="head")(x))
    for number, name in enumerate(("bn1", "bn2")):
        layer = model.get_layer(name)
        layer.moving_mean.assign(np.linspace(-1, 1, 5) + number)
        layer.moving_variance.assign(np.linspace(0.5, 2, 5))
    model.get_layer("bn1").gamma.assign(np.linspace(-1, 2, 5))
    return model


def batches(sizes: tuple[int, ...] = SIZES) -> Iterator[Any]:
    start = 0
    for size in sizes:
        yield X[start : start + size], Y[start : start + size]
        start += size


def value(variable: Any) -> Any:
    return np.array(keras.ops.convert_to_numpy(variable), dtype=np.float64)


def stored(model: Any, name: str) -> tuple[Any, Any]:
    layer = next(place.layer for place in walk(model) if place.path == name)
    return value(layer.moving_mean), value(layer.moving_variance)


def close(found: tuple[Any, Any], wanted: tuple[Any, Any]) -> None:
    for have, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)


def population(model: Any, method: str, sizes: tuple[int, ...] = SIZES) -> dict[str, Any]:
    """Moments of all samples at both sites, dropout off, in float64.

    ``batch``: the first site normalises each batch with its own moments. ``sequential``: it does
    with those of all samples.
    """
    first, second = (model.get_layer(name) for name in ("d1", "d2"))
    gamma, beta = value(model.get_layer("bn1").gamma), value(model.get_layer("bn1").beta)
    hidden = X.astype(np.float64) @ value(first.kernel) + value(first.bias)
    cuts = np.cumsum(sizes)[:-1] if method == "batch" else []
    later = []
    for part in np.split(hidden, cuts):
        normal = (part - part.mean(0)) / np.sqrt(part.var(0) + EPSILON) * gamma + beta
        later.append(np.maximum(normal, 0) @ value(second.kernel) + value(second.bias))
    behind = np.concatenate(later)
    return {"bn1": (hidden.mean(0), hidden.var(0)), "bn2": (behind.mean(0), behind.var(0))}


def everything(model: Any) -> list[Any]:
    """Bits of all variables, flags of layers and variables, momenta, modes of torch modules."""
    layers = [model, *(place.layer for place in walk(model))]
    slots = model.optimizer.variables if model.compiled else []
    return [
        *(keras.ops.convert_to_numpy(v).tobytes() for v in [*model.variables, *slots]),
        *(bool(each.trainable) for each in [*layers, *model.variables]),
        *(layer.momentum for layer in layers if isinstance(layer, L.BatchNormalization)),
        *(layer.training for layer in layers if keras.backend.backend() == "torch"),
        *(sorted(vars(layer)) for layer in layers[1:]),
    ]


@pytest.mark.parametrize("method", ["sequential", "batch"])
def test_a_loader_of_any_length_counts_each_sample_once(method: Any) -> None:
    """AIMET divides by the batches that it asked for, and needs gamma and beta. ``update_bn`` and
    AIMET weigh a last short batch like a full one, leave out the variance between batches, and run
    with dropout on. AIMET's momentum stays 0 afterwards."""
    model = network()
    wanted = population(model, method)
    settings = [layer.get_config() for layer in model.layers]
    fl.recalibrate(model, batches(), method=method)
    for name, moments in wanted.items():
        close(stored(model, name), moments)
    assert [layer.get_config() for layer in model.layers] == settings


@pytest.mark.parametrize("method", ["sequential", "batch"])
def test_a_loader_that_breaks_off_leaves_no_trace(method: Any) -> None:
    """fvcore's loader that is too short ends in an assertion, with the statistics overwritten and
    momentum at 1.0; ``update_bn`` leaves them reset and momentum at None."""
    model = network()
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    model.get_layer("d2").bias.trainable = False  # a flag that no setter of a layer restores
    before = everything(model)

    def loader() -> Iterator[Any]:
        yield from batches((48,))
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        fl.recalibrate(model, loader(), method=method)
    assert everything(model) == before


def test_frozen_sites_and_modes_of_single_layers_stay() -> None:
    """``update_bn`` resets frozen sites and puts every module into the mode of the root; AIMET,
    asked for a frozen site, writes back what was there."""
    model = network()
    fl.freeze(model, "d2")
    before = everything(model)
    fl.recalibrate(model, batches()).undo()
    assert everything(model) == before
    kept = stored(model, "bn1")
    flags = [layer.trainable for layer in model.layers]
    fl.recalibrate(model, batches())
    np.testing.assert_array_equal(stored(model, "bn1"), kept)
    fl.recalibrate(model, batches(), sites="frozen")
    close(stored(model, "bn1"), population(model, "sequential")["bn1"])
    assert [layer.trainable for layer in model.layers] == flags


def test_a_shared_layer_has_the_statistics_of_all_its_uses() -> None:
    """fvcore asserts that no layer is used twice."""
    one, other, shared = keras.Input((6,)), keras.Input((6,)), norm("shared")
    model = keras.Model([one, other], L.Add()([shared(one), shared(other)]))
    fl.recalibrate(model, ((X, 2 * X + 1),))
    both = np.concatenate([X, 2 * X + 1]).astype(np.float64)
    close(stored(model, "shared"), (both.mean(0), both.var(0)))


def test_equal_names_in_nested_models_are_two_sites() -> None:
    """AIMET keeps its statistics by ``layer.name``."""
    inner = [keras.Sequential([keras.Input((6,)), norm("bn")], name=name) for name in ("a", "b")]
    model = keras.Sequential([keras.Input((6,)), inner[0], L.Dense(6, name="d"), inner[1]])
    fl.recalibrate(model, X)
    exact, dense = X.astype(np.float64), model.get_layer("d")
    close(stored(model, "a/bn"), (exact.mean(0), exact.var(0)))
    middle = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + EPSILON) @ value(dense.kernel)
    close(stored(model, "b/bn"), (middle.mean(0), middle.var(0)))


REPAIRS: dict[str, Callable[[Any], Any]] = {
    "freeze": fl.freeze,
    "freeze and unfreeze": lambda model: (fl.freeze(model), fl.unfreeze(model)),
    "convert": fl.convert,
    "convert and restore": lambda model: fl.restore(fl.convert(model)),
    "fold": fl.fold,
}


@pytest.mark.parametrize("repair", REPAIRS)
def test_epsilon_and_momentum_are_kept(repair: str) -> None:
    """``replace_batch_norm`` of the DETR family drops epsilon; timm's ``unfreeze`` and detectron2's
    way back from FrozenBatchNorm give momentum its default."""
    model = network()
    small = np.full(5, 1e-4)  # epsilon decides
    for name in ("bn1", "bn2"):
        model.get_layer(name).moving_variance.assign(small)
    before = value(model(X[:4], training=False))
    done = REPAIRS[repair](model)
    model = done if repair == "fold" else model
    np.testing.assert_allclose(value(model(X[:4], training=False)), before, rtol=1e-4, atol=1e-4)
    for site in fl.sites(model):
        assert (site.epsilon, site.decay) == (EPSILON, MOMENTUM)


def test_frozen_is_frozen_in_training_whatever_the_rank() -> None:
    """Lightning trains the BN of a frozen backbone, finetuning-scheduler lets its statistics move,
    frozen classes elsewhere are two-dimensional, fastai's misses BN without gamma and beta."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((2, 2, 2, 3))
    x = norm("rank5", scale=False, center=False)(inputs)
    x = norm("rank4")(L.Reshape((4, 2, 3))(x))
    x = norm("rank3")(L.Reshape((8, 3))(x))
    x = norm("rank2")(L.Flatten()(x))
    model = keras.Model(inputs, L.Dense(1, name="head")(x))
    fl.freeze(model, "head")
    model.compile(keras.optimizers.AdamW(0.1, weight_decay=0.1), "mse")
    data = RNG.normal(5, 3, (16, 2, 2, 2, 3)).astype("float32")
    kept = [w for layer in model.layers[:-1] for w in layer.get_weights()]
    own = model.predict(data, verbose=0)
    assert model.train_on_batch(data, own) < 1e-8  # training computes what inference computes
    model.train_on_batch(data, own + 1)
    now = [w for layer in model.layers[:-1] for w in layer.get_weights()]
    for old, new in zip(kept, now, strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_optimizer_keeps_the_weights_that_it_knows() -> None:
    """timm swaps layers: an optimizer that was made before holds parameters of nobody."""
    model = network()
    model.compile("adam", "mse")
    model.train_on_batch(X, np.zeros((96, 2)))
    known = [id(variable) for variable in model.optimizer._trainable_variables]
    change = fl.freeze(model, "d2")
    fl.unfreeze(model)
    change.undo()
    assert [id(variable) for variable in model.trainable_variables] == known
    before = model.get_layer("bn1").get_weights()
    model.train_on_batch(X, np.zeros((96, 2)))
    assert not np.array_equal(before[0], model.get_layer("bn1").get_weights()[0])
