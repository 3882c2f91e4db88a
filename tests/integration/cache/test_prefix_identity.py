"""Who a prefix is: every pair of different computations has two identities, equal ones have one.

Pairs are generated: kinds of values times the places where a layer may hold one.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frostline.adapters.computation import identity_of
from frostline.adapters.prefix import identity

keras = pytest.importorskip("keras")
L = keras.layers

# ---------------------------------------------------------------- values


class Mode(enum.Enum):
    ONE = 1.0
    TWO = 2.0


class Whole(enum.IntEnum):
    ONE = 1
    TWO = 2


@dataclasses.dataclass
class Settings:
    scale: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    scale: float = 1.0


class Plain:
    def __init__(self, scale: float) -> None:
        self._scale = scale


class Called(Plain):
    def __call__(self, x: Any) -> Any:
        return x * self._scale


class Length(float):
    pass


Pair = collections.namedtuple("Pair", "scale name")


def once(x: Any) -> Any:
    return x * 1.0


def twice(x: Any) -> Any:
    return x * 2.0


def times(x: Any, by: float) -> Any:
    return x * by


def closure(by: Any) -> Callable[[Any], Any]:
    return lambda x: x * by


def default(by: Any) -> Callable[[Any], Any]:
    def function(x: Any, *, by: Any = by) -> Any:
        return x * by

    return function


def module(by: Any) -> types.ModuleType:
    made = types.ModuleType("settings_of_a_user")
    made.scale = by  # type: ignore[attr-defined]
    return made


VALUES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "float": (lambda: 1.0, lambda: 2.0),
    "sign of zero": (lambda: 0.0, lambda: -0.0),
    "int or float": (lambda: 1, lambda: 1.0),
    "bool or int": (lambda: True, lambda: 1),
    "string": (lambda: "relu", lambda: "tanh"),
    "None": (lambda: None, lambda: 0),
    "bytes": (lambda: b"1", lambda: b"2"),
    "complex": (lambda: 1j, lambda: 2j),
    "last bit": (lambda: 0.1, lambda: np.nextafter(0.1, 1).item()),
    "subclass": (lambda: Length(1), lambda: Length(2)),
    "tuple": (lambda: (1, (2, 3)), lambda: ((1, 2), 3)),
    "list": (lambda: [1, [2]], lambda: [1, [3]]),
    "order of a list": (lambda: [1, 2], lambda: [2, 1]),
    "dict": (lambda: {"name": 1.0}, lambda: {"name": 2.0}),
    "key": (lambda: {"trainable": 1.0}, lambda: {"name": 1.0}),
    "set": (lambda: {"a", "b"}, lambda: {"a", "c"}),
    "default dict": (lambda: collections.defaultdict(int), lambda: collections.defaultdict(list)),
    "named tuple": (lambda: Pair(1, "a"), lambda: Pair(2, "a")),
    "range": (lambda: range(3), lambda: range(4)),
    "slice": (lambda: slice(1), lambda: slice(2)),
    "array": (lambda: np.ones(3), lambda: np.full(3, 2.0)),
    "dtype": (lambda: np.ones(2, "f4"), lambda: np.ones(2, "f8")),
    "shape": (lambda: np.ones((1, 2)), lambda: np.ones((2, 1))),
    "objects": (lambda: np.array([1, None]), lambda: np.array([2, None])),
    "scalar": (lambda: np.float32(1), lambda: np.float32(2)),
    "enum": (lambda: Mode.ONE, lambda: Mode.TWO),
    "int enum": (lambda: Whole.ONE, lambda: Whole.TWO),
    "dataclass": (lambda: Settings(1.0), lambda: Settings(2.0)),
    "slots": (lambda: Slots(1.0), lambda: Slots(2.0)),
    "object": (lambda: Plain(1.0), lambda: Plain(2.0)),
    "callable object": (lambda: Called(1.0), lambda: Called(2.0)),
    "namespace": (lambda: types.SimpleNamespace(k=1), lambda: types.SimpleNamespace(k=2)),
    "function": (lambda: once, lambda: twice),
    "closure": (lambda: closure(1.0), lambda: closure(2.0)),
    "default": (lambda: default(1.0), lambda: default(2.0)),
    "partial": (
        lambda: functools.partial(times, by=1.0),
        lambda: functools.partial(times, by=2.0),
    ),
    "method": (lambda: Called(1.0).__call__, lambda: Called(2.0).__call__),
    "function in C": (lambda: np.tanh, lambda: np.sin),
    "bound in C": (lambda: {"a": 1.0}.get, lambda: {"a": 2.0}.get),
    "module": (lambda: module(1.0), lambda: module(2.0)),
    "class": (lambda: Plain, lambda: Called),
    "deque": (lambda: collections.deque([1]), lambda: collections.deque([2])),
    "generator": (lambda: np.random.default_rng(1), lambda: np.random.default_rng(2)),
    "path": (lambda: Path("a"), lambda: Path("b")),
}

# ---------------------------------------------------------------- places


def in_attribute(base: type, value: Any, name: str = "scale") -> Any:
    made = base()
    setattr(made, name, value)
    return made


def in_closure(base: type, value: Any) -> Any:
    class Holds(base):  # type: ignore[misc,valid-type]
        def helper(self) -> Any:
            return value

    return Holds()


def in_default(base: type, value: Any) -> Any:
    class Holds(base):  # type: ignore[misc,valid-type]
        def helper(self, held: Any = value) -> Any:
            return held

    return Holds()


def in_class(base: type, value: Any) -> Any:
    return type("Holds", (base,), {"SCALE": value, "__module__": __name__})()


def in_property(base: type, value: Any) -> Any:
    return type("Holds", (base,), {"held": property(lambda _: value), "__module__": __name__})()


def in_global(base: type, value: Any) -> Any:
    space: dict[str, Any] = {"VALUE": value, "base": base, "__name__": "module_of_a_user"}
    exec("class Holds(base):\n    def helper(self): return VALUE\n", space)
    return space["Holds"]()


def in_replaced_method(base: type, value: Any) -> Any:
    made = base()
    vars(made)["call"] = lambda x: (x, value)[0]
    return made


def in_object(base: type, value: Any) -> Any:
    return in_attribute(base, types.SimpleNamespace(inner=types.SimpleNamespace(name=value)))


PLACES: dict[str, Callable[[type, Any], Any]] = {
    "attribute": in_attribute,
    "private attribute": functools.partial(in_attribute, name="_k"),
    "attribute called momentum": functools.partial(in_attribute, name="momentum"),
    "closure": in_closure,
    "default": in_default,
    "class constant": in_class,
    "property": in_property,
    "global": in_global,
    "replaced method": in_replaced_method,
    "object in object": in_object,
}


class KerasBase(L.Layer):  # type: ignore[misc]
    def call(self, x: Any) -> Any:
        return x


def keras_model(layer: Any) -> Any:
    return keras.Sequential([keras.Input((2,)), layer])


def _frameworks() -> list[tuple[str, type, Callable[[Any], Any]]]:
    found: list[tuple[str, type, Callable[[Any], Any]]] = [("keras", KerasBase, keras_model)]
    if os.environ["KERAS_BACKEND"] == "torch":
        from torch import nn

        class TorchBase(nn.Module):
            def forward(self, x: Any) -> Any:
                return x

        found.append(("torch", TorchBase, lambda module: nn.Sequential(nn.Linear(2, 2), module)))
    return found


def _stable(model: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def made(layer: Any) -> Any:
        keras.utils.set_random_seed(0)
        return identity(model(layer))

    return made


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("framework", _frameworks(), ids=lambda each: each[0])
def test_different_values_are_different_prefixes(framework: Any, place: str) -> None:
    _, base, model = framework
    known = _stable(model)
    collisions, unstable, private = [], [], []
    for kind, (one, other) in VALUES.items():
        if kind == "default dict" and framework[0] == "keras" and "attribute" in place:
            continue  # Keras puts a plain dict of its own in its place
        first, again, second = (known(PLACES[place](base, make())) for make in (one, one, other))
        if first == second:
            collisions.append(kind)
        if first != again:
            unstable.append(kind)
        if first.private or second.private:
            private.append(kind)
    assert collisions == []
    assert unstable == []
    assert private == []


def test_what_cannot_be_read_off_is_private() -> None:
    for unreadable in (object(), (n for n in range(3)), open(os.devnull)):  # noqa: SIM115, PTH123
        found = [identity(keras_model(in_attribute(KerasBase, unreadable))) for _ in range(2)]
        assert all(each.private for each in found)
        assert found[0] != found[1]
        getattr(unreadable, "close", lambda: None)()


# ---------------------------------------------------------------- stock Keras layers


def convolution(**ways: Any) -> Any:
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 3))
    name = ways.pop("name", "relu")
    x = L.Conv2D(4, 3, name="conv")(image)
    layers = [layer(x) for layer in ways.pop("layers", ())]
    x = L.Activation(ways.pop("act", "relu"), name=name)(layers[-1] if layers else x)
    return keras.Model(image, x)


STOCK: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "an activation of a layer's name": (
        lambda: convolution(act="relu", name="relu"),
        lambda: convolution(act="tanh", name="tanh"),
    ),
    "a function of the user's, of one name": (
        lambda: convolution(act=closure(1.0)),
        lambda: convolution(act=closure(2.0)),
    ),
    "body of a lambda": (
        lambda: convolution(layers=[L.Lambda(lambda x: x * 1.5)]),
        lambda: convolution(layers=[L.Lambda(lambda x: x * 2.5)]),
    ),
    "closure of a lambda": (
        lambda: convolution(layers=[L.Lambda(closure(1.0))]),
        lambda: convolution(layers=[L.Lambda(closure(2.0))]),
    ),
    "precision": (
        lambda: convolution(layers=[L.ReLU(dtype="float32")]),
        lambda: convolution(layers=[L.ReLU(dtype="mixed_bfloat16")]),
    ),
    "padding of a name": (
        lambda: convolution(layers=[L.MaxPooling2D(padding="same", name="same")]),
        lambda: convolution(layers=[L.MaxPooling2D(padding="valid", name="valid")]),
    ),
}


@pytest.mark.parametrize("pair", STOCK)
def test_stock_layers(pair: str) -> None:
    one, other = STOCK[pair]
    first = identity(one())
    assert first != identity(other())
    keras.Sequential([L.Conv2D(1, 1), L.ReLU()])  # moves Keras' counters
    assert identity(one()) == first
    assert not first.private


def test_names_of_layers_do_not_matter() -> None:
    assert identity(convolution(name="one")) == identity(convolution(name="other"))


def test_wiring_matters() -> None:
    def made(first: int) -> Any:
        keras.utils.set_random_seed(0)
        x = keras.Input((4,))
        branches = [L.Dense(4, name="a")(x), L.Dense(4, name="b")(x)]
        return keras.Model(x, L.Subtract()([branches[first], branches[1 - first]]))

    assert identity(made(0)) != identity(made(1))
    assert identity(made(0)) == identity(made(0))


# ---------------------------------------------------------------- other processes

_SCRIPT = """
import numpy as np, keras, frostline
from frostline.adapters.prefix import identity
from frostline.adapters.computation import identity_of
keras.utils.set_random_seed(0)
NAMES = {"b", "a", "c"}
class Own(keras.layers.Layer):
    kinds = frozenset({"x", "y", "z"})
    def call(self, x):
        return x * len(NAMES) if "q" in {"q", "r", "s"} else x
image = keras.Input((8, 8, 3))
x = keras.layers.BatchNormalization()(keras.layers.Conv2D(2, 3)(image))
print(identity(keras.Model(image, Own()(keras.layers.ReLU()(x)))))
print(identity_of(lambda x: np.tanh(x) * len(NAMES)))
"""


def test_another_process_finds_the_same() -> None:
    found = [
        subprocess.run(
            [sys.executable, "-c", _SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        for seed in (1, 2)
    ]
    assert found[0] == found[1]
    assert "private=''" in found[0]


def test_helpers_and_imports_inside_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "helper_of_a_user.py").write_text("SCALE = 1.0\ndef by(): return SCALE\n")

    def inside(x: Any) -> Any:
        import helper_of_a_user  # type: ignore[import-not-found]

        return x * helper_of_a_user.by()

    inside(1.0)
    before = identity_of(inside)
    assert identity_of(inside) == before
    monkeypatch.setattr("helper_of_a_user.SCALE", 2.0)
    assert identity_of(inside) != before


def test_packages_of_another_environment_are_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ``.pth`` file adds folders that no function of ``site`` names."""
    from frostline.adapters import computation

    there = tmp_path / "lib" / "site-packages"
    there.mkdir(parents=True)
    (there / "package_of_another.py").write_text("NOTHING = object()\n")
    monkeypatch.syspath_prepend(str(there))
    import package_of_another  # type: ignore[import-not-found]

    computation._roots.cache_clear()
    try:
        assert computation.is_library(package_of_another.__name__)
    finally:
        monkeypatch.undo()
        computation._roots.cache_clear()
