"""Write a frozen Keras prefix as an ONNX graph, whatever the Keras backend.

Exports that trace a backend's program leave its layout changes in the graph. This one is written
from the layers: images travel with the channels first, as inference engines want them, from one
transpose at the input to one at the output, and BN layers disappear into the convolutions before
them, computed in float64. What it does not know it refuses by name, so that another way is taken.

This room reads only.
"""

from __future__ import annotations

from typing import Any

from frostline.adapters.keras.calls import flatten
from frostline.adapters.keras.onnx.layers import rule_for
from frostline.adapters.keras.onnx.writer import Writer
from frostline.types import BackendError, ModelError


def to_onnx(model: Any) -> bytes:
    """Serialize a functional model in inference mode as an ONNX model.

    Args:
        model: A functional model of float32 layers; its inputs become the ONNX inputs in flattened
            order, its outputs the outputs ``output_0``, ``output_1``, ...

    Returns:
        The serialized ``ModelProto``; weights are copied, so later training does not change it.

    Raises:
        ModelError: A layer or an option that this exporter does not know, by name.
        BackendError: The package ``onnx`` is not installed.
    """
    try:
        import onnx
    except ImportError as problem:
        raise BackendError('writing an ONNX graph needs onnx: pip install "frostline[onnx]"') from (
            problem
        )
    graph = flatten(model)
    if graph is None:
        raise ModelError(f"only functional models can be exported. Received: {model.name!r}")
    return Writer(onnx, graph, rule_for).written(model.name)
