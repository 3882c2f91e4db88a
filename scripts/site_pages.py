"""Pages of the site that are made while it is built: rules, causes, remedies, cases, the API.

A hook of MkDocs (``mkdocs.yml``). Nothing that it makes is committed: a rule's page is its
docstring and what Frostline says to its example, run here; a cause's page has the measured cases of
``docs/results``; the page of all calls and commands is read from the package. It also turns links
between files of the repository into links of the site, and codes into links to their pages.
"""

from __future__ import annotations

import html
import inspect
import json
import os
import posixpath
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import fill_examples

ROOT = Path(__file__).resolve().parents[1]

#: Files of the repository outside docs/ that are pages.
_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changes.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security-policy.md",
}
#: Measured cases, in the order of the page.
_CASES = {"Keras": "casebook-keras.json", "PyTorch": "casebook-torch.json"}

_FENCE = re.compile(r"^( *)```.*?^\1```", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(
    r"^(?P<heading>#.*)$|(?P<text>\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<target>[^)\s]+)\)"
    r"|`(?P<code>(?:[^`\n]|\n(?!\n))+)`|\b(?P<bare>FL\d{3})\b",
    re.MULTILINE,
)
#: References of docstrings, as the HTML of the API has them.
_ROLE = re.compile(r":(?:func|class|meth|attr|mod|data):<code>~?(?P<name>[\w.]+)</code>")


# ---------------------------------------------------------------- links


def site_uri(path: str) -> str | None:
    """Return the page or file of the site for a file of the repository; ``None`` without one.

    >>> site_uri("docs/faq.md"), site_uri("README.md"), site_uri("examples/gan.py")
    ('faq.md', 'index.md', 'examples/gan.md')
    """
    if path in _PAGES:
        return _PAGES[path]
    if path.startswith("examples/"):
        return str(Path(path).with_suffix(".md"))
    return path.removeprefix("docs/") if path.startswith("docs/") else None


def linked(text: str, source: str, uri: str) -> str:
    """Return Markdown of the file ``source`` for the page ``uri``: links lead to pages of the site.

    Codes of rules and causes become links, except in code, in headings and on their own page.
    """
    folder, place = posixpath.dirname(source), posixpath.dirname(uri)

    def span(match: re.Match[str]) -> str:
        if match["heading"] is not None:
            return match[0]
        if match["target"] is not None:
            path, mark, anchor = match["target"].partition("#")
            if "://" in path or not path:
                return match[0]
            found = site_uri(posixpath.normpath(posixpath.join(folder, path)))
            if found is None:
                return match["text"].strip("[]")
            return f"{match['text']}({posixpath.relpath(found, place or '.')}{mark}{anchor})"
        word = match["bare"] or match["code"]
        page = code_pages().get(word)
        if page is None or page == uri:
            return match[0]
        shown = f"`{word}`" if match["code"] else word
        return f"[{shown}]({posixpath.relpath(page, place or '.')})"

    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_SPAN.sub(span, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _SPAN.sub(span, text[end:])])


@cache
def code_pages() -> Mapping[str, str]:
    """Codes of rules and causes, each with its page."""
    from frostline.causes.registry import all_causes
    from frostline.rules import all_rules

    return {entry.code: f"rules/{entry.code}.md" for entry in all_rules()} | {
        str(entry.code): f"causes/{entry.code}.md" for entry in all_causes()
    }


def remedy_page(fix: str) -> str:
    """Page of a repair.

    >>> remedy_page("set epsilon")
    'remedies/set-epsilon.md'
    """
    return f"remedies/{fix.replace(' ', '-')}.md"


# ---------------------------------------------------------------- generated pages


def pages() -> Iterator[tuple[str, str, str]]:
    """Yield the pages that are made: address, text, and the file that its links are relative to."""
    for name, uri in _PAGES.items():
        yield uri, (ROOT / name).read_text(encoding="utf-8"), name
    for path, uri in _examples().items():
        text = notebook(path) if path.suffix == ".ipynb" else _program(path)
        yield uri, text, f"examples/{path.name}"
    for uri, text in (
        *_rule_pages(), *_cause_pages(), *_remedy_pages(),
        ("all.md", _all()), ("api.md", _api()), ("commands.md", _commands()),
        ("cases.md", _cases()),
    ):  # fmt: skip
        yield uri, text, f"docs/{uri}"


def _examples() -> dict[Path, str]:
    found = sorted((ROOT / "examples").iterdir())
    kinds = (".py", ".ipynb")
    return {path: f"examples/{path.stem}.md" for path in found if path.suffix in kinds}


def _program(path: Path) -> str:
    import ast

    source = path.read_text(encoding="utf-8")
    words = ast.get_docstring(ast.parse(source)) or ""
    first = words.partition("\n")[0].rstrip(".")
    return f"# {first}\n\n`examples/{path.name}`\n\n```python\n{source}```\n"


def notebook(path: Path) -> str:
    """Return a notebook as Markdown, with the outputs that it holds."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            shown = output.get("text") or output.get("data", {}).get("text/plain", ())
            parts.append(f"```text\n{''.join(shown).rstrip()}\n```")
    return "\n\n".join(parts) + f"\n\nThe notebook is `examples/{path.name}`.\n"


def _rule_pages() -> Iterator[tuple[str, str]]:
    from frostline.rules import all_rules

    rows = []
    for entry in all_rules():
        rows.append(f"| {entry.code} | {entry.name} | {entry.severity} | {entry.summary} |")
        head = f"{entry.severity}; needs {entry.needs}"
        if entry.fix is not None:
            known = {repair.fix for repair in _repairs()}
            fix = f"[{entry.fix}](../{remedy_page(entry.fix)})"
            head += f"; repair: {fix if entry.fix in known else entry.fix}"
        body = entry.documentation
        for heading, code in zip(
            ("## Use instead", "## When not to use it"), _blocks(body), strict=True
        ):
            body = body.replace(heading, f"{_said(entry, code)}\n{heading}", 1)
        body = re.sub(r"(?m)^## (.*)$", r"## \1\n", body)
        yield (
            f"rules/{entry.code}.md",
            f"# {entry.code} {entry.name}\n\n*{head}*\n\n{body}\n",
        )
    table = "\n".join(["| code | name | severity | says |", "|---|---|---|---|", *rows])
    text = (
        "# Rules\n\n`frostline lint` and `frostline diagnose` apply them; `frostline rule CODE` "
        f"prints the same page.\n\n{table}\n"
    )
    yield "rules/index.md", text


def _blocks(documentation: str) -> list[str]:
    return re.findall(r"```python\n(.+?)```", documentation, re.DOTALL)


def _said(entry: Any, code: str) -> str:
    """What Frostline says to an example of a rule, run here and now."""
    import keras
    import numpy as np

    import frostline as fl

    names: dict[str, Any] = {"keras": keras, "np": np, "fl": fl}
    keras.utils.set_random_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Keras thinks of numpy 2 is not about the example
        exec(compile(code, entry.code, "exec"), names)
        if entry.needs == "data":
            options = {key: names[key] for key in ("reference", "batch_size") if key in names}
            report = fl.diagnose(
                names["model"], names["data"], select=entry.code, verbose=0, **options
            )
            call = f'fl.diagnose(model, data, select="{entry.code}")'
        else:
            report = fl.lint(names["model"], select=entry.code)
            call = f'fl.lint(model, select="{entry.code}")'
    found = [f"{each.code} at {', '.join(each.sites)}: {each.message}" for each in report.findings]
    lines = "\n".join(found) or "nothing found"
    return f"`{call}` says:\n\n```text\n{lines}\n```\n"


def _cause_pages() -> Iterator[tuple[str, str]]:
    from frostline.causes.registry import all_causes

    rows = []
    for entry in all_causes():
        kind = "BN" if entry.code.is_bn else "not BN"
        rows.append(f"| {entry.code} | {kind} | {entry.summary} |")
        treated = [f"[{fix}](../{remedy_page(fix)})" for fix in entry.treated_by]
        body = re.sub(r"(?m)^## (.*)$", r"## \1\n", entry.documentation)
        parts = [
            f"# {entry.code}", f"*{kind}; repairs that are tried: {', '.join(treated) or 'none'}*",
            body, _measured(case for case in cases() if entry.code in case.expected),
        ]  # fmt: skip
        yield f"causes/{entry.code}.md", "\n\n".join(parts) + "\n"
    table = "\n".join(["| code | | what |", "|---|---|---|", *rows])
    text = (
        "# Causes\n\nWhat `fl.diagnose` can name, in the order in which it prefers them where two "
        f"explain equally much.\n\n{table}\n"
    )
    yield "causes/index.md", text


def _remedy_pages() -> Iterator[tuple[str, str]]:
    from frostline.causes.registry import treated_by

    rows = []
    for repair in _repairs():
        page = posixpath.basename(remedy_page(repair.fix))
        rows.append(f"| [{repair.fix}]({page}) | {repair.summary} |")
        codes = ", ".join(f"`{code}`" for code in treated_by(repair.fix))
        body = re.sub(r"(?m)^## (.*)$", r"## \1\n", repair.documentation)
        for code in _blocks(repair.documentation):
            file = "examples/symptom_keras.py"
            made = fill_examples.Example("import frostline as fl\n" + code, file, "").run(ROOT)
            body += f"\n\nOn the network of [{file}](../{site_uri(file)}) it prints:\n\n"
            body += f"```text\n{made}```"
        chosen = (case for case in cases() if case.remedy.startswith(_names(repair.fix)))
        parts = [f"# {repair.fix}", f"*for {codes}*", body, _measured(chosen)]
        yield remedy_page(repair.fix), "\n\n".join(parts) + "\n"
    table = "\n".join(["| repair | what |", "|---|---|", *rows])
    text = (
        "# Remedies\n\n`fl.diagnose` tries each of them on your samples where a cause asks for it, "
        f"without changing the model, and reports what it would give.\n\n{table}\n"
    )
    yield "remedies/index.md", text


def _repairs() -> Sequence[Any]:
    from frostline.remedies.registry import all_repairs

    return all_repairs()


def _names(fix: str) -> tuple[str, ...]:
    """How the names of a repair's candidates begin."""
    others = {
        "freeze": "lock", "set-momentum": "momentum", "set epsilon": "epsilon",
        "fix preprocessing": "inputs as", "relabel": "rename",
    }  # fmt: skip
    return (others.get(fix, fix),)


# ---------------------------------------------------------------- cases


@dataclass(frozen=True, kw_only=True)
class MeasuredCase:
    """One case of the casebook and what was answered."""

    library: str
    number: str
    title: str
    expected: tuple[str, ...]
    answers: tuple[str, ...]
    right: bool
    remedy: str
    verdict: str


@cache
def cases() -> tuple[MeasuredCase, ...]:
    """The cases whose answers are committed under docs/results."""
    found = []
    for library, file in _CASES.items():
        read = json.loads((ROOT / "docs" / "results" / file).read_text(encoding="utf-8"))
        found += [
            MeasuredCase(
                library=library, number=case["number"], title=case["title"],
                expected=tuple(case["expected"]), answers=tuple(case["answers"]),
                right=case["right"], remedy=case["remedy"] or "", verdict=case["verdict"],
            )
            for case in read["cases"]
        ]  # fmt: skip
    return tuple(found)


def _measured(chosen: Iterator[MeasuredCase]) -> str:
    lines = [
        f"**{case.library}, case {case.number}: {_cell(case.title)}**\n\n> {_cell(case.verdict)}"
        for case in chosen
    ]
    if not lines:
        return ""
    head = "## Measured\n\nWhat `fl.diagnose` said in [the casebook](../casebook.md):\n\n"
    return head + "\n\n".join(lines[:6])


def _cases() -> str:
    rows = [
        f"| {case.library} {case.number} | {_cell(case.title)} | "
        f"{' '.join(f'`{code}`' for code in case.expected)} | "
        f"{' '.join(f'`{code}`' for code in case.answers[:2])} | "
        f"{'right' if case.right else 'wrong'} | {_cell(case.remedy)} |"
        for case in cases()
    ]
    head = """---
hide: [toc]
---

# The casebook as a table

Every case of [the casebook](casebook.md) with what `fl.diagnose` answered. Type in the box to keep
the rows that hold all of your words.

<p><label for="filter">Search the table: </label>
<input id="filter" type="search" autocomplete="off">
<span id="filtered" role="status"></span></p>

| case | what happened | expected | answered | | first remedy |
|---|---|---|---|---|---|"""
    return "\n".join([head, *rows, ""])


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


# ---------------------------------------------------------------- everything, API, commands


def _all() -> str:
    import frostline as fl
    from frostline.causes.registry import all_causes
    from frostline.rules import all_rules

    parts = ["# All of Frostline\n\nEverything public, one line each.\n\n## Calls\n"]
    parts += ["| call | what |", "|---|---|"]
    parts += [
        f"| [`fl.{name}`](api.md#frostline.{name}) | {_first(getattr(fl, name))} |"
        for name in _public()
    ]
    for room, names in _members().items():
        parts += [f"\n## {room}\n", "| name | what |", "|---|---|"]
        parts += [
            f"| [`{name}`](api.md#{room}.{name}) | {_first(value)} |"
            for name, value in names.items()
        ]
    parts += ["\n## Commands\n", "| command | what |", "|---|---|"]
    parts += [
        f"| [`{name}`](commands.md#{name.replace(' ', '-')}) | {_cell(_line(command.help))} |"
        for name, command in _command_tree()
    ]
    parts += ["\n## Rules\n", "| rule | what |", "|---|---|"]
    parts += [f"| {rule.code} {rule.name} | {_cell(rule.summary)} |" for rule in all_rules()]
    parts += ["\n## Causes\n", "| cause | what |", "|---|---|"]
    parts += [f"| `{entry.code}` | {_cell(entry.summary)} |" for entry in all_causes()]
    parts += ["\n## Remedies\n", "| remedy | what |", "|---|---|"]
    parts += [f"| [{r.fix}]({remedy_page(r.fix)}) | {_cell(r.summary)} |" for r in _repairs()]
    return "\n".join(parts) + "\n"


def _api() -> str:
    parts = ["# API\n", "`import frostline as fl`\n"]
    parts += [f"::: frostline.{name}\n" for name in _public()]
    for room, names in _members().items():
        parts += [f"## {room}\n", *(f"::: {room}.{name}\n" for name in names)]
    return "\n".join(parts)


def _public() -> list[str]:
    import frostline as fl

    return [
        name for name in fl.__all__ if not inspect.ismodule(getattr(fl, name)) and name[0] != "_"
    ]


def _members() -> dict[str, dict[str, Any]]:
    import frostline as fl

    return {
        module.__name__: {
            name: value for name, value in sorted(vars(module).items()) if inspect.isclass(value)
            and value.__module__.startswith("frostline.")
        }
        for module in (fl.callbacks, fl.layers)
    }  # fmt: skip


def _first(value: Any) -> str:
    text = _cell(_line(inspect.getdoc(value)))
    return re.sub(r"``([^`]+)``|:\w+:`~?(?:frostline\.)?([^`]+)`", r"`\1\2`", text)


def _line(text: str | None) -> str:
    return " ".join((text or "").partition("\n\n")[0].split())


def _command_tree() -> Iterator[tuple[str, Any]]:
    import typer

    from frostline.cli import app

    def below(command: Any, name: str) -> Iterator[tuple[str, Any]]:
        for word, inner in getattr(command, "commands", {}).items():
            if getattr(inner, "commands", None) is None:
                yield f"{name} {word}", inner
            yield from below(inner, f"{name} {word}")

    yield from below(typer.main.get_command(app), "frostline")


def _commands() -> str:
    parts = [
        """# Commands

Exit codes: 0 clean, 1 a gap or findings, 2 could not run, 130 interrupted, 128 and the number of a
signal that ended it, 141 when the reader of a pipe has gone; `--exit-zero` makes 1 into 0.
[What the forms of `--format` hold](formats.md).
"""
    ]
    for name, command in _command_tree():
        parts += [f"## {name}\n", f"{_cell(command.help or '')}\n"]
        rows = [
            f"| {' '.join(f'`{word}`' for word in option.opts)} | "
            f"{_cell(getattr(option, 'help', None) or '')} |"
            for option in command.params
        ]
        if rows:
            parts += ["| argument or option | |", "|---|---|", *rows, ""]
    return "\n".join(parts)


# ---------------------------------------------------------------- what MkDocs calls


def on_config(config: Any) -> Any:
    """Complete the navigation: a page for each rule, cause, remedy and example, and new documents.

    A document of docs/ that ``mkdocs.yml`` does not place stands under "Background".
    """
    from frostline.causes.registry import all_causes
    from frostline.rules import all_rules

    more: dict[str, list[Any]] = {
        "Rules": [{f"{r.code} {r.name}": code_pages()[r.code]} for r in all_rules()],
        "Causes": [{str(entry.code): code_pages()[entry.code]} for entry in all_causes()],
        "Remedies": [{str(r.fix): remedy_page(r.fix)} for r in _repairs()],
        "Examples": [{Path(uri).stem: uri} for uri in _examples().values()],
    }
    placed = set(re.findall(r"[\w/-]+\.md", json.dumps(config.nav)))
    documents = (path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md"))
    more["Background"] = sorted({path.as_posix() for path in documents} - placed)
    for section in config.nav:
        for title, entries in section.items() if isinstance(section, dict) else ():
            if title in more:
                entries += more[title]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    os.environ.setdefault("KERAS_BACKEND", "torch")
    for uri, text, source in pages():
        files.append(File.generated(config, uri, content=linked(text, source, uri)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make links of a page of docs/ into links of the site."""
    if page.file.generated_by is not None:
        return markdown
    return linked(markdown, f"docs/{page.file.src_uri}", page.file.src_uri)


def on_page_content(content: str, **_: Any) -> str:
    """Make the references of docstrings readable, and links where the page has the name."""

    def reference(match: re.Match[str]) -> str:
        name = match["name"]
        return f'<autoref identifier="{name}" optional><code>{name}</code></autoref>'

    return _ROLE.sub(reference, content)
