"""Train a torch model in one's own loop with its frozen part answered from a cache."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from frostline import engines
from frostline.adapters import adapter_of
from frostline.cache import BATCH_SIZE, build, cache_features, folder, shards
from frostline.cache.build import Manifest
from frostline.cache.features import View
from frostline.cache.files import DamagedError
from frostline.data.arrays import leaves
from frostline.types import Array, DataError, FrostlineError, ModelError
from frostline.types.arguments import checked


@checked
def cached(
    model: Any,
    loader: Any,
    *,
    path: str | os.PathLike[str] | None = None,
    engine: str = "auto",
    precision: str = "float32",
    views: int = 1,
) -> Any:
    """Go through a loader's batches while the frozen part of the model answers from a cache.

    The loop stays the user's own: the same batches in the same order, from any loader with any
    number of workers; the loss, the optimizer and the mode of the model are what they are. The
    first time the model meets a sample its frozen modules run and what crosses to the rest is
    stored; from then on they are skipped. No graph is needed, so models that ``torch.fx`` cannot
    follow are served as well: those of Hugging Face, detectors, U-Nets with skip connections.

    Loaders of one model may be gone through side by side or one inside the other. A call whose
    inputs require gradients runs as it is: rows that are stored pass none on.

    A sample is known by its bytes as ``model(...)`` gets them. What changes in every epoch
    (augmentation) is computed anew in every epoch; ``views`` makes it repeat.

    Before anything is skipped the frozen part is checked by behaviour on four samples of the first
    batch: in another order and with one sample less, with another seed and with other trainable
    weights it returns the same, and the whole model with the cache returns what it returns without.
    Of the first two batches that come from the cache four samples are computed as well, alone, and
    compared. Where the model does not take so few, whole batches are. The model is left
    untouched after the loop, after ``break`` and after any exception. Frozen weights are read anew
    in every epoch; when they change, or more is frozen or thawed, the cache begins anew.

    Args:
        model: A torch module, partly frozen (:func:`frostline.freeze`); what is around it
            (``torch.compile``, DDP) is taken off.
        loader: A ``DataLoader``, or any iterable of batches.
        path: Folder to keep the features in for other runs; ``None``: in memory, for as long as
            the model lives. Memory: the features of all samples. A frozen part that holds what
            cannot be told from another in a later run is kept in memory only, with a warning.
        engine: What computes the frozen part of samples that are not known yet. ``"native"``: the
            model itself, in its own first epoch. ``"auto"``: the fastest of native, ONNX Runtime
            and OpenVINO that agrees to 1e-4, where the model is called with float32 tensors on
            the processor and so much is to be computed that exporting pays; else native. Or one
            of these by name.
        precision: What computes the frozen part: ``"float32"``, as the model does; or
            ``"bfloat16"``, on processors with AMX or AVX512-BF16, by OpenVINO or by torch, for
            models called as ``engine`` says. The rest trains as it is. How far that is from
            float32 on the first batch is in ``precision_error`` of what is returned.
        views: How many versions of a random augmentation to train with: in epoch e every sample
            of a ``DataLoader`` is drawn with the seed of view ``e % views``. With 1 the loader is
            taken as it is.

    Returns:
        What yields the loader's batches, once per ``for``; ``len()`` is the loader's.

    Raises:
        ModelError: A Keras model (:func:`frostline.fit` does this); nothing is frozen; or, at the
            first batch, a frozen part that depends on more than the sample, or that no engine
            computes in ``"bfloat16"``.
        DataError: ``views`` without a ``DataLoader`` over a data set with indices, or below 1.

    Example:
        >>> fl.freeze(model, until="layer4")
        >>> for epoch in range(3):
        ...     for x, y in fl.cached(model, loader):
        ...         loss = criterion(model(x), y)
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
    """
    known = ("auto", *engines.NAMES)
    if engine not in known:
        raise ModelError(f"engine is one of {', '.join(known)}. Received: engine={engine!r}")
    engines.require_precision(precision)
    plain = precision == "float32"
    if views < 1:
        raise DataError(f"views must be at least 1. Received: views={views!r}")
    through = getattr(adapter_of(model), "cached", None)
    if through is None:
        raise ModelError(
            "fl.cached is for loops over a torch module. A Keras model is trained through the "
            f"cache by fl.fit(model, x, y). Received: {type(model).__name__}"
        )
    return through(
        loader,
        store=None if path is None else _Store(path),
        views=views,
        engine=engine,
        accelerate=None if engine == "native" and plain else _accelerated,
        precision=precision,
        bound=None if plain else engines.TOLERANCES[precision],
    )


def _accelerated(prefix: Any, batch: Any, samples: int | None, engine: str, precision: str) -> Any:
    """What runs a prefix faster than torch does; ``None``: nothing that agrees with it."""
    try:
        chosen = engines.choose(prefix, batch, engine, samples=samples, precision=precision)
    except FrostlineError as problem:
        if precision != "float32":
            raise
        if engine != "auto":
            warnings.warn(f"fl.cached runs the frozen part itself: {problem}", stacklevel=2)
        return None
    return None if chosen.name == "native" and precision == "float32" else chosen


class _Store:
    """Rows by the digest of their sample, in the folders of :func:`frostline.cache_features`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.root = folder.resolve(path)
        self.read: dict[str, tuple[View, dict[bytes, int]] | None] = {}

    def find(self, identity: str, digests: Sequence[bytes]) -> tuple[list[int], list[Array]]:
        """Positions in ``digests`` of what is stored, and the rows, one array per tensor."""
        if identity not in self.read:
            self.read[identity] = self._open(identity)
        found = self.read[identity]
        if found is None:
            return [], []
        view, places = found
        names = [digest.tobytes() for digest in shards.sample_digests(leaves(_column(digests)))]
        here = [number for number, name in enumerate(names) if name in places]
        return here, view.rows(np.array([places[names[number]] for number in here], np.int64))

    def _open(self, identity: str) -> tuple[View, dict[bytes, int]] | None:
        x = _column([b"\0" * 16])
        forms = sorted((name, leaf.dtype.str, leaf.shape[1:]) for name, leaf in leaves(x))
        key = build.collection_key(identity, "native", "float32", BATCH_SIZE, forms, ())
        try:
            collection = shards.load(self.root / key)
            known = list(shards.known_shards(collection))
        except DamagedError:
            return None
        if not known:
            return None
        rows = [np.arange(len(shard.samples), dtype=np.uint64) for shard in known]
        pointers = np.concatenate(
            [
                (np.uint64(number) << np.uint64(32)) | positions
                for number, positions in enumerate(rows)
            ]
        )
        names = (digest.tobytes() for shard in known for digest in shard.samples)
        manifest = Manifest(
            fingerprint="", shards=tuple(shard.name for shard in known), pointers=pointers
        )
        view = View(collection=collection, manifest=manifest)
        return view, {name: row for row, name in enumerate(names)}

    def save(self, identity: str, digests: Sequence[bytes], rows: Sequence[Array]) -> None:
        """Store new rows."""
        x = _column(digests)
        known = dict(zip(digests, range(len(digests)), strict=True))

        def features(batch: Array) -> list[Array]:
            chosen = [known[row.tobytes()] for row in batch]
            return [column[chosen] for column in rows]

        features.identity = identity  # type: ignore[attr-defined]
        cache_features(features, x, self.root, engine="native", verbose=0)


def _column(digests: Sequence[bytes]) -> Array:
    found: Array = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
    return found
