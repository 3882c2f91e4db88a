"""The frozen part of native torch in bfloat16: its error, its key, and who refuses it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if os.environ["KERAS_BACKEND"] != "torch":
    pytest.skip("torch has a process of its own", allow_module_level=True)

import torch
from test_torch_split import images, resnet
from torch.nn import functional

import frostline as fl
from frostline import engines, environment
from frostline.adapters import prefix as prefixes
from frostline.engines import openvino as openvino_engine
from frostline.types import BackendError, ModelError


def prefix_of(model: Any) -> Any:
    fl.freeze(model, "fc")
    return fl.split(model).prefix


def share(have: Any, want: Any) -> float:
    return float((have - want).abs().max() / want.abs().max())


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that says it has bfloat16; torch computes it on any, slowly."""
    monkeypatch.setattr(environment, "has_bfloat16", lambda: True)


def openvino_has_it() -> bool:
    if any(importlib.util.find_spec(name) is None for name in ("openvino", "onnx")):
        return False
    return "BF16" in openvino_engine._capabilities(openvino_engine._quiet_openvino())


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize("engine", ["native", "openvino", "auto"])
def test_the_error_is_what_torch_finds_in_float32(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if engine == "openvino" and not openvino_has_it():
        pytest.skip("OpenVINO has no bfloat16 here")
    part, x = prefix_of(resnet()), images(32)
    with torch.no_grad():
        want = part(x)
    ways: dict[str, Any] = {"engine": engine, "verbose": 2}
    made = fl.cache_features(part, x, tmp_path, precision="bfloat16", **ways)
    have = torch.from_numpy(made.rows(np.arange(32))[0])
    assert have.dtype == torch.float32
    assert made.precision == "bfloat16"
    assert made.error == pytest.approx(share(have, want), rel=1e-3)
    assert 2.0**-12 < made.error < 0.1  # rounded, and not something else
    said = capsys.readouterr().err
    assert f"in bfloat16, {made.error:.1e} of the largest value from float32" in said
    exact = fl.cache_features(part, x, tmp_path, **ways)
    assert exact.keys != made.keys
    assert (exact.precision, exact.error) == ("float32", 0.0)
    assert share(torch.from_numpy(exact.rows(np.arange(32))[0]), want) < 1e-4
    # What is stored is taken again, also by a process that has not measured it.
    engines.choice._CHOSEN.clear()
    shards = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/shards/*")}
    again = fl.cache_features(part, x, tmp_path, precision="bfloat16", **ways)
    assert (again.keys, again.error) == (made.keys, made.error)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/shards/*")} == shards


@pytest.mark.usefixtures("able")
def test_features_of_other_weights_are_seen_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, x = resnet(), images(32)
    part = prefix_of(model)
    known = prefixes.identity(part)
    monkeypatch.setattr(prefixes, "identity", lambda _: known)  # an identity that sees nothing
    ways: dict[str, Any] = {"precision": "bfloat16", "engine": "native", "verbose": 2}
    fl.cache_features(part, x, tmp_path, **ways)
    model.layer2.conv2.weight.data *= 1.5
    engines.choice._CHOSEN.clear()
    made = fl.cache_features(part, x, tmp_path, **ways)
    assert "discarded and computed anew" in capsys.readouterr().err
    with torch.no_grad():
        assert share(torch.from_numpy(made.rows(np.arange(32))[0]), part(x)) < 0.1


def test_who_has_none_says_what_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part, x = prefix_of(resnet()), images(8).numpy()
    monkeypatch.setattr(environment, "has_bfloat16", lambda: False)
    monkeypatch.setattr(openvino_engine, "_capabilities", lambda _: ["FP32"])
    works = r"Leave precision= out \(float32\)"
    with pytest.raises(BackendError, match=rf"engine native .* device \(cpu\).*{works}"):
        engines.choose(part, x, "native", precision="bfloat16")
    with pytest.raises(ModelError, match=f"onnxruntime .* it has no bfloat16.*{works}"):
        engines.choose(part, x, "onnxruntime", precision="bfloat16")
    if importlib.util.find_spec("openvino") is not None:
        with pytest.raises(BackendError, match=rf"openvino .* no instructions .*{works}"):
            engines.choose(part, x, "openvino", precision="bfloat16")
    with pytest.raises(ModelError, match=rf"nothing here computes .* in bfloat16.*{works}"):
        fl.cache_features(part, x, tmp_path, precision="bfloat16", verbose=0)
    with pytest.raises(ModelError, match="must be 'float32' or 'bfloat16'"):
        fl.cache_features(part, x, tmp_path, precision="float16", verbose=0)
    monkeypatch.setattr(environment, "has_bfloat16", lambda: True)
    with pytest.raises(ModelError, match=r"for a model in float32.*torch\.float64"):
        engines.choose(part.double(), x, "native", precision="bfloat16")


def test_what_a_processor_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, has in (("flags : fpu avx512_bf16", True), ("Features : fp bf16", True),
                      ("flags : fpu avx512f", False)):  # fmt: skip
        monkeypatch.setattr(environment.Path, "read_text", lambda *_, said=said, **__: said)
        assert environment.has_bfloat16() is has


@pytest.mark.usefixtures("able")
def test_a_loop_over_the_frozen_part_in_bfloat16() -> None:
    """The rest trains on what torch's own autocast makes of the frozen part, from epoch 2 on."""
    x, y = images(16), torch.arange(16) % 4
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    model = resnet()
    fl.freeze(model, "fc")
    seen: list[Any] = []
    handle = model.fc.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    for _ in range(2):
        data = fl.cached(model, batches, engine="native", precision="bfloat16")
        for images_, labels in data:
            functional.cross_entropy(model(images_), labels).backward()
    handle.remove()
    part = fl.split(model).prefix
    with torch.no_grad():
        want = part(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lower = torch.cat([part(x[:8]), part(x[8:])]).float()
    fed = torch.cat(seen[-2:]).reshape(lower.shape)
    assert share(fed, lower) < 2.0**-8 < share(fed, want) * 4
    assert data.precision_error == pytest.approx(share(lower[8:], want[8:]), rel=0.2)
    batches = fl.cached(model, batches, engine="native", precision="bfloat16")
    with pytest.raises(ModelError, match=r"by position.*Leave precision= out"):
        rounded_twice(model, batches)


def rounded_twice(model: Any, batches: Any) -> None:
    """A loop under autocast."""
    for x, _ in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(x)
