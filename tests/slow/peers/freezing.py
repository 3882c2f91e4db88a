"""A backbone frozen for a whole `fit` in Lightning: what stays, by whose means."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .scenarios import samples

BACKBONE_FINETUNING = "Lightning BackboneFinetuning(train_bn=False)"
REQUIRES_GRAD = "requires_grad_(False)"
FREEZERS = ("frostline freeze", BACKBONE_FINETUNING, REQUIRES_GRAD)
KEEPS = ("frozen statistics stay", "frozen gamma and beta stay", "training uses the stored ones")


def keeps(freezer: str, folder: Any) -> dict[str, bool]:
    """Train two epochs with a frozen backbone; which of :data:`KEEPS` holds.

    Args:
        freezer: One of :data:`FREEZERS`.
        folder: For what Lightning writes.
    """
    import pytorch_lightning as lightning
    from pytorch_lightning.callbacks import BackboneFinetuning

    import frostline as fl

    torch.manual_seed(0)
    seen: dict[str, Any] = {}

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU())
            self.head = nn.Linear(5, 2)

        def training_step(self, batch: Any, _: int) -> Any:
            features = self.backbone(batch[0])
            seen["input"], seen["features"] = batch[0], features.detach()
            return nn.functional.cross_entropy(self.head(features), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)

    module = Module()
    module.backbone[1].running_mean.uniform_(-1, 1)
    callbacks = []
    if freezer == BACKBONE_FINETUNING:
        callbacks = [BackboneFinetuning(unfreeze_backbone_at_epoch=100, train_bn=False)]
    elif freezer == REQUIRES_GRAD:
        module.backbone.requires_grad_(False)
    else:
        fl.freeze(module.backbone)
    kept = {name: value.clone() for name, value in module.backbone.state_dict().items()}
    x = samples()
    data = torch.utils.data.TensorDataset(x, (x[:, 0] > 0).long())
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        default_root_dir=folder,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=24))
    now = module.backbone.state_dict()
    same = {name for name, value in kept.items() if torch.equal(value, now[name])}
    with torch.no_grad():
        stored = module.backbone.eval()(seen["input"])
    return {
        KEEPS[0]: {"1.running_mean", "1.running_var"} <= same,
        KEEPS[1]: {"1.weight", "1.bias"} <= same,
        KEEPS[2]: torch.allclose(stored, seen["features"], atol=1e-5),
    }
