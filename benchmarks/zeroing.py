"""Measures what the zeroing trick saves: of a task of Omniglot 5-way, in both orders, and of an evaluation.

    python benchmarks/zeroing.py --rounds 12 [--json FILE]

It prints processor milliseconds of one task with one thread, as medians; all contestants take turns in one process.
Without zeroing nothing is left out. learn2learn's loop has no zeroing. The evaluation has three steps, and its two
modes (test zeroing off and on) are measured together and alone.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import peers
import torch

from fewshot.batched import engine as batched
from fewshot.data.task import Task
from fewshot.inner_loop import InnerLoop
from fewshot.maml import sequential
from fewshot.models.network import conv4_strided
from fewshot.processes.surroundings import keep_memory

WAYS, QUERIES, TASKS = 5, 15, 8


def tasks(shots: int) -> Task:
    generator = torch.Generator().manual_seed(1)
    images = (torch.rand(TASKS, WAYS * number, 1, 28, 28, generator=generator) for number in (shots, QUERIES))
    labels = (torch.arange(WAYS).repeat_interleave(number).expand(TASKS, -1) for number in (shots, QUERIES))
    support, query = zip(images, labels, strict=True)
    return Task(*support, *query)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keep_memory()  # as every command of this project does
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = conv4_strided(channels=1, size=28, ways=WAYS)
    engines = {"sequential": peers.sequential, "batched": peers.batched}
    entered, times = {}, {}
    for shots, steps in ((1, 1), (1, 2), (1, 5), (5, 1), (5, 2), (5, 5)):
        for order in ("first", "second"):
            knobs = {"inner_lr": 0.4, "inner_steps": steps, "first_order": order == "first"}
            for name, engine in engines.items():
                for zeroing in (False, True):
                    call = partial(engine, network, tasks(shots), zeroing=zeroing, **knobs)
                    entered[name, shots, steps, order, "zeroing" if zeroing else "none"] = call
            call = partial(peers.learn2learn_loop, network, tasks(shots), **knobs)
            entered["learn2learn", shots, steps, order, "none"] = call
        for name, engine in {"sequential": sequential, "batched": batched}.items() if steps == 1 else ():
            for modes in ((False,), (True,), (False, True)):
                loops = [InnerLoop(3, inner_lr=0.4, first_order=True, zeroing=zeroing) for zeroing in modes]
                call = partial(engine.step_accuracies, network, tasks(shots), loops)
                entered[name, shots, 3, "evaluation", modes] = call
    for _ in range(args.rounds + 1):
        for key, call in entered.items():
            began = time.process_time()
            call()
            times.setdefault(key, []).append(1000 * (time.process_time() - began) / TASKS)
    medians = {key: statistics.median(rounds[1:]) for key, rounds in times.items()}  # the first round warms up
    for key, median in medians.items():
        first = medians.get((*key[:3], "first", "none"))
        print(*key, f"{median:.2f} ms", f"{median / first:.2f} of first order without zeroing" if first else "")
    if args.json:
        rows = [{"contestant": list(map(str, key)), "milliseconds": rounds} for key, rounds in times.items()]
        args.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
