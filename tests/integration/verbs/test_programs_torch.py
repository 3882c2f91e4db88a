"""Programs of other people's kinds in native torch, each verb on each, held to the program itself.

What a step sees must be what the loader yields, whatever a verb does with the samples in between;
the losses of phase 0 are those of the program, and statistics those that hooks see.
"""

from __future__ import annotations

import collections
import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn
from torch.nn import functional as F

import frostline as fl
from frostline.adapters.protocol import Condition
from frostline.adapters.torch.blend import TorchForward
from frostline.data.batch import Batch


def layers(given: int = 4, out: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(given, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, out))


def inputs(shift: int) -> Any:
    return torch.randn(16, 4) * (1 + shift) + shift


@dataclass(frozen=True, kw_only=True)
class Program:
    model: Any
    data: Any
    step: Callable[[Any, Any], Any]
    gradients: bool = False


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = layers()

    def forward(self, one: Any, other: Any) -> Any:
        return (self.body(one) - self.body(other)).square().sum(1)


def pairs() -> Program:
    def step(net: Any, batch: Any) -> Any:
        one, other, same = batch
        return (net(one, other) * same).mean()

    same = (torch.arange(16) % 2).float()
    data = [(inputs(shift), inputs(shift + 1), same) for shift in range(4)]
    return Program(model=Siamese(), data=data, step=step)


class Weighted(NamedTuple):
    x: Any
    y: Any
    weight: Any


def named_tuples() -> Program:
    def step(net: Any, batch: Any) -> Any:
        assert isinstance(batch, Weighted)
        return (F.cross_entropy(net(batch.x), batch.y, reduction="none") * batch.weight).mean()

    y = torch.arange(16) % 3
    data = [Weighted(inputs(shift), y, torch.linspace(0, 1, 16)) for shift in range(4)]
    return Program(model=layers(), data=data, step=step)


@dataclass
class Drawn:
    x: Any
    y: Any
    name: str = "any"


def dataclasses_() -> Program:
    def step(net: Any, batch: Any) -> Any:
        return F.cross_entropy(net(batch.x), batch.y)

    data = [Drawn(inputs(shift), torch.arange(16) % 3) for shift in range(4)]
    return Program(model=layers(), data=data, step=step)


def bare_tensors() -> Program:
    def step(net: Any, batch: Any) -> Any:
        return F.mse_loss(net(batch), batch)

    data = [inputs(shift) for shift in range(4)]
    return Program(model=layers(out=4), data=data, step=step)


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = layers(out=2), layers(given=2, out=1)


def gradient_penalty() -> Program:
    def step(net: Any, batch: Any) -> Any:
        noise, real = batch
        fake = net.generator(noise)
        between = (0.5 * fake + 0.5 * real).detach().requires_grad_()
        (slope,) = torch.autograd.grad(net.critic(between).sum(), between, create_graph=True)
        return net.critic(fake).mean() - net.critic(real).mean() + (slope.norm(2, 1) - 1).mean()

    data = [(inputs(shift), torch.randn(16, 2) + shift) for shift in range(4)]
    return Program(model=Gan(), data=data, step=step, gradients=True)


PROGRAMS = [pairs, named_tuples, dataclasses_, bare_tensors, gradient_penalty]


@pytest.fixture(params=PROGRAMS, ids=lambda build: build.__name__)
def program(request: pytest.FixtureRequest) -> Program:
    torch.manual_seed(0)
    found: Program = request.param()
    found.model.train()
    with torch.no_grad() if not found.gradients else torch.enable_grad():
        found.step(found.model, next(iter(found.data)))
    return found


def state(model: Any) -> Any:
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    return {k: v.clone() for k, v in model.state_dict().items()}, flags, modes


def same(one: Any, other: Any) -> bool:
    alike = all(torch.equal(one[0][name], other[0][name]) for name in one[0])
    return alike and one[1:] == other[1:]


def own_loss(program: Program) -> float:
    twin = copy.deepcopy(program.model).eval()
    with torch.set_grad_enabled(program.gradients):
        losses = [program.step(twin, batch).detach() for batch in program.data]
    return float(torch.stack(losses).mean())


def test_phase_0_has_the_loss_of_the_program(program: Program) -> None:
    before = state(program.model)
    found = fl.phases(program.model, program.data, step=program.step)
    row = next(row for row in found.rows if row.phase == "0")
    assert row.loss == pytest.approx(own_loss(program), rel=1e-5)
    assert found.samples == 64
    assert same(before, state(program.model))


def test_a_diagnosis_hands_the_step_what_the_loader_yields(program: Program) -> None:
    before = state(program.model)
    report = fl.diagnose(program.model, program.data, step=program.step, verbose=0)
    assert report.measurement is not None
    inference = report.measurement.probes["inference"]
    assert inference.loss == pytest.approx(own_loss(program), rel=0.3)
    assert report.measurement.samples == 64
    assert same(before, state(program.model))


def test_recalibration_stores_what_hooks_see(program: Program) -> None:
    fl.recalibrate(program.model, program.data, step=program.step)
    twin = copy.deepcopy(program.model).eval()
    seen: dict[str, list[Any]] = collections.defaultdict(list)
    sites = {name: m for name, m in twin.named_modules() if isinstance(m, nn.BatchNorm1d)}
    for name, site in sites.items():
        site.register_forward_pre_hook(
            lambda _, given, name=name: seen[name].append(given[0].detach().double())
        )
    with torch.set_grad_enabled(program.gradients):
        for batch in program.data:
            program.step(twin, batch)
    for name, site in sites.items():
        values = torch.cat(seen[name])
        torch.testing.assert_close(site.running_mean.double(), values.mean(0), rtol=1e-3, atol=1e-4)
        variance = values.var(0, unbiased=False)
        torch.testing.assert_close(site.running_var.double(), variance, rtol=1e-3, atol=1e-4)


def test_frozen_it_is_seen_to_stay_and_thawed_it_is_named(program: Program) -> None:
    with pytest.raises(fl.NotFrozenError):
        fl.assert_frozen(program.model, data=program.data, step=program.step)
    fl.freeze(program.model)
    fl.assert_frozen(program.model, data=program.data, step=program.step)


def by_optimizer(net: Any, batch: Any) -> Any:
    loss = F.mse_loss(net(batch), batch)
    loss.backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    return loss


def by_hand(net: Any, batch: Any) -> Any:
    loss = F.mse_loss(net(batch), batch)
    parameters = list(net.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        parameter.data -= 0.1 * gradient
    return loss


@pytest.mark.parametrize("step", [by_optimizer, by_hand])
def test_a_step_that_trains_is_refused_and_changes_nothing(step: Any) -> None:
    torch.manual_seed(0)
    net, x = layers(out=4), inputs(0)
    net[0].bias.grad = torch.ones(8)
    before = state(net)
    for verb in (fl.phases, fl.diagnose, fl.recalibrate):
        with pytest.raises(fl.ModelError, match="the step trains the model"):
            verb(net, [x, x], step=step)
        assert same(before, state(net))
        assert net[0].weight.grad is None
        assert torch.equal(net[0].bias.grad, torch.ones(8))


def adapted(net: Any, batch: Any, gradients: Any, buffers: Any) -> Any:
    """Loss of the second half after a step on the first one, as MAML takes it."""
    x, y = batch
    fast = {name: value - 0.02 * gradients[name] for name, value in net.named_parameters()}
    return F.cross_entropy(torch.func.functional_call(net, (fast, buffers), x[8:]), y[8:])


def maml(net: Any, batch: Any) -> Any:
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    loss = F.cross_entropy(net(batch[0][:8]), batch[1][:8])
    found = torch.autograd.grad(loss, list(named.values()), create_graph=True)
    return adapted(net, batch, dict(zip(named, found, strict=True)), {})


def choosing_maml(net: Any, batch: Any) -> Any:
    """It goes without an inner update, where nothing needs gradients."""
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    gradients = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    if named:
        with torch.enable_grad():
            loss = F.cross_entropy(net(batch[0][:8]), batch[1][:8])
            found = torch.autograd.grad(loss, list(named.values()))
        gradients.update(zip(named, found, strict=True))
    return adapted(net, batch, gradients, {})


def functional_maml(net: Any, batch: Any) -> Any:
    def loss(named: Any, buffers: Any) -> Any:
        out = torch.func.functional_call(net, (named, buffers), batch[0][:8])
        return F.cross_entropy(out, batch[1][:8])

    def lent() -> Any:
        return {name: value.clone() for name, value in net.named_buffers()}

    return adapted(net, batch, torch.func.grad(loss)(dict(net.named_parameters()), lent()), lent())


@pytest.mark.parametrize("step", [maml, choosing_maml, functional_maml])
def test_a_step_with_an_inner_update_is_asked_with_gradients(step: Any) -> None:
    torch.manual_seed(0)
    net, data = layers(), classes()
    net[1].running_mean.fill_(-9.0)
    before, flags = state(net), [p.requires_grad for p in net.parameters()]
    table = fl.phases(net, data, step=step)
    for phase in (0, 1):
        twin = copy.deepcopy(net).train(bool(phase))
        losses = [float(step(twin, batch).detach()) for batch in data]
        assert table[str(phase)].loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        forward = TorchForward(net, None, loss=None, step=step)  # λ reaches lent buffers, too
        found = [
            forward.outcome(Batch(batch[0], batch[1], whole=batch), Condition(phase, record=True))
            for batch in data
        ]
        assert [float(each.losses[0]) for each in found] == pytest.approx(losses, rel=1e-5)
        assert all("1" in each.moments for each in found)
    assert same(before, state(net))
    assert flags == [p.requires_grad for p in net.parameters()]
    assert all(parameter.grad is None for parameter in net.parameters())
    if step is not functional_maml:  # that one normalises with copies alone
        net[1].reset_running_stats()
        fl.recalibrate(net, data, step=step)
        seen: list[Any] = []
        hook = net[1].register_forward_hook(lambda _, given, __: seen.append(given[0].detach()))
        for batch in data:
            step(net.eval(), batch)
        hook.remove()
        torch.testing.assert_close(net[1].running_mean, torch.cat(seen).mean(0))


# --- models ---------------------------------------------------------------------------------------


class Unnamed(nn.Module):
    """Statistics under names that say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.register_buffer("m", torch.zeros(8))
        self.register_buffer("v", torch.ones(8))


class Functional(Unnamed):
    """Given to ``batch_norm``."""

    def forward(self, x: Any) -> Any:
        x = F.batch_norm(self.first(x), self.m, self.v, training=self.training, momentum=0.05)
        return self.last(x.relu())


def normalised(x: Any, mean: Any, variance: Any, training: bool) -> Any:
    return F.batch_norm(x, mean, variance, training=training, momentum=0.05)


class Elsewhere(Unnamed):
    """The call is in a function of the program's own."""

    def forward(self, x: Any) -> Any:
        return self.last(normalised(self.first(x), self.m, self.v, self.training).relu())


def classes() -> list[Any]:
    return [(inputs(shift), torch.arange(16) % 3) for shift in range(4)]


def test_statistics_of_any_name_that_batch_norm_gets_are_a_site() -> None:
    torch.manual_seed(0)
    net, data = Functional(), classes()
    assert [site.path for site in fl.sites(net)] == ["Functional"]
    report = fl.diagnose(net, data, loss=F.cross_entropy, verbose=0)
    assert [cause.code for cause in report.causes if cause.is_bn]
    fl.recalibrate(net, data)
    seen = net.first(torch.cat([x for x, _ in data]))
    torch.testing.assert_close(net.m, seen.mean(0))
    torch.testing.assert_close(net.v, seen.var(0, unbiased=False))
    fl.freeze(net)
    before = net.m.clone()
    net.train()
    net(data[0][0])
    assert torch.equal(net.m, before)


def test_bn_in_a_function_of_the_programs_own_is_not_acquitted() -> None:
    torch.manual_seed(0)
    net, data = Elsewhere(), classes()
    report = fl.diagnose(net, data, loss=F.cross_entropy, verbose=0)
    assert not report.verdict.startswith("not BN")
    assert "'Elsewhere' (a call of batch_norm)" in report.verdict
    with pytest.raises(fl.NotFrozenError, match="Elsewhere"):
        fl.assert_frozen(net, data=data)


class Textbook(nn.BatchNorm1d):
    """A subclass of torch's own that computes by hand."""

    def forward(self, x: Any) -> Any:
        mean, variance = self.running_mean, self.running_var
        if self.training:
            mean, variance = x.mean(0), x.var(0, unbiased=False)
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach(), self.momentum)
        return self.weight * (x - mean) / (variance + self.eps).sqrt() + self.bias


class Renormalised(nn.BatchNorm1d):
    """Batch renormalisation: in training close to inference, by hand."""

    def forward(self, x: Any) -> Any:
        scale = (self.running_var + self.eps).sqrt()
        if not self.training:
            return self.weight * (x - self.running_mean) / scale + self.bias
        mean, own = x.mean(0), (x.var(0, unbiased=False) + self.eps).sqrt()
        r = (own.detach() / scale).clamp(0.7, 1.4)
        d = ((mean.detach() - self.running_mean) / scale).clamp(-0.5, 0.5)
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(own.detach().square(), self.momentum)
        return self.weight * ((x - mean) / own * r + d) + self.bias


def test_a_subclass_that_computes_by_hand_is_measured_like_its_parent() -> None:
    torch.manual_seed(0)
    own, data = layers(), classes()
    other = copy.deepcopy(own)
    other[1] = Textbook(8)
    for net in (own, other):
        report = fl.diagnose(net, data, loss=F.cross_entropy, verbose=0)
        codes = [cause.code for cause in report.causes]
        assert codes == ["STATS_NEVER_UPDATED"], report
        fl.recalibrate(net, data)
    torch.testing.assert_close(own[1].running_mean, other[1].running_mean)
    torch.testing.assert_close(own[1].running_var, other[1].running_var)


def test_a_subclass_that_does_more_than_bn_is_named_and_not_measured() -> None:
    torch.manual_seed(0)
    net, data = layers(), classes()
    net[1] = Renormalised(8)
    report = fl.diagnose(net, data, loss=F.cross_entropy, verbose=0)
    assert "'1' (Renormalised) keeps running statistics" in report.verdict
    with pytest.raises(fl.ModelError, match="in a way that no BN does"):
        fl.recalibrate(net, data)
    fl.freeze(net)
    before = net[1].running_mean.clone()
    net.train()
    net(data[0][0])
    assert torch.equal(net[1].running_mean, before)


class Conditional(nn.Module):
    """A generator: what stands in the place of labels is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8, affine=False)
        self.scale, self.last = nn.Embedding(3, 8), nn.Linear(8, 5)

    def forward(self, noise: Any, y: Any) -> Any:
        return self.last((self.norm(self.first(noise)) * self.scale(y)).relu())


def test_a_model_that_needs_the_whole_batch_is_compared_by_outputs() -> None:
    torch.manual_seed(0)
    net, data = Conditional(), classes()
    report = fl.diagnose(net, data, verbose=0)
    assert [cause.code for cause in report.causes] == ["STATS_NEVER_UPDATED"], report
    found = fl.phases(net, data)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        (zero, one) = (torch.cat([twin.train(on)(*b) for b in data]) for on in (False, True))
    distance = float(((one - zero).square().mean() / zero.var(unbiased=False)).sqrt())
    row = next(row for row in found.rows if row.phase == "1")
    assert row.metrics["distance"] == pytest.approx(distance, rel=0.1)


# --- teachers -------------------------------------------------------------------------------------


class Taught(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = layers()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)


def taught(net: Any, batch: Any) -> Any:
    x, y = batch
    own = net.student(x)
    with torch.no_grad():
        wanted = net.teacher(x + 0.1)
    return F.cross_entropy(own, y) + F.mse_loss(own.softmax(1), wanted.softmax(1))


def moved_apart(net: Any) -> Any:
    with torch.no_grad():
        for parameter in net.student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    net.train()
    for _ in range(40):
        for batch in classes():
            taught(net, batch)
    return net


def test_a_mean_teacher_is_not_blamed_for_statistics_that_move() -> None:
    torch.manual_seed(0)
    net = moved_apart(Taught())
    report = fl.diagnose(net, classes(), step=taught, verbose=0)
    assert not [cause for cause in report.causes if cause.code == "FROZEN_DRIFT"], report
    (finding,) = [each for each in report.findings if each.code == "FL103"]
    assert finding.certainty == "may"
    assert "beside 'student/1'" in finding.message
    assert not [each for each in report.findings if each.code == "FL302"]


class Momentum(Taught):
    """A momentum encoder, which moves while the model is called in training mode."""

    def forward(self, one: Any, other: Any) -> Any:
        with torch.no_grad():
            if self.training:
                pairs = zip(self.student.parameters(), self.teacher.parameters(), strict=True)
                for own, average in pairs:
                    average.lerp_(own + 1, 0.1)
            keys = F.normalize(self.teacher(other), dim=1)
        logits = F.normalize(self.student(one), dim=1) @ keys.T / 0.1
        return F.cross_entropy(logits, torch.arange(len(one)))


@pytest.mark.parametrize("verb", ["phases", "diagnose", "assert_frozen", "watch", "recalibrate"])
def test_looking_at_a_momentum_encoder_does_not_move_it(verb: str) -> None:
    torch.manual_seed(0)
    net = Momentum()
    fl.freeze(net)
    data, before = [(inputs(0), inputs(1)), (inputs(1), inputs(2))], state(net)

    def watched() -> None:
        with fl.watch(net, data, step=lambda m, b: m(*b)) as seen:
            seen.check()

    calls: dict[str, Callable[[], Any]] = {
        "phases": lambda: fl.phases(net, data, step=lambda m, b: m(*b)),
        "diagnose": lambda: fl.diagnose(net, data, step=lambda m, b: m(*b), verbose=0),
        "assert_frozen": lambda: fl.assert_frozen(net, data=data, step=lambda m, b: m(*b)),
        "watch": watched,
        "recalibrate": lambda: fl.recalibrate(
            net, data, sites="all", step=lambda m, b: m(*b)
        ).undo(),
    }
    calls[verb]()
    assert same(before, state(net))


def test_sites_without_statistics_are_left_alone_unless_they_are_named() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(layers(out=8), nn.BatchNorm1d(8, track_running_stats=False))
    done = fl.recalibrate(net, inputs(1))
    assert "left alone: 1 BN layer(s) that keep no statistics ('1')" in str(done)
    assert not torch.equal(net[0][1].running_mean, torch.zeros(8))
    with pytest.raises(fl.ModelError, match="'1' keeps no statistics"):
        fl.recalibrate(net, inputs(1), sites="1")
    with pytest.raises(fl.ModelError, match="'1' keeps no statistics"):
        fl.recalibrate(net[1:], inputs(1))


def test_a_block_of_the_same_shape_before_those_that_train_is_no_teacher() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()) for _ in range(3)]
    net = nn.Sequential(*blocks, nn.Linear(4, 3))
    net[0].requires_grad_(False)
    net.train()
    for _ in range(40):
        for x, _ in classes():
            net(x)
    report = fl.diagnose(net, classes(), loss=F.cross_entropy, verbose=0)
    assert [cause for cause in report.causes if cause.code == "FROZEN_DRIFT"], report
    assert {each.code for each in report.findings} >= {"FL103", "FL302"}


def test_a_recalibration_reads_the_facts_once_at_most(monkeypatch: Any) -> None:
    """Once per site it read those of all sites: 80 sites took eighteen passes of the model."""
    from frostline.adapters.torch.adapter import TorchView
    from frostline.verbs import edit

    bare = nn.BatchNorm1d(4, track_running_stats=False)
    for extra, most in (((), 0), ((bare,), 1)):
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4), *extra)
        view, asked = TorchView(model), []

        def facts(known: Any = view.facts, asked: list[int] = asked) -> Any:
            asked.append(1)
            return known()

        view.facts = facts  # type: ignore[assignment]
        monkeypatch.setattr(edit, "adapter_of", lambda _, view=view: view)
        fl.recalibrate(model, inputs(1))
        assert len(asked) == most


def test_padding_to_the_longest_of_a_batch_is_no_wrong_operation() -> None:
    """KERNEL_BUG was said for sure: a batch of two is padded less than one of eight."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv1d(1, 8, 5, padding=2), nn.BatchNorm1d(8)
            self.head = nn.Linear(8, 3)

        def forward(self, values: Any, mask: Any, labels: Any) -> Any:
            x = F.relu(self.bn(self.conv(values[:, None])) + 1)
            x = F.relu(x.cumsum(2) / x.shape[2])
            out = self.head((x * mask[:, None]).sum(2) / mask.sum(1, keepdim=True))
            return {"loss": F.cross_entropy(out, labels), "logits": out}

    def collate(items: list[Any]) -> Any:
        longest = max(len(values) for values, _ in items)
        rows = [F.pad(values, (0, longest - len(values))) for values, _ in items]
        mask = [F.pad(torch.ones(len(v)), (0, longest - len(v))) for v, _ in items]
        labels = torch.tensor([label for _, label in items])
        return {"values": torch.stack(rows), "mask": torch.stack(mask), "labels": labels}

    torch.manual_seed(0)
    # One in four is long, so that small batches are padded to other lengths.
    long = [i % 4 == 0 and i >= 16 for i in range(64)]
    items = [(torch.randn(28 if long[i] else 8) + i % 3, i % 3) for i in range(64)]
    loader = torch.utils.data.DataLoader(items, batch_size=16, collate_fn=collate)
    net = Net()
    for _ in range(20):
        for batch in loader:
            net(**batch)
    report = fl.diagnose(net.eval(), loader, verbose=0, max_samples=64)
    found = {cause.code: cause for cause in report.causes}
    assert found["KERNEL_BUG"].certainty == "may"
    assert "padded to other lengths" in found["KERNEL_BUG"].message
    assert [point.padded for point in report.measurement.sweep if point.batch_size == 2] == [True]


def test_a_lost_epsilon_is_found_without_a_reference() -> None:
    """It was taken for an average that lags: the default of another framework was not tried."""
    torch.manual_seed(0)
    first, second = nn.BatchNorm1d(8, eps=1e-3), nn.BatchNorm1d(16, eps=1e-3)
    net = nn.Sequential(nn.Linear(4, 8), first, nn.ReLU(), nn.Linear(8, 16), second,
                        nn.ReLU(), nn.Linear(16, 3))  # fmt: skip
    net[0].weight.data *= 0.01
    net[6].weight.data *= 10
    x = torch.randn(512, 4)
    fl.recalibrate(net, x)
    labels = net.eval()(x).argmax(1)
    first.eps = second.eps = 1e-5
    report = fl.diagnose(net, (x, labels), loss=F.cross_entropy, verbose=0, max_samples=128)
    assert report.causes[0].code == "EPS_MISMATCH"
    assert report.causes[0].certainty == "may"
    assert report.remedies[0].name == "epsilon 0.001"
    exec(report.remedies[0].python, {"model": net})
    assert first.eps == 1e-3


def test_the_lines_for_an_exported_graph_are_such_that_run_there() -> None:
    """eval() raises an error on a graph, and there is no module with an eps."""
    from frostline.adapters.torch.adapter import TorchView

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, eps=1e-2), nn.ReLU())
    x = torch.randn(8, 1, 8, 8)
    net(x)
    wanted = copy.deepcopy(net).eval()(x)
    graph = torch.export.export(net.train(), (x,)).module()
    words = TorchView(graph).facts().words
    exec(words.inference_call, {"model": graph, "torch": torch})
    assert torch.allclose(graph(x), wanted, atol=1e-6)
    exec(words.epsilon_line.format(epsilon=1.0), {"model": graph, "torch": torch})
    net[1].eps = 1.0
    assert torch.allclose(graph(x), net.eval()(x), atol=1e-6)


def test_statistics_that_are_nan_have_not_moved() -> None:
    """A layer that diverged is still frozen, and folds into what it computes: NaN."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
    model[1].running_mean[0] = torch.nan
    x = torch.randn(4, 1, 6, 6)
    fl.freeze(model)
    fl.assert_frozen(model, data=x)
    torch.testing.assert_close(fl.fold(model, sample=x)(x), model.eval()(x), equal_nan=True)


@pytest.mark.parametrize(
    "verb",
    [
        fl.lint,
        fl.freeze,
        lambda model: fl.recalibrate(model, torch.randn(4, 2)),
        lambda model: fl.diagnose(model, torch.randn(4, 2)),
    ],
    ids=["lint", "freeze", "recalibrate", "diagnose"],
)
def test_a_model_without_values_says_how_to_load_them(verb: Callable[[Any], Any]) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(fl.ModelError, match=r"meta.*to_empty.*load_state_dict"):
        verb(model)
    assert len(fl.sites(model)) == 1


# --- what only training does, and what inference does by chance -----------------------------------


class Dropping(nn.Module):
    """Dropout by a function, in the forward pass of the model itself."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.body, self.head = layers(out=8), nn.Linear(8, 3)
        self.always = always

    def forward(self, x: Any) -> Any:
        drops = self.always or self.training
        return self.head(F.dropout(self.body(x).relu(), 0.6, training=drops))


def caught_up(net: Any) -> tuple[Any, list[Any]]:
    """Classes that the data tell, and averages that have caught up."""
    y = torch.arange(64) % 3
    data = [(torch.randn(64, 4) + 3 * F.one_hot(y, 4), y) for _ in range(3)]
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for turn in range(60):
        for x, y in data:
            net.train()
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            if turn < 30:
                optimizer.step()
    return net, data


def smoothed(net: Any, batch: Any) -> Any:
    return F.cross_entropy(net(batch[0]), batch[1], label_smoothing=0.5 * net.training)


@pytest.mark.parametrize(
    ("net", "judged"),
    [(lambda: Dropping(False), {"loss": F.cross_entropy}), (layers, {"step": smoothed})],
    ids=["dropout in a forward of its own", "a loss that depends on the mode"],
)
def test_what_only_training_does_is_told_where_no_layer_is_known_for_it(
    net: Any, judged: dict[str, Any]
) -> None:
    """It was "nothing that is known here", beside the gap of BN alone."""
    torch.manual_seed(0)
    net, data = caught_up(net())
    report = fl.diagnose(net, data, verbose=0, **judged)
    assert [str(cause.code) for cause in report.causes] == ["DROPOUT"], report.verdict
    probes = report.measurement.probes
    gap = probes["training"].loss - probes["inference"].loss
    assert report.causes[0].share > 0.8
    assert abs(gap) > 0.05


def test_a_random_inference_is_told_from_one_that_mixes_samples() -> None:
    """Neighbours were blamed, and BN for the dropout that λ turned off."""
    torch.manual_seed(0)
    net, data = caught_up(Dropping(True))
    report = fl.diagnose(net, data, loss=F.cross_entropy, verbose=0)
    assert [str(cause.code) for cause in report.causes] == ["DROPOUT"], report.verdict
    assert "inference is random" in report.verdict
    probes = report.measurement.probes
    assert probes["stored"].loss == probes["inference"].loss


# --- what a program writes into, and which mode it asks for ---------------------------------------


class Scaling(nn.Module):
    """Scales its inputs in place, and a loss that does so with its targets."""

    def __init__(self) -> None:
        super().__init__()
        self.body = layers()

    def forward(self, x: Any) -> Any:
        return self.body(x.sub_(1.0).div_(2.0))


def ignoring(outputs: Any, target: Any) -> Any:
    target.sub_(1).clamp_(0)
    return F.cross_entropy(outputs, target)


@pytest.mark.parametrize("kind", ["tensors", "arrays", "mappings"])
def test_what_a_program_writes_into_its_batch_does_not_reach_the_next_pass(kind: str) -> None:
    """Each pass saw what the one before had made of the samples, and so did the user's arrays."""
    torch.manual_seed(0)
    net = Scaling()
    x, y = torch.randn(48, 4) * 3 + 2, torch.arange(48) % 3
    net(x.clone())
    data: Any = [(x[i : i + 16], y[i : i + 16]) for i in (0, 16, 32)]
    if kind == "arrays":
        data = (x.numpy(), y.numpy())
    if kind == "mappings":
        data = [{"x": a, "labels": b} for a, b in data]
    kept = x.clone(), y.clone()
    wanted = ignoring(net.eval()(x.clone()), y.clone()).item()
    how = {"loss": ignoring, "batch_size": 16} if kind == "arrays" else {"loss": ignoring}
    table = fl.phases(net, data, **how)
    assert table["0"].loss == pytest.approx(wanted, rel=1e-5)
    report = fl.diagnose(net, data, verbose=0, **how)
    assert report.measurement.probes["inference"].loss == pytest.approx(wanted, rel=1e-5)
    fl.recalibrate(net, data)
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])


class Centred(nn.Module):
    """A loss that moves a centre of its own, as DINO's does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))

    def forward(self, outputs: Any, target: Any) -> Any:
        loss = F.cross_entropy(outputs - self.centre, target)
        self.centre = 0.5 * self.centre + outputs.detach().mean(0)
        return loss


def test_the_state_of_a_loss_is_as_before_at_every_pass() -> None:
    torch.manual_seed(0)
    net, loss = layers(), Centred()
    data = [(inputs(shift), torch.arange(16) % 3) for shift in range(3)]
    wanted = sum(F.cross_entropy(net.eval()(x), y).item() for x, y in data) / 3
    table = fl.phases(net, data, loss=loss)
    report = fl.diagnose(net, data, loss=loss, verbose=0)
    assert table["0"].loss == pytest.approx(wanted, rel=1e-5)
    assert report.measurement.probes["inference"].loss == pytest.approx(wanted, rel=1e-5)
    assert torch.equal(loss.centre, torch.zeros(3))


def test_a_step_that_calls_train_is_asked_at_inference_all_the_same() -> None:
    """It was FORCED_TRAIN, and the averages that lag were not seen."""

    def step(net: Any, batch: Any) -> Any:
        net.train()
        return F.cross_entropy(net(batch[0]), batch[1])

    torch.manual_seed(0)
    net = layers()
    data = [(torch.randn(32, 4) * 5 + 9, torch.arange(32) % 3) for _ in range(3)]
    step(net, data[0]).backward()
    twin = copy.deepcopy(net).eval()
    wanted = [F.cross_entropy(twin(x), y).item() for x, y in data]
    found = fl.phases(net, data, step=step)["0"].loss
    assert found == pytest.approx(sum(wanted) / 3, rel=1e-5)
    assert net.training
    assert "train" not in vars(net)


def test_a_loader_that_fills_one_buffer_is_seen_as_its_loop_sees_it() -> None:
    held = [(inputs(shift), torch.full((16,), shift % 3)) for shift in range(4)]

    class Loader:
        def __init__(self) -> None:
            self.x, self.y = torch.empty(16, 4), torch.empty(16, dtype=torch.long)

        def __iter__(self) -> Any:
            for x, y in held:
                self.x.copy_(x)
                self.y.copy_(y)
                yield self.x, self.y

    torch.manual_seed(0)
    net, loss = layers(), nn.CrossEntropyLoss()
    with torch.no_grad():
        losses = [float(loss(net.eval()(x), y)) for x, y in Loader()]
    assert fl.phases(net, Loader(), loss=loss)["0"].loss == pytest.approx(sum(losses) / 4)
    fl.recalibrate(net, Loader())
    seen = net[0](torch.cat([x for x, _ in held]))
    torch.testing.assert_close(net[1].running_mean, seen.mean(0), rtol=1e-5, atol=1e-6)


class Masks(nn.Module):
    """Takes rows that are padded with NaN, and normalises what is left of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = layers(out=8)[:3], nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        there = torch.isfinite(x).all(-1)
        rows = self.body(x[there])
        sums = x.new_zeros(*there.shape, 8).masked_scatter(there[..., None], rows).sum(1)
        return self.head(sums / there.sum(1, keepdim=True).clamp(min=1))


def test_padding_that_the_model_masks_is_no_broken_input() -> None:
    torch.manual_seed(0)
    net, data = Masks(), []
    for shift in range(4):
        x = torch.randn(16, 5, 4) + shift
        for row in range(16):
            x[row, 1 + row % 5 :] = float("nan") if row % 2 else float("-inf")
        data.append((x, torch.arange(16) % 3))
    seen: list[Any] = []
    hook = net.body[1].register_forward_hook(lambda _, given, __: seen.append(given[0].detach()))
    for x, _ in data:
        net.eval()(x)
    hook.remove()
    report = fl.diagnose(net, data, loss=nn.CrossEntropyLoss(), validation=data, max_samples=256)
    assert report.measurement.samples == 64
    assert len(report.measurement.probes["validation inference"].losses) == 64
    assert not report.measurement.probes["inference"].broken
    done = fl.recalibrate(net, data)
    assert "skipped" not in str(done)
    torch.testing.assert_close(net.body[1].running_mean, torch.cat(seen).mean(0))
    net.body[1].momentum = None  # a sample that it does not mask is left out, with its batch
    spoilt = [(x.nan_to_num(neginf=0.0), y) for x, y in data]
    net.forward = lambda x: net.head(net.body(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1))
    spoilt[0][0][3, 0, 0] = float("nan")
    assert fl.diagnose(net, spoilt, loss=nn.CrossEntropyLoss()).measurement.samples < 64
    assert "batch 0: x has NaN or infinite values" in str(fl.recalibrate(net, spoilt))


class Denoiser(nn.Module):
    """Two inputs, of which its step draws one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.time = layers(given=5, out=4), nn.Embedding(4, 1)

    def forward(self, x: Any, time: Any) -> Any:
        return self.body(torch.cat([x, self.time(time)], 1))


def test_as_many_tensors_as_the_model_takes_are_batches_to_a_step() -> None:
    """A list of two was taken for one batch of two arrays, and the step was told to fail."""

    def step(net: Any, batch: Any) -> Any:
        assert isinstance(batch, torch.Tensor)
        return F.mse_loss(net(batch, torch.arange(len(batch)) % 4), batch)

    torch.manual_seed(0)
    net, data = Denoiser(), [inputs(0), inputs(1)]
    assert fl.phases(net, data, step=step).samples == 32
    fl.diagnose(net, data, step=step, verbose=0)
    with fl.watch(net, data, step=step):
        pass
    fl.recalibrate(net, data, step=step)
    hidden = net.body[0](torch.cat([torch.cat(data), net.time(torch.arange(32) % 4)], 1))
    torch.testing.assert_close(net.body[1].running_mean, hidden.mean(0), rtol=1e-3, atol=1e-4)
    fl.freeze(net)
    fl.assert_frozen(net, data=data, step=step)


def test_a_step_gets_no_part_of_a_batch() -> None:
    """The second of two graphs of 40 nodes was cut at 64 samples, its edges were not."""

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = layers()

        def forward(self, x: Any, edges: Any) -> Any:
            return self.body(edges @ x)

    def step(net: Any, batch: Any) -> Any:
        x, edges, y, mask = batch
        return F.cross_entropy(net(x, edges)[mask], y[mask])

    torch.manual_seed(0)
    y = torch.arange(40) % 3
    data = [(torch.randn(40, 4), torch.eye(40), y, y > 0) for _ in range(3)]
    net = Graph()
    with fl.watch(net, data, step=step, max_samples=60):
        pass
    fl.freeze(net)
    fl.assert_frozen(net, data=data, step=step)


def test_a_treatment_under_which_no_parameter_trains_is_named() -> None:
    torch.manual_seed(0)
    net, data = layers(), [(torch.randn(8, 4), torch.arange(8) % 3)]
    net[0].requires_grad_(False), net[3].requires_grad_(False)
    ways: Any = {"loss": F.cross_entropy, "epochs": 1, "verbose": 0}
    ways["optimizer"] = lambda parameters: torch.optim.SGD(parameters, 0.1)
    found = fl.compare(net, data, validation=data, **ways)
    assert found.skipped["all-bn-frozen"].startswith("no parameter trains under this treatment")
    net.requires_grad_(False)
    with pytest.raises(fl.ModelError, match=r"no parameter trains.*unfreeze"):
        fl.compare(net, data, validation=data, **ways)
    fl.unfreeze(net, since=3)
    assert fl.compare(net, data, validation=data, **ways).rows


class Transductive(nn.Module):
    """All nodes of one graph are the batch: their matrix is the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", torch.eye(40).roll(1, 0))
        self.body = layers()

    def forward(self, x: Any) -> Any:
        return self.body(self.edges @ x)


def in_classes(net: Any, batch: Any) -> Any:
    return F.cross_entropy(net(batch[0]), batch[1])


@pytest.mark.parametrize("judged", [{"step": in_classes}, {"loss": F.cross_entropy}, {}])
def test_a_batch_is_diagnosed_whole_where_the_model_takes_no_part_of_it(judged: Any) -> None:
    torch.manual_seed(0)
    net, data = Transductive(), [(torch.randn(40, 4) * 2 + 1, torch.arange(40) % 3)]
    report = fl.diagnose(net, data, validation=data, verbose=0, max_samples=20, **judged)
    with torch.no_grad():
        own = F.cross_entropy(net.eval()(data[0][0]), data[0][1]).item()
    assert report.measurement is not None
    for name in ("inference", "validation inference"):
        assert report.measurement.probes[name].loss == pytest.approx(own, rel=1e-5)
    assert "taken as they come: the model takes no part" in report.measurement.notes[0]
    with pytest.raises(fl.ModelError, match="pass a list of them"):
        fl.diagnose(net, iter(data), verbose=0, **judged)


def test_a_step_that_fails_on_whole_batches_too_says_what_it_raised() -> None:
    data = [(torch.randn(40, 4), torch.arange(40) % 3)]
    with pytest.raises(fl.ModelError, match="ZeroDivisionError"):
        fl.diagnose(Transductive(), data, step=lambda *_: 1 / 0, verbose=0)


def classify(net: Any, data: Any) -> None:
    """Train on batches of inputs and labels for ten epochs."""
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(10):
        for batch, labels in data:
            loss = F.cross_entropy(net(batch), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


class Experts(nn.Module):
    """Each sees the rows that are routed to it, and none alone: BN needs two of them."""

    def __init__(self) -> None:
        super().__init__()
        norm = {"momentum": 0.01}
        self.stem = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, **norm), nn.ReLU())
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, **norm), nn.ReLU()) for _ in range(3)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Any) -> Any:
        route = (x[:, 0] > 1.6).long() + (x[:, 0] > 2.4).long()
        hidden = self.stem(x)
        made = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            rows = (route == number).nonzero().flatten()
            if len(rows) > 1:
                made = made.index_copy(0, rows, expert(hidden[rows]))
        return self.head(made)


def test_experts_that_the_rows_pick_are_no_wrong_operation() -> None:
    """KERNEL_BUG acquitted BN, and a KeyError stood among what was not checked."""
    torch.manual_seed(0)
    y = torch.arange(48) % 4
    x = torch.randn(48, 6) * 0.8 + 2
    x[:, 1] += y
    data = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 48, 16)]
    net = Experts()
    classify(net, data)
    report = fl.diagnose(net, data, loss=F.cross_entropy, verbose=0)
    assert report.causes[0].code == "EMA_LAG", report.verdict
    assert "KeyError" not in str(report)
    assert all(cause.certainty == "may" for cause in report.causes if cause.code == "KERNEL_BUG")


def test_models_that_are_called_at_once_acquit_nobody() -> None:
    """``torch.vmap`` hands BN the statistics of all of them, which no site keeps."""

    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList(layers() for _ in range(2))

        def forward(self, x: Any) -> Any:
            if self.training:
                return torch.stack([member(x) for member in self.members], 1)
            states = torch.func.stack_module_state(list(self.members))

            def called(*state: Any) -> Any:
                return torch.func.functional_call(self.members[0], state, (x,))

            return torch.vmap(called, out_dims=1)(*states)

    def loss(outputs: Any, labels: Any) -> Any:
        return F.cross_entropy(outputs.mean(1), labels)

    torch.manual_seed(0)
    net = Ensemble()
    data = [(inputs(0) + 3, torch.arange(16) % 3) for _ in range(3)]
    report = fl.diagnose(net, data, loss=loss, verbose=0)
    assert "BN is not ruled out; pass step=" in report.verdict

    def step(m: Any, batch: Any) -> Any:
        return loss(torch.stack([member(batch[0]) for member in m.members], 1), batch[1])

    looked = fl.diagnose(net, data, step=step, verbose=0)
    assert looked.causes[0].is_bn
    assert "not ruled out" not in looked.verdict
    with pytest.raises(fl.FrostlineError, match=r"torch\.vmap.*Pass data, or step="):
        fl.recalibrate(net, data)


class Handed(nn.Module):
    """Hands the statistics of a layer to the function, with its own flag: nothing counts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.norm.momentum = 0.01
        self.last = nn.BatchNorm1d(3, momentum=0.01)

    def forward(self, x: Any) -> Any:
        norm, hidden = self.norm, self.first(x)
        kept = norm.running_mean, norm.running_var, norm.weight, norm.bias
        hidden = F.batch_norm(hidden, *kept, self.training, norm.momentum, norm.eps)
        return self.last(self.head(F.relu(hidden)))


def handed() -> tuple[Any, list[Any]]:
    torch.manual_seed(0)
    y = torch.arange(48) % 3
    x = torch.randn(48, 4) + 2 + y[:, None]
    data = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 48, 16)]
    net = Handed()
    classify(net, data)
    return net, data


def test_statistics_that_a_function_moved_were_updated() -> None:
    """STATS_NEVER_UPDATED was said: the layer that owns them has counted nothing."""
    net, data = handed()
    assert int(net.norm.num_batches_tracked) == 0
    assert float(net.norm.running_mean.abs().max()) > 0.1
    report = fl.diagnose(net, data, loss=F.cross_entropy, verbose=0)
    assert [cause.code for cause in report.causes if cause.code != "DOMAIN_STATS"] == ["EMA_LAG"]
    assert set(report.causes[0].sites) == {"norm", "last"}


class Stored(Handed):
    """Hands them over to be read, in any mode."""

    def train(self, mode: bool = True) -> Any:
        return super().train(False)


def test_what_only_reads_the_statistics_of_a_layer_is_asked_with_data() -> None:
    net, data = Stored(), handed()[1]
    assert fl.freeze(net).notes
    with pytest.raises(fl.NotFrozenError, match="data= shows whether"):
        fl.assert_frozen(net)
    fl.assert_frozen(net, data=data)
    graph = torch.fx.symbolic_trace(net.eval())  # the calls of a graph are known
    assert not fl.freeze(graph).notes
    fl.assert_frozen(graph)
    within = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Stored())
    fl.freeze(within, "2")
    fl.assert_frozen(within, "2")
    fl.freeze(within)
    with pytest.raises(fl.NotFrozenError, match=r"1 of 3 .*'2': a Stored that may hand"):
        fl.assert_frozen(within)


def test_what_a_freeze_cannot_lock_is_told_so() -> None:
    """The advice was to freeze the model, and it was frozen."""
    net, data = handed()
    change = fl.freeze(net)
    assert "Handed may hand the statistics of a layer to a function" in change.notes[0]
    with pytest.raises(fl.NotFrozenError, match=r"'Handed': .*; data= shows whether.*No flag"):
        fl.assert_frozen(net)
    with pytest.raises(fl.NotFrozenError, match=r"'norm'.*whatever its flags say.*No flag reaches"):
        fl.assert_frozen(net, data=data)
    fl.unfreeze(net)
    with pytest.raises(fl.NotFrozenError, match=r"frostline\.freeze\(model, until\) locks them"):
        fl.assert_frozen(net, data=data)
