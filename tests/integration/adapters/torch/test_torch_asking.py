"""How a model is called and judged, held to the library's own loss and the model's own modes."""

from __future__ import annotations

import collections
import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
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
from frostline.adapters.torch.adapter import TorchView
from frostline.adapters.torch.forward_pass import noise_layers
from frostline.data.batch import Batch
from frostline.types import DataError, ModelError

RNG = np.random.default_rng(0)
X = RNG.normal(0.5, 2, (12, 3, 8, 8)).astype("float32")
Y = RNG.integers(0, 4, 12)
IMAGES, LABELS = torch.as_tensor(X), torch.as_tensor(Y)


def body() -> Any:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(6)
    norm.running_mean.uniform_(-1, 1)
    layers = (nn.Conv2d(3, 6, 3), norm, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(6, 4))


def contrastive(outputs: Any, _: Any) -> Any:
    z = functional.normalize(outputs, dim=1)
    return functional.cross_entropy(z @ z.T / 0.1, torch.arange(len(z)))


def correlation(outputs: Any, targets: Any) -> Any:
    a, b = outputs[:, 0], targets.float()
    a, b = a - a.mean(), b - b.mean()
    return 1 - (a * b).mean() / (a.std() * b.std())


class Dice(nn.modules.loss._Loss):
    """Has a ``reduction`` and ignores it, as segmentation libraries do."""

    def forward(self, outputs: Any, targets: Any) -> Any:
        p, t = outputs.softmax(1), functional.one_hot(targets, 4)
        return 1 - 2 * (p * t).sum() / (p.square().sum() + t.sum())


def weighted(outputs: Any, targets: Any) -> Any:
    return functional.cross_entropy(outputs, targets, torch.tensor([1.0, 2.0, 0.5, 9.0]))


@pytest.mark.parametrize("loss", [contrastive, correlation, Dice(), weighted])
def test_a_loss_of_the_whole_batch_is_computed_on_it_alone(loss: Any) -> None:
    model = body()
    forward = TorchView(model).blend_forward(loss=loss)
    found = forward.outcome(Batch(X, Y), Condition(0.0))
    with torch.no_grad():
        wanted = float(loss(copy.deepcopy(model).eval()(IMAGES), LABELS))
        training = float(loss(copy.deepcopy(model).train()(IMAGES), LABELS))
    assert (found.unit, found.losses.shape) == ("batch", (1,))
    assert found.losses[0] == pytest.approx(wanted, rel=1e-5)
    assert forward.own(Batch(X, Y), training=True).losses[0] == pytest.approx(training, rel=1e-4)
    losses, slope = forward.gradient(Batch(X, Y), Condition(0.5))
    assert losses.shape == (1,)
    high, low = (
        forward.outcome(Batch(X, Y), Condition(blend=0.5 + d)).losses[0] for d in (1e-3, -1e-3)
    )
    assert slope[0] == pytest.approx((high - low) / 2e-3, rel=0.05)
    with pytest.raises(DataError, match="sample weights need a loss per sample"):
        forward.outcome(Batch(X, Y, np.ones(12, "float32")), Condition(0.0))


def test_a_loss_that_stops_being_one_of_samples_is_an_error() -> None:
    def moody(outputs: Any, targets: Any) -> Any:
        return functional.cross_entropy(outputs, targets) if len(outputs) != 5 else outputs.std()

    forward = TorchView(body()).blend_forward(loss=moody)
    assert forward.outcome(Batch(X, Y), Condition(0.0)).unit == "sample"
    with pytest.raises(DataError, match="do not average or add up to the loss of this batch"):
        forward.outcome(Batch(X[:5], Y[:5]), Condition(0.0))


@dataclass
class Output:
    logits: Any
    loss: Any = None
    note: str = "no number"


class Hugging(nn.Module):
    """As transformers has it: named inputs, labels inside, its own loss, a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = body()

    def forward(self, pixel_values: Any, mask: Any = None, labels: Any = None) -> Any:
        logits = self.net(pixel_values)
        loss = None if labels is None else functional.cross_entropy(logits, labels)
        return Output(logits, loss)


def test_a_mapping_goes_in_by_name_and_the_models_loss_is_taken() -> None:
    model = Hugging()
    given = {"pixel_values": IMAGES, "labels": LABELS, "index": torch.arange(12)}
    batch = Batch(given, whole=given)
    forward = TorchView(model).blend_forward()
    found = forward.outcome(batch, Condition(0.0))
    with torch.no_grad():
        wanted = copy.deepcopy(model).eval()(IMAGES, labels=LABELS)
    assert (found.unit, found.losses[0]) == ("batch", pytest.approx(float(wanted.loss), rel=1e-6))
    np.testing.assert_array_equal(found.outputs["logits"], wanted.logits)
    assert set(found.outputs) == {"logits"}  # no single number is an output of samples
    inside = TorchView(model).blend_forward(
        loss=lambda outputs, labels: functional.cross_entropy(outputs.logits, labels)
    )
    assert inside.outcome(batch, Condition(0.0)).losses.mean() == pytest.approx(float(wanted.loss))


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = body()

    def forward(self, batch: Any) -> Any:
        return self.net(batch["image"]) * batch["scale"]


def test_a_mapping_whose_keys_are_not_named_goes_in_as_one_argument() -> None:
    given = {"image": IMAGES, "scale": 2.0, "label": LABELS}
    forward = TorchView(Whole()).blend_forward(loss=nn.CrossEntropyLoss())
    found = forward.outcome(Batch(given, whole=given), Condition(0.0))
    with torch.no_grad():
        wanted = functional.cross_entropy(Whole().eval()(given), LABELS)
    assert found.losses.mean() == pytest.approx(float(wanted), rel=1e-6)


class Detector(nn.Module):
    """As torchvision has it: losses in training mode only, lists of images and of mappings."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = body(), nn.Dropout(0.5)

    def forward(self, images: list[Any], targets: Any = None) -> Any:
        logits = functional.dropout(self.drop(self.net(torch.stack(images))), 0.3, self.training)
        if not self.training:
            return [{"scores": each.softmax(0)} for each in logits]
        if targets is None:
            raise ValueError("In training mode, targets should be passed")
        labels = torch.stack([each["label"] for each in targets])
        return {"class": functional.cross_entropy(logits, labels), "size": logits.square().mean()}


def test_losses_that_exist_in_training_mode_only() -> None:
    model = Detector().train()
    images, targets = list(IMAGES), [{"label": each} for each in LABELS]
    batch = Batch(images, targets, whole=(images, targets))
    before = copy.deepcopy(model.state_dict())

    def by_hand(training: bool) -> dict[str, float]:
        twin = copy.deepcopy(model.net).train(training)
        with torch.no_grad():
            logits = twin(IMAGES)
            loss = functional.cross_entropy(logits, LABELS)
            return {"class": float(loss), "size": float(logits.square().mean())}

    for loss in (None, lambda outputs, _: sum(outputs.values())):
        forward = TorchView(model).blend_forward(loss=loss)
        for blend in (0.0, 1.0):
            found, wanted = forward.outcome(batch, Condition(blend)), by_hand(blend == 1)
            assert found.unit == "batch"
            assert found.losses[0] == pytest.approx(sum(wanted.values()), rel=1e-5)
            if loss is None:
                assert {k: v[0] for k, v in found.parts.items()} == pytest.approx(wanted, rel=1e-5)
        own = forward.own(batch, training=False)
        assert own.losses[0] == pytest.approx(sum(by_hand(False).values()), rel=1e-5)
    assert model.training
    assert model.drop.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    behaviour = TorchView(model).behaviour([(images, targets)])["net/1"]
    assert (behaviour.training, behaviour.inference, behaviour.moves) == (1.0, 0.0, True)


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.aux = body(), nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

    def forward(self, x: Any) -> Any:
        return (self.net(x), self.aux(x)) if self.training else self.net(x)


def test_main_and_auxiliary_in_training_but_main_alone_at_inference() -> None:
    model = Auxiliary()
    forward = TorchView(model).blend_forward(loss=nn.CrossEntropyLoss())
    with torch.no_grad():
        wanted = functional.cross_entropy(copy.deepcopy(model).train()(IMAGES)[0], LABELS)
    assert forward.own(Batch(X, Y), training=True).losses.mean() == pytest.approx(float(wanted))
    assert forward.outcome(Batch(X, Y), Condition(1.0)).losses.mean() == pytest.approx(
        float(wanted)
    )


def test_the_users_step() -> None:
    model = body()

    def step(net: Any, batch: Any) -> Any:
        x, y, _ = batch
        logits = net(x)
        losses = {"ce": functional.cross_entropy(logits, y), "l2": 0.1 * logits.square().mean()}
        return losses, {"accuracy": (logits.argmax(1) == y).float()}

    batch = Batch(X, Y, whole=(IMAGES, LABELS, torch.arange(12)))
    found = TorchView(model).blend_forward(step=step).outcome(batch, Condition(0.0, record=True))
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(IMAGES)
        ce = float(functional.cross_entropy(logits, LABELS))
        l2 = 0.1 * float(logits.square().mean())
    assert found.unit == "batch"
    assert found.losses[0] == pytest.approx(ce + l2, rel=1e-5)
    assert found.parts["ce"][0] == pytest.approx(ce, rel=1e-5)
    assert found.metrics["accuracy"].shape == (12,)
    assert found.moments["1"].count == 12 * 36
    each = TorchView(model).blend_forward(
        step=lambda net, b: functional.cross_entropy(net(b[0]), b[1], reduction="none")
    )
    assert each.outcome(batch, Condition(0.0)).losses.shape == (12,)


Pair = collections.namedtuple("Pair", "logits scale")


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = body()

    def forward(self, x: Any, scale: float = 1.0) -> Any:
        return Pair(self.net(x) * scale, scale)


def test_named_tuples_scalars_and_arguments_with_defaults() -> None:
    loss = nn.CrossEntropyLoss()
    forward = TorchView(Outputs()).blend_forward(loss=lambda out, y: loss(out.logits, y))
    found = forward.outcome(Batch(X, Y), Condition(0.0))
    with torch.no_grad():
        wanted = loss(Outputs().eval()(IMAGES).logits, LABELS)
    assert found.losses.mean() == pytest.approx(float(wanted), rel=1e-5)
    assert [each.shape for each in found.outputs] == [(12, 4)]


def test_no_loss_is_said() -> None:
    with pytest.raises(ModelError, match=r"pass loss=.*or step="):
        TorchView(body()).blend_forward().outcome(Batch(X, Y), Condition(0.0))
    forward = TorchView(body()).blend_forward(loss=lambda outputs, _: outputs["no"])
    with pytest.raises(DataError, match="does not take these outputs"):
        forward.outcome(Batch(X, Y), Condition(0.0))


class Two(nn.Module):
    """Needs two arguments, as a critic does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, observation: Any, action: Any) -> Any:
        return self.net(torch.cat([observation, action], 1))


def test_the_arguments_that_forward_needs_are_the_first_items_of_a_batch() -> None:
    model, generator = Two(), torch.Generator().manual_seed(0)
    items = [3 * torch.randn(24, size, generator=generator) for size in (3, 2, 1)]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*items), batch_size=8)
    with torch.no_grad():
        outputs = copy.deepcopy(model).eval()(*items[:2])
    wanted = float(functional.mse_loss(outputs, items[2]))
    for data in (loader, tuple(items), list(loader)):
        table = fl.phases(model, data, loss=functional.mse_loss)
        assert table["0"].loss == pytest.approx(wanted, rel=1e-5)
    fl.recalibrate(model, loader)
    seen = model.net[0](torch.cat(items[:2], 1)).detach()
    assert torch.allclose(model.net[1].running_mean, seen.mean(0), atol=1e-5)
    assert torch.allclose(model.net[1].running_var, seen.var(0, unbiased=False), rtol=1e-5)


@pytest.mark.parametrize("method", ["sequential", "batch"])
def test_recalibration_by_a_step_that_runs_in_training_mode_only(method: Any) -> None:
    model, twin = Detector(), Detector()
    twin.load_state_dict(model.state_dict())
    named = [{"label": label} for label in LABELS]
    batches = [(list(IMAGES[i : i + 4]), named[i : i + 4]) for i in (0, 4, 8)]

    def step(module: Any, batch: Any) -> Any:
        return sum(module(*batch).values())

    fl.recalibrate(model, batches, step=step, method=method)
    fl.recalibrate(twin, [(images,) for images, _ in batches], method=method)
    for one, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(one, other)


def test_what_the_users_code_raises_is_one_of_our_errors() -> None:
    def fails(*_: Any) -> Any:
        raise KeyError("image")

    with pytest.raises(
        ModelError, match=r"the step fails.*KeyError: 'image'\. It is called as step"
    ):
        fl.phases(body(), (X, Y), step=fails)
    with pytest.raises(ModelError, match="pass step="):
        fl.recalibrate(Two(), [(IMAGES,), (IMAGES,)])


def test_a_mapping_with_one_input_for_a_module_that_takes_a_tensor() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body()

        def forward(self, x: Any) -> Any:
            return self.body(x)

    model = Named()
    table = fl.phases(model, [{"image": IMAGES, "label": LABELS}], loss=functional.cross_entropy)
    with torch.no_grad():
        wanted = functional.cross_entropy(copy.deepcopy(model).eval()(IMAGES), LABELS)
    assert table["0"].loss == pytest.approx(float(wanted), rel=1e-5)


def test_a_step_never_gets_a_mapping_that_is_put_together_anew() -> None:
    model, seen = body(), []
    batches = [{"image": IMAGES[i : i + 4], "index": torch.arange(4)} for i in (0, 4, 8)]

    def step(module: Any, batch: Any) -> Any:
        seen.append(batch["index"].tolist())
        return module(batch["image"]).square().mean()

    fl.diagnose(model, batches, step=step, verbose=0)
    assert seen
    assert all(index == [0, 1, 2, 3] for index in seen)


class Dropping(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop_rate, self.norm = rate, nn.BatchNorm1d(3)

    def forward(self, x: Any) -> Any:
        return nn.functional.dropout(self.norm(x), p=self.drop_rate, training=self.training)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_functional_dropout_is_seen_in_the_code(rate: float) -> None:
    found = noise_layers(nn.Sequential(nn.Linear(3, 3), Dropping(rate), nn.Dropout(0.2)))
    assert found == ({"1": "dropout"} if rate else {}) | {"2": "dropout"}


class Encoding(collections.UserDict):  # type: ignore[type-arg]
    """As Hugging Face's: a mapping that is no ``dict``, read by attribute."""

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


def pooled(rows: Any) -> nn.Module:
    """BN on the mean over time of whatever ``rows`` makes of the inputs."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(3, momentum=0.5), nn.Linear(3, 2)

        def forward(self, x: Any) -> Any:
            return self.head(self.norm(rows(x)))

    torch.manual_seed(0)
    return Pooled()


def both(model: Any, loss: Callable[[Any], Any]) -> tuple[float, float]:
    with torch.no_grad():
        return tuple(float(loss(copy.deepcopy(model).train(mode))) for mode in (False, True))


def test_a_mapping_of_any_class_reaches_the_step_as_it_is() -> None:
    model = pooled(lambda x: x)
    batch = Encoding(x=torch.randn(6, 3) + 2, y=torch.arange(6) % 2)

    def step(m: Any, b: Any) -> Any:
        return functional.cross_entropy(m(b.x), b.y)

    table = fl.phases(model, [batch], step=step)
    assert (table["0"].loss, table["1"].loss) == pytest.approx(
        both(model, lambda m: step(m, batch))
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_packed_and_nested_and_sparse_inputs_stay_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(2 + i % 3, 3, generator=generator) + 1 for i in range(6)]
    y = torch.arange(6) % 2

    def unpacked(x: Any) -> Any:
        padded, lengths = nn.utils.rnn.pad_packed_sequence(x, batch_first=True)
        return padded.sum(1) / lengths[:, None]

    kinds = (
        (nn.utils.rnn.pack_sequence(rows, enforce_sorted=False), unpacked),
        (torch.nested.nested_tensor(rows), lambda x: x.to_padded_tensor(0.0).mean(1)),
        (torch.eye(6, 3).to_sparse(), lambda x: x.to_dense() * 3 + 1),
    )
    for x, rows_of in kinds:
        model = pooled(rows_of)
        table = fl.phases(model, [(x, y)], loss=functional.cross_entropy)
        wanted = both(model, lambda m, x=x: functional.cross_entropy(m(x), y))
        assert (table["0"].loss, table["1"].loss) == pytest.approx(wanted, rel=1e-5)
        fl.recalibrate(model, [(x, y)])
        torch.testing.assert_close(model.norm.running_mean, rows_of(x).mean(0))
        fl.freeze(model)
        fl.assert_frozen(model, data=[(x, y)])
        assert fl.diagnose(model, [(x, y)], loss=functional.cross_entropy, verbose=0).verdict


def test_a_module_that_returns_its_loss_in_both_modes_is_asked_with_labels() -> None:
    class Judge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = pooled(lambda x: x)

        def forward(self, x: Any, y: Any) -> Any:
            return functional.cross_entropy(self.net(x), y)

    model, x, y = Judge(), torch.randn(6, 3) + 2, torch.arange(6) % 2
    table = fl.phases(model, [(x, y)])
    assert (table["0"].loss, table["1"].loss) == pytest.approx(both(model, lambda m: m(x, y)))
    assert fl.diagnose(model, [(x, y)], verbose=0).verdict


def test_a_branch_that_no_batch_takes_is_not_blamed() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm1d(3, momentum=0.01) for _ in range(3))
            self.head = nn.Linear(3, 2)

        def forward(self, x: Any, domain: Any) -> Any:
            return self.head(self.norms[int(domain[0])](x))

    torch.manual_seed(0)
    model, y = Branches(), torch.arange(16) % 2
    batches = [
        (torch.randn(16, 3) * 2 + 5 * (y * 2 - 1)[:, None] + 9, torch.full((16,), i % 2), y)
        for i in range(4)
    ]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(10):
        for x, domain, labels in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model.train()(x, domain), labels).backward()
            optimizer.step()
    report = fl.diagnose(model, batches, loss=functional.cross_entropy, verbose=0)
    assert report.causes[0].code == "EMA_LAG"
    assert not any("norms/2" in cause.sites for cause in report.causes)


def test_a_frozen_branch_that_is_not_called_is_not_blamed() -> None:
    """An old head that is kept, or what an adapter has replaced: it uses no batch."""

    class Replaced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.new = nn.BatchNorm1d(6), nn.Linear(6, 2)
            self.old = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)).requires_grad_(False)

        def forward(self, x: Any) -> Any:
            return self.new(self.trunk(x))

    torch.manual_seed(0)
    model, x, y = Replaced(), torch.randn(64, 6), torch.arange(64) % 2
    for _ in range(60):
        model.train()(x)
    report = fl.diagnose(model, (x, y), loss=functional.cross_entropy, verbose=0)
    assert not [cause for cause in report.causes if cause.is_bn or cause.sites]


@pytest.mark.parametrize("behind", [False, True])
def test_the_lock_that_is_advised_freezes_nothing_that_trains(behind: bool) -> None:
    """A student before its teacher, an encoder before a frozen part; with a head or without."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5)]
    model = nn.Sequential(*layers, *[nn.Linear(5, 5)] * behind)
    model[3].requires_grad_(False)
    model[4].requires_grad_(False)
    x = torch.randn(64, 6)
    y = x[:, :5].argmax(1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        functional.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    report = fl.diagnose(model, (x + 1, y), loss=functional.cross_entropy, verbose=0)
    (line,) = {remedy.python for remedy in report.remedies if remedy.fix == "freeze"}
    live = [p for p in model.parameters() if p.requires_grad]
    exec(line, {"fl": fl, "model": model})
    assert all(p.requires_grad for p in live)
    before = model[4].running_mean.clone()
    model.train()(x).sum().backward()
    assert torch.equal(model[4].running_mean, before)


class Scales(nn.Module):
    """Yields its outputs, as code for pyramids does: nothing runs before they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body()[:5], nn.Linear(6, 4)

    def forward(self, x: Any) -> Any:
        x = self.body(x)
        yield self.head(x)
        yield self.head(x).tanh()


def test_outputs_that_are_yielded_are_read_where_the_sites_are_seen() -> None:
    model = Scales().train()

    def loss(outputs: Any, y: Any) -> Any:
        return sum(functional.cross_entropy(each, y) for each in outputs)

    table = fl.phases(model, [(IMAGES, LABELS)], loss=loss)
    for phase, training in (("0", False), ("1", True)):
        with torch.no_grad():
            own = float(loss(copy.deepcopy(model).train(training)(IMAGES), LABELS))
        assert table[phase].loss == pytest.approx(own, rel=1e-4)
    fl.recalibrate(model, [(IMAGES, LABELS)])
    with torch.no_grad():
        seen = model.body[0](IMAGES)
    np.testing.assert_allclose(model.body[1].running_mean, seen.mean((0, 2, 3)), atol=1e-5)


def test_sites_of_a_model_that_only_a_step_can_call_are_measured() -> None:
    class Both(nn.Module):
        """One layer, called on two sources; no key of a batch is a name of its arguments."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3, momentum=0.01)

        def forward(self, real: Any, made: Any) -> Any:
            return self.norm(real), self.norm(made)

    x = torch.randn(32, 3) * 2 + 3
    batches = [{"A": x[i : i + 16], "B": 1 - x[i : i + 16]} for i in (0, 16)]

    def step(m: Any, b: Any) -> Any:
        one, two = m(b["A"], b["B"])
        return (one.square() - 1).square().mean() + (two.square() - 1).square().mean()

    report = fl.diagnose(Both(), batches, step=step, verbose=0)
    assert report.causes[0].is_bn
    assert list(report.measurement.sites) == ["norm"]


class Beside(nn.Module):
    """A network beside the model, in training mode, that counts its calls and keeps what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.last = nn.BatchNorm1d(4), torch.zeros(4)
        self.calls, self.kept = 0, [0.0]

    def forward(self, x: Any, _: Any = None) -> Any:
        self.calls, self.last = self.calls + 1, x.detach().mean(0)
        self.kept.append(float(self.last[0]))
        self.seen = True
        return self.norm(x).square().mean()


BESIDE = {
    "step": lambda other: {"step": lambda m, b: other(m(b[0]))},
    "loss, a function": lambda other: {"loss": lambda out, y: other(out)},
    "loss, a module": lambda other: {"loss": other},
    "loss, a method": lambda other: {"loss": other.forward_of},
}
LOOKS: dict[str, Callable[..., Any]] = {
    "phases": lambda m, d, **ways: fl.phases(m, d, **ways),
    "diagnose": lambda m, d, **ways: fl.diagnose(m, d, verbose=0, **ways),
    "watch": lambda m, d, **ways: checked(m, d, **ways),
    "recalibrate, undone": lambda m, d, **ways: fl.recalibrate(m, d, step=ways["step"]).undo(),
    "assert_frozen": lambda m, d, **ways: not_frozen(m, d, step=ways["step"]),
}


def checked(model: Any, data: Any, **ways: Any) -> None:
    with fl.watch(model, data, **ways) as seen:
        seen.check()


def not_frozen(model: Any, data: Any, **ways: Any) -> None:
    with pytest.raises(fl.NotFrozenError):
        fl.assert_frozen(model, data=data, **ways)


@pytest.mark.parametrize("way", BESIDE)
@pytest.mark.parametrize("look", LOOKS)
def test_what_stands_beside_the_model_is_as_it_was(look: str, way: str) -> None:
    if way != "step" and look in ("recalibrate, undone", "assert_frozen"):
        pytest.skip("takes no loss")
    model, other = body(), Beside()
    other.__dict__["forward_of"] = lambda out, y: other(out)
    for _ in range(3):
        other(model(IMAGES))
    state, own = copy.deepcopy(other.state_dict()), dict(vars(other))
    kept, last = list(other.kept), other.last.clone()
    del other.__dict__["seen"]
    LOOKS[look](model, [(IMAGES[at : at + 4], LABELS[at : at + 4]) for at in (0, 4, 8)],
                **BESIDE[way](other))  # fmt: skip
    for name, value in other.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert "seen" not in vars(other)
    assert (other.calls, other.kept, other.training) == (3, kept, True)
    assert other.kept is own["kept"]
    assert other.last is own["last"]
    assert torch.equal(other.last, last)
    assert not nn.modules.module._global_forward_pre_hooks


def test_a_step_that_fails_behind_a_network_beside_the_model_leaves_it_as_it_was() -> None:
    model, other = body(), Beside()
    before = copy.deepcopy(other.state_dict())

    def step(m: Any, b: Any) -> Any:
        other(m(b[0]))
        raise KeyboardInterrupt

    for look in LOOKS.values():
        with pytest.raises(KeyboardInterrupt):
            look(model, [(IMAGES[:6], LABELS[:6]), (IMAGES[6:], LABELS[6:])], step=step)
        assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())
        assert other.calls == 0
        assert not nn.modules.module._global_forward_pre_hooks
