"""The same inner loop for every task of a meta-batch at once.

Shapes: B tasks, K ways, S support and Q query images per task, I images of C channels, H x W pixels, N inner steps, T
steps of an evaluation; the parameters of adapted networks have a leading B.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.overrides import TorchFunctionMode

from fewshot.execution import Execute, Function, on_threads, one_by_one
from fewshot.models import drop_squares, prototype_head
from fewshot.tasks import Task, query_accuracy

Parameters = dict[str, Tensor]


def meta_gradient(
    network: nn.Module,
    tasks: Task,
    *,
    inner_lr: float | Sequence[Tensor],
    inner_steps: int,
    first_order: bool,
    adapted: str = "all",
    prototypes: bool = False,
    step_losses: Tensor | None = None,
    tasks_at_once: int | None = None,
    execute: Execute | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds the outer gradient, a mean over the tasks, to the .grad of the network's parameters (method.md section 0).

    Args:
        inner_lr, adapted, prototypes, step_losses: as in learner.py.
        tasks_at_once: in memory together; None: on a CPU as many as there are threads, on a GPU all.
        execute: of execution.py; None: threads on a CPU, else one chunk after the other.

    Returns the query loss and the query accuracy after the last inner step, (B,) each.
    """
    knobs = {"inner_lr": inner_lr, "inner_steps": inner_steps, "first_order": first_order, "adapted": adapted}
    function = partial(_outer_gradient, **knobs, prototypes=prototypes, step_losses=step_losses)
    gradients, losses, logits = zip(*_run(function, network, tasks, tasks_at_once, execute), strict=True)
    mean = sum(gradients) / len(tasks.support)
    parameters = [*network.parameters(), *_rates(inner_lr)]
    for parameter, gradient in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        gradient = gradient.view_as(parameter)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return torch.cat(losses), query_accuracy(torch.cat(logits), tasks.query_labels)


def step_accuracies(
    network: nn.Module,
    tasks: Task,
    *,
    inner_lr: float | Sequence[Tensor],
    steps: int,
    zeroing: bool,
    adapted: str = "all",
    prototypes: bool = False,
    tasks_at_once: int | None = None,
    execute: Execute | None = None,
) -> Tensor:
    """Query accuracy after every inner step 0 .. T, (B, T + 1); with zeroing, adapted from a zeroed head.

    First-order adaptation (the adapted parameters are the same); the network is left as it is.
    """
    knobs = {"inner_lr": inner_lr, "steps": steps, "zeroing": zeroing, "adapted": adapted, "prototypes": prototypes}
    chunks = _run(partial(_step_logits, **knobs), network, tasks, tasks_at_once, execute)
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
    network: nn.Module,
    tasks: Task,
    *,
    inner_lr: float | Sequence[Tensor],
    inner_steps: int,
    first_order: bool,
    adapted: str,
    prototypes: bool,
    step_losses: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The outer gradient, summed over the tasks, as one vector; query losses (B,); query logits (B, Q, K)."""
    initial = _copies(network, len(tasks.support))  # theta_n <- theta
    module, theta, names, tasks = _start(network, initial, tasks, adapted, prototypes)
    outer = 0.0
    for step in range(inner_steps):
        theta = theta | _step(module, theta, names, tasks, inner_lr, first_order)
        if step_losses is not None or step == inner_steps - 1:
            logits = _outputs(module, theta, tasks.query)
            losses = _losses(logits, tasks.query_labels)  # L(theta_n, Q_n)
            outer = losses if step_losses is None else outer + step_losses[step] * losses
    leaves, rates = list(initial.values()), _rates(inner_lr)
    gradients = torch.autograd.grad(outer.sum(), [*leaves, *rates], materialize_grads=True)
    summed = [*(each.sum(0) for each in gradients[: len(leaves)]), *gradients[len(leaves) :]]
    return torch.cat([each.flatten() for each in summed]), losses.detach(), logits.detach()


def _step_logits(
    network: nn.Module,
    tasks: Task,
    *,
    inner_lr: float | Sequence[Tensor],
    steps: int,
    zeroing: bool,
    adapted: str,
    prototypes: bool,
) -> tuple[Tensor, ...]:
    """The query logits after every inner step, T + 1 times (B, Q, K)."""
    initial = _copies(network, len(tasks.support))
    with torch.no_grad():
        if zeroing:
            for name in initial:
                if name.startswith("head."):
                    initial[name].zero_()
        module, theta, names, tasks = _start(network, initial, tasks, adapted, prototypes and not zeroing)
    logits = []
    for step in range(steps + 1):
        if step > 0:
            theta = theta | _step(module, theta, names, tasks, inner_lr, first_order=True)
        theta = {name: p.detach().requires_grad_() for name, p in theta.items()}
        with torch.no_grad():
            logits.append(_outputs(module, theta, tasks.query))
    return tuple(logits)


def _start(
    network: nn.Module, theta: Parameters, tasks: Task, adapted: str, prototypes: bool
) -> tuple[nn.Module, Parameters, list[str], Task]:
    """A module, its parameters and which of them adapt, and its tasks: images, or features (B, I, d) for the head."""
    encoder, head = (
        {name.removeprefix(part): p for name, p in theta.items() if name.startswith(part)}
        for part in ("encoder.", "head.")
    )
    if prototypes:
        support = _outputs(network.encoder, encoder, tasks.support)
        start = prototype_head(support, tasks.support_labels, network.head.out_features)
        head = {name: start[name] for name in head}
    if adapted == "head":
        support, query = (_outputs(network.encoder, encoder, images) for images in (tasks.support, tasks.query))
        return network.head, head, list(head), tasks._replace(support=support, query=query)
    if prototypes:  # of theta, of which theta_n is a copy: no inner gradient goes through them
        theta = {name: p.view_as(p) for name, p in theta.items()}
        theta |= {f"head.{name}": p for name, p in head.items()}
    names = [name for name in theta if adapted == "all" or name.startswith("encoder.")]
    return network, theta, names, tasks


def _copies(network: nn.Module, tasks: int) -> Parameters:
    return {
        name: p.detach().expand(tasks, *p.shape).clone(memory_format=torch.contiguous_format).requires_grad_()
        for name, p in network.named_parameters()
    }


def _rates(inner_lr: float | Sequence[Tensor]) -> list[Tensor]:
    """The inner_lr that are learned."""
    return [] if isinstance(inner_lr, float | int) else list(inner_lr)


def _step(
    module: nn.Module,
    theta: Parameters,
    names: list[str],
    tasks: Task,
    inner_lr: float | Sequence[Tensor],
    first_order: bool,
) -> Parameters:
    """What adapts, moved. First order: the inner gradient is a constant, so that d theta_n / d theta is 1."""
    losses = _losses(_outputs(module, theta, tasks.support), tasks.support_labels)
    before = [theta[name] for name in names]
    gradients = torch.autograd.grad(losses.sum(), before, create_graph=not first_order)
    etas = _rates(inner_lr) or [inner_lr] * len(names)
    moved = (p - eta * g for p, eta, g in zip(before, etas, gradients, strict=True))
    return dict(zip(names, moved, strict=True))  # theta_n <- theta_n - eta grad L(theta_n, S_n)


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
