"""One forward pass of a torch module for every question: the blend λ and the statistics are given.

Every site normalises with ``(1 - λ) * stored + λ * batch``: its calls are answered, see
:mod:`frostline.adapters.torch.calls`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils import checkpoint

from frostline.adapters import Outcome
from frostline.adapters.protocol import Condition
from frostline.adapters.torch.asking import Question, call, takes_targets
from frostline.adapters.torch.calls import (
    Call,
    answered,
    as_meant,
    statistics as batch_statistics,
    stored,
)
from frostline.adapters.torch.forward_pass import (
    arrays,
    arrays_in,
    device_of,
    frozen_parameters_kept,
    mover,
    set_inference,
    set_phase,
    untouched,
)
from frostline.adapters.torch.graph import set_mode, site_modules
from frostline.adapters.torch.loss import Judged
from frostline.atomic import taken_back
from frostline.data.batch import Batch
from frostline.numerics.blend import mixed
from frostline.numerics.compare import relative_difference
from frostline.numerics.stats import Moments
from frostline.types import ModelError, as_float64

#: Largest difference, as a share, of losses that are the same: torch takes other kernels where
#: gradients are recorded, and adds up in another order.
_SAME_LOSS = 1e-3


class TorchForward:
    """Forward passes of a torch module with blended statistics; see ``models.Forward``.

    Runs eagerly. At λ = 0 a site uses its stored statistics, at λ = 1 those of the batch (biased
    variance), whatever its mode. A site that stores nothing always uses those of the batch.

    Args:
        model: A torch module; DataParallel, DDP and ``torch.compile`` are taken off.
        paths: Sites to blend, in the order of the blend vector; ``None`` for all of them.
        loss: A torch loss, any callable ``(outputs, targets)``, or a name; ``None``: the one that
            the model computes.
        step: The user's ``step(model, batch)``.

    Attributes:
        calls: Path -> how often one pass that recorded moments called the site.

    Raises:
        ModelError: An unknown path, or a lazy module that has not seen data yet.
    """

    def __init__(self, model: Any, paths: Sequence[str] | None, *, loss: Any, step: Any) -> None:
        self.model = model
        self._sites = site_modules(model)
        self.paths = tuple(self._sites if paths is None else paths)
        for path in self.paths:
            if path not in self._sites:
                listed = ", ".join(map(repr, self._sites)) or "none"
                raise ModelError(
                    f"no BN layer has this path; there are {listed}. Received: {path!r}"
                )
        self.calls: dict[str, int] = {}
        self._move = mover(model)
        self._question = Question(loss, step)
        self._settled = step is None  # whether the step needs gradients of parameters is known
        self._trains: bool | None = None  # the model has its losses in training mode only
        self._several: bool | None = None  # it returns more in training than at inference

    def outputs(self, batch: Batch, condition: Condition) -> Any:
        """Return the outputs of one batch and, with ``record``, what each site saw."""
        seen: dict[str, Moments] | None = {} if condition.record else None
        with torch.no_grad():
            how = self._how(self._blend(condition), condition, seen)
            with self._answered(how, condition.number) as root:
                set_inference(root, self._sites, dropout=condition.dropout)
                found = arrays(call(root, batch, self._move))
        return (found, seen) if condition.record else found

    def gradient(
        self, batch: Batch, condition: Condition
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the losses, shape ``(units,)``, and d mean(losses) / dλ, shape ``(sites,)``."""
        blend = self._blend(condition).requires_grad_(True)
        with torch.enable_grad(), _checkpoints_opened():
            how = self._how(blend, condition, None)
            _, found = self._judged(batch, how, condition)
            slope = None
            if found.losses.requires_grad:
                mean = found.losses.mean()
                (slope,) = torch.autograd.grad(mean, blend, allow_unused=True)
        zero = torch.zeros_like(blend)
        losses = as_float64(arrays(found.losses))
        return losses, as_float64(arrays(zero if slope is None else slope))

    def outcome(self, batch: Batch, condition: Condition) -> Outcome:
        """Return outputs, losses and, with ``record``, the sites' moments of one pass together."""
        seen: dict[str, Moments] | None = {} if condition.record else None
        with torch.no_grad():
            how = self._how(self._blend(condition), condition, seen)
            outputs, found = self._judged(batch, how, condition)
        return outcome_of(outputs, found, seen or {})

    def own(self, batch: Batch, *, training: bool, number: int = 0) -> Outcome:
        """Return outputs and losses of the module's own pass, as its ``train()`` leaves it.

        Where the losses exist in training mode only, inference is that mode with the stored
        statistics and without dropout. Of ``(main, auxiliary)`` outputs of training alone the first
        is judged.
        """
        if not training:
            if self._trains is None:  # find out how the model is asked
                self.outcome(batch, Condition(0.0, number=number))
            if self._trains:
                return self.outcome(batch, Condition(0.0, number=number))
        try:
            with torch.no_grad(), untouched(self.model, number=number) as root:
                set_phase(root, training=training)
                with answered(self._sites, as_meant):
                    first = training and self._returns_more_in_training(batch)
                    outputs, found = self._question.answer(root, batch, self._move, first=first)
        except ModelError as error:
            if not self._question.may_differentiate(error):
                raise
            return self.own(batch, training=training, number=number)
        outcome = outcome_of(outputs, found, {})
        return replace(outcome, step_trains=not training and self._question.trains)

    # --- the pass -----------------------------------------------------------------------------

    def _returns_more_in_training(self, batch: Batch) -> bool:
        """Whether inference returns one tensor, so that what training adds is not compared."""
        if self._several is None:
            if self._trains or self._question.steps:
                self._several = False
            else:
                with untouched(self.model) as root:
                    set_mode(root, training=False)
                    try:
                        found = call(root, batch, self._move)
                    except Exception:  # it runs in training mode only
                        found = None
                self._several = isinstance(found, torch.Tensor)
        return self._several

    def _judged(
        self, batch: Batch, how: Callable[[Call], Any], condition: Condition
    ) -> tuple[Any, Judged]:
        """Outputs and losses at some λ; in training mode where there are no losses without."""
        if not self._settled:
            self._settled = True
            self._settle(batch, condition.number)
        problem: Exception | None = None
        dropout, number = condition.dropout, condition.number
        first = dropout and self._returns_more_in_training(batch)
        for trains in (False, True) if self._trains is None else (self._trains,):
            # In evaluation mode dropout that drops is the model's own, and inference has it, too.
            with self._answered(how, number, quiet=trains and not dropout) as root:
                if trains and not self._question.steps and not takes_targets(root):
                    break
                set_inference(root, self._sites, trains=trains, dropout=dropout)
                try:
                    found = self._question.answer(root, batch, self._move, first=first)
                except Exception as error:
                    problem = problem or error
                    continue
            self._trains = trains
            return found
        assert problem is not None
        if self._question.may_differentiate(problem):
            return self._judged(batch, how, condition)
        raise problem

    def _settle(self, batch: Batch, number: int) -> None:
        """Ask the step with gradients where it computes something else of parameters without.

        An inner update, as MAML makes it, may move those alone that need gradients.
        """
        with_flags = self._question.with_gradients_of_parameters()
        if with_flags is None:
            return
        found = []
        for question in (self._question, with_flags):
            with (
                torch.no_grad(),
                frozen_parameters_kept(self.model),
                untouched(self.model, number=number) as root,
            ):
                set_phase(root, training=True)
                if question is self._question:
                    for parameter in root.parameters():
                        parameter.requires_grad_(False)
                try:
                    with answered(self._sites, as_meant):
                        _, answer = question.answer(root, batch, self._move)
                except Exception:  # said where the step is asked
                    return
                found.append([as_float64(arrays(answer.losses))])
        if relative_difference(*found) > _SAME_LOSS:
            self._question = with_flags

    @contextmanager
    def _answered(
        self, how: Callable[[Call], Any], number: int, *, quiet: bool = False
    ) -> Iterator[Any]:
        with untouched(self.model, number=number) as root:
            if not self._question.of_parameters:
                for parameter in root.parameters():
                    parameter.requires_grad_(False)  # the graph then holds what depends on λ alone
            with answered(self._sites, how, quiet=quiet):
                yield root

    def _how(
        self, blend: Any, condition: Condition, seen: dict[str, Moments] | None
    ) -> Callable[[Call], Any]:
        """How calls are answered; ``seen`` takes their moments."""
        given = self._statistics(condition)
        shares = dict(zip(self.paths, blend.detach().tolist(), strict=True))
        places = {path: index for index, path in enumerate(self.paths)}

        def answer(call: Call) -> Any:
            path = call.path
            if path not in self._sites:
                return call.run()
            if path in places and seen is not None:
                moments = call.moments()
                self.calls[path] = self.calls[path] + 1 if path in seen else 1
                seen[path] = seen[path].merge(moments) if path in seen else moments
            if call.mean is None or not call.x.numel():
                return call.run()
            pair = given.get(str(path), (call.mean, call.variance))
            if path not in places or (shares[path] == 0 and not blend.requires_grad):
                as_it_is = path not in given and not call.training
                return call.run() if as_it_is else call.with_statistics(*pair)
            share = blend[places[path]]
            if shares[path] == 1 and not blend.requires_grad:
                return call.with_batch()
            fresh = batch_statistics(call.wide, single=call.single)
            mean, variance = (
                mixed(share.to(new.dtype), old.to(new.dtype), new, torch)
                for old, new in zip(pair, fresh, strict=True)
            )
            return call.differentiable(mean, variance)

        return answer

    def _blend(self, condition: Condition) -> Any:
        shares = condition.shares(len(self.paths)).astype(np.float32)
        return torch.as_tensor(shares, device=device_of(self.model))

    def _statistics(self, condition: Condition) -> dict[str, tuple[Any, Any]]:
        """What is used in the place of stored statistics; a lazy module is refused."""
        own = {path: stored(self._sites[path], path) for path in self.paths}
        shapes = {path: None if pair is None else pair[0].shape for path, pair in own.items()}
        device = device_of(self.model)
        return {
            path: (torch.as_tensor(mean, device=device).float(),
                   torch.as_tensor(variance, device=device).float())
            for path, (mean, variance) in condition.replaced(shapes).items()
        }  # fmt: skip


class _Opened:
    """Stands for the function of autograd behind ``checkpoint(..., use_reentrant=True)``."""

    @staticmethod
    def apply(function: Callable[..., Any], _: bool, *arguments: Any) -> Any:
        return function(*arguments)


def _recording_nothing(*_: Any, **__: Any) -> Iterator[None]:
    """Stands for what ``checkpoint(..., use_reentrant=False)`` does around its block."""
    yield


@contextmanager
def _checkpoints_opened() -> Iterator[None]:
    """Run checkpointed blocks as they are; torch has no switch for that.

    Backward would run them again, where no call is answered: without λ, and moving the statistics.
    A reentrant one records nothing unless an input needs a gradient, and λ is none of its inputs.
    """
    opened = {
        "CheckpointFunction": _Opened,
        "_checkpoint_without_reentrant_generator": _recording_nothing,
        "_checkpoint_without_reentrant_generator_impl": _recording_nothing,  # from torch 2.14 on
    }
    before = {name: made for name, made in vars(checkpoint).items() if name in opened}
    with taken_back(lambda: vars(checkpoint).update(before)):
        vars(checkpoint).update({name: opened[name] for name in before})
        yield


def outcome_of(outputs: Any, found: Judged, seen: Mapping[str, Moments]) -> Outcome:
    """Outputs, losses and moments as arrays."""
    return Outcome(
        outputs=arrays_in(outputs),
        losses=as_float64(arrays(found.losses)),
        moments=seen,
        unit=found.unit,
        parts={name: as_float64(arrays(part)) for name, part in found.parts.items()},
        metrics={name: arrays(value) for name, value in found.metrics.items()},
    )
