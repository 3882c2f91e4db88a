"""``frostline demo``: the essay's story in five steps, with numbers measured while it is told."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from frostline.cli.options import BackendOption, command
from frostline.cli.progress import Display
from frostline.experiments.overfit_settings import OverfitSettings
from frostline.report import phases, text

if TYPE_CHECKING:
    from frostline.experiments.overfit import Row, RowResult

#: Small enough for minutes on two cores, large enough to show what full-size photographs show:
#: ImageNet weights, images that ImageNet has none of, frozen up to the usual boundary.
SETTINGS = OverfitSettings(
    backbone="efficientnet-lite0",
    data="digits",
    classes=("3", "8"),
    per_class=100,
    image_size=64,
    rows=("batch", "inference", "inference+debias"),
    epochs=6,
    batch_size=20,
    learning_rate=0.005,
)


@command
def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the results; overwritten.")
    ] = Path("runs/demo"),
    backend: BackendOption = None,
) -> int:
    """See a frozen BN layer break a fine-tuned network, and Frostline fix it (minutes)."""
    from frostline.cli import model_files

    model_files.start(backend)
    from frostline.experiments.overfit import run_overfit

    count = (SETTINGS.per_class or 0) * len(SETTINGS.classes)
    out = text.console()
    _say(
        f"Frostline demo: {SETTINGS.backbone} with ImageNet weights learns to tell the handwritten "
        f"digits {' and '.join(SETTINGS.classes)} apart ({count} images, {SETTINGS.image_size}², "
        f"seed {SETTINGS.seed}). The first layers are frozen, the rest trains for "
        f"{SETTINGS.epochs} epochs. The images of the evaluation are those of the training, so "
        "nothing can be lost to overfitting."
    )
    with Story() as story:
        result = run_overfit(SETTINGS, output=output, force=True, progress=story)
    if result.interrupted:
        raise KeyboardInterrupt
    out.print()
    out.print(phases.comparison_table(result.tables))
    _step(5, "Where to go next")
    pictures = [str(path) for path in result.files if path.suffix == ".png"]
    for what, how in (
        ("the curves of this run", ", ".join(pictures)),
        ("every policy, with controls", "frostline experiment overfit --data digits"),
        ("your own model", "frostline sites model.keras"),
        ("your own model and data", "frostline phases model.keras images/"),
        ("the fix for a model file", "frostline convert model.keras -o fixed.keras"),
    ):
        out.print(f"  {what + ':':<29} {how}", markup=False, soft_wrap=True)
    return 0


class Story(Display):
    """Progress that tells the first four steps while the rows run."""

    def __init__(self) -> None:
        super().__init__()
        self._before: RowResult | None = None

    def started(self, row: Row, number: int, total: int) -> None:
        """Say what is about to be trained."""
        if number == 1:
            _step(1, "Fine-tune with frozen layers that still look at the batch")
            _say(
                "Frozen BN layers normalise with the statistics of each batch while the network "
                "trains, as in Keras 2.1.3 to 2.2.4 "
                '(fl.convert(model, policy="batch"); fl.freeze(model, until=...)).'
            )
        elif number == 2:
            _step(4, "The fix: frozen layers that are really frozen")
            _say(
                "The same weights, head and order of batches again, with frozen BN layers that use "
                'their stored statistics in training too: fl.convert(model, policy="inference").'
            )
        else:
            _say(
                "\nWith debias=True as well, the moving averages of the layers that train start "
                "from nothing instead of from ImageNet, and are corrected for it."
            )
        super().started(replace(row, meaning="training ..."), number, total)

    def finished(self, result: RowResult) -> None:
        """Say what was measured."""
        self.pause()
        if self._before is None:
            _tell_the_gap(result)
        else:
            _tell_the_fix(self._before, result)
        self._before = result


def _tell_the_gap(result: RowResult) -> None:
    inference, training = result.phases["0"], result.phases["1"]
    low, high = inference.metrics["accuracy"], training.metrics["accuracy"]
    samples = result.phases.samples
    _say(
        f"Accuracy reported in the last epoch: {result.epochs[-1].train_accuracy:.3f}. "
        f"The trained network in training mode: {high:.3f}."
    )
    _step(2, "The same network, the same images, at inference")
    _say(
        f"Accuracy at inference: {low:.3f}. {round((1 - low) * samples)} of {samples} images are "
        f"wrong; in training mode {round((1 - high) * samples)} are. The weights are the same "
        "and the images are the same: only the learning phase differs."
    )
    _step(3, "How to see it: fl.phases(model, (x, y))")
    text.console().print(phases.phases_table(result.phases))
    _say(
        f"The model has {result.sites} BN layers; {result.sites_frozen} of them are frozen, and "
        "the frozen ones compute something else at inference than in training."
    )


def _tell_the_fix(before: RowResult, after: RowResult) -> None:
    samples = after.phases.samples
    was, now = (row.phases["0"].metrics["accuracy"] for row in (before, after))
    _say(
        f"Accuracy at inference: {now:.3f}, was {was:.3f}: "
        f"{round((1 - now) * samples)} of {samples} images are wrong, "
        f"were {round((1 - was) * samples)}. "
        f"Loss at inference: {text.number(after.phases['0'].loss)}, "
        f"was {text.number(before.phases['0'].loss)}."
    )
    high = after.phases["1"].metrics["accuracy"]
    if now < high and not after.row.debias:
        _say(
            f"It is {high:.3f} in training mode. What is left of the gap is not in the frozen "
            "layers, which now compute the same in both phases, but behind the boundary, where "
            "the moving averages have to follow layers that train."
        )


def _step(number: int, title: str) -> None:
    text.console().print(f"\nStep {number}: {title}", style="bold", markup=False)


def _say(paragraph: str) -> None:
    out = text.console()
    width = min(out.width, 88)
    lead = "\n" if paragraph.startswith("\n") else ""
    lines = textwrap.fill(paragraph.strip(), width=width, break_on_hyphens=False)
    out.print(lead + lines, markup=False, soft_wrap=True)
