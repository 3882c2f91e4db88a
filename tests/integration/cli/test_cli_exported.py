"""Exported programs that were sent by someone else: nothing in them runs.

In torch's process: ``torch.export`` loads Triton, where there is one, and Triton crashes beside
TensorFlow.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli_hostile import Trap, refused

from frostline import cli

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_exported_program_is_not_unpickled(here: Path, capsys: Any) -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3)).eval()
    net[1].running_mean += torch.tensor([1.0, 2.0, 3.0])
    torch.export.save(torch.export.export(net, (torch.zeros(2, 1, 8, 8),)), "sound.pt2")
    with zipfile.ZipFile("sound.pt2") as old, zipfile.ZipFile("bad.pt2", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("sample_inputs/model.pt"):
                stream = io.BytesIO()
                torch.save(Trap(), stream)
                content = stream.getvalue()
            new.writestr(name, content)
    assert cli.main(["sites", "bad.pt2", "--format", "json"]) == 0
    (site,) = json.loads(capsys.readouterr().out)["sites"]
    assert (site["path"], site["channels"]) == ("1", 3)
    assert not (here / "trap").exists()
    # The same numbers as torch's own reader gives.
    from frostline.adapters import read_facts
    from frostline.adapters.torch.files import load_model

    ours, theirs = read_facts(load_model("bad.pt2")), read_facts(torch.export.load("sound.pt2"))
    for a, b in zip(ours, theirs, strict=True):
        assert a.site == b.site
        for key in ("mean", "variance", "gamma", "beta"):
            np.testing.assert_array_equal(getattr(a, key), getattr(b, key))


def test_weights_of_a_program_that_are_a_pickle(here: Path, capsys: Any) -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3)).eval()
    torch.export.save(torch.export.export(net, (torch.zeros(2, 1, 8, 8),)), "sound.pt2")
    stream = io.BytesIO()
    torch.save(Trap(), stream)
    with zipfile.ZipFile("sound.pt2") as old, zipfile.ZipFile("bad.pt2", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("weights_config.json"):
                config = json.loads(content)
                for entry in config["config"].values():
                    entry["use_pickle"] = True
                content = json.dumps(config).encode()
            elif "weights/weight_" in name:
                content = stream.getvalue()
            new.writestr(name, content)
    assert "not a readable .pt2" in refused(capsys, "sites", "bad.pt2")
    assert not (here / "trap").exists()
