"""BatchNorm of ReLU as one kernel forward and one backward (Triton), for first order: its backward has no derivative.

Shapes: x (I, C, H, W) contiguous, C the channels of all tasks side by side; n = I H W numbers of a channel.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

BLOCK = 1024


@triton.jit
def _places(first, channel, n: tl.constexpr, C: tl.constexpr, HW: tl.constexpr, BLOCK: tl.constexpr):
    """Where the numbers first .. first + BLOCK - 1 of a channel lie, and which of them exist."""
    index = first + tl.arange(0, BLOCK)
    return (index // HW) * C * HW + channel * HW + index % HW, index < n


@triton.jit
def _forward(
    x, y, gamma, beta, mean, rstd, n: tl.constexpr, C: tl.constexpr, HW: tl.constexpr, eps, BLOCK: tl.constexpr
):
    channel = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        place, there = _places(first, channel, n, C, HW, BLOCK)
        total += tl.maximum(tl.load(x + place, there, 0.0), 0.0)
    mu = tl.sum(total) / n
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        place, there = _places(first, channel, n, C, HW, BLOCK)
        apart = tl.where(there, tl.maximum(tl.load(x + place, there, 0.0), 0.0) - mu, 0.0)
        total += apart * apart
    r = 1 / tl.sqrt(tl.sum(total) / n + eps)
    tl.store(mean + channel, mu)
    tl.store(rstd + channel, r)
    scale, shift = tl.load(gamma + channel) * r, tl.load(beta + channel)
    for first in range(0, n, BLOCK):
        place, there = _places(first, channel, n, C, HW, BLOCK)
        tl.store(y + place, (tl.maximum(tl.load(x + place, there, 0.0), 0.0) - mu) * scale + shift, there)


@triton.jit
def _backward(
    x, dy, dx, gamma, mean, rstd, dgamma, dbeta, n: tl.constexpr, C: tl.constexpr, HW: tl.constexpr, BLOCK: tl.constexpr
):
    channel = tl.program_id(0)
    mu, r = tl.load(mean + channel), tl.load(rstd + channel)
    by_one, by_x = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        place, there = _places(first, channel, n, C, HW, BLOCK)
        d = tl.load(dy + place, there, 0.0)
        by_one += d
        by_x += d * (tl.maximum(tl.load(x + place, there, 0.0), 0.0) - mu) * r
    sum_one, sum_x = tl.sum(by_one), tl.sum(by_x)
    tl.store(dbeta + channel, sum_one)
    tl.store(dgamma + channel, sum_x)
    scale = tl.load(gamma + channel) * r
    for first in range(0, n, BLOCK):
        place, there = _places(first, channel, n, C, HW, BLOCK)
        value = tl.load(x + place, there, 0.0)
        normal = (tl.maximum(value, 0.0) - mu) * r
        d = scale * (tl.load(dy + place, there, 0.0) - sum_one / n - normal * sum_x / n)
        tl.store(dx + place, tl.where(value > 0, d, 0.0), there)


class ReluNorm(torch.autograd.Function):
    """y = gamma (relu(x) - mean) / sqrt(variance + eps) + beta; gamma, beta (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        x, gamma, beta = x.contiguous(), gamma.contiguous(), beta.contiguous()
        channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
        y, mean, rstd = torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(gamma)
        _forward[(channels,)](x, y, gamma, beta, mean, rstd, len(x) * pixels, channels, pixels, eps, BLOCK=BLOCK)
        ctx.save_for_backward(x, gamma, mean, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, gamma, mean, rstd = ctx.saved_tensors
        channels, pixels, dy = x.shape[1], x.shape[2] * x.shape[3], dy.contiguous()
        dx, dgamma, dbeta = torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(gamma)
        sizes = (len(x) * pixels, channels, pixels)
        _backward[(channels,)](x, dy, dx, gamma, mean, rstd, dgamma, dbeta, *sizes, BLOCK=BLOCK)
        return dx, dgamma, dbeta, None


def relu_norm(x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """(I, C, H, W) to the same shape. The batched engine calls its own version, for channels of several tasks in x."""
    if has_torch_function((x, gamma, beta)):
        return handle_torch_function(relu_norm, (x, gamma, beta), x, gamma, beta, eps)
    return F.batch_norm(F.relu(x), None, None, gamma, beta, training=True, eps=eps)


def side_by_side(tasks: int, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    return ReluNorm.apply(x, gamma.flatten(), beta.flatten(), eps)


class FusedNorm(nn.Module):
    """Stands in place of a BatchNorm2d that follows a ReLU; its parameters keep their names."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return relu_norm(x, self.weight, self.bias, self.eps)


def fused(network: nn.Module) -> nn.Module:
    """Fuses every ReLU with the BatchNorm2d that follows it, in place; parameters keep their names."""
    layers = network.encoder
    for place in range(len(layers) - 1):
        if isinstance(layers[place], nn.ReLU) and isinstance(layers[place + 1], nn.BatchNorm2d):
            layers[place], layers[place + 1] = nn.Identity(), FusedNorm(layers[place + 1])
    return network
