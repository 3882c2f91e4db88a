"""The public names of ``frostline`` are the ones listed, and every one of them is there."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import pytest

import frostline

pytestmark = pytest.mark.once


def test_all_is_the_sorted_list_of_exports() -> None:
    assert frostline.__all__ == sorted([*frostline._EXPORTS, "__version__"])


def test_type_checkers_see_the_same_names() -> None:
    source = inspect.getsource(frostline)
    block = source[source.index("if TYPE_CHECKING") : source.index("__version__ = ")]
    shown = {name for name, again in re.findall(r"(\w+) as (\w+)", block) if name == again}
    assert shown == set(frostline._EXPORTS)


def test_dir_shows_the_public_names_and_nothing_else() -> None:
    assert dir(frostline) == frostline.__all__


@pytest.mark.parametrize("name", frostline.__all__)
def test_every_public_name_resolves_to_what_its_module_defines(name: str) -> None:
    value = getattr(frostline, name)
    if name == "__version__":
        assert isinstance(value, str)
        return
    module = importlib.import_module(f"frostline.{frostline._EXPORTS[name]}")
    if frostline._EXPORTS[name] == name:
        assert value is module
    else:
        assert value is getattr(module, name)
        assert value.__module__ == module.__name__, "export it from where it is defined"


@pytest.mark.parametrize("name", sorted(set(frostline.__all__) - {"__version__"}))
def test_every_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(frostline, name))


def test_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="'frostline' has no attribute 'recalibrat'"):
        frostline.recalibrat  # noqa: B018


def test_no_module_is_hidden_by_a_function_of_the_same_name() -> None:
    """``frostline.sites`` cannot be both a function and a file; the import order would decide."""
    modules = {module.name for module in pkgutil.iter_modules(frostline.__path__)}
    functions = {name for name, module in frostline._EXPORTS.items() if name != module}
    assert modules & functions == set()
