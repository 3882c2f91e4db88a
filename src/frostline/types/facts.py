"""What rules may know of a model: plain data, no framework.

Rules are tested with facts written by hand. Nothing is computed here that a rule should judge.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from frostline.types import Array, Site
from frostline.types.codes import Fix

#: Whether ``momentum`` is the share of the old value that an update keeps, or the new share.
Convention = Literal["kept", "new"]

#: The best-known framework of each convention.
_CONVENTIONS: dict[Convention, str] = {"kept": "Keras", "new": "PyTorch"}


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What a framework calls things and what its layers can do; its adapter supplies one.

    Messages of rules, causes and remedies are built from it, so that they name no framework. The
    defaults are those of Keras.

    Attributes:
        name: The framework, for messages.
        convention: What the framework's ``momentum`` means.
        usual_momentum: A sound value, in words.
        has_policy: What a frozen layer does in training is a setting of the layer.
        lock: What locks a site that is frozen but uses the batch.
        frozen_on_batch: What to say of such a site.
        frozen_parameters: How gamma and beta are frozen while the layer is not.
        positional_names: Layers are named by their position, so names repeat by design.
        own_loop: The training loop and the optimizer belong to the user.
        file: Name of the file that a command to paste writes.
        file_keeps_settings: Such a file holds momentum and epsilon, not only arrays.
        inference_call: The line that runs inference.
        passed_phase: The argument by which a caller passes on the phase it is given; ``None`` where
            the phase is an edit of the model.
        constant: How an array of ``{values}`` is written, to compute with inputs.
        epsilon_line: The line that sets ``{epsilon}``, with ``{name}`` and ``{dotted}`` path.
    """

    name: str = "Keras"
    convention: Convention = "kept"
    usual_momentum: str = "a decay below 1"
    has_policy: bool = True
    lock: Fix = Fix.CONVERT
    frozen_on_batch: str = "frozen, but training uses batch statistics; set policy='inference'"
    frozen_parameters: str = "gamma and beta are frozen"
    positional_names: bool = False
    own_loop: bool = False
    file: str = "FIXED.keras"
    file_keeps_settings: bool = True
    inference_call: str = "model(x, training=False)"
    passed_phase: str | None = "training=training"
    constant: str = "np.array({values})"
    epsilon_line: str = 'model.get_layer("{name}").epsilon = {epsilon:g}  # compile again'

    def momentum(self, decay: float) -> float:
        """A decay as the framework writes it."""
        return decay if self.convention == "kept" else 1 - decay

    def step(self, decay: float) -> str:
        """The subject of "... keeps a share of the statistics"."""
        return (
            "one step"
            if self.convention == "kept"
            else f"{self.name} momentum {1 - decay:.3g}: a step"
        )

    def decay(self, decay: float) -> str:
        """A decay by the name that the user gave it."""
        return f"decay {decay:g}" if self.convention == "kept" else f"momentum {1 - decay:g}"

    def other_convention(self, decay: float) -> str:
        """What this momentum is in the framework that it was probably copied from."""
        own = self.momentum(decay)
        other: Convention = "new" if self.convention == "kept" else "kept"
        names = _CONVENTIONS[other], _CONVENTIONS[self.convention]
        return f"{own:g} is a {names[0]} momentum, {1 - own:g} in {names[1]}"


@dataclass(frozen=True, kw_only=True)
class SiteFacts:
    """One site with its stored numbers and what surrounds it.

    Attributes:
        site: The site.
        mean: Stored mean, shape ``(channels,)``, float64; ``None`` when the layer is not built or
            keeps no statistics. So are the next three.
        variance: Stored variance as the framework stores it (torch: unbiased).
        gamma: Scale; ``None`` without one.
        beta: Offset; ``None`` without one.
        shadow_variance: With ``renorm``: the variance that the next update will derive
            ``variance`` from, ``moving_stddev**2 - epsilon``, at least 0.
        dtype: Name of the dtype in which the statistics are stored, for example ``"float16"``.
        live: A flip of ``trainable`` takes effect without ``compile``.
        stepped: What of it the compiled training step writes, whatever the flags say by now:
            ``"parameters"``, ``"statistics"``; ``None`` when that is not known.
        optimized: gamma or beta are in the optimizer's list of variables; ``None`` when there is
            no such list yet, or nothing to be in it.
        wrapper_frozen: ``trainable`` of the ``TorchModuleWrapper`` around the site is ``False``;
            ``None`` outside of one.
        undone: Put into inference mode by hand in a model that trains: the next ``train()`` of any
            parent puts it back (torch).
        mode: Whether the module is in training mode now (torch); ``None`` where there is no such
            thing.
        updates: How often the statistics were updated, where the layer counts it
            (``num_batches_tracked``).
        cumulative: The stored statistics are the plain mean over all updates, so `decay` grows.
        training: Value of ``training=`` that is written at the nearest call around the site in a
            functional graph; ``None`` when none is.
        values: Values per channel in one sample (height times width); ``None`` when not known.
        cancels: Training computes the batch variance as E[x²] − E[x]² in float32.
        words: How to speak of the site; a wrapped layer of another framework has its own words.
        two_regimes: ``site.trained_by`` trains it, and in this model it is frozen, now or in the
            step that the model was compiled for.
        twin: Path of its counterpart in a part of the same structure that trains, while its own
            part has no gradients: it may be a mean teacher, a target network or a fixed old model.
    """

    site: Site
    mean: Array | None = None
    variance: Array | None = None
    gamma: Array | None = None
    beta: Array | None = None
    shadow_variance: Array | None = None
    dtype: str = "float32"
    live: bool = False
    stepped: frozenset[str] | None = None
    optimized: bool | None = None
    wrapper_frozen: bool | None = None
    undone: bool = False
    mode: bool | None = None
    updates: int | None = None
    cumulative: bool = False
    training: bool | None = None
    values: int | None = None
    cancels: bool = False
    words: Vocabulary = Vocabulary()
    two_regimes: bool = False
    twin: str | None = None


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """A layer with weights that holds no other layer.

    Attributes:
        path: As in :class:`~frostline.types.Site`.
        order: Rank in execution order, on one scale with :attr:`ModelFacts.order`.
        trains: At least one of its variables will be trained.
    """

    path: str
    order: int
    trains: bool


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Everything that rules without data may look at.

    Attributes:
        name: The model's name.
        backend: ``"tensorflow"``, ``"jax"`` or ``"torch"``.
        words: How to speak of the model and its layers.
        mode: Whether the model is in training mode now (torch), as of a site.
        sites: In execution order.
        layers: Layers with weights that are not sites, in execution order.
        order: Path of a site -> its rank in execution order.
        batch: Batch size that is fixed in the model's input; ``None`` when it is free.
        any_size: Images of any height and width may come, as far as the model says; it may refuse
            some.
        steps: Training steps since the optimizer was made; ``None`` without an optimizer. Of a
            native torch module: the most updates that any site has counted.
        traced: A compiled training step exists, made under the flags of that moment.
        unknown: Path of what keeps running statistics in a way of its own -> its class. It is no
            site: whether it uses the batch cannot be determined, so BN is not ruled out.
        handed: Path of what may hand the statistics of a layer to a function (torch) -> its class;
            ``""`` is the model. Such a call goes past what locks the layer.
    """

    name: str = "model"
    backend: str = "tensorflow"
    words: Vocabulary = Vocabulary()
    mode: bool | None = None
    sites: tuple[SiteFacts, ...] = ()
    layers: tuple[LayerFacts, ...] = ()
    order: dict[str, int] = field(default_factory=dict)
    batch: int | None = None
    any_size: bool = False
    steps: int | None = None
    traced: bool = False
    unknown: Mapping[str, str] = field(default_factory=dict)
    handed: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[SiteFacts]:
        return iter(self.sites)

    @functools.cached_property
    def orders(self) -> tuple[int, ...]:
        """Ranks of ``layers`` in execution order, which rise."""
        return tuple(layer.order for layer in self.layers)

    @property
    def odd_epsilons(self) -> dict[str, float]:
        """Path of each site with another epsilon than most -> the most frequent one."""
        counts = Counter(site.site.epsilon for site in self)
        if len(counts) < 2:
            return {}
        frequent = counts.most_common(1)[0][0]
        return {s.site.path: frequent for s in self if s.site.epsilon != frequent}

    def flip_effect(self, *, frozen: bool) -> str | None:
        """What the next training step does after a flip of ``trainable``; ``None``: as meant.

        Measured on Keras 3.15, see the tests of the rule.
        """
        if self.backend == "jax" or (self.backend == "torch" and not frozen):
            return "the next training step raises"
        if self.backend == "torch":
            return None
        if self.traced:
            return "it still trains" if frozen else "it still does not train"
        return None if frozen else "the next training step raises"

    def flipped(self, facts: SiteFacts) -> str | None:
        """As :meth:`flip_effect` for a site that was flipped since compile; ``None``: as meant."""
        site, frozen = facts.site, facts.site.params_frozen
        if facts.live:
            return None
        if frozen and facts.stepped is not None:  # an optimizer may be older than the step
            still = "parameters" in facts.stepped
            still |= site.stats_frozen and "statistics" in facts.stepped
        else:
            still = facts.optimized is frozen
        return self.flip_effect(frozen=frozen) if still else None
