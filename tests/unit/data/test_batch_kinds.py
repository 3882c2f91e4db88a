"""Batches as loaders make them: kept whole unless they are arrays of one length; no framework."""

from __future__ import annotations

import collections
import types
from typing import Any

import numpy as np
import pytest

from frostline.data.batch import Batch, left_out, require_arrays, take
from frostline.data.batches import batches, collect, paired
from frostline.measure.samples import draw, rebatched
from frostline.types import DataError

X = np.arange(36, dtype=np.float32).reshape(12, 3)
Y = np.arange(12) % 3


class Graph:
    """Stands for an object with tensors inside, as graph libraries make them."""

    def __init__(self, nodes: int, graphs: int) -> None:
        self.x, self.num_graphs = np.zeros((nodes, 4)), graphs

    def to(self, device: Any) -> Graph:
        return self


def torch_like(name: str, **methods: Any) -> Any:
    """An instance of a class that has the name and module of torch's own."""
    parent = type(name, (), {"__module__": "torch.utils.data"})
    return type("Mine", (parent,), methods)()


def read(*items: Any, **how: Any) -> list[Batch]:
    return list(batches(iter(items), **how))


class TestKinds:
    def test_a_mapping_stays_whole_and_may_be_cut_where_it_is_arrays_of_one_length(self) -> None:
        given = {"pixel_values": X, "labels": Y}
        (batch,) = read(given)
        assert batch.whole is given
        assert (batch.count, batch.y, batch.divisible) == (12, None, True)
        np.testing.assert_array_equal(take(batch, slice(2, 4)).x["labels"], Y[2:4])
        assert collections.UserDict(given) is not None
        (other,) = read(collections.UserDict(given))
        assert (other.count, other.divisible) == (12, True)

    def test_a_step_gets_tuples_of_one_where_the_loader_yields_these(self) -> None:
        parts = read((X[:6],), (X[6:],))
        cut = [
            take(parts[0], slice(2, 4)),
            *draw(parts, max_samples=12, batch_size=4, labels=False).batches,
        ]
        for batch in cut:
            assert isinstance(batch.given, tuple)
            assert batch.given[0].shape[1:] == (3,)
        (array,) = read(X)
        assert take(array, slice(2)).given.shape == (2, 3)

    def test_lists_of_mappings_and_of_images_of_different_sizes(self) -> None:
        images = [np.zeros((3, 5, 4)), np.zeros((3, 6, 4))]
        targets = [{"boxes": np.zeros((2, 4))}, {"boxes": np.zeros((1, 4))}]
        batch, bare, four = read((images, targets), images, [np.zeros((3, 5, 5))] * 4)
        assert batch.x is images
        assert batch.y is targets
        assert [part.count for part in (batch, bare, four)] == [2, 2, 4]
        assert [part.divisible for part in (batch, bare, four)] == [False] * 3
        assert bare.x is images

    def test_images_of_one_size_with_a_mapping_each_are_no_arrays(self) -> None:
        images = (np.zeros((3, 5, 5)), np.zeros((3, 5, 5)))
        (batch,) = read((images, ({"boxes": 1}, {"boxes": 2})))
        assert batch.x is images
        assert (batch.count, batch.divisible) == (2, False)

    def test_arrays_of_different_lengths_are_left_as_they_are(self) -> None:
        tokens, offsets = np.arange(9), np.array([0, 4])
        flat, boxes = read(({"text": tokens, "offsets": offsets}, Y[:2]), (X, np.ones((31, 6))))
        assert flat.x["text"] is tokens
        assert not flat.divisible
        assert (boxes.count, boxes.divisible) == (12, False)
        with pytest.raises(DataError, match=r"In here: .*x: 12, y: 31"):
            require_arrays(boxes, "here")

    def test_points_with_an_index_count_as_the_samples_that_it_tells_of(self) -> None:
        points, owner, labels = np.zeros((9, 3)), np.array([0, 0, 1, 1, 1, 1, 2, 2, 2]), Y[:3]
        edges = np.stack([np.arange(9), np.roll(np.arange(9), 1)])
        clouds = (
            (points, owner, labels),
            (points, edges, owner, labels),
            {"points": points, "owner": owner, "labels": np.zeros((3, 2))},
            [(points, owner), labels],
        )
        assert [batch.count for batch in read(*clouds)] == [3] * 4
        whole = np.repeat([0, 1], [4, 5])
        others = (
            (points, owner[::-1].copy(), labels),  # no order: classes
            (points, owner + 1, labels),
            (points, owner * 2, labels),  # 1 and 3 left out
            (points, edges, whole),  # two classes of points, and edges of two ends
            (points, owner, Y[:4]),
            (points, owner.astype(np.float32), labels),
        )
        assert [batch.count for batch in read(*others)] == [9] * 6
        assert [batch.count for batch in read((points, np.zeros(9, int), labels[:1]))] == [1]
        table = types.SimpleNamespace(shape=(9, 2))  # no dtype, as a DataFrame has none
        assert Batch({"table": table, "labels": labels}).count == 9

    def test_an_object_with_tensors_inside(self) -> None:
        graph = Graph(7, 2)
        for data in (graph, [graph], iter([graph])):
            (batch,) = batches(data)
            assert batch.x is batch.given is graph
            assert (batch.count, batch.divisible) == (2, False)

    def test_padded_batches_each_are_arrays_but_do_not_join(self) -> None:
        parts = read((np.zeros((4, 9)), Y[:4]), (np.zeros((4, 5)), Y[:4]))
        assert all(part.divisible for part in parts)
        with pytest.raises(DataError, match="do not fit together"):
            collect(parts)

    def test_more_items_than_inputs_labels_and_weights(self) -> None:
        given = (X, X + 1, X + 2, Y)
        (batch,) = read(given)
        assert batch.given is given
        assert batch.y is None
        assert "pass step=" in str(left_out(batch))


class TestThirdItem:
    @pytest.mark.parametrize(
        "third",
        [
            np.arange(12),
            [f"{i}.png" for i in range(12)],
            np.ones((12, 3), bool),
            {"id": np.arange(12)},
            np.full(12, -1.0),
            np.full(12, np.nan),
            np.ones((12, 3)),
            7,
            "train",
        ],
        ids=["index", "paths", "mask", "mapping", "negative", "nan", "rows", "number", "text"],
    )
    def test_what_is_no_weight_is_never_taken_for_one(self, third: Any) -> None:
        given = (X, Y, third)
        (batch,) = read(given)
        assert batch.sample_weight is None
        assert batch.given is given
        assert not batch.divisible
        assert "no sample weights" in str(left_out(batch))
        with pytest.raises(DataError, match=r"third item must be sample weights.*Received"):
            list(batches(given))

    @pytest.mark.parametrize("weights", [np.ones(12), np.full((12, 1), 0.5, np.float32)])
    def test_weights_are_weights(self, weights: Any) -> None:
        (batch,) = read((X, Y, weights))
        np.testing.assert_array_equal(batch.sample_weight, weights)
        assert (batch.divisible, left_out(batch)) == (True, None)

    def test_weights_in_some_batches_only_are_refused(self) -> None:
        with pytest.raises(DataError, match=r"batch 1.*in some batches and not in others"):
            read((X, Y, np.ones(12)), (X, Y, -np.ones(12)))


class TestDatasets:
    def test_a_torch_dataset_is_read_by_index_and_collated(self) -> None:
        data = torch_like(
            "Dataset", __len__=lambda _: 12, __getitem__=lambda _, i: (X[i], int(Y[i]))
        )
        found = list(batches(data, batch_size=5))
        assert [part.count for part in found] == [5, 5, 2]
        np.testing.assert_array_equal(np.concatenate([np.asarray(p.x) for p in found]), X)
        np.testing.assert_array_equal(np.concatenate([np.asarray(p.y) for p in found]), Y)

    def test_samples_that_do_not_fit_in_one_batch_are_refused_with_the_way_out(self) -> None:
        data = torch_like(
            "Dataset", __len__=lambda _: 3, __getitem__=lambda _, i: (np.zeros(i + 1), 0)
        )
        with pytest.raises(DataError, match=r"collate_fn=.*Received: samples of type tuple"):
            list(batches(data))

    def test_a_lone_last_sample_joins_the_batch_before_it(self) -> None:
        parts = list(paired(read((X[:5], Y[:5]), (X[5:11], Y[5:11]), (X[11:], Y[11:]))))
        assert [part.count for part in parts] == [5, 7]
        graphs = list(paired(read(Graph(9, 3), Graph(2, 1))))
        assert [part.count for part in graphs] == [3]
        assert [part.count for part in paired(read((X[:1], Y[:1])))] == [1]


def padded_loader(lengths: list[int]) -> Any:
    """A loader of padded batches with a dataset and a collate function of its own."""
    items = [(np.full(length, float(i)), i) for i, length in enumerate(lengths)]

    def collate(chosen: list[Any]) -> Any:
        width = max(len(values) for values, _ in chosen)
        rows = np.stack([np.pad(values, (0, width - len(values))) for values, _ in chosen])
        return {"values": rows, "labels": np.array([i for _, i in chosen]), "width": width}

    return torch_like(
        "DataLoader",
        dataset=items,
        sampler=type("SequentialSampler", (), {"__module__": "torch.utils.data"})(),
        batch_size=4,
        collate_fn=staticmethod(collate),
        __iter__=lambda _: (collate(items[i : i + 4]) for i in range(0, len(items), 4)),
    )


class TestDraw:
    def test_a_loader_makes_other_batches_of_its_own_dataset(self) -> None:
        samples = draw(padded_loader([3, 9, 4, 7] * 4), max_samples=12, labels=False)
        assert (samples.divisible, samples.fixed, len(samples)) == (False, None, 12)
        drawn = np.concatenate([part.given["labels"] for part in samples.batches])
        assert len(set(drawn.tolist())) == 12
        other = list(rebatched(samples, 3, np.arange(12)[::-1]))
        assert [part.count for part in other] == [3] * 4
        again = np.concatenate([part.given["labels"] for part in other])
        np.testing.assert_array_equal(again, drawn[::-1])
        # Padded to what they need together, not to what they came with.
        assert all(part.given["values"].shape[1] == part.given["width"] for part in other)

    def test_batches_that_nobody_can_make_anew_are_taken_as_they_come(self) -> None:
        graphs = [Graph(9, 4), Graph(7, 4), Graph(8, 4), Graph(2, 1)]
        samples = draw(iter(graphs), max_samples=100, labels=False)
        assert [part.x for part in samples.batches] == graphs[:3]
        assert "collate function" in str(samples.fixed)
        with pytest.raises(DataError, match="other batches cannot be made"):
            list(rebatched(samples, 2))

    def test_an_index_is_dropped_for_a_loss_and_kept_for_a_step(self) -> None:
        loader = [(X[i : i + 4], Y[i : i + 4], np.arange(i, i + 4)) for i in (0, 4, 8)]
        for_loss = draw(loader, max_samples=12)
        assert for_loss.divisible
        assert any("no sample weights" in note for note in for_loss.notes)
        for_step = draw(loader, max_samples=12, whole=True)
        assert [part.given for part in for_step.batches] == loader
