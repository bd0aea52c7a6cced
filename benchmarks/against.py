"""Compares two checkouts, as whole processes of train.py that take turns: what an update costs, and what a run costs.

    python benchmarks/against.py OLD NEW --rounds 3 [--neighbours 1] [--json FILE] [KNOB=VALUE ...]

OLD and NEW are folders of checkouts, each with its own environment in .venv. What an update costs is the difference
between a run of --long updates and one of --short, divided by the updates between them; start, validation and test
cancel out. A neighbour is another train.py of OLD that trains on two threads all the time. A ratio is NEW / OLD, the
median over rounds.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

KNOBS = ["logger=none", "val_every=1000", "val_tasks=16", "test_tasks=16", "threads=2"]


def command(checkout: Path, folder: str, iterations: int, knobs: list[str]) -> list[str]:
    run = [f"iterations={iterations}", f"hydra.run.dir={folder}"]
    return [str(checkout / ".venv/bin/python"), str(checkout / "train.py"), *KNOBS, *knobs, *run]


def measured(checkout: Path, iterations: int, knobs: list[str]) -> dict[str, float]:
    """Wall and processor seconds and page faults of one process and all that it starts."""
    folder = tempfile.mkdtemp()
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(command(checkout, folder, iterations, knobs), check=True, stdout=subprocess.DEVNULL)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(folder)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": wall, "processor": processor, "faults": after.ru_minflt - before.ru_minflt}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--short", type=int, default=5)
    parser.add_argument("--long", type=int, default=45)
    parser.add_argument("--neighbours", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("knobs", nargs="*")
    args = parser.parse_intermixed_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    checkouts, rounds = {"old": args.old.resolve(), "new": args.new.resolve()}, []
    neighbours = [
        subprocess.Popen(
            command(checkouts["old"], tempfile.mkdtemp(), 100_000, []),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(args.neighbours)
    ]
    try:
        time.sleep(40 * bool(neighbours))  # until they train
        for _ in range(args.rounds):
            costs = {}
            for name, checkout in checkouts.items():
                short, long = (measured(checkout, updates, args.knobs) for updates in (args.short, args.long))
                costs[name] = {key: (long[key] - short[key]) / (args.long - args.short) for key in short}
                costs[name] |= {f"{key} of the short run": value for key, value in short.items()}
            print(json.dumps(costs), flush=True)
            rounds.append(costs)
    finally:
        for neighbour in neighbours:
            neighbour.kill()
    for key in rounds[0]["old"]:
        ratio = statistics.median(costs["new"][key] / costs["old"][key] for costs in rounds)
        old, new = (statistics.median(costs[name][key] for costs in rounds) for name in checkouts)
        print(f"{key}: {old:.4g} -> {new:.4g}, ratio {ratio:.3f}")
    if args.json:
        args.json.write_text(json.dumps({"knobs": args.knobs, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
