"""The tuple of sites prints as the table; what the table looks like is tested in ``test_text``."""

from __future__ import annotations

from dataclasses import replace

import pytest

from frostline.report.sites import Sites
from frostline.types import Site

SITE = Site(path="a", name="a", kind="BatchNormalization", index=0, channels=3, axis=-1, decay=0.9,
            epsilon=1e-3, params_frozen=True, stats_frozen=True, policy="inference")  # fmt: skip
PAIR = (SITE, replace(SITE, path="<b>", index=1, params_frozen=False, stats_frozen=False))


def test_a_tuple_that_prints_as_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    sites = Sites(PAIR, before=1, boundary="conv2")
    assert sites == PAIR
    assert sites[:1] == (SITE,)
    lines = str(sites).splitlines()
    assert [line.split()[0] for line in lines] == ["#", "0", "boundary:", "1", "2"]
    assert lines[2].startswith("boundary: conv2 is the first layer that trains ─")
    assert max(map(len, lines)) == 70
    assert "&lt;b&gt;" in sites._repr_html_()


def test_no_prefix_no_line_and_no_site_no_table() -> None:
    assert "boundary" not in str(Sites(PAIR))
    assert str(Sites(())) == "no BN layer"
