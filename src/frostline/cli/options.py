"""What may stand behind a command: option types, their help, and how values are read.

Only typer here: every command's signature is built from these, before any framework is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

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


class Split(StrEnum):
    """Part of a data source."""

    train = "train"
    test = "test"
    all = "all"


class FrozenPolicy(StrEnum):
    """What a frozen BN layer does in training."""

    inference = "inference"
    batch = "batch"
    update = "update"


class Weights(StrEnum):
    """Where a backbone's weights come from."""

    pretrained = "pretrained"
    none = "none"


class Solver(StrEnum):
    """Optimizers of the experiments."""

    sgd = "sgd"
    rmsprop = "rmsprop"
    adam = "adam"


class ReportFormat(StrEnum):
    """How a report is printed; ``github`` makes annotations of it."""

    text = "text"
    json = "json"
    html = "html"
    github = "github"


class Method(StrEnum):
    """How recalibration measures: site by site, or all sites in one pass."""

    sequential = "sequential"
    batch = "batch"


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A .keras, .h5, .pt2 or TorchScript file, or module:function."
    ),
]
StateOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="state_dict of the torch module that module:function returns; it is read with "
        "weights_only=True.",
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
SeedOption = Annotated[int, typer.Option(min=0, help="Seeds every random choice.")]
DATA_HELP = (
    "Image folder, Hugging Face parquet file or folder, .npz, digits, or cifar10. Arrays x and y "
    "of an .npz go to the model as they are; images with the channels last are moved, with a note, "
    "for a model that takes them on axis 1 only."
)
DataArgument = Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)]
OutputOption = Annotated[Path, typer.Option("-o", "--output", help="Model file to write.")]
PerClassOption = Annotated[int | None, typer.Option(min=1, help="Images per class.")]
ImageSizeOption = Annotated[
    int | None, typer.Option(min=1, help="Side in pixels; else the model's input size.")
]
PreprocessOption = Annotated[
    str | None, typer.Option(help="none (0 to 255), unit (0 to 1), or a backbone's name.")
]
SplitOption = Annotated[Split, typer.Option(help="Part of the data.")]
SelectOption = Annotated[list[str] | None, typer.Option(help="Codes, prefixes or names.")]
IgnoreOption = Annotated[list[str] | None, typer.Option(help="Rules to leave out.")]
ReportFormatOption = Annotated[ReportFormat, typer.Option("--format", help="How to print.")]
ReportOption = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Also write the report: .html, .json or .txt."),
]
ExitZeroOption = Annotated[bool, typer.Option("--exit-zero", help="Exit 0 whatever is found.")]
LossOption = Annotated[
    str | None,
    typer.Option(
        help="Name of a loss, else the compiled one; for torch also module:function, called with "
        "outputs and targets."
    ),
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Samples per forward pass.")]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How DATA becomes ``x`` and ``y``.

    Attributes:
        source: As typed.
        classes: Names; their order gives the labels. Empty for all.
        per_class: Images per class; ``None`` for all.
        image_size: Side in pixels; ``None`` takes the model's own input size.
        preprocess: ``"none"`` (0 to 255), ``"unit"`` (0 to 1) or a backbone's name.
        split: ``"train"``, ``"test"`` or ``"all"``.
        seed: Of the choice and the order.
    """

    source: str
    classes: tuple[str, ...] = ()
    per_class: int | None = None
    image_size: int | None = None
    preprocess: str | None = None
    split: Literal["train", "test", "all"] = "train"
    seed: int = 0


def read_as(
    source: str,
    classes: Sequence[str] | None,
    per_class: int | None,
    image_size: int | None,
    preprocess: str | None,
    split: Split,
    seed: int,
) -> DataOptions:
    """Return DATA with its options, in the order in which the commands have them."""
    return DataOptions(
        source=source,
        classes=names(classes),
        per_class=per_class,
        image_size=image_size,
        preprocess=preprocess,
        split=split.value,
        seed=seed,
    )


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
