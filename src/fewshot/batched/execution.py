"""How the chunks of a meta-batch are computed: one after the other, by several threads, or as CUDA graphs.

All of them give list(function(network, chunk) for chunk in chunks).
"""

import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fewshot.data.task import Task
from fewshot.errors import first_line
from fewshot.models.network import Network

log = logging.getLogger(__name__)

Module = TypeVar("Module", bound=nn.Module)
Function = Callable[[Network, Task], tuple[Tensor, ...]]
Execute = Callable[[Function, Network, list[Task]], list[tuple[Tensor, ...]]]


def one_by_one(function: Function, network: Network, chunks: list[Task]) -> list[tuple[Tensor, ...]]:
    return [function(network, chunk) for chunk in chunks]


def on_threads(
    function: Function, network: Network, chunks: list[Task], workers: int | None = None
) -> list[tuple[Tensor, ...]]:
    """Computes chunks on threads of a CPU, each thread whole chunks, since one task is too small to be shared out.

    workers: how many chunks at a time; None: torch.get_num_threads(). If there are fewer, each has several threads.
    """
    threads = torch.get_num_threads()
    workers = min(workers or threads, len(chunks))
    if workers == 1:
        return one_by_one(function, network, chunks)
    results: list[Any] = [None] * len(chunks)
    autocast = {"dtype": torch.get_autocast_dtype("cpu"), "enabled": torch.is_autocast_enabled("cpu")}
    autocast["cache_enabled"] = torch.is_autocast_cache_enabled()

    def work(first: int) -> None:
        if torch.get_num_threads() != threads // workers:  # of this thread; setting it empties caches
            torch.set_num_threads(threads // workers)
        # functional_call puts other parameters into the modules, so each thread has modules of its own
        own = copied(network, network.parameters())
        with torch.autocast("cpu", **autocast):
            for place in range(first, len(chunks), workers):
                results[place] = function(own, chunks[place])

    futures = [_pool(workers).submit(work, first) for first in range(workers)]
    try:
        wait(futures)
    finally:
        torch.set_num_threads(threads)  # what threads still to come will start with
    for future in futures:
        future.result()  # raises what was raised there
    return results


def copied(module: Module, shared: Iterable[Tensor] = ()) -> Module:
    """A copy that shares these parameters, and the tensors that layers keep from a forward, which cannot be copied."""
    kept = [kept for layer in module.modules() for kept in vars(layer).values() if isinstance(kept, Tensor)]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*shared, *kept)})


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers)


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of its parent's threads


class CaptureFailed(Exception):
    """A function could not be recorded; the cause of this error says why."""


class CudaGraphs:
    """Computes chunks on a GPU: the kernels of a function are recorded once, and from then on launched all at once.

    They are recorded for every function with its knobs, shape of chunk and place of the parameters in memory. After a
    Trainer has ended a new object is needed, because the Trainer frees workspaces that recorded kernels use. If
    recording fails, one line says so, and from then on this process launches kernels one by one.
    """

    possible = True  # in this process
    _failed: ClassVar[list[Any]] = []  # kept, since torch's allocator may still point to them

    def __init__(self) -> None:
        self._recorded: dict[Any, tuple[Any, Task, tuple[Tensor, ...]]] = {}
        self._pool: Any = None  # one for all: they replay one after the other, and what they leave is copied at once

    def __call__(self, function: Any, network: Network, chunks: list[Task]) -> list[tuple[Tensor, ...]]:
        return [self._one(function, network, chunk) for chunk in chunks]

    def _one(self, function: Any, network: Network, chunk: Task) -> tuple[Tensor, ...]:
        if not CudaGraphs.possible:
            return function(network, chunk)
        key = (
            *(function.func, *sorted(function.keywords.items())),
            *((field.shape, field.dtype) for field in chunk),
            *(parameter.data_ptr() for parameter in network.parameters()),
        )
        if key not in self._recorded:
            inputs = Task(*(field.clone() for field in chunk))
            cached = torch.is_autocast_cache_enabled()
            torch.set_autocast_cache_enabled(False)  # what it keeps would lie in the graph's memory
            try:
                self._warm_up(function, network, inputs)
                self._recorded[key] = self._record(function, network, inputs)
            except CaptureFailed as failed:
                CudaGraphs.possible = False
                self._recorded.clear()
                reason = first_line(failed.__cause__)
                log.info(f"engine=batched: no CUDA graph ({reason}); kernels are launched one by one")
                return function(network, chunk)
            finally:
                torch.set_autocast_cache_enabled(cached)
        graph, inputs, outputs = self._recorded[key]
        for place, value in zip(inputs, chunk, strict=True):
            place.copy_(value)
        graph.replay()
        return tuple(output.clone() for output in outputs)  # the next replay overwrites them

    def _warm_up(self, function: Function, network: Network, inputs: Task) -> None:
        """Libraries choose their kernels and take their workspaces."""
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                function(network, inputs)
        torch.cuda.current_stream().wait_stream(aside)

    def _record(self, function: Function, network: Network, inputs: Task) -> tuple[Any, Task, tuple[Tensor, ...]]:
        """Records the kernels of a function.

        Raises:
            CaptureFailed: recording failed; out of memory is raised as such.
        """
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                outputs = function(network, inputs)
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # torch 2.11 would go on with the stream of the capture
            CudaGraphs._failed.append(graph)
            # The end of a capture fails too, and hides why; before torch 2.15 its allocator would think it goes on.
            with contextlib.suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(before.device_index, self._pool)
            cause = error if isinstance(error, torch.OutOfMemoryError) else error.__context__ or error
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise CaptureFailed from cause
        return graph, inputs, outputs
