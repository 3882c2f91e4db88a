"""Accelerate needs no callback: the loop is the user's, and so are the calls in it."""

from __future__ import annotations

from typing import Any

import pytest

import frostline as fl

accelerate = pytest.importorskip("accelerate")
torch = pytest.importorskip("torch")

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_recipe_of_the_documentation(network: Any, samples: Any, recipe: Any) -> None:
    loss = torch.nn.functional.cross_entropy
    logged: list[dict[str, float]] = []

    class Accelerator(accelerate.Accelerator):  # type: ignore[misc, name-defined]
        def log(self, values: dict[str, float], *_: Any, **__: Any) -> None:
            logged.append(values)

    accelerator = Accelerator(cpu=True)
    fl.freeze(network, until="2")

    def train(model: Any, optimizer: Any, loader: Any) -> None:
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            accelerator.backward(loss(model(x), y))
            optimizer.step()

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*samples), batch_size=16)
    names = {
        "fl": fl, "accelerator": accelerator, "model": network, "loader": loader, "loss": loss,
        "optimizer": torch.optim.SGD(network.parameters(), 0.1), "x": samples[0],
        "y": samples[1], "train": train,
    }  # fmt: skip
    exec(recipe("## Accelerate"), names)
    assert logged[0]["bn/frozen_moved"] == 0.0
    assert logged[0]["bn/drift_max"] > 0.1
    net = accelerator.unwrap_model(names["model"])
    assert torch.equal(net[1].running_mean, torch.zeros(4))
    with torch.no_grad():
        torch.testing.assert_close(net[3].running_mean, net.eval()[:3](samples[0]).mean(0))
