"""Population moments of what the BN sites of a torch module see, and where they are stored.

Where ``torch.fx`` can trace the model, activations are carried from site to site, so that all of it
costs one forward pass. Elsewhere the whole model is one closed step, read again for each site.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from frostline.adapters.torch.calls import Call, answered, replaced_forward, statistics, stored
from frostline.adapters.torch.forward_pass import (
    arrays,
    called,
    tensors,
    untouched,
)
from frostline.adapters.torch.graph import site_modules, site_places, unwrapped
from frostline.adapters.torch.trace import trace
from frostline.data.batches import leaves
from frostline.graph.schedule import Program, Slot, Step, closed, schedule
from frostline.numerics.stats import Moments
from frostline.types import Array, ModelError, as_float64

Seen = Mapping[str, Sequence[Moments]]


class TorchMoments:
    """Measures and stores the statistics of chosen sites of one torch module.

    A stored variance is used by inference as it is, so the biased population variance is stored;
    torch's own training step would store the unbiased one, n/(n − 1) as large.

    Args:
        model: A torch module.
        paths: Paths of BN sites, as in ``frostline.sites``.

    Raises:
        ModelError: A path is no BN site, or a site that keeps no statistics.
    """

    def __init__(self, model: Any, paths: Sequence[str]) -> None:
        self.model = model
        known = {place.path: place.module for place in site_places(model)}
        self.modules = {path: _require(path, known.get(path)) for path in paths}
        self._structure: Any = None
        self._programs: tuple[Program, ...] | None = None
        self._scalars: dict[int, Callable[[Any], Any]] = {}  # slots that are no tensor
        graph, _ = trace(model)
        chosen = {id(module): path for path, module in self.modules.items()}
        self._steps = None if graph is None else _steps(unwrapped(model), graph, chosen)

    def start(self, x: Any) -> tuple[Array, ...]:
        """The arrays that the first stage takes, from one batch of model inputs."""
        self._structure = x
        return tuple(np.asarray(leaf) for _, leaf in leaves(x))

    def programs(self, inputs: int) -> tuple[Program, ...]:
        """The stages in order; ``inputs`` is the number of arrays in a batch of model inputs."""
        if self._programs is None:
            steps = self._steps
            usable = steps is not None and _placeholders(unwrapped(self.model)) == inputs
            chosen = {id(module): path for path, module in self.modules.items()}
            whole = closed(self._call_model, chosen, inputs)
            self._programs = schedule(steps if usable and steps is not None else whole)
        return self._programs

    def _call_model(self, values: Any) -> Any:
        return called(unwrapped(self.model), _packed(self._structure, list(values)))

    def stage(
        self, program: Program
    ) -> Callable[[Sequence[Array]], tuple[tuple[Array, ...], Seen]]:
        """One stage: arrays of one batch -> (arrays for the next stage, moments of its sites)."""

        def stage(values: Sequence[Array]) -> tuple[tuple[Array, ...], Seen]:
            seen: dict[str, list[Moments]] = {path: [] for path in program.paths}
            taken = tensors(list(values), self.model)
            table = {
                # A copy: what the model does in place must not reach the stored activations.
                slot: self._scalars[slot](value) if slot in self._scalars else value.clone()
                for slot, value in zip(program.takes, taken, strict=True)
            }
            with untouched(self.model) as root, torch.no_grad():
                root.eval()
                self._run(program, table, seen)
            return tuple(self._given(slot, table[slot]) for slot in program.gives), seen

        return stage

    def _run(self, program: Program, table: dict[int, Any], seen: dict[str, list[Moments]]) -> None:
        inside = {self.modules[path]: path for path in program.paths}
        for step, runs, look in program.steps:
            args, kwargs = _filled(step, table)
            if look and step.open:
                seen[step.sites[0]].append(moments_of(next(iter([*args, *kwargs.values()]))))
            if not runs:
                continue
            hidden = {
                module: functools.partial(_watched, module.forward, seen[path])
                for module, path in inside.items()
                if look and not step.open and path in step.sites
            }
            with replaced_forward(hidden):
                output = step.operation(*args, **kwargs)
            for slot in step.writes:
                table[slot] = output

    def _given(self, slot: int, value: Any) -> Array:
        if isinstance(value, (bool, int, float, torch.Size)):
            self._scalars[slot] = type(value)
            return np.asarray(value)
        found: Array = arrays(value)
        return found

    def batch(self) -> Callable[[Any], Seen]:
        """One pass with batch statistics at all chosen sites: ``x`` -> their moments."""

        def batch(x: Any) -> Seen:
            seen: dict[str, list[Moments]] = {path: [] for path in self.modules}

            def answer(call: Call) -> Any:
                if call.path not in seen:
                    return call.run()
                seen[call.path].append(call.moments())
                return call.with_batch()

            inputs = tensors(x, self.model)
            with untouched(self.model) as root, torch.no_grad():
                root.eval()
                with answered(root, site_modules(root), answer):
                    called(root, inputs)
            return seen

        return batch

    # --- what is stored -----------------------------------------------------------------------

    def stored(self, path: str) -> tuple[Array, Array]:
        """Stored mean and variance of a site, float64, shape ``(channels,)`` each."""
        module = self.modules[path]
        return as_float64(arrays(module.running_mean)), as_float64(arrays(module.running_var))

    def epsilon(self, path: str) -> float:
        """What the site adds to the variance."""
        return float(getattr(self.modules[path], "eps", 1e-5))

    def store(self, path: str, mean: Array, variance: Array) -> None:
        """Store population statistics, in place: buffers stay the objects they are."""
        module = self.modules[path]
        with torch.no_grad():
            module.running_mean.copy_(torch.as_tensor(mean))
            module.running_var.copy_(torch.as_tensor(variance))

    def snapshot(self) -> Callable[[], None]:
        """Remember the statistics of the chosen sites; returns what puts them back, bit for bit."""
        before = [
            (buffer, buffer.detach().clone())
            for module in self.modules.values()
            for buffer in (module.running_mean, module.running_var)
        ]

        def restore() -> None:
            with torch.no_grad():
                for buffer, value in before:
                    buffer.copy_(value)

        return restore


def _require(path: str, module: Any) -> Any:
    if module is None:
        raise ModelError(f"'{path}' is not a BN site of this model. Received: {path!r}")
    if stored(module, path) is None:
        raise ModelError(
            f"'{path}' keeps no statistics (track_running_stats=False), so there is nothing to "
            f"recalibrate; leave it out of sites=. Received: {path!r}"
        )
    return module


def _watched(forward: Callable[..., Any], entries: list[Moments], x: Any, *args: Any) -> Any:
    entries.append(moments_of(x))
    return forward(x, *args)


def moments_of(x: Any) -> Moments:
    """Moments of a site's input, float64."""
    wide = x.detach().double()
    count = wide.numel() // wide.shape[1]
    mean, variance = statistics(wide)
    return Moments(count, mean.cpu().numpy(), variance.cpu().numpy() * count)


# --- the graph --------------------------------------------------------------------------------


def _placeholders(root: Any) -> int:
    """Arguments that a call of the module must be given."""
    parameters = inspect.signature(root.forward).parameters.values()
    empty = inspect.Parameter.empty
    return sum(
        p.default is empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    )


def _steps(root: Any, graph: Any, chosen: Mapping[int, str]) -> list[Step] | None:
    slots: dict[Any, Slot] = {}
    steps: list[Step] = []
    inputs = [node for node in graph.nodes if node.op == "placeholder" and not node.args]
    for node in inputs:
        slots[node] = Slot(len(slots))
    for node in graph.nodes:
        if node.op in ("output", "placeholder"):
            if node.op == "placeholder" and node.args:  # an argument with a default
                slots[node] = Slot(len(slots))
                steps.append(_constant(node.args[0], slots[node]))
            continue
        slots[node] = Slot(len(slots))
        if node.op == "get_attr":
            steps.append(
                _constant(functools.reduce(getattr, node.target.split("."), root), slots[node])
            )
            continue
        steps.append(_step(root, node, slots, chosen))
    crossing_tuples = any(
        "getitem" in str(node.target) and node.op == "call_function" and not _is_size(node)
        for node in graph.nodes
    )
    # A tuple between two stages has no array form; such models take the closed way.
    return None if crossing_tuples else steps


def _is_size(node: Any) -> bool:
    source = node.args[0]
    return getattr(source, "target", None) in ("size",) or "getattr" in str(
        getattr(source, "target", "")
    )


def _constant(value: Any, slot: Slot) -> Step:
    return Step(operation=lambda: value, args=(), kwargs={}, reads=(), writes=(slot.index,))


def _step(root: Any, node: Any, slots: Mapping[Any, Slot], chosen: Mapping[int, str]) -> Step:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: slots[n])
    if node.op == "call_module":
        operation = root.get_submodule(node.target)
    elif node.op == "call_method":
        operation = functools.partial(_method, node.target)
    else:
        operation = node.target
    inner = [operation, *operation.modules()] if isinstance(operation, nn.Module) else []
    sites = tuple(dict.fromkeys(chosen[id(m)] for m in inner if id(m) in chosen))
    reads = tuple(dict.fromkeys(slots[each].index for each in node.all_input_nodes))
    return Step(
        operation=operation,
        args=tuple(args),
        kwargs=dict(kwargs),
        reads=reads,
        writes=(slots[node].index,),
        sites=sites,
        open=id(operation) in chosen,
    )


def _method(name: str, owner: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(owner, name)(*args, **kwargs)


def _filled(step: Step, table: Mapping[int, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def fill(value: Any) -> Any:
        if isinstance(value, Slot):
            return table[value.index]
        if isinstance(value, slice):
            return slice(fill(value.start), fill(value.stop), fill(value.step))
        if isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(fill(item) for item in value)
        return value

    return fill(tuple(step.args)), fill(dict(step.kwargs))


def _packed(structure: Any, values: list[Any]) -> Any:
    """The inverse of flattening ``structure``: the next values in the place of its leaves."""
    if isinstance(structure, Mapping):
        return {key: _packed(item, values) for key, item in structure.items()}
    if isinstance(structure, (list, tuple)):
        return tuple(_packed(item, values) for item in structure)
    return values.pop(0)
