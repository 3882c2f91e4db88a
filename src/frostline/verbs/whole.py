"""A verb that is interrupted, by an error, by Ctrl-C or by anything else, has changed nothing."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from typing import Any, TypeVar, cast

from frostline.adapters import adapter_of
from frostline.atomic import Guard, generators, modes, surroundings, taken_back

Verb = TypeVar("Verb", bound=Callable[..., Any])


def whole(verb: Verb) -> Verb:
    """Let a verb, whose first argument is the model, do all or nothing.

    This is the last frame before the user's own, so that a signal that arrives when the work is
    done, and the verb about to return, still takes all of it back.
    """

    @functools.wraps(verb)
    def run(model: Any, *args: Any, **kwargs: Any) -> Any:
        adapter = adapter_of(model)
        given = (*args, *kwargs.values())
        # Of loaders that have a generator of their own; of all others the verbs take care.
        drawn = [adapter.generators(x) for x in given if getattr(x, "generator", None) is not None]
        guard = Guard(adapter.snapshot(), surroundings(), *drawn)
        blocks = (modes(), adapter.modes(), *drawn)
        try:
            made = verb(model, *args, **kwargs)
            for left in blocks:  # an error that the verb took may have hit their exit
                left()
            return made
        except BaseException:
            try:
                guard.undo()
            except BaseException:
                guard.undo()  # the first one may not have reached its first line
                raise
            raise

    return cast(Verb, run)


def draws_nothing(verb: Verb) -> Verb:
    """Let a verb put the random generators back: a ``DataLoader`` draws a seed for each reading."""

    @functools.wraps(verb)
    def run(model: Any, *args: Any, **kwargs: Any) -> Any:
        with taken_back(generators()), taken_back(adapter_of(model).generators()):
            return verb(model, *args, **kwargs)

    return cast(Verb, run)


def brief(verb: Verb) -> Verb:
    """Let Python's collector of garbage wait for the end of a verb that only looks.

    It would go through a model of thousands of layers several times, which takes longer than the
    look, and find nothing.
    """

    @functools.wraps(verb)
    def run(*args: Any, **kwargs: Any) -> Any:
        with taken_back(gc.enable if gc.isenabled() else gc.disable):
            gc.disable()
            return verb(*args, **kwargs)

    return cast(Verb, run)
