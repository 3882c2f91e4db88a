"""Programs of TorchScript and of ``torch.export``: asked through modules that read them."""

from __future__ import annotations

import copy
import io
import os
from typing import Any

import pytest

import frostline as fl
from frostline.types import ModelError

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn
from torch.nn import functional as F

from frostline.adapters import adapter_of
from frostline.adapters.torch import script
from frostline.adapters.torch.graph import unwrapped

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),  # of torch, on any copy
]


def shifted(x: torch.Tensor, by: float) -> torch.Tensor:
    return x + by


class OwnNorm(nn.Module):
    """Normalises by a function, with statistics of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, var = self.running_mean, self.running_var
        return F.batch_norm(x, mean, var, None, None, self.training, 0.2)


class Net(nn.Module):
    """Loops, conditions, lists, a function of its own, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, momentum=0.3)
        self.blocks = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1, groups=2), OwnNorm(6)])
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, twice: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.norm(self.conv(x)))
        for block in self.blocks:
            x = x + block(x)
        if twice:
            x = 2 * x
        rows: list[torch.Tensor] = []
        for index in range(x.size(0)):
            rows.append(shifted(x[index], 0.5 * index / x.size(0)))  # noqa: PERF401
        pooled = torch.stack(rows).mean([2, 3]).view(x.size(0), -1)
        return self.head(self.dropout(pooled)), pooled


def net() -> tuple[Any, Any]:
    """A module with statistics that two batches have left, and a batch."""
    torch.manual_seed(0)
    model, x = Net().train(), torch.randn(8, 3, 6, 6)
    model(x), model(x + 1)
    return model, x


def loaded(program: Any) -> Any:
    stream = io.BytesIO()
    torch.jit.save(program, stream)
    stream.seek(0)
    return torch.jit.load(stream)


def loss(model: Any, batch: Any) -> Any:
    return F.cross_entropy(model(batch[0])[0], batch[1])


@pytest.mark.parametrize("made", [torch.jit.script, lambda m: loaded(torch.jit.script(m))])
def test_a_reading_computes_what_the_program_computes(made: Any) -> None:
    model, x = net()
    program = made(copy.deepcopy(model))
    reading = unwrapped(program)
    assert unwrapped(program) is reading is not program
    for training in (True, False):
        program.train(training)
        script.brought_up(reading)
        assert reading.training == reading.norm.training == training
        for given in ((x,), (x, True)):
            twin = copy.deepcopy(reading)
            torch.manual_seed(1)
            wanted = program(*given)
            torch.manual_seed(1)
            found = twin(*given)
            assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
            for name, tensor in program.state_dict().items():  # updates as well
                assert torch.equal(tensor, twin.state_dict()[name]), name
            reading.load_state_dict(model.state_dict())
    kinds = [(site.path, site.kind) for site in fl.sites(program)]
    assert kinds == [("norm", "BatchNorm2d"), ("blocks/1", "OwnNorm")]


def test_recalibrating_a_program_is_recalibrating_its_module() -> None:
    model, x = net()
    program = torch.jit.script(copy.deepcopy(model))
    for each in (model, program):
        fl.recalibrate(each, [(x,), (x - 1,)], sites="all")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(program.state_dict()[name], tensor, rtol=1e-6, atol=1e-7)


def test_a_frozen_program_stays_frozen() -> None:
    model, x = net()
    program, data = torch.jit.script(model), [(x, torch.arange(8) % 2)]
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    modes = [module.training for module in program.modules()]
    change = fl.freeze(program)
    program.train()
    with torch.no_grad():
        program(x * 3)
    moved = [n for n, t in program.state_dict().items() if not torch.equal(t, before[n])]
    assert not moved
    assert not any(parameter.requires_grad for parameter in program.parameters())
    fl.assert_frozen(program, data=data, step=loss)
    fl.unfreeze(program, since="blocks/1")
    with pytest.raises(fl.NotFrozenError, match="blocks/1"):
        fl.assert_frozen(program, data=data, step=loss)
    change.undo()
    assert [module.training for module in program.modules()] == modes
    assert all(parameter.requires_grad for parameter in program.parameters())
    with torch.no_grad():
        program(x * 3)
    assert not torch.equal(program.norm.running_mean, before["norm.running_mean"])


def test_a_traced_program_normalises_as_it_was_traced() -> None:
    model, x = net()
    traced = torch.jit.trace(model.eval(), x)
    assert all(site.stats_frozen for site in fl.sites(traced))
    fl.freeze(traced)
    fl.assert_frozen(traced, data=x)
    with pytest.raises(ModelError, match="statistics=False"):
        fl.unfreeze(traced)
    fl.unfreeze(traced, statistics=False)
    assert all(parameter.requires_grad for parameter in traced.parameters())
    with pytest.raises(ModelError, match="number in its code"):
        fl.set_momentum(traced, 0.5)
    learning = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    traced = torch.jit.trace(learning, x, check_trace=False)
    with pytest.raises(ModelError, match=r"trace it in eval\(\)"):
        fl.phases(traced, x)


def test_parts_of_a_program() -> None:
    """Folded, split and cached: with the numbers of the program itself."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4),
        nn.ReLU(), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip
    x = torch.randn(8, 3, 6, 6)
    model(x)
    for program in (torch.jit.script(copy.deepcopy(model)), torch.jit.trace(model.eval(), x)):
        with torch.no_grad():
            wanted = program.eval()(x)
        folded = fl.fold(program)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        torch.testing.assert_close(folded(x), wanted, rtol=1e-4, atol=1e-5)
        fl.freeze(program, until="3")
        parts = fl.split(program, sample=x)
        torch.testing.assert_close(parts.suffix.eval()(parts.prefix(x)), wanted)
        own = {id(parameter) for parameter in program.parameters()}
        assert {id(parameter) for parameter in parts.suffix.parameters()} <= own
        answers = fl.cached(program, [x])
        for _ in range(3):
            for batch in answers:
                torch.testing.assert_close(program.eval()(batch), wanted)
        assert answers.answered == 2 * len(x)
        assert not isinstance(vars(program).get("forward"), type(loss))  # its own again


def test_what_is_refused() -> None:
    model, x = net()
    program = torch.jit.script(model)
    with pytest.raises(ModelError, match=r"torch\.jit\.load"):
        fl.freeze(copy.deepcopy(program))

    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.jit.wait(torch.jit.fork(self.norm, x))

    forking = torch.jit.script(Fork())
    assert [site.path for site in fl.sites(forking)] == ["norm"]
    with pytest.raises(ModelError, match="is not known to Frostline"):
        fl.recalibrate(forking, x)


def test_an_exported_graph_is_frozen_and_cut() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2),
        nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2),
    )  # fmt: skip
    x = torch.randn(8, 3, 6, 6)
    model(x)
    graph: Any = torch.export.export(model.eval(), (x,)).module()
    with torch.no_grad():
        wanted = graph(x)
    assert all(site.stats_frozen for site in fl.sites(graph))
    with pytest.raises(ModelError, match="statistics=False"):
        fl.unfreeze(graph)
    folded = fl.fold(graph, sample=x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    torch.testing.assert_close(folded(x), wanted, rtol=1e-4, atol=1e-5)
    fl.freeze(graph, until="3")
    fl.assert_frozen(graph, data=x, until="3")
    parts = fl.split(graph, sample=x)
    torch.testing.assert_close(parts.suffix.train()(parts.prefix(x)), wanted)
    own = {id(parameter) for parameter in graph.parameters()}
    assert {id(parameter) for parameter in parts.suffix.parameters()} <= own
    answers = fl.cached(graph, [x])
    for _ in range(2):
        for batch in answers:
            torch.testing.assert_close(graph(batch), wanted)
    assert answers.answered == len(x)


@pytest.mark.parametrize("training", [False, True])
def test_sites_of_a_graph_are_what_its_calls_say(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.03))
    x = torch.randn(4, 3, 6, 6)
    graph: Any = torch.export.export(model.train(training), (x,)).module()
    (site,) = fl.sites(graph)
    assert (site.epsilon, site.decay, site.stats_frozen) == (1e-3, 0.97, not training)
    assert not adapter_of(graph).difference(model, x.numpy()).epsilons
    if training:
        with pytest.raises(ModelError, match="exported in training mode"):
            fl.freeze(graph)
        with pytest.raises(ModelError, match=r"export it in eval\(\)"):
            fl.fold(graph, sample=x)


def test_a_head_that_was_not_traced() -> None:
    """Torch keeps its weights, without a forward."""

    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(3, 2, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.norm(x)) if self.training else self.norm(x)

    x = torch.randn(4, 3, 6, 6)
    traced = torch.jit.trace(WithHead().eval(), x)
    fl.recalibrate(traced, x, sites="all")
    torch.testing.assert_close(traced.norm.running_mean, x.mean((0, 2, 3)))
    fl.freeze(traced)
    assert not any(parameter.requires_grad for parameter in traced.parameters())


class Around(nn.Module):
    """A plain module around a program."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6, 2)
        self.inner = nn.ModuleDict({"body": made(body)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.inner["body"](x)).mean([2, 3]))


def batches_of_two_classes() -> list[Any]:
    torch.manual_seed(1)
    return [(torch.randn(8, 3, 6, 6) + shift, torch.arange(8) % 2) for shift in range(3)]


@pytest.mark.parametrize("how", ["scripted", "traced at inference"])
def test_a_program_inside_of_a_module_is_asked_as_its_module(how: str) -> None:
    def made(body: Any) -> Any:
        if how == "scripted":
            return torch.jit.script(body)
        return torch.jit.trace(body.eval(), torch.randn(4, 3, 6, 6))

    net, plain, data = Around(made), Around(lambda body: body), batches_of_two_classes()
    program = net.inner["body"]
    loss, x = nn.CrossEntropyLoss(), torch.cat([x for x, _ in data])
    assert [site.path for site in fl.sites(net)] == ["norm", "inner/body/1"]
    if how != "scripted":
        fl.freeze(plain.inner["body"])
    for phase in "01":
        mine, wanted = (fl.phases(each, data, loss=loss)[phase].loss for each in (net, plain))
        assert mine == pytest.approx(wanted, rel=1e-6)
    for each in (net, plain):
        fl.recalibrate(each, data)
    wanted = plain.state_dict()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)
    assert net.inner["body"] is program
    torch.testing.assert_close(fl.fold(net)(x), net.eval()(x), rtol=1e-4, atol=1e-5)
    fl.freeze(net.inner["body"])
    before = copy.deepcopy({name: t for name, t in net.state_dict().items() if "inner" in name})
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    cached = fl.cached(net.train(), data)
    for _ in range(3):
        for inputs, labels in cached:
            optimizer.zero_grad()
            loss(net(inputs), labels).backward()
            optimizer.step()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    fl.freeze(net)
    fl.assert_frozen(net, data=data)
    if how == "scripted":
        fl.unfreeze(net)
        net.train()(x)
        assert not torch.equal(net.state_dict()["inner.body.1.running_mean"],
                               before["inner.body.1.running_mean"])  # fmt: skip


def test_a_program_that_cannot_be_read_is_named_and_not_acquitted() -> None:
    net = Around(lambda body: torch.jit.trace(body, torch.randn(4, 3, 6, 6)))
    data = batches_of_two_classes()
    assert [site.path for site in fl.sites(net)] == ["norm"]
    report = fl.diagnose(net, data, loss=nn.CrossEntropyLoss())
    assert "'inner/body/1'" in report.verdict
    assert not report.verdict.startswith("not BN")
    assert "'inner/body/1'" in str(fl.freeze(net))
    with pytest.raises(fl.NotFrozenError, match="inner/body/1"):
        fl.assert_frozen(net, data=data)
    x = data[0][0]
    torch.testing.assert_close(fl.fold(net)(x), net.eval()(x), rtol=1e-4, atol=1e-5)
