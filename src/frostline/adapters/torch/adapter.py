"""The torch view: what the rest of Frostline may ask of a native ``nn.Module``.

Conventions are converted here and nowhere above: momentum (the new share) to decay (the kept
share), dotted names to paths, ``(outputs, targets)`` losses to one number per sample.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch

from frostline.adapters.torch import (
    cached_loop as torch_cached,
    distributed as torch_distributed,
    edit as torch_edit,
    facts as torch_facts,
    fold as torch_fold,
    forward_pass as torch_pass,
    graph as torch_graph,
    prefix as torch_prefix,
    reference as torch_reference,
    rehearsal as torch_rehearsal,
    script,
    split as torch_split,
)
from frostline.adapters.torch.asking import inputs_of, needs_targets
from frostline.adapters.torch.behaviour import behaviour, moved_at_inference
from frostline.adapters.torch.blend import TorchForward
from frostline.adapters.torch.copying import copied
from frostline.adapters.torch.locked import unlock
from frostline.adapters.torch.moments import TorchMoments
from frostline.adapters.torch.random import generators
from frostline.adapters.torch.surroundings import modes, surroundings
from frostline.data.arrays import leaves
from frostline.data.batch import Batch
from frostline.graph import addresses
from frostline.numerics.compare import relative_difference
from frostline.types import Boundary, ModelError, Policy


class TorchView:
    """A torch module seen in numpy and dataclasses; see :class:`frostline.adapters.Adapter`."""

    framework = "torch"
    backend = "torch"
    saved_as: Literal["model", "state"] = "state"
    channel_axis = 1
    #: The training loop of a torch module is the user's.
    train = None
    #: Ours, where we compare trainings.
    loop = torch_rehearsal

    def __init__(self, model: Any) -> None:
        script.brought_up(torch_graph.unwrapped(model))
        self.model = model
        # Questions that another file of this folder answers.
        self.sites = partial(torch_graph.sites, model)
        self.facts = partial(torch_facts.facts, model)
        self.boundary = partial(torch_graph.resolve, model)
        self.frozen_prefix = partial(torch_graph.frozen_prefix, model)
        self.noise_layers = partial(torch_pass.noise_layers, model)
        self.behaviour = partial(behaviour, model)
        self.moved_at_inference = partial(moved_at_inference, model)
        self.meter = partial(TorchMoments, model)
        self.together = partial(torch_distributed.together, model)
        self.difference = partial(torch_reference.difference, model)
        self.preserved = partial(torch_edit.preserved, model)
        self.full_precision = partial(torch_prefix.full_precision, model)
        self.snapshot = partial(torch_edit.all_that_edits_touch, model)
        self.surroundings, self.modes = surroundings, modes
        self.set_frozen = partial(torch_edit.set_frozen, model)
        self.set_decay = partial(torch_edit.set_decay, model)
        self.fold = partial(torch_fold.fold, model)
        self.split = partial(torch_split.split, model)
        self.cached = partial(torch_cached.cached, model)
        self.rehearsal = partial(torch_rehearsal.rehearsal, model)

    def before(self, boundary: Boundary) -> frozenset[str]:
        """Paths of the modules before a boundary: those that freezing up to it freezes."""
        places = addresses.side(torch_graph.walk(self.model), boundary, before=True)
        return frozenset(place.path for place in places)

    def generators(self, data: Any = None) -> Callable[[], None]:
        """Remember torch's generators and those of a loader; returns what puts them back."""
        return generators(data)

    def forward(self, x: Any, *, training: bool, step: int = 0) -> Any:
        """Return the outputs of one batch, float32; nothing of the model changes."""
        return torch_pass.arrays(torch_pass.run(self.model, x, training=training, number=step))

    def score(
        self,
        x: Any,
        y: Any,
        sample_weight: Any = None,  # noqa: ARG002 - a module has no loss to weigh
        *,
        training: bool,
        step: int = 0,
    ) -> tuple[Any, float | None]:
        """Return the outputs of one batch; a torch module has no loss of its own."""
        return self.forward(Batch(x, y), training=training, step=step), None

    def objective(self) -> tuple[str | None, bool | None]:
        """Nothing is known: a torch module has no loss of its own."""
        return None, None

    def judges_itself(self) -> bool:
        """Whether ``forward`` needs labels."""
        return needs_targets(torch_graph.unwrapped(self.model))

    def own_loss(self) -> Any:
        """``None``: a torch module has no loss of its own."""
        return None

    def compiled(self) -> bool:
        """Never: training is the user's own loop."""
        return False

    def evaluate(self, batches: Iterable[tuple[Any, ...]]) -> Mapping[str, float]:  # noqa: ARG002
        """Nothing: a torch module has no ``evaluate`` of its own."""
        return {}

    def blend_forward(
        self, loss: Any = None, step: Any = None, paths: Sequence[str] | None = None
    ) -> TorchForward:
        """Forward passes with λ and the statistics as arguments."""
        return TorchForward(self.model, paths, loss=loss, step=step)

    def inputs(self, *, labels: bool = False) -> int:
        """How many arguments ``forward`` needs, beside labels if they do not count."""
        return inputs_of(torch_graph.unwrapped(self.model), labels=labels)

    def round_trip(self, x: Any) -> float:
        """Largest relative change of an inference output after saving and loading the state."""
        with torch_edit.preserved(self.model):
            before = self.forward(x, training=False)
            stream = io.BytesIO()
            torch.save(torch_graph.unwrapped(self.model).state_dict(), stream)
            stream.seek(0)
            twin = copied(torch_graph.unwrapped(self.model))
            twin.load_state_dict(torch.load(stream, weights_only=True))
        after = TorchView(twin).forward(x, training=False)
        return relative_difference(
            *([a for _, a in leaves(outputs)] for outputs in (after, before))
        )

    def trial(
        self, batches: Iterable[Any], *, policy: str = "inference", epochs: int = 1
    ) -> AbstractContextManager[None]:
        """Refuse: the optimizer is the user's.

        Raises:
            ModelError: Always.
        """
        del batches, policy, epochs
        raise ModelError(
            "a torch module has no optimizer of its own, so no trial training can be run on it; "
            "freeze with frostline.freeze and continue your own loop. Received: a torch module"
        )

    # --- edits --------------------------------------------------------------------------------

    def convert(self, *, version: str | None, policy: Policy | None, debias: bool | None) -> int:
        """Refuse: our layer is a Keras layer.

        Raises:
            ModelError: Always.
        """
        del version, policy, debias
        raise ModelError(
            "frostline.convert turns Keras layers into Frostline's; torch modules are locked in "
            "place by frostline.freeze. Received: a torch module"
        )

    def restore(self) -> int:
        """Take every lock off; returns how many BN layers there are."""
        places = torch_graph.site_places(self.model)
        for place in places:
            if not script.is_fixed(place.module):
                unlock(place.module, training=place.module.training)
        script.handed_on(torch_graph.unwrapped(self.model))
        return len(places)
