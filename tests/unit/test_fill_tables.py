"""The tables of README and docs are what the result files say."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def load() -> Any:
    sys.path.insert(0, str(ROOT / "scripts"))  # for its neighbour, as when it is run
    spec = importlib.util.spec_from_file_location("fill_tables", ROOT / "scripts/fill_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", load().documents(), ids=lambda path: path.name)
def test_documents_show_the_measured_numbers(path: Path) -> None:
    text, kinds = path.read_text(), "|".join(load().tables.KINDS)
    # A marker that nothing fills would let its numbers be typed by hand.
    assert text.count("<!-- end -->") == len(re.findall(rf"<!-- ({kinds}) [^>]+ -->\n", text))
    assert load().filled(text) == text


def test_a_number_typed_by_hand_is_noticed(tmp_path: Path) -> None:
    figures = {"training": {"ratio": 1.0, "quartiles": [0.99, 1.01]}}
    (tmp_path / "a.json").write_text(json.dumps({"backend": "jax", "figures": figures}))
    template = "x\n<!-- layer a.json -->\n<!-- end -->\n"
    made = load().filled(template, tmp_path)
    assert "| training | 1.000 [0.990, 1.010] |" in made
    assert load().filled(made, tmp_path) == made
    assert load().filled(made.replace("1.000", "0.500"), tmp_path) == made


def test_engines_per_model_and_backend() -> None:
    row = {"model": "resnet50", "image_size": 96, "batch_size": 8}
    fast = {"ratio": 1.5, "error": 2e-6}
    slow = {"reason": "layer 'a': a|b"}
    results = [
        {"backend": "jax", "rows": [{**row, "engines": {"native": fast, "openvino": slow}}]},
        {"backend": "torch", "rows": [{**row, "model": "vgg16", "engines": {"native": fast}}]},
    ]
    assert load().tables.KINDS["engines"](results).splitlines()[2:] == [
        "| resnet50 at 96², batch 8 | native | 1.50× (error 2e-06) |  |",
        "| resnet50 at 96², batch 8 | openvino | falls back: layer 'a': a/b |  |",
        "| vgg16 at 96², batch 8 | native |  | 1.50× (error 2e-06) |",
    ]


def test_killed_builds_say_when_files_differ() -> None:
    found = {"kills": 3, "caches": 1, "shards": [2, 0, 5], "again": 7, "identical": False,
             "samples": 64, "batch_size": 8, "seed": 1}  # fmt: skip
    made = load().tables.KINDS["killed-builds"]([found])
    assert "| complete shards on disk after a kill | 0 to 5 |" in made
    assert "| samples of complete shards computed again | 7 |" in made
    assert "| **no** |" in made


def test_costs_per_backend_and_case() -> None:
    kinds = load().tables.KINDS
    settings = {
        "train": 8, "validation": 4, "size": 32, "head_epochs": 2, "epochs": 1, "batch": 4,
        "samples": 8, "rounds": 3,
    }  # fmt: skip
    ratio = {"ratio": 2.0, "range": [1.5, 2.5]}
    cached = {"backend": "jax", "cpus": 2, "settings": settings, "figures": {"head": ratio}}
    assert "`fl.fit` | 2.00 [1.50, 2.50] |" in kinds["cached-training"]([cached])
    case = {"sites": 3, "evaluate_s": 0.5, "units": 20.0, "passes": 18.0, "memory": 1.25}
    diagnosed = {"backend": "torch", "samples": 8, "size": 32, "figures": {"small": case}}
    row = "| torch | small, 8 samples at 32² | 3 | 0.50 s | 20 |  | 18 | 1.2× |"
    assert row in kinds["diagnosis-cost"]([diagnosed])
    figure = {"warm_ratio": [1.5, 1.25], "first_s": [4.0, 0.0], "growth_mib": 3.0}
    plain = {**figure, "first_s": [2.0, 0.0]}
    figures = {"predict": plain, "batch": figure, "sequential": figure}
    measured = {"backend": "torch", "settings": settings, "figures": figures}
    row = "| torch | `sequential` | 1.50 | 1.25 | 2.00 | +3 MiB |"
    assert row in kinds["recalibration-cost"]([measured])
    native = {
        "torch": "2", "cpus": 2, "settings": {**settings, "step_batch": 2},
        "figures": {"prefix a": {**ratio, "auto": True}},
    }  # fmt: skip
    row = "| prefix a | 2.00 [1.50, 2.50] | taken by `auto` |"
    assert row in kinds["torch-prefix"]([native])


def test_folds_per_network_and_backend() -> None:
    row = {"model": "B", "backend": "tensorflow", "dtype": "float32", "image_size": 32, "sites": 3,
           "absorbed": 2, "replaced": 1, "left": 0, "difference": 2e-6, "one rounding": 1e-6,
           "file": 3e-6}  # fmt: skip
    rows = [
        {**row, "backend": "jax", "left": 1},
        {**row, "dtype": "float64", "difference": 4e-15, "one rounding": 1e-15},
        row,
        {**row, "model": "A", "sites": 0, "refused": "no BN: nothing | to fold"},
    ]
    result = {"rows": rows, "environment": {"versions": {"keras": "3.9"}}}
    caption = (
        "float32: 2 folded, 1 BN layers left, largest difference 2.0e-06, at most 2.0 times one "
        "rounding; float64: 1 folded, 0 BN layers left, largest difference 4.0e-15, at most 4.0 "
        "times one rounding. Keras 3.9."
    )
    assert load().tables.KINDS["fold"]([result]).splitlines()[2:] == [
        "| A | tensorflow | 32 | 0 |  |  |  | refused: no BN |  |  |  |",
        "| B | tensorflow | 32 | 3 | 2 | 1 | 0 | 2.0e-06 | 1.0e-06 | 3.0e-06 | 4.0e-15 |",
        "| B | jax | 32 | 3 | 2 | 1 | 1 | 2.0e-06 | 1.0e-06 | 3.0e-06 |  |",
        "",
        caption,
    ]


def test_work_on_ray_and_by_ranks() -> None:
    kinds = load().tables.KINDS
    row = {"network": "small", "image side": 12, "processes": 2, "shards": [5, 0],
           "all ranks bit-identical": True, "largest relative difference": 2e-15}  # fmt: skip
    rows = [{**row, "method": "sequential"},
            {**row, "method": "batch", "all ranks bit-identical": False}]  # fmt: skip
    assert "| small, 12² | 2 | 5, 0 | **no** | 2.0e-15 | 2.0e-15 |" in kinds["ranks"]([rows])
    found = {"images": 1000, "rows of a batch": 128, "kills": 3, "lost": 1, "duplicates": 0,
             "all equal": False, "computed again": 130, "seconds lost per kill": 4.4}  # fmt: skip
    made = kinds["scale-kills"]([{"kills": found}])
    assert "| samples lost | 1 |" in made
    assert "| 130 of at most 384 in flight |" in made
    assert "undisturbed build | **no** |" in made


def test_bfloat16_stands_beside_float32() -> None:
    engines = {
        "openvino": {"ratio": 4.0, "error": 2e-6},
        "openvino in bfloat16": {"ratio": 9.0, "error": 0.012, "over_float32": [2.0, 2.25, 3.0]},
        "native in bfloat16": {"reason": "none"},
    }
    row = {"model": "resnet50", "image_size": 224, "batch_size": 16, "engines": engines}
    made = load().tables.KINDS["precision"]([{"backend": "jax", "rows": [row]}])
    figures = "4.00 | 9.00 | 2.25 [2.00, 3.00] | 1.2e-02"
    assert made.splitlines()[2:] == [f"| resnet50 at 224², batch 16 | jax | openvino | {figures} |"]
