"""Cached features: pass the data through the frozen part once, keep the result on disk.

Features are found by what they were computed from: the prefix with its weights and BN statistics,
dtype, augmentation and view decide the folder; the bytes of a sample decide the row. So a changed
weight, statistic, option or sample is computed, and nothing else is.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from frostline import engines
from frostline.adapters import prefix as prefixes
from frostline.adapters.computation import Identity
from frostline.atomic import atomically
from frostline.cache import build, folder, shards
from frostline.cache.augmentation import augmentation_identity
from frostline.cache.features import FeatureCache, View
from frostline.cache.files import DamagedError, sha256
from frostline.cache.judge import ChangedError, Judge
from frostline.cache.lookup import Lookup
from frostline.cache.progress import Progress
from frostline.cache.shards import Collection, Shard, Tensor
from frostline.cache.through import Through, start as start_through
from frostline.data.arrays import Table, leaves
from frostline.data.batch import Batch
from frostline.data.batches import batches, is_reiterable, require_reiterable
from frostline.types import Array, DataError, FrostlineError, ModelError
from frostline.types.arguments import checked
from frostline.types.reasons import first_line

#: Samples per pass of the prefix. Part of the key: another size rounds differently.
BATCH_SIZE = 32
#: Up to so many batches, ``"auto"`` means native.
_FEW_BATCHES = 2


@dataclass(frozen=True, kw_only=True)
class _Order:
    """What :func:`cache_features` was asked for."""

    root: Path
    engine: str
    precision: str
    dtype: str
    augment: Any
    augmentation: str
    batch_size: int
    max_bytes: int | None
    lock_timeout: float | None
    verbose: Any
    seed: int
    title: str
    through: Through | None


@checked
def cache_features(
    prefix: Any,
    data: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    engine: str = "auto",
    precision: str = "float32",
    dtype: str = "float32",
    views: int = 1,
    augment: Any = None,
    augment_name: str | None = None,
    batch_size: int = BATCH_SIZE,
    max_gb: float | None = None,
    lock_timeout: float | None = None,
    verbose: Any = "auto",
    seed: int = 0,
    title: str = "features",
    through: Through | None = None,
) -> FeatureCache:
    """Compute what a frozen prefix makes of every sample, once, and keep it on disk.

    Samples whose features are there, computed by the same prefix in the same way, are not computed
    again, whatever data set they came with. A build that was killed goes on where it was: complete
    shards are compared with their checksums and kept. Memory stays flat: about one batch of inputs,
    one shard of features (64 MB per tensor), and 200 bytes per sample.

    Args:
        prefix: The frozen part, for example ``fl.split(model).prefix``; a torch module is run at
            inference.
        data: What :func:`frostline.data.batches.batches` takes, or a torch ``Dataset``; the prefix
            sees ``x`` alone. Row i of the cache is sample i. For a torch module ``x`` may hold what
            :func:`frostline.cached` takes: lists of pictures, mappings, dataclasses, texts that
            belong to all samples.
        path: Cache folder; by default ``FROSTLINE_CACHE_DIR``, or the user's cache folder.
            Nothing is written outside it.
        engine: What runs the prefix: ``"native"``, ``"onnxruntime"``, ``"openvino"``, or
            ``"auto"``: the fastest of those that are installed and agree with native to 1e-4
            (:func:`frostline.engines.choose`); native where the work takes no longer than a trial.
        precision: What the engine computes in: ``"float32"``, as the prefix does; or
            ``"bfloat16"``, on processors with AMX or AVX512-BF16, by OpenVINO or by torch. How far
            that is from float32 is measured on the first batch, shown, and kept in
            :attr:`FeatureCache.error`; more than 0.1 of the largest value is refused.
        dtype: ``"float32"`` keeps features exactly as computed; ``"float16"`` and ``"bfloat16"``
            halve the disk and round.
        views: How many augmented views to store of every sample.
        augment: ``(x, seed) -> x`` on a numpy batch, or a Keras layer or model. The seed depends
            on ``seed``, the view and the samples, so a view is the same in every run.
        augment_name: Name of the augmentation, instead of reading off what it does.
        batch_size: Samples per pass of the prefix.
        max_gb: Largest size of the whole cache folder, in GB of 1e9 bytes.
        lock_timeout: Seconds to wait for another process that writes to the same cache; ``None``
            waits as long as it takes.
        verbose: ``0`` silent, ``1`` a line that moves, ``2`` plain lines, ``"auto"``.
        seed: Of the augmentation.
        title: What progress lines begin with.
        through: Features of an earlier frontier for the same data, and what lies between: the
            prefix is then computed from these, unless that turns out to differ from it. The key is
            that of the prefix all the same: it says what is computed, not by which way.

    Returns:
        The features on disk. For a torch module a ``torch.utils.data.Dataset`` of them with
        the labels in ``data``, for the user's own loop; row i is sample i of the data set, in
        whatever order its ``DataLoader`` would shuffle.

    Raises:
        DataError: NaN or infinite features, with the samples; data that can be read only once with
            ``views`` > 1; a folder of another version.
        OutputError: No room on the disk or within ``max_gb``: before the work where it can be
            foreseen, and always with what is complete kept.
        ModelError: A prefix that is neither a Keras model nor a torch module; ``"bfloat16"``
            where no engine has it.
        BackendError: ``"bfloat16"`` of one engine, on a processor without.
    """
    engines.require_precision(precision)
    if precision != "float32" and prefixes.is_callable_prefix(prefix):
        raise ModelError(
            "a prefix that is a function computes in a precision of its own: leave precision= out. "
            f"Received: precision={precision!r}"
        )
    _check(views=views, augment=augment, batch_size=batch_size, max_gb=max_gb)
    if through is not None and (augment is not None or dtype != "float32"):
        raise DataError(
            "features of an earlier frontier stand for the samples only where they are exact and "
            f"not augmented. Received: through=..., augment={augment!r}, dtype={dtype!r}"
        )
    if views > 1:
        require_reiterable(data, f"cache_features(views={views})")
    order = _Order(
        root=folder.resolve(path),
        engine=engine,
        precision=precision,
        dtype=shards.require_dtype(dtype),
        augment=augment,
        augmentation="" if augment is None else augmentation_identity(augment, augment_name),
        batch_size=batch_size,
        max_bytes=None if max_gb is None else int(max_gb * 1e9),
        lock_timeout=lock_timeout,
        verbose=verbose,
        seed=seed,
        title=title,
        through=through,
    )
    return atomically(prefixes.snapshot(prefix), partial(_cached, prefix, data, order, views))


def _cached(prefix: Any, data: Any, order: _Order, views: int) -> FeatureCache:
    found = prefixes.identity(prefix)
    data = prefixes.readable(prefix, data, order.batch_size)
    labels: list[Any] | None = [] if prefixes.hands_out_labels(prefix) else None
    made = [
        _view(prefix, found, data, order, view, views, None if view else labels)
        for view in range(views)
    ]
    cache: FeatureCache = prefixes.handed_out(
        prefix, FeatureCache(path=order.root, views=tuple(made)), labels or ()
    )
    return cache


def _check(*, views: int, augment: Any, batch_size: int, max_gb: float | None) -> None:
    for name, value in (("views", views), ("batch_size", batch_size)):
        if value < 1:
            raise DataError(f"{name} must be at least 1. Received: {name}={value}")
    if views > 1 and augment is None:
        raise DataError(
            f"several views differ by their augmentation: pass augment=. Received: views={views}"
        )
    if augment is not None and not callable(augment):
        raise DataError(f"augment must be callable. Received: {type(augment).__name__}")
    if max_gb is not None and not max_gb > 0:
        raise DataError(f"max_gb must be above 0. Received: max_gb={max_gb}")


def _view(
    prefix: Any,
    identity: Identity,
    data: Any,
    order: _Order,
    view: int,
    views: int,
    labels: list[Any] | None,
) -> View:
    """Build one view, or find it; labels are noted where there is a list for them."""
    stream = _read(prefix, data, order.batch_size)
    first = next(stream)  # an empty data set is refused here
    forms = _forms(first.x)
    if order.augment is not None and isinstance(first.x, Table):
        raise DataError(
            "an augmentation takes arrays of one length, and these inputs are none: augment the "
            "samples in the data set and train with fl.cached(..., views=8). "
            f"Received: augment={order.augment!r}"
        )
    augmented = (order.augmentation, order.seed, view) if order.augmentation else ()
    title = order.title if views == 1 else f"{order.title}, view {view + 1} of {views}"
    expected = expected_samples(data, len(first))

    def key_with(engine: str) -> str:
        return _key(identity, replace(order, engine=engine), forms, augmented)

    key = key_with(order.engine)
    known_by = (identity.text, repr(forms), order.precision)
    small = expected is not None and expected <= _FEW_BATCHES * order.batch_size
    tried = (
        (order.root / key).exists()
        or engines.remembered(prefix, known_by, order.engine) is not None
        or (order.through is not None and order.through.cache.engine != "native")
    )
    if order.engine == "auto" and order.precision == "float32" and small and not tried:
        # Trying engines would take longer than the work itself.
        order = replace(order, engine="native")
        key = key_with("native")
    progress = Progress(title, expected, order.verbose)
    home = order.root / key
    if identity.private:
        folder.remove_at_exit(home)
        progress.say(
            f"{title}: the prefix uses {identity.private}, which cannot be told from another: its "
            "features are computed anew and kept for this process only"
        )
    with folder.locked(home, progress, timeout=order.lock_timeout):
        work = None if expected is None else expected * (views - view)
        start = _Start(prefix, known_by, order, progress, expected, work)
        rest: Iterator[Batch] = itertools.chain([first], stream)
        try:
            collection, manifest = _built(start, home, key, view, first.x, _noted(rest, labels))
        except ChangedError as changed:
            shards.discard(home)
            progress.say(f"{title}: {changed}; they are discarded and computed anew")
            if is_reiterable(data):
                rest = _read(prefix, data, order.batch_size)
            elif changed.batches == 1:
                rest = itertools.chain([first], stream)
            else:
                raise DataError(
                    f"{changed}. They are discarded; the data can be read only once, so run it "
                    f"again. Received: {type(data).__name__}"
                ) from changed
            progress.done = progress.computed = 0
            if labels is not None:
                labels.clear()
            collection, manifest = _built(start, home, key, view, first.x, _noted(rest, labels))
    progress.finish()
    return View(collection=collection, manifest=manifest)


def _read(prefix: Any, data: Any, batch_size: int) -> Iterator[Batch]:
    """Batches with one entry per sample in each array of their inputs."""
    names: list[str] | None = None
    for number, batch in enumerate(batches(data, batch_size=batch_size)):
        found = replace(batch, x=prefixes.columns(prefix, batch.x))
        if isinstance(found.x, Table):
            names = list(found.x) if names is None else names
            if list(found.x) != names:
                raise DataError(
                    f"batch {number} has something else in common than the first one: what belongs "
                    "to all samples of a batch is the same in one cache. Leave out what the frozen "
                    "part does not need, make one call of fl.cache_features for each kind of "
                    "batches, or train with fl.cached. "
                    f"Received: {min(found.x)[:80]} after {names[0][:80]}"
                )
        yield found


def _forms(x: Any) -> list[Any]:
    """Name, dtype and shape of the arrays of one sample."""
    other = [leaf for _, leaf in leaves(x) if not isinstance(leaf, np.ndarray)]
    if other:
        raise DataError(
            "cached features are found by the arrays of a sample, and these inputs are no arrays "
            "of one length: pass such arrays, or train with fl.cached. "
            f"Received: inputs of type {type(other[0]).__name__}"
        )
    return sorted((name, leaf.dtype.str, leaf.shape[1:]) for name, leaf in leaves(x))


def _key(identity: Identity, order: _Order, forms: list[Any], augmented: Any = ()) -> str:
    """Of a collection: what computes, and the forms of what it takes."""
    # Features in float32 keep the key that they had before there was another precision.
    lower = () if order.precision == "float32" else (order.precision,)
    return build.collection_key(
        identity.text, order.engine, order.dtype, order.batch_size, forms, augmented, *lower
    )


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A collection whose lock is held, for writers that share it.

    Attributes:
        collection: Where.
        identity: Of the prefix, which every writer must have.
        whole: Shards that are there, compared with their checksums.
        progress: Told of what is done.
        root: Folder of the cache.
    """

    collection: Collection
    identity: Identity
    whole: tuple[Shard, ...]
    progress: Progress
    root: Path


@contextmanager
def opened(
    prefix: Any,
    first: Any,
    path: str | os.PathLike[str] | None,
    whole: Callable[[Collection], Iterable[Shard]],
    *,
    engine: str = "auto",
    dtype: str = "float32",
    batch_size: int = BATCH_SIZE,
    lock_timeout: float | None = None,
    verbose: Any = "auto",
    title: str = "features",
) -> Iterator[Opened]:
    """Hold the collection that :func:`cache_features` would fill with many samples.

    Args:
        prefix: As there.
        first: Inputs of a first batch: the engine is chosen on them, and features that are stored
            are compared with what the prefix computes of them.
        path: As there.
        whole: Returns the shards of a collection whose bytes are right.
        engine: As there.
        dtype: As there.
        batch_size: As there.
        lock_timeout: As there.
        verbose: As there.
        title: As there.

    Raises:
        ModelError: The prefix cannot be told from another in another process.
    """
    _check(views=1, augment=None, batch_size=batch_size, max_gb=None)
    order = _Order(root=folder.resolve(path), engine=engine, precision="float32",
                   dtype=shards.require_dtype(dtype),
                   augment=None, augmentation="", batch_size=batch_size, max_bytes=None,
                   lock_timeout=lock_timeout, verbose=verbose, seed=0, title=title,
                   through=None)  # fmt: skip
    identity = prefixes.identity(prefix)
    if identity.private:
        raise ModelError(
            f"the prefix uses {identity.private}, which cannot be told from another in another "
            "process, so workers cannot share its features. Give it by a function or class that "
            "can be imported. Received: a prefix that is known in this process only"
        )
    forms, progress = _forms(first), Progress(title, None, verbose)
    home = order.root / (key := _key(identity, order, forms))
    with folder.locked(home, progress, timeout=lock_timeout):
        known_by = (identity.text, repr(forms), order.precision)
        start = _Start(prefix, known_by, order, progress, None, None)
        collection = _Lazy(start, first, 0, _known(home)).collection(home, key)
        shards.create(collection)
        there = tuple(whole(collection))
        try:
            _judge_first(prefix, collection, first, there)
        except ChangedError as changed:
            shards.discard(home)
            progress.say(f"{title}: {changed}; they are discarded and computed anew")
            collection = _Lazy(start, first, 0, None).collection(home, key)
            shards.create(collection)
            there = ()
        yield Opened(
            collection=collection, identity=identity, whole=there, progress=progress,
            root=order.root,
        )  # fmt: skip
    progress.finish()


def _judge_first(prefix: Any, collection: Collection, x: Any, there: Sequence[Shard]) -> None:
    """Compare samples of one batch that are stored with what the prefix computes now."""
    digests = shards.sample_digests(leaves(x))
    pointers, known = Lookup.of(there).find(digests)
    places = [
        (number, there[int(pointers[number]) >> 32], int(pointers[number]) & 0xFFFFFFFF)
        for number in np.flatnonzero(known).tolist()
    ]
    Judge(prefix, collection, None).see(x, digests, places)


def _built(
    start: _Start, home: Path, key: str, view: int, first: Any, stream: Iterator[Batch]
) -> tuple[Collection, build.Manifest]:
    """Compute what is missing and write the manifest; the lock is held.

    Raises:
        ChangedError: What is stored is not what the prefix computes.
    """
    order, progress = start.order, start.progress
    lazy = _Lazy(start, first, view, _known(home))
    collection = lazy.collection(home, key)
    shards.create(collection)
    used = folder.size(order.root)
    build.require_room(collection, start.expected, max_bytes=order.max_bytes, used=used)
    progress.say(build.estimate(collection, progress.title, start.expected))
    judge = Judge(start.prefix, collection, _augmenter(order, view))
    builder = build.Builder(
        collection, lazy.run, order.dtype, progress, order.max_bytes, used, judge
    )
    return collection, builder.build(batch.x for batch in stream)


def _noted(stream: Iterator[Batch], labels: list[Any] | None) -> Iterator[Batch]:
    for batch in stream:
        if labels is not None:
            labels.append(batch.y)
        yield batch


def _known(home: Path) -> Collection | None:
    """What an earlier build says: another engine would not go on with the same bytes."""
    try:
        return shards.load(home)
    except DamagedError:
        return None


@dataclass(frozen=True)
class _Start:
    """What it takes to get an engine going.

    Attributes:
        prefix: The frozen part.
        known_by: Its identity, the forms of its inputs, and the precision.
        order: What was asked for.
        progress: Told what was chosen and why.
        expected: Samples to come; ``None`` when not known.
        work: Those of the views behind this one included.
    """

    prefix: Any
    known_by: tuple[str, str, str]
    order: _Order
    progress: Progress
    expected: int | None
    work: int | None

    def run(self, first: Any, known: Collection | None) -> engines.Engine:
        """What computes: for an earlier build, the engine that it took."""
        if prefixes.is_callable_prefix(self.prefix):
            return engines.Engine(name="callable", device="", _run=self.prefix)
        wanted = self.order.engine if known is None else known.engine
        chosen = engines.remembered(self.prefix, self.known_by, wanted)
        if chosen is None:
            prefixes.require_apart(self.prefix, first)
            chosen = self._choose(first, wanted)
            engines.remember(self.prefix, self.known_by, self.order.engine, chosen)
        return chosen

    def _choose(self, first: Any, wanted: str) -> engines.Engine:
        choose = partial(
            engines.choose, self.prefix, first, samples=self.work,
            precision=self.order.precision,
        )  # fmt: skip
        try:
            chosen = choose(wanted)
        except FrostlineError as problem:
            if self.order.engine != "auto" or wanted == "auto":
                raise
            self.progress.say(f"{self.order.title}: {problem}; going on with native")
            chosen = choose("native")
        self.tell(chosen)
        return chosen

    def tell(self, chosen: engines.Engine) -> None:
        """Say what computes, and why."""
        for note in chosen.notes:
            self.progress.say(f"{self.order.title}: {note}")
        lower = chosen.precision != "float32"
        if chosen.name != "native" or chosen.rates or lower:
            rates = [f"{name} {rate:.3g}/s" for name, rate in chosen.rates.items()]
            measured = f"; on the first batch {', '.join(rates)}" if rates else ""
            how = (
                f" in {chosen.precision}, {chosen.error:.1e} of the largest value from float32"
                if lower else ""
            )  # fmt: skip
            self.progress.say(f"{self.order.title}: computed by {chosen.name}{how}{measured}")


class _Lazy:
    """The prefix, prepared when the first features are missing: often none are."""

    def __init__(self, start: _Start, x: Any, view: int, known: Collection | None) -> None:
        self.start = start
        self.order = start.order
        self.first = _full(x, self.order.batch_size)
        self.view = view
        self.known = known
        self.engine = self.order.engine
        self.error = 0.0
        self._run: build.Run | None = None
        self._trial: tuple[bytes, Any] | None = None
        #: Key of the earlier frontier that features are computed from; empty: from the samples.
        self.through = "" if known is None else str(known.about.get("through", ""))

    def run(self, x: Any, digests: Array) -> Any:
        """Features of a full batch; what the trial computed is handed out instead of done again."""
        trial, self._trial = self._trial, None
        if trial is not None and trial[0] == digests.tobytes():
            return trial[1]
        if self._run is None:
            self._run = self._through() or self._straight()
        return self._run(x, digests)

    def _straight(self) -> build.Run:
        """Compute from the samples."""
        chosen = self.start.run(self.first, self.known)
        self.engine, self.error, self.through = chosen.name, chosen.error, ""
        return _augmented(chosen.run, self.order, self.view)

    def _through(self) -> build.Run | None:
        """Compute from an earlier frontier, if that is asked for and right.

        What an earlier build began is gone on with in its way, so that it ends in the same bytes.
        """
        through = self.order.through
        if through is None or (self.known is not None and self.through != through.key):
            return None
        start = self.start
        try:
            chosen, run = start_through(
                through,
                start.prefix,
                start.known_by,
                self.first,
                shards.sample_digests(leaves(self.first)),
                engine=self.order.engine if self.known is None else self.known.engine,
                samples=start.work,
                precision=self.order.precision,
            )
        except FrostlineError as problem:
            start.progress.say(f"{self.order.title}: {problem}; computed from the samples")
            return None
        self.engine, self.error, self.through = chosen.name, chosen.error, through.key
        start.tell(chosen)
        return run

    def collection(self, home: Path, key: str) -> Collection:
        """Where features go: as an earlier build described it, or by a trial on the first batch."""
        if self.known is not None:
            return self.known
        digests = shards.sample_digests(leaves(self.first))
        try:
            trial = self.run(self.first, digests)
        except FrostlineError:
            raise
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            shapes = ", ".join(str(leaf.shape[1:]) for _, leaf in leaves(self.first))
            raise DataError(
                f"the frozen part does not take these inputs ({first_line(error)}). Pass them as "
                "the model takes them, with batch_size= where it takes one size of batches alone. "
                f"Received: batches of {self.order.batch_size} samples of shape {shapes}"
            ) from error
        self._trial = (digests.tobytes(), trial)
        dtype, prefix = self.order.dtype, self.start.prefix
        tensors = tuple(
            Tensor(shape=array.shape[1:], dtype=shards.stored_dtype(array, dtype))
            for array in map(np.asarray, trial)
        )
        about = {
            "model": str(getattr(prefix, "name", type(prefix).__name__)),
            "dtype": dtype,
            "view": self.view,
            "augmented": bool(self.order.augmentation),
            "through": self.through,
        }
        if self.order.precision != "float32":
            about |= {"precision": self.order.precision, "error": self.error}
        return Collection(folder=home, key=key, tensors=tensors, engine=self.engine,
                          batch_size=self.order.batch_size, about=about)  # fmt: skip


def _full(x: Any, size: int) -> Any:
    """The first samples, repeated up to a whole batch."""
    return _map_rows(x, np.arange(size) % len(leaves(x)[0][1]))


def _map_rows(x: Any, rows: Array) -> Any:
    from frostline.data.arrays import map_leaves

    return map_leaves(lambda leaf: np.asarray(leaf)[rows], x)


def _augmented(run: Any, order: _Order, view: int) -> build.Run:
    """Run on augmented samples."""
    augment = _augmenter(order, view)
    if augment is None:
        return lambda x, _: run(x)
    return lambda x, digests: run(augment(x, digests))


def _augmenter(order: _Order, view: int) -> Callable[[Any, Array], Any] | None:
    """Augment a batch; the seed is a hash of its samples: a killed run goes on alike."""
    if order.augment is None:
        return None
    apply = prefixes.augmenter(order.augment)

    def augmented(x: Any, digests: Array) -> Any:
        digest = sha256("seed", str(order.seed), str(view), digests.tobytes())
        made = apply(x, int(digest[:8], 16) & 0x7FFFFFFF)
        if made is None:
            raise DataError("augment must return the batch that it made. Received: augment -> None")
        return made

    return augmented


def expected_samples(data: Any, first: int) -> int | None:
    """How many samples there are, as far as the data say; an upper estimate for batched data.

    Args:
        data: What the user passed.
        first: Samples in the first batch.
    """
    if isinstance(data, Batch):
        return len(data)
    arrays = data[0] if isinstance(data, tuple) and data else data
    shaped = [leaf for _, leaf in leaves(arrays) if hasattr(leaf, "shape")]
    if shaped and len(shaped[0].shape):
        return int(shaped[0].shape[0])
    inner = getattr(data, "dataset", None)
    if inner is not None and hasattr(inner, "__len__"):
        return len(inner)  # a torch DataLoader's
    if callable(getattr(data, "cardinality", None)):
        known = int(data.cardinality())
        return known * first if known >= 0 else None
    try:
        return len(data) * first
    except TypeError:
        return None


__all__ = ["BATCH_SIZE", "FeatureCache", "Through", "cache_features"]
