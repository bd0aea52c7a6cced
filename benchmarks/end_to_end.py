"""Measures iterations per second of whole programs, data included: train.py and learn2learn's own Omniglot program.

    python benchmarks/end_to_end.py --zips FOLDER --device cpu --threads 2 --iterations 10 40 --rounds 3 --json FILE

Both train FOMAML, 5-way 1-shot, 15 queries, 2 inner steps, 32 tasks, conv4_strided on Omniglot, with the same number of
threads. Every run is a process of its own, and its wall time counts from start to exit. The steady rate comes from runs
of two lengths: the iterations that the long one has more, over the seconds that it takes longer. Imports and the
reading of the data cancel out in it. Before anything is timed each program runs once, to fill its cache; that time is
printed too.

train.py also validates on two tasks before its first iteration and after its last, tests on two (it cannot do less) and
writes its checkpoints. learn2learn's program only trains.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from instruments import Machine
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
PARTS = ("images_background", "images_evaluation")
META_BATCH_SIZE = 32  # as in learn2learn_omniglot.py


def unpack(zips: Path, folder: Path) -> None:
    """FOLDER/omniglot-py, where torchvision looks for the PNG files; train.py reads the zips themselves."""
    for part in PARTS:
        with zipfile.ZipFile(zips / f"{part}.zip") as archive:
            archive.extractall(folder / "omniglot-py")


def commands(zips: Path, folder: Path, device: str, threads: int, engine: str):
    """Each program's command line, a function of the number of iterations."""
    accelerator = {"cpu": "cpu", "cuda": "gpu"}[device]

    def fewshot(iterations: int) -> list[str]:
        knobs = "dataset=omniglot model=conv4_strided algo=fomaml logger=none ways=5 shots=1 queries=15 inner_steps=2"
        knobs += f" inner_lr=0.4 outer_lr=0.001 meta_batch_size={META_BATCH_SIZE} val_tasks=2 test_tasks=2"
        knobs += f" iterations={iterations} val_every={iterations} engine={engine} threads={threads}"
        output = tempfile.mkdtemp(dir=folder, prefix="run-")
        places = [f"dataset.root={zips.resolve()}", f"dataset.cache={folder / 'cache'}", f"hydra.run.dir={output}"]
        return [sys.executable, str(HERE.parent / "train.py"), *knobs.split(), f"trainer={accelerator}", *places]

    def learn2learn(iterations: int) -> list[str]:
        program = HERE / "learn2learn_omniglot.py"
        return [sys.executable, *map(str, (program, folder, iterations, device, threads))]

    return {"train.py": fewshot, "learn2learn": learn2learn}


def wall(command: list[str], threads: int) -> float:
    """Seconds from the start of a process to its end."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return seconds


def summarise(program: str, first: dict, seconds: dict, short: int, long: int) -> dict:
    """Medians over the rounds; the ratio to learn2learn's steady rate is taken within a round."""

    def steady(name: str) -> list[float]:
        times = seconds[name]
        return [(b - a) / (long - short) for a, b in zip(times[short], times[long], strict=True)]

    median, rate = statistics.median, 1 / statistics.median(steady(program))
    return {
        "program": program,
        "first_seconds": first[program],
        "short_seconds": median(seconds[program][short]),
        "long_seconds": median(seconds[program][long]),
        "long_iterations_per_second": long / median(seconds[program][long]),
        "steady_iterations_per_second": rate,
        "steady_tasks_per_second": META_BATCH_SIZE * rate,
        "steady_speedup": median(a / b for a, b in zip(steady("learn2learn"), steady(program), strict=True)),
        "seconds": seconds[program],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zips", type=Path, required=True, help="the folder of images_background.zip and the other")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--iterations", type=int, nargs=2, default=[10, 40], metavar=("SHORT", "LONG"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", default="auto", help="of train.py")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        unpack(arguments.zips, folder)
        programs = commands(arguments.zips, folder, arguments.device, arguments.threads, arguments.engine)
        first = {name: wall(command(1), arguments.threads) for name, command in programs.items()}
        seconds = {name: {length: [] for length in arguments.iterations} for name in programs}
        for turn in range(arguments.rounds):
            for length in arguments.iterations:
                for program in list(programs)[:: -1 if turn % 2 else 1]:
                    seconds[program][length].append(wall(programs[program](length), arguments.threads))
    rows = [summarise(program, first, seconds, *arguments.iterations) for program in programs]
    table = Table("", "first run, s", "short, s", "long, s", "long, it/s", "steady it/s", "steady tasks/s", "speed-up")
    for row in rows:
        table.add_row(row["program"], *(f"{value:.2f}" for value in row.values() if isinstance(value, float)))
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
    if arguments.json:
        machine = Machine(arguments.device, arguments.threads, tf32=False).describe()
        settings = {"iterations": arguments.iterations, "engine": arguments.engine, "rows": rows}
        arguments.json.write_text(json.dumps({"machine": machine, **settings}, indent=1) + "\n")


if __name__ == "__main__":
    main()
