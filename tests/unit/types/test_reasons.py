"""What a framework complains of, in one line."""

from __future__ import annotations

import pytest

from frostline.types import DataError
from frostline.types.reasons import first_line


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("\n  Shapes differ.\nReceived: x", "ValueError: Shapes differ."),
        ("in user code:\n\n    File 'a.py', line 1\n\n    ValueError: Shapes differ.\n • x=1",
         "ValueError: Shapes differ."),
        ("in user code:\n\n    File 'a.py', line 1\n\n    TypeError: No tensor.\n • x=1",
         "ValueError: TypeError: No tensor."),
        ("", "ValueError"),
        ("\x1b[1mBold.\x1b[0m", "ValueError: Bold."),
        ("x" * 300, "ValueError: " + "x" * 185 + "..."),
        ("word " * 60, "ValueError: " + "word " * 36 + "word..."),
    ],
    ids=["first-line", "trace", "trace-of-another", "nothing", "colours", "long", "words"],
)  # fmt: skip
def test_the_line_that_names_the_error(text: str, wanted: str) -> None:
    assert first_line(ValueError(text)) == wanted


def test_our_own_errors_go_without_the_name_of_their_class() -> None:
    assert first_line(DataError("No batch.")) == "No batch."
