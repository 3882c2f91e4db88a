"""Programs of the last round: audio with padding, streams, crops, ranks, complex spectra.

When they were asked first every verb worked or refused; nothing was mended for them.
"""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .program import Program, entry
from .situations import CLASSES, LAGGING, convolutions, pictures, rows, situation
from .torchvision_operators import load as torchvision
from .unseen import CLASSIFIED, classify, mixed, settled


def dense(given: int, out: int, **norm: Any) -> nn.Sequential:
    norm = {**LAGGING, **norm}
    return nn.Sequential(
        nn.Linear(given, 16), nn.BatchNorm1d(16, **norm), nn.ReLU(),
        nn.Linear(16, 16), nn.BatchNorm1d(16, **norm), nn.ReLU(), nn.Linear(16, out),
    )  # fmt: skip


def table(count: int = 48, width: int = 6, seed: int = 0) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % CLASSES
    x = torch.randn(count, width, generator=generator) * 2 + 3
    x[:, 0] += 3 * y
    return x, y


@entry("transformers Wav2Vec2-Conformer, padded audio", "transformers", "later")
def _conformer() -> Program:
    torchvision()
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForSequenceClassification

    config = Wav2Vec2ConformerConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_labels=CLASSES,
        classifier_proj_size=8, conv_depthwise_kernel_size=3, layerdrop=0.0, hidden_dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
        mask_time_prob=0.0, apply_spec_augment=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    batches = []
    for start in range(0, 24, 8):
        y = torch.arange(start, start + 8) % CLASSES
        lengths = 400 + 40 * (torch.arange(8) % 3)
        mask = (torch.arange(480)[None] < lengths[:, None]).long()
        sound = torch.randn(8, 480, generator=generator) * (1 + y[:, None]) * mask
        batches.append({"input_values": sound, "attention_mask": mask, "labels": y})

    def make() -> Any:
        model = Wav2Vec2ConformerForSequenceClassification(config)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = 0.01
        return model

    return situation(
        make,
        batches,
        lambda m, b: m(**b).loss,
        call=lambda m, b: m(**b).logits,
        lags=False,
        sample={name: batches[0][name] for name in ("input_values", "attention_mask")},
    )


@entry("nodes of several graphs in one row: forward(x, edges, graph)", "torch", "later")
def _nodes() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(5, 12), nn.BatchNorm1d(12, **LAGGING)
            self.second, self.last = nn.Linear(12, 12), nn.BatchNorm1d(12, **LAGGING)
            self.head = nn.Linear(12, CLASSES)

        def forward(self, x: Any, edges: Any, graph: Any) -> Any:
            for layer, norm in ((self.first, self.norm), (self.second, self.last)):
                x = layer(x)
                x = F.relu(norm(x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])))
            count = int(graph.max()) + 1
            pooled = torch.zeros(count, x.shape[1]).index_add(0, graph, x)
            return self.head(pooled / torch.bincount(graph, minlength=count)[:, None])

    generator = torch.Generator().manual_seed(0)
    batches = []
    for index in range(3):
        sizes = 3 + (torch.arange(8) + index) % 4
        graph = torch.repeat_interleave(torch.arange(8), sizes)
        y = torch.arange(8) % CLASSES
        x = torch.randn(len(graph), 5, generator=generator) + 2 + 2 * y[graph][:, None]
        edges = torch.stack([torch.arange(len(graph)), torch.arange(len(graph)).roll(1)])
        batches.append((x, edges, graph, y))
    step = lambda m, b: F.cross_entropy(m(*b[:3]), b[3])  # noqa: E731
    return situation(Net, batches, step, options={"step": step}, call=lambda m, b: m(*b[:3]),
                     sample=batches[0][:3])  # fmt: skip


@entry("words of different lengths, BN1d on (n, channels, length)", "torch", "later")
def _words() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 8, padding_idx=0)
            self.conv, self.norm = nn.Conv1d(8, 12, 3, padding=1), nn.BatchNorm1d(12, **LAGGING)
            self.head = nn.Linear(12, CLASSES)

        def forward(self, ids: Any, lengths: Any) -> Any:
            mask = (torch.arange(ids.shape[1])[None] < lengths[:, None])[:, None]
            x = F.relu(self.norm(self.conv(self.embedding(ids).transpose(1, 2)))) * mask
            return self.head(x.amax(2))

    items = []
    generator = torch.Generator().manual_seed(0)
    for i in range(48):
        ids = torch.randint(1, 20, (4 + i % 7,), generator=generator)
        ids[0] = 1 + i % CLASSES
        items.append((ids, i % CLASSES))

    def collate(chosen: list[Any]) -> Any:
        ids = nn.utils.rnn.pad_sequence([ids for ids, _ in chosen], batch_first=True)
        lengths = torch.tensor([len(ids) for ids, _ in chosen])
        return {"ids": ids, "lengths": lengths}, torch.tensor([y for _, y in chosen])

    loader = torch.utils.data.DataLoader(items, batch_size=16, collate_fn=collate)
    batches = list(loader)
    ask = lambda m, b: F.cross_entropy(m(**b[0]), b[1])  # noqa: E731
    return situation(
        Net, batches, ask, call=lambda m, b: m(**b[0]), sample=batches[0][0], **CLASSIFIED
    )


@entry("an IterableDataset of mappings", "torch", "later")
def _stream() -> Program:
    x, y = pictures()

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            for image, label in zip(x, y, strict=True):
                yield {"image": image, "label": label, "name": "picture"}

    batches = list(torch.utils.data.DataLoader(Stream(), batch_size=16))
    step = lambda m, b: F.cross_entropy(m(b["image"]), b["label"])  # noqa: E731
    return situation(
        convolutions, batches, step, options={"step": step}, call=lambda m, b: m(b["image"]),
        sample=x[:4],
    )  # fmt: skip


Pack = namedtuple("Pack", "inputs targets meta")


@entry("collate_fn that returns a named tuple with a list of names", "torch", "later")
def _packs() -> Program:
    x, y = pictures()
    batches = [Pack(x[r], y[r], [f"file{i}" for i in range(16)]) for r in rows()]
    ask = lambda m, b: F.cross_entropy(m(b.inputs), b.targets)  # noqa: E731
    return situation(convolutions, batches, ask, options={"step": ask}, sample=x[:4],
                     call=lambda m, b: m(b.inputs))  # fmt: skip


@entry("(main, aux) in training, main at inference, loss knows both", "torch", "later")
def _auxiliary() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(
                nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8, **LAGGING), nn.ReLU()
            )
            self.aux = nn.Sequential(
                nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4, **LAGGING), nn.ReLU(),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES),
            )  # fmt: skip
            self.main = nn.Sequential(
                nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, **LAGGING), nn.ReLU(),
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
            )  # fmt: skip

        def forward(self, x: Any) -> Any:
            x = self.stem(x)
            return (self.main(x), self.aux(x)) if self.training else self.main(x)

    def loss(out: Any, y: Any) -> Any:
        main, aux = out if isinstance(out, tuple) else (out, None)
        more = 0.0 if aux is None else 0.4 * F.cross_entropy(aux, y)
        return F.cross_entropy(main, y) + more

    x, y = pictures()
    return situation(
        Net, [(x[r], y[r]) for r in rows()], lambda m, b: loss(m(b[0]), b[1]),
        options={"loss": loss}, more_in_training=True, sample=x[:4],
    )  # fmt: skip


@entry("SupCon: views in one row, labels for half of it", "torch", "later")
def _supcon() -> Program:
    def loss(m: Any, b: Any) -> Any:
        views, labels = b
        z = F.normalize(m(torch.cat(list(views))), dim=1)
        y = labels.repeat(2)
        alike = (y[:, None] == y[None]).float() - torch.eye(len(y))
        logits = z @ z.T / 0.2 - 1e9 * torch.eye(len(y))
        return -((logits.log_softmax(1) * alike).sum(1) / alike.sum(1)).mean()

    x, y = pictures()
    noise = 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    batches = [([x[r], x[r] + noise[r]], y[r]) for r in rows()]
    return situation(
        convolutions, batches, loss, options={"step": loss},
        call=lambda m, b: m(torch.cat(list(b[0]))), sample=x[:4],
    )  # fmt: skip


@entry("crops of two sizes in a list (DINO), each size in a pass of its own", "torch", "later")
def _crops() -> Program:
    class Multi(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = convolutions()

        def forward(self, crops: Any) -> Any:
            return torch.cat([self.backbone(torch.cat(crops[:2])), self.backbone(crops[2])])

    def step(m: Any, b: Any) -> Any:
        big, other, small = m(b).chunk(3)
        target = big.detach().softmax(1)
        return -(target * (other.log_softmax(1) + small.log_softmax(1))).sum(1).mean()

    x, _ = pictures()
    batches = [[x[r], x[r].flip(3), x[r][..., :5, :5]] for r in rows()]
    return situation(Multi, batches, step, options={"step": step}, call=lambda m, b: m(b),
                     sample=[crop[:4] for crop in batches[0]], lags=False)  # fmt: skip


@entry("a map of classes with pixels that count nothing (ignore_index)", "torch", "later")
def _ignored() -> Program:
    def make() -> Any:
        return nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8, **LAGGING), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, **LAGGING), nn.ReLU(),
            nn.Conv2d(8, CLASSES, 1),
        )  # fmt: skip

    loss = nn.CrossEntropyLoss(ignore_index=255)
    x, y = pictures()
    maps = y.view(-1, 1, 1).repeat(1, 8, 8)
    maps[:, :, ::3] = 255
    maps[5] = 255  # a picture of which nothing counts
    batches = [(x[r], maps[r]) for r in rows()]
    return situation(make, batches, lambda m, b: loss(m(b[0]), b[1]), options={"loss": loss},
                     sample=x[:4])  # fmt: skip


@entry("mean and variance as outputs, GaussianNLLLoss", "torch", "later")
def _gaussian() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.mean, self.spread = dense(6, 8), nn.Linear(8, 1), nn.Linear(8, 1)

        def forward(self, x: Any) -> Any:
            x = self.body(x).relu()
            return self.mean(x), F.softplus(self.spread(x)) + 1e-3

    loss = lambda out, y: F.gaussian_nll_loss(out[0], y, out[1])  # noqa: E731
    x, y = table()
    target = y[:, None].float() + 0.1 * x[:, 1:2]
    batches = [(x[r], target[r]) for r in rows()]
    return situation(Net, batches, lambda m, b: loss(m(b[0]), b[1]), options={"loss": loss},
                     sample=x[:4])  # fmt: skip


@entry("lists to rank: documents of a query, BN over all of them", "torch", "later")
def _ranks() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = dense(6, 1)

        def forward(self, documents: Any) -> Any:
            n, k, width = documents.shape
            return self.body(documents.reshape(n * k, width)).reshape(n, k)

    loss = lambda out, y: -(y.softmax(1) * out.log_softmax(1)).sum(1).mean()  # noqa: E731
    x, y = table(240)
    documents, relevance = x.reshape(48, 5, 6), y.reshape(48, 5).float()
    batches = [(documents[r], relevance[r]) for r in rows()]
    return situation(Net, batches, lambda m, b: loss(m(b[0]), b[1]), options={"loss": loss},
                     lags=False, sample=documents[:4])  # fmt: skip


@entry("forward(inputs, data_samples, mode) that returns losses or outputs", "torch", "later")
def _modes() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = convolutions()

        def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
            out = self.backbone(torch.stack(list(inputs)))
            if mode == "loss":
                labels = torch.stack([sample["label"] for sample in data_samples])
                return {"loss_cls": F.cross_entropy(out, labels)}
            return out

    def step(m: Any, b: Any) -> Any:
        return sum(m(b["inputs"], b["data_samples"], mode="loss").values())

    x, y = pictures()
    batches = [
        {"inputs": list(x[r]), "data_samples": [{"label": label} for label in y[r]]} for r in rows()
    ]
    return situation(Net, batches, step, options={"step": step}, sample={"inputs": list(x[:4])},
                     call=lambda m, b: m(b["inputs"]))  # fmt: skip


@entry("complex spectra in, magnitudes inside", "torch", "later")
def _complex() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = dense(9, CLASSES)

        def forward(self, spectrum: Any) -> Any:
            return self.body(spectrum.abs().log1p())

    y = torch.arange(48) % CLASSES
    time = torch.arange(16) / 16
    wave = torch.sin(2 * math.pi * (1 + y[:, None]) * time[None]) * 3
    wave += torch.randn(wave.shape, generator=torch.Generator().manual_seed(0))
    x = torch.fft.rfft(wave)
    return situation(Net, [(x[r], y[r]) for r in rows()], classify, sample=x[:4], **CLASSIFIED)


@entry("bytes in, scaled inside, channels last", "torch", "later")
def _bytes() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.tensor(255.0))
            self.body = convolutions()

        def forward(self, x: Any) -> Any:
            return self.body((x.float() / self.scale).contiguous(memory_format=torch.channels_last))

    x, y = pictures()
    x = (x * 40).clamp(0, 255).to(torch.uint8)
    return situation(Net, [(x[r], y[r]) for r in rows()], classify, sample=x[:4], **CLASSIFIED)


@entry("healthy: squeeze and excitation, stochastic depth, dropout", "torch", "later")
def _excited() -> Program:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.squeeze = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1),
                nn.Sigmoid(),
            )  # fmt: skip

        def forward(self, x: Any) -> Any:
            out = F.relu(self.norm(self.conv(x)))
            out = out * self.squeeze(out)
            if self.training:
                out = out * (torch.rand(len(x), 1, 1, 1) > 0.1) / 0.9
            return x + out

    def make() -> Any:
        return nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), Block(), Block(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, CLASSES),
        )  # fmt: skip

    return settled(make, mixed(), classify, own_ways=True, **CLASSIFIED)


@entry("healthy: momentum=None, no scale, no shift", "torch", "later")
def _cumulative() -> Program:
    def make() -> Any:
        return convolutions(momentum=0.1, affine=False)

    program = settled(make, mixed(), classify, **CLASSIFIED)
    for module in program.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    return program
