"""Train a torch module for a while, judge it, and have it back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import data as torch_data

from frostline.adapters import Outcome
from frostline.adapters.torch.asking import Question, inputs_of, takes_targets
from frostline.adapters.torch.blend import outcome_of
from frostline.adapters.torch.edit import preserved
from frostline.adapters.torch.forward_pass import (
    mover,
    set_inference,
    set_phase,
    untouched,
)
from frostline.adapters.torch.graph import site_modules, unwrapped
from frostline.adapters.torch.random import generators, own_generators, seeded
from frostline.atomic import generators as of_python, taken_back
from frostline.data.arrays import leaves, map_leaves
from frostline.data.batch import Batch
from frostline.data.batches import batches


@contextmanager
def rehearsal(model: Any, seed: int, data: Any = None) -> Iterator[None]:
    """Seed everything for a block; on any exit the module is what it was, bit for bit.

    Args:
        model: A torch module.
        seed: Of Python, numpy, torch, and the generators of a ``DataLoader``.
        data: The loader.
    """
    own, python = generators(data), of_python()

    def back() -> None:
        python()
        own()

    with taken_back(back), preserved(model):
        seeded(seed)
        for generator in own_generators(data):
            generator.manual_seed(seed)
        yield


def as_loader(data: Any, batch_size: int) -> Any:
    """Arrays of one length as a loader that shuffles; anything else as it is."""
    if not isinstance(data, tuple):
        return data
    return torch_data.DataLoader(_Rows(data), batch_size, shuffle=True)


class _Rows(torch_data.Dataset):  # type: ignore[misc]
    """Samples of arrays that belong together; batches are taken as a whole."""

    def __init__(self, arrays: Any) -> None:
        self.arrays = map_leaves(torch.as_tensor, arrays)

    def __len__(self) -> int:
        return len(leaves(self.arrays)[0][1])

    def __getitem__(self, row: int) -> Any:
        return map_leaves(lambda column: column[row], self.arrays)


class Trainer:
    """A training loop over a module, and what it is judged by.

    Args:
        model: A torch module.
        loss: As for :class:`.Question`.
        step: Likewise.
    """

    def __init__(self, model: Any, loss: Any = None, step: Any = None) -> None:
        self.model, self.root = model, unwrapped(model)
        self._move = mover(model)
        self._training = Question(loss, step, whole=True)
        self._judging = Question(loss, step)

    def _losses(self, read: Iterable[Any], before: Callable[[], None]) -> Iterator[Any]:
        """The loss of each batch, in training mode."""
        if not self.root.training:
            self.root.train()
        for batch in batches(read, inputs=inputs_of(self.root)):
            before()
            _, found = self._training.answer(self.root, batch, self._move)
            yield found.losses.mean()

    def run(self, read: Iterable[Any]) -> None:
        """Make each batch's training pass without learning from it."""
        with torch.no_grad():
            for _ in self._losses(read, lambda: None):
                pass

    def epoch(self, read: Iterable[Any], optimizer: Any, before: Callable[[], None]) -> None:
        """Train one epoch; ``before`` is called before each pass."""
        with torch.enable_grad():
            for loss in self._losses(read, before):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def judged(self, batch: Batch) -> Outcome:
        """Outputs and losses of one batch at inference; nothing of the module changes.

        A model that has its losses in training mode only is asked there, with stored statistics.
        """
        with torch.no_grad(), untouched(self.model) as root:
            set_phase(root, training=False)
            try:
                outputs, found = self._judging.answer(root, batch, self._move)
            except Exception:
                if self._judging.steps or not takes_targets(root):
                    raise
                set_inference(root, site_modules(root), trains=True)
                outputs, found = self._judging.answer(root, batch, self._move)
        return outcome_of(outputs, found, {})
