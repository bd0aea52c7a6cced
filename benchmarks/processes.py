"""Measures tasks per second of train.py by the number of its processes and threads, and its messages alone.

    python benchmarks/processes.py 1x1 1x1+1x1 2x1 4x1 1x2 --rounds 3 --json benchmarks/processes.json

2x1: two processes, one thread each, that share out each meta-batch. 1x1+1x1: two programs side by side that know
nothing of each other, and the tasks of both: what the machine has to give to two processes of one thread.

FOMAML on glyphs, 5-way 1-shot, 15 queries, 2 inner steps, 32 tasks, conv4_strided. The time is `seconds.train` of
results.json: the outer updates, and a validation on two tasks per process before the first and after the last. Imports
and the start of the processes are left out. With --device cuda each process has a GPU.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from instruments import Machine
from rich.console import Console
from rich.table import Table
from torch.multiprocessing.spawn import spawn

from fewshot.files import write_file
from fewshot.training.ddp import max_over_ranks, mean_over_ranks

ROOT = Path(__file__).parents[1]
META_BATCH_SIZE = 32
WEIGHTS = 91_781  # of conv4_strided with five ways; loss and accuracy stand behind their gradient
TIMES = 300  # that each message is sent


def tasks_per_second(contestant: str, device: str, iterations: int, cache: str) -> float:
    """Of all its programs together, each from start to end."""
    programs, rate = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        for number, program in enumerate(contestant.split("+")):
            processes, threads = map(int, program.split("x"))
            accelerator = {"cpu": "cpu", "cuda": "gpu"}[device]
            trainer = ["trainer=ddp", f"trainer.devices={processes}"] if processes > 1 else [f"trainer={accelerator}"]
            knobs = f"logger=none meta_batch_size={META_BATCH_SIZE} iterations={iterations} val_every={iterations}"
            knobs += f" val_tasks={2 * processes} test_tasks={2 * processes} threads={threads}"
            places = [f"dataset.cache={cache}", f"trainer.accelerator={accelerator}"]
            call = [*trainer, *knobs.split(), *places, f"hydra.run.dir={folder}/{number}"]
            programs.append(subprocess.Popen([sys.executable, ROOT / "train.py", *call], stdout=subprocess.DEVNULL))
        for number, running in enumerate(programs):
            if running.wait():
                raise SystemExit(f"{contestant}: ended with status {running.returncode}")
            results = json.loads((Path(folder) / str(number) / "results.json").read_text())
            rate += iterations * META_BATCH_SIZE / results["seconds"]["train"]
    return rate


def messages(processes: int) -> dict[str, float]:
    """Median seconds of the two messages of an update between so many processes of one thread, by gloo."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_send, (processes, folder), processes)
        return json.loads((Path(folder) / "seconds.json").read_text())


def _send(rank: int, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=processes)
    values = [torch.rand(WEIGHTS), torch.rand(1), torch.rand(1)]
    sent: dict[str, Any] = {
        "gradient": lambda: mean_over_ranks(values),
        "number": lambda: max_over_ranks(rank, torch.device("cpu")),
    }
    seconds: dict[str, float] = {}
    for name, message in sent.items():
        times = []
        for _ in range(TIMES):
            dist.barrier()
            began = time.perf_counter()
            message()
            times.append(time.perf_counter() - began)
        seconds[name] = statistics.median(times)
    if not rank:
        (Path(folder) / "seconds.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("contestants", nargs="*", default=["1x1", "2x1"], metavar="PROCESSESxTHREADS[+..]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    content: dict[str, Any] = {
        "command": f"python benchmarks/processes.py {' '.join(sys.argv[1:])}",
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "machine": Machine(asked.device, 1, tf32=False).describe(),
        "tasks": META_BATCH_SIZE,
        "weights": WEIGHTS,
        "tasks_per_second": {contestant: [] for contestant in asked.contestants},
    }
    sizes = sorted({int(program.split("x")[0]) for name in asked.contestants for program in name.split("+")} - {1})
    content["message_seconds"] = {processes: messages(processes) for processes in sizes if asked.device == "cpu"}
    rates = content["tasks_per_second"]
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(asked.rounds):  # in turns, because the speed of a machine drifts
            for contestant, measured in rates.items():
                measured.append(tasks_per_second(contestant, asked.device, asked.iterations, cache))
            if asked.json:
                write_file(asked.json, json.dumps(content, indent=2) + "\n")
    table = Table("processes x threads", "tasks/s, median", "all rounds", "ratio to the first, median of rounds")
    first = rates[asked.contestants[0]]
    for contestant, measured in rates.items():
        ratio = statistics.median(one / other for one, other in zip(measured, first, strict=True))
        every = " ".join(f"{rate:.1f}" for rate in measured)
        table.add_row(contestant, f"{statistics.median(measured):.1f}", every, f"{ratio:.2f}")
    Console().print(table)
    print(json.dumps(content["message_seconds"]))


if __name__ == "__main__":
    main()
