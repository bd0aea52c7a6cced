"""Measures tasks per second of train.py with one process, and with several that share out each meta-batch.

    python benchmarks/processes.py --processes 1 2 --threads 2 --rounds 3 --json FILE

FOMAML on glyphs, 5-way 1-shot, 15 queries, 2 inner steps, 32 tasks, conv4_strided. The time is `seconds.train` of
results.json: the outer updates, and a validation on two tasks per process before the first and after the last. Imports
and the start of the processes are left out. The processes share the threads; with --device cuda each has a GPU.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from instruments import Machine
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
META_BATCH_SIZE = 32


def tasks_per_second(processes: int, threads: int, device: str, iterations: int, cache: str) -> float:
    """Of one run of train.py from start to end."""
    accelerator = {"cpu": "cpu", "cuda": "gpu"}[device]
    trainer = ["trainer=ddp", f"trainer.devices={processes}"] if processes > 1 else [f"trainer={accelerator}"]
    with tempfile.TemporaryDirectory() as folder:
        knobs = f"logger=none meta_batch_size={META_BATCH_SIZE} iterations={iterations} val_every={iterations}"
        knobs += f" val_tasks={2 * processes} test_tasks={2 * processes} threads={max(1, threads // processes)}"
        places = [f"dataset.cache={cache}", f"hydra.run.dir={folder}", f"trainer.accelerator={accelerator}"]
        command = [sys.executable, HERE.parent / "train.py", *trainer, *knobs.split(), *places]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = json.loads((Path(folder) / "results.json").read_text())["seconds"]["train"]
    return iterations * META_BATCH_SIZE / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=2, help="of all processes together")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rates: dict[int, list[float]] = {processes: [] for processes in asked.processes}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(asked.rounds):  # in turns, because the speed of a machine drifts
            for processes, measured in rates.items():
                measured.append(tasks_per_second(processes, asked.threads, asked.device, asked.iterations, cache))
    table = Table("processes", "tasks/s, median", "all rounds", "ratio to the first, median of rounds")
    first = rates[asked.processes[0]]
    for processes, measured in rates.items():
        ratio = statistics.median(one / other for one, other in zip(measured, first, strict=True))
        every = " ".join(f"{rate:.1f}" for rate in measured)
        table.add_row(str(processes), f"{statistics.median(measured):.1f}", every, f"{ratio:.2f}")
    Console().print(table)
    if asked.json:
        machine = Machine(asked.device, asked.threads, tf32=False)
        content = {"machine": machine.describe(), "arguments": {**vars(asked), "json": None}, "tasks_per_second": rates}
        asked.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
