"""H cases: not in the book, from the same families; and healthy models. Nobody tuned to them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

import frostline as fl

from .bench import (
    CLASSES,
    NORMS,
    Case,
    Scenario,
    both,
    compiled,
    fit,
    freeze_blocks,
    gap,
    load_old,
    net,
    outputs,
    part,
    score,
    stock,
    target,
)

ALL = frozenset(NORMS)
SHOWN = 256


class Stubborn(keras.Model):
    """A subclassed net whose last block insists on training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net(head=[keras.layers.Identity(name="end")])
        self.extra = keras.layers.BatchNormalization(name="extra", momentum=0.9)
        self.out = keras.layers.Dense(CLASSES, activation="softmax", name="out")

    def call(self, x: Any, training: Any = None) -> Any:
        return self.out(self.extra(self.body(x, training=False), training=True))


def settled(seed: int, x: Any, y: Any, *, epochs: int = 8, **options: Any) -> Any:
    """The pretrained net trained on with a fast average and small steps: no gap is left."""
    keras.utils.set_random_seed(seed)
    model = load_old(net(stock(0.9), **options), head="head" not in options)
    fit(model, x, y, epochs=epochs, lr=1e-3)
    return model


def coloured(x: np.ndarray) -> np.ndarray:
    """Orange digits on a dark blue ground: (n, 16, 16, 3)."""
    return x * np.float32([1.0, 0.5, 0.1]) + (1 - x) * np.float32([0.0, 0.05, 0.4])


def case_h1(seed: int) -> Scenario:
    """Two cameras share one network; each half of the model sees another domain."""
    keras.utils.set_random_seed(seed)
    left, right = keras.Input((16, 16, 1), name="left"), keras.Input((16, 16, 1), name="right")
    base = net(stock(0.9), head=[keras.layers.Dense(16, activation="relu", name="embed")])
    base.name = "base"
    joined = keras.layers.Concatenate(name="both")([base(left), base(right)])
    model = keras.Model(
        [left, right], keras.layers.Dense(CLASSES, activation="softmax", name="head")(joined)
    )
    x, y = (values[:320] for values in part("new"))
    pair = (x, (1.5 - 3 * x).astype("float32"))
    fit(model, pair, y, epochs=10)
    pair, y = tuple(side[:SHOWN] for side in pair), y[:SHOWN]
    return Scenario(model=model, data=(pair, y), shown=gap(model, list(pair), y, at_least=0.2))


def case_h2(seed: int) -> Scenario:
    """A discriminator whose fakes are noise, one source per batch, fakes three times as often."""
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    real = part("new")[0][:256]
    fake = rng.normal(0.5, 0.1, real.shape).astype("float32") + 0.3 * real[::-1]
    model = net(stock(0.9), head=[keras.layers.Dense(1, activation="sigmoid", name="head")])
    model.compile(keras.optimizers.Adam(1e-2), "binary_crossentropy")
    for step in range(240):
        rows = rng.choice(len(real), 32, replace=False)
        label = float(step % 4 == 0)
        model.train_on_batch((real if label else fake)[rows], np.full((32, 1), label, "float32"))
    x = np.concatenate([real[:128], fake[:128]]).astype("float32")
    y = np.repeat([1.0, 0.0], 128).astype("float32")[:, None]
    return Scenario(model=model, data=(x, y), shown=gap(model, x, y, at_least=0.2))


def case_h3(seed: int) -> Scenario:
    """bfloat16, and inputs so faint that variances are far below epsilon: rounding, no gap."""
    keras.utils.set_random_seed(seed)
    x, y = (values[:320] for values in part("new"))
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = net(stock(0.9))
        fit(model, 0.05 * x, y, epochs=12)
        fit(model, 0.05 * x, y, epochs=6, lr=1e-4)  # the averages catch up
        x, y = 0.05 * x[:SHOWN], y[:SHOWN]
        inference, training = both(model, x, y)
    finally:
        keras.config.set_dtype_policy("float32")
    shown = {"inference loss": inference.loss, "training loss": training.loss}
    assert abs(inference.loss - training.loss) < 0.1 + 0.1 * training.loss, shown
    return Scenario(model=model, data=(x, y), shown=shown)


def case_h4(seed: int) -> Scenario:
    """Weights averaged over the last epochs (SWA); the statistics are those of the last step."""
    keras.utils.set_random_seed(seed)
    x, y = (values[:320] for values in part("new"))
    model = net(stock(0.9))
    optimizer = keras.optimizers.SGD(0.3, momentum=0.9)
    fit(model, x, y, epochs=6, optimizer=optimizer)
    kept = []
    for _ in range(6):
        model.fit(x, y, batch_size=32, epochs=1, verbose=0)
        kept.append([np.array(ops.convert_to_numpy(w)) for w in model.trainable_weights])
    for variable, values in zip(model.trainable_weights, zip(*kept, strict=True), strict=True):
        variable.assign(np.mean(values, axis=0))
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(model=model, data=(x, y), closable=True, shown=gap(model, x, y, at_least=0.1))


def case_h5(seed: int) -> Scenario:
    """Half of the weights of each convolution pruned after training; nothing retrained."""
    x, y = (values[:320] for values in part("new"))
    model = settled(seed, x, y)
    for block in range(1, 5):
        layer = model.get_layer(f"conv{block}")
        kernel, bias = layer.get_weights()
        small = np.abs(kernel) < np.quantile(np.abs(kernel), 0.5)
        layer.set_weights([np.where(small, 0, kernel), bias])
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(model=model, data=(x, y), closable=True, shown=gap(model, x, y, at_least=0.1))


def case_h6(seed: int) -> Scenario:
    """Trained on RGB, asked about BGR."""
    keras.utils.set_random_seed(seed)
    x, y = (values[:320] for values in part("new"))
    x = coloured(x)
    model = net(stock(0.9), channels=3)
    history = fit(model, x, y, epochs=15)
    x, y = x[:SHOWN], y[:SHOWN]
    right, wrong = (score(model, i, y, training=False) for i in (x, x[..., ::-1]))
    shown = {"accuracy": wrong.accuracy, "accuracy in RGB": right.accuracy}
    assert right.accuracy > wrong.accuracy + 0.3, shown
    return Scenario(
        model=model, data=(x[..., ::-1].copy(), y), options={"history": history}, shown=shown
    )


def case_h7(seed: int) -> Scenario:
    """The classes have other numbers than in training: folders in another order."""
    x, y = (values[:320] for values in part("new"))
    model = settled(seed, x, y)
    renamed = np.random.default_rng(seed).permutation(CLASSES)[y].astype("int32")
    right, wrong = (score(model, x, labels, training=False) for labels in (y, renamed))
    shown = {"accuracy": wrong.accuracy, "accuracy as trained": right.accuracy}
    assert right.accuracy > wrong.accuracy + 0.6, shown
    return Scenario(model=model, data=(x[:SHOWN], renamed[:SHOWN]), shown=shown)


def case_h8(seed: int) -> Scenario:
    """A slow average and strong dropout: their effects on the loss are of opposite sign."""
    keras.utils.set_random_seed(seed)
    head = [
        keras.layers.Dense(64, activation="relu", name="hidden"),
        keras.layers.Dropout(0.7, name="dropout"),
        keras.layers.Dense(CLASSES, activation="softmax", name="head"),
    ]
    model = net(head=head)
    x, y = (values[:320] for values in part("new"))
    fit(model, x, y, epochs=12)
    x, y = x[:SHOWN], y[:SHOWN]
    inference, training = both(model, x, y)
    quiet = net(head=[head[0], keras.layers.Dropout(0.0, name="dropout"), head[2]])
    quiet.set_weights([w for w in model.get_weights() if w.dtype != np.uint32])
    batch = score(quiet, x, y, training=True)
    shown = {
        "inference loss": inference.loss,
        "training loss": training.loss,
        "training loss without dropout": batch.loss,
    }
    assert inference.loss > batch.loss + 0.3, shown
    assert training.loss > batch.loss + 0.3, shown
    return Scenario(model=model, data=(x, y), closable=True, shown=shown)


def case_h9(seed: int) -> Scenario:
    """Regression: how much ink is in the image; few steps."""
    keras.utils.set_random_seed(seed)
    model = net(head=[keras.layers.Dense(1, name="head")])
    x, _ = part("new")
    x = x[:320]
    y = x.mean((1, 2)) * 10
    fit(model, x, y, epochs=6, lr=1e-2, loss="mse")
    x, y = x[:SHOWN], y[:SHOWN]
    errors = [float(np.mean((outputs(model, x, training=t) - y) ** 2)) for t in (False, True)]
    shown = {"inference mse": errors[0], "training mse": errors[1], "variance": float(y.var())}
    assert errors[0] > errors[1] + 0.25 * float(y.var()), shown
    return Scenario(model=model, data=(x, y), closable=True, shown=shown)


def case_h10(seed: int) -> Scenario:
    """A subclassed model calls one of its BN layers with training=True."""
    keras.utils.set_random_seed(seed)
    model = Stubborn()
    x, y = (values[:320] for values in part("new"))
    model(x[:2])
    load_old(model.body).trainable = False
    fit(model, x, y, epochs=6, lr=1e-2)
    x, y = x[:SHOWN], y[:SHOWN]
    single, batch = (
        score(model, x, y, training=False, batch_size=size).accuracy for size in (1, 64)
    )
    assert batch > single + 0.3, (single, batch)
    return Scenario(
        model=model, data=(x, y), shown={"accuracy one by one": single, "in batches": batch}
    )


def case_h11(seed: int) -> Scenario:
    """Healthy: long trained, settled averages."""
    x, y = (values[:320] for values in part("new"))
    model = settled(seed, x, y)
    inference, training = both(model, x, y)
    shown = {"inference loss": inference.loss, "training loss": training.loss}
    assert abs(inference.loss - training.loss) < 0.05, shown
    return Scenario(model=model, data=(x[:SHOWN], y[:SHOWN]), shown=shown)


def case_h12(seed: int) -> Scenario:
    """Healthy and without BN."""
    keras.utils.set_random_seed(seed)
    layers = [keras.Input((16, 16, 1))]
    for filters in (8, 16):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", activation="relu"),
            keras.layers.MaxPooling2D(),
        ]
    model = keras.Sequential(
        [*layers, keras.layers.Flatten(), keras.layers.Dense(CLASSES, activation="softmax")]
    )
    x, y = (values[:320] for values in part("new"))
    fit(model, x, y, epochs=10)
    return Scenario(model=model, data=(x[:SHOWN], y[:SHOWN]))


def case_h13(seed: int) -> Scenario:
    """The canary of a freeze that holds: its own predictions as labels."""
    keras.utils.set_random_seed(seed)
    model = freeze_blocks(load_old(net()), 4)
    model.get_layer("head").trainable = False
    compiled(model, loss="mse")
    x = target(part("new")[0][:SHOWN])
    y = model.predict(x, verbose=0)
    training = outputs(model, x, training=True)
    worst = float(np.mean((training - y) ** 2))
    assert worst < 1e-6, worst
    return Scenario(model=model, data=(x, y), shown={"training loss": worst})


def case_h14(seed: int) -> Scenario:
    """The book's first case under another release: 2.1.5 in the middle blocks only."""
    keras.utils.set_random_seed(seed)
    kinds = {name: stock(0.9) for name in NORMS}
    for name in ("bn2", "bn3"):
        kinds[name] = lambda name: fl.layers.BatchNormalization(version="2.1.5", name=name)
    model = freeze_blocks(load_old(net(lambda name: kinds[name](name)), head=False))
    x, y = (values[:320] for values in part("new"))
    x = (1 - x).astype("float32")  # inverted
    fit(model, x, y, epochs=8, lr=1e-2)
    x, y = x[:SHOWN], y[:SHOWN]
    return Scenario(model=model, data=(x, y), closable=True, shown=gap(model, x, y, at_least=0.2))


CASES = (
    Case(
        number="H1",
        title="two domains through one shared base",
        expected=("MIXED_SOURCES",),
        build=case_h1,
    ),
    Case(
        number="H2",
        title="discriminator against noise, unbalanced pure batches",
        expected=("MIXED_SOURCES",),
        sites=ALL,
        build=case_h2,
    ),
    Case(
        number="H3",
        title="mixed precision, variances far below epsilon",
        expected=("NONE",),
        build=case_h3,
    ),
    Case(
        number="H4",
        title="averaged weights, statistics of the last step",
        expected=("STALE_AFTER_WEIGHT_EDIT",),
        sites=ALL,
        build=case_h4,
    ),
    Case(
        number="H5",
        title="convolutions pruned after training",
        expected=("STALE_AFTER_WEIGHT_EDIT",),
        sites=ALL,
        build=case_h5,
    ),
    Case(number="H6", title="RGB and BGR", expected=("PREPROCESS",), build=case_h6),
    Case(
        number="H7",
        title="classes renumbered",
        expected=("LABEL_ORDER",),
        build=case_h7,
        everywhere=True,
    ),
    Case(
        number="H8",
        title="slow average and dropout, of opposite sign",
        expected=("EMA_LAG", "DROPOUT"),
        sites=ALL,
        build=case_h8,
    ),
    Case(
        number="H9",
        title="regression with a slow average",
        expected=("EMA_LAG",),
        sites=ALL,
        build=case_h9,
    ),
    Case(
        number="H10",
        title="subclassed model, one BN forced into training mode",
        expected=("FORCED_TRAIN",),
        sites=frozenset({"extra"}),
        build=case_h10,
    ),
    Case(number="H11", title="healthy", expected=("NONE",), build=case_h11, everywhere=True),
    Case(
        number="H12",
        title="healthy, without BN",
        expected=("NONE",),
        build=case_h12,
        everywhere=True,
    ),
    Case(
        number="H13",
        title="canary of a true freeze",
        expected=("NONE",),
        build=case_h13,
        everywhere=True,
    ),
    Case(
        number="H14",
        title="Keras 2.1.5 in two of the frozen blocks, inverted images",
        expected=("FROZEN_BATCH_STATS",),
        sites=frozenset({"bn2", "bn3"}),
        build=case_h14,
    ),
)
