"""Every normalising call of a torch module, answered or watched by one function mode.

A site is a *call* that normalises with stored statistics, whatever class makes it. It is known by
its ``running_mean``: the module that owns that buffer is the site. A call that is given no
statistics belongs to the innermost site whose ``forward`` is running.

Function modes belong to a thread; each thread enters its own.
"""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from frostline.adapters.torch.graph import is_frozen_kind
from frostline.adapters.torch.keeping import ByHand, by_hand, holding, mean_of, names, variance_of
from frostline.adapters.torch.locked import is_locked
from frostline.atomic import taken_back
from frostline.numerics.stats import Moments
from frostline.types import ModelError

_FUNCTIONAL = ("x", "mean", "variance", "weight", "bias", "training", "momentum", "epsilon")
_NATIVE = ("x", "weight", "bias", "mean", "variance", "training", "momentum", "epsilon", "cudnn")
_NAMES = {"input": "x", "running_mean": "mean", "running_var": "variance", "eps": "epsilon"}
_NAMES |= {"use_input_stats": "training", "cudnn_enabled": "cudnn"}

#: Function -> names of its arguments in order, and whether statistics are those of one sample.
_FUNCTIONS: dict[Any, tuple[tuple[str, ...], bool]] = {
    functional.batch_norm: (_FUNCTIONAL, False),
    torch.batch_norm: (_NATIVE, False),
    torch.ops.aten.batch_norm.default: (_NATIVE, False),
    functional.instance_norm: (_FUNCTIONAL, True),
    torch.instance_norm: (_NATIVE, True),
    torch.ops.aten.instance_norm.default: (_NATIVE, True),
}

#: Values that a processor's cache holds; as many deviations are added up in float32 at a time.
_BLOCK = 1 << 17
#: Up to so many values torch's own statistics are quicker.
_FEW = 1 << 17

#: Functional dropout, which ``training=`` turns off.
SWITCHED = {
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
    functional.alpha_dropout,
    functional.feature_alpha_dropout,
}
_DROPOUT = SWITCHED | {functional.scaled_dot_product_attention}


class Ended(BaseException):
    """Ends a pass at one of its calls; no ``except Exception`` of a model catches it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call that normalises.

    Attributes:
        path: The site; ``None`` for statistics that no known site owns.
        x: What is normalised, channels on axis 1.
        mean: Stored mean that the call was given, or ``None``.
        variance: Stored variance, likewise.
        weight: gamma or ``None``.
        bias: beta or ``None``.
        training: It asks for the statistics of its input.
        epsilon: What is added to the variance.
        single: It normalises each sample by itself (instance normalisation).
        run: Makes the call as it was meant; ``None`` comes back where the module computes by hand.
    """

    path: str | None
    x: Any
    mean: Any = None
    variance: Any = None
    weight: Any = None
    bias: Any = None
    training: bool
    epsilon: float = 1e-5
    single: bool
    run: Callable[[], Any]

    @property
    def wide(self) -> Any:
        """The input in float32 at least."""
        return self.x if self.x.dtype == torch.float64 else self.x.float()

    def moments(self) -> Moments:
        """Moments of the input, float64."""
        x = self.x.detach()
        channels = x.shape[1]
        count = x.numel() // channels if channels else 0
        kind = SampleMoments if self.single else Moments
        if not count:
            zeros = torch.zeros(channels, dtype=torch.float64).numpy()
            return kind(0, zeros, zeros)
        if self.single:
            mean, variance = (moment.mean(0) for moment in statistics(x.double(), single=True))
        elif x.device.type == "cpu" and x.numel() <= _FEW:
            # One call of torch in float64; for more values its sums are slower than ours.
            given = x.double(), None, None, 0.0
            mean, variance = torch.batch_norm_update_stats(*given)
        else:
            mean, variance = shifted_statistics(self.wide.detach())
        return kind(count, _numbers(mean), _numbers(variance) * count)

    def with_statistics(self, mean: Any, variance: Any) -> Any:
        """Normalise with these, as inference does; not differentiable in them."""
        function = torch.instance_norm if self.single else torch.batch_norm
        dtype = self.x.dtype if self.mean is None else self.mean.dtype
        given = mean.to(dtype), variance.to(dtype)
        return function(self.x, self.weight, self.bias, *given, False, 0.0, self.epsilon, True)

    def with_batch(self) -> Any:
        """Normalise with the statistics of the input, as training does; nothing is updated."""
        function = torch.instance_norm if self.single else torch.batch_norm
        none = (None, None)
        return function(self.x, self.weight, self.bias, *none, True, 0.0, self.epsilon, True)

    def differentiable(self, mean: Any, variance: Any) -> Any:
        """Normalise with statistics, of the batch or of each sample, differentiable in them."""
        scale = torch.rsqrt(variance + self.epsilon)
        wide = (self.wide - along(mean, self.x)) * along(scale, self.x)
        if self.weight is not None:
            wide = wide * along(self.weight, self.x)
        if self.bias is not None:
            wide = wide + along(self.bias, self.x)
        return wide.to(self.x.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class HandCall(Call):
    """A call of a class that normalises by hand: it runs with other statistics in its buffers.

    Attributes:
        holds: Runs the class at inference with a mean and a variance.
        unbiased: In training it divides by the unbiased variance.
    """

    holds: Callable[[Any, Any], Any]
    unbiased: bool

    def with_statistics(self, mean: Any, variance: Any) -> Any:
        """Normalise with these, as the class does at inference."""
        return self.holds(mean, variance)

    def with_batch(self) -> Any:
        """Normalise with the statistics of the input, as the class does in training."""
        mean, variance = statistics(self.wide)
        count = self.x.numel() // self.x.shape[1]
        return self.holds(mean, variance * (count / max(1, count - 1) if self.unbiased else 1.0))

    def differentiable(self, mean: Any, variance: Any) -> Any:
        """As :meth:`with_statistics`: the class is plain arithmetic."""
        return self.holds(mean, variance)


def as_meant(call: Call) -> Any:
    """Answer a call as the model itself would."""
    return call.run()


class SampleMoments(Moments):
    """Moments within single samples: what lies between samples or batches is no part of them."""

    def merge(self, other: Moments) -> Moments:
        """Means weighted by their counts; squares within add up."""
        count = self.count + other.count
        share = other.count / count if count else 0.0
        mean = self.mean + (other.mean - self.mean) * share
        return SampleMoments(count, mean, self.m2 + other.m2)


def _numbers(values: Any) -> Any:
    """An array, float64; what ``torch.func.grad`` has wrapped has values and no memory."""
    wrapped = torch._C._functorch.is_gradtrackingtensor(values)
    return np.array(values.tolist()) if wrapped else values.cpu().numpy()


class Calls(TorchFunctionMode):  # type: ignore[misc]
    """While it is entered, every normalising call in this thread is answered by ``answer``.

    Args:
        sites: Path -> module of every site of the model.
        answer: Gets each call and returns its output; ``call.run()`` leaves it as it is.
        made: Called with everything that any function returns.
        quiet: Functional dropout drops nothing.
    """

    def __init__(
        self,
        sites: Mapping[str, Any],
        answer: Callable[[Call], Any],
        *,
        made: Callable[[Any], None] | None = None,
        quiet: bool = False,
    ) -> None:
        super().__init__()
        self._made, self._quiet = made, quiet
        self._sites = {path: m for path, m in sites.items() if not is_frozen_kind(m)}
        # What is locked is known, and no site; a live one that holds the same tensor is.
        self._paths = {
            id(mean): path if path in self._sites else None
            for path, module in sorted(sites.items(), key=lambda item: item[0] in self._sites)
            if (mean := _own_mean(module)) is not None
        }
        self._answer = answer

    def __enter__(self) -> Calls:
        """Answer from now on."""
        self._left = function_modes()
        super().__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        """Answer no more.

        torch takes the mode off for the time of an answer, and does not put it back where it is
        interrupted at that: its own exit would take off another one, or find none.
        """
        self._left()

    def __torch_function__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Hand normalising calls to ``answer``, all others on."""
        if function in _FUNCTIONS:
            result = self._normalised(function, args, kwargs or {})
        elif self._quiet and function in _DROPOUT:
            kwargs = _off(function, args, kwargs or {})
            result = function(*(args[:1] if function in SWITCHED else args), **kwargs)
        else:
            result = function(*args, **kwargs) if kwargs else function(*args)
        if self._made is not None:
            self._made(result)
        return result

    def _path(self, mean: Any) -> str | None:
        """The site that holds this tensor, its own or one that is lent to it.

        ``functional_call`` lends tensors for the time being.
        """
        if id(mean) in self._paths:
            return self._paths[id(mean)]
        if of_several_models(mean):
            return None
        return next(
            (path for path, module in self._sites.items() if _own_mean(module) is mean), None
        )

    def _normalised(self, function: Any, args: Any, kwargs: Any) -> Any:
        names, single = _FUNCTIONS[function]
        run = functools.partial(function, *args, **kwargs)
        given = dict(zip(names, args, strict=False))
        given |= {_NAMES.get(name, name): value for name, value in kwargs.items()}
        for unused in ("momentum", "cudnn"):
            given.pop(unused, None)
        mean = given.get("mean")
        given["training"] = mean is None or bool(given.get("training", single))
        path = None if mean is None else self._path(mean)
        if path is None and (mean is None or id(mean) not in self._paths):
            path = _running.site  # whose class mixes statistics of its own for the call
        return self._answer(Call(path=path, single=single, run=run, **given))


def of_several_models(mean: Any) -> bool:
    """Whether it holds the statistics of several models, stacked for ``torch.vmap``."""
    return bool(torch._C._functorch.is_batchedtensor(mean))


def function_modes() -> Callable[[], None]:
    """Remember which function modes this thread has entered.

    Returns:
        What leaves those that came since and enters those that went; can be repeated.
    """
    before = _entered()

    def back() -> None:
        now = _entered()
        same = next((n for n, (a, b) in enumerate(zip(before, now, strict=False)) if a is not b),
                    min(len(before), len(now)))  # fmt: skip
        for _ in now[same:]:
            torch._C._pop_torch_function_stack()
        for mode in before[same:]:
            torch._C._push_on_torch_function_stack(mode)

    return back


def _entered() -> list[Any]:
    count = torch._C._len_torch_function_stack()
    return [torch._C._get_function_stack_at(place) for place in range(count)]


def _off(function: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments with which a dropout function drops nothing."""
    if function in SWITCHED:
        return {
            **{key: value for key, value in kwargs.items() if key == "input"},
            "training": False,
        }
    return {**kwargs, "dropout_p": 0.0} if len(args) < 5 else dict(kwargs)


class _Running(threading.local):
    """The innermost site whose ``forward`` runs in this thread, where that must be known."""

    site: str | None = None


_running = _Running()


@contextmanager
def answered(
    sites: Mapping[str, Any], answer: Callable[[Call], Any], *, quiet: bool = False
) -> Iterator[None]:
    """Answer the normalising calls that this thread makes for a while; see :class:`Calls`."""
    with answerable(sites, answer), Calls(sites, answer, quiet=quiet):
        yield


@contextmanager
def answerable(sites: Mapping[str, Any], answer: Callable[[Call], Any]) -> Iterator[None]:
    """Let a model make calls that :class:`Calls` sees, in any thread, for a while.

    FrozenBatchNorm classes, which compute by hand, make calls as well. SyncBatchNorm in a single
    process is plain BN.

    Args:
        sites: Path -> module of a model's sites.
        answer: See :class:`Calls`.
    """
    changes = {
        module: functools.partial(forward, path, module, module.forward)
        for path, module in sites.items()
        if (forward := _own_forward(module, answer)) is not None
    }
    with _uncompiled(), replaced_forward(changes):
        yield


def _own_forward(module: Any, answer: Callable[[Call], Any]) -> Callable[..., Any] | None:
    """What runs in the place of a site's ``forward``; ``None`` where its calls tell everything."""
    if is_frozen_kind(module):
        return functools.partial(_frozen, answer)
    if isinstance(module, nn.SyncBatchNorm) and not is_locked(module) and not _distributed():
        return _plain
    if (hand := by_hand(module)) is not None:
        return functools.partial(_by_hand, answer, hand)
    whole = mean_of(module) is not None and getattr(module, "track_running_stats", True)
    room = type(module).forward.__module__ or "torch"  # a TorchScript class has none
    own = room.partition(".")[0] != "torch"
    return _named if own or not whole else None


def _named(path: str, _: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    before, _running.site = _running.site, path
    try:
        return forward(*args, **kwargs)
    finally:
        _running.site = before


def _plain(path: str, module: Any, _: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(nn.modules.batchnorm._BatchNorm.forward, module)
    return _named(path, module, forward, *args, **kwargs)


def _frozen(
    answer: Callable[[Call], Any],
    path: str,
    module: Any,
    forward: Callable[..., Any],
    x: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a FrozenBatchNorm, which computes by hand; where it is answered, on what is normalised.

    The module then scales, shifts and activates with statistics that change nothing.
    """
    epsilon = float(getattr(module, "eps", 1e-5))
    buffers, names = module._buffers, ("running_mean", "running_var")
    mean, variance = (buffers[name] for name in names)
    call = Call(
        path=path,
        x=x,
        mean=mean,
        variance=variance,
        training=False,
        epsilon=epsilon,
        single=False,
        run=lambda: None,
    )
    with torch._C.DisableTorchFunction():
        normalised = answer(call)
    if normalised is None:
        return forward(x, *args, **kwargs)
    try:
        buffers |= dict(zip(names, (torch.zeros_like(mean), 1.0 - epsilon + 0 * mean), strict=True))
        return forward(normalised, *args, **kwargs)
    finally:
        buffers |= dict(zip(names, (mean, variance), strict=True))


def _by_hand(
    answer: Callable[[Call], Any],
    hand: ByHand,
    path: str,
    module: Any,
    forward: Callable[..., Any],
    x: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run a class that normalises by hand; where it is answered, with statistics in its buffers."""
    run = functools.partial(forward, x, *args, **kwargs)
    axis = hand.axes.get(x.ndim) if isinstance(x, torch.Tensor) else None
    if axis is None:
        return run()

    def holds(mean: Any, variance: Any) -> Any:
        with holding(module, mean, variance):
            return run()

    call = HandCall(
        path=path,
        x=x.movedim(axis, 1),
        mean=mean_of(module),
        variance=variance_of(module),
        training=bool(module.training) and not is_locked(module),
        epsilon=float(getattr(module, "eps", 1e-5)),
        single=False,
        run=run,
        holds=holds,
        unbiased=hand.unbiased,
    )
    return answer(call)


def _own_mean(module: Any) -> Any:
    """The very tensor that a site hands to its call."""
    known = names(module)
    return None if known is None else getattr(module, known[0])


def _distributed() -> bool:
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())


@contextmanager
def replaced_forward(changes: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another ``forward`` for a while."""
    with taken_back(forwards(changes)):
        for module, forward in changes.items():
            vars(module)["forward"] = forward
        yield


def forwards(modules: Iterable[Any]) -> Callable[[], None]:
    """Remember what modules have for a ``forward``; returns what puts it back."""
    before = [(module, vars(module).get("forward")) for module in modules]

    def back() -> None:
        for module, forward in before:
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward

    return back


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Run what is compiled inside eagerly: a compiled call is no call that a mode sees.

    Libraries compile functions of their own, too (torchvision's RoI align), and would compile them
    anew under each mode. What is compiled has loaded the compiler.
    """
    if "torch._dynamo" not in sys.modules:
        yield
        return
    if hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    # Before torch 2.6: what a compiled call switches on stays off.
    frames = sys.modules["torch._dynamo.eval_frame"]
    switch = vars(frames)["set_eval_frame"]
    with taken_back(lambda: vars(frames).update(set_eval_frame=switch)):
        vars(frames)["set_eval_frame"] = lambda _: None
        yield


def stored(module: Any, path: str) -> tuple[Any, Any] | None:
    """Stored mean and variance of a site; ``None`` where it keeps none.

    Raises:
        ModelError: A lazy module without statistics yet.
    """
    mean = mean_of(module)
    if mean is None:
        return None
    if isinstance(mean, nn.parameter.UninitializedTensorMixin):
        raise ModelError(
            f"'{path}' is lazy and has seen no data yet, so it has no statistics; call the model "
            "on one batch first. Received: an uninitialised module"
        )
    return mean.detach(), variance_of(module).detach()


def shifted_statistics(x: Any) -> tuple[Any, Any]:
    """As :func:`statistics`, in float64, at the price of sums in float32.

    Deviations from a value near the mean are small numbers, so that both moments are off by some
    1e-7 of the deviation and of the variance.
    """
    axes, parts = _axes(x, single=False), pieces(x)
    near = parts[0].mean(axes)
    sums = [
        torch.stack((part.sum(axes), part.square_().sum(axes)))
        for part in deviations(parts, along(near, x))
    ]
    rest, squares = torch.stack(sums).double().sum(0) / (x.numel() // x.shape[1])
    return near.double() + rest, (squares - rest.square()).clamp_min(0.0)


def pieces(x: Any) -> Sequence[Any]:
    """Views of a tensor, along its first axis, that fit into a processor's cache."""
    size = _BLOCK // max(1, math.prod(x.shape[1:])) if x.device.type == "cpu" else len(x)
    parts: Sequence[Any] = x.split(max(1, size))
    return parts


def deviations(parts: Sequence[Any], near: Any) -> Iterator[Any]:
    """What is left of each piece without a value near its mean; the next one has its memory.

    A large tensor for all of them would cost more than their sums.
    """
    memory = torch.empty_like(parts[0])
    for part in parts:
        yield torch.sub(part, near, out=memory[: len(part)])


def _axes(x: Any, *, single: bool) -> list[int]:
    return list(range(2, x.ndim)) if single else [axis for axis in range(x.ndim) if axis != 1]


def statistics(x: Any, *, single: bool = False) -> tuple[Any, Any]:
    """Mean and biased variance per channel (axis 1) in two passes.

    Args:
        x: Channels on axis 1.
        single: Of each sample by itself, shape ``(n, channels)``.
    """
    axes = _axes(x, single=single)
    mean = x.mean(axes)
    deviations = x - along(mean, x)
    # In place where nothing is differentiated: a second tensor costs more than the sum.
    squares = deviations.square() if deviations.requires_grad else deviations.square_()
    return mean, squares.mean(axes)


def along(values: Any, x: Any) -> Any:
    """Shape ``(channels,)`` or ``(n, channels)`` -> what broadcasts along axis 1 of ``x``."""
    lead = [1] if values.ndim == 1 else []
    return values.reshape([*lead, *values.shape, *[1] * (x.ndim - 2)])
