"""The public surface of Frostline as plain types: names, signatures, commands, codes.

    python scripts/public_api.py > tests/unit/public_api.json

``tests/unit/test_public_api.py`` compares it with the file, so that a change of the surface is a
decision and never an accident.
"""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

import typer

import frostline as fl


def surface() -> dict[str, Any]:
    """Return every public name with its signature, every command with its options, every code."""
    from frostline.rules import all_rules

    command = typer.main.get_command(_application())
    return {
        "names": {name: _described(getattr(fl, name)) for name in fl.__all__},
        "layers": _members(fl.layers),
        "callbacks": _members(fl.callbacks),
        "commands": dict(sorted(_commands(command, "frostline"))),
        "rules": sorted(f"{rule.code} {rule.name}" for rule in all_rules()),
    }


def _application() -> Any:
    from frostline.cli import app

    return app


def _members(module: Any) -> dict[str, str]:
    names = sorted(name for name in dir(module) if name[0].isupper())
    return {name: _described(getattr(module, name)) for name in names}


def _described(value: Any) -> str:
    if inspect.isclass(value):
        fields = getattr(value, "__dataclass_fields__", None)
        if fields is not None:
            return f"dataclass({', '.join(fields)})"
        if issubclass(value, Exception):
            return "exception(" + ", ".join(kind.__name__ for kind in value.__mro__[1:-3]) + ")"
    if not callable(value):
        return type(value).__name__
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:
        return type(value).__name__
    return "(" + ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) + ")"


def _commands(command: Any, name: str) -> Any:
    options = [" / ".join([*p.opts, *p.secondary_opts]) for p in command.params]
    yield name, sorted(options)
    for child, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, f"{name} {child}")


if __name__ == "__main__":
    json.dump(surface(), sys.stdout, indent=1, sort_keys=True)
    sys.stdout.write("\n")
