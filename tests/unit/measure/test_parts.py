"""History, encodings of inputs, the walk of the attribution and its groups; no framework."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from frostline.data.batch import Batch
from frostline.measure import inputs, shares
from frostline.measure.history import parse
from frostline.numerics.attribution import path_integral
from frostline.types import DataError

WANTED = {"loss": (2.0, 1.0), "val_loss": (3.0, 2.5)}


class TestHistory:
    def test_every_form(self, tmp_path: Path) -> None:
        columns = {"epoch": [0, 1], "loss": [2, np.float32(1)], "val_loss": [3.0, 2.5]}
        rows = [{"epoch": 0, "loss": 2, "val_loss": 3}, {"epoch": 1, "loss": 1, "val_loss": 2.5}]
        commas, semicolons = tmp_path / "log.csv", tmp_path / "semi.csv"
        commas.write_text("epoch,loss,val_loss\n0,2,3\n1,1.0,2.5\n")
        semicolons.write_text("epoch;loss;val_loss\n0;2;3\n1;1.0;2.5\n")
        for form in (
            columns,
            SimpleNamespace(history=columns),
            rows,
            iter(rows),
            commas,
            str(semicolons),
        ):
            assert parse(form) == WANTED
        assert parse(None) == {}

    def test_epochs_without_a_number(self, tmp_path: Path) -> None:
        found = parse({"loss": [2.0, 1.0], "val_loss": [3.0]})
        assert found["val_loss"][0] == 3
        assert np.isnan(found["val_loss"][1])
        path = tmp_path / "log.csv"
        path.write_text("epoch,loss\n0,NA\n1,1\n")
        assert np.isnan(parse(path)["loss"][0])

    @pytest.mark.parametrize("bad", [3, {"loss": 1.0}, [1, 2], {"loss": ["a", "b"]}, "x.csv"])
    def test_words(self, bad: Any) -> None:
        with pytest.raises(DataError, match="Received"):
            parse(bad)


def pictures(low: float, high: float, channels: int = 3) -> Any:
    return np.random.default_rng(0).uniform(low, high, (40, 4, 4, channels)).astype(np.float32)


class TestInputs:
    def test_moments_per_channel(self) -> None:
        x = pictures(0, 1) * np.array([1, 2, 3], np.float32)
        found = inputs.moments([Batch(x[:10]), Batch(x[10:])])
        assert found is not None
        np.testing.assert_allclose(found.mean, x.mean((0, 1, 2)), rtol=1e-5)
        np.testing.assert_allclose(found.deviation, x.std((0, 1, 2)), rtol=1e-5)
        np.testing.assert_array_equal(found.high, x.max((0, 1, 2)))
        assert inputs.moments([Batch({"a": x, "b": x})]) is None
        assert inputs.moments([Batch(np.arange(3))]) is None
        # Sequences of other lengths, on the axis that a torch model has its channels on.
        assert inputs.moments([Batch(np.ones((4, 9))), Batch(np.ones((4, 7)))]) is None

    @pytest.mark.parametrize("unit", [False, True])
    def test_encodings_are_those_of_keras_applications(self, unit: bool) -> None:
        """Written out from the documentation of ``preprocess_input``, per pixel."""
        raw = np.round(pictures(0, 255))
        x = raw / 255 if unit else raw
        seen = inputs.moments([Batch(x)])
        assert seen is not None
        tried = {name: change(x) for name, change in inputs.transforms(seen).items()}
        red, green, blue = (raw[..., i] for i in range(3))
        caffe = np.stack([blue - 103.939, green - 116.779, red - 123.68], -1)
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
        torch = np.stack([(raw[..., i] / 255 - mean[i]) / std[i] for i in range(3)], -1)
        name = "255x" if unit else "x"
        np.testing.assert_allclose(tried[f"caffe({name})"], caffe, atol=1e-3)
        np.testing.assert_allclose(tried[f"torch({name})"], torch, atol=1e-4)
        back = inputs.transforms(seen)
        np.testing.assert_allclose(back["caffe⁻¹(x)"](caffe), raw, atol=1e-3)
        np.testing.assert_allclose(back["torch⁻¹(x)"](torch), raw, atol=1e-3)
        np.testing.assert_array_equal(tried["BGR"], x[..., ::-1])
        if not unit:
            np.testing.assert_allclose(tried["x/127.5-1"], raw / 127.5 - 1, atol=1e-6)
        assert all(values.dtype == np.float32 for values in tried.values())

    @pytest.mark.parametrize("axis", [-1, 1])
    @pytest.mark.parametrize("scale", [1.0, 255.0])
    def test_the_code_of_an_encoding_makes_it(self, scale: float, axis: int) -> None:
        x = np.moveaxis(scale * pictures(0, 1), -1, axis)
        seen = inputs.moments([Batch(x)], axis=axis)
        assert seen is not None
        changes = inputs.transforms(seen, axis=axis)
        assert len(changes) == 14
        for name, change in changes.items():
            made = eval(inputs.written(name, axis=axis), {"np": np, "x": x})
            np.testing.assert_allclose(made, change(x), rtol=1e-5, atol=1e-3, err_msg=name)

    def test_other_sizes_undo_each_other(self) -> None:
        x = pictures(0, 1)
        tried = inputs.resolutions(x.shape)
        double = tried[inputs.DOUBLE](x)
        assert double.shape == (len(x), 2 * x.shape[1], 2 * x.shape[2], x.shape[3])
        np.testing.assert_array_equal(double, np.kron(x, np.ones((1, 2, 2, 1))))
        half = inputs.resolutions(double.shape)[inputs.HALF]
        np.testing.assert_allclose(half(double), x, atol=1e-6)
        channels_first = np.moveaxis(double, -1, 1)
        torch = inputs.resolutions(channels_first.shape, axis=1)[inputs.HALF]
        np.testing.assert_allclose(torch(channels_first), np.moveaxis(x, -1, 1), atol=1e-6)
        assert inputs.HALF not in inputs.resolutions((4, 9, 16, 3))

    def test_one_channel_has_no_colours(self) -> None:
        seen = inputs.moments([Batch(pictures(0, 1, 1))])
        assert seen is not None
        names = list(inputs.transforms(seen))
        scales = ["x/255", "x*255", "x/127.5-1", "(x+1)*127.5", "x*2-1", "(x+1)/2"]
        assert names == [*scales, "1-x"]
        assert inputs.transforms(seen)["x*255"]({"image": np.ones(2)})["image"][0] == 255


class TestWalk:
    @pytest.mark.parametrize("quotient", [1.0, 30.0, 1e5])
    def test_ends_and_speed(self, quotient: float) -> None:
        assert shares.walk(0.0, quotient)[0] == pytest.approx(0, abs=1e-12)
        assert shares.walk(1.0, quotient)[0] == pytest.approx(1)
        for u in (0.1, 0.5, 0.8):
            ahead, behind = shares.walk(u + 1e-6, quotient)[0], shares.walk(u - 1e-6, quotient)[0]
            assert shares.walk(u, quotient)[1] == pytest.approx((ahead - behind) / 2e-6, rel=1e-5)

    def test_integrates_what_bends_at_one_end(self) -> None:
        """1/√v with v from 1 to ``quotient``: its derivative adds up to the difference."""
        quotient = 5e4

        def slope(t: float) -> float:
            return -0.5 * (quotient - 1) * (1 + (quotient - 1) * t) ** -1.5

        gap = quotient**-0.5 - 1

        def walked(u: float) -> Any:
            t, speed = shares.walk(u, quotient)
            return np.array([slope(t) * speed])

        assert path_integral(walked, gap, nodes=20, max_nodes=20).residual < 0.01
        straight = path_integral(lambda t: np.array([slope(t)]), gap, nodes=20, max_nodes=20)
        assert straight.residual > 0.03


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("conv2_block1_1_bn", "conv2_block1"),
        ("conv1_bn", "conv1"),
        ("block2a_expand_bn", "block2a"),
        ("block_12_project_BN", "block_12"),
        ("net/block3a_bn", "net/block3a"),
        ("backbone/block3/bn1", "backbone/block3"),
        ("batch_normalization_7", "batch_normalization_7"),
        ("layer1/0/bn2", "layer1/0"),
    ],
)
def test_block_of_a_site(path: str, block: str) -> None:
    assert shares.block(path) == block


def test_groups_add_up() -> None:
    paths = [f"conv{i}_block{j}_{k}_bn" for i in (2, 3) for j in (1, 2, 3) for k in (1, 2, 3)]
    values = np.arange(18.0)
    groups = shares.grouped(paths, values)
    assert list(groups)[:2] == ["conv2_block1", "conv2_block2"]
    assert groups["conv2_block2"] == 3 + 4 + 5
    numbered = shares.grouped([f"batch_normalization_{i}" for i in range(60)], np.ones(60))
    assert next(iter(numbered)) == "batch_normalization_0 … batch_normalization_4"
    assert set(numbered.values()) == {5.0}
    assert shares.grouped(["a", "b"], np.ones(2)) == {}
