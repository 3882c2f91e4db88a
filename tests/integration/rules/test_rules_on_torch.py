"""Rules on native torch modules: flags as torch sets them, and what the rules claim it does."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import frostline as fl
from frostline.adapters import adapter_of

X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)) * 2 + 3


def network(**norm: Any) -> Any:
    """Two BN layers that have settled on the data."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6, **norm)
    )
    with torch.no_grad():
        for _ in range(40):
            model(X)
    return model


def found(model: Any) -> dict[str, tuple[str, ...]]:
    """Code -> paths, of errors, warnings and notes; the model is left as it was."""
    before = [(name, m.training) for name, m in model.named_modules()]
    report = fl.lint(model)
    assert [(name, m.training) for name, m in model.named_modules()] == before
    codes: dict[str, tuple[str, ...]] = {}
    for each in report.findings:
        codes[each.code] = (*codes.get(each.code, ()), *each.sites)
        assert len(each.message) <= 120
    return codes


def moves(model: Any, index: int) -> bool:
    """Whether one training-mode pass of a copy moves the statistics of a layer."""
    twin = copy.deepcopy(model)
    twin.train()
    before = twin[index].running_mean.clone()
    with torch.no_grad():
        twin(X + 1)
    return not torch.equal(before, twin[index].running_mean)


def test_healthy_frozen_and_serving() -> None:
    assert found(network()) == {}
    assert found(network().eval()) == {}
    assert found(network().eval().requires_grad_(False)) == {}  # nothing trains it
    model = network()
    fl.freeze(model)
    assert found(model) == {}
    assert not moves(model, 1)


def test_requires_grad_alone() -> None:
    model = network().requires_grad_(False)
    assert found(model) == {"FL103": ("1", "4")}
    assert moves(model, 1)
    (first, _) = fl.lint(model).findings
    assert first.message.startswith("requires_grad is off, but each step replaces 0.1 ")
    assert first.fix == "freeze"


def test_eval_by_hand() -> None:
    model = network().train()
    model[1].eval()
    assert found(model) == {"FL118": ("1",)}
    assert moves(model, 1)
    model.eval()  # now it is the mode of the whole model
    assert found(model) == {}


def test_training_mode_inside_eval_is_what_its_inference_does() -> None:
    model = network().eval()
    model[4].train()
    assert found(model) == {"FL119": ("4",)}
    y = torch.arange(32) % 6
    report = fl.diagnose(model, (X, y), loss=nn.CrossEntropyLoss(), verbose=0)
    assert report.causes[0].code == "FORCED_TRAIN"
    assert report.causes[0].sites == ("4",)
    assert model[4].training
    assert not model[1].training


def test_statistics_switched_off() -> None:
    model = network()
    model[1].track_running_stats = False
    assert found(model) == {"FL101": ("1",), "FL104": ("1",)}
    (first, *_) = fl.lint(model).findings
    assert (first.code, first.fix) == ("FL101", "freeze")
    assert not moves(model, 1)  # and yet training uses the batch:
    with torch.no_grad():
        inside = model[0](X)
        assert not torch.allclose(model[1].train()(inside), model[1].eval()(inside), atol=1e-3)
    assert found(network(track_running_stats=False)) == {"FL110": ("4",)}


def test_buffers_that_torch_func_dropped() -> None:
    model = network()
    with torch.no_grad():
        for index in (1, 4):
            model[index].weight.uniform_(0.5, 1.5)
    alone = model.eval()(X[:1])
    kept = copy.deepcopy(model)
    torch.func.replace_all_batch_norm_modules_(model)
    assert found(kept) == {}
    assert found(model) == {"FL121": ("1", "4")}
    # As it says: a prediction now depends on its batch, in eval() too.
    torch.testing.assert_close(kept(X)[:1], alone)
    assert not torch.allclose(model(X)[:1], model(X[:8])[:1], atol=1e-3)
    never = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    assert found(never) == {"FL110": ("1",)}


@pytest.mark.parametrize(
    ("momentum", "code", "told"),
    [
        (0.0, "FL112", "torch momentum 0: a step keeps 1 of the statistics: they never move"),
        (1.0, "FL112", "torch momentum 1: a step keeps 0 of the statistics: its statistics are"),
        (0.9, "FL111", "0.1 may be meant"),
        (None, "FL120", "momentum=None averages over all 41 batches"),
    ],
)
def test_momentum_in_words_of_torch(momentum: Any, code: str, told: str) -> None:
    model = network()
    model[4].momentum = momentum
    assert found(model) == {code: ("4",)}
    assert told in fl.lint(model).findings[0].message


def test_a_cumulative_average_at_0_discards_what_was_loaded() -> None:
    model = network()
    model[1].momentum = None
    model[1].num_batches_tracked.zero_()
    (finding,) = fl.lint(model).findings
    assert "the next one replaces all" in finding.message
    with torch.no_grad():  # as torch does indeed
        inside = model[0](X - 5)
        model[1](inside)
    torch.testing.assert_close(model[1].running_mean, inside.mean(0))


def test_a_new_layer_counts_for_itself() -> None:
    """The backbone has seen 40 batches, the new head's layer 5."""
    model = nn.Sequential(*network(), nn.BatchNorm1d(6))
    with torch.no_grad():
        for _ in range(5):
            model(X)
    assert found(model) == {"FL203": ("5",)}
    (finding,) = fl.lint(model).findings
    assert finding.evidence["old_share"] == pytest.approx(0.9**5)


def test_never_updated_though_trained() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    assert found(model) == {}
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(X).square().sum().backward()
    optimizer.step()  # a loop that forgot train()
    assert found(model.train()) == {"FL204": ("1",)}
    assert "num_batches_tracked is 0" in fl.lint(model).findings[0].message


def test_frozen_batch_norm_of_a_library_is_at_rest() -> None:
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.rand(n) + 0.5)

        def forward(self, x: Any) -> Any:
            return x

    model = nn.Sequential(nn.Conv2d(3, 5, 1), FrozenBatchNorm2d(5), nn.ReLU())
    assert found(model) == {}
    assert found(model.eval()) == {}


def test_lazy_layers_before_their_first_batch() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    assert found(model) == {}
    with torch.no_grad():
        for _ in range(40):
            model(X)
    assert found(model) == {}
    fl.freeze(model)
    assert found(model) == {}


def test_counts_that_were_averaged_with_the_buffers_are_no_counts() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    averages = {buffers: AveragedModel(net, use_buffers=buffers) for buffers in (False, True)}
    for _ in range(50):
        net(torch.randn(16, 4))
        for averaged in averages.values():
            averaged.update_parameters(net)
    counts = {buffers: int(a.module[1].num_batches_tracked) for buffers, a in averages.items()}
    assert counts[False] == 50
    assert counts[True] < 50  # a mean, rounded down each time
    known = {buffers: adapter_of(a).facts() for buffers, a in averages.items()}
    assert (known[False].steps, known[False].sites[0].updates) == (50, 50)
    assert (known[True].steps, known[True].sites[0].updates) == (None, None)
