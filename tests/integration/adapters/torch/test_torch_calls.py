"""Sites are calls: whatever class makes them, they are blended, watched and read off the call."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn
from torch.nn import functional

import frostline as fl
from frostline.adapters.protocol import Condition
from frostline.adapters.torch import calls
from frostline.adapters.torch.adapter import TorchView
from frostline.adapters.torch.calls import Call
from frostline.data.batch import Batch

X = np.random.default_rng(0).normal(0.5, 2, (12, 3, 8, 8)).astype("float32")


class BatchNormAct(nn.BatchNorm2d):
    def forward(self, x: Any) -> Any:
        return functional.relu6(super().forward(x))


class OwnBatchNorm(nn.Module):
    """As timm and flows have it: buffers of its own, a functional call, an activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels) + 0.5)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Any) -> Any:
        mean, variance = self.running_mean, self.running_var
        y = functional.batch_norm(x, mean, variance, self.scale, None, self.training, 0.2, 1e-4)
        return functional.silu(y)


class FrozenBatchNormAct(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name, value in (("weight", 2.0), ("bias", 0.3), ("running_mean", 0.5)):
            self.register_buffer(name, torch.full((channels,), value))
        self.register_buffer("running_var", torch.full((channels,), 3.0))

    def forward(self, x: Any) -> Any:
        statistics = self.running_mean, self.running_var
        y = functional.batch_norm(x, *statistics, self.weight, self.bias, False, 0.0, self.eps)
        return functional.relu(y)


def instance_norm(channels: int) -> Any:
    return nn.InstanceNorm2d(channels, track_running_stats=True, affine=True)


KINDS: list[Callable[[int], Any]] = [BatchNormAct, OwnBatchNorm, instance_norm, nn.SyncBatchNorm]


def net(kind: Callable[[int], Any]) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), kind(5), nn.Conv2d(5, 4, 3), kind(4))
    for module in (model[1], model[3]):
        module.running_mean.uniform_(-1, 1)
        module.running_var.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_blend_is_the_module_itself_at_both_ends(kind: Callable[[int], Any]) -> None:
    model, inputs = net(kind), torch.as_tensor(X)
    view = TorchView(model)
    assert [site.path for site in view.sites()] == ["1", "3"]
    before = copy.deepcopy(model.state_dict())
    forward = view.blend_forward()
    twin = copy.deepcopy(model)
    if kind is nn.SyncBatchNorm:  # which refuses to train on a CPU; one process is plain BN
        for index in (1, 3):
            own = nn.BatchNorm2d(twin[index].num_features)
            own.load_state_dict(twin[index].state_dict())
            twin[index] = own
    with torch.no_grad():
        stored, trained = twin.eval()(inputs).numpy(), twin.train()(inputs).numpy()
    np.testing.assert_array_equal(forward.outputs(Batch(X), Condition(0.0)), stored)
    np.testing.assert_allclose(
        forward.outputs(Batch(X), Condition(1.0)), trained, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(view.forward(X, training=True), trained, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_against_differences(kind: Callable[[int], Any]) -> None:
    model = net(kind).double()
    forward = TorchView(model).blend_forward(
        loss=lambda outputs, _: outputs.square().sum((1, 2, 3))
    )
    batch = Batch(X, np.zeros(12))
    losses, slope = forward.gradient(batch, Condition(0.3))
    assert losses.shape == (12,)
    for index in range(2):
        step = np.eye(2)[index] * 2.0**-10
        high, low = (
            forward.outcome(batch, Condition(blend=0.3 + sign * step)).losses.mean()
            for sign in (1, -1)
        )
        assert slope[index] == pytest.approx((high - low) / 2.0**-9, rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_site_does_is_read_off_its_call(kind: Callable[[int], Any]) -> None:
    model = net(kind)
    with torch.no_grad():  # stored and batch statistics alike: outputs could not tell
        seen = model[0](torch.as_tensor(X))
        model[1].running_mean.copy_(seen.mean((0, 2, 3)))
        model[1].running_var.copy_(seen.var((0, 2, 3), correction=0))
    found = TorchView(model).behaviour([Batch(X)])
    assert {(b.training, b.inference, b.moves) for b in found.values()} == {(1.0, 0.0, True)}
    fl.freeze(model, "2")
    found = TorchView(model).behaviour([Batch(X)])
    assert (found["1"].training, found["1"].moves) == (0.0, False)
    assert (found["3"].training, found["3"].moves) == (1.0, True)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_is_believed_and_thawed_is_found(kind: Callable[[int], Any]) -> None:
    model = net(kind)
    fl.freeze(model)
    model.train()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model(torch.as_tensor(X))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    fl.assert_frozen(model, data=X)
    fl.unfreeze(model, "3")
    with pytest.raises(fl.NotFrozenError, match="'3'"):
        fl.assert_frozen(model, data=X)


def test_frozen_batch_norm_with_an_activation() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), FrozenBatchNormAct(5)).eval()
    forward = TorchView(model).blend_forward()
    with torch.no_grad():
        inner = model[0](torch.as_tensor(X))
        wanted = model(torch.as_tensor(X)).numpy()
        by_hand = functional.relu(
            functional.batch_norm(inner, None, None, model[1].weight, model[1].bias, True)
        ).numpy()
    np.testing.assert_array_equal(forward.outputs(Batch(X), Condition(0.0)), wanted)
    found, seen = forward.outputs(Batch(X), Condition(1.0, record=True))
    np.testing.assert_allclose(found, by_hand, rtol=1e-4, atol=1e-5)
    assert seen["1"].count == inner.numel() // 5
    behaviour = TorchView(model).behaviour([Batch(X)])["1"]
    assert (behaviour.training, behaviour.inference, behaviour.moves) == (0.0, 0.0, False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_exported_graph() -> None:
    model = net(nn.BatchNorm2d).eval()
    inputs = torch.as_tensor(X)
    exported: Any = torch.export.export(model, (inputs,)).module()
    view = TorchView(exported)
    assert [site.path for site in view.sites()] == ["1", "3"]
    with torch.no_grad():
        stored, trained = model(inputs).numpy(), copy.deepcopy(model).train()(inputs).numpy()
    forward = view.blend_forward()
    np.testing.assert_allclose(
        forward.outputs(Batch(X), Condition(0.0)), stored, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        forward.outputs(Batch(X), Condition(1.0)), trained, rtol=1e-5, atol=1e-5
    )


def test_instance_norm_moments_are_means_over_samples() -> None:
    model = net(instance_norm)
    with torch.no_grad():
        inner = model[0](torch.as_tensor(X)).double()
    _, seen = TorchView(model).blend_forward().outputs(Batch(X), Condition(0.0, record=True))
    mean, variance = inner.mean((2, 3)).mean(0), inner.var((2, 3), correction=0).mean(0)
    np.testing.assert_allclose(seen["1"].mean, mean, rtol=1e-9)
    np.testing.assert_allclose(seen["1"].variance, variance, rtol=1e-9)
    halves = [
        TorchView(model).blend_forward().outputs(Batch(part), Condition(0.0, record=True))[1]["1"]
        for part in (X[:5], X[5:])
    ]
    np.testing.assert_allclose(halves[0].merge(halves[1]).variance, variance, rtol=1e-9)


class FlowNorm(nn.Module):
    """Normalises by hand, as flows do; nothing of torch's is called."""

    def __init__(self, channels: int, *, stubborn: bool = False) -> None:
        super().__init__()
        self.stubborn = stubborn
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Any) -> Any:
        mean, variance = self.running_mean, self.running_var
        if self.training or self.stubborn:
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
            with torch.no_grad():
                self.running_mean.lerp_(mean, 0.1)
                self.running_var.lerp_(variance, 0.1)
        shape = (1, -1, 1, 1)
        return (x - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()


def test_what_keeps_statistics_and_is_no_bn_is_named_and_acquits_nobody() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), FlowNorm(5, stubborn=True), nn.Conv2d(5, 2, 3))
    assert len(fl.sites(model)) == 0
    told = str(fl.lint(model).verdict)
    assert "'1' (FlowNorm)" in told
    assert "BN is not ruled out" in told
    report = fl.diagnose(model, (X, X[:, :2, :4, :4]), loss=nn.MSELoss(), verbose=0)
    assert "BN is not ruled out" in report.verdict
    assert "not BN" not in report.verdict
    for data in (None, X):
        with pytest.raises(fl.NotFrozenError, match="'1'"):
            fl.assert_frozen(model, data=data)
    change = fl.freeze(model)
    assert any("'1' (FlowNorm) keeps running statistics" in note for note in change.notes)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.train()(torch.as_tensor(X))
    moved = any(not torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert moved
    model.load_state_dict(before)
    with pytest.raises(fl.NotFrozenError, match="'1': its statistics move"):
        fl.assert_frozen(model, data=X)
    change.undo()
    assert type(model[1]) is FlowNorm


def test_a_frozen_batch_norm_in_evaluation_mode_is_frozen() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 5, 3), FrozenBatchNormAct(5)), nn.Flatten())
    model.train()
    model[0].eval()
    fl.assert_frozen(model)
    assert not any(each.undone for each in TorchView(model).facts())


@pytest.mark.parametrize("offset", [0.0, 50.0, 3e4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("piece", [1, 3 * 5 * 9 * 9, calls._BLOCK])
def test_moments_in_float32_are_those_of_float64(
    offset: float, layout: Any, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "_BLOCK", piece)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 5, 9, 9, generator=generator) * torch.linspace(0.1, 9, 5).view(-1, 1, 1)
    x = (x + offset).to(memory_format=layout)
    found = Call(path="", x=x, training=True, single=False, run=lambda: None).moments()
    exact = x.double().numpy().transpose(1, 0, 2, 3).reshape(5, -1)
    off = np.abs(found.mean - exact.mean(1)) / exact.std(1)
    assert off.max() < 1e-7
    np.testing.assert_allclose(found.variance, exact.var(1), rtol=1e-6)


class Mixed(nn.BatchNorm1d):
    """Normalises at inference with a mixture of the batch's statistics and the stored ones."""

    def forward(self, x: Any) -> Any:
        if self.training:
            return super().forward(x)
        mean = 0.5 * (x.mean(0) + self.running_mean)
        variance = 0.5 * (x.var(0, correction=0) + self.running_var)
        return functional.batch_norm(x, mean, variance, self.weight, self.bias, False, 0.0, 1e-5)


def test_a_class_that_mixes_statistics_for_its_call_is_looked_into() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Mixed(8, momentum=0.01), nn.ReLU(), nn.Linear(8, 3))
    x = 3 * torch.randn(96, 6) + 2
    y = x[:, :3].argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        functional.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    model.eval()
    report = fl.diagnose(model, (x, y), loss=functional.cross_entropy, batch_size=96, verbose=0)
    probes = report.measurement.probes
    with torch.no_grad():
        served = float(functional.cross_entropy(copy.deepcopy(model)(x), y))
        learned = float(functional.cross_entropy(copy.deepcopy(model).train()(x), y))
    assert abs(learned - served) > 0.01
    assert probes["inference"].loss == pytest.approx(served, rel=1e-4)
    assert probes["batch"].loss == pytest.approx(learned, rel=1e-4)
    assert "population" in probes
    fl.recalibrate(model, x)
    own = model[0](x)
    np.testing.assert_allclose(model[1].running_mean, own.detach().mean(0), rtol=1e-4, atol=1e-5)
