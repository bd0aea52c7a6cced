"""Times variants of the batched engine on a GPU, which take turns, and the errors of their gradients against float64.

The settings are Omniglot 5-way 1-shot, 2 steps, 32 tasks, and 84x84 photos, 5 steps, 4 tasks, both in both orders. An
outer step is zero_grad, the outer gradient, Adam and the zeroing of the head. Every variant is compared with `graphs`,
which is what the program does.
"""

import contextlib
import copy
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import torch
from common import DEVICE, REHEARSE, write

if REHEARSE:
    os.environ["TRITON_INTERPRET"] = "1"  # before relu_norm is imported

import torch.nn.functional as F
from engines import draw
from instruments import Machine, relative_error
from relu_norm import fused, relu_norm
from relu_norm import side_by_side as relu_norm_side_by_side
from torch import Tensor, nn

from fewshot.batched import engine as batched
from fewshot.batched import side_by_side
from fewshot.batched.execution import CudaGraphs, one_by_one
from fewshot.data.task import Task
from fewshot.inner_loop import InnerLoop
from fewshot.maml import sequential
from fewshot.models.head import zero_head
from fewshot.models.network import conv4_pooled, conv4_strided

SETTINGS = {  # network, channels, size, tasks, the inner loop
    "omniglot 5w1s 2 steps": (
        partial(conv4_strided, width=4 if REHEARSE else 64),
        1,
        28,
        2 if REHEARSE else 32,
        {"inner_lr": 0.4, "inner_steps": 2},
    ),
    "photos84 5w1s 5 steps": (
        partial(conv4_pooled, width=4 if REHEARSE else 32),
        3,
        24 if REHEARSE else 84,
        2 if REHEARSE else 4,
        {"inner_lr": 0.01, "inner_steps": 2 if REHEARSE else 5},
    ),
}
ROUNDS = 0 if REHEARSE else 7  # Triton's interpreter takes seconds for a step
TURN = 0.2  # seconds; a variant whose step is shorter repeats it until its turn is as long


@contextlib.contextmanager
def precision(tf32: bool) -> Iterator[None]:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    yield
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@contextlib.contextmanager
def channels_last() -> Iterator[None]:
    """Convolutions on images and weights whose channels lie together in memory."""
    plain = side_by_side._conv2d

    def convolution(tasks: int, x: Tensor, weight: Tensor, *rest: object, **options: object) -> Tensor:
        return plain(tasks, x.contiguous(memory_format=torch.channels_last), weight, *rest, **options)

    with mock.patch.dict(side_by_side.OWN, {F.conv2d: convolution}):
        yield


@contextlib.contextmanager
def own_relu_norm() -> Iterator[None]:
    with mock.patch.dict(side_by_side.OWN, {relu_norm: relu_norm_side_by_side}):
        yield


class Variant:
    """An outer step inside the contexts of `surroundings`.

    whole: one CUDA graph holds the whole step, Adam and zeroing included, and not the gradient alone.
    """

    def __init__(
        self,
        network: nn.Module,
        tasks: Task,
        knobs: dict,
        *,
        surroundings: tuple[Callable[[], contextlib.AbstractContextManager], ...] = (),
        graphs: bool = True,
        whole: bool = False,
        change: Callable[[nn.Module], nn.Module] = lambda network: network,
    ) -> None:
        self.initial, self.network, self.tasks, self.knobs = network, change(copy.deepcopy(network)), tasks, knobs
        self.surroundings = surroundings
        self.execute = CudaGraphs() if graphs and not whole and DEVICE == "cuda" else one_by_one
        on_gpu = DEVICE == "cuda"
        self.adam = torch.optim.Adam(self.network.parameters(), lr=1e-3, capturable=whole and on_gpu, fused=on_gpu)
        self.graph = None
        if whole and on_gpu:
            self._record()

    def gradients(self) -> dict[str, Tensor]:
        """The outer gradient at the initial weights."""
        self._reset()
        with self._inside():
            self.network.zero_grad()
            batched.meta_gradient(self.network, self.tasks, InnerLoop(**self.knobs), execute=self.execute)
        return {name: parameter.grad for name, parameter in self.network.named_parameters()}

    def __call__(self) -> None:
        if self.graph:
            self.graph.replay()
            return
        with self._inside():
            self._step()

    def _step(self) -> None:
        self.network.zero_grad()
        batched.meta_gradient(self.network, self.tasks, InnerLoop(**self.knobs), execute=self.execute)
        self.adam.step()
        zero_head(self.network.head)

    def _reset(self) -> None:
        with torch.no_grad():
            for own, first in zip(self.network.parameters(), self.initial.parameters(), strict=True):
                own.copy_(first)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for surrounding in self.surroundings:
                stack.enter_context(surrounding())
            yield

    def _record(self) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with self._inside():
            with torch.cuda.stream(aside):
                for _ in range(3):
                    self._step()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
        self.graph = graph


def variants(first_order: bool) -> dict[str, dict]:
    """The arguments of every variant; the fused kernel has no second derivative."""
    tf32 = partial(precision, True)
    bf16 = partial(torch.autocast, DEVICE, torch.bfloat16)
    made = {
        "graphs": {},
        "no graphs": {"graphs": False},
        "one graph for the step": {"whole": True},
        "channels last": {"surroundings": (channels_last,)},
        "TF32": {"surroundings": (tf32,)},
        "bf16": {"surroundings": (bf16,)},
        "TF32, one graph": {"surroundings": (tf32,), "whole": True},
        "TF32, channels last, one graph": {"surroundings": (tf32, channels_last), "whole": True},
    }
    if first_order:
        own = {"surroundings": (own_relu_norm,), "change": fused}
        both = {"surroundings": (own_relu_norm, tf32), "change": fused, "whole": True}
        made |= {"ReLU and norm fused": own, "fused, TF32, one graph": both}
    return made


def compare(setting: str, first_order: bool, machine: Machine) -> list[dict]:
    """A row for each variant. A variant that fails has the reason in its row."""
    network, channels, size, tasks, knobs = SETTINGS[setting]
    knobs = knobs | {"first_order": first_order}
    weights, exact_tasks = draw(network, channels, size, tasks, torch.float64)
    exact = copy.deepcopy(weights)
    sequential.meta_gradient(exact, exact_tasks, InnerLoop(**knobs))
    reference = {name: parameter.grad.cpu() for name, parameter in exact.named_parameters()}
    weights, batch = draw(network, channels, size, tasks, torch.float32)
    rows, entered, warms = [], {}, {}
    for name, made in variants(first_order).items():
        row = {"setting": f"{setting} {'first' if first_order else 'second'}", "variant": name}
        rows.append(row)
        try:
            entered[name] = Variant(weights, batch, knobs, **made)
            row["relative_error"] = relative_error(entered[name].gradients(), reference)
            warms[name] = min(machine.seconds(entered[name]) for _ in range(1 if REHEARSE else 3))
        except Exception as error:
            entered.pop(name, None)
            row["error"] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
    seconds = {name: [] if ROUNDS else [warms[name]] for name in entered}
    for turn in range(ROUNDS):
        order = list(entered)[turn % len(entered) :] + list(entered)[: turn % len(entered)]
        for name in order:
            seconds[name].append(machine.seconds(entered[name], max(1, round(TURN / warms[name]))))
    for row in rows:
        if own := seconds.get(row["variant"]):
            row["milliseconds"] = 1000 * statistics.median(own)
            if base := seconds.get("graphs"):
                row["speedup"] = statistics.median(a / b for a, b in zip(base, own, strict=True))
    return rows


def line(row: dict) -> str:
    if "error" in row:
        return f"{row['setting']:30} {row['variant']:32} failed: {row['error']}"
    return (
        f"{row['setting']:30} {row['variant']:32} {row['milliseconds']:8.2f} ms {row.get('speedup', 0):5.2f} x "
        f"error {row['relative_error']:.0e}"
    )


def main() -> None:
    began = time.monotonic()
    machine = Machine(DEVICE, None, tf32=False)
    rows = []
    for setting in SETTINGS:
        for first_order in (True, False):
            rows += (measured := compare(setting, first_order, machine))
            print("\n".join(map(line, measured)), flush=True)
            write("tune", {"machine": machine.describe(), "rows": rows, "lines": [line(row) for row in rows]})
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
