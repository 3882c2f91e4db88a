"""What can be said of a torch program without its modules: BN sites and their stored numbers.

A ``.pt2`` file of ``torch.export`` and a TorchScript file hold a finished computation. Its BN
layers can be listed and their numbers checked; there is nothing to train, freeze or blend.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NoReturn

import numpy as np
import torch

from frostline.adapters.torch.forward_pass import arrays
from frostline.adapters.torch.vocabulary import TORCH
from frostline.types import Array, ModelError, Site
from frostline.types.facts import ModelFacts, SiteFacts

#: ATen operators that normalise with stored statistics; arguments 1 to 4 are weight, bias, running
#: mean and running variance in all of them.
_OPERATORS = ("batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")


class ProgramView:
    """A program seen in numpy and dataclasses, as far as that goes."""

    framework = "torch"
    backend = "torch"
    saved_as: Literal["model", "state"] = "state"  # a changed program could not be written at all

    def __init__(self, model: Any) -> None:
        self.model = model

    def sites(self) -> tuple[Site, ...]:
        """Every BN layer, in execution order (TorchScript: of registration)."""
        return tuple(each.site for each in self.facts())

    def frozen_prefix(self) -> tuple[int | None, str | None]:
        """All of it: nothing trains."""
        return len(self.sites()), None

    def facts(self) -> ModelFacts:
        """Stored numbers; nothing trains."""
        scripted = isinstance(self.model, torch.jit.ScriptModule)
        found = _scripted(self.model) if scripted else _exported(self.model)
        found = [replace(f, site=replace(f.site, index=i)) for i, f in enumerate(found)]
        return ModelFacts(
            name=str(getattr(self.model, "original_name", type(self.model).__name__)),
            backend="torch",
            words=TORCH,
            mode=False,
            sites=tuple(found),
            order={each.site.path: index for index, each in enumerate(found)},
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ModelError(
            "an exported program can be listed and linted (sites, lint), and nothing else: pass "
            f"the nn.Module, or module:function --state FILE. Received: {type(self.model).__name__}"
        )


def _exported(program: Any) -> list[SiteFacts]:
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    tensors = {**program.state_dict, **program.constants}
    found: dict[str, SiteFacts] = {}
    for node in program.graph.nodes:
        operator = getattr(getattr(node.target, "_schema", None), "name", "").partition("::")[2]
        if node.op != "call_function" or operator not in _OPERATORS:
            continue
        owned = [names.get(getattr(each, "name", "")) for each in node.args[1:5]]
        weight, bias, mean, variance = (_numbers(tensors.get(name)) for name in owned)
        if mean is None or variance is None:
            continue
        path = str(owned[2]).rpartition(".")[0].replace(".", "/")
        calls = 1 + (found[path].site.calls if path in found else 0)
        numbers = {"mean": mean, "variance": variance, "gamma": weight, "beta": bias}
        epsilon = next((a for a in reversed(node.args) if isinstance(a, float)), 1e-5)
        found[path] = _facts(path, numbers, kind="batch_norm", epsilon=epsilon, calls=calls)
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
