"""Images that Frostline reads as Ray data sets: workers decode what they compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from frostline.data import image_sets
from frostline.data.catalogue import Catalogue, Split
from frostline.scale import cluster
from frostline.types import Array

#: Images that a task reads at a time.
_ROWS = 64


def of_images(chosen: image_sets.Chosen, prepare: Callable[[Array], Array]) -> tuple[Array, Any]:
    """The first two images, prepared, and a data set of ``id`` and ``image``.

    Args:
        chosen: Which images; an id is the number of one in it.
        prepare: What a model wants of uint8 images, shape ``(n, h, w, 3)``; is sent to workers.
    """
    source, split, size, rows = chosen.source, chosen.split, chosen.size, chosen.rows

    def read(batch: dict[str, Array]) -> dict[str, Array]:
        wanted = rows[batch["id"]].tolist()
        images = image_sets.decoded(_opened(source, split), wanted, size, source)
        return {"id": batch["id"], "image": prepare(images)}

    first = read({"id": np.arange(min(2, len(rows)))})["image"]
    numbers = cluster.require_ray().data.range(len(rows))
    return first, numbers.map_batches(read, batch_size=_ROWS, batch_format="numpy")


def of_arrays(x: Array) -> Any:
    """A data set of ``id`` and ``image`` from an array in memory."""
    ray = cluster.require_ray()
    import pyarrow
    from ray.data.extensions import ArrowTensorArray

    parts = np.array_split(np.arange(len(x)), max(1, len(x) // _ROWS))
    columns = [{"id": ids, "image": ArrowTensorArray.from_numpy(x[ids])} for ids in parts]
    return ray.data.from_arrow([pyarrow.table(column) for column in columns])


@functools.cache
def _opened(source: str, split: Split) -> Catalogue:
    """The reader of a source, once per process."""
    return image_sets.open_source(source, split)
