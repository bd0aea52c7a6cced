"""What docs/cluster.md has of kept files: tasks per second by a formula, what benchmarks/processes.py measured of it,
and what the image was seen to do.

U(R) = a + t B/R + m(R) are the seconds of an update of B tasks by R processes.
"""

import statistics
import textwrap
from math import log2
from typing import NamedTuple

from tables import ROOT, markdown, measured

GRADIENT = 4 * 91_781  # bytes, of conv4_strided with five ways
RESNET12 = 49.7e6
GPUS = (1, 2, 4, 8, 16, 32, 64)
START, TASK = 1.5e-3, 50e-6  # assumed of a GPU: a and t


class Wire(NamedTuple):
    """latency: seconds between neighbours; bandwidth: bytes per second."""

    latency: float
    bandwidth: float

    def seconds(self, processes: int, size: float) -> float:
        """m(R): both messages of an update, in a ring."""
        rounds, parts = log2(processes), (processes - 1) / processes
        return 4 * self.latency * rounds + 2 * parts * size / self.bandwidth


# By data sheet.
ETHERNET, NVLINK, INFINIBAND = Wire(50e-6, 1.25e9), Wire(5e-6, 450e9), Wire(10e-6, 50e9)


def _of_gpus(processes: int) -> Wire:
    return NVLINK if processes <= 8 else INFINIBAND


def messages() -> str:
    """m(R) between GPUs, in microseconds."""
    rows = []
    for words, size in (("367 kB", GRADIENT), ("49.7 MB", RESNET12)):
        rows.append([words, *(f"{1e6 * _of_gpus(count).seconds(count, size):,.0f}" for count in GPUS[1:])])
    return markdown(["GPUs", *map(str, GPUS[1:])], rows)


def tasks_per_second() -> str:
    task = 1 / _median("1x2")
    rows = [["CPU hosts, 64 tasks", *(f"{_rate(64, R, 0, task, ETHERNET):,.0f}" for R in GPUS)]]
    for tasks in (64, 1024):
        rates = [_rate(tasks, count, START, TASK, _of_gpus(count)) for count in GPUS]
        rows.append([f"GPUs, {tasks:,} tasks", *(f"{float(f'{rate:.3g}'):,.0f}" for rate in rates)])
    return markdown(["", *map(str, GPUS)], rows)


def _rate(tasks: int, processes: int, start: float, task: float, wire: Wire) -> float:
    return tasks / (start + task * tasks / processes + wire.seconds(processes, GRADIENT))


def _median(contestant: str) -> float:
    return statistics.median(measured("processes")["tasks_per_second"][contestant])


def checked() -> str:
    """Measured on two threads of one core, beside what the formula says of it."""
    content = measured("processes")
    called = {
        "1x1": "one process of one thread",
        "1x1+1x1": "two programs of one thread side by side, both together",
        "2x1": "one run of two processes of one thread",
        "4x1": "one run of four processes of one thread",
        "1x2": "one process of two threads",
    }
    rows = []
    for contestant, words in called.items():
        rates, alone = (content["tasks_per_second"][name] for name in (contestant, "1x1"))
        ratio = statistics.median(one / other for one, other in zip(rates, alone, strict=True))
        expected = f"{_expected(contestant):.1f}" if contestant in ("2x1", "4x1") else ""
        every = " ".join(f"{rate:.1f}" for rate in rates)
        rows.append([words, f"{statistics.median(rates):.1f}", every, f"{ratio:.2f}", expected])
    return markdown(["", "tasks/s, median", "all rounds", "over the first, median", "by the formula"], rows)


def _expected(contestant: str) -> float:
    """Two programs side by side tell how long a task takes a process, and the messages alone how long they take."""
    content, processes = measured("processes"), int(contestant.split("x")[0])
    task = processes / _median("1x1+1x1")  # more processes than threads share them
    message = sum(content["message_seconds"][str(processes)].values())
    return content["tasks"] / (task * content["tasks"] / processes + message)


def overlap() -> str:
    """What sending the gradient while the last pass is computed could gain at most."""
    content = measured("processes")
    message, update = content["message_seconds"]["2"]["gradient"], content["tasks"] / _median("2x1")
    on_gpu, step = NVLINK.seconds(2, GRADIENT), START + TASK * content["tasks"] / 2
    text = (
        f"Between two processes of this machine the outer gradient takes {1e3 * message:.1f} ms of an update's "
        f"{1e3 * update:.0f} ms, {100 * message / update:.1f}%. By the formula it takes {1e6 * on_gpu:.0f} us of "
        f"{1e3 * step:.1f} ms, {100 * on_gpu / step:.1f}%, between two GPUs. So little is all that sending it during "
        "the last backward pass could gain, and that is not done."
    )
    return f"\n{textwrap.fill(text, 140)}\n\n"


def image() -> str:
    """What was kept of the output of tests/docker/build_and_run.sh."""
    text = (ROOT / "docs" / "results" / "image.txt").read_text(encoding="utf-8")
    return f"\n```text\n{text}```\n\n"
