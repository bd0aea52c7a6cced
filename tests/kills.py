"""Runs that are killed at random moments end as if they had not been: python tests/kills.py [KILLS=20] [KIND,KIND ...]

Three kinds of run: a plain one, a sweep of two jobs, one in two processes. Each is done once undisturbed; then again,
and SIGKILL ends it, or one of its processes, or all of them, while it starts, trains or tests. The same call goes on,
or checkpoint=LAST. At the end weights, the optimiser's state, metrics.csv and the sweep's summary are bitwise the same,
or the script ends with an error.

The runs are forks of this process, which has imported what takes long; the two processes of a run are programs of
their own.
"""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from fewshot.data import meta_batches as data_module  # noqa: E402, F401
from fewshot.results import record_files  # noqa: E402, F401  what train.py imports late
from fewshot.train import main as train  # noqa: E402

KNOBS = (
    *("queries=3", "meta_batch_size=2", "iterations=20", "val_every=4", "val_tasks=2", "test_tasks=3", "threads=1"),
    *("model.width=8", "trainer=cpu", "logger=none"),
)
KINDS = {
    "plain": ("seed=1",),
    "sweep": ("-m", "seed=1,2", "algo=zero"),
    "ranks": ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"),
}
WRITES = ("splits.json", "last.ckpt", "best.ckpt", "metrics.csv", "results.json", "summary.csv")


def call(kind: str, folder: Path) -> list[str]:
    """The words of train.py; Hydra wants flags first."""
    knobs = {knob.split("=")[0]: knob for knob in (*KNOBS, *KINDS[kind])}
    flags = [word for word in knobs if word.startswith("-")]
    where = f"hydra.{'sweep' if kind == 'sweep' else 'run'}.dir={folder}"
    return [*flags, *(word for word in knobs.values() if word not in flags), where]


def start(words: list[str], log: Path) -> multiprocessing.Process:
    """train.py with these words; what it prints goes to a file."""

    def program() -> None:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = [str(ROOT / "train.py"), *words]
        train()

    process = multiprocessing.get_context("fork").Process(target=program)
    process.start()
    return process


def family(pids: set[int]) -> set[int]:
    """Those of the processes that live, and all that they have started."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    parents = {int(pid): int(parent) for pid, parent, state in rows if state[0] != "Z"}
    living = pids & parents.keys()
    while more := {pid for pid, parent in parents.items() if parent in living} - living:
        living |= more
    return living


def written(folder: Path) -> float:
    """When a run last wrote what it computes; 0 for never."""
    return max((path.stat().st_mtime for path in folder.rglob("*.*") if path.name in WRITES), default=0.0)


def end(folder: Path) -> dict[str, Any]:
    """What the run or sweep computed, bit by bit."""
    computed: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name in ("metrics.csv", "summary.csv"):
            computed[name] = path.read_text()
        if path.suffix == ".ckpt":
            content = torch.load(path, weights_only=True)
            adam = content["optimizer_states"][0]["state"]
            computed[name] = [content["global_step"]]
            computed[name] += [(key, tensor.numpy().tobytes()) for key, tensor in content["state_dict"].items()]
            computed[name] += [
                (key, tensor.numpy().tobytes()) for entries in adam.values() for key, tensor in entries.items()
            ]
    return computed


def kill(kind: str, folder: Path, chance: random.Random, seconds: float) -> str:
    """Starts or continues the run and kills it; returns what was killed and when, or "" where it had ended before.

    seconds: that the undisturbed run took from its first write to its end.
    """
    last, log = folder / "checkpoints" / "last.ckpt", folder.with_suffix(".log")
    words = (
        [f"checkpoint={last}"] if kind == "plain" and last.exists() and chance.random() < 0.5 else call(kind, folder)
    )
    began, process = time.time(), start(words, log)
    early = chance.random() < 0.2  # while it starts
    while not early and written(folder) < began and process.is_alive():
        time.sleep(0.02)
    delay = chance.uniform(0, seconds)
    process.join(delay)
    everyone = family({process.pid})
    victims = chance.choice([{process.pid}, everyone, {chance.choice(sorted(everyone or {process.pid}))}])
    for pid in victims if process.is_alive() else ():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.join()
    while family(everyone):  # the others end by themselves
        time.sleep(0.05)
    told = log.read_text()
    assert process.exitcode in (0, -signal.SIGKILL) or "killed by SIGKILL" in told, told
    moment = f"{delay:.2f} s after {'it began' if early else 'its first write'}"
    return f"{kind}: {len(victims)} of {len(everyone)} processes, {moment}" if process.exitcode else ""


def finish(kind: str, folder: Path) -> float:
    """Runs it to its end; returns the seconds from its first write on."""
    log, began, first = folder.with_suffix(".log"), time.time(), 0.0
    process = start(call(kind, folder), log)
    while process.is_alive():
        first = first or (time.time() if written(folder) > began else 0.0)
        time.sleep(0.02)
    assert process.exitcode == 0, log.read_text()
    return time.time() - (first or began)


def main(kills: int, kinds: list[str]) -> None:
    """
    Raises:
        AssertionError: a run ended otherwise than the undisturbed one, or not at all.
    """
    chance = random.Random()
    with tempfile.TemporaryDirectory() as base:
        for number, kind in enumerate(kinds):
            whole, folder = Path(base) / f"{kind}-whole", Path(base) / kind
            share = kills // len(kinds) + (number < kills % len(kinds))
            seconds, done = finish(kind, whole), 0
            while done < share:
                if killed := kill(kind, folder, chance, seconds / 2):
                    print(killed, flush=True)
                    done += 1
                else:  # it had ended: once more from the beginning
                    assert end(folder) == end(whole), f"{kind}: it ended otherwise than undisturbed"
                    folder = folder.with_name(f"{folder.name}-again")
            finish(kind, folder)
            for record in folder.rglob("overrides.yaml"):  # Hydra's, of the call that began it
                assert "checkpoint=" not in record.read_text(), f"{record}: is not of the call that began this run"
            assert end(folder) == end(whole), f"{kind}: it ended otherwise than undisturbed"
            print(f"{kind}: the same end after {share} kills, bit by bit: {', '.join(end(whole))}", flush=True)


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["20"])[0]), sys.argv[2].split(",") if sys.argv[2:] else list(KINDS))
