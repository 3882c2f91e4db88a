"""The treatments of BN that :func:`frostline.compare` trains under: one function each.

A treatment changes the model with the verbs that a user has, and says what it wrote: its line. It
raises :class:`ModelError` where this model does not allow it; the comparison names the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from frostline.adapters import Adapter
from frostline.numerics.averages import suggest_momentum
from frostline.types import ModelError
from frostline.verbs.edit import convert, freeze, recalibrate, set_momentum, unfreeze


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a treatment may look at.

    Attributes:
        model: The model, to be changed.
        adapter: Its adapter.
        data: The training data.
        batch_size: Samples per step.
        steps: Steps of one epoch.
        epochs: Epochs of the training.
        boundary: Path of the first layer that trains.
        step: The user's ``step(model, batch)``.
    """

    model: Any
    adapter: Adapter
    data: Any
    batch_size: int
    steps: int
    epochs: int
    boundary: str
    step: Any = None

    @property
    def keras(self) -> bool:
        """Whether the framework trains the model itself, by ``fit``."""
        return self.adapter.train is not None

    def training_sites(self) -> list[str]:
        """Paths of the sites whose statistics move; raises where there are none."""
        paths = [site.path for site in self.adapter.sites() if not site.stats_frozen]
        if not paths:
            raise ModelError("no BN layer trains")
        return paths


@dataclass(frozen=True, kw_only=True)
class Treated:
    """What a treatment did.

    Attributes:
        line: What a user writes for it.
        momentum: Number of a step, from 1 -> what to set the momentum to before it.
        state: Tells treatments apart that leave the same flags; empty where flags say all.
    """

    line: str
    momentum: Callable[[int], float] | None = None
    state: str = ""


@dataclass(frozen=True, kw_only=True)
class Treatment:
    """One way of treating BN: ``prepare`` changes the model, ``meaning`` is its first sentence."""

    name: str
    meaning: str
    prepare: Callable[[Setting], Treated]


#: Name -> treatment, in the order in which they run.
TREATMENTS: dict[str, Treatment] = {}


def treatment(name: str) -> Callable[[Callable[[Setting], Treated]], Any]:
    """Register a function as a treatment; the first line of its docstring is its meaning."""

    def register(prepare: Callable[[Setting], Treated]) -> Any:
        meaning = (prepare.__doc__ or "").partition("\n")[0].rstrip(".")
        TREATMENTS[name] = Treatment(name=name, meaning=meaning, prepare=prepare)
        return prepare

    return register


@treatment("now")
def now(setting: Setting) -> Treated:  # noqa: ARG001 - nothing to do
    """The model as it is."""
    return Treated(line="# nothing to change")


@treatment("all-bn-frozen")
def all_bn_frozen(setting: Setting) -> Treated:
    """Every BN layer frozen, statistics and gamma and beta, while its neighbours train."""
    setting.training_sites()
    freeze(setting.model, sites="all")
    return Treated(line='fl.freeze(model, sites="all")')


@treatment("statistics-frozen")
def statistics_frozen(setting: Setting) -> Treated:
    """Every BN layer at its stored statistics, while gamma and beta train."""
    setting.training_sites()
    freeze(setting.model, sites="unfrozen", params=False)
    return Treated(line='fl.freeze(model, sites="unfrozen", params=False)')


@treatment("thawed")
def thawed(setting: Setting) -> Treated:
    """Everything from the first layer that trains on is thawed, BN with it."""
    return _thawed(setting)


@treatment("debiased")
def debiased(setting: Setting) -> Treated:
    """Thawed, and the averages start from nothing, with Adam's correction for their start."""
    line = _thawed(setting).line
    paths = setting.training_sites()
    if setting.keras:
        convert(setting.model, debias=True)
        return Treated(line=f"{line}\nfl.convert(model, debias=True)", state="debiased")
    kept = {site.decay for site in setting.adapter.sites() if site.path in set(paths)}
    if len(kept) > 1:
        raise ModelError(f"the BN layers that train differ in momentum ({sorted(kept)})")
    decay = kept.pop()

    def momentum(step: int) -> float:
        """The kept share of an average that is corrected by 1 / (1 - decay**step)."""
        return (decay - decay**step) / (1 - decay**step)

    return Treated(
        line=f"{line}\n# before each step, counted from 1:\n"
        f"fl.set_momentum(model, ({decay:g} - {decay:g}**step) / (1 - {decay:g}**step), "
        'sites="unfrozen")',
        momentum=momentum,
        state="debiased",
    )


@treatment("recalibrated")
def recalibrated(setting: Setting) -> Treated:
    """Thawed, with the statistics of the training data measured and stored before the training."""
    line = _thawed(setting).line
    ways = {} if setting.step is None else {"step": setting.step}
    recalibrate(setting.model, setting.data, batch_size=setting.batch_size, **ways)
    step = "" if setting.step is None else ", step=step"
    return Treated(line=f"{line}\nfl.recalibrate(model, data{step})", state="recalibrated")


@treatment("ramp")
def ramp(setting: Setting) -> Treated:
    """Thawed slowly: over the first epoch BN goes from stored to batch statistics."""
    _thawed(setting)
    start = getattr(setting.adapter.train, "start_ramp", None)
    if start is None:
        raise ModelError("a ramp is Frostline's Keras layer's; a torch module has none")
    paths = setting.training_sites()
    convert(setting.model)
    start(setting.model, paths, setting.steps)
    return Treated(
        line='fl.convert(model)\nfl.freeze(model, sites="unfrozen")\n'
        f"ramp = fl.callbacks.GradualUnfreeze({{0: {setting.boundary!r}}}, ramp={setting.steps})\n"
        "# fl.fit(model, ..., callbacks=[ramp])",
        state="ramp",
    )


@treatment("momentum-by-steps")
def momentum_by_steps(setting: Setting) -> Treated:
    """Thawed, with the momentum that forgets all but 1% of the old statistics by the end."""
    line = _thawed(setting).line
    setting.training_sites()
    steps = setting.steps * setting.epochs
    set_momentum(setting.model, suggest_momentum(steps), sites="unfrozen")
    chosen = f'fl.set_momentum(model, fl.suggest_momentum({steps}), sites="unfrozen")'
    return Treated(line=f"{line}\n{chosen}")


def _thawed(setting: Setting) -> Treated:
    unfreeze(setting.model, since=setting.boundary)
    return Treated(line=f"fl.unfreeze(model, since={setting.boundary!r})")


def from_boundary(reference: Any) -> Treatment:
    """Train from another layer on: everything before it frozen, the rest thawed."""

    def prepare(setting: Setting) -> Treated:
        freeze(setting.model, until=reference)
        unfreeze(setting.model, since=reference)
        line = f"fl.freeze(model, until={reference!r})\nfl.unfreeze(model, since={reference!r})"
        return Treated(line=line)

    name = f"from {reference}"
    return Treatment(name=name, meaning=f"Trains from {reference!r} on, all of it", prepare=prepare)


def chosen(names: Sequence[str] | None, boundaries: Sequence[Any]) -> list[Treatment]:
    """The treatments with these names, ``now`` first, and one for each boundary.

    Raises:
        ModelError: An unknown name.
    """
    wanted = list(TREATMENTS) if names is None else list(dict.fromkeys(["now", *names]))
    unknown = [name for name in wanted if name not in TREATMENTS]
    if unknown:
        raise ModelError(
            f"no treatment has this name; there are {', '.join(TREATMENTS)}. "
            f"Received: treatments={unknown[0]!r}"
        )
    return [*(TREATMENTS[name] for name in wanted), *map(from_boundary, boundaries)]
