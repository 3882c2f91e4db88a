"""Read a user's data set before training without training noticing: no shuffle is used up."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from frostline.atomic import generators, taken_back

#: Input of TensorFlow's ``ShuffleDatasetV3`` that holds its generator.
_SEED_GENERATOR = 4


def untouched(data: Any) -> Any:
    """Return a data set with the same samples, whose reading leaves ``data`` as it is.

    A ``tf.data.Dataset`` is copied through its graph: a copy shuffles from the start again, and the
    original has not begun yet. A torch ``DataLoader`` over a data set with numbered samples is read
    in their order, which is the same in every run. Anything else is returned as it is.
    """
    tensorflow, torch = sys.modules.get("tensorflow"), sys.modules.get("torch")
    if tensorflow is not None and isinstance(data, tensorflow.data.Dataset):
        return _copied(data)
    if torch is not None and isinstance(data, torch.utils.data.DataLoader):
        return _in_order(data)
    return data


def _copied(dataset: Any) -> Any:
    """Make the data set anew from its graph, with shuffles that have their own, fresh state."""
    tf = sys.modules["tensorflow"]
    try:
        variant = tf.data.experimental.to_variant(dataset)
        raw = tf.raw_ops.DatasetToGraphV2(input_dataset=variant, external_state_policy=1)
        graph = tf.compat.v1.GraphDef.FromString(raw.numpy())
        for nodes in (graph.node, *(function.node_def for function in graph.library.function)):
            for node in [entry for entry in nodes if entry.op == "ShuffleDatasetV3"]:
                # The graph names the original's generator, which a copy would use up.
                fresh = f"{node.name}/fresh"
                nodes.add(name=fresh, op="DummySeedGenerator")
                node.input[_SEED_GENERATOR] = fresh
        variant = tf.raw_ops.DatasetFromGraph(graph_def=graph.SerializeToString())
        return tf.data.experimental.from_variant(variant, dataset.element_spec)
    except Exception:  # a data set that has no graph form: read the original
        return dataset


def _in_order(loader: Any) -> Any:
    data = sys.modules["torch"].utils.data
    if isinstance(loader.dataset, data.IterableDataset):
        return loader
    return data.DataLoader(
        loader.dataset,
        batch_size=loader.batch_size or 32,
        shuffle=False,
        collate_fn=loader.collate_fn if loader.batch_size else None,
        num_workers=loader.num_workers,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
    )


@contextmanager
def randomness_kept() -> Iterator[None]:
    """Put the global generators of Python, numpy, torch and TensorFlow back on any exit."""
    torch, tensorflow = sys.modules.get("torch"), sys.modules.get("tensorflow")
    python = generators()
    tensors = None if torch is None else torch.get_rng_state()
    seeds = None if tensorflow is None else _eager_seeds()
    state = None if seeds is None else seeds.getstate()

    def back() -> None:
        python()
        if torch is not None and tensors is not None:
            torch.set_rng_state(tensors)
        if seeds is not None:
            seeds.setstate(state)

    with taken_back(back):
        yield


def _eager_seeds() -> Any:
    """The generator that gives seeds to TensorFlow's eager operations; there once a seed is set."""
    from tensorflow.python.eager import context

    return getattr(context.context(), "_rng", None)
