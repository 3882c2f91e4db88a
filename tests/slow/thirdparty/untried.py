"""Programs that nobody had tried: steps, batches, outputs and BN in forms that none before had.

They were asked of one commit before anything was mended for them; what was answered is in
``docs/results/unseen-programs-first.json``. Names that end alike are one program in two ways:
with ``step=``, and with ``loss=`` alone.
"""

from __future__ import annotations

import random
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from .program import Program, entry
from .situations import CLASSES, LAGGING, convolutions, pictures, rows, situation
from .unseen import CLASSIFIED, classify, mixed, pairs, settled


def drawn(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numbers() -> Any:
    """Class numbers of 48 samples."""
    return torch.arange(48) % CLASSES


def normed(layer: Any, channels: int, **norm: Any) -> nn.Sequential:
    """A layer of two dimensions, BN behind it, ReLU."""
    return nn.Sequential(layer, nn.BatchNorm2d(channels, **{**LAGGING, **norm}), nn.ReLU())


def pooled(*layers: Any) -> nn.Sequential:
    """These, then the mean of each of eight channels, then a classifier."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))


def classifier(make: Callable[[], Any], **more: Any) -> Program:
    """Pictures and their classes, asked with ``loss=``."""
    return situation(make, pairs(), classify, **{"sample": pictures()[0][:4], **CLASSIFIED, **more})


# --- passes in training that are not those at inference -----------------------------------------


@entry("re-entrant checkpoints, micro-batches in the step", "torch", "untried")
def _micro_batches() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(2, 8, 3, padding=1)
            self.blocks = nn.ModuleList(
                nn.Sequential(
                    nn.BatchNorm2d(8, **LAGGING), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
                )
                for _ in range(2)
            )
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            x = self.stem(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=True)
            return self.head(x.mean((2, 3)))

    def step(m: Any, b: Any) -> Any:
        parts = zip(b[0].chunk(2), b[1].chunk(2), strict=True)
        return sum(F.cross_entropy(m(x), y) for x, y in parts) / 2

    return situation(Net, pairs(), step, options={"step": step}, sample=pictures()[0][:4])


@entry("ghost BN: small parts of a batch in training", "torch", "untried")
def _ghost() -> Program:
    class Ghost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(8, **LAGGING)

        def forward(self, x: Any) -> Any:
            if self.training:
                return torch.cat([self.bn(part) for part in x.split(8)])
            return self.bn(x)

    def make() -> Any:
        return pooled(
            nn.Conv2d(2, 8, 3), Ghost(), nn.ReLU(), nn.Conv2d(8, 8, 3), Ghost(), nn.ReLU()
        )

    return classifier(make)


@entry("one BN in two branches of different inputs", "torch", "untried")
def _tied() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            norm = nn.BatchNorm2d(8, **LAGGING)
            self.left = nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.ReLU())
            self.right = nn.Sequential(nn.Conv2d(1, 8, 3), norm, nn.ReLU())
            self.head = nn.Sequential(
                nn.Linear(16, 16), nn.BatchNorm1d(16, **LAGGING), nn.ReLU(), nn.Linear(16, CLASSES)
            )

        def forward(self, x: Any) -> Any:
            left, right = self.left(x[:, :1]), self.right(x[:, 1:])
            return self.head(torch.cat([left.mean((2, 3)), right.mean((2, 3))], 1))

    return classifier(Net, lags=False)


@entry("recurrent BN, one for each time step", "torch", "untried")
def _recurrent() -> Program:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.given, self.hidden = nn.Linear(3, 24, bias=False), nn.Linear(6, 24)
            self.norms = nn.ModuleList(nn.BatchNorm1d(24, **LAGGING) for _ in range(4))

        def forward(self, x: Any, hidden: Any, memory: Any, time: int) -> Any:
            norm = self.norms[min(time, len(self.norms) - 1)]
            into, kept, new, out = (norm(self.given(x)) + self.hidden(hidden)).chunk(4, 1)
            memory = torch.sigmoid(kept) * memory + torch.sigmoid(into) * torch.tanh(new)
            return torch.sigmoid(out) * torch.tanh(memory), memory

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = Cell(), nn.Linear(6, CLASSES)

        def forward(self, x: Any, lengths: Any) -> Any:
            hidden = memory = x.new_zeros(len(x), 6)
            for time in range(int(lengths.max())):
                found = self.cell(x[:, time], hidden, memory, time)
                going = (lengths > time).unsqueeze(1)
                hidden = torch.where(going, found[0], hidden)
                memory = torch.where(going, found[1], memory)
            return self.head(hidden)

    generator = torch.Generator().manual_seed(0)
    batches = []
    for longest in (3, 6, 5):
        y = torch.arange(16) % CLASSES
        lengths = torch.randint(2, longest + 1, (16,), generator=generator)
        lengths[0] = longest
        x = torch.randn(16, longest, 3, generator=generator) * 0.7 + 2 + y.view(-1, 1, 1)
        batches.append((x, lengths, y))

    def step(m: Any, b: Any) -> Any:
        return F.cross_entropy(m(b[0], b[1]), b[2])

    return situation(
        Net, batches, step, options={"step": step}, call=lambda m, b: m(b[0], b[1]),
        sample=batches[1][:2], lags=False, no_help=("did not reach its frontier",),
    )  # fmt: skip


@entry("FixMatch: pseudo-labels of a weak view", "torch", "untried")
def _fixmatch() -> Program:
    x, y = pictures()
    strong = x + drawn(*x.shape, seed=1)
    batches = [((x[r][:8], y[r][:8]), (x[r][8:], strong[r][8:])) for r in rows()]

    def step(m: Any, b: Any) -> Any:
        (labelled, labels), (weak, strong) = b
        with torch.no_grad():
            sure, pseudo = m(weak).softmax(1).max(1)
        loss = F.cross_entropy(m(labelled), labels)
        unlabelled = F.cross_entropy(m(strong), pseudo, reduction="none")
        return {"labelled": loss, "unlabelled": ((sure > 0.6) * unlabelled).mean()}

    return situation(
        convolutions, batches, lambda m, b: sum(step(m, b).values()), options={"step": step},
        call=lambda m, b: m(b[0][0]), sample=x[:4], lags=False,
    )  # fmt: skip


@entry("MAML: an inner step on fast weights", "torch", "untried")
def _inner_step() -> Program:
    x, y = pictures()
    batches = [((x[r][:8], y[r][:8]), (x[r][8:], y[r][8:])) for r in rows()]

    def step(m: Any, b: Any) -> Any:
        (support, labels), (query, wanted) = b
        weights = dict(m.named_parameters())
        with torch.enable_grad():
            inner = F.cross_entropy(torch.func.functional_call(m, weights, (support,)), labels)
            if names := [name for name, weight in weights.items() if weight.requires_grad]:
                found = torch.autograd.grad(inner, [weights[n] for n in names], allow_unused=True)
                fast = {n: weights[n] - 0.1 * g for n, g in zip(names, found, strict=True)
                        if g is not None}  # fmt: skip
                weights = {**weights, **fast}
        return F.cross_entropy(torch.func.functional_call(m, weights, (query,)), wanted)

    return situation(
        convolutions, batches, step, options={"step": step}, call=lambda m, b: m(b[0][0]),
        sample=x[:4], lags=False, own_ways=True,
    )  # fmt: skip


@entry("an ensemble, under torch.vmap at inference", "torch", "untried")
def _ensemble() -> Program:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList(convolutions() for _ in range(3))

        def forward(self, x: Any) -> Any:
            if self.training:
                return torch.stack([member(x) for member in self.members])
            held, first = torch.func.stack_module_state(list(self.members)), self.members[0]

            def one(parameters: Any, buffers: Any) -> Any:
                return torch.func.functional_call(first, (parameters, buffers), (x,))

            return torch.vmap(one)(*held)

    def step(m: Any, b: Any) -> Any:
        return torch.stack([F.cross_entropy(out, b[1]) for out in m(b[0])]).mean()

    return situation(Ensemble, pairs(), step, options={"step": step}, sample=pictures()[0][:4])


@entry("early exit: all exits in training, the first sure one at inference", "torch", "untried")
def _exits() -> Program:
    class Exits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(normed(nn.Conv2d(c, 8, 3, padding=1), 8) for c in (2, 8, 8))
            self.heads = nn.ModuleList(nn.Linear(8, CLASSES) for _ in range(3))

        def forward(self, x: Any) -> Any:
            out = []
            for block, head in zip(self.blocks, self.heads, strict=True):
                x = block(x)
                out.append(head(x.mean((2, 3))))
                if not self.training and out[-1].softmax(1).amax(1).min() > 0.9999:
                    break
            return out if self.training else out[-1]

    def step(m: Any, b: Any) -> Any:
        out = m(b[0])
        exits = out if isinstance(out, list) else [out]
        return sum(F.cross_entropy(each, b[1]) for each in exits) / len(exits)

    return situation(
        Exits, pairs(), step, options={"step": step}, sample=pictures()[0][:4],
        more_in_training=True, lags=False,
    )  # fmt: skip


@entry("blocks skipped by Python's random numbers", "torch", "untried")
def _skipped() -> Program:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = normed(nn.Conv2d(8, 8, 3, padding=1), 8, momentum=0.1)

        def forward(self, x: Any) -> Any:
            if not self.training:
                return x + 0.7 * self.body(x)
            return x if random.random() < 0.3 else x + self.body(x)

    def make() -> Any:
        random.seed(0)
        return pooled(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Block(), Block())

    return settled(
        make, mixed(), classify, sample=pictures()[0][:4], healthy=False, own_ways=True,
        more_in_training=True, **CLASSIFIED,
    )  # fmt: skip


@entry("slimmable network: a BN for each width", "torch", "untried")
def _slimmable() -> Program:
    class Slimmable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.width = 8
            self.conv, self.last = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3)
            self.norms, self.lasts = (
                nn.ModuleDict({str(w): nn.BatchNorm2d(w, **LAGGING) for w in (4, 8)})
                for _ in range(2)
            )
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            w = self.width
            x = F.conv2d(x, self.conv.weight[:w], self.conv.bias[:w])
            x = F.conv2d(
                F.relu(self.norms[str(w)](x)), self.last.weight[:w, :w], self.last.bias[:w]
            )
            x = F.relu(self.lasts[str(w)](x)).mean((2, 3))
            return F.linear(x, self.head.weight[:, :w], self.head.bias)

    def step(m: Any, b: Any) -> Any:
        total = 0.0
        for m.width in (4, 8):
            total = total + F.cross_entropy(m(b[0]), b[1])
        return total / 2

    return situation(Slimmable, pairs(), step, options={"step": step}, sample=pictures()[0][:4])


@entry("experts that see their own rows of a batch", "torch", "untried")
def _experts() -> Program:
    def block(given: int) -> Any:
        return nn.Sequential(nn.Linear(given, 8), nn.BatchNorm1d(8, **LAGGING), nn.ReLU())

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = block(6), nn.Linear(8, CLASSES)
            self.experts = nn.ModuleList(block(8) for _ in range(3))

        def forward(self, x: Any) -> Any:
            route = (x[:, 0] > 1.6).long() + (x[:, 0] > 2.4).long()
            x = self.stem(x)
            out = torch.zeros_like(x)
            for index, expert in enumerate(self.experts):
                mine = (route == index).nonzero().flatten()
                if len(mine) > 1:
                    out = out.index_copy(0, mine, expert(x[mine]))
            return self.head(out)

    y = numbers()
    x = drawn(48, 6) * 0.8 + 2
    x[:, 1] += y
    batches = [(x[r], y[r]) for r in rows()]
    return situation(Experts, batches, classify, sample=x[:8], **CLASSIFIED)


@entry("a backbone under no_grad that stays in training mode", "torch", "untried")
def _no_grad() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = convolutions(8).requires_grad_(False)
            self.head = nn.Sequential(nn.BatchNorm1d(8, **LAGGING), nn.Linear(8, CLASSES))

        def forward(self, x: Any) -> Any:
            with torch.no_grad():
                x = self.backbone(x)
            return self.head(x)

    return classifier(Net)


@entry("greedy local losses, detached between stages", "torch", "untried")
def _greedy() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(normed(nn.Conv2d(c, 8, 3, padding=1), 8) for c in (2, 8, 8))
            self.heads = nn.ModuleList(nn.Linear(8, CLASSES) for _ in range(3))

        def forward(self, x: Any) -> Any:
            out: dict[str, list[Any]] = {"logits": [], "features": []}
            for stage, head in zip(self.stages, self.heads, strict=True):
                x = stage(x.detach())
                out["logits"].append(head(x.mean((2, 3))))
                out["features"].append(x)
            return out

    def step(m: Any, b: Any) -> Any:
        logits = m(b[0])["logits"]
        return {f"stage {i}": F.cross_entropy(each, b[1]) for i, each in enumerate(logits)}

    return situation(
        Net, pairs(), lambda m, b: sum(step(m, b).values()), options={"step": step},
        sample=pictures()[0][:4],
    )  # fmt: skip


@entry("one backbone under two names, called twice in training", "torch", "untried")
def _two_names() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = convolutions(8)
            self.others, self.head = nn.ModuleDict({"same": self.student}), nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            out = self.student(x)
            return self.head((out + self.others["same"](x.flip(3))) / 2 if self.training else out)

    return classifier(Net, lags=False, no_help=("'student/8' comes first",))


@entry("checkpoint_sequential in three parts", "torch", "untried")
def _checkpoints() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = convolutions(8), nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            return self.head(checkpoint_sequential(self.body, 3, x, use_reentrant=False))

    return classifier(Net)


# --- layers and precisions ----------------------------------------------------------------------


class Positive(nn.Module):
    def forward(self, x: Any) -> Any:
        return F.softplus(x)

    def right_inverse(self, y: Any) -> Any:
        return torch.log(torch.expm1(y))


@entry("gamma under a parametrization (softplus)", "torch", "untried")
def _parametrized() -> Program:
    def make() -> Any:
        model = convolutions()
        for index in (1, 4):
            parametrize.register_parametrization(model[index], "weight", Positive())
        return model

    return classifier(make)


@entry("a model in bfloat16", "torch", "untried")
def _bfloat16() -> Program:
    model = situation(convolutions, pairs(), classify).model.to(torch.bfloat16)
    batches = [(x.bfloat16(), y) for x, y in pairs()]

    def loss(out: Any, y: Any) -> Any:
        return F.cross_entropy(out.float(), y)

    return Program(
        model=model, batches=batches, ask=lambda m, b: loss(m(b[0]), b[1]),
        options={"loss": loss}, sample=batches[0][0][:4], own_ways=True,
    )  # fmt: skip


@entry("folds in two dimensions: depthwise, grouped, transposed, shared, two readers", "torch",
       "untried")  # fmt: skip
def _folds() -> Program:
    def norm(channels: int) -> Any:
        return nn.BatchNorm2d(channels, **LAGGING)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.padded = norm(2), nn.Conv2d(2, 8, 3, padding=1)
            self.one, self.other = norm(8), norm(8)  # read the same convolution
            self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
            self.depthwise_norm = norm(8)
            self.up = nn.ConvTranspose2d(8, 12, 3, 2, 1, output_padding=1, groups=4)
            self.up_norm = norm(12)
            self.shared, self.norms = nn.Conv2d(12, 12, 1), nn.ModuleList([norm(12), norm(12)])
            self.kept, self.kept_norm = nn.Conv2d(12, 12, 3), norm(12)  # read twice
            self.plain = nn.BatchNorm1d(12, affine=False, **LAGGING)
            self.head = nn.Linear(12, CLASSES)

        def forward(self, x: Any) -> Any:
            x = self.padded(self.first(x))
            x = F.relu(self.one(x)) + torch.sigmoid(self.other(x))
            x = F.relu6(self.depthwise_norm(self.depthwise(x)))
            x = F.relu(self.up_norm(self.up(x)))
            x = F.relu(self.norms[0](self.shared(x))) + F.relu(self.norms[1](self.shared(-x)))
            x = self.kept(x)
            x = F.relu(self.kept_norm(x)) + 0.1 * x
            return self.head(self.plain(x.mean((2, 3))))

    return classifier(Net)


@entry("folds in one and three dimensions: Linear on a row, circular and same padding", "torch",
       "untried")  # fmt: skip
def _other_folds() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.solid, self.solid_norm = nn.Conv3d(2, 6, 3, padding="same"), nn.BatchNorm3d(6)
            self.up, self.up_norm = nn.ConvTranspose3d(6, 4, 2, stride=2), nn.BatchNorm3d(4)
            self.linear, self.linear_norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
            self.before = nn.BatchNorm1d(8)
            self.circular = nn.Conv1d(8, 8, 3, padding=1, padding_mode="circular")
            self.circular_norm = nn.BatchNorm1d(8, eps=1e-3)
            self.dense, self.dense_norm = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)
            self.head = nn.Linear(8, CLASSES)
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.momentum = LAGGING["momentum"]

        def forward(self, x: Any) -> Any:
            x = F.relu(self.solid_norm(self.solid(x)))
            x = F.relu(self.up_norm(self.up(x))).flatten(2).transpose(1, 2)
            x = F.relu(self.linear_norm(self.linear(x).transpose(1, 2)))
            x = F.relu(self.circular_norm(self.circular(self.before(x))))
            return self.head(F.relu(self.dense_norm(self.dense(x.mean(2)))))

    x, y = pictures(side=4)
    x = x.unsqueeze(2).repeat(1, 1, 4, 1, 1) + 0.3 * drawn(48, 2, 4, 4, 4, seed=3)
    batches = [(x[r], y[r]) for r in rows()]
    return situation(Net, batches, classify, sample=x[:4], **CLASSIFIED)


@entry("a decoder with an embedding in the place of gamma and beta", "torch", "untried")
def _conditional() -> Program:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(8, affine=False, **LAGGING)
            self.embedding = nn.Embedding(CLASSES, 16)
            with torch.no_grad():
                self.embedding.weight[:, :8], self.embedding.weight[:, 8:] = 1, 0

        def forward(self, x: Any, y: Any) -> Any:
            gamma, beta = self.embedding(y)[..., None, None].chunk(2, 1)
            return gamma * self.bn(x) + beta

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.n1 = nn.ConvTranspose2d(4, 8, 4), Conditional()
            self.second, self.n2 = nn.ConvTranspose2d(8, 8, 2, stride=2), Conditional()
            self.out = nn.Conv2d(8, 2, 1)

        def forward(self, z: Any, y: Any) -> Any:
            x = F.relu(self.n1(self.first(z[..., None, None]) * 3 + 1, y))
            return self.out(F.relu(self.n2(self.second(x), y)))

    (x, y), z = pictures(), drawn(48, 4, seed=5)
    batches = [(z[r], y[r], x[r]) for r in rows()]

    def step(m: Any, b: Any) -> Any:
        return F.l1_loss(m(b[0], b[1]), b[2])

    return situation(
        Decoder, batches, step, options={"step": step}, call=lambda m, b: m(b[0], b[1]),
        sample=(z[:4], y[:4]), lags=False,
    )  # fmt: skip


@entry("complex layers, BN on real and imaginary parts", "torch", "untried")
def _complex_layers() -> Program:
    class ComplexNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.real, self.imaginary = (nn.BatchNorm1d(8, **LAGGING) for _ in range(2))

        def forward(self, z: Any) -> Any:
            return torch.complex(self.real(z.real), self.imaginary(z.imag))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(8, 8, dtype=torch.complex64), ComplexNorm()
            self.second, self.last = nn.Linear(8, 8, dtype=torch.complex64), ComplexNorm()
            self.head = nn.Linear(8, CLASSES)

        def forward(self, z: Any) -> Any:
            z = self.norm(self.first(z))
            z = torch.complex(F.relu(z.real), F.relu(z.imag))
            return self.head(self.last(self.second(z)).abs())

    y = numbers()
    z = torch.complex(drawn(48, 8) + 2 + y[:, None], drawn(48, 8, seed=1) - 1)
    batches = [(z[r], y[r]) for r in rows()]
    return situation(Net, batches, classify, sample=z[:4], **CLASSIFIED)


@entry("video: frames as samples, then BN over time, in float64", "torch", "untried")
def _video() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frames = normed(nn.Conv2d(2, 6, 3), 6)
            self.time, self.norm = nn.Conv1d(6, 6, 3, padding=1), nn.BatchNorm1d(6, **LAGGING)
            self.head = nn.Linear(6, CLASSES)

        def forward(self, x: Any) -> Any:
            count, frames = x.shape[:2]
            x = self.frames(x.flatten(0, 1)).mean((2, 3))
            x = x.view(count, frames, -1).transpose(1, 2)
            return self.head(F.relu(self.norm(self.time(x))).mean(2))

    x, y = pictures()
    x = torch.stack([x, x + 0.3, x * 0.9], 1).double()
    batches = [(x[r], y[r]) for r in rows()]
    return situation(lambda: Net().double(), batches, classify, sample=x[:4], **CLASSIFIED)


@entry("pruned convolutions and weight_norm before BN", "torch", "untried")
def _pruned() -> Program:
    warnings.simplefilter("ignore")  # weight_norm by hooks is old, and used

    def make() -> Any:
        model = pooled(
            *normed(nn.Conv2d(2, 8, 3), 8), *normed(nn.utils.weight_norm(nn.Conv2d(8, 8, 3)), 8)
        )
        for layer in (model[0], model[-1]):
            prune.l1_unstructured(layer, "weight", 0.3)
        return model

    program = classifier(make)
    with torch.no_grad():  # what a hook computes with a gradient cannot be copied
        program.model(program.batches[0][0])
    return program


@entry("parts of a Sequential, called by slices; channels last", "torch", "untried")
def _slices() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8, **LAGGING), nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, **LAGGING), nn.ReLU(inplace=True),
            )  # fmt: skip
            self.head = nn.Linear(16, CLASSES)

        def forward(self, x: Any) -> Any:
            low = self.features[:3](x)
            high = self.features[3:](low)
            return self.head(torch.cat([low.mean((2, 3)), high.mean((2, 3))], 1))

    batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in pairs()]
    return situation(
        lambda: Net().to(memory_format=torch.channels_last), batches, classify,
        sample=batches[0][0][:4], **CLASSIFIED,
    )  # fmt: skip


@entry("F.batch_norm on the statistics of a layer", "torch", "untried")
def _function() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c1, self.n1 = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8, **LAGGING)
            self.c2, self.n2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, **LAGGING)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            x, n = self.n1(self.c1(x)).relu() + 0.5, self.n2
            y = F.batch_norm(
                self.c2(x), n.running_mean, n.running_var, n.weight, n.bias, self.training,
                n.momentum, n.eps,
            )  # fmt: skip
            return self.head((x + y).relu_().mean((2, 3)))

    return classifier(Net)


@entry("momentum=None beside a slow average", "torch", "untried")
def _both_averages() -> Program:
    return classifier(
        lambda: pooled(
            *normed(nn.Conv2d(2, 8, 3), 8, momentum=None), *normed(nn.Conv2d(8, 8, 3), 8)
        )
    )


@entry("mixer: one BN twice in a block, tokens transposed", "torch", "untried")
def _mixer() -> Program:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mix = nn.BatchNorm1d(8, **LAGGING), nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            for _ in range(2):
                x = x + self.mix(self.norm(x.transpose(1, 2)).transpose(1, 2))
            return x

    class Mean(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.mean(1)

    y = numbers()
    x = drawn(48, 5, 3) + 2 + y[:, None, None]
    batches = [(x[r], y[r]) for r in rows()]

    def make() -> Any:
        return nn.Sequential(nn.Linear(3, 8), Block(), Block(), Mean(), nn.Linear(8, CLASSES))

    return situation(make, batches, classify, sample=x[:4], lags=False, **CLASSIFIED)


@entry("hooks that change what a BN takes and returns", "torch", "untried")
def _hooks() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = convolutions(8), nn.Linear(8, CLASSES)
            self.kept: dict[str, Any] = {}
            self.net[4].register_forward_hook(lambda module, given, out: out * 0.9)
            self.net[1].register_forward_pre_hook(lambda module, given: (given[0] + 0.1,))

        def forward(self, x: Any) -> Any:
            self.kept["features"] = self.net(x)
            return self.head(self.kept["features"])

    program = classifier(Net)
    program.model.kept.clear()
    return program


@entry("U-Net for odd sizes, a mask of valid pixels", "torch", "untried")
def _odd_sizes() -> Program:
    def block(given: int, out: int) -> Any:
        return normed(nn.Conv2d(given, out, 3, padding=1, bias=False), out)

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.bottom = nn.ModuleList([block(2, 6), block(6, 8)]), block(8, 8)
            self.up = nn.ModuleList(nn.ConvTranspose2d(8, out, 2, 2) for out in (8, 6))
            self.decoders = nn.ModuleList([block(16, 8), block(12, 6)])
            self.out = nn.Conv2d(6, 1, 1)

        def forward(self, x: Any) -> Any:
            skips = []
            for down in self.down:
                x = down(x)
                skips.append(x)
                x = F.max_pool2d(x, 2)
            x = self.bottom(x)
            for up, decoder, skip in zip(self.up, self.decoders, reversed(skips), strict=True):
                x = up(x)
                missing = [skip.shape[d] - x.shape[d] for d in (3, 2)]
                x = decoder(torch.cat([skip, F.pad(x, (0, missing[0], 0, missing[1]))], 1))
            return self.out(x)

    x, _ = pictures(side=9)
    mask = torch.rand(48, 1, 9, 9, generator=torch.Generator().manual_seed(1)) > 0.3
    batches = [(x[r], x[r][:, :1] * 2 - 1, mask[r]) for r in rows()]

    def step(m: Any, b: Any) -> Any:
        return F.huber_loss(m(b[0])[b[2]], b[1][b[2]])

    return situation(UNet, batches, step, options={"step": step}, sample=x[:4], lags=False)


@entry("BN as the first and the last module", "torch", "untried")
def _first_and_last() -> Program:
    def make() -> Any:
        return nn.Sequential(OrderedDict(
            first=nn.BatchNorm2d(2, **LAGGING),
            conv=nn.Conv2d(2, 8, 3, padding=1, padding_mode="reflect"), act=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), dense=nn.Linear(8, CLASSES),
            last=nn.BatchNorm1d(CLASSES, **LAGGING),
        ))  # fmt: skip

    return classifier(make, lags=False)


@entry("BN before padding, pooling and dropout", "torch", "untried")
def _before() -> Program:
    def make() -> Any:
        return nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.ReLU6(inplace=True), nn.BatchNorm2d(8, **LAGGING),
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(8, **LAGGING),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8, **LAGGING), nn.Dropout(0.0),
            nn.Linear(8, CLASSES),
        )  # fmt: skip

    return classifier(make)


@entry("BN in float32 among layers in bfloat16", "torch", "untried")
def _two_precisions() -> Program:
    class Net(nn.Module):
        def __init__(self, first: Any, norm: Any, head: Any) -> None:
            super().__init__()
            self.first, self.norm, self.head = first.bfloat16(), norm, head.bfloat16()

        def forward(self, x: Any) -> Any:
            x = F.relu(self.norm(self.first(x).float()))
            return self.head(x.bfloat16()).float()

    def make() -> Any:
        return nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16, **LAGGING), nn.ReLU(), nn.Linear(16, CLASSES)
        )

    y = numbers()
    x = drawn(48, 6) + 2 + y[:, None]
    first, norm, _, head = situation(make, [(x[r], y[r]) for r in rows()], classify).model
    batches = [(x[r].bfloat16(), y[r]) for r in rows()]
    return Program(
        model=Net(first, norm, head), batches=batches, ask=classify, sample=batches[0][0][:4],
        own_ways=True, **CLASSIFIED,
    )  # fmt: skip


@entry("fake quantisation by hand, with a running scale", "torch", "untried")
def _fake() -> Program:
    class Fake(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_max", torch.zeros(()))

        def forward(self, x: Any) -> Any:
            if self.training:
                with torch.no_grad():
                    self.running_max.mul_(0.9).add_(0.1 * x.abs().max())
            scale = self.running_max.clamp_min(1e-3) / 127
            return x + ((x / scale).round().clamp(-127, 127) * scale - x).detach()

    def make() -> Any:
        return pooled(
            nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8, **LAGGING), Fake(), nn.ReLU(),
            *normed(nn.Conv2d(8, 8, 3), 8),
        )  # fmt: skip

    return classifier(make, lags=False, own_ways=True)
