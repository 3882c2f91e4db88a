"""Small programs of kinds that libraries have in common: batches, losses and BN of every form.

Each is trained for a few steps with a momentum under which the averages lag, so that inference is
worse than training: a diagnosis that acquits BN is wrong.
"""

from __future__ import annotations

import dataclasses
from collections import UserDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .program import Program, entry
from .torchvision_operators import load as torchvision

CLASSES = 4
LAGGING = {"momentum": 0.01}


def pictures(count: int = 48, side: int = 8, seed: int = 0) -> tuple[Any, Any]:
    """(n, 2, side, side), far from zero mean and unit variance, and class numbers to learn."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    x = torch.randn(count, 2, side, side, generator=generator) * 0.7 + 2.0
    x[:, 0] += y.view(-1, 1, 1) * 1.5
    return x, y


def rows(count: int = 48, size: int = 16) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def trained(model: Any, ask: Callable[[Any, Any], Any], batches: Sequence[Any]) -> Any:
    """Ten epochs of Adam: the averages keep most of what they began with."""
    torch.manual_seed(0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(10):
        for batch in batches:
            model.train()
            loss = ask(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def situation(
    make: Callable[[], Any],
    batches: Sequence[Any],
    ask: Callable[[Any, Any], Any],
    **more: Any,
) -> Program:
    torch.manual_seed(0)
    return Program(
        model=trained(make(), ask, batches), batches=batches, ask=ask,
        **{"lags": True, "call": lambda m, b: m(b[0]), **more},
    )  # fmt: skip


def convolutions(out: int = CLASSES, **norm: Any) -> nn.Sequential:
    norm = {**LAGGING, **norm}
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8, **norm), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, **norm), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, out),
    )  # fmt: skip


class Sample(NamedTuple):
    image: Any
    label: Any


@entry("NamedTuple batches", "torch", "batch")
def _named_tuple() -> Program:
    x, y = pictures()
    batches = [Sample(x[r], y[r]) for r in rows()]
    return situation(
        convolutions, batches, lambda m, b: F.cross_entropy(m(b.image), b.label),
        options={"loss": F.cross_entropy}, sample=x[:4],
    )  # fmt: skip


@dataclasses.dataclass
class Pictures:
    image: Any
    label: Any


@entry("dataclass batches, forward(batch)", "torch", "batch")
def _dataclass() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = convolutions()

        def forward(self, batch: Any) -> Any:
            return self.net(batch.image)

    x, y = pictures()
    batches = [Pictures(x[r], y[r]) for r in rows()]

    def step(m: Any, b: Any) -> Any:
        return F.cross_entropy(m(b), b.label)

    return situation(
        Net, batches, step, options={"step": step}, call=lambda m, b: m(b), sample=batches[0]
    )


@entry("tuple of two mappings (inputs, targets)", "torch", "batch")
def _two_mappings() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = convolutions()

        def forward(self, image: Any, scale: Any) -> Any:
            return {"logits": self.net(image * scale.view(-1, 1, 1, 1))}

    x, y = pictures()
    batches = [
        ({"image": x[r], "scale": torch.ones(len(x[r]))}, {"label": y[r], "id": y[r] + 100})
        for r in rows()
    ]

    def loss(out: Any, target: Any) -> Any:
        return F.cross_entropy(out["logits"], target["label"])

    return situation(
        Net, batches, lambda m, b: loss(m(**b[0]), b[1]), options={"loss": loss},
        call=lambda m, b: m(**b[0]), sample=batches[0][0],
    )  # fmt: skip


class Feature(UserDict):  # type: ignore[type-arg]
    """As Hugging Face's BatchEncoding: no dict, with attributes and ``to``."""

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise AttributeError(name)
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, device: Any) -> Any:
        return Feature({key: value.to(device) for key, value in self.data.items()})


@entry("BatchEncoding (a UserDict), step by attribute", "torch", "batch")
def _encoding() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = convolutions()

        def forward(self, pixel_values: Any, labels: Any = None) -> Any:
            logits = self.net(pixel_values)
            loss = None if labels is None else F.cross_entropy(logits, labels)
            return {"loss": loss, "logits": logits}

    x, y = pictures()
    batches = [Feature({"pixel_values": x[r], "labels": y[r]}) for r in rows()]

    def step(m: Any, b: Any) -> Any:
        return m(pixel_values=b.pixel_values, labels=b.labels)["loss"]

    return situation(
        Net, batches, step, options={"step": step},
        call=lambda m, b: m(b["pixel_values"])["logits"], sample={"pixel_values": x[:4]},
    )  # fmt: skip


@entry("PackedSequence inputs", "torch", "batch")
def _packed() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3, **LAGGING)
            self.memory = nn.GRU(3, 16, batch_first=True)
            self.last, self.head = nn.BatchNorm1d(16, **LAGGING), nn.Linear(16, CLASSES)

        def forward(self, packed: Any) -> Any:
            packed = packed._replace(data=self.norm(packed.data))
            return self.head(self.last(self.memory(packed)[1][0]))

    generator = torch.Generator().manual_seed(0)
    y = torch.arange(48) % CLASSES
    x = [
        torch.randn(4 + i % 5, 3, generator=generator) + 2 + y[i] * torch.tensor([1.0, 0, -1])
        for i in range(48)
    ]
    batches = [(nn.utils.rnn.pack_sequence(x[r], enforce_sorted=False), y[r]) for r in rows()]
    return situation(
        Net, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        options={"loss": F.cross_entropy}, sample=batches[0][0],
    )  # fmt: skip


@entry("nested tensors", "torch", "batch")
def _nested() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(3, 16), nn.BatchNorm1d(16, **LAGGING)
            self.head = nn.Linear(16, CLASSES)

        def forward(self, x: Any) -> Any:
            padded = torch.nested.to_padded_tensor(x, 0.0)
            return self.head(self.norm(self.first(padded).mean(1)).relu())

    generator = torch.Generator().manual_seed(0)
    y = torch.arange(48) % CLASSES
    x = [torch.randn(4 + i % 5, 3, generator=generator) + 2 + y[i] for i in range(48)]
    batches = [(torch.nested.nested_tensor(x[r]), y[r]) for r in rows()]
    return situation(
        Net, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        options={"loss": F.cross_entropy}, sample=batches[0][0],
    )  # fmt: skip


@entry("sparse inputs", "torch", "batch")
def _sparse() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(30, 16) / 3)
            self.norm, self.head = nn.BatchNorm1d(16, **LAGGING), nn.Linear(16, CLASSES)

        def forward(self, x: Any) -> Any:
            return self.head(self.norm(torch.sparse.mm(x, self.weight) + 1).relu())

    generator = torch.Generator().manual_seed(0)
    y = torch.arange(48) % CLASSES
    x = torch.rand(48, 30, generator=generator)
    x = torch.where(x > 0.7, x + 2 * F.one_hot(y, 30), torch.zeros(()))
    batches = [(x[r].to_sparse(), y[r]) for r in rows()]
    return situation(
        Net, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        options={"loss": F.cross_entropy}, sample=batches[0][0],
    )  # fmt: skip


@entry("(x, y, paths) batches", "torch", "batch")
def _paths() -> Program:
    x, y = pictures()
    batches = [(x[r], y[r], [f"{i}.png" for i in range(len(x[r]))]) for r in rows()]
    return situation(
        convolutions, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        options={"loss": F.cross_entropy}, sample=x[:4],
    )  # fmt: skip


@entry("(x, y, mask) of a segmentation", "torch", "batch")
def _masked() -> Program:
    def make() -> Any:
        return nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8, **LAGGING), nn.ReLU(),
            nn.Conv2d(8, CLASSES, 1),
        )  # fmt: skip

    x, y = pictures()
    labels = y.view(-1, 1, 1).expand(-1, 8, 8).contiguous()
    mask = torch.rand(48, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.3
    batches = [(x[r], labels[r], mask[r]) for r in rows()]

    def step(m: Any, b: Any) -> Any:
        images, target, valid = b
        losses = F.cross_entropy(m(images), target, reduction="none")
        return (losses * valid).sum() / valid.sum()

    return situation(make, batches, step, options={"step": step}, sample=x[:4])


@entry("forward(x, y) returns the loss", "torch", "model")
def _returns_loss() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = convolutions()

        def forward(self, x: Any, y: Any) -> Any:
            return F.cross_entropy(self.net(x), y)

    x, y = pictures()
    batches = [(x[r], y[r]) for r in rows()]
    return situation(
        Net, batches, lambda m, b: m(*b), call=lambda m, b: m(*b), sample=(x[:4], y[:4])
    )


@entry("deep supervision: a list in training", "torch", "model")
def _supervised() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8, **LAGGING), nn.ReLU())
            self.second = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, **LAGGING), nn.ReLU())
            self.side = nn.Sequential(nn.BatchNorm1d(8, **LAGGING), nn.Linear(8, CLASSES))
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            x = self.first(x)
            main = self.head(self.second(x).mean((2, 3)))
            return [main, self.side(x.mean((2, 3)))] if self.training else main

    x, y = pictures()
    batches = [(x[r], y[r]) for r in rows()]

    def loss(out: Any, target: Any) -> Any:
        outs = out if isinstance(out, list) else [out]
        return sum(F.cross_entropy(o, target) * 0.5**i for i, o in enumerate(outs))

    return situation(
        Net, batches, lambda m, b: loss(m(b[0]), b[1]), options={"loss": loss}, sample=x[:4],
        more_in_training=True,
    )  # fmt: skip


@entry("BN per domain, forward(x, domain)", "torch", "model")
def _domains() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 8, 3)
            self.norms = nn.ModuleList(nn.BatchNorm2d(8, **LAGGING) for _ in range(3))
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Any, domain: Any) -> Any:
            x = self.norms[int(domain[0])](self.conv(x)).relu()
            return self.head(x.mean((2, 3)))

    x, y = pictures()
    batches = [(x[r] * (1 + i % 2), torch.full((16,), i % 2), y[r]) for i, r in enumerate(rows())]
    return situation(
        Net, batches, lambda m, b: F.cross_entropy(m(b[0], b[1]), b[2]),
        options={"loss": F.cross_entropy}, call=lambda m, b: m(b[0], b[1]),
        sample=(x[:4], torch.zeros(4, dtype=torch.long)),
    )  # fmt: skip


@entry("student with its teacher inside", "torch", "loop")
def _teacher() -> Program:
    class Distilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = convolutions(momentum=0.5)
            with torch.no_grad():
                for _ in range(5):
                    self.teacher(pictures()[0])
            self.teacher.requires_grad_(False)
            self.student = convolutions()

        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.teacher.eval()
            return self

        def forward(self, x: Any) -> Any:
            return self.student(x), self.teacher(x)

    x, y = pictures()
    batches = [{"image": x[r], "label": y[r]} for r in rows()]

    def step(m: Any, b: Any) -> Any:
        mine, theirs = m(b["image"])
        return {
            "hard": F.cross_entropy(mine, b["label"]),
            "soft": F.kl_div(mine.log_softmax(1), theirs.softmax(1), reduction="batchmean"),
        }

    return situation(
        Distilled, batches, lambda m, b: sum(step(m, b).values()), options={"step": step},
        call=lambda m, b: m(b["image"]), sample=x[:4],
    )  # fmt: skip


class Conditional(nn.Module):
    """Class-conditional BN of a GAN: buffers of its own, gamma and beta of each class."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Embedding(CLASSES, channels), nn.Embedding(CLASSES, channels)
        nn.init.ones_(self.gain.weight)
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def forward(self, x: Any, label: Any) -> Any:
        x = F.batch_norm(
            x, self.stored_mean, self.stored_var, None, None, self.training, 0.01, 1e-5
        )
        return x * self.gain(label)[..., None, None] + self.shift(label)[..., None, None]


@entry("conditional BN with stored_mean (BigGAN)", "torch", "own BN")
def _conditional() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(6, 8 * 16), Conditional(8)
            self.last = nn.ConvTranspose2d(8, 2, 4, 2, 1)

        def forward(self, z: Any, label: Any) -> Any:
            x = self.norm(self.first(z).view(-1, 8, 4, 4) * 3 + 1, label).relu()
            return self.last(x)

    x, y = pictures()
    z = torch.randn(48, 6, generator=torch.Generator().manual_seed(2))
    batches = [((z[r], y[r]), x[r]) for r in rows()]
    return situation(
        Net, batches, lambda m, b: F.mse_loss(m(*b[0]), b[1]),
        options={"loss": F.mse_loss}, call=lambda m, b: m(*b[0]), sample=(z[:4], y[:4]),
    )  # fmt: skip


class ByHand(nn.Module):
    """BN in plain arithmetic."""

    def __init__(self, channels: int, names: tuple[str, str] = ("moving_mean", "moving_var")):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.names = names
        self.register_buffer(names[0], torch.zeros(1, channels, 1, 1))
        self.register_buffer(names[1], torch.ones(1, channels, 1, 1))

    def forward(self, x: Any) -> Any:
        mean, variance = (getattr(self, name) for name in self.names)
        if self.training:
            now = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
            with torch.no_grad():
                for name, old, new in zip(self.names, (mean, variance), now, strict=True):
                    setattr(self, name, 0.99 * old + 0.01 * new.detach())
            mean, variance = now
        return self.gamma * (x - mean) / torch.sqrt(variance + 1e-5) + self.beta


def _own(name: str, names: tuple[str, str]) -> None:
    @entry(name, "torch", "own BN")
    def build() -> Program:
        def make() -> Any:
            return nn.Sequential(
                nn.Conv2d(2, 8, 3), ByHand(8, names), nn.ReLU(), nn.Conv2d(8, 8, 3),
                ByHand(8, names), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                nn.Linear(8, CLASSES),
            )  # fmt: skip

        x, y = pictures()
        batches = [(x[r], y[r]) for r in rows()]
        return situation(
            make, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]),
            options={"loss": F.cross_entropy}, sample=x[:4],
        )  # fmt: skip


_own("BN by hand (d2l: moving_mean, moving_var)", ("moving_mean", "moving_var"))
_own("BN by hand (running_mean, running_var)", ("running_mean", "running_var"))


@entry("BN subclass with a mask argument", "torch", "own BN")
def _masked_norm() -> Program:
    class Masked(nn.BatchNorm1d):  # type: ignore[misc]
        def forward(self, x: Any, mask: Any) -> Any:
            out = torch.zeros_like(x)
            out[mask] = super().forward(x[mask])
            return out

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(3, 16), Masked(16, **LAGGING)
            self.head = nn.Linear(16, CLASSES)

        def forward(self, x: Any, mask: Any) -> Any:
            x = self.norm(self.first(x), mask).relu()
            return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    generator = torch.Generator().manual_seed(0)
    y = torch.arange(48) % CLASSES
    x = torch.randn(48, 7, 3, generator=generator) + 2 + y.view(-1, 1, 1)
    mask = torch.arange(7) < (3 + torch.arange(48) % 5).view(-1, 1)
    batches = [{"x": x[r], "mask": mask[r], "labels": y[r]} for r in rows()]
    return situation(
        Net, batches, lambda m, b: F.cross_entropy(m(b["x"], b["mask"]), b["labels"]),
        options={"loss": F.cross_entropy}, call=lambda m, b: m(b["x"], b["mask"]),
        sample={"x": x[:4], "mask": mask[:4]},
    )  # fmt: skip


@entry("SyncBatchNorm on a processor", "torch", "own BN")
def _sync() -> Program:
    class Uneasy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.SyncBatchNorm.convert_sync_batchnorm(convolutions())

        def forward(self, x: Any) -> Any:
            return self.net(x)

    x, y = pictures()
    batches = [(x[r], y[r]) for r in rows()]
    plain = situation(
        convolutions, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        options={"loss": F.cross_entropy}, sample=x[:4],
    )  # fmt: skip
    model = Uneasy()
    model.net.load_state_dict(plain.model.state_dict())
    return dataclasses.replace(plain, model=model)


@entry("compiled module (torch.compile, eager)", "torch", "deployment")
def _compiled() -> Program:
    x, y = pictures()
    batches = [(x[r], y[r]) for r in rows()]

    def make() -> Any:
        model = convolutions()
        model.compile(backend="eager")
        return model

    return situation(
        make, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        options={"loss": F.cross_entropy}, sample=x[:4],
    )  # fmt: skip


@entry("checkpointed blocks", "torch", "model")
def _checkpointed() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = convolutions(8), nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            return self.head(checkpoint(self.net, x, use_reentrant=False))

    x, y = pictures()
    batches = [(x[r], y[r]) for r in rows()]
    return situation(
        Net, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        options={"loss": F.cross_entropy}, sample=x[:4],
    )  # fmt: skip


@entry("lazy modules, built by their first batch", "torch", "model")
def _lazy() -> Program:
    def make() -> Any:
        return nn.Sequential(
            nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(**LAGGING), nn.ReLU(), nn.Flatten(),
            nn.LazyLinear(16), nn.LazyBatchNorm1d(**LAGGING), nn.ReLU(), nn.LazyLinear(CLASSES),
        )  # fmt: skip

    x, y = pictures()
    batches = [(x[r], y[r]) for r in rows()]
    model = make()
    model(x[:4])
    return situation(
        lambda: model, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        options={"loss": F.cross_entropy}, sample=x[:4],
    )  # fmt: skip


@entry("InstanceNorm of both kinds beside BN", "torch", "model")
def _instance() -> Program:
    def make() -> Any:
        return nn.Sequential(
            nn.InstanceNorm2d(2), nn.Conv2d(2, 8, 3),
            nn.InstanceNorm2d(8, track_running_stats=True, **LAGGING), nn.ReLU(),
            nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, **LAGGING), nn.Tanh(),
            nn.Flatten(), nn.Linear(8 * 16, CLASSES),
        )  # fmt: skip

    x, y = pictures()
    x = x * (1 + y.view(-1, 1, 1, 1) * torch.linspace(-1, 1, 8))
    batches = [(x[r], y[r]) for r in rows()]
    return situation(
        make, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        options={"loss": F.cross_entropy}, sample=x[:4], lags=False,
    )  # fmt: skip


@entry("margin head that needs labels (ArcFace)", "torch", "model")
def _margin() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = convolutions(8)
            self.centres = nn.Parameter(torch.randn(CLASSES, 8))

        def forward(self, x: Any, label: Any = None) -> Any:
            cosine = F.normalize(self.net(x)) @ F.normalize(self.centres).T
            if label is not None:
                cosine = cosine - 0.2 * F.one_hot(label, CLASSES)
            return 8 * cosine

    x, y = pictures()
    batches = [(x[r], y[r]) for r in rows()]

    def step(m: Any, b: Any) -> Any:
        return F.cross_entropy(m(*b), b[1])

    return situation(Net, batches, step, options={"step": step}, sample=x[:4])


@entry("CTC on padded sequences", "torch", "loss")
def _ctc() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(3, 16, 3, padding=1), nn.BatchNorm1d(16, **LAGGING)
            self.head = nn.Linear(16, 5)

        def forward(self, audio: Any) -> Any:
            x = self.norm(self.conv(audio)).relu()
            return self.head(x.transpose(1, 2)).log_softmax(2)

    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, 5, (48, 3), generator=generator)
    audio = text.float().repeat_interleave(5, 1)[:, None] * torch.tensor([1.0, 2, -1])[:, None]
    audio = audio + 3 + 0.3 * torch.randn(audio.shape, generator=generator)
    length = 12 + torch.arange(48) % 4
    batches = [
        {"audio": audio[r], "lengths": length[r], "text": text[r],
         "text_lengths": torch.full((16,), 3)} for r in rows()
    ]  # fmt: skip

    def step(m: Any, b: Any) -> Any:
        found = m(b["audio"]).transpose(0, 1)
        return F.ctc_loss(found, b["text"], b["lengths"], b["text_lengths"])

    return situation(
        Net, batches, step, options={"step": step}, call=lambda m, b: m(b["audio"]),
        sample=audio[:4],
    )  # fmt: skip


@entry("three images per sample (triplets)", "torch", "loss")
def _triplets() -> Program:
    x, _ = pictures(96)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    batches = [(x[r], (x + 2 * noise)[r].roll(4, 0), x[r].roll(1, 0)) for r in rows(96, 16)]
    margin = nn.TripletMarginLoss(margin=3.0)

    def step(m: Any, b: Any) -> Any:
        return margin(*(F.normalize(m(each)) for each in b))

    return situation(lambda: convolutions(8), batches, step, options={"step": step}, sample=x[:4])


@entry("cross-correlation of two views (Barlow Twins)", "torch", "loss")
def _barlow() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = convolutions(8)

        def forward(self, one: Any, two: Any) -> Any:
            return self.net(one), self.net(two)

    def loss(out: Any, _: Any) -> Any:
        one, two = ((z - z.mean(0)) / (z.std(0) + 1e-4) for z in out)
        c = one.T @ two / len(one)
        return (torch.diagonal(c) - 1).square().sum() + 0.01 * (
            c - torch.diag(c.diag())
        ).square().sum()

    x, _ = pictures()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    batches = [((x[r], x[r] + 0.5 * noise[r]), torch.zeros(16)) for r in rows()]
    return situation(
        Net, batches, lambda m, b: loss(m(*b[0]), None), options={"loss": loss},
        call=lambda m, b: m(*b[0]), sample=(x[:4], x[:4]), lags=False,
    )  # fmt: skip


@entry("partial likelihood of survival (Cox)", "torch", "loss")
def _survival() -> Program:
    def make() -> Any:
        return nn.Sequential(
            nn.Linear(5, 16), nn.BatchNorm1d(16, **LAGGING), nn.ReLU(), nn.Linear(16, 1)
        )

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 5, generator=generator) * 3 + 4
    time = torch.exp(-x[:, 0] / 3) * (1 + torch.rand(96, generator=generator))
    event = torch.rand(96, generator=generator) > 0.2
    batches = [(x[r], (time[r], event[r])) for r in rows(96, 32)]

    def loss(out: Any, target: Any) -> Any:
        when, seen = target
        risk = out[:, 0][when.argsort(descending=True)]
        seen = seen[when.argsort(descending=True)]
        return -((risk - risk.logcumsumexp(0)) * seen).sum() / seen.sum().clamp_min(1)

    return situation(
        make, batches, lambda m, b: loss(m(b[0]), b[1]), options={"loss": loss}, sample=x[:4],
        lags=False,
    )  # fmt: skip


@entry("experts that only some batches use", "torch", "model")
def _experts() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 8, 3)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.BatchNorm2d(8, **LAGGING), nn.ReLU()) for _ in range(3)
            )
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            chosen = int(x.mean() > 4.5)
            return self.head(self.experts[chosen](self.conv(x)).mean((2, 3)))

    x, y = pictures()
    batches = [(x[r] * (1 + i), y[r]) for i, r in enumerate(rows())]
    return situation(
        Net, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        options={"loss": F.cross_entropy}, sample=x[:4],
    )  # fmt: skip


@entry("partly frozen by requires_grad and an own train()", "torch", "loop")
def _partly() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Sequential(
                nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8, momentum=0.5), nn.ReLU()
            )
            with torch.no_grad():
                for _ in range(6):
                    self.base(pictures()[0])
            self.base.requires_grad_(False)
            self.top = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, **LAGGING), nn.ReLU())
            self.head = nn.Linear(8, CLASSES)

        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.base.eval()
            return self

        def forward(self, x: Any) -> Any:
            return self.head(self.top(self.base(x)).mean((2, 3)))

    x, y = pictures()
    batches = [(x[r], y[r]) for r in rows()]
    return situation(
        Net, batches, lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        options={"loss": F.cross_entropy}, sample=x[:4],
    )  # fmt: skip


@entry("Lightning: a mapping from training_step, self.log", "lightning", "loop")
def _logging() -> Program:
    torchvision()
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = convolutions()

        def forward(self, x: Any) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, index: int = 0) -> Any:
            x, y = batch
            logits = self(x)
            loss = F.cross_entropy(logits, y)
            self.log("train_loss", loss)
            return {"loss": loss, "logits": logits.detach()}

    x, y = pictures()
    batches = [(x[r], y[r]) for r in rows()]
    return situation(
        Module, batches, lambda m, b: m.training_step(b)["loss"],
        options={"step": lambda m, b: m.training_step(b)}, sample=x[:4],
    )  # fmt: skip
