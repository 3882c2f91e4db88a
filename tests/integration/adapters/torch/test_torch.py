"""The torch view against torch itself: modes, buffers, losses and gradients by hand."""

from __future__ import annotations

import copy
import functools
import io
import os
import random
from typing import Any

import numpy as np
import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import frostline as fl
from frostline.adapters.protocol import Condition, FreezeRequest
from frostline.adapters.torch.adapter import TorchView
from frostline.adapters.torch.blend import TorchForward
from frostline.adapters.torch.locked import is_locked
from frostline.adapters.torch.loss import as_callable, judged
from frostline.data.batch import Batch
from frostline.types import DataError, ModelError

RNG = np.random.default_rng(0)
X = RNG.normal(0.5, 2, (24, 3, 8, 8)).astype("float32")
Y = RNG.integers(0, 4, 24)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Any) -> Any:
        return functional.relu(self.bn(self.conv(x)) + x, inplace=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.block = Block(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.out = nn.Linear(5, 4)

    def forward(self, x: Any) -> Any:
        x = self.block(self.stem(x)).mean((2, 3))
        return self.out(self.norm(self.head(self.drop(x))))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    made = Net()
    for module in made.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    return made


def everything(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: value.detach().clone() for name, value in model.state_dict().items()
    }
    for name, module in model.named_modules():
        found[f"{name}:mode"] = (module.training, type(module), "forward" in vars(module))
    for name, parameter in model.named_parameters():
        found[f"{name}:flag"] = parameter.requires_grad
    return found


def assert_untouched(model: Any, before: dict[str, Any]) -> None:
    after = everything(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(after[name], value), name
        else:
            assert after[name] == value, name


def test_sites() -> None:
    found = TorchView(net()).sites()
    assert [site.path for site in found] == ["stem/1", "block/bn", "norm"]
    assert TorchView(net()).channel_axis == 1
    first = found[0]
    assert (first.kind, first.channels, first.axis) == ("BatchNorm2d", 6, 1)
    assert first.decay == pytest.approx(0.9)
    assert first.epsilon == 1e-5
    assert (first.params_frozen, first.stats_frozen, first.policy) == (False, False, "update")


def test_where_the_frozen_prefix_ends() -> None:
    model = net()
    assert (fl.sites(model).before, fl.sites(model).boundary) == (None, None)
    for until, expected in (("block", (1, "block/conv")), ("drop", (2, "head")), (None, (3, None))):
        fl.freeze(model, until)
        assert (fl.sites(model).before, fl.sites(model).boundary) == expected
    fl.unfreeze(model, "block.bn", params=False)  # its statistics alone
    assert fl.sites(model).boundary == "block/bn"


def test_eval_alone_is_undone_but_an_overridden_train_is_not() -> None:
    model = net()
    model.stem[1].eval()
    assert TorchView(model).sites()[0].stats_frozen
    assert [each.undone for each in TorchView(model).facts()] == [True, False, False]
    assert not model.stem[1].training  # looking changed nothing
    model.eval()  # now it is only the mode of the moment
    assert not any(site.stats_frozen for site in TorchView(model).sites())
    assert not any(each.undone for each in TorchView(model).facts())

    class NormEval(Net):
        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.stem.eval()
            return self

    for own in (NormEval().train(), NormEval().eval()):
        assert [site.stats_frozen for site in TorchView(own).sites()] == [True, False, False]
        assert not any(each.undone for each in TorchView(own).facts())


def test_track_running_stats_off_means_batch_statistics() -> None:
    model = net()
    model.stem[1].track_running_stats = False
    site = TorchView(model).sites()[0]
    assert (site.stats_frozen, site.policy) == (True, "batch")


@pytest.mark.parametrize("seed", [0, 1])
def test_blend_is_the_model_itself_at_both_ends(seed: int) -> None:
    model = net(seed)
    before = everything(model)
    forward = TorchView(model).blend_forward()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        stored = twin.eval()(torch.as_tensor(X)).numpy()
        twin.train()
        twin.drop.eval()
        batch = twin(torch.as_tensor(X)).numpy()
    np.testing.assert_allclose(
        forward.outputs(Batch(X), Condition(0.0)), stored, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        forward.outputs(Batch(X), Condition(1.0)), batch, rtol=1e-5, atol=1e-6
    )
    assert_untouched(model, before)


def test_statistics_are_arguments() -> None:
    model = net()
    forward = TorchView(model).blend_forward()
    mean, variance = np.full(6, 0.3), np.full(6, 1.7)
    found = forward.outputs(Batch(X), Condition(0.0, statistics={"block/bn": (mean, variance)}))
    twin = copy.deepcopy(model).eval()
    twin.block.bn.running_mean.fill_(0.3)
    twin.block.bn.running_var.fill_(1.7)
    with torch.no_grad():
        np.testing.assert_allclose(found, twin(torch.as_tensor(X)), rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match=r"must have shape \(6,\)"):
        forward.outputs(Batch(X), Condition(0.0, statistics={"block/bn": (mean[:2], variance[:2])}))
    with pytest.raises(ModelError, match="not blended"):
        forward.outputs(Batch(X), Condition(0.0, statistics={"nothing": (mean, variance)}))


def test_recorded_moments_are_those_of_the_inputs() -> None:
    model = net()
    _, seen = TorchView(model).blend_forward().outputs(Batch(X), Condition(0.0, record=True))
    with torch.no_grad():
        inner = model.stem[0](torch.as_tensor(X)).double().numpy()
    # Sums in float32 over deviations from a rounded mean: off by 1e-7 deviations, and 1e-6.
    spread = inner.std((0, 2, 3)).min()
    np.testing.assert_allclose(seen["stem/1"].mean, inner.mean((0, 2, 3)), 0, atol=1e-7 * spread)
    np.testing.assert_allclose(seen["stem/1"].variance, inner.var((0, 2, 3)), rtol=1e-6)
    assert seen["stem/1"].count == inner.size // 6


def test_gradient_against_differences_and_cross_entropy_by_hand() -> None:
    model = net().double()
    before = everything(model)
    forward = TorchView(model).blend_forward(loss=nn.CrossEntropyLoss())
    losses, slope = forward.gradient(Batch(X, Y), Condition(0.4))
    outputs = forward.outputs(Batch(X), Condition(0.4)).astype("float64")
    by_hand = np.log(np.exp(outputs).sum(1)) - outputs[np.arange(24), Y]
    np.testing.assert_allclose(losses, by_hand, rtol=1e-4)
    step = 2.0**-12
    for index in range(3):
        up, down = np.full(3, 0.4), np.full(3, 0.4)
        up[index] += step
        down[index] -= step
        high, low = (
            forward.outcome(Batch(X, Y), Condition(each)).losses.mean() for each in (up, down)
        )
        assert slope[index] == pytest.approx((high - low) / (2 * step), rel=1e-2, abs=1e-6)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0])),
        nn.CrossEntropyLoss(ignore_index=2, label_smoothing=0.1),
        functional.cross_entropy,
        lambda outputs, targets: functional.cross_entropy(outputs, targets) * 2,
        "sparse_categorical_crossentropy",
    ],
)
def test_losses_average_to_what_the_callable_gives(loss: Any) -> None:
    outputs, targets = torch.randn(24, 4), torch.as_tensor(Y)
    reduced = functional.cross_entropy(outputs, targets) if isinstance(loss, str) else None
    wanted = loss(outputs, targets) if reduced is None else reduced
    found, _ = judged(as_callable(loss), outputs, targets, None)
    assert found.unit == "sample"
    assert found.losses.shape == (24,)
    assert float(found.losses.mean()) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 3.0]), reduction="sum"),
        lambda outputs, targets: functional.cross_entropy(outputs, targets, reduction="sum"),
    ],
)
def test_losses_that_are_sums_are_of_samples(loss: Any) -> None:
    outputs, targets = torch.randn(24, 4), torch.as_tensor(Y)
    found, _ = judged(as_callable(loss), outputs, targets, None)
    assert found.unit == "sample"
    for index in (0, 7, 23):
        alone = loss(outputs[index : index + 1], targets[index : index + 1])
        assert float(found.losses[index]) == pytest.approx(float(alone), rel=1e-5)


def test_a_sum_over_the_batch_does_not_make_small_batches_better() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    x, y = torch.randn(64, 3), torch.randint(4, (64,))
    data = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 64, 16)]

    def step(root: Any, batch: Any, reduction: str) -> Any:
        return functional.cross_entropy(root(batch[0]), batch[1], reduction=reduction)

    found = {
        reduction: fl.diagnose(model, data, step=functools.partial(step, reduction=reduction))
        for reduction in ("sum", "mean")
    }
    codes = {name: [cause.code for cause in report.causes] for name, report in found.items()}
    assert codes["sum"] == codes["mean"]
    for point, other in zip(*(r.measurement.sweep for r in found.values()), strict=True):
        assert point.batch_loss == pytest.approx(16 * other.batch_loss, rel=1e-4)


def test_a_loss_says_what_it_does_not_take() -> None:
    with pytest.raises(DataError, match=r"labels \(24,\)"):
        judged(nn.CrossEntropyLoss(), torch.randn(20, 4), torch.as_tensor(Y), None)
    with pytest.raises(ModelError, match="no compiled loss"):
        as_callable(None)
    with pytest.raises(ModelError, match="no loss has this name"):
        as_callable("crossentropy")


def test_subclass_with_an_activation_keeps_it() -> None:
    class BatchNormAct(nn.BatchNorm2d):
        def forward(self, x: Any) -> Any:
            return functional.silu(super().forward(x))

    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct(4))
    forward = TorchView(model).blend_forward()
    with torch.no_grad():
        wanted = copy.deepcopy(model).train()(torch.as_tensor(X)).numpy()
    np.testing.assert_allclose(
        forward.outputs(Batch(X), Condition(1.0)), wanted, rtol=1e-4, atol=1e-5
    )
    seen = TorchView(model).behaviour([Batch(X)])["1"]
    assert (seen.training, seen.inference, seen.moves) == (None, None, True) or seen.training == 1


def test_behaviour_is_seen_not_read() -> None:
    model = net()
    model.stem[1].track_running_stats = False  # batch statistics, no update
    freeze(model, "drop", statistics=False)

    class Forced(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Any) -> Any:
            self.inner.norm.train()
            return self.inner(x)

    before = everything(model)
    found = TorchView(Forced(model)).behaviour([Batch(X)])
    assert found["inner/stem/1"].training == 1
    assert found["inner/stem/1"].moves is False
    assert found["inner/block/bn"].training == 1
    assert found["inner/block/bn"].moves is True
    assert found["inner/norm"].inference == 1
    assert found["inner/block/bn"].inference == 0
    assert_untouched(model, before)


def test_phases_of_a_pass_leave_no_trace() -> None:
    model = net()
    before = everything(model)
    view = TorchView(model)
    stored = view.forward(X, training=False)
    trained = view.forward(X, training=True, step=3)
    np.testing.assert_array_equal(trained, view.forward(X, training=True, step=3))
    assert np.abs(trained - view.forward(X, training=True, step=4)).max() > 1e-3  # other masks
    assert np.abs(trained - stored).max() > 1e-2
    assert_untouched(model, before)


@pytest.mark.parametrize("method", ["sequential", "batch"])
@pytest.mark.parametrize("graph", [True, False])
def test_moments_equal_brute_force(method: str, graph: bool) -> None:
    from frostline.measure.recalibration import recalibrated

    class Undecided(Net):
        def forward(self, x: Any) -> Any:
            return super().forward(x) if bool(x.sum() < 1e9) else x  # fx cannot trace this

    torch.manual_seed(0)
    model = net() if graph else Undecided()
    twin = copy.deepcopy(model).double().eval()
    meter = TorchView(model).meter(["stem/1", "block/bn", "norm"])
    batches = [(X[:7],), (X[7:20],), (X[20:],)]
    if method == "sequential":
        done = recalibrated(meter, ["stem/1", "block/bn", "norm"], X, batch_size=7)
        assert done.passes == 1
        x = torch.as_tensor(X).double()
        for module in (twin.stem[1], twin.block.bn, twin.norm):
            seen: list[Any] = []
            hook = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))  # noqa: B023
            with torch.no_grad():
                twin(x)
            hook.remove()
            axes = [axis for axis in range(seen[0].ndim) if axis != 1]
            module.running_mean.copy_(seen[0].mean(axes))
            module.running_var.copy_(seen[0].var(axes, correction=0))
    else:
        recalibrated(meter, ["stem/1", "block/bn", "norm"], batches, method="batch")
        sums: dict[Any, list[Any]] = {}
        for module in (twin.stem[1], twin.block.bn, twin.norm):
            module.train()
            module.register_forward_pre_hook(
                lambda own, inputs: sums.setdefault(own, []).append(inputs[0].movedim(1, -1))
            )
        with torch.no_grad():
            for (x,) in batches:
                twin(torch.as_tensor(x).double())
        for module, parts in sums.items():
            flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
            module.running_mean.copy_(flat.mean(0))
            module.running_var.copy_(flat.var(0, correction=0))
    for ours, theirs in ((model.stem[1], twin.stem[1]), (model.norm, twin.norm)):
        np.testing.assert_allclose(ours.running_mean, theirs.running_mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours.running_var, theirs.running_var, rtol=1e-5)


def freeze(model: Any, until: Any = None, **kwargs: Any) -> Any:
    view = TorchView(model)
    settings = {"before": True, "frozen": True, **kwargs}
    return view.set_frozen(FreezeRequest(boundary=view.boundary(until), **settings))


def test_frozen_survives_what_undoes_it_elsewhere() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    model(torch.as_tensor(X)).sum().backward()  # gradients are there when it is frozen
    identities = [id(parameter) for parameter in model.parameters()]
    counts, _ = freeze(model, "drop")
    assert counts.sites == 2
    assert is_locked(model.stem[1])
    assert isinstance(model.stem[1], nn.BatchNorm2d)
    assert repr(model.stem[1]).startswith("BatchNorm2d(6, eps=1e-05, momentum=0.1")
    assert [id(parameter) for parameter in model.parameters()] == identities
    kept = {k: v.clone() for k, v in model.state_dict().items() if k.startswith(("stem", "block"))}

    def step(one: Any) -> None:
        one.train()
        for module in one.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = True  # by force
        one(torch.as_tensor(X)).sum().backward()
        if one is model:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for one in (model, model, copy.deepcopy(model), loaded):
        step(one)
        for name, value in kept.items():
            assert torch.equal(one.state_dict()[name], value), name
    from torch.optim.swa_utils import update_bn

    update_bn([torch.as_tensor(X)], model)
    assert torch.equal(model.stem[1].running_mean, kept["stem.1.running_mean"])
    model.stem[1].track_running_stats = False  # what Lightning's BaseFinetuning does
    with torch.no_grad():
        trained = model.stem.train()(torch.as_tensor(X))
        assert torch.equal(trained, model.stem.eval()(torch.as_tensor(X)))
    fresh = net(1)
    fresh.load_state_dict(model.state_dict())
    assert TorchView(model).sites()[0].policy == "inference"


def test_compiled_frozen_model() -> None:
    model = net().train()
    freeze(model)
    model.drop.p = 0.0
    compiled = torch.compile(model, backend="eager")
    found = TorchView(compiled)
    assert [site.path for site in found.sites()] == ["stem/1", "block/bn", "norm"]
    mean = model.stem[1].running_mean.clone()
    with torch.no_grad():
        outputs = compiled.train()(torch.as_tensor(X))
        torch.testing.assert_close(outputs, model.eval()(torch.as_tensor(X)))
    assert torch.equal(model.stem[1].running_mean, mean)


def test_thaw_and_undo() -> None:
    model = net()
    before = everything(model)
    _, undo = freeze(model)
    assert all(site.stats_frozen for site in TorchView(model).sites())
    freeze(model, frozen=False)
    after = everything(model)
    assert all(after[f"{name}:mode"][1] is before[f"{name}:mode"][1] for name in ("stem.1", "norm"))
    undo()
    assert_untouched(model, before)


def test_statistics_and_params_apart() -> None:
    model = net()
    freeze(model, params=False)
    assert [s.params_frozen for s in TorchView(model).sites()] == [False] * 3
    assert [s.stats_frozen for s in TorchView(model).sites()] == [True] * 3
    other = net()
    freeze(other, statistics=False)
    assert [s.params_frozen for s in TorchView(other).sites()] == [True] * 3
    assert [s.stats_frozen for s in TorchView(other).sites()] == [False] * 3


def test_momentum() -> None:
    model = net()
    _, undo = TorchView(model).set_decay(["norm"], 0.99)
    assert model.norm.momentum == pytest.approx(0.01)
    undo()
    assert model.norm.momentum == 0.1
    with pytest.raises(ModelError, match="no BN site"):
        TorchView(model).set_decay(["head"], 0.9)


def test_frozen_batch_norm_of_other_libraries() -> None:
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.5)):
                self.register_buffer(name, torch.full((n,), value))
            self.register_buffer("running_var", torch.full((n,), 2.0))
            self.eps = 1e-3

        def forward(self, x: Any) -> Any:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]

    model = nn.Sequential(FrozenBatchNorm2d(3), nn.Conv2d(3, 2, 1))
    (site,) = TorchView(model).sites()
    assert (site.kind, site.stats_frozen, site.params_frozen) == ("FrozenBatchNorm2d", True, True)
    forward = TorchView(model).blend_forward()
    with torch.no_grad():
        wanted = model(torch.as_tensor(X)).numpy()
    np.testing.assert_allclose(
        forward.outputs(Batch(X), Condition(0.0)), wanted, rtol=1e-5, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_what_cannot_be_read() -> None:
    traced = torch.jit.trace(nn.BatchNorm1d(2).train(), torch.randn(4, 2), check_trace=False)
    with pytest.raises(ModelError, match="TorchScript"):
        TorchView(traced)
    with pytest.raises(ModelError, match="not a module of this model"):
        TorchView(net()).boundary("stem/7")
    with pytest.raises(ModelError, match="lazy"):
        TorchView(nn.Sequential(nn.LazyBatchNorm2d())).blend_forward().outputs(
            Batch(X), Condition(0.0)
        )
    assert TorchView(net()).boundary("stem.1").path == "stem/1"
    assert TorchView(net()).boundary(-1).path == "out"


def test_reference(tmp_path: Any) -> None:
    model = net()
    file = tmp_path / "before.pt"
    torch.save(model.state_dict(), file)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.norm.running_mean += 3 * (model.norm.running_var + 1e-5).sqrt()
        model.out.weight *= 2
    found = TorchView(model).difference(file, X)
    assert found.statistics["norm"] == pytest.approx(3, rel=1e-4)
    assert found.statistics["stem/1"] == 0
    assert found.params["out"] > 0.5
    assert found.params["stem/0"] == 0
    assert TorchView(model).difference(twin, X).outputs > 0.1  # type: ignore[operator]
    assert TorchView(twin).difference(twin, X).outputs == 0
    (tmp_path / "bad.pt").write_bytes(b"no state")
    with pytest.raises(ModelError, match="cannot read a state_dict"):
        TorchView(model).difference(tmp_path / "bad.pt", X)
    narrow = {name: value[..., :1] for name, value in model.state_dict().items() if value.ndim}
    with pytest.raises(ModelError, match=r"another architecture.*Received"):
        TorchView(model).difference(narrow, X)


def test_round_trip_of_a_model_with_state_outside_of_its_state_dict() -> None:
    assert TorchView(net()).round_trip(X) == 0


def test_noise_layers() -> None:
    assert TorchView(net()).noise_layers() == {"drop": "dropout"}


class Checkpointed(nn.Module):
    """Runs its body again in backward, as ``gradient_checkpointing_enable()`` makes a model do."""

    def __init__(self, body: Any, reentrant: bool) -> None:
        super().__init__()
        self.body, self.head, self.reentrant = body, nn.Linear(4, 3), reentrant

    def forward(self, x: Any) -> Any:
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_block_has_the_slopes_of_the_block_itself(reentrant: bool) -> None:
    """Backward ran it behind the pass: it moved its statistics, and λ had no part in it."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))
    model = Checkpointed(body, reentrant).train()
    plain = nn.Sequential(body, model.head).train()
    batch = Batch(torch.randn(8, 5).numpy(), np.arange(8) % 3)
    before = copy.deepcopy(model.state_dict())

    found, wanted = (
        TorchForward(each, None, loss=functional.cross_entropy, step=None).gradient(
            batch, Condition(0.5)
        )
        for each in (model, plain)
    )
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-5)
    assert np.abs(wanted[1]).min() > 0
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


class Skipping(nn.Module):
    """Blocks that Python's and numpy's random numbers skip in training."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.more = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        x = self.body(x)
        skips = random.random() < 0.4 or np.random.rand() < 0.4  # noqa: NPY002
        return self.head(x if self.training and skips else x + self.more(x))


def test_random_numbers_of_python_and_numpy_are_those_of_the_pass_and_put_back() -> None:
    torch.manual_seed(0)
    model, x, y = Skipping(), torch.randn(64, 6) * 2 + 1, torch.arange(64) % 3
    for _ in range(20):
        model(x)
    loss = nn.CrossEntropyLoss(reduction="none")

    def diagnosed() -> dict[str, Any]:
        report = fl.diagnose(model, (x, y), loss=loss, verbose=0)
        return {name: probe.losses for name, probe in report.measurement.probes.items()}

    def cached() -> None:
        fl.freeze(model, "head")
        for _ in range(2):
            assert len(list(fl.cached(model, [(x[:32], y[:32]), (x[32:], y[32:])]))) == 2

    diagnosed()  # what is loaded for the first one may draw
    verbs = (
        diagnosed,
        lambda: fl.phases(model, (x, y), loss=loss),
        lambda: fl.recalibrate(model, x),
        lambda: fl.fold(model, sample=x),
        lambda: fl.freeze(model, "head"),
        lambda: fl.split(model, sample=x),
    )
    for number, verb in enumerate(verbs):
        random.seed(number)
        np.random.seed(number)  # noqa: NPY002
        before = random.getstate(), np.random.get_state()[1:3]  # noqa: NPY002
        verb()
        assert random.getstate() == before[0], number
        np.testing.assert_equal(np.random.get_state()[1:3], before[1], str(number))  # noqa: NPY002
    fl.unfreeze(model)
    random.seed(1)
    one = diagnosed()
    random.seed(2)
    other = diagnosed()
    assert one.keys() == other.keys()
    for name, losses in one.items():
        np.testing.assert_array_equal(losses, other[name], name)
    cached()
