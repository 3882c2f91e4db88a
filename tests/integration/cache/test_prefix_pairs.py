"""A few of the pairs that ``scripts/prefix_pairs.py`` makes: different features, different keys."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import prefix_pairs
import pytest

import frostline as fl

keras = pytest.importorskip("keras")

KERAS = [
    "function as an argument",
    "operation of a user",
    "name that is read",
    "flag that is read",
    "autocast",
]
TORCH = ["quantized", "tensor of a user's class", "parametrization", "pre-hook, inside"]
CHOSEN = [("keras", kind) for kind in KERAS]
if os.environ["KERAS_BACKEND"] == "torch":
    CHOSEN += [("torch", kind) for kind in TORCH]
    CHOSEN.append(("keras", "torch module in a wrapper"))
if os.environ["KERAS_BACKEND"] == "tensorflow":
    CHOSEN.append(("keras", "vocabulary"))
if os.environ["KERAS_BACKEND"] != "torch":
    CHOSEN.append(("keras", "compiled function"))


@pytest.mark.parametrize(("framework", "kind"), CHOSEN)
def test_different_features_have_different_keys(framework: str, kind: str) -> None:
    chosen = prefix_pairs.framework(framework)
    make = chosen.ways[kind](random.Random(3))
    one, other = make(0), make(1)
    first, second = (prefix_pairs.key(prefix).text for prefix in (one, other))
    x = chosen.x(one)
    features = [chosen.features(prefix, x) for prefix in (one, other)]
    assert prefix_pairs.difference(*features) > prefix_pairs.DIFFERENT
    assert first != second
    chosen.rename()
    assert prefix_pairs.key(make(0)).text == first


@pytest.mark.parametrize("place", ["constant of a module by a string", "attribute history"])
@pytest.mark.parametrize("form", ["class of a class", "value of a thread", "module by a string"])
def test_a_number_counts_wherever_it_is_held(form: str, place: str) -> None:
    layers = prefix_pairs.framework("keras")
    make, get = prefix_pairs.FORMS[form]
    import prefix_pairs_keras as networks

    def key(number: float) -> Any:
        part = prefix_pairs.PLACES[place](networks.Holder, make(number), get)
        return prefix_pairs.key(networks.after(part))

    layers.rename()
    assert key(1.0).text != key(2.0).text
    assert key(1.0).text == key(1.0).text


def test_features_of_a_model_whose_call_takes_no_phase(tmp_path: Path) -> None:
    import prefix_pairs_keras as networks

    prefix = networks._subclassed(networks.L.ReLU())
    x = networks.x(prefix)
    stored = prefix_pairs.stored(prefix, x, str(tmp_path))
    assert prefix_pairs.difference(stored, networks.features(prefix, x)) < 1e-5


@pytest.mark.skipif(os.environ["KERAS_BACKEND"] != "torch", reason="a module of torch")
@pytest.mark.parametrize("branches", [False, True])
def test_a_module_that_holds_a_sparse_tensor_is_split(branches: bool) -> None:
    import prefix_pairs_torch as networks
    import torch

    held = torch.tensor([0.0, 2.0]).to_sparse()
    part = networks.Tensor(held, lambda tensor: tensor.to_dense()[1])
    prefix = networks._split(part, branches=branches)
    assert prefix_pairs.key(prefix).text


def test_what_no_reading_finds_is_found_by_the_comparison() -> None:
    chosen = prefix_pairs.framework("keras")
    make = chosen.ways["global of an installed package"](random.Random(3))
    found = SimpleNamespace(one=make(0), other=make(1))
    x = chosen.x(found.one)
    assert prefix_pairs.key(found.one) == prefix_pairs.key(found.other)
    expected = chosen.features(found.other, x)
    assert not prefix_pairs.served(found.one, found.other, x, expected)


@dataclasses.dataclass
class Given:
    rows: Any


def test_inputs_that_are_no_arrays_are_refused_in_words(tmp_path: Path) -> None:
    """It was an AttributeError: an object has no dtype."""
    torch = pytest.importorskip("torch")

    class Reads(torch.nn.Linear):  # type: ignore[misc, name-defined]
        def forward(self, given: Any) -> Any:
            return super().forward(given.rows)

    ragged = [torch.ones(3, 2), torch.ones(2, 2)]
    with pytest.raises(fl.ModelError, match=r"no entry per sample.*fl\.cached"):
        fl.cache_features(Reads(2, 3).eval(), [(ragged, None)], tmp_path, verbose=0)
