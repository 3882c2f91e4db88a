"""How a torch model is called on a batch, and what it or a loss says of it.

A mapping goes in by keyword where ``forward`` names its keys, else as one argument; a tuple or list
of arrays by position. Labels go in where ``forward`` has a place for them and its loss is asked.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from frostline.adapters.torch.loss import Judged, as_callable, judged, read_losses
from frostline.adapters.torch.outside import outside_kept
from frostline.adapters.torch.state_kept import same_values
from frostline.atomic import taken_back
from frostline.data.batch import Batch, failure
from frostline.types import DataError, FrostlineError, ModelError

#: Names of labels, as keys of a mapping and as arguments of a ``forward``.
_LABELS = ("labels", "label", "targets", "target", "y", "gt", "annotations")

_PLACES = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def call(
    root: Any,
    batch: Batch,
    move: Callable[[Any], Any],
    *,
    step: Any = None,
    targets: bool = False,
    trains: Callable[[], None] | None = None,
) -> Any:
    """Call a module on a batch, or have the user's step do so.

    Args:
        root: The module, in the mode in which it is asked.
        batch: The batch.
        move: Arrays and tensors -> tensors where the model is.
        step: ``step(model, batch)``; ``None``: the module is called.
        targets: Labels go in where ``forward`` has a place for them.
        trains: Called where the step calls ``train()`` on the module in inference mode.

    Raises:
        ModelError: The module or the step fails.
    """
    with _told(batch, step), outside_kept(root):
        if step is not None:
            with _mode_held(root, trains), _unlogged(root):
                return step(root, move(batch.given))
        outputs = _called(root, batch, move, targets)
        # A generator runs the model while it is read: here, not where nobody looks any more.
        return list(outputs) if isinstance(outputs, Iterator) else outputs


@contextmanager
def _mode_held(root: Any, trains: Callable[[], None] | None) -> Iterator[None]:
    """Let a step that calls ``train()``, as a training step does, be asked in the mode at hand."""
    if "train" in vars(root) or isinstance(root, torch.jit.ScriptModule):
        yield
        return
    modes = [(module, module.training) for module in root.modules()]
    inference = not root.training

    def train(mode: bool = True) -> Any:
        if not mode:
            return type(root).train(root, False)
        if inference and trains is not None:
            trains()
        for module, before in modes:
            module.training = before
        return root

    vars(root)["train"] = train
    try:
        yield
    finally:
        del vars(root)["train"]


@contextmanager
def _unlogged(root: Any) -> Iterator[None]:
    """Let what a step of Lightning's logs reach no trainer.

    ``self.log`` raises an error once ``fit`` is over, and in a callback it would add to the logs.
    """
    kinds = ("log", "log_dict")
    silent = [
        (module, name)
        for module in root.modules()
        if any(kind.__name__ == "LightningModule" for kind in type(module).__mro__)
        for name in kinds
        if name not in vars(module)
    ]

    def back() -> None:
        for module, name in silent:
            vars(module).pop(name, None)

    with taken_back(back):
        for module, name in silent:
            vars(module)[name] = _nothing
        yield


def _nothing(*_: Any, **__: Any) -> None:
    """Stands for ``self.log``."""


def with_gradients(step: Any, problem: BaseException | None) -> Any:
    """The step with gradients where that is what it lacked; ``None``: something else is wrong.

    At first the parameters of the model need none, so that nothing but what the step asks for is
    recorded (a gradient penalty); then theirs, too (an inner update, as MAML makes it).

    Args:
        step: ``step(model, batch)``, run without gradients so far.
        problem: What it raised; its causes count as well.
    """
    while problem is not None and not any(text in str(problem) for text in _LACKS_GRADIENTS):
        problem = problem.__cause__
    if step is None or problem is None:
        return None
    if not isinstance(step, WithGradients):
        return WithGradients(step)
    return None if step.of_parameters else WithGradients(step.step, of_parameters=True)


#: What torch says where a gradient is asked for of what needs none.
_LACKS_GRADIENTS = ("does not require grad", "`inputs` argument to `grad()` cannot be empty")


class WithGradients:
    """A step that runs with gradients; the caller puts the flags of parameters back.

    Args:
        step: ``step(model, batch)``.
        of_parameters: Parameters need them as they do in the user's training.
    """

    def __init__(self, step: Any, *, of_parameters: bool = False) -> None:
        self.step, self.of_parameters = step, of_parameters
        #: Parameter -> its value before the first call.
        self._values: dict[Any, Any] = {}

    def __call__(self, root: Any, batch: Any) -> Any:
        """What the step returns."""
        if not self.of_parameters:
            for parameter in root.parameters():
                parameter.requires_grad_(False)
        with self._untrained(root), torch.enable_grad():
            return self.step(root, batch)

    @contextmanager
    def _untrained(self, root: Any) -> Iterator[None]:
        """Refuse a step that hands gradients to the parameters, or moves them; put them back."""
        parameters = [p for p in root.parameters() if self.of_parameters and p.requires_grad]
        for parameter in parameters:
            self._values.setdefault(parameter, parameter.detach().clone())
        gradients = [(parameter, parameter.grad) for parameter in parameters]

        def back() -> None:
            for parameter, gradient in gradients:
                parameter.grad = gradient

        with taken_back(back), ExitStack() as hooks:
            for parameter in parameters:
                parameter.grad = None
                hook = parameter.register_post_accumulate_grad_hook(_refuse)
                hooks.callback(hook.remove)
            yield
        moved = [p for p in parameters if not same_values(p.detach(), self._values[p])]
        for parameter in moved:
            parameter.data.copy_(self._values[parameter])
        if moved:
            _refuse()


def _refuse(*_: Any) -> None:
    raise ModelError(
        "the step trains the model, and a step that is looked at must only compute the loss: leave "
        "backward() and the optimizer out, as in step=lambda model, batch: loss. An inner update "
        "goes to tensors of its own (torch.autograd.grad and torch.func.functional_call). "
        "Received: a step that gives the model's parameters gradients or other values"
    )


@contextmanager
def _told(batch: Batch, step: Any) -> Iterator[None]:
    """Make what a user's code raises on a batch one of our errors."""
    try:
        yield
    except FrostlineError:
        raise
    except Exception as error:
        raise failure(error, batch, step=step is not None) from error


def _called(root: Any, batch: Batch, move: Callable[[Any], Any], targets: bool) -> Any:
    x = move(batch.x)
    parameters = inspect.signature(root.forward).parameters
    places = [parameter for parameter in parameters.values() if parameter.kind in _PLACES]
    if isinstance(x, Mapping):
        every = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        named = {key: value for key, value in x.items() if key in parameters}
        if named:
            return root(**(x if every else named))
        plain = [value for key, value in x.items() if key not in _LABELS]
        if every and not places:
            return root(**x)
        if len(plain) != 1:
            return root(x)
        if isinstance(root, nn.Sequential):
            return root(plain[0])
        try:
            return root(x)
        except Exception as problem:  # a mapping is nothing for its first operation
            try:
                return root(plain[0])
            except Exception:
                raise problem from None
    several = isinstance(x, (list, tuple)) and not _one(x, batch, places)
    arguments = list(x) if several else [x]
    if batch.y is not None and len(arguments) < len(places):
        place = places[len(arguments)]
        if place.default is inspect.Parameter.empty or (targets and place.name in _LABELS):
            arguments.append(move(batch.y))
    return root(*arguments)


def inputs_of(root: Any, *, labels: bool = False) -> int:
    """How many arguments ``forward`` needs: so many first items of a longer batch are inputs.

    With ``labels`` those count whose names are labels': a condition, or for a loss of its own.
    """
    places = inspect.signature(root.forward).parameters.values()
    needed = [
        parameter.name
        for parameter in places
        if parameter.kind in _PLACES and parameter.default is inspect.Parameter.empty
    ]
    return max(1, sum(labels or name not in _LABELS for name in needed))


def _one(x: Any, batch: Batch, places: list[Any]) -> bool:
    """Whether a list is one argument, such as the images of a detector."""
    needed = sum(parameter.default is inspect.Parameter.empty for parameter in places)
    if not places or len(x) < needed or needed > 1:
        return False
    beside = isinstance(batch.y, (list, tuple)) and len(batch.y) == len(x)
    kept = isinstance(batch.x, (list, tuple)) and isinstance(batch.x[0], torch.Tensor)
    return beside or kept or len(x) > len(places)


def takes_targets(root: Any) -> bool:
    """Whether ``forward`` has a place for labels behind its inputs."""
    names = inspect.signature(root.forward).parameters
    return any(name in _LABELS for name in names)


def needs_targets(root: Any) -> bool:
    """Whether ``forward`` cannot be called without labels."""
    places = inspect.signature(root.forward).parameters.values()
    return any(p.name in _LABELS and p.default is inspect.Parameter.empty for p in places)


class Question:
    """What is asked of a model: its own loss, a loss of outputs and labels, or the user's step.

    Args:
        loss: As for :func:`frostline.adapters.torch.loss.as_callable`; ``None``: the model's own.
        step: ``step(model, batch)``; see :func:`frostline.adapters.torch.loss.read_losses`.
        whole: Losses are asked of the batch, as a training does, never of single samples.
    """

    def __init__(self, loss: Any, step: Any, *, whole: bool = False) -> None:
        self._step = step
        self.steps = step is not None
        #: The step has called ``train()`` on a model in inference mode.
        self.trains = False
        self._loss = None if loss is None else as_callable(loss)
        # Whether a loss of single samples is the loss of the batch.
        self._sliced: bool | None = False if whole else None

    @property
    def of_parameters(self) -> bool:
        """Whether the step needs gradients of the model's parameters."""
        return isinstance(self._step, WithGradients) and self._step.of_parameters

    def with_gradients_of_parameters(self) -> Question | None:
        """The same with gradients of the parameters; ``None``: there is no step, or it has them."""
        if not self.steps or isinstance(self._step, WithGradients):
            return None
        found = copy.copy(self)
        found._step = WithGradients(self._step, of_parameters=True)
        return found

    def may_differentiate(self, problem: Exception) -> bool:
        """Whether the step runs with gradients from now on, since it failed without them."""
        step = with_gradients(self._step, problem)
        self._step = step or self._step
        return step is not None

    def answer(
        self, root: Any, batch: Batch, move: Callable[[Any], Any], *, first: bool = False
    ) -> tuple[Any, Judged]:
        """Outputs and losses of one batch.

        Args:
            root: The module, in the mode in which it is asked.
            batch: The batch.
            move: Arrays and tensors -> tensors where the model is.
            first: Of several outputs only the first is judged.

        Raises:
            ModelError: There is no loss.
            DataError: The loss does not take these outputs and labels.
        """
        if self._step is not None:
            found = call(root, batch, move, step=self._step, trains=self._notice_train)
            return None, read_losses(found)
        outputs = call(root, batch, move, targets=self._loss is None or root.training)
        if first and isinstance(outputs, (tuple, list)):
            outputs = outputs[0]
        if self._loss is None:
            return outputs, self._own(root, outputs)
        labels = batch.y
        if labels is None and isinstance(batch.x, Mapping):
            labels = next((batch.x[key] for key in _LABELS if key in batch.x), None)
        with outside_kept(root):  # a loss may keep a state of its own, as the centre of DINO
            found, sliced = judged(self._loss, outputs, move(labels), self._sliced)
        if self._sliced is None and (len(found.losses) > 1 or not sliced):
            self._sliced = sliced
        if batch.sample_weight is not None:
            if found.unit == "batch":
                raise DataError(
                    "sample weights need a loss per sample, and this one is of the whole batch; "
                    "leave the weights out, or pass step=. Received: sample weights"
                )
            weights = move(batch.sample_weight).to(found.losses.dtype)
            found = dataclasses.replace(found, losses=found.losses * weights)
        return outputs, found

    def _notice_train(self) -> None:
        self.trains = True

    def _own(self, root: Any, outputs: Any) -> Judged:
        """The loss that the model computes itself."""
        own = outputs.get("loss") if isinstance(outputs, Mapping) else None
        own = getattr(outputs, "loss", None) if own is None else own
        if isinstance(own, torch.Tensor):
            return read_losses(own)
        if isinstance(outputs, torch.Tensor) and outputs.ndim == 0 and needs_targets(root):
            return read_losses(outputs)
        if root.training:
            if isinstance(outputs, torch.Tensor) and outputs.ndim == 0:
                return read_losses(outputs)
            values = list(outputs.values()) if isinstance(outputs, Mapping) else []
            if values and all(isinstance(v, torch.Tensor) and v.numel() == 1 for v in values):
                return read_losses(outputs)
        raise ModelError(
            "a torch module has no compiled loss: pass loss=, for example "
            "torch.nn.CrossEntropyLoss(), or step=. Received: loss=None"
        )
