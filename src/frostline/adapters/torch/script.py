"""A TorchScript program as a module whose operations run in Python, one after the other.

What TorchScript runs, no function mode and no hook sees. Its graph can be read, though: the modules
that are made here hold the program's own parameters and buffers and call its operations in its
order, so that every question can be asked of them as of any module. Convolutions, linear and
normalising layers of torch become what they were. No code that a program holds is evaluated; an
operation that is not known here makes the program one that can be listed and linted only.

A program that was traced normalises as it did then, whatever its mode.
"""

from __future__ import annotations

import copy
import inspect
import keyword
import math
import operator
import re
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.nn import functional

from frostline.adapters.torch.locked import is_locked, lock
from frostline.types import ModelError

#: Key in ``vars`` of a program for its reading.
_HELD = "reading_of_frostline"
#: In ``vars`` of a BN layer: the program calls it with stored statistics, whatever its mode.
_FIXED = "fixed_in_program"
_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
#: Classes that a layer of a program is made to be again.
_REBUILT = {
    f"{kind.__module__}.{kind.__name__}": kind
    for kind in (*_CONVOLUTIONS, *_NORMS, *_DROPOUTS, nn.Linear)
}
#: Operations that normalise with given statistics.
_NORMALISING = ("aten::batch_norm", "aten::instance_norm")


class UnreadableProgramError(ModelError):
    """A TorchScript program that does something which is not known here."""


# --- programs and their readings ------------------------------------------------------------------


@dataclass(eq=False)
class _Bond:
    """A program and the module that reads it.

    Attributes:
        root: The module.
        pairs: Each module with the part of the program that it reads.
        modes: Mode of each part when they were compared last.
    """

    root: Any
    pairs: tuple[tuple[Any, Any], ...]
    modes: list[bool]


#: Module that holds programs -> its twin, which holds their readings; and back.
_TWINS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
_HOSTS: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()
#: Root of a reading -> its program, while both are there.
_PROGRAMS: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def is_program(model: Any) -> bool:
    """Whether it is a module of TorchScript."""
    return isinstance(model, torch.jit.ScriptModule)


def read(program: Any) -> Any:
    """The module that reads a program; always the same one.

    Raises:
        UnreadableProgramError: It holds an operation that is not known here.
    """
    held = vars(program).get(_HELD)
    if held is None:
        pairs: list[tuple[Any, Any]] = []
        root = _module(program, pairs)
        held = _Bond(root, tuple(pairs), [bool(part.training) for _, part in pairs])
        vars(program)[_HELD] = held
        _PROGRAMS[root] = weakref.ref(program)
    return held.root


def why_unreadable(program: Any) -> str | None:
    """Why a program can be listed and linted only; ``None`` where it can be read."""
    try:
        read(program)
    except UnreadableProgramError as problem:
        return str(problem)
    return None


def program_of(root: Any) -> Any | None:
    """The program that a module reads; ``None`` for any other module, and for a copy."""
    held = _PROGRAMS.get(root)
    return None if held is None else held()


def is_fixed(module: Any) -> bool:
    """Whether a program calls this layer with stored statistics, whatever its mode."""
    return _FIXED in getattr(module, "__dict__", ())


def host(model: Any) -> Any:
    """A module in which readings stand in the place of the programs that it holds.

    It is the module itself where it holds none, and else always the same twin: it has the module's
    own parameters, buffers and other parts, and is one of its class. A program that cannot be read
    stays where it is.
    """
    if not any(map(is_program, model.modules())):
        return model
    return _hosted(model)


def _hosted(module: Any) -> Any:
    if is_program(module):
        return module if why_unreadable(module) else read(module)
    parts = {name: part and _hosted(part) for name, part in module._modules.items()}
    twin = _TWINS.get(module)
    if twin is None:
        if all(part is module._modules[name] for name, part in parts.items()):
            return module
        twin = object.__new__(type(module))
        vars(twin).update(vars(module))
        _TWINS[module], _HOSTS[twin] = twin, weakref.ref(module)
    vars(twin)["_modules"] = parts
    return twin


def hosted_by(root: Any) -> Any | None:
    """The module that a twin stands for; ``None`` for any other module."""
    held = _HOSTS.get(root)
    return None if held is None else held()


def brought_up(root: Any) -> None:
    """Let a reading have the tensors and modes that its program has now, and a twin its parts."""
    known = hosted_by(root)
    if known is None:
        _program_brought_up(root)
        return
    _hosted(known)
    for part in root.modules():
        if (own := hosted_by(part)) is not None:
            # Its parts are its own, and what runs it for the time being.
            kept = {key: vars(part)[key] for key in ("_modules", "forward") if key in vars(part)}
            given = {key: value for key, value in vars(own).items() if key != "forward"}
            vars(part).clear()
            vars(part).update({**given, **kept})
        _program_brought_up(part)


def _program_brought_up(root: Any) -> None:
    program = program_of(root)
    if program is None:
        return
    bond: _Bond = vars(program)[_HELD]
    for index, (module, part) in enumerate(bond.pairs):
        mode = bool(part.training)
        if mode != bond.modes[index] and not is_locked(module):
            module.training = mode
        bond.modes[index] = mode
        for table in ("_parameters", "_buffers"):
            own = getattr(module, table)
            for name, tensor in getattr(part, table).items():
                if own.get(name) is not tensor:
                    own[name] = tensor


def handed_on(root: Any) -> None:
    """Let programs have the modes of their readings; nothing for any other module.

    A part that is locked stays in inference: its ``train()`` does not reach it.
    """
    if hosted_by(root) is None:
        _program_handed_on(root)
        return
    for part in root.modules():
        if (own := hosted_by(part)) is not None:
            own.training = part.training
        _program_handed_on(part)


def _program_handed_on(root: Any) -> None:
    program = program_of(root)
    if program is None:
        return
    bond: _Bond = vars(program)[_HELD]
    for index, (module, part) in enumerate(bond.pairs):
        held = vars(part)
        if is_locked(module) and not is_fixed(module):
            held["train"] = types.MethodType(_stays, part)
            part.training = False
        elif isinstance(held.get("train"), types.MethodType):
            del held["train"]
            part.training = module.training
        bond.modes[index] = bool(part.training)


def _stays(self: Any, mode: bool = True) -> Any:  # noqa: ARG001 - any mode is inference
    self.training = False
    return self


def entrances(root: Any) -> dict[Any, Callable[..., Any]]:
    """What a reading or a twin stands for, with a ``forward`` that runs it; empty for others."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        brought_up(root)
        return root(*args, **kwargs)

    own = program_of(root) or hosted_by(root)
    return {} if own is None else {own: forward}


# --- modules --------------------------------------------------------------------------------------


class Reading(nn.Module):  # type: ignore[misc]
    """A module of a program, which calls the operations of its graph.

    Each has a class of its own, with the ``forward`` that its program has.
    """

    _program: ClassVar[Any]
    _codes: ClassVar[Mapping[str, _Code]]
    #: Whether its ``forward`` normalises with stored statistics of its own.
    NORMALISES: ClassVar[bool] = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            program = None if name.startswith("__") else type(self)._program
            if program is not None and program._c.hasattr(name):
                return program._c.getattr(name)
            constants = {} if program is None else _constants(program)
            if name not in constants:
                raise
            return constants[name]

    def _run(self, method: str, *args: Any) -> Any:
        code = type(self)._codes.get(method)
        if code is None:
            raise UnreadableProgramError(_unknown(f"the method {method!r}", type(self)._program))
        return code.run((self, *args))


def _module(program: Any, pairs: list[tuple[Any, Any]]) -> Any:
    """Read a program and all that is in it."""
    if not all(tensor.is_leaf for tensor in program._parameters.values()):
        raise UnreadableProgramError(
            "the parameters of this TorchScript program are no leaves, as copy.deepcopy leaves "
            "them, so they can neither be trained nor frozen: copy it by torch.jit.save and "
            f"torch.jit.load. Received: {type(program).__name__}"
        )
    made = _rebuilt(program)
    if made is None:
        made = _read_module(program)
        for name, part in program._modules.items():
            made._modules[name] = _module(part, pairs)
    for held in (made._parameters, made._buffers):
        for name in held:
            held[name] = None
    made._parameters.update(program._parameters.items())
    made._buffers.update(program._buffers.items())
    made.training = bool(program.training)
    if is_fixed(made):
        lock(made)
    pairs.append((made, program))
    return made


def _read_module(program: Any) -> Any:
    codes: dict[str, _Code] = {}
    for name in program._c._method_names():
        method = program._c._get_method(name)
        try:
            codes[name] = _code_of(method, program)
        except UnreadableProgramError:
            if name == "forward":
                raise
    members: dict[str, Any] = {"_program": program, "_codes": codes, "__module__": __name__}
    asks = _asks_of_input(program) if "forward" in codes else ()
    if "forward" in codes:
        members["forward"] = _forward(program)
        members["NORMALISES"] = bool(asks)
    name = str(program.original_name) or "ScriptModule"
    kind: Any = type(name if name.isidentifier() else "ScriptModule", (Reading,), members)
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    if asks and all(asked is False for asked in asks):
        vars(made)[_FIXED] = True
    return made


def _forward(program: Any) -> Any:
    """A ``forward`` with the arguments of the program: torch.fx and others read its signature."""
    arguments = program._c._get_method("forward").schema.arguments[1:]
    names = [argument.name for argument in arguments]
    sound = all(n.isidentifier() and not keyword.iskeyword(n) and n != "self" for n in names)
    if not sound or len(set(names)) != len(names):
        names = [f"input_{index}" for index in range(len(arguments))]
    defaults = [a.default_value for a in arguments if a.has_default_value()]
    space: dict[str, Any] = {}
    # The names have been checked: nothing of the program is evaluated.
    listed = "".join(f", {name}" for name in names)
    exec(f"def forward(self{listed}): return self._run('forward'{listed})", space)
    forward = space["forward"]
    forward.__defaults__ = tuple(defaults) or None
    return forward


def _asks_of_input(program: Any) -> list[bool | None]:
    """Whether calls that normalise with the module's statistics ask for those of their input.

    One entry per call; ``None``: that depends on the mode.

    Raises:
        UnreadableProgramError: It asks for those of its input in any mode.
    """
    graph = program._c._get_method("forward").inlined_graph
    module = next(graph.inputs()).debugName()
    found = []
    for kind in _NORMALISING:
        for node in graph.findAllNodes(kind):
            source = node.inputsAt(3).node()
            if source.kind() != "prim::GetAttr" or source.s("name") not in program._buffers:
                continue
            if source.inputsAt(0).debugName() == module:
                found.append(_constant(node.inputsAt(5)))
    if True in found:
        raise UnreadableProgramError(
            "this TorchScript program normalises with the statistics of the batch in any mode, as "
            "it was traced in training mode: trace it in eval(), or use torch.jit.script, whose "
            f"programs have modes. Received: {type(program).__name__}"
        )
    return found


def _name(kind: Any) -> str:
    """Qualified name of a class or function of a program, as Python knows it."""
    return re.sub(r"\.___torch_mangle_\d+", "", str(kind)).removeprefix("__torch__.")


def _constants(program: Any) -> dict[str, Any]:
    concrete = vars(program).get("_concrete_type")
    return {} if concrete is None else dict(concrete.get_constants())


def _rebuilt(program: Any) -> Any | None:
    """The layer of torch that a program was made of; ``None`` for any other module."""
    kind = _REBUILT.get(_name(program._c._type().qualified_name()))
    if kind is None or not program._c._has_method("forward"):  # no call of it was traced
        return None
    traced = isinstance(program, torch.jit.TracedModule) or not _constants(program)
    settings = _settings(program, kind) if traced else _constants(program)
    tensors = {**dict(program._parameters.items()), **dict(program._buffers.items())}
    if settings is None:
        return None
    if kind is nn.Linear:
        settings = dict(zip(("out_features", "in_features"), tensors["weight"].shape, strict=True))
    known = inspect.signature(kind).parameters
    needed = [p for p in known if p not in ("bias", "device", "dtype")]
    if not all(name in settings for name in needed if not _optional(name)):
        return None
    given = {name: settings[name] for name in needed if name in settings}
    if "bias" in known and kind not in _NORMS:
        given["bias"] = tensors.get("bias") is not None
    made = kind(**given, **({"device": "meta"} if "device" in known else {}))
    if kind in _NORMS and _asks_of_input(program) == [False]:
        vars(made)[_FIXED] = True
    return made


def _optional(name: str) -> bool:
    """Arguments whose defaults are what a program that does not say otherwise does."""
    return name in ("padding_mode", "output_padding", "inplace")


def _settings(program: Any, kind: Any) -> dict[str, Any] | None:
    """What a traced layer was made with, from the one operation that is left of it."""
    graph = program._c._get_method("forward").graph
    plain = ("prim::GetAttr", "prim::Constant", "prim::ListConstruct")
    calls = [node for node in graph.nodes() if node.kind() not in plain]
    if len(calls) != 1 or kind in _DROPOUTS:
        return None
    (call,) = calls
    given = [_constant(value) for value in call.inputs()]
    shapes = {name: tuple(tensor.shape) for name, tensor in program._parameters.items()}
    if kind is nn.Linear and call.kind() == "aten::linear":
        return {}
    if kind in _NORMS and call.kind() == "aten::batch_norm" and given[5] is False:
        held = dict(program._buffers.items())
        if "running_mean" in held:
            return {
                "num_features": len(held["running_mean"]), "eps": given[7], "momentum": given[6],
                "affine": "weight" in shapes, "track_running_stats": True,
            }  # fmt: skip
    if kind in _CONVOLUTIONS and call.kind() == "aten::_convolution":
        stride, padding, dilation, transposed, extra, groups = given[3:9]
        out, inner, *size = shapes["weight"]
        across = (out, inner * groups) if transposed else (inner * groups, out)
        return {
            "in_channels": across[0], "out_channels": across[1], "kernel_size": tuple(size),
            "stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation),
            "groups": groups, **({"output_padding": tuple(extra)} if transposed else {}),
        }  # fmt: skip
    return None


def _constant(value: Any) -> Any:
    node = value.node()
    if node.kind() == "prim::ListConstruct":
        return [_constant(item) for item in node.inputs()]
    return value.toIValue() if node.kind() == "prim::Constant" else None


# --- graphs ---------------------------------------------------------------------------------------

#: Reads and writes the values of a run.
_Step = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class _Code:
    """A method of a program.

    Attributes:
        inputs: Names of the values that it is given, the module first.
        steps: Its operations.
        outputs: Names of what it returns.
        constants: Name -> value.
    """

    inputs: tuple[str, ...]
    steps: tuple[_Step, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Any]

    def run(self, given: Sequence[Any]) -> Any:
        """Run it; one output comes back as it is, several as a tuple."""
        values = {**self.constants, **dict(zip(self.inputs, given, strict=False))}
        for step in self.steps:
            step(values)
        found = tuple(values[name] for name in self.outputs)
        return found[0] if len(found) == 1 else found or None


def _unknown(what: str, program: Any) -> str:
    return (
        f"{what} of this TorchScript program is not known to Frostline, so it can be listed and "
        "linted (sites, lint), and nothing else: pass the nn.Module that it was made from. "
        f"Received: {type(program).__name__}"
    )


def _code_of(method: Any, program: Any) -> _Code:
    try:
        return _Reader(program).code(method.graph)
    except _ForeignError:  # functions that only the program itself knows: they stand in this graph
        return _Reader(program).code(method.inlined_graph)


class _ForeignError(Exception):
    """A function of the program's own, which is no part of this graph."""


class _Reader:
    """Turns a graph into steps."""

    def __init__(self, program: Any) -> None:
        self.program = program
        self.constants: dict[str, Any] = {}

    def code(self, graph: Any) -> _Code:
        """All of a graph."""
        return _Code(
            inputs=tuple(value.debugName() for value in graph.inputs()),
            steps=self.steps(graph.nodes()),
            outputs=tuple(value.debugName() for value in graph.outputs()),
            constants=self.constants,
        )

    def steps(self, nodes: Iterator[Any]) -> tuple[_Step, ...]:
        """The steps of some nodes; constants are put aside."""
        found = []
        for node in nodes:
            if node.kind() == "prim::Constant":
                self._constant(node)
            else:
                found.append(self.step(node))
        return tuple(found)

    def _constant(self, node: Any) -> None:
        value = node.output()
        name = value.debugName()
        if "name" in node.attributeNames():  # a function
            self.constants[name] = self._function(_name(value.type()))
        else:
            self.constants[name] = value.toIValue()

    def _function(self, name: str) -> Callable[..., Any] | None:
        space, _, word = name.rpartition(".")
        if space == "torch.nn.functional" and hasattr(functional, word):
            return _by_position(getattr(functional, word))
        return None  # one of the program's own: its calls may have been put in the graph

    def step(self, node: Any) -> _Step:
        """What one node does."""
        kind = node.kind()
        inputs = [value.debugName() for value in node.inputs()]
        outputs = [value.debugName() for value in node.outputs()]
        if kind == "prim::If":
            return self._branch(node, inputs, outputs)
        if kind == "prim::Loop":
            return self._loop(node, inputs, outputs)
        if kind == "prim::CallFunction" and self.constants.get(inputs[0]) is None:
            raise _ForeignError(kind)
        run = self._operation(kind, node)

        def step(values: dict[str, Any]) -> None:
            made = run(*[values[name] for name in inputs])
            if len(outputs) == 1:
                values[outputs[0]] = made
            elif outputs:
                values.update(zip(outputs, made, strict=True))

        return step

    def _branch(self, node: Any, inputs: list[str], outputs: list[str]) -> _Step:
        blocks = [
            (self.steps(block.nodes()), [value.debugName() for value in block.outputs()])
            for block in node.blocks()
        ]

        def step(values: dict[str, Any]) -> None:
            steps, made = blocks[0] if values[inputs[0]] else blocks[1]
            for each in steps:
                each(values)
            values.update(zip(outputs, [values[name] for name in made], strict=True))

        return step

    def _loop(self, node: Any, inputs: list[str], outputs: list[str]) -> _Step:
        (block,) = node.blocks()
        index, *carried = [value.debugName() for value in block.inputs()]
        steps = self.steps(block.nodes())
        again, *made = [value.debugName() for value in block.outputs()]

        def step(values: dict[str, Any]) -> None:
            most, goes_on, *state = [values[name] for name in inputs]
            turn = 0
            while goes_on and turn < most:
                values.update(zip(carried, state, strict=True))
                values[index] = turn
                for each in steps:
                    each(values)
                goes_on, state, turn = values[again], [values[name] for name in made], turn + 1
            values.update(zip(outputs, state, strict=True))

        return step

    def _operation(self, kind: str, node: Any) -> Callable[..., Any]:
        if kind == "prim::GetAttr":
            return operator.attrgetter(node.s("name"))
        if kind == "prim::SetAttr":
            attribute = node.s("name")
            return lambda owner, value: setattr(owner, attribute, value)
        if kind == "prim::CallMethod":
            return _method(node.s("name"))
        if kind == "prim::CallFunction":
            return lambda function, *args: function(*args)
        if kind == "prim::TupleConstruct" and str(node.output().type()).startswith("__torch__"):
            raise UnreadableProgramError(_unknown("a named tuple", self.program))
        if kind in _PRIMITIVES:
            return _PRIMITIVES[kind]
        space, _, word = kind.partition("::")
        if space == "aten" and word in _WORDS:
            return _WORDS[word]
        operation = _tensor_operation(node) if space != "prim" else None
        if operation is None:
            raise UnreadableProgramError(_unknown(f"the operation {kind}", self.program))
        if space == "aten" and word in _EITHER:
            return _either(_EITHER[word], operation)
        return operation


def _method(name: str) -> Callable[..., Any]:
    def called(owner: Any, *args: Any) -> Any:
        if name == "forward":
            return owner(*args)
        if isinstance(owner, Reading):
            return owner._run(name, *args)
        return getattr(owner, name)(*args)

    return called


def _by_position(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch that takes what it wants by name in the order of its signature."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # a builtin one
        return function
    named = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    places = len(parameters) - len(named)
    return lambda *args: function(*args[:places], **dict(zip(named, args[places:], strict=False)))


def _tensor_operation(node: Any) -> Callable[..., Any] | None:
    """The operation of torch that a node calls; ``None``: there is none."""
    try:
        schema = torch._C.parse_schema(node.schema())
        space, _, word = schema.name.partition("::")
        packet = getattr(getattr(torch.ops, space), word)
        call = getattr(packet, schema.overload_name or "default")
    except (RuntimeError, AttributeError):
        return None
    named = [argument.name for argument in schema.arguments if argument.kwarg_only]
    places = len(schema.arguments) - len(named)
    if not named:
        return call  # type: ignore[no-any-return]
    return lambda *args: call(*args[:places], **dict(zip(named, args[places:], strict=True)))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _either(plain: Callable[..., Any], operation: Callable[..., Any]) -> Callable[..., Any]:
    """An operation of Python on what is no tensor, and torch's on tensors."""

    def run(*args: Any) -> Any:
        if any(isinstance(x, torch.Tensor) for x in args):
            return operation(*args)
        if any(isinstance(x, fx.Proxy) for x in args) and plain in _OF_VALUES:
            return operation(*args)
        return plain(*args)

    return run


def _sum(one: Any, other: Any, alpha: Any = 1) -> Any:
    return one + (other if alpha == 1 else other * alpha)


def _difference(one: Any, other: Any, alpha: Any = 1) -> Any:
    return one - (other if alpha == 1 else other * alpha)


def _sorted(values: list[Any], reverse: bool = False) -> None:
    values.sort(reverse=reverse)


def _slice(values: Any, start: Any = None, end: Any = None, step: Any = 1) -> Any:
    return values[start:end:step]


def _popped(values: Any, *where: Any) -> Any:
    return values.pop(*where)


#: On numbers and lists Python's own; on tensors, and what stands for one in a trace, torch's.
_OF_VALUES: tuple[Any, ...] = (
    math.floor, math.ceil, math.sqrt, math.exp, math.log, abs, min, max, _slice, _sorted, _popped,
)  # fmt: skip
_EITHER: dict[str, Callable[..., Any]] = {
    "add": _sum, "sub": _difference, "mul": operator.mul, "div": operator.truediv,
    "floordiv": operator.floordiv, "remainder": operator.mod, "neg": operator.neg,
    "pow": operator.pow, "eq": operator.eq, "ne": operator.ne, "lt": operator.lt,
    "le": operator.le, "gt": operator.gt, "ge": operator.ge, "__and__": operator.and_,
    "__or__": operator.or_, "__xor__": operator.xor, "floor": math.floor, "ceil": math.ceil,
    "sqrt": math.sqrt, "exp": math.exp, "log": math.log, "abs": abs, "min": min, "max": max,
    "slice": _slice, "sort": _sorted, "pop": _popped,
    "add_": operator.iadd, "mul_": operator.imul,
}  # fmt: skip


def _setitem(owner: Any, key: Any, value: Any) -> Any:
    owner[key] = value
    return owner


def _appended(values: list[Any], value: Any) -> list[Any]:
    values.append(value)
    return values


def _whole(x: Any) -> Any:
    """An integer; what stands for one in a trace goes on as it is."""
    return x if isinstance(x, fx.Proxy) else int(x)


def _ignored(*_: Any) -> None:
    return None


#: Operations of the language, not of tensors, and those that modes of Python have to see.
_WORDS: dict[str, Callable[..., Any]] = {
    "batch_norm": torch.batch_norm,
    "instance_norm": torch.instance_norm,
    "dropout": lambda x, p, train: functional.dropout(x, p, train),
    "dropout_": lambda x, p, train: functional.dropout(x, p, train, inplace=True),
    "feature_dropout": lambda x, p, train: functional.dropout2d(x, p, train),
    "alpha_dropout": lambda x, p, train: functional.alpha_dropout(x, p, train),
    "size": lambda x, *axis: x.size(*axis),
    "dim": lambda x: x.dim(),
    "item": lambda x: x.item(),
    "len": len,
    "__getitem__": operator.getitem,
    "_set_item": _setitem,
    "append": _appended,
    "extend": lambda values, more: values.extend(more),
    "insert": lambda values, place, value: values.insert(place, value),
    "__contains__": operator.contains,
    "keys": lambda table: list(table.keys()),
    "values": lambda table: list(table.values()),
    "items": lambda table: list(table.items()),
    "list": list,
    "copy": copy.copy,
    "str": str,
    "format": lambda text, *given: text.format(*given),
    "Int": _whole,
    "Float": float,
    "Bool": bool,
    "IntImplicit": _whole,
    "FloatImplicit": float,
    "ScalarImplicit": lambda x: x.item() if _is_tensor(x) else x,
    "__not__": operator.not_,
    "__is__": operator.is_,
    "__isnot__": operator.is_not,
    "_unwrap_optional": lambda x: x,
    "__range_length": lambda low, high, step: len(range(low, high, step)),
    "__derive_index": lambda index, start, step: start + index * step,
    "is_scripting": lambda: True,
    "has_torch_function": lambda *_: False,
    "warn": _ignored,
}


def _raised(text: Any, *_: Any) -> None:
    raise RuntimeError(str(text))


_PRIMITIVES: dict[str, Callable[..., Any]] = {
    "prim::ListConstruct": lambda *items: list(items),
    "prim::TupleConstruct": lambda *items: tuple(items),
    "prim::DictConstruct": lambda *items: dict(zip(items[::2], items[1::2], strict=True)),
    "prim::ListUnpack": lambda items: items[0] if len(items) == 1 else items,
    "prim::TupleUnpack": lambda items: items[0] if len(items) == 1 else items,
    "prim::TupleIndex": operator.getitem,
    "prim::RaiseException": _raised,
    "prim::Uninitialized": _ignored,
    "prim::Print": _ignored,
    "prim::unchecked_cast": lambda x: x,
    "prim::NumToTensor": lambda x: x if isinstance(x, fx.Proxy) else torch.as_tensor(x),
    "prim::device": lambda x: x.device,
    "prim::dtype": lambda x: x.dtype,
    "prim::layout": lambda x: x.layout,
    "prim::shape": lambda x: x.shape,
    "prim::data": lambda x: x.data,
    "prim::is_cuda": lambda x: x.is_cuda,
    "prim::min": min,
    "prim::max": max,
    "prim::abs": abs,
}
