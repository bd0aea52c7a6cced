"""Step kernels: where the time of one batched meta-step goes, Omniglot 5-way 1-shot, 2 steps, 32 tasks, both orders.

It lists the ten kernels that take longest with their share of the time, and measures the gaps between kernels, with
CUDA graphs and without. On a CPU, in a rehearsal, torch's operators are counted in place of kernels.
"""

from collections import Counter
from functools import partial

import torch
from common import DEVICE, REHEARSE, write
from engines import draw
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fewshot.batched import engine as batched
from fewshot.batched.execution import CudaGraphs, one_by_one
from fewshot.inner_loop import InnerLoop
from fewshot.models.network import conv4_strided


def busy(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(intervals):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def profiled(first_order: bool, graphs: bool) -> dict:
    network, tasks = draw(conv4_strided, 1, 28, 2 if REHEARSE else 32, torch.float32)
    execute = CudaGraphs() if graphs else one_by_one
    step = partial(batched.meta_gradient, network, tasks, InnerLoop(2, 0.4, first_order), execute=execute)
    for _ in range(2 if REHEARSE else 5):
        network.zero_grad()
        step()
    activity = ProfilerActivity.CUDA if DEVICE == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if DEVICE == "cuda" else DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == kind]
    if DEVICE == "cpu":
        events = [event for event in events if event.name.startswith("aten::") and not event.cpu_children]
    intervals = [(event.time_range.start, event.time_range.end) for event in events]
    span = max(last for _, last in intervals) - min(first for first, _ in intervals)
    time, number = Counter(), Counter()
    for event in events:
        time[event.name] += event.time_range.end - event.time_range.start
        number[event.name] += 1
    total = sum(time.values())
    return {
        "kernels": len(events),
        "span_ms": span / 1000,
        "busy_share": busy(intervals) / span,
        "longest": [
            {"name": name, "ms": spent / 1000, "share": spent / total, "times": number[name]}
            for name, spent in time.most_common(10)
        ],
    }


def main() -> None:
    profiles, lines = {}, []
    for first_order in (True, False):
        for graphs in (False, True) if DEVICE == "cuda" else (False,):
            name = f"{'first' if first_order else 'second'} order, {'with' if graphs else 'without'} graphs"
            profiles[name] = told = profiled(first_order, graphs)
            lines.append(
                f"{name}: {told['kernels']} kernels in {told['span_ms']:.2f} ms, at work {told['busy_share']:.0%} of it"
            )
        lines += [
            f"    {one['share']:5.1%} {one['ms']:7.3f} ms {one['times']:4} x {one['name'][:60]}"
            for one in told["longest"]
        ]
        write("kernels", {"device": DEVICE, "profiles": profiles, "lines": lines})


if __name__ == "__main__":
    main()
