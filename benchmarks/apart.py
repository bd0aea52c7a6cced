"""learn2learn's loop in a process of its own, as its users run it: memory is given back, waiting threads spin.

meta_step.py starts it and asks for a turn at a time, so that it takes its turns with all others.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

OURS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # what fewshot.processes.surroundings.settle sets


class Apart:
    """A contestant elsewhere; its time is asked for, not taken."""

    def __init__(self, setting: str, tasks: int, threads: int) -> None:
        call = [sys.executable, str(Path(__file__)), setting, str(tasks), str(threads)]
        surroundings = {name: value for name, value in os.environ.items() if name not in OURS}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(call, env=surroundings, **pipes)

    def timed(self, times: int) -> tuple[float, float]:
        """Of one step, wall and processor, a mean over `times`."""
        print(times, file=self._process.stdin, flush=True)
        wall, processor = self._process.stdout.readline().split()
        return float(wall), float(processor)

    def close(self) -> None:
        self._process.communicate()  # the end of its input is its end


def main(name: str, tasks: int, threads: int) -> None:
    from dataclasses import replace

    import torch
    from meta_step import ENGINES, Torch, settings

    torch.set_num_threads(threads)
    setting = replace(next(each for each in settings() if each.name == name), tasks=tasks)
    contestant = Torch(ENGINES["learn2learn"], *setting.start(torch.device("cpu")), **setting.knobs)
    for line in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            contestant()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        print(wall / int(line), processor / int(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
