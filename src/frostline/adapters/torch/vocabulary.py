"""How to speak of torch modules; no torch is needed to read it."""

from __future__ import annotations

from dataclasses import replace

from frostline.types.codes import Fix
from frostline.types.facts import Vocabulary

TORCH = Vocabulary(
    name="torch",
    convention="new",
    usual_momentum="0.1",
    has_policy=False,
    lock=Fix.FREEZE,
    frozen_on_batch="track_running_stats is off: training uses the batch, eval() what is stored; "
    "lock the layer",
    frozen_parameters="requires_grad is off",
    positional_names=True,
    own_loop=True,
    file="FIXED.pt",
    file_keeps_settings=False,
    inference_call="model.eval()",
    passed_phase="training=self.training",
    constant="torch.tensor({values})",
    epsilon_line='model.get_submodule("{dotted}").eps = {epsilon:g}',
)

_NODES = "for n in model.graph.nodes if n.target is torch.ops.aten.batch_norm.default"

#: Graphs of ``torch.export`` have mode and epsilon among the arguments of their nodes: ``eval()``
#: raises an error there, and no module has an ``eps``.
EXPORTED = replace(
    TORCH,
    passed_phase=None,
    inference_call=f"[n.update_arg(5, False) {_NODES}]; model.recompile()",
    epsilon_line=f"[n.update_arg(7, {{epsilon:g}}) {_NODES}]; model.recompile()",
)
