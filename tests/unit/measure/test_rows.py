"""Rows that are kept in a file: the same numbers as in memory, and what is judged of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frostline.adapters.spool import Workspace
from frostline.measure import judged
from frostline.measure.rows import Kept, Rows, pieces
from frostline.types import OutputError

Room = Callable[[int], Workspace]

sklearn_metrics = pytest.importorskip("sklearn.metrics")
scipy_stats = pytest.importorskip("scipy.stats")


@pytest.fixture
def room() -> Iterator[Room]:
    """Workspaces that are closed when the test ends."""
    with ExitStack() as stack:
        yield lambda limit: stack.enter_context(Workspace(limit))


def rows_of(array: Any, workspace: Workspace | None, size: int = 7) -> Rows:
    rows = Rows(workspace)
    for start in range(0, len(array), size):
        rows.append(array[start : start + size])
    return rows


@pytest.mark.parametrize("limit", [0, 500, 1 << 20])
def test_rows_are_the_arrays_that_came(limit: int, room: Room) -> None:
    workspace = room(limit)
    values = np.random.default_rng(0).normal(size=(100, 3)).astype("float32")
    rows = rows_of(values, workspace)
    assert workspace.used == (values.nbytes if limit > values.nbytes else 0)
    assert (len(rows), rows.shape, rows.ndim, rows.dtype) == (100, (100, 3), 2, values.dtype)
    assert [len(part) for part in rows.batches()] == [7] * 14 + [2]
    for count in (1, 7, 30, 1000):
        assert np.array_equal(np.concatenate(list(rows.pieces(count))), values)
    whole = rows.whole()
    assert type(whole) is np.ndarray
    assert np.array_equal(whole, values)
    whole[:] = 0  # who has it may write to it
    assert np.array_equal(rows_of(values, workspace).astype("float64").whole(), values)
    rows.append(values)  # after it was read
    assert np.array_equal(rows.whole()[100:], values)


def test_what_is_no_array_is_kept_as_it_is(room: Room) -> None:
    kept = Kept(room(10))
    values: list[Any] = [np.zeros((2, 3)), np.ones((1, 3)), {"a": np.ones(2)}]
    kept.extend(values)
    assert kept.rows() is None
    assert [np.shape(value) for value in kept] == [(2, 3), (1, 3), ()]
    of_two_types = Kept(room(10))
    of_two_types.extend([np.zeros((2, 3)), np.ones((1, 3), "float32")])
    joined = of_two_types.rows()
    assert joined is not None
    assert joined.shape == (3, 3)


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, room: Room) -> None:
    full = Path("/dev/full").open("w+b", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full)
    with full, pytest.raises(OutputError, match="temporary folder"):
        rows_of(np.zeros((1 << 16, 2)), room(0), size=1 << 15)


@pytest.mark.parametrize("piece", [5, 1 << 18])
@pytest.mark.parametrize("broken", [False, True])
def test_judged_in_pieces_as_by_others(
    piece: int, broken: bool, monkeypatch: pytest.MonkeyPatch, room: Room
) -> None:
    monkeypatch.setattr("frostline.measure.rows._PIECE", piece)
    monkeypatch.setattr("frostline.numerics.stats._CHUNK", piece)
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 200)
    scores = np.round(rng.normal(y, 1.0), 1)  # many ties
    if broken:
        scores[::40] = np.nan
    found = judged.judge_rows(
        rows_of(y, room(0)), rows_of(scores, room(0)), "binary", True,
        lambda: Rows(room(0)),
    )  # fmt: skip
    if broken:
        assert np.isnan(found.metrics["auc"])
    else:
        assert found.metrics["auc"] == pytest.approx(sklearn_metrics.roc_auc_score(y, scores))
    assert found.broken == 5 * broken
    sound = ~np.isnan(scores)
    right = (scores > 0) == (y == 1)
    assert found.metrics["accuracy"] == pytest.approx((right & sound).mean())
    # Thresholds between two scores, or none of these: NaN is above all others.
    filled = np.where(sound, scores, np.inf)
    levels = np.unique(filled)
    cuts = [-np.inf, *(levels[: -2 if broken else -1]), np.inf]
    best = max(float(((filled > cut) == (y == 1)).mean()) for cut in cuts)
    assert found.reachable == pytest.approx(best)
    assert isinstance(found.losses, Rows)
    with np.errstate(invalid="ignore"):
        entropy = np.logaddexp(0, np.where(y == 1, -scores, scores))
    np.testing.assert_allclose(found.losses.whole(), entropy)
    targets = np.stack([scores, rng.normal(size=200)], axis=1)
    outputs = targets + rng.normal(size=(200, 2))
    whole = judged.judge(targets, outputs, "regression", False)
    if not broken:
        expected = [scipy_stats.spearmanr(targets[:, k], outputs[:, k])[0] for k in (0, 1)]
        assert whole.metrics["spearman"] == pytest.approx(np.mean(expected))
        assert whole.reference == pytest.approx(targets.var(axis=0).mean())


def test_columns_come_in_equal_pieces(room: Room) -> None:
    x, y = np.arange(30.0).reshape(10, 3), np.arange(10)
    for parts in (pieces(rows_of(x, room(0)), y), pieces(x, rows_of(y, None, 3))):
        assert [(len(one), len(other)) for one, other in parts] == [(10, 10)]
    assert np.array_equal(judged.difference(rows_of(y, None), y), np.zeros(10))
    assert judged.mean(rows_of(y, room(0))) == 4.5
