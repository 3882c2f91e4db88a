"""Loading, selecting and resizing images; every bad source is one line that names the culprit."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frostline.data import parquet as sources
from frostline.data.image_sets import load, resize
from frostline.types import BackendError, DataError

PIL_Image = pytest.importorskip("PIL.Image")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("sklearn")
pytestmark = pytest.mark.once

CIFAR = Path(__file__).parents[3].parent / "shared" / "data"
needs_cifar = pytest.mark.skipif(
    not (CIFAR / "cifar10-train.parquet").exists(), reason="no CIFAR-10 parquet files here"
)


def encoded(value: int, *, kind: str = "PNG", size: tuple[int, int] = (6, 4)) -> bytes:
    """A one-colour image that can be recognised after decoding."""
    buffer = io.BytesIO()
    PIL_Image.new("RGB", size, (value, 255 - value, 7)).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(
    path: Path,
    labels: list[Any],
    *,
    columns: tuple[str, str] = ("image", "label"),
    names: list[str] | None = None,
    cells: list[Any] | None = None,
    row_group_size: int = 3,
) -> Path:
    """A Hugging Face image file; the first channel of row i is i."""
    if cells is None:
        cells = [{"bytes": encoded(i), "path": None} for i in range(len(labels))]
    table = pa.table({columns[0]: cells, columns[1]: labels})
    if names is not None:
        features = {
            columns[0]: {"_type": "Image"},
            columns[1]: {"names": names, "_type": "ClassLabel"},
        }
        text = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def write_folder(root: Path, classes: dict[str, int], suffix: str = ".png") -> Path:
    value = 0
    kind = {".jpg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP"}[suffix]
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i:03d}{suffix}").write_bytes(encoded(value, kind=kind))
            value += 1
    return root


class TestSelection:
    def test_digits_match_scikit_learn(self) -> None:
        from sklearn.datasets import load_digits

        bundle = load_digits()
        got = load("digits", split="all", per_class=170)
        assert got.images.dtype == np.uint8
        assert got.images.shape == (1700, 8, 8, 3)
        assert got.labels.dtype == np.int64
        rows = got.selection["indices"]
        np.testing.assert_array_equal(bundle.target[rows], got.labels)
        grey = bundle.images[rows]
        for channel in range(3):
            np.testing.assert_allclose(got.images[..., channel] * (16 / 255), grey, atol=0.04)

    def test_order_of_classes_gives_the_labels(self) -> None:
        got = load("digits", classes=["8", 3], per_class=20)
        assert got.class_names == ("8", "3")
        from sklearn.datasets import load_digits

        target = load_digits().target[got.selection["indices"]]
        np.testing.assert_array_equal(np.where(target == 8, 0, 1), got.labels)
        assert Counter(got.labels.tolist()) == {0: 20, 1: 20}

    def test_seeded_and_reproducible(self) -> None:
        a, b, c = (load("digits", per_class=10, seed=seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(a.images, b.images)
        assert a.selection == b.selection
        assert set(a.selection["indices"]) != set(c.selection["indices"])
        assert a.selection["digest"] != c.selection["digest"]

    def test_global_rng_is_untouched(self) -> None:
        before = np.random.get_state()[1].copy()  # noqa: NPY002 - the global one is the point
        load("digits", per_class=3)
        np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002

    def test_a_class_is_chosen_alike_whatever_its_company_and_fewer_are_a_subset(self) -> None:
        def rows(classes: list[str], n: int) -> set[int]:
            got = load("digits", classes=classes, per_class=n)
            kept = got.labels == classes.index("5")
            return set(np.array(got.selection["indices"])[kept].tolist())

        assert rows(["5", "1"], 30) == rows(["7", "5", "9"], 30)
        assert rows(["5"], 10) < rows(["5"], 30)

    def test_classes_are_mixed_in_the_order(self) -> None:
        labels = load("digits", classes=["0", "1"], per_class=100).labels
        # A batch of one class only would have batch statistics that training never shows.
        assert all(0 < labels[start : start + 20].mean() < 1 for start in range(0, 200, 20))

    def test_train_and_test_are_disjoint_and_complete(self) -> None:
        parts = {
            split: load("digits", split=split, per_class=None) for split in ("train", "test", "all")
        }
        assert len(parts["train"]) + len(parts["test"]) == len(parts["all"]) == 1797
        chosen = {s: load("digits", split=s, per_class=34) for s in ("train", "test")}
        rows = {s: set(c.selection["indices"]) for s, c in chosen.items()}
        assert not rows["train"] & rows["test"]
        assert 0.18 < len(parts["test"]) / 1797 < 0.2

    def test_selection_is_json(self) -> None:
        got = load("digits", classes=[1, 2], per_class=3, seed=4)
        record = json.loads(json.dumps(got.selection))
        assert record == dict(got.selection)
        assert record["source"] == "digits"
        assert (record["classes"], record["per_class"], record["seed"]) == (["1", "2"], 3, 4)
        assert len(record["indices"]) == 6
        assert load("digits").selection["indices"] is None


class TestParquet:
    def test_names_rows_and_lazy_decoding(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = ["cat", "dog", "eel"]
        path = write_parquet(tmp_path / "a.parquet", [i % 3 for i in range(30)], names=names)
        decoded: list[str] = []
        real = sources.decode_image

        def recorded(data: bytes, where: str) -> Any:
            decoded.append(where)
            return real(data, where)

        monkeypatch.setattr(sources, "decode_image", recorded)
        got = load(str(path), classes=["eel", "cat"], per_class=4)
        assert len(decoded) == 8
        assert got.images.shape == (8, 4, 6, 3)
        np.testing.assert_array_equal(got.images[:, 0, 0, 0], got.selection["indices"])
        np.testing.assert_array_equal(
            np.where(np.array(got.selection["indices"]) % 3 == 2, 0, 1), got.labels
        )

    @pytest.mark.parametrize(
        ("columns", "labels", "expected"),
        [
            (("img", "fine_label"), [3, 5, 3], ("3", "5")),
            (("image", "label"), ["b", "a", "b"], ("a", "b")),
        ],
    )
    def test_columns_without_metadata(
        self, tmp_path: Path, columns: tuple[str, str], labels: list[Any], expected: Any
    ) -> None:
        path = write_parquet(tmp_path / "a.parquet", labels, columns=columns)
        got = load(str(path), split="all")
        assert got.class_names == expected
        assert Counter(got.labels.tolist()) == Counter(
            expected.index(str(label)) for label in labels
        )

    def test_unusual_column_names_are_found_by_their_metadata(self, tmp_path: Path) -> None:
        path = write_parquet(
            tmp_path / "a.parquet", [0, 1], columns=("scan", "diagnosis"), names=["ok", "ill"]
        )
        assert load(str(path), split="all").class_names == ("ok", "ill")

    def test_plain_binary_column(self, tmp_path: Path) -> None:
        cells = [encoded(9), encoded(9)]
        path = write_parquet(tmp_path / "a.parquet", [0, 0], cells=cells)
        assert (load(str(path), split="all").images[..., 0] == 9).all()

    def test_folder_with_shards_and_splits(self, tmp_path: Path) -> None:
        names = ["a", "b"]
        for shard, count in ((0, 4), (1, 6)):
            write_parquet(
                tmp_path / f"train-0000{shard}-of-00002.parquet", [0, 1] * count, names=names
            )
        write_parquet(tmp_path / "validation-00000-of-00001.parquet", [0, 1] * 2, names=names)
        write_parquet(tmp_path / "test-00000-of-00001.parquet", [0, 1] * 3, names=names)
        assert len(load(str(tmp_path))) == 20
        assert len(load(str(tmp_path), split="test")) == 6
        assert len(load(str(tmp_path), split="all")) == 30
        got = load(str(tmp_path), per_class=10)
        shard_rows = np.array(got.selection["indices"])
        # Rows 0-7 are the first shard's, 8-19 the second's.
        np.testing.assert_array_equal(
            got.images[:, 0, 0, 0], np.where(shard_rows < 8, shard_rows, shard_rows - 8)
        )

    def test_missing_split(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "x-train.parquet", [0, 1])
        with pytest.raises(DataError, match=r"no file of the split 'test'.*x-train.parquet"):
            load(str(tmp_path), split="test")

    def test_without_expected_columns(self, tmp_path: Path) -> None:
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"text": ["a"], "score": [1.0]}), path)
        with pytest.raises(DataError, match=r"an image and a label.*Received: columns text, score"):
            load(str(path))

    def test_truncated(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "a.parquet", [0, 1])
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file") as caught:
            load(str(path))
        assert "\n" not in str(caught.value)

    def test_damaged_page(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        noise = [{"bytes": encoded(0) + rng.bytes(5000), "path": None} for _ in range(6)]
        path = write_parquet(tmp_path / "a.parquet", [0] * 6, cells=noise, row_group_size=6)
        raw = bytearray(path.read_bytes())
        raw[4:64] = b"\xff" * 60
        path.write_bytes(bytes(raw))
        with pytest.raises(DataError, match=r"a\.parquet.*cannot be read"):
            load(str(path), split="all")

    def test_corrupt_image_is_named_by_row(self, tmp_path: Path) -> None:
        cells = [{"bytes": encoded(i), "path": None} for i in range(8)]
        cells[5] = {"bytes": encoded(0, kind="JPEG", size=(64, 64))[:300], "path": None}
        path = write_parquet(tmp_path / "a.parquet", [0] * 8, cells=cells)
        with pytest.raises(DataError, match=r"a\.parquet, row 5: not a readable image") as caught:
            load(str(path), split="all")
        assert "BytesIO" not in str(caught.value)

    def test_rows_without_bytes_or_label(self, tmp_path: Path) -> None:
        cells = [{"bytes": encoded(0), "path": None}, {"bytes": None, "path": "elsewhere.png"}]
        path = write_parquet(tmp_path / "a.parquet", [0, 0], cells=cells)
        with pytest.raises(DataError, match="row 1: holds no image bytes"):
            load(str(path), split="all")
        path = write_parquet(tmp_path / "b.parquet", [0, -1], names=["a", "b"])
        with pytest.raises(DataError, match=r"row 1: no label; labels are 0 to 1. Received: -1"):
            load(str(path))
        path = write_parquet(tmp_path / "c.parquet", [0, None])
        with pytest.raises(DataError, match="row 1: no label"):
            load(str(path))

    def test_files_of_different_data_sets(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "a.parquet", [0, 1], names=["cat", "dog"])
        write_parquet(tmp_path / "b.parquet", [0, 1], names=["one", "two"])
        with pytest.raises(DataError, match=r"b\.parquet: its classes differ from those of a\.par"):
            load(str(tmp_path))

    @needs_cifar
    def test_cifar10(self) -> None:
        got = load(str(CIFAR), classes=["cat", "dog"], per_class=100)
        assert got.images.shape == (200, 32, 32, 3)
        assert got.class_names == ("cat", "dog")
        # The oracle reads the same rows without our reader.
        table = pq.read_table(CIFAR / "cifar10-train.parquet")
        for position in range(0, 200, 20):
            row = got.selection["indices"][position]
            cell = table["image"][row].as_py()["bytes"]
            pixels = np.asarray(PIL_Image.open(io.BytesIO(cell)).convert("RGB"))
            np.testing.assert_array_equal(got.images[position], pixels)
            assert table["label"][row].as_py() == (3, 5)[got.labels[position]]
        assert len(load(str(CIFAR), split="test", per_class=5)) == 50
        with pytest.raises(DataError, match="'truck' has 1000 image"):
            load(str(CIFAR), split="test", per_class=1001, classes=["truck"])


class TestFolder:
    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
    def test_one_folder_per_class(self, tmp_path: Path, suffix: str) -> None:
        write_folder(tmp_path, {"b": 5, "a": 10}, suffix)
        (tmp_path / ".cache").mkdir()
        (tmp_path / "a" / "notes.txt").write_text("not an image")
        got = load(str(tmp_path))
        assert got.class_names == ("a", "b")
        assert Counter(got.labels.tolist()) == {0: 8, 1: 4}
        assert got.images.shape == (12, 4, 6, 3)
        # Values 0-4 were written for b; JPEG may be off by a little.
        assert (got.images[got.labels == 1][..., 0] <= 8).all()

    def test_train_and_test_folders(self, tmp_path: Path) -> None:
        write_folder(tmp_path / "train", {"a": 3, "b": 3})
        write_folder(tmp_path / "val", {"a": 2, "b": 1})
        assert len(load(str(tmp_path))) == 6
        assert len(load(str(tmp_path), split="test")) == 3
        assert len(load(str(tmp_path), split="all")) == 9

    def test_different_sizes_need_image_size(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"a": 2})
        (tmp_path / "a" / "big.png").write_bytes(encoded(3, size=(20, 30)))
        with pytest.raises(DataError, match=r"different sizes, from \(4, 6\) to \(30, 20\)"):
            load(str(tmp_path), split="all")
        assert load(str(tmp_path), split="all", image_size=10).images.shape == (3, 10, 10, 3)

    def test_corrupt_jpeg_is_named(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"a": 3}, ".jpg")
        bad = tmp_path / "a" / "001.jpg"
        bad.write_bytes(encoded(0, kind="JPEG", size=(64, 64))[:400])
        with pytest.raises(DataError, match=r"a/001\.jpg: not a readable image \(.*\)$"):
            load(str(tmp_path), split="all")
        bad.write_bytes(b"")
        with pytest.raises(DataError, match=r"a/001\.jpg"):
            load(str(tmp_path), split="all")

    def test_sixteen_bit_images_are_not_clipped_silently(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        PIL_Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "a" / "0.png")
        with pytest.raises(DataError, match=r"a/0\.png: only 8-bit images"):
            load(str(tmp_path), split="all")

    def test_without_images(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no images in it; expected FOLDER/CLASS"):
            load(str(tmp_path))
        (tmp_path / "0.png").write_bytes(encoded(0))
        with pytest.raises(DataError, match="not in one sub-folder per class"):
            load(str(tmp_path))


class TestNpz:
    x = np.random.default_rng(0).integers(0, 256, (10, 4, 5, 3), dtype=np.uint8)
    y = np.arange(10) % 2

    def test_x_and_y(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "a.npz", x=self.x, y=self.y)
        got = load(str(tmp_path / "a.npz"), split="all", per_class=5)
        np.testing.assert_array_equal(got.images, self.x[got.selection["indices"]])
        assert got.class_names == ("0", "1")

    def test_splits_names_and_column_labels(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npz"
        np.savez(
            path,
            x_train=self.x,
            y_train=self.y[:, None],
            x_test=self.x[:4],
            y_test=self.y[:4, None],
            class_names=np.array(["cat", "dog"]),
        )
        assert len(load(str(path))) == 10
        got = load(str(path), split="test", classes=["dog"])
        assert len(got) == 2
        assert len(load(str(path), split="all")) == 14

    @pytest.mark.parametrize("form", ["grey", "grey1", "unit", "float255", "int"])
    def test_forms_of_pixels(self, tmp_path: Path, form: str) -> None:
        x: Any = {
            "grey": self.x[..., 0],
            "grey1": self.x[..., :1],
            "unit": self.x / 255,
            "float255": self.x.astype(np.float32),
            "int": self.x.astype(np.int32),
        }[form]
        expected = np.repeat(self.x[..., :1], 3, axis=3) if form.startswith("grey") else self.x
        np.savez(tmp_path / "a.npz", x=x, y=np.eye(2)[self.y])
        got = load(str(tmp_path / "a.npz"), split="all", per_class=5)
        np.testing.assert_array_equal(got.images, expected[got.selection["indices"]])
        np.testing.assert_array_equal(got.labels, self.y[got.selection["indices"]])

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"a": x, "b": y}, r"no arrays x and y, nor x_train and y_train. Received: a, b"),
            ({"x": x, "y": y[:4]}, "10 images but 4 labels"),
            ({"x": x - 500.0, "y": y}, r"must be 0 to 255.*Received: -500"),
            ({"x": np.full((1, 2, 2, 3), np.nan), "y": y[:1]}, "must be 0 to 255"),
            ({"x": x.transpose(0, 3, 1, 2), "y": y}, r"Received: \(10, 3, 4, 5\), uint8"),
            ({"x": x, "y": y + 0.5}, r"integer labels.*float64"),
            ({"x": np.array([{}, {}], dtype=object), "y": y}, "pickled objects, which are never"),
            ({"x": x, "y": y, "class_names": np.array(["only"])}, "labels must be 0 to 0"),
        ],
    )
    def test_wrong_arrays(self, tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(DataError, match=message) as caught:
            load(str(tmp_path / "a.npz"))
        assert "\n" not in str(caught.value)

    def test_not_an_archive(self, tmp_path: Path) -> None:
        path = tmp_path / "a.npz"
        np.savez(path, x=self.x, y=self.y)
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"hello"):
            path.write_bytes(content)
            with pytest.raises(DataError, match=r"a\.npz: ") as caught:
                load(str(path))
            assert "\n" not in str(caught.value)
        with path.open("wb") as file:
            np.save(file, self.x)
        with pytest.raises(DataError, match=r"a\.npz: not a readable \.npz file"):
            load(str(path))


class TestErrors:
    @pytest.mark.parametrize(
        ("kwargs", "message"),
        [
            ({"classes": ["3", "eleven"]}, r"no such class.*0, 1, 2.*Received: 'eleven'"),
            ({"classes": ["3", "3"]}, "named twice"),
            ({"classes": []}, "must be a list"),
            ({"classes": "38"}, "must be a list"),
            ({"classes": [10]}, "no such class"),
            ({"classes": [-1]}, "no such class"),
            ({"per_class": 0}, "at least 1"),
            ({"per_class": 500}, r"class '0' has \d+ image.*'train'.*per_class=500"),
            ({"split": "validation"}, "split must be"),
            ({"seed": -1}, "seed must be"),
            ({"image_size": 0}, "1 to 8192 pixels"),
        ],
    )
    def test_wrong_selection(self, kwargs: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            load("digits", **kwargs)

    def test_closest_class_is_offered(self, tmp_path: Path) -> None:
        write_folder(tmp_path, {"cat": 1, "dog": 1})
        with pytest.raises(DataError, match=r"Closest: cat\. Its classes: cat, dog\. Rec.*'cta'"):
            load(str(tmp_path), classes=["cta"])

    def test_missing_source(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"No such file or folder.*Received: nowhere/at/all"):
            load("nowhere/at/all")
        (tmp_path / "a.csv").write_text("x")
        with pytest.raises(DataError, match=r"must be \.parquet or \.npz"):
            load(str(tmp_path / "a.csv"))

    @pytest.mark.parametrize(
        ("module", "source"),
        [("sklearn.datasets", "digits"), ("pyarrow.parquet", "a.parquet"), ("PIL.Image", "images")],
    )
    def test_missing_package_names_the_extra(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str
    ) -> None:
        write_parquet(tmp_path / "a.parquet", [0, 1])
        write_folder(tmp_path / "images", {"a": 2})
        monkeypatch.setitem(sys.modules, module, None)
        where = source if source == "digits" else str(tmp_path / source)
        with pytest.raises(BackendError, match=r'pip install "frostline\[experiments\]"'):
            load(where, split="all")

    def test_cifar10_without_a_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        keras = pytest.importorskip("keras")

        def offline() -> Any:
            raise Exception("URL fetch failure on ...: None -- [Errno -3]\nsecond line")

        monkeypatch.setattr(keras.datasets.cifar10, "load_data", offline)
        with pytest.raises(DataError, match="--data FOLDER_WITH_PARQUET") as caught:
            load("cifar10")
        assert "\n" not in str(caught.value)

    def test_cifar10_from_keras(self, monkeypatch: pytest.MonkeyPatch) -> None:
        keras = pytest.importorskip("keras")
        x = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
        y = (np.arange(20) % 10)[:, None]
        monkeypatch.setattr(
            keras.datasets.cifar10, "load_data", lambda: ((x, y), (x[:10] + 100, y[:10]))
        )
        got = load("cifar10", classes=["frog", "cat"], per_class=2)
        assert got.class_names == ("frog", "cat")
        np.testing.assert_array_equal(got.images[:, 0, 0, 0] % 10, np.where(got.labels == 0, 6, 3))
        assert load("cifar10", split="test").images.min() == 100
        assert len(load("cifar10", split="all")) == 30


class TestResize:
    def test_matches_pillow(self) -> None:
        images = np.random.default_rng(1).integers(0, 256, (3, 9, 7, 3), dtype=np.uint8)
        for method, code in (("bilinear", 2), ("bicubic", 3)):
            got = resize(images, (12, 20), method=method)  # type: ignore[arg-type]
            assert got.shape == (3, 12, 20, 3)
            for image, result in zip(images, got, strict=True):
                expected = PIL_Image.fromarray(image).resize((20, 12), code)
                np.testing.assert_array_equal(result, np.asarray(expected))

    def test_same_size_changes_nothing_and_shares_nothing(self) -> None:
        images = np.zeros((2, 4, 4, 3), np.uint8)
        got = resize(images, 4)
        got += 1
        assert images.max() == 0

    def test_wrong_input(self) -> None:
        with pytest.raises(DataError, match=r"uint8 of shape.*float32 of shape \(2, 4, 4, 3\)"):
            resize(np.zeros((2, 4, 4, 3), np.float32), 8)
        with pytest.raises(DataError, match="1 to 8192 pixels"):
            resize(np.zeros((2, 4, 4, 3), np.uint8), (8, 0))
        with pytest.raises(DataError, match="method must be"):
            resize(np.zeros((2, 4, 4, 3), np.uint8), 8, method="nearest")  # type: ignore[arg-type]
