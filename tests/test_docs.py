"""docs/method.md: the tests and the code that it names are there, and its formulas are none that Markdown breaks.

CONTRIBUTING.md: the files of its recipes do what they say. CHANGELOG.md: its newest version is the program's. Tables of
measured numbers are written from files, and the tutorial's outputs are those of the kept runs.
"""

import ast
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import collect
import curves
import numpy as np
import recipes
import yaml
from conftest import ROOT

from fewshot.sweep.settings import group
from fewshot.sweep.tables import as_markdown

METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")})
NOT_MEASURED = {  # first lines of tables whose numbers no run has measured
    "docs/datasets.md": [
        "| `dataset=` | classes: train, val, test | images per class | pixels | split | `dataset.root` | download |",
        "| `dataset=` | classes: train, val, test | images | split by class name | `dataset.root`, or a zip of it |",
    ],
    "docs/sources.md": ["| split | from | licence of that repository |"],
}
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


def test_what_the_recipes_put_into_a_file_comes_in_one_place_of_it():
    calls = re.findall(
        r"^perl -pi -e '(.+)' (\S+)$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len(calls) == 2
    for program, path in calls:
        text = (ROOT / path).read_text(encoding="utf-8")
        for pattern, _ in re.findall(r"s/((?:\\.|[^/])+)/((?:\\.|[^/])+)/", program):
            assert len(re.findall(pattern, text, re.MULTILINE)) == 1, f"{path}: {pattern}"


def test_the_newest_version_of_the_changelog_is_that_of_the_program_and_its_image():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    versions = re.findall(r"^## \[(\d[\d.]*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == version and versions == sorted(versions, reverse=True)
    assert f'image.version="{version}"' in (ROOT / "Dockerfile").read_text()
    assert f"REGISTRY/fewshot:{version}\n" in (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")


def test_cog_is_asked_about_every_page_with_a_table_of_its_own():
    pages = (ROOT / "docs" / "results" / "pages").read_text(encoding="utf-8").split()
    with_marker = {path for path in PAGES if "<!-- [[[cog" in path.read_text(encoding="utf-8")}
    assert with_marker == {ROOT / page for page in pages}


def test_every_picture_has_its_command():
    rows = (ROOT / "docs" / "results" / "README.md").read_text(encoding="utf-8").partition("## Pictures")[2]
    named = re.findall(r"`([a-z0-9_]+\.png)`", "".join(re.findall(r"^\| .+? \|", rows, flags=re.MULTILINE)))
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.png"))


def typed_tables(page: str) -> list[str]:
    """The first lines of tables with fractions or thousands that stand neither between cog's markers nor in code."""
    for written in (r"<!-- \[\[\[cog .*?\[\[\[end\]\]\] -->", r"^```.*?^```"):
        page = re.sub(written, "", page, flags=re.MULTILINE | re.DOTALL)
    tables = re.findall(r"(?:^\|.*\n)+", page, flags=re.MULTILINE)
    return [table.splitlines()[0] for table in tables if any(map(is_measurement, table.split("|")))]


def is_measurement(cell: str) -> bool:
    """Such as .93, 0.4 ± 0.1, 1,234 or 84 -> 90.5%; a sentence that has a number among its words is none."""
    return bool(re.search(r"(?<![\w.])\d*[.,]\d", cell)) and len(re.findall("[A-Za-z]{2,}", cell)) < 4


def test_tables_of_measurements_are_written_from_files():
    assert typed_tables("| a |\n| --- |\n| .93 ± .01 |\n") == ["| a |"] == typed_tables("| a |\n| --- |\n| 1,234 |\n")
    assert typed_tables("| a |\n| --- |\n| `x` | all of the 0.2 version |\n```text\n| 0.4 |\n```\n") == []
    pages = {path.relative_to(ROOT).as_posix(): typed_tables(path.read_text(encoding="utf-8")) for path in PAGES}
    assert {page: heads for page, heads in pages.items() if heads} == NOT_MEASURED


def final_tests(name: str, setting: str) -> dict[str, list[str]]:
    """The two columns of a run's last table, as `89.67 ± 0.50` for each inner step."""
    rows = [row for row in collect.rows(name, setting=setting, seed=0, split="test") if row.ci95 is not None]
    columns: dict[str, list[str]] = {}
    for row in rows:
        columns.setdefault(row.mode, []).append(f"{100 * row.accuracy:.2f} ± {100 * (row.ci95 or 0):.2f}")
    return columns


def test_the_tables_of_the_tutorial_are_those_of_the_kept_runs():
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    printed = re.findall(r"│ +\d+\*? │ +([\d.]+ ± [\d.]+) │ +([\d.]+ ± [\d.]+) │", page)
    runs = [("tutorial", "first"), *(("panel1", f"{algo}-first") for algo in ("zero", "fomaml", "zero_init"))]
    kept = [final_tests(*run) for run in runs]
    assert printed == [cells for columns in kept for cells in zip(*columns.values(), strict=True)]
    runs_of_seed_0 = [job for setting in curves.settings("panel1", "first") for job in setting.jobs[:1]]
    assert as_markdown(group(runs_of_seed_0), []) in page
