"""The pytest plugin: tests that fail when a frozen BN layer trains.

``@pytest.mark.frozen(until="layer2")`` watches the model that the test gets from a fixture. The
fixture ``frostline`` watches any other: ``frostline.keep_frozen(model, until="layer2")``. At the
end of the test no BN layer before the boundary may have moved, and each must still be frozen.

Nothing is imported before a test asks for it, so that pytest starts as fast as without the plugin.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest

_KEPT = pytest.StashKey[list[Callable[[], None]]]()


class Keeper:
    """What the fixture ``frostline`` gives: the package, and :meth:`keep_frozen`."""

    def __init__(self, checks: list[Callable[[], None]]) -> None:
        self._checks = checks

    def keep_frozen(self, model: Any, until: Any = None) -> None:
        """Fail the test, at its end, if BN before a boundary moved or is not frozen.

        Args:
            model: A Keras model or a torch module.
            until: As in :func:`frostline.assert_frozen`.
        """
        self._checks.append(_watched(model, until))

    def __getattr__(self, name: str) -> Any:
        import frostline

        return getattr(frostline, name)


def pytest_configure(config: pytest.Config) -> None:
    """Describe the marker."""
    config.addinivalue_line(
        "markers",
        "frozen(until=None, model=None): BN layers of the fixture named by model (default: 'model' "
        "or 'net') before the boundary are frozen at the end of the test, and did not move",
    )


@pytest.fixture
def frostline(request: pytest.FixtureRequest) -> Keeper:
    """The package Frostline, and ``keep_frozen(model, until=...)``."""
    return Keeper(request.node.stash.setdefault(_KEPT, []))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Check at the end of a test what it promised to keep frozen."""
    marker = item.get_closest_marker("frozen")
    if marker is not None:
        checks = item.stash.setdefault(_KEPT, [])
        settings = {"until": None, "model": None, **marker.kwargs}
        checks.append(_watched(_model(item, settings["model"]), settings["until"]))
    result = yield
    for check in item.stash.get(_KEPT, []):
        check()
    return result


def _watched(model: Any, until: Any = None) -> Callable[[], None]:
    from frostline.verbs.watch import NotFrozenError, assert_frozen, watching_of

    watching = watching_of(model)

    def check() -> None:
        __tracebackhide__ = True
        try:
            watching.require_unmoved(until)
            assert_frozen(model, until=until)
        except NotFrozenError as problem:
            pytest.fail(str(problem), pytrace=False)

    return check


def _model(item: pytest.Item, model: str | None) -> Any:
    """The fixture's value that a marker means."""
    given: dict[str, Any] = getattr(item, "funcargs", {})
    for name in ("model", "net") if model is None else (model,):
        if name in given:
            return given[name]
    wanted = "'model' or 'net', or one named by model=" if model is None else repr(model)
    raise pytest.UsageError(
        f"@pytest.mark.frozen needs the model as a fixture of the test: {wanted}. "
        f"Received: fixtures {sorted(given)} in {item.nodeid}"
    )
