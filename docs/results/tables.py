"""The tables of the docs that are made of files: cog calls a function of this module between two markers of a page.

cog -r -I docs/results @docs/results/pages
"""

import ast
import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
AS_IS = "learn2learn as it is"
CALLED = {  # the contestants of memory.json, in the order of the table
    "sequential+recompute": "`recompute_steps=true`",
    "sequential": "`recompute_steps=false`",
    "batched+recompute": "`recompute_steps=true`, batched engine",
    "batched": "`recompute_steps=false`, batched engine",
    "learn2learn": "learn2learn",
    "higher": "higher",
    "torchopt": "TorchOpt",
}


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table between empty lines, as Markdown wants it behind a marker."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n"


def measured(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))


def house() -> str:
    """The packages from the roof to the ground, each with the first line of its docstring."""
    source, floors, rows = ROOT / "src" / "fewshot", _floors(), []
    for number in reversed(range(len(floors))):
        for name in floors[number]:
            path = source / name / "__init__.py" if (source / name).is_dir() else source / f"{name}.py"
            says = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]
            called = f"`{name}{'/' if path.stem == '__init__' else '.py'}`"
            rows.append([str(number), called, says.partition(": python -m")[0]])
    return markdown(["floor", "package", "what it is for"], rows)


def _floors() -> list[list[str]]:
    """Of tests/test_house.py, from the ground up."""
    tree = ast.parse((ROOT / "tests" / "test_house.py").read_text(encoding="utf-8"))
    nodes = (node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS")
    return ast.literal_eval(next(nodes).value)


def knobs() -> str:
    from fewshot.config.help import table

    return f"\n{table()}\n"


def panel1() -> str:
    import panel1 as script

    return f"\n{script.tables(script.read_runs(), script.read_authors())}\n"


def models() -> str:
    import models as script

    return f"\n{script.table(script.MODELS)}\n"


def meta_step() -> str:
    """Speed-ups over learn2learn's loop as its users run it."""
    heads = ["setting", "learn2learn as it is, ms", "learn2learn, kept and asleep", "sequential", "batched"]
    rows = []
    for setting, by_name in _contestants().items():
        auto = "batched" if setting.startswith("omniglot") else "sequential"  # the rule of engine=auto, two threads
        share = by_name[auto]["processor_milliseconds"] / by_name[AS_IS]["processor_milliseconds"]
        speedups = {name: f"{row['speedup']:.2f}" for name, row in by_name.items()}
        rows.append(
            [
                *(setting, f"{by_name[AS_IS]['milliseconds']:.0f}"),
                *(speedups[name] for name in ("learn2learn", "sequential", "batched")),
                *(f"**{speedups[auto]}** ({auto})", f"{share:.2f}"),
            ]
        )
    return markdown([*heads, "`engine=auto` takes", "its processor time"], rows)


def batched_engine() -> str:
    """What the batched engine takes: memory, kernels, error."""
    heads = ["setting", "tasks/s", "peak MiB: learn2learn", "batched", "kernels: learn2learn", "batched, all at once"]
    heads += ["share", "times the floor", "error against float64: learn2learn", "batched"]
    rows = []
    for setting, by_name in _contestants().items():
        loop, batched = by_name["learn2learn"], by_name["batched"]
        both = (loop, batched)
        rows.append(
            [
                *(setting, f"{batched['tasks_per_second']:.0f}"),
                *(f"{row['peak_mib']:.0f}" for row in both),
                *(f"{row['kernels']:,}" for row in both),
                *(f"{batched['kernels'] / loop['kernels']:.1%}", f"{batched['times_floor']:.1f}"),
                *(f"{row['relative_error']:.0e}" for row in both),
            ]
        )
    return markdown(heads, rows)


def _contestants() -> dict[str, dict[str, dict[str, Any]]]:
    """The rows of cpu.json by setting and contestant."""
    by_setting: dict[str, dict[str, dict[str, Any]]] = {}
    for row in measured("cpu")["rows"]:
        by_setting.setdefault(row["setting"], {})[row["contestant"]] = row
    return by_setting


def zeroing() -> str:
    """Processor milliseconds of a task without and with the zeroing trick, medians of all rounds but the first."""
    medians = {
        tuple(row["contestant"]): statistics.median(row["milliseconds"][1:]) for row in measured("zeroing")["rows"]
    }
    rows = []
    for _, shots, steps, order in [key[:4] for key in medians if key[0] == "learn2learn"]:
        cells = []
        for engine in ("sequential", "batched"):
            off, on = (medians[engine, shots, steps, order, zeroing] for zeroing in ("none", "zeroing"))
            cells += [f"{off:.1f}", f"{on:.1f}", f"{on / off:.2f}"]
        rows.append([f"{shots}, {steps}", order, *cells, f"{medians['learn2learn', shots, steps, order, 'none']:.1f}"])
    heads = ["shots, steps", "order", *("sequential", "with zeroing", "ratio"), *("batched", "with zeroing", "ratio")]
    return markdown([*heads, "learn2learn's loop"], rows)


def memory(network: str, queries: int = 15) -> str:
    """Peak MB and processor seconds by the number of inner steps."""
    measurements = [row for row in measured("memory")["rows"] if (row["network"], row["queries"]) == (network, queries)]
    steps = sorted({row["steps"] for row in measurements})
    cells: dict[str, dict[int, str]] = {}
    for row in measurements:
        value = row.get("not_run") or f"{row['peak_mb']:,.0f} ({row['processor_seconds']:.0f})"
        cells.setdefault(f"{CALLED.get(row['contestant'], row['contestant'])}, {row['memory']}", {})[row["steps"]] = (
            value
        )
    order = [f"{name}, {kept}" for kept in ("kept", "glibc") for name in CALLED.values()]
    rows = [[name, *(cells[name].get(number, "") for number in steps)] for name in sorted(cells, key=order.index)]
    title = f"`{network}`, {queries} quer{'y' if queries == 1 else 'ies'} per class"
    return markdown([title, *(f"{number} step{'s' * (number > 1)}" for number in steps)], rows)


def sensitivity() -> str:
    """How far two trainings are apart after ten updates that began 1e-12 apart in one weight."""
    difference = {(row["start"], row["order"]): row["difference"]["10"] for row in measured("sensitivity")}
    starts = {"fomaml": "random head", "zero_init": "zero at the start", "zero": "zeroed every update"}
    rows = [
        [name, *(f"{difference[start, order]:.1e}".replace("e-0", "e-") for order in ("first", "second"))]
        for start, name in starts.items()
    ]
    return markdown(["", "FOMAML", "SOMAML"], rows)
