"""timm's averaged weights: exact statistics for their evaluation, frozen layers left alone."""

from __future__ import annotations

from typing import Any

import pytest

import frostline as fl

timm = pytest.importorskip("timm")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_recipe_of_the_documentation(recipe: Any) -> None:
    torch.manual_seed(0)
    net = timm.create_model("efficientnet_lite0", num_classes=3)
    x, y = torch.randn(16, 3, 32, 32) * 2 + 1, torch.arange(16) % 3
    before = {name: value.clone() for name, value in net.state_dict().items()}
    seen: list[Any] = []

    def train(net: Any, ema: Any, loader: Any) -> None:
        trained = [each for each in net.parameters() if each.requires_grad]
        optimizer = torch.optim.SGD(trained, 0.05)
        for _ in range(2):
            net.train()
            for inputs, labels in loader:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(inputs), labels).backward()
                optimizer.step()
                ema.update(net)
        seen.append({name: value.clone() for name, value in ema.module.state_dict().items()})

    def evaluate(averaged: Any) -> None:
        inputs: list[Any] = []
        hook = averaged.blocks[6][0].bn3.register_forward_pre_hook(
            lambda _, given: inputs.append(given[0])
        )
        with torch.no_grad():
            averaged.eval()(x)
        hook.remove()
        mean = inputs[0].mean(dim=(0, 2, 3))
        torch.testing.assert_close(
            averaged.blocks[6][0].bn3.running_mean, mean, rtol=1e-3, atol=1e-4
        )
        seen.append(mean)

    dataset = torch.utils.data.TensorDataset(x, y)
    names = {
        "fl": fl, "net": net, "train": train, "evaluate": evaluate,
        "loader": torch.utils.data.DataLoader(dataset, batch_size=8),
    }  # fmt: skip
    exec(recipe("## timm"), names)
    after = net.state_dict()
    frozen = [name for name in after if name.startswith(("conv_stem", "bn1", "blocks.0"))]
    assert all(torch.equal(after[name], before[name]) for name in frozen)
    assert not torch.equal(
        after["blocks.1.0.bn1.running_mean"], before["blocks.1.0.bn1.running_mean"]
    )
    stored, exact = seen
    averaged: Any = names["ema"]
    assert all(
        torch.equal(value, stored[name]) for name, value in averaged.module.state_dict().items()
    )
    assert not torch.allclose(stored["blocks.6.0.bn3.running_mean"], exact, rtol=0.05, atol=0.05)
