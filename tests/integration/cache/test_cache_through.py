"""Features of a later frontier from those of an earlier one: right, or from the samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frostline.cache import Through, cache_features, shards
from frostline.types import DataError

keras = pytest.importorskip("keras")
L = keras.layers
pytestmark = pytest.mark.once

X = np.random.default_rng(0).normal(size=(70, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, Any]:
    """A prefix, its first part, and what lies between."""
    keras.utils.set_random_seed(0)
    inputs, crossing = keras.Input((6,)), keras.Input((5,))
    first, second = L.Dense(5, activation="tanh"), L.Dense(3)
    return (
        keras.Model(inputs, second(first(inputs))),
        keras.Model(inputs, first(inputs)),
        keras.Model(crossing, second(crossing)),
    )


def make(prefix: Any, path: Path, x: Any = X, **options: Any) -> Any:
    ways = {"engine": "native", "batch_size": 16, "verbose": 2}
    return cache_features(prefix, x, path, **{**ways, **options})


def numbers(cached: Any) -> Any:
    return cached.rows(range(len(cached)))[0]


def test_features_come_from_the_earlier_ones(parts: Any, tmp_path: Path, capfd: Any) -> None:
    whole, first, rest = parts
    earlier = make(first, tmp_path / "through")
    straight = make(whole, tmp_path / "straight")
    capfd.readouterr()
    cached = make(whole, tmp_path / "through", through=Through(cache=earlier, rest=rest))
    told = capfd.readouterr().err
    assert "70 samples, 70 computed" in told
    assert "computed from the samples" not in told
    assert cached.keys == straight.keys  # what is computed decides, not by which way
    np.testing.assert_allclose(numbers(cached), numbers(straight), rtol=1e-5, atol=1e-6)
    assert cached.views[0].collection.about["through"] == earlier.keys[0]
    make(whole, tmp_path / "through")
    assert "70 samples, 0 computed" in capfd.readouterr().err


@pytest.mark.parametrize("wrong", ["rest", "samples"])
def test_wrong_features_are_never_taken(wrong: str, parts: Any, tmp_path: Path, capfd: Any) -> None:
    whole, first, rest = parts
    straight = make(whole, tmp_path / "straight")
    if wrong == "rest":
        rest = keras.models.clone_model(rest)  # other weights
    earlier = make(first, tmp_path / "through", X + 1 if wrong == "samples" else X)
    cached = make(whole, tmp_path / "through", through=Through(cache=earlier, rest=rest))
    reason = "differ by" if wrong == "rest" else "has no features at the earlier frontier"
    told = capfd.readouterr().err
    assert reason in told
    assert "computed from the samples" in told
    assert np.array_equal(numbers(cached), numbers(straight))


def test_a_build_is_gone_on_with_in_its_own_way(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_SHARD_ROWS", 16)
    whole, first, rest = parts
    ends = {}
    for name in ("whole", "halves"):
        earlier = make(first, tmp_path / name)
        through = Through(cache=earlier, rest=rest)
        if name == "halves":
            make(whole, tmp_path / name, X[:32], through=through)
        make(whole, tmp_path / name, through=through)
        files = (tmp_path / name).rglob("*.npy")
        ends[name] = {path.name: path.read_bytes() for path in files if "shards" in path.parts}
    assert ends["whole"] == ends["halves"]
    make(whole, tmp_path / "straight", X[:32])
    begun = make(whole, tmp_path / "straight", through=Through(cache=earlier, rest=rest))
    assert begun.views[0].collection.about["through"] == ""
    assert np.array_equal(numbers(begun), numbers(make(whole, tmp_path / "other")))


def test_only_exact_features_stand_for_samples(parts: Any, tmp_path: Path) -> None:
    whole, first, rest = parts
    through = Through(cache=make(first, tmp_path), rest=rest)
    for options in ({"dtype": "float16"}, {"augment": lambda x, _: x, "augment_name": "none"}):
        with pytest.raises(DataError, match="only where they are exact and not augmented"):
            make(whole, tmp_path, through=through, **options)
