"""Make pairs of prefixes that compute different features, and count those that share a cache key.

    KERAS_BACKEND=torch python scripts/prefix_pairs.py --framework torch --pairs 500
    KERAS_BACKEND=jax python scripts/prefix_pairs.py --framework keras --pairs 500 \
        --json docs/results/prefix-pairs.json

A pair is one network with one thing changed: a value, held in one of many forms at one of many
places, or a setting of a layer. That the features of the samples differ is found by the framework
alone. Counted are pairs with one key, and of these the ones that the comparison of stored samples
lets pass (a fault: training would run on another prefix's features). That comparison is also tried
alone, with every pair given one key. Each first prefix is built again, with other names of layers
and in another process: it should find its features. ``--json`` replaces this framework's row.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import decimal
import enum
import functools
import json
import operator
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

#: ``make(which)`` builds one of the two prefixes anew, from nothing.
Make = Callable[[int], Any]
#: ``way(draw)`` draws what the two have in common and what they differ in.
Way = Callable[[random.Random], Make]
#: Two sets of features are different from here on, as a share of the largest value.
DIFFERENT = 2e-3

# --- forms of a number ----------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    """A number in a dataclass."""

    scale: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    """A number in a slot."""

    scale: float = 1.0


class Plain:
    """A number in a private attribute."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def __call__(self, x: Any) -> Any:
        """Multiply by the number."""
        return x * self._scale

    def get(self) -> float:
        """The number."""
        return self._scale

    @property
    def scale(self) -> float:
        """The number."""
        return self._scale


class Answers(Plain):
    """A number that any attribute gives."""

    def __getattr__(self, name: str) -> float:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._scale


class Length(float):
    """A number of a user's type."""


Pair = collections.namedtuple("Pair", "scale name")


class Local(threading.local):
    """A number of a thread."""


def _local(by: float) -> Any:
    made = Local()
    made.scale = by
    return made


def _times(x: Any, by: float) -> Any:
    return x * by


def _closure(by: float) -> Callable[[], float]:
    return lambda: by


def _deep(by: float) -> Callable[[], float]:
    def outer() -> Callable[[], float]:
        return lambda: by

    return outer()


def _default(by: float) -> Callable[..., float]:
    def function(*, by: float = by) -> float:
        return by

    return function


def _module(by: float) -> types.ModuleType:
    made = types.ModuleType("settings_of_a_user")
    made.scale = by  # type: ignore[attr-defined]
    made.other = 3.0  # type: ignore[attr-defined]
    return made


def _attribute_of_function(by: float) -> Any:
    def function() -> float:
        return float(function.by)  # type: ignore[attr-defined]

    function.by = by  # type: ignore[attr-defined]
    return function


def _wrapped(by: float) -> Any:
    @functools.wraps(_times)
    def function() -> float:
        return by

    return function


def _meta(by: float) -> Any:
    class Meta(type):
        @property
        def scale(cls) -> float:
            return by

    return Meta("Made", (), {"__module__": __name__})


def _enum(by: float) -> Any:
    return enum.Enum("Mode", {"ONE": by, "TWO": by + 1}, module=__name__).ONE  # type: ignore[attr-defined]


def _itself(value: Any) -> Any:
    return value


#: name -> (a value that holds a number, how the number is got from it)
FORMS: dict[str, tuple[Callable[[float], Any], Callable[[Any], Any]]] = {
    "float": (float, _itself),
    "string": (repr, float),
    "bytes": (lambda k: repr(k).encode(), lambda v: float(v.decode())),
    "bytearray": (lambda k: bytearray(repr(k).encode()), lambda v: float(v.decode())),
    "complex": (lambda k: complex(0, k), lambda v: v.imag),
    "fraction": (lambda k: decimal.Decimal(repr(k)), float),
    "subclass of float": (Length, float),
    "tuple": (lambda k: (3.0, (k,)), lambda v: v[1][0]),
    "list": (lambda k: [3.0, [k]], lambda v: v[1][0]),
    "dictionary": (lambda k: {"k": k, "name": 3.0}, lambda v: v["k"]),
    "key called name": (lambda k: {"name": k}, lambda v: v["name"]),
    "key called trainable": (
        lambda k: {"config": {"trainable": k}},
        lambda v: v["config"]["trainable"],
    ),
    "key of a dictionary": (lambda k: {k: 1}, lambda v: next(iter(v))),
    "set": (lambda k: {k}, min),
    "frozen set": (lambda k: frozenset({k}), min),
    "ordered dictionary": (lambda k: collections.OrderedDict(a=k), lambda v: v["a"]),
    "counter": (lambda k: collections.Counter({"a": round(k * 1e6)}), lambda v: v["a"] / 1e6),
    "chain of dictionaries": (lambda k: collections.ChainMap({}, {"a": k}), lambda v: v["a"]),
    "read-only dictionary": (lambda k: types.MappingProxyType({"a": k}), lambda v: v["a"]),
    "named tuple": (lambda k: Pair(k, "a"), lambda v: v.scale),
    "deque": (lambda k: collections.deque([k]), lambda v: v[0]),
    "array": (lambda k: np.array([3.0, k], np.float32), lambda v: float(v[1])),
    "array of objects": (lambda k: np.array([None, k], object), lambda v: float(v[1])),
    "scalar of numpy": (np.float32, float),
    "record": (lambda k: np.array([(k,)], [("a", "f8")]), lambda v: float(v["a"][0])),
    "polynomial": (lambda k: np.poly1d([k]), lambda v: float(v(1.0))),
    "masked array": (
        lambda k: np.ma.masked_array([k, 1.0], [False, True]),
        lambda v: float(v.sum()),
    ),
    "enum": (_enum, lambda v: v.value),
    "dataclass": (Settings, lambda v: v.scale),
    "slots": (Slots, lambda v: v.scale),
    "object": (Plain, lambda v: v.get()),
    "property": (Plain, lambda v: v.scale),
    "object that answers": (Answers, lambda v: v.anything),
    "namespace": (lambda k: types.SimpleNamespace(a=types.SimpleNamespace(k=k)), lambda v: v.a.k),
    "function": (_closure, lambda v: v()),
    "function in a function": (_deep, lambda v: v()),
    "default": (_default, lambda v: v()),
    "function with an attribute": (_attribute_of_function, lambda v: v()),
    "wrapped function": (_wrapped, lambda v: v()),
    "cached function": (lambda k: functools.lru_cache(_closure(k)), lambda v: v()),
    "partial": (lambda k: functools.partial(_times, by=k), lambda v: v(1.0)),
    "partial of a method": (lambda k: functools.partial(Plain(k)), lambda v: v(1.0)),
    "bound method": (lambda k: Plain(k).get, lambda v: v()),
    "method in C": (lambda k: {"a": k}.get, lambda v: v("a")),
    "getter in C": (lambda k: operator.methodcaller("__add__", k), lambda v: v(0.0)),
    "module": (_module, lambda v: v.scale),
    "module by a string": (_module, lambda v: (v.other, getattr(v, "scale"))[1]),  # noqa: B009
    "class": (lambda k: type("Made", (), {"K": k, "__module__": __name__}), lambda v: v.K),
    "class of a class": (_meta, lambda v: v.scale),
    "iterator's length": (lambda k: range(round(k * 1000)), lambda v: len(v) / 1000),
    "slice": (lambda k: slice(k), lambda v: v.stop),
    "pattern": (lambda k: re.compile(repr(k)), lambda v: float(v.pattern)),
    "path": (lambda k: Path(repr(k)), lambda v: float(v.name)),
    "random state": (
        lambda k: np.random.default_rng(round(k * 1000)).bit_generator.state,
        lambda v: 0.5 + v["state"]["state"] % 1000 / 500,
    ),
    "value of a thread": (_local, lambda v: v.scale),
}  # fmt: skip


# --- places that hold it --------------------------------------------------------------------------


def _in_attribute(name: str) -> Callable[[type, Any, Any], Any]:
    def place(base: type, value: Any, get: Any) -> Any:
        class Holds(base):  # type: ignore[misc]
            def factor(self) -> Any:
                return get(getattr(self, name))

        made = Holds()
        setattr(made, name, value)
        return made

    return place


def _in_closure(base: type, value: Any, get: Any) -> Any:
    class Holds(base):  # type: ignore[misc]
        def factor(self) -> Any:
            return get(value)

    return Holds()


def _in_default(base: type, value: Any, get: Any) -> Any:
    class Holds(base):  # type: ignore[misc]
        def factor(self, held: Any = value) -> Any:
            return get(held)

    return Holds()


def _in_class(base: type, value: Any, get: Any) -> Any:
    class Holds(base):  # type: ignore[misc]
        SCALE = (value,)

        def factor(self) -> Any:
            return get(self.SCALE[0])

    return Holds()


def _in_parent(base: type, value: Any, get: Any) -> Any:
    return type("Child", (type(_in_class(base, value, get)),), {"__module__": __name__})()


def _in_property(base: type, value: Any, get: Any) -> Any:
    class Holds(base):  # type: ignore[misc]
        @property
        def held(self) -> Any:
            return value

        def factor(self) -> Any:
            return get(self.held)

    return Holds()


def _in_static(base: type, value: Any, get: Any) -> Any:
    class Holds(base):  # type: ignore[misc]
        @staticmethod
        def held() -> Any:
            return value

        def factor(self) -> Any:
            return get(self.held())

    return Holds()


_USES = """
import settings_of_a_test
def outer(): return inner()
def inner(): return VALUE
class Holds(base):
    def factor(self): return get(%s)
"""


def _in_source(expression: str) -> Callable[[type, Any, Any], Any]:
    def place(base: type, value: Any, get: Any) -> Any:
        module = types.ModuleType("settings_of_a_test")
        module.VALUE, module.other = value, 3.0  # type: ignore[attr-defined]
        sys.modules["settings_of_a_test"] = module
        space: dict[str, Any] = {"VALUE": value, "base": base, "get": get, "__name__": __name__}
        exec(_USES % expression, space)
        return space["Holds"]()

    return place


def _in_method_of_instance(base: type, value: Any, get: Any) -> Any:
    made = base()
    vars(made)["factor"] = lambda: get(value)
    return made


def _in_object(base: type, value: Any, get: Any) -> Any:
    class Holds(base):  # type: ignore[misc]
        def factor(self) -> Any:
            return get(self.settings.inner.name)

    made = Holds()
    made.settings = types.SimpleNamespace(inner=types.SimpleNamespace(name=value))
    return made


def _in_listener(base: type, value: Any, get: Any) -> Any:
    class Holds(base):  # type: ignore[misc]
        def factor(self) -> Any:
            return get(self.chosen["by"]())

    made = Holds()
    made.chosen = {"by": lambda: value}
    return made


PLACES: dict[str, Callable[[type, Any, Any], Any]] = {
    **{
        f"attribute {name}": _in_attribute(name)
        for name in ("scale", "_k", "momentum", "history", "seed", "validation_data", "rate",
                     "stop_training", "jit_compile", "_layers_held", "steps", "compiled_loss")
    },
    "closure": _in_closure,
    "default": _in_default,
    "constant of the class": _in_class,
    "constant of the parent": _in_parent,
    "property": _in_property,
    "static method": _in_static,
    "global": _in_source("VALUE"),
    "helper of a helper": _in_source("outer()"),
    "constant of a module": _in_source("settings_of_a_test.VALUE"),
    "constant of a module by a string": _in_source(
        "(settings_of_a_test.other, getattr(settings_of_a_test, 'VALUE'))[1]"
    ),
    "replaced method": _in_method_of_instance,
    "object in an object": _in_object,
    "function in a dictionary": _in_listener,
}  # fmt: skip


def numbers(draw: random.Random) -> tuple[float, float]:
    """Two numbers that are far enough from one another."""
    one = draw.uniform(0.5, 2.0)
    return one, one * draw.choice([0.5, 0.7, 1.5, 2.0])


def pair(model: Callable[[float], Any]) -> Way:
    """A model of a number: two numbers."""

    def way(draw: random.Random) -> Make:
        both = numbers(draw)
        return lambda which: model(both[which])

    return way


def in_chain(
    chain: Callable[[random.Random], Callable[[Any], Any]], part: Callable[[float], Any]
) -> Way:
    """A part that is made of a number, in a prefix of one of the kinds that ``chain`` draws."""

    def way(draw: random.Random) -> Make:
        both, model = numbers(draw), chain(draw)
        return lambda which: model(lambda: part(both[which]))

    return way


def held(base: type, chain: Callable[[random.Random], Callable[[Any], Any]]) -> Way:
    """A number in one form at one place, in a layer of class ``base``."""

    def way(draw: random.Random) -> Make:
        form, place, both = draw.choice(list(FORMS)), draw.choice(list(PLACES)), numbers(draw)
        model = chain(draw)
        make, get = FORMS[form]

        def made(which: int) -> Any:
            return model(lambda: PLACES[place](base, make(both[which]), get))

        made.kind = f"{form} in {place}"  # type: ignore[attr-defined]
        return made

    return way


def settings(model: Callable[..., Any], **choices: Any) -> Way:
    """One setting of a layer: two of its values."""
    ((name, values),) = choices.items()

    def way(draw: random.Random) -> Make:
        both = draw.sample(list(values), 2)
        return lambda which: model(**{name: both[which]})

    return way


# --- what is counted ------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What the pairs showed; lists hold kinds.

    Attributes:
        pairs: Pairs that compute different features of the samples.
        private: Pairs with a part that cannot be read off: never reused by another process.
        same_key: Pairs with one key.
        passed: Of these, pairs whose second prefix was served the first one's features.
        forged_passed: Pairs that the comparison alone let pass, all given one key.
        not_shared: Prefixes that were built again and did not find their features.
        not_shared_elsewhere: The same, built in another process.
        alike: Pairs that were drawn and compute the same features, and so do not count.
        refused: Pairs that the cache refuses, with its words.
    """

    pairs: int = 0
    private: int = 0
    same_key: list[str] = dataclasses.field(default_factory=list)
    passed: list[str] = dataclasses.field(default_factory=list)
    forged_passed: list[str] = dataclasses.field(default_factory=list)
    not_shared: list[str] = dataclasses.field(default_factory=list)
    not_shared_elsewhere: list[str] = dataclasses.field(default_factory=list)
    alike: int = 0
    refused: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Framework:
    """Networks of one framework.

    Attributes:
        ways: Kind of difference -> how to draw one.
        x: The samples, for a prefix.
        features: What the framework itself computes of them.
        rename: Changes what must not matter, before a network is built again.
    """

    ways: dict[str, Way]
    x: Callable[[Any], Any]
    features: Callable[[Any, Any], list[Any]]
    rename: Callable[[], None]


@dataclasses.dataclass(frozen=True)
class Augmented:
    """A prefix, and what is done to its samples before."""

    prefix: Any
    augment: Any


def framework(name: str) -> Framework:
    """Networks of ``"keras"`` or ``"torch"``."""
    if name == "torch":
        import prefix_pairs_torch as found
    else:
        import prefix_pairs_keras as found  # type: ignore[no-redef]
    return Framework(found.ways(), found.x, found.features, found.rename)


def drawn(chosen: Framework, count: int, seed: int) -> Iterator[tuple[str, Make]]:
    """Kinds and pairs: one of each kind in turn, and as many of those that hold a number."""
    draw = random.Random(seed)
    names = list(chosen.ways)
    for number in range(count):
        odd, place = number % 2, number // 2
        kind = names[place % len(names)] if odd else names[0]
        make = chosen.ways[kind](draw)
        yield getattr(make, "kind", kind), make


def key(prefix: Any) -> Any:
    """The identity under which features of a prefix are kept."""
    from frostline.adapters import prefix as prefixes
    from frostline.cache.augmentation import augmentation_identity

    if not isinstance(prefix, Augmented):
        return prefixes.identity(prefix)
    found = prefixes.identity(prefix.prefix)
    return dataclasses.replace(found, text=found.text + augmentation_identity(prefix.augment))


def stored(prefix: Any, x: Any, root: str) -> list[Any]:
    """Features of the samples, by way of a cache."""
    from frostline.cache import cache_features

    ways: dict[str, Any] = {"engine": "native", "verbose": 0, "batch_size": 8}
    if isinstance(prefix, Augmented):
        made = cache_features(prefix.prefix, x, root, augment=prefix.augment, **ways)
    else:
        made = cache_features(prefix, x, root, **ways)
    cache = getattr(made, "cache", made)
    return [np.asarray(each) for each in cache.rows(np.arange(8))]


def difference(one: list[Any], other: list[Any]) -> float:
    """Largest difference as a share of the largest value."""
    if [a.shape for a in one] != [b.shape for b in other]:
        return float("inf")
    return max(
        float(np.abs(np.float64(a) - b).max() / max(np.abs(a).max(), np.abs(b).max(), 1e-6))
        for a, b in zip(one, other, strict=True)
    )


@contextmanager
def one_key() -> Iterator[None]:
    """Give every prefix and every augmentation the same key."""
    from frostline.adapters import prefix as prefixes
    from frostline.adapters.computation import Identity

    forged = mock.patch.object(prefixes, "identity", return_value=Identity("forged"))
    same = mock.patch("frostline.cache.augmentation_identity", return_value="forged")
    with forged, same:
        yield


def served(one: Any, other: Any, x: Any, expected: list[Any]) -> bool:
    """Whether a cache serves the second prefix what it stored of the first."""
    with tempfile.TemporaryDirectory() as root:
        stored(one, x, root)
        return difference(stored(other, x, root), expected) > DIFFERENT / 2


def judge(chosen: Framework, kind: str, make: Make, found: Outcome) -> None:
    """Build a pair and add what it shows."""
    one, other = make(0), make(1)
    first, second = key(one), key(other)
    x = chosen.x(one)
    wanted = [chosen.features(prefix, x) for prefix in (one, other)]
    if not difference(*wanted) > DIFFERENT:
        found.alike += 1
        return
    found.pairs += 1
    found.private += bool(first.private or second.private)
    if first.text == second.text:
        found.same_key.append(kind)
        if served(one, other, x, wanted[1]):
            found.passed.append(kind)
    with one_key():
        if served(one, other, x, wanted[1]):
            found.forged_passed.append(kind)
    chosen.rename()
    if not first.private and key(make(0)).text != first.text:
        found.not_shared.append(kind)


def keys(name: str, count: int, seed: int) -> list[str]:
    """Keys of the first prefix of each pair, empty where it has none for another process."""
    chosen = framework(name)
    found = []
    for _, make in drawn(chosen, count, seed):
        try:
            known = key(make(0))
            found.append("" if known.private else known.text)
        except Exception:
            found.append("")
    return found


def elsewhere(name: str, count: int, seed: int, hash_seed: int) -> list[str]:
    """:func:`keys` in another process."""
    command = [sys.executable, __file__, "--framework", name, "--pairs", str(count),
               "--seed", str(seed), "--keys"]  # fmt: skip
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(name: str, count: int, seed: int, *, processes: bool = True) -> Outcome:
    """Judge so many pairs."""
    from frostline.types import FrostlineError

    chosen, found = framework(name), Outcome()
    kinds = []
    for kind, make in drawn(chosen, count, seed):
        kinds.append(kind)
        try:
            judge(chosen, kind, make, found)
        except FrostlineError as problem:
            found.refused.append(f"{kind}: {problem}"[:200])
        except Exception as problem:
            raise RuntimeError(f"pair {len(kinds) - 1}: {kind}") from problem
    if processes:
        here, there = (elsewhere(name, count, seed, number) for number in (1, 2))
        found.not_shared_elsewhere = [
            kind for kind, one, other in zip(kinds, here, there, strict=True) if one != other
        ]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Draw, judge, print; exit code 1 where a pair was served the other's features."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--framework", choices=("keras", "torch"), default="torch")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file whose row of this framework is replaced")
    parser.add_argument("--keys", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if options.keys:
        print(json.dumps(keys(options.framework, options.pairs, options.seed)))
        return 0
    started = time.perf_counter()
    found = run(options.framework, options.pairs, options.seed)
    row = {"seed": options.seed, **dataclasses.asdict(found)}
    row["seconds"] = round(time.perf_counter() - started)
    print(json.dumps(row, indent=1))
    if options.json is not None:
        name = "torch"
        if options.framework == "keras":
            name = f"Keras on {os.environ['KERAS_BACKEND']}"
        known = json.loads(options.json.read_text()) if options.json.is_file() else {}
        options.json.write_text(
            json.dumps(dict(sorted({**known, name: row}.items())), indent=1) + "\n"
        )
    return bool(found.passed)


if __name__ == "__main__":
    sys.modules["prefix_pairs"] = sys.modules["__main__"]
    sys.exit(main())
