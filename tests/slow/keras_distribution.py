"""Run by test_keras_distribution.py: statistics of a Keras model on several virtual processors.

    python tests/slow/keras_distribution.py FILE

Writes the largest relative difference from one processor, per method, as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import keras
import numpy as np

import frostline as fl

X = np.random.default_rng(0).normal(2, 3, size=(112, 8, 8, 3)).astype(np.float32)


def network() -> Any:
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
            keras.layers.Conv2D(5, 3),
            keras.layers.BatchNormalization(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2),
        ]
    )


def on_jax(notes: dict[str, Any]) -> Any:
    distribution = keras.distribution.DataParallel(devices=keras.distribution.list_devices("cpu"))
    keras.distribution.set_distribution(distribution)
    model = network()
    sharding = model.weights[0].value.sharding
    notes["devices"] = len(sharding.device_set)
    return model


def on_tensorflow(notes: dict[str, Any]) -> Any:
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration() for _ in range(2)]
    tf.config.set_logical_device_configuration(cpu, two)
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    notes["devices"] = strategy.num_replicas_in_sync
    with strategy.scope():
        return network()


def main() -> None:
    notes: dict[str, Any] = {}
    backend = keras.backend.backend()
    model = on_jax(notes) if backend == "jax" else on_tensorflow(notes)
    start = model.get_weights()
    found = {}
    for method in ("sequential", "batch"):
        model.set_weights(start)
        change = fl.recalibrate(model, X, method=method, batch_size=20)  # type: ignore[arg-type]
        found[method] = model.get_weights()
        change.undo()
        same = zip(model.get_weights(), start, strict=True)
        notes[f"undo {method}"] = all(np.array_equal(one, other) for one, other in same)
    keras.distribution.set_distribution(None)
    alone = network()
    for method, weights in found.items():
        alone.set_weights(start)
        fl.recalibrate(alone, X, method=method, batch_size=20)  # type: ignore[arg-type]
        notes[method] = max(
            float(np.max(np.abs(one - other) / (np.abs(other) + 1e-3)))
            for one, other in zip(weights, alone.get_weights(), strict=True)
        )
    Path(sys.argv[1]).write_text(json.dumps(notes))


if __name__ == "__main__":
    main()
