"""A network of two BN layers in numpy, behind the protocol of a view: no framework."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from frostline.adapters import Outcome
from frostline.adapters.protocol import Condition
from frostline.adapters.staged import in_stages
from frostline.data.batch import Batch
from frostline.numerics.stats import Moments
from frostline.types import DataError, ModelError, Site
from frostline.types.facts import ModelFacts, SiteFacts
from frostline.types.measured import Behaviour

EPSILON = 1e-3
PATHS = ("first", "second")


class FakeView:
    """``softmax(bn2(tanh(bn1(x))) @ head)``; dropout shifts the logits of class 0."""

    framework, backend, saved_as, channel_axis = "fake", "numpy", "model", -1

    def __init__(self, classes: int = 3, *, sites: Sequence[str] = PATHS, **settings: Any) -> None:
        self.model: Any = self
        self._paths = tuple(sites)
        #: λ that the model's own training and inference passes use.
        self.training: Mapping[str, float] = settings.pop("training", dict.fromkeys(sites, 1.0))
        self.inference: Mapping[str, float] = settings.pop("inference", dict.fromkeys(sites, 0.0))
        self.frozen: Sequence[str] = settings.pop("frozen", ())
        self.dropout: float = settings.pop("dropout", 0.0)
        self.stop_at: int | None = settings.pop("stop_at", None)
        self.compiled_loss: str | None = settings.pop("loss", "sparse_categorical_crossentropy")
        assert not settings, settings
        self.stored = {path: (np.zeros(classes), np.ones(classes)) for path in sites}
        self.head = np.eye(classes) * 3
        self.calls: list[tuple[str, int]] = []

    def sites(self) -> tuple[Site, ...]:
        return tuple(
            Site(
                path=path,
                name=path,
                kind="BatchNormalization",
                index=index,
                channels=len(self.head),
                axis=-1,
                decay=0.99,
                epsilon=EPSILON,
                params_frozen=path in self.frozen,
                stats_frozen=path in self.frozen,
                policy="inference",
            )
            for index, path in enumerate(self._paths)
        )

    def facts(self) -> ModelFacts:
        return ModelFacts(name="fake", sites=tuple(SiteFacts(site=each) for each in self.sites()))

    def judges_itself(self) -> bool:
        return False

    def own_loss(self) -> Any:
        return None

    def compiled(self) -> bool:
        return self.compiled_loss is not None

    def forward(self, x: Any, *, training: bool, step: int = 0) -> Any:
        table = self.training if training else self.inference
        return self.run(x, [table[p] for p in self._paths], None, training)[0].astype(np.float32)

    def objective(self) -> tuple[str | None, bool | None]:
        return self.compiled_loss, None

    @contextmanager
    def preserved(self) -> Iterator[None]:
        before = dict(self.stored)
        try:
            yield
        finally:
            self.stored = before

    def run(self, x: Any, blend: Any, statistics: Any, dropout: bool) -> tuple[Any, dict[str, Any]]:
        """Probabilities, and what each site saw."""
        seen, h = {}, np.asarray(x, np.float64)
        for path, weight in zip(self._paths, blend, strict=True):
            moments = seen[path] = Moments.of(h)
            mean, variance = (statistics or {}).get(path, self.stored[path])
            if weight == 1:  # a share of nothing counts nothing, even of NaN
                mean, variance = moments.mean, moments.variance
            elif weight:
                mean = (1 - weight) * mean + weight * moments.mean
                variance = (1 - weight) * variance + weight * moments.variance
            h = np.tanh((h - mean) / np.sqrt(variance + EPSILON))
        logits = h @ self.head
        logits[:, 0] += self.dropout * dropout
        exponent = np.exp(logits - logits.max(1, keepdims=True))
        return exponent / exponent.sum(1, keepdims=True), seen

    def blend_forward(self, loss: Any = None, step: Any = None, paths: Any = None) -> FakeForward:
        return FakeForward(self)

    def inputs(self, *, labels: bool = False) -> int:
        return 1

    def noise_layers(self) -> dict[str, str]:
        return {"drop": "dropout"} if self.dropout else {}

    def behaviour(self, batches: Any, step: Any = None) -> dict[str, Behaviour]:
        return {
            path: Behaviour(
                path=path,
                training=self.training[path],
                inference=self.inference[path],
                moves=self.training[path] == 1,
            )
            for path in self._paths
        }

    def moved_at_inference(self, batch: Any, step: Any = None) -> dict[str, str]:
        return {}

    def difference(self, reference: Any, x: Any) -> Any:
        raise ModelError("models of this framework cannot be compared yet")

    def round_trip(self, x: Any) -> float:
        raise ModelError("models of this framework cannot be saved and loaded yet")

    def meter(self, paths: Sequence[str], ranks: Any = None) -> FakeMeter:
        return FakeMeter(self, paths)


class FakeForward:
    """See :class:`frostline.adapters.Forward`."""

    def __init__(self, view: FakeView) -> None:
        self.view, self.paths = view, view._paths

    def outcome(self, batch: Batch, condition: Condition, kind: str = "outcome") -> Outcome:
        if batch.y is None:
            raise DataError("a loss needs labels. Received: y=None")
        self.view.calls.append((kind, len(batch)))
        if self.view.stop_at is not None and len(self.view.calls) == self.view.stop_at:
            raise KeyboardInterrupt
        blend = np.broadcast_to(condition.blend, len(self.paths))
        outputs, seen = self.view.run(batch.x, blend, condition.statistics, condition.dropout)
        classes = np.asarray(batch.y).reshape(-1)
        losses = -np.log(outputs[np.arange(len(batch)), classes] + 1e-12)
        return Outcome(outputs=outputs, losses=losses, moments=seen if condition.record else {})

    def own(self, batch: Batch, *, training: bool, number: int = 0) -> Any:
        table = self.view.training if training else self.view.inference
        blend = [table[path] for path in self.paths]
        return self.outcome(batch, Condition(blend, dropout=training, number=number), "own")

    def outputs(self, batch: Batch, condition: Condition) -> Any:
        unlabelled = Batch(batch.x, np.zeros(len(batch), int))
        found = self.outcome(unlabelled, condition)
        return (found.outputs, found.moments) if condition.record else found.outputs

    def gradient(self, batch: Batch, condition: Condition) -> Any:
        middle = np.broadcast_to(condition.blend, len(self.paths)).astype(float)
        slopes, distance = [], 1e-6
        for unit in np.eye(len(self.paths)):
            up, down = (
                self.outcome(
                    batch, replace(condition, blend=middle + sign * distance * unit), "gradient"
                )
                for sign in (1, -1)
            )
            slopes.append((up.losses - down.losses).mean() / (2 * distance))
        return self.outcome(batch, condition).losses, np.array(slopes)


class FakeMeter:
    """See :class:`frostline.measure.recalibration.Meter`: one stage per site."""

    def __init__(self, view: FakeView, paths: Sequence[str]) -> None:
        self.view, self.paths = view, tuple(paths)

    def start(self, x: Any) -> tuple[Any, ...]:
        return (x,)

    def programs(self, inputs: int, paths: Collection[str]) -> list[Any]:
        # Its stages hand over what they take, which is of other slots than what they give.
        ways = {"passes": 1, "closed": False, "takes": (0,), "gives": (1,)}
        return [SimpleNamespace(paths=(path,), **ways) for path in self.paths]

    def stage(self, program: Any) -> Callable[[Any], Any]:
        def run(values: Any) -> Any:
            self.view.calls.append(("stage", len(values[0])))
            if self.view.stop_at is not None and len(self.view.calls) == self.view.stop_at:
                raise KeyboardInterrupt
            blend = np.zeros(len(self.view._paths))
            _, seen = self.view.run(values[0], blend, None, False)
            return values, {path: [seen[path]] for path in program.paths}

        return run

    def sequential(self, source: Any, paths: Any, memory_limit: int) -> Any:
        return in_stages(self, source, paths, memory_limit)

    def stored(self, path: str) -> tuple[Any, Any]:
        return self.view.stored[path]

    def epsilon(self, path: str) -> float:
        return EPSILON

    def store(self, path: str, mean: Any, variance: Any) -> None:
        self.view.stored[path] = (mean, variance)

    def snapshot(self) -> Callable[[], None]:
        before = dict(self.view.stored)

        def restore() -> None:
            self.view.stored = before

        return restore


def data(n: int = 200, classes: int = 3, *, shift: float = 0.0, seed: int = 0) -> tuple[Any, Any]:
    """Inputs whose largest column names the class, moved by ``shift``; classes in order."""
    rng = np.random.default_rng(seed)
    y = np.sort(rng.integers(0, classes, n))
    return 2 * np.eye(classes)[y] + rng.normal(0, 0.6, (n, classes)) + shift, y
