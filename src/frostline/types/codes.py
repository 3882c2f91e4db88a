"""The fixed words of the interface: codes of causes, names of probes, repairs.

Values are public and appear in reports: a value is never changed, nor used again. They are enums so
that a typo is an error instead of a probe that is never found.
"""

from __future__ import annotations

from enum import StrEnum


class CauseCode(StrEnum):
    """What can explain a gap between training mode and inference."""

    FROZEN_BATCH_STATS = "FROZEN_BATCH_STATS"
    FROZEN_DRIFT = "FROZEN_DRIFT"
    MODE_RESET = "MODE_RESET"
    EMA_LAG = "EMA_LAG"
    EMA_NOISE = "EMA_NOISE"
    STATS_NEVER_UPDATED = "STATS_NEVER_UPDATED"
    MOMENTUM_CONVENTION = "MOMENTUM_CONVENTION"
    SMALL_BATCH = "SMALL_BATCH"
    BESSEL = "BESSEL"
    POISONED = "POISONED"
    STALE_AFTER_WEIGHT_EDIT = "STALE_AFTER_WEIGHT_EDIT"
    DOMAIN_STATS = "DOMAIN_STATS"
    MIXED_SOURCES = "MIXED_SOURCES"
    BATCH_LEAK = "BATCH_LEAK"
    RANK_DIVERGENCE = "RANK_DIVERGENCE"
    FORCED_TRAIN = "FORCED_TRAIN"
    STALE_SWITCH = "STALE_SWITCH"
    EPS_MISMATCH = "EPS_MISMATCH"

    DROPOUT = "DROPOUT"
    EPOCH_AVERAGE = "EPOCH_AVERAGE"
    PREPROCESS = "PREPROCESS"
    LABEL_ORDER = "LABEL_ORDER"
    AUGMENT_TRAIN_ONLY = "AUGMENT_TRAIN_ONLY"
    OVERFIT = "OVERFIT"
    STALE_PARAMS = "STALE_PARAMS"
    LOADING = "LOADING"
    KERNEL_BUG = "KERNEL_BUG"
    NONE = "NONE"

    @property
    def is_bn(self) -> bool:
        """Whether BN is to blame."""
        return self not in OTHER_CAUSES


#: Causes that are not BN.
OTHER_CAUSES = (
    CauseCode.DROPOUT,
    CauseCode.EPOCH_AVERAGE,
    CauseCode.PREPROCESS,
    CauseCode.LABEL_ORDER,
    CauseCode.AUGMENT_TRAIN_ONLY,
    CauseCode.OVERFIT,
    CauseCode.STALE_PARAMS,
    CauseCode.LOADING,
    CauseCode.KERNEL_BUG,
    CauseCode.NONE,
)
BN_CAUSES = tuple(code for code in CauseCode if code.is_bn)


class ProbeName(StrEnum):
    """The conditions under which the same samples are evaluated.

    See :attr:`frostline.types.measured.Measurement.probes`. A trial of another input encoding is
    named :data:`INPUT_TRIAL` and the encoding.
    """

    INFERENCE = "inference"
    TRAINING = "training"
    STORED = "stored"
    BATCH = "batch"
    TRAINING_BLEND = "training blend"
    DROPOUT = "dropout"
    POPULATION = "population"
    POPULATION_UNFROZEN = "population unfrozen"
    POPULATION_FROZEN = "population frozen"
    SORTED = "sorted"
    GIVEN = "given"
    GIVEN_INFERENCE = "given inference"
    EPSILON = "epsilon"
    VALIDATION_INFERENCE = "validation inference"
    VALIDATION_BATCH = "validation batch"
    VALIDATION_POPULATION = "validation population"
    VALIDATION_RECALIBRATED = "validation recalibrated"
    VALIDATION_RESIZED = "validation resized"


#: Prefix of the name of a probe with the inputs in another encoding.
INPUT_TRIAL = "input "


def probe_name(name: str) -> str:
    """Return the name of a probe as it is, if there can be such a probe.

    Raises:
        ValueError: No probe has this name.
    """
    return name if name.startswith(INPUT_TRIAL) else ProbeName(name)


class Fix(StrEnum):
    """What repairs a finding or a cause, as a word."""

    FREEZE = "freeze"
    UNFREEZE = "unfreeze"
    CONVERT = "convert"
    COMPILE = "compile"
    RECALIBRATE = "recalibrate"
    SET_MOMENTUM = "set-momentum"
    SET_EPSILON = "set epsilon"
    MERGE_STATISTICS = "merge statistics"
    LARGER_BATCH = "larger batch"
    INFERENCE_MODE = "inference mode"
    RENAME = "rename"
    RELABEL = "relabel"
    FIX_PREPROCESSING = "fix preprocessing"
