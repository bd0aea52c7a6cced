"""Solves A x = b with products by A alone (Hestenes and Stiefel 1952), for one task or for several at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def conjugate_gradients(
    product: Callable[[list[Tensor]], Sequence[Tensor]], b: Sequence[Tensor], steps: int, task_dimensions: int
) -> tuple[list[Tensor], Tensor]:
    """x after so many steps from 0, in the parts that b has, and |b - A x| / |b| of each task.

    Args:
        product: p to A p, where A is symmetric.
        task_dimensions: how many leading dimensions of every part number the tasks, 0 or 1; each task has its own A.
    """
    shapes = [part.shape for part in b]

    def vector(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.reshape(*part.shape[:task_dimensions], -1) for part in parts], -1)

    def parts(vector: Tensor) -> list[Tensor]:
        split = vector.split([shape[task_dimensions:].numel() for shape in shapes], -1)
        return [part.reshape(shape) for part, shape in zip(split, shapes, strict=True)]

    r = p = first = vector(b)
    x, r_r = torch.zeros_like(r), _dot(r, r)
    for _ in range(steps):
        A_p = vector(product(parts(p)))
        alpha = _ratio(r_r, _dot(p, A_p))
        x, r, before = x + alpha * p, r - alpha * A_p, r_r
        r_r = _dot(r, r)
        p = r + _ratio(r_r, before) * p
    return parts(x), _ratio(r.norm(dim=-1), first.norm(dim=-1))


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(-1, keepdim=True)


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 where y is 0, when nothing is left to be solved."""
    return torch.where(y == 0, 0.0, x / torch.where(y == 0, 1.0, y))
