"""Where a module keeps running statistics, whatever their names, and BN that is written by hand.

A class of a user's own may call its buffers ``moving_mean`` and ``moving_var`` and normalise in
plain arithmetic. Whether it is batch normalisation shows in what it does: on random numbers its
output in training must be that at inference with the mean and variance of these numbers stored.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
import weakref
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from frostline.adapters.torch.locked import unlock
from frostline.adapters.torch.random import forked
from frostline.atomic import taken_back

#: A mean that a module keeps; its variance has the same name but for the last word.
_MEAN = re.compile(r"(\w*_)?(running|moving|stored|ema|avg)_?mean\w*|mean_(ema|avg|running)")
_VARIANCES = ("var", "variance")
_NORMS = ("batch_norm", "instance_norm")
#: Names of such tensors in a state.
_STATISTIC = re.compile(r"(\w*_)?(running|moving|stored|ema|avg)_?(mean|var|variance)\w*")


def is_statistic(name: str) -> bool:
    """Whether this is what a module calls a running mean or variance."""
    return _STATISTIC.fullmatch(name) is not None


def names(module: Any) -> tuple[str, str] | None:
    """Names of the one mean and variance that a module keeps; ``None``: none, or several pairs.

    BN and InstanceNorm of torch have the usual names even where they keep nothing.
    """
    if isinstance(module, (_BatchNorm, _InstanceNorm)):
        return "running_mean", "running_var"
    found = _pairs(module)
    return found[0] if len(found) == 1 else None


def owner_of(tensor: Any, root: Any) -> str | None:
    """Path of the module that keeps a tensor; ``None``: none does."""
    for name, module in root.named_modules():
        if any(value is tensor for value in tensors_of(module).values()):
            return name.replace(".", "/") or type(root).__name__
    return None


def _pairs(module: Any) -> list[tuple[str, str]]:
    kind: Any = type(module)
    return _named_pairs(module) or [
        pair
        for pair in (_given_pairs(kind) if calls_norm(kind) else ())
        if all(name in tensors_of(module) for name in pair)
    ]


@functools.cache
def _given_pairs(kind: Any) -> tuple[tuple[str, str], ...]:
    """Names of attributes that the code of a class gives to ``batch_norm`` as mean and variance."""
    found: dict[tuple[str, str], None] = {}
    for owner in kind.__mro__:
        if owner.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except (OSError, TypeError, SyntaxError):  # made at run time: there is no source
            continue
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and (pair := _given_pair(call)) is not None:
                found[pair] = None
    return tuple(found)


def _given_pair(call: ast.Call) -> tuple[str, str] | None:
    """Attributes of a name, of ``self`` that is, that a norm gets as mean and variance."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
    if name not in _NORMS:
        return None
    # torch's own has weight and bias between its input and the statistics.
    owner = getattr(function, "value", None)
    first = 3 if isinstance(owner, ast.Name) and owner.id == "torch" else 1
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    given = (
        named.get(word) or (call.args[place] if place < len(call.args) else None)
        for place, word in enumerate(("running_mean", "running_var"), first)
    )
    mean, variance = (
        value.attr
        if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name)
        else None
        for value in given
    )
    return None if mean is None or variance is None else (mean, variance)


def _named_pairs(module: Any) -> list[tuple[str, str]]:
    own, buffers = getattr(module, "__dict__", {}), getattr(module, "_buffers", None) or {}
    # Of most modules nothing is called so, and this is asked of each of them again and again.
    if not any("mean" in name for holder in (buffers, own) for name in holder.keys()):  # noqa: SIM118
        return []
    found = []
    tensors = tensors_of(module)
    for name, mean in tensors.items():
        match = _MEAN.fullmatch(name)
        if match is None:
            continue
        for word in _VARIANCES:
            start, _, end = name.rpartition("mean")
            variance = tensors.get(f"{start}{word}{end}")
            if variance is not None and _same_kind(mean, variance):
                found.append((name, f"{start}{word}{end}"))
    return found


def _same_kind(mean: Any, variance: Any) -> bool:
    if isinstance(mean, nn.parameter.UninitializedTensorMixin):
        return type(mean) is type(variance)
    return bool(mean.is_floating_point()) and mean.shape == variance.shape


def tensors_of(module: Any) -> dict[str, Any]:
    """Buffers of a module, and tensors that are plain attributes."""
    own = vars(module) if hasattr(module, "__dict__") else {}
    plain = {name: value for name, value in own.items() if isinstance(value, torch.Tensor)}
    buffers = getattr(module, "_buffers", None) or {}
    return {**plain, **{name: value for name, value in buffers.items() if value is not None}}


def keeps_any(module: Any) -> bool:
    """Whether it keeps running statistics of some kind."""
    return bool(_pairs(module)) or _keeps_others(module)


def _keeps_others(module: Any) -> bool:
    held = [name for name in tensors_of(module) if re.search("running|moving|stored|ema", name)]
    if any(re.search("var|std|sigma|cov|rms", name) for name in held):
        return True
    return any("scale" in name for name in held) and any("mean" in name for name in held)


def mean_of(module: Any) -> Any:
    """The mean that a site keeps, shape ``(channels,)``, sharing its memory; ``None``: none."""
    return _one(module, 0)


def variance_of(module: Any) -> Any:
    """The variance that a site keeps, as :func:`mean_of`."""
    return _one(module, 1)


def _one(module: Any, which: int) -> Any:
    known = names(module)
    value = None if known is None else getattr(module, known[which])
    if value is None or isinstance(value, nn.parameter.UninitializedTensorMixin):
        return value
    return value if value.ndim == 1 else value.reshape(-1)


def _holder(module: Any, name: str) -> MutableMapping[str, Any]:
    buffers: MutableMapping[str, Any] = module._buffers
    return buffers if name in buffers else vars(module)


@contextmanager
def holding(module: Any, mean: Any, variance: Any) -> Iterator[None]:
    """Let a module keep other statistics for a while, in inference mode.

    Args:
        module: A site by hand.
        mean: Shape ``(channels,)``.
        variance: Likewise.
    """
    known = names(module)
    assert known is not None
    before = [(_holder(module, name), name, getattr(module, name)) for name in known]
    mode = module.training

    def back() -> None:
        module.training = mode
        for holder, name, own in before:
            holder[name] = own

    with taken_back(back):
        for (holder, name, own), value in zip(before, (mean, variance), strict=True):
            holder[name] = value.to(own.dtype).reshape(own.shape)
        module.training = False
        yield


@functools.cache
def calls_norm(kind: Any) -> bool:
    """Whether the code of a class names a function that normalises with given statistics.

    A bare ``nn.Module`` holds the buffers of an exported graph, whose nodes are such calls.
    """
    known = kind is nn.Module or getattr(kind, "NORMALISES", False)  # of a TorchScript program
    return known or not _called(kind.__mro__).isdisjoint(_NORMS)


@functools.cache
def may_hand_over(kind: Any) -> bool:
    """Whether a method of a class names such a function, torch's statistics, and its own mode."""
    return any(
        {"running_mean", "training"} <= names and not names.isdisjoint(_NORMS)
        for names in _names(kind.__mro__)
    )


def _called(classes: Iterable[Any]) -> set[str]:
    """Global names and attributes in the code of the methods of some classes."""
    return {name for names in _names(classes) for name in names}


def _names(classes: Iterable[Any]) -> Iterator[set[str]]:
    """Those of each method."""
    for owner in classes:
        for method in vars(owner).values() if owner is not nn.Module else ():
            if (code := getattr(method, "__code__", None)) is not None:
                yield set(code.co_names)


@functools.cache
def replaces_norm(kind: Any) -> bool:
    """Whether a subclass of torch's norms has a ``forward`` of its own that calls none of them."""
    own = [owner for owner in kind.__mro__ if owner.__module__.partition(".")[0] != "torch"]
    overrides = any("forward" in vars(owner) for owner in own)
    return overrides and _called(own).isdisjoint({*_NORMS, "super"})


# --- by hand --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ByHand:
    """How a class of a user's own normalises in plain arithmetic.

    Attributes:
        axes: Number of axes of its input -> that of the channels.
        unbiased: In training it divides by the unbiased variance, n/(n − 1) as large.
        decay: Share of the old mean that an update keeps.
        keeps: Its ``momentum`` is that share, not torch's complement; ``None``: it has none.
    """

    axes: Mapping[int, int]
    unbiased: bool
    decay: float
    keeps: bool | None

    def decay_of(self, module: Any) -> float:
        """Share of the old statistics that the next update of a module keeps."""
        if self.keeps is None:
            return self.decay
        return float(module.momentum if self.keeps else 1.0 - module.momentum)


_KNOWN: weakref.WeakKeyDictionary[Any, ByHand | None] = weakref.WeakKeyDictionary()


def by_hand(module: Any) -> ByHand | None:
    """How a module normalises by hand; ``None``: it is no BN, or does more than can be seen."""
    kind: Any = type(module)
    if isinstance(module, (_BatchNorm, _InstanceNorm)) and not replaces_norm(kind):
        return None
    if module in _KNOWN:
        return _KNOWN[module]
    found = _looked_into(module) if _may_be(module) else None
    _KNOWN[module] = found
    return found


def _may_be(module: Any) -> bool:
    own: Any = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return False
    if isinstance(module, (_BatchNorm, _InstanceNorm)):
        calls = not replaces_norm(own)
    else:
        calls = own.forward is nn.Module.forward or calls_norm(own)
    mean = mean_of(module)
    if mean is None or isinstance(mean, nn.parameter.UninitializedTensorMixin):
        return False
    # The rest calls a function whose call tells everything, or has no code of its own.
    return bool(mean.numel()) and not calls


def _looked_into(module: Any) -> ByHand | None:
    mean = getattr(module, (names(module) or ("", ""))[0])
    channels = mean.numel()
    generator = torch.Generator().manual_seed(0)
    axes: dict[int, int] = {}
    seen = (False, 0.0)
    for shape, axis in _layouts(mean, channels):
        if len(shape) in axes:
            continue
        x = torch.randn(shape, generator=generator) * (1.5 + torch.rand(shape, generator=generator))
        x = (x + 2.0).to(mean.device, mean.dtype)
        found = _normalises(module, x, axis)
        if found is not None:
            axes[len(shape)], seen = axis, found
    if not axes:
        return None
    unbiased, decay = seen
    momentum = getattr(module, "momentum", None)
    keeps = None
    if isinstance(momentum, float):
        near = [abs(weight - decay) < 1e-3 for weight in (momentum, 1.0 - momentum)]
        keeps = near[0] if any(near) else None
    return ByHand(axes=axes, unbiased=unbiased, decay=decay, keeps=keeps)


def _layouts(mean: Any, channels: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Shapes of inputs that have so many channels, and the axis of these."""
    if mean.ndim > 1:
        wide = [axis for axis, side in enumerate(mean.shape) if side > 1]
        axis = wide[0] if wide else 1
        if len(wide) <= 1 and axis > 0:
            shape = [5, 4, 3, 4, 3][: mean.ndim]
            shape[axis] = channels
            yield tuple(shape), axis
    for sides in ((), (4,), (4, 3), (3, 2, 3)):
        yield (7, channels, *sides), 1
        if sides:
            yield (7, *sides, channels), len(sides) + 1


def _normalises(module: Any, x: Any, axis: int) -> tuple[bool, float] | None:
    """Whether it uses the batch in training and what it keeps at inference.

    Returns:
        Whether the variance in training is the unbiased one, and the decay of its mean; ``None``:
        it is no BN of this input.
    """
    rest = [dimension for dimension in range(x.ndim) if dimension != axis]
    try:
        for gradients in (False, True):  # a class may tell its phase by them
            trained, new = _run(module, x, training=True, gradients=gradients)
            asleep, moved = _run(module, x, training=False, gradients=gradients)
            if new is None or moved is not None or _near(trained, asleep):
                return None
            for unbiased in (False, True):
                stored = x.mean(rest), x.var(rest, unbiased=unbiased)
                found, still = _run(module, x, training=False, gradients=gradients, stored=stored)
                if still is None and _near(trained, found):
                    break
            else:
                return None
    except Exception:  # whatever code of a user's own raises on what it does not take
        return None
    old, batch = mean_of(module), x.mean(rest)
    decay = float(((new.reshape(-1) - batch) / (old - batch)).median())
    return unbiased, min(max(decay, 0.0), 1.0)


def _run(
    module: Any, x: Any, *, training: bool, gradients: bool, stored: Any = None
) -> tuple[list[Any], Any]:
    """Outputs of a copy, and the mean that it keeps then; ``None``: nothing has moved."""
    twin: Any = object.__new__(type(module))
    vars(twin).update(vars(module))
    unlock(twin, training=training)
    vars(twin).pop("forward", None)
    vars(twin)["_buffers"] = {
        name: None if value is None else value.detach().clone()
        for name, value in module._buffers.items()
    }
    known = names(module)
    assert known is not None
    for name in known:
        _holder(twin, name)[name] = getattr(module, name).detach().clone()
    for child in twin._modules.values():
        if child is not None and any(True for _ in child.buffers()):
            raise ValueError("it holds other modules that keep something")
    if stored is not None:
        for name, value in zip(known, stored, strict=True):
            own = getattr(twin, name)
            _holder(twin, name)[name] = value.to(own.dtype).reshape(own.shape)
    vars(twin)["training"] = training
    before = [getattr(twin, name).clone() for name in known]
    with torch.set_grad_enabled(gradients), forked():
        made = type(module).forward(twin, x.clone())
    moved = not all(
        torch.equal(old, getattr(twin, name).detach().reshape(old.shape))
        for old, name in zip(before, known, strict=True)
    )
    return _floats(made), getattr(twin, known[0]).detach() if moved else None


def _floats(made: Any) -> list[Any]:
    if isinstance(made, torch.Tensor):
        return [made.detach()] if made.is_floating_point() else []
    return (
        [leaf for item in made for leaf in _floats(item)] if isinstance(made, (tuple, list)) else []
    )


def _near(one: list[Any], other: list[Any]) -> bool:
    near = functools.partial(torch.allclose, rtol=1e-3, atol=1e-4)
    return bool(one) and len(one) == len(other) and all(map(near, one, other))
