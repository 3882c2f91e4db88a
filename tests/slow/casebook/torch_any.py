"""Any model, any batch, any loss: trouble with BN and without, in native torch, as reported.

Unlike the cases of the book, these models are no classifiers of ``(x, y)``: they have their own
losses, batches that are mappings, several inputs, no labels, or keep statistics in their own ways.
Each case names the thread that it is rebuilt from.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from .scenario import CLASSES, NORMS, Case, Scenario, digits, target
from .torch_bench import fit, gap, images, net, pretrained

ALL = frozenset(NORMS)
GITHUB = "https://github.com/"


def small(count: int = 800) -> tuple[Any, Any]:
    """Digits of 8 by 8 pixels: (n, 1, 8, 8) in [0, 1], and labels."""
    x, y = digits()
    pixels = x[:count, ::2, ::2].transpose(0, 3, 1, 2).copy()
    return torch.from_numpy(pixels), torch.from_numpy(y[:count]).long()


def train(model: Any, loss: Any, *, steps: int, of: int, batch: int = 32, lr: float = 3e-3) -> None:
    """Steps of Adam on ``loss(rows)`` for random rows out of ``of``."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    for _ in range(steps):
        model.train()
        value = loss(torch.randint(0, of, (batch,)))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def apart(model: Any, loss: Any, *, at_least: float) -> dict[str, float]:
    """``loss(model)`` in both modes on copies; asserts that inference loses by ``at_least``."""
    shown = {}
    with torch.no_grad():
        for name, mode in (("training", True), ("inference", False)):
            shown[f"{name} loss"] = float(loss(copy.deepcopy(model).train(mode)))
    assert shown["inference loss"] - shown["training loss"] > at_least, shown
    return shown


def follow(average: Any, model: Any, decay: float) -> None:
    """An average of parameters only: buffers stay behind."""
    with torch.no_grad():
        for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
            mine.mul_(decay).add_((1 - decay) * theirs)


def conv(inputs: int, outputs: int, stride: int = 1, **norm: Any) -> nn.Sequential:
    made = nn.Sequential()
    made.add_module("conv", nn.Conv2d(inputs, outputs, 3, stride, 1))
    made.add_module("norm", nn.BatchNorm2d(outputs, **norm))
    made.add_module("relu", nn.ReLU())
    return made


# --- averages of weights --------------------------------------------------------------------------


class Segmenter(nn.Module):
    """A small U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.middle = conv(1, 12), conv(12, 16), conv(16, 16)
        self.last, self.out = conv(28, 12), nn.Conv2d(12, 3, 1)

    def forward(self, x: Any) -> Any:
        fine = self.first(x)
        coarse = self.middle(self.second(functional.max_pool2d(fine, 2)))
        joined = torch.cat([fine, functional.interpolate(coarse, scale_factor=2)], 1)
        return self.out(self.last(joined))


def mean_teacher(seed: int) -> Scenario:
    """The teacher follows the student's parameters to another domain, its buffers do not."""
    torch.manual_seed(seed)
    x = images("old")[0]
    masks = (x[:, 0] * 2.99).long()
    student = Segmenter()

    def source(rows: Any) -> Any:
        noisy = x[rows] + 0.1 * torch.randn_like(x[rows])
        return functional.cross_entropy(student(noisy), masks[rows])

    train(student, source, steps=150, of=600, batch=16)
    teacher = copy.deepcopy(student).eval()
    moved = 0.35 * x + 0.55 + 0.05 * torch.randn_like(x)

    def on_target(rows: Any) -> Any:
        follow(teacher, student, 0.97)
        return functional.cross_entropy(student(moved[rows]), masks[rows])

    train(student, on_target, steps=200, of=600, batch=16)
    data = DataLoader(TensorDataset(moved[:256], masks[:256]), batch_size=16)
    shown = apart(
        teacher,
        lambda m: functional.cross_entropy(m(moved[:64]), masks[:64]),
        at_least=0.1,
    )
    return Scenario(model=teacher, data=data, closable=True, shown=shown)


def federated(seed: int) -> Scenario:
    """The server averages the clients' parameters and keeps the statistics of the first one."""
    torch.manual_seed(seed)
    x, y = small(1200)
    lights = ((1.0, 0.0), (0.5, 0.0), (0.6, 0.6), (1.6, -0.3))
    shards = [(a * x[i::4] + b, y[i::4]) for i, (a, b) in enumerate(lights)]

    def made() -> Any:
        head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, CLASSES))
        return nn.Sequential(conv(1, 16), nn.MaxPool2d(2), conv(16, 32), head)

    clients, server = [made() for _ in shards], made()
    for _ in range(6):
        for client, (inputs, labels) in zip(clients, shards, strict=True):
            follow(client, server, 0.0)
            optimizer = torch.optim.SGD(client.parameters(), 0.05, momentum=0.9)
            client.train()
            for _ in range(15):
                rows = torch.randint(0, len(inputs), (32,))
                value = functional.cross_entropy(client(inputs[rows]), labels[rows])
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
        server = copy.deepcopy(clients[0])
        with torch.no_grad():
            for mine, *theirs in zip(server.parameters(), *(c.parameters() for c in clients),
                                     strict=True):  # fmt: skip
                mine.copy_(torch.stack(theirs).mean(0))
    order = torch.randperm(1200)[:512]
    x, y = torch.cat([s[0] for s in shards])[order], torch.cat([s[1] for s in shards])[order]
    shown = apart(server, lambda m: functional.cross_entropy(m(x), y), at_least=0.05)
    return Scenario(model=server, data=(x, y), closable=True, shown=shown)


class Critic(nn.Module):
    """The value of a state and an action."""

    def __init__(self) -> None:
        super().__init__()
        self.state_norm, self.first, self.norm1 = (
            nn.BatchNorm1d(6),
            nn.Linear(8, 32),
            nn.BatchNorm1d(32),
        )
        self.second, self.norm2, self.value = (
            nn.Linear(32, 32),
            nn.BatchNorm1d(32),
            nn.Linear(32, 1),
        )

    def forward(self, state: Any, action: Any) -> Any:
        x = torch.cat([self.state_norm(state), action], 1)
        x = self.norm1(self.first(x)).relu()
        return self.value(self.norm2(self.second(x)).relu())


def target_network(seed: int) -> Scenario:
    """A target network that follows the critic's parameters: its statistics stay at 0 and 1."""
    torch.manual_seed(seed)
    scale, offset = torch.tensor([1.0, 20, 3, 0.1, 5, 1]), torch.tensor([0.0, 100, -7, 0, 40, 2])
    state, action = torch.randn(2000, 6) * scale + offset, torch.rand(2000, 2) * 2 - 1
    value = torch.sin(state[:, :1]) + (state[:, 1:2] - 100) / 20 * action[:, :1]
    value = value + (state[:, 4:5] - 40) / 5 + action[:, 1:] ** 2
    critic = Critic()
    lagging = copy.deepcopy(critic).eval()

    def loss(rows: Any) -> Any:
        follow(lagging, critic, 0.98)
        return functional.mse_loss(critic(state[rows], action[rows]), value[rows])

    train(critic, loss, steps=400, of=2000, batch=64)
    data = ((state[:512], action[:512]), value[:512])
    shown = apart(lagging, lambda m: functional.mse_loss(m(*data[0]), data[1]), at_least=0.5)
    options = {"loss": functional.mse_loss, "batch_size": 64}
    return Scenario(model=lagging, data=data, options=options, closable=True, shown=shown)


class Generator(nn.Module):
    """Noise to images of 8 by 8."""

    def __init__(self, **norm: Any) -> None:
        super().__init__()
        self.project, self.norm0 = nn.Linear(16, 128), nn.BatchNorm1d(128, **norm)
        self.up1, self.norm1 = nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16, **norm)
        self.up2, self.norm2 = nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.BatchNorm2d(8, **norm)
        self.out = nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, z: Any) -> Any:
        x = self.norm0(self.project(z)).relu().view(-1, 32, 2, 2)
        x = self.norm2(self.up2(self.norm1(self.up1(x)).relu())).relu()
        return torch.tanh(self.out(x))


def adversarial(seed: int, *, steps: int, decay: float = 0.0, rate: float = 2e-3) -> Any:
    """A generator trained against a discriminator, and an average of its parameters."""
    torch.manual_seed(seed)
    x = small(1000)[0] * 2 - 1
    judge = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 3, 2, 1),
                          nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(128, 1))  # fmt: skip
    generator = Generator()
    average = copy.deepcopy(generator)
    ours, theirs = (
        torch.optim.Adam(m.parameters(), rate, betas=(0.5, 0.99)) for m in (generator, judge)
    )
    cross = functional.binary_cross_entropy_with_logits
    one, zero = torch.ones(32, 1), torch.zeros(32, 1)
    for step in range(steps):
        for group in ours.param_groups:
            group["lr"] = rate * (1 - step / steps)
        made = generator(torch.randn(32, 16))
        real = judge(x[torch.randint(0, 1000, (32,))])
        value = cross(real, one) + cross(judge(made.detach()), zero)
        theirs.zero_grad()
        value.backward()
        theirs.step()
        value = cross(judge(made), one)
        ours.zero_grad()
        value.backward()
        ours.step()
        follow(average, generator, decay)
    return generator, average


def averaged_generator(seed: int) -> Scenario:
    """Averaged parameters of a generator behind fresh statistics; there is only noise to ask by."""
    _, average = adversarial(seed, steps=250, decay=0.98)
    return Scenario(
        model=average, data=torch.randn(256, 16), options={"loss": None}, closable=False
    )


def iterates_averaged(seed: int) -> Scenario:
    """As a schedule-free optimizer's eval(): weights become the mean of all iterates."""
    model = net(seed)
    x, y = (values[:320] for values in images("new"))
    average, count = copy.deepcopy(model), 0

    def after(made: Any) -> None:
        nonlocal count
        count += 1
        if count > 60:
            follow(average, made, 1 - 1 / (count - 60))

    fit(model, x, y, epochs=24, lr=2e-2, each_step=after)
    average.load_state_dict({**average.state_dict(), **dict(model.named_buffers())})
    x, y = x[:256], y[:256]
    shown = gap(average, x, y, at_least=0.1)
    return Scenario(model=average, data=(x, y), closable=True, shown=shown)


def soup(seed: int) -> Scenario:
    """Two fine-tunings averaged, statistics too: those of neither."""
    x, y = (values[:480] for values in images("new"))
    first, second = pretrained(seed), pretrained(seed)
    fit(first, x, y, epochs=8, lr=1e-2)
    torch.manual_seed(seed + 1)
    fit(second, target(x), y, epochs=8, lr=1e-2)
    theirs = second.state_dict()
    mixed = {k: (v + theirs[k]) / 2 if v.is_floating_point() else v
             for k, v in first.state_dict().items()}  # fmt: skip
    first.load_state_dict(mixed)
    x, y = x[:256], y[:256]
    shown = gap(first, x, y, at_least=0.05)
    return Scenario(model=first, data=(x, y), closable=True, shown=shown)


def parameters_only(seed: int) -> Scenario:
    """A checkpoint of model.parameters(), loaded into a new net."""
    trained, model = pretrained(seed), net(seed + 1)
    follow(model, trained, 0.0)
    x, y = (values[:256] for values in images("new"))
    shown = gap(model, x, y, at_least=0.2)
    return Scenario(model=model, data=(x, y), closable=True, shown=shown)


# --- batches and losses of their own --------------------------------------------------------------


class Speech(nn.Module):
    """Convolutions over padded sequences; gives a loss when it is given labels.

    Args:
        masked: Padding is set back to zero behind each norm, whose shift makes it something else.
    """

    def __init__(self, *, masked: bool = False) -> None:
        super().__init__()
        self.masked = masked
        self.conv1, self.norm1 = nn.Conv1d(1, 16, 15, padding=7), nn.BatchNorm1d(16)
        self.conv2, self.norm2 = nn.Conv1d(16, 24, 31, padding=15), nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 4)

    def forward(self, input_values: Any, attention_mask: Any, labels: Any = None) -> Any:
        mask = attention_mask[:, None]
        x = self.norm1(self.conv1(input_values[:, None] * mask)).relu()
        x = self.norm2(self.conv2(x * mask if self.masked else x)).relu()
        logits = self.head((x * mask).sum(2) / mask.sum(2))
        if labels is None:
            return {"logits": logits}
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def collate(items: Any) -> dict[str, Any]:
    longest = max(len(values) for values, _ in items)
    padded = [functional.pad(values, (0, longest - len(values))) for values, _ in items]
    mask = [functional.pad(torch.ones(len(v)), (0, longest - len(v))) for v, _ in items]
    labels = torch.tensor([label for _, label in items])
    return {
        "input_values": torch.stack(padded),
        "attention_mask": torch.stack(mask),
        "labels": labels,
    }


def speech(seed: int, *, uneven: bool) -> tuple[Any, list[Any]]:
    torch.manual_seed(seed)

    def sample(index: int) -> tuple[Any, int]:
        label = index % 4
        length = int(torch.randint(8, 20, ()))
        length = 220 if uneven and index % 9 == 0 else length
        t = torch.arange(length)
        wave = torch.sin(t * (0.3 + 0.15 * label) + 6 * torch.rand(()))
        return wave + 2 + 0.4 * torch.randn(length), label

    items = [sample(index) for index in range(400)]
    model = Speech(masked=not uneven)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    loader = DataLoader(items, batch_size=16, shuffle=True, collate_fn=collate)
    for epoch in range(16):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - epoch / 16)
        for batch in loader:
            model.train()
            loss = model(**batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model, items


def padded(seed: int) -> Scenario:
    """Padding that layers do not mask: what a sequence gives depends on the longest of its batch.

    The statistics are off as well, but inference of short sequences loses nothing by that.
    """
    model, items = speech(seed, uneven=True)
    short = sorted((item for item in items if len(item[0]) < 200), key=lambda item: len(item[0]))
    return Scenario(
        model=model,
        data=DataLoader(short, batch_size=16, collate_fn=collate),
        options={"loss": None},
    )


class OwnNorm(nn.Module):
    """Invertible batch normalisation as flows have it, with its log-determinant."""

    def __init__(self, channels: int, momentum: float = 0.99) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, 1e-5
        self.log_gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Any) -> Any:
        mean, variance = self.running_mean, self.running_var
        if self.training:
            mean, variance = x.mean(0), x.var(0)
            with torch.no_grad():
                self.running_mean.mul_(self.momentum).add_(mean * (1 - self.momentum))
                self.running_var.mul_(self.momentum).add_(variance * (1 - self.momentum))
        out = self.log_gamma.exp() * (x - mean) / torch.sqrt(variance + self.eps) + self.beta
        return out, (self.log_gamma - 0.5 * torch.log(variance + self.eps)).expand_as(x).sum(1)


class Coupling(nn.Module):
    def __init__(self, channels: int, flip: bool) -> None:
        super().__init__()
        mask = (torch.arange(channels) % 2).float()
        self.register_buffer("mask", 1 - mask if flip else mask)
        self.net = nn.Sequential(nn.Linear(channels, 32), nn.Tanh(), nn.Linear(32, 2 * channels))

    def forward(self, x: Any) -> Any:
        scale, shift = self.net(x * self.mask).chunk(2, 1)
        scale = torch.tanh(scale) * (1 - self.mask)
        return x * torch.exp(scale) + shift * (1 - self.mask), scale.sum(1)


class Flow(nn.Module):
    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        for block in range(3):
            self.add_module(f"coupling{block}", Coupling(channels, bool(block % 2)))
            self.add_module(f"norm{block}", OwnNorm(channels))

    def forward(self, x: Any) -> Any:
        volume = 0
        for layer in self.children():
            x, change = layer(x)
            volume = volume + change
        return x, volume


def negative_log_likelihood(out: Any, _: Any = None) -> Any:
    return 0.5 * out[0].square().sum(1) + 3 * math.log(2 * math.pi) - out[1]


def flow(seed: int) -> Scenario:
    """A flow with its own BN class, without labels, whose averages lag."""
    torch.manual_seed(seed)
    x = small(1700)[0].flatten(1)
    x = torch.linalg.svd(x - x.mean(0), full_matrices=False)[0][:, :6] * math.sqrt(1700) * 4 + 6
    model = Flow()
    train(model, lambda rows: negative_log_likelihood(model(x[rows])).mean(),
          steps=120, of=1700, batch=64, lr=5e-3)  # fmt: skip
    x = x[:512]
    shown = apart(model, lambda m: negative_log_likelihood(m(x)).mean(), at_least=0.5)
    return Scenario(
        model=model,
        data=x,
        options={"loss": negative_log_likelihood, "batch_size": 64},
        closable=True,
        shown=shown,
    )


class Detector(nn.Module):
    """A mapping of losses in training, detections at inference; images of different sizes."""

    def __init__(self, **norm: Any) -> None:
        super().__init__()
        self.stage1, self.stage2 = conv(1, 16, 2, **norm), conv(16, 32, 2, **norm)
        self.neck = conv(32, 32, **norm)
        self.classes, self.boxes = nn.Conv2d(32, CLASSES + 1, 1), nn.Conv2d(32, 2, 1)

    def forward(self, pictures: Any, targets: Any = None) -> Any:
        high, wide = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
        x = torch.stack([
            functional.pad(p, (0, wide - p.shape[2], 0, high - p.shape[1])) for p in pictures
        ])  # fmt: skip
        found = self.neck(self.stage2(self.stage1(x)))
        scores, boxes = self.classes(found), self.boxes(found)
        if not self.training:
            best = scores.softmax(1)[:, :CLASSES].flatten(1).max(1)
            return [{"score": s, "place": p} for s, p in zip(*best, strict=True)]
        if targets is None:
            raise ValueError("in training mode, targets should be passed")
        wanted = torch.full((len(pictures), *scores.shape[2:]), CLASSES)
        off = torch.zeros(())
        for index, goal in enumerate(targets):
            column, row = (int(value) // 4 for value in goal["centre"])
            wanted[index, row, column] = goal["label"]
            off = off + (boxes[index, :, row, column] - goal["centre"] % 4 / 4).abs().mean()
        weight = torch.tensor([1.0] * CLASSES + [0.05])
        return {
            "classes": functional.cross_entropy(scores, wanted, weight=weight),
            "boxes": off / len(pictures),
        }


def detector(seed: int) -> Scenario:
    """Losses only in training, from lists of pictures: averages that lag."""
    torch.manual_seed(seed)
    x, y = small(256)

    def item(index: int) -> tuple[Any, Any]:
        high, wide = (int(value) for value in torch.randint(16, 33, (2,)))
        top, left = int(torch.randint(0, high - 8, ())), int(torch.randint(0, wide - 8, ()))
        picture = torch.zeros(1, high, wide)
        picture[:, top : top + 8, left : left + 8] = x[index]
        return picture, {"label": y[index], "centre": torch.tensor([left + 4.0, top + 4.0])}

    items = [item(index) for index in range(256)]
    loader = DataLoader(items, batch_size=8, collate_fn=lambda rows: tuple(zip(*rows, strict=True)))
    model = Detector(momentum=0.003)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(4):
        for pictures, targets in loader:
            model.train()
            loss = sum(model(pictures, targets).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Scenario(model=model, data=loader, options={"loss": None}, closable=True)


class TwoViews(nn.Module):
    def __init__(self, **norm: Any) -> None:
        super().__init__()
        self.first, self.pool, self.second = (
            conv(1, 16, **norm),
            nn.MaxPool2d(2),
            conv(16, 32, **norm),
        )
        self.project = nn.Linear(128, 32)
        self.last = nn.BatchNorm1d(32, **norm)
        self.out = nn.Linear(32, 16)

    def one(self, x: Any) -> Any:
        x = functional.adaptive_avg_pool2d(self.second(self.pool(self.first(x))), 2).flatten(1)
        return self.out(self.last(self.project(x)).relu())

    def forward(self, first: Any, second: Any) -> Any:
        return self.one(first), self.one(second)


def contrast(out: Any, _: Any = None) -> Any:
    """NT-Xent: a loss of the whole batch."""
    z = functional.normalize(torch.cat(out), dim=1)
    half = len(z) // 2
    alike = z @ z.T / 0.2 - 1e9 * torch.eye(2 * half)
    partner = torch.cat([torch.arange(half, 2 * half), torch.arange(half)])
    return functional.cross_entropy(alike, partner)


def seen_anew(x: Any) -> Any:
    """A view: shifted, of another contrast, noisy."""
    moves = torch.randint(-1, 2, (len(x), 2)).tolist()
    x = torch.stack([torch.roll(i, (a, b), (1, 2)) for i, (a, b) in zip(x, moves, strict=True)])
    return x * (0.6 + 0.8 * torch.rand(len(x), 1, 1, 1)) + 0.1 * torch.randn(x.shape)


def contrastive(seed: int) -> Scenario:
    """Two views, a loss of whole batches, no labels: averages that lag."""
    torch.manual_seed(seed)
    x = small(1000)[0]
    model = TwoViews(momentum=0.01)

    def loss(rows: Any) -> Any:
        return contrast(model(seen_anew(x[rows]), seen_anew(x[rows])))

    train(model, loss, steps=80, of=1000, batch=64)
    batches = [((seen_anew(rows), seen_anew(rows)),) for rows in x[:512].split(64)]
    shown = apart(
        model,
        lambda m: sum(contrast(m(*views)) for (views,) in batches) / len(batches),
        at_least=0.1,
    )
    return Scenario(
        model=model, data=batches, options={"loss": contrast}, closable=True, shown=shown
    )


def pinball(out: Any, y: Any) -> Any:
    """Quantile regression."""
    levels = torch.tensor([0.1, 0.5, 0.9])
    excess = y[..., None] - out
    return torch.maximum(levels * excess, (levels - 1) * excess).mean()


class Plant(nn.Module):
    """Two named inputs in one mapping, three quantiles of four hours."""

    def __init__(self, **norm: Any) -> None:
        super().__init__()
        self.sky, self.norm1 = nn.Conv2d(2, 8, 3), nn.BatchNorm1d(8, **norm)
        self.past, self.norm2 = nn.Linear(12, 16), nn.BatchNorm1d(16, **norm)
        self.joined, self.norm3 = nn.Linear(24, 24), nn.BatchNorm1d(24, **norm)
        self.out = nn.Linear(24, 12)

    def forward(self, batch: Any) -> Any:
        sky = self.norm1(self.sky(batch["satellite"]).relu().mean((2, 3)))
        past = self.norm2(self.past(batch["history"])).relu()
        return self.out(self.norm3(self.joined(torch.cat([sky, past], 1))).relu()).view(-1, 4, 3)


def last_of_one(seed: int) -> Scenario:
    """97 samples in batches of 32: the last one has one sample, on which BN1d cannot train."""
    torch.manual_seed(seed)
    sky = torch.randn(97, 2, 8, 8) + torch.randn(97, 2, 1, 1)
    past = torch.rand(97, 12).cumsum(1)
    y = torch.stack([past[:, -1] + k * sky.mean((1, 2, 3)) for k in range(4)], 1)
    items = [({"satellite": sky[i], "history": past[i]}, y[i]) for i in range(97)]
    loader = DataLoader(items, batch_size=32)
    model = Plant(momentum=0.01)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(20):
        for batch, labels in loader:
            if len(labels) > 1:
                model.train()
                loss = pinball(model(batch), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    whole = {"satellite": sky, "history": past}
    shown = apart(model, lambda m: pinball(m(whole), y), at_least=0.1)
    return Scenario(model=model, data=loader, options={"loss": pinball}, closable=True, shown=shown)


class TwoHeads(nn.Module):
    """(main, auxiliary) in training, main alone at inference."""

    def __init__(self, **norm: Any) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16, **norm)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32, **norm)
        self.aside, self.norm3 = nn.Conv2d(16, 8, 3, 2, 1), nn.BatchNorm2d(8, **norm)
        self.main, self.auxiliary = nn.Linear(512, CLASSES), nn.Linear(128, CLASSES)

    def forward(self, x: Any) -> Any:
        x = self.norm1(self.conv1(x)).relu()
        main = self.main(self.norm2(self.conv2(x)).relu().flatten(1))
        if not self.training:
            return main
        return main, self.auxiliary(self.norm3(self.aside(x)).relu().flatten(1))


def both_heads(out: Any, y: Any) -> Any:
    if not isinstance(out, tuple):
        return functional.cross_entropy(out, y)
    main, auxiliary = (functional.cross_entropy(each, y) for each in out)
    return main + 0.4 * auxiliary


def auxiliary_head(seed: int) -> Scenario:
    """A head in training only, and averages that lag: the auxiliary BN is not to blame."""
    torch.manual_seed(seed)
    x, y = small(400)
    model = TwoHeads(momentum=0.01)
    train(model, lambda rows: both_heads(model(x[rows]), y[rows]), steps=60, of=400)
    x, y = x[:256], y[:256]

    def main(m: Any) -> Any:
        out = m(x)
        return functional.cross_entropy(out[0] if isinstance(out, tuple) else out, y)

    shown = apart(model, main, at_least=0.2)
    return Scenario(
        model=model, data=(x, y), options={"loss": both_heads}, closable=True, shown=shown
    )


# --- several distributions through one layer ------------------------------------------------------


class Frames(nn.Module):
    """One network called for each frame; frames differ in light."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool, self.second = conv(1, 12), nn.MaxPool2d(2), conv(12, 24)
        self.memory, self.head = nn.GRU(24, 24, batch_first=True), nn.Linear(24, CLASSES)

    def forward(self, video: Any) -> Any:
        frames = [
            self.second(self.pool(self.first(video[:, t]))).mean((2, 3))
            for t in range(video.shape[1])
        ]
        return self.head(self.memory(torch.stack(frames, 1))[1][0])


def frames(seed: int) -> Scenario:
    torch.manual_seed(seed)
    x, y = small(600)
    video = torch.stack([x * (0.25 + 0.75 * t) + 0.8 * t for t in range(4)], 1)
    video = video + 0.1 * torch.randn(video.shape)
    model = Frames()
    train(model, lambda rows: functional.cross_entropy(model(video[rows]), y[rows]),
          steps=230, of=600)  # fmt: skip
    video, y = video[:256], y[:256]
    shown = apart(model, lambda m: functional.cross_entropy(m(video), y), at_least=0.1)
    return Scenario(model=model, data=(video, y), shown=shown)


def pairs_in_order(seed: int) -> Scenario:
    """A siamese net that is always shown the sharp image first, and the blurred one second."""
    torch.manual_seed(seed)
    x, _ = small(600)
    blurred = functional.avg_pool2d(x, 3, 1, 1)

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv(1, 12), conv(12, 24, 2)
            self.score = nn.Linear(24, 1)

        def one(self, x: Any) -> Any:
            return self.score(self.second(self.first(x)).mean((2, 3)))

        def forward(self, better: Any, worse: Any) -> Any:
            return self.one(better) - self.one(worse)

    def ranked(out: Any, _: Any = None) -> Any:
        return functional.softplus(-out).mean()

    model = Pairs()
    train(model, lambda rows: ranked(model(x[rows] + 0.5 * torch.randn(x[rows].shape),
                                           blurred[rows] + 0.5 * torch.randn(x[rows].shape))),
          steps=200, of=600)  # fmt: skip
    views = [x[:256] + 0.5 * torch.randn(x[:256].shape), blurred[:256]]
    views[1] = views[1] + 0.5 * torch.randn(x[:256].shape)
    batches = [((a, b),) for a, b in zip(views[0].split(32), views[1].split(32), strict=True)]
    shown = apart(model, lambda m: ranked(m(*views)), at_least=0.02)
    return Scenario(model=model, data=batches, options={"loss": ranked}, shown=shown)


def alternating_domains(seed: int) -> Scenario:
    """Adaptation: a batch of the source, a batch of the target; asked about the source."""
    model = pretrained(seed)
    x, y = (values[:480] for values in images("new"))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()
    for _ in range(6):
        for rows in torch.randperm(480).split(32):
            for inputs in (x[rows], target(x[rows])):
                loss = functional.cross_entropy(model(inputs), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    x, y = x[:256], y[:256]
    shown = gap(model, x, y, at_least=0.05)
    return Scenario(model=model, data=(x, y), closable=True, shown=shown)


def validated_in_training_mode(seed: int) -> Scenario:
    """The validation loop forgets eval(): the statistics become those of the validation data."""
    model = pretrained(seed)
    x, y = images("new")
    held_out = target(images("held out")[0])
    fit(model, x[:480], y[:480], epochs=4, lr=5e-4)
    with torch.no_grad():
        model.train()
        for _ in range(4):
            for rows in held_out.split(32):
                model(rows)
    x, y = x[:256], y[:256]
    shown = gap(model, x, y, at_least=0.1)
    return Scenario(model=model, data=(x, y), closable=True, shown=shown)


# --- not as layers --------------------------------------------------------------------------------


def exported(seed: int) -> Scenario:
    """torch.export in training mode: eval() does nothing to a graph's batch_norm."""
    torch.manual_seed(seed)
    x, y = small(512)
    model = nn.Sequential(conv(1, 16), conv(16, 32, 2), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                          nn.Linear(128, CLASSES))  # fmt: skip
    train(model, lambda rows: functional.cross_entropy(model(x[rows]), y[rows]), steps=200, of=512)
    batch = torch.export.Dim("batch", min=2, max=4096)
    made = torch.export.export(model.train(), (x[:32],), dynamic_shapes=({0: batch},)).module()
    ordered = y.argsort()
    with torch.no_grad():
        alike = torch.cat([made(rows) for rows in x[ordered].split(8)]).argmax(1)
    shown = {"accuracy in sorted batches of 8": float(alike.eq(y[ordered]).float().mean())}
    return Scenario(model=made, data=(x[:256], y[:256]), shown=shown)


class AlwaysBatch(nn.Module):
    """BN by the function with ``training=True``, as MAML's reference code has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Any) -> Any:
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=True
        )


def always_training(seed: int) -> Scenario:
    torch.manual_seed(seed)
    x, y = small(512)
    model = nn.Sequential()
    for name, part in (
        ("conv1", nn.Conv2d(1, 16, 3)), ("norm1", AlwaysBatch(16)), ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(16, 32, 3)), ("norm2", AlwaysBatch(32)), ("relu2", nn.ReLU()),
        ("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten()), ("head", nn.Linear(32, CLASSES)),
    ):  # fmt: skip
        model.add_module(name, part)
    train(model, lambda rows: functional.cross_entropy(model(x[rows]), y[rows]), steps=200, of=512)
    return Scenario(model=model.eval(), data=(x[:256], y[:256]))


class Prompted(nn.Module):
    """A transformer that picks one prompt for a whole batch at inference; no BN anywhere."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(0.1 * torch.randn(8, width))
        self.keys = nn.Parameter(torch.randn(5, 64), requires_grad=False)
        self.prompts = nn.Parameter(torch.randn(5, 3, width))
        self.block = nn.TransformerEncoderLayer(
            width, 2, 48, 0.0, batch_first=True, norm_first=True
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Any) -> Any:
        query = functional.normalize(x.flatten(1), dim=1)
        own = (query @ functional.normalize(self.keys, dim=1).T).argmax(1)
        own = own if self.training else torch.mode(own).values.expand_as(own)
        tokens = torch.cat([self.prompts[own], self.embed(x) + self.place], 1)
        return self.head(self.norm(self.block(tokens)).mean(1))


def voted_prompts(seed: int) -> Scenario:
    torch.manual_seed(seed)
    x, y = small(800)
    x = x[:, 0]
    model = Prompted()
    means = [x[y == label].mean(0).flatten() for label in (0, 1, 4, 6, 7)]
    model.keys.data.copy_(torch.stack(means) - x.flatten(1).mean(0))
    train(model, lambda rows: functional.cross_entropy(model(x[rows]), y[rows]), steps=300, of=800)
    model.eval()
    return Scenario(model=model, data=(x[:512], y[:512]))


def scaled_by_the_batch(seed: int) -> Scenario:
    """A feature divided by a mean over the whole batch; its BN layers are in order."""
    torch.manual_seed(seed)
    x, y = small(800)
    x = x * (0.3 + 1.4 * torch.rand(800, 1, 1, 1))

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv(1, 16), conv(16, 32, 2)
            self.head = nn.Linear(128, CLASSES)

        def forward(self, x: Any) -> Any:
            x = functional.adaptive_avg_pool2d(self.second(self.first(x)), 2).flatten(1)
            return self.head(x / x.square().mean())

    model = Scaled()
    train(model, lambda rows: functional.cross_entropy(model(x[rows]), y[rows]), steps=250, of=800)
    train(model, lambda rows: functional.cross_entropy(model(x[rows]), y[rows]), steps=80, of=800,
          lr=2e-4)  # fmt: skip
    return Scenario(model=model, data=(x[:256], y[:256]))


def epsilon_lost(seed: int) -> Scenario:
    """Rebuilt with the default epsilon: activations are so small that it matters."""
    torch.manual_seed(seed)
    x, y = small(512)
    x = 0.02 * x
    model = nn.Sequential(conv(1, 16, eps=1e-3), conv(16, 32, 2, eps=1e-3), nn.AdaptiveAvgPool2d(2),
                          nn.Flatten(), nn.Linear(128, CLASSES))  # fmt: skip
    train(model, lambda rows: functional.cross_entropy(model(x[rows]), y[rows]), steps=250, of=512)
    train(model, lambda rows: functional.cross_entropy(model(x[rows]), y[rows]), steps=80, of=512,
          lr=2e-4)  # fmt: skip
    rebuilt = copy.deepcopy(model)
    for module in rebuilt.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5
    x, y = x[:256], y[:256]
    with torch.no_grad():
        losses = [float(functional.cross_entropy(m.eval()(x), y)) for m in (model, rebuilt)]
    assert losses[1] > losses[0] + 0.1, losses
    shown = {"loss": losses[1], "loss with its epsilon": losses[0]}
    return Scenario(
        model=rebuilt, data=(x, y), options={"reference": model}, closable=True, shown=shown
    )


def other_range(seed: int) -> Scenario:
    """Trained on pixels from -1 to 1, asked about pixels from 0 to 1."""
    model = net(seed)
    x, y = (values[:480] for values in images("new"))
    fit(model, 2 * x - 1, y, epochs=12)
    fit(model, 2 * x - 1, y, epochs=4, lr=2e-4)
    x, y = x[:256], y[:256]
    with torch.no_grad():
        losses = [float(functional.cross_entropy(model.eval()(i), y)) for i in (2 * x - 1, x)]
    assert losses[1] > losses[0] + 0.3, losses
    shown = {"loss": losses[1], "loss in the right range": losses[0]}
    return Scenario(model=model, data=(x, y), shown=shown)


def first_steps(seed: int) -> Scenario:
    """Eight steps: the network is unsure of all digits, so that its loss hardly tells a gap."""
    model = net(seed)
    x, y = (values[:256] for values in images("new"))
    fit(model, x, y, epochs=1, lr=1e-3)
    shown = gap(model, x, y, at_least=0.0)
    assert shown["training accuracy"] > shown["inference accuracy"] + 0.05, shown
    assert shown["inference loss"] < 1.05 * shown["training loss"], shown
    return Scenario(model=model, data=(x, y), closable=True, shown=shown)


def larger_pictures(seed: int) -> Scenario:
    """Trained at 16 by 16 pixels, asked at 32 by 32."""
    model = net(seed)
    x, y = (values[:480] for values in images("new"))
    fit(model, x, y, epochs=12)
    fit(model, x, y, epochs=4, lr=2e-4)
    x, y = functional.interpolate(x[:256], scale_factor=2.0), y[:256]
    shown = gap(model, x, y, at_least=0.3)
    return Scenario(model=model, data=(x, y), closable=True, shown=shown)


# --- healthy programs -----------------------------------------------------------------------------


def healthy_speech(seed: int) -> Scenario:
    """Mappings with the labels inside, sequences of like length, a rate that falls."""
    model, items = speech(seed, uneven=False)
    data = DataLoader(items[:256], batch_size=16, collate_fn=collate)
    return Scenario(model=model, data=data, options={"loss": None})


def healthy_segmenter(seed: int) -> Scenario:
    torch.manual_seed(seed)
    x = images("old")[0]
    masks = (x[:, 0] * 2.99).long()
    model = Segmenter()

    def loss(rows: Any) -> Any:
        return functional.cross_entropy(model(x[rows]), masks[rows])

    train(model, loss, steps=200, of=600, batch=16)
    train(model, loss, steps=80, of=600, batch=16, lr=2e-4)
    return Scenario(
        model=model, data=DataLoader(TensorDataset(x[:256], masks[:256]), batch_size=16)
    )


class FineTuned(nn.Module):
    """A pretrained backbone that stays in eval() whatever the mode, and a head that trains."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.backbone.head = nn.Identity()
        self.head = nn.Linear(16, CLASSES)

    def train(self, mode: bool = True) -> FineTuned:
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, x: Any) -> Any:
        return self.head(self.backbone(x))


def frozen_right(seed: int) -> Scenario:
    model = FineTuned(pretrained(seed))
    x, y = (values[:320] for values in images("new"))
    fit(model, x, y, epochs=10, lr=1e-2)
    return Scenario(model=model, data=(x[:256], y[:256]))


def grouped(seed: int) -> Scenario:
    torch.manual_seed(seed)
    x, y = small(512)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 32, 3),
                          nn.GroupNorm(4, 32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(32, CLASSES))  # fmt: skip
    train(model, lambda rows: functional.cross_entropy(model(x[rows]), y[rows]), steps=200, of=512)
    return Scenario(model=model, data=(x[:256], y[:256]))


def synchronised(seed: int) -> Scenario:
    """SyncBatchNorm from the cluster, on a laptop."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(settled(seed))
    x, y = images("old")
    return Scenario(model=model, data=(x[:256], y[:256]))


def by_instance(seed: int) -> Scenario:
    """InstanceNorm without running statistics: image to image."""
    torch.manual_seed(seed)
    x = images("old")[0]
    noisy = x + 0.3 * torch.randn_like(x)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.InstanceNorm2d(16, affine=True),
                          nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1))  # fmt: skip
    train(model, lambda rows: functional.mse_loss(model(noisy[rows]), x[rows]), steps=150, of=600)
    return Scenario(model=model, data=(noisy[:256], x[:256]), options={"loss": functional.mse_loss})


def settled(seed: int) -> Any:
    """The old net after small steps at the default momentum: its averages have caught up."""
    model = pretrained(seed)
    fit(model, *images("old"), epochs=4, lr=5e-5)
    return model


def served(seed: int) -> Scenario:
    """Loaded for inference only: eval(), no gradients."""
    model = settled(seed).eval().requires_grad_(False)
    x, y = images("old")
    return Scenario(model=model, data=DataLoader(TensorDataset(x[:256], y[:256]), batch_size=32))


class PreActivation(nn.Module):
    """Norm, ReLU, convolution, and a shortcut; the last scale begins at zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Any) -> Any:
        out = self.conv1(self.norm1(x).relu())
        return x + self.conv2(self.norm2(out).relu())


def pre_activation(seed: int) -> Scenario:
    """A pre-activation network whose stem is frozen for good, the rest thawed and settled."""
    torch.manual_seed(seed)
    x, y = small(512)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = conv(1, 16)
            self.blocks = nn.Sequential(PreActivation(16), PreActivation(16))
            self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, CLASSES)
            self.frozen = False

        def train(self, mode: bool = True) -> Net:
            super().train(mode)
            if self.frozen:
                self.stem.eval()
            return self

        def forward(self, x: Any) -> Any:
            return self.head(self.norm(self.blocks(self.stem(x))).relu().mean((2, 3)))

    model = Net()

    def loss(rows: Any) -> Any:
        return functional.cross_entropy(model(x[rows]), y[rows])

    train(model, loss, steps=200, of=512)
    train(model, loss, steps=60, of=512, lr=2e-4)
    model.frozen = True
    model.stem.requires_grad_(False)
    train(model, loss, steps=60, of=512, lr=2e-4)
    return Scenario(model=model, data=(x[:256], y[:256]))


def checkpointed(seed: int) -> Scenario:
    """Gradient checkpointing runs each block twice, so that statistics move twice per step."""
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(seed)
    x, y = small(512)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv(1, 16), conv(16, 32, 2)
            self.head = nn.Linear(32, CLASSES)

        def forward(self, x: Any) -> Any:
            for part in (self.first, self.second):
                x = checkpoint(part, x, use_reentrant=False) if self.training else part(x)
            return self.head(x.mean((2, 3)))

    model = Net()

    def loss(rows: Any) -> Any:
        return functional.cross_entropy(model(x[rows]), y[rows])

    train(model, loss, steps=200, of=512)
    train(model, loss, steps=60, of=512, lr=2e-4)
    return Scenario(model=model, data=(x[:256], y[:256]))


def healthy_generator(seed: int) -> Scenario:
    """A generator whose rate falls to nothing: its own statistics fit; asked by noise alone."""
    generator, _ = adversarial(seed, steps=400)
    return Scenario(model=generator, data=torch.randn(256, 16), options={"loss": None})


def cases() -> Iterator[Case]:
    """Number, title, source, answer."""
    stale = ("STALE_AFTER_WEIGHT_EDIT", "DOMAIN_STATS")
    other = ("DOMAIN_STATS", "STALE_AFTER_WEIGHT_EDIT", "MIXED_SOURCES")
    none = ("NONE",)
    u_net = frozenset({"norm"})
    for number, title, source, accepted, sites, build in (
        ("A1", "mean teacher: averaged parameters, buffers of the source domain",
         "saltoricristiano/cosmix-uda/issues/21", stale, u_net, mean_teacher),
        ("A2", "FedAvg: the server keeps the statistics of one client",
         "TsingZ0/PFLlib/issues/260", stale, u_net, federated),
        ("A3", "target network of a critic: parameters follow, statistics do not",
         "DLR-RM/stable-baselines3/issues/996", ("STATS_NEVER_UPDATED",),
         frozenset({"state_norm", "norm1", "norm2"}), target_network),
        ("A4", "averaged generator with fresh statistics, asked by noise alone",
         "odegeasslbc/FastGAN-pytorch/issues/4", ("STATS_NEVER_UPDATED",),
         frozenset({"norm0", "norm1", "norm2"}), averaged_generator),
        ("A5", "weights swapped for the mean of all iterates",
         "facebookresearch/schedule_free/issues/60", ("STALE_AFTER_WEIGHT_EDIT",), ALL,
         iterates_averaged),
        ("A6", "a soup of two fine-tunings", "leela-zero/leela-zero/pull/1064", stale, ALL, soup),
        ("A7", "a checkpoint of the parameters alone", "torch/nn/issues/1165",
         ("STATS_NEVER_UPDATED",), ALL, parameters_only),
        ("A8", "padding that layers do not mask", "pytorch/audio/issues/4205", ("KERNEL_BUG",),
         None, padded),
        ("A9", "a flow with its own BN class, no labels",
         "kamenbliznashki/normalizing_flows/issues/13", ("EMA_LAG",),
         frozenset({"norm0", "norm1", "norm2"}), flow),
        ("A10", "a detector: losses in training only, lists of pictures",
         "pytorch/vision/issues/1350", ("EMA_LAG",), u_net, detector),
        ("A11", "contrastive: two views, a loss of whole batches",
         "lightly-ai/lightly/issues/1438", ("EMA_LAG",), frozenset({"norm", "last"}), contrastive),
        ("A12", "a last batch of one, mappings, quantiles",
         "openclimatefix/pvnet/issues/528", ("EMA_LAG",),
         frozenset({"norm1", "norm2", "norm3"}), last_of_one),
        ("A13", "an auxiliary head in training only", "ProjectNeura/MIPCandy/issues/28",
         ("EMA_LAG",), frozenset({"norm1", "norm2"}), auxiliary_head),
        ("A14", "frames of a video through one network",
         "OlavHN/bnlstm/issues/7", ("MIXED_SOURCES",), u_net, frames),
        ("A15", "a siamese net, always the better image first",
         "warpem/miss-alignment/issues/6", ("MIXED_SOURCES", "BATCH_LEAK"), u_net,
         pairs_in_order),
        ("A16", "source and target in batches of their own", "wasidennis/AdaptSegNet/issues/79",
         ("MIXED_SOURCES", "DOMAIN_STATS", "STALE_AFTER_WEIGHT_EDIT"), ALL, alternating_domains),
        ("A17", "validated in training mode on other data",
         "princeton-vl/pytorch_stacked_hourglass/issues/44", other[:2], ALL,
         validated_in_training_mode),
        ("A18", "an exported graph that eval() does not reach", "pytorch/ao/issues/2980",
         ("FORCED_TRAIN",), None, exported),
        ("A19", "F.batch_norm(training=True) for good",
         "AntreasAntoniou/HowToTrainYourMAMLPytorch/issues/3", ("FORCED_TRAIN",),
         frozenset({"norm1", "norm2"}), always_training),
        ("A20", "rebuilt with the default epsilon", "pytorch/ao/pull/4758", ("EPS_MISMATCH",),
         None, epsilon_lost),
        ("A21", "the first steps: inference at chance, and a loss that hardly tells",
         "soloice/Chinese-Character-Recognition/issues/5", ("EMA_LAG",), ALL, first_steps),
        ("A22", "asked about larger pictures", "facebookresearch/FixRes/issues/25",
         ("PREPROCESS", *other[:2]), ALL, larger_pictures),
        ("AN1", "a prompt voted for by the batch; no BN",
         "Minhchuyentoancbn/MoE_PromptCL/issues/1", ("KERNEL_BUG",), None, voted_prompts),
        ("AN2", "features divided by a mean over the batch",
         "xuexingyu24/License_Plate_Detection_Pytorch/issues/22", ("KERNEL_BUG",), None,
         scaled_by_the_batch),
        ("AN3", "pixels from 0 to 1 in the place of -1 to 1",
         "Cadene/pretrained-models.pytorch/issues/188",
         ("PREPROCESS",), None, other_range),
        ("AH1", "healthy: mappings with labels inside", "huggingface/transformers/issues/47739",
         none, None, healthy_speech),
        ("AH2", "healthy: a U-Net", "wolny/pytorch-3dunet/issues/53", none, None,
         healthy_segmenter),
        ("AH3", "healthy: a backbone that train() leaves in eval()",
         "filipradenovic/cnnimageretrieval-pytorch/issues/19", none, None, frozen_right),
        ("AH4", "healthy: GroupNorm", "facebookresearch/moco/issues/80", none, None, grouped),
        ("AH5", "healthy: SyncBatchNorm on one processor", "pytorch/pytorch/issues/63662", none,
         None, synchronised),
        ("AH6", "healthy: InstanceNorm without statistics", "KupynOrest/DeblurGAN/issues/94",
         none, None, by_instance),
        ("AH7", "healthy: served", "facebookresearch/VideoPose3D/issues/113", none, None, served),
        ("AH8", "healthy: pre-activation behind a frozen stem, zero scales",
         "pytorch/pytorch/issues/86590", none, None, pre_activation),
        ("AH9", "healthy: gradient checkpointing", "deepinsight/insightface/issues/2053", none,
         None, checkpointed),
        ("AH10", "healthy: a generator", "boschresearch/OASIS/issues/21", none, None,
         healthy_generator),
    ):  # fmt: skip
        yield Case(
            number=number,
            title=title,
            expected=accepted[:1],
            also=accepted[1:],
            sites=sites,
            build=build,
            source=GITHUB + source,
        )


CASES = tuple(cases())
