"""``fl.cached`` checks the frozen part on four samples of a batch; on all where four mislead."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest

import frostline as fl
from frostline.types import ModelError

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from test_torch_cached_loop import ResNet, Seen, made, plain_loss, require_same, trained
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(4)
X = torch.randn(48, 3, 12, 12, dtype=torch.float64)
Y = torch.arange(48) % 4


def loader() -> Any:
    generator = torch.Generator().manual_seed(2)
    return DataLoader(TensorDataset(X, Y), 16, shuffle=True, generator=generator)


def cached_and_not(kind: Any, until: str) -> Any:
    """The convolution's calls on the way through the cache; parameters are those without it."""
    model, twin = made(kind, until), made(kind, until)
    with warnings.catch_warnings(), Seen(model.stem) as seen:
        warnings.simplefilter("error")
        trained(model, fl.cached(model, loader()), plain_loss)
    require_same(model, trained(twin, loader(), plain_loss))
    return seen.sizes


def test_the_check_costs_four_samples_a_pass() -> None:
    sizes = cached_and_not(ResNet, "layer2")
    assert sorted(sizes)[-3:] == [16, 16, 16]  # the first epoch
    assert set(sizes[:-3]) <= {4, 16}
    assert sum(sizes) <= 48 + 5 * 4  # three passes before the first step; two batches later


class Centred(nn.Module):
    def forward(self, x: Any) -> Any:
        return x - x.mean(0)


class OfTheBatch(ResNet):
    """Its frozen stem depends on the other samples."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), Centred(), nn.Conv2d(6, 6, 1))


def test_four_samples_show_that_a_part_depends_on_the_batch() -> None:
    model, twin = made(OfTheBatch, "layer2"), made(OfTheBatch, "layer2")
    data = fl.cached(model, loader())
    require_same(trained(model, data, plain_loss), trained(twin, loader(), plain_loss))
    assert {name for plan, _ in data.known.values() for name, _ in plan.frontier} == {"stem.0"}
    lone = nn.Sequential(nn.Sequential(nn.Flatten(), Centred(), nn.Linear(432, 4)), nn.Linear(4, 4))
    lone = lone.double()
    lone[0].requires_grad_(False)
    with pytest.raises(ModelError, match=r"depends on the batch|no frozen module returns the same"):
        trained(lone, fl.cached(lone, loader()), plain_loss, 1)


class OfOneSize(ResNet):
    """It does not take four samples."""

    def forward(self, x: Any) -> Any:
        if len(x) == 4:
            raise ValueError(x.shape)
        return super().forward(x)


class Named(nn.Conv2d):
    """Returns a constant beside its rows, as long as four of them."""

    def forward(self, x: Any) -> Any:
        return super().forward(x), torch.zeros(4, dtype=x.dtype)


class WithConstant(ResNet):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Named(3, 6, 3)

    def forward(self, x: Any) -> Any:
        rows, constant = self.stem(x)
        x = self.layer1(self.norm(rows + constant.sum()))
        return self.head(self.layer2(x).mean((2, 3)))


@pytest.mark.parametrize("kind", [OfOneSize, WithConstant])
def test_where_four_samples_do_not_do_the_whole_batch_is_checked(kind: Any) -> None:
    sizes = cached_and_not(kind, "layer2")
    assert sum(sizes) <= 48 + 5 * 4 + 6 * 16  # two epochs are answered, whatever the check takes
