"""What every job on Ray needs: Ray itself, the columns of a data set, a model on a worker."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from frostline.adapters import Adapter, prefix as prefixes
from frostline.types import Array, BackendError, DataError, FrostlineError, ModelError
from frostline.types.reasons import first_line

#: Columns that name samples, where ``ids`` does not say.
IDS = ("id", "path")
#: Columns that hold the inputs, where ``inputs`` does not say and several could.
INPUTS = ("image", "x", "data")
#: Seconds in which something must answer at the address of a cluster.
_ANSWER_S = 5.0

#: How a traceback ends, other than with an error of Ray's own.
_RAISED = re.compile(r"(?!ray\.)[A-Za-z_][\w.]*(Error|Exception)\b")

#: Name or names of columns; a mapping from names of the model's inputs to columns.
Inputs = str | Sequence[str] | Mapping[str, str]


def require_ray() -> Any:
    """Import Ray with Ray Data, or say how to get it.

    Raises:
        BackendError: It is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise BackendError('frostline.scale needs Ray: pip install "frostline[ray]"') from error
    return ray


def connect(address: str | None = None) -> Any:
    """Connect to Ray, for a script that does not call ``ray.init`` itself.

    Args:
        address: ``None``: what this process is connected to already, else the variable
            ``RAY_ADDRESS``, else Ray on this machine alone; ``"auto"``: what it is connected to,
            else the cluster that runs on this machine; ``HOST:PORT``: its head.

    Returns:
        The module ``ray``.

    Raises:
        BackendError: Ray is not installed.
        FrostlineError: Nothing answers there, or this process is connected to another cluster.
    """
    ray = require_ray()
    if not (address is None or isinstance(address, str)):
        raise FrostlineError(
            f"the address of a cluster is text, HOST:PORT or 'auto'. Received: {address!r}"
        )
    if ray.is_initialized():
        if address not in (None, "auto"):
            _require_connected(ray, address)
        return ray
    if address is not None and address != "auto":
        _require_answer(address)
    alone = address is None and not os.environ.get("RAY_ADDRESS")
    try:
        ray.init(
            address="local" if alone else address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            include_dashboard=False if address is None else None,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise FrostlineError(
            f"cannot connect to Ray: {first_line(error)}. Start it with 'ray start --head', or "
            f"leave the address out for this machine alone. Received: {address!r}"
        ) from error
    return ray


def _require_connected(ray: Any, address: str) -> None:
    """Refuse another cluster than the one of this process, which has one connection at a time."""
    here = ray.get_runtime_context().gcs_address
    host, port = _place(here)
    wanted, other = _place(address)
    client = address.startswith("ray://")  # a door of the same head, with a port of its own
    if host == wanted and (client or port == other):
        return
    raise FrostlineError(
        f"this process is connected to Ray at {here} already, and has one connection at a time: "
        f"leave the address out to use it, or call ray.shutdown() first. Received: {address!r}"
    )


def _place(address: str) -> tuple[str, str]:
    """Host, by its number, and port; all names of this machine are one."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    host = host.strip("[]")
    with contextlib.suppress(OSError):
        host = socket.gethostbyname(host)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as door:
            door.bind((host, 0))  # only an address of this machine can be bound
            host = "127.0.0.1"
    return host, port


def _require_answer(address: str) -> None:
    """Ask for a connection first: Ray itself would wait for minutes, and then end the process."""
    plain = address.removeprefix("ray://")
    host, _, port = plain.rpartition(":")
    try:
        if not host or not port.isdecimal():
            raise OSError("it is no HOST:PORT")
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise FrostlineError(
            f"no Ray cluster answers at {plain} ({first_line(error)}). 'ray start --head' prints "
            f"the address of one. Received: {address!r}"
        ) from error


def require_dataset(ray: Any, dataset: Any) -> None:
    """Raise for what is no data set of Ray's.

    Raises:
        DataError: It is none.
    """
    if not isinstance(dataset, ray.data.Dataset):
        raise DataError(
            "the data are a ray.data.Dataset, for example ray.data.read_images(folder, "
            "include_paths=True); arrays in memory go to fl.cache_features and fl.recalibrate. "
            f"Received: {type(dataset).__name__}"
        )


def require_counts(**counts: Any) -> None:
    """Raise for what is no whole number of at least one; ``None`` is allowed.

    Raises:
        DataError: One is something else.
    """
    for name, count in counts.items():
        whole = isinstance(count, int | np.integer) and not isinstance(count, bool)
        if count is not None and not (whole and count >= 1):
            raise DataError(f"{name} must be a whole number of at least 1. Received: {count!r}")


# --- columns --------------------------------------------------------------------------------------


def id_column(columns: Sequence[str], ids: str | None) -> str:
    """Name of the column that names the samples.

    Raises:
        DataError: There is none.
    """
    for name in IDS if ids is None else (ids,):
        if name in columns:
            return name
    raise DataError(
        "the data set has no column of ids, by which a job goes on where it was and drops what "
        "came twice. ray.data.read_images(..., include_paths=True) gives 'path'; elsewhere name "
        "a column of unique numbers or strings with ids=. "
        f"Received: ids={ids!r}, columns {', '.join(columns) or 'none'}"
    )


def input_columns(columns: Sequence[str], inputs: Inputs | None, ids: str | None = None) -> Inputs:
    """Names of the columns that the model takes.

    Raises:
        DataError: They are not there, or could be several.
    """
    if inputs is None:
        left = [name for name in columns if name not in (ids, "label", *IDS)]
        known = [name for name in INPUTS if name in left]
        if len(left) != 1 and not known:
            raise DataError(
                "which column does the model take? Name it with inputs=. "
                f"Received: inputs=None, columns {', '.join(columns) or 'none'}"
            )
        return known[0] if known else left[0]
    several = isinstance(inputs, Mapping | Sequence)
    names = names_of(inputs) if several else [inputs]
    if not all(isinstance(name, str) for name in names):
        raise DataError(
            "inputs names the columns: text, a list of it, or a mapping from the model's inputs. "
            f"Received: inputs={inputs!r}"
        )
    missing = [name for name in names if name not in columns]
    if missing:
        raise DataError(
            f"the data set has no column {missing[0]!r}. "
            f"Received: inputs={inputs!r}, columns {', '.join(columns) or 'none'}"
        )
    return inputs


def names_of(inputs: Inputs) -> list[str]:
    """The columns, as a list."""
    if isinstance(inputs, str):
        return [inputs]
    return list(inputs.values() if isinstance(inputs, Mapping) else inputs)


def picked(batch: Mapping[str, Any], inputs: Inputs) -> Any:
    """Model inputs of a batch of columns: an array, a tuple of arrays, or a mapping.

    Raises:
        DataError: A column is missing, or its samples have several shapes.
    """
    for name in names_of(inputs):
        if name not in batch:
            raise DataError(
                f"the data set has no column {name!r}. Received: {', '.join(batch) or 'none'}"
            )
        if np.asarray(batch[name]).dtype == object:
            raise DataError(
                f"the samples in column {name!r} have several shapes or are no arrays: "
                "ray.data.read_images(..., size=(224, 224), mode='RGB') makes images alike, "
                "dataset.map decodes others. Received: dtype object"
            )
    if isinstance(inputs, str):
        return batch[inputs]
    if isinstance(inputs, Mapping):
        return {name: batch[column] for name, column in inputs.items()}
    return tuple(batch[name] for name in inputs)


# --- models on workers ----------------------------------------------------------------------------


def packed(ray: Any, model: Any) -> Any:
    """Put a model into Ray's object store, once for all workers; returns the reference.

    Raises:
        ModelError: It cannot be sent to another process.
    """
    try:
        with prefixes.exactly(model):
            return ray.put(model)
    except Exception as error:  # whatever the pickling of a user's class raises
        raise ModelError(
            f"the model cannot be sent to workers ({first_line(error)}): Ray pickles it. Move what "
            "cannot be pickled (locks, open files, lambdas in a Keras layer) out of it. "
            f"Received: {type(model).__name__}"
        ) from error


def surroundings(adapter: Adapter) -> dict[str, Any]:
    """Options of Ray for workers that run this model: Keras' backend is chosen by a variable."""
    if adapter.framework != "keras":
        return {}
    return {"runtime_env": {"env_vars": {"KERAS_BACKEND": adapter.backend}}}


def workers(ray: Any, actors: Any, gpus: Any) -> tuple[int, float]:
    """How many workers, and GPUs for each: one where the cluster has some.

    Raises:
        DataError: No numbers.
        FrostlineError: The cluster has not as many.
    """
    require_counts(actors=actors)
    if gpus is not None and not (isinstance(gpus, int | float) and gpus >= 0):
        raise DataError(f"num_gpus must be a number of at least 0. Received: {gpus!r}")
    has = ray.cluster_resources()
    each = (1.0 if has.get("GPU") else 0.0) if gpus is None else gpus
    most = int(has.get("CPU", 1)) if not each else int(has.get("GPU", 0) / each)
    wanted = most if actors is None else actors
    if not 1 <= wanted <= most:
        raise FrostlineError(
            f"the cluster has room for {most} workers with one CPU"
            f"{f' and {each:g} GPU' if each else ''} each. Received: actors={actors}, "
            f"num_gpus={gpus}"
        )
    return wanted, each


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raise what a worker raised as what it is, and what Ray says of itself in one line."""
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        cause: Any = error
        while cause is not None:
            if isinstance(cause, FrostlineError) and not isinstance(cause, RayError):
                raise type(cause)(str(cause)) from error
            cause = getattr(cause, "cause", None) or cause.__cause__
        lines = [line for line in str(error).splitlines() if line.strip()]
        raised = [line for line in lines if _RAISED.match(line)]  # by the user's own code, first
        reason = [*raised[:1], *lines[-1:], type(error).__name__][0].strip(" .")
        raise FrostlineError(
            f"a worker of Ray failed: {reason}. What was complete is kept; run it again and it "
            "goes on from there"
        ) from error


def rows(value: Any, chosen: Array) -> Any:
    """Rows of the inputs, copied: what Ray hands out cannot be written to."""
    from frostline.data.arrays import map_leaves

    return map_leaves(lambda leaf: np.asarray(leaf)[chosen], value)
