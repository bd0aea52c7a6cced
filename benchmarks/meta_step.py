"""Times one meta-step (zero_grad and the mean outer gradient of a meta-batch) of both engines and of other libraries.

    python benchmarks/meta_step.py --rounds 5 --device cpu --threads 2 --json cpu.json
    python benchmarks/meta_step.py --draw cpu.json gpu.json --png docs/meta_step.png

Contestants take turns in one process, in an order that rotates from round to round. A ratio is taken within a round,
because the speed of a shared machine drifts. benchmarks/README.md says what every column means.
"""

import argparse
import importlib.util
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

from fewshot.processes.surroundings import settle

if __name__ == "__main__":
    settle()  # as train.py does, before torch is there

import peers
import torch
from apart import Apart
from instruments import MIB, Machine, Traffic, launches, relative_error
from rich.console import Console
from rich.table import Table
from settings import Setting, Torch, settings
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fewshot.batched import engine as batched
from fewshot.batched.execution import CudaGraphs, one_by_one
from fewshot.data.task import Task

ENGINES: dict[str, Callable] = {
    "sequential": peers.sequential,
    "batched": peers.batched,
    "eager": peers.batched,  # without CUDA graphs
    "im2col": peers.im2col,
    "learn2learn": peers.learn2learn_loop,
    "higher": peers.higher_loop,
    "torchopt": peers.torchopt_loop,
}
AS_IS = "learn2learn as it is"  # on a CPU, without the kept memory and the sleeping threads of all others here
CONTESTANTS = (*ENGINES, AS_IS, "jax")
OURS = ("sequential", "batched", "eager", "im2col")
ON_GPU_ONLY, ON_CPU_ONLY = ("eager", "im2col"), (AS_IS,)
BASELINE = "learn2learn"  # on a CPU AS_IS, if that takes part
# Colours and marks of the others; the colours are Okabe and Ito's, which the colour-blind can tell apart.
LOOKS = (
    ("#0072B2", "o"),
    ("#D55E00", "D"),
    ("#009E73", "^"),
    ("#CC79A7", "v"),
    ("#E69F00", "s"),
    ("#56B4E9", "P"),
    ("#999999", "X"),
    ("#000000", "|"),
)
TURN = 0.2  # seconds; a contestant whose step is shorter repeats it until its turn is as long


def count(setting: Setting, machine: Machine) -> tuple[int, int]:
    """Floating-point operations (of convolutions and matrix products) and bytes of a meta-step.

    The operations are counted on one task of the sequential engine and multiplied by the tasks, because torch's counter
    takes the gradient of a grouped convolution's weight for that of a dense one. The bytes are counted on the batched
    engine with all tasks at once, because it has fewer operations.
    """
    network, tasks = setting.start(machine.device)
    with FlopCounterMode(display=False) as flops:
        peers.sequential(network, Task(*(field[:1] for field in tasks)), **setting.knobs)
    with Traffic() as traffic, mock.patch.object(batched, "tasks_in_a_row", return_value=False):
        peers.batched(network, tasks, **setting.knobs, execute=one_by_one)
    return flops.get_total_flops() * setting.tasks, traffic.bytes


def exact_gradients(setting: Setting, machine: Machine) -> dict[str, Tensor]:
    """The outer gradient in float64, one task after the other, with which every contestant is compared."""
    network, tasks = setting.start(machine.device)
    tasks = tasks._replace(support=tasks.support.double(), query=tasks.query.double())
    exact = Torch(peers.sequential, network.double(), tasks, **setting.knobs)
    exact()
    return {name: gradient.cpu() for name, gradient in exact.gradients().items()}


def measure(setting: Setting, names: list[str], machine: Machine, *, rounds: int, cap: float) -> list[dict]:
    """One row per contestant. After `cap` seconds of rounds no fourth or later round begins."""
    exact, (flops, traffic) = exact_gradients(setting, machine), count(setting, machine)
    floor = max(flops / machine.flops_per_second, traffic / machine.bytes_per_second)
    entered, rows, times = {}, {}, {}
    for name in names:
        try:
            entered[name], times[name], rows[name] = enter(name, setting, machine)
        except Exception as error:
            if name in OURS:
                raise
            print(f"{name} is left out of {setting.name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    seconds, processor = {name: [] for name in entered}, {name: [] for name in entered}
    began = time.perf_counter()
    for turn in range(rounds):
        order = list(entered)[turn % len(entered) :] + list(entered)[: turn % len(entered)]
        for name in order:
            apart = isinstance(entered[name], Apart)
            wall, busy = (entered[name].timed if apart else partial(machine.timed, entered[name]))(times[name])
            seconds[name].append(wall)
            processor[name].append(busy)
        if turn >= 2 and time.perf_counter() - began > cap:
            break
    baseline = AS_IS if AS_IS in entered else BASELINE
    for name, row in rows.items():
        median = statistics.median(seconds[name])
        ratios = [theirs / own for theirs, own in zip(seconds.get(baseline, []), seconds[name], strict=False)]
        row |= {
            "setting": setting.name,
            "contestant": name,
            "milliseconds": 1000 * median,
            "tasks_per_second": setting.tasks / median,
            "processor_milliseconds": 1000 * statistics.median(processor[name]),
            "speedup": statistics.median(ratios) if ratios else None,
            "relative_error": None if name == AS_IS else relative_error(entered[name].gradients(), exact),
            "times_floor": median / floor,
            "round_milliseconds": [1000 * wall for wall in seconds[name]],
            "round_processor_milliseconds": [1000 * busy for busy in processor[name]],
            "gflop": flops / 1e9,
            "mib_moved": traffic / MIB,
        }
        if name == AS_IS:
            entered[name].close()
    return list(rows.values())


def enter(name: str, setting: Setting, machine: Machine) -> tuple[Callable, int, dict]:
    """Makes a contestant, warms it up and measures what would disturb the timing: steps per turn, memory and kernels.

    On a GPU the memory is the peak of the warm-up, in which a CUDA graph is captured; to replay one allocates nothing.
    """
    if name == AS_IS:
        contestant = Apart(setting.name, setting.tasks, torch.get_num_threads())
        contestant.timed(1)
        return contestant, max(1, round(TURN / contestant.timed(1)[0])), {"kernels": None, "peak_mib": None}
    network, tasks = setting.start(machine.device)
    if name == "jax":
        contestant = peers.Jax(network, tasks, **setting.knobs, tf32=machine.tf32)
    else:
        recorded = {"execute": CudaGraphs()} if machine.on_gpu and name in ("batched", "im2col") else {}
        contestant = Torch(ENGINES[name], network, tasks, **setting.knobs, **recorded)
    before = torch.cuda.memory_allocated() if machine.on_gpu else 0
    if machine.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3 if machine.on_gpu else 1):
        warm = machine.seconds(contestant)
    peak = torch.cuda.max_memory_allocated() - before if machine.on_gpu else 0
    if name == "jax":
        kernels, peak = None, contestant.temporary_bytes
    else:
        # On a GPU a loop over tasks is profiled for one task, because it takes seconds to read ten thousand events.
        loop = machine.on_gpu and name not in ("batched", "eager", "im2col")
        one = (
            Torch(ENGINES[name], network, Task(*(field[:1] for field in tasks)), **setting.knobs)
            if loop
            else contestant
        )
        kernels, cpu_peak = launches(one, machine)
        kernels *= setting.tasks if loop else 1
        peak = peak or cpu_peak
        if name == "batched" and not machine.on_gpu:  # the profiler does not see its threads
            alone = partial(Torch, ENGINES[name], network, tasks, **setting.knobs, execute=one_by_one)
            with mock.patch.object(batched, "tasks_in_a_row", return_value=False):  # all tasks at once, as on a GPU
                kernels, _ = launches(alone(), machine)
            together = batched.tasks_of_a_pass(network, tasks)
            peak = launches(alone(tasks_at_once=together), machine)[1] * torch.get_num_threads()
    return contestant, max(1, round(TURN / warm)), {"kernels": kernels, "peak_mib": peak / MIB}


def table(title: str, rows: list[dict]) -> Table:
    table = Table(title=title, title_justify="left")
    headings = ("", "ms", "CPU ms", "tasks/s", "speed-up", "peak MiB", "kernels", "rel. error", "x floor", "rounds")
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(
            row["contestant"],
            f"{row['milliseconds']:.1f}",
            f"{row['processor_milliseconds']:.1f}",
            f"{row['tasks_per_second']:.1f}",
            "" if row["speedup"] is None else f"{row['speedup']:.2f}",
            "" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}",
            "" if row["kernels"] is None else str(row["kernels"]),
            "" if row["relative_error"] is None else f"{row['relative_error']:.1e}",
            f"{row['times_floor']:.1f}",
            str(len(row["round_milliseconds"])),
        )
    return table


def draw(files: list[Path], png: Path) -> None:
    """Speed-up over learn2learn per setting, a panel per file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    measured = [json.loads(file.read_text()) for file in files]
    names = list(dict.fromkeys(row["setting"] for content in measured for row in content["rows"]))
    size = (2.5 + 4 * len(files), 1.4 + 0.42 * len(names))
    figure, panels = plt.subplots(1, len(files), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, content in zip(panels[0], measured, strict=True):
        panel.axvline(1, color="black", linewidth=1, label=BASELINE)
        others = [name for name in CONTESTANTS if name != BASELINE]
        for place, (contestant, (colour, marker)) in enumerate(zip(others, LOOKS, strict=True)):
            rows = [row for row in content["rows"] if row["contestant"] == contestant and row["speedup"]]
            rows = [] if contestant == AS_IS else rows  # its speed-up is 1, because all are compared with it
            if not rows:
                continue
            heights = [
                names.index(row["setting"]) + 0.12 * (place - 2) for row in rows
            ]  # so that equal ones do not hide each other
            panel.plot([row["speedup"] for row in rows], heights, marker, color=colour, markersize=5, label=contestant)
        machine = content["machine"]
        panel.set_title(f"{machine['device']}, {machine['precision']}, torch {machine['torch']}", fontsize=9)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        panel.set_yticks(range(len(names)), names)
        panel.grid(color="0.9")
        panel.set_axisbelow(True)
    panels[0][0].invert_yaxis()
    figure.supxlabel("times as fast as learn2learn, same tasks and weights", fontsize=10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(png, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", default="", help="a regular expression; settings whose names match it")
    parser.add_argument("--contestants", help="separated by commas; all if left out (eager and im2col on a GPU only)")
    parser.add_argument("--tasks", type=int, help="of a meta-batch, in place of each setting's own number")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cap", type=float, default=60, help="seconds of rounds after which no fourth or later one begins"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["float32", "tf32"], default="float32", help="tf32: on a GPU only")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--draw", type=Path, nargs="+", metavar="JSON", help="measure nothing, draw these")
    parser.add_argument("--png", type=Path, default=Path("meta_step.png"))
    arguments = parser.parse_args()
    if arguments.draw:
        draw(arguments.draw, arguments.png)
        return
    asked = (arguments.contestants or ",".join(CONTESTANTS)).split(",")
    elsewhere = ON_GPU_ONLY if arguments.device == "cpu" else ON_CPU_ONLY
    if not arguments.contestants:
        asked = [name for name in asked if name not in elsewhere]
    names = [name for name in CONTESTANTS if name in asked]
    for absent in [name for name in names if name not in OURS and not importlib.util.find_spec(name.split()[0])]:
        print(f"{absent} is skipped: not installed here; pip install {absent}")
        names.remove(absent)
    machine = Machine(arguments.device, arguments.threads, tf32=arguments.precision == "tf32")
    description, rows, console = machine.describe(), [], Console()
    console.width = max(console.width, 100)
    for key, value in description.items():
        print(f"{key}: {value:.0f}" if isinstance(value, float) else f"{key}: {value}")
    if "jax" in names and not machine.on_gpu and description["cores"] != description["threads"]:
        print(f"jax runs on {description['cores']} cores, torch on {description['threads']}: taskset makes them equal")
    for setting in settings():
        if re.search(arguments.settings, setting.name):
            setting = replace(setting, tasks=arguments.tasks or setting.tasks)
            rows += (measured := measure(setting, names, machine, rounds=arguments.rounds, cap=arguments.cap))
            console.print(table(setting.name, measured))
            if arguments.json:  # after every setting, so that a run that is stopped leaves what it has measured
                arguments.json.write_text(json.dumps({"machine": description, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
