"""Population statistics of a Ray data set: each worker measures a share, all of them merge."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from frostline.adapters import adapter_of
from frostline.adapters.together import Together
from frostline.atomic import atomically
from frostline.data.arrays import leaves, map_leaves
from frostline.measure.recalibration import Recalibration, recalibrate_adapter
from frostline.scale import cluster
from frostline.scale.cluster import Inputs
from frostline.types import Array, FrostlineError
from frostline.types.reasons import first_line
from frostline.verbs.edit import Change, undoing

#: A job whose worker died is started again, so often.
ATTEMPTS = 3


class _Meeting:
    """Where the workers leave their words and take those of all; an actor of Ray."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._turns: dict[int, tuple[dict[int, bytes], asyncio.Event]] = {}

    async def gather(self, turn: int, rank: int, word: bytes) -> list[bytes]:
        """Wait for the words of all ranks in this turn."""
        words, all_here = self._turns.setdefault(turn, ({}, asyncio.Event()))
        words[rank] = word
        if len(words) == self._size:
            all_here.set()
            self._turns.pop(turn - 1, None)  # whoever is here has left that one
        await all_here.wait()
        return [words[rank] for rank in range(self._size)]


class _Cluster(Together):
    """The workers of one job."""

    def __init__(self, ray: Any, meeting: Any, rank: int, size: int, timeout: float) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        self._ray, self._meeting, self._timeout = ray, meeting, timeout
        self._turn = itertools.count()

    def _gather(self, word: bytes) -> list[bytes]:
        turn = self._meeting.gather.remote(next(self._turn), self.rank, word)
        found: list[bytes] = self._ray.get(turn, timeout=self._timeout)
        return found


class _Share:
    """Batches of some blocks, which can be read again; one block in memory at a time."""

    def __init__(self, ray: Any, blocks: Sequence[Any], inputs: Inputs, batch_size: int) -> None:
        self._ray, self._blocks, self._inputs, self._size = ray, blocks, inputs, batch_size

    def __iter__(self) -> Iterator[Any]:
        rest: Any = None
        for block in self._blocks:
            columns = self._ray.get(block)
            if isinstance(columns, np.ndarray):  # of a data set with one column
                columns = dict.fromkeys(cluster.names_of(self._inputs), columns)
            x = cluster.picked(columns, self._inputs)
            x = x if rest is None else _joined(rest, x)
            count = len(leaves(x)[0][1])
            whole = count - count % self._size
            for start in range(0, whole, self._size):
                yield self._batch(x, start, start + self._size)
            rest = None if whole == count else cluster.rows(x, np.arange(whole, count))
        if rest is not None:
            yield self._batch(rest, 0, self._size)

    def _batch(self, x: Any, start: int, stop: int) -> Any:
        part = map_leaves(lambda leaf: np.array(np.asarray(leaf)[start:stop]), x)
        return part if isinstance(part, np.ndarray | dict) else (part,)


def _joined(one: Any, other: Any) -> Any:
    following = iter([leaf for _, leaf in leaves(other)])
    return map_leaves(lambda leaf: np.concatenate([leaf, next(following)]), one)


def _measure(
    model: Any, meeting: Any, rank: int, size: int, blocks: Sequence[Any], inputs: Inputs,
    timeout: float, options: Mapping[str, Any],
) -> tuple[Recalibration, dict[str, tuple[Array, Array]]]:  # fmt: skip
    """What a worker does: recalibrate its copy of the model together with the others."""
    ray = cluster.require_ray()
    adapter = adapter_of(model)
    ranks = _Cluster(ray, meeting, rank, size, timeout)
    share: Any = _Share(ray, blocks, inputs, options["batch_size"]) if blocks else []
    with ranks.collective("recalibrate"):
        done, _ = recalibrate_adapter(adapter, share, ranks=ranks, **options)
    meter = adapter.meter([shift.path for shift in done.shifts])
    return done, {shift.path: meter.stored(shift.path) for shift in done.shifts}


def recalibrate(
    model: Any,
    dataset: Any,
    *,
    inputs: Inputs | None = None,
    sites: Any = "unfrozen",
    method: Literal["sequential", "batch"] = "sequential",
    batch_size: int = 32,
    samples: int | None = None,
    actors: int | None = None,
    num_gpus: float | None = None,
    timeout: float = 600.0,
) -> Change:
    """Replace stored statistics, in place, by the population statistics of a Ray data set.

    As :func:`frostline.recalibrate`, with the samples spread over workers, which merge count, mean
    and sum of squared deviations of each site in float64. Blocks stay in Ray's object store, which
    spills to disk; the driver sees none of them. Between two sites a worker keeps the activations
    of its share in a temporary folder (up to 1 GiB in memory), so on very large data say how many
    ``samples``: ten thousand settle the statistics of most networks.

    Args:
        model: A built Keras model or a torch module that can be pickled.
        dataset: A ``ray.data.Dataset``.
        inputs: As in :class:`frostline.scale.Features`.
        sites: As in :func:`frostline.recalibrate`.
        method: As there.
        batch_size: As there.
        samples: Read the first so many; ``None``: all.
        actors: Workers, with one CPU each; ``None``: as many as the cluster has room for.
        num_gpus: GPUs of each worker; ``None``: one where the cluster has some.
        timeout: Seconds that a worker waits for the others at a site.

    Returns:
        A change; ``undo()`` puts the old statistics back.

    Raises:
        BackendError: Ray is not installed.
        ModelError: As :func:`frostline.recalibrate`; or the model cannot be sent to workers.
        DataError: As there; or columns that do not fit.
        FrostlineError: Workers died three times.
    """
    ray = cluster.require_ray()
    cluster.require_dataset(ray, dataset)
    cluster.require_counts(batch_size=batch_size, samples=samples)
    inputs = cluster.input_columns(dataset.columns() or [], inputs)
    size, gpus = cluster.workers(ray, actors, num_gpus)
    adapter = adapter_of(model)
    options = {"sites": sites, "method": method, "batch_size": batch_size}
    undo = adapter.snapshot()

    def edit() -> Change:
        with cluster.plain_errors():
            part = dataset.select_columns(cluster.names_of(inputs))
            part = (part if samples is None else part.limit(samples)).materialize()
            if part.num_blocks() < size:
                part = part.repartition(size)
            blocks = part.to_numpy_refs()
            around = {**cluster.surroundings(adapter), "num_cpus": 1, "num_gpus": gpus}
            done, found = _all(ray, cluster.packed(ray, model), blocks, size, around,
                               (inputs, timeout, options))  # fmt: skip
        meter = adapter.meter(list(found))
        before = meter.snapshot()
        for path, (mean, variance) in found.items():
            meter.store(path, np.array(mean), np.array(variance))  # Ray's cannot be written to
        return Change(
            verb="recalibrate",
            text=done.text(),
            notes=done.remarks(),
            _undo=undoing(adapter, before),
        )

    return atomically(undo, edit)


def _all(
    ray: Any, model: Any, blocks: Sequence[Any], size: int, around: Mapping[str, Any],
    rest: tuple[Any, ...],
) -> tuple[Recalibration, dict[str, tuple[Array, Array]]]:  # fmt: skip
    """Run all workers; where one is lost, end the others and begin anew."""
    from ray.exceptions import RayError, RayTaskError, WorkerCrashedError

    lost: Exception | None = None
    for _ in range(ATTEMPTS):
        meeting = ray.remote(_Meeting).options(num_cpus=0, max_concurrency=size + 1).remote(size)
        measure = ray.remote(_measure).options(max_retries=0, **around)
        waiting = [
            measure.remote(model, meeting, rank, size, blocks[rank::size], *rest)
            for rank in range(size)
        ]
        pending, problems = list(waiting), []
        try:
            while pending:
                (ready, *_), pending = ray.wait(pending, num_returns=1)
                try:
                    ray.get(ready)
                except WorkerCrashedError as error:
                    lost = error
                    break
                except RayTaskError as error:
                    problems.append(error)
            else:
                if not problems:
                    answer: tuple[Recalibration, dict[str, tuple[Array, Array]]]
                    answer = ray.get(waiting[0])
                    return answer
                # The one who raised first, not those who were told of it.
                raise min(problems, key=lambda error: type(error.cause) is FrostlineError)
        finally:
            for future in pending:
                ray.cancel(future, force=True)
            ray.kill(meeting)
    assert isinstance(lost, RayError)
    raise FrostlineError(
        f"workers of Ray died {ATTEMPTS} times ({first_line(lost)}). The model is as it was. "
        "Fewer actors leave more memory to each"
    ) from lost
