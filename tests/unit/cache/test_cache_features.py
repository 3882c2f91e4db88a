"""The feature store: content, keys, faults. No framework: the prefix is a function."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

import frostline.cache as package
from frostline.cache import (
    FeatureCache,
    augmentation,
    cache_features,
    files,
    folder,
    judge,
    shards,
)
from frostline.cache.progress import Progress, in_bytes
from frostline.types import DataError, ModelError, OutputError

#: Samples that are computed again to compare them where features are reused.
JUDGED = judge.AT_FIRST + judge.FROM_ALL


class Prefix:
    """Two tensors per sample; counts the samples that it was asked for."""

    def __init__(self, name: str = "prefix", scale: float = 2.0) -> None:
        self.identity = hashlib.sha256(name.encode()).hexdigest()
        self.scale = scale
        self.seen: list[float] = []

    def __call__(self, x: Any) -> list[Any]:
        self.seen += x[:, 0].tolist()
        return [x * np.float32(self.scale), np.cumsum(x, axis=1)[:, 1:3].reshape(-1, 2, 1)]


@pytest.fixture
def x() -> Any:
    x = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
    x[:, 0] = np.arange(100)
    return x


def make(prefix: Any, x: Any, path: Path, **options: Any) -> FeatureCache:
    return cache_features(prefix, x, path, **{"batch_size": 16, "verbose": 0, **options})


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SHARD_ROWS", 32)


def everything(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


# ---------------------------------------------------------------- content


@pytest.mark.usefixtures("small_shards")
def test_row_i_is_sample_i(x: Any, tmp_path: Path) -> None:
    cache = make(Prefix(), x, tmp_path)
    order = np.random.default_rng(1).permutation(100)
    for rows in (order, [5], [7, 7, 3], np.arange(20, 60)):
        doubled, sums = cache.rows(rows)
        np.testing.assert_array_equal(doubled, x[rows] * 2)
        np.testing.assert_array_equal(sums[..., 0], np.cumsum(x, axis=1)[rows, 1:3])
    assert len(cache) == 100
    assert cache.nbytes == 100 * (6 + 2) * 4
    with pytest.raises(DataError, match="from 0 to 99"):
        cache.rows([100])


@pytest.mark.usefixtures("small_shards")
def test_samples_are_computed_once_whatever_data_set_they_come_in(x: Any, tmp_path: Path) -> None:
    prefix = Prefix()
    make(prefix, x, tmp_path)
    assert sorted(set(prefix.seen)) == list(range(100))
    prefix.seen = []
    cache = make(prefix, x[::-1][:40], tmp_path)  # another order, a subset
    assert len(set(prefix.seen)) <= JUDGED
    prefix.seen = []
    np.testing.assert_array_equal(cache.rows([0, 39])[0], x[[99, 60]] * 2)
    more = np.concatenate([x, x[:3] + 1000])  # and three new ones
    cache = make(prefix, more, tmp_path)
    assert {1000.0, 1001.0, 1002.0} <= set(prefix.seen)
    assert len(set(prefix.seen)) <= 3 + JUDGED
    np.testing.assert_array_equal(cache.rows(np.arange(103))[0], more * 2)


def test_repeated_samples_are_stored_once(x: Any, tmp_path: Path) -> None:
    twice = np.concatenate([x, x])
    cache = make(Prefix(), twice, tmp_path)
    np.testing.assert_array_equal(cache.rows(np.arange(200))[0], twice * 2)
    assert folder.entries(tmp_path)[0].samples == 100


def test_data_in_batches_of_any_size(x: Any, tmp_path: Path) -> None:
    batches = [(x[:3], np.zeros(3)), (x[3:50], np.zeros(47)), (x[50:], np.zeros(50))]
    cache = make(Prefix(), iter(batches), tmp_path)
    np.testing.assert_array_equal(cache.rows(np.arange(100))[0], x * 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_round_to_nearest(dtype: str, x: Any, tmp_path: Path) -> None:
    import ml_dtypes

    oracle = np.dtype(getattr(ml_dtypes, dtype, dtype))
    cache = make(Prefix(), x, tmp_path, dtype=dtype)
    doubled = cache.rows(np.arange(100))[0]
    assert doubled.dtype == np.float32
    np.testing.assert_array_equal(doubled, (x * 2).astype(oracle).astype(np.float32))
    assert cache.nbytes == 100 * 8 * 2


def test_dtypes_that_are_not_floats_are_kept(tmp_path: Path) -> None:
    def whole(x: Any) -> list[Any]:
        return [x, x > 3]

    whole.identity = "f" * 64  # type: ignore[attr-defined]
    x = np.arange(20, dtype=np.int64).reshape(10, 2)
    numbers, flags = make(whole, x, tmp_path, dtype="bfloat16").rows([9, 1])
    assert (numbers.dtype, flags.dtype) == (np.int64, np.bool_)
    np.testing.assert_array_equal(numbers, x[[9, 1]])


def test_double_precision_is_kept_to_the_last_bit(tmp_path: Path) -> None:
    def thirds(x: Any) -> list[Any]:
        return [x / 3]

    thirds.identity = "c" * 64  # type: ignore[attr-defined]
    x = np.random.default_rng(0).normal(size=(20, 2))
    (found,) = make(thirds, x, tmp_path).rows(np.arange(20))
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, x / 3)


def test_several_inputs_in_any_order_of_names(tmp_path: Path) -> None:
    class Sum:
        identity = "e" * 64
        calls = 0

        def __call__(self, x: Any) -> list[Any]:
            Sum.calls += len(np.unique(x["b"], axis=0))
            return [x["a"] + x["b"]]

    a, b = np.ones((4, 2), np.float32), np.arange(8, dtype=np.float32).reshape(4, 2)
    cache = make(Sum(), {"a": a, "b": b}, tmp_path)
    calls = Sum.calls
    again = make(Sum(), {"b": b, "a": a}, tmp_path)
    assert Sum.calls - calls <= judge.AT_FIRST  # compared, not computed
    calls = Sum.calls
    np.testing.assert_array_equal(cache.rows([2])[0], again.rows([2])[0])
    np.testing.assert_array_equal(cache.rows([2])[0], [[5.0, 6.0]])
    swapped = make(Sum(), {"a": b, "b": a}, tmp_path)
    assert Sum.calls > calls
    assert swapped.fingerprint != cache.fingerprint


# ---------------------------------------------------------------- keys


def test_what_decides_the_features_decides_the_key(x: Any, tmp_path: Path) -> None:
    def shift(x: Any, seed: int) -> Any:
        return x + seed

    base = make(Prefix(), x, tmp_path)
    others = [
        make(Prefix("other"), x, tmp_path),
        make(Prefix(), x, tmp_path, dtype="float16"),
        make(Prefix(), x, tmp_path, engine="native"),
        make(Prefix(), x, tmp_path, batch_size=8),
        make(Prefix(), x.astype(np.float64), tmp_path),
        make(Prefix(), x, tmp_path, augment=shift),
        make(Prefix(), x, tmp_path, augment=shift, seed=1),
        make(Prefix(), x, tmp_path, augment=lambda x, seed: x - seed),
    ]
    keys = [base.keys, *(other.keys for other in others)]
    assert len(set(keys)) == len(keys)
    changed = x.copy()
    changed[50, 5] = np.nextafter(changed[50, 5], 1)
    for data in (changed, x[::-1], x[:-1]):
        other = make(Prefix(), data, tmp_path)
        assert other.fingerprint != base.fingerprint
        np.testing.assert_array_equal(other.rows(np.arange(len(data)))[0], data * 2)


def test_views_differ_and_are_the_same_again(x: Any, tmp_path: Path) -> None:
    def noise(x: Any, seed: int) -> Any:
        return x + np.random.default_rng(seed).normal(size=x.shape).astype(np.float32)

    one = make(Prefix(), x, tmp_path / "one", views=3, augment=noise)
    two = make(Prefix(), x, tmp_path / "two", views=3, augment=noise)
    rows = np.arange(100)
    seen = [one.rows(rows, view=view)[0] for view in range(3)]
    for view in range(3):
        np.testing.assert_array_equal(seen[view], two.rows(rows, view=view)[0])
        assert not np.array_equal(seen[view], seen[view - 1])
        assert 0.5 < np.std(seen[view] / 2 - x) < 1.5
    with pytest.raises(DataError, match="more than once"):
        make(Prefix(), iter([x]), tmp_path, views=2, augment=noise)
    with pytest.raises(DataError, match="augment="):
        make(Prefix(), x, tmp_path, views=2)


SCALE = 1.0


def scaled(x: Any, seed: int) -> Any:
    return x * SCALE


def test_an_augmentation_is_known_by_what_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = augmentation.augmentation_identity

    def make_shift(amount: Any) -> Any:
        return lambda x, seed: x + amount

    same = identity(make_shift(1)) == identity(make_shift(1))
    ways = [make_shift(1), make_shift(2), scaled, functools.partial(scaled, seed=1)]
    ways += [lambda x, seed: x + np.tanh(1), lambda x, seed: x + np.tan(1)]
    found = {identity(way) for way in ways}
    assert same
    assert len(found) == len(ways)
    before = identity(scaled)
    monkeypatch.setitem(scaled.__globals__, "SCALE", 2.0)
    assert identity(scaled) != before
    with pytest.raises(DataError, match="augment_name"):
        identity(make_shift(object()))
    assert identity(make_shift(object()), "shift 1") == identity(scaled, "shift 1")


# ---------------------------------------------------------------- behaviour as the judge


class Bent(Prefix):
    """The same identity as :class:`Prefix`; another function for some samples."""

    def __init__(self, since: float = 0, share: float = 1e-2) -> None:
        super().__init__()
        self.since = since
        self.share = share

    def __call__(self, x: Any) -> list[Any]:
        doubled, sums = super().__call__(x)
        return [np.where(x[:, :1] >= self.since, doubled * (1 + self.share), doubled), sums]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("kind", ["arrays", "one-shot", "one shard"])
def test_features_of_another_computation_are_discarded(
    kind: str, x: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(Prefix(), x, tmp_path)
    data = iter([x[:30], x[30:]]) if kind == "one-shot" else x[:20] if kind == "one shard" else x
    cache = make(Bent(), data, tmp_path, verbose=2)
    rows = np.arange(len(cache))
    np.testing.assert_array_equal(cache.rows(rows)[0], Bent()(x[: len(cache)])[0])
    text = capsys.readouterr().err
    assert "differ by 9.9e-03 from what the prefix computes now" in text
    assert f"{len(cache)} samples, {len(cache)} computed, 0 already there" in text
    again = Bent()
    make(again, x[: len(cache)], tmp_path, verbose=2)
    assert len(set(again.seen)) <= JUDGED
    assert "differ" not in capsys.readouterr().err


def test_a_difference_in_later_samples_is_found(
    x: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = np.random.Generator(np.random.PCG64(0))
    monkeypatch.setattr(judge.np.random, "default_rng", lambda: drawn)
    make(Prefix(), x, tmp_path)
    cache = make(Bent(since=16), x, tmp_path)  # the first batch is as it was
    np.testing.assert_array_equal(cache.rows(np.arange(100))[0], Bent(since=16)(x)[0])
    make(Prefix("other"), x, tmp_path)
    other = Bent(since=16)
    other.identity = Prefix("other").identity
    with pytest.raises(DataError, match="run it again"):
        make(other, iter([x[:16], x[16:]]), tmp_path)
    cache = make(other, iter([x[:16], x[16:]]), tmp_path)
    np.testing.assert_array_equal(cache.rows(np.arange(100))[0], Bent(since=16)(x)[0])


def test_augmented_features_are_compared_as_they_were_augmented(
    x: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def noise(x: Any, seed: int) -> Any:
        return x + np.random.default_rng(seed).normal(size=x.shape).astype(np.float32)

    one = make(Prefix(), x, tmp_path, views=2, augment=noise)
    make(Prefix(), x, tmp_path, views=2, augment=noise, verbose=2)
    assert "differ" not in capsys.readouterr().err
    other = make(Bent(since=-99), x, tmp_path, views=2, augment=noise, verbose=2)
    assert capsys.readouterr().err.count("differ by 9.9e-03") == 2
    rows = np.arange(100)
    np.testing.assert_allclose(
        other.rows(rows, view=1)[0] / 1.01, make(Prefix("b"), x, tmp_path, views=2, augment=noise)
        .rows(rows, view=1)[0], rtol=1e-5,
    )  # fmt: skip
    assert one.keys == other.keys


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_to_sixteen_bits_is_no_difference(
    dtype: str, x: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(Prefix(), x, tmp_path, dtype=dtype)
    make(Prefix(), x, tmp_path, dtype=dtype, verbose=2)
    assert "0 computed, 100 already there" in (text := capsys.readouterr().err)
    assert "differ" not in text
    make(Bent(share=0.05), x, tmp_path, dtype=dtype, verbose=2)
    assert "differ" in capsys.readouterr().err


# ---------------------------------------------------------------- faults


@pytest.mark.usefixtures("small_shards")
def test_a_flipped_bit_in_any_file_is_found_and_repaired(x: Any, tmp_path: Path) -> None:
    make(Prefix(), x, tmp_path)
    whole = everything(tmp_path)
    rng = np.random.default_rng(2)
    assert len(whole) == 1 + 4 * 3 + 2
    for name, content in whole.items():
        for position in (0, len(content) - 1, int(rng.integers(len(content)))):
            damaged = bytearray(content)
            damaged[position] ^= 1 << int(rng.integers(8))
            (tmp_path / name).write_bytes(damaged)
            (home,) = folder.collections(tmp_path)
            assert folder.verify(home), (name, position)
            prefix = Prefix()
            cache = make(prefix, x, tmp_path)
            np.testing.assert_array_equal(cache.rows(np.arange(100))[0], x * 2)
            np.testing.assert_array_equal(cache.rows([99])[1][0, :, 0], np.cumsum(x[99])[1:3])
            assert everything(tmp_path) == whole, (name, position)
            # Only the shard that was hit is computed again (its padding and the trial apart).
            assert len(set(prefix.seen) - set(range(16))) <= 32 + JUDGED, (name, position)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("cut", [0, 10, -1])
def test_a_file_that_is_cut_short_or_gone_is_repaired(cut: int, x: Any, tmp_path: Path) -> None:
    make(Prefix(), x, tmp_path)
    whole = everything(tmp_path)
    for name in whole:
        path = tmp_path / name
        path.write_bytes(whole[name][:cut]) if cut else path.unlink()
        make(Prefix(), x, tmp_path)
        assert everything(tmp_path) == whole, name


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("damage", ["bit", "bit, old time", "cut", "swapped", "gone"])
@pytest.mark.parametrize("opened", [True, False])
def test_damage_while_in_use_is_an_error_and_is_repaired(
    damage: str, opened: bool, x: Any, tmp_path: Path
) -> None:
    cache = make(Prefix(), x, tmp_path)
    if opened:
        cache.rows(np.arange(100))
    collection, names = cache.views[0].collection, cache.views[0].manifest.shards
    path = collection.file(names[1], 0)
    content, stat = bytearray(path.read_bytes()), path.stat()
    if damage == "cut":
        os.truncate(path, len(content) // 2)
    elif damage == "gone":
        path.unlink()
    else:
        content[-5] ^= 16
        other = collection.file(names[0], 0).read_bytes() if damage == "swapped" else content
        with path.open("r+b") as stream:  # in place: what is open sees it
            stream.write(other)
        if damage == "bit, old time":
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    np.testing.assert_array_equal(cache.rows(np.arange(32))[0], x[:32] * 2)
    if damage == "gone" and opened:  # what is open is there
        np.testing.assert_array_equal(cache.rows([40])[0], x[[40]] * 2)
    else:
        with pytest.raises(DataError, match=f"shard {names[1][:12]} .* is damaged"):
            cache.rows([40])
    cache = make(Prefix(), x, tmp_path)
    np.testing.assert_array_equal(cache.rows(np.arange(100))[0], x * 2)


@pytest.mark.parametrize("place", ["shards", "manifests", "lock", "."])
def test_a_link_in_place_of_a_folder_is_refused(place: str, x: Any, tmp_path: Path) -> None:
    cache = make(Prefix(), x, tmp_path / "cache")
    path = cache.views[0].collection.folder / place
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="a link does not belong into a cache"):
        make(Prefix(), x, tmp_path / "cache")


def test_temporary_files_of_a_killed_build_are_removed(x: Any, tmp_path: Path) -> None:
    make(Prefix(), x, tmp_path)
    whole = everything(tmp_path)
    (home,) = folder.collections(tmp_path)
    for place in (home, home / "shards", home / "manifests"):
        (place / ".half.npy.123.tmp").write_bytes(b"half")
    make(Prefix(), x, tmp_path)
    assert everything(tmp_path) == whole


@pytest.mark.usefixtures("small_shards")
def test_a_failure_half_way_keeps_what_is_complete(x: Any, tmp_path: Path) -> None:
    class Fails(Prefix):
        def __call__(self, x: Any) -> list[Any]:
            if 70 in x[:, 0]:
                raise RuntimeError("half-way")
            return super().__call__(x)

    with pytest.raises(RuntimeError, match="half-way"):
        make(Fails(), x, tmp_path)
    prefix = Prefix()
    cache = make(prefix, x, tmp_path)
    assert set(prefix.seen) >= set(range(64, 100))
    assert len(set(prefix.seen)) <= 36 + JUDGED
    np.testing.assert_array_equal(cache.rows(np.arange(100))[0], x * 2)


@pytest.mark.usefixtures("small_shards")
def test_a_shard_is_written_while_the_next_one_is_computed(
    x: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    further, write, waited = threading.Event(), shards.write_shard, []

    class Announced(Prefix):
        def __call__(self, x: Any) -> list[Any]:
            if 32 in x[:, 0]:  # the first sample of the second shard
                further.set()
            return super().__call__(x)

    def patient(*given: Any) -> Any:
        waited.append(further.wait(30))
        return write(*given)

    monkeypatch.setattr(shards, "write_shard", patient)
    cache = make(Announced(), x, tmp_path)
    assert all(waited)
    np.testing.assert_array_equal(cache.rows(np.arange(100))[0], x * 2)


def test_features_that_are_not_finite_are_named(x: Any, tmp_path: Path) -> None:
    x[[17, 83], 3] = np.nan
    with pytest.raises(DataError, match=r"sample\(s\) 17"):
        make(Prefix(), x, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []  # nothing was complete
    clean = x.copy()
    clean[17, 3] = 0
    with pytest.raises(DataError, match=r"sample\(s\) 83"):
        make(Prefix(), clean, tmp_path)
    clean[83, 3] = 1e5
    with pytest.raises(DataError, match=r"bfloat16.*sample\(s\) 83"):
        make(Prefix(), clean, tmp_path, dtype="float16")
    clean[83, 3] = np.inf
    with pytest.raises(DataError, match=r"sample\(s\) 83"):
        make(Prefix(), clean, tmp_path, dtype="bfloat16")


def test_another_version_is_refused(
    x: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files, "SCHEMA", "frostline-cache/2")
        make(Prefix(), x, tmp_path)
    before = everything(tmp_path)
    with pytest.raises(DataError, match="another version"):
        make(Prefix(), x, tmp_path)
    assert everything(tmp_path) == before
    (home,) = folder.collections(tmp_path)
    assert "another version" in folder.verify(home)[0]
    assert "another version" in str(folder.entries(tmp_path)[0].problem)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a" * 63, "A" * 64, 5])
def test_a_manifest_that_leads_elsewhere_is_refused(name: Any, x: Any, tmp_path: Path) -> None:
    from frostline.cache import build

    cache = make(Prefix(), x, tmp_path)
    collection = cache.views[0].collection
    path = collection.manifests / f"{cache.fingerprint}.json"
    body = files.read_sealed(path)
    files.write_sealed(path, {**body, "shards": [name]})  # sealed anew, as an attacker would
    with pytest.raises(DataError, match="refused"):
        build.read_manifest(collection, cache.fingerprint)
    with pytest.raises(DataError, match="refused"):
        make(Prefix(), x, tmp_path)
    assert any("refused" in problem for problem in folder.verify(collection.folder))


def test_a_link_is_not_followed(x: Any, tmp_path: Path) -> None:
    cache = make(Prefix(), x, tmp_path / "cache")
    collection = cache.views[0].collection
    file = collection.file(cache.views[0].manifest.shards[0], 0)
    (tmp_path / "elsewhere.npy").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere.npy")
    cache = make(Prefix(), x, tmp_path / "cache")
    assert not file.is_symlink()
    np.testing.assert_array_equal(cache.rows([5])[0], x[[5]] * 2)


def test_objects_are_never_unpickled(x: Any, tmp_path: Path) -> None:
    def objects(x: Any) -> list[Any]:
        return [np.array([{}] * len(x), dtype=object)]

    objects.identity = "d" * 64  # type: ignore[attr-defined]
    with pytest.raises((DataError, ValueError)):
        make(objects, x, tmp_path)
    path = tmp_path / "evil.npy"
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(files.DamagedError):
        files.read_array(path, hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(files.DamagedError):
        files.StoredArray(path, hashlib.sha256(path.read_bytes()).hexdigest())


# ---------------------------------------------------------------- room


def test_what_cannot_fit_is_refused_before_the_work(
    x: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = Prefix()
    with pytest.raises(OutputError, match=r"100 samples of 32 bytes .* beyond the limit"):
        make(prefix, x, tmp_path, max_gb=2e-6)
    assert set(prefix.seen) <= set(range(16))  # the trial alone

    class Usage:
        free = 1000
        total = 10**6

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with pytest.raises(OutputError, match="the disk has"):
        make(Prefix(), x, tmp_path)


@pytest.mark.usefixtures("small_shards")
def test_the_limit_holds_where_the_size_is_not_known_before(x: Any, tmp_path: Path) -> None:
    prefix = Prefix()
    with pytest.raises(OutputError, match=r"limit.*shard\(s\) of this run are complete"):
        make(prefix, (x[i : i + 8] for i in range(0, 100, 8)), tmp_path, max_gb=3.5e-6)
    again = Prefix()
    cache = make(again, x, tmp_path)
    assert 0 < len(set(again.seen)) < 100
    np.testing.assert_array_equal(cache.rows(np.arange(100))[0], x * 2)


def test_bad_input(x: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="identity"):
        make(lambda x: [x], x, tmp_path)
    with pytest.raises(DataError, match="dtype must be one of"):
        make(Prefix(), x, tmp_path, dtype="int8")
    with pytest.raises(DataError, match="views must be at least 1"):
        make(Prefix(), x, tmp_path, views=0)
    with pytest.raises(DataError, match="no samples"):
        make(Prefix(), x[:0], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        make(Prefix(), x, tmp_path / "file")
    with pytest.raises(DataError, match="changed its shape"):
        make(Ragged(), x, tmp_path)


class Ragged:
    """The second batch has other shapes."""

    identity = "c" * 64

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Any) -> list[Any]:
        self.calls += 1
        return [np.zeros((len(x), min(3, self.calls)))]


# ---------------------------------------------------------------- folder


def test_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, x: Any) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE_DIR", str(tmp_path / "mine"))
    monkeypatch.chdir(tmp_path)
    cache = cache_features(Prefix(), x, verbose=0)
    assert cache.path == tmp_path / "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"mine"}
    monkeypatch.delenv("FROSTLINE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert folder.default_folder() == tmp_path / "xdg" / "frostline" / "features"


def test_list_and_remove(x: Any, tmp_path: Path) -> None:
    from frostline.cache.progress import Progress

    make(Prefix(), x, tmp_path)
    make(Prefix("other"), x, tmp_path, dtype="float16")
    (tmp_path / "not ours").mkdir()
    entries = folder.entries(tmp_path)
    assert [(entry.samples, entry.data_sets, entry.problem) for entry in entries] == [
        (100, 1, None),
        (100, 1, None),
    ]
    folder.remove(entries[0].folder, Progress("", None, 0))
    assert folder.collections(tmp_path) == [entries[1].folder]
    with folder.locked(entries[1].folder, Progress("", None, 0)):
        pass
    assert folder.verify(entries[1].folder) == []


def test_progress_tells_rate_and_time_left(
    x: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("frostline.cache.progress._QUIET_SECONDS", 0.0)
    make(Prefix(), x, tmp_path, verbose="auto")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "48/100 samples" in captured.err
    assert " left" in captured.err
    assert captured.err.splitlines()[-1].startswith(
        "features: 100 samples, 100 computed, 0 already"
    )
    assert package.BATCH_SIZE == 32


@pytest.mark.parametrize(
    ("count", "told"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_499, "999 kB"), (999_960, "1 MB"),
     (102_760_448, "103 MB"), (2.5e13, "25 TB")],
)  # fmt: skip
def test_bytes_in_three_digits(count: float, told: str) -> None:
    assert in_bytes(count) == told


def test_what_another_process_is_writing_is_no_shard(x: Any, tmp_path: Path) -> None:
    """Nor what a killed one left behind: readers hold no lock."""
    make(Prefix(), x, tmp_path)
    (home,) = folder.collections(tmp_path)
    for place in ("shards", "manifests"):
        (home / place / ".0123.26940egg.tmp.json").write_text("{")
    assert folder.verify(home) == []
    (entry,) = folder.entries(tmp_path)
    assert (entry.problem, entry.data_sets) == (None, 1)
    assert len(list(shards.known_shards(shards.load(home)))) > 0


def test_a_complete_cache_on_a_disk_that_is_read_only_serves(
    x: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.array(make(Prefix(), x, tmp_path).rows(np.arange(100))[0])
    opened, writes = os.open, os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def read_only(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & writes:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return opened(path, flags, *args, **kwargs)

    def no_times(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "utime", no_times)
    prefix = Prefix()
    cache = make(prefix, x, tmp_path)
    np.testing.assert_array_equal(cache.rows(np.arange(100))[0], rows)
    with pytest.raises(OutputError, match="Read-only file system"):
        make(Prefix(), x + 1, tmp_path)  # these are not there


def test_rm_holds_the_lock_until_everything_is_gone(
    x: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(Prefix(), x, tmp_path)
    (home,) = folder.collections(tmp_path)
    held: list[bool] = []
    removed = shutil.rmtree

    def watched(path: Any) -> None:
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(home / "lock", is_singleton=False).acquire(timeout=0)
        held.append(True)
        removed(path)

    monkeypatch.setattr(shutil, "rmtree", watched)
    folder.remove(home, Progress("", None, 0))
    assert held == [True, True]
    assert not home.exists()


def test_a_terminal_gets_no_command_from_the_name_of_a_folder(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Progress("a\x1b[31mred\x07", 4, 2)
    progress.say("free in b\x1b]0;t\x07\u202ec")
    progress.advance(4, 4)
    progress.finish()
    shown = capsys.readouterr().err
    assert set(shown) - {"\n"} == {c for c in shown if c.isprintable()}
    assert "free in b\\x1b]0;t\\x07\\u202ec" in shown
