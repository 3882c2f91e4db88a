"""How a Keras model is asked: a user's step, its own ``compute_loss``, losses of a whole batch."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L, ops

import frostline as fl
from frostline.adapters import OutputDistance
from frostline.adapters.keras.blend import BlendForward
from frostline.adapters.protocol import Condition
from frostline.data.batch import Batch
from frostline.types import DataError, FrostlineError, ModelError

RNG = np.random.default_rng(0)
X = RNG.normal(1.0, 2.0, (24, 6)).astype("float32")
Y = RNG.integers(0, 3, 24)
WHOLE = Batch(X, Y, whole=(X, Y))


def classifier(*, dropout: float = 0.0, **compiled: Any) -> Any:
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            L.Dense(8, name="first"),
            L.BatchNormalization(name="bn"),
            L.Dropout(dropout),
            L.Dense(3, activation="softmax"),
        ]
    )
    if compiled:
        model.compile(**compiled)
    return model


def entropy(model: Any, batch: Any, **how: Any) -> Any:
    x, y = batch
    return keras.losses.sparse_categorical_crossentropy(y, model(x, **how))


@pytest.mark.parametrize("form", ["per-sample", "scalar", "mapping", "with-metrics"])
def test_a_step_gives_what_the_loss_gives(form: str) -> None:
    model = classifier(loss="sparse_categorical_crossentropy")
    blend = 0.7

    def step(model: Any, batch: Any) -> Any:
        losses = entropy(model, batch, training=True)
        if form == "scalar":
            return ops.mean(losses)
        if form == "mapping":
            return {"a": losses * 0.25, "b": losses * 0.75}
        return (losses, {"size": ops.mean(batch[0])}) if form == "with-metrics" else losses

    wanted, slope = BlendForward(model).gradient(Batch(X, Y), Condition(blend))
    forward = BlendForward(model, step=step)
    found = forward.outcome(WHOLE, Condition(blend))
    assert found.unit == ("batch" if form == "scalar" else "sample")
    expected = wanted.mean(keepdims=True) if form == "scalar" else wanted
    np.testing.assert_allclose(found.losses, expected, rtol=1e-5)
    losses, slopes = forward.gradient(WHOLE, Condition(blend))
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(slopes, slope, rtol=1e-4, atol=1e-6)
    if form == "mapping":
        np.testing.assert_allclose(found.parts["a"], wanted / 4, rtol=1e-5)
    if form == "with-metrics":
        np.testing.assert_allclose(found.metrics["size"], X.mean(), rtol=1e-5)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("said", [None, False, True])
def test_the_phase_is_the_one_that_is_asked_for(asked: bool, said: bool | None) -> None:
    model = classifier()

    def step(model: Any, batch: Any) -> Any:
        return entropy(model, batch, training=said)

    found = BlendForward(model, step=step).own(WHOLE, training=asked)
    x = ops.convert_to_tensor(X)
    before = [np.array(w) for w in model.get_weights()]
    outputs = keras.ops.convert_to_numpy(model(x, training=asked))
    model.set_weights(before)
    np.testing.assert_allclose(
        found.losses, -np.log(outputs[np.arange(24), Y]), rtol=1e-4, atol=1e-6
    )


def test_dropout_is_off_unless_asked_for_and_nothing_of_the_model_changes() -> None:
    model = classifier(dropout=0.5)
    before = model.get_weights()

    def step(model: Any, batch: Any) -> Any:
        return entropy(model, batch, training=True)

    forward = BlendForward(model, step=step)
    quiet = [forward.outcome(WHOLE, Condition(1.0, number=number)).losses for number in (0, 1)]
    noisy = [
        forward.outcome(WHOLE, Condition(1.0, number=number, dropout=True)).losses
        for number in (0, 0, 1)
    ]
    np.testing.assert_array_equal(quiet[0], quiet[1])
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert np.abs(noisy[0] - noisy[2]).max() > 1e-3
    assert np.abs(noisy[0] - quiet[0]).max() > 1e-3
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert all("call" not in vars(layer) for layer in (model, *model.layers))


def test_a_loss_of_a_whole_batch_is_taken_of_the_batch() -> None:
    def contrast(_: Any, outputs: Any) -> Any:
        return ops.mean(ops.square(outputs @ ops.transpose(outputs)))

    model = classifier()
    found = BlendForward(model, loss=contrast).outcome(Batch(X, Y), Condition(0.0))
    outputs = keras.ops.convert_to_numpy(model(ops.convert_to_tensor(X), training=False))
    assert found.unit == "batch"
    np.testing.assert_allclose(found.losses, [np.square(outputs @ outputs.T).mean()], rtol=1e-5)


def test_a_callable_takes_a_mapping_of_outputs_together() -> None:
    inputs = keras.Input((6,))
    hidden = L.BatchNormalization()(L.Dense(6)(inputs))
    model = keras.Model(inputs, {"copy": L.Dense(6)(hidden), "code": hidden})

    def reconstruction(y: Any, outputs: Any) -> Any:
        return ops.mean(ops.square(outputs["copy"] - y), axis=-1)

    found = BlendForward(model, loss=reconstruction).outcome(Batch(X, X), Condition(0.0))
    copy = keras.ops.convert_to_numpy(model(ops.convert_to_tensor(X), training=False)["copy"])
    assert found.unit == "sample"
    np.testing.assert_allclose(found.losses, np.square(copy - X).mean(1), rtol=1e-4)


class Ranked(keras.Model):  # type: ignore[misc]
    """A model whose loss is in ``compute_loss``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = L.BatchNormalization(), L.Dense(1)

    def call(self, x: Any, training: Any = None) -> Any:
        return self.head(self.norm(x, training=training))

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, **_: Any) -> Any:
        return ops.mean(ops.abs(y_pred[:, 0] - ops.mean(x, axis=1)))


class Added(keras.Model):  # type: ignore[misc]
    """A model that adds its loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = L.BatchNormalization(), L.Dense(6)

    def call(self, x: Any, training: Any = None) -> Any:
        outputs = self.head(self.norm(x, training=training))
        self.add_loss(ops.mean(ops.square(outputs - x)))
        return outputs


def test_compute_loss_and_added_losses_need_no_labels() -> None:
    for kind in (Ranked, Added):
        keras.utils.set_random_seed(0)
        model = kind()
        x = ops.convert_to_tensor(X)
        outputs = keras.ops.convert_to_numpy(model(x, training=False))
        if kind is Ranked:
            model.compile(optimizer="sgd")
            wanted = np.abs(outputs[:, 0] - X.mean(1)).mean()
        else:
            wanted = np.square(outputs - X).mean()
        found = BlendForward(model).own(Batch(X), training=False)
        assert found.unit == "batch"
        np.testing.assert_allclose(found.losses, [wanted], rtol=1e-5)


def test_distance_of_outputs() -> None:
    model = classifier()
    goal = BlendForward(model).outputs(Batch(X), Condition(1.0))
    forward = BlendForward(model, loss=OutputDistance(spread=(0.5,)))
    batch = Batch(X, (goal,))
    np.testing.assert_allclose(forward.outcome(batch, Condition(1.0)).losses, 0, atol=1e-9)
    here = BlendForward(model).outputs(Batch(X), Condition(0.0))
    np.testing.assert_allclose(
        forward.outcome(batch, Condition(0.0)).losses,
        np.square((here - goal) / 0.5).mean(1),
        rtol=1e-4,
    )


@pytest.mark.parametrize("returned", [None, "loss", {}, {"a": "b"}])
def test_what_is_no_loss_is_refused_by_name(returned: Any) -> None:
    with pytest.raises(ModelError, match=r"loss.*Received"):
        BlendForward(classifier(), step=lambda *_: returned).outcome(WHOLE, Condition(0.0))


def test_verbs_take_a_step() -> None:
    def step(model: Any, batch: Any) -> Any:
        return entropy(model, (batch["image"], batch["label"]), training=True)

    model = classifier()
    data = [{"image": X[i : i + 8], "label": Y[i : i + 8], "name": "a"} for i in (0, 8, 16)]
    table = fl.phases(model, data, step=step)
    outputs = keras.ops.convert_to_numpy(model(ops.convert_to_tensor(X), training=False))
    wanted = -np.log(outputs[np.arange(24), Y]).mean()
    np.testing.assert_allclose(table["0"].loss, wanted, rtol=1e-5)
    assert table["1"].loss != table["0"].loss
    with fl.watch(model, data, step=step) as watching:
        pass
    assert watching.checks[-1].gap is not None
    with pytest.raises(ModelError, match="not both"):
        fl.phases(model, data, step=step, loss="mse")
    with pytest.raises(FrostlineError, match="step="):
        fl.phases(model, data)


def test_the_compiled_loss_needs_its_labels() -> None:
    model = classifier(loss="sparse_categorical_crossentropy")
    with pytest.raises(DataError, match="needs labels"):
        BlendForward(model).own(Batch(X), training=False)


def test_frozen_is_asserted_through_a_step() -> None:
    def step(model: Any, batch: Any) -> Any:
        return entropy(model, (batch["image"], batch["label"]))

    model = classifier()
    data = [{"image": X, "label": Y, "name": "a"}]
    with pytest.raises(AssertionError, match="'bn'"):
        fl.assert_frozen(model, data=data, step=step)
    fl.freeze(model)
    fl.assert_frozen(model, data=data, step=step)
    # Flags say frozen here; only the pass shows that the step makes the layer use the batch.
    layer = model.get_layer("bn")
    vars(layer)["call"] = lambda x, training=None, mask=None: (x - ops.mean(x, 0)) / ops.std(x, 0)
    with pytest.raises(AssertionError, match="training uses the batch's"):
        fl.assert_frozen(model, data=data, step=step)


def test_a_diagnosis_through_a_step_agrees_with_one_through_the_loss() -> None:
    model = classifier(loss="sparse_categorical_crossentropy")
    how = {"batch_size": 8, "verbose": 0}
    by_loss = fl.diagnose(model, (X, Y), **how)
    by_step = fl.diagnose(model, (X, Y), step=entropy, **how)
    assert by_step.gap is not None
    for name in ("inference", "batch", "population"):
        np.testing.assert_allclose(
            by_step.measurement.probes[name].losses,
            by_loss.measurement.probes[name].losses,
            rtol=2e-3,
            atol=1e-5,
        )
    assert [cause.code for cause in by_step.causes] == [cause.code for cause in by_loss.causes]


class OnlyInTraining(keras.Model):  # type: ignore[misc]
    """A head that only training has, and a loss of the model's own; nothing is compiled but it."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = keras.layers.Dense(5), keras.layers.BatchNormalization(name="body")
        self.head, self.aside = keras.layers.Dense(3), keras.layers.BatchNormalization(name="aside")

    def call(self, inputs: Any, training: Any = None) -> Any:
        h = self.norm(self.dense(inputs), training=training)
        found = {"main": self.head(h)}
        return {**found, "aside": self.head(self.aside(h, training=True))} if training else found

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None,
        training: bool = True,
    ) -> Any:  # fmt: skip
        each = [
            keras.losses.sparse_categorical_crossentropy(y, part, from_logits=True)
            for part in y_pred.values()
        ]
        return keras.ops.mean(sum(each))


def test_outputs_that_only_training_has_and_the_model_s_own_loss() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)).astype("float32"), np.arange(40) % 3
    model = OnlyInTraining()
    model(x, training=True)
    model.compile("sgd")
    model.fit(x, y, verbose=0)
    table = fl.phases(model, (x, y), batch_size=40)
    for phase, training in (("0", False), ("1", True)):
        with keras.StatelessScope():
            own = model.compute_loss(x, y, model(x, training=training))
        assert float(table[phase].loss) == pytest.approx(float(ops.convert_to_numpy(own)), rel=1e-5)
    aside = [keras.ops.convert_to_numpy(w) for w in model.aside.weights]
    report = fl.diagnose(model, (x, y), verbose=0)
    assert report.verdict
    fl.recalibrate(model, x)
    for one, other in zip(aside, model.aside.weights, strict=True):
        np.testing.assert_array_equal(one, keras.ops.convert_to_numpy(other))


class Untold(keras.Model):  # type: ignore[misc]
    """Its ``compute_loss`` has the signature of the Distiller on keras.io: no ``training``."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.norm = keras.layers.Dense(5), keras.layers.BatchNormalization()
        self.head = keras.layers.Dense(3)

    def call(self, inputs: Any, training: Any = None) -> Any:
        return self.head(self.norm(self.dense(inputs), training=training))

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None,
        allow_empty: bool = False,
    ) -> Any:  # fmt: skip
        losses = keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)
        return keras.ops.mean(losses)


def test_a_loss_of_its_own_that_is_not_told_the_phase() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)).astype("float32"), np.arange(40) % 3
    model = Untold()
    model(x[:2])  # the monitor looks at layers that are there when the training begins
    model.compile("sgd")
    monitor = fl.callbacks.BatchNormMonitor((x, y), batch_size=40)
    history = model.fit(x, y, verbose=0, batch_size=40, callbacks=[monitor]).history
    table = fl.phases(model, (x, y), batch_size=40)
    own = model.evaluate(x, y, batch_size=40, verbose=0)
    assert float(table["0"].loss) == pytest.approx(own, rel=1e-5)
    gap = float(table["1"].loss - table["0"].loss)
    assert history["bn/gap"] == pytest.approx([gap], rel=1e-3)
    assert fl.diagnose(model, (x, y), verbose=0).verdict
    with fl.watch(model, (x, y)) as seen:
        model.fit(x, y, verbose=0)
    assert str(seen)


@pytest.mark.parametrize("y", [{"a": 0}, {"a": 0, "c": 0}, 0])
def test_labels_without_an_output_are_our_error(y: Any) -> None:
    inputs = keras.Input((4,))
    h = keras.layers.BatchNormalization()(inputs)
    model = keras.Model(inputs, {n: keras.layers.Dense(2, name=n)(h) for n in "ab"})
    model.compile("sgd", {"a": "mse", "b": "mse"})
    x, labels = np.zeros((8, 4), "float32"), keras.tree.map_structure(lambda _: np.zeros((8, 2)), y)
    for verb in (fl.phases, fl.diagnose):
        with pytest.raises(DataError, match="labels"):
            verb(model, (x, labels))
    with pytest.raises(DataError, match="do not fit the model"):
        fl.recalibrate(model, np.zeros((8, 5), "float32"))


def test_several_inputs_in_a_list_have_the_loss_of_evaluate() -> None:
    one, other = keras.Input((6,)), keras.Input((6,))
    norm = L.BatchNormalization()
    outputs = L.Dense(3, activation="softmax")(L.subtract([norm(one), norm(other)]))
    model = keras.Model([one, other], outputs)
    model.compile("sgd", "sparse_categorical_crossentropy")
    found = fl.phases(model, ([X, 3 * X], Y))
    own = model.evaluate([X, 3 * X], Y, verbose=0)
    losses = {row.phase: row.loss for row in found.rows}
    assert losses["dynamic"] == pytest.approx(own, rel=1e-5)
    assert losses["0"] == pytest.approx(own, rel=1e-5)


class Reads(keras.layers.Layer):
    """Adds a loss of what it sees, whose gradient nobody needs."""

    def call(self, x: Any) -> Any:
        self.add_loss(keras.ops.mean(keras.ops.square(x)))
        return x


class Rebuilds(keras.Model):
    """Its loss is how far the outputs are from the inputs."""

    def compute_loss(  # type: ignore[override]
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None, training: bool = True
    ) -> Any:
        del y, sample_weight, training
        return keras.ops.mean(keras.ops.square(x - y_pred))


@pytest.mark.parametrize("kind", ["compute_loss", "add_loss"])
def test_a_loss_without_labels_has_the_phase_of_evaluate(kind: str) -> None:
    inputs = keras.Input((6,))
    h = keras.layers.BatchNormalization()(keras.layers.Dense(6)(inputs))
    added = kind == "add_loss"
    model = keras.Model(inputs, Reads()(h)) if added else Rebuilds(inputs, h)
    model.compile("sgd")
    x = np.random.default_rng(0).normal(1, 2, (48, 6)).astype("float32")
    own = model.evaluate(x, verbose=0, batch_size=16)
    found = fl.phases(model, x, batch_size=16)
    assert found["dynamic"].loss == pytest.approx(own, rel=1e-5)
    assert found["0"].loss == pytest.approx(own, rel=1e-5)
