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
from fewshot.models import drop_squares
from fewshot.tasks import Task, query_accuracy

Parameters = dict[str, Tensor]


def meta_gradient(
    network: nn.Module,
    tasks: Task,
    *,
    inner_lr: float,
    inner_steps: int,
    first_order: bool,
    adapted: str = "all",
    tasks_at_once: int | None = None,
    execute: Execute | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds the outer gradient, a mean over the tasks, to the .grad of the network's parameters (method.md section 0).

    Args:
        adapted: what the inner loop adapts, "all" or the "head" alone (EFIL, method.md section 1).
        tasks_at_once: in memory together; None: on a CPU as many as there are threads, on a GPU all.
        execute: of execution.py; None: threads on a CPU, else one chunk after the other.

    Returns the query loss and the query accuracy after the last inner step, (B,) each.
    """
    knobs = {"inner_lr": inner_lr, "inner_steps": inner_steps, "first_order": first_order, "adapted": adapted}
    function = partial(_outer_gradient, **knobs)
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
    adapted: str = "all",
    tasks_at_once: int | None = None,
    execute: Execute | None = None,
) -> Tensor:
    """Query accuracy after every inner step 0 .. steps, (B, steps + 1); with zeroing, adapted from a zeroed head.

    First-order adaptation (the adapted parameters are the same); the network is left as it is.
    """
    function = partial(_step_logits, inner_lr=inner_lr, steps=steps, zeroing=zeroing, adapted=adapted)
    chunks = _run(function, network, tasks, tasks_at_once, execute)
    each_step = [torch.cat(logits) for logits in zip(*chunks, strict=True)]
    return torch.stack([query_accuracy(logits, tasks.query_labels) for logits in each_step], dim=1)


def _run(
    function: Function, network: nn.Module, tasks: Task, tasks_at_once: int | None, execute: Execute | None
) -> list[tuple[Tensor, ...]]:
    """function(network, chunk) for all chunks of the tasks, in their order."""
    number = len(tasks.support)
    size = tasks_at_once or number
    if execute is None and tasks.support.device.type == "cpu":  # `workers` chunks at a time
        workers = min(torch.get_num_threads(), size)
        size = min((tasks_at_once or workers) // workers, -(-number // workers))
        execute = partial(on_threads, workers=workers)
    chunks = [Task(*fields) for fields in zip(*(field.split(size) for field in tasks), strict=True)]
    return (execute or one_by_one)(function, network, chunks)


def _outer_gradient(
    network: nn.Module, tasks: Task, *, inner_lr: float, inner_steps: int, first_order: bool, adapted: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The outer gradient, summed over the tasks, as one vector; query losses (B,); query logits (B, Q, K)."""
    initial = _copies(network, len(tasks.support))  # theta_n <- theta
    part, theta, tasks = _adapting(network, initial, tasks, adapted)
    for _ in range(inner_steps):
        theta = _step(part, theta, tasks, inner_lr, first_order)
    logits = _outputs(part, theta, tasks.query)
    losses = _losses(logits, tasks.query_labels)  # L(theta_n, Q_n)
    at = initial
    if first_order:  # the gradient at theta_n; second order: at theta, through all inner steps
        at = theta if part is network else initial | {f"head.{name}": p for name, p in theta.items()}
    gradients = torch.autograd.grad(losses.sum(), list(at.values()))
    return torch.cat([each.sum(0).flatten() for each in gradients]), losses.detach(), logits.detach()


def _step_logits(
    network: nn.Module, tasks: Task, *, inner_lr: float, steps: int, zeroing: bool, adapted: str
) -> tuple[Tensor, ...]:
    """The query logits after every inner step, steps + 1 times (B, Q, K)."""
    theta = _copies(network, len(tasks.support))
    with torch.no_grad():
        if zeroing:
            for name in theta:
                if name.startswith("head."):
                    theta[name].zero_()
        part, theta, tasks = _adapting(network, theta, tasks, adapted)
    logits = []
    for step in range(steps + 1):
        if step > 0:
            theta = _step(part, theta, tasks, inner_lr, first_order=True)
        with torch.no_grad():
            logits.append(_outputs(part, theta, tasks.query))
    return tuple(logits)


def _adapting(network: nn.Module, theta: Parameters, tasks: Task, adapted: str) -> tuple[nn.Module, Parameters, Task]:
    """What adapts, its parameters, and to what: the network to images, or the head to features (B, I, d)."""
    if adapted == "all":
        return network, theta, tasks
    encoder, head = (
        {name.removeprefix(part): p for name, p in theta.items() if name.startswith(part)}
        for part in ("encoder.", "head.")
    )
    support, query = (_outputs(network.encoder, encoder, images) for images in (tasks.support, tasks.query))
    return network.head, head, tasks._replace(support=support, query=query)


def _copies(network: nn.Module, tasks: int) -> Parameters:
    return {
        name: p.detach().expand(tasks, *p.shape).clone(memory_format=torch.contiguous_format).requires_grad_()
        for name, p in network.named_parameters()
    }


def _step(network: nn.Module, theta: Parameters, tasks: Task, inner_lr: float, first_order: bool) -> Parameters:
    losses = _losses(_outputs(network, theta, tasks.support), tasks.support_labels)
    gradients = torch.autograd.grad(losses.sum(), list(theta.values()), create_graph=not first_order)
    with torch.set_grad_enabled(not first_order):  # theta_n <- theta_n - eta grad L(theta_n, S_n)
        theta = {name: p - inner_lr * g for (name, p), g in zip(theta.items(), gradients, strict=True)}
    return {name: p.requires_grad_() for name, p in theta.items()} if first_order else theta


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each task: (B, I, K), (B, I) -> (B,)."""
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(dim=1)


def _outputs(module: nn.Module, theta: Parameters, x: Tensor) -> Tensor:
    """Every task by its own parameters. Of the network: images (B, I, C, H, W) -> logits (B, I, K)."""
    side_by_side = x.transpose(0, 1).flatten(1, 2)  # (I, B*C, H, W)
    try:
        with SideBySide(len(x)):
            y = functional_call(module, theta, side_by_side)
    except NotSideBySide:  # slower, for whatever vmap takes; right as long as all differentiation stays outside of it
        return vmap(partial(functional_call, module))(theta, x)
    return y.unflatten(1, (len(x), -1)).transpose(0, 1)


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
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if function in ON_IMAGES:
            fits = tensors and tensors[0].dim() == 4 and not (function is F.pad and len(args[1]) > 4)
        else:
            fits = function in METADATA or (function in ELEMENTWISE and len({t.shape for t in tensors}) == 1)
        if not fits:
            raise NotSideBySide(function)
        return function(*args, **kwargs)


def _conv2d(
    tasks: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str) or input.dim() != 4 or weight.dim() != 5:
        raise NotSideBySide(F.conv2d)
    weight, bias = weight.flatten(0, 1), None if bias is None else bias.flatten()
    if torch.is_autocast_enabled(input.device.type):  # it does not reach into an autograd.Function
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    pairs = (each if isinstance(each, tuple) else (each, each) for each in (stride, padding, dilation))
    return Convolution.apply(input, weight, bias, (*pairs, tasks * groups))


def _batch_norm(
    tasks: int,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    if running_mean is not None or (weight is not None and weight.dim() != 2):
        raise NotSideBySide(F.batch_norm)
    weight, bias = (None if each is None else each.flatten() for each in (weight, bias))
    return F.batch_norm(input, None, None, weight, bias, **options)


def _linear(tasks: int, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(I, B*d), (B, K, d), (B, K) -> (I, B*K)"""
    if input.dim() != 2 or weight.dim() != 3:
        raise NotSideBySide(F.linear)
    x = input.unflatten(1, (tasks, -1)).transpose(0, 1)
    logits = x @ weight.mT if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)
    return logits.transpose(0, 1).flatten(1)


def _flatten(tasks: int, x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    if start_dim % x.dim() == 0:
        raise NotSideBySide(torch.flatten)
    return x.flatten(start_dim, end_dim)


def _drop_squares(tasks: int, x: Tensor, share: float) -> Tensor:
    return torch.cat([drop_squares(each, share) for each in x.chunk(tasks, dim=1)], dim=1)


OWN = {
    F.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    F.linear: _linear,
    drop_squares: _drop_squares,
    torch.flatten: _flatten,
    Tensor.flatten: _flatten,
}
# Each channel alone: on (I, B*C, H, W), or number by number where all tensors have one shape.
ON_IMAGES = {F.pad, torch.max_pool2d, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d}
ELEMENTWISE = {
    *(F.relu, F.leaky_relu, F.gelu, F.silu, F.elu, torch.relu, torch.tanh, torch.sigmoid),
    *(F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid, F.dropout),
    *(torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__),
}
METADATA = {Tensor.dim, Tensor.dtype.__get__, Tensor.device.__get__}


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
