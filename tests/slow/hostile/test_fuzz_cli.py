"""A short run of the fuzzer; a long one by hand: ``python scripts/fuzz_cli.py --runs 10000``."""

from __future__ import annotations

import os

import pytest
from fuzz_cli import fuzz


# The inputs hold exported programs: torch.export loads Triton, which must not meet TensorFlow.
@pytest.mark.skipif(os.environ["KERAS_BACKEND"] != "torch", reason="torch has a process of its own")
@pytest.mark.filterwarnings("ignore")  # what Keras warns of is not what is tested
def test_no_command_line_ends_in_what_must_not_be() -> None:
    outcome = fuzz(200, seed=2026)
    assert outcome.failures == {}
    assert outcome.runs == 200
    # Which lines succeed depends on the optional packages; most lines are meant to be refused.
    assert outcome.codes[0] >= 5
    assert outcome.codes[2] > 50
