"""Rules on real Keras models: the documented examples, and what the rules claim Keras does."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import frostline as fl
from frostline import rules
from frostline.adapters import read_facts
from frostline.rules import Rule
from frostline.types import FrostlineError, ModelError
from frostline.verbs.diagnose import lint

keras = pytest.importorskip("keras")

X = np.random.default_rng(0).normal(3, 2, (16, 4)).astype(np.float32)
Y = X[:, :2]


def examples() -> list[Any]:
    found = []
    for each in rules.all_rules():
        if each.needs == "data":
            continue
        blocks = re.findall(r"```python\n(.+?)```", each.documentation, re.DOTALL)
        found += [
            pytest.param(each, code, bad, id=f"{each.code}-{'bad' if bad else 'good'}")
            for code, bad in zip(blocks, (True, False), strict=True)
        ]
    return found


def numbers(variable: Any) -> Any:
    return np.array(keras.ops.convert_to_numpy(variable))


def found(model: Any, select: str | None = None) -> list[str]:
    return [finding.code for finding in lint(model, select=select).findings]


def network(norm: Any = None) -> Any:
    return keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(4, name="first"),
            norm or keras.layers.BatchNormalization(name="bn", momentum=0.9),
            keras.layers.Dense(2, name="head"),
        ]
    )


def step(model: Any) -> None:
    model.train_on_batch(X, Y)


def trained(model: Any) -> Any:
    model.compile("sgd", "mse")
    step(model)
    return model


@pytest.mark.parametrize(("each", "code", "bad"), examples())
def test_documented_examples(each: Rule, code: str, bad: bool) -> None:
    if "torch" in code and keras.backend.backend() != "torch":
        pytest.skip("the example is about torch modules in Keras")
    names: dict[str, Any] = {"keras": keras, "np": np, "fl": fl}
    exec(code, names)
    report = lint(names["model"], select=each.code)
    assert [f.code for f in report.findings] == ([each.code] if bad else [])
    assert report.rules == (each.code,) or not bad  # really applied
    assert all(len(f.message) <= 120 for f in report.findings)


@pytest.mark.parametrize("norm", [None, fl.layers.BatchNormalization(name="bn", momentum=0.9)])
def test_a_healthy_model_is_clean(norm: Any) -> None:
    model = network(norm)
    model.compile("sgd", "mse")
    for _ in range(25):  # 0.9**25 = 7% of the old value
        step(model)
    assert lint(model).verdict.endswith("nothing found")
    for layer in model.layers[:2]:
        layer.trainable = False
    model.compile("sgd", "mse")
    step(model)
    report = lint(model)
    assert report.findings == ()
    assert report.clean


def test_notes_do_not_make_a_model_suspicious() -> None:
    model = network()
    model.get_layer("bn").moving_variance.assign(np.array([1.0, 0.0, 2.0, 3.0]))
    model.get_layer("bn").moving_mean.assign(np.array([1.0, 0.0, 2.0, 3.0]))
    report = lint(model)
    assert [finding.code for finding in report.findings] == ["FL206"]
    assert report.verdict.endswith("nothing wrong; 1 note")
    assert report.clean


def test_a_model_without_bn() -> None:
    report = lint(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]))
    assert report.verdict == "no BatchNormalization layer: BN cannot be the cause"
    assert (report.findings, report.skipped, report.sites) == ((), (), ())


def test_not_a_model() -> None:
    with pytest.raises(ModelError, match="Received"):
        lint(object())
    with pytest.raises(FrostlineError, match="no rule 'FL7'"):
        lint(network(), select="FL7")


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.filterwarnings("ignore")  # Keras warns when the loaded optimizer does not fit
def test_a_late_flip_does_what_fl107_says(frozen: bool, loaded: bool, tmp_path: Any) -> None:
    model = network()
    model.get_layer("bn").trainable = frozen
    trained(model)
    if loaded:
        model.save(tmp_path / "m.keras")
        model = keras.saving.load_model(tmp_path / "m.keras")
    layer = model.get_layer("bn")
    layer.trainable = not frozen
    findings = lint(model, select="FL107").findings
    before = numbers(layer.gamma), numbers(layer.moving_mean)
    try:
        step(model)
    except (ValueError, KeyError, TypeError):
        outcome = "the next training step raises"
    else:
        moved = [np.any(numbers(v) != old) for v, old in
                 zip((layer.gamma, layer.moving_mean), before, strict=True)]  # fmt: skip
        assert moved[0] == moved[1]
        outcome = {(True, True): "it still trains", (False, False): "it still does not train"}.get(
            (frozen, bool(moved[0])), "complies"
        )
    if findings:
        assert outcome in findings[0].message
    else:
        assert outcome == "complies"


def test_a_flip_between_compile_and_the_first_step_is_no_finding() -> None:
    model = network()
    model.compile("sgd", "mse")
    model.get_layer("bn").trainable = False
    assert found(model, "FL107") == []
    old = numbers(model.get_layer("bn").moving_mean)
    step(model)
    np.testing.assert_array_equal(numbers(model.get_layer("bn").moving_mean), old)
    assert found(model, "FL107") == []


def test_written_inference_mode_is_overridden_by_training() -> None:
    """FL108, whatever the backend: the recipe `base(inputs, training=False)` does not hold."""
    inputs = keras.Input((4,))
    base = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn")])
    model = keras.Model(inputs, keras.layers.Dense(2)(base(inputs, training=False)))
    layer = base.get_layer("bn")
    assert "FL108" in found(model)
    old = numbers(layer.moving_mean)
    trained(model)
    assert np.all(numbers(layer.moving_mean) != old)
    layer.trainable = False
    model.compile("sgd", "mse")
    old = numbers(layer.moving_mean)
    step(model)
    np.testing.assert_array_equal(numbers(layer.moving_mean), old)
    assert found(model, "FL108") == []


def test_a_default_of_call_is_not_written_by_hand() -> None:
    """Keras notes the default at the call: of its own RNN it is False."""

    class Cell(keras.layers.Layer):
        def __init__(self) -> None:
            super().__init__(name="cell")
            self.state_size, self.norm = 3, keras.layers.BatchNormalization(name="bn")

        def build(self, shape: Any) -> None:
            self.norm.build(shape)

        def call(self, inputs: Any, states: Any, training: Any = None) -> Any:
            state = self.norm(inputs, training=training)
            return state, [state]

    inputs = keras.Input((2, 3))
    model = keras.Model(inputs, keras.layers.RNN(Cell(), name="rnn")(inputs))
    assert found(model, "FL108") == []


def test_written_training_mode_gives_two_answers() -> None:
    inputs = keras.Input((4,))
    outputs = keras.layers.BatchNormalization(name="bn")(inputs, training=True)
    model = keras.Model(inputs, outputs)
    assert found(model, "FL109") == ["FL109"]
    predicted = model.predict(X, verbose=0)
    called = numbers(model(X))
    np.testing.assert_allclose(called.mean(0), 0, atol=1e-5)  # the batch's own statistics
    np.testing.assert_allclose(predicted, X / np.sqrt(1.001), rtol=1e-5)  # the stored ones


def test_half_frozen_statistics_move() -> None:
    model = network()
    layer = model.get_layer("bn")
    for variable in layer.trainable_variables:
        variable.trainable = False
    assert "FL103" in found(model)
    gamma, mean = numbers(layer.gamma), numbers(layer.moving_mean)
    trained(model)
    np.testing.assert_array_equal(numbers(layer.gamma), gamma)
    assert np.all(numbers(layer.moving_mean) != mean)


def test_old_share_is_what_the_moving_average_keeps() -> None:
    layer = keras.layers.BatchNormalization(name="bn", momentum=0.97)
    model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(2)])
    layer.moving_mean.assign(np.full(4, 1000.0))
    model.compile("sgd", "mse")
    for _ in range(7):
        step(model)
    (finding,) = lint(model, select="FL203").findings
    kept = (numbers(layer.moving_mean) - X.mean(0)) / (1000 - X.mean(0))
    np.testing.assert_allclose(kept, finding.evidence["old_share"], rtol=1e-4)
    assert finding.evidence["steps"] == 7


def test_accumulated_gradients_do_not_hide_steps() -> None:
    model = network()
    model.compile(keras.optimizers.SGD(gradient_accumulation_steps=4), "mse")
    for _ in range(8):
        step(model)
    (finding,) = lint(model, select="FL203").findings
    assert finding.evidence["steps"] == 8


def test_torch_modules_in_keras() -> None:
    if keras.backend.backend() != "torch":
        pytest.skip("torch modules need the torch backend")
    import torch

    norm = torch.nn.BatchNorm1d(4)
    body = torch.nn.Sequential(torch.nn.Linear(4, 4), norm)
    layer = keras.layers.TorchModuleWrapper(body, name="wrapped", output_shape=(None, 4))
    model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(2)])
    layer.trainable = False
    report = lint(model, select="FL105")
    assert [finding.sites for finding in report.findings] == [("wrapped/1",)]
    old = norm.running_mean.clone()
    trained(model)
    assert torch.all(norm.running_mean != old)  # the claim of FL105
    with torch.no_grad():
        norm.running_var[2] = torch.nan
    assert found(model, "FL201") == ["FL201"]
    body[1] = torch.nn.BatchNorm1d(4, momentum=None)
    assert found(model, "FL112") == []


def test_facts_of_a_nested_model() -> None:
    def block(name: str) -> Any:
        return keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                keras.layers.Conv2D(5, 3, name="conv"),
                keras.layers.BatchNormalization(name="bn"),
            ],
            name=name,
        )

    inputs = keras.Input((8, 8, 3), batch_size=6)
    left, right = block("left"), block("right")
    merged = keras.layers.Concatenate()([left(inputs), right(inputs, training=False)])
    model = keras.Model(inputs, keras.layers.Dense(2, name="head")(merged), name="twins")
    left.get_layer("conv").trainable = False
    known = read_facts(model)
    assert (known.name, known.batch, known.steps, known.traced) == ("twins", 6, None, False)
    assert [each.site.path for each in known] == ["left/bn", "right/bn"]
    assert [each.training for each in known] == [None, False]
    assert [each.values for each in known] == [36, 36]
    assert {layer.path: layer.trains for layer in known.layers} == {
        "left/conv": False, "right/conv": True, "head": True,
    }  # fmt: skip
    assert known.sites[0].variance is not None
    np.testing.assert_array_equal(known.sites[0].variance, np.ones(5))
    assert known.sites[0].variance.dtype == np.float64
    trained_model = keras.Model(inputs, model.output)
    trained_model.compile("sgd", "mse")
    trained_model.train_on_batch(np.ones((6, 8, 8, 3)), np.ones((6, 6, 6, 2)))
    after = read_facts(trained_model)
    assert (after.steps, after.traced) == (1, True)
    assert [each.optimized for each in after] == [True, True]


def test_a_subclassed_model_and_an_unbuilt_one() -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.norm = keras.layers.BatchNormalization(name="bn", momentum=0.1)
            self.head = keras.layers.Dense(2)

        def call(self, x: Any, training: Any = None) -> Any:
            return self.head(self.norm(x, training=training))

    model = Net()
    assert found(model) == ["FL111"]
    assert {each.code for each in lint(model).skipped} >= {"FL201", "FL203"}
    trained(model)
    model.norm.moving_variance.assign(np.full(4, -1.0))
    assert found(model) == ["FL202", "FL111"]


def test_lint_changes_no_bit() -> None:
    model = trained(network(fl.layers.BatchNormalization(name="bn")))

    def everything() -> list[Any]:
        return [numbers(v) for v in (*model.variables, *model.optimizer.variables)]

    before = everything()
    lint(model)
    for old, new in zip(before, everything(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_report_of_lint() -> None:
    layer = fl.layers.BatchNormalization(name="bn[bold]<script>", policy="batch", momentum=0.2)
    model = network(layer)
    layer.trainable = False
    report = lint(model, ignore={"FL204": "weights are loaded later"})
    assert report.verdict == "1 error at 1 of 1 BN layer; first: FL101 frozen-uses-batch-statistics"
    assert report.findings[0].sites == ("bn[bold]<script>",)
    assert "bn[bold]<script>" in str(report)
    assert {each.code: each.reason for each in report.skipped}["FL204"] == (
        "ignored: weights are loaded later"
    )
    assert report.origin["backend"] == keras.backend.backend()
    assert not set(report.rules) & {each.code for each in report.skipped}
    assert not report.clean


def test_a_discriminator_under_two_regimes() -> None:
    """The pattern of examples/gan.py, whose flags say nothing: the two optimizers do."""
    inner = keras.Sequential(
        [
            keras.Input((4,)),
            fl.layers.BatchNormalization(name="bn"),
            keras.layers.Dense(2, name="head"),
        ],
        name="critic",
    )
    trained(inner)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), inner])
    model.compile("sgd", "mse")
    assert found(model, "FL117") == []
    with fl.frozen(inner):
        assert found(model, "FL117") == ["FL117"]
        step(model)
    assert inner.trainable
    assert found(model, "FL117") == ["FL117"]
    assert [site.trained_by for site in fl.sites(model)] == ["critic"]
    assert [site.trained_by for site in fl.sites(inner)] == [None]
