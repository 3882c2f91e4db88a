"""What is installed, and which Keras backend a command will use. Imports no framework.

Keras reads its backend once, when it is first imported, from ``KERAS_BACKEND`` or from its
configuration file. A command line tool has to settle that before anything imports Keras.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from frostline.types import BackendError

#: Keras backend -> the distributions that bring it, in order of preference.
BACKENDS = {
    "tensorflow": ("tensorflow", "tensorflow-cpu"),
    "jax": ("jax",),
    "torch": ("torch",),
}

#: What to say where there is none.
HOW_TO_INSTALL = "no Keras backend is installed. Install one of: " + ", ".join(
    f'pip install "frostline[{name}]"' for name in BACKENDS
)

#: The oldest Keras that Frostline works with; in older ones files can run code.
OLDEST_KERAS = (3, 12)

#: Distributions whose versions matter when a number has to be reproduced.
_DISTRIBUTIONS = ("frostline", "keras", "numpy", "scipy", "tensorflow", "tensorflow-cpu", "jax",
                  "torch", "scikit-learn", "matplotlib")  # fmt: skip


def has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16; where it does not say so: no."""
    try:
        said = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(said)


def installed_backends() -> tuple[str, ...]:
    """Return the Keras backends that can be imported here; empty without Keras itself."""
    if not _importable("keras"):
        return ()
    return tuple(name for name in BACKENDS if _importable(name))


def choose_backend(requested: str | None = None) -> str:
    """Settle the Keras backend of this process and export it as ``KERAS_BACKEND``.

    Order: the argument, ``KERAS_BACKEND``, the ``backend`` of Keras' configuration file if that
    one is installed, then the first installed one of tensorflow, jax, torch.

    Args:
        requested: ``"tensorflow"``, ``"jax"``, ``"torch"`` or ``None``.

    Returns:
        The backend's name.

    Raises:
        BackendError: If none is installed, the wanted one is not, Keras is too old, or it is
            already running on another one.
    """
    name, origin = _wanted(requested)
    available = installed_backends()
    if available and "keras" in (known := versions()):
        refuse_old_keras(known["keras"])
    if not available:
        raise BackendError(HOW_TO_INSTALL)
    if name is None:
        name = available[0]
    if name not in BACKENDS:
        raise BackendError(
            f"unknown Keras backend; allowed: {', '.join(BACKENDS)}. Received: {origin}={name!r}"
        )
    if name not in available:
        raise BackendError(
            f'Keras backend {name!r} ({origin}) is not installed: pip install "frostline[{name}]". '
            f"Installed: {', '.join(available)}"
        )
    running = _running_backend()
    if running is not None and running != name:
        raise BackendError(f"Keras already runs on {running!r} in this process; wanted {name!r}")
    os.environ["KERAS_BACKEND"] = name
    return name


def refuse_old_keras(version: str) -> None:
    """Refuse a Keras in which a model file can run code.

    Args:
        version: Of the Keras at hand, as in ``keras.__version__``.

    Raises:
        BackendError: It is older than :data:`OLDEST_KERAS`.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_KERAS:
        oldest = ".".join(map(str, OLDEST_KERAS))
        raise BackendError(
            f"Keras {version} is too old: Frostline needs {oldest} or newer, because a model file "
            f'can run code in older ones: pip install --upgrade "keras>={oldest}"'
        )


def how_backend_is_chosen() -> str:
    """Return one sentence: which backend a command would use now, and why."""
    available = installed_backends()
    name, origin = _wanted(None)
    if not available:
        return "none: no Keras backend is installed"
    if name is None:
        return f"{available[0]} (first installed of {', '.join(BACKENDS)})"
    if name not in available:
        return f"{name} ({origin}), which is not installed"
    return f"{name} ({origin})"


def quiet_frameworks() -> None:
    """Silence the start-up chatter of native libraries, unless the user asked for it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("ABSL_MIN_LOG_LEVEL", "3")
    if os.environ.get("FROSTLINE_LOG_LEVEL") != "debug":
        for name in ("absl", "tensorflow", "jax"):
            logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def native_noise_held_back() -> Iterator[None]:
    """Hold back what native libraries write to standard error while they are loaded.

    TensorFlow logs before its log level is read, so no variable silences it. If the block fails,
    all of it is shown after all.
    """
    sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(kept, held.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)


def versions() -> dict[str, str]:
    """Return the versions of the installed distributions that shape a result."""
    found: dict[str, str] = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def facts() -> dict[str, object]:
    """Return what a result must record about this machine: versions, backend, cores."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": usable_cores(),
        "backend": _running_backend() or os.environ.get("KERAS_BACKEND"),
        "versions": versions(),
    }


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cache_folder() -> Path:
    """Return ``FROSTLINE_CACHE_DIR``, or ``frostline`` in the user's cache folder."""
    named = os.environ.get("FROSTLINE_CACHE_DIR")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frostline"


def _wanted(requested: str | None) -> tuple[str | None, str]:
    """Return the backend that was asked for, and where; a configuration file only advises."""
    if requested:
        return requested, "--backend"
    if os.environ.get("KERAS_BACKEND"):
        return os.environ["KERAS_BACKEND"], "KERAS_BACKEND"
    configured = _configured_backend()
    if configured in installed_backends():
        return configured, "keras.json"
    return None, ""


def _configured_backend() -> str | None:
    home = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras")
    try:
        content = json.loads((home / "keras.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    backend = content.get("backend") if isinstance(content, dict) else None
    return backend if isinstance(backend, str) else None


def _importable(name: str) -> bool:
    if sys.modules.get(name) is not None:
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _running_backend() -> str | None:
    keras = sys.modules.get("keras")
    if keras is None:
        return None
    return str(keras.backend.backend())
