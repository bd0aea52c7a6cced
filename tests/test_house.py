"""The plan of the house: each package imports only those below it, files stay short, and names say what they hold."""

import ast
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

SOURCE = ROOT / "src" / "fewshot"
FLOORS = (  # from the ground up; packages of one floor stand side by side and do not import each other
    ("errors", "files", "inner_loop"),  # these three may
    ("algorithms", "norms", "recompute"),
    ("models",),
    ("processes",),
    ("config",),
    ("data",),
    ("results",),
    ("sweep",),
    ("compare",),
    ("theory",),
    ("maml",),
    ("batched",),
    ("training",),
    ("predict",),
    ("export", "adapt", "evidence", "across", "train", "push", "check_algorithm"),
    ("test",),
    ("api",),
    ("__main__",),
)
FLOOR = {package: floor for floor, packages in enumerate(FLOORS) for package in packages}
# What a reader of the paper reads.
PAPER = ("data/task.py", "data/sampler.py", "models", "inner_loop.py", "maml", "theory")
PAPER += ("training/meta_learner.py", "training/zero_head.py")


def imports(path: Path) -> Iterator[str]:
    """The packages of this program that a file imports, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fewshot":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fewshot."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fewshot."))


def test_no_import_runs_back_up():
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        package = path.relative_to(SOURCE).with_suffix("").parts[0]
        for other in imports(path) if package != "__init__" else ():
            beside = FLOOR[other] == FLOOR[package] > 0 and other != package
            if FLOOR[other] > FLOOR[package] or beside:
                wrong.append(f"{path.relative_to(SOURCE)} imports {other}")
    assert not wrong


def test_every_package_has_its_floor():
    names = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert names - {"__init__"} == set(FLOOR)


def lines(*places: str) -> int:
    files = [path for place in places for path in (SOURCE / place,) if path.is_file()]
    files += [path for place in places for path in (SOURCE / place).rglob("*.py")]
    return sum(len(path.read_text().splitlines()) for path in files)


def test_a_file_is_a_screen_to_a_few_and_the_papers_own_part_can_be_read_in_one_sitting():
    assert {path.name: size for path in SOURCE.rglob("*.py") if (size := lines(str(path))) > 350} == {}
    assert lines(*PAPER) < 1700


def test_no_two_benchmarks_import_each_other():
    places = {path.stem: path for path in (ROOT / "benchmarks").rglob("*.py")}
    below: dict[str, set[str]] = {}
    for name, path in places.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        below[name] = modules & set(places)
    while leaves := {name for name, others in below.items() if not others & set(below)}:
        below = {name: others for name, others in below.items() if name not in leaves}
    assert not below


def test_no_test_imports_another():
    nodes = {path.stem: ast.walk(ast.parse(path.read_text())) for path in (ROOT / "tests").rglob("test_*.py")}
    for name, inside in nodes.items():
        assert not {node.module for node in inside if isinstance(node, ast.ImportFrom)} & {*nodes}, name


def chosen_names(path: Path) -> Iterator[tuple[str, int]]:
    """The names that a file gives, with their lines; not those that a library has given."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        match node:
            case (
                ast.Name(id=name, ctx=ast.Store())
                | ast.Attribute(attr=name, ctx=ast.Store())
                | ast.arg(arg=name)
                | ast.alias(asname=str(name))
                | ast.ExceptHandler(name=str(name))
                | ast.FunctionDef(name=name)
                | ast.AsyncFunctionDef(name=name)
            ):
                yield name, node.lineno


def test_a_name_says_what_it_holds():
    paths = [path for place in ("src", "tests", "docs/results", "benchmarks") for path in (ROOT / place).rglob("*.py")]
    unclear = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in paths
        for name, line in chosen_names(path)
        if name in ("found", "each", "given", "how")
    ]
    assert not unclear
