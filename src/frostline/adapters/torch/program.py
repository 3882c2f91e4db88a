"""What can be said of a torch program without its modules: BN sites and their stored numbers.

A ``.pt2`` file of ``torch.export`` and a TorchScript file hold a finished computation, which is not
run: its BN layers can be listed and their numbers checked. The same goes for a program in memory
that cannot be read further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import numpy as np
import torch

from frostline.adapters.torch.forward_pass import arrays
from frostline.adapters.torch.script import why_unreadable
from frostline.adapters.torch.vocabulary import TORCH
from frostline.types import Array, ModelError, Site
from frostline.types.facts import ModelFacts, SiteFacts

#: ATen operators that normalise with stored statistics; arguments 1 to 4 are weight, bias, running
#: mean and running variance in all of them.
OPERATORS = ("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportedCall:
    """One normalising call of an exported program.

    Attributes:
        path: Where its statistics live.
        numbers: ``mean``, ``variance``, ``gamma`` and ``beta``.
        epsilon: Added to the variance.
    """

    path: str
    numbers: dict[str, Array | None]
    epsilon: float


@dataclass(frozen=True, eq=False)
class ExportedFile:
    """What is read of a ``.pt2`` file: its normalising calls, in execution order."""

    calls: tuple[ExportedCall, ...]


@dataclass(frozen=True, eq=False)
class ScriptFile:
    """What is read of a TorchScript file: the program, which is not run."""

    program: Any


class ProgramView:
    """A program seen in numpy and dataclasses, as far as that goes."""

    framework = "torch"
    backend = "torch"
    saved_as: Literal["model", "state"] = "state"  # a changed program could not be written at all

    def __init__(self, model: Any) -> None:
        self.model = model

    def sites(self) -> tuple[Site, ...]:
        """Every BN layer, in execution order (TorchScript: of registration)."""
        return tuple(fact.site for fact in self.facts())

    def frozen_prefix(self, found: tuple[Site, ...] | None = None) -> tuple[int | None, str | None]:
        """All of it: nothing trains."""
        return len(self.sites() if found is None else found), None

    def facts(self) -> ModelFacts:
        """Stored numbers; nothing trains."""
        program = getattr(self.model, "program", self.model)
        if isinstance(program, torch.jit.ScriptModule):
            found = _scripted(program)
        else:
            of_file = isinstance(self.model, ExportedFile)
            found = _exported(self.model.calls if of_file else _calls(self.model))
        found = [replace(f, site=replace(f.site, index=i)) for i, f in enumerate(found)]
        return ModelFacts(
            name=str(getattr(program, "original_name", type(program).__name__)),
            backend="torch",
            words=TORCH,
            mode=False,
            sites=tuple(found),
            order={fact.site.path: index for index, fact in enumerate(found)},
        )

    def snapshot(self) -> Callable[[], None]:
        """Nothing changes it, so there is nothing to put back."""
        return lambda: None

    modes = snapshot

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        if isinstance(self.model, torch.jit.ScriptModule):
            raise ModelError(why_unreadable(self.model))
        of_file = isinstance(self.model, (ExportedFile, ScriptFile))
        instead = "module:function --state FILE" if of_file else "program.module(), which can run"
        raise ModelError(
            "an exported program can be listed and linted (sites, lint), and nothing else: pass "
            f"the nn.Module, or {instead}. Received: {type(self.model).__name__}"
        )


def exported_call(
    names: Sequence[str | None], tensor: Callable[[str], Any], epsilon: float
) -> ExportedCall | None:
    """Return one call of an operator that normalises; ``None`` where it has no statistics.

    Args:
        names: Of weight, bias, running mean and running variance in the state of the program.
        tensor: Name -> tensor.
        epsilon: As the operator got it.
    """
    gamma, beta, mean, variance = (
        None if name is None else _numbers(tensor(name)) for name in names
    )
    if mean is None or variance is None:
        return None
    path = str(names[2]).rpartition(".")[0].replace(".", "/")
    numbers = {"mean": mean, "variance": variance, "gamma": gamma, "beta": beta}
    return ExportedCall(path=path, numbers=numbers, epsilon=epsilon)


def _calls(program: Any) -> Iterator[ExportedCall]:
    """Calls of a program in memory, in execution order."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    tensors = {**program.state_dict, **program.constants}
    for node in program.graph.nodes:
        operator = getattr(getattr(node.target, "_schema", None), "name", "").partition("::")[2]
        if node.op != "call_function" or operator not in OPERATORS:
            continue
        owned = [names.get(getattr(argument, "name", "")) for argument in node.args[1:5]]
        epsilon = next((a for a in reversed(node.args) if isinstance(a, float)), 1e-5)
        call = exported_call(owned, tensors.get, epsilon)
        if call is not None:
            yield call


def _exported(calls: Iterable[ExportedCall]) -> list[SiteFacts]:
    found: dict[str, SiteFacts] = {}
    for call in calls:
        count = 1 + (found[call.path].site.calls if call.path in found else 0)
        found[call.path] = _facts(
            call.path, call.numbers, kind="batch_norm", epsilon=call.epsilon, calls=count
        )
    return list(found.values())


def _scripted(program: Any) -> list[SiteFacts]:
    found = []
    for name, module in program.named_modules():
        own = dict(module.named_buffers(recurse=False))
        if "running_mean" not in own or "running_var" not in own:
            continue
        held = {**dict(module.named_parameters(recurse=False)), **own}
        numbers = {
            "mean": _numbers(held["running_mean"]),
            "variance": _numbers(held["running_var"]),
            "gamma": _numbers(held.get("weight")),
            "beta": _numbers(held.get("bias")),
        }
        kind = str(module.original_name)
        epsilon = float(getattr(module, "eps", 1e-5))
        found.append(_facts(name.replace(".", "/") or kind, numbers, kind=kind, epsilon=epsilon))
    return found


def _facts(
    path: str, numbers: dict[str, Array | None], *, kind: str, epsilon: float, calls: int = 1
) -> SiteFacts:
    mean = numbers["mean"]
    site = Site(
        path=path,
        name=path.rpartition("/")[2],
        kind=kind,
        index=0,
        channels=None if mean is None else int(mean.size),
        axis=1,
        decay=1.0,
        epsilon=epsilon,
        params_frozen=True,
        stats_frozen=True,
        policy="inference",
        calls=calls,
    )
    return SiteFacts(site=site, live=True, **numbers)  # type: ignore[arg-type]


def _numbers(tensor: Any) -> Array | None:
    return None if tensor is None else np.array(arrays(tensor), dtype=np.float64)
