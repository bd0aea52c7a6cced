"""docs/method.md: the tests and the code that it names are there, and its formulas are none that Markdown breaks."""

import ast
import re
from pathlib import Path

from conftest import ROOT

METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
HELD_BY = re.compile(r"^Test: (.+?)\.\sCode:\s(.+?)\.\n(?=\n#|\Z)", flags=re.MULTILINE | re.DOTALL)


def defined(path: Path) -> set[str]:
    """Functions and classes of a file, and functions of its classes as Class.function."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, kinds):
            inside = {f"{node.name}.{part.name}" for part in node.body if isinstance(part, kinds)}
            names |= {node.name} | (inside if isinstance(node, ast.ClassDef) else set())
    return names


def test_every_section_of_the_method_names_tests_and_code_that_exist():
    held_by = HELD_BY.findall(METHOD)
    sections = re.findall(r"^#+ (\d\.? ?\d*)", METHOD, flags=re.MULTILINE)
    assert len(held_by) == len(sections) - 1  # "2. Closed forms" holds the others
    for folder, places in ((ROOT, 0), (ROOT / "src" / "fewshot", 1)):
        for line in held_by:
            names: list[str] = []
            for named in re.findall(r"`(.+?)`", line[places]):
                if not named.endswith(".py"):
                    names.append(named)
                    continue
                assert names and set(names) <= defined(folder / named), f"{named}: {names}"
                names = []
            assert names == []


def test_every_link_into_the_method_has_its_heading():
    headings = re.findall(r"^#+ (.+)$", METHOD, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        linked = re.findall(r"method\.md#([\w-]+)", path.read_text(encoding="utf-8"))
        assert set(linked) <= anchors, path.name


def test_no_formula_has_what_markdown_takes_for_its_own():
    """GitHub reads Markdown before mathematics: _ after a bracket is emphasis, a backslash takes a sign's meaning."""
    prose = re.sub(r"`[^`]*`", "", METHOD)
    blocks = re.findall(r"(?<=\n\n)\$\$\n(.+)\n\$\$\n(?=\n)", prose)
    prose = re.sub(r"\$\$\n.+\n\$\$", "", prose)
    formulas = blocks + re.findall(r"(?<=[\s(])\$([^\s$](?:[^$\n]*[^\s$])?)\$(?=[\s.,;:)])", prose)
    assert len(blocks) == METHOD.count("$$") / 2 and len(formulas) - len(blocks) == prose.count("$") / 2
    for formula in formulas:
        assert not re.search(r"(?<![A-Za-z0-9])_|\\[^A-Za-z]|[<>*|&~]|\]\s*\(", formula), formula
