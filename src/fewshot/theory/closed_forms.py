"""What MAML's outer loop asks of the features, in closed form: (2.x) is a section of docs/method.md.

The encoder is frozen in the inner loop (EFIL): only the head is adapted. Nothing here differentiates.

>>> phi_S, phi_Q = torch.randn(5, 64), torch.randn(10, 64)  # 5-way 1-shot, two queries per class, one task
>>> t, u = torch.arange(5), torch.arange(5).repeat(2)
>>> features = Features(phi_S, t, phi_Q, u, weight=torch.zeros(5, 64), bias=torch.zeros(5))
>>> gradients = closed_form_gradients(features, inner_lr=0.4, inner_steps=1, first_order=False)
>>> gradients.support_features.shape  # SOMAML moves the support features too
torch.Size([5, 64])
>>> gradients.interference.any()  # the head is zero, so it interferes with nothing
tensor(False)
>>> (c,) = contrastive_coefficients(features, inner_lr=0.4, inner_steps=1)
>>> torch.equal(c > 0, features.same_class())  # and adds no noise to the coefficients
True

Shapes: ... any leading task dimensions, S support and Q query images per task, K ways, d features, N inner steps.

A bias is the weight of a feature that is always 1. So below, phi = [features, 1] and W = [weight, bias], and the
formulas for W_p, A, G_p are those for b_p, g_p too. One set of formulas serves both losses: "cross_entropy" predicts
the softmax of the logits and takes means over images, "mse" predicts the logits themselves and takes 1/2 the sums.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot.theory.features import Features


class Gradients(NamedTuple):
    """Gradients of each task's query loss after N inner steps; nothing is averaged over tasks."""

    loss: Tensor  # (...)
    query_features: Tensor  # (..., Q, d), dL/dPhi_Q = interference + contrastive
    support_features: Tensor  # (..., S, d), dL/dPhi_S; zeros for first order
    weight: Tensor  # (..., K, d), first order dL/dW_N, second order dL/dW_0
    bias: Tensor | None  # (..., K), likewise; None without a bias
    interference: Tensor  # (..., Q, d), through the initial head: E_Q W_0
    contrastive: Tensor  # (..., Q, d), through the support features: -eta/(N_s N_q) [sum_p C^(p)] Phi_S


def closed_form_gradients(
    features: Features, *, inner_lr: float, inner_steps: int, first_order: bool, loss: str = "cross_entropy"
) -> Gradients:
    """The gradients of FOMAML (2.4) or SOMAML (2.5) with respect to features and head, exact for any N and any head.

    The query features' gradient is the same in both orders, E_Q W_N. The encoder's is that of
    sum(query_features o Phi_Q) + sum(support_features o Phi_S), both gradients held constant (2.5).

    Args:
        inner_lr, inner_steps: eta and N >= 1.
        first_order: True for FOMAML, False for SOMAML.
        loss: of inner loop and query. "cross_entropy": mean over images (2.2); "mse": 1/2 the sum over images and
            ways, one inner step (2.1), where eta/(N_s N_q) is eta.

    Raises:
        ValueError: loss, inner_steps or one of the features' fields is not as said here and in `Features`.
    """
    return adapt_head(features, inner_lr=inner_lr, inner_steps=inner_steps, loss=loss).gradients(first_order)


def contrastive_coefficients(
    features: Features, *, inner_lr: float, inner_steps: int, loss: str = "cross_entropy"
) -> Tensor:
    """C^(p) for p = 0 .. N-1, (N, ..., Q, S): where c^(p)_qs > 0, a descent step adds some phi(s) to phi(q) (2.3).

    c^(p)_qs = sum_j q_j s^(p)_j - s^(p)_u - q_t + 1[t=u], t and u the labels of s and q; 1[t=u] - q_t without noise.
    Within a class it is never negative, with noise or without (2.12): (1 - q_u)(1 - s_u) + sum_{j != u} q_j s_j.
    For "mse" it is the inner product of the residuals, (W_1 phi(q) - u).(W_0 phi(s) - t): 1[t=u] - eta phi(q).m_t if
    W_0 = 0 (2.1). They are the same in both orders. Arguments and errors are those of `closed_form_gradients`.
    """
    return adapt_head(features, inner_lr=inner_lr, inner_steps=inner_steps, loss=loss).coefficients()


@torch.no_grad()
def adapt_head(features: Features, *, inner_lr: float, inner_steps: int, loss: str = "cross_entropy") -> "AdaptedHead":
    """The inner loop (2.2), run once for whatever is asked of it. Arguments and errors: as `closed_form_gradients`."""
    _check(features, inner_steps, loss)
    phi_S, labels_S, phi_Q, labels_Q, W_0, bias = features
    T_S, T_Q = (F.one_hot(labels.long(), len(W_0)).to(W_0.dtype) for labels in (labels_S, labels_Q))
    if bias is not None:
        W_0 = torch.cat([W_0, bias.unsqueeze(1)], dim=1)
        phi_S, phi_Q = F.pad(phi_S, (0, 1), value=1.0), F.pad(phi_Q, (0, 1), value=1.0)
    rate = inner_lr / _images(T_S, loss)
    W, P = [W_0], []
    for _ in range(inner_steps):
        P.append(_predictions(phi_S @ W[-1].mT, loss))  # P^(p) = softmax(Phi_S W_p^T + b_p)
        W.append(W[-1] + rate * (T_S - P[-1]).mT @ phi_S)  # W_{p+1} = W_p + (eta/N_s) (T_S - P^(p))^T Phi_S
    logits = phi_Q @ W[-1].mT
    return AdaptedHead(features, inner_lr, loss, phi_S, phi_Q, T_S, T_Q, rate, W, P, logits, _predictions(logits, loss))


class AdaptedHead(NamedTuple):
    """Tasks after their inner loop, all but `features` detached; phi and W include the bias."""

    features: Features
    inner_lr: float  # eta
    loss: str
    phi_S: Tensor  # (..., S, d), with a bias d + 1
    phi_Q: Tensor  # (..., Q, d)
    T_S: Tensor  # (..., S, K), one-hot
    T_Q: Tensor  # (..., Q, K), one-hot
    rate: float  # eta/N_s; for mse eta
    W: list[Tensor]  # W_0 .. W_N
    P: list[Tensor]  # P^(0) .. P^(N-1), (..., S, K)
    logits: Tensor  # (..., Q, K), Phi_Q W_N^T + b_N
    Q: Tensor  # (..., Q, K), predictions of the queries after the last inner step

    @property
    def weight(self) -> Tensor:
        """W_N without the bias, (..., K, d)."""
        return self.W[-1][..., : self.features.weight.shape[1]]

    @torch.no_grad()
    def gradients(self, first_order: bool) -> Gradients:
        """See `closed_form_gradients`."""
        N_q, d = _images(self.T_Q, self.loss), self.features.weight.shape[1]
        E_Q = (self.Q - self.T_Q) / N_q
        interference = E_Q @ self.features.weight  # E_Q W_0 (2.4)
        contrastive = -self.rate / N_q * self.coefficients().sum(0) @ self.features.support
        D, G = torch.zeros_like(self.phi_S), E_Q.mT @ self.phi_Q  # D = 0; G_N = E_Q^T Phi_Q, g_N = E_Q^T 1
        if not first_order:
            D, G = self._back_through_inner_loop(D, G)
        return Gradients(
            loss=_mean_loss(self.logits, self.T_Q, self.loss),
            query_features=interference + contrastive,
            support_features=D[..., :d],
            weight=G[..., :d],
            bias=None if self.features.bias is None else G[..., d],
            interference=interference,
            contrastive=contrastive,
        )

    @torch.no_grad()
    def coefficients(self) -> Tensor:
        """See `contrastive_coefficients`."""
        return torch.stack([-(self.Q - self.T_Q) @ (self.T_S - P).mT for P in self.P])  # -(Q - T_Q) (T_S - P^(p))^T

    def explicit_loss(self, *, first_order: bool, noise: bool = True, interference: bool = True) -> Tensor:
        """The contrastive loss that gives the features the gradient of MAML on cross entropy (method.md 5).

        L1 = mean_{q,s} eta [-sum_p c^(p)_qs] phi(s)^T phi(q), [..] held constant, and phi(s) too for first order;
        without noise c^(p)_qs is 1[t=u] - q_t. With interference L2 = mean_q sum_k [(q_k - 1[k=u]) w0_k]^T phi(q) is
        added. Second order is exact for a head of equal rows only (2.5); of several steps it is a ValueError. Returns
        (...), to be differentiated with respect to the features.
        """
        if len(self.P) > 1 and not first_order:
            raise ValueError(f"inner_steps={len(self.P)}: in second order the explicit loss is that of one inner step")
        phi_S, phi_Q = self.features.support, self.features.query
        residual = self.Q - self.T_Q
        c = -residual @ (len(self.P) * self.T_S - (sum(self.P) if noise else 0)).mT  # -(Q - T_Q) T_S^T is 1[t=u] - q_t
        loss = -self.inner_lr * (c * (phi_Q @ (phi_S.detach() if first_order else phi_S).mT)).mean((-2, -1))
        if interference:
            loss = loss + (residual @ self.features.weight.detach() * phi_Q).sum(-1).mean(-1)
        return loss

    def _back_through_inner_loop(self, D: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        """From D = 0 and G_N to D = dL/dPhi_S and G_0 (2.5)."""
        for W, P in zip(self.W[-2::-1], self.P[::-1], strict=True):  # p = N-1 .. 0
            A = self.phi_S @ G.mT  # A = Phi_S G_{p+1}^T + 1 g_{p+1}^T
            M = _logits_gradient(P, A, self.loss)
            D = D + self.rate * ((self.T_S - P) @ G - M @ W)  # D += (eta/N_s) [(T_S - P^(p)) G_{p+1} - M W_p]
            G = G - self.rate * M.mT @ self.phi_S  # G_p = G_{p+1} - (eta/N_s) M^T Phi_S
        return D, G


def _images(T: Tensor, loss: str) -> int:
    """What a loss over these images is divided by: N_s or N_q for a mean, 1 for a sum."""
    return T.shape[-2] if loss == "cross_entropy" else 1


def _predictions(logits: Tensor, loss: str) -> Tensor:
    return logits.softmax(-1) if loss == "cross_entropy" else logits


def _logits_gradient(P: Tensor, A: Tensor, loss: str) -> Tensor:
    """M: the gradient of sum(A o predictions) with respect to the logits, A held constant."""
    return P * (A - (P * A).sum(-1, keepdim=True)) if loss == "cross_entropy" else A  # P o (A - ((P o A) 1) 1^T)


def _mean_loss(logits: Tensor, T_Q: Tensor, loss: str) -> Tensor:
    if loss == "cross_entropy":
        return -(T_Q * logits.log_softmax(-1)).sum(-1).mean(-1)
    return (logits - T_Q).square().sum((-2, -1)) / 2  # 1/2 sum_q |W_1 phi(q) - u|^2 (2.1)


def _check(features: Features, inner_steps: int, loss: str) -> None:
    if loss not in ("cross_entropy", "mse"):
        raise ValueError(f"loss={loss!r}: give 'cross_entropy' or 'mse'")
    if not isinstance(inner_steps, int) or inner_steps < 1:
        raise ValueError(f"inner_steps={inner_steps!r}: give an integer of at least 1")
    if loss == "mse" and inner_steps != 1:
        raise ValueError(f"inner_steps={inner_steps}: loss='mse' takes one step; give 1, or loss='cross_entropy'")
    phi_S, labels_S, phi_Q, labels_Q, weight, bias = features
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weight is {_said(weight)}: give (K, d), torch.float32 or torch.float64")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"bias is {_said(bias)}: give ({len(weight)},) {weight.dtype}, one for each row of the weight")
    for name, phi, labels in (("support", phi_S, labels_S), ("query", phi_Q, labels_Q)):
        _check_images(name, phi, labels, weight)
    if phi_S.shape[:-2] != phi_Q.shape[:-2]:
        raise ValueError(f"support is {_said(phi_S)}, query {_said(phi_Q)}: give both the same task dimensions")


def _check_images(name: str, phi: Tensor, labels: Tensor, weight: Tensor) -> None:
    K, d = weight.shape
    if phi.ndim < 2 or phi.shape[-1] != d or phi.dtype != weight.dtype:
        raise ValueError(f"{name} is {_said(phi)}: give (..., images, {d}) {weight.dtype}, as the weight")
    if labels.shape != phi.shape[:-1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"{name}_labels is {_said(labels)}: give {tuple(phi.shape[:-1])} integers")
    if labels.numel() == 0:
        raise ValueError(f"{name} is {_said(phi)}: give at least one image")
    if labels.min() < 0 or labels.max() >= K:
        raise ValueError(f"{name}_labels are {labels.min()}..{labels.max()}: give 0..{K - 1}, a row of the weight each")


def _said(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"
