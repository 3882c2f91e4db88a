"""Lock a torch BN module to its stored statistics so that nothing but :func:`thaw` undoes it.

``requires_grad=False`` freezes gamma and beta only, ``eval()`` is undone by the next ``train()`` of
any parent, and ``track_running_stats=False`` switches to batch statistics. A locked module keeps
its identity: the same object with the same parameters and buffers (an optimizer built earlier stays
valid), and ``isinstance`` of the class it had. What changes is its class, to a subclass of the same
name whose ``forward`` always uses the stored statistics; ``repr`` says ``locked``.

The subclass is made on demand for any BN class, also a user's own, and is never looked up by name:
``deepcopy`` and ``pickle`` (``torch.save`` of a module) go through :func:`_new`.
"""

from __future__ import annotations

from typing import Any


class Locked:
    """What a locked module does differently; mixed in before the module's own class."""

    training: bool

    def train(self, mode: bool = True) -> Any:
        """Set the mode of the children, if any; the module itself stays in inference."""
        super().train(mode)  # type: ignore[misc]
        self.training = False
        return self

    def reset_running_stats(self) -> None:
        """Keep the statistics: `update_bn` and others would start them anew."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Normalise with the stored statistics, whatever the flags say at this moment."""
        module: Any = self
        # The flags are public: other tools set them to "freeze" or to "recalibrate".
        before = module.training, getattr(module, "track_running_stats", None)
        if before in ((False, True), (False, None)):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        module.training = False
        if before[1] is not None:
            module.track_running_stats = True
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            module.training = before[0]
            if before[1] is not None:
                module.track_running_stats = before[1]

    def extra_repr(self) -> str:
        """The class's own text with ``locked``."""
        own = super().extra_repr()  # type: ignore[misc]
        return f"{own}, locked" if own else "locked"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Rebuild from the class that it had: the locked one cannot be found by its name."""
        return _new, (unlocked_class(type(self)),), dict(vars(self))


def is_locked(module: Any) -> bool:
    """Whether the module is locked to its stored statistics by Frostline."""
    return isinstance(module, Locked)


def lock(module: Any) -> None:
    """Lock a module that has stored statistics, in place."""
    if not is_locked(module):
        module.__class__ = _locked_class(type(module))
        module.training = False


def unlock(module: Any, *, training: bool) -> None:
    """Give a module back the class it had, in place, and set its mode."""
    if is_locked(module):
        module.__class__ = unlocked_class(type(module))
        module.training = training


def unlocked_class(kind: type) -> type:
    """The class that a locked class was made from; any other class is returned as it is."""
    return kind.__mro__[2] if issubclass(kind, Locked) and kind is not Locked else kind


_MADE: dict[type, Any] = {}


def _locked_class(kind: type) -> Any:
    if kind not in _MADE:
        _MADE[kind] = _made_locked(kind)
    return _MADE[kind]


def _made_locked(kind: type) -> Any:
    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (Locked, kind), names)


def _new(kind: type) -> Any:
    """An empty locked module of a class, to be filled by the unpickler or by ``deepcopy``."""
    made: Any = _locked_class(kind)
    return made.__new__(made)
