"""Fill the output of the documents' examples by running them; none of it is typed by hand.

An output stands behind its Python block, between ``<!-- output FILE -->`` and ``<!-- end output
-->``. ``FILE`` is a Python file of this repository that makes the names that the block uses, as
``examples/symptom_torch.py`` makes ``net``, ``x`` and ``y``. ``--check`` changes nothing and fails
when an output has other words than the document; numbers may differ from machine to machine.

Usage: ``KERAS_BACKEND=torch python scripts/fill_examples.py [--check]``
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 100
_EXAMPLE = re.compile(
    r"```python\n(?P<code>(?:(?!```).)*)```\s*<!-- output (?P<file>\S+) -->\n```text\n"
    r"(?P<output>.*?)```\n<!-- end output -->",
    re.DOTALL,
)
_NUMBER = re.compile(r"[+−-]?\d[\d.,]*(?:e[+−-]?\d+)?")
#: What a version says of its build, after its numbers: ``2.13.0+cpu``.
_BUILD = re.compile(r"#\+[a-z]\w*")


@dataclass(frozen=True)
class Example:
    """A block of a document, the file that makes its names, and the output it shows."""

    code: str
    file: str
    shown: str

    def run(self, root: Path = ROOT, names: dict[str, Any] | None = None) -> str:
        """Return what the block prints, lines wrapped; runs it in this process.

        Args:
            root: Folder of the repository.
            names: What the block uses, and adds to; default: those that the file makes.
        """
        printed = io.StringIO()
        names = names_of(self.file, root) if names is None else names
        with contextlib.redirect_stdout(printed):
            exec(compile(self.code, self.file, "exec"), names)
        lines = printed.getvalue().splitlines()
        return "".join(f"{part}\n" for line in lines for part in _wrapped(line))


def names_of(file: str, root: Path = ROOT) -> dict[str, Any]:
    """Run a file and return the names that it makes."""
    return runpy.run_path(str(root / file))


def documents(root: Path = ROOT) -> list[Path]:
    """Files that may hold examples."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def examples(text: str) -> Iterator[Example]:
    """Yield the examples of a document whose output it shows."""
    for match in _EXAMPLE.finditer(text):
        yield Example(match["code"], match["file"], match["output"])


def filled(text: str, root: Path = ROOT) -> str:
    """Return ``text`` with every output made anew."""
    names: dict[str, dict[str, Any]] = {}

    def example(match: re.Match[str]) -> str:
        file = match["file"]
        if file not in names:
            names[file] = names_of(file, root)
        made = Example(match["code"], file, match["output"]).run(root, names[file])
        if words(made) == words(match["output"]):
            return match[0]
        start, end = (place - match.start() for place in match.span("output"))
        return f"{match[0][:start]}{made}{match[0][end:]}"

    return _EXAMPLE.sub(example, text)


def words(output: str) -> str:
    """An output without its numbers and line breaks: what every machine prints alike."""
    return " ".join(_BUILD.sub("#", _NUMBER.sub("#", output)).split())


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, break_long_words=False, drop_whitespace=True) or [""]


def main(arguments: Sequence[str]) -> int:
    """Fill or check the documents; returns the exit code."""
    if arguments not in ([], ["--check"]):
        print(__doc__)
        return 2
    os.environ.setdefault("KERAS_BACKEND", "torch")
    stale = 0
    for path in documents():
        text = path.read_text()
        wanted = filled(text)
        if wanted == text:
            continue
        if arguments:
            print(f"{path.name}: an output differs from its example; run scripts/fill_examples.py")
            stale = 1
        else:
            path.write_text(wanted)
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
