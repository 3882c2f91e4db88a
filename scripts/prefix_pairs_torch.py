"""Networks of native torch for ``prefix_pairs.py``: small ones, with one thing changed."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from prefix_pairs import Augmented, Way, held, in_chain, pair, settings
from torch import nn
from torch.nn.utils import parametrize

import frostline as fl


class Holder(nn.Module):  # type: ignore[misc]
    """Multiplies by a number that a subclass holds."""

    def forward(self, x: Any) -> Any:
        """Multiply."""
        return x * self.factor()

    def factor(self) -> Any:
        """The number."""
        return 1.0


def _body() -> Any:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    norm.running_var.uniform_(0.5, 1.5)
    norm.running_mean.normal_()
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm)


class Whole(nn.Module):  # type: ignore[misc]
    """A body, one more part, and a head that trains."""

    def __init__(self, part: Any, *, branches: bool) -> None:
        super().__init__()
        self.body, self.part, self.branches = _body(), part, branches
        self.head = nn.Linear(4, 2)

    def forward(self, x: Any) -> Any:
        """Through all of it; ``torch.fx`` cannot follow a branch on values."""
        x = self.part(self.body(x))
        if self.branches and x.isnan().any():
            x = x * 2
        return self.head(x.mean((2, 3)))


def _split(part: Any, *, branches: bool) -> Any:
    model = Whole(part, branches=branches)
    fl.freeze(model, until="head")
    return fl.split(model, sample=torch.from_numpy(x(None))).prefix


def chain(draw: random.Random) -> Callable[[Any], Any]:
    """One of three ways to a prefix with a given part in it."""
    ways = (
        lambda part: nn.Sequential(_body(), part()),
        lambda part: _split(part(), branches=False),
        lambda part: _split(part(), branches=True),
    )
    return draw.choice(ways)


def after(*parts: Any) -> Any:
    """A prefix of a body and what follows it."""
    return nn.Sequential(_body(), *parts)


# --- what can be changed --------------------------------------------------------------------------


def _in_chain(part: Callable[[float], Any]) -> Way:
    """A part that is made of a number, in one of the ways of :func:`chain`."""
    return in_chain(chain, part)


class Buffered(nn.Module):  # type: ignore[misc]
    """Multiplies by a buffer."""

    def __init__(self, k: float, name: str, *, persistent: bool) -> None:
        super().__init__()
        self.by = name
        self.register_buffer(name, torch.tensor(k), persistent=persistent)

    def forward(self, x: Any) -> Any:
        """Multiply."""
        return x * getattr(self, self.by)


class Tensor(nn.Module):  # type: ignore[misc]
    """Multiplies by a tensor that is no buffer, by way of ``wrap`` and ``get``."""

    def __init__(self, k: Any, get: Any) -> None:
        super().__init__()
        self.k, self.get = k, get

    def forward(self, x: Any) -> Any:
        """Multiply."""
        return x * self.get(self.k)


class Scaled(torch.Tensor):  # type: ignore[misc]
    """A tensor that is multiplied where it is used."""

    @classmethod
    def __torch_function__(
        cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        plain = list(args)
        if function is torch.Tensor.mul:
            plain[0] = args[0].as_subclass(torch.Tensor) * args[0].by
        with torch._C.DisableTorchFunctionSubclass():
            return function(*plain, **(kwargs or {}))


def _scaled(k: float) -> Any:
    made = torch.ones(1).as_subclass(Scaled)
    made.by = k
    return Tensor(made, lambda t: torch.Tensor.mul(t, 1.0))


class Acts(nn.Module):  # type: ignore[misc]
    """Applies a function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        """Apply."""
        return self.function(x)


def _hooked(place: str, k: float, *, deep: bool) -> Any:
    part = nn.Sequential(nn.ReLU(), nn.Identity()) if deep else nn.Identity()
    target = part[1] if deep else part
    if place == "hook":
        target.register_forward_hook(lambda *given: given[-1] * k)
    elif place == "hook with keywords":
        target.register_forward_hook(lambda *given: given[-1] * k, with_kwargs=True)
    elif place == "pre-hook":
        target.register_forward_pre_hook(lambda _, given: (given[0] * k,))
    elif place == "method of an object":
        target.register_forward_hook(_Hook(k).hook)
    else:
        forward = target.forward
        target.forward = lambda x: forward(x) * k
    return part


class _Hook:
    def __init__(self, k: float) -> None:
        self.k = k

    def hook(self, module: Any, args: Any, output: Any) -> Any:  # noqa: ARG002 - as torch calls it
        return output * self.k


class Times(nn.Module):  # type: ignore[misc]
    """A parametrization."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Any) -> Any:
        """Multiply."""
        return x * self.k


def _parametrized(k: float) -> Any:
    model = after()
    parametrize.register_parametrization(model[0][0], "weight", Times(k))
    return model


def _normed(function: Any) -> Callable[[float], Any]:
    def made(k: float) -> Any:
        model = after()
        function(model[0][0])
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if n.endswith(("_g", "original0"))).mul_(k)
        return model

    return made


class Function(torch.autograd.Function):  # type: ignore[misc]
    """A function with its own gradient, of a number in its class."""

    k = 1.0

    @classmethod
    def forward(cls, ctx: Any, x: Any) -> Any:  # noqa: ARG003 - as torch calls it
        """Multiply."""
        return x * cls.k


def _custom_function(k: float) -> Any:
    own: Any = type("Own", (Function,), {"k": k, "__module__": __name__})
    return Acts(own.apply)


def _statistics(field: str) -> Callable[[float], Any]:
    def made(k: float) -> Any:
        model = after()
        with torch.no_grad():
            getattr(model[0][1], field).mul_(k).add_(0.1 * k)
        return model

    return made


def _eps(eps: float) -> Any:
    model = after()
    model[0][1].eps = eps
    return model


def _own_norm(field: str, value: Any) -> Any:
    class Norm(nn.BatchNorm2d):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return super().forward(x) * (1 + (getattr(self, field) or 0))

    made = Norm(4)
    setattr(made, field, value)
    return after(made)


class Order(nn.Module):  # type: ignore[misc]
    """Two convolutions, and what is made of both."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.how = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), how

    def forward(self, x: Any) -> Any:
        """One of several ways."""
        a = self.a if self.how != "shared" else self.b
        if self.how == "other way":
            return self.b(x) - self.a(x)
        return a(self.b(x)) if self.how == "one after the other" else a(x) - 0.5 * self.b(x)


def _encoder(activation: Any = F.relu, eps: float = 1e-5, norm_first: bool = False) -> Any:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(
        8, 2, 16, activation=activation, batch_first=True, dropout=0.0, layer_norm_eps=eps,
        norm_first=norm_first,
    ).eval()  # fmt: skip


def _convolution(**ways: Any) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, **{"padding": 1, **ways}), nn.BatchNorm2d(4))


def _dynamic(k: float) -> Any:
    torch.manual_seed(0)
    model = after(nn.Flatten(), nn.Linear(64, 8))
    with torch.no_grad():
        model[2].weight.mul_(k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch will move it
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def _cast(dtype: Any) -> Any:
    class Cast(nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return (x.to(self.dtype) * 100.3).float()

    made = Cast()
    made.dtype = dtype
    return after(made)


def _fx(k: float) -> Any:
    model = after(Acts(lambda t: t * k))
    return torch.fx.symbolic_trace(model)


def _augmented(k: float) -> Any:
    return Augmented(after(), lambda x, seed: x * np.float32(k))  # noqa: ARG005 - as it is called


def _of_package(k: float) -> Any:
    class Reads(nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            return x * torch.of_a_test[id(self)]

    made = Reads()
    vars(torch).setdefault("of_a_test", {})[id(made)] = k
    vars(torch).setdefault("kept_by_a_test", []).append(made)
    return after(made)


def ways() -> dict[str, Way]:
    """Kinds of difference; the first one is drawn half of the time."""
    relus = [nn.ReLU(), nn.Tanh(), nn.GELU(), nn.SiLU(), nn.ELU(0.5), nn.Hardswish(), nn.Softplus()]
    functions = [F.relu, torch.tanh, F.gelu, F.silu, torch.sigmoid, torch.sin, torch.abs, F.mish]
    kinds: dict[str, Way] = {
        "a held number": held(Holder, chain),
        "module of an activation": settings(lambda part: after(part), part=relus),
        "function of an activation": settings(lambda f: after(Acts(f)), f=functions),
        "function of a functional module": settings(
            lambda f: _split(Acts(f), branches=False), f=functions
        ),
        "function of a module that is replayed": settings(
            lambda f: _split(Acts(f), branches=True), f=functions
        ),
        "activation of nn.TransformerEncoderLayer": settings(_encoder, activation=functions),
        "eps of nn.TransformerEncoderLayer": settings(_encoder, eps=[1e-5, 0.1, 0.5]),
        "order in nn.TransformerEncoderLayer": settings(_encoder, norm_first=[True, False]),
        "padding mode": settings(
            _convolution, padding_mode=["zeros", "reflect", "replicate", "circular"]
        ),
        "dilation with padding": settings(
            lambda d: _convolution(dilation=d, padding=d), d=[1, 2, 3]
        ),
        "interpolation": settings(
            lambda mode: after(nn.Upsample(scale_factor=2, mode=mode)),
            mode=["nearest", "bilinear", "bicubic"],
        ),
        "corners": settings(
            lambda a: after(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=a)),
            a=[True, False],
        ),
        "pooling": settings(
            lambda p: after(p), p=[nn.MaxPool2d(2), nn.AvgPool2d(2), nn.LPPool2d(2, 2)]
        ),
        "padding counts": settings(
            lambda c: after(nn.AvgPool2d(3, 1, 1, count_include_pad=c)), c=[True, False]
        ),
        "eps of BN": settings(_eps, eps=[1e-5, 0.1, 0.5, 1.0]),
        "momentum in a subclass of BN": settings(
            lambda v: _own_norm("momentum", v), v=[0.1, 0.5, 0.9]
        ),
        "attribute in a subclass of BN": settings(
            lambda v: _own_norm("extra", v), v=[0.1, 0.5, 0.9]
        ),
        "slope": settings(lambda s: after(nn.LeakyReLU(s)), s=[0.01, 0.1, 0.3]),
        "groups of GroupNorm": settings(lambda g: after(nn.GroupNorm(g, 4)), g=[1, 2, 4]),
        "axis": settings(lambda a: after(nn.Softmax(a)), a=[1, 2, 3]),
        "order of two branches": settings(
            lambda how: after(Order(how)),
            how=["one way", "other way", "shared", "one after the other"],
        ),
        "dtype of a cast": settings(_cast, dtype=[torch.float16, torch.bfloat16, torch.int8]),
    }
    for name in ("running_mean", "running_var", "weight", "bias"):
        kinds[f"{name} of BN"] = pair(_statistics(name))
    for place in ("hook", "hook with keywords", "pre-hook", "method of an object", "forward"):
        for deep in (False, True):
            kinds[f"{place}, {'inside' if deep else 'on the part'}"] = _in_chain(
                lambda k, place=place, deep=deep: _hooked(place, k, deep=deep)  # type: ignore[misc]
            )
    for name in ("momentum", "scale", "num_batches_tracked", "_k"):
        for persistent in (True, False):
            kinds[f"buffer {name}{'' if persistent else ', not persistent'}"] = _in_chain(
                lambda k, name=name, p=persistent: Buffered(k, name, persistent=p)  # type: ignore[misc]
            )
    kinds |= {
        "tensor": _in_chain(lambda k: Tensor(torch.tensor(k), lambda t: t)),
        "tensor in a dictionary": _in_chain(
            lambda k: Tensor({"k": torch.tensor(k)}, lambda t: t["k"])
        ),
        "tensor in a list": _in_chain(lambda k: Tensor([torch.tensor(k)], lambda t: t[0])),
        "sparse tensor": _in_chain(
            lambda k: Tensor(torch.tensor([0.0, k]).to_sparse(), lambda t: t.to_dense()[1])
        ),
        "half a tensor": _in_chain(
            lambda k: Tensor(
                torch.tensor([k, 2 * k], dtype=torch.bfloat16)[1:], lambda t: t.float()
            )
        ),
        "tensor of a user's class": pair(lambda k: after(_scaled(k))),
        "module that is no child": _in_chain(lambda k: Tensor([Times(k)], lambda m: m[0](1.0))),
        "parametrization": pair(_parametrized),
        "weight norm, old": pair(_normed(nn.utils.weight_norm)),
        "weight norm": pair(_normed(nn.utils.parametrizations.weight_norm)),
        "function with a gradient": pair(lambda k: after(_custom_function(k))),
        "vmap": pair(lambda k: after(Acts(torch.vmap(lambda t: t * k)))),
        "traced by fx": pair(_fx),
        "quantized": pair(_dynamic),
        "TorchScript": pair(
            lambda k: torch.jit.trace(after(Times(k)).eval(), torch.from_numpy(x(None)))
        ),
        "compiled function": pair(
            lambda k: after(Acts(torch.compile(lambda t: t * k, backend="eager")))
        ),
        "augmentation": pair(_augmented),
        "global of an installed package": pair(_of_package),
    }
    return kinds


def x(prefix: Any) -> Any:
    """Samples: sequences for an encoder, else images."""
    random_ = np.random.default_rng(0)
    if isinstance(prefix, nn.TransformerEncoderLayer):
        return random_.normal(size=(8, 5, 8)).astype(np.float32)
    return random_.normal(size=(8, 3, 6, 6)).astype(np.float32)


def features(prefix: Any, samples: Any) -> list[Any]:
    """What the module itself gives at inference."""
    if isinstance(prefix, Augmented):
        prefix, samples = prefix.prefix, prefix.augment(samples, 0)
    with torch.no_grad():
        found = prefix.eval()(torch.from_numpy(samples))
    found = found if isinstance(found, (tuple, list)) else [found]
    return [each.float().numpy() for each in found]


def rename() -> None:
    """Modules of torch have no numbers of their own."""
