"""Features of inputs that are no structure of arrays: what a sample is to ``fl.cached``."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn
from torch.nn import functional
from torch.utils import data as torch_data

import frostline as fl
from frostline.types import DataError, ModelError


def body(channels: int = 2) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def pictures(count: int, *, sizes: int = 1) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 6 + i % sizes, 6 + 2 * (i % sizes), generator=generator)
        for i in range(count)
    ]


@dataclasses.dataclass
class Pictures:
    image: Any
    scale: float = 1.0
    label: Any = None


class Resized(nn.Module):
    """Each picture is brought to one size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = body()

    def forward(self, images: list[Any]) -> Any:
        return self.body(torch.cat([functional.interpolate(i[None], (8, 8)) for i in images]))


class Padded(Resized):
    """All pictures are padded to the largest of them."""

    def forward(self, images: list[Any]) -> Any:
        high, wide = (max(i.shape[axis] for i in images) for axis in (1, 2))
        padded = [functional.pad(i, (0, wide - i.shape[2], 0, high - i.shape[1])) for i in images]
        return self.body(torch.stack(padded))


class Opened(Resized):
    def forward(self, batch: Any) -> Any:
        return self.body(batch.image * batch.scale)


class Mapped(Resized):
    def forward(self, batch: Any) -> Any:
        return self.body(batch["image"])


class Tasks(Resized):
    def forward(self, x: Any, task: str) -> Any:
        return self.body(x * {"one": 1.0, "two": 2.0}[task])


def prefix_of(model: Any, sample: Any) -> Any:
    model.eval()
    fl.freeze(model, "body/3")
    return fl.split(model, sample=sample).prefix


def own(prefix: Any, *args: Any) -> Any:
    with torch.no_grad():
        return prefix.eval()(*args)


def cases() -> dict[str, Callable[[], tuple[Any, Any, list[Any]]]]:
    """A model, a sample, and the inputs of two batches."""
    x = torch.stack(pictures(44))
    many = pictures(44, sizes=4)
    return {
        "pictures of many sizes": lambda: (
            Resized(), (many[:4],), [(many[:40],), (many[40:],)]
        ),
        "a dataclass": lambda: (
            Opened(), (Pictures(x[:4], 2.0),), [(Pictures(x[:40], 2.0),), (Pictures(x[40:], 2.0),)]
        ),
        "a mapping as one argument": lambda: (
            Mapped(), ({"image": x[:4], "name": "a"},),
            [({"image": x[:40], "name": "a"},), ({"image": x[40:], "name": "a"},)],
        ),
        "a text for all samples": lambda: (
            Tasks(), (x[:4], "two"), [(x[:40], "two"), (x[40:], "two")]
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", cases())
def test_features_are_those_of_the_frozen_part_in_their_order(name: str, tmp_path: Path) -> None:
    model, sample, batches = cases()[name]()
    prefix = prefix_of(model, sample)
    expected = torch.cat([own(prefix, *given) for given in batches])
    data = [(given, torch.arange(40 if i == 0 else 4)) for i, given in enumerate(batches)]
    for _ in range(2):  # the second time they are read
        features = fl.cache_features(prefix, data, tmp_path, verbose=0)
        found = torch.stack([features[i][0] for i in range(44)])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [int(features[i][1]) for i in range(44)] == [*range(40), *range(4)]


def test_what_belongs_to_all_samples_is_part_of_the_key(tmp_path: Path) -> None:
    x = torch.stack(pictures(8))
    prefix = prefix_of(Tasks(), (x, "one"))
    for task in ("one", "two", "one"):
        features = fl.cache_features(prefix, [((x, task), None)], tmp_path, verbose=0)
        found = torch.stack([features[i] for i in range(8)])
        torch.testing.assert_close(found, own(prefix, x, task), rtol=1e-5, atol=1e-5)
    both = [((x, task), None) for task in ("one", "two")]
    with pytest.raises(DataError, match=r"one call .* for each kind"):
        fl.cache_features(prefix, both, tmp_path, verbose=0)


def test_pictures_of_the_same_bytes_in_another_shape_are_others(tmp_path: Path) -> None:
    image = torch.arange(48.0).reshape(2, 4, 6)
    images = [image, image.reshape(2, 6, 4), image.double(), *pictures(2)]
    prefix = prefix_of(Resized(), (images[:2],))
    features = fl.cache_features(prefix, [((images,), None)], tmp_path, verbose=0)
    assert len({row.tobytes() for row in features.views[0].digests()}) == len(images)
    torch.testing.assert_close(features[1], own(prefix, images[:2])[1], rtol=1e-5, atol=1e-5)


def test_two_views_in_a_list_are_no_list_of_samples() -> None:
    class Views(Resized):
        def forward(self, x: Any, views: list[Any]) -> Any:
            if not isinstance(x, torch.Tensor) or len(x) > 99:  # no graph
                raise ValueError
            return self.body(x) + sum(v.mean((1, 2))[:, None] for v in views)

    x = torch.stack(pictures(4))
    views = [torch.randn(4, 5, 3), torch.randn(4, 5, 3)]
    model = Views().eval()
    fl.freeze(model, "body/3")
    parts = fl.split(model, sample=(x, views))
    others = (x + 1, [v + 1 for v in views])
    with torch.no_grad():
        cut = parts.suffix(*parts.prefix(*others))
        torch.testing.assert_close(cut, model(*others), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("most", [0, 99])
@pytest.mark.parametrize("sizes", [1, 3])
def test_pictures_that_are_padded_to_the_largest_are_not_kept(
    sizes: int, most: int, tmp_path: Path
) -> None:
    images = pictures(4, sizes=sizes)
    largest = max(max(i.shape) for i in images)

    class Bounded(Padded):
        def forward(self, images: list[Any]) -> Any:
            if max(max(i.shape) for i in images) > largest + max(1, most):
                raise ValueError("too large")
            return super().forward(images)

    prefix = prefix_of(Bounded(), (images,))
    with pytest.raises(ModelError, match=r"largest picture.*fl\.cached"):
        fl.cache_features(prefix, [((images,), None)], tmp_path, verbose=0)


def test_a_loader_of_pictures_with_what_is_in_them(tmp_path: Path) -> None:
    images = pictures(6, sizes=3)
    boxes = [{"boxes": torch.full((i % 3, 4), float(i)), "name": str(i)} for i in range(6)]
    data: Any = list(zip(images, boxes, strict=True))

    def collate(items: list[Any]) -> Any:
        return [image for image, _ in items], [target for _, target in items]

    masks: list[Any] = [torch.zeros(1, 2 + i % 3, 3) for i in range(6)]
    prefix = prefix_of(Resized(), (images,))
    loader = torch_data.DataLoader(data, batch_size=4, shuffle=True, collate_fn=collate)
    features = fl.cache_features(prefix, loader, tmp_path, verbose=0, batch_size=4)
    expected = own(prefix, images)
    for number in range(6):
        x, target = features[number]
        torch.testing.assert_close(x, expected[number], rtol=1e-5, atol=1e-5)
        assert target["name"] == str(number)
        torch.testing.assert_close(target["boxes"], boxes[number]["boxes"])
    data = [(images[:4], masks[:4]), (images[4:], masks[4:])]
    features = fl.cache_features(prefix, data, tmp_path, verbose=0, batch_size=4)
    assert [tuple(features[number][1].shape) for number in range(6)] == [m.shape for m in masks]


def test_an_augmentation_is_not_given_what_it_cannot_take(tmp_path: Path) -> None:
    x = torch.stack(pictures(4))
    prefix = prefix_of(Opened(), (Pictures(x),))
    with pytest.raises(DataError, match=r"fl\.cached\(.*views"):
        fl.cache_features(prefix, [((Pictures(x),), None)], tmp_path, verbose=0, views=2,
                          augment=lambda x, seed: x)  # fmt: skip


def test_a_suffix_that_needs_what_a_dataclass_holds_is_refused() -> None:
    class Skips(Opened):
        def forward(self, batch: Any) -> Any:
            return self.body(batch.image) + batch.image.mean((1, 2, 3))[:, None]

    model, x = Skips(), torch.stack(pictures(4))
    model.eval()
    fl.freeze(model, "body/3")
    with pytest.raises(ModelError, match=r"not compute what the model computes"):
        fl.split(model, sample=(Pictures(x),))


def test_labels_in_a_list_are_those_of_the_sample_in_a_suffix() -> None:
    class Detector(Resized):
        def forward(self, images: list[Any], targets: Any = None) -> Any:
            found = super().forward(images)
            if not self.training:
                return found
            return functional.mse_loss(found, torch.stack([t["box"] for t in targets]))

    images = pictures(4)
    targets = [{"box": torch.ones(3)} for _ in images]
    model = Detector()
    fl.freeze(model, "body/3")
    assert "fl.cached hands it" in " ".join(fl.split(model, sample=(images, targets)).notes)
