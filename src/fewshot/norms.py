"""By whose statistics the queries of a task are normalised.

Shapes: ... nothing for one task, or B tasks; S support and Q query images per task, I images of a pass, C channels,
d features or logits.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

Context = AbstractContextManager[Any]
TOGETHER = nullcontext()  # all images of a pass are one batch, as the network has it by itself
Outputs = Callable[[Tensor, Context], Tensor]


def of_queries(task: Any, outputs: Outputs, statistics: str = "task") -> Tensor:
    """The features or logits of a task's queries, (..., Q, d), where BatchNorm normalises by `statistics`:

    task: of the queries together, as in training; support: of the support images alone, as this network sees them;
    each: of the support images and one query, each query by itself.

    Args:
        task: of one task, or of B with a leading B; see data/task.py.
        outputs: images (..., I, C, H, W) to (..., I, d), inside of a context.
    """
    place = task.support_labels.dim() - 1  # of the dimension of images
    S, Q = task.support.shape[place], task.query.shape[place]
    if statistics == "task":
        return outputs(task.query, TOGETHER)
    if statistics == "support":
        images = torch.cat([task.support, task.query], place)
        return outputs(images, InSets(S + Q, first=S)).narrow(place, S, Q)
    parts = []
    for queries in task.query.split(max(1, (S + Q) // (S + 1)), place):  # no pass is larger than that for `support`
        shape = (*queries.shape[: place + 1], *task.support.shape[place:])
        pairs = [task.support.unsqueeze(place).expand(shape), queries.unsqueeze(place + 1)]
        images = torch.cat(pairs, place + 1).flatten(place, place + 1)  # a query after its own copy of the support
        several = queries.shape[place] > 1
        passed = outputs(images, InSets(S + 1, first=S + 1) if several else TOGETHER)
        parts.append(passed.unflatten(place, (-1, S + 1)).select(place + 1, S))
    return torch.cat(parts, place)


def inside(module: Callable[[Tensor], Tensor], images: Tensor, context: Context) -> Tensor:
    """What a module makes of images in a context."""
    with context:
        return module(images)


class InSets(TorchFunctionMode):
    """Inside, each task's images are sets of so many, and BatchNorm normalises a set by the moments of its first few.

    Inside of a mode of batched/ it treats all tasks of a pass.
    """

    def __init__(self, size: int, *, first: int) -> None:
        super().__init__()
        self.sets = {"size": size, "first": first}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm and kwargs.get("training") and args[1] is None:
            return batch_norm(args[0], kwargs["weight"], kwargs["bias"], kwargs["eps"], **self.sets)
        return function(*args, **kwargs)


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, size: int, first: int) -> Tensor:
    """(I, C, ...) of one task, (C,), (C,) -> (I, C, ...): each set of `size` images by the moments of its first."""
    if has_torch_function((x,)):  # the batched engine has several tasks in x
        return handle_torch_function(batch_norm, (x,), x, weight, bias, eps, size=size, first=first)
    weight, bias = (None if parameter is None else parameter[None] for parameter in (weight, bias))
    return batch_norm_of_tasks(x[None], weight, bias, eps, size=size, first=first)[0]


def batch_norm_of_tasks(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, size: int, first: int
) -> Tensor:
    """(B, I, C, ...), (B, C), (B, C) -> (B, I, C, ...)"""
    sets = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (-1, size))
    numbers = (2, *range(4, sets.dim()))  # of a channel: images and pixels
    variance, mean = torch.var_mean(sets[:, :, :first], numbers, correction=0, keepdim=True)
    y = (sets - mean) * (variance + eps).rsqrt()
    if weight is not None:
        y = y * _of_channels(weight, y)
    if bias is not None:
        y = y + _of_channels(bias, y)
    return y.to(x.dtype).flatten(1, 2)


def _of_channels(parameter: Tensor, y: Tensor) -> Tensor:
    """(B, C) as it meets (B, sets, images, C, ...)."""
    return parameter.view(len(parameter), 1, 1, -1, *[1] * (y.dim() - 4))
