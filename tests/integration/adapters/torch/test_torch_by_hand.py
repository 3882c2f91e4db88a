"""BN in plain arithmetic, and statistics under other names, held to the class itself."""

from __future__ import annotations

import copy
import math
import os
from typing import Any

import numpy as np
import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn
from torch.nn import functional as F

import frostline as fl


class ByHand(nn.Module):
    """As textbooks write it: new tensors in the place of old ones."""

    def __init__(self, channels: int, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, channels).view(1, -1, 1, 1))
        self.beta = nn.Parameter(torch.linspace(-1, 1, channels).view(1, -1, 1, 1))
        self.register_buffer("moving_mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("moving_var", torch.ones(1, channels, 1, 1))

    def forward(self, x: Any) -> Any:
        mean, variance = self.moving_mean, self.moving_var
        if self.training:
            mean = x.mean((0, 2, 3), keepdim=True)
            variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
            with torch.no_grad():
                self.moving_mean = self.decay * self.moving_mean + (1 - self.decay) * mean
                self.moving_var = self.decay * self.moving_var + (1 - self.decay) * variance
        return self.gamma * (x - mean) / torch.sqrt(variance + 1e-5) + self.beta


class Invertible(nn.Module):
    """As flows have it: with a log-determinant, and ``momentum`` for the share that is kept."""

    def __init__(self, channels: int, momentum: float = 0.97) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Any) -> Any:
        mean, variance = self.running_mean, self.running_var
        if self.training:
            mean, variance = x.mean(0), x.var(0)
            with torch.no_grad():
                self.running_mean.mul_(self.momentum).add_((1 - self.momentum) * mean)
                self.running_var.mul_(self.momentum).add_((1 - self.momentum) * variance)
        change = -0.5 * torch.log(variance + 1e-5)
        return (x - mean) / torch.sqrt(variance + 1e-5), change.expand_as(x).sum(1)


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), Invertible(4)

    def forward(self, x: Any) -> Any:
        return self.norm(self.first(x))


class Scaler(nn.Module):
    """Observations by their running statistics, in training as well: no BN."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))

    def forward(self, x: Any) -> Any:
        if self.training:
            self.running_mean.lerp_(x.detach().mean(0), 0.1)
            self.running_var.lerp_(x.detach().var(0), 0.1)
        return (x - self.running_mean) / (self.running_var + 1e-5).sqrt()


def images(count: int = 12) -> Any:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, 5, 5, generator=generator) * 2 + 3
    return x * torch.linspace(0.5, 2, count).view(-1, 1, 1, 1)


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), ByHand(6), nn.ReLU(), nn.Conv2d(6, 4, 3), ByHand(4), nn.Flatten()
    )


def state(model: Any) -> Any:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_class_by_hand_is_a_site_with_what_it_really_does() -> None:
    found = fl.sites(net())
    assert [(s.path, s.channels, s.stats_frozen) for s in found] == [
        ("1", 6, False),
        ("4", 4, False),
    ]
    assert [s.decay for s in found] == pytest.approx([0.99, 0.99], abs=1e-4)
    (flow,) = fl.sites(Flow())
    assert flow.decay == pytest.approx(0.97)  # not 0.03: it names the share that is kept


def test_phases_are_those_of_the_class_and_nothing_moves() -> None:
    model, x = net(), images()
    y = torch.zeros(12, 4)
    before, tensors = state(model), dict(model.named_buffers())
    table = fl.phases(model, (x, y), loss=F.mse_loss, batch_size=6)
    assert same(before, state(model))
    assert all(tensors[name] is buffer for name, buffer in model.named_buffers())
    for phase, training in (("0", False), ("1", True)):
        twin = copy.deepcopy(model).train(training)
        with torch.no_grad():
            own = [float(F.mse_loss(twin(part), torch.zeros(6, 4))) for part in x.split(6)]
        assert table[phase].loss == pytest.approx(np.mean(own), rel=1e-5)


def test_recalibration_stores_the_moments_that_hooks_see() -> None:
    model, x = net(), images()
    change = fl.recalibrate(model, x, batch_size=4)
    seen: dict[int, Any] = {}
    hooks = [
        model[at].register_forward_pre_hook(lambda _, args, at=at: seen.update({at: args[0]}))
        for at in (1, 4)
    ]
    with torch.no_grad():
        model.eval()(x)
    for at, norm in ((1, model[1]), (4, model[4])):
        torch.testing.assert_close(norm.moving_mean.flatten(), seen[at].mean((0, 2, 3)))
        torch.testing.assert_close(
            norm.moving_var.flatten(), seen[at].var((0, 2, 3), unbiased=False)
        )
    for hook in hooks:
        hook.remove()
    change.undo()
    assert float(model[1].moving_mean.abs().max()) == 0


def test_frozen_it_stays_and_a_thaw_is_found() -> None:
    model, x = net(), images()
    fl.freeze(model)
    before = state(model)
    model.train()(x)
    assert same(before, state(model))
    fl.assert_frozen(model, data=x)
    fl.unfreeze(model, since="4")
    with pytest.raises(fl.NotFrozenError, match="'4'"):
        fl.assert_frozen(model, data=x)


def test_folded_it_computes_the_same_without_it() -> None:
    model, x = net().eval(), images()
    fl.recalibrate(model, x)
    folded = fl.fold(model)
    assert not any(isinstance(module, ByHand) for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_lagging_flow_is_blamed_and_repaired() -> None:
    torch.manual_seed(0)
    model, x = Flow(), torch.randn(256, 4) * 3 + 5

    def loss(out: Any, _: Any) -> Any:
        return 0.5 * out[0].square().sum(1) + 2 * math.log(2 * math.pi) - out[1]

    for rows in x.split(32):
        model.train()(rows)
    report = fl.diagnose(model, x, loss=loss, batch_size=64, verbose=0)
    assert report.causes[0].code == "EMA_LAG"
    assert report.causes[0].sites == ("norm",)
    twin = copy.deepcopy(model).eval()
    fl.recalibrate(model, x)
    with torch.no_grad():
        wrong, right = float(loss(twin(x), None).mean()), float(loss(model.eval()(x), None).mean())
        own = float(loss(copy.deepcopy(model).train()(x), None).mean())
    assert wrong > right + 1
    assert right == pytest.approx(own, abs=0.05)


def test_a_fold_leaves_what_returns_more_than_it_normalises() -> None:
    model = nn.Sequential(Flow(), nn.Identity()).eval()
    with pytest.raises(fl.ModelError, match="'0/norm' is a BN class of its own, which does more"):
        fl.fold(model)


class Whitening(nn.Module):
    """With a running covariance."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_cov", torch.eye(size))

    def forward(self, x: Any) -> Any:
        mean, covariance = self.running_mean, self.running_cov
        if self.training:
            mean, covariance = x.mean(0), x.T.cov()
            self.running_mean.lerp_(mean.detach(), 0.1)
            self.running_cov.lerp_(covariance.detach(), 0.1)
        root = torch.linalg.cholesky(covariance + 1e-3 * torch.eye(len(mean)))
        return torch.linalg.solve_triangular(root, (x - mean).T, upper=False).T


def test_a_running_covariance_is_named_and_frozen_by_its_mode() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), Whitening(4), nn.BatchNorm1d(4)), torch.randn(16, 4)
    assert "'1' (Whitening)" in str(fl.lint(model).verdict)
    with pytest.raises(fl.NotFrozenError, match="'1': its statistics move"):
        fl.assert_frozen(model, data=x, params=False)
    fl.freeze(model)
    fl.assert_frozen(model, data=x)
    before = state(model)
    model.train()(x)
    assert same(state(model), before)


def test_a_running_scaler_is_no_bn_and_is_named() -> None:
    model = nn.Sequential(Scaler(3), nn.Linear(3, 2))
    assert len(fl.sites(model)) == 0
    assert "'0' (Scaler)" in str(fl.lint(model).verdict)


def test_instance_norm_without_statistics_keeps_none() -> None:
    model = nn.Sequential(nn.InstanceNorm2d(2), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    assert [site.path for site in fl.sites(model)] == ["2"]
    assert "'0'" not in str(fl.lint(model).verdict)
    fl.freeze(model)
    fl.assert_frozen(model, data=images())


@pytest.mark.parametrize("frozen", [False, True])
def test_bn_without_parameters_is_as_frozen_as_what_is_before_it(frozen: bool) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4, affine=False, momentum=0.03)
    model, x = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 1)), torch.randn(256, 4) * 3 + 5
    model[0].requires_grad_(not frozen)
    for rows in x.split(32):
        model.train()(rows)
    report = fl.diagnose(model, (x, torch.zeros(256, 1)), loss=nn.MSELoss(), verbose=0)
    assert report.causes[0].code == ("FROZEN_DRIFT" if frozen else "EMA_LAG")
    fl.freeze(model, until="2")
    fl.assert_frozen(model, until="2", data=x)


class Conditional(nn.Module):
    """Statistics under another name, handed to torch's function; gains for each class."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Embedding(3, channels)
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def forward(self, x: Any, kind: Any) -> Any:
        x = F.batch_norm(x, self.stored_mean, self.stored_var, None, None, self.training, 0.1)
        return x * self.gain(kind)[..., None, None]


def test_a_momentum_in_the_code_of_a_class_is_left_to_it() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), Conditional(2))
    with pytest.raises(fl.ModelError, match=r"'1' is no BN site with a momentum.* sites=\['0'\]"):
        fl.set_momentum(model, 0.8)
    fl.set_momentum(model, 0.8, sites=["0"])
    assert model[0].momentum == pytest.approx(0.2)
    with pytest.raises(fl.ModelError, match="Set it there"):
        fl.set_momentum(model, 0.8, sites=["1"])


def test_statistics_of_another_name_are_found_frozen_and_recalibrated() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 3), Conditional(4)

        def forward(self, x: Any, kind: Any) -> Any:
            return self.norm(self.conv(x), kind)

    model, x, kind = Net(), images(), torch.arange(12) % 3
    assert [site.path for site in fl.sites(model)] == ["norm"]
    fl.recalibrate(model, [((x, kind),)])
    with torch.no_grad():
        seen = model.conv(x)
    torch.testing.assert_close(model.norm.stored_mean, seen.mean((0, 2, 3)))
    fl.freeze(model)
    before = state(model)
    model.train()(x, kind)
    assert same(before, state(model))
