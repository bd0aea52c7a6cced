"""Steps paper and panel1: whole runs of train.py, and what they leave.

    runs.py paper     the paper's Omniglot run, experiment=paper_omniglot_5w1s algo=zero: seconds, accuracy, memory
    runs.py panel1    the poster's panel 1 at full length, six settings, seed after seed, until the time is over

panel1 runs six processes at a time on the card for seed 0 and three for seed 1. From then on it runs as many as were
faster. OUT/runs.tar.gz has metrics.csv, results.json and the log of every run; of a run that was stopped it has what
there was.
"""

import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from common import DEVICE, OUT, REHEARSE, SECONDS, write

HERE = Path(__file__).parents[2]
FOLDER = Path("outputs/gpu-runs")
SETTINGS = {
    f"{algo}-{order}": [f"algo={algo}", f"algo.first_order={str(order == 'first').lower()}"]
    for algo in ("fomaml", "zero_init", "zero")
    for order in ("first", "second")
}
TINY = ["iterations=2", "meta_batch_size=2", "queries=2", "val_every=2", "val_tasks=2", "test_tasks=2", "threads=1"]
TINY += ["test_every=2", "callbacks.record.test_curve_tasks=2"]
# The curves' points are those of the paper's own table; the final test has as many tasks as the authors' curves.
CURVES = ["val_every=150", "test_every=150", "callbacks.record.test_curve_tasks=300", "test_tasks=992"]


class Run:
    """A train.py at work in the folder `name`."""

    def __init__(self, name: str, overrides: list[str], threads: int) -> None:
        self.name, self.folder = name, FOLDER / name
        self.folder.mkdir(parents=True, exist_ok=True)
        common = [
            "experiment=paper_omniglot_5w1s",
            "dataset.root=.gpu/data/omniglot",
            "logger=none",
            f"threads={threads}",
        ]
        device = ["trainer=cpu"] if REHEARSE else ["trainer=gpu"]
        tiny = TINY if REHEARSE else []
        command = [sys.executable, "train.py", *common, *device, *overrides, *tiny, f"hydra.run.dir={self.folder}"]
        self.command = " ".join(command[1:])
        self.began = time.monotonic()
        with open(self.folder / "log.txt", "w") as log:
            self.process = subprocess.Popen(command, cwd=HERE, stdout=log, stderr=subprocess.STDOUT)
        self.seconds = 0.0

    def over(self) -> bool:
        if self.process.poll() is None:
            return False
        self.seconds = self.seconds or time.monotonic() - self.began
        return True

    def outcome(self) -> dict:
        """The call, the seconds from start to end, and the results; or the last line of a run that did not end well."""
        row = {"name": self.name, "command": self.command, "seconds": round(self.seconds, 1)}
        results = self.folder / "results.json"
        if self.process.poll() == 0 and results.exists():
            told = json.loads(results.read_text())
            accuracy = {mode: told["test"][mode]["accuracy"] for mode in ("zeroing_off", "zeroing_on")}
            return row | {"parts": told["seconds"], "accuracy": accuracy, "iterations": told["iterations"]}
        said = (self.folder / "log.txt").read_text(errors="replace").strip().splitlines()
        return row | {"error": said[-1][-300:] if said else "it said nothing"}


def wait(runs: list[Run], until: float) -> float:
    """Waits until all runs or the time is over, then kills the rest. Returns the most GPU memory seen, in MiB."""
    most = 0.0
    while sum(run.over() for run in runs) < len(runs):
        if time.monotonic() > until:
            for run in runs:
                if not run.over():
                    run.process.kill()
                    run.process.wait()
            break
        if DEVICE == "cuda":
            query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
            told = subprocess.run(query, capture_output=True, text=True).stdout.split()
            most = max([most, *(float(mebibytes) for mebibytes in told if mebibytes.isdigit())])
        time.sleep(0.5)
    return most


def pack() -> None:
    """Writes OUT/runs.tar.gz anew."""
    part = OUT / ".runs.part"
    with tarfile.open(part, "w:gz") as archive:
        for name in ("metrics.csv", "results.json", "log.txt"):
            for file in sorted(FOLDER.glob(f"*/{name}")):
                archive.add(file, f"{file.parent.name}/{name}")
    part.replace(OUT / "runs.tar.gz")


def line(row: dict) -> str:
    """The table's line of a run."""
    if "error" in row:
        return f"{row['name']:26} {row['seconds']:6.1f} s  not finished: {row['error'][:120]}"
    step_1 = "/".join(f"{row['accuracy'][mode][1]:.3f}" for mode in ("zeroing_off", "zeroing_on"))
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["parts"].items())
    return f"{row['name']:26} {row['seconds']:6.1f} s ({parts}); step 1, test zeroing off/on: {step_1}"


def paper() -> None:
    end = time.monotonic() + SECONDS - 6
    began = time.monotonic()
    prepare = ["-m", "fewshot.data", "prepare", "dataset=omniglot", "dataset.root=.gpu/data/omniglot"]
    subprocess.run([sys.executable, *prepare], cwd=HERE, check=True)  # the images, once for all runs
    prepared = time.monotonic() - began
    run = Run("paper-zero-first", [*SETTINGS["zero-first"], "test_every=null"], threads=8)
    most = wait([run], end)
    row = run.outcome() | {"peak_gpu_mib": most, "prepare_seconds": round(prepared, 1)}
    pack()
    told = f"images prepared once: {prepared:.0f} s; GPU memory at most {most:.0f} MiB"
    write("paper", {"run": row, "lines": [line(row), told]})


def panel1() -> None:
    end = time.monotonic() + SECONDS - 8  # to pack what was stopped
    settings = list(SETTINGS)[:2] if REHEARSE else list(SETTINGS)
    rows, waves, lines = [], [], []
    seed, seconds = 0, {}  # seconds of a seed, by how many processes were at work at once
    while True:
        together = (len(settings), len(settings) // 2)[seed] if seed < 2 else min(seconds, key=seconds.get)
        # A number of processes that was not tried yet is taken to need at least as long as the fastest so far.
        if seed and time.monotonic() + 1.05 * min(seconds.values()) > end:
            break
        began = time.monotonic()
        for first in range(0, len(settings), together):
            runs = [
                Run(f"{name}-seed{seed}", [*SETTINGS[name], *CURVES, f"seed={seed}"], threads=2)
                for name in settings[first : first + together]
            ]
            most = wait(runs, end)
            rows += [run.outcome() for run in runs]
            waves.append({"seed": seed, "together": together, "peak_gpu_mib": most})
            lines = [*[line(row) for row in rows], *summary(seconds)]
            pack()
            write("panel1", {"runs": rows, "waves": waves, "seconds_of_a_seed": seconds, "lines": lines})
        if any("error" in row for row in rows[-len(settings) :]):
            break
        seconds[together] = min(time.monotonic() - began, seconds.get(together, float("inf")))
        lines = [*[line(row) for row in rows], *summary(seconds)]
        write("panel1", {"runs": rows, "waves": waves, "seconds_of_a_seed": seconds, "lines": lines})
        seed += 1
        if REHEARSE and seed == 2:
            break


def summary(seconds: dict[int, float]) -> list[str]:
    return [f"all settings of a seed, {together} at once: {spent:.0f} s" for together, spent in seconds.items()]


if __name__ == "__main__":
    {"paper": paper, "panel1": panel1}[sys.argv[1]]()
