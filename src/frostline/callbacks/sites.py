"""The sites that the callbacks act on."""

from __future__ import annotations

from typing import Any

from frostline.adapters import adapter_of
from frostline.types import ModelError, Site


def keras_sites(model: Any) -> list[Site]:
    """Sites of Keras' own layers; torch modules inside a wrapper are left out.

    Raises:
        ModelError: There is none.
    """
    every = [site for site in adapter_of(model).sites() if not site.kind.startswith("torch.")]
    if not every:
        raise ModelError(f"the model has no BN layer. Received: model {model.name!r}")
    return every
