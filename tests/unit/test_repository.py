"""What must never be committed, and what no source file may do."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))

# A folder of one machine: of the one this is developed on, or of anybody's home.
MACHINE_PATH = re.compile(
    r"(?<![\w./}\])*-])/(?:work|root|home|Users)/\w|/tmp/(?:venv|w)\b|/opt/(?:wheels|pypi)"
)
REGISTRY_HOST = re.compile(
    r"(?:pypi|pythonhosted|npmjs|anaconda|debian)\.(?:org|com|net)|download\.pytorch\.org"
)
BINARY = {".npz", ".png", ".keras", ".h5", ".jpg", ".jpeg", ".gz"}
# Golden traces are small; a data set is not.
LARGEST_FILE_BYTES = 2_000_000


def tracked() -> list[Path]:
    """Every file that git tracks and that still exists."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    paths = (ROOT / name for name in listing.stdout.split("\0") if name)
    return [path for path in paths if path.is_file()]


def lines_matching(pattern: re.Pattern[str]) -> list[str]:
    """``file:line: text`` for every line of a tracked text file that the pattern matches."""
    found = []
    for path in tracked():
        if path.suffix in BINARY or path == Path(__file__):  # this file holds the patterns
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:120]}")
    return found


def test_no_path_of_one_machine() -> None:
    assert lines_matching(MACHINE_PATH) == []


def test_no_package_registry_is_named() -> None:
    assert lines_matching(REGISTRY_HOST) == []


@pytest.mark.parametrize("line", ["cd /root/x", "'/work/main'", "/home/ann/data", "=/tmp/venv/bin"])
def test_pattern_finds_paths_of_a_machine(line: str) -> None:
    assert MACHINE_PATH.search(line)


@pytest.mark.parametrize(
    "line", ["src/work/x", "https://a.example/home/b", "../shared", "/usr/bin"]
)
def test_pattern_leaves_other_paths_alone(line: str) -> None:
    assert not MACHINE_PATH.search(line)


def test_no_data_set_and_no_large_file() -> None:
    paths = tracked()
    assert [path.name for path in paths if path.suffix in {".parquet", ".arrow", ".tfrecord"}] == []
    assert [path.name for path in paths if path.stat().st_size > LARGEST_FILE_BYTES] == []


# ---------------------------------------------------------------- nothing unpickles

UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# Calls that unpickle unless the keyword says otherwise.
SAFE_KEYWORDS = {
    ("np", "load"): ("allow_pickle", False),
    ("numpy", "load"): ("allow_pickle", False),
    ("torch", "load"): ("weights_only", True),
}
# Keywords that switch a safeguard off, whatever the function.
UNSAFE = {("safe_mode", False), ("allow_pickle", True), ("weights_only", False)}


def unpickling(source: str) -> Iterator[str]:
    """Say what in ``source`` could run code that a file contains."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            modules = []
        for module in modules:
            if module.partition(".")[0] in UNPICKLERS:
                yield f"line {node.lineno}: imports {module}"
        if isinstance(node, ast.Call):
            yield from _unsafe_call(node)


def _unsafe_call(node: ast.Call) -> Iterator[str]:
    given = {
        (keyword.arg, keyword.value.value)
        for keyword in node.keywords
        if isinstance(keyword.value, ast.Constant)
    }
    name = tuple(ast.unparse(node.func).split("."))
    if name in SAFE_KEYWORDS and SAFE_KEYWORDS[name] not in given:
        yield f"line {node.lineno}: {'.'.join(name)} without {SAFE_KEYWORDS[name]}"
    for keyword in sorted(UNSAFE & given, key=str):
        yield f"line {node.lineno}: {ast.unparse(node.func)} with {keyword}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_never_unpickles(path: Path) -> None:
    assert list(unpickling(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "keras.models.load_model(path, safe_mode=False)",
    ],
)
def test_check_finds_what_unpickles(source: str) -> None:
    assert list(unpickling(source))


@pytest.mark.parametrize(
    "source",
    [
        "import pickletools",
        "np.load(path, allow_pickle=False)",
        "torch.load(path, weights_only=True)",
        "keras.models.load_model(path)",
        "json.load(file)",
    ],
)
def test_check_leaves_safe_code_alone(source: str) -> None:
    assert list(unpickling(source)) == []
