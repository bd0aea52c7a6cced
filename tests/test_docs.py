"""docs/method.md: the tests and the code that it names are there, and its formulas are none that Markdown breaks.

CONTRIBUTING.md: the files of its recipes do what they say. CHANGELOG.md: its newest version is the program's.
"""

import ast
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import recipes
import yaml
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


def test_the_files_of_the_recipes_do_what_they_say(tmp_path, monkeypatch):
    """python tests/recipes.py follows the recipes as a whole."""
    files, modules = dict(recipes.FILE.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))), {}
    for path, content in files.items():
        if path.startswith("src/"):
            assert not (ROOT / path).exists()
            name = path.removeprefix("src/").removesuffix(".py").replace("/", ".")
            module = modules[Path(path).stem] = ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            exec(compile(content, path, "exec"), module.__dict__)
    loop, steps, state = modules["inner_decay"].InnerDecay(3, 0.4, False, decay=0.5), [], None
    for _ in range(3):
        step, state = loop.update({"head.weight": np.zeros(1)}, {"head.weight": np.ones(1)}, state)
        steps += [*step["head.weight"]]
    assert steps == [-0.4, -0.2, -0.1] and loop.overrides("update")
    splits = modules["stripes"].load(size=28, cache=str(tmp_path))
    says = yaml.safe_load(files["conf/dataset/stripes.yaml"])["dataset"]
    assert {split: len(made.names) for split, made in splits.items()} == says["classes"]
    evidence = {"norms": {"query": 1.0, "support": 1.05}}
    (verdict,) = modules["norms"].verdict(evidence).values()
    assert verdict.kind == "holds" and modules["norms"].section(evidence).tables[0].rows[1] == ("support", "1.1")


def test_the_newest_version_of_the_changelog_is_that_of_the_program():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    versions = re.findall(r"^## \[(\d[\d.]*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == version and versions == sorted(versions, reverse=True)


def test_cog_is_asked_about_every_page_with_a_table_of_its_own():
    pages = (ROOT / "docs" / "results" / "pages").read_text(encoding="utf-8").split()
    written = set(ROOT.glob("*.md")) | {*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")}
    with_marker = {path for path in written if "<!-- [[[cog" in path.read_text(encoding="utf-8")}
    assert with_marker == {ROOT / page for page in pages}
