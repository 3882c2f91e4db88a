"""Every verb on a torch program, held to what torch and the model's own library say."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import math
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import frostline as fl

from .judging import Wrong, require
from .program import Program

#: Largest difference, in standard deviations, between stored statistics and those that hooks see.
FIXED_POINT = 1e-4


def copied(model: Any) -> Any:
    """A copy of a torch model; of a TorchScript program through a file, as its users make one."""
    if not isinstance(model, torch.jit.ScriptModule):
        return copy.deepcopy(model)
    stream = io.BytesIO()
    torch.jit.save(model, stream)
    stream.seek(0)
    return torch.jit.load(stream)


# --- oracles ----------------------------------------------------------------------------------


class Seen(TorchFunctionMode):  # type: ignore[misc]
    """Inputs of every normalising call that reads stored statistics, by their buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[int, list[Any]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func in (nn.functional.batch_norm, torch.batch_norm):
            mean = given.get("running_mean", args[1] if len(args) > 1 else None)
            if func is torch.batch_norm:
                mean = args[3]
            if mean is not None:
                x = given.get("input", args[0] if args else None)
                with contextlib.suppress(RuntimeError):  # several models at once have no pointer
                    self.inputs.setdefault(mean.data_ptr(), []).append(x.detach().double())
        return func(*args, **given)


def tensors(outputs: Any) -> list[Any]:
    """All floating tensors of an output, in order."""
    if isinstance(outputs, torch.Tensor):
        return [outputs] if outputs.is_floating_point() else []
    if isinstance(outputs, Mapping):
        return [t for value in outputs.values() for t in tensors(value)]
    if isinstance(outputs, (list, tuple)):
        return [t for value in outputs for t in tensors(value)]
    if hasattr(outputs, "__dict__"):
        return [t for value in vars(outputs).values() for t in tensors(value)]
    return []


def state(model: Any) -> dict[str, Any]:
    """Parameters, buffers, flags and modes, as they are."""
    found = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    flags = {f"flag {name}": p.requires_grad for name, p in model.named_parameters()}
    modes = {f"mode {name}": m.training for name, m in model.named_modules()}
    kinds = {f"class {name}": type(m).__name__ for name, m in model.named_modules()}
    return {**found, **flags, **modes, **kinds}


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The first entry that differs; empty where all are the same, bit for bit."""
    for name in before.keys() | after.keys():
        one, two = before.get(name), after.get(name)
        same = torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
        if not same:
            return name
    return ""


def as_module(program: Program, model: Any) -> Any:
    """The model itself; of an exported program, the module of torch with what it holds now."""
    if program.plain is None:
        return model
    twin = program.plain()
    twin.load_state_dict(model.state_dict())
    return twin


def norms(model: Any) -> list[tuple[str, Any]]:
    """Modules with running statistics."""
    return [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(getattr(m, "running_mean", None), torch.Tensor)
        and isinstance(getattr(m, "running_var", None), torch.Tensor)
    ]


_KEPT = re.compile("(running|moving|stored)_(mean|var)")
_MEAN = re.compile("(running|moving|stored)_mean")


def kept_pairs(model: Any) -> list[tuple[str, Any, str, str]]:
    """Modules that keep statistics under any name, with the names of their buffers."""
    found = []
    for name, module in model.named_modules():
        for mean in [n for n in module._buffers if _MEAN.fullmatch(n)]:
            variance = mean.replace("mean", "var")
            if isinstance(module._buffers.get(variance), torch.Tensor):
                found.append((name, module, mean, variance))
    return found


def noisy(model: Any) -> bool:
    """Whether the model is random in training."""
    words = ("Dropout", "DropPath", "StochasticDepth")
    if getattr(model, "drop_rate", 0):  # timm's own, a function
        return True
    return any(
        word in type(m).__name__ and any(getattr(m, r, 0) for r in ("p", "drop_prob"))
        for m in model.modules()
        for word in words
    )


@contextlib.contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Put everything back, by torch alone."""
    kept = copy.deepcopy(model.state_dict())
    modes = {m: m.training for m in model.modules()}
    try:
        yield
    finally:
        model.load_state_dict(kept)
        for module, mode in modes.items():
            module.training = mode


def rows_of(batch: Any) -> int:
    """Samples of a batch: a last one may be short."""
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)) and not isinstance(batch, torch.Tensor):
        return len(batch) if isinstance(batch[0], Mapping) else rows_of(batch[0])
    if not isinstance(batch, torch.Tensor) or batch.layout != torch.strided:
        return 1
    return batch.size(0) if batch.is_nested else len(batch)


def own_loss(program: Program, model: Any, *, training: bool) -> float | None:
    """Mean of the library's own loss over the batches, in a phase without dropout."""
    if program.ask is None:
        return None
    with untouched(model), torch.no_grad():
        total, samples = 0.0, 0
        for batch in program.batches:
            with contextlib.suppress(Exception):
                model.train(training)
            if not training and program.in_training_mode:
                model.train()
                for module in model.modules():
                    if isinstance(getattr(module, "running_mean", None), torch.Tensor) or (
                        "Dropout" in type(module).__name__
                    ):
                        module.eval()
            count = rows_of(batch)
            total, samples = total + count * float(program.ask(model, batch)), samples + count
        return total / samples


def acts_in_training(program: Program, model: Any) -> bool:
    """Whether the mode changes the library's loss while BN computes as at inference."""
    if program.ask is None:
        return True
    losses: list[list[float]] = []
    with untouched(model), torch.no_grad():
        for training in (False, True):
            model.train(training)
            for _, module in norms(model):
                module.eval()
            losses.append([float(program.ask(model, batch)) for batch in program.batches])
    return losses[0] != losses[1]


def outputs(program: Program, model: Any) -> list[Any]:
    """What the model returns at inference for the first batch."""
    with untouched(model), torch.no_grad():
        with contextlib.suppress(Exception):
            model.eval()
        if program.seen is not None:
            return tensors(program.seen(model))
        return tensors(program.call(model, program.batches[0]))


def close(one: list[Any], two: list[Any]) -> float:
    """Largest difference, relative to the largest output."""
    require(len(one) == len(two), f"{len(two)} outputs instead of {len(one)}")
    worst = 0.0
    for a, b in zip(one, two, strict=True):
        if a.shape != b.shape:
            return math.inf
        if a.numel():
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)))
    return worst


def step_of(program: Program) -> dict[str, Any]:
    """The user's step, for verbs that look at no loss."""
    return {name: value for name, value in program.options.items() if name == "step"}


# --- verbs ------------------------------------------------------------------------------------


def sites(program: Program, model: Any) -> str:
    found = fl.sites(model)
    require(bool(found) or not norms(model), "no site in a model with running statistics")
    seen, seeable = Seen(), as_module(program, model)
    with untouched(seeable), torch.no_grad(), seen:
        seeable.eval()
        program.call(seeable, program.batches[0])
    known = len({m.running_mean.data_ptr() for _, m in norms(seeable)})
    used = len(seen.inputs)
    require(len(found) >= max(known, used), f"{len(found)} sites; torch has {known}")
    moving = [site.path for site in found if not site.stats_frozen]
    require(not (program.fixed and moving), f"{moving[:1]} cannot move, and is said to")
    return f"{len(found)} sites"


def lint(program: Program, model: Any) -> str:
    before = state(model)
    report = fl.lint(model)
    require(not difference(before, state(model)), "lint changed the model")
    return f"{len(report.findings)} findings"


def phases(program: Program, model: Any) -> str:
    before = state(model)
    table = fl.phases(model, program.batches, **program.options)
    require(not difference(before, state(model)), "phases changed the model")
    for phase, training in (("0", False), ("1", True)):
        mine, own = table[phase].loss, own_loss(program, model, training=training)
        if own is None or (training and (noisy(model) or program.more_in_training)):
            continue
        require(mine is not None, f"no loss at phase {phase}; the library says {own:.4g}")
        within = 0.2 if program.own_ways else 2e-3
        near = math.isclose(float(mine or 0), own, rel_tol=within, abs_tol=1e-4)
        require(near, f"loss at phase {phase} is {mine:.5g}; the library says {own:.5g}")
    return f"{table['0'].loss} → {table['1'].loss}"


def recalibrate(program: Program, model: Any) -> str:
    before = state(model)
    change = fl.recalibrate(model, program.batches, sites="all", **step_of(program))
    others = [k for k in before if not _KEPT.search(k) and not k.endswith("num_batches_tracked")]
    moved = difference({k: before[k] for k in others}, {k: state(model)[k] for k in others})
    require(not moved, f"recalibrate changed {moved}")
    require_fixed_point(program, as_module(program, model), before)
    change.undo()
    require(not difference(before, state(model)), "undo did not put everything back")
    return "fixed point"


def require_fixed_point(program: Program, model: Any, before: Mapping[str, Any]) -> None:
    """Hold what a module keeps to the inputs that torch sees it normalise at inference."""
    seen, hooked = Seen(), {}
    kept = kept_pairs(model)
    for name, module, *_ in kept:  # classes that compute by hand
        took = functools.partial(lambda n, _, x: hooked.setdefault(n, []).append(x[0]), name)
        module.register_forward_pre_hook(took)
    eager = torch.compiler.set_stance("force_eager")  # a compiled call is seen by no mode
    with untouched(model), torch.no_grad(), seen, eager:
        model.eval()
        for batch in program.batches:
            (program.ask if step_of(program) else program.call)(model, batch)
    for name, module, *names in kept:
        mean, variance = (getattr(module, each).double().flatten() for each in names)
        inputs = seen.inputs.get(getattr(module, names[0]).data_ptr())
        inputs = inputs or [x.double() for x in hooked.get(name, [])]
        if program.own_ways:  # what it is given depends on the passes before
            require(bool(mean.isfinite().all() and variance.isfinite().all()), f"{name}")
            continue
        if not inputs:
            same = torch.equal(before[f"{name}.{names[0]}"], getattr(module, names[0]))
            require(same, f"{name} is not used, and changed")
            continue
        x = torch.cat([i.transpose(0, 1).reshape(i.shape[1], -1) for i in inputs], 1)
        biased = x.var(1, unbiased=False)
        if isinstance(module, nn.modules.instancenorm._InstanceNorm):  # within each sample
            within = [i.flatten(2).var(2, unbiased=False) for i in inputs]
            biased = torch.cat(within).mean(0)
        spread = biased.clamp_min(0).sqrt() + 1e-3
        off = float(((mean - x.mean(1)) / spread).abs().max())
        require(off < FIXED_POINT, f"the mean of {name} is {off:.2g} deviations off")
        big = biased > 1e-6
        ratio = (variance / biased.clamp_min(1e-12))[big]
        if bool(big.any()):  # torch's own updates store n / (n - 1) of the biased variance
            low, high = float(ratio.min()), float(ratio.max())
            factor = x.shape[1] / (x.shape[1] - 1)
            holds = low > 1 - FIXED_POINT and high < factor * (1 + FIXED_POINT)
            require(holds, f"the variance of {name} is {low:.6g} to {high:.6g} of the biased")
    for _, module, *_ in kept:
        module._forward_pre_hooks.clear()


def freeze(program: Program, model: Any) -> str:
    before, kept_state = state(model), copy.deepcopy(model.state_dict())
    change = fl.freeze(model)
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    require(not learning, f"{learning[:1]} still trains")
    kept = {k: v for k, v in state(model).items() if _KEPT.search(k)}
    with torch.no_grad():
        for batch in program.batches:
            model.train()
            (program.ask or program.call)(model, batch)
    moved = difference(kept, {k: v for k, v in state(model).items() if _KEPT.search(k)})
    doubts = [note for note in change.notes if "shows whether freezing holds them" in note]
    if moved and doubts:
        raise fl.FrostlineError(doubts[0])
    require(not moved, f"{moved} moved though frozen")
    model.load_state_dict(kept_state)
    change.undo()
    after = state(model)
    flags = {k: v for k, v in after.items() if k.startswith(("flag", "class"))}
    require(not difference({k: before[k] for k in flags}, flags), "undo left flags or classes")
    return "statistics stay"


def assert_frozen(program: Program, model: Any) -> str:
    fl.freeze(model)
    fl.assert_frozen(model, data=program.batches, **step_of(program))
    paths = [site.path for site in fl.sites(model)]
    if not program.fixed:
        fl.unfreeze(model, since=paths[-1])
        try:
            fl.assert_frozen(model, data=program.batches, **step_of(program))
        except fl.NotFrozenError:
            return "no false alarm; a thaw is found"
        raise Wrong("a thawed layer was not found")
    return "no false alarm"


def watch(program: Program, model: Any) -> str:
    with fl.watch(model, program.batches, **program.options) as seen:
        model.train()
        with torch.no_grad():
            (program.ask or program.call)(model, program.batches[0])
    return f"{len(str(seen))} characters"


def diagnose(program: Program, model: Any) -> str:
    before = state(model)
    report = fl.diagnose(model, program.batches, verbose=0, **program.options)
    require(not difference(before, state(model)), "diagnose changed the model")
    require(bool(report.verdict), "no verdict")
    if any(cause.code == "DROPOUT" for cause in report.causes):
        acts = acts_in_training(program, model)
        require(acts, f"DROPOUT, where BN alone acts in training: {report.verdict}")
    if program.lags:
        at_rest, learning = (own_loss(program, model, training=t) for t in (False, True))
        if not (at_rest or 0) > 1.1 * (learning or 0):
            raise RuntimeError(f"no lag to find: {learning} in training, {at_rest} at inference")
        blamed = bool(report.causes) and report.causes[0].is_bn
        if not blamed and "BN is not ruled out; pass step=" in report.verdict:
            raise fl.FrostlineError(report.verdict)  # a refusal that says what would decide
        require(blamed, f"BN is not blamed, at {learning:.3g} → {at_rest:.3g}: {report.verdict}")
    if program.healthy:
        blamed = any(cause.is_bn for cause in report.causes)
        require(not blamed, f"BN is blamed, which is well: {report.verdict}")
    return report.verdict[:60]


def split(program: Program, model: Any) -> str:
    fl.freeze(model, program.until or 0.5)
    before = state(model)
    parts = fl.split(model, sample=program.sample)
    changed = difference(before, state(model))
    require(not changed, f"split changed the model: {changed}")

    def run(part: Any) -> Any:
        if program.sample is None:
            return program.call(part, program.batches[0])
        if isinstance(program.sample, Mapping):
            return part(**program.sample)
        return part(*program.sample) if type(program.sample) is tuple else part(program.sample)

    for part in (model, parts.prefix, parts.suffix):
        with contextlib.suppress(Exception):  # an exported program has no eval()
            part.eval()
    with torch.no_grad():
        whole, features = tensors(run(model)), run(parts.prefix)
        several = isinstance(features, tuple) and len(parts.frontier) > 1
        found = tensors(parts.suffix(*features) if several else parts.suffix(features))
    worst = close(whole[: len(found)], found)
    require(worst < 1e-4, f"suffix(prefix(x)) is {worst:.2g} off")
    return f"{len(parts.frontier)} tensors cross"


def cached(program: Program, model: Any) -> str:
    """Two epochs of the user's loop, the first half frozen: with the cache and without."""
    paths = [site.path for site in fl.sites(model)]
    fl.freeze(model, program.until or paths[len(paths) // 2])
    mine, own = copied(model), copied(model)
    train = program.ask or (
        lambda m, b: sum(t.square().mean() for t in tensors(program.call(m, b)))
    )
    found = []
    for each, batches in ((own, program.batches), (mine, fl.cached(mine, program.batches))):
        torch.manual_seed(0)
        random.seed(0)
        learning = [p for p in each.parameters() if p.requires_grad]
        optimizer, losses = torch.optim.SGD(learning, 1e-3) if learning else None, []
        for _ in range(2):
            for batch in batches:
                each.train()
                loss = train(each, batch)
                if optimizer is not None:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                losses.append(float(loss))
        found.append(losses)
    still = [name for name, p in model.named_parameters() if not p.requires_grad]
    left, right = own.state_dict(), mine.state_dict()
    moved = [name for name in still if not torch.equal(left[name], right[name])]
    require(not moved, f"{moved[:1]} differs from a loop without the cache")
    if not noisy(model) and not (program.more_in_training and program.healthy):
        near = all(
            math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-5) for a, b in zip(*found, strict=True)
        )
        require(near, f"losses are {found[1]}; without the cache {found[0]}")
    return f"{found[1][-1]:.4g}"


def fold(program: Program, model: Any) -> str:
    with contextlib.suppress(Exception):
        model.eval()
    folded = fl.fold(model, sample=program.sample)
    worst = close(outputs(program, model), outputs(program, folded))
    require(worst < 1e-2, f"the folded model is {worst:.2g} off")
    left = len(norms(folded))
    return f"{left} BN layers left"


def set_momentum(program: Program, model: Any) -> str:
    def known() -> list[Any]:
        batch_norm = nn.modules.batchnorm._BatchNorm
        return [m.momentum for m in model.modules() if isinstance(m, batch_norm)]

    before = known()
    change = fl.set_momentum(model, 0.9)
    wrong = [share for share in known() if share is None or not math.isclose(share, 0.1)]
    require(not wrong, f"a momentum of {wrong[:1]}")
    change.undo()
    require(before == known(), "undo did not put everything back")
    return "set and undone"


def unfreeze(program: Program, model: Any) -> str:
    fl.freeze(model, 0.5)
    frozen = state(model)
    fl.unfreeze(model).undo()
    changed = difference(frozen, state(model))
    require(not changed, f"undo left {changed}")
    fl.unfreeze(model)
    still = [site.path for site in fl.sites(model) if site.stats_frozen or site.params_frozen]
    still += [name for name, p in model.named_parameters() if not p.requires_grad]
    require(not still or program.fixed, f"{still[:1]} is still frozen")
    return "nothing is frozen"


def cache_features(program: Program, model: Any) -> str:
    fl.freeze(model, program.until or 0.5)
    prefix = fl.split(model, sample=program.sample).prefix
    given = program.batches[0][0] if program.sample is None else program.sample
    prefix.eval()
    with torch.no_grad():
        if isinstance(given, Mapping):
            out = prefix(**given)
        else:
            out = prefix(*given) if type(given) is tuple else prefix(given)
    own = out if isinstance(out, tuple) else (out,)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):  # the second time they are read
            data = given if isinstance(given, torch.Tensor) else [(given, None)]
            size = {"batch_size": len(given)} if program.fixed else {}
            found = fl.cache_features(prefix, data, folder, verbose=0, **size)
        rows = [found[i] for i in range(len(found))]
    require(len(rows) == len(own[0]), f"{len(rows)} rows; the prefix returns {len(own[0])}")
    worst = 0.0
    for row, wanted in zip(rows, zip(*own, strict=True), strict=True):
        several = row if isinstance(row, (tuple, list)) else (row,)
        for one, other in zip(map(torch.as_tensor, several), wanted, strict=True):
            off = one.to(torch.complex128) - other.to(torch.complex128)  # a mask too
            worst = max(worst, float(off.abs().max()))
    require(worst < 1e-3, f"features are {worst:.2g} off")
    return f"{len(rows)} rows"


VERBS: dict[str, Callable[[Program, Any], str]] = {
    verb.__name__: verb
    for verb in (
        sites, lint, phases, recalibrate, freeze, assert_frozen, watch, diagnose, split,
        cached, fold, set_momentum, unfreeze, cache_features
    )
}  # fmt: skip
