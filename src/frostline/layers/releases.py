"""What Batch Normalization did in each Keras release: the table behind ``version="2.2.4"``.

The rules were measured on the real releases (DESIGN.md section 8, golden traces in
``tests/golden``). Pure Python: it must not know a framework.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from frostline.types import ModelError, Policy

VarianceRule = Literal["biased", "fused-unbiased", "epsilon-unbiased"]


@dataclass(frozen=True, kw_only=True)
class Release:
    """One release's behaviour.

    Attributes:
        name: The release this preset is called after.
        policy: What a frozen layer does in training.
        debias: Whether the moving average is zero-debiased (``b / (1 - decay**t)``).
        variance: Which batch variance enters the moving average: ``biased`` as it is;
            ``fused-unbiased`` times n/(n-1) on 4-D channels-last inputs; ``epsilon-unbiased``
            times n/(n-1-epsilon), and times n/(n-1) more on 4-D channels-last inputs.
    """

    name: str
    policy: Policy
    debias: bool
    variance: VarianceRule

    def variance_factor(self, n: Any, *, fused: bool, epsilon: float) -> Any:
        """Return what the biased batch variance is multiplied with before it is averaged.

        Args:
            n: Values per channel in the batch; a number or a scalar tensor.
            fused: Whether the old release took its fused kernel: 4-D, channels last.
            epsilon: The layer's epsilon.
        """
        if self.variance == "biased":
            return 1.0
        bessel = n / (n - 1.0) if fused else 1.0
        if self.variance == "fused-unbiased":
            return bessel
        return bessel * (n / (n - (1.0 + epsilon)))


_UPDATE = Release(name="2.1.2", policy="update", debias=False, variance="biased")
_FIRST_BATCH = Release(name="2.1.3", policy="batch", debias=True, variance="fused-unbiased")
_BATCH = Release(name="2.2.4", policy="batch", debias=True, variance="epsilon-unbiased")
_FORK = Release(name="fork-2.2.4", policy="inference", debias=True, variance="epsilon-unbiased")
_KERAS_3 = Release(name="3", policy="inference", debias=False, variance="biased")

#: Every accepted ``version``. Releases before 2.1.3 behave as 2.1.2, releases from 2.1.4 as 2.2.4.
RELEASES: dict[str, Release] = {
    **dict.fromkeys(("2.0.0", "2.0.9", "2.1.0", "2.1.1", "2.1.2"), _UPDATE),
    "2.1.3": _FIRST_BATCH,
    **dict.fromkeys(
        ("2.1.4", "2.1.5", "2.1.6", "2.2.0", "2.2.1", "2.2.2", "2.2.3", "2.2.4"), _BATCH
    ),
    **dict.fromkeys(("fork-2.1.6", "fork-2.2.2", "fork-2.2.4"), _FORK),
    "3": _KERAS_3,
}


def release(version: str) -> Release:
    """Return the behaviour of a Keras release.

    Args:
        version: A key of ``RELEASES``, such as ``"2.2.4"`` or ``"fork-2.2.4"``; any ``"3.x"``
            means ``"3"`` and any ``"1.x"`` or ``"2.0.x"`` means ``"2.1.2"``.

    Raises:
        ModelError: The release is not in the table.
    """
    text = str(version)
    if text.startswith("3."):
        text = "3"
    elif text.startswith(("1.", "2.0.")):
        text = "2.1.2"
    if text not in RELEASES:
        raise ModelError(
            f"version must be one of {', '.join(RELEASES)}. Received: version={version!r}"
        )
    return RELEASES[text]
