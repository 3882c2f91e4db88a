"""What the flags of a torch module say against the purity of its calls, and trial runs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from frostline.adapters.dropout_rate import TURN_OFF
from frostline.adapters.torch.forward_pass import (
    arrays_in,
    noise_layers,
    tensors,
    untouched,
)
from frostline.adapters.torch.graph import is_site, sites
from frostline.adapters.torch.network import Network, attribute, phase
from frostline.adapters.torch.samples import ROWS, guesses
from frostline.adapters.torch.state_kept import is_plain, same_values
from frostline.data.arrays import leaves
from frostline.graph import purity
from frostline.graph.purity import Graph, Impurity, Node, NotRunError, Observed
from frostline.types import Array, ModelError
from frostline.types.reasons import first_line

_BATCH = "in training it normalises with the statistics of the batch"


class Flags:
    """What the flags say of each call of a network."""

    def __init__(self, network: Network, model: Any) -> None:
        self.network = network
        self.policies = {site.path: site for site in sites(model)}
        self.noise = noise_layers(model)
        self.names = {id(m): n.replace(".", "/") for n, m in network.root.named_modules()}

    def impurity(self, node: Any) -> Impurity | None:
        """What is to be said against a call; ``None``: nothing."""
        network = self.network
        if node.op == "get_attr":
            value = attribute(network.root, node.target)
            if not getattr(value, "requires_grad", False):
                return None
            return Impurity(why="trains", path=network.name(node), text="it is trainable")
        if node.op != "call_module":
            return self._function(node)
        inner = list(network.modules(node))
        training = [m for m in inner if any(p.requires_grad for p in m.parameters(recurse=False))]
        if training:
            path = self._path(training[-1], node)
            return Impurity(why="trains", path=path, text="it is trainable")
        for item in inner:
            found = self._module(item, self._path(item, node))
            if found is not None:
                return found
        if node.target in network.varying:
            text = network.whole[node.target]
            return Impurity(why="random", path=network.name(node), text=text)
        return None

    def _path(self, module: Any, node: Any) -> str:
        return self.names.get(id(module)) or self.network.name(node)

    def _module(self, module: Any, path: str) -> Impurity | None:
        if is_site(module):
            site = self.policies.get(path)
            if site is not None and site.policy == "inference":
                return None
            kind = type(module).__name__
            # Without gamma and beta there is no flag by which it could seem frozen.
            seems = any(True for _ in module.parameters(recurse=False))
            return Impurity(why="statistics", path=path, text=_BATCH, kind=kind, seems=seems)
        if self.network.modes.get(module, False) and (path in self.noise or _drops(module)):
            drops = self.noise.get(path, "dropout") == "dropout"
            text = f"it is random in training{TURN_OFF if drops else ''}"
            return Impurity(why="random", path=path, text=text)
        return None

    def _function(self, node: Any) -> Impurity | None:
        """A function that drops, or that gets another phase in training."""
        network = self.network
        name = node.target if isinstance(node.target, str) else node.target.__name__
        phased = node in network.phased
        if "dropout" not in name and not phased:
            return None
        args, kwargs = network.arguments(node, training=True)
        rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        if (isinstance(rate, (int, float)) and rate == 0) or (
            not phased and kwargs.get("training", args[2] if len(args) > 2 else True) is False
        ):
            return None
        if name in ("batch_norm", "instance_norm"):
            return Impurity(why="statistics", path=network.name(node), text=_BATCH, kind=name)
        text = "it is random in training" if "drop" in name else "it acts otherwise in training"
        return Impurity(why="random", path=network.name(node), text=text)


def _drops(module: Any) -> bool:
    """A module of torch with a dropout rate of its own."""
    if isinstance(module, nn.RNNBase):
        return bool(module.dropout) and module.num_layers > 1
    return isinstance(module, nn.MultiheadAttention) and bool(module.dropout)


# --- behaviour ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a trial run of the pure calls showed.

    Attributes:
        seen: Shapes and dtypes, by node.
        batch: Name of an input -> tensor.
        guessed: The batch was made up.
        named: The inputs were given by name.
    """

    seen: Observed
    batch: Mapping[str, Any]
    guessed: bool
    named: bool

    def called(self, module: Any) -> Any:
        """The module's outputs for the batch."""
        batch = {name: tensor.clone() for name, tensor in self.batch.items()}
        return module(**batch) if self.named else module(*batch.values())

    def itemsize(self, node: Any) -> int:
        """Bytes of one number of a node's tensor."""
        return int(getattr(torch, self.seen.dtypes[node]).itemsize)


def observe(network: Network, graph: Graph, nodes: Sequence[Node], sample: Any = None) -> Trial:
    """Run pure nodes on trial batches: see :func:`frostline.graph.purity.observe`.

    Args:
        network: The traced module; it is left as it was found.
        graph: The same as nodes.
        nodes: Nodes in execution order, pure by their flags.
        sample: A batch of model inputs, or ``None``: random numbers where their shape can be read
            off the first layer.

    Raises:
        ModelError: A node is not pure, with its path and how it showed; no trial batch.
    """
    named = isinstance(sample, Mapping)
    if sample is not None:
        rows = _given(network, sample)
        try:
            return _tried(network, graph, nodes, rows, False, named)
        except NotRunError as failure:
            shapes, model = (row.shape for row in rows), type(network.root).__name__
            refused = purity.sample_refused(failure, shapes, model)
            fewer = [row[: _rows_of_a_trial(rows)] for row in rows]
            takes = [_takes(network, given, named=named) for given in (rows, fewer)]
            if takes == [True, False]:
                refused = ModelError(
                    f"the model takes the sample, and not some rows of it ({failure.path!r}: "
                    f"{first_line(failure.problem)}): its rows are tied together, as the nodes of "
                    "a graph are, so they cannot be stored one by one. Train without a split. "
                    f"Received: {model}"
                )
            raise refused from failure
    problem: Exception | None = None
    modules = [inner for node in network.calls for inner in network.modules(node)]
    for guess in guesses(network.root, modules) if len(network.inputs) == 1 else ():
        try:
            return _tried(network, graph, nodes, (guess,), True, named)
        except NotRunError as failure:  # the model does not take such inputs: try others
            problem = failure.problem
    reason = "" if problem is None else f" ({' '.join(str(problem).split())[:100]})"
    raise ModelError(
        f"what this model takes cannot be read off its layers{reason}: pass a batch of its inputs, "
        f"fl.split(model, sample=x). Received: {type(network.root).__name__}, sample=None"
    )


def _takes(network: Network, rows: Sequence[Any], *, named: bool) -> bool:
    """Whether the model takes these rows at inference."""
    names = [str(node.target).lstrip("*") for node in network.inputs]
    with untouched(network.root) as root, torch.no_grad(), phase(list(root.modules()), None):
        try:
            root(**dict(zip(names, rows, strict=True))) if named else root(*rows)
        except Exception:  # whatever the model's own code raises
            return False
    return True


def _tried(
    network: Network, graph: Graph, nodes: Sequence[Node], rows: tuple[Any, ...], *how: bool
) -> Trial:
    """Run the pure nodes, and the whole model: what is behind them may take other inputs.

    Raises:
        NotRunError: One of them does not take these rows.
    """
    trial = _observed(network, graph, nodes, rows, *how)
    with untouched(network.root) as root, torch.no_grad(), phase(list(root.modules()), None):
        try:
            trial.called(root)
        except Exception as problem:  # whatever the model's own code raises
            raise NotRunError(type(root).__name__, problem) from problem
    return trial


def _given(network: Network, sample: Any) -> tuple[Any, ...]:
    if isinstance(sample, Mapping):
        values = [sample.get(str(node.target)) for node in network.inputs]
    else:
        several = isinstance(sample, (tuple, list)) and not hasattr(sample, "to")
        values = list(sample) if several else [sample]
    found = [leaf for _, leaf in leaves([v for v in values if v is not None])]
    if not all(isinstance(leaf, np.ndarray) or _dense(leaf) for leaf in found):
        raise ModelError(
            "the sample of a split is arrays or tensors with a first axis of samples: what the "
            "frozen part computes is stored in rows. Pass such inputs, or train with fl.cached. "
            f"Received: sample of type {type(sample).__name__}"
        )
    if len(found) != len(network.inputs):
        names = ", ".join(repr(str(node.target)) for node in network.inputs)
        raise ModelError(
            f"the sample has {len(found)} arrays for {len(network.inputs)} inputs ({names}). "
            f"Received: sample of type {type(sample).__name__}"
        )
    arrays = [arrays_in(leaf) for leaf in found]
    if any(len(array) < 2 for array in arrays):
        raise ModelError("the sample needs at least two rows. Received: fewer")
    made: tuple[Any, ...] = tensors(tuple(np.asarray(array) for array in arrays), network.root)
    return made


def _dense(value: Any) -> bool:
    tensor = isinstance(value, torch.Tensor) and not value.is_nested
    return tensor and value.layout == torch.strided and value.ndim > 0


def _rows_of_a_trial(rows: Sequence[Any]) -> int:
    """Samples of a trial batch: one less than there are, so that another has other neighbours."""
    return max(1, min(ROWS, len(rows[0]) - 1))


def _observed(
    network: Network,
    graph: Graph,
    nodes: Sequence[Node],
    rows: tuple[Any, ...],
    guessed: bool,
    named: bool,
) -> Trial:
    count = _rows_of_a_trial(rows)
    one = tuple(column[:count] for column in rows)
    other = tuple(column[purity.others(len(column), count)] for column in rows)
    first, second, third = (
        dict(zip(network.inputs, (value.clone() for value in batch), strict=True))
        for batch in (one, other, one)
    )

    def run(node: Node, values: dict[Any, Any], training: bool) -> str | None:
        inner = network.modules(node.call)
        held = [(b, b.clone()) for m in inner for b in m.buffers(recurse=False)] if training else []
        with phase(inner, network.modes if training else None):
            values[node.call] = network.run(node.call, values, training=training)
        moved = not all(same_values(now, was) for now, was in held)
        return "it changes its buffers in every training step" if moved else None

    with untouched(network.root), torch.no_grad():
        seen = purity.observe(graph, nodes, (first, second, third), count, run, _numbers, _dtype)
    names = [str(node.target).lstrip("*") for node in network.inputs]
    batch = dict(zip(names, one, strict=True))
    return Trial(seen=seen, batch=batch, guessed=guessed, named=named)


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _numbers(value: Any) -> Array | None:
    if not isinstance(value, torch.Tensor) or not is_plain(value):
        return None
    narrow = value.is_floating_point() and value.dtype not in (torch.float32, torch.float64)
    wide = value.detach().float() if narrow else value.detach()
    return np.asarray(wide.cpu().numpy())
