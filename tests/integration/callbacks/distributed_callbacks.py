"""Run by test_callbacks.py in its own process: virtual devices must precede TensorFlow's start."""

import keras
import numpy as np
import tensorflow as tf

import frostline as fl

cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

rng = np.random.default_rng(0)
x, y = rng.normal(2, 3, (64, 6)).astype("float32"), rng.normal(size=(64, 1)).astype("float32")
keras.utils.set_random_seed(0)
with strategy.scope():
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(5, use_bias=False, name="d1"),
            fl.layers.BatchNormalization(name="bn", momentum=0.9),
            keras.layers.Dense(1, name="head"),
        ]
    )
    # Not steps_per_execution=2: under a strategy that fails with stock layers as well.
    model.compile(keras.optimizers.AdamW(0.05, weight_decay=0.1), "mse", jit_compile=False)
fl.freeze(model, until="head")
seen = []


class Record(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        seen.append(model.get_weights())


before = model.get_weights()
history = model.fit(
    x,
    y,
    batch_size=16,
    epochs=3,
    verbose=0,
    callbacks=[
        fl.callbacks.BatchNormMonitor((x, y)),
        fl.callbacks.Recalibrate(x),
        fl.callbacks.KeepFrozen(every=1),
        fl.callbacks.GradualUnfreeze({1: 0}, ramp=3),
        Record(),
    ],
    validation_data=(x, y),
).history
moved = [
    [not np.array_equal(old, new) for old, new in zip(before, after, strict=True)] for after in seen
]
assert moved[0] == [False] * 5 + [True] * 2, moved
assert moved[1] == moved[2] == [True] * 7, moved
for kernel, _, _, mean, variance, *_ in seen[1:]:
    inputs = x.astype("float64") @ kernel
    np.testing.assert_allclose(mean, inputs.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(variance, inputs.var(0), rtol=1e-4)
assert np.isfinite(history["bn/gap"]).all(), history
assert history["bn/frozen"] == [1, 0, 0]
assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == 12
model.fit(x, y, batch_size=16, verbose=0)

with fl.frozen(model.get_layer("bn")):
    kept = model.get_layer("bn").get_weights()
    model.fit(x, y, batch_size=16, verbose=0)
    for old, new in zip(kept, model.get_layer("bn").get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
