"""Programs that were written last, as people write them: loops, wrappers and layers of every kind.

They were asked, and what was answered was committed (``docs/results/unseen-first.json``), before
anything was mended for them. ``healthy`` ones have nothing wrong with their BN.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .program import Program, entry
from .situations import CLASSES, LAGGING, convolutions, pictures, rows, situation, trained


def settled(
    make: Callable[[], Any], batches: Sequence[Any], ask: Callable[[Any, Any], Any], **more: Any
) -> Program:
    """Trained as it should be: small steps at the end, while the averages catch up."""
    torch.manual_seed(0)
    model = trained(make(), ask, batches)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-5)
    for _ in range(40):
        for batch in batches:
            model.train()
            loss = ask(model, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return Program(
        model=model, batches=batches, ask=ask,
        **{"healthy": True, "call": lambda m, b: m(b[0]), **more},
    )  # fmt: skip


def pairs() -> list[Any]:
    x, y = pictures()
    return [(x[r], y[r]) for r in rows()]


def mixed(count: int = 96, side: int = 8) -> list[Any]:
    """Large batches of one distribution, in which every class is as often as in any other."""
    x, y = pictures(count, side)
    return [(x[r], y[r]) for r in rows(count, 48)]


def classify(m: Any, b: Any) -> Any:
    return F.cross_entropy(m(b[0]), b[1])


CLASSIFIED: dict[str, Any] = {"options": {"loss": F.cross_entropy}}


# --- loops --------------------------------------------------------------------------------------


@entry("MoCo: queue and momentum encoder in forward", "torch", "unseen")
def _moco() -> Program:
    class MoCo(nn.Module):
        def __init__(self, dim: int = 8, size: int = 64) -> None:
            super().__init__()
            self.size, self.m, self.temperature = size, 0.99, 0.2
            self.encoder_q, self.encoder_k = convolutions(dim), convolutions(dim)
            self.encoder_k.load_state_dict(self.encoder_q.state_dict())
            self.encoder_k.requires_grad_(False)
            self.register_buffer("queue", F.normalize(torch.randn(dim, size), dim=0))
            self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

        def forward(self, im_q: Any, im_k: Any) -> Any:
            q = F.normalize(self.encoder_q(im_q), dim=1)
            with torch.no_grad():
                for ours, theirs in zip(
                    self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True
                ):
                    theirs.data = theirs.data * self.m + ours.data * (1.0 - self.m)
                k = F.normalize(self.encoder_k(im_k), dim=1)
            positive = torch.einsum("nc,nc->n", [q, k]).unsqueeze(-1)
            negative = torch.einsum("nc,ck->nk", [q, self.queue.clone().detach()])
            logits = torch.cat([positive, negative], dim=1) / self.temperature
            start = int(self.queue_ptr)
            self.queue[:, start : start + len(k)] = k.T
            self.queue_ptr[0] = (start + len(k)) % self.size
            return logits, torch.zeros(len(logits), dtype=torch.long)

    x, _ = pictures()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    batches = [(x[r], x[r] + 0.3 * noise[r]) for r in rows()]

    def step(m: Any, b: Any) -> Any:
        return F.cross_entropy(*m(*b))

    return situation(
        MoCo, batches, step, options={"step": step}, call=lambda m, b: m(*b), lags=False,
        own_ways=True, sample=(x[:16], x[:16]),
    )  # fmt: skip


@entry("Mean Teacher: teacher outside, labelled and unlabelled batches", "torch", "unseen")
def _mean_teacher() -> Program:
    torch.manual_seed(1)
    teacher = convolutions(momentum=0.5)
    with torch.no_grad():
        for _ in range(8):
            teacher(pictures()[0])
    teacher.requires_grad_(False).eval()
    x, y = pictures()
    more, _ = pictures(96, seed=5)
    batches = [
        ({"image": x[r], "label": y[r]}, {"weak": more[2 * r.start :][:32], "index": i})
        for i, r in enumerate(rows())
    ]

    def step(m: Any, b: Any) -> Any:
        labelled, unlabelled = b
        hard = F.cross_entropy(m(labelled["image"]), labelled["label"])
        with torch.no_grad():
            target = teacher(unlabelled["weak"]).softmax(1)
        soft = F.mse_loss(m(unlabelled["weak"]).softmax(1), target)
        return hard + 0.5 * soft, {"hard": hard.detach(), "soft": soft.detach()}

    return situation(
        convolutions, batches, lambda m, b: step(m, b)[0], options={"step": step},
        call=lambda m, b: m(b[0]["image"]), sample=x[:4],
    )  # fmt: skip


@entry("autocast in the step (AMP)", "torch", "unseen")
def _amp() -> Program:
    def step(m: Any, b: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(m(b[0]).float(), b[1])

    return situation(convolutions, pairs(), step, options={"step": step}, sample=pictures()[0][:4])


@entry("EMA copy of everything (ModelEmaV2)", "torch", "unseen")
def _ema() -> Program:
    batches = mixed()
    program = settled(lambda: convolutions(momentum=0.1), batches, classify, **CLASSIFIED)
    model, ema = program.model, copy.deepcopy(program.model).eval()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    for _ in range(40):
        for batch in batches:
            optimizer.zero_grad()
            classify(model.train(), batch).backward()
            optimizer.step()
            with torch.no_grad():
                for a, b in zip(
                    ema.state_dict().values(), model.state_dict().values(), strict=True
                ):
                    a.copy_(0.9 * a + 0.1 * b)
    return dataclasses.replace(program, model=ema.requires_grad_(False), sample=batches[0][0][:4])


@entry("GAN discriminator: real and fake in passes of their own", "torch", "unseen")
def _discriminator() -> Program:
    torch.manual_seed(2)
    generator = nn.Sequential(nn.ConvTranspose2d(4, 8, 4), nn.ReLU(), nn.ConvTranspose2d(8, 2, 5))
    x, _ = pictures()
    z = torch.randn(48, 4, 1, 1, generator=torch.Generator().manual_seed(6))
    batches = [(x[r], z[r]) for r in rows()]

    def step(m: Any, b: Any) -> Any:
        real, fake = m(b[0]), m(generator(b[1]).detach())
        ones, zeros = torch.ones_like(real), torch.zeros_like(fake)
        return {
            "real": F.binary_cross_entropy_with_logits(real, ones),
            "fake": F.binary_cross_entropy_with_logits(fake, zeros),
        }

    return situation(
        lambda: convolutions(1), batches, lambda m, b: sum(step(m, b).values()),
        options={"step": step}, sample=x[:4], lags=False,
    )  # fmt: skip


@entry("CycleGAN: two generators, each called on two sources", "torch", "unseen")
def _cycle() -> Program:
    def generator() -> Any:
        return nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8, **LAGGING), nn.ReLU(),
            nn.ConvTranspose2d(8, 2, 3, padding=1),
        )  # fmt: skip

    class Cycle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g_ab, self.g_ba = generator(), generator()

        def forward(self, real_a: Any, real_b: Any) -> Any:
            fake_b, fake_a = self.g_ab(real_a), self.g_ba(real_b)
            return fake_b, fake_a, self.g_ba(fake_b), self.g_ab(fake_a)

    x, _ = pictures()
    batches = [{"A": x[r], "B": 1 - x[r].flip(-1)} for r in rows()]

    def step(m: Any, b: Any) -> Any:
        _, _, rec_a, rec_b = m(b["A"], b["B"])
        return F.l1_loss(rec_a, b["A"]) + F.l1_loss(rec_b, b["B"])

    return situation(
        Cycle, batches, step, options={"step": step}, call=lambda m, b: m(b["A"], b["B"]),
        sample=(x[:4], x[4:8]),
    )  # fmt: skip


@entry("AveragedModel (SWA) without update_bn", "torch", "unseen")
def _averaged() -> Program:
    program = situation(convolutions, pairs(), classify, **CLASSIFIED)
    model = torch.optim.swa_utils.AveragedModel(program.model)
    model.update_parameters(trained(program.model, classify, program.batches))
    return dataclasses.replace(program, model=model, sample=pictures()[0][:4])


# --- what forward takes and returns -------------------------------------------------------------


@entry("forward(*args, **kwargs)", "torch", "unseen")
def _args() -> Program:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = convolutions()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    return situation(Wrapped, pairs(), classify, sample=pictures()[0][:4], **CLASSIFIED)


@entry("a generator of outputs, one per scale", "torch", "unseen")
def _yielding() -> Program:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8, **LAGGING), nn.ReLU()
                )
                for c in (2, 8)
            )
            self.heads = nn.ModuleList(nn.Linear(8, CLASSES) for _ in range(2))

        def forward(self, x: Any) -> Iterator[Any]:
            for block, head in zip(self.blocks, self.heads, strict=True):
                x = block(x)
                yield head(x.mean((2, 3)))

    def loss(out: Any, target: Any) -> Any:
        return sum(F.cross_entropy(each, target) for each in out)

    return situation(
        Pyramid, pairs(), lambda m, b: loss(m(b[0]), b[1]), options={"loss": loss},
        call=lambda m, b: list(m(b[0])), sample=pictures()[0][:4],
    )  # fmt: skip


@dataclasses.dataclass
class Output:
    loss: Any = None
    logits: Any = None
    hidden: tuple[Any, ...] = ()


@entry("mappings with keys that forward does not take; dataclass outputs", "torch", "unseen")
def _output() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = convolutions()

        def forward(self, pixels: Any, labels: Any = None, return_hidden: bool = False) -> Output:
            hidden = self.net[:6](pixels)
            logits = self.net[6:](hidden)
            loss = None if labels is None else F.cross_entropy(logits, labels)
            return Output(loss, logits, (hidden,) if return_hidden else ())

    x, y = pictures()
    batches = [
        {"pixels": x[r], "labels": y[r], "path": [f"{i}.jpg" for i in range(16)], "idx": y[r] * 7}
        for r in rows()
    ]

    def step(m: Any, b: Any) -> Any:
        return m(b["pixels"], labels=b["labels"]).loss

    return situation(
        Net, batches, step, options={"step": step}, call=lambda m, b: m(b["pixels"]).logits,
        sample={"pixels": x[:4]},
    )  # fmt: skip


@entry("volumes: 3-D U-Net with deep supervision", "torch", "unseen")
def _volumes() -> Program:
    def block(inside: int, out: int) -> Any:
        return nn.Sequential(
            nn.Conv3d(inside, out, 3, padding=1), nn.BatchNorm3d(out, **LAGGING), nn.LeakyReLU(0.01)
        )

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.bottom, self.up = block(1, 6), block(6, 12), block(18, 6)
            self.head, self.aux = nn.Conv3d(6, 3, 1), nn.Conv3d(12, 3, 1)

        def forward(self, x: Any) -> Any:
            skip = self.down(x)
            low = self.bottom(F.max_pool3d(skip, 2))
            high = F.interpolate(low, scale_factor=2, mode="trilinear", align_corners=False)
            out = self.head(self.up(torch.cat([skip, high], 1)))
            if self.training:
                return {"out": out, "aux": [self.aux(low)]}
            return {"out": out}

    x = torch.randn(8, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0)) + 2
    y = (x[:, 0] * 0.7).long().clamp(0, 2)
    batches = [{"image": x[r], "label": y[r], "spacing": (1.0, 1.0, 2.5)} for r in rows(8, 4)]

    def step(m: Any, b: Any) -> Any:
        out = m(b["image"])
        loss = F.cross_entropy(out["out"], b["label"])
        for each in out.get("aux", []):
            small = F.interpolate(b["label"][:, None].float(), each.shape[2:])[:, 0].long()
            loss = loss + 0.05 * F.cross_entropy(each, small)
        return loss

    return situation(
        UNet, batches, step, options={"step": step}, call=lambda m, b: m(b["image"])["out"],
        sample=x[:4], more_in_training=True,
    )  # fmt: skip


@entry("CTC with texts in one row, lengths beside", "torch", "unseen")
def _speech() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 16, 3, stride=2, padding=1)
            self.norm = nn.BatchNorm1d(16, **LAGGING)
            self.memory = nn.LSTM(16, 8, batch_first=True, bidirectional=True)
            self.head = nn.Linear(16, 5)

        def forward(self, audio: Any, lengths: Any) -> Any:
            x = F.hardtanh(self.norm(self.conv(audio)), 0, 20).transpose(1, 2)
            return self.head(self.memory(x)[0]).log_softmax(-1), (lengths + 1) // 2

    generator = torch.Generator().manual_seed(0)
    batches = []
    for i in range(3):
        texts = [torch.randint(1, 5, (2 + j % 3,), generator=generator) for j in range(12)]
        sounds = [
            (t.float().repeat_interleave(8)[None] * torch.tensor([[1.0], [2.0], [-1.0]]) + 3)
            for t in texts
        ]
        lengths = torch.tensor([s.shape[1] for s in sounds])
        audio = torch.zeros(12, 3, int(lengths.max()) + 2 * i)
        for row, sound in zip(audio, sounds, strict=True):
            row[:, : sound.shape[1]] = sound
        batches.append((audio, torch.cat(texts), lengths, torch.tensor([len(t) for t in texts])))

    def step(m: Any, b: Any) -> Any:
        found, lengths = m(b[0], b[2])
        return F.ctc_loss(found.transpose(0, 1), b[1], lengths, b[3], zero_infinity=True)

    return situation(
        Net, batches, step, options={"step": step}, call=lambda m, b: m(b[0], b[2]),
        sample=(batches[0][0][:4], batches[0][2][:4]),
    )  # fmt: skip


@entry("a detector of one's own; pictures without boxes", "torch", "unseen")
def _detector() -> Program:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8, **LAGGING), nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, **LAGGING), nn.ReLU(),
            )  # fmt: skip
            self.objectness, self.regression = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 4, 1)

        def forward(self, images: list[Any], targets: list[dict[str, Any]] | None = None) -> Any:
            side = max(max(i.shape[1:]) for i in images)
            x = torch.stack(
                [F.pad(i, (0, side - i.shape[2], 0, side - i.shape[1])) for i in images]
            )
            x = self.body(x)
            score, box = self.objectness(x)[:, 0], self.regression(x)
            if not self.training:
                return [
                    {"boxes": b[:, s.sigmoid() > 0.5].T, "scores": s.sigmoid()[s.sigmoid() > 0.5]}
                    for s, b in zip(score, box, strict=True)
                ]
            if targets is None:
                raise ValueError("targets should not be None in training mode")
            wanted, losses = torch.zeros_like(score), [box.sum() * 0]
            for row, target in enumerate(targets):
                for x0, y0, x1, y1 in target["boxes"].tolist():
                    i, j = int((y0 + y1) / 2), int((x0 + x1) / 2)
                    wanted[row, i, j] = 1
                    losses.append(
                        F.smooth_l1_loss(box[row, :, i, j], torch.tensor([x0, y0, x1, y1]) / 8)
                    )
            return {
                "loss_objectness": F.binary_cross_entropy_with_logits(score, wanted),
                "loss_box": sum(losses) / len(losses),
            }

    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for i in range(24):
        image = torch.randn(2, 8 + i % 3, 8, generator=generator) * 0.5 + 2
        boxes = torch.zeros(0, 4)
        if i % 4:
            image[:, 2:5, 2:5] += 4
            boxes = torch.tensor([[1.0, 1.0, 5.0, 5.0]])
        images.append(image)
        targets.append({"boxes": boxes, "labels": torch.ones(len(boxes), dtype=torch.long)})
    batches = [(images[r], targets[r]) for r in rows(24, 8)]
    return situation(
        Detector, batches, lambda m, b: sum(m(*b).values()), sample=(images[:4], targets[:4]),
        in_training_mode=True,
    )  # fmt: skip


@entry("tasks by name, BN of their own", "torch", "unseen")
def _tasks() -> Program:
    class Tasks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 8, 3)
            self.norm = nn.ModuleDict(
                {name: nn.BatchNorm2d(8, **LAGGING) for name in ("sort", "size", "unused")}
            )
            self.head = nn.ModuleDict({"sort": nn.Linear(8, CLASSES), "size": nn.Linear(8, 1)})

        def forward(self, x: Any, task: str) -> Any:
            return self.head[task](self.norm[task](self.conv(x)).relu().mean((2, 3)))

    x, y = pictures()
    batches = [
        {"x": x[r] * (1 + i % 2), "task": ("sort", "size")[i % 2],
         "y": y[r] if i % 2 == 0 else y[r].float()[:, None]}
        for i, r in enumerate(rows(48, 12))
    ]  # fmt: skip

    def step(m: Any, b: Any) -> Any:
        out = m(b["x"], b["task"])
        return F.cross_entropy(out, b["y"]) if b["task"] == "sort" else F.mse_loss(out, b["y"])

    return situation(
        Tasks, batches, step, options={"step": step}, call=lambda m, b: m(b["x"], b["task"]),
        sample={"x": x[:4], "task": "sort"},
    )  # fmt: skip


class Graphs:
    """As PyG's Batch, by hand: nodes of several graphs in one tensor."""

    def __init__(self, x: Any, edge_index: Any, batch: Any, y: Any) -> None:
        self.x, self.edge_index, self.batch, self.y = x, edge_index, batch, y

    def to(self, device: Any) -> Any:
        return Graphs(*(getattr(self, n).to(device) for n in ("x", "edge_index", "batch", "y")))


@entry("graphs of an own class, forward(batch)", "torch", "unseen")
def _graphs() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(3, 12), nn.BatchNorm1d(12, **LAGGING)
            self.second, self.last = nn.Linear(12, 12), nn.BatchNorm1d(12, **LAGGING)
            self.head = nn.Linear(12, CLASSES)

        def forward(self, data: Graphs) -> Any:
            source, target = data.edge_index
            x = self.norm(self.first(data.x)).relu()
            x = x + torch.zeros_like(x).index_add_(0, target, x[source])
            x = self.last(self.second(x)).relu()
            count = int(data.batch.max()) + 1
            return self.head(torch.zeros(count, 12).index_add_(0, data.batch, x))

    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(3):
        sizes = torch.randint(3, 7, (12,), generator=generator)
        y = torch.arange(12) % CLASSES
        batch = torch.arange(12).repeat_interleave(sizes)
        x = torch.randn(len(batch), 3, generator=generator) + 2 + y[batch][:, None]
        edges = torch.randint(0, len(batch), (2, 40), generator=generator)
        edges = edges[:, batch[edges[0]] == batch[edges[1]]]
        batches.append(Graphs(x, edges, batch, y))

    def step(m: Any, b: Any) -> Any:
        return F.cross_entropy(m(b), b.y)

    return situation(
        Net, batches, step, options={"step": step}, call=lambda m, b: m(b), sample=batches[0]
    )


# --- wrappers -----------------------------------------------------------------------------------


@entry("torch.compile(model): OptimizedModule", "torch", "unseen")
def _optimized() -> Program:
    program = situation(convolutions, pairs(), classify, **CLASSIFIED)
    model = torch.compile(program.model, backend="eager")
    return dataclasses.replace(program, model=model, sample=pictures()[0][:4])


@entry("DataParallel around the model", "torch", "unseen")
def _parallel() -> Program:
    program = situation(convolutions, pairs(), classify, **CLASSIFIED)
    return dataclasses.replace(
        program, model=nn.DataParallel(program.model), sample=pictures()[0][:4]
    )


@entry("script module (torch.jit.script)", "torch", "unseen")
def _scripted() -> Program:
    program = situation(convolutions, pairs(), classify, **CLASSIFIED)
    return dataclasses.replace(
        program, model=torch.jit.script(program.model), sample=pictures()[0][:4],
        plain=convolutions,
    )  # fmt: skip


@entry("traced module (torch.jit.trace)", "torch", "unseen")
def _traced() -> Program:
    program = situation(convolutions, pairs(), classify, **CLASSIFIED)
    model = torch.jit.trace(program.model.eval(), pictures()[0][:4])
    return dataclasses.replace(
        program, model=model, sample=pictures()[0][:4], lags=False, plain=convolutions,
        fixed=True,
    )  # fmt: skip


@entry("quantisation-aware: prepare_qat with fused BN", "torch", "unseen")
def _aware() -> Program:
    import torch.ao.quantization as quantization

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
            self.conv, self.bn = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8, **LAGGING)
            self.relu, self.head = nn.ReLU(), nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            x = self.relu(self.bn(self.conv(self.quant(x))))
            return self.dequant(self.head(x.mean((2, 3))))

    def make() -> Any:
        model = Net().train()
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
        quantization.fuse_modules_qat(model, [["conv", "bn", "relu"]], inplace=True)
        return quantization.prepare_qat(model, inplace=True)

    return situation(make, pairs(), classify, own_ways=True, sample=pictures()[0][:4], **CLASSIFIED)


@entry("LoRA around convolutions; the pretrained part by requires_grad", "torch", "unseen")
def _lora() -> Program:
    class Adapted(nn.Module):
        def __init__(self, conv: Any, rank: int = 2) -> None:
            super().__init__()
            self.conv = conv.requires_grad_(False)
            self.down = nn.Conv2d(
                conv.in_channels, rank, conv.kernel_size, padding=conv.padding, bias=False
            )
            self.up = nn.Conv2d(rank, conv.out_channels, 1, bias=False)
            nn.init.zeros_(self.up.weight)

        def forward(self, x: Any) -> Any:
            return self.conv(x) + 0.5 * self.up(self.down(x))

    def make() -> Any:
        model = convolutions()
        for index in (0, 3):
            model[index] = Adapted(model[index])
        return model

    return situation(make, pairs(), classify, sample=pictures()[0][:4], **CLASSIFIED)


@entry("spectral norm before BN", "torch", "unseen")
def _spectral() -> Program:
    def make() -> Any:
        model = convolutions()
        for index in (0, 3):
            nn.utils.parametrizations.spectral_norm(model[index])
        return model

    return situation(make, pairs(), classify, own_ways=True, sample=pictures()[0][:4], **CLASSIFIED)


@entry("weight-standardised convolutions before BN", "torch", "unseen")
def _standardised() -> Program:
    class Standardised(nn.Conv2d):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding)

    def make() -> Any:
        return nn.Sequential(
            Standardised(2, 8, 3), nn.BatchNorm2d(8, **LAGGING), nn.ReLU(),
            Standardised(8, 8, 3), nn.BatchNorm2d(8, **LAGGING), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
        )  # fmt: skip

    return situation(make, pairs(), classify, sample=pictures()[0][:4], **CLASSIFIED)


@entry("reversible blocks: BN in an autograd function's recomputation", "torch", "unseen")
def _reversible() -> Program:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4, **LAGGING), nn.ReLU()
            )

        def forward(self, x: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.f, self.g = nn.Conv2d(2, 8, 3, padding=1), Half(), Half()
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            a, b = self.stem(x).chunk(2, 1)
            a = a + self.f(b)
            b = b + self.g(a)
            return self.head(torch.cat([a, b], 1).mean((2, 3)))

    return situation(Net, pairs(), classify, sample=pictures()[0][:4], **CLASSIFIED)


# --- healthy ------------------------------------------------------------------------------------


@entry("healthy: VAE, drawn in training only", "torch", "unseen")
def _vae() -> Program:
    class VAE(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(
                nn.Conv2d(2, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
                nn.Linear(128, 8),
            )  # fmt: skip
            self.decoder = nn.Sequential(
                nn.Linear(4, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Unflatten(1, (8, 4, 4)),
                nn.ConvTranspose2d(8, 2, 4, 2, 1),
            )  # fmt: skip

        def forward(self, x: Any) -> Any:
            mean, logvar = self.encoder(x).chunk(2, 1)
            z = mean
            if self.training:
                z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
            return self.decoder(z), mean, logvar

    def step(m: Any, b: Any) -> Any:
        found, mean, logvar = m(b[0])
        kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(1).mean()
        return {"reconstruction": F.mse_loss(found, b[0]), "kl": 1e-3 * kl}

    return settled(
        VAE, mixed(), lambda m, b: sum(step(m, b).values()), options={"step": step},
        sample=pictures()[0][:4], more_in_training=True,
    )  # fmt: skip


class RunningMeanStd(nn.Module):
    """Observation normalisation of reinforcement learning."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("var", torch.ones(size))
        self.register_buffer("count", torch.tensor(1e-4))

    def forward(self, x: Any) -> Any:
        if self.training:
            with torch.no_grad():
                delta, total = x.mean(0) - self.mean, self.count + len(x)
                between = delta.square() * self.count * len(x) / total
                second = self.var * self.count + x.var(0, unbiased=False) * len(x) + between
                self.mean += delta * len(x) / total
                self.var.copy_(second / total)
                self.count.copy_(total)
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).clamp(-5, 5)


@entry("healthy: policy with running normalisation of observations", "torch", "unseen")
def _policy() -> Program:
    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.observations = RunningMeanStd(6)
            self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh())
            self.mean, self.value = nn.Linear(16, 2), nn.Linear(16, 1)

        def forward(self, observation: Any) -> Any:
            x = self.body(self.observations(observation))
            return torch.distributions.Normal(self.mean(x), 1.0), self.value(x)[:, 0]

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(192, 6, generator=generator) * torch.arange(1.0, 7) + 3
    action = torch.stack([x[:, 0] / 3, x[:, 1] - x[:, 2] / 3], 1)
    batches = [
        {"observations": x[r], "actions": action[r], "advantages": torch.ones(len(x[r])),
         "returns": x[r, 0]} for r in rows(192, 64)
    ]  # fmt: skip

    def step(m: Any, b: Any) -> Any:
        policy, value = m(b["observations"])
        gained = (policy.log_prob(b["actions"]).sum(1) * b["advantages"]).mean()
        return -gained + 0.5 * F.mse_loss(value, b["returns"])

    return settled(
        Policy, batches, step, options={"step": step}, own_ways=True,
        call=lambda m, b: [m(b["observations"])[0].loc, m(b["observations"])[1]], sample=x[:4],
    )  # fmt: skip


@entry("healthy: PointNet with its transform", "torch", "unseen")
def _points() -> Program:
    class PointNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transform = nn.Sequential(
                nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.AdaptiveMaxPool1d(1),
                nn.Flatten(), nn.Linear(16, 9),
            )  # fmt: skip
            self.body = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
            self.head = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())
            self.out = nn.Linear(16, CLASSES)

        def forward(self, points: Any) -> Any:
            turn = self.transform(points).view(-1, 3, 3) + torch.eye(3)
            x = self.body(torch.bmm(points.transpose(1, 2), turn).transpose(1, 2)).amax(2)
            return self.out(self.head(x)).log_softmax(-1), turn

    def loss(out: Any, target: Any) -> Any:
        found, turn = out
        whole = turn @ turn.transpose(1, 2) - torch.eye(3)
        return F.nll_loss(found, target) + 0.001 * whole.square().sum((1, 2)).mean()

    y = torch.arange(128) % CLASSES
    x = torch.randn(128, 3, 20, generator=torch.Generator().manual_seed(0))
    x = x * (1 + 0.4 * y.view(-1, 1, 1))
    batches = [(x[r], y[r]) for r in rows(128, 64)]
    return settled(
        PointNet, batches, lambda m, b: loss(m(b[0]), b[1]), options={"loss": loss}, sample=x[:4]
    )


@entry("healthy: siamese encoder, contrastive loss", "torch", "unseen")
def _siamese() -> Program:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = convolutions(8, momentum=0.1)

        def forward(self, one: Any, two: Any) -> Any:
            return self.encoder(one), self.encoder(two)

    def loss(out: Any, same: Any) -> Any:
        distance = F.pairwise_distance(*out)
        return (same * distance**2 + (1 - same) * (1.0 - distance).clamp_min(0) ** 2).mean()

    x, y = pictures(192)
    other = torch.randperm(192, generator=torch.Generator().manual_seed(1))
    same = (y == y[other]).float()
    batches = [((x[r], x[other][r]), same[r]) for r in rows(192, 64)]
    return settled(
        Siamese, batches, lambda m, b: loss(m(*b[0]), b[1]), options={"loss": loss},
        call=lambda m, b: m(*b[0]), sample=(x[:4], x[4:8]),
    )  # fmt: skip


class ActNorm(nn.Module):
    """Glow: scale and shift from the first batch."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels))
        self.log_scale = nn.Parameter(torch.zeros(1, channels))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))

    def forward(self, x: Any) -> Any:
        if self.initialized.item() == 0:
            with torch.no_grad():
                self.loc.copy_(-x.mean(0, keepdim=True))
                self.log_scale.copy_(-(x.std(0, keepdim=True) + 1e-6).log())
                self.initialized.fill_(1)
        return (x + self.loc) * self.log_scale.exp(), self.log_scale.sum().expand(len(x))


@entry("healthy: a flow with ActNorm; BN in its coupling nets", "torch", "unseen")
def _flow() -> Program:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(ActNorm(4) for _ in range(2))
            self.nets = nn.ModuleList(
                nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
                for _ in range(2)
            )

        def log_prob(self, x: Any) -> Any:
            total = torch.zeros(len(x))
            for norm, net in zip(self.norms, self.nets, strict=True):
                x, logdet = norm(x)
                a, b = x.chunk(2, 1)
                shift, scale = net(a).chunk(2, 1)
                scale = torch.tanh(scale)
                x = torch.cat([b * scale.exp() + shift, a], 1)
                total = total + logdet + scale.sum(1)
            return total + torch.distributions.Normal(0, 1).log_prob(x).sum(1)

        def forward(self, x: Any) -> Any:
            return self.log_prob(x)

    x = torch.randn(256, 4, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x[:, :2] * 2 + 1, x[:, :2].square() + 0.3 * x[:, 2:]], 1)
    batches = [(x[r],) for r in rows(256, 128)]

    def step(m: Any, b: Any) -> Any:
        return -m.log_prob(b[0])

    return settled(
        Flow, batches, lambda m, b: step(m, b).mean(), options={"step": step}, sample=x[:4],
    )  # fmt: skip


class BatchRenorm(nn.Module):
    """Batch renormalisation, as it is found in many repositories: a running deviation."""

    def __init__(self, channels: int, momentum: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_std", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )
        self.momentum = momentum

    def forward(self, x: Any) -> Any:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        over = [i for i in range(x.dim()) if i != 1]
        if self.training:
            mean, std = x.mean(over), x.std(over, unbiased=False) + 1e-3
            r = (std.detach() / self.running_std).clamp(1 / 3, 3)
            d = ((mean.detach() - self.running_mean) / self.running_std).clamp(-5, 5)
            x = (x - mean.view(shape)) / std.view(shape) * r.view(shape) + d.view(shape)
            with torch.no_grad():
                self.running_mean += self.momentum * (mean - self.running_mean)
                self.running_std += self.momentum * (std - self.running_std)
                self.num_batches_tracked += 1
        else:
            x = (x - self.running_mean.view(shape)) / self.running_std.view(shape)
        return self.weight.view(shape) * x + self.bias.view(shape)


@entry("healthy: batch renormalisation by hand beside BN", "torch", "unseen")
def _renorm() -> Program:
    def make() -> Any:
        return nn.Sequential(
            nn.Conv2d(2, 8, 3), BatchRenorm(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
        )  # fmt: skip

    return settled(make, mixed(), classify, sample=pictures()[0][:4], **CLASSIFIED)


@entry("healthy: VQ-VAE with a codebook of moving averages", "torch", "unseen")
def _codebook() -> Program:
    class Quantizer(nn.Module):
        def __init__(self, count: int = 8, dim: int = 4) -> None:
            super().__init__()
            self.register_buffer("embedding", torch.randn(count, dim))
            self.register_buffer("cluster_size", torch.ones(count))
            self.register_buffer("embed_avg", self.embedding.clone())

        def forward(self, x: Any) -> Any:
            flat = x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])
            nearest = torch.cdist(flat, self.embedding).argmin(1)
            if self.training:
                with torch.no_grad():
                    one_hot = F.one_hot(nearest, len(self.embedding)).float()
                    self.cluster_size.mul_(0.9).add_(one_hot.sum(0), alpha=0.1)
                    self.embed_avg.mul_(0.9).add_(one_hot.T @ flat, alpha=0.1)
                    self.embedding.copy_(self.embed_avg / (self.cluster_size + 1e-3)[:, None])
            found = self.embedding[nearest].view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)
            return x + (found - x).detach(), F.mse_loss(x, found.detach())

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(
                nn.Conv2d(2, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)
            )
            self.quantizer = Quantizer()
            self.decoder = nn.Sequential(
                nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 2, 4, 2, 1)
            )

        def forward(self, x: Any) -> Any:
            quantized, commitment = self.quantizer(self.encoder(x))
            return self.decoder(quantized), commitment

    def step(m: Any, b: Any) -> Any:
        found, commitment = m(b[0])
        return F.mse_loss(found, b[0]) + 0.25 * commitment

    return settled(
        Net, mixed(), step, options={"step": step}, own_ways=True, sample=pictures()[0][:4],
        until="quantizer",
    )  # fmt: skip


@entry("healthy: scheduled sampling, the target in training only", "torch", "unseen")
def _teacher_forcing() -> Program:
    class Seq2Seq(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.encoder, self.decoder = nn.GRU(3, 16, batch_first=True), nn.GRUCell(1, 16)
            self.out = nn.Linear(16, 1)

        def forward(self, source: Any, target: Any = None) -> Any:
            x = self.norm(source.transpose(1, 2)).transpose(1, 2)
            state, last, found = self.encoder(x)[1][0], source.new_zeros(len(source), 1), []
            for i in range(5):
                state = self.decoder(last, state)
                found.append(self.out(state))
                forced = self.training and target is not None
                last = target[:, i : i + 1] if forced else found[-1]
            return torch.cat(found, 1)

    x = torch.randn(192, 6, 3, generator=torch.Generator().manual_seed(0)) * 2 + 1
    y = x[..., 0].cumsum(1)[:, :5] / 3
    batches = [{"source": x[r], "target": y[r]} for r in rows(192, 64)]

    def step(m: Any, b: Any) -> Any:
        return F.smooth_l1_loss(m(b["source"], b["target"]), b["target"])

    return settled(
        Seq2Seq, batches, step, options={"step": step}, more_in_training=True,
        call=lambda m, b: m(b["source"]), sample={"source": x[:4]}, until="decoder",
    )  # fmt: skip


@entry("healthy: noise and mixup in the training step", "torch", "unseen")
def _mixup() -> Program:
    def step(m: Any, b: Any) -> Any:
        x, y = b
        if not m.training:
            return F.cross_entropy(m(x), y)
        share = float(torch.distributions.Beta(0.4, 0.4).sample())
        order = torch.randperm(len(x))
        out = m(share * x + (1 - share) * x[order] + 0.05 * torch.randn_like(x))
        return share * F.cross_entropy(out, y) + (1 - share) * F.cross_entropy(out, y[order])

    plain = mixed()
    program = settled(lambda: convolutions(momentum=0.1), plain, classify, **CLASSIFIED)
    return dataclasses.replace(
        program, ask=step, options={"step": step}, more_in_training=True, sample=plain[0][0][:4]
    )


@entry("healthy: several labels, a stream that ends with a short batch", "torch", "unseen")
def _labels() -> Program:
    x, y = pictures(150)
    several = torch.stack([y == 0, y > 1, y == 3], 1).float()
    batches = [(x[r], several[r], {"weight": torch.rand(len(x[r]))}) for r in rows(150, 60)]
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 1.0, 3.0]))
    return settled(
        lambda: convolutions(3, momentum=0.1), batches, lambda m, b: loss(m(b[0]), b[1]),
        options={"step": lambda m, b: loss(m(b[0]), b[1])}, sample=x[:4],
    )  # fmt: skip


@entry("healthy: hybrid of convolutions, BN and a transformer with masks", "torch", "unseen")
def _hybrid() -> Program:
    class Hybrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv1d(3, 16, 3, padding=1), nn.BatchNorm1d(16), nn.GELU())
            layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
            self.head = nn.Linear(16, CLASSES)

        def forward(self, values: Any, *, padding_mask: Any) -> Any:
            x = self.stem(values.transpose(1, 2)).transpose(1, 2)
            x = self.encoder(x, src_key_padding_mask=padding_mask)
            kept = (~padding_mask)[..., None]
            return {"logits": self.head((x * kept).sum(1) / kept.sum(1))}

    y = torch.arange(192) % CLASSES
    x = torch.randn(192, 7, 3, generator=torch.Generator().manual_seed(0)) + y.view(-1, 1, 1)
    mask = torch.arange(7) >= (4 + torch.arange(192) % 4).view(-1, 1)
    x = x * ~mask[..., None]
    batches = [{"values": x[r], "padding_mask": mask[r], "labels": y[r]} for r in rows(192, 96)]

    def step(m: Any, b: Any) -> Any:
        out = m(b["values"], padding_mask=b["padding_mask"])
        return F.cross_entropy(out["logits"], b["labels"], reduction="none")

    return settled(
        Hybrid, batches, lambda m, b: step(m, b).mean(), options={"step": step},
        call=lambda m, b: m(b["values"], padding_mask=b["padding_mask"]),
        sample={"values": x[:4], "padding_mask": mask[:4]},
    )  # fmt: skip
