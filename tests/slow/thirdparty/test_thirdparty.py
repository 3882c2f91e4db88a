"""Three programs of the table that need only torch; the whole of it is run by hand."""

from __future__ import annotations

import os

import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

from .__main__ import answers, load


@pytest.mark.parametrize(
    "name",
    [
        "plain GAN generator (no labels, no loss)",
        "plain contrastive loop (two views, NT-Xent)",
        "plain auto-encoder, (x, index) batches",
    ],
)
def test_every_verb_agrees_with_its_oracle(name: str) -> None:
    answered = answers(load()[name])["verbs"]
    wrong = {verb: text for verb, (text, _) in answered.items() if not text.startswith("works")}
    assert not wrong
    assert len(answered) == 14
