"""Torch modules on the command line: a function, a state, programs; and all that is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from torch import nn

from frostline import cli

CODE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 3))

def wide():
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6))

def lists():
    return [1]

def raises():
    raise RuntimeError("no weights here")

def loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trained module without statistics, its state, samples; the folder is the current one."""
    (tmp_path / "nets.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    import nets

    model = nets.build()
    rng = np.random.default_rng(0)
    y = np.arange(96) % 3
    x = (rng.normal(size=(96, 1, 8, 8)) + 2 * y[:, None, None, None]).astype("float32")
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
    model[1].reset_running_stats()
    torch.save(model.state_dict(), "weights.pt")
    np.savez("data.npz", x=x, y=y.astype("int32"))
    return tmp_path


def run(capsys: Any, *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


NET = ("nets:build", "--state", "weights.pt")


def test_sites_lint_phases(folder: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, "sites", *NET, "--format", "json")
    (site,) = json.loads(out)["sites"]
    assert (code, site["path"], site["kind"]) == (0, "1", "BatchNorm2d")
    code, out, _ = run(capsys, "lint", *NET, "--format", "json")
    assert code == 1
    assert [each["code"] for each in json.loads(out)["findings"]] == ["FL204"]
    code, out, _ = run(
        capsys, "phases", *NET, "data.npz", "--loss", "nets:loss", "--format", "json"
    )
    phases = json.loads(out)["phases"]
    assert code == 1
    assert phases["0"]["loss"] > phases["1"]["loss"] + 0.5


@pytest.mark.parametrize("loss", ["cross_entropy", "nets:loss"])
def test_diagnose_then_recalibrate(loss: str, folder: Path, capsys: Any) -> None:
    words = ("data.npz", "--loss", loss, "--format", "json")
    code, out, _ = run(capsys, "diagnose", *NET, *words)
    report = json.loads(out)
    assert code == 1
    assert report["causes"][0]["sites"] == ["1"], report["causes"]
    (line,) = {r["shell"] for r in report["remedies"] if r["fix"] == "recalibrate"}
    assert line == (
        "frostline recalibrate nets:build --state weights.pt data.npz --sites unfrozen "
        "--output FIXED.pt"
    )
    before = Path("weights.pt").read_bytes()
    assert run(capsys, *line.split()[1:])[0] == 0  # the line as it is
    assert Path("weights.pt").read_bytes() == before
    state = torch.load("FIXED.pt", weights_only=True)
    import nets

    with torch.no_grad():
        seen = nets.build()
        seen.load_state_dict(state)
        inside = seen[0](torch.from_numpy(np.load("data.npz")["x"])).double()
    np.testing.assert_allclose(state["1.running_mean"], inside.mean((0, 2, 3)), rtol=1e-4)
    assert {p.name for p in folder.iterdir() if p.is_file()} == {
        "nets.py", "weights.pt", "data.npz", "FIXED.pt",
    }  # fmt: skip
    code, out, _ = run(
        capsys, "diagnose", "nets:build", "--state", "FIXED.pt", *words, "--reference", "weights.pt"
    )
    assert json.loads(out)["measurement"]["difference"]["statistics"]["1"] > 0.5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_programs(folder: Path, capsys: Any) -> None:
    import nets

    model = nets.build()
    model.load_state_dict(torch.load("weights.pt", weights_only=True))
    model[1].running_mean += 1
    model[1].running_var.copy_(torch.tensor([1.0, 2, -1, 3, 4, 5]))
    torch.export.save(torch.export.export(model.eval(), (torch.zeros(2, 1, 8, 8),)), "net.pt2")
    torch.jit.save(torch.jit.script(model), "net.pt")
    for name in ("net.pt2", "net.pt"):
        code, out, _ = run(capsys, "sites", name, "--format", "json")
        (site,) = json.loads(out)["sites"]
        assert (code, site["path"], site["channels"]) == (0, "1", 6)
        assert site["epsilon"] == pytest.approx(1e-5)
        code, out, _ = run(capsys, "lint", name, "--format", "json")
        assert [f["code"] for f in json.loads(out)["findings"]] == ["FL202"]
        code, out, err = run(capsys, "diagnose", name, "data.npz")
        assert (code, out) == (2, "")
        assert "can be listed and linted" in err


def test_a_pickled_module_is_never_read(folder: Path, capsys: Any) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (folder / "trap",))

    torch.save({"model": Trap()}, "whole.pt")
    for words in (("sites", "whole.pt"), ("sites", "nets:build", "--state", "whole.pt")):
        code, out, err = run(capsys, *words)
        assert (code, out) == (2, "")
        assert "holds a pickled Python object" in err
        assert "module:function --state FILE" in err
    assert not (folder / "trap").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sites", "nets:none", "--state", "weights.pt"], "no function 'none'"),
        (["sites", "nots:build", "--state", "weights.pt"], "cannot import 'nots'"),
        (["sites", "nets:raises", "--state", "weights.pt"], "RuntimeError: no weights here"),
        (["sites", "nets:lists", "--state", "weights.pt"], "not a torch.nn.Module. Received: list"),
        (
            ["sites", "nets:wide", "--state", "weights.pt"],
            "4 missing (2.weight, 2.bias, 2.running_mean, ...); 2 unexpected",
        ),
        (["sites", "nets:build", "--state", "no.pt"], "no such file: no.pt"),
        (["sites", "nets:build", "--state", "data.npz"], "cannot read a state_dict"),
        (["sites", "weights.pt"], "which is no network"),
        (["sites", "no.pt2"], "no such model file: no.pt2"),
        (["sites", "data.npz", "--state", "weights.pt"], "--state goes with module:function"),
        (["recalibrate", *NET, "data.npz", "-o", "out.keras"], "as .pt or .pth"),
        (["recalibrate", *NET, "data.npz", "-o", "weights.pt"], "weights.pt exists"),
        (["freeze", *NET, "--until", "3", "-o", "out.pt"], "fl.freeze(model, until=3)"),
        (["freeze", *NET, "--until", "nine", "-o", "out.pt"], "is not a module of this model"),
        (["set-momentum", *NET, "0.9", "-o", "out.pt"], "fl.set_momentum(model, 0.9)"),
        (["fold", *NET, "-o", "out.pt"], "folded = fl.fold(model)"),
        (["diagnose", *NET, "data.npz", "--loss", "hinge"], "no loss has this name"),
        (["diagnose", *NET, "data.npz", "--loss", "nets:none"], "no function 'none'"),
    ],
)
def test_what_cannot_be(words: list[str], told: str, folder: Path, capsys: Any) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert told in line
    assert "unexpected;" not in line
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_a_function_alone_is_enough(folder: Path, capsys: Any) -> None:
    code, out, _ = run(capsys, "sites", "nets:build", "--format", "json")
    assert code == 0
    assert [site["path"] for site in json.loads(out)["sites"]] == ["1"]


def test_keras_is_not_loaded(folder: Path) -> None:
    ask = (
        "import sys; from frostline import cli; code = cli.main(['lint', 'nets:build', '--state', "
        "'weights.pt', '--format', 'github']); print(code, 'keras' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "1 False"


def test_channels_last_are_moved_with_a_note_where_only_that_is_taken(
    folder: Path, capsys: Any
) -> None:
    words = ("--loss", "nets:loss", "--format", "json")
    _, expected, err = run(capsys, "phases", *NET, "data.npz", *words)
    assert "note:" not in err
    data = dict(np.load("data.npz"))
    np.savez("last.npz", x=np.moveaxis(data["x"], 1, -1), y=data["y"])
    code, out, err = run(capsys, "phases", *NET, "last.npz", *words)
    found, expected = json.loads(out)["phases"], json.loads(expected)["phases"]
    assert code == 1
    assert [found[phase] for phase in "01"] == [pytest.approx(expected[phase]) for phase in "01"]
    (note,) = [line for line in err.splitlines() if line.startswith("note: ")]
    assert "last.npz: x has the channels last, (96, 8, 8, 1)" in note
    assert "read as (samples, 1, 8, 8)" in note
    # Three channels fit in neither layout: the module's own words, and nothing is moved.
    np.savez("other.npz", x=np.zeros((6, 8, 8, 3), "float32"), y=data["y"][:6])
    code, out, err = run(capsys, "phases", *NET, "other.npz", *words)
    assert (code, out) == (2, "")
    assert "note:" not in err
    assert "[6, 8, 8, 3]" in err


def test_what_a_module_takes_as_it_is_stays(folder: Path, capsys: Any) -> None:
    Path("nets.py").write_text(
        CODE
        + """
class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = build()

    def forward(self, x):
        return self.inner(x.movedim(-1, 1))
"""
    )
    sys.modules.pop("nets")
    data = dict(np.load("data.npz"))
    np.savez("last.npz", x=np.moveaxis(data["x"], 1, -1), y=data["y"])
    code, _, err = run(
        capsys, "phases", "nets:Last", "last.npz", "--loss", "nets:loss", "--format", "json"
    )
    assert code in (0, 1), err
    assert "note:" not in err
