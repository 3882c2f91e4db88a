"""The graph of a torch module, where ``torch.fx`` can find one."""

from __future__ import annotations

import warnings
from typing import Any

from torch import fx

from frostline.adapters.torch.graph import is_site, modes_kept, unwrapped
from frostline.types.reasons import first_line


class Tracer(fx.Tracer):  # type: ignore[misc]
    """Looks into everything but torch's own modules and BN sites."""

    def is_leaf_module(self, module: Any, name: str) -> bool:
        """Whether a call of the module is one node."""
        return is_site(module) or bool(super().is_leaf_module(module, name))


def trace(model: Any) -> tuple[Any | None, str]:
    """Trace a module in inference mode; it is left as it was found.

    Returns:
        The graph, or ``None`` with the reason in one line: the model decides by the values of its
        tensors, for example.
    """
    root = unwrapped(model)
    with modes_kept(root), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root.eval()
        try:
            return Tracer().trace(root), ""
        except Exception as problem:  # whatever the model's own code raises on a stand-in
            return None, first_line(problem)
