"""learn2learn's loop in a process of its own, as its users run it: freed memory goes back, and waiting threads spin.

meta_step.py starts the process and asks it for one turn at a time, so that it takes its turns with all others.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

OURS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # what fewshot.processes.surroundings.settle sets


class Apart:
    """A contestant in a process of its own, which measures its time itself."""

    def __init__(self, setting: str, tasks: int, threads: int) -> None:
        call = [sys.executable, str(Path(__file__)), setting, str(tasks), str(threads)]
        surroundings = {name: value for name, value in os.environ.items() if name not in OURS}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(call, env=surroundings, **pipes)

    def timed(self, times: int) -> tuple[float, float]:
        """Wall and processor seconds of one step, a mean over `times`."""
        print(times, file=self._process.stdin, flush=True)
        wall, processor = self._process.stdout.readline().split()
        return float(wall), float(processor)

    def close(self) -> None:
        self._process.communicate()  # closes its input, which ends it


def main(name: str, tasks: int, threads: int) -> None:
    from dataclasses import replace

    import torch
    from peers import learn2learn_loop
    from settings import Torch, settings

    torch.set_num_threads(threads)
    setting = replace(next(setting for setting in settings() if setting.name == name), tasks=tasks)
    contestant = Torch(learn2learn_loop, *setting.start(torch.device("cpu")), **setting.knobs)
    for line in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            contestant()
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        print(wall / int(line), processor / int(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
