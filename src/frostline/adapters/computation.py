"""What a piece of Python computes, as a hash: part of the key under which features are kept.

A function is known by its code, constants, defaults, closure and the globals it uses; a class by
its members; an object by its class and its state; an array by its bytes. Code of the standard
library and of installed packages is known by name and version. What cannot be read off is an
:class:`UnreadableError`, never a guess.
"""

from __future__ import annotations

import builtins
import collections
import dis
import enum
import functools
import hashlib
import itertools
import logging
import secrets
import site
import sys
import sysconfig
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type(Ellipsis), type(NotImplemented))
#: Members of a class that say nothing about what it computes.
_BESIDE = frozenset(
    {
        "__abstractmethods__", "__annotate__", "__annotate_func__", "__annotations__",
        "__annotations_cache__", "__classcell__", "__dataclass_fields__", "__dict__", "__doc__",
        "__firstlineno__", "__match_args__", "__module__", "__orig_bases__", "__parameters__",
        "__qualname__", "__signature__", "__static_attributes__", "__type_params__",
        "__weakref__", "_abc_impl",
    }
)  # fmt: skip
#: Types that hold nothing a computation reads.
_EMPTY = ("_thread.lock", "_thread.RLock", "_abc._abc_data")
#: A model whose state goes beyond this many Python objects is not read to its end.
_MOST = 500_000
#: Instructions that read a member of what was loaded before.
_MEMBER = ("LOAD_ATTR", "LOAD_METHOD")
#: Set in the flags of a class that Python code defines.
_HEAP = 1 << 9


class UnreadableError(Exception):
    """A value has no readable content; the text says which."""


@dataclass(frozen=True)
class Identity:
    """What tells one prefix from another.

    Attributes:
        text: Equal for two prefixes only if they compute the same.
        private: What could not be read off, so that ``text`` holds in this process only; empty
            where everything could.
    """

    text: str
    private: str = ""


#: ``leaf(value, reader)`` returns the parts of a framework's own value; ``None``: not one.
Leaf = Callable[[Any, "Reader"], Iterable[Any] | None]


class Reader:
    """Reads values into hashes; each object once.

    Args:
        leaf: Reads the values of a framework.
        lenient: Packages whose instances are known by their class alone, but for those that a
            user's function or object holds.
    """

    def __init__(self, leaf: Leaf | None = None, *, lenient: frozenset[str] = frozenset()) -> None:
        self.leaf = leaf
        self.lenient = lenient
        self._open: list[int] = []
        self._known: dict[int, tuple[Any, str]] = {}  # the object stays alive, so its id is its own

    def read(self, value: Any) -> str:
        """Hash of a value.

        Raises:
            UnreadableError: Part of it cannot be read.
        """
        if type(value) in _PLAIN:
            return f"{type(value).__name__}:{value!r}"
        key = id(value)
        if key in self._known:
            return self._known[key][1]
        if key in self._open:
            return f"above:{len(self._open) - self._open.index(key)}"
        if len(self._known) > _MOST:
            raise UnreadableError("more Python objects than can be read")
        self._open.append(key)
        try:
            found = hashed(*self._parts(value))
        except RecursionError:
            raise UnreadableError("a structure that is nested too deeply") from None
        finally:
            self._open.pop()
        self._known[key] = (value, found)
        return found

    def each(self, values: Iterable[Any]) -> list[str]:
        """Hashes of several values."""
        return [self.read(value) for value in values]

    def items(self, values: Mapping[str, Any], skip: Iterable[str] = ()) -> list[str]:
        """Names and hashes of attributes, by name."""
        left = sorted(set(values) - set(skip))
        return [part for name in left for part in (name, self.read(values[name]))]

    def _parts(self, value: Any) -> list[Any]:
        kind = type(value)
        if self.lenient and _is_users(value):
            strict = Reader(self.leaf)
            strict._open = self._open[:-1]
            return [strict.read(value)]
        parts = None if self.leaf is None else self.leaf(value, self)
        if parts is not None:
            return list(parts)
        if isinstance(value, enum.Enum):
            return ["enum", self.read(kind), value.name, self.read(value.value)]
        if isinstance(value, (np.ndarray, np.generic)):
            return self._array(np.asarray(value))
        contents = self._contents(value)
        if contents is not None:
            own = [] if is_library(kind.__module__) else self._state(value)
            return [kind.__qualname__, *contents, "own", *own]
        reader = _READERS.get(kind)
        if reader is not None:
            return [kind.__name__, *reader(self, value)]
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, (np.dtype, np.ufunc)):
            return [kind.__name__, str(getattr(value, "descr", None) or value)]
        return self._instance(value)

    def _array(self, array: Any) -> list[Any]:
        if array.dtype.hasobject:
            return ["objects", str(array.shape), *self.each(array.ravel().tolist())]
        content = np.ascontiguousarray(array)
        return ["array", str(array.dtype.descr), str(array.shape), content.tobytes()]

    def _contents(self, value: Any) -> list[Any] | None:
        """What a container holds, or the value of a subclass of a plain type."""
        if isinstance(value, (tuple, list, collections.deque)):
            return self.each(value)
        if isinstance(value, (set, frozenset)):  # in no order that another process would have
            return sorted(Reader(self.leaf, lenient=self.lenient).read(item) for item in value)
        if isinstance(value, (dict, types.MappingProxyType)):
            factory = getattr(value, "default_factory", None)
            pairs = [part for pair in value.items() for part in self.each(pair)]
            return [self.read(factory), *pairs]
        plain = next((base for base in _PLAIN[:5] if isinstance(value, base)), None)
        return None if plain is None else [repr(plain(value))]

    # --- code ---------------------------------------------------------------------------------

    def _function(self, function: types.FunctionType) -> list[Any]:
        cells = []
        for cell in function.__closure__ or ():
            try:
                cells.append(self.read(cell.cell_contents))
            except ValueError:  # assigned later, as a function that refers to itself
                cells.append("empty")
        parts = [
            self._code(function.__code__),
            self.read(function.__defaults__),
            self.read(function.__kwdefaults__),
            *cells,
        ]
        if is_library_code(function.__code__):
            known = f"{function.__module__}.{function.__qualname__}"
            return [known, _version(function.__module__ or ""), *parts]
        return [*parts, *self._globals(function), *self.items(vars(function))]

    def _globals(self, function: types.FunctionType) -> list[str]:
        """Values of the globals, and of what is imported inside, that the code may use."""
        loaded, imported, *names = _uses(function.__code__)
        parts: list[str] = []
        for name in sorted(loaded - {"__file__", "__builtins__", "__spec__"}):
            if name in function.__globals__:
                parts += [name, self._used(name, function.__globals__[name], names)]
            elif name not in vars(builtins):
                parts += [name, "undefined"]
        for name in sorted(imported):
            if name in sys.modules:
                parts += [name, self._used(name, sys.modules[name], names)]
        return parts

    def _used(self, name: str, value: Any, names: Sequence[frozenset[str]]) -> str:
        """A global; of a user's module what the code may name, all of it where it is handed on."""
        if not isinstance(value, types.ModuleType) or is_library(value.__name__):
            return self.read(value)
        if id(value) in self._open:
            return "above"
        self._open.append(id(value))
        try:
            known, (named, handed_on) = vars(value), names
            if name in handed_on or known.keys().isdisjoint(named):
                return hashed(*self._module(value))
            used = sorted(known.keys() & named)
            own = (part for key in used for part in (key, self._used(key, known[key], names)))
            return hashed("module", *own)
        finally:
            self._open.pop()

    def _module(self, module: types.ModuleType) -> list[Any]:
        if is_library(module.__name__):
            return [module.__name__, _version(module.__name__)]
        own = {name: value for name, value in vars(module).items() if not name.startswith("__")}
        return self.items(own)

    def _code(self, code: types.CodeType) -> str:
        constants = [
            self._code(const) if isinstance(const, types.CodeType) else self.read(const)
            for const in code.co_consts
        ]
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        return hashed(
            "code", code.co_code, code.co_exceptiontable, repr(counts), repr(names), *constants
        )

    def _class(self, kind: type) -> list[Any]:
        """Members of a class and its parents; of a library's class, those that are not its own."""
        made_by = type(kind)
        parts: list[Any] = ["class"]
        if not is_library(made_by.__module__):
            parts.append(self.read(made_by))
        for parent in kind.__mro__:
            own = {
                name: value
                for name, value in vars(parent).items()
                if name not in _BESIDE and not isinstance(value, _DESCRIPTORS)
            }
            if is_library(parent.__module__):
                parts += [f"{parent.__module__}.{parent.__qualname__}", _version(parent.__module__)]
                own = {name: value for name, value in own.items() if _is_patched(value)}
            else:
                parts.append(parent.__qualname__)
            parts += self.items(own)
        return parts

    # --- objects ------------------------------------------------------------------------------

    def _instance(self, value: Any) -> list[Any]:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in _EMPTY or kind.__module__.partition(".")[0] in self.lenient:
            return ["instance", name]
        if isinstance(value, threading.local):
            return ["of a thread", self.read(kind), *self.items(vars(value))]
        if isinstance(value, logging.Logger):
            return ["logger", value.name]
        if isinstance(value, weakref.ref):
            return ["weak", self.read(value())]
        if kind is object:
            raise UnreadableError("a value of type object")
        return ["instance", self.read(kind), *self._state(value)]

    def _state(self, value: Any) -> list[str]:
        """Attributes of an object; what C code holds inside it, as far as it can be pickled."""
        kind = type(value)
        own = dict(vars(value)) if hasattr(value, "__dict__") else {}
        slots = [base.__dict__.get("__slots__", ()) for base in kind.__mro__]
        for names in slots:
            for name in (names,) if isinstance(names, str) else names:
                mangled = _mangled(name, kind)
                if name not in ("__dict__", "__weakref__") and hasattr(value, mangled):
                    own[mangled] = getattr(value, mangled)
        parts = self.items(own)
        python = any(slots) or hasattr(value, "__dict__")
        custom = any("__reduce__" in vars(base) for base in kind.__mro__[:-1])
        in_c = any(not base.__flags__ & _HEAP and base not in _READ_ABOVE for base in kind.__mro__)
        if not python or in_c or (custom and is_library(kind.__module__)):
            try:
                reduced = value.__reduce_ex__(2)
            except Exception:
                raise UnreadableError(
                    f"a value of type {kind.__module__}.{kind.__qualname__}"
                ) from None
            if isinstance(reduced, str):
                return [*parts, reduced]
            arguments, state, *iterators = (*reduced[1:], None)[: max(2, len(reduced) - 1)]
            rest = [None if iterator is None else list(iterator) for iterator in iterators]
            parts += [self.read(arguments), self.read(state), self.read(rest)]
        return parts


def _builtin(reader: Reader, value: Any) -> list[Any]:
    """A function in C, and what it is bound to."""
    bound = getattr(value, "__self__", None)
    name = f"{value.__module__}.{value.__qualname__}"
    if bound is None or isinstance(bound, types.ModuleType):
        return [name, "" if bound is None else bound.__name__]
    return [name, bound.__qualname__ if isinstance(bound, type) else reader.read(bound)]


def _random_state(reader: Reader, value: Any) -> list[Any]:
    return [reader.read(value.bit_generator.state)]


def _bound(*names: str) -> Callable[[Reader, Any], list[Any]]:
    return lambda reader, value: reader.each(getattr(value, name) for name in names)


_READERS: dict[type, Callable[[Reader, Any], list[Any]]] = {
    functools.partial: _bound("func", "args", "keywords"),
    functools.partialmethod: _bound("func", "args", "keywords"),
    functools.cached_property: _bound("func"),
    type(functools.lru_cache(lambda: None)): _bound("__wrapped__"),
    types.ModuleType: Reader._module,
    types.FunctionType: Reader._function,
    types.MethodType: _bound("__func__", "__self__"),
    types.BuiltinFunctionType: _builtin,
    types.CodeType: lambda reader, value: [reader._code(value)],
    type(str.join): lambda _, value: [value.__qualname__],
    type(object.__init__): lambda _, value: [value.__qualname__],
    property: _bound("fget", "fset", "fdel"),
    staticmethod: _bound("__func__"),
    classmethod: _bound("__func__"),
    slice: _bound("start", "stop", "step"),
    range: _bound("start", "stop", "step"),
    np.random.Generator: _random_state,
}
_DESCRIPTORS = (types.MemberDescriptorType, types.GetSetDescriptorType)
#: Static types whose state :meth:`Reader._contents` reads, or that have none.
_READ_ABOVE = frozenset({object, tuple, list, dict, set, frozenset, *_PLAIN, type, BaseException})


def identity_of(value: Any, leaf: Leaf | None = None) -> Identity:
    """What a value computes; where part of it cannot be read, an identity of this process alone."""
    try:
        return Identity(Reader(leaf).read(value))
    except UnreadableError as error:
        return Identity(hashed("private", secrets.token_hex(16)), private=str(error))


def hashed(*parts: str | bytes | memoryview) -> str:
    """Hex digest of the parts, each with its length before it, so that none can run into the next.

    Example:
        >>> hashed("ab", "c") == hashed("a", "bc")
        False
    """
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        size = raw.nbytes if isinstance(raw, memoryview) else len(raw)
        digest.update(size.to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()


@functools.cache
def _roots() -> tuple[str, ...]:
    """Folders of the standard library and of installed packages, of other environments too."""
    ways = ("stdlib", "platstdlib", "purelib", "platlib")
    found = [sysconfig.get_paths()[way] for way in ways]
    found += [*site.getsitepackages(), site.getusersitepackages()]
    found += [f for f in sys.path if Path(f).name in ("site-packages", "dist-packages")]
    return tuple(
        {f"{Path(folder).resolve()}/" for folder in found} | {f"{folder}/" for folder in found}
    )


def is_library(module: str) -> bool:
    """Whether a module is part of Python, of an installed package or of Frostline."""
    top = module.partition(".")[0]
    if top in ("builtins", "frostline") or top in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(top), "__file__", None)
    return file is not None and file.startswith(_roots())


def _is_users(value: Any) -> bool:
    """Whether a value is a function or an object of code that no package holds."""
    if isinstance(value, types.FunctionType):
        return not is_library_code(value.__code__)
    return not is_library(type(value).__module__)


def is_library_code(code: types.CodeType) -> bool:
    """Whether a function's code stands in a file of Python or of an installed package."""
    return code.co_filename.startswith((*_roots(), "<frozen"))


def _is_patched(member: Any) -> bool:
    """Whether a member of a library's class is a function from elsewhere."""
    held = getattr(member, "fget", None) or getattr(member, "__func__", member)
    if not isinstance(held, types.FunctionType):
        return False
    code, module = held.__code__, held.__module__ or ""
    return not (is_library_code(code) or code.co_filename.startswith("<") or is_library(module))


def _version(module: str) -> str:
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top == "builtins":
        return f"{sys.version_info.major}.{sys.version_info.minor}"
    return str(getattr(sys.modules.get(top), "__version__", ""))


@functools.cache
def _uses(code: types.CodeType) -> tuple[frozenset[str], ...]:
    """Globals that code loads, modules it imports, all names, names it reads no member of."""
    loaded, imported, names, handed_on = set(), set(), set(code.co_names), set()
    steps = list(dis.get_instructions(code))
    for step, following in itertools.zip_longest(steps, steps[1:]):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            loaded.add(str(step.argval))
        elif step.opname == "IMPORT_NAME":
            imported.add(str(step.argval))
        member = following is not None and following.opname in _MEMBER
        if step.opname.startswith("LOAD_") and step.opname != "LOAD_CONST" and not member:
            handed_on.add(str(step.argval))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            here = (loaded, imported, names, handed_on)
            for found, inner in zip(here, _uses(constant), strict=True):
                found |= inner
    return frozenset(loaded), frozenset(imported), frozenset(names), frozenset(handed_on)


def read_of_self(kind: type, beside: frozenset[str]) -> frozenset[str]:
    """Attributes that methods of a user's class, but for some, read of their first argument."""
    found: set[str] = set()
    for parent in kind.__mro__:
        if is_library(parent.__module__):
            continue
        for name, member in vars(parent).items():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            if name in beside or not isinstance(function, types.FunctionType):
                continue
            itself = function.__code__.co_varnames[:1]
            steps = list(dis.get_instructions(function.__code__))
            for before, step in itertools.pairwise(steps):
                reads = before.opname.startswith("LOAD_FAST") and (before.argval,) == itself
                if reads and step.opname in _MEMBER:
                    found.add(str(step.argval))
    return frozenset(found)


def _mangled(name: str, kind: type) -> str:
    private = name.startswith("__") and not name.endswith("__")
    return f"_{kind.__name__.lstrip('_')}{name}" if private else name
