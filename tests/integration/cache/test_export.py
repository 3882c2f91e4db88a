"""Features and statistics in other people's formats, read back by their own readers."""

import keras
import numpy as np
import pytest

import frostline as fl

X = np.random.default_rng(0).normal(size=(2100, 6)).astype(np.float32)
LABELS = np.arange(2100) % 7


class Prefix:
    """Two tensors per sample, one of them an image."""

    identity = "two tensors"

    def __call__(self, x):
        return [2 * x, np.cumsum(x, axis=1)[:, :4].reshape(-1, 2, 2, 1)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return fl.cache_features(Prefix(), X, tmp_path_factory.mktemp("cache"), verbose=0)


@pytest.mark.once
def test_parquet_and_arrow_hold_every_row(cache, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(cache.to_parquet(tmp_path / "f.parquet", LABELS))
    assert table.column_names == ["features_0", "features_1", "label"]
    np.testing.assert_array_equal(np.array(table["features_0"].to_pylist(), np.float32), 2 * X)
    image = np.array(table["features_1"].to_pylist(), np.float32)
    np.testing.assert_array_equal(image, cache.rows(range(2100))[1])
    np.testing.assert_array_equal(table["label"].to_numpy(), LABELS)
    with pytest.raises(fl.OutputError, match="exists"):
        cache.to_parquet(tmp_path / "f.parquet")
    with pytest.raises(fl.OutputError, match=r"written as \.parquet or \.arrow"):
        cache.to_parquet(tmp_path / "f.csv")
    with pytest.raises(fl.DataError, match=r"each of the 2100 samples.*\(3,\)"):
        cache.to_parquet(tmp_path / "g.parquet", [1, 2, 3])
    assert not (tmp_path / "g.parquet").exists()


@pytest.mark.once
def test_a_data_set_of_hugging_face_maps_the_file(cache, tmp_path):
    pytest.importorskip("datasets")
    found = cache.to_dataset(tmp_path / "f.arrow", LABELS)
    assert len(found) == 2100
    some = found.with_format("numpy")[[5, 2000]]
    np.testing.assert_array_equal(some["features_0"], 2 * X[[5, 2000]])
    np.testing.assert_array_equal(some["label"], LABELS[[5, 2000]])
    with pytest.raises(fl.OutputError, match=r"an \.arrow file"):
        cache.to_dataset(tmp_path / "f.parquet")


@pytest.mark.once
def test_a_data_set_of_torch(cache):
    torch = pytest.importorskip("torch")
    loader = torch.utils.data.DataLoader(cache.to_torch(LABELS), batch_size=700)
    (first, image), label = next(iter(loader))
    np.testing.assert_array_equal(first.numpy(), 2 * X[:700])
    assert image.shape == (700, 2, 2, 1)
    np.testing.assert_array_equal(label.numpy(), LABELS[:700])
    assert len(cache.to_torch()[0]) == 2


def test_a_sidecar_puts_the_statistics_of_keras_back(tmp_path):
    pytest.importorskip("safetensors")
    model = keras.Sequential([keras.Input((6,)), keras.layers.BatchNormalization(name="bn")])
    fl.recalibrate(model, X)
    before = model.get_weights()
    file = fl.merge_statistics([model]).save(tmp_path / "bn.safetensors")
    fl.recalibrate(model, X * 3 + 1)
    fl.merge_statistics([file]).load_into(model)
    for one, want in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(one, want)
    with pytest.raises(fl.OutputError, match="exists"):
        fl.merge_statistics([model]).save(file)


@pytest.mark.once
def test_a_sidecar_puts_the_statistics_of_torch_back(tmp_path):
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    fl.recalibrate(model, X)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    file = fl.merge_statistics([model]).save(tmp_path / "bn.safetensors")
    assert set(fl.merge_statistics([file])) == {
        "1.running_mean", "1.running_var", "1.num_batches_tracked",
    }  # fmt: skip
    fl.recalibrate(model, X * 3 + 1)
    fl.merge_statistics([file]).load_into(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
