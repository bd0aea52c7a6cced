"""The tables of the docs that are made of files: cog calls a function of this module between two markers of a page.

cog -r -I docs/results @docs/results/pages
"""

import ast
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import collect

ROOT = Path(__file__).parents[2]
AS_IS = "learn2learn as it is"
STARTS = {"fomaml": "random head", "zero_init": "zero at the start", "zero": "zeroed every update"}
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


def knobs(wanted: str = "") -> str:
    from fewshot.config.help import table

    return f"\n{table(wanted.split())}\n"


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


def memory_growth() -> str:
    """How many times the peak of one inner step more of them take, where both were measured."""
    peaks = {
        (row["network"], row["contestant"], row["memory"], row["steps"]): row["peak_mb"]
        for row in measured("memory")["rows"]
        if row["queries"] == 15 and "peak_mb" in row
    }
    rows = []
    for network, name, kept in dict.fromkeys(key[:3] for key in peaks):
        times = [peaks.get((network, name, kept, steps), 0) / peaks[network, name, kept, 1] for steps in (2, 5, 10, 20)]
        if any(times[1:]):
            rows.append([f"`{network}`", CALLED[name], kept, *(f"{ratio:.2f}" if ratio else "" for ratio in times)])
    order = list(CALLED.values())
    rows.sort(key=lambda row: (row[0], row[2] == "glibc", order.index(row[1])))
    return markdown(["", "", "memory", "2 steps over 1", "5 over 1", "10 over 1", "20 over 1"], rows)


def _surroundings() -> dict[tuple[str, int, str], dict[str, str]]:
    """The medians over rounds by job, neighbours and contestant."""
    medians = {}
    for entrant in measured("surroundings")["measured"]:
        columns = {name: [row[name] for row in entrant["rounds"]] for name in entrant["rounds"][0]}
        median = {name: statistics.median(values) for name, values in columns.items()}
        medians[entrant["job"], entrant["neighbours"], entrant["contestant"]] = {
            "wall": f"{1000 * median['wall']:.0f}",
            "processor": f"{1000 * median['processor']:.0f}",
            "faults": f"{median['faults']:,.0f}",
            "peak": f"{median['peak_mib']:,.0f}",
            "rounds": str(len(entrant["rounds"])),
        }
    return medians


def allocators() -> str:
    """A meta-step of the default job under several allocators."""
    called = {
        "glibc": "glibc as it is",
        "fewshot": "**`mallopt`, as the program does it**",
        "kept-huge-pages": "`mallopt` and huge pages (`glibc.malloc.hugetlb=1`)",
        "kept-one-arena": "`mallopt` and one arena (`MALLOC_ARENA_MAX=1`)",
        "jemalloc": "jemalloc 5.3.0",
        "tcmalloc": "tcmalloc 2.10 (minimal)",
        "mimalloc": "mimalloc 2.0.9",
    }
    medians = _surroundings()
    cells = {name: list(medians["default/batched", 0, name].values()) for name in called}
    heads = ["", "wall, ms", "processor, ms", "page faults", "peak memory, MiB", "rounds"]
    return markdown(heads, [[words, *cells[name]] for name, words in called.items()])


def waiting() -> str:
    """A meta-step of the default job by what waiting threads do."""
    policies = {"fewshot": "**asleep (`PASSIVE`)**", "spin-1000": "1000", "spin-5000": "5000", "spin-20000": "20000"}
    policies["spin"] = "`spin`"
    medians, rows = _surroundings(), []
    for engine in ("batched", "sequential"):
        for neighbours, words in enumerate(("alone", "one neighbour")):
            by_policy = [medians.get((f"default/{engine}", neighbours, policy)) for policy in policies]
            cells = [f"{row['wall']} ({row['processor']})" if row else "" for row in by_policy]
            rows.append([f"`engine={engine}`, {words}", *cells])
    return markdown(["", *policies.values()], rows)


def whole_run() -> str:
    """Seconds and memory of the default run."""
    rows = []
    beside = {"default-quiet-seed0": "alone on the machine", "default-seed0": "beside other programs"}
    for run, words in beside.items():
        about = collect.facts("default")[run]
        seconds = about["seconds"]
        parts = [f"{seconds[part]:.0f}" for part in ("start", "train", "test", "processor")]
        rows.append([words, *parts, f"{about['peak_mb']:,.0f}"])
    heads = ["", "start, s", "training, s", "test, s", "processor, s", "peak memory, MB"]
    return markdown(heads, rows)


def final_test(name: str) -> str:
    """The final test of a kept run in %, as its terminal shows it; one column where both modes are the same."""
    columns = [
        [
            f"{100 * row.accuracy:.2f} ± {100 * (row.ci95 or 0):.2f}"
            for row in collect.rows(name, setting=name, split="test", mode=mode)
            if row.ci95 is not None
        ]
        for mode in ("zeroing_off", "zeroing_on")
    ]
    heads = ["inner step", "test zeroing off", "test zeroing on"]
    if columns[0] == columns[1]:
        columns, heads = columns[:1], ["inner step", "query accuracy"]
    return markdown(heads, [[str(step), *cells] for step, cells in enumerate(zip(*columns, strict=True))])


def prototypical() -> str:
    """Test accuracy of MAML with zeroing and one step, and of prototypical networks by their temperature."""
    updates, rows = (0, 200, 400, 600, 800, 1000), []
    for run, about in sorted(collect.facts("prototypical").items(), key=lambda item: item[1]["config"]["inner_lr"]):
        network, eta = about["config"]["algo"]["head"] == "prototypes", about["config"]["inner_lr"]
        words = f"`algo=protonet`, T = {about['config']['ways'] / eta:.4g}" if network else "`algo=zero`"
        tests = collect.rows("prototypical", setting=run.rpartition("-")[0], split="test", mode="zeroing_on", step=1)
        curve = {row.iteration: row.accuracy for row in tests if row.ci95 is None}
        (final,) = (row for row in tests if row.ci95 is not None)
        cells = [f"{curve[number]:.3f}" for number in updates]
        rows.append([words, f"{eta:g}", *cells, f"{final.accuracy:.3f} ± {final.ci95:.3f}"])
    return markdown(["", "eta", *map("{:,}".format, updates), "final test"], rows)


def sensitivity() -> str:
    """How far two trainings are apart that began with one weight a little apart, after 20 and after 200 updates."""

    def apart(row: dict[str, Any], at: str) -> str:
        value = row["difference"][at]
        return f"{100 * value:.2g}%" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")

    return _by_setting(apart, ("20", "200"))


def sensitivity_curvature() -> str:
    """Of the same trainings, eta times the curvature before the first inner step: at the start, after 200 updates."""
    return _by_setting(lambda row, at: f"{row['sharpness'][at][0]:,.0f}", ("0", "200"))


def _by_setting(cell: Callable[[dict[str, Any], str], str], updates: tuple[str, ...]) -> str:
    """Of benchmarks/sensitivity.json: a line for each data set, shots, inner_lr, steps and precision; six settings."""
    settings = [(order, start) for order in ("first", "second") for start in STARTS]
    lines: dict[str, dict[tuple[str, str], str]] = {}
    for row in measured("sensitivity"):
        steps = f"{row['inner_steps']} step{'s' * (row['inner_steps'] > 1)}"
        of = f"{row['dataset']}, {row['shots']}-shot, inner_lr {row['inner_lr']:g}, {steps}, {row['precision']}"
        lines.setdefault(of, {})[row["order"], row["start"]] = " / ".join(cell(row, at) for at in updates)
    heads = [f"{order}, {start}" for order in ("FOMAML", "SOMAML") for start in STARTS.values()]
    return markdown(["", *heads], [[of, *(cells.get(one, "") for one in settings)] for of, cells in lines.items()])
