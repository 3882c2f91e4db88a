"""Processes that answer one question together: exchange, merge, fail together.

Everything that a rank decides with is exchanged, so that all ranks decide alike. Before each
exchange a status word goes round: if one rank has failed, all of them raise, so none waits for it.
"""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from frostline.numerics.stats import Moments
from frostline.types import DataError, FrostlineError, ModelError
from frostline.types.reasons import first_line


class Together:
    """One process alone, for which every exchange is trivial; a group overrides :meth:`_gather`.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
    """

    rank = 0
    size = 1

    def __init__(self) -> None:
        self._over = False

    def _gather(self, word: bytes) -> list[bytes]:
        """One word of each rank, in their order; all of one length."""
        return [word]

    def exchange(self, word: bytes) -> list[bytes]:
        """What each rank passes here, in the order of ranks; the lengths may differ.

        Raises:
            FrostlineError: Another rank has failed, or is gone.
        """
        return self._exchange(word, failed=False)

    def _exchange(self, word: bytes, *, failed: bool) -> list[bytes]:
        if self.size == 1:
            return [word]
        try:
            heads = [
                np.frombuffer(head, np.int64)
                for head in self._gather(np.array([failed, len(word)], np.int64).tobytes())
            ]
            longest = max(int(head[1]) for head in heads)
            words = self._gather(word.ljust(longest, b"\0")) if longest else [b""] * self.size
        except Exception as error:  # torch has no one class for what a lost peer raises
            self._over = True
            raise FrostlineError(
                f"rank {self.rank} of {self.size} lost the others ({first_line(error)}). Its model "
                "is as it was; the process group cannot be used any more"
            ) from error
        words = [word[: int(head[1])] for word, head in zip(words, heads, strict=True)]
        lost = [rank for rank, head in enumerate(heads) if head[0]]
        if lost:
            self._over = True
            if not failed:
                raise FrostlineError(
                    f"rank {lost[0]} of {self.size} raised {words[lost[0]].decode()} "
                    "The models of all ranks are as they were"
                )
        return words

    @contextmanager
    def collective(self, verb: str, **options: Any) -> Iterator[None]:
        """A block that all ranks enter; where one of them raises inside, all do.

        Args:
            verb: What they are in.
            options: What must be the same on all of them, as plain values.

        Raises:
            ModelError: The ranks are in different verbs, or differ in an option.
            FrostlineError: Another rank raised, or is gone.
        """
        self._over = self.size == 1
        try:
            self.require_alike(verb=verb, **options)
            yield
            self.exchange(b"")  # all have come to their end before anyone returns
        except BaseException as error:
            if not self._over:
                self._tell(error)
            raise

    def _tell(self, error: BaseException) -> None:
        """Let the others raise as well; that they are gone is no news then."""
        text = f"{type(error).__name__}: {str(error)[:2000] or 'no message'}".rstrip(".") + "."
        try:
            self._exchange(text.encode(errors="replace"), failed=True)
        except FrostlineError:
            return

    def require_alike(self, **options: Any) -> None:
        """Raise :class:`ModelError` unless these plain values are the same on all ranks."""
        mine = json.loads(json.dumps(options))
        for rank, theirs in enumerate(self.values(options)):
            name = next((name for name in mine if mine[name] != theirs.get(name)), None)
            if name is not None:
                raise ModelError(
                    "all ranks of the process group must call the same verb with the same options; "
                    f"process_group=False leaves the others out. Received: {name}={mine[name]!r} "
                    f"on rank {self.rank}, {name}={theirs.get(name)!r} on rank {rank}"
                )

    def values(self, value: Any) -> list[Any]:
        """A plain value of each rank: numbers, strings, lists, mappings with strings as keys."""
        if self.size == 1:
            return [value]
        return [json.loads(word) for word in self.exchange(json.dumps(value).encode())]

    def nested(self, value: Any) -> list[Any]:
        """A nested value of each rank: as for :meth:`values`, with arrays, tuples and tensors.

        Raises:
            DataError: Something in it is none of these.
        """
        if self.size == 1:
            return [value]
        arrays: list[Any] = []
        plain = json.dumps(self._flattened(value, arrays)).encode()
        stream = io.BytesIO()
        for array in (np.frombuffer(plain, np.uint8), *arrays):
            np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
        found = []
        for word in self.exchange(stream.getvalue()):
            stream = io.BytesIO(word)
            read = functools.partial(np.lib.format.read_array, stream, allow_pickle=False)
            found.append(self._rebuilt(json.loads(read().tobytes()), read))
        return found

    def _flattened(self, value: Any, arrays: list[Any]) -> Any:
        """The structure as plain values, its arrays put aside in the order of the structure."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            items = [self._flattened(item, arrays) for item in value.values()]
            return {"mapping": list(value), "items": items}
        if type(value) in (list, tuple):
            return {type(value).__name__: [self._flattened(item, arrays) for item in value]}
        array, kind = self._leaf(value)
        if array is None or array.dtype.hasobject:
            raise DataError(
                "batches of this kind cannot be sent to the other ranks; process_group=False looks "
                f"at this process alone. Received: {type(value).__name__}"
            )
        arrays.append(array)
        # A numpy array loses the shape () on its way.
        return {"array": kind, "shape": list(array.shape)}

    def _rebuilt(self, plain: Any, read: Callable[[], Any]) -> Any:
        if not isinstance(plain, dict):
            return plain
        if "array" in plain:
            return self._restored(read().reshape(plain["shape"]), plain["array"])
        if "mapping" in plain:
            items = [self._rebuilt(item, read) for item in plain["items"]]
            return dict(zip(plain["mapping"], items, strict=True))
        (kind, items), *_ = plain.items()
        made = [self._rebuilt(item, read) for item in items]
        return tuple(made) if kind == "tuple" else made

    def _leaf(self, value: Any) -> tuple[Any, str]:
        """An array and what it was; ``None``: not an array."""
        is_array = isinstance(value, (np.ndarray, np.generic))
        return (np.asarray(value) if is_array else None), "numpy"

    def _restored(self, array: Any, kind: str) -> Any:  # noqa: ARG002 - what others make of it
        return array

    def total(self, value: float) -> Any:
        """Sum over the ranks."""
        return sum(self.values(value))

    def union(self, items: Sequence[Any]) -> list[Any]:
        """What at least one rank has, in the order of ranks; the same list on all of them."""
        found = {json.dumps(item): item for theirs in self.values(list(items)) for item in theirs}
        return list(found.values())

    def merged(
        self, moments: Moments | None, kinds: Sequence[type[Moments]] = (Moments,)
    ) -> Moments | None:
        """Moments of all ranks, added up in their order: bit for bit the same on each.

        Args:
            moments: Of this rank; ``None``: it has none.
            kinds: Classes that they may have.
        """
        if self.size == 1:
            return moments
        word = b""
        if moments is not None:
            head = [kinds.index(type(moments)), moments.count]
            word = np.concatenate([head, moments.mean, moments.m2]).tobytes()
        parts = []
        for numbers in (
            np.frombuffer(answer, np.float64) for answer in self.exchange(word) if answer
        ):
            mean, m2 = np.split(numbers[2:], 2)
            parts.append(kinds[int(numbers[0])](int(numbers[1]), mean, m2))
        return functools.reduce(lambda one, other: one.merge(other), parts) if parts else None


#: A single process.
ALONE = Together()
