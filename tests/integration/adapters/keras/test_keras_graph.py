"""Paths, order, sharing and boundaries of every kind of Keras model."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

import frostline as fl
from frostline.adapters import adapter_of
from frostline.adapters.keras import graph as keras_graph
from frostline.types import Boundary, ModelError

L = keras.layers


def backbone(name: str) -> Any:
    inputs = keras.Input((4,))
    x = L.BatchNormalization(name="bn1")(L.Dense(4, name="d1")(inputs))
    return keras.Model(inputs, L.BatchNormalization(name="bn2")(x), name=name)


def two_backbones() -> Any:
    inputs = keras.Input((4,), name="in")
    x = backbone("second")(backbone("first")(inputs))
    return keras.Model(inputs, L.Dense(1, name="head")(x))


class Block(L.Layer):  # type: ignore[misc]
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.plain = L.BatchNormalization(name="plain")
        self.listed = [L.BatchNormalization(name="twin"), L.BatchNormalization(name="twin")]
        self.keyed = {"a": L.BatchNormalization(name="keyed")}

    def call(self, x: Any) -> Any:
        for each in (self.plain, *self.listed, self.keyed["a"]):
            x = each(x)
        return x


def paths(model: Any) -> list[str]:
    return [place.path for place in keras_graph.walk(model)]


def site_paths(model: Any) -> list[str]:
    return [site.path for site in keras_graph.sites(model)]


def test_equal_names_in_two_backbones() -> None:
    model = two_backbones()
    assert site_paths(model) == ["first/bn1", "first/bn2", "second/bn1", "second/bn2"]
    assert [site.index for site in keras_graph.sites(model)] == [0, 1, 2, 3]


def test_top_level_order_is_that_of_model_layers() -> None:
    inputs = keras.Input((4,))
    left = L.Dense(4, name="z_left")(inputs)
    right = L.BatchNormalization(name="a_right")(L.Dense(4, name="m_right")(inputs))
    model = keras.Model(inputs, L.Add()([right, left]))
    assert paths(model) == [layer.name for layer in model.layers]


def test_layers_in_attributes_lists_and_dicts() -> None:
    model = keras.Sequential([keras.Input((4,)), Block(name="block")])
    assert site_paths(model) == [
        "block/plain",
        "block/twin",
        "block/twin#2",
        "block/keyed",
    ]
    assert paths(model) == paths(model)


def test_wrappers_are_seen_through() -> None:
    inner = L.BatchNormalization(name="bn")
    model = keras.Sequential([keras.Input((3, 4)), L.TimeDistributed(inner, name="each")])
    assert site_paths(model) == ["each/bn"]


def test_uses_are_counted_through_containers() -> None:
    shared = backbone("tower")
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    bn = L.BatchNormalization(name="joint")
    towers = [shared(bn(a)), shared(bn(b)), shared(bn(L.Dense(4)(a)))]
    model = keras.Model([a, b], L.Concatenate()(towers))
    assert {s.path: s.calls for s in keras_graph.sites(model)} == {
        "joint": 3,
        "tower/bn1": 3,
        "tower/bn2": 3,
    }


def test_uses_outside_the_model_do_not_count() -> None:
    bn = L.BatchNormalization(name="bn")
    inputs = keras.Input((4,))
    middle = bn(inputs)
    keras.Model(inputs, bn(middle))  # another model that uses it once more
    assert keras_graph.sites(keras.Model(inputs, middle))[0].calls == 1


class Custom(L.BatchNormalization):  # type: ignore[misc]
    pass


def test_what_a_site_says() -> None:
    model = keras.Sequential(
        [keras.Input((5, 3)), Custom(axis=1, momentum=0.9, epsilon=0.01, name="bn")]
    )
    site = keras_graph.sites(model)[0]
    assert (site.kind, site.channels, site.axis) == ("Custom", 5, 1)
    assert (site.decay, site.epsilon) == (0.9, 0.01)
    assert (site.params_frozen, site.stats_frozen, site.policy) == (False, False, "inference")
    model.layers[0].trainable = False
    site = keras_graph.sites(model)[0]
    assert (site.params_frozen, site.stats_frozen) == (True, True)


def test_a_frozen_root_trains_nothing_but_its_thawed_statistics_move() -> None:
    model = keras.Sequential([keras.Input((4,)), L.BatchNormalization(name="bn"), L.Dense(1)])
    model.trainable = False
    model.layers[0].trainable = True
    site = keras_graph.sites(model)[0]
    assert (site.params_frozen, site.stats_frozen) == (True, False)
    assert model.trainable_variables == []  # Keras' own account of the first
    before = np.array(model.layers[0].moving_mean)
    model(np.ones((8, 4), "float32") * 3, training=True)
    assert not np.array_equal(before, np.array(model.layers[0].moving_mean))  # and of the second


def test_unbuilt_sites_have_no_channels() -> None:
    assert keras_graph.sites(keras.Sequential([L.BatchNormalization()]))[0].channels is None


def test_torch_modules_inside_a_wrapper(backend: str) -> None:
    if backend != "torch":
        pytest.skip("TorchModuleWrapper exists on the torch backend only")
    import torch

    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3),
        torch.nn.BatchNorm2d(6, momentum=0.3),
        torch.nn.Sequential(torch.nn.BatchNorm2d(6, momentum=None)),
    )
    inputs = keras.Input((3, 8, 8))
    wrapper = keras.layers.TorchModuleWrapper(module, output_shape=(None, 6, 6, 6), name="wrap")
    model = keras.Model(inputs, wrapper(inputs))
    for _ in range(3):
        module(torch.ones(2, 3, 8, 8, device=module[0].weight.device))
    wrapper.trainable = False
    first, second = keras_graph.sites(model)
    assert (first.path, first.kind, first.channels) == ("wrap/1", "torch.BatchNorm2d", 6)
    assert first.decay == pytest.approx(0.7)  # torch's momentum is the share of the new value
    assert second.path == "wrap/2/0"
    assert second.decay == pytest.approx(3 / 4)  # cumulative: after 3 updates a 4th keeps 3/4
    assert (first.params_frozen, first.stats_frozen) == (True, False)
    before = module[1].running_mean.clone()
    model(np.ones((2, 3, 8, 8), "float32"), training=True)
    assert not torch.equal(before, module[1].running_mean)  # Keras' `trainable` does not hold them


# --- boundaries -----------------------------------------------------------------------------------


def test_every_way_to_name_a_boundary() -> None:
    model = two_backbones()
    inner = model.get_layer("second").get_layer("bn1")
    wanted = Boundary(path="second/bn1", index=2)
    for reference in ("second/bn1", inner, wanted):
        assert keras_graph.resolve(model, reference) == wanted
    for reference in (3, -1, np.int64(3), "head", model.layers[3]):
        assert keras_graph.resolve(model, reference) == Boundary(path="head", index=3)
    for reference in (None, 4, 1.0):
        assert keras_graph.resolve(model, reference) == Boundary(path=None, index=4)


def test_a_fraction_counts_leaf_layers_in_execution_order() -> None:
    model = two_backbones()
    leaves = [p.path for p in keras_graph.walk(model) if p.leaf]
    for cut in range(len(leaves)):
        assert keras_graph.resolve(model, cut / len(leaves)).path == leaves[cut]


def test_an_index_counts_a_layer_that_was_met_deeper_down() -> None:
    bn = L.BatchNormalization(name="bn")
    inner_in = keras.Input((4,))
    inner = keras.Model(inner_in, bn(inner_in), name="inner")
    inputs = keras.Input((4,), name="in")
    model = keras.Model(inputs, L.Dense(1, name="head")(bn(inner(inputs))))
    assert [layer.name for layer in model.layers] == ["in", "inner", "bn", "head"]
    found = [keras_graph.resolve(model, index).path for index in range(5)]
    assert found == ["in", "inner", "inner/bn", "head", None]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("firzt/bn1", r"not a layer of this model\. Closest: 'first/bn1'.*Received: 'firzt/bn1'"),
        ("zzzz", r"Its layers go from 'in' to 'head'"),
        ("bn1", r"names 2 layers; use one of the paths 'first/bn1', 'second/bn1'"),
        (5, r"between -4 and 4"),
        (-5, r"between -4 and 4"),
        (1.01, r"between 0\.0 and 1\.0"),
        (float("nan"), r"between 0\.0 and 1\.0"),
        (True, r"a layer name, a path, an index.*\(bool\)"),
        ([1], r"\(list\)"),
    ],
)
def test_wrong_boundaries(reference: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        keras_graph.resolve(two_backbones(), reference)
    assert "\n" not in str(caught.value)


def test_a_layer_of_another_model() -> None:
    with pytest.raises(ModelError, match="'head' is not part of this model"):
        keras_graph.resolve(two_backbones(), two_backbones().get_layer("head"))


# --- what is not a model --------------------------------------------------------------------------


class _Legacy:
    __module__ = "tf_keras.src.engine.training"


class _OtherBackend:
    __module__ = "keras.src.models.model"


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (_Legacy(), "legacy Keras 2"),
        (_OtherBackend(), "another backend"),
        (L.Dense(1), "a single layer"),
        (
            "model.keras",
            r"expected a keras\.Model or a torch\.nn\.Module\. Received: builtins\.str",
        ),
        (None, "Received: builtins.NoneType"),
    ],
)
def test_not_a_keras_model(thing: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        adapter_of(thing)


def test_native_torch_has_a_view_of_its_own(backend: str) -> None:
    torch = pytest.importorskip("torch")
    assert adapter_of(torch.nn.Linear(2, 2)).framework == "torch"
    assert adapter_of(torch.nn.Linear(2, 2)).sites() == ()


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        (0, (None, None)),
        ("first/bn1", (0, "first/bn1")),
        ("second", (2, "second/d1")),
        ("head", (4, "head")),
        (None, (4, None)),
    ],
)
def test_where_the_frozen_prefix_ends(until: Any, expected: Any) -> None:
    model = two_backbones()
    fl.freeze(model, until)
    found = fl.sites(model)
    assert (found.before, found.boundary) == expected
    assert ("boundary: " in str(found)) == (until != 0)


@pytest.mark.parametrize("half", ["params", "statistics"])
def test_a_layer_that_is_frozen_by_half_is_not_in_the_prefix(half: str) -> None:
    model = two_backbones()
    fl.freeze(model)
    fl.unfreeze(model, "second/bn1", **{half: False})
    assert fl.sites(model).boundary == ("second/bn1")
