"""``frostline merge-statistics``: one set of statistics from several replicas."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from frostline.cli.options import BackendOption, OutputOptions, command, names


@command
def merge_statistics(
    replicas: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Two or more of one kind: .pt, .pth or .safetensors files with a state_dict, or "
            ".keras or .h5 files.",
        ),
    ],
    target: OutputOptions,
    weights: Annotated[
        str | None,
        typer.Option(help="One number per file, separated by commas; equal when not given."),
    ] = None,
    backend: BackendOption = None,
) -> int:
    """Merge the BN statistics of replicas into the first one, variance between them included."""
    from frostline.adapters import store
    from frostline.cli import model_files
    from frostline.cli.terminal import echo
    from frostline.data import files
    from frostline.types import ModelError
    from frostline.verbs.merge_statistics import merged_states, read_state

    state = replicas[0].suffix not in model_files.KERAS_FILES
    odd = [path for path in replicas if (path.suffix not in model_files.KERAS_FILES) != state]
    if odd or len(replicas) < 2:
        raise ModelError(
            "pass two or more files, all with a state_dict of torch or all with a Keras model. "
            f"Received: {', '.join(map(str, replicas))}"
        )
    suffixes = (*model_files.STATE_FILES, ".safetensors") if state else model_files.KERAS_FILES
    noun = "the state of a torch module" if state else "a model"
    files.check_output(target.output, suffixes, noun, force=target.force, source=str(replicas[0]))
    model_files.start(backend, keras=not state)
    share = None if weights is None else _numbers(weights)
    room = store("torch" if state else "keras")
    found = [room.read_state_file(path) if state else room.load_model(str(path))
             for path in replicas]  # fmt: skip
    merged = merged_states([read_state(path) for path in found], share)
    differing = _differing(found, merged) if state else ()
    if state:
        room.write_state({**found[0], **merged}, target.output, overwrite=target.force)
    else:
        merged.load_into(found[0])
        room.save_model(found[0], target.output, overwrite=target.force)
    echo(f"{target.output}: {merged.text()}")
    if differing:
        echo(
            f"note: '{differing[0]}' and {len(differing) - 1} more are not the same in all files; "
            f"those of {replicas[0]} are written, whose statistics these are not. Merge the "
            "parameters and recalibrate"
        )
    return 0


def _differing(states: list[Any], merged: Any) -> tuple[str, ...]:
    """Names of what is no statistic and not the same in all states."""
    import numpy as np

    from frostline.data.arrays import to_numpy

    def same(name: str) -> bool:
        first = to_numpy(states[0][name])
        return all(
            name in state and np.array_equal(first, to_numpy(state[name])) for state in states[1:]
        )

    return tuple(
        name for name in states[0]
        if name not in merged and hasattr(states[0][name], "shape") and not same(name)
    )  # fmt: skip


def _numbers(text: str) -> list[float]:
    from frostline.types import DataError

    try:
        return [float(name) for name in names([text])]
    except ValueError:
        raise DataError(
            f"weights are numbers separated by commas. Received: --weights {text}"
        ) from None
