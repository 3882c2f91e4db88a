"""The casebook's net, modes and numbers in native torch; the images are the same."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from .scenario import CLASSES, FILTERS, NORMS, Score, part


class Net(nn.Module):
    """Four blocks of convolution, BN and ReLU, global average, and a head of any kind."""

    def __init__(self, norm: Callable[[int], Any], head: Any, channels: int = 1) -> None:
        super().__init__()
        before = channels
        for block, filters in enumerate(FILTERS, 1):
            self.add_module(f"conv{block}", nn.Conv2d(before, filters, 3, padding=1))
            self.add_module(f"bn{block}", norm(filters))
            before = filters
        self.head = head

    def forward(self, x: Any) -> Any:
        for block in range(1, len(FILTERS) + 1):
            x = self.get_submodule(f"bn{block}")(self.get_submodule(f"conv{block}")(x)).relu()
            x = nn.functional.max_pool2d(x, 2) if block == 2 else x
        return self.head(x.mean((2, 3)))


def images(name: str) -> tuple[Any, Any]:
    """A part of the digits: (n, 1, 16, 16) in [0, 1] and labels, tensors."""
    x, y = part(name)
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(y).long()


def net(seed: int, *, head: Any = None, channels: int = 1, **norm: Any) -> Net:
    """A new net; ``norm`` are arguments of BatchNorm2d, such as torch's momentum."""
    torch.manual_seed(seed)
    made = head() if head is not None else nn.Linear(FILTERS[-1], CLASSES)
    return Net(lambda filters: nn.BatchNorm2d(filters, **norm), made, channels)


@functools.cache
def old_state() -> dict[str, Any]:
    """State after 513 updates on the source domain; made once per process."""
    model = net(7, momentum=0.01)
    x, y = images("old")
    fit(model, x, y, epochs=17)
    fit(model, x, y, epochs=10, lr=2e-4)  # small steps at the end: the averages catch up
    return dict(model.state_dict())


def pretrained(seed: int, *, head: bool = True, make_head: Any = None, **norm: Any) -> Net:
    """The net with its old weights; without ``head`` that one is new."""
    model = net(seed, head=make_head, **norm)
    own = head and make_head is None
    kept = {k: v for k, v in old_state().items() if own or not k.startswith("head")}
    model.load_state_dict({**model.state_dict(), **kept})
    return model


def without_grad(model: Net, count: int = 3) -> Net:
    """``requires_grad = False`` in the first blocks, and nothing else: what most people do."""
    for block in range(1, count + 1):
        for kind in ("conv", "bn"):
            model.get_submodule(f"{kind}{block}").requires_grad_(False)
    return model


def fit(
    model: Any,
    x: Any,
    y: Any,
    *,
    epochs: int,
    batch_size: int = 32,
    lr: float = 3e-3,
    loss: Any = nn.functional.cross_entropy,
    shuffle: bool = True,
    begin: Callable[[Any], Any] | None = None,
    each_step: Callable[[Any], Any] | None = None,
) -> dict[str, list[float]]:
    """A plain loop: ``train()`` at the start of each epoch; returns loss per epoch.

    Args:
        begin: Called in the place of ``model.train()``.
        each_step: Called after each step.
    """
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for _ in range(epochs):
        (begin or type(model).train)(model)
        order = torch.randperm(len(x)) if shuffle else torch.arange(len(x))
        total = 0.0
        for start in range(0, len(x), batch_size):
            rows = order[start : start + batch_size]
            optimizer.zero_grad()
            value = loss(model(x[rows]), y[rows])
            value.backward()
            optimizer.step()
            total += float(value.detach()) * len(rows)
            if each_step is not None:
                each_step(model)
        losses.append(total / len(x))
    return {"loss": losses}


def statistics(model: Any, names: Sequence[str] = NORMS) -> Any:
    """All running means and variances in one array."""
    found = [model.get_submodule(name) for name in names]
    return torch.cat([v.clone() for m in found for v in (m.running_mean, m.running_var)]).numpy()


def outputs(model: Any, x: Any, *, training: bool, batch_size: int = 32) -> Any:
    """Forward passes batch by batch on a copy, so that nothing of the model moves."""
    twin = copy.deepcopy(model).train(training)
    torch.manual_seed(0)
    with torch.no_grad():
        return torch.cat([twin(rows) for rows in x.split(batch_size)])


def score(model: Any, x: Any, y: Any, *, training: bool, batch_size: int = 32) -> Score:
    """Cross-entropy and accuracy in one mode, by numpy."""
    logits = outputs(model, x, training=training, batch_size=batch_size).double().numpy()
    logits = logits - logits.max(1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    labels = y.numpy()
    return Score(
        float(-logs[np.arange(len(labels)), labels].mean()),
        float((logits.argmax(1) == labels).mean()),
    )


def both(model: Any, x: Any, y: Any, *, batch_size: int = 32) -> dict[str, float]:
    """Scores at inference and in training mode, by name."""
    inference, training = (
        score(model, x, y, training=mode, batch_size=batch_size) for mode in (False, True)
    )
    return {
        "inference loss": inference.loss,
        "training loss": training.loss,
        "inference accuracy": inference.accuracy,
        "training accuracy": training.accuracy,
    }


def gap(model: Any, x: Any, y: Any, *, at_least: float, batch_size: int = 32) -> dict[str, float]:
    """Assert that inference has a loss higher by ``at_least`` than training mode; the numbers."""
    shown = both(model, x, y, batch_size=batch_size)
    assert shown["inference loss"] - shown["training loss"] > at_least, shown
    return shown


def no_gap(model: Any, x: Any, y: Any, *, at_most: float = 0.1) -> dict[str, float]:
    """Assert that inference is not worse than training mode; the numbers."""
    shown = both(model, x, y)
    assert shown["inference loss"] - shown["training loss"] < at_most, shown
    return shown
