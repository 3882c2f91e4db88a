"""The two parts of a split torch module, as modules: the frozen one and the one that trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from frostline.adapters.torch.network import Network, attribute, phase

_MODE = "frostline_mode"


class _Part(fx.GraphModule):  # type: ignore[misc]
    """A part of a model; it holds the model's own modules under their own names."""

    @property
    def layers(self) -> tuple[Any, ...]:
        """The modules that it calls, in order."""
        names = dict.fromkeys(n.target for n in self.graph.nodes if n.op == "call_module")
        return tuple(self.get_submodule(name) for name in names if name != _MODE)


class Prefix(_Part):
    """The frozen part: model inputs -> frontier, one tensor or a tuple of them.

    It computes what the model computes at inference, in whatever mode it is.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run in inference; modes are put back."""
        with phase(list(self.modules()), None):
            return super().__call__(*args, **kwargs)


class Suffix(_Part):
    """The rest: frontier -> the model's outputs. ``train()`` and ``eval()`` are the model's own.

    A model may override ``train``, to keep some of its BN layers in inference; so the suffix asks
    the model, which sets the modes of the modules that both hold.
    """

    def train(self, mode: bool = True) -> Any:
        """Set the mode of the whole model, and of what is the suffix' own."""
        super().train(mode)
        for model in self.__dict__.get("_whole", ()):  # a tuple: no submodule of this one
            model.train(mode)
        return self


class Mode(nn.Module):  # type: ignore[misc]
    """Whether the model is in training, for functions that it tells its mode."""

    def forward(self) -> bool:
        """The mode of the model; in a copy of the suffix, which knows no model, its own."""
        whole = self.__dict__.get("_whole", (self,))
        return bool(whole[0].training)

    def __deepcopy__(self, memo: Any) -> Any:
        """Copy without the model."""
        made = type(self)()
        made.training = self.forward()
        return made


def of_mode(mode: bool, training: Any, inference: Any) -> Any:
    """The argument that holds in a phase."""
    return training if mode else inference


def build(
    net: Network, inside: Sequence[Any], crossing: Sequence[Any], constant: frozenset[Any]
) -> tuple[Prefix, Suffix]:
    """Make both parts.

    Args:
        net: The traced model.
        inside: The nodes of the prefix, in order.
        crossing: The nodes whose values cross, in order; the suffix takes them as arguments.
        constant: Nodes that either part makes itself.
    """
    ours = set(inside)
    front = _Writer(net, constant)
    for node in net.inputs:
        front.known[node] = front.graph.node_copy(node)
    for node in inside:
        front.copy(node)
    leaves = tuple(front.known[node] for node in crossing)
    front.graph.output(leaves[0] if len(leaves) == 1 else leaves)
    back = _Writer(net, constant, phases=True)
    for number, node in enumerate(crossing):
        back.known[node] = back.graph.placeholder(f"frontier_{number}")
    back.rows = back.known[crossing[0]]
    for node in net.calls:
        if node not in ours and node not in constant:
            back.copy(node)
    back.graph.output(fx.node.map_arg(net.output.args[0], back.value))
    name = type(net.root).__name__
    prefix = Prefix(front.held(), front.graph, class_name=f"{name}Prefix")
    suffix = Suffix(back.held(), back.graph, class_name=f"{name}Suffix")
    prefix.eval()
    for module in suffix.modules():
        if module not in net.modes:  # the containers that are the suffix' own
            module.training = net.root.training
    for part in (suffix, getattr(suffix, _MODE, suffix)):
        part.__dict__["_whole"] = (net.root,)  # in a tuple: no submodule
    return prefix, suffix


class _Writer:
    """Copies nodes of the model's graph into a new one."""

    def __init__(self, net: Network, constant: frozenset[Any], *, phases: bool = False) -> None:
        self.net = net
        self.constant = constant
        self.phases = phases
        self.graph = fx.Graph()
        self.known: dict[Any, Any] = {}
        self.rows: Any = None  # a tensor whose rows are the samples
        self.mode: Any = None

    def copy(self, node: Any) -> Any:
        """Copy a node whose inputs are known, or can be made."""
        made = self.graph.node_copy(node, self.value)
        training = self.net.training.get(node)
        if self.phases and training is not None:
            with self.graph.inserting_before(made):
                if self.mode is None:
                    self.mode = self.graph.call_module(_MODE)
                given = (node.args, dict(node.kwargs))
                made.args, made.kwargs = self._chosen(given, training)
        self.known[node] = made
        return made

    def value(self, node: Any) -> Any:
        """The copy of a node."""
        if node in self.known:
            return self.known[node]
        if any(each not in self.known and each not in self.constant
               for each in node.all_input_nodes):  # fmt: skip
            # The size of a batch that is not here: any tensor of the frontier has it.
            self.known[node] = self.graph.call_method("size", (self.rows, 0))
            return self.known[node]
        return self.copy(node)

    def _chosen(self, inference: Any, training: Any) -> Any:
        """Arguments of a node, with a choice by mode where the phases differ."""
        if isinstance(inference, fx.Node):
            return self.value(inference)
        if isinstance(inference, (tuple, list)):
            pairs = zip(inference, training, strict=True)
            return type(inference)(self._chosen(one, other) for one, other in pairs)
        if isinstance(inference, dict):
            return {key: self._chosen(each, training[key]) for key, each in inference.items()}
        if type(inference) is type(training) and inference == training:
            return inference
        return self.graph.call_function(of_mode, (self.mode, training, inference))

    def held(self) -> dict[str, Any]:
        """What the graph names: the model's own modules and tensors."""
        names = {node.target for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        return {
            name: Mode() if name == _MODE else attribute(self.net.root, name)
            for name in sorted(names)
        }
