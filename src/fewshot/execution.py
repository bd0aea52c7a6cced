"""How the chunks of a meta-batch are computed: one after the other, by several threads, or as CUDA graphs.

All of them give list(function(network, chunk) for chunk in chunks).
"""

import copy
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fewshot.tasks import Task

log = logging.getLogger(__name__)

Function = Callable[[nn.Module, Task], tuple[Tensor, ...]]
Execute = Callable[[Function, nn.Module, list[Task]], list[tuple[Tensor, ...]]]


def one_by_one(function: Function, network: nn.Module, chunks: list[Task]) -> list[tuple[Tensor, ...]]:
    return [function(network, chunk) for chunk in chunks]


def on_threads(function: Function, network: nn.Module, chunks: list[Task]) -> list[tuple[Tensor, ...]]:
    """On a CPU: each thread takes chunks of its own, since a task alone is too small to be shared out inside.

    As many as torch.get_num_threads(); fewer chunks than that get several threads each.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(chunks))
    if workers == 1:
        return one_by_one(function, network, chunks)
    results: list[Any] = [None] * len(chunks)
    autocast, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def work(first: int) -> None:
        torch.set_num_threads(threads // workers)  # of this thread
        # functional_call puts other parameters into the modules, so each thread has modules of its own
        own = copy.deepcopy(network, {id(p): p for p in network.parameters()})
        with torch.autocast("cpu", dtype, enabled=autocast):
            for place in range(first, len(chunks), workers):
                results[place] = function(own, chunks[place])

    try:
        list(_pool(workers).map(work, range(workers)))
    finally:
        torch.set_num_threads(threads)  # what threads still to come will start with
    return results


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers)


class CudaGraphs:
    """On a GPU: the kernels of a function are recorded once for every shape of chunk, and launched all at once after.

    The parameters of the network must stay where they are in memory. If recording is impossible one line says so, and
    the kernels are launched one by one.
    """

    def __init__(self) -> None:
        self._recorded: dict[Any, tuple[torch.cuda.CUDAGraph, Task, tuple[Tensor, ...]]] = {}
        self._possible = True

    def __call__(self, function: Any, network: nn.Module, chunks: list[Task]) -> list[tuple[Tensor, ...]]:
        return [self._one(function, network, chunk) for chunk in chunks]

    def _one(self, function: Any, network: nn.Module, chunk: Task) -> tuple[Tensor, ...]:
        key = (function.func, *sorted(function.keywords.items()), *(field.shape for field in chunk))
        if self._possible and key not in self._recorded:
            try:
                self._recorded[key] = self._record(function, network, chunk)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._possible = False
                log.info(
                    f"engine=batched: no CUDA graph ({str(error).splitlines()[0]}); kernels are launched one by one"
                )
        if not self._possible:
            return function(network, chunk)
        graph, inputs, outputs = self._recorded[key]
        for place, value in zip(inputs, chunk, strict=True):
            place.copy_(value)
        graph.replay()
        return tuple(output.clone() for output in outputs)  # the next replay overwrites them

    def _record(self, function: Function, network: nn.Module, chunk: Task) -> Any:
        inputs = Task(*(field.clone() for field in chunk))
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # what it keeps would lie in the graph's memory
        try:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):  # libraries choose their kernels and take their workspaces
                    function(network, inputs)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = function(network, inputs)
        finally:
            torch.set_autocast_cache_enabled(cached)
        return graph, inputs, outputs
