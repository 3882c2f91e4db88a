"""Changes of a model that a person can name, read and take back.

Every verb changes the model in place, restores it if anything fails half-way, and says in numbers
what it did. What a framework must do for it is in ``adapters``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from frostline.adapters import Adapter, FlagCounts, adapter_of, freezer
from frostline.adapters.protocol import Edit, FreezeRequest, Inspect
from frostline.atomic import taken_back, to_its_end
from frostline.graph.selection import select
from frostline.measure.recalibration import recalibrate_adapter
from frostline.types import ModelError, Policy
from frostline.types.arguments import checked
from frostline.types.facts import ModelFacts
from frostline.types.reasons import warn
from frostline.verbs.momentum import set_site_momentum
from frostline.verbs.whole import whole


@dataclass(frozen=True, kw_only=True)
class Change:
    """An edit of a model that can be taken back.

    Attributes:
        verb: What was done: ``freeze``, ``unfreeze``, ...
        text: What changed, in numbers, one sentence.
        notes: What the user should know or do next; may be empty.
    """

    verb: str
    text: str
    notes: tuple[str, ...] = ()
    _undo: Callable[[], None] = field(repr=False, compare=False, default=lambda: None)
    _undone: list[bool] = field(repr=False, compare=False, default_factory=list)

    def undo(self) -> None:
        """Put back what this change replaced, bit for bit, whatever happened to it since.

        Raises:
            ModelError: It was undone before.
        """
        if self._undone:
            raise ModelError(f"this change was undone already. Received: undo() of '{self.text}'")
        to_its_end(self._undo)
        self._undone.append(True)

    def __str__(self) -> str:
        return "\n".join([self.text, *(f"note: {note}" for note in self.notes)])


@whole
@checked
def freeze(
    model: Any,
    until: Any = None,
    *,
    sites: Any = None,
    params: bool = True,
    statistics: bool = True,
    dropout: bool = False,
) -> Change:
    """Freeze, in place, every layer before a boundary, or chosen BN layers alone.

    A frozen BN layer is locked to its stored statistics in training (stock Keras 3 layers and ours
    with ``policy="inference"``). Containers keep their own flag; what is set are the layers.

    Args:
        model: A Keras model.
        until: First layer that stays as it is: a layer name or path, an index into
            ``model.layers`` (``until=140`` freezes ``model.layers[:140]``), a fraction of the
            layers (float in [0, 1]), or a layer. ``None`` freezes everything.
        sites: Freeze these BN layers and nothing else, in the place of ``until``: as in
            :func:`recalibrate`. ``sites="all"`` freezes all BN while the layers around it train.
        params: Freeze kernels, biases, gamma and beta.
        statistics: Freeze the stored statistics of BN layers. With ``statistics=False`` gamma and
            beta are frozen while the statistics move on; with ``params=False`` stock BN layers use
            their stored statistics while gamma and beta train.
        dropout: Also set the rates of dropout to 0, so that the frozen part computes in training
            what it computes at inference. Without it dropout goes on acting on what is frozen, and
            :func:`split` ends the prefix there. Rates come back with ``undo()`` and with
            :func:`unfreeze`. Noise and random augmentation are left alone; dropout that a torch
            module calls as a function is not seen.

    Returns:
        A change; ``undo()`` puts every flag and rate back.

    Raises:
        ModelError: Unknown boundary or sites (with the closest names); both of them;
            ``params=False`` for our own layer, which freezes both together; BN inside a
            ``TorchModuleWrapper``, whose statistics Keras cannot freeze; ``dropout=True`` for a
            class of your own whose rate is not known.
    """
    what = {"params": params, "statistics": statistics, "dropout": dropout}
    return _switch(model, until, sites, frozen=True, **what)


@whole
@checked
def unfreeze(
    model: Any,
    since: Any = None,
    *,
    sites: Any = None,
    params: bool = True,
    statistics: bool = True,
    dropout: bool = True,
) -> Change:
    """Thaw, in place, a boundary's layer and every layer behind it.

    Args:
        model: A Keras model.
        since: First layer to thaw, as ``until`` of :func:`freeze`; ``None`` thaws everything.
        sites: Thaw these BN layers and nothing else, as in :func:`freeze`.
        params: Thaw kernels, biases, gamma and beta.
        statistics: Thaw the stored statistics of BN layers.
        dropout: Give dropout the rates that it had before :func:`freeze` turned it off.

    Returns:
        A change; ``undo()`` puts every flag and rate back.

    Raises:
        ModelError: As :func:`freeze`.
    """
    what = {"params": params, "statistics": statistics, "dropout": dropout and sites is None}
    return _switch(model, since, sites, frozen=False, **what)


@contextmanager
def frozen(model_or_layers: Any) -> Iterator[Change]:
    """Freeze a model or some layers for a block or a single step, and put every flag back after.

    For a part that trains in one place and must not in another, as the discriminator of a GAN::

        with fl.frozen(discriminator):
            combined.train_on_batch(noise, real)     # moves the generator alone
        discriminator.train_on_batch(images, labels)

    Flags come back exactly as they were on any exit, exceptions and Ctrl-C included; blocks can be
    nested. Frostline's BN layers follow in steps that are compiled already, with no new trace. What
    else is in there is frozen in every step that is *compiled* inside such a block: on TensorFlow a
    step keeps the flags of its first call, on JAX an optimizer keeps those of its first step. So
    compile each of the two steps under the flags that it will run with.

    Args:
        model_or_layers: A Keras model, a layer, a torch module, or a list of them, with all that
            they contain.

    Yields:
        A change; ``undo()`` ends the freeze early.

    Raises:
        ModelError: Neither a Keras layer nor a torch module.
    """
    freeze, back = freezer(model_or_layers)
    with taken_back(back):
        counts = freeze()
        stock = (
            f"{counts.stock_sites} of the BN sites are stock Keras layers: a step that TensorFlow "
            "compiled outside of this block goes on training them; frostline.convert makes them "
            "live"
        )
        yield Change(
            verb="freeze",
            text=f"froze {_counted(counts)} for a block",
            notes=(stock,) if counts.stock_sites else (),
            _undo=back,
        )


@whole
def convert(
    model: Any,
    *,
    version: str | None = None,
    policy: Policy | None = None,
    debias: bool | None = None,
) -> Any:
    """Turn every stock BN layer, in place, into :class:`frostline.layers.BatchNormalization`.

    The layers stay the same objects with the same weight variables, so functional, sequential,
    nested and subclassed models keep their graph, names, shared layers, flags, loss, metrics and
    optimizer state. Compiled steps are dropped and made anew at the next call; an optimizer that
    did not know a frozen gamma or beta is rebuilt with the same settings and slots.

    Args:
        model: A built Keras model.
        version: A Keras release to reproduce; sets policy and debias. See ``releases.py``.
        policy: What a frozen layer does in training; ``None`` keeps it (``"inference"`` at first).
        debias: Correct the moving average for its start; ``None`` keeps it (``False`` at first).

    Returns:
        ``model`` itself.

    Raises:
        ModelError: No BN layer; a BN layer of a user's own class or one without weights yet, with
            its path; settings that contradict each other. The model is unchanged.
    """
    if adapter_of(model).convert(version=version, policy=policy, debias=debias) == 0:
        raise ModelError(
            "no BatchNormalization layer: there is nothing to convert. "
            f"Received: model {getattr(model, 'name', model)!r}"
        )
    return model


@whole
def restore(model: Any) -> Any:
    """Turn every BN layer of ours, in place, back into the stock layer, with its present weights.

    What the stock layer cannot do is lost: another policy than ``"inference"``, debias, the live
    switch. A model without our layers comes back unchanged.

    Returns:
        ``model`` itself.
    """
    adapter_of(model).restore()
    return model


@whole
def fold(model: Any, *, sample: Any = None) -> Any:
    """Fold every BN layer into the layer before it: an inference network of plain layers.

    Every site is folded at its stored statistics, frozen or not: what comes back computes what
    ``model(x, training=False)`` computes and needs no Frostline to be saved, loaded and served.
    With ``s = gamma / sqrt(variance + epsilon)``, a linear layer whose output goes to the BN layer
    alone gets ``kernel * s`` and ``(bias - mean) * s + beta``, computed in float64 (Jacob et al.
    2018, arXiv 1712.05877, section 3.2). These are Dense, Conv and Conv-Transpose of any rank,
    DepthwiseConv and SeparableConv, without activation; its regularizers and constraints, which
    mean the kernel before folding, are dropped. Elsewhere one layer that scales and shifts takes
    the BN layer's place and name: a 1x1 DepthwiseConv2D for images with channels last, a Dense
    layer with a diagonal kernel where masks are passed along, an EinsumDense otherwise.

    Outputs agree to 1e-5 of the largest one in float32; where a network amplifies rounding, as far
    as it moves when its weights move by their last bit (``docs/fold.md``); in half precision as far
    as the layer's own rounding goes. Do not train the outcome: nothing is left that normalises.

    A torch module comes back as plain torch, too. What cannot be folded stays as it is and is named
    in a warning: a BN class that does more than normalise and call the modules that it holds, a BN
    layer that keeps no statistics; in Keras one inside a layer of your own. The outcome is compared
    with the model on ``sample``; a torch module on random inputs where these can be guessed.

    Args:
        model: A built functional or sequential Keras model; nested models and shared layers are
            fine. Or a torch module. It is not changed.
        sample: A batch of inputs: a tuple of the arguments, or a mapping by name. A torch module
            that ``torch.fx`` cannot follow and whose inputs cannot be guessed needs it.

    Returns:
        A new model, not compiled, with the names of the old layers.

    Raises:
        ModelError: No BN layer, or none that can be folded, with its path; in a Keras model also
            one inside a subclassed model or a composite layer, of a class of your own, or with
            broken statistics. Or the outcome does not compute what the model computes.
    """
    folded = adapter_of(model).fold(sample=sample)
    for note in folded.notes:
        warn(f"fold: {note}")
    return folded.model


@whole
@checked
def recalibrate(
    model: Any,
    data: Any,
    *,
    sites: Any = "unfrozen",
    method: Literal["sequential", "batch"] = "sequential",
    batch_size: int = 32,
    process_group: Any = None,
    step: Any = None,
) -> Change:
    """Replace stored statistics, in place, by the population statistics of ``data``.

    Mean and biased variance over every value per channel, float64, batches weighted by their
    counts, the variance between batches included (Chan, Golub, LeVeque 1982). Everything but the
    chosen sites runs as in inference: dropout off, other BN layers at their stored statistics.
    Frozen layers are left alone unless ``sites`` asks for them. All that holds a copy is set:
    batch renormalisation's own deviations; a debiased average goes on from the new values.

    ``method="sequential"`` measures each site with all earlier ones already at their new values, so
    that what is stored is what the inference network sees; a second run changes nothing. It costs
    about one forward pass: activations are carried from site to site (up to 1 GiB in memory, the
    rest in a temporary folder). A layer that is used more than once has one set of statistics,
    pooled over its uses; where one use lies behind another one there is no order to measure in, and
    passes are repeated until the statistics reproduce themselves to 1e-6 standard deviations.
    Subclassed Keras models, composite layers with BN inside and models that pass masks along have
    no graph to follow: they take one pass per site. A torch module needs no graph.

    ``method="batch"`` is one pass with batch statistics at all chosen sites at once (precise BN; Wu
    and Johnson, arXiv 2105.07576, section 3). It reads the data once, in constant memory.

    In a process group of ``torch.distributed`` the call is collective: every rank calls it with its
    own share of the data, which may differ in length and may be empty, and all end with the same
    statistics, bit for bit: those of all the data. Where one rank raises, all raise, and every
    model is as it was; a rank that is gone or late is noticed within the timeout of the group.

    Args:
        model: A built Keras model or a torch module.
        data: ``(x, y)``, a bare ``x``, a dataset or an iterable of batches; labels are ignored.
            Batches with a NaN or infinite value are left out and named in the notes. One-shot
            iterators are fine, except for models without a graph and ``"sequential"``.
        sites: ``"unfrozen"``, ``"frozen"``, ``"all"``, a path, a layer name, a pattern
            (``"backbone/*"``), or a list of these.
        method: ``"sequential"`` or ``"batch"``.
        batch_size: Samples per batch for data given as arrays.
        process_group: As in ``torch.nn.SyncBatchNorm``: the processes that measure together;
            ``None`` is the default group where one is initialised. ``False``: this process alone.
        step: The user's own ``step(model, batch)``, as in :func:`frostline.diagnose`, for a torch
            module that takes a batch in its own way; what it returns is not looked at.

    Returns:
        A change; ``undo()`` puts the old statistics back, of this process.

    Raises:
        ModelError: No such site, an unbuilt model, BN inside a ``TorchModuleWrapper``; no such
            process group, or ranks with different models, options or verbs.
        DataError: The data do not fit, or no batch is finite.
        OutputError: The temporary folder is full.
        FrostlineError: Another rank raised, or is gone.
    """
    adapter = adapter_of(model)
    ranks = adapter.together(process_group)
    with ranks.collective("recalibrate", method=str(method)):
        done, undo = recalibrate_adapter(
            adapter,
            data,
            sites=sites,
            method=method,
            batch_size=batch_size,
            ranks=ranks,
            step=step,
        )
    back = undoing(adapter, undo)
    return Change(verb="recalibrate", text=done.text(), notes=done.remarks(), _undo=back)


@whole
def set_momentum(model: Any, momentum: float, *, sites: Any = "all") -> Change:
    """Set how much of the old statistics an update keeps, in place and without rebuilding.

    Args:
        model: A Keras model.
        momentum: In Keras' convention, the kept share: 0.99 by default, where PyTorch says 0.01.
            BN inside a ``TorchModuleWrapper`` gets the complement. :func:`suggest_momentum` helps
            to choose.
        sites: As in :func:`recalibrate`.

    Returns:
        A change; ``undo()`` puts the old values back. Frostline's layers follow at the next step.
        A stock layer's momentum is a constant of the compiled step on TensorFlow and JAX: call
        ``compile()`` again; the change says so.

    Raises:
        ModelError: Not a number between 0 and 1, or no such site.
    """
    adapter = adapter_of(model)
    done = set_site_momentum(adapter, momentum, sites=sites)
    back = undoing(adapter, done.undo)
    return Change(verb="set_momentum", text=done.text, notes=done.notes, _undo=back)


def _switch(
    model: Any,
    reference: Any,
    sites: Any,
    *,
    frozen: bool,
    params: bool,
    statistics: bool,
    dropout: bool,
) -> Change:
    if sites is not None and (reference is not None or (frozen and dropout)):
        raise ModelError(
            "sites= chooses BN layers in the place of a boundary, and has no dropout: leave "
            f"{'the boundary' if reference is not None else 'dropout'} out. "
            f"Received: sites={sites!r}"
        )
    if not (params or statistics or dropout):
        raise ModelError(
            "params, statistics and dropout are all False, so there is nothing to do. "
            "Received: params=False, statistics=False, dropout=False"
        )
    adapter = adapter_of(model)
    request = FreezeRequest(
        boundary=adapter.boundary(reference),
        # No boundary means the end, and all of the model is before it, for thawing as well.
        before=frozen or reference is None,
        frozen=frozen,
        params=params,
        statistics=statistics,
        dropout=dropout,
        paths=None if sites is None else frozenset(s.path for s in select(adapter.sites(), sites)),
    )
    return _switched(adapter, request, reference)


def _switched(adapter: Adapter, request: FreezeRequest, reference: Any) -> Change:
    frozen, params, statistics = request.frozen, request.params, request.statistics
    known = adapter.facts()
    counts, undo = adapter.set_frozen(request)
    what = [_counted(counts)] if params or statistics else []
    if params != statistics:
        what[0] += " (parameters only)" if params else " (statistics only)"
    if request.dropout and (frozen or counts.dropouts or not what):
        what.append(f"the dropout of {counts.dropouts:,} layers")
    where = _where(request.boundary.path, reference, frozen)
    if request.paths is not None:
        where = f"among {len(request.paths)} chosen BN sites"
    return Change(
        verb="freeze" if frozen else "unfreeze",
        text=f"{'froze' if frozen else 'thawed'} {' and '.join(what)} {where}",
        notes=(
            *_notes(adapter, counts, half=params != statistics, off=frozen and request.dropout),
            *(() if counts.layers else _flipped_before(known)),
            *(_past_the_lock(known) if frozen and statistics else ()),
        ),
        _undo=undoing(adapter, undo),
    )


def undoing(adapter: Edit, undo: Callable[[], None]) -> Callable[[], None]:
    """An undo that leaves the process as it was, whatever interrupts it."""

    def back() -> None:
        with taken_back(adapter.surroundings()):
            undo()

    return back


def _flipped_before(known: ModelFacts) -> Iterator[str]:
    found = [(site.site.path, effect) for site in known if (effect := known.flipped(site))]
    for path, effect in found[:1]:
        yield f"the flags of '{path}' changed after compile, and {effect}: call compile() again"


def _past_the_lock(known: ModelFacts) -> Iterator[str]:
    shows = "assert_frozen(model, data=...) shows whether freezing holds them"
    for path, kind in [*known.unknown.items()][:1]:
        yield f"'{path}' ({kind}) keeps running statistics in a way of its own; {shows}"
    for kind in [*known.handed.values()][:1]:
        yield (
            f"{kind} may hand the statistics of a layer to a function, past what locks the layer; "
            f"{shows}"
        )


def _counted(counts: FlagCounts) -> str:
    return f"{counts.layers:,} layers ({counts.sites:,} BN sites, {counts.parameters:,} parameters)"


def _where(path: str | None, reference: Any, frozen: bool) -> str:
    if path is None or (not frozen and reference is None):
        return "of the whole model" if frozen or reference is None else "behind the end"
    return f"before '{path}'" if frozen else f"from '{path}' on"


def _notes(adapter: Inspect, counts: FlagCounts, *, half: bool, off: bool) -> tuple[str, ...]:
    notes = []
    if (counts.layers or counts.dropouts) and adapter.compiled():
        changed = "flags and rates" if counts.dropouts else "flags"
        note = (
            f"the model is compiled: call compile() again, or the change of {changed} may not take "
            "effect"
        )
        if counts.stock_sites == 0 and counts.sites:
            note += " (for the BN sites, which are Frostline's, it does at once)"
        notes.append(note)
    if half and counts.stock_sites:
        notes.append(
            "a saved model keeps the flag of a stock BN layer but not those of its gamma and beta: "
            "do this again after loading"
        )
    if off and counts.dropouts:
        notes.append(
            "the rates are kept beside the layers, in no file: a saved Keras model has dropout off "
            "for good, a state_dict says nothing of it; unfreeze before saving to keep them"
        )
    return tuple(notes)
