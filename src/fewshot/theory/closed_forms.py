"""What MAML's outer loop asks of the features, in closed form: (2.x) is a section of docs/method.md.

The encoder is frozen in the inner loop (EFIL): only the head is adapted. Nothing here differentiates.

Shapes: ... any leading task dimensions, S support and Q query images per task, K ways, d features, N inner steps.

A bias is the weight of a feature that is always 1. So below, phi = [features, 1] and W = [weight, bias], and the
formulas for W_p, A, G_p are those for b_p, g_p too. One set of formulas serves both losses: "cross_entropy" predicts
the softmax of the logits and takes means over images, "mse" predicts the logits themselves and takes 1/2 the sums.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Gradients(NamedTuple):
    """Gradients of each task's query loss after N inner steps; nothing is averaged over tasks."""

    loss: Tensor  # (...)
    query_features: Tensor  # (..., Q, d), dL/dPhi_Q = interference + contrastive
    support_features: Tensor  # (..., S, d), dL/dPhi_S; zeros for first order
    weight: Tensor  # (..., K, d), first order dL/dW_N, second order dL/dW_0
    bias: Tensor | None  # (..., K), likewise; None without a bias
    interference: Tensor  # (..., Q, d), through the initial head: E_Q W_0
    contrastive: Tensor  # (..., Q, d), through the support features: -eta/(N_s N_q) [sum_p C^(p)] Phi_S


@torch.no_grad()
def closed_form_gradients(
    support_features: Tensor,
    support_labels: Tensor,
    query_features: Tensor,
    query_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    inner_lr: float,
    inner_steps: int,
    first_order: bool,
    loss: str = "cross_entropy",
) -> Gradients:
    """The gradients of FOMAML (2.4) or SOMAML (2.5) with respect to features and head, exact for any N and any head.

    The query features' gradient is the same in both orders, E_Q W_N. The encoder's is that of
    sum(query_features o Phi_Q) + sum(support_features o Phi_S), both gradients held constant (2.5).

    Args:
        support_features, query_features: (..., S, d) and (..., Q, d), phi(s) and phi(q).
        support_labels, query_labels: (..., S) and (..., Q), integers 0..K-1; classes may differ in size or be absent.
        weight, bias: (K, d) and (K,), the head before the inner loop, the same for all tasks.
        inner_lr: eta.
        inner_steps: N >= 1.
        first_order: True for FOMAML, False for SOMAML.
        loss: of inner loop and query. "cross_entropy": mean over images (2.2); "mse": 1/2 the sum over images and
            ways, one inner step (2.1), where eta/(N_s N_q) is eta.

    Returns:
        Gradients, detached. All tensors are of one dtype, float32 or float64.

    Raises:
        ValueError: loss or inner_steps, or a tensor's shape, dtype or labels, are not as said here.
    """
    task = _adapt(
        support_features, support_labels, query_features, query_labels, weight, bias, inner_lr, inner_steps, loss
    )
    E_Q = (task.Q - task.T_Q) / _images(task.T_Q, loss)
    interference = E_Q @ weight  # E_Q W_0 (2.4)
    C = _coefficients(task).sum(0)
    contrastive = -task.rate / _images(task.T_Q, loss) * C @ support_features  # -eta/(N_s N_q) [sum_p C^(p)] Phi_S
    D, G = torch.zeros_like(task.phi_S), E_Q.mT @ task.phi_Q  # D = 0; G_N = E_Q^T Phi_Q, g_N = E_Q^T 1
    if not first_order:
        D, G = _back_through_inner_loop(task, D, G, loss)
    d = weight.shape[1]
    return Gradients(
        loss=_query_loss(task.logits, task.T_Q, loss),
        query_features=interference + contrastive,
        support_features=D[..., :d],
        weight=G[..., :d],
        bias=None if bias is None else G[..., d],
        interference=interference,
        contrastive=contrastive,
    )


@torch.no_grad()
def contrastive_coefficients(
    support_features: Tensor,
    support_labels: Tensor,
    query_features: Tensor,
    query_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    inner_lr: float,
    inner_steps: int,
    first_order: bool = True,
    loss: str = "cross_entropy",
) -> Tensor:
    """C^(p) for p = 0 .. N-1, (N, ..., Q, S): where c^(p)_qs > 0, a descent step moves phi(q) toward phi(s) (2.3).

    c^(p)_qs = sum_j q_j s^(p)_j - s^(p)_u - q_t + 1[t=u], t and u the labels of s and q; 1[t=u] - q_t without noise.
    Of one class it is never negative, with noise or without: (1 - q_u)(1 - s_u) + sum_{j != u} q_j s_j.
    For "mse" the inner products of the residuals, (W_1 phi(q) - u).(W_0 phi(s) - t): 1[t=u] - eta phi(q).m_t if
    W_0 = 0 (2.1). Arguments and errors are those of `closed_form_gradients`; the coefficients are the same in both
    orders, so first_order changes nothing.
    """
    task = _adapt(
        support_features, support_labels, query_features, query_labels, weight, bias, inner_lr, inner_steps, loss
    )
    return _coefficients(task)


def explicit_loss(
    support_features: Tensor,
    support_labels: Tensor,
    query_features: Tensor,
    query_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    inner_lr: float,
    first_order: bool,
    noise: bool = True,
    interference: bool = True,
) -> Tensor:
    """The contrastive loss whose gradient with respect to the features is MAML's after one inner step (method.md 5).

    L1 = mean_{q,s} eta [-c_qs] phi(s)^T phi(q), [..] held constant, and phi(s) too for first order; without noise c_qs
    is 1[t=u] - q_t. With interference L2 = mean_q sum_k [(q_k - 1[k=u]) w0_k]^T phi(q) is added. Second order is exact
    for a zero head only (2.5). Arguments as of `closed_form_gradients`. Returns (...), to be differentiated with
    respect to the features.
    """
    with torch.no_grad():
        task = _adapt(
            support_features, support_labels, query_features, query_labels, weight, bias, inner_lr, 1, "cross_entropy"
        )
        residual = task.Q - task.T_Q
        c = -residual @ (task.T_S - (task.P[0] if noise else 0)).mT  # -(Q - T_Q) T_S^T is 1[t=u] - q_t
    phi_S = support_features.detach() if first_order else support_features
    loss = -inner_lr * (c * (query_features @ phi_S.mT)).mean((-2, -1))
    if interference:
        loss = loss + (residual @ weight.detach() * query_features).sum(-1).mean(-1)
    return loss


@torch.no_grad()
def adapted_logits(
    support_features: Tensor,
    support_labels: Tensor,
    query_features: Tensor,
    query_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    inner_lr: float,
    inner_steps: int,
) -> Tensor:
    """Phi_Q W_N^T + b_N, (..., Q, K), by (2.2). Arguments and errors as of `closed_form_gradients`."""
    return _adapt(
        *(support_features, support_labels, query_features, query_labels, weight, bias),
        *(inner_lr, inner_steps, "cross_entropy"),
    ).logits


@torch.no_grad()
def adapted_head(
    support_features: Tensor,
    support_labels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    inner_lr: float,
    inner_steps: int,
) -> tuple[Tensor, Tensor | None]:
    """W_N (..., K, d) and b_N (..., K), by (2.2). Arguments and errors as of `closed_form_gradients`."""
    support = (support_features, support_labels)
    task = _adapt(*support, *support, weight, bias, inner_lr, inner_steps, "cross_entropy")  # queries play no part
    W, d = task.W[-1], weight.shape[1]
    return W[..., :d], None if bias is None else W[..., d]


def centred(rows: Tensor) -> Tensor:
    """What of a head's K rows (..., K, d), or of its bias as (K, 1), the loss can see: they, less their mean.

    Rows of Q - T_Q and of P - T_S sum to 0, so what all classes share interferes with nothing and stays as it is (2.4).
    """
    rows = rows - rows[..., :1, :]  # equal rows become 0 exactly, which they need not be less their rounded mean
    return rows - rows.mean(-2, keepdim=True)


class _Adapted(NamedTuple):
    """A task after its inner loop; phi and W include the bias."""

    phi_S: Tensor  # (..., S, d), with a bias d + 1
    phi_Q: Tensor  # (..., Q, d)
    T_S: Tensor  # (..., S, K), one-hot
    T_Q: Tensor  # (..., Q, K), one-hot
    rate: float  # eta/N_s; for mse eta
    W: list[Tensor]  # W_0 .. W_N
    P: list[Tensor]  # P^(0) .. P^(N-1), (..., S, K)
    logits: Tensor  # (..., Q, K), Phi_Q W_N^T + b_N
    Q: Tensor  # (..., Q, K)


def _adapt(
    phi_S: Tensor,
    labels_S: Tensor,
    phi_Q: Tensor,
    labels_Q: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inner_lr: float,
    inner_steps: int,
    loss: str,
) -> _Adapted:
    _check_loss(loss, inner_steps)
    _check_head(weight, bias)
    _check_images("support", phi_S, labels_S, weight)
    _check_images("query", phi_Q, labels_Q, weight)
    if phi_S.shape[:-2] != phi_Q.shape[:-2]:
        raise ValueError(
            f"support_features is {_said(phi_S)}, query_features {_said(phi_Q)}: give both the same task dimensions"
        )
    T_S, T_Q = (F.one_hot(labels.long(), len(weight)).to(weight.dtype) for labels in (labels_S, labels_Q))
    W_0 = weight
    if bias is not None:
        W_0 = torch.cat([weight, bias.unsqueeze(1)], dim=1)
        phi_S, phi_Q = F.pad(phi_S, (0, 1), value=1.0), F.pad(phi_Q, (0, 1), value=1.0)
    rate = inner_lr / _images(T_S, loss)
    W, P = _inner_loop(phi_S, T_S, W_0, rate, inner_steps, loss)
    logits = phi_Q @ W[-1].mT
    return _Adapted(phi_S, phi_Q, T_S, T_Q, rate, W, P, logits, _predictions(logits, loss))


def _inner_loop(
    phi_S: Tensor, T_S: Tensor, W_0: Tensor, rate: float, inner_steps: int, loss: str
) -> tuple[list[Tensor], list[Tensor]]:
    W, P = [W_0], []
    for _ in range(inner_steps):
        P.append(_predictions(phi_S @ W[-1].mT, loss))  # P^(p) = softmax(Phi_S W_p^T + b_p) (2.2)
        W.append(W[-1] + rate * (T_S - P[-1]).mT @ phi_S)  # W_{p+1} = W_p + (eta/N_s) (T_S - P^(p))^T Phi_S
    return W, P


def _coefficients(task: _Adapted) -> Tensor:
    return torch.stack([-(task.Q - task.T_Q) @ (task.T_S - P).mT for P in task.P])  # C^(p) = -(Q - T_Q) (T_S - P^(p))^T


def _back_through_inner_loop(task: _Adapted, D: Tensor, G: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """From D = 0 and G_N to D = dL/dPhi_S and G_0 (2.5)."""
    for W, P in zip(task.W[-2::-1], task.P[::-1], strict=True):  # p = N-1 .. 0
        A = task.phi_S @ G.mT  # A = Phi_S G_{p+1}^T + 1 g_{p+1}^T
        M = _logits_gradient(P, A, loss)
        D = D + task.rate * ((task.T_S - P) @ G - M @ W)  # D += (eta/N_s) [(T_S - P^(p)) G_{p+1} - M W_p]
        G = G - task.rate * M.mT @ task.phi_S  # G_p = G_{p+1} - (eta/N_s) M^T Phi_S
    return D, G


def _images(T: Tensor, loss: str) -> int:
    """What a loss over these images is divided by: N_s or N_q for a mean, 1 for a sum."""
    return T.shape[-2] if loss == "cross_entropy" else 1


def _predictions(logits: Tensor, loss: str) -> Tensor:
    return logits.softmax(-1) if loss == "cross_entropy" else logits


def _logits_gradient(P: Tensor, A: Tensor, loss: str) -> Tensor:
    """M: the gradient of sum(A o predictions) with respect to the logits, A held constant."""
    return P * (A - (P * A).sum(-1, keepdim=True)) if loss == "cross_entropy" else A  # P o (A - ((P o A) 1) 1^T)


def _query_loss(logits: Tensor, T_Q: Tensor, loss: str) -> Tensor:
    if loss == "cross_entropy":
        return -(T_Q * logits.log_softmax(-1)).sum(-1).mean(-1)
    return (logits - T_Q).square().sum((-2, -1)) / 2  # 1/2 sum_q |W_1 phi(q) - u|^2 (2.1)


def _check_loss(loss: str, inner_steps: int) -> None:
    if loss not in ("cross_entropy", "mse"):
        raise ValueError(f"loss={loss!r}: give 'cross_entropy' or 'mse'")
    if not isinstance(inner_steps, int) or inner_steps < 1:
        raise ValueError(f"inner_steps={inner_steps!r}: give an integer of at least 1")
    if loss == "mse" and inner_steps != 1:
        raise ValueError(f"inner_steps={inner_steps}: loss='mse' takes one step; give 1, or loss='cross_entropy'")


def _check_head(weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weight is {_said(weight)}: give (K, d), torch.float32 or torch.float64")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        raise ValueError(f"bias is {_said(bias)}: give ({len(weight)},) {weight.dtype}, one for each row of the weight")


def _check_images(name: str, features: Tensor, labels: Tensor, weight: Tensor) -> None:
    K, d = weight.shape
    if features.ndim < 2 or features.shape[-1] != d or features.dtype != weight.dtype:
        raise ValueError(f"{name}_features is {_said(features)}: give (..., images, {d}) {weight.dtype}, as the weight")
    if labels.shape != features.shape[:-1] or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"{name}_labels is {_said(labels)}: give {tuple(features.shape[:-1])} integers")
    if labels.numel() == 0:
        raise ValueError(f"{name}_features is {_said(features)}: give at least one image")
    if labels.min() < 0 or labels.max() >= K:
        raise ValueError(f"{name}_labels are {labels.min()}..{labels.max()}: give 0..{K - 1}, a row of the weight each")


def _said(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"
