"""The same inner loop for every task of a meta-batch at once.

Shapes: B tasks, K ways, S support and Q query images per task, I images of C channels, H x W pixels, N inner steps, T
steps of an evaluation; the parameters of adapted networks have a leading B.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
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
    zeroing: bool = False,
    adapted: str = "all",
    prototypes: bool = False,
    step_losses: Tensor | None = None,
    tasks_at_once: int | None = None,
    execute: Execute | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds the outer gradient, a mean over the tasks, to the .grad of the network's parameters (method.md section 0).

    Args:
        inner_lr, zeroing, adapted, prototypes, step_losses: as in learner.py.
        tasks_at_once: in memory together; None: on a CPU as many as there are threads, on a GPU all.
        execute: of execution.py; None: threads on a CPU, else one chunk after the other.

    Returns the query loss and the query accuracy after the last inner step, (B,) each.
    """
    knobs = {"inner_lr": inner_lr, "steps": inner_steps, "first_order": first_order, "zeroing": zeroing}
    knobs |= {"adapted": adapted, "prototypes": prototypes}
    function = partial(_outer_gradient, step_losses=step_losses, **knobs)
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
    tasks_at_once: int | None = None,
    execute: Execute | None = None,
    **knobs: Any,
) -> Tensor:
    """Query accuracy after every inner step 0 .. T, (modes, B, T + 1); knobs: as in learner.py."""
    chunks = _run(partial(_step_logits, **knobs), network, tasks, tasks_at_once, execute)
    logits = torch.cat([torch.stack(each).unflatten(0, (len(knobs["zeroing"]), -1)) for each in chunks], dim=2)
    labels = tasks.query_labels.expand(*logits.shape[:2], -1, -1)
    return query_accuracy(logits.flatten(0, 2), labels.flatten(0, 2)).view(labels.shape[:3]).transpose(1, 2)


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
    network: nn.Module, tasks: Task, *, steps: int, step_losses: Tensor | None, **knobs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The outer gradient, summed over the tasks, as one vector; query losses (B,); query logits (B, Q, K)."""
    theta = _copies(network, len(tasks.support))
    outer = 0.0
    encode = cache(partial(_features, network, theta))
    for step, query_logits in enumerate(_adapt(network, theta, tasks, encode, steps=steps, **knobs)):
        if step == steps or (step > 0 and step_losses is not None):
            logits = query_logits()
            losses = _losses(logits, tasks.query_labels)  # L(theta_n, Q_n)
            outer = losses if step_losses is None else outer + step_losses[step - 1] * losses
    leaves, rates = list(theta.values()), _rates(knobs["inner_lr"])
    gradients = torch.autograd.grad(outer.sum(), [*leaves, *rates], materialize_grads=True)
    summed = [*(each.sum(0) for each in gradients[: len(leaves)]), *gradients[len(leaves) :]]
    return torch.cat([each.flatten() for each in summed]), losses.detach(), logits.detach()


def _step_logits(network: nn.Module, tasks: Task, *, zeroing: Sequence[bool], **knobs: Any) -> tuple[Tensor, ...]:
    """The query logits of one mode after every inner step, then of the next: T + 1 times (B, Q, K) each.

    First-order adaptation (the adapted parameters are the same); the network is left as it is.
    """
    theta, logits = _copies(network, len(tasks.support)), []
    encode = cache(torch.no_grad()(partial(_features, network, theta)))
    for zero in zeroing:
        for query_logits in _adapt(network, theta, tasks, encode, first_order=True, zeroing=zero, **knobs):
            with torch.no_grad():
                logits.append(query_logits())
    return tuple(logits)


def _features(network: nn.Module, theta: Parameters, images: Tensor) -> Tensor:
    """(B, I, C, H, W) -> (B, I, d)"""
    encoder = {name.removeprefix("encoder."): p for name, p in theta.items() if name.startswith("encoder.")}
    return _outputs(network.encoder, encoder, images)


def _adapt(
    network: nn.Module,
    initial: Parameters,
    tasks: Task,
    encode: Callable[[Tensor], Tensor],
    *,
    inner_lr: float | Sequence[Tensor],
    steps: int,
    first_order: bool,
    zeroing: bool,
    adapted: str = "all",
    prototypes: bool = False,
) -> Iterator[Callable[[], Tensor]]:
    """After inner step 0, 1, .. N: what computes the logits of the queries, (B, Q, K).

    encode: images (B, I, C, H, W) to their features at theta (B, I, d); each set of images passes it once.
    """
    # As a view, so that no inner gradient goes through the features of theta that the head was made of.
    theta = {name: p.view_as(p) for name, p in initial.items()}  # theta_n <- theta
    heads = [name for name in theta if name.startswith("head.")]
    if zeroing:
        theta |= {name: torch.zeros_like(theta[name]).requires_grad_() for name in heads}  # w <- 0
    elif prototypes:
        start = prototype_head(encode(tasks.support), tasks.support_labels, network.head.out_features)
        theta |= {name: start[name.removeprefix("head.")].requires_grad_() for name in heads}
    names = [name for name in theta if adapted == "all" or name.startswith(f"{adapted}.")]
    eta = dict(zip(names, _rates(inner_lr) or [inner_lr] * len(names), strict=True))

    def logits(images: Tensor) -> Tensor:
        return _outputs(network, theta, images)

    def at_theta(images: Tensor) -> Tensor:
        head = {name.removeprefix("head."): theta[name] for name in heads}
        return _outputs(network.head, head, encode(images))

    yield partial(at_theta, tasks.query)
    for step in range(1, steps + 1):
        head_alone = adapted == "head" or (
            adapted == "all" and zeroing and step == 1
        )  # (P - T) w = 0: the encoder stays
        outputs, names = (at_theta, heads) if head_alone else (logits, list(eta))
        loss = _losses(outputs(tasks.support), tasks.support_labels).sum()
        gradients = torch.autograd.grad(loss, [theta[name] for name in names], create_graph=not first_order)
        moved = {name: theta[name] - eta[name] * g for name, g in zip(names, gradients, strict=True)}
        theta = theta | moved  # theta_n <- theta_n - eta grad L(theta_n, S_n)
        yield partial(outputs, tasks.query)


def _copies(network: nn.Module, tasks: int) -> Parameters:
    return {
        name: p.detach().expand(tasks, *p.shape).clone(memory_format=torch.contiguous_format).requires_grad_()
        for name, p in network.named_parameters()
    }


def _rates(inner_lr: float | Sequence[Tensor]) -> list[Tensor]:
    """The inner_lr that are learned."""
    return [] if isinstance(inner_lr, float | int) else list(inner_lr)


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
