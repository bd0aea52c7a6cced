"""The split of FOMAML's gradient where the inner loop adapts everything, not the head alone (docs/method.md 2.9).

It uses automatic differentiation and the formula, and not the program's own inner loop.

Shapes: of one task, S support and Q query images, d features, K ways, N inner steps.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from fewshot.data.task import Task
from fewshot.evidence.model import Model
from fewshot.models.network import Network
from fewshot.norms import inside, of_queries


class Terms(NamedTuple):
    """dL/dPhi_Q(theta_N) = interference + contrastive."""

    interference: Tensor  # (Q, d), E_Q W_0
    contrastive: Tensor  # (Q, d), -eta/(N_s N_q) sum_p C^(p) Phi_S(theta_p)
    query: Tensor  # (Q, d), Phi_Q(theta_N), a function of the encoder
    encoder: list[Tensor]  # the encoder's parameters in theta_N
    head_gradient: list[Tensor]  # E_Q^T Phi_Q(theta_N), and E_Q^T 1 where there is a bias


def split_adapting_all(model: Model, task: Task, steps: int) -> Terms:
    """The two terms after so many inner steps of all parameters from this model's head."""
    eta, W_0 = model.loop.inner_lr, model.network.head.weight.detach()
    T_S, T_Q = (F.one_hot(labels, len(W_0)).double() for labels in (task.support_labels, task.query_labels))
    theta = dict(model.network.named_parameters())
    memory = torch.zeros_like(W_0)  # sum_p (T_S - P^(p))^T Phi_S(theta_p)
    for _ in range(steps):
        theta = {name: parameter.detach().requires_grad_() for name, parameter in theta.items()}
        phi_S = _features(model.network, theta, task.support)
        logits = functional_call(model.network.head, _part(theta, "head."), phi_S)
        gradients = torch.autograd.grad(F.cross_entropy(logits, task.support_labels), list(theta.values()))
        memory = memory + ((T_S - logits.softmax(1)).mT @ phi_S).detach()
        theta = {name: p - eta * g for (name, p), g in zip(theta.items(), gradients, strict=True)}
    theta = {name: parameter.detach().requires_grad_() for name, parameter in theta.items()}
    # TaskNorm normalises the queries by the support, which the encoder at theta_N sees, too.
    phi_Q = of_queries(model.network.encoder, task, partial(inside, partial(_features, model.network, theta)))
    logits = functional_call(model.network.head, _part(theta, "head."), phi_Q)
    residual = (logits.softmax(1) - T_Q).detach()  # N_q E_Q
    N_s, N_q = len(T_S), len(T_Q)
    return Terms(
        interference=residual @ W_0 / N_q,
        contrastive=eta / (N_s * N_q) * residual @ memory,  # C^(p) = -(Q - T_Q) (T_S - P^(p))^T
        query=phi_Q,
        encoder=[p for name, p in theta.items() if name.startswith("encoder.")],
        head_gradient=[
            residual.mT @ phi_Q.detach() / N_q,
            *([residual.sum(0) / N_q] if "head.bias" in theta else []),
        ],
    )


def _features(network: Network, theta: dict[str, Tensor], images: Tensor) -> Tensor:
    return functional_call(network.encoder, _part(theta, "encoder."), images)


def _part(theta: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The parameters of one module, by the names that they have in it."""
    return {name.removeprefix(prefix): p for name, p in theta.items() if name.startswith(prefix)}
