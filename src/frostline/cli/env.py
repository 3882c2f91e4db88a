"""``frostline env``: what is installed and what a command would use. Needs no backend."""

from __future__ import annotations

import json
import os
import sys

from frostline import environment
from frostline.cli.options import Format, FormatOption, command

_VARIABLES = ("KERAS_BACKEND", "KERAS_HOME", "FROSTLINE_CACHE_DIR", "FROSTLINE_LOG_LEVEL",
              "CUDA_VISIBLE_DEVICES")  # fmt: skip


@command
def env(format: FormatOption = Format.text) -> int:
    """Show versions, backends and how one is chosen, cores, folders. Needs no backend."""
    from frostline.cli.terminal import echo
    from frostline.report import text

    found = {
        **environment.facts(),
        "executable": sys.executable,
        "backends": list(environment.installed_backends()),
        "backend_choice": environment.how_backend_is_chosen(),
        "cache_folder": str(environment.cache_folder()),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    if format is Format.json:
        echo(json.dumps(found, indent=2))
        return 0
    versions = environment.versions()
    backends = ", ".join(environment.installed_backends()) or environment.HOW_TO_INSTALL
    shown = {
        "frostline": versions.pop("frostline", "not installed"),
        "python": f"{found['python']} ({found['system']})",
        "cores": found["cores"],
        **versions,
        "Keras backends": backends,
        "backend used": found["backend_choice"],
        "cache folder": found["cache_folder"],
    }
    text.console().print(text.facts(shown))
    return 0
