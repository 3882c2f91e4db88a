"""What a framework complains of, in one line."""

from __future__ import annotations

import pytest

pytest.importorskip("keras")

from frostline.adapters.keras.forward_pass import reason


@pytest.mark.once
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("\n  Shapes differ.\nReceived: x", "Shapes differ."),
        ("in user code:\n\n    File 'a.py', line 1\n\n    ValueError: Shapes differ.\n • x=1",
         "ValueError: Shapes differ."),
        ("", "no reason given"),
    ],
    ids=["first-line", "trace", "nothing"],
)  # fmt: skip
def test_reason(text: str, wanted: str) -> None:
    assert reason(ValueError(text)) == wanted
