"""Phases, tasks and patterns against a fake view: no framework is loaded here."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from frostline import measure
from frostline.measure import infer_task, judge, phase_table
from frostline.types import DataError, ModelError, PhaseRow, PhaseTable, Site

sklearn_metrics = pytest.importorskip("sklearn.metrics")
scipy_stats = pytest.importorskip("scipy.stats")

SITE = Site(
    path="bn",
    name="bn",
    kind="BatchNormalization",
    index=0,
    channels=1,
    axis=-1,
    decay=0.99,
    epsilon=1e-3,
    params_frozen=True,
    stats_frozen=True,
    policy="batch",
)


def identity(values: Any) -> Any:
    return values


def sigmoid(values: Any) -> Any:
    return 1 / (1 + np.exp(-values))


class FakeView:
    """BN with stored statistics, then a head. Counts on ``preserved`` to undo what it changes."""

    model: Any = None
    framework = "fake"
    backend = "numpy"

    def __init__(
        self,
        *,
        head: Callable[[Any], Any] = sigmoid,
        mean: float = 0.0,
        std: float = 1.0,
        sites: int = 1,
        objective: tuple[str | None, bool | None] = (None, None),
        interrupt_at: int | None = None,
    ) -> None:
        self.head, self.mean, self.std, self.interrupt_at = head, mean, std, interrupt_at
        self._sites, self._objective = sites, objective
        self.state = {"steps": 0}
        self.calls: list[tuple[int, bool, int]] = []

    def sites(self) -> tuple[Site, ...]:
        return tuple(replace(SITE, index=index) for index in range(self._sites))

    def judges_itself(self) -> bool:
        return False

    def own_loss(self) -> None:
        return None

    def objective(self) -> tuple[str | None, bool | None]:
        return self._objective

    @contextlib.contextmanager
    def preserved(self) -> Iterator[None]:
        before = dict(self.state)
        try:
            yield
        finally:
            self.state = before

    def forward(self, x: Any, *, training: bool, step: int = 0) -> Any:
        self.state["steps"] += 1
        if self.interrupt_at is not None and self.state["steps"] == self.interrupt_at:
            raise KeyboardInterrupt
        self.calls.append((len(x), training, step))
        mean, std = (x.mean(), x.std()) if training else (self.mean, self.std)
        return self.head((x[:, :1] - mean) / std).astype(np.float32)

    def score(
        self, x: Any, y: Any, sample_weight: Any = None, *, training: bool, step: int = 0
    ) -> tuple[Any, float | None]:
        outputs = self.forward(x, training=training, step=step)
        return outputs, float(np.square(outputs[:, 0] - y).mean())

    def inputs(self, *, labels: bool = False) -> int:
        return 1

    def blend_forward(self, loss: Any = None, step: Any = None, paths: Any = None) -> Any:
        class Lossless:
            def own(self, batch: Any, *, training: bool, number: int = 0) -> Any:
                raise ModelError("no loss")

        return Lossless()

    def evaluate(self, batches: Iterable[tuple[Any, ...]]) -> Mapping[str, float]:
        seen = list(batches)
        count = sum(len(b[0]) for b in seen)
        loss = sum(self.score(b[0], b[1], training=False)[1] * len(b[0]) for b in seen) / count  # type: ignore[operator]
        return {"loss": loss, "mean": float(np.concatenate([b[0] for b in seen]).mean())}

    def boundary(self, reference: Any) -> Any:
        raise NotImplementedError


def two_classes(n: int = 200, seed: int = 0) -> tuple[Any, Any]:
    """One feature, centred at 10 and split by class; stored statistics may or may not fit it."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(n) % 2)
    return (10 + 2 * (2 * y - 1) + rng.normal(0, 0.8, n))[:, None], y


class TestPhases:
    @pytest.mark.parametrize(
        ("training", "last_only"), [(True, False), (True, True), (False, False)]
    )
    def test_an_evaluate_that_runs_in_training_mode_is_named(
        self, training: bool, last_only: bool
    ) -> None:
        class Own(FakeView):
            def evaluate(self, batches: Iterable[tuple[Any, ...]]) -> Mapping[str, float]:
                losses = [self.score(x, y, training=training)[1] for x, y in batches]
                return {"loss": losses[-1] if last_only else float(np.mean(losses))}  # type: ignore

        x, y = two_classes()
        table = phase_table(Own(), (x, y), batch_size=50)  # type: ignore[arg-type]
        said = [text for text in table.patterns if "own evaluate" in text]
        assert len(said) == training
        assert not said or "agrees with phase 1" in said[0]
        fits = Own(mean=10.0, std=float(x.std()))  # no gap, nothing to say
        table = phase_table(fits, (x, y), batch_size=50)  # type: ignore[arg-type]
        assert not any("own evaluate" in text for text in table.patterns)

    @pytest.mark.parametrize("given", ["arrays", "generator"])
    def test_a_table_from_a_file_is_the_one_from_memory(
        self, given: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x, y = two_classes(203)
        rows = [slice(start, start + 50) for start in range(0, 203, 50)]

        def data() -> Any:
            return (x, y) if given == "arrays" else ((x[part], y[part]) for part in rows)

        whole = phase_table(FakeView(mean=9.0, std=2.0), data(), batch_size=50)
        monkeypatch.setattr("frostline.measure.phases.WINDOW", 0)
        monkeypatch.setattr("frostline.measure.rows._PIECE", 64)
        table = phase_table(FakeView(mean=9.0, std=2.0), data(), batch_size=50)
        assert str(table) == str(whole)
        for row, other in zip(table.rows[1:], whole.rows[1:], strict=True):
            assert np.array_equal(row.outputs, other.outputs)  # type: ignore[arg-type]

    def test_rows_match_independent_oracles(self) -> None:
        x, y = two_classes(203)
        view = FakeView(mean=9.0, std=2.0)
        table = phase_table(view, (x, y), batch_size=50)
        assert [row.phase for row in table.rows] == ["dynamic", "0", "1"]
        inference = sigmoid((x[:, 0] - 9) / 2)
        starts = range(0, 203, 50)
        training = np.concatenate(
            [
                sigmoid((x[s : s + 50, 0] - x[s : s + 50].mean()) / x[s : s + 50].std())
                for s in starts
            ]
        )
        for phase, outputs in (("0", inference), ("1", training)):
            row = table[phase]
            np.testing.assert_allclose(row.outputs[:, 0], outputs, rtol=1e-6)  # type: ignore[index]
            assert row.loss == pytest.approx(np.square(outputs - y).mean(), rel=1e-6)
            assert row.metrics["accuracy"] == pytest.approx(
                sklearn_metrics.accuracy_score(y, outputs > 0.5)
            )
            assert row.metrics["auc"] == pytest.approx(sklearn_metrics.roc_auc_score(y, outputs))
        assert table["dynamic"].loss == pytest.approx(table["0"].loss)
        assert table["dynamic"].metrics["mean"] == pytest.approx(x.mean())
        assert (table.task, table.samples, table.sites) == ("binary", 203, 1)

    def test_both_phases_see_the_same_batches_once(self) -> None:
        x, y = two_classes(70)

        class Shuffling:
            """A loader that gives another order on every pass, as many do."""

            rng = np.random.default_rng(0)

            def __iter__(self) -> Iterator[Any]:
                order = self.rng.permutation(70)
                return iter([(x[order[:32]], y[order[:32]]), (x[order[32:]], y[order[32:]])])

        view = FakeView(mean=10.0, std=2.0)
        table = phase_table(view, Shuffling())
        assert view.calls[:4] == [(32, False, 0), (32, True, 0), (38, False, 1), (38, True, 1)]
        ranks = [scipy_stats.rankdata(table[phase].outputs[:32, 0]) for phase in "01"]  # type: ignore[index]
        np.testing.assert_array_equal(*ranks)  # BN is monotone within a batch

    def test_generator_is_accepted(self) -> None:
        x, y = two_classes(64)
        whole = phase_table(FakeView(), (x, y), batch_size=16)
        parts = ((x[s : s + 16], y[s : s + 16]) for s in range(0, 64, 16))
        assert phase_table(FakeView(), parts).as_dict() == whole.as_dict()

    def test_state_is_restored_also_when_interrupted(self) -> None:
        x, y = two_classes(64)
        for interrupt_at in (None, 1, 3, 6):
            view = FakeView(interrupt_at=interrupt_at)
            stop = (
                contextlib.nullcontext()
                if interrupt_at is None
                else pytest.raises(KeyboardInterrupt)
            )
            with stop:
                phase_table(view, (x, y))
            assert view.state == {"steps": 0}

    def test_custom_metrics(self) -> None:
        x, y = two_classes()
        table = phase_table(FakeView(), (x, y), metrics={"mean <b>": lambda y, p: float(p.mean())})
        assert table["1"].metrics["mean <b>"] == pytest.approx(float(table["1"].outputs.mean()))  # type: ignore[union-attr]
        assert "mean <b>" not in table["dynamic"].metrics
        with pytest.raises(DataError, match=r"metrics\['m'\] must return one number.*\(200, 1\)"):
            phase_table(FakeView(), (x, y), metrics={"m": lambda y, p: p})

    def test_without_labels(self) -> None:
        with pytest.raises(DataError, match="which need labels"):
            phase_table(FakeView(objective=("mean_squared_error", None)), two_classes()[0])

    def test_without_labels_and_loss_outputs_are_compared(self) -> None:
        x = two_classes()[0]
        view = FakeView(head=identity, mean=1.0, std=2.0)
        table = phase_table(view, x, batch_size=50)
        assert [row.loss for row in table.rows] == [None, None, None]
        # Phase 0 is (x - 1) / 2, phase 1 the batch's own standardisation.
        parts = np.split(x[:, :1], len(x) // 50)
        one = np.concatenate([(part - part.mean()) / part.std() for part in parts])
        zero = (x[:, :1] - 1) / 2
        wanted = np.sqrt(np.square(one - zero).mean()) / zero.std()
        np.testing.assert_allclose(table["1"].metrics["distance"], wanted, rtol=1e-5)
        assert table["0"].metrics["distance"] == 0
        assert any("outputs are compared" in text for text in table.patterns)

    def test_labels_that_no_loss_is_known_for(self) -> None:
        class Lossless(FakeView):
            def score(self, x: Any, *_: Any, training: bool, step: int = 0) -> Any:
                return self.forward(x, training=training, step=step), None

            def evaluate(self, batches: Any) -> Any:
                raise ModelError("no loss")

        x = two_classes()[0]
        table, bare = (
            phase_table(Lossless(head=identity, mean=1.0, std=2.0), data, batch_size=50)
            for data in ((x, np.full((len(x), 2, 2), 7.5)), x)
        )
        assert table.task == "unknown"
        assert table["1"].metrics["distance"] == bare["1"].metrics["distance"] > 0
        assert any("Pass loss=" in text for text in table.patterns)


class TestPatterns:
    def test_chance_while_auc_is_near_one(self) -> None:
        table = phase_table(FakeView(mean=0.0, std=2.0), two_classes(), batch_size=200)
        assert table["0"].metrics["accuracy"] == 0.5
        assert table["0"].metrics["auc"] > 0.97
        words = table.patterns[0]
        assert words.startswith("Phase 0: accuracy 0.500 is at chance")
        # The best threshold is the oracle of what the same scores could give.
        outputs = table["0"].outputs[:, 0]  # type: ignore[index]
        y = two_classes()[1]
        best = max(float(((outputs > t) == y).mean()) for t in [-1, *outputs])
        assert words.endswith(f"another threshold would give {best:.3f}.")
        gap = next(p for p in table.patterns if p.startswith("Gap in accuracy"))
        assert "phase 1 minus phase 0: +0.4" in gap
        assert gap.endswith("phase 0 is worse.")
        assert not any(p.startswith("Phase 1") for p in table.patterns)

    def test_large_mse_while_spearman_is_near_one(self) -> None:
        rng = np.random.default_rng(0)
        x = rng.normal(10, 2, (200, 1))
        y = (x[:, 0] - 10) / 2 + rng.normal(0, 0.05, 200)
        table = phase_table(FakeView(head=identity, mean=0.0, std=2.0), (x, y), batch_size=200)
        assert table.task == "regression"
        row = table["0"]
        assert row.metrics["mse"] == pytest.approx(
            sklearn_metrics.mean_squared_error(y, row.outputs), rel=1e-5
        )
        assert row.metrics["spearman"] == pytest.approx(
            scipy_stats.spearmanr(y, row.outputs[:, 0]).statistic  # type: ignore[index]
        )
        assert "Phase 0: MSE" in table.patterns[0]
        assert "rank correlation is 0.99" in table.patterns[0]
        gap = next(p for p in table.patterns if p.startswith("Gap in squared error"))
        assert gap.endswith("phase 0 is worse.")

    def test_healthy_model_has_no_pattern(self) -> None:
        x, y = two_classes()
        table = phase_table(FakeView(mean=x.mean(), std=x.std()), (x, y), batch_size=200)
        assert table.patterns == ()

    def test_unequal_classes_are_no_sign(self) -> None:
        """97% of one class: a good model is near chance, and no threshold would help it much."""
        rng = np.random.default_rng(1)
        y = (np.arange(400) < 12).astype(int)
        outputs = sigmoid(-4 + 3 * y + rng.normal(0, 0.7, 400))
        judged = judge(y, outputs, "binary", False)
        assert judged.metrics["auc"] >= measure.NEAR_ONE
        assert judged.metrics["accuracy"] <= judged.reference + measure.CHANCE_MARGIN
        assert measure.patterns("binary", {"0": judged, "1": judged}, 1) == ()

    def test_random_scores_are_no_sign(self) -> None:
        rng = np.random.default_rng(1)
        y, outputs = rng.integers(0, 2, 300), rng.random(300)
        judged = judge(y, outputs, "binary", False)
        assert measure.patterns("binary", {"0": judged, "1": judged}, 1) == ()

    def test_gap_without_bn_is_not_blamed_on_bn(self) -> None:
        table = phase_table(FakeView(mean=0.0, std=2.0, sites=0), two_classes(), batch_size=200)
        assert table.patterns[-1].startswith("The model has no BatchNormalization layer")

    def test_nan_outputs_are_named_and_never_right(self) -> None:
        def head(values: Any) -> Any:
            out = sigmoid(values)
            out[3] = np.nan
            return out

        table = phase_table(FakeView(head=head, mean=10, std=2), two_classes(), batch_size=200)
        assert table.patterns[0] == "Phase 0: 1 of 200 outputs are NaN or infinite."
        assert np.isnan(table["0"].metrics["auc"])
        assert table["0"].metrics["accuracy"] < 1
        text = json.dumps(table.as_dict(), allow_nan=False)
        assert json.loads(text)["rows"][1]["metrics"]["auc"] is None


BINARY = np.array([0, 1, 1, 0])
ONE, TWO, FOUR = np.zeros((4, 1)), np.zeros((4, 2)), np.zeros((4, 4))


@pytest.mark.parametrize(
    ("y", "outputs", "loss", "expected"),
    [
        (BINARY, ONE, None, "binary"),
        (BINARY, np.zeros(4), None, "binary"),
        (BINARY[:, None].astype(float), ONE, None, "binary"),
        (BINARY.astype(bool), ONE, None, "binary"),
        (BINARY, ONE, "mean_squared_error", "regression"),
        (BINARY * 2 - 1, ONE, "hinge", "binary"),
        (BINARY * 0.9 + 0.05, ONE, "binary_crossentropy", "binary"),
        (BINARY * 0.9 + 0.05, ONE, None, "regression"),
        (np.array([1.5, 2, 3, 4]), ONE, None, "regression"),
        (np.array([3, 7, 1, 20]), ONE, None, "regression"),
        (BINARY, TWO, None, "binary"),
        (np.eye(2)[BINARY], TWO, None, "binary"),
        (np.array([0, 3, 2, 1]), FOUR, None, "multiclass"),
        (np.array([[0.0], [3], [2], [1]]), FOUR, None, "multiclass"),
        (np.eye(4), FOUR, "categorical_crossentropy", "multiclass"),
        (np.eye(4) * 0.9 + 0.025, FOUR, None, "multiclass"),
        (np.array([0, 4, 2, 1]), FOUR, None, "unknown"),
        (np.array([[1, 1, 0, 0]] * 4), FOUR, None, "unknown"),
        (np.random.default_rng(0).normal(size=(4, 4)), FOUR, None, "regression"),
        (np.random.default_rng(0).normal(size=(4, 3)), FOUR, "mean_squared_error", "unknown"),
        (np.zeros((4, 8, 8)), np.zeros((4, 8, 8, 3)), None, "unknown"),
        (np.array(["a", "b", "a", "b"]), TWO, None, "unknown"),
    ],
)
def test_task_is_inferred(y: Any, outputs: Any, loss: str | None, expected: str) -> None:
    assert infer_task(y, outputs, loss) == expected


class TestJudge:
    def test_two_columns_equal_one(self) -> None:
        rng = np.random.default_rng(0)
        y, logit = rng.integers(0, 2, 100), rng.normal(0, 1, 100)
        one = judge(y, sigmoid(logit), "binary", False)
        for outputs, logits in (
            (logit, True),
            (np.stack([np.zeros(100), logit], 1), True),
            (np.stack([1 - sigmoid(logit), sigmoid(logit)], 1), False),
        ):
            for labels in (y, y[:, None], np.eye(2)[y]):
                if labels.shape[-1] == 2 and outputs.ndim == 1:
                    continue
                other = judge(labels, outputs, "binary", logits)
                assert other.metrics == pytest.approx(one.metrics)
                np.testing.assert_allclose(other.losses, one.losses, rtol=1e-6)
                assert other.reachable == one.reachable

    def test_logits_are_told_by_their_values(self) -> None:
        x, y = two_classes()
        table = phase_table(FakeView(head=identity, mean=10.0, std=2.0), (x, y), batch_size=200)
        oracle = sklearn_metrics.accuracy_score(y, x[:, 0] > 10)
        assert table["0"].metrics["accuracy"] == pytest.approx(oracle)

    def test_compiled_from_logits_wins_over_values(self) -> None:
        """Logits that happen to lie between 0 and 1 are all class 1."""
        x, y = two_classes()
        view = FakeView(head=sigmoid, mean=10.0, std=2.0, objective=("binary_crossentropy", True))
        table = phase_table(view, (x, y), batch_size=200)
        assert table["0"].metrics["accuracy"] == pytest.approx(y.mean())

    def test_multiclass(self) -> None:
        rng = np.random.default_rng(0)
        y, logits = rng.integers(0, 5, 80), rng.normal(size=(80, 5))
        got = judge(y, logits, "multiclass", True)
        assert got.metrics == {
            "accuracy": pytest.approx(sklearn_metrics.accuracy_score(y, logits.argmax(1)))
        }
        assert got.reference == np.bincount(y).max() / 80

    def test_several_columns_of_regression(self) -> None:
        y, outputs = np.random.default_rng(0).normal(size=(2, 50, 3))
        got = judge(y, outputs, "regression", False)
        assert got.metrics["mse"] == pytest.approx(sklearn_metrics.mean_squared_error(y, outputs))
        expected = np.mean([scipy_stats.spearmanr(y[:, i], outputs[:, i])[0] for i in range(3)])
        assert got.metrics["spearman"] == pytest.approx(expected)


def test_table_renders_as_text_and_escaped_html() -> None:
    table = PhaseTable(
        rows=(
            PhaseRow(phase="dynamic", loss=0.125, metrics={"<script>": 0.5}),
            PhaseRow(phase="0", loss=None, metrics={"accuracy": 1.0}),
        ),
        task="binary",
        samples=7,
        sites=2,
        patterns=("a < b",),
    )
    assert str(table).splitlines() == [
        "phase     loss  <script>  accuracy",
        "dynamic  0.125       0.5         –",
        "0            –         –         1",
        "7 samples, binary task, 2 BN layers",
        "a < b",
    ]
    html = table._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "<p>a &lt; b</p>" in html
    with pytest.raises(KeyError, match="'dynamic', '0' or '1'"):
        table["2"]
