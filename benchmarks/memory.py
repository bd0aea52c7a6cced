"""Measures memory and time of a second-order meta-step by the number of inner steps, with and without recompute_steps.

    python benchmarks/memory.py --json FILE
    python benchmarks/memory.py --memory glibc --networks resnet12 --steps 1 2 5 --contestants sequential,learn2learn

The step is of one task of 84x84 photos, 5-way 5-shot, on the CPU. Every measurement is the first step of a process of
its own. `peak` is the largest resident memory during the step, less what was resident before it. Rows that FILE has
already are not measured again. It works on Linux only.
"""

import argparse
import importlib
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import peers
import torch
from instruments import Machine
from rich.console import Console
from rich.table import Table

from fewshot.batched import engine as batched
from fewshot.data.task import Task
from fewshot.inner_loop import InnerLoop
from fewshot.maml import sequential
from fewshot.models import resnet12
from fewshot.models.network import Network, conv4_pooled
from fewshot.processes.surroundings import keep_memory


def ours(engine: Callable, model: Network, tasks: Task, **knobs: float | bool) -> None:
    """An engine of this project, called as those of peers.py are."""
    engine(model, tasks, InnerLoop(**knobs))


NETWORKS = {"conv4_64": partial(conv4_pooled, width=64, norm_first=True), "resnet12": resnet12}
CONTESTANTS: dict[str, Callable] = {
    "sequential": partial(ours, sequential.meta_gradient),
    "sequential+recompute": partial(ours, sequential.meta_gradient, recompute_steps=True),
    "batched": partial(ours, batched.meta_gradient),
    "batched+recompute": partial(ours, batched.meta_gradient, recompute_steps=True),
    "learn2learn": peers.learn2learn_loop,
    "higher": peers.higher_loop,
    "torchopt": peers.torchopt_loop,
}
OTHERS = ("higher", "torchopt")  # the contestants that take part where they are installed
MEMORY = ("kept", "glibc")  # as in every command of this project; as in other programs, with glibc's defaults
WAYS, SHOTS, SIZE, INNER_LR = 5, 5, 84, 0.01
MB = 10**6


def resident(line: str) -> int:
    """Bytes. line: VmRSS (resident now) or VmHWM (the most since it was reset)."""
    return 1024 * int(re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure(network: str, contestant: str, steps: int, queries: int, threads: int) -> dict[str, float]:
    """Measures in this process, which must have computed nothing yet."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = NETWORKS[network](channels=3, size=SIZE, ways=WAYS)
    images = [torch.randn(1, WAYS * number, 3, SIZE, SIZE) for number in (SHOTS, queries)]
    labels = [torch.arange(WAYS).repeat(number)[None] for number in (SHOTS, queries)]
    if contestant in OTHERS:
        importlib.import_module(contestant)
    tasks = Task(images[0], labels[0], images[1], labels[1])
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    began = time.process_time()
    CONTESTANTS[contestant](model, tasks, inner_lr=INNER_LR, inner_steps=steps, first_order=False)
    return {"processor_seconds": time.process_time() - began, "peak_mb": (resident("VmHWM") - before) / MB}


def in_a_process(row: dict, *, gigabytes: float, seconds: float) -> dict[str, float | str]:
    """What `measure` returns in a new process, or why it returned nothing.

    gigabytes: what the process may map beyond the memory that torch maps at its start.
    """
    command = [sys.executable, __file__, "--one", json.dumps(row), "--gigabytes", str(gigabytes)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(row["threads"])}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return {"not_run": f"over {seconds:g} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if re.search("can't allocate memory|MemoryError|bad_alloc", done.stderr):
        return {"not_run": f"over {gigabytes:g} GB"}
    return {"not_run": (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]}


def too_large(row: dict, rows: list[dict]) -> dict[str, str] | None:
    """Why a row is not tried: with fewer steps it needed too much memory already."""
    for old in rows:
        fewer = old["steps"] < row["steps"] and (row | {"steps": old["steps"]}).items() <= old.items()
        if fewer and old.get("not_run", "").endswith("GB"):
            return {"not_run": f"{old['not_run']} with {old['steps']}"}
    return None


def table(memory: str, network: str, queries: int, threads: int, rows: list[dict]) -> Table:
    steps = sorted({row["steps"] for row in rows})
    title = f"{network}, {WAYS}-way {SHOTS}-shot, {queries} queries per class, {threads} threads, memory: {memory}"
    shown = Table()
    for heading in ("", *(f"{number} step{'s' * (number > 1)}" for number in steps)):
        shown.add_column(heading, justify="right" if heading else "left")
    print(f"\n{title}; peak MB (processor seconds)")
    for contestant in [name for name in CONTESTANTS if any(row["contestant"] == name for row in rows)]:
        cells = dict.fromkeys(steps, "")
        for row in [row for row in rows if row["contestant"] == contestant]:
            cells[row["steps"]] = row.get("not_run") or f"{row['peak_mb']:,.0f} ({row['processor_seconds']:.1f})"
        shown.add_row(contestant, *cells.values())
    return shown


def stored(file: Path | None) -> list[dict]:
    return json.loads(file.read_text())["rows"] if file and file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--memory", nargs="+", choices=MEMORY, default=MEMORY, help="kept after it was freed, or not")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help="separated by commas")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 20])
    parser.add_argument("--queries", type=int, default=15, help="per class")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gigabytes", type=float, default=16, help="that a process may take")
    parser.add_argument("--seconds", type=float, default=1200, help="that a process may take, start included")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        if asked.one.pop("memory") == "kept":
            keep_memory()
        mapped = 1024 * int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
        resource.setrlimit(resource.RLIMIT_AS, (mapped + int(asked.gigabytes * 10**9),) * 2)
        print(json.dumps(measure(**asked.one)))
        return
    contestants = asked.contestants.split(",")
    for name in [name for name in OTHERS if name in contestants and not importlib.util.find_spec(name)]:
        print(f"{name} is not installed: left out")
        contestants.remove(name)
    limits = {"gigabytes": asked.gigabytes, "seconds": asked.seconds}
    machine = Machine("cpu", asked.threads, tf32=False).describe()
    rows = stored(asked.json)
    for place in product(asked.memory, asked.networks, contestants, sorted(asked.steps)):
        row = dict(zip(("memory", "network", "contestant", "steps"), place, strict=True))
        row |= {"queries": asked.queries, "threads": asked.threads}
        if any(row.items() <= old.items() for old in rows):
            continue
        row |= too_large(row, rows) or in_a_process(row, **limits)
        print(row, flush=True)
        rows = [*(stored(asked.json) or rows), row]
        if asked.json:  # after every process, so that nothing measured is lost
            asked.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    groups = defaultdict(list)
    for row in rows:
        groups[row["memory"], row["network"], row["queries"], row["threads"]].append(row)
    for group, own in groups.items():
        Console().print(table(*group, own))


if __name__ == "__main__":
    main()
