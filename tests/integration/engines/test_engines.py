"""Engines: what each computes, against Keras' own ``predict``; how one is chosen."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frostline import engines
from frostline.adapters import prefix as prefixes
from frostline.engines import choice, onnxruntime as onnxruntime_engine, registry
from frostline.numerics.compare import relative_difference
from frostline.types import BackendError, ModelError

keras = pytest.importorskip("keras")
L = keras.layers


def normal(*shape: int) -> Any:
    return np.random.default_rng(0).normal(size=shape).astype("float32")


@pytest.fixture(scope="module")
def prefix() -> Any:
    keras.utils.set_random_seed(0)
    image, vector = keras.Input((8, 8, 3), name="z"), keras.Input((4,), name="a")
    site = L.BatchNormalization()
    x = L.ReLU()(site(L.Conv2D(6, 3, padding="same")(image)))
    site.moving_mean.assign(normal(6))
    return keras.Model(
        {"z": image, "a": vector},
        [L.GlobalAveragePooling2D()(x), L.Dense(3)(vector), L.MaxPooling2D()(x)],
    )


@pytest.mark.parametrize("name", engines.NAMES)
def test_every_engine_computes_what_predict_computes(prefix: Any, name: str) -> None:
    if name != "native":
        # Imported by itself OpenVINO calls home from a forked process, of which JAX warns.
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
        pytest.importorskip("onnx")
    x = {"a": normal(7, 4), "z": normal(7, 8, 8, 3)}
    want = prefix.predict(x, verbose=0)
    engine = engines.choose(prefix, {"a": x["a"][:4], "z": x["z"][:4]}, engine=name)
    assert engine.name == name
    for size in (4, 7, 3):  # larger and smaller than the first batch
        have = engine.run({key: value[:size] for key, value in x.items()})
        for one, other in zip(want, have, strict=True):
            assert other.dtype == np.float32
            np.testing.assert_allclose(one[:size], other, rtol=1e-4, atol=1e-5)


def test_auto_takes_the_fastest_that_agrees(prefix: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(prefixes, "accelerator", lambda _: "")
    x = {"a": normal(4, 4), "z": normal(4, 8, 8, 3)}
    want = prefix.predict(x, verbose=0)
    rates = {"right": 5.0, "wrong": 9.0, "broken": 9.0}

    def right() -> Any:
        return (lambda batch: [y[: len(batch["a"])] for y in want]), "there"

    def wrong() -> Any:
        return (lambda batch: [1.001 * y[: len(batch["a"])] for y in want]), "there"

    def broken() -> Any:
        return (lambda batch: 1 // 0), "there"

    made = {"right": right, "wrong": wrong, "broken": broken}
    monkeypatch.setattr(choice, "_soon", lambda *_: False)
    monkeypatch.setattr(choice, "_candidates", lambda *_: list(made.items()))
    runs = {}
    real = choice._attempt

    def attempt(run: Any, batch: Any) -> Any:
        runs[run] = len(runs)
        return real(run, batch)[0], rates["right"]

    monkeypatch.setattr(choice, "_attempt", attempt)
    monkeypatch.setattr(choice, "_rate", lambda run, batch: rates["right"] if run in runs else 1.0)
    engine = engines.choose(prefix, x)
    assert engine.name == "right"
    assert engine.device == "there"
    assert set(engine.rates) == {"native", "right"}
    assert engine.errors["wrong"] == pytest.approx(1e-3, rel=0.1)
    assert len(engine.notes) == 2
    assert "wrong is not used: it differs from native by 1.0e-03" in engine.notes[0]
    assert "broken is not used: it fails on the first batch" in engine.notes[1]
    rates["right"] = 0.5
    assert engines.choose(prefix, x).name == "native"
    assert engines.choose(prefix, x, samples=31).name == "native"  # 62 s of work
    spared = engines.choose(prefix, x, samples=29)
    assert (spared.name, set(spared.rates)) == ("right", {"right"})
    monkeypatch.setattr(choice, "_candidates", lambda *_: [("openvino", wrong)])
    with pytest.raises(ModelError, match="engine openvino cannot run this prefix: it differs"):
        engines.choose(prefix, x, engine="openvino")


@pytest.mark.once
def test_what_cannot_be_exported_runs_natively_and_says_why() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = keras.Sequential([keras.Input((4, 3)), L.UnitNormalization(name="norm"), L.Dense(2)])
    engine = engines.choose(model, normal(2, 4, 3))
    assert engine.name == "native"
    assert any("layer 'norm' cannot be exported" in note for note in engine.notes)
    with pytest.raises(ModelError, match="layer 'norm' cannot be exported"):
        engines.choose(model, normal(2, 4, 3), engine="onnxruntime")
    with pytest.raises(ModelError, match="engine must be one of auto, native"):
        engines.choose(model, normal(2, 4, 3), engine="fast")


@pytest.mark.once
@pytest.mark.parametrize(
    ("package", "machine", "device"),
    [
        (["CPUExecutionProvider"], ["CPUExecutionProvider"], "CPU"),
        (
            ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
            ["CUDAExecutionProvider", "CPUExecutionProvider"],
            "CUDA",
        ),
        (
            ["AzureExecutionProvider", "CPUExecutionProvider", "TensorrtExecutionProvider"],
            ["TensorrtExecutionProvider", "CPUExecutionProvider"],
            "Tensorrt",
        ),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], ["CPUExecutionProvider"], "CPU"),
    ],
    ids=["cpu", "no-tensorrt-library", "tensorrt", "no-gpu"],
)
def test_onnxruntime_takes_the_fastest_provider_of_package_and_machine(
    prefix: Any, monkeypatch: Any, package: list[str], machine: list[str], device: str
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    real, asked = onnxruntime.InferenceSession, []

    class Session:
        """Computes on the CPU, and says what a machine would say that has these devices."""

        def __init__(self, content: bytes, options: Any, *, providers: Any) -> None:
            asked.extend(providers)
            self._session = real(content, options, providers=["CPUExecutionProvider"])

        def __getattr__(self, name: str) -> Any:
            return getattr(self._session, name)

        def get_providers(self) -> list[str]:
            return machine

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: package)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    has_tensorrt = "TensorrtExecutionProvider" in machine
    found = {"nvinfer": "libnvinfer.so.10"} if has_tensorrt else {}
    monkeypatch.setattr(onnxruntime_engine.ctypes.util, "find_library", found.get)
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    x = {"a": normal(2, 4), "z": normal(2, 8, 8, 3)}
    assert engines.choose(prefix, x, engine="onnxruntime").device == device
    order = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert [name for name, _ in asked] == [
        name for name in order if name in package and (has_tensorrt or name != order[0])
    ]
    assert all(given == {"use_tf32": "0"} for name, given in asked if name.startswith("CUDA"))


@pytest.mark.once
def test_tensorrt_is_found_where_the_loader_looks(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(onnxruntime_engine.ctypes.util, "find_library", lambda name: None)
    monkeypatch.setenv("LD_LIBRARY_PATH", f":{tmp_path}")
    assert not onnxruntime_engine._has_tensorrt()
    (tmp_path / "libnvinfer.so.10").touch()
    assert onnxruntime_engine._has_tensorrt()


def test_native_is_compared_in_full_precision(
    prefix: Any, monkeypatch: Any, precision: Callable[[], Any]
) -> None:
    """On a card native may round products; what it is compared with must not, nor stay set."""
    x = {"a": normal(2, 4), "z": normal(2, 8, 8, 3)}
    want = prefix.predict(x, verbose=0)
    monkeypatch.setattr(prefixes, "accelerator", lambda _: "gpu")
    # Loaded before: a room that is first loaded now would keep the other device for good.
    importlib.import_module("frostline.adapters.keras.prefix")
    monkeypatch.setattr("frostline.adapters.keras.native.device", lambda _: "gpu")
    before = precision()
    seen: list[Any] = []
    real = type(prefix).__call__

    def called(self: Any, *args: Any, **ways: Any) -> Any:
        seen.append(precision())
        return real(self, *args, **ways)

    monkeypatch.setattr(type(prefix), "__call__", called)
    expected = prefixes.reference(prefix)(x)
    assert relative_difference(want, expected) < 1e-5
    assert len(seen) == 1
    assert seen[0] != before
    assert precision() == before
    assert engines.rounding(prefix, x, [2 * y for y in want]) == pytest.approx(0.5, rel=1e-4)
    monkeypatch.setattr(prefixes, "accelerator", lambda _: "")
    assert engines.rounding(prefix, x, [2 * y for y in want]) == 0.0


@pytest.mark.once
def test_engines_are_tried_on_a_few_samples_where_any_number_will_do(
    prefix: Any, monkeypatch: Any
) -> None:
    tried: list[int] = []
    monkeypatch.setattr(prefixes, "accelerator", lambda _: "")

    def run(batch: Any) -> Any:
        tried.append(len(batch["a"] if isinstance(batch, dict) else batch))
        raise RuntimeError

    monkeypatch.setattr(choice, "_soon", lambda *_: False)
    monkeypatch.setattr(choice, "_candidates", lambda *_: [("onnxruntime", lambda: (run, "there"))])
    engines.choose(prefix, {"a": normal(32, 4), "z": normal(32, 8, 8, 3)})
    engines.choose(keras.Sequential([keras.Input(batch_shape=(16, 4)), L.Dense(2)]), normal(16, 4))
    assert tried == [engines.TRIAL_SAMPLES, 16]
    monkeypatch.setattr(choice, "relative_difference", lambda *_: 0.0)

    def timed(_: Any, batch: Any) -> float:
        tried.append(len(batch["a"]))
        return 1.0

    monkeypatch.setattr(choice, "_attempt", lambda *given: ([], timed(*given)))
    engines.choose(prefix, {"a": normal(32, 4), "z": normal(32, 8, 8, 3)}, samples=1)
    monkeypatch.setattr(choice, "_attempt", lambda *_: ([], 1.0))
    monkeypatch.setattr(choice, "_rate", timed)
    assert tried[2:] == [engines.TRIAL_SAMPLES]
    monkeypatch.setattr(prefixes, "accelerator", lambda _: "gpu")
    registered = choice.ENGINES["onnxruntime"]
    there = dataclasses.replace(registered, accelerated=lambda: True)
    monkeypatch.setitem(choice.ENGINES, "onnxruntime", there)
    tried.clear()
    engines.choose(prefix, {"a": normal(32, 4), "z": normal(32, 8, 8, 3)}, samples=1)
    assert tried == [32, 32]  # whole batches, and native is timed as well


@pytest.mark.once
@pytest.mark.parametrize(
    ("package", "engine_names"),
    [(["CPUExecutionProvider"], []), (["CUDAExecutionProvider"], ["onnxruntime", "openvino"])],
)
def test_beside_an_accelerator_no_engine_of_the_processor_is_tried(
    prefix: Any, monkeypatch: Any, package: list[str], engine_names: list[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: package)
    monkeypatch.setattr(prefixes, "accelerator", lambda _: "gpu")
    asked: list[str] = []
    monkeypatch.setattr(choice, "_candidates", lambda _, wanted, *__: asked.extend(wanted) or [])
    engine = engines.choose(prefix, {"a": normal(2, 4), "z": normal(2, 8, 8, 3)})
    assert engine.name == "native"
    assert asked == engine_names
    assert any("native runs on gpu" in note for note in engine.notes) == (not engine_names)


@pytest.mark.once
def test_an_engine_that_is_not_installed_is_an_error_only_if_asked_for(
    prefix: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(prefixes, "accelerator", lambda _: "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    x = {"a": normal(2, 4), "z": normal(2, 8, 8, 3)}
    engine = engines.choose(prefix, x)
    assert engine.name == "native"
    assert [note.split()[0] for note in engine.notes] == ["onnxruntime", "openvino"]
    with pytest.raises(BackendError, match=r'pip install "frostline\[openvino\]"'):
        engines.choose(prefix, x, engine="openvino")


@pytest.mark.once
def test_torch_is_not_compared_where_it_is_soon_done(monkeypatch: pytest.MonkeyPatch) -> None:
    nn = pytest.importorskip("torch.nn")
    module, x, tried = nn.Linear(4, 3).eval(), normal(16, 4), []

    def engine() -> Any:
        tried.append(len(tried))
        return lambda batch: prefixes.native(module)(batch), "there"

    monkeypatch.setattr(choice, "_candidates", lambda *_: [("onnxruntime", engine)])
    soon = engines.choose(module, x, samples=100)
    assert (soon.name, dict(soon.rates), tried) == ("native", {}, [])
    np.testing.assert_allclose(soon.run(x)[0], module(torch_tensor(x)).detach(), rtol=1e-6)
    engines.remember(module, 1, "auto", soon)  # more data may be worth a trial
    assert engines.remembered(module, 1, "auto") is None
    for samples, seconds in ((None, 1.5), (100, 0.0), (10**12, 1.5)):  # unknown, long, long
        monkeypatch.setattr(choice, "SOON_S", seconds)
        assert engines.choose(module, x, samples=samples).rates
    assert tried == [0, 1, 2]


def torch_tensor(x: Any) -> Any:
    import torch

    return torch.as_tensor(x)


def test_native_follows_the_weights(prefix: Any) -> None:
    x = {"a": normal(4, 4), "z": normal(4, 8, 8, 3)}
    engine = engines.choose(prefix, x, engine="native")
    before = engine.run(x)
    dense = next(layer for layer in prefix.layers if isinstance(layer, L.Dense))
    kernel = dense.get_weights()
    dense.set_weights([2 * w for w in kernel])
    np.testing.assert_allclose(engine.run(x)[1], 2 * before[1], rtol=1e-5)
    dense.set_weights(kernel)


@pytest.mark.parametrize(
    ("allowed", "given", "threads"),
    [("3", {0, 1}, 3), ("", {0, 1}, 2), ("", set(range(16)), 0)],
)
def test_an_engine_gets_the_threads_that_the_process_has(
    monkeypatch: pytest.MonkeyPatch, allowed: str, given: set[int], threads: int
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", allowed)
    monkeypatch.setattr(registry.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(registry.os, "sched_getaffinity", lambda _: given, raising=False)
    assert registry.threads() == threads


_FREED_ELSEWHERE = """
import os, signal, threading, time
import numpy, onnx
from frostline.engines import openvino
tensors = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
node = onnx.helper.make_node("Exp", ["x"], ["y"])
graph = onnx.helper.make_graph([node], "g", *[[tensor] for tensor in tensors])
version = onnx.helper.make_opsetid("", 18)
model = onnx.helper.make_model(graph, opset_imports=[version], ir_version=8)
kept = [openvino.start(model.SerializeToString, "float32")[0]]
signal.signal(signal.SIGUSR1, lambda *_: print("handled"))
print(kept[0](numpy.zeros(1, "float32"))[0])
freed = threading.Thread(target=kept.clear)
freed.start()
freed.join()
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(0.01)
"""


@pytest.mark.once
def test_a_signal_after_openvino_was_freed_in_another_thread() -> None:
    pytest.importorskip("openvino")
    done = subprocess.run(
        [sys.executable, "-c", _FREED_ELSEWHERE], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["[1.]", "handled"], done.stderr
    assert done.returncode == 0


@pytest.mark.once
def test_openvino_sends_no_usage_reports() -> None:
    pytest.importorskip("openvino_telemetry")
    code = (
        "import sys\n"
        "from frostline.engines.openvino import _quiet_openvino\n"
        "core = _quiet_openvino().Core()\n"
        "assert 'openvino_telemetry' not in sys.modules\n"
        "import openvino_telemetry\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
