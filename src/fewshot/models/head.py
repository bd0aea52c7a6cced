"""What becomes of the linear head before the inner loop begins, in training and in a task.

Shapes: ... any leading task dimensions, S support images, K ways, d features.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot.algorithms.fitting import fitting
from fewshot.inner_loop import InnerLoop


def initial_head(
    loop: InnerLoop, head: dict[str, Tensor], encode: Callable[[Tensor], Tensor], support: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """What stands in for the network's own head when the inner loop of a task begins; empty: nothing does.

    Args:
        head: the network's own, weight (..., K, d) and perhaps bias (..., K).
        encode: images to their features at theta. No inner gradient goes through these, since theta_n is a copy.
        support, labels: the images (..., S, C, H, W) and their labels (..., S).
    """
    if loop.zeroing:
        return {name: torch.zeros_like(w).requires_grad_() for name, w in head.items()}  # w <- 0
    if not loop.makes_head:
        return {}
    make = loop.initial_head if loop.head == "own" else partial(prototype_head, loop)
    made = fitting(loop, "initial_head", make(encode(support), labels, head["weight"].shape[-2]), head)
    return {name: w.view_as(w).requires_grad_() for name, w in made.items()}  # views: none is a function of another


def zero_head(head: nn.Linear) -> None:
    """w <- 0, b <- 0, in place. The bias too: if its entries differ, P is not uniform over classes (method.md 2.6)."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()


def prototype_head(loop: InnerLoop, features: Tensor, labels: Tensor, ways: int) -> dict[str, Tensor]:
    """The head that gives each class -|phi(x) - c_k|^2 up to what all share: w_k = 2 c_k, b_k = -|c_k|^2.

    A prototypical network (method.md 2.13) may have phi(x).c_k or, with |phi(x)| = 1, the cosine; and a temperature.

    Args:
        features: of the support, (..., S, d); c_k, the prototype, is the mean of class k's.
        labels: (..., S).

    Returns weight (..., K, d) and bias (..., K), as ProtoMAML begins with (Triantafillou et al. 2020, section 3).
    """
    if loop.distance and loop.first_order:
        features = features.detach()  # constants, as support features are to FOMAML
    usual = ways / loop.inner_lr if loop.distance == "dot" else 0.1 if loop.distance == "cosine" else 1.0
    temperature = loop.temperature or usual
    with torch.autocast(features.device.type, enabled=False):  # eight bits are too few for |c_k|^2
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        members = F.one_hot(labels, ways).to(features).mT  # (..., K, S)
        c = members @ features / members.sum(-1, keepdim=True)
        if loop.distance in (None, "squared"):
            return {"weight": 2 * c / temperature, "bias": -c.square().sum(-1) / temperature}
        c = F.normalize(c, dim=-1) if loop.distance == "cosine" else c
        return {"weight": c / temperature, "bias": c.new_zeros(c.shape[:-1])}


def unit_length(module: nn.Module, inputs: Any, features: Tensor) -> Tensor:
    """A hook of an encoder: its features divided by their length."""
    return F.normalize(features, dim=-1)


def share_rows(head: nn.Linear) -> None:
    """All rows begin as the first one: one vector for all classes (UnicornMAML, Ye and Chao 2022; method.md 2.8)."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))


def share_gradient(head: nn.Linear) -> None:
    """The gradient of the one vector that all rows are, given to every row: so they stay one vector."""
    for parameter in head.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.sum(0, keepdim=True).expand_as(parameter).clone()
