"""Options that several commands share, one by one and in groups, and how values are read.

A command's function takes single options and groups; `command` spreads each group out, so that
typer sees the options themselves. Imports only typer: no framework is loaded for a help page.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer


class Backend(StrEnum):
    """Keras backends."""

    tensorflow = "tensorflow"
    jax = "jax"
    torch = "torch"


class Format(StrEnum):
    """How a result is printed."""

    text = "text"
    json = "json"


class ReportFormat(StrEnum):
    """How a report is printed; the last three are for CI services."""

    text = "text"
    json = "json"
    html = "html"
    github = "github"
    sarif = "sarif"
    junit = "junit"


class Precision(StrEnum):
    """What the frozen part is computed in."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Split(StrEnum):
    """Part of a data source."""

    train = "train"
    test = "test"
    all = "all"


class Weights(StrEnum):
    """Where a backbone's weights come from."""

    pretrained = "pretrained"
    none = "none"


DATA_HELP = (
    "Image folder, Hugging Face parquet file or folder, .npz, digits, or cifar10. Arrays x and y "
    "of an .npz go to the model as they are; images with the channels last are moved, with a note, "
    "for a model that takes them on axis 1 only."
)
ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A .keras, .h5, .pt2 or TorchScript file, or module:function."
    ),
]
BackendOption = Annotated[
    Backend | None,
    typer.Option(help="Keras backend; otherwise KERAS_BACKEND, or the first one installed."),
]
FormatOption = Annotated[Format, typer.Option("--format", help="How to print the result.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]
ClassesOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME...",
        help="Classes to use, in the order of their labels: "
        "--classes cat dog. All classes when not given.",
    ),
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seeds every random choice.")]
CacheOption = Annotated[
    Path | None,
    typer.Option("--cache", help="Cache folder; else FROSTLINE_CACHE_DIR or the user's own."),
]
PrecisionOption = Annotated[
    Precision,
    typer.Option(help="What the frozen part is computed in; bfloat16 where the processor has it."),
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Samples per forward pass.")]
#: Of the experiments.
ImageSize = Annotated[int, typer.Option(min=8, max=8192, help="Side in pixels.")]
LossOption = Annotated[
    str | None,
    typer.Option(
        help="Name of a loss, else the compiled one; for torch also module:function, called with "
        "outputs and targets."
    ),
]
SitesOption = Annotated[
    str, typer.Option(help="unfrozen, frozen, all, a path, a name, or a pattern.")
]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """MODEL and what it is read with."""

    model: ModelArgument
    state: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="state_dict of the torch module that module:function returns; it is read with "
            "weights_only=True.",
        ),
    ] = None
    backend: BackendOption = None


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How DATA becomes ``x`` and ``y``; ``seed`` is that of the choice and the order."""

    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)]
    classes: ClassesOption = None
    per_class: Annotated[int | None, typer.Option(min=1, help="Images per class.")] = None
    image_size: Annotated[
        int | None,
        typer.Option(min=1, max=8192, help="Side in pixels; else the model's input size."),
    ] = None
    preprocess: Annotated[
        str | None, typer.Option(help="none (0 to 255), unit (0 to 1), or a backbone's name.")
    ] = None
    split: Annotated[Split, typer.Option(help="Part of the data.")] = Split.train
    seed: SeedOption = 0


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions:
    """What both experiments are run with, and where the results go."""

    backbone: Annotated[
        str, typer.Option(help="efficientnet-lite0|1|2, tiny, or a keras.applications name.")
    ] = "efficientnet-lite0"
    classes: ClassesOption = None
    since: Annotated[
        str | None,
        typer.Option(
            "--boundary",
            metavar="LAYER",
            help="First layer that is fine-tuned: name, path, index, or share; "
            "else the backbone's usual one.",
        ),
    ] = None
    weights: Annotated[Weights, typer.Option(help="Weights of the backbone.")] = Weights.pretrained
    batch_size: Annotated[int, typer.Option(min=2, help="Images per step.")] = 32
    momentum: Annotated[float, typer.Option(min=0.0, help="Momentum of SGD.")] = 0.9
    seed: SeedOption = 0
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the results.")
    ] = None
    force: ForceOption = False
    backend: BackendOption = None

    def settings(self) -> dict[str, Any]:
        """Return the settings by the names that the experiments give them."""
        return {
            "backbone": self.backbone,
            "classes": names(self.classes),
            "boundary": None if self.since is None else boundary(self.since),
            "weights": None if self.weights is Weights.none else self.weights.value,
            "batch_size": self.batch_size,
            "momentum": self.momentum,
            "seed": self.seed,
        }


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """The model file that a command writes."""

    output: Annotated[Path, typer.Option("-o", "--output", help="Model file to write.")]
    force: ForceOption = False


@dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """Which rules are applied."""

    select: Annotated[list[str] | None, typer.Option(help="Codes, prefixes or names.")] = None
    ignore: Annotated[list[str] | None, typer.Option(help="Rules to leave out.")] = None

    def chosen(self) -> dict[str, Any]:
        """Return both as the library's verbs take them, ``None`` for the default.

        Raises:
            ModelError: No rule has such a code or name; so it is said before the model loads.
        """
        from frostline import rules

        select, ignore = names(self.select) or None, names(self.ignore) or None
        rules.select(select, ignore)
        return {"select": select, "ignore": ignore}


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """How a report is printed, and where it is written as well."""

    format: Annotated[ReportFormat, typer.Option("--format", help="How to print.")] = (
        ReportFormat.text
    )
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Also write the report: .html, .json or .txt."),
    ] = None
    force: ForceOption = False
    exit_zero: Annotated[bool, typer.Option("--exit-zero", help="Exit 0 whatever is found.")] = (
        False
    )


def command(function: Callable[..., int]) -> Callable[..., int]:
    """Return a function whose parameters are the options of ``function``, its groups spread out.

    Every parameter is annotated as typer wants it, or with one of the dataclasses above; the
    result still takes such groups as a whole, under the name of the parameter.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        kind = hints[parameter.name]
        if not is_dataclass(kind):
            parameters.append(_parameter(parameter.name, kind, parameter.default))
            continue
        assert isinstance(kind, type)
        groups[parameter.name] = kind
        inner = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(_parameter(field.name, inner[field.name], default))

    @functools.wraps(function)
    def run(**values: Any) -> int:
        arguments = {
            name: kind(**{f.name: values.pop(f.name) for f in fields(kind) if f.name in values})
            for name, kind in groups.items()
        }
        return function(**arguments, **values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {entry.name: entry.annotation for entry in parameters}
    return run


def _parameter(name: str, kind: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def names(values: Sequence[str] | None) -> tuple[str, ...]:
    """Return names given one by one, or separated by commas."""
    return tuple(name for value in values or () for name in value.split(",") if name)


def boundary(text: str) -> str | int | float:
    """Return an index or a share where the text is a number, else the name."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
