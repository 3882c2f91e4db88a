"""Build the wheel and the sdist in dist/ and check them as an index would; nothing is uploaded.

The version stands once, in ``pyproject.toml``. On a commit with a tag the two must agree
(``v0.1.0``), and the top entry of ``CHANGELOG.md`` must be that version and have a date.

Usage: ``python scripts/make_dist.py [--no-isolation]`` (``make dist``)
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_ENTRY = re.compile(r"^## \[(?P<version>[^\]]+)\] - (?P<date>\S+)$", re.MULTILINE)


def objections(version: str, changelog: str, tags: Sequence[str]) -> Iterator[str]:
    """Yield what keeps a commit from being the release that its tag says it is.

    Args:
        version: Of ``pyproject.toml``.
        changelog: Text of ``CHANGELOG.md``.
        tags: Tags of the commit; without one nothing is released, and nothing is asked.

    >>> list(objections("0.2.0", "## [0.2.0] - 2027-01-05", ["v0.2.0"]))
    []
    """
    for tag in tags:
        if tag != f"v{version}":
            yield f"the tag is {tag}, pyproject.toml says {version}"
    entry = _ENTRY.search(changelog)
    if entry is None or entry["version"] != version:
        yield f"the top entry of CHANGELOG.md is not {version}"
    elif tags and entry["date"] == "unreleased":
        yield f"CHANGELOG.md calls {version} unreleased: give it a date"


def main(arguments: Sequence[str]) -> int:
    """Build and check; returns the exit code."""
    if arguments not in ([], ["--no-isolation"]):
        print(__doc__)
        return 2
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = list(objections(project["version"], changelog, _tags()))
    if found:
        print("\n".join(found), file=sys.stderr)
        return 1
    dist = ROOT / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    python = [sys.executable, "-m"]
    for command in (
        [*python, "build", *arguments],
        [*python, "twine", "check", "--strict", "dist/*"],
        [*python, "check_wheel_contents", "dist"],
    ):
        if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
            return code
    return 0


def _tags() -> list[str]:
    command = ["git", "tag", "--points-at", "HEAD", "--list", "v*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.split()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
