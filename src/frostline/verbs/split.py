"""Cut a model into the part that is frozen and the part that trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from frostline.adapters import adapter_of
from frostline.types import Crossing
from frostline.types.arguments import checked
from frostline.verbs.whole import whole


@dataclass(frozen=True, kw_only=True)
class Split:
    """A model cut in two; ``suffix(prefix(x))`` is ``model(x)``.

    Attributes:
        prefix: Model of the frozen part: the model's inputs -> the frontier, one tensor or a list.
        suffix: Model of the rest: the frontier -> the model's outputs, in their structure. Its
            layers are the model's own: training it trains the model.
        frontier: The tensors that cross, in the order of the prefix's outputs.
        notes: What ended the prefix other than a trainable layer, and what could not be checked.
    """

    prefix: Any
    suffix: Any
    frontier: tuple[Crossing, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes_per_sample(self) -> int:
        """Size of the whole frontier for one sample."""
        return sum(crossing.bytes_per_sample for crossing in self.frontier)

    def __str__(self) -> str:
        crossing = ", ".join(
            f"'{c.path}' {'x'.join('?' if n is None else str(n) for n in c.shape) or 'scalar'} "
            f"{c.dtype}"
            for c in self.frontier
        )
        text = (
            f"prefix of {_layers(self.prefix):,} layers, suffix of {_layers(self.suffix):,}; "
            f"frontier: {crossing}; {self.bytes_per_sample:,} bytes per sample"
        )
        return "\n".join([text, *(f"note: {note}" for note in self.notes)])


def _layers(part: Any) -> int:
    """How many there are; a torch module may call one of its own ``layers``."""
    called = getattr(part, "called_modules", None)
    return len(part.layers if called is None else called())


@whole
@checked
def split(model: Any, at: Any = None, *, sample: Any = None) -> Split:
    """Cut a model where its frozen part ends, at the tensors that are smallest to store.

    A layer belongs to the frozen part, the *prefix*, if nothing in it trains, it is not random in
    training, it normalises with stored statistics, keeps no state, adds nothing to the loss, and
    all of its inputs are such. The *frontier* is the set of tensors, smallest in bytes per sample,
    that separates these layers from the rest (a minimum cut; Ford and Fulkerson 1956): with all but
    the head frozen, the features behind the pooling, not the feature map. Layers that cost next to
    nothing (activations, merging, padding, ...) go behind the frontier where that makes it smaller.

    Purity is also checked by behaviour: the prefix runs on a few samples, one of them in two
    different batches, in training mode and in inference. Nothing of the model changes; its layers
    only gain records of being called in the two new models.

    A torch module is followed by ``torch.fx``, in training and at inference; a module inside that
    cannot be followed is kept whole. A model that cannot be followed itself, or that hides frozen
    modules in one kept whole, is cut by record and replay, which takes a ``sample``: both parts are
    runs of the model, in which frozen modules stop, or answer with the features; they serve inputs
    of the sample's shape and cannot be saved. In a graph, a head that only training uses is part of
    the suffix in training. Both parts are modules that hold the model's own parameters, under the
    model's names, so an optimizer that was built earlier stays valid; ``suffix.train()`` is the
    model's ``train()``. ``torch.save`` of a part writes a plain ``torch.fx.GraphModule``, which
    loads without Frostline; of a model that is another graph in training, the one of its present
    mode.

    Args:
        model: A built Keras model; nested models are followed, and so is a class of your own, model
            or layer, whose ``call`` does to symbols what it does to arrays, in training and at
            inference. Or a torch module; what is around it (``torch.compile``, DDP) is taken off.
        at: Cut before this layer instead: a name or path, an index into ``model.layers``
            (``at=140``: ``model.layers[:140]`` is the prefix), a fraction of the layers, or a
            layer. Everything before it must be pure.
        sample: Batch of model inputs (at least two samples) for the check, a mapping where they
            have names; ``None``: random numbers. Arguments of a torch module that have a default
            and are not in the sample keep it. A torch module does not say what it takes: where its
            first layer does not tell either, a sample is needed, and the sizes of the frontier are
            those of the sample.

    Returns:
        Prefix, suffix and frontier.

    Raises:
        ModelError: No graph (an unbuilt model, a ``call`` that symbols do not tell the whole of);
            nothing or everything is frozen; a frozen layer that is not pure, with its path and how
            it showed.
    """
    parts = adapter_of(model).split(at, sample=sample)
    return Split(
        prefix=parts.prefix, suffix=parts.suffix, frontier=parts.frontier, notes=parts.notes
    )
