"""Measures meta-steps under several allocators and ways to wait, alone and beside neighbours.

    python benchmarks/surroundings.py --jobs default/batched --contestants glibc,kept,jemalloc --rounds 3 --json FILE
    python benchmarks/surroundings.py --jobs default/sequential --contestants spin,kept --neighbours 1 --json FILE

It measures time, page faults and peak memory. Every measurement is a process of its own, because an allocator is chosen
when a process starts, and the processes take turns. A neighbour is a process that does the same under the same
surroundings until the measured one has ended.
"""

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from glob import glob
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from fewshot.processes.surroundings import settle

KEPT = {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_TOP_PAD_": str(2**26), "MALLOC_MMAP_THRESHOLD_": str(2**30)}
TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=2147483647:glibc.malloc.top_pad=67108864"
GLIBC = {"MALLOC_ARENA_TEST": "8"}  # glibc's default: nothing changes, but fewshot leaves the allocator alone


def preloaded(name: str) -> dict[str, str]:
    """The variables that give a process the allocator of a Debian package."""
    return GLIBC | {"LD_PRELOAD": next(iter(sorted(glob(f"/usr/lib/*/lib{name}.so*"))), f"lib{name}.so is not here")}


CONTESTANTS = {
    "fewshot": {},  # the program's own choice
    "glibc": GLIBC,
    "kept": KEPT,
    "one-arena": {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0"},
    "kept-one-arena": KEPT | {"MALLOC_ARENA_MAX": "1"},
    "kept-one-arena-no-mmap": KEPT | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0"},
    "kept-huge-pages": GLIBC | {"GLIBC_TUNABLES": f"{TUNABLES}:glibc.malloc.mmap_threshold=1073741824"},
    "jemalloc": preloaded("jemalloc"),
    "tcmalloc": preloaded("tcmalloc_minimal"),
    "mimalloc": preloaded("mimalloc"),
    "spin": {"GOMP_SPINCOUNT": "300000"},  # libgomp's default
    "spin-1000": {"GOMP_SPINCOUNT": "1000"},
    "spin-5000": {"GOMP_SPINCOUNT": "5000"},
    "spin-20000": {"GOMP_SPINCOUNT": "20000"},
    "active": {"OMP_WAIT_POLICY": "ACTIVE"},
    "glibc-spin": GLIBC | {"GOMP_SPINCOUNT": "300000"},  # as every other program runs
}


class Job(NamedTuple):
    """The shapes of a training, on which its speed depends."""

    network: str
    channels: int
    size: int
    tasks: int
    ways: int
    shots: int
    inner_steps: int
    queries: int
    first_order: bool
    steps: int  # the meta-steps that are measured


JOBS = {
    "default": Job("conv4_strided", 1, 28, 16, 5, 1, 2, 15, True, 12),
    "default-second": Job("conv4_strided", 1, 28, 16, 5, 1, 2, 15, False, 6),
    "photos84": Job("conv4_pooled", 3, 84, 4, 5, 1, 5, 15, True, 2),
    "photos84-second": Job("conv4_pooled", 3, 84, 4, 5, 1, 5, 15, False, 2),
    "photos84-10q": Job("conv4_pooled", 3, 84, 4, 5, 1, 5, 10, True, 2),  # outputs of 11 million numbers, not 17
    "photos84-10q-second": Job("conv4_pooled", 3, 84, 4, 5, 1, 5, 10, False, 2),
}


def work(name: str, steps: int | None) -> None:
    """Prints "ready" when it is warm, and then what `steps` meta-steps cost; None: goes on until it is ended."""
    settle()
    import torch

    from fewshot import models
    from fewshot.data.task import Task

    job, engine, *at_once = name.split("/")
    job = JOBS[job]
    from fewshot.inner_loop import InnerLoop

    if engine == "sequential":
        from fewshot.maml.sequential import meta_gradient
    else:
        from fewshot.batched.engine import meta_gradient

        meta_gradient = functools.partial(meta_gradient, tasks_at_once=int(at_once[0]) if at_once else None)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    width = {"width": 32} if job.network == "conv4_pooled" else {}
    network = getattr(models, job.network)(channels=job.channels, size=job.size, ways=job.ways, **width)
    labels = [torch.arange(job.ways).repeat_interleave(n).repeat(job.tasks, 1) for n in (job.shots, job.queries)]
    images = [torch.randn(*classes.shape, job.channels, job.size, job.size) for classes in labels]
    tasks = Task(images[0], labels[0], images[1], labels[1])
    optimizer = torch.optim.Adam(network.parameters(), lr=0.001)

    def step() -> None:
        optimizer.zero_grad()
        meta_gradient(network, tasks, InnerLoop(job.inner_steps, 0.01, job.first_order))
        optimizer.step()

    step()
    print("ready", flush=True)
    while steps is None:
        step()
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(steps):
        step()
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    used = {
        "wall": seconds / steps,
        "user": (after.ru_utime - before.ru_utime) / steps,
        "system": (after.ru_stime - before.ru_stime) / steps,
        "faults": (after.ru_minflt - before.ru_minflt) / steps,
        "peak_mib": after.ru_maxrss / 1024,
    }
    print(json.dumps(used | {"processor": used["user"] + used["system"]}))


def start(contestant: str, job: str, steps: int | None) -> subprocess.Popen:
    """Starts a process and returns it when it is warm."""
    inherited = {n: v for n, v in os.environ.items() if not n.startswith(("OMP_", "GOMP_", "MALLOC_", "GLIBC_", "LD_"))}
    command = [sys.executable, __file__, "--work", job, *([] if steps is None else [str(steps)])]
    process = subprocess.Popen(command, env=inherited | CONTESTANTS[contestant], stdout=subprocess.PIPE, text=True)
    if process.stdout.readline() != "ready\n":
        raise SystemExit(f"{contestant}: {job} ended with status {process.wait()}")
    return process


def measure(contestant: str, job: str, steps: int, neighbours: int) -> dict[str, float]:
    others = [start(contestant, job, None) for _ in range(neighbours)]
    try:
        return json.loads(start(contestant, job, steps).communicate()[0])
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", default="default/batched", help="NAME/ENGINE or NAME/batched/TASKS_AT_ONCE,...")
    parser.add_argument("--contestants", default="glibc,fewshot", help=", ".join(CONTESTANTS))
    parser.add_argument("--neighbours", type=int, default=0)
    parser.add_argument("--steps", type=int, help="meta-steps that are measured, in place of each job's own number")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        work(asked.work[0], int(asked.work[1]) if asked.work[1:] else None)
        return
    turns = [(job, contestant) for job in asked.jobs.split(",") for contestant in asked.contestants.split(",")]
    rows: dict[tuple[str, str], list[dict[str, float]]] = {turn: [] for turn in turns}
    for number in range(asked.rounds):
        for job, contestant in turns if number % 2 == 0 else reversed(turns):
            steps = asked.steps or JOBS[job.split("/")[0]].steps
            rows[job, contestant].append(measure(contestant, job, steps, asked.neighbours))
            print(job, contestant, json.dumps(rows[job, contestant][-1]), file=sys.stderr, flush=True)
    columns = ("wall", "processor", "system", "faults", "peak_mib")
    table = Table("job", "contestant", *columns, title=f"per meta-step, median; neighbours: {asked.neighbours}")
    for (job, contestant), rounds in rows.items():
        medians = [statistics.median(costs[column] for costs in rounds) for column in columns]
        table.add_row(job, contestant, *(f"{m:.3f}" if m < 1000 else f"{m:,.0f}" for m in medians))
    Console(width=120).print(table)
    if asked.json:
        measured = [{"job": job, "contestant": name, "rounds": rounds} for (job, name), rounds in rows.items()]
        asked.json.write_text(json.dumps({"neighbours": asked.neighbours, "measured": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
