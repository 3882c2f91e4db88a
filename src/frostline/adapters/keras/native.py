"""Run a Keras model on its own backend, batch by batch, without what ``predict`` adds.

``predict`` builds a data pipeline, callbacks and a progress bar around every call. Here one
compiled function (TensorFlow, JAX) or the model itself (torch) is called on each batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from frostline.adapters.keras.arrays import to_numpy
from frostline.adapters.keras.calls import takes_training
from frostline.adapters.keras.compile import without_gradients
from frostline.atomic import taken_back
from frostline.types import Array, ModelError


def native(model: Any) -> Callable[[Any], list[Array]]:
    """Return ``f(batch) -> arrays``: the model in inference mode.

    Args:
        model: A built model. Its variables are read at every call, not copied.

    Returns:
        A function of one batch, in the structure of the model's inputs, that returns the flattened
        outputs in the model's dtypes. On TensorFlow and JAX it compiles for the size of the first
        batch; a smaller one is filled up and cut back.
    """
    backend = keras.backend.backend()
    if backend == "torch":
        return uncompiled(model)
    step = _traced(model) if backend == "tensorflow" else _jitted(model)
    largest: list[int] = [0]

    def run(batch: Any) -> list[Array]:
        leaves = [np.asarray(leaf) for leaf in keras.tree.flatten(batch)]
        count = len(leaves[0])
        largest[0] = max(largest[0], count)
        missing = largest[0] - count
        if missing:
            leaves = [np.concatenate([x, np.repeat(x[:1], missing, axis=0)]) for x in leaves]
        outputs = keras.tree.flatten(step(keras.tree.pack_sequence_as(batch, leaves)))
        return [to_numpy(y)[:count] for y in outputs]

    return run


def uncompiled(model: Any) -> Callable[[Any], list[Array]]:
    """Return ``f(batch) -> arrays`` as :func:`native` does, operation by operation.

    For a few samples: on TensorFlow and JAX nothing is compiled as a whole, which takes longer than
    they do.
    """

    def run(batch: Any) -> list[Array]:
        with without_gradients():
            outputs = model(keras.tree.map_structure(_contiguous, batch), training=False)
            return [to_numpy(y) for y in keras.tree.flatten(outputs)]

    return run


def lower(model: Any) -> Callable[[Any], list[Array]]:
    """As :func:`native`, in bfloat16 where the backend can be asked for it; outputs are float32.

    Raises:
        ModelError: The backend, or a model that is not in float32, cannot.
        BackendError: The device cannot.
    """
    backend = keras.backend.backend()
    if backend != "torch":
        raise ModelError(f"Keras on {backend} computes it in the dtype of its layers")
    odd = {v.dtype for v in model.variables if "float" in v.dtype} - {"float32"}
    if odd:
        raise ModelError(f"bfloat16 is for a model in float32. Received: a model in {min(odd)}")
    from frostline.adapters.torch.prefix import in_bfloat16, require_bfloat16

    require_bfloat16(device(model))
    return in_bfloat16(uncompiled(model), device(model))


@contextmanager
def full_precision(model: Any) -> Iterator[None]:
    """Let no product of float32 numbers be rounded to TF32; nothing changes on a processor."""
    backend = keras.backend.backend()
    if device(model) == "cpu":
        yield
    elif backend == "jax":
        import jax

        with jax.default_matmul_precision("highest"):
            yield
    elif backend == "torch":
        from frostline.adapters.torch.forward_pass import full_precision as of_torch

        with of_torch():
            yield
    else:
        import tensorflow as tf

        switch = tf.config.experimental
        before = switch.tensor_float_32_execution_enabled()
        with taken_back(lambda: switch.enable_tensor_float_32_execution(before)):
            switch.enable_tensor_float_32_execution(False)
            yield


def device(model: Any) -> str:
    """Kind of device that the model's backend computes on, in lower case: ``"cpu"``, ``"gpu"``."""
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return str(jax.default_backend())
    if backend == "tensorflow":
        import tensorflow as tf

        return "gpu" if tf.config.list_logical_devices("GPU") else "cpu"
    return next((str(v.value.device.type) for v in model.variables), "cpu")


def _traced(model: Any) -> Callable[[Any], Any]:
    import tensorflow as tf

    traced = tf.function(lambda batch: model(batch, training=False), reduce_retracing=True)
    return lambda batch: traced(keras.tree.map_structure(tf.convert_to_tensor, batch))


def _jitted(model: Any) -> Callable[[Any], Any]:
    import jax

    taken = inspect.signature(model.call).parameters.values()
    named = takes_training(model) or any(place.kind is place.VAR_KEYWORD for place in taken)
    # A model that takes no phase is asked for none: this calls its own `call`, unlike `model(x)`.
    phase = {"training": False} if named else {}

    def step(trained: Any, others: Any, batch: Any) -> Any:
        outputs, _ = model.stateless_call(trained, others, batch, **phase)
        return outputs

    compiled = jax.jit(step)

    def run(batch: Any) -> Any:
        trained = [v.value for v in model.trainable_variables]
        return compiled(trained, [v.value for v in model.non_trainable_variables], batch)

    return run


def _contiguous(leaf: Any) -> Any:
    return keras.ops.convert_to_tensor(np.ascontiguousarray(leaf))
