"""Features of a frozen prefix on Ray Data: a column of the data set, or the store of the cache."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from frostline import engines, types
from frostline.adapters import adapter_of, prefix as prefixes
from frostline.cache import BATCH_SIZE, FeatureCache, Opened, build, opened, shards
from frostline.cache.features import View
from frostline.cache.files import DamagedError
from frostline.cache.lookup import Lookup
from frostline.cache.shards import DIGEST_BYTES, Collection, Shard
from frostline.data.arrays import leaves
from frostline.scale import cluster
from frostline.scale.cluster import Inputs
from frostline.types import Array, DataError, FrostlineError, ModelError

#: Bytes of inputs that a worker takes at a time, about: a kill loses as much.
_INPUT_BYTES = 64 << 20
#: Shards that one task compares with their checksums.
_SHARDS_PER_TASK = 16


class Features:
    """A stateful function for ``Dataset.map_batches``: adds the features of a frozen prefix.

    One object per actor builds the prefix and its engine once. All other columns are kept::

        dataset.map_batches(
            scale.Features,
            fn_constructor_args=(prefix,),
            fn_constructor_kwargs={"inputs": "image"},
            compute=ray.data.ActorPoolStrategy(size=8),
            num_gpus=1,
        )

    Args:
        prefix: The frozen part, for example ``fl.split(model).prefix``: a built Keras model or a
            torch module. A torch module is moved to the GPU that Ray gives to the actor.
        inputs: Column of the model's input, shape ``(n, ...)``; a list of columns; or a mapping
            from the names of inputs to columns. ``None``: ``image``, ``x``, ``data``, or the only
            column that is none of ``id``, ``path``, ``label``.
        output: Column of the features; ``output_0``, ``output_1``, ... where several tensors
            cross the frontier.
        engine: What runs the prefix, as in :func:`frostline.cache_features`. ``"auto"`` measures
            in every actor, and actors may choose differently.
        batch_size: Samples per pass of the prefix. Batches of Ray may have any size.

    Raises:
        ModelError: A prefix that is neither, or an engine that cannot run it.
        DataError: Columns that are missing or ambiguous, or samples of several shapes.
    """

    def __init__(
        self,
        prefix: Any,
        *,
        inputs: Inputs | None = None,
        output: str = "features",
        engine: str = "native",
        batch_size: int = BATCH_SIZE,
    ) -> None:
        self.prefix = prefix if prefixes.is_callable_prefix(prefix) else prefixes.placed(prefix)
        self.inputs, self.output = inputs, output
        self.engine, self.batch_size = engine, batch_size
        self._run: Callable[[Any], Sequence[Array]] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with its features."""
        if self.inputs is None:
            self.inputs = cluster.input_columns(list(batch), None)
        x = cluster.picked(batch, self.inputs)
        count = len(leaves(x)[0][1])
        parts = [
            [array[: len(chosen)] for array in self.run(_padded(x, chosen, self.batch_size))]
            for chosen in self.chunks(np.arange(count))
        ]
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        several = len(columns) > 1
        return {
            **batch,
            **{
                f"{self.output}_{number}" if several else self.output: _numbers(column)
                for number, column in enumerate(columns)
            },
        }

    def run(self, x: Any) -> list[Array]:
        """Features of exactly ``batch_size`` samples, one array per tensor."""
        if self._run is None:
            callable_ = prefixes.is_callable_prefix(self.prefix)
            self._run = (
                self.prefix if callable_ else engines.choose(self.prefix, x, self.engine).run
            )
        return [np.asarray(array) for array in self._run(x)]

    def chunks(self, chosen: Array) -> Iterator[Array]:
        """Some rows, ``batch_size`` at a time."""
        for start in range(0, len(chosen), self.batch_size):
            yield chosen[start : start + self.batch_size]


def _padded(x: Any, chosen: Array, size: int) -> Any:
    """Rows, the last one repeated up to a whole batch."""
    return cluster.rows(x, chosen[np.minimum(np.arange(size), len(chosen) - 1)])


def _numbers(array: Array) -> Array:
    """An array in a dtype that Arrow knows."""
    return array.astype(np.float32) if array.dtype.name == "bfloat16" else array


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What the writers of one collection share.

    Attributes:
        prefix: Reference to the packed prefix.
        known: Reference to a :class:`Lookup` of what is stored already.
        collection: Where features go.
        version: Of Frostline on the driver.
        identity: Of the prefix there.
        ids: Column of the ids.
        inputs: Columns of the inputs.
        dtype: How floats are stored.
    """

    prefix: Any
    known: Any
    collection: Collection
    version: str
    identity: str
    ids: str
    inputs: Inputs
    dtype: str


class _Writer(Features):
    """Writes the features of a batch as one shard; returns ids, digests and what was computed.

    Frostline's errors come back as a row: Ray would wrap them, and retry what is no accident.
    """

    def __init__(self, job: _Job) -> None:
        ray = cluster.require_ray()
        self._job, self._problem = job, ""
        try:
            prefix = ray.get(job.prefix)
            _require_same(job, prefix)
            collection = job.collection
            super().__init__(prefix, inputs=job.inputs, engine=collection.engine,
                             batch_size=collection.batch_size)  # fmt: skip
            self._known: Lookup = ray.get(job.known)
        except FrostlineError as error:
            self._problem = _told(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        ids = np.asarray(batch[self._job.ids])
        problem = self._problem
        digests, missing = np.zeros((len(ids), DIGEST_BYTES), np.uint8), np.zeros(len(ids), bool)
        if not problem:
            try:
                digests, missing = self._written(batch, ids)
            except FrostlineError as error:
                problem = _told(error)
        problems = np.full(len(ids), problem)
        return {"id": ids, "digest": digests, "computed": missing, "problem": problems}

    def _written(self, batch: dict[str, Any], ids: Array) -> tuple[Array, Array]:
        """Write what is missing; digests of the samples, and which of them were computed."""
        collection, x = self._job.collection, cluster.picked(batch, self._job.inputs)
        digests = shards.sample_digests(leaves(x))
        missing = ~self._known.find(digests)[1]
        once = np.zeros(len(ids), bool)
        once[np.unique(digests, axis=0, return_index=True)[1]] = True
        missing &= once
        if not missing.any():
            return digests, missing
        wanted = np.flatnonzero(missing)
        if _is_there(collection, digests[wanted]):
            return digests, np.zeros(len(ids), bool)
        parts = [
            build.computed(
                collection,
                lambda batch, _: self.run(batch),
                self._job.dtype,
                cluster.rows(x, chosen),
                digests[chosen],
                ids[chosen],
            )
            for chosen in self.chunks(wanted)
        ]
        arrays = [np.concatenate(column) for column in zip(*parts, strict=True)]
        shards.write_shard(collection, digests[wanted], arrays)
        return digests, missing


def _require_same(job: _Job, prefix: Any) -> None:
    """Refuse to compute for another version of Frostline, another prefix or another folder.

    Raises:
        FrostlineError: It is another.
    """
    if (here := version("frostline")) != job.version:
        raise FrostlineError(
            f"a worker has Frostline {here} and the driver {job.version}: install one version on "
            f"all nodes, for example by runtime_env={{'pip': [...]}}. Received: {here}"
        )
    found = prefixes.identity(prefix)
    if found.text != job.identity:
        raise ModelError(
            "the prefix is another one on a worker than on the driver: its code or weights, the "
            "version of its framework, or the backend of Keras differ, so its features would "
            f"have another key. Received: {found.text[:12]} on the worker, {job.identity[:12]} on "
            "the driver"
        )
    try:
        key = shards.load(job.collection.folder).key
    except DamagedError:
        key = ""
    if key != job.collection.key:
        raise FrostlineError(
            f"a worker does not see the cache folder {job.collection.folder}: choose one that all "
            "nodes share (a network file system)"
        )


def _told(error: FrostlineError) -> str:
    return f"{type(error).__name__}|{error}"


def cache_features(
    prefix: Any,
    dataset: Any,
    path: str | os.PathLike[str] | None = None,
    *,
    ids: str | None = None,
    inputs: Inputs | None = None,
    engine: str = "auto",
    dtype: str = "float32",
    batch_size: int = BATCH_SIZE,
    actors: int | None = None,
    num_gpus: float | None = None,
    lock_timeout: float | None = None,
    verbose: Any = "auto",
    title: str = "features",
) -> FeatureCache:
    """Compute what a frozen prefix makes of every sample of a Ray data set, once, and keep it.

    What is written is the store of :func:`frostline.cache_features`, found by ``fl.fit`` and by
    torch training as if one machine had written it: the same key, the same checks, the same
    features. Workers write shards; the driver needs about 230 bytes per sample (id, digest, place).

    Samples whose features are there are read and hashed, not computed. A worker that dies is
    started again by Ray, and its batch is computed again; what it wrote counts. So a sample may be
    computed twice, and is stored and counted once: by its id, and by its bytes.

    Args:
        prefix: The frozen part, for example ``fl.split(model).prefix``: a built Keras model or a
            torch module that can be pickled.
        dataset: A ``ray.data.Dataset``.
        path: Cache folder, which all nodes must share.
        ids: Column with a unique number or string for every sample; ``None``: ``id`` or ``path``.
            Row i of the cache is the i-th sample in the order of ids.
        inputs: As in :class:`Features`.
        engine: As in :func:`frostline.cache_features`; chosen once, by the driver.
        dtype: As there.
        batch_size: As there.
        actors: Workers, with one CPU each; ``None``: as many as the cluster has room for.
        num_gpus: GPUs of each worker; ``None``: one where the cluster has some.
        lock_timeout: As there.
        verbose: As there.
        title: As there.

    Returns:
        The features on disk; ``ids`` has the ids of its rows, ``to_torch()`` makes a data set.

    Raises:
        BackendError: Ray is not installed.
        DataError: No ids, ids that are not unique, columns that do not fit, an empty data set,
            features that are not finite.
        ModelError: A prefix that cannot be sent to workers, or is another one there.
        OutputError: No room on the disk.
        FrostlineError: A worker has another version of Frostline, or does not see the folder.
    """
    ray = cluster.require_ray()
    cluster.require_dataset(ray, dataset)
    cluster.require_counts(batch_size=batch_size)
    count, gpus = cluster.workers(ray, actors, num_gpus)
    with cluster.plain_errors():
        try:
            columns = dataset.take_batch(batch_size, batch_format="numpy")
        except ValueError as error:  # Ray's word for it
            raise DataError("The data hold no samples. Received: an empty data set") from error
        name = cluster.id_column(list(columns), ids)
        inputs = cluster.input_columns(list(columns), inputs, name)
        first = cluster.picked(columns, inputs)
        wanted = dict.fromkeys([name, *cluster.names_of(inputs)])
        dataset = dataset.select_columns(list(wanted))
        around = cluster.surroundings(adapter_of(prefix)) if _is_model(prefix) else {}
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, **around}
        with opened(
            prefix, cluster.rows(first, np.arange(len(leaves(first)[0][1]))), path,
            lambda collection: _whole(ray, collection), engine=engine, dtype=dtype,
            batch_size=batch_size, lock_timeout=lock_timeout, verbose=verbose, title=title,
        ) as here:  # fmt: skip
            job = _Job(
                prefix=cluster.packed(ray, prefix), known=ray.put(Lookup.of(here.whole)),
                collection=here.collection, version=version("frostline"),
                identity=here.identity.text, ids=name, inputs=inputs, dtype=dtype,
            )  # fmt: skip
            stream = dataset.map_batches(
                _Writer,
                fn_constructor_args=(job,),
                batch_size=_rows_at_a_time(here.collection, first),
                batch_format="numpy",
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=count),
                **options,
            ).iter_batches(batch_size=None, batch_format="numpy")
            found = _finished(here, stream)
        return FeatureCache(path=here.root, views=(found,))


def _is_model(prefix: Any) -> bool:
    return not prefixes.is_callable_prefix(prefix)


def _rows_at_a_time(collection: Collection, x: Any) -> int:
    """Samples that a worker takes at a time: one shard, and whole batches of the prefix."""
    each = sum(np.asarray(leaf)[0].nbytes for _, leaf in leaves(x))
    most: int = min(collection.shard_rows, _INPUT_BYTES // max(1, each))
    return max(1, most // collection.batch_size) * collection.batch_size


def _whole(ray: Any, collection: Collection) -> list[Shard]:
    """The shards whose bytes are right, compared by tasks of Ray; others are removed."""
    there = list(shards.known_shards(collection))
    if not there:
        return []

    def check(batch: dict[str, Any]) -> dict[str, Any]:
        return {
            "number": batch["item"],
            "whole": [_is_whole(collection, there[n]) for n in batch["item"]],
        }

    checked = ray.data.from_items(list(range(len(there)))).map_batches(
        check, batch_size=_SHARDS_PER_TASK, batch_format="numpy"
    )
    whole = {int(row["number"]) for row in checked.iter_rows() if row["whole"]}
    for number, shard in enumerate(there):
        if number not in whole:
            shards.remove_shard(collection, shard.name)
    return [shard for number, shard in enumerate(there) if number in whole]


def _is_whole(collection: Collection, shard: Shard) -> bool:
    try:
        shards.verify_shard(collection, shard)
    except DamagedError:
        return False
    return True


def _is_there(collection: Collection, samples: Array) -> bool:
    """Whether a worker that died has written the shard of these samples.

    Ray hands all batches of a block out again after the worker of one of them died.
    """
    try:
        shard = shards.read_shard(collection, shards.shard_name(collection.key, samples))
    except DamagedError:
        return False
    return _is_whole(collection, shard)


def _finished(here: Opened, stream: Any) -> View:
    """Collect ids and digests, and write the manifest last of all."""
    collection = here.collection
    names: list[Array] = []
    digests: list[Array] = []
    for batch in stream:
        for problem in batch["problem"]:
            if problem:
                _raise(str(problem))
        # Copies: what Ray hands out keeps its blocks in memory.
        names.append(np.array(_plain(batch["id"])))
        digests.append(np.array(batch["digest"], np.uint8))
        here.progress.advance(len(names[-1]), int(np.sum(batch["computed"])))
    ids, whole = _once(np.concatenate(names), np.concatenate(digests))
    there = list(shards.known_shards(collection))
    pointers, known = Lookup.of(there).find(whole)
    if not known.all():
        raise FrostlineError(
            f"shards vanished from {collection.folder} while the job ran: run it again, it goes on "
            f"from what is there. Received: {int((~known).sum())} samples without features"
        )
    manifest = build.numbered(
        hashlib.sha256(whole.tobytes()).hexdigest(), pointers, lambda n: there[n].name, ids
    )
    build.write_manifest(collection, manifest)
    return View(collection=collection, manifest=manifest)


def _raise(problem: str) -> None:
    kind, _, text = problem.partition("|")
    raise getattr(types, kind, FrostlineError)(text)


def _plain(ids: Any) -> Array:
    """Ids as numbers or as text; anything else cannot be kept.

    Raises:
        DataError: They are neither.
    """
    array = np.asarray(ids)
    if array.dtype == object and all(isinstance(value, str) for value in array):
        array = array.astype(np.str_)
    if array.ndim != 1 or array.dtype.kind not in "iuU":
        raise DataError(
            "ids are whole numbers or strings, one per sample. "
            f"Received: dtype {array.dtype} of shape {array.shape}"
        )
    return array


def _once(ids: Array, digests: Array) -> tuple[Array, Array]:
    """Every id once, in order, with the digest of its sample.

    Raises:
        DataError: One id stands for several samples.
    """
    unique, first, which = np.unique(ids, return_index=True, return_inverse=True)
    differ = (digests != digests[first][which]).any(axis=1)
    if differ.any():
        odd = ids[differ]
        raise DataError(
            f"ids are not unique: {odd[0].item()!r} stands for several samples "
            f"({len(np.unique(odd))} such ids). Give every sample an id of its own"
        )
    return unique, digests[first]
