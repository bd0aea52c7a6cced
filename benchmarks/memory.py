"""Memory and time of one second-order meta-step by the number of inner steps, with and without recompute_steps.

    python benchmarks/memory.py --networks conv4_64 --json FILE
    python benchmarks/memory.py --networks resnet12 --queries 1 --steps 1 2 5 --contestants sequential,learn2learn

One task of 84x84 photos, 5-way 5-shot, on the CPU. Every number is of a process of its own: `peak` is the largest
resident memory during the step less what was resident before it, and the step is the process's first. Linux alone.
"""

import argparse
import importlib
import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import peers
import torch
from instruments import Machine
from rich.console import Console
from rich.table import Table

from fewshot.batched import engine as batched
from fewshot.data.task import Task
from fewshot.maml import sequential
from fewshot.models import resnet12
from fewshot.models.conv4 import conv4_pooled
from fewshot.processes.surroundings import keep_memory

NETWORKS = {"conv4_64": partial(conv4_pooled, width=64, norm_first=True), "resnet12": resnet12}
CONTESTANTS: dict[str, Callable] = {
    "sequential": sequential.meta_gradient,
    "sequential+recompute": partial(sequential.meta_gradient, recompute_steps=True),
    "batched": batched.meta_gradient,
    "batched+recompute": partial(batched.meta_gradient, recompute_steps=True),
    "learn2learn": peers.learn2learn_loop,
    "higher": peers.higher_loop,
    "torchopt": peers.torchopt_loop,
}
WAYS, SHOTS, SIZE, INNER_LR = 5, 5, 84, 0.01
MB = 10**6


def resident(line: str) -> int:
    """Bytes; line: VmRSS, as it is, or VmHWM, the largest since it was reset."""
    return 1024 * int(re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure(network: str, contestant: str, steps: int, queries: int) -> dict[str, float]:
    """In this process, which has computed nothing yet."""
    torch.manual_seed(0)
    model = NETWORKS[network](channels=3, size=SIZE, ways=WAYS)
    images = [torch.randn(1, WAYS * each, 3, SIZE, SIZE) for each in (SHOTS, queries)]
    labels = [torch.arange(WAYS).repeat(each)[None] for each in (SHOTS, queries)]
    if contestant in ("higher", "torchopt"):
        importlib.import_module(contestant)
    tasks = Task(images[0], labels[0], images[1], labels[1])
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    wall, cpu = time.perf_counter(), time.process_time()
    CONTESTANTS[contestant](model, tasks, inner_lr=INNER_LR, inner_steps=steps, first_order=False)
    seconds = {"wall_seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - cpu}
    return {"peak_mb": (resident("VmHWM") - before) / MB, **seconds}


def in_a_process(*given: str | int, gigabytes: float, seconds: float, threads: int) -> dict[str, float | str]:
    """What `measure` returns, or why there is nothing: more memory or time than it may take.

    Each may map so much beyond what a process of torch does at its start.
    """
    command = [sys.executable, __file__, "--one", *map(str, given), "--gigabytes", str(gigabytes)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return {"not_run": f"over {seconds:g} s"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "memory" in done.stderr:
        return {"not_run": f"over {gigabytes:g} GB"}
    return {"not_run": done.stderr.strip().splitlines()[-1]}


def table(network: str, queries: int, rows: list[dict]) -> Table:
    steps = list(dict.fromkeys(row["steps"] for row in rows))
    title = f"{network}, {WAYS}-way {SHOTS}-shot, {queries} queries per class: peak MB (processor seconds)"
    found = Table(title=title, title_justify="left")
    for heading in ("", *(f"{each} step{'s' * (each > 1)}" for each in steps)):
        found.add_column(heading, justify="right" if heading else "left")
    for contestant in dict.fromkeys(row["contestant"] for row in rows):
        own = {row["steps"]: row for row in rows if row["contestant"] == contestant}
        cells = (
            each.get("not_run") or f"{each['peak_mb']:,.0f} ({each['processor_seconds']:.1f})" for each in own.values()
        )
        found.add_row(contestant, *cells)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help="separated by commas")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 5, 10, 20])
    parser.add_argument("--queries", type=int, default=15, help="per class")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gigabytes", type=float, default=16, help="that a process may take")
    parser.add_argument("--seconds", type=float, default=180, help="that a process may take, start included")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    keep_memory()  # as every command of this project does
    if asked.one:
        mapped = 1024 * int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
        resource.setrlimit(resource.RLIMIT_AS, (mapped + int(asked.gigabytes * 10**9),) * 2)
        network, contestant, *numbers = asked.one
        print(json.dumps(measure(network, contestant, *map(int, numbers))))
        return
    console, rows = Console(), []
    limits = {"gigabytes": asked.gigabytes, "seconds": asked.seconds, "threads": asked.threads}
    machine = Machine("cpu", asked.threads, tf32=False).describe()
    for network in asked.networks:
        for contestant in asked.contestants.split(","):
            for steps in asked.steps:
                found = in_a_process(network, contestant, steps, asked.queries, **limits)
                rows.append({"network": network, "contestant": contestant, "steps": steps, **found})
                print(rows[-1], flush=True)
                if asked.json:  # after every process: what is stopped leaves what it has
                    content = {"machine": machine, "queries": asked.queries, "rows": rows}
                    asked.json.write_text(json.dumps(content, indent=1) + "\n")
        console.print(table(network, asked.queries, [row for row in rows if row["network"] == network]))


if __name__ == "__main__":
    main()
