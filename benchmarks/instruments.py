"""The instruments of meta_step.py: the machine's clock and limits, counts of bytes and kernels, a gradient's error."""

import contextlib
import datetime
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20


class Machine:
    """A device: it takes times there, and knows how fast it copies and multiplies at most."""

    def __init__(self, device: str, threads: int | None, *, tf32: bool) -> None:
        self.device, self.tf32 = torch.device(device), tf32
        if threads:
            torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32  # cuDNN's is on by default
        self.bytes_per_second = self._copy(mib=1024 if self.on_gpu else 128)
        self.flops_per_second = self._multiply(side=8192 if self.on_gpu else 2048)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, step: Callable[[], object], times: int = 1) -> float:
        """Seconds of one step, a mean over `times`; on a GPU until the last kernel has ended."""
        self._wait()
        began = time.perf_counter()
        for _ in range(times):
            step()
        self._wait()
        return (time.perf_counter() - began) / times

    def timed(self, step: Callable[[], object], times: int = 1) -> tuple[float, float]:
        """Wall and processor seconds of one step, a mean over `times`."""
        processor = time.process_time()
        wall = self.seconds(step, times)
        return wall, (time.process_time() - processor) / times

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _copy(self, mib: int) -> float:
        """Bytes read and written per second."""
        source = torch.zeros(mib * MIB, dtype=torch.uint8, device=self.device)
        target = torch.zeros_like(source)
        return 2 * source.nbytes / self._fastest(lambda: target.copy_(source))

    def _multiply(self, side: int) -> float:
        """Floating-point operations per second."""
        matrix = torch.randn(side, side, device=self.device)
        return 2 * side**3 / self._fastest(lambda: matrix @ matrix)

    def _fastest(self, step: Callable[[], object]) -> float:
        return min(self.seconds(step) for _ in range(20))  # the fastest of many, because other programs may be at work

    def describe(self) -> dict:
        model = platform.processor()
        with contextlib.suppress(OSError):
            model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
        return {
            "device": torch.cuda.get_device_name() if self.on_gpu else model,
            "cpu": model,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "precision": "tf32" if self.tf32 else "float32",
            "copy_gb_per_second": self.bytes_per_second / 1e9,
            "matmul_gflop_per_second": self.flops_per_second / 1e9,
            "date": datetime.date.today().isoformat(),
        }


class Traffic(TorchDispatchMode):
    """Counts the bytes of all inputs and outputs of operations, except views and bare allocations."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not re.search(r"empty|_unsafe_view|lift_fresh|detach", func.name()):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.bytes += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)  # expanded: read once
        return out


def relative_error(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """The norm of the difference over the norm of `exact`, for the whole outer gradient."""
    difference = sum((gradients[name].detach().cpu().double() - g).square().sum() for name, g in exact.items())
    return float((difference / sum(g.square().sum() for g in exact.values())).sqrt())


NO_LAUNCH = re.compile(  # views, metadata and bare allocations
    r"aten::(_?unsafe_view|view(_as)?|_?reshape(_alias)?|as_strided_?|t_?|transpose_?|permute|movedim|expand(_as)?"
    r"|unsqueeze_?|squeeze_?|select|slice|narrow|unbind|split(_with_sizes)?|chunk|flatten|unflatten|detach_?|alias"
    r"|lift_fresh|empty(_like|_strided)?|new_empty(_strided)?|resize_|result_type|contiguous|to|item|is_nonzero"
    r"|_local_scalar_dense|diagonal|unfold|requires_grad_|set_|resolve_conj|resolve_neg|broadcast_tensors)$"
)


def launches(step: Callable[[], object], machine: Machine) -> tuple[int, int]:
    """How many kernels one step runs, and on a CPU the peak of its memory in bytes, beyond what was allocated before.

    A CPU launches no kernels. Innermost torch operations that are no view and no bare allocation are counted instead.
    The memory is the running sum of the allocations and releases of torch's allocator.
    """
    kind = ProfilerActivity.CUDA if machine.on_gpu else ProfilerActivity.CPU
    with profile(activities=[kind], profile_memory=not machine.on_gpu) as profiler:
        machine.seconds(step)
    events = profiler.events()
    if machine.on_gpu:
        kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.name.startswith(("Mem", "Context"))]
        return len(kernels), 0

    def leaves(event) -> int:
        below = sum(leaves(child) for child in event.cpu_children)
        return below or (event.name.startswith("aten::") and not NO_LAUNCH.match(event.name))

    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return sum(leaves(event) for event in events if event.cpu_parent is None), peak
