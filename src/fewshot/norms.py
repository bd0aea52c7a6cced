"""The normalisations of a network, and by whose statistics the queries of a task are normalised.

Shapes: ... nothing for one task, or B tasks; S support and Q query images per task, I images of a pass, C channels,
d features or logits.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

Context = AbstractContextManager[Any]
TOGETHER = nullcontext()  # all images of a pass are one batch, as the network has it by itself
Outputs = Callable[[Tensor, Context], Tensor]


def norm(width: int, kind: str = "batch") -> nn.Module:
    """What follows a convolution of so many channels.

    batch: BatchNorm by the statistics of the batch at hand, in training and test alike.
    group: GroupNorm (Wu and He 2018), which treats each image alone: groups of eight channels, or of the fewest above
        eight that divide the width; a width below eight is one group.
    task: TaskNorm.
    """
    if kind == "group":
        return nn.GroupNorm(next(groups for groups in range(max(1, width // 8), 0, -1) if width % groups == 0), width)
    return TaskNorm(width) if kind == "task" else nn.BatchNorm2d(width, track_running_stats=False)


def of_queries(module: nn.Module, task: Any, outputs: Outputs, statistics: str = "task") -> Tensor:
    """The features or logits of a task's queries, (..., Q, d), where BatchNorm normalises by `statistics`:

    task: of the queries together, as in training; support: of the support images alone, as this network sees them;
    each: of the support images and one query, each query by itself.
    TaskNorm always has the support's.

    Args:
        module: the network, or its encoder.
        task: of one task, or of B with a leading B; see data/task.py.
        outputs: what the module makes of images (..., I, C, H, W) inside of a context, (..., I, d).
    """
    if any(isinstance(layer, TaskNorm) and layer.mean is None for layer in module.modules()):
        statistics = "support"
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


class TaskNorm(nn.Module):
    """TaskNorm-I (Bronskill et al. 2020, section 4): an image x is normalised by a blend, learned and dependent on the
    number of support images, of the moments of the support S and of x alone, in every channel:

        mu      = alpha mu_S + (1 - alpha) mu_x
        sigma^2 = alpha (sigma_S^2 + (mu_S - mu)^2) + (1 - alpha) (sigma_x^2 + (mu_x - mu)^2)
        alpha   = sigmoid(scale |S| + offset)

    scale and offset are parameters of the layer, zero at first, and adapt as all others do. Outside of InSets all
    images of a pass are the support.
    """

    mean: Tensor | None
    variance: Tensor | None

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.scale, self.offset = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.eps = eps
        # Of a support that is fixed from now on: mu_S, sigma_S^2 and its number of images.
        self.register_buffer("mean", None)
        self.register_buffer("variance", None)
        self.images = 0

    def forward(self, x: Tensor) -> Tensor:
        parameters = (self.weight, self.bias, self.scale, self.offset)
        if self.mean is None or self.variance is None:
            return task_norm(x, *parameters, self.eps)
        mean, variance = (moment.view(1, 1, 1, -1, 1, 1) for moment in (self.mean, self.variance))
        learned: Any = [p[None] for p in parameters]
        return _blended(x[None, None], (mean, variance, self.images), *learned, eps=self.eps)[0, 0]


class InSets(TorchFunctionMode):
    """Inside, each task's images are sets of so many, and BatchNorm normalises a set by the moments of its first few.

    To TaskNorm these first few are the support.

    Inside of a mode of batched/ it treats all tasks of a pass.
    """

    def __init__(self, size: int, *, first: int) -> None:
        super().__init__()
        self.sets = {"size": size, "first": first}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm and kwargs.get("training") and args[1] is None:
            return batch_norm(args[0], kwargs["weight"], kwargs["bias"], kwargs["eps"], **self.sets)
        if function is task_norm:
            return task_norm(*args, **kwargs | self.sets)
        return function(*args, **kwargs)


def batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, size: int, first: int) -> Tensor:
    """(I, C, ...) of one task, (C,), (C,) -> (I, C, ...): each set of `size` by the moments of its `first` images."""
    if has_torch_function((x,)):  # the batched engine has several tasks in x
        return handle_torch_function(batch_norm, (x,), x, weight, bias, eps, size=size, first=first)
    weight, bias = (None if parameter is None else parameter[None] for parameter in (weight, bias))
    return batch_norm_of_tasks(x[None], weight, bias, eps, size=size, first=first)[0]


def batch_norm_of_tasks(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, size: int, first: int
) -> Tensor:
    """(B, I, C, ...), (B, C), (B, C) -> (B, I, C, ...)"""
    sets, (mean, variance) = _sets_and_moments(x, size, first)
    return _scaled((sets - mean) * (variance + eps).rsqrt(), weight, bias).to(x.dtype).flatten(1, 2)


def task_norm(x: Tensor, *parameters: Any, size: int | None = None, first: int | None = None) -> Tensor:
    """(I, C, H, W) of one task; parameters: weight, bias, scale, offset and eps."""
    if has_torch_function((x,)):
        return handle_torch_function(task_norm, (x,), x, *parameters, size=size, first=first)
    *tensors, eps = parameters
    return task_norm_of_tasks(x[None], *(p[None] for p in tensors), eps, size=size, first=first)[0]


def task_norm_of_tasks(x: Tensor, *parameters: Any, size: int | None = None, first: int | None = None) -> Tensor:
    """(B, I, C, H, W) and parameters with a leading B -> (B, I, C, H, W)"""
    size = size or x.shape[1]
    first = first or size
    sets, moments = _sets_and_moments(x, size, first)
    return _blended(sets, (*moments, first), *parameters).to(x.dtype).flatten(1, 2)


def _blended(
    sets: Tensor, support: tuple, weight: Tensor, bias: Tensor, scale: Tensor, offset: Tensor, eps: float
) -> Tensor:
    """The formula of TaskNorm; support: its mean, its variance and its number of images."""
    mean_S, variance_S, images = support
    variance_x, mean_x = torch.var_mean(sets, (4, 5), correction=0, keepdim=True)
    alpha = _of_channels((scale * images + offset).sigmoid(), sets)
    mean = alpha * mean_S + (1 - alpha) * mean_x
    variance = alpha * (variance_S + (mean_S - mean) ** 2) + (1 - alpha) * (variance_x + (mean_x - mean) ** 2)
    return _scaled((sets - mean) * (variance + eps).rsqrt(), weight, bias)


def _sets_and_moments(x: Tensor, size: int, first: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(B, sets, size, C, ...), in float32 at least, and mean and variance of the first images of each set."""
    sets = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, (-1, size))
    numbers = (2, *range(4, sets.dim()))  # of a channel: images and pixels
    variance, mean = torch.var_mean(sets[:, :, :first], numbers, correction=0, keepdim=True)
    return sets, (mean, variance)


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * _of_channels(weight, y)
    return y if bias is None else y + _of_channels(bias, y)


def _of_channels(parameter: Tensor, y: Tensor) -> Tensor:
    """(B, C) as it meets (B, sets, images, C, ...)."""
    return parameter.view(len(parameter), 1, 1, -1, *[1] * (y.dim() - 4))
