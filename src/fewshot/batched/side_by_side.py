"""A network's own forward on B tasks at once, side by side in the channels.

Shapes: B tasks, K ways, I images of C channels, H x W pixels, d features; the parameters of adapted networks have a
leading B.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.overrides import TorchFunctionMode

from fewshot import norms
from fewshot.models.network import drop_squares


class NotSideBySide(Exception):
    """A function that may mix channels, so that tasks side by side in the channels would see each other."""


class SideBySide(TorchFunctionMode):
    """Runs a network's own forward on B tasks that lie side by side in the channels, (I, B*C, H, W).

    There a convolution in B groups and BatchNorm treat each task alone, and so does whatever treats each channel alone.

    Raises:
        NotSideBySide: the network calls something else.
    """

    def __init__(self, tasks: int, own: dict | None = None) -> None:
        super().__init__()
        self.tasks, self.own = tasks, OWN if own is None else own

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in self.own:
            return self.own[function](self.tasks, *args, **kwargs)
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
        if function in ON_IMAGES:
            fits = tensors and tensors[0].dim() == 4 and not (function is F.pad and len(args[1]) > 4)
        else:
            fits = function in METADATA or (function in ELEMENTWISE and len({t.shape for t in tensors}) == 1)
        if not fits:
            raise NotSideBySide(function)
        return function(*args, **kwargs)


def _conv2d(
    tasks: int, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups=1
) -> Tensor:
    if isinstance(padding, str) or input.dim() != 4 or weight.dim() != 5:
        raise NotSideBySide(F.conv2d)
    weight, bias = weight.flatten(0, 1), None if bias is None else bias.flatten()
    if torch.is_autocast_enabled(input.device.type):  # it does not reach into an autograd.Function
        dtype = torch.get_autocast_dtype(input.device.type)
        input, weight, bias = input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    stride, padding, dilation = (_pair(number) for number in (stride, padding, dilation))
    return Convolution.apply(input, weight, bias, (stride, padding, dilation, tasks * groups))


def _pair(number: Any) -> tuple[int, int]:
    return number if isinstance(number, tuple) else (number, number)


def _batch_norm(
    tasks: int, input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, **options: Any
) -> Tensor:
    if running_mean is not None or (weight is not None and weight.dim() != 2):
        raise NotSideBySide(F.batch_norm)
    weight, bias = (None if parameter is None else parameter.flatten() for parameter in (weight, bias))
    return F.batch_norm(input, None, None, weight, bias, **options)


def _batch_norm_in_sets(tasks: int, x: Tensor, weight: Any, bias: Any, eps: float, **sets: int) -> Tensor:
    y = norms.batch_norm_of_tasks(x.unflatten(1, (tasks, -1)).transpose(0, 1), weight, bias, eps, **sets)
    return y.transpose(0, 1).flatten(1, 2)


def _task_norm(tasks: int, x: Tensor, *parameters: Any, **sets: int) -> Tensor:
    y = norms.task_norm_of_tasks(x.unflatten(1, (tasks, -1)).transpose(0, 1), *parameters, **sets)
    return y.transpose(0, 1).flatten(1, 2)


def _group_norm(tasks: int, x: Tensor, groups: int, weight: Any = None, bias: Any = None, **eps: float) -> Tensor:
    if x.dim() != 4 or (weight is not None and weight.dim() != 2):
        raise NotSideBySide(F.group_norm)
    weight, bias = (None if parameter is None else parameter.flatten() for parameter in (weight, bias))
    return F.group_norm(x, tasks * groups, weight, bias, **eps)


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


def _normalize(tasks: int, x: Tensor, p: float = 2.0, dim: int = 1, **options: Any) -> Tensor:
    if x.dim() != 2 or dim % 2 == 0:
        raise NotSideBySide(F.normalize)
    return F.normalize(x.unflatten(1, (tasks, -1)), p, dim=-1, **options).flatten(1)


def _drop_squares(tasks: int, x: Tensor, share: float) -> Tensor:
    return torch.cat([drop_squares(images, share) for images in x.chunk(tasks, dim=1)], dim=1)


OWN = {
    F.conv2d: _conv2d,
    F.batch_norm: _batch_norm,
    norms.batch_norm: _batch_norm_in_sets,
    norms.task_norm: _task_norm,
    F.group_norm: _group_norm,
    F.linear: _linear,
    F.normalize: _normalize,
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
METADATA = {Tensor.dim, Tensor.dtype.__get__, Tensor.device.__get__}  # pyright: ignore[reportAttributeAccessIssue]


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
        dx = InputGradient.apply(dy, x, w, ctx.geometry) if for_x else None
        dw = WeightGradient.apply(dy, x, w, ctx.geometry) if for_w else None
        return dx, dw, dy.sum((0, 2, 3)) if for_b else None, None


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
        ddy = Convolution.apply(ddx, w, None, ctx.geometry) if for_dy else None
        return ddy, None, WeightGradient.apply(dy, ddx, w, ctx.geometry) if for_w else None, None


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
        ddy = Convolution.apply(x, ddw, None, ctx.geometry) if for_dy else None
        return ddy, InputGradient.apply(dy, x, ddw, ctx.geometry) if for_x else None, None, None
