"""The features of tasks and the head that meets them: what the theory speaks of, and nothing else of a model.

Shapes: B tasks, S support and Q query images per task, d features, K ways.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot.data.task import Task
from fewshot.models.network import Network
from fewshot.theory.probes import encode


class Features(NamedTuple):
    """The arguments of the closed forms in contrast.py."""

    support: Tensor  # (B, S, d)
    support_labels: Tensor  # (B, S)
    query: Tensor  # (B, Q, d)
    query_labels: Tensor  # (B, Q)
    weight: Tensor  # (K, d)
    bias: Tensor | None  # (K,)

    def zeroed(self) -> "Features":
        """The same features, met by a head of zeros."""
        bias = None if self.bias is None else torch.zeros_like(self.bias)
        return self._replace(weight=torch.zeros_like(self.weight), bias=bias)

    def same_class(self) -> Tensor:
        """1[t=u], (B, Q, S) bool."""
        return self.query_labels[:, :, None] == self.support_labels[:, None]

    def support_means(self) -> Tensor:
        """mu_k, (B, K, d)."""
        of_class = F.one_hot(self.support_labels, len(self.weight)).to(self.support.dtype)
        return of_class.mT @ self.support / of_class.sum(1).unsqueeze(-1)

    def prototype_scores(self) -> Tensor:
        """phi(q).mu_k, (B, Q, K), by which the prototype classifier chooses (2.6)."""
        return self.query @ self.support_means().mT


@torch.no_grad()
def features(network: Network, tasks: Task) -> Features:
    """Of the unadapted encoder."""
    phi_S, phi_Q = encode(network, tasks.support), encode(network, tasks.query)
    w, b = network.head.weight.detach(), network.head.bias
    return Features(phi_S, tasks.support_labels, phi_Q, tasks.query_labels, w, None if b is None else b.detach())


ROUNDING = 1e-12  # of the largest score: closer than this, float64 cannot tell two scores apart


def agreement(scores: Tensor, logits: Tensor) -> Tensor:
    """Whether the class of the largest logit has the largest score, (..., K), (..., K) -> (...) bool; any, of a tie."""
    return tied(scores).gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)


def tied(scores: Tensor) -> Tensor:
    """Which scores are the largest but for rounding, (..., K) bool."""
    return scores >= scores.amax(-1, keepdim=True) - ROUNDING * scores.abs().amax()
