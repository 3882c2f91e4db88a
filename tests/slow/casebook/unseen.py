"""U cases: written when the rules were done, before anyone saw what a diagnosis says to them.

What it said at first is in ``docs/results/casebook-unseen-first.json``.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

import frostline as fl

from .bench import (
    CLASSES,
    NORMS,
    Case,
    Scenario,
    both,
    fit,
    freeze_blocks,
    gap,
    in_blocks,
    load_old,
    net,
    outputs,
    part,
    score,
    stock,
    target,
)

ALL = frozenset(NORMS)
SHOWN = 192


def fresh(count: int = 320) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels for fine-tuning."""
    x, y = part("new")
    return x[:count], y[:count]


def pretrained(seed: int, *, epochs: int = 5, **options: Any) -> Any:
    """The pretrained net, trained on with a fast average and small steps."""
    keras.utils.set_random_seed(seed)
    model = load_old(net(stock(0.9), **options), head="head" not in options)
    fit(model, *fresh(), epochs=epochs, lr=1e-3)
    return model


def no_gap(model: Any, x: Any, y: np.ndarray) -> dict[str, float]:
    """Assert that the two modes agree; the numbers."""
    inference, training = both(model, x, y)
    shown = {"inference loss": inference.loss, "training loss": training.loss}
    assert abs(inference.loss - training.loss) < 0.1, shown
    return shown


def case_u1(seed: int) -> Scenario:
    """A residual network from scratch; 50 steps at the default momentum."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((16, 16, 1))
    x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(inputs)
    for block in (1, 2):
        y = keras.layers.BatchNormalization(name=f"bn{block}a")(x)
        y = keras.layers.ReLU()(y)
        y = keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(y)
        y = keras.layers.BatchNormalization(name=f"bn{block}b")(y)
        y = keras.layers.ReLU()(y)
        y = keras.layers.Conv2D(8, 3, padding="same", use_bias=False)(y)
        x = keras.layers.Add()([x, y])
    x = keras.layers.BatchNormalization(name="last")(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(x))
    model = keras.Model(inputs, keras.layers.Dense(CLASSES, activation="softmax")(x))
    images, labels = fresh()
    fit(model, images, labels, epochs=5, lr=1e-2)
    images, labels = images[:SHOWN], labels[:SHOWN]
    shown = gap(model, images, labels, at_least=0.2)
    return Scenario(model=model, data=(images, labels), closable=True, shown=shown)


def case_u2(seed: int) -> Scenario:
    """Three labels in ten are wrong, in training and validation alike; BN is settled."""
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)

    def noisy(y: np.ndarray) -> np.ndarray:
        return np.where(rng.random(len(y)) < 0.3, rng.integers(0, CLASSES, len(y)), y)

    x, y = part("new")
    y = noisy(y).astype("int32")
    model = load_old(net(stock(0.9)))
    history = fit(model, x, y, epochs=3, lr=1e-3)
    val_x, val_y = part("held out")
    val_y = noisy(val_y).astype("int32")
    shown = no_gap(model, x[:SHOWN], y[:SHOWN])
    assert shown["inference loss"] > 0.5, shown
    options = {"history": history, "validation": (val_x, val_y)}
    return Scenario(model=model, data=(x[:SHOWN], y[:SHOWN]), options=options, shown=shown)


def case_u3(seed: int) -> Scenario:
    """Everything but the head locked; the validation images are from a darker camera."""
    keras.utils.set_random_seed(seed)
    model = freeze_blocks(load_old(net(), head=False), 4)
    x, y = fresh()
    fit(model, x, y, epochs=15, lr=1e-2)
    val_x, val_y = part("held out")
    val_x = target(val_x)
    here, there = (score(model, *d, training=False) for d in ((x, y), (val_x, val_y)))
    shown = {"accuracy": here.accuracy, "validation accuracy": there.accuracy}
    assert here.accuracy > there.accuracy + 0.2, shown
    return Scenario(
        model=model,
        data=(x[:SHOWN], y[:SHOWN]),
        options={"validation": (val_x, val_y)},
        shown=shown,
    )


def case_u4(seed: int) -> Scenario:
    """Never shuffled: the images lie class by class, eight per batch."""
    keras.utils.set_random_seed(seed)
    x, y = fresh()
    order = np.argsort(y, kind="stable")
    x, y = x[order], y[order]
    model = load_old(net(stock(0.6)))
    fit(model, x, y, epochs=2, batch_size=8, lr=1e-4, shuffle=False)
    x, y = x[::2], y[::2]
    shown = gap(model, x, y, at_least=0.05, batch_size=160)
    return Scenario(model=model, data=(x, y), options={"batch_size": 8}, closable=True, shown=shown)


def case_u5(seed: int) -> Scenario:
    """Odd or even: one sigmoid, few steps."""
    keras.utils.set_random_seed(seed)
    model = net(head=[keras.layers.Dense(1, activation="sigmoid", name="head")])
    x, y = fresh()
    y = (y % 2).astype("float32")[:, None]
    fit(model, x, y, epochs=8, lr=1e-2, loss="binary_crossentropy")
    x, y = x[:SHOWN], y[:SHOWN]
    shown = gap(model, x, y, at_least=0.2)
    return Scenario(model=model, data=(x, y), closable=True, shown=shown)


def case_u6(seed: int) -> Scenario:
    """Segmentation: which of the pixels are ink; one probability per pixel, few steps."""
    keras.utils.set_random_seed(seed)
    layers: list[Any] = [keras.Input((16, 16, 1))]
    for block in (1, 2):
        layers += [
            keras.layers.Conv2D(8, 3, padding="same", name=f"conv{block}"),
            keras.layers.BatchNormalization(name=f"bn{block}"),
            keras.layers.ReLU(),
        ]
    model = keras.Sequential([*layers, keras.layers.Conv2D(1, 1, activation="sigmoid")])
    rng = np.random.default_rng(seed)
    clean = fresh(256)[0]
    masks = (clean > 0.5).astype("float32")
    x = (target(clean) + 0.1 * rng.normal(size=clean.shape)).astype("float32")
    fit(model, x, masks, epochs=5, lr=1e-2, loss="binary_crossentropy")
    x, masks = x[:128], masks[:128]
    losses = []
    for training in (False, True):
        p = np.clip(outputs(model, x, training=training), 1e-6, 1 - 1e-6)
        losses.append(float(-np.mean(masks * np.log(p) + (1 - masks) * np.log(1 - p))))
    shown = {"inference loss": losses[0], "training loss": losses[1]}
    assert losses[0] > losses[1] + 0.1, shown
    return Scenario(model=model, data=(x, masks), closable=True, shown=shown)


def perceptron() -> Any:
    """BN between dense layers."""
    layers: list[Any] = [keras.Input((64,))]
    for block in (1, 2):
        layers += [
            keras.layers.Dense(48, name=f"dense{block}"),
            keras.layers.BatchNormalization(name=f"bn{block}"),
            keras.layers.ReLU(),
        ]
    head = keras.layers.Dense(CLASSES, activation="softmax", name="head", dtype="float32")
    return keras.Sequential([*layers, head])


def case_u7(seed: int) -> Scenario:
    """Dense layers; few steps."""
    keras.utils.set_random_seed(seed)
    model = perceptron()
    x, y = fresh()
    x = x[:, ::2, ::2, 0].reshape(len(x), 64)
    fit(model, x, y, epochs=4, lr=1e-2)
    x, y = x[:SHOWN], y[:SHOWN]
    shown = gap(model, x, y, at_least=0.2)
    return Scenario(model=model, data=(x, y), closable=True, shown=shown)


def case_u8(seed: int) -> Scenario:
    """Half precision with a scaled loss, inputs from 0 to 16, momentum 0.999; few steps."""
    keras.utils.set_random_seed(seed)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = perceptron()
    finally:
        keras.config.set_dtype_policy("float32")
    for name in ("bn1", "bn2"):
        model.get_layer(name).momentum = 0.999
    x, y = fresh()
    x = 16 * x[:, ::2, ::2, 0].reshape(len(x), 64)
    fit(model, x, y, epochs=8, lr=1e-2)
    x, y = x[:SHOWN], y[:SHOWN]
    shown = gap(model, x, y, at_least=0.1)
    return Scenario(model=model, data=(x, y), closable=True, shown=shown)


def case_u9(seed: int) -> Scenario:
    """Group and layer normalisation, no BN; sixty images learned by heart."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((16, 16, 1)),
            keras.layers.Conv2D(16, 3, padding="same"),
            keras.layers.GroupNormalization(4),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(64),
            keras.layers.LayerNormalization(),
            keras.layers.ReLU(),
            keras.layers.Dense(CLASSES, activation="softmax"),
        ]
    )
    x, y = fresh(60)
    noise = np.random.default_rng(seed).normal(0, 0.6, (2, 200, *x.shape[1:]))
    x = (x + noise[0, :60]).astype("float32")
    history = fit(model, x, y, epochs=25)
    val_x, val_y = part("held out")
    val_x, val_y = (val_x[:200] + noise[1]).astype("float32"), val_y[:200]
    here, there = (score(model, *d, training=False) for d in ((x, y), (val_x, val_y)))
    shown = {"accuracy": here.accuracy, "validation accuracy": there.accuracy}
    assert here.accuracy > there.accuracy + 0.2, shown
    options = {"validation": (val_x, val_y), "history": history}
    return Scenario(model=model, data=(x, y), options=options, shown=shown)


def case_u10(seed: int) -> Scenario:
    """Served behind a client that has divided by 255 already."""
    model = pretrained(seed)
    x, y = fresh(SHOWN)
    right, wrong = (score(model, i, y, training=False) for i in (x, x / 255))
    shown = {"accuracy": wrong.accuracy, "accuracy as trained": right.accuracy}
    assert right.accuracy > wrong.accuracy + 0.5, shown
    return Scenario(model=model, data=((x / 255).astype("float32"), y), closable=True, shown=shown)


def case_u11(seed: int) -> Scenario:
    """Dropout after each block and in the head; BN is settled."""
    keras.utils.set_random_seed(seed)
    layers: list[Any] = [keras.Input((16, 16, 1))]
    for block in (1, 2):
        layers += [
            keras.layers.Conv2D(16, 3, padding="same", name=f"conv{block}"),
            keras.layers.BatchNormalization(momentum=0.9, name=f"bn{block}"),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(),
            keras.layers.SpatialDropout2D(0.2),
        ]
    layers += [
        keras.layers.Flatten(),
        keras.layers.Dense(48, activation="relu"),
        keras.layers.Dropout(0.6),
        keras.layers.Dense(CLASSES, activation="softmax"),
    ]
    model = keras.Sequential(layers)
    x, y = fresh()
    fit(model, x, y, epochs=12)
    history = fit(model, x, y, epochs=3, lr=2e-4)
    x, y = x[:SHOWN], y[:SHOWN]
    inference, training = both(model, x, y)
    shown = {"inference loss": inference.loss, "training loss": training.loss}
    assert training.loss > inference.loss + 0.2, shown
    return Scenario(model=model, data=(x, y), options={"history": history}, shown=shown)


def case_u12(seed: int) -> Scenario:
    """A transfer model whose frozen blocks use the batch, trained with two images per step."""
    keras.utils.set_random_seed(seed)
    kinds = in_blocks(
        NORMS[:3],
        lambda name: fl.layers.BatchNormalization(policy="batch", name=name),
        stock(0.9),
    )
    model = freeze_blocks(load_old(net(kinds), head=False), 4)
    x, y = fresh(160)
    x = target(x)
    fit(model, x, y, epochs=5, batch_size=2, lr=3e-3)
    x, y = x[:128], y[:128]
    shown = gap(model, x, y, at_least=0.2, batch_size=2)
    return Scenario(model=model, data=(x, y), options={"batch_size": 2}, shown=shown)


def case_u13(seed: int) -> Scenario:
    """Converted with another epsilon, behind faint inputs: variances as small as epsilon."""
    keras.utils.set_random_seed(seed)
    x, y = fresh()
    x = (0.02 * x).astype("float32")
    original = net(stock(0.9, epsilon=1e-6))
    fit(original, x, y, epochs=8, lr=1e-2)
    fit(original, x, y, epochs=4, lr=1e-4)
    converted = net(stock(0.9, epsilon=1e-3))
    converted.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    converted.set_weights(original.get_weights())
    right, wrong = (score(m, x, y, training=False) for m in (original, converted))
    shown = {"loss": wrong.loss, "loss of the original": right.loss}
    assert wrong.loss > right.loss + 0.3, shown
    return Scenario(
        model=converted,
        data=(x[:SHOWN], y[:SHOWN]),
        options={"reference": original},
        shown=shown,
    )


def case_u14(seed: int) -> Scenario:
    """Regression that works: where the ink lies, in pixels."""
    keras.utils.set_random_seed(seed)
    head = [keras.layers.Dense(1, name="where")]
    model = load_old(net(stock(0.9), head=head))
    x, _ = fresh()
    columns = np.arange(16, dtype="float32")
    y = (x[..., 0].sum(1) * columns).sum(1) / x[..., 0].sum((1, 2))
    fit(model, x, y, epochs=12, lr=1e-2, loss="mse")
    fit(model, x, y, epochs=5, lr=2e-4, loss="mse")
    x, y = x[:SHOWN], y[:SHOWN]
    errors = [
        float(np.mean((outputs(model, x, training=mode)[:, 0] - y) ** 2)) for mode in (False, True)
    ]
    shown = {"inference mse": errors[0], "training mse": errors[1], "variance": float(y.var())}
    assert abs(errors[0] - errors[1]) < 0.1 * float(y.var()), shown
    return Scenario(model=model, data=(x, y), shown=shown)


def case_u15(seed: int) -> Scenario:
    """In the manner of VGG: no BN, dropout between its dense layers."""
    keras.utils.set_random_seed(seed)
    layers: list[Any] = [keras.Input((16, 16, 1))]
    for filters in (8, 16):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(filters, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
        ]
    layers.append(keras.layers.Flatten())
    for _ in range(2):
        layers += [keras.layers.Dense(64, activation="relu"), keras.layers.Dropout(0.5)]
    model = keras.Sequential([*layers, keras.layers.Dense(CLASSES, activation="softmax")])
    x, y = fresh()
    fit(model, x, y, epochs=12)
    x, y = x[:SHOWN], y[:SHOWN]
    inference, training = both(model, x, y)
    shown = {"inference loss": inference.loss, "training loss": training.loss}
    assert training.loss > inference.loss + 0.1, shown
    return Scenario(model=model, data=(x, y), shown=shown)


def case_u16(seed: int) -> Scenario:
    """Two heads, the digit and whether it is odd; few steps."""
    keras.utils.set_random_seed(seed)
    body = net(head=[keras.layers.Dense(16, activation="relu", name="embed")])
    inputs = keras.Input((16, 16, 1))
    embedded = body(inputs)
    model = keras.Model(
        inputs,
        {
            "digit": keras.layers.Dense(CLASSES, activation="softmax", name="digit")(embedded),
            "odd": keras.layers.Dense(1, activation="sigmoid", name="odd")(embedded),
        },
    )
    x, digit = fresh()
    y = {"digit": digit, "odd": (digit % 2).astype("float32")[:, None]}
    model.compile(
        keras.optimizers.Adam(1e-2),
        {"digit": "sparse_categorical_crossentropy", "odd": "binary_crossentropy"},
    )
    model.fit(x, y, batch_size=32, epochs=7, verbose=0)
    x, y = x[:SHOWN], {name: values[:SHOWN] for name, values in y.items()}
    losses = []
    for training in (False, True):
        before = model.get_weights()
        p = keras.ops.convert_to_numpy(model(x, training=training)["digit"])
        model.set_weights(before)
        losses.append(float(-np.log(p[np.arange(SHOWN), y["digit"]] + 1e-7).mean()))
    shown = {"inference loss": losses[0], "training loss": losses[1]}
    assert losses[0] > losses[1] + 0.2, shown
    return Scenario(model=model, data=(x, y), closable=True, shown=shown)


def case_u17(seed: int) -> Scenario:
    """Images are shifted about in training only, by a layer of the model; BN is settled."""
    keras.utils.set_random_seed(seed)
    shift = keras.layers.RandomTranslation(0.25, 0.25, fill_mode="constant", name="shift")
    model = load_old(net(stock(0.9), before=[shift]))
    x, y = fresh()
    fit(model, x, y, epochs=6)
    history = fit(model, x, y, epochs=2, lr=3e-4)
    x, y = x[:SHOWN], y[:SHOWN]
    inference, training = both(model, x, y)
    shown = {"inference loss": inference.loss, "training loss": training.loss}
    assert training.loss > inference.loss + 0.2, shown
    return Scenario(model=model, data=(x, y), options={"history": history}, shown=shown)


CASES = (
    Case(
        number="U1",
        title="residual network, few steps",
        expected=("EMA_LAG",),
        sites=frozenset({"bn1a", "bn1b", "bn2a", "bn2b", "last"}),
        build=case_u1,
        in_suite=False,
    ),
    Case(
        number="U2",
        title="three labels in ten are wrong",
        expected=("NONE",),
        also=("OVERFIT",),
        build=case_u2,
        in_suite=False,
    ),
    Case(
        number="U3",
        title="locked backbone, validation images from another camera",
        expected=("PREPROCESS",),
        also=("OVERFIT",),
        build=case_u3,
        in_suite=False,
    ),
    Case(
        number="U4",
        title="class after class, eight images per batch",
        expected=("EMA_NOISE",),
        also=("MIXED_SOURCES",),
        sites=ALL,
        build=case_u4,
    ),
    Case(
        number="U5",
        title="one sigmoid, few steps",
        expected=("EMA_LAG",),
        sites=ALL,
        build=case_u5,
        in_suite=False,
    ),
    Case(
        number="U6",
        title="segmentation, few steps",
        expected=("EMA_LAG",),
        sites=frozenset({"bn1", "bn2"}),
        build=case_u6,
    ),
    Case(
        number="U7",
        title="dense layers only, few steps",
        expected=("EMA_LAG",),
        sites=frozenset({"bn1", "bn2"}),
        build=case_u7,
        in_suite=False,
    ),
    Case(
        number="U8",
        title="half precision, few steps",
        expected=("EMA_LAG",),
        sites=frozenset({"bn1", "bn2"}),
        build=case_u8,
        in_suite=False,
    ),
    Case(
        number="U9",
        title="group and layer normalisation, learned by heart",
        expected=("OVERFIT",),
        build=case_u9,
        in_suite=False,
    ),
    Case(
        number="U10",
        title="divided by 255 twice at inference",
        expected=("PREPROCESS",),
        build=case_u10,
        in_suite=False,
    ),
    Case(
        number="U11",
        title="dropout everywhere, settled BN",
        expected=("DROPOUT",),
        build=case_u11,
    ),
    Case(
        number="U12",
        title="frozen blocks on the statistics of two images",
        expected=("FROZEN_BATCH_STATS",),
        sites=frozenset(NORMS[:3]),
        build=case_u12,
        in_suite=False,
    ),
    Case(
        number="U13",
        title="converted with another epsilon",
        expected=("EPS_MISMATCH",),
        build=case_u13,
    ),
    Case(
        number="U14",
        title="regression that works",
        expected=("NONE",),
        build=case_u14,
        in_suite=False,
    ),
    Case(
        number="U15",
        title="VGG-style without BN, dropout only",
        expected=("DROPOUT",),
        build=case_u15,
        in_suite=False,
    ),
    Case(
        number="U16",
        title="two heads, few steps",
        expected=("EMA_LAG",),
        sites=ALL,
        build=case_u16,
        in_suite=False,
    ),
    Case(
        number="U17",
        title="shifted about in training only",
        expected=("AUGMENT_TRAIN_ONLY",),
        build=case_u17,
        in_suite=False,
    ),
)
