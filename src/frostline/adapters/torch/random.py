"""Random generators of a torch program, Python's and numpy's too: remembered, and put back."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

from frostline.atomic import generators as of_python, taken_back

Given = ParamSpec("Given")
Made = TypeVar("Made")


def own_generators(data: Any) -> list[Any]:
    """The generators of a ``DataLoader`` and its samplers."""
    holders = (getattr(data, name, None) for name in ("sampler", "batch_sampler"))
    found = {
        id(generator): generator
        for holder in (data, *holders)
        if isinstance(generator := getattr(holder, "generator", None), torch.Generator)
    }
    return list(found.values())


def generators(data: Any = None) -> Callable[[], None]:
    """Remember the default generators and those of a ``DataLoader``; returns what restores them."""
    own = own_generators(data)
    states = [(generator, generator.get_state()) for generator in own]
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore() -> None:
        for generator, state in states:
            generator.set_state(state)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return restore


def forked() -> AbstractContextManager[None]:
    """Put the default generators back on any exit from a block.

    ``torch.random.fork_rng`` would do so once more when an interrupted block's frame is freed, with
    what it met inside of other blocks, which are left by then.
    """
    own, python = generators(), of_python()

    def back() -> None:
        own()
        python()

    return taken_back(back)


def draws_nothing(function: Callable[Given, Made]) -> Callable[Given, Made]:
    """Let a function that runs the model's code put the default generators back."""

    @functools.wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        with forked():
            return function(*args, **kwargs)

    return run


def seeded(seed: int) -> None:
    """Start all that a forward may draw from: torch, Python and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
