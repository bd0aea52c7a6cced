"""A network's own forward on B tasks at once, one task's images after the other's: what suits a CPU.

Shapes: B tasks, K ways, I images of C channels, H x W pixels, d features; O channels of a convolution, k its kernel;
the parameters of adapted networks have a leading B.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fewshot import norms
from fewshot.batched import side_by_side
from fewshot.batched.side_by_side import NotSideBySide, SideBySide, _pair
from fewshot.models.network import drop_squares

Pair = tuple[int, int]
FEW_PIXELS = 32 * 32  # of a map: above, oneDNN's convolution needs no columns of nine times the map's size


def in_a_row(tasks: int) -> SideBySide:
    """Like SideBySide, but the tasks lie one after the other in the images, (B*I, C, H, W)."""
    return SideBySide(tasks, OWN)


def _conv2d(
    tasks: int, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride=1, padding=0, dilation=1, groups=1
) -> Tensor:
    plain = not isinstance(padding, str) and (_pair(padding), _pair(dilation), groups) == ((0, 0), (1, 1), 1)
    small = input.dim() == 4 and input.shape[2:].numel() <= FEW_PIXELS and weight.shape[3:].numel() > 1
    if plain and small and weight.dim() == 5 and _exact(input, weight):
        return _by_columns(input, weight, bias, _pair(stride))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return _task_by_task(partial(side_by_side._conv2d, 1, **options), tasks, input, weight, bias)


def _exact(x: Tensor, weight: Tensor) -> bool:
    """Whether the formulas of this file are for it, and not autocast."""
    return x.dtype == weight.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")


def _task_by_task(function: Callable[..., Tensor], tasks: int, x: Tensor, *parameters: Tensor | None) -> Tensor:
    """function(images, parameters) of each task; the parameters keep a leading 1."""
    if tasks == 1:
        return function(x, *parameters)
    split = [tasks * [None] if p is None else p.split(1) for p in parameters]
    return torch.cat([function(*of_task) for of_task in zip(x.chunk(tasks), *split, strict=True)])


def _by_columns(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int]) -> Tensor:
    """The convolution as one matrix product; the channels of its result lie together in memory, as those of x should.

    (B*I, C, H, W), (B, O, C, k, k), (B, O) -> (B*I, O, h, w)
    """
    tasks, kernel = len(weight), (weight.shape[3], weight.shape[4])
    height, width = _places(x.shape[2:], kernel, stride)
    columns = Columns.apply(x.permute(0, 2, 3, 1), kernel, stride)
    y = _product(columns.unflatten(0, (tasks, -1)), weight.permute(0, 1, 3, 4, 2).flatten(2), bias)
    return y.view(-1, height, width, y.shape[2]).permute(0, 3, 1, 2)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, n, d), (B, O, d), (B, O) -> (B, n, O)"""
    return x @ weight.mT if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)


def _batch_norm(
    tasks: int, input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, **options: Any
) -> Tensor:
    affine = weight is not None and weight.dim() == 2 and bias is not None and options.get("training")
    several = input.dim() == 4 and input.numel() > tasks * input.shape[1]  # numbers of a channel
    if running_mean is None and affine and several and _exact(input, weight):  # pyright: ignore[reportArgumentType]
        eps = options.get("eps", 1e-5)
        if _rows_lie_together(input):
            return Norm.apply(input, weight, bias, eps)
        return _task_by_task(lambda *of_task: Norm.apply(*of_task, eps), tasks, input, weight, bias)

    def norm(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
        return side_by_side._batch_norm(1, x, running_mean, running_var, gamma, beta, **options)

    return _task_by_task(norm, tasks, input, weight, bias)


def _batch_norm_in_sets(tasks: int, x: Tensor, weight: Any, bias: Any, eps: float, **sets: int) -> Tensor:
    return norms.batch_norm_of_tasks(x.unflatten(0, (tasks, -1)), weight, bias, eps, **sets).flatten(0, 1)


def _task_norm(tasks: int, x: Tensor, *parameters: Any, **sets: int) -> Tensor:
    return norms.task_norm_of_tasks(x.unflatten(0, (tasks, -1)), *parameters, **sets).flatten(0, 1)


def _group_norm(tasks: int, x: Tensor, groups: int, weight: Any = None, bias: Any = None, **eps: float) -> Tensor:
    def of_task(x: Tensor, gamma: Any, beta: Any) -> Tensor:
        return side_by_side._group_norm(1, x, groups, gamma, beta, **eps)

    return _task_by_task(of_task, tasks, x, weight, bias)


def _linear(tasks: int, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(B*I, d), (B, K, d), (B, K) -> (B*I, K)"""
    if input.dim() != 2 or weight.dim() != 3:
        raise NotSideBySide(F.linear)
    return _product(input.unflatten(0, (tasks, -1)), weight, bias).flatten(0, 1)


def _drop_squares(tasks: int, x: Tensor, share: float) -> Tensor:
    return torch.cat([drop_squares(images, share) for images in x.chunk(tasks)])


OWN = side_by_side.OWN | {F.conv2d: _conv2d, F.batch_norm: _batch_norm, F.linear: _linear, drop_squares: _drop_squares}
OWN |= {norms.batch_norm: _batch_norm_in_sets, norms.task_norm: _task_norm, F.group_norm: _group_norm}
OWN[F.normalize] = lambda tasks, *args, **options: side_by_side._normalize(1, *args, **options)


# The patches under a kernel gathered, and added up where they came from: each is the derivative of the other.


class Columns(torch.autograd.Function):
    """(I, H, W, C) -> (I*h*w, k*k*C), a row for each of the h x w places of the kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Pair, stride: Pair) -> Tensor:
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
    def forward(ctx: Any, columns: Tensor, shape: Sequence[int], kernel: Pair, stride: Pair) -> Tensor:
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
    """BatchNorm by the statistics of each task's batch: (B*I, C, H, W), (B, C), (B, C) -> (B*I, C, H, W).

    Torch's own, but for the second derivative: torch goes through the images twice as often for it. Of several tasks
    the channels have to lie together in memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        if not _rows_lie_together(x) or (len(gamma) == 1 and x.is_contiguous()):  # of one task
            y, *statistics = torch.native_batch_norm(x, gamma[0], beta[0], None, None, True, 0.0, eps)
            mean, rstd = (statistic[None] for statistic in statistics)
        else:  # channels lie together: there torch adds up one number after the other, and errs by 1e-5 in float32
            rows = _rows(x, len(gamma))
            mean = rows.mean(1)
            centred = rows - mean[:, None]
            y = torch.empty_like(x)  # no view, which nothing could change in place
            place = _rows(y, len(gamma))
            rstd = (torch.square(centred, out=place).mean(1) + eps).rsqrt()
            torch.addcmul(beta[:, None], centred, (gamma * rstd)[:, None], out=place)
        ctx.save_for_backward(x, gamma, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        gradient = NormGradient.apply if torch.is_grad_enabled() else _norm_gradient
        return *gradient(dy, *ctx.saved_tensors), None


def _rows_lie_together(x: Tensor) -> bool:
    return x.permute(0, 2, 3, 1).is_contiguous()


def _rows(x: Tensor, tasks: int) -> Tensor:
    """(B*I, C, H, W) -> (B, n, C), n numbers of each channel; a view where channels lie together."""
    return x.permute(0, 2, 3, 1).reshape(tasks, -1, x.shape[1])


def _norm_gradient(dy: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dx = gamma rstd (dy - mean(dy) - z mean(dy z)), sum(dy z), sum(dy), where z = (x - mean) rstd."""
    tasks = zip(dy.chunk(len(gamma)), x.chunk(len(gamma)), gamma, mean, rstd, strict=True)
    of_task = torch.ops.aten.native_batch_norm_backward
    gradients = [of_task(v, x, w, None, None, m, r, True, 0.0, [True] * 3) for v, x, w, m, r in tasks]
    dx, dgamma, dbeta = zip(*gradients, strict=True)
    return dx[0] if len(dx) == 1 else torch.cat(dx), torch.stack(dgamma), torch.stack(dbeta)


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

        covariance = mean(u v) - mean(u) mean(v) - mean(u z) mean(v z). Its gradient for x is a sum of multiples
        of z, u, v and 1.
        """
        v, x, gamma, mean, rstd, dgamma, dbeta = ctx.saved_tensors
        n = x.numel() // gamma.numel()
        u = ddx
        for_v, uz, u1 = _norm_gradient(u, x, gamma, mean, rstd)
        uz, u1, vz, v1 = (total / n for total in (uz, u1, dgamma, dbeta))
        u, v, x, for_v = (images.unflatten(0, (len(gamma), -1)) for images in (u, v, x, for_v))  # (B, I, C, H, W)
        covariance = (u * v).sum((1, 3, 4)) / n - u1 * v1 - uz * vz
        scale, per_z = gamma * rstd * rstd, ddgamma * rstd
        by_u = -scale * vz
        by_v = per_z - scale * uz
        by_x = rstd * (scale * (2 * uz * vz - covariance) - per_z * vz)
        rest = -by_u * u1 - by_v * v1 - by_x * mean
        rest, by_x, by_u, by_v, z, for_beta = (
            factor[:, None, :, None, None] for factor in (rest, by_x, by_u, by_v, per_z, ddbeta - per_z * mean)
        )
        for_x = torch.addcmul(rest, x, by_x).addcmul_(u, by_u).addcmul_(v, by_v).flatten(0, 1)
        return for_v.addcmul_(x, z).add_(for_beta).flatten(0, 1), for_x, n * rstd * covariance, None, None
