"""A network's own forward on B tasks at once, side by side in the channels.

Shapes: B tasks, K ways, I images of C channels, H x W pixels, d features; the parameters of adapted networks have a
leading B.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.overrides import TorchFunctionMode

from fewshot.models.resnet12 import drop_squares

FEW_PIXELS = 32 * 32  # of a map: above, oneDNN's convolution needs no columns of nine times the map's size


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
    stride, padding, dilation = (_pair(each) for each in (stride, padding, dilation))
    kernel, plain = tuple(weight.shape[2:]), (padding, dilation, groups) == ((0, 0), (1, 1), 1)
    if _one_on_a_cpu(tasks, input, weight) and plain and kernel != (1, 1) and input.shape[2:].numel() <= FEW_PIXELS:
        return _by_columns(input, weight, bias, stride)
    return Convolution.apply(input, weight, bias, (stride, padding, dilation, tasks * groups))


def _pair(number: Any) -> tuple[int, int]:
    return number if isinstance(number, tuple) else (number, number)


def _one_on_a_cpu(tasks: int, x: Tensor, weight: Tensor) -> bool:
    return tasks == 1 and x.device.type == "cpu" and x.dtype == weight.dtype in (torch.float32, torch.float64)


def _by_columns(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int]) -> Tensor:
    """The convolution as one matrix product; the channels of its result lie together in memory, as those of x should.

    (I, C, H, W), (O, C, k, k), (O,) -> (I, O, h, w)
    """
    kernel = tuple(weight.shape[2:])
    height, width = _places(x.shape[2:], kernel, stride)
    columns = Columns.apply(x.permute(0, 2, 3, 1), kernel, stride)
    y = F.linear(columns, weight.permute(0, 2, 3, 1).flatten(1), bias)
    return y.unflatten(0, (-1, height, width)).permute(0, 3, 1, 2)


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
    several = input.dim() == 4 and input.numel() > input.shape[1]  # numbers of a channel
    affine = weight is not None and bias is not None
    if several and affine and options.get("training") and _one_on_a_cpu(tasks, input, weight):
        return Norm.apply(input, weight, bias, options.get("eps", 1e-5))
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


# The patches under a kernel gathered, and added up where they came from: each is the derivative of the other.


class Columns(torch.autograd.Function):
    """(I, H, W, C) -> (I*h*w, k*k*C), a row for each of the h x w places of the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: tuple[int, int], stride: tuple[int, int]) -> Tensor:
        ctx.shape, ctx.geometry = x.shape, (kernel, stride)
        images, *pixels, channels = x.shape
        places, (image, row, column, channel) = _places(pixels, kernel, stride), x.stride()
        steps = row * stride[0], column * stride[1]
        if channels < 8:  # place by place a copy would have to do with runs of very few numbers
            strides = (row, column, channel, image, *steps)
            return x.as_strided((*kernel, channels, images, *places), strides).flatten(3).flatten(0, 2).T
        return x.as_strided((images, *places, *kernel, channels), (image, *steps, row, column, channel)).reshape(
            -1, kernel[0] * kernel[1] * channels
        )

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple:
        return Images.apply(d, ctx.shape, *ctx.geometry), None, None


class Images(torch.autograd.Function):
    """(I*h*w, k*k*C) -> (I, H, W, C)"""

    @staticmethod
    def forward(
        ctx: Any, columns: Tensor, shape: torch.Size, kernel: tuple[int, int], stride: tuple[int, int]
    ) -> Tensor:
        ctx.geometry = kernel, stride
        images, *pixels, channels = shape
        if kernel == tuple(pixels):
            return columns.reshape(shape)
        places = _places(pixels, kernel, stride)
        columns = columns.reshape(images, *places, *kernel, channels)
        x = columns.new_zeros(shape)
        image, row, column, _ = x.stride()
        for i in range(0, kernel[0], stride[0]):  # what the kernel's places have at most once is added in one go
            for j in range(0, kernel[1], stride[1]):
                part = columns[:, :, :, i : i + stride[0], j : j + stride[1]]
                strides = (image, row * stride[0], column * stride[1], row, column, 1)
                x.as_strided(part.shape, strides, i * row + j * column).add_(part)
        return x

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple:
        return Columns.apply(dx, *ctx.geometry), None, None, None


def _places(pixels: Sequence[int], kernel: tuple[int, int], stride: tuple[int, int]) -> tuple[int, ...]:
    return tuple((p - k) // s + 1 for p, k, s in zip(pixels, kernel, stride, strict=True))


class Norm(torch.autograd.Function):
    """BatchNorm by the statistics of the batch: (I, C, H, W), (C,), (C,) -> (I, C, H, W).

    Torch's own, but for the second derivative: torch goes through the images twice as often for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        if x.is_contiguous():
            y, mean, rstd = torch.native_batch_norm(x, gamma, beta, None, None, True, 0.0, eps)
        else:  # channels lie together: there torch adds up one number after the other, and errs by 1e-5 in float32
            rows = x.permute(0, 2, 3, 1)
            mean = rows.mean((0, 1, 2))
            centred = rows - mean
            rstd = (centred.square().mean((0, 1, 2)) + eps).rsqrt()
            y = torch.empty_like(x)  # no view, which nothing could change in place
            torch.addcmul(beta, centred, gamma * rstd, out=y.permute(0, 2, 3, 1))
        ctx.save_for_backward(x, gamma, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        gradient = NormGradient.apply if torch.is_grad_enabled() else _norm_gradient
        return *gradient(dy, *ctx.saved_tensors), None


def _norm_gradient(dy: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx = gamma rstd (dy - mean(dy) - z mean(dy z)), sum(dy z), sum(dy), where z = (x - mean) rstd."""
    options = (None, None, mean, rstd, True, 0.0, [True] * 3)
    return torch.ops.aten.native_batch_norm_backward(dy, x, gamma, *options)


class NormGradient(torch.autograd.Function):
    """dx, dgamma, dbeta; mean and rstd are functions of x, and derived as such."""

    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor) -> tuple:
        dx, dgamma, dbeta = _norm_gradient(dy, x, gamma, mean, rstd)
        ctx.save_for_backward(dy, x, gamma, mean, rstd, dgamma, dbeta)
        return dx, dgamma, dbeta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ddx: Tensor, ddgamma: Tensor, ddbeta: Tensor) -> tuple:
        """With u = ddx, v = dy and means over a channel's n numbers: <u, dx> = n gamma rstd covariance, where

        covariance = mean(u v) - mean(u) mean(v) - mean(u z) mean(v z). For x that is a sum of z, u and v.
        """
        v, x, gamma, mean, rstd, dgamma, dbeta = ctx.saved_tensors
        n = x.numel() // len(gamma)
        u = ddx
        for_v, uz, u1 = _norm_gradient(u, x, gamma, mean, rstd)
        uz, u1, vz, v1 = (each / n for each in (uz, u1, dgamma, dbeta))
        covariance = (u * v).sum((0, 2, 3)) / n - u1 * v1 - uz * vz
        scale, per_z = gamma * rstd * rstd, ddgamma * rstd
        by_u = -scale * vz
        by_v = per_z - scale * uz
        by_x = rstd * (scale * (2 * uz * vz - covariance) - per_z * vz)
        rest = -by_u * u1 - by_v * v1 - by_x * mean
        rest, by_x, by_u, by_v, z, for_beta = (
            each[:, None, None] for each in (rest, by_x, by_u, by_v, per_z, ddbeta - per_z * mean)
        )
        for_x = torch.addcmul(rest, x, by_x).addcmul_(u, by_u).addcmul_(v, by_v)
        return for_v.addcmul_(x, z).add_(for_beta), for_x, n * rstd * covariance, None, None
