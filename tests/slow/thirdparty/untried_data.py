"""Untried programs whose losses, targets, batches and outputs are unusual; see ``untried.py``."""

from __future__ import annotations

import dataclasses
import functools
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from .later import dense
from .program import Program, entry
from .situations import CLASSES, LAGGING, convolutions, pictures, rows, situation
from .unseen import CLASSIFIED, classify, pairs, settled
from .untried import drawn, normed, numbers


class Loader(DataLoader[Any]):
    """With a first batch, which the oracles ask for."""

    def __getitem__(self, _: int) -> Any:
        return next(iter(self))


# --- targets and losses -------------------------------------------------------------------------


@entry("grades in order (CORAL)", "torch", "untried")
def _grades() -> Program:
    class Coral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.weight = convolutions(8), nn.Linear(8, 1, bias=False)
            self.bias = nn.Parameter(torch.zeros(CLASSES - 1))

        def forward(self, x: Any) -> Any:
            return self.weight(self.body(x)) + self.bias

    def loss(out: Any, y: Any) -> Any:
        above = (y[:, None] > torch.arange(CLASSES - 1)).float()
        return F.binary_cross_entropy_with_logits(out, above)

    return situation(
        Coral, pairs(), lambda m, b: loss(m(b[0]), b[1]), options={"loss": loss},
        sample=pictures()[0][:4],
    )  # fmt: skip


@entry("soft targets, and label smoothing on them", "torch", "untried")
def _soft() -> Program:
    x, y = pictures()
    soft = F.one_hot(y, CLASSES) * 0.9 + 0.025
    loss = nn.CrossEntropyLoss(label_smoothing=0.1)
    return situation(
        convolutions, [(x[r], soft[r]) for r in rows()], lambda m, b: loss(m(b[0]), b[1]),
        options={"loss": loss}, sample=x[:4],
    )  # fmt: skip


@entry("tags of tokens, padding counts nothing", "torch", "untried")
def _tags() -> Program:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(30, 8, padding_idx=0)
            self.c1, self.n1 = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8, **LAGGING)
            self.c2, self.n2 = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8, **LAGGING)
            self.head = nn.Linear(8, 5)

        def forward(self, ids: Any) -> Any:
            x = self.embedding(ids).transpose(1, 2) * 3 + 2
            x = F.relu(self.n2(self.c2(F.relu(self.n1(self.c1(x))))))
            return self.head(x.transpose(1, 2))

    ids = torch.randint(1, 30, (48, 9), generator=torch.Generator().manual_seed(0))
    padding = torch.arange(9)[None] >= 3 + torch.arange(48)[:, None] % 7
    tags = (ids % 5).masked_fill(padding, -100)
    ids = ids.masked_fill(padding, 0)

    def loss(out: Any, wanted: Any) -> Any:
        return F.cross_entropy(out.flatten(0, 1), wanted.flatten(), ignore_index=-100)

    return situation(
        Tagger, [(ids[r], tags[r]) for r in rows()], lambda m, b: loss(m(b[0]), b[1]),
        options={"loss": loss}, sample=ids[:4],
    )  # fmt: skip


@entry("a loss with parameters of its own, targets in a mapping", "torch", "untried")
def _uncertainty() -> Program:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spread = nn.Parameter(torch.zeros(2))

        def forward(self, out: Any, wanted: Any) -> Any:
            age = F.mse_loss(out["age"].squeeze(1), wanted["age"])
            kind = F.cross_entropy(out["kind"], wanted["kind"])
            return (torch.exp(-self.spread) * torch.stack([age, kind]) + self.spread).sum()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = convolutions(8)
            self.age, self.kind = nn.Linear(8, 1), nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            x = self.body(x)
            return {"age": self.age(x), "kind": self.kind(x)}

    x, y = pictures()
    batches = [(x[r], {"age": y[r].float(), "kind": y[r]}) for r in rows()]
    loss = Weighted()
    return situation(
        Net, batches, lambda m, b: loss(m(b[0]), b[1]), options={"loss": loss}, sample=x[:4]
    )


@entry("healthy: diffusion, noise and time drawn in the step", "torch", "untried")
def _diffusion() -> Program:
    class Denoiser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Embedding(10, 8)
            self.c1, self.n1 = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.c2, self.n2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.out = nn.Conv2d(8, 2, 1)

        def forward(self, x: Any, time: Any) -> Any:
            x = F.relu(self.n1(self.c1(x))) + self.time(time)[..., None, None]
            return self.out(F.relu(self.n2(self.c2(x))))

    x, _ = pictures(96)

    def step(m: Any, b: Any) -> Any:
        time, noise = torch.randint(0, 10, (len(b),)), torch.randn_like(b)
        kept = (1 - time / 10).view(-1, 1, 1, 1)
        return F.mse_loss(m(kept.sqrt() * b + (1 - kept).sqrt() * noise, time), noise)

    return settled(
        Denoiser, [x[r] for r in rows(96, 48)], step, options={"step": step}, own_ways=True,
        call=lambda m, b: m(b, torch.zeros(len(b), dtype=torch.long)),
        sample=(x[:4], torch.zeros(4, dtype=torch.long)),
    )  # fmt: skip


@entry("forecasting: quantiles, each row scaled by itself (RevIN)", "torch", "untried")
def _forecast() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(1, 8, 3, padding=1), nn.BatchNorm1d(8, **LAGGING)
            self.known, self.known_norm = nn.Linear(4, 8), nn.BatchNorm1d(8, **LAGGING)
            self.head = nn.Linear(16, 12)

        def forward(self, past: Any, known: Any) -> Any:
            mean, spread = past.mean(1, keepdim=True), past.std(1, keepdim=True) + 1e-3
            x = F.relu(self.norm(self.conv(((past - mean) / spread)[:, None] * 3 + 2))).mean(2)
            x = torch.cat([x, F.relu(self.known_norm(self.known(known)))], 1)
            return self.head(x).view(-1, 4, 3) * spread[..., None] + mean[..., None]

    past, known = drawn(48, 12).cumsum(1) + 5, drawn(48, 4, seed=1) * 2 + 3
    batches = [(past[r], known[r], past[r][:, -4:] + known[r] * 0.5) for r in rows()]
    levels = torch.tensor([0.1, 0.5, 0.9])

    def step(m: Any, b: Any) -> Any:
        error = b[2][..., None] - m(b[0], b[1])
        return torch.maximum(levels * error, (levels - 1) * error).mean((1, 2))

    return situation(
        Net, batches, lambda m, b: step(m, b).mean(), options={"step": step},
        call=lambda m, b: m(b[0], b[1]), sample=(past[:4], known[:4]), lags=False,
    )  # fmt: skip


@entry("actor and critic: a distribution and a value", "torch", "untried")
def _actor() -> Program:
    class ActorCritic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.policy, self.value = dense(6, 16), nn.Linear(16, 3), nn.Linear(16, 1)

        def forward(self, state: Any) -> Any:
            x = F.relu(self.body(state))
            policy = torch.distributions.Categorical(logits=self.policy(x))
            return policy, self.value(x).squeeze(1)

    states = drawn(48, 6) * 2 + 3
    action, gained = (states[:, 0] > 3).long(), states[:, 1]
    batches = [(states[r], action[r], gained[r], torch.zeros(16), states[r] + 0.1) for r in rows()]

    def step(m: Any, b: Any) -> Any:
        policy, value = m(b[0])
        error = (b[2] - value).square().mean()
        return F.cross_entropy(policy.logits, b[1]) + 0.5 * error - 0.01 * policy.entropy().mean()

    return situation(
        ActorCritic, batches, step, options={"step": step}, sample=states[:4], lags=False
    )


@entry("autocast around the loss; the step returns it with metrics", "torch", "untried")
def _metrics() -> Program:
    def step(m: Any, b: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            out = m(b[0])
            loss = F.cross_entropy(out, b[1])
        return loss, {"accuracy": (out.argmax(1) == b[1]).float().mean()}

    return situation(
        convolutions, pairs(), lambda m, b: step(m, b)[0], options={"step": step},
        sample=pictures()[0][:4], own_ways=True,
    )  # fmt: skip


@entry("a BN that normalises the targets", "torch", "untried")
def _targets() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Linear(6, 16), nn.BatchNorm1d(16, **LAGGING), nn.ReLU(), nn.Linear(16, 1)
            )
            self.target = nn.BatchNorm1d(1, affine=False)

        def forward(self, x: Any, target: Any = None) -> Any:
            found, norm = self.body(x), self.target
            if target is None:
                return found * (norm.running_var + 1e-5).sqrt() + norm.running_mean
            return F.mse_loss(found, norm(target[:, None]))

    x = drawn(48, 6) * 2 + 3
    batches = [(x[r], x[r, 0] * 10 + 50) for r in rows()]

    def step(m: Any, b: Any) -> Any:
        return m(b[0], b[1])

    return situation(Net, batches, step, options={"step": step}, sample=x[:4], lags=False)


@entry("domain adversarial: gradient reversal, two domains in one row", "torch", "untried")
def _domains() -> Program:
    class Reversal(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, share: float) -> Any:
            ctx.share = share
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            return -ctx.share * gradient, None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.classes = convolutions(8), nn.Linear(8, CLASSES)
            self.domain = nn.Sequential(
                nn.Linear(8, 8), nn.BatchNorm1d(8, **LAGGING), nn.ReLU(), nn.Linear(8, 1)
            )

        def forward(self, x: Any, share: float = 1.0) -> Any:
            x = self.body(x)
            return self.classes(x), self.domain(Reversal.apply(x, share)).squeeze(1)

    x, y = pictures()
    batches = [((x[r][:8], y[r][:8]), (x[r][8:] * 1.5 - 1,)) for r in rows()]

    def step(m: Any, b: Any) -> Any:
        (source, labels), (target,) = b
        classes, domain = m(torch.cat([source, target]), share=0.1)
        which = torch.arange(16).ge(8).float()
        told = F.binary_cross_entropy_with_logits(domain, which)
        return F.cross_entropy(classes[:8], labels) + told

    return situation(
        Net, batches, step, options={"step": step}, sample=x[:4],
        call=lambda m, b: m(torch.cat([b[0][0], b[1][0]])),
    )  # fmt: skip


Quantiles = namedtuple("Quantiles", "low middle high")


@entry("quantiles in a named tuple, a loss with a buffer, targets in float64", "torch", "untried")
def _quantiles() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = convolutions(8), nn.Linear(8, 3)

        def forward(self, x: Any) -> Any:
            return Quantiles(*self.head(self.body(x)).unbind(1))

    class Pinball(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("levels", torch.tensor([0.1, 0.5, 0.9]))

        def forward(self, out: Any, y: Any) -> Any:
            error = y[:, None] - torch.stack(tuple(out), 1)
            return torch.maximum(self.levels * error, (self.levels - 1) * error).mean()

    x, y = pictures()
    loss = Pinball()
    return situation(
        Net, [(x[r], y[r].double()) for r in rows()], lambda m, b: loss(m(b[0]), b[1]),
        options={"loss": loss}, sample=x[:4],
    )  # fmt: skip


@entry("a distribution as output, loss= its likelihood", "torch", "untried")
def _likelihood() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16, **LAGGING), nn.ReLU())
            self.mean, self.spread = nn.Linear(16, 1), nn.Linear(16, 1)

        def forward(self, x: Any) -> Any:
            x = self.body(x)
            spread = F.softplus(self.spread(x)).squeeze(1) + 0.1
            return torch.distributions.Normal(self.mean(x).squeeze(1), spread)

    def loss(out: Any, y: Any) -> Any:
        return -out.log_prob(y).mean()

    x = drawn(48, 5) * 2 + 3
    return situation(
        Net, [(x[r], x[r, 0] - 1) for r in rows()], lambda m, b: loss(m(b[0]), b[1]),
        options={"loss": loss}, sample=x[:4], lags=False,
    )  # fmt: skip


@entry("masked auto-encoder: its random generator in the model", "torch", "untried")
def _masked() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(0)
            self.body = nn.Sequential(
                nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6)
            )

        def forward(self, x: Any) -> Any:
            mask = torch.zeros_like(x)
            if self.training:
                mask = (torch.rand(x.shape, generator=self.generator) < 0.3).float()
            return self.body(x * (1 - mask)), mask

    x = drawn(96, 6) * 2 + 3

    def step(m: Any, b: Any) -> Any:
        return F.mse_loss(m(b[0])[0], b[0])

    return settled(
        Net, [(x[r],) for r in rows(96, 48)], step, options={"step": step}, sample=x[:4],
        own_ways=True, healthy=False, more_in_training=True,
    )  # fmt: skip


@entry("perceptual loss: a network with BN in the criterion", "torch", "untried")
def _perceptual() -> Program:
    class Perceptual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(9)
            self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            self.requires_grad_(False).train()

        def train(self, mode: bool = True) -> Any:
            return super().train(False)

        def forward(self, out: Any, y: Any) -> Any:
            return F.l1_loss(self.body(out), self.body(y)) + F.l1_loss(out, y)

    def make() -> Any:
        return nn.Sequential(
            *normed(nn.Conv2d(2, 8, 3, padding=1), 8), nn.Conv2d(8, 2, 3, padding=1)
        )

    x, _ = pictures()
    loss = Perceptual()
    return situation(
        make, [(x[r] + 0.3, x[r]) for r in rows()], lambda m, b: loss(m(b[0]), b[1]),
        options={"loss": loss}, sample=x[:4], lags=False,
    )  # fmt: skip


@entry("hard triplets; the step keeps a list that grows", "torch", "untried")
def _triplets() -> Program:
    bank: list[int] = []

    def step(m: Any, b: Any) -> Any:
        embedded = F.normalize(m(b[0]), dim=1)
        distance, same = torch.cdist(embedded, embedded), b[1][:, None] == b[1]
        bank.append(len(embedded))
        return F.relu((distance * same).amax(1) - (distance + 9 * same).amin(1) + 0.3).mean()

    return situation(
        functools.partial(convolutions, 8), pairs(), step, options={"step": step},
        sample=pictures()[0][:4], lags=False,
    )  # fmt: skip


# --- batches and outputs ------------------------------------------------------------------------


@dataclasses.dataclass
class Head:
    logits: Any
    scores: list[Any]
    note: str = "well"
    extra: Any = None


@entry("outputs nested in a mapping of a dataclass of lists", "torch", "untried")
def _nested() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = convolutions(8)
            self.kind, self.age = nn.Linear(8, CLASSES), nn.Linear(8, 1)

        def forward(self, image: Any, *, temperature: float = 1.0, **ignored: Any) -> Any:
            x = self.body(image)
            head = Head(self.kind(x) / temperature, [self.age(x)])
            return {"head": head, "count": len(image), "nothing": None}

    x, y = pictures()
    names = [f"picture {i}" for i in range(16)]
    batches = [
        {"image": x[r], "label": y[r], "age": y[r].float()[:, None], "name": names} for r in rows()
    ]

    def step(m: Any, b: Any) -> Any:
        head = m(image=b["image"], name=b["name"], temperature=0.5)["head"]
        return F.cross_entropy(head.logits, b["label"]) + F.mse_loss(head.scores[0], b["age"])

    return situation(
        Net, batches, step, options={"step": step}, call=lambda m, b: m(image=b["image"]),
        sample={"image": x[:4]},
    )  # fmt: skip


class Records(Dataset[Any]):
    def __init__(self) -> None:
        self.x, self.y = pictures()

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> Any:
        return self.x[index], int(self.y[index]), f"{index}.png", torch.zeros(index % 3, 4)


def collated(items: list[Any]) -> Any:
    pixels, labels, names, boxes = zip(*items, strict=True)
    return {
        "pixels": torch.stack(pixels), "label": torch.tensor(labels), "file": list(names),
        "mask": None, "boxes": list(boxes),
    }  # fmt: skip


@entry("a DataLoader with workers: names, None, boxes of many counts", "torch", "untried")
def _workers() -> Program:
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0)).tolist()
    loader = Loader(
        Records(), num_workers=2, batch_sampler=[order[:20], order[20:36], order[36:]],
        collate_fn=collated,
    )  # fmt: skip

    def step(m: Any, b: Any) -> Any:
        return F.cross_entropy(m(b["pixels"]), b["label"])

    return situation(
        convolutions, loader, step, options={"step": step}, call=lambda m, b: m(b["pixels"]),
        sample=pictures()[0][:4],
    )  # fmt: skip


@entry("one graph in one batch, a mask of its nodes", "torch", "untried")
def _one_graph() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l1, self.n1 = nn.Linear(6, 8), nn.BatchNorm1d(8, **LAGGING)
            self.l2, self.n2 = nn.Linear(8, 8), nn.BatchNorm1d(8, **LAGGING)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Any, near: Any) -> Any:
            x = F.relu(self.n1(near @ self.l1(x)))
            return self.head(F.relu(self.n2(near @ self.l2(x))))

    generator = torch.Generator().manual_seed(0)
    y = torch.arange(40) % CLASSES
    x = torch.randn(40, 6, generator=generator) + 2
    x[:, 0] += 2 * y
    edges = torch.rand(40, 40, generator=generator) < 0.5
    near = (edges & (y[:, None] == y)) + torch.eye(40)
    near = near / near.sum(1, keepdim=True)
    mask = torch.rand(40, generator=generator) < 0.6

    def step(m: Any, b: Any) -> Any:
        return F.cross_entropy(m(b[0], b[1])[b[3]], b[2][b[3]])

    return situation(
        Net, [(x, near, y, mask)] * 3, step, options={"step": step}, sample=(x, near),
        call=lambda m, b: m(b[0], b[1]),
    )  # fmt: skip


@entry("categories, bags and numbers in a mapping (DeepFM)", "torch", "untried")
def _tabular() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = nn.ModuleDict(
                {"city": nn.Embedding(5, 4), "device": nn.Embedding(3, 4)}
            )
            self.bag, self.numbers = nn.EmbeddingBag(20, 4), nn.BatchNorm1d(3, **LAGGING)
            self.head = nn.Sequential(
                nn.Linear(15, 16), nn.BatchNorm1d(16, **LAGGING), nn.ReLU(), nn.Dropout(0.0),
                nn.Linear(16, 1),
            )  # fmt: skip

        def forward(self, batch: Any) -> Any:
            known = [embedding(batch[name]) for name, embedding in self.embeddings.items()]
            known += [self.bag(batch["tags"], batch["offsets"]), self.numbers(batch["numbers"])]
            return self.head(torch.cat(known, 1)).squeeze(1)

    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(3):
        values = torch.randn(16, 3, generator=generator) * 5 + 20
        batches.append({
            "city": torch.randint(5, (16,), generator=generator),
            "device": torch.randint(3, (16,), generator=generator),
            "tags": torch.randint(20, (40,), generator=generator),
            "offsets": torch.cat([torch.arange(15) * 2, torch.tensor([33])]),
            "numbers": values, "label": (values[:, 0] > 20).float(),
        })  # fmt: skip

    def step(m: Any, b: Any) -> Any:
        return F.binary_cross_entropy_with_logits(m(b), b["label"])

    return situation(
        Net, batches, step, options={"step": step}, call=lambda m, b: m(b), sample=batches[0]
    )


def resized() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = convolutions()

        def forward(self, images: list[Any]) -> Any:
            return self.net(torch.cat([F.interpolate(i[None], (8, 8)) for i in images]))

    x, y = pictures()
    images = [F.interpolate(i[None], (8 + k % 4, 8 + k % 3))[0] for k, i in enumerate(x)]
    batches = [(images[r], y[r]) for r in rows()]
    return situation(Net, batches, classify, sample=(images[:4],), **CLASSIFIED)


@entry("pictures of many sizes in a list, step=", "torch", "untried")
def _many_sizes_step() -> Program:
    return dataclasses.replace(resized(), options={"step": classify})


@entry("pictures of many sizes in a list, loss=", "torch", "untried")
def _many_sizes() -> Program:
    return resized()


@entry("a ConcatDataset with a Subset, and a sampler", "torch", "untried")
def _concatenated() -> Program:
    x, y = pictures()
    data = ConcatDataset(
        [TensorDataset(x[:24], y[:24]), Subset(TensorDataset(x, y), range(24, 48))]
    )
    loader = Loader(data, batch_size=16, sampler=list(range(48)))
    return situation(convolutions, loader, classify, sample=x[:4], **CLASSIFIED)


def positions() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(3, 8), nn.BatchNorm1d(8, **LAGGING)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Any, mask: Any) -> Any:
            x = self.first(x)
            out = torch.zeros_like(x)
            out[mask] = self.norm(x[mask])
            out = (F.relu(out) * mask[..., None]).sum(1)
            return self.head(out / mask.sum(1, keepdim=True))

    generator = torch.Generator().manual_seed(0)
    y = numbers()
    x = torch.randn(48, 7, 3, generator=generator) + 2 + y[:, None, None]
    mask = torch.arange(7)[None] < torch.randint(2, 8, (48, 1), generator=generator)
    batches = [{"x": x[r], "mask": mask[r], "labels": y[r]} for r in rows()]
    return situation(
        Net, batches, lambda m, b: F.cross_entropy(m(b["x"], b["mask"]), b["labels"]),
        call=lambda m, b: m(b["x"], b["mask"]), sample=(x[:4], mask[:4]), **CLASSIFIED,
    )  # fmt: skip


@entry("BN over the valid positions alone, step=", "torch", "untried")
def _valid_step() -> Program:
    program = positions()
    return dataclasses.replace(program, options={"step": program.ask})


@entry("BN over the valid positions alone, loss=", "torch", "untried")
def _valid() -> Program:
    return positions()


@entry("nested mappings of NumPy arrays, unpacked by the step", "torch", "untried")
def _arrays() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = convolutions()

        def forward(self, image: Any) -> Any:
            return self.net(image)

    x, y = pictures()
    batches = [
        {"inputs": {"image": x[r].numpy()},
         "targets": {"label": y[r].numpy(), "weight": torch.ones(16).numpy()},
         "meta": {"index": list(range(16)), "split": "train"}}
        for r in rows()
    ]  # fmt: skip

    def called(m: Any, b: Any) -> Any:
        return m(**{name: torch.as_tensor(array) for name, array in b["inputs"].items()})

    def step(m: Any, b: Any) -> Any:
        return F.cross_entropy(called(m, b), torch.as_tensor(b["targets"]["label"]))

    return situation(Net, batches, step, options={"step": step}, call=called, sample=x[:4])


@entry("a ModuleDict without forward, called by the step", "torch", "untried")
def _no_forward() -> Program:
    def make() -> Any:
        adversary = nn.Sequential(
            nn.Linear(8, 8), nn.BatchNorm1d(8, **LAGGING), nn.ReLU(), nn.Linear(8, 2)
        )
        return nn.ModuleDict(
            {"encoder": convolutions(8), "classes": nn.Linear(8, CLASSES), "adversary": adversary}
        )

    def step(m: Any, b: Any) -> Any:
        x = m["encoder"](b[0])
        against = F.cross_entropy(m["adversary"](x), b[1] % 2)
        return F.cross_entropy(m["classes"](x), b[1]) + 0.1 * against

    return situation(
        make, pairs(), step, options={"step": step}, no_help=("pass sample=",),
        call=lambda m, b: m["classes"](m["encoder"](b[0])),
    )  # fmt: skip


@entry("a loader that ends with a single picture", "torch", "untried")
def _single() -> Program:
    x, y = pictures(49)

    class Again:
        def __iter__(self) -> Iterator[Any]:
            return (self[index] for index in range(4))

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Any:
            rows = slice(16 * index, 16 * index + 16)
            return x[rows], y[rows]

    def ask(m: Any, b: Any) -> Any:
        alone = len(b[0]) == 1 and m.training  # joined to the batch before it by fl.phases
        x, y = (each.repeat_interleave(2, 0) if alone else each for each in b)
        return F.cross_entropy(m(x), y)

    return situation(convolutions, Again(), ask, sample=x[:4], more_in_training=True, **CLASSIFIED)


@dataclasses.dataclass
class Scaled:
    image: Any
    scale: int = 1


class Scored:
    def __init__(self, logits: Any) -> None:
        self.logits = logits


def objects() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = convolutions(8), nn.Linear(8, CLASSES)

        def forward(self, given: Scaled) -> Scored:
            return Scored(self.head(self.net(given.image * given.scale)))

    def loss(out: Scored, y: Any) -> Any:
        return F.cross_entropy(out.logits, y)

    x, y = pictures()
    batches = [(Scaled(x[r]), y[r]) for r in rows()]
    return situation(
        Net, batches, lambda m, b: loss(m(b[0]), b[1]), options={"loss": loss},
        sample=(batches[0][0],),
    )  # fmt: skip


@entry("inputs in a dataclass, outputs in an object, step=", "torch", "untried")
def _objects_step() -> Program:
    program = objects()
    return dataclasses.replace(program, options={"step": program.ask})


@entry("inputs in a dataclass, outputs in an object, loss=", "torch", "untried")
def _objects() -> Program:
    return objects()


@entry("(x, y, lengths) batches of which the loss takes two", "torch", "untried")
def _lengths() -> Program:
    x, y = pictures()
    batches = [(x[r], y[r], torch.full((16,), 8)) for r in rows()]
    return situation(convolutions, batches, classify, sample=x[:4], **CLASSIFIED)


@entry("(x, y, mask): a number for each sample that is no weight", "torch", "untried")
def _no_weights() -> Program:
    x, y = pictures()
    batches = [(x[r], y[r], (y[r] % 2).float()) for r in rows()]
    return situation(convolutions, batches, classify, options={"step": classify}, sample=x[:4])


def sets() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 16), nn.BatchNorm1d(16, **LAGGING), nn.ReLU())
            self.head = nn.Linear(16, CLASSES)

        def forward(self, sets: list[Any]) -> Any:
            x = self.body(torch.cat(sets)).split([len(each) for each in sets])
            return self.head(torch.stack([each.mean(0) for each in x]))

    generator = torch.Generator().manual_seed(0)
    y = numbers()
    found = [torch.randn(3 + i % 5, 3, generator=generator) + 2 + int(y[i]) for i in range(48)]
    batches = [(found[r], y[r]) for r in rows()]
    return situation(Net, batches, classify, sample=(found[:4],), **CLASSIFIED)


@entry("sets of many sizes in a list, step=", "torch", "untried")
def _sets_step() -> Program:
    return dataclasses.replace(sets(), options={"step": classify})


@entry("sets of many sizes in a list, loss=", "torch", "untried")
def _sets() -> Program:
    return sets()
