"""Every kind of data gives the same samples in the same order, or one clear error."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st

from frostline.data.arrays import leaves, to_numpy
from frostline.data.batch import Batch
from frostline.data.batches import batches, collect, is_reiterable, require_reiterable
from frostline.types import DataError

X = np.arange(30, dtype=np.float32).reshape(10, 3)
Y = np.arange(10)


def pairs() -> list[tuple[Any, Any]]:
    return [(X[:4], Y[:4]), (X[4:8], Y[4:8]), (X[8:], Y[8:])]


@given(n=st.integers(1, 50), size=st.integers(1, 60), limit=st.none() | st.integers(1, 60))
def test_arrays_are_cut_in_order_without_loss(n: int, size: int, limit: int | None) -> None:
    x, y, weight = np.arange(n), np.arange(n) * 2, np.arange(n) * 3.0
    parts = list(batches((x, y, weight), batch_size=size, max_samples=limit))
    kept = n if limit is None else min(n, limit)
    assert all(len(part) == size for part in parts[:-1])
    assert np.concatenate([p.x for p in parts]).tolist() == list(range(kept))
    assert np.concatenate([p.y for p in parts]).tolist() == list(range(0, 2 * kept, 2))
    assert np.concatenate([p.sample_weight for p in parts]).tolist() == list(range(0, 3 * kept, 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: (X, Y),
        lambda: (X.tolist(), Y.tolist()),
        pairs,
        lambda: iter(pairs()),
        lambda: (pair for pair in pairs()),
        lambda: [Batch(x, y) for x, y in pairs()],
        lambda: (list(pair) for pair in pairs()),
        lambda: Batch(X, Y),
        lambda: map(tuple, pairs()),
    ],
    ids=["arrays", "lists", "list", "iterator", "generator", "batches", "as-lists", "Batch", "map"],
)
def test_every_plain_form_gives_the_same_samples(make: Any) -> None:
    got = collect(make(), batch_size=4)
    np.testing.assert_array_equal(got.x, X)
    np.testing.assert_array_equal(got.y, Y)
    assert got.sample_weight is None
    assert [len(batch) for batch in batches(make(), batch_size=4)] == [4, 4, 2]


def test_bare_x_has_no_labels() -> None:
    for data in (X, (X,), [(X,)], iter([X])):
        batch = next(batches(data, batch_size=10))
        np.testing.assert_array_equal(batch.x, X)
        assert batch.y is None


def test_several_inputs_keep_their_structure() -> None:
    data = ({"image": X, "meta": (Y, [Y, X])}, [Y, Y])
    first, second = batches(data, batch_size=6)
    assert isinstance(first.x["meta"], tuple)
    assert isinstance(first.x["meta"][1], list)
    np.testing.assert_array_equal(second.x["meta"][1][1], X[6:])
    np.testing.assert_array_equal(second.y[1], Y[6:])
    joined = collect(data, batch_size=3)
    np.testing.assert_array_equal(joined.x["meta"][1][1], X)
    assert [name for name, _ in leaves(joined.x)] == [
        "['image']",
        "['meta'][0]",
        "['meta'][1][0]",
        "['meta'][1][1]",
    ]
    bare = list(batches({"a": X, "b": Y}, batch_size=5))
    assert [len(b) for b in bare] == [5, 5]
    assert bare[0].y is None


def test_disk_arrays_are_read_batch_by_batch(tmp_path: Path) -> None:
    class Recorder:
        """Stands for an HDF5 data set: a shape and slices, no whole-array access."""

        shape = X.shape
        reads: list[slice] = []  # noqa: RUF012 - one instance

        def __getitem__(self, rows: slice) -> Any:
            self.reads.append(rows)
            return X[rows]

    recorder = Recorder()
    np.testing.assert_array_equal(collect((recorder, Y), batch_size=4).x, X)
    assert [(r.start, r.stop) for r in recorder.reads] == [(0, 4), (4, 8), (8, 12)]
    np.save(tmp_path / "x.npy", X)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r", allow_pickle=False)
    np.testing.assert_array_equal(collect((mapped, Y)).x, X)


def test_max_samples_reads_no_further_than_needed() -> None:
    def endless() -> Iterator[tuple[Any, Any]]:
        for start in itertools.count():
            assert start < 2, "read past the limit"
            yield X + start, Y

    got = collect(endless(), max_samples=14)
    assert len(got) == 14
    np.testing.assert_array_equal(got.x[10:], X[:4] + 1)


def test_reiterable() -> None:
    assert is_reiterable((X, Y))
    assert is_reiterable(pairs())
    assert not is_reiterable(iter(pairs()))
    require_reiterable((X, Y), "diagnose")
    with pytest.raises(DataError, match=r"diagnose reads the data more than once.*generator"):
        require_reiterable((pair for pair in pairs()), "diagnose")


@pytest.mark.parametrize(
    "form",
    [lambda x, y: (x, y), lambda x, y: {"image": x, "more": [y]}, lambda x, y: Part(x, y)],
    ids=["tuple", "mapping", "dataclass"],
)
def test_a_loader_may_fill_the_same_memory_for_each_batch(form: Any) -> None:
    x, y = np.empty((4, 3)), np.empty(4)
    item = form(x, y)

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            for number in range(3):
                x[:], y[:] = number, 10 * number
                yield item

    wholes = [batch.whole for batch in batches(Loader())]
    held = [[float(leaf.flat[0]) for leaf in _arrays(whole)] for whole in wholes]
    assert held == [[0, 0], [1, 10], [2, 20]]
    assert all(type(whole) is type(item) for whole in wholes)


@dataclasses.dataclass(frozen=True)
class Part:
    """A batch as a library's own class."""

    x: Any
    y: Any
    shape: tuple[int, ...] = (4,)


def _arrays(whole: Any) -> list[Any]:
    return [whole.x, whole.y] if isinstance(whole, Part) else [a for _, a in leaves(whole)]


def test_empty_batches_in_the_middle_are_skipped() -> None:
    parts = list(batches([(X[:2], Y[:2]), (X[:0], Y[:0]), (X[2:], Y[2:])]))
    assert [len(part) for part in parts] == [2, 8]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X, Y[:9]), r"x: 10, y: 9"),
        (({"a": X, "b": X[:3]}, Y), r"x\['a'\]: 10, x\['b'\]: 3, y: 10"),
        ((X, Y, np.ones(4)), r"sample_weight: 4"),
        ([(X, Y), (X, Y[:3])], r"batch 1.*x: 10, y: 3"),
        ((X[:0], Y[:0]), r"no samples"),
        ([], r"no samples"),
        (iter([]), r"no samples"),
        ((X, Y, Y, Y), r"4 items"),
        ("digits", r"Received: str 'digits'"),
        (Path("a"), r"Received: pathlib"),
        (None, r"Received: NoneType"),
        (3, r"Received: int"),
        (np.float32(3), r"single number"),
        ([(X[0], Y[0])], r"y is a single number, not a batch"),
        ((np.array([[1, 2], [3]], dtype=object), [0, 1]), r"batch 0 .*dtype object"),
        (([[1, 2], [3]], [0, 1]), r"rectangular"),
        ([X, X], r"\(\(a, b\), y\)"),
        ((iter(pairs()), None), r"brings its own labels"),
        ((None, Y), r"x holds no array"),
    ],
)
def test_wrong_data_is_one_clear_error(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        collect(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kwargs", [{"batch_size": 0}, {"max_samples": 0}, {"batch_size": -1}])
def test_wrong_sizes(kwargs: dict[str, int]) -> None:
    with pytest.raises(DataError, match=r"at least 1\. Received"):
        batches((X, Y), **kwargs)


def test_batches_that_do_not_fit_together() -> None:
    with pytest.raises(DataError, match=r"arrays x do not fit.*\(3,\), \(4,\)"):
        collect([(X, Y), (np.ones((10, 4)), Y)])
    with pytest.raises(DataError, match="Some batches have y"):
        collect([(X, Y), (X,)])
    with pytest.raises(DataError, match="nest x in different ways"):
        collect([({"a": X}, Y), ({"b": X}, Y)])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_samples_are_named(value: float) -> None:
    x = X.copy()
    x[7, 1] = value
    x[7, 2] = value
    x[9, 0] = value
    with pytest.raises(DataError, match=r"x of batch 1 has 2 value\(s\).*sample\(s\) 7\.$"):
        collect((x, Y), batch_size=4, check_finite=True)
    with pytest.raises(DataError, match=r"x\['a'\] of batch 0 has 3.*sample\(s\) 7, 9\.$"):
        collect(({"a": x}, Y), check_finite=True)
    assert len(collect((x, Y))) == 10
    assert len(collect((Y, Y), check_finite=True)) == 10


def test_importing_data_loads_no_framework() -> None:
    import subprocess

    code = (
        "import sys, frostline.data.batches; "
        "print([m for m in ('keras', 'torch', 'tensorflow', 'jax', 'pandas') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


class TestFrameworks:
    """The real classes; each is skipped where its framework is not installed."""

    def test_tensorflow_dataset(self) -> None:
        tf = pytest.importorskip("tensorflow")
        dataset = tf.data.Dataset.from_tensor_slices(({"a": X}, Y)).batch(4)
        assert is_reiterable(dataset)
        np.testing.assert_array_equal(collect(dataset).x["a"], X)
        np.testing.assert_array_equal(collect(iter(dataset)).y, Y)
        with pytest.raises(DataError, match="never end"):
            batches(dataset.repeat())
        assert len(collect(dataset.repeat(), max_samples=25)) == 25
        with pytest.raises(DataError, match=r"batch the data first"):
            collect(tf.data.Dataset.from_tensor_slices((X, Y)))
        ragged = tf.data.Dataset.from_tensors(tf.ragged.constant([[1], [2, 3]]))
        with pytest.raises(DataError, match=r"In batch 0"):
            collect(ragged)

    def test_tensorflow_bfloat16(self) -> None:
        tf = pytest.importorskip("tensorflow")
        got = to_numpy(tf.constant([1.5, -2.25], tf.bfloat16))
        assert got.dtype == np.float32
        assert got.tolist() == [1.5, -2.25]

    def test_torch_loader_and_tensors(self) -> None:
        torch = pytest.importorskip("torch")
        x, y = torch.tensor(X, requires_grad=True), torch.tensor(Y)
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(x.detach(), y), batch_size=4
        )
        assert is_reiterable(loader)
        np.testing.assert_array_equal(collect(loader).x, X)
        np.testing.assert_array_equal(collect(loader).y, Y)
        np.testing.assert_array_equal(collect((x, y)).x, X)
        half = to_numpy(torch.tensor([1.5, -2.25], dtype=torch.bfloat16, requires_grad=True))
        assert half.dtype == np.float32
        assert half.tolist() == [1.5, -2.25]

    def test_jax_arrays(self) -> None:
        jnp = pytest.importorskip("jax.numpy")
        got = collect((jnp.asarray(X, dtype=jnp.bfloat16), jnp.asarray(Y)), batch_size=3)
        assert got.x.dtype == np.float32
        np.testing.assert_array_equal(got.x, X)  # 0..29 are exact in bfloat16

    def test_keras_py_dataset(self) -> None:
        keras = pytest.importorskip("keras")

        class Data(keras.utils.PyDataset):  # type: ignore[misc]
            def __len__(self) -> int:
                return 3

            def __getitem__(self, index: int) -> Any:
                return X[index * 4 : index * 4 + 4], Y[index * 4 : index * 4 + 4]

        class Endless(Data):
            @property
            def num_batches(self) -> None:
                return None

        np.testing.assert_array_equal(collect(Data()).x, X)
        assert is_reiterable(Data())
        with pytest.raises(DataError, match="never end"):
            batches(Endless())
        assert len(collect(Endless(), max_samples=9)) == 9
        with pytest.raises(DataError, match="pass it alone"):
            collect((Data(), Y))

    def test_pandas(self) -> None:
        pd = pytest.importorskip("pandas")
        frame = pd.DataFrame(X, index=list("jihgfedcba"))
        np.testing.assert_array_equal(collect((frame, pd.Series(Y)), batch_size=4).x, X)
