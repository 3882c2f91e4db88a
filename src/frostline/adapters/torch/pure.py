"""Which calls of a torch module are pure: the same function of the sample in phase and batch.

Two looks, because either can be fooled. By flags: nothing trains, stored statistics, no dropout. By
behaviour: the calls that passed are run on a few samples, one of which is in two different batches,
in the modes of a training step and in inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from frostline.adapters.dropout_rate import TURN_OFF
from frostline.adapters.torch.forward_pass import noise_layers, tensors, untouched
from frostline.adapters.torch.graph import is_site, sites
from frostline.adapters.torch.network import Network, attribute, phase
from frostline.data.batches import leaves
from frostline.types import ModelError

#: Largest difference, as a share of the largest value, that rounding may make.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
_ROWS = 3  # samples in a trial batch
_SIZES = (64, 224, 32, 28, 128, 16)  # sides of images that are tried where no sample is given

Why = Literal["trains", "statistics", "random"]


@dataclass(frozen=True, kw_only=True)
class Impurity:
    """Why a call is no pure function of its input.

    Attributes:
        why: In one word.
        path: Path of the module to blame.
        text: In words, without the path.
        seems: Its parameters are frozen all the same.
    """

    why: Why
    path: str
    text: str
    seems: bool = False


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
            trains = getattr(value, "requires_grad", False)
            return self._found("trains", network.name(node), "it is trainable") if trains else None
        if node.op != "call_module":
            return self._function(node)
        inner = list(network.modules(node))
        training = [m for m in inner if any(p.requires_grad for p in m.parameters(recurse=False))]
        if training:
            return self._found("trains", self._path(training[-1], node), "it is trainable")
        for each in inner:
            found = self._module(each, self._path(each, node))
            if found is not None:
                return found
        if node.target in network.varying:
            return self._found("random", network.name(node), network.whole[node.target])
        return None

    def _path(self, module: Any, node: Any) -> str:
        return self.names.get(id(module)) or self.network.name(node)

    def _module(self, module: Any, path: str) -> Impurity | None:
        acts = self.network.modes.get(module, False)
        if is_site(module):
            site = self.policies.get(path)
            if site is not None and site.policy == "inference":
                return None
            text = "in training it normalises with the statistics of the batch"
            return self._found("statistics", path, text, seems=True)
        if acts and (path in self.noise or _drops(module)):
            drops = self.noise.get(path, "dropout") == "dropout"
            return self._found(
                "random", path, f"it is random in training{TURN_OFF if drops else ''}"
            )
        return None

    def _function(self, node: Any) -> Impurity | None:
        name = node.target if isinstance(node.target, str) else node.target.__name__
        if "dropout" not in name:
            return None
        args, kwargs = self.network.arguments(node, training=True)
        rate = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        if rate == 0 or kwargs.get("training", args[2] if len(args) > 2 else True) is False:
            return None
        return self._found("random", self.network.name(node), "it is random in training")

    def _found(self, why: Why, path: str, text: str, *, seems: bool = False) -> Impurity:
        return Impurity(why=why, path=path, text=text, seems=seems)


def _drops(module: Any) -> bool:
    """A module of torch with a dropout rate of its own."""
    if isinstance(module, nn.RNNBase):
        return bool(module.dropout) and module.num_layers > 1
    return isinstance(module, nn.MultiheadAttention) and bool(module.dropout)


# --- behaviour ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Observed:
    """What a trial run of the pure calls showed.

    Attributes:
        shapes: Node -> shape of one sample's tensor; only of tensors whose rows are the samples.
        dtypes: Node -> dtype, of the same.
        batch: The trial batch, tensors in the structure in which the model takes them.
        guessed: The batch was made up.
    """

    shapes: Mapping[Any, tuple[int, ...]]
    dtypes: Mapping[Any, Any]
    batch: tuple[Any, ...]
    guessed: bool


def observe(network: Network, calls: Sequence[Any], sample: Any = None) -> Observed:
    """Run calls on trial batches and refuse what turns out not to be pure.

    Every call runs three times: in the modes of a training step on two batches that share one
    sample, in another place and among others, and in inference. It must return the same for that
    sample and move no buffer. The model is left as it was found.

    Args:
        network: What the calls are from.
        calls: Nodes in execution order, pure by their flags.
        sample: A batch of model inputs, or ``None``: random numbers where their shape can be read
            off the first layer.

    Raises:
        ModelError: A call is not pure, with its path and how it showed; no trial batch.
    """
    if sample is not None:
        return _observed(network, calls, _given(network, sample), guessed=False)
    problem: Exception | None = None
    for rows in _guesses(network):
        try:
            return _observed(network, calls, (rows,), guessed=True)
        except ModelError:
            raise
        except Exception as error:  # the model does not take such inputs: try others
            problem = error
    reason = "" if problem is None else f" ({' '.join(str(problem).split())[:100]})"
    raise ModelError(
        f"what this model takes cannot be read off its layers{reason}: pass a batch of its inputs, "
        f"fl.split(model, sample=x). Received: {type(network.root).__name__}, sample=None"
    )


def _given(network: Network, sample: Any) -> tuple[Any, ...]:
    if isinstance(sample, Mapping):
        values = [sample.get(_argument(node)) for node in network.inputs]
    else:
        values = list(sample) if isinstance(sample, (tuple, list)) else [sample]
    found = [each for _, each in leaves([v for v in values if v is not None])]
    if len(found) != len(network.inputs):
        raise ModelError(
            f"the sample has {len(found)} arrays for {len(network.inputs)} inputs. Received: "
            f"sample of type {type(sample).__name__}"
        )
    arrays = [each.detach().cpu().numpy() if hasattr(each, "detach") else each for each in found]
    if any(len(each) < 2 for each in arrays):
        raise ModelError("the sample needs at least two rows. Received: fewer")
    made: tuple[Any, ...] = tensors(tuple(np.asarray(each) for each in arrays), network.root)
    return made


def _argument(node: Any) -> str:
    return str(node.target)


def _guesses(network: Network) -> list[Any]:
    """Batches of random inputs of a shape that the first module with weights may take."""
    modules = (inner for node in network.calls for inner in network.modules(node))
    first = next((m for m in modules if any(True for _ in m.parameters(recurse=False))), None)
    rng = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = []
    if len(network.inputs) != 1 or first is None:
        return []
    if isinstance(first, nn.Linear):
        shapes = [(first.in_features,), (8, first.in_features)]
    elif isinstance(first, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        axes = len(first.kernel_size)
        shapes = [(first.in_channels, *[side] * axes) for side in _SIZES]
    elif is_site(first):
        channels = len(first.weight)
        shapes = [(channels,), (channels, 16), (channels, 16, 16)]
    elif isinstance(first, nn.Embedding):
        return [torch.from_numpy(rng.integers(0, first.num_embeddings, (2 * _ROWS, 16)))]
    drawn = [rng.normal(size=(2 * _ROWS, *shape)).astype(np.float32) for shape in shapes]
    return [tensors(each, network.root) for each in drawn]


def _observed(
    network: Network, calls: Sequence[Any], rows: tuple[Any, ...], *, guessed: bool
) -> Observed:
    count = max(1, min(_ROWS, len(rows[0]) - 1))
    one = tuple(each[:count] for each in rows)
    other = tuple(each[[*_others(len(each), count), 0]] for each in rows)
    tables = [
        dict(zip(network.inputs, (value.clone() for value in batch), strict=True))
        for batch in (one, other, one)
    ]
    shapes = {node: tuple(tables[0][node].shape[1:]) for node in network.inputs}
    dtypes = {node: tables[0][node].dtype for node in network.inputs}
    with untouched(network.root), torch.no_grad():
        for node in calls:
            inner = network.modules(node)
            before = [(b, b.clone()) for m in inner for b in m.buffers(recurse=False)]
            for number, table in enumerate(tables):
                training = number < 2
                with phase(inner, network.modes if training else None):
                    table[node] = network.run(node, table, training=training)
            moved = not all(torch.equal(b, was) for b, was in before)
            _require_pure(network, node, [table[node] for table in tables], count, moved=moved)
            value = tables[0][node]
            if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == count:
                shapes[node], dtypes[node] = tuple(value.shape[1:]), value.dtype
    return Observed(shapes=shapes, dtypes=dtypes, batch=one, guessed=guessed)


def _others(rows: int, count: int) -> list[int]:
    """Samples of the second batch, which ends with the first one's first sample."""
    return [count + position % (rows - count) for position in range(count - 1)]


def _require_pure(
    network: Network, node: Any, found: Sequence[Any], count: int, *, moved: bool
) -> None:
    text = "it changes its buffers in every training step" if moved else None
    first, second, inference = found
    if text is None and isinstance(first, torch.Tensor):
        rows = first.ndim and first.shape[0] == count
        if first.shape != inference.shape or not _same(first, inference):
            text = "it computes something else in training than at inference"
        elif rows and first.shape == second.shape and not _same(first[0], second[-1]):
            text = "its output for one sample depends on the other samples of the batch"
    if text is None:
        return
    module = network.module(node)
    kind = type(module).__name__ if module is not None else str(node.target)
    raise ModelError(
        f"'{network.name(node)}' is frozen but not a pure function of its input: {text}, so what "
        f"it computes cannot be stored. Put the boundary before it (at=...). Received: {kind}"
    )


def _same(one: Any, other: Any) -> bool:
    wide, expected = one.detach().double(), other.detach().double()
    finite = expected[torch.isfinite(expected)]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    atol = _ROUNDING.get(one.dtype, 0.0) * largest
    return bool(torch.allclose(wide, expected, rtol=0.0, atol=atol, equal_nan=True))
