"""The features of tasks and the head that meets them: all of a model that the theory speaks of; and their cosines.

Shapes: ... any leading task dimensions, B tasks, S support and Q query images per task, d features, K ways.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot.data.task import Task
from fewshot.models.network import Network
from fewshot.norms import inside, of_queries

ROUNDING = 1e-12  # sums of up to a few thousand float64 terms of order one, each rounded to 1e-16


class Features(NamedTuple):
    """Tasks as the head sees them. All but the labels are of one dtype, float32 or float64."""

    support: Tensor  # (..., S, d), phi(s)
    support_labels: Tensor  # (..., S), integers 0..K-1; classes may differ in size or be absent
    query: Tensor  # (..., Q, d), phi(q)
    query_labels: Tensor  # (..., Q)
    weight: Tensor  # (K, d), W_0, the head before the inner loop, the same for all tasks
    bias: Tensor | None = None  # (K,), b_0

    @classmethod
    def of(cls, network: Network, tasks: Task) -> "Features":
        """The features of the unadapted encoder, (B, ...); their gradient reaches its parameters."""
        w, b = network.head.weight, network.head.bias
        phi_S, phi_Q = (phi.to(w.dtype) for phi in encode(network, tasks))
        return cls(phi_S, tasks.support_labels, phi_Q, tasks.query_labels, w, b)

    def zeroed(self) -> "Features":
        """The same features, met by a head of zeros."""
        bias = None if self.bias is None else torch.zeros_like(self.bias)
        return self._replace(weight=torch.zeros_like(self.weight), bias=bias)

    def same_class(self) -> Tensor:
        """1[t=u], (..., Q, S) bool."""
        return self.query_labels[..., :, None] == self.support_labels[..., None, :]

    def coefficients_without_noise(self, Q: Tensor) -> Tensor:
        """1[t=u] - q_t, (..., Q, S), where q_t is an entry of the predictions Q, (..., Q, K)."""
        labels = self.support_labels.long().unsqueeze(-2).expand(*Q.shape[:-1], -1)
        return self.same_class().to(Q.dtype) - Q.gather(-1, labels)

    def wrong_signs(self, c: Tensor) -> Tensor:
        """Which coefficients c (..., Q, S) draw a query to another class, bool; none pushes it from its own (2.12).

        A prediction as sure as can be has c = 0 but for rounding, whose sign says nothing.
        """
        return ((c > 0) != self.same_class()) & (c.abs() > 16 * torch.finfo(c.dtype).eps)

    def support_sums(self) -> Tensor:
        """m_k, the sum of each class's support features, (..., K, d)."""
        return self._support_of_classes().mT @ self.support

    def support_means(self) -> Tensor:
        """mu_k, (..., K, d)."""
        return self.support_sums() / self._support_of_classes().sum(-2).unsqueeze(-1)

    def _support_of_classes(self) -> Tensor:
        """T_S, (..., S, K)"""
        return F.one_hot(self.support_labels, len(self.weight)).to(self.support.dtype)

    def prototype_scores(self) -> Tensor:
        """phi(q).mu_k, (..., Q, K), by which the prototype classifier chooses (2.6)."""
        return self.query @ self.support_means().mT


def encode(network: Network, tasks: Task) -> tuple[Tensor, Tensor]:
    """Features of support (B, S, d) and queries (B, Q, d); task by task, since BatchNorm sees a task at a time."""
    supports, queries = zip(*(encode_one(network, task) for task in tasks.one_by_one()), strict=True)
    return torch.stack(supports), torch.stack(queries)


def encode_one(network: Network, task: Task) -> tuple[Tensor, Tensor]:
    """The features of one task, (S, d) and (Q, d)."""
    phi = network.encoder
    return phi(task.support), of_queries(phi, task, partial(inside, phi))


def centred(rows: Tensor) -> Tensor:
    """What the loss can see of a head's K rows (..., K, d), or of its bias as (K, 1): the rows less their mean.

    Rows of Q - T_Q and of P - T_S sum to 0: what all classes share interferes with nothing and stays as it is (2.12).
    """
    rows = rows - rows[..., :1, :]  # equal rows become 0 exactly; less their rounded mean alone, they need not
    return rows - rows.mean(-2, keepdim=True)


def agreement(scores: Tensor, logits: Tensor) -> Tensor:
    """Whether the class of the largest logit has the largest score, or one tied with it: (..., K) twice -> (...)."""
    return tied(scores).gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1)


def tied(scores: Tensor) -> Tensor:
    """Which scores are the largest as far as float64 can tell, (..., K) bool."""
    return scores >= scores.amax(-1, keepdim=True) - ROUNDING * scores.abs().amax()


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosine similarity of every two rows: (..., I, d), (..., J, d) -> (..., I, J)"""
    return F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).mT


def mean_cosines(first: Tensor, second: Tensor, same: Tensor, counted: bool | Tensor = True) -> tuple[Tensor, Tensor]:
    """Mean cosine similarity of the pairs that are `same` and of the others, among those counted.

    first (B, I, d), second (B, J, d), same (B, I, J) -> (B,), (B,)
    """
    similarity = cosines(first, second)
    same, other = ((similarity * pairs).sum((1, 2)) / pairs.sum((1, 2)) for pairs in (same & counted, ~same & counted))
    return same, other


@torch.no_grad()
def class_similarities(network: Network, task: Task) -> dict[str, list[list[float]]]:
    """Mean cosine similarity of the features of every two classes: {"query_support": K x K, "query_query": K x K}.

    Entry [u][t] is the mean over the queries of class u paired with the support images, or with the other queries, of
    class t (docs/method.md, section 5). The encoder is unadapted; support and queries pass it apart, as in training.
    """
    of_S, of_Q = (F.one_hot(labels).double() for labels in (task.support_labels, task.query_labels))  # (S, K), (Q, K)
    phi_S, phi_Q = (phi.double() for phi in encode_one(network, task))
    not_itself = 1 - torch.eye(len(phi_Q), dtype=torch.double, device=phi_Q.device)

    def means(similarity: Tensor, counted: Tensor, of_second: Tensor) -> list[list[float]]:
        sums, pairs = (of_Q.mT @ values @ of_second for values in (similarity * counted, counted))
        return [[round(value, 6) for value in row] for row in (sums / pairs).tolist()]

    return {
        "query_support": means(cosines(phi_Q, phi_S), torch.ones(len(phi_Q), len(phi_S)).to(of_S), of_S),
        "query_query": means(cosines(phi_Q, phi_Q), not_itself, of_Q),
    }
