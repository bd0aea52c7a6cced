"""The same inner loop for every task of a meta-batch at once.

Shapes: B tasks, K ways, S support and Q query images per task, I images of C channels, H x W pixels, N inner steps;
the parameters of adapted networks have a leading B.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.overrides import TorchFunctionMode

from fewshot.execution import Execute, Function, on_threads, one_by_one
from fewshot.tasks import Task, query_accuracy

Parameters = dict[str, Tensor]


def meta_gradient(
    network: nn.Module,
    tasks: Task,
    *,
    inner_lr: float,
    inner_steps: int,
    first_order: bool,
    tasks_at_once: int | None = None,
    execute: Execute | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds the outer gradient, a mean over the tasks, to the .grad of the network's parameters (method.md section 0).

    Args:
        tasks_at_once: in memory together; None: on a CPU as many as there are threads, on a GPU all.
        execute: of execution.py; None: threads on a CPU, else one chunk after the other.

    Returns the query loss and the query accuracy after the last inner step, (B,) each.
    """
    function = partial(_outer_gradient, inner_lr=inner_lr, inner_steps=inner_steps, first_order=first_order)
    gradients, losses, logits = zip(*_run(function, network, tasks, tasks_at_once, execute), strict=True)
    mean = sum(gradients) / len(tasks.support)
    parameters = list(network.parameters())
    for parameter, gradient in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        gradient = gradient.view_as(parameter)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return torch.cat(losses), query_accuracy(torch.cat(logits), tasks.query_labels)


def step_accuracies(
    network: nn.Module,
    tasks: Task,
    *,
    inner_lr: float,
    steps: int,
    zeroing: bool,
    tasks_at_once: int | None = None,
    execute: Execute | None = None,
) -> Tensor:
    """Query accuracy after every inner step 0 .. steps, (B, steps + 1); with zeroing, adapted from a zeroed head.

    First-order adaptation (the adapted parameters are the same); the network is left as it is.
    """
    function = partial(_step_logits, inner_lr=inner_lr, steps=steps, zeroing=zeroing)
    chunks = _run(function, network, tasks, tasks_at_once, execute)
    each_step = [torch.cat(logits) for logits in zip(*chunks, strict=True)]
    return torch.stack([query_accuracy(logits, tasks.query_labels) for logits in each_step], dim=1)


def _run(
    function: Function, network: nn.Module, tasks: Task, tasks_at_once: int | None, execute: Execute | None
) -> list[tuple[Tensor, ...]]:
    """function(network, chunk) for all chunks of the tasks, in their order."""
    if execute is None:
        execute = on_threads if tasks.support.device.type == "cpu" else one_by_one
    if execute is on_threads:  # as many chunks at a time as there are threads
        workers = min(torch.get_num_threads(), tasks_at_once or len(tasks.support))
        size = (tasks_at_once or workers) // workers
    else:
        size = tasks_at_once or len(tasks.support)
    chunks = [Task(*fields) for fields in zip(*(field.split(size) for field in tasks), strict=True)]
    return execute(function, network, chunks)


def _outer_gradient(
    network: nn.Module, tasks: Task, *, inner_lr: float, inner_steps: int, first_order: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The outer gradient, summed over the tasks, as one vector; query losses (B,); query logits (B, Q, K)."""
    theta = _copies(network, len(tasks.support))
    adapted = theta  # theta_n <- theta
    for _ in range(inner_steps):
        adapted = _step(network, adapted, tasks, inner_lr, first_order)
    logits = _logits(network, adapted, tasks.query)
    losses = _losses(logits, tasks.query_labels)  # L(theta_n, Q_n)
    at = adapted if first_order else theta  # where the gradient is taken; second order: through all inner steps
    gradients = torch.autograd.grad(losses.sum(), list(at.values()))
    return torch.cat([each.sum(0).flatten() for each in gradients]), losses.detach(), logits.detach()


def _step_logits(network: nn.Module, tasks: Task, *, inner_lr: float, steps: int, zeroing: bool) -> tuple[Tensor, ...]:
    """The query logits after every inner step, steps + 1 times (B, Q, K)."""
    theta = _copies(network, len(tasks.support))
    if zeroing:
        with torch.no_grad():
            theta["head.weight"].zero_(), theta["head.bias"].zero_()
    logits = []
    for step in range(steps + 1):
        if step > 0:
            theta = _step(network, theta, tasks, inner_lr, first_order=True)
        with torch.no_grad():
            logits.append(_logits(network, theta, tasks.query))
    return tuple(logits)


def _copies(network: nn.Module, tasks: int) -> Parameters:
    return {
        name: p.detach().expand(tasks, *p.shape).clone(memory_format=torch.contiguous_format).requires_grad_()
        for name, p in network.named_parameters()
    }


def _step(network: nn.Module, theta: Parameters, tasks: Task, inner_lr: float, first_order: bool) -> Parameters:
    losses = _losses(_logits(network, theta, tasks.support), tasks.support_labels)
    gradients = torch.autograd.grad(losses.sum(), list(theta.values()), create_graph=not first_order)
    with torch.set_grad_enabled(not first_order):  # theta_n <- theta_n - eta grad L(theta_n, S_n)
        theta = {name: p - inner_lr * g for (name, p), g in zip(theta.items(), gradients, strict=True)}
    return {name: p.requires_grad_() for name, p in theta.items()} if first_order else theta


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each task: (B, I, K), (B, I) -> (B,)."""
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(dim=1)


def _logits(network: nn.Module, theta: Parameters, images: Tensor) -> Tensor:
    """(B, I, C, H, W) -> (B, I, K), every task by its own parameters."""
    side_by_side = images.transpose(0, 1).flatten(1, 2)  # (I, B*C, H, W)
    try:
        with SideBySide(len(images)):
            logits = functional_call(network, theta, side_by_side)
    except NotSideBySide:  # slower, and right for any network as long as all differentiation stays outside
        return vmap(partial(functional_call, network))(theta, images)
    return logits.unflatten(1, (len(images), -1)).transpose(0, 1)


class NotSideBySide(Exception):
    """A function that may mix channels, so that tasks side by side in the channels would see each other."""


class SideBySide(TorchFunctionMode):
    """Runs a network's own forward on B tasks that lie side by side in the channels, (I, B*C, H, W).

    There a convolution in B groups and BatchNorm treat each task alone, and so does whatever treats each channel alone.

    Raises:
        NotSideBySide: the network calls something else.
    """

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.tasks = tasks

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in OWN:
            return OWN[function](self.tasks, *args, **kwargs)
        if function not in EACH_CHANNEL_ALONE or len({a.shape for a in args if isinstance(a, Tensor)}) > 1:
            raise NotSideBySide(function)
        return function(*args, **kwargs)


def _conv2d(tasks: int, x: Tensor, weight: Tensor, bias: Tensor | None, *geometry: Any) -> Tensor:
    stride, padding, dilation, groups = geometry
    if isinstance(padding, str):
        raise NotSideBySide(f"padding={padding}")
    weight, bias = weight.flatten(0, 1), None if bias is None else bias.flatten()
    if torch.is_autocast_enabled(x.device.type):  # it does not reach into an autograd.Function
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return Convolution.apply(x, weight, bias, (stride, padding, dilation, tasks * groups))


def _batch_norm(tasks: int, x: Tensor, mean: None, var: None, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
    weight, bias = (None if each is None else each.flatten() for each in (weight, bias))
    return F.batch_norm(x, mean, var, weight, bias, **options)


def _linear(tasks: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(I, B*d), (B, K, d), (B, K) -> (I, B*K)"""
    if x.dim() != 2:
        raise NotSideBySide(F.linear)
    x = x.unflatten(1, (tasks, -1)).transpose(0, 1)
    logits = x @ weight.mT if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)
    return logits.transpose(0, 1).flatten(1)


def _flatten(tasks: int, x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    if start_dim == 0:
        raise NotSideBySide(torch.flatten)
    return x.flatten(start_dim, end_dim)


OWN = {
    F.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    F.linear: _linear,
    torch.flatten: _flatten,
    Tensor.flatten: _flatten,
}
EACH_CHANNEL_ALONE = {
    *(F.relu, F.leaky_relu, F.gelu, F.silu, F.elu, torch.relu, torch.tanh, torch.sigmoid, F.pad),
    *(torch.max_pool2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
    *(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__),
    *(Tensor.dim, Tensor.dtype.__get__, Tensor.device.__get__),
}


# <dy, conv(x, w)> is linear in all three, so the derivatives of each of these functions are the other two. Torch's own
# second derivative of a convolution in groups goes group by group.


class Convolution(torch.autograd.Function):
    """y = conv(x, w) + b; geometry: stride, padding, dilation, groups."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: tuple) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return F.conv2d(x, w, b, *geometry)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, w = ctx.saved_tensors
        for_x, for_w, for_b, _ = ctx.needs_input_grad
        if not torch.is_grad_enabled():  # not to be differentiated again: all three in one go
            stride, padding, dilation, groups = ctx.geometry
            options = (stride, padding, dilation, False, [0, 0], groups, (for_x, for_w, for_b))
            return (*torch.ops.aten.convolution_backward(dy, x, w, [len(w)], *options), None)
        return (
            InputGradient.apply(dy, x, w, ctx.geometry) if for_x else None,
            WeightGradient.apply(dy, x, w, ctx.geometry) if for_w else None,
            dy.sum((0, 2, 3)) if for_b else None,
            None,
        )


class InputGradient(torch.autograd.Function):
    """dx; of x only the shape matters."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, w: Tensor, geometry: tuple) -> Tensor:
        ctx.save_for_backward(dy, w)
        ctx.geometry = geometry
        return conv2d_input(x.shape, w, dy, *geometry)

    @staticmethod
    def backward(ctx: Any, ddx: Tensor) -> tuple:
        dy, w = ctx.saved_tensors
        for_dy, _, for_w, _ = ctx.needs_input_grad
        return (
            Convolution.apply(ddx, w, None, ctx.geometry) if for_dy else None,
            None,
            WeightGradient.apply(dy, ddx, w, ctx.geometry) if for_w else None,
            None,
        )


class WeightGradient(torch.autograd.Function):
    """dw; of w only the shape matters."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, w: Tensor, geometry: tuple) -> Tensor:
        ctx.save_for_backward(dy, x)
        ctx.geometry = geometry
        return conv2d_weight(x, w.shape, dy, *geometry)

    @staticmethod
    def backward(ctx: Any, ddw: Tensor) -> tuple:
        dy, x = ctx.saved_tensors
        for_dy, for_x, _, _ = ctx.needs_input_grad
        return (
            Convolution.apply(x, ddw, None, ctx.geometry) if for_dy else None,
            InputGradient.apply(dy, x, ddw, ctx.geometry) if for_x else None,
            None,
            None,
        )
