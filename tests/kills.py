"""Runs that are killed at random moments end as if they had not been: python tests/kills.py [KILLS=20] [SEED=0]

Three kinds of run: a plain one, a sweep of two jobs, one in two processes. Each is done once undisturbed; then again,
and SIGKILL ends it, or one of its processes, or all of them, while it starts, trains or tests. The same call goes on,
or checkpoint=LAST. At the end weights, the optimiser's state, metrics.csv and the sweep's summary are bitwise the same,
or the script ends with an error.
"""

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

ROOT = Path(__file__).parents[1]
KNOBS = (
    *("queries=3", "meta_batch_size=2", "iterations=100", "val_every=4", "val_tasks=4", "test_tasks=6", "threads=1"),
    *("model.width=8", "trainer=cpu", "logger=none"),
)
KINDS = {
    "plain": ("seed=1",),
    "sweep": ("-m", "seed=1,2", "algo=zero"),
    "ranks": ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"),
}
WRITES = ("splits.json", "last.ckpt", "best.ckpt", "metrics.csv", "results.json", "summary.csv")
LONG = 600.0  # seconds after which a process has hung


def call(kind: str, folder: Path) -> list[str]:
    """The words of train.py; Hydra wants flags first."""
    knobs = {knob.split("=")[0]: knob for knob in (*KNOBS, *KINDS[kind])}
    flags = [word for word in knobs if word.startswith("-")]
    where = f"hydra.{'sweep' if kind == 'sweep' else 'run'}.dir={folder}"
    return [*flags, *(word for word in knobs.values() if word not in flags), where]


def start(words: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def family(pids: set[int]) -> set[int]:
    """Those of the processes that live, and all that they have started."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    parents = {int(pid): int(parent) for pid, parent, state in rows if state[0] != "Z"}
    found = pids & parents.keys()
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def written(folder: Path) -> float:
    """When a run last wrote what it computes; 0 for never."""
    return max((path.stat().st_mtime for path in folder.rglob("*.*") if path.name in WRITES), default=0.0)


def end(folder: Path) -> dict[str, Any]:
    """What the run or sweep computed, bit by bit."""
    import torch

    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name in ("metrics.csv", "summary.csv"):
            found[name] = path.read_text()
        if path.suffix == ".ckpt":
            content = torch.load(path, weights_only=True)
            adam = content["optimizer_states"][0]["state"]
            found[name] = [content["global_step"]]
            found[name] += [(key, tensor.numpy().tobytes()) for key, tensor in content["state_dict"].items()]
            found[name] += [(key, tensor.numpy().tobytes()) for each in adam.values() for key, tensor in each.items()]
    return found


def kill(kind: str, folder: Path, random: random.Random, seconds: float) -> str:
    """Starts or continues the run and kills it; returns what was killed and when, or "" where it had ended before.

    seconds: that the undisturbed run took from its first write to its end.
    """
    last = folder / "checkpoints" / "last.ckpt"
    words = call(kind, folder)
    if kind == "plain" and last.exists() and random.random() < 0.5:
        words = [f"checkpoint={last}"]
    began, process = time.time(), start(words)
    early = random.random() < 0.2  # while it starts
    while not early and written(folder) < began and process.poll() is None and time.time() < began + LONG:
        time.sleep(0.02)
    delay = random.uniform(0, 5 if early else seconds)
    everyone: list[int] = []
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        everyone = sorted(family({process.pid}))
        victims = random.choice([[process.pid], everyone, [random.choice(everyone)]])
        for pid in victims:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    errors = process.communicate(timeout=LONG)[1].decode()
    while left := family(set(everyone)):  # the others end by themselves
        assert time.time() < began + 2 * LONG, f"{kind}: {left} go on without the one that was killed"
        time.sleep(0.05)
    assert process.returncode in (0, -signal.SIGKILL) or "killed by SIGKILL" in errors, errors
    moment = "while it started" if early else f"{delay:.2f} s after its first write"
    return f"{kind}: {len(victims)} of {len(everyone)} processes, {moment}" if process.returncode else ""


def finish(kind: str, folder: Path) -> float:
    """Runs it to its end; returns the seconds from its first write on."""
    began, process, first = time.time(), start(call(kind, folder)), 0.0
    while process.poll() is None and time.time() < began + LONG:
        first = first or (time.time() if written(folder) > began else 0.0)
        time.sleep(0.02)
    errors = process.communicate(timeout=LONG)[1].decode()
    assert process.returncode == 0, errors
    return time.time() - (first or began)


def main(kills: int, seed: int, kinds: tuple[str, ...] = tuple(KINDS)) -> None:
    """
    Raises:
        AssertionError: a run ended otherwise than the undisturbed one, or not at all.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as base:
        for number, kind in enumerate(kinds):
            share = len(range(number, kills, len(kinds)))
            whole, folder = Path(base) / f"{kind}-whole", Path(base) / kind
            seconds = finish(kind, whole) if share else 0.0
            for _ in range(share):
                killed = ""
                while not killed:
                    if killed := kill(kind, folder, chance, seconds):
                        print(killed, flush=True)
                    else:  # it had ended: once more from the beginning
                        assert end(folder) == end(whole), f"{kind}: {folder} is not as {whole}"
                        folder = folder.with_name(f"{folder.name}-again")
            if share:
                finish(kind, folder)
                assert end(folder) == end(whole), f"{kind}: it ended otherwise than undisturbed"
                print(f"{kind}: after {share} kills bitwise the same end, {len(end(whole))} files", flush=True)


if __name__ == "__main__":
    main(*(int(word) for word in (sys.argv[1:] + ["20", "0"][len(sys.argv) - 1 :])))
