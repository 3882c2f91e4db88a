"""Run by test_layers.py in its own process: virtual devices must precede TensorFlow's start."""

import keras
import numpy as np
import tensorflow as tf

from frostline.layers import BatchNormalization

cpus = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpus[0], [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def build(layer_class, **options):
    keras.utils.set_random_seed(0)
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((6,)),
                keras.layers.Dense(5, use_bias=False),
                layer_class(name="bn", momentum=0.9, **options),
                keras.layers.Dense(1),
            ]
        )
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse", jit_compile=False)
    return model


rng = np.random.default_rng(0)
x, y = rng.normal(2, 3, (64, 6)).astype("float32"), rng.normal(size=(64, 1)).astype("float32")
for synchronized in (True, False):
    pair = [
        build(cls, synchronized=synchronized)
        for cls in (BatchNormalization, keras.layers.BatchNormalization)
    ]
    pair[0].set_weights(pair[1].get_weights())
    for model in pair:
        model.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0)
    for received, expected in zip(pair[0].get_weights(), pair[1].get_weights(), strict=True):
        np.testing.assert_allclose(received, expected, atol=1e-5, rtol=1e-5)
    model = pair[0]
    bn = model.get_layer("bn")
    for value in (False, True):
        before = bn.get_weights()
        bn.trainable = value
        model.fit(x, y, batch_size=32, epochs=1, shuffle=False, verbose=0)
        same = [np.array_equal(a, b) for a, b in zip(before, bn.get_weights(), strict=True)]
        assert same == [not value] * 4, (value, same)
