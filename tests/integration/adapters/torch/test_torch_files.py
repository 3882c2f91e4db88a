"""A state that is put into its module: what torch's own ``load_state_dict`` does, in less time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from frostline.types import ModelError

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn

from frostline.adapters.torch import files

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Token(nn.Module):
    """Holds a parameter beside a child."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(2, 2)
        self.token = nn.Parameter(torch.ones(2))


class Counting(nn.Module):
    """Stores a number of its own beside its child's tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.number = torch.tensor(1)

    def get_extra_state(self) -> Any:
        return self.number

    def set_extra_state(self, state: Any) -> None:
        self.number = state


class Renamed(nn.Module):
    """Takes the name that its child had in an earlier version."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(2, 2)
        self._register_load_state_dict_pre_hook(self._rename)

    def _rename(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if f"{prefix}old.weight" in state:
            state[f"{prefix}dense.weight"] = state.pop(f"{prefix}old.weight")


class Own(nn.Module):
    """Loads by itself: what it is given doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(2, 2)

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        doubled = {name: value * 2 for name, value in state_dict.items()}
        return super().load_state_dict(doubled, *args, **kwargs)


class Dropping(nn.Sequential):
    """Drops what an earlier version stored."""

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        state.pop(f"{prefix}steps", None)
        super()._load_from_state_dict(state, prefix, *args)


def network() -> nn.Module:
    torch.manual_seed(0)
    tied = nn.Linear(2, 2)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU()),
        Token(),
        nn.ModuleDict({"counting": Counting(), "tied": tied, "again": tied}),
        Renamed(),
        torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))),
        Dropping(nn.Linear(2, 2)),
    )


def renamed(state: dict[str, Any]) -> None:
    state["3.old.weight"] = state.pop("3.dense.weight")


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "fits": lambda state: None,
    "misses one": lambda state: state.pop("0.0.weight"),
    "misses counts": lambda state: (
        state.pop("0.1.num_batches_tracked"),
        state.pop("4.1.num_batches_tracked"),
    ),
    "misses its own": lambda state: state.pop("1.token"),
    "empty": dict.clear,
    "no such child": lambda state: state.update({"7.x": torch.ones(1), "x": torch.ones(1)}),
    "names of children": lambda state: state.update({"0": torch.ones(1), "2.tied": torch.ones(1)}),
    "too deep": lambda state: state.update({"1.dense.x": torch.ones(1), "0.5": torch.ones(1)}),
    "an older name": renamed,
    "what is dropped": lambda state: state.update({"5.steps": torch.ones(1)}),
    "another shape": lambda state: state.update({"0.0.weight": torch.ones(9)}),
}


def asked(load: Callable[[nn.Module, Any], Any], state: dict[str, Any]) -> tuple[Any, nn.Module]:
    """What a load says, its names in order of the alphabet, and the module behind it."""
    module = network()
    try:
        return tuple(map(sorted, load(module, dict(state)))), module
    except RuntimeError:
        return RuntimeError, module


@pytest.mark.parametrize("edit", EDITS)
def test_a_state_is_loaded_as_torch_loads_it(edit: str) -> None:
    state = {name: value + 3 for name, value in network().state_dict().items()}
    EDITS[edit](state)

    theirs, one = asked(lambda module, given: module.load_state_dict(given, strict=False), state)
    ours, other = asked(files._load, state)

    assert ours == theirs
    if theirs is not RuntimeError:  # what does not fit is given up with its module
        filled = other.state_dict()
        assert all(torch.equal(value, filled[name]) for name, value in one.state_dict().items())


def test_a_module_that_loads_by_itself_does_so() -> None:
    module = Own()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    files._load(module, state)
    assert torch.equal(module.dense.weight, state["dense.weight"] * 2)


def test_each_name_is_looked_at_as_often_as_it_has_parts() -> None:
    """Torch looks at every name once per block."""
    looked = 0

    class Name(str):
        def startswith(self, *args: Any) -> bool:
            nonlocal looked
            looked += 1
            return super().startswith(*args)

        def partition(self, *args: Any) -> Any:
            nonlocal looked
            looked += 1
            first, dot, inner = super().partition(*args)
            return first, dot, Name(inner)

    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(1, 1)) for _ in range(100)))
    files._load(blocks, {Name(name): value for name, value in blocks.state_dict().items()})
    assert 0 < looked <= 10 * 200


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ("misses one", "1 missing (0.0.weight)"),
        ("no such child", "2 unexpected (7.x, x)"),
        ("another shape", "size mismatch for 0.0.weight"),
    ],
)
def test_what_does_not_fit_is_named_as_in_the_file(
    edit: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = network().state_dict()
    EDITS[edit](state)
    torch.save(state, tmp_path / "state.pt")
    monkeypatch.setattr(files, "built", lambda source: network())
    with pytest.raises(ModelError) as refusal:
        files.load_model("code_of:network", str(tmp_path / "state.pt"))
    assert said in str(refusal.value)
