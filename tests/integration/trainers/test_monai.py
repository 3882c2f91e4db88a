"""MONAI: batches are mappings, and the Dice loss is one of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest

import frostline as fl

monai = pytest.importorskip("monai")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_recipe_of_the_documentation(recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    net = monai.networks.nets.UNet(
        spatial_dims=2, in_channels=1, out_channels=1, channels=(4, 8), strides=(2,), norm="batch"
    )
    images = torch.randn(16, 1, 16, 16) * 5 + 20
    samples = [{"image": image, "label": (image > 20).float()} for image in images]
    loader = monai.data.DataLoader(samples, batch_size=4)
    dice = monai.losses.DiceLoss(sigmoid=True)
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    net.train()
    for _ in range(3):
        for batch in loader:
            optimizer.zero_grad()
            dice(net(batch["image"]), batch["label"]).backward()
            optimizer.step()
    exec(recipe("## MONAI"), {"fl": fl, "net": net, "loader": loader, "dice": dice})
    assert "EMA_LAG" in capsys.readouterr().out
    first = next(each for each in net.modules() if isinstance(each, torch.nn.BatchNorm2d))
    seen: list[Any] = []
    first.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        net.eval()(images)
    torch.testing.assert_close(first.running_mean, seen[0].mean(dim=(0, 2, 3)))
    torch.testing.assert_close(first.running_var, seen[0].var(dim=(0, 2, 3)), rtol=1e-2, atol=0)
