"""Second order in memory that does not grow with the inner steps: no step's graph is kept, each is made once more.

Of an inner step theta_n alone is kept. The backward pass computes the step from it again, now with the graph of its own
gradient, hands back the vector-Jacobian product and lets that graph go before it comes to the step before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Outputs = Tensor | list[Tensor]
Function = Callable[[Sequence[Tensor]], Outputs]


def recomputed(function: Function, inputs: Sequence[Tensor], *, draws: bool) -> Outputs:
    """function(inputs), of which only the inputs are kept.

    Args:
        function: an inner step of second order, which returns a list shaped as the first inputs are, or query logits.
        inputs: theta_n, learned inner_lr: all that it depends on and that is to have a gradient.
        draws: whether it draws random numbers, which are the same ones the second time.
    """
    outputs = Recomputed.apply(function, draws, *inputs)
    return outputs if isinstance(outputs, Tensor) else list(outputs)


class Recomputed(torch.autograd.Function):
    """The graph is made, and let go at once, in the forward pass too: so both compute bitwise the same numbers."""

    @staticmethod
    def forward(ctx: Any, function: Function, draws: bool, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        ctx.function, device = function, inputs[0].device
        on_cpu = device.type == "cpu"
        ctx.state = (torch.get_rng_state() if on_cpu else torch.cuda.get_rng_state(device)) if draws else None
        # A GPU's backward pass has a thread of its own, where autocast is off; cached casts would outlive the step.
        dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        ctx.autocast = {"device_type": device.type, "dtype": dtype, "enabled": enabled, "cache_enabled": False}
        # theta_n+1 stays when the graph goes: it has a place from before the graph, so as to leave no holes behind it.
        places = [torch.empty_like(tensor) for tensor in inputs]
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            outputs = function(_leaves(inputs, ctx.needs_input_grad[2:]))
        if isinstance(outputs, Tensor):
            return outputs.detach()
        of_input = zip_longest(outputs, places[: len(outputs)])  # a state that the first step makes has no place yet
        return tuple(_copied(output.detach(), place) for output, place in of_input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        inputs = _leaves(ctx.saved_tensors, needed)
        with torch.enable_grad(), torch.autocast(**ctx.autocast), _drawing_from(ctx.state, inputs[0].device):
            outputs = ctx.function(inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        pairs = (pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad)
        outputs, gradients = zip(*pairs, strict=True)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        products = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
        return (None, None, *(next(products) if need else None for need in needed))


def _copied(output: Tensor, place: Tensor | None) -> Tensor:
    if place is None or (place.shape, place.dtype) != (output.shape, output.dtype):
        return output
    return place.copy_(output)


def _leaves(inputs: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    return [tensor.detach().requires_grad_(need) for tensor, need in zip(inputs, needed, strict=True)]


@contextmanager
def _drawing_from(state: Tensor | None, device: torch.device) -> Iterator[None]:
    """Inside, random numbers are those after this state; outside, as if none had been drawn. None: changes nothing."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else [], enabled=state is not None):
        if state is not None:
            torch.cuda.set_rng_state(state, device) if on_gpu else torch.set_rng_state(state)
        yield
