"""Torch programs that nobody had tried, of other kinds; see ``untried.py``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .program import Program, entry
from .situations import CLASSES, LAGGING, convolutions, pictures, rows, situation
from .unseen import classify, pairs


@entry("a flow with BN as one of its bijectors, log-determinants added up", "torch", "fresh")
def _bijectors() -> Program:
    class Bijector(nn.Module):
        """MAF's batch norm: normalises by the batch in training, by running values otherwise."""

        def __init__(self) -> None:
            super().__init__()
            self.log_gamma, self.beta = (nn.Parameter(torch.zeros(6)) for _ in range(2))
            self.register_buffer("running_mean", torch.zeros(6))
            self.register_buffer("running_var", torch.ones(6))

        def forward(self, x: Any) -> Any:
            mean, var = self.running_mean, self.running_var
            if self.training:
                mean, var = x.mean(0), x.var(0, unbiased=False)
                with torch.no_grad():
                    self.running_mean.lerp_(mean, 0.01)
                    self.running_var.lerp_(var, 0.01)
            y = (x - mean) / torch.sqrt(var + 1e-5) * self.log_gamma.exp() + self.beta
            return y, (self.log_gamma - 0.5 * torch.log(var + 1e-5)).sum()

    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(
                nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6)) for _ in range(2)
            )
            self.norms = nn.ModuleList(Bijector() for _ in range(2))

        def forward(self, x: Any) -> Any:
            total = torch.zeros(len(x))
            for net, norm in zip(self.nets, self.norms, strict=True):
                one, two = x.chunk(2, 1)
                shift, scale = net(one).chunk(2, 1)
                x = torch.cat((two * torch.tanh(scale).exp() + shift, one), 1)
                x, gained = norm(x)
                total = total + torch.tanh(scale).sum(1) + gained
            return x, total

    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(0)) * 3 + 2
    batches = [(x[r],) for r in rows()]

    def step(m: Any, b: Any) -> Any:
        z, gained = m(b[0])
        return (0.5 * z.square().sum(1) - gained).mean()

    return situation(Flow, batches, step, options={"step": step}, sample=x[:4])


@entry("spikes: one BN over all time steps of a leaky neuron", "torch", "fresh")
def _spikes() -> Program:
    class Spikes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8, **LAGGING)
            self.out = nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            current = self.norm(self.conv(x.repeat(3, 1, 1, 1))).view(3, len(x), 8, 6, 6)
            held, fired = torch.zeros_like(current[0]), 0.0
            for each in current:
                held = 0.5 * held + each
                soft = torch.sigmoid(4 * (held - 1))
                spike = (held > 1).float() + soft - soft.detach()
                held = held * (1 - spike.detach())
                fired = fired + spike
            return self.out(fired.mean((2, 3)))

    return situation(Spikes, pairs(), classify, options={"loss": F.cross_entropy},
                     sample=pictures()[0][:4])  # fmt: skip


@entry("switchable normalisation: BN and instance statistics mixed by weights", "torch", "fresh")
def _switched() -> Program:
    class Switched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.batch = nn.BatchNorm2d(8, affine=False, **LAGGING)
            self.single = nn.InstanceNorm2d(8)
            self.mix, self.gain = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(8))

        def forward(self, x: Any) -> Any:
            share = self.mix.softmax(0)
            mixed = share[0] * self.batch(x) + share[1] * self.single(x)
            return mixed * self.gain.view(1, -1, 1, 1)

    def make() -> Any:
        return nn.Sequential(
            nn.Conv2d(2, 8, 3), Switched(), nn.ReLU(), nn.Conv2d(8, 8, 3), Switched(), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
        )  # fmt: skip

    return situation(make, pairs(), classify, options={"loss": F.cross_entropy}, lags=False,
                     sample=pictures()[0][:4])  # fmt: skip


@entry("test-time adaptation (TENT): BN without statistics after the training", "torch", "fresh")
def _adapted() -> Program:
    program = situation(convolutions, pairs(), classify, options={"loss": F.cross_entropy},
                        sample=pictures()[0][:4], lags=False)  # fmt: skip
    norm = program.model[4]
    norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    for parameter in program.model.parameters():
        parameter.requires_grad_(False)
    for each in (program.model[1], norm):
        each.requires_grad_(True)
    return program


@entry("Q-learning: a target network, tuples of five", "torch", "fresh")
def _q_learning() -> Program:
    class Agent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.online = convolutions(2)
            self.target = copy.deepcopy(self.online).requires_grad_(False)

        def forward(self, x: Any) -> Any:
            return self.online(x)

    x, y = pictures()
    shifted = x.roll(1, 0)
    batches = [(x[r], y[r] % 2, y[r].float(), shifted[r], (y[r] == 0)) for r in rows()]

    def step(m: Any, b: Any) -> Any:
        state, action, reward, following, ended = b
        q = m(state).gather(1, action[:, None])[:, 0]
        with torch.no_grad():
            best = m.target(following).amax(1)
        return F.smooth_l1_loss(q, reward + 0.9 * best * (~ended).float())

    return situation(
        Agent, batches, step, options={"step": step}, sample=x[:4], lags=False, until="online/4"
    )


@entry("few-shot episodes: support and query in one pass (ProtoNet)", "torch", "fresh")
def _episodes() -> Program:
    x, y = pictures()
    batches = [{"support": (x[r][:8], y[r][:8]), "query": (x[r][8:], y[r][8:])} for r in rows()]

    def step(m: Any, b: Any) -> Any:
        (known, labels), (asked, wanted) = b["support"], b["query"]
        found = m(torch.cat((known, asked)))
        classes = torch.stack([found[: len(known)][labels == c].mean(0) for c in range(CLASSES)])
        return F.cross_entropy(-torch.cdist(found[len(known) :], classes), wanted)

    return situation(
        lambda: convolutions(6), batches, step, options={"step": step},
        call=lambda m, b: m(torch.cat((b["support"][0], b["query"][0]))), sample=x[:4],
        lags=False,
    )  # fmt: skip


@entry("a fixed point: one block with BN, called until it settles", "torch", "fresh")
def _settled() -> Program:
    class Settled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(2, 8, 3)
            self.block = nn.Sequential(
                nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, **LAGGING), nn.Tanh()
            )
            self.out = nn.Linear(8, CLASSES)

        def forward(self, x: Any) -> Any:
            given = self.first(x)
            z = torch.zeros_like(given)
            for _ in range(6):
                new = 0.3 * self.block(z + given) + 0.5 * z
                done = float((new - z).detach().abs().max()) < 0.05
                z = new
                if done:
                    break
            return self.out(z.mean((2, 3)))

    return situation(Settled, pairs(), classify, options={"loss": F.cross_entropy}, lags=False,
                     sample=pictures()[0][:4])  # fmt: skip


@entry("whitening by a running covariance, BN behind it", "torch", "fresh")
def _whitened() -> Program:
    class Whitening(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(width))
            self.register_buffer("running_cov", torch.eye(width))

        def forward(self, x: Any) -> Any:
            flat = x.movedim(1, 0).flatten(1)
            mean, cov = self.running_mean, self.running_cov
            if self.training:
                mean = flat.mean(1)
                cov = (flat - mean[:, None]) @ (flat - mean[:, None]).T / flat.shape[1]
                with torch.no_grad():
                    self.running_mean.lerp_(mean, 0.01)
                    self.running_cov.lerp_(cov, 0.01)
            root = torch.linalg.cholesky(cov + 1e-3 * torch.eye(len(cov)))
            white = torch.linalg.solve_triangular(root, flat - mean[:, None], upper=False)
            return white.view(x.shape[1], x.shape[0], *x.shape[2:]).movedim(0, 1)

    def make() -> Any:
        net = convolutions()
        return nn.Sequential(net[0], Whitening(8), *net[2:])

    return situation(make, pairs(), classify, options={"loss": F.cross_entropy}, lags=False,
                     sample=pictures()[0][:4])  # fmt: skip


@entry("autocast in forward, channels last, the head in float32", "torch", "fresh")
def _half() -> Program:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            net = convolutions().to(memory_format=torch.channels_last)
            self.body, self.head = net[:-1], net[-1]

        def forward(self, x: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                found = self.body(x.contiguous(memory_format=torch.channels_last))
            return self.head(found.float())

    return situation(Half, pairs(), classify, options={"loss": F.cross_entropy},
                     sample=pictures()[0][:4])  # fmt: skip


@entry("new layers faded in by a number that the step turns up", "torch", "fresh")
def _grown() -> Program:
    class Grown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = convolutions(), convolutions()
            self.share = 0.7

        def forward(self, x: Any) -> Any:
            small = F.avg_pool2d(x, 2)
            return (1 - self.share) * self.early(small) + self.share * self.late(x)

    return situation(Grown, pairs(), classify, options={"loss": F.cross_entropy},
                     sample=pictures()[0][:4])  # fmt: skip


@entry("keyword-only forward, batches of keywords, the loss a number and a mapping", "torch",
       "fresh")  # fmt: skip
def _keywords() -> Program:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = convolutions(), nn.Parameter(torch.ones(()))

        def forward(self, *, image: Any, temperature: float = 1.0, label: Any = None) -> Any:
            scores = self.net(image) * self.scale / temperature
            if label is None:
                return {"scores": scores}
            return {"scores": scores, "loss": F.cross_entropy(scores, label)}

    x, y = pictures()
    batches = [{"image": x[r], "label": y[r], "temperature": 0.8} for r in rows()]

    def step(m: Any, b: Any) -> Any:
        found = m(**b)
        return found["loss"], {"accuracy": (found["scores"].argmax(1) == b["label"]).float().mean()}

    return situation(
        Net, batches, lambda m, b: step(m, b)[0], options={"step": step},
        call=lambda m, b: m(image=b["image"], temperature=b["temperature"])["scores"],
        sample={"image": x[:4], "temperature": 0.8},
    )  # fmt: skip
