"""The outer gradient of the explicit loss, which needs no inner loop: by the theory it is MAML's (docs/method.md 5).

Shapes: B tasks, S support and Q query images per task, d features, K ways.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fewshot.data.task import Task, query_accuracy
from fewshot.inner_loop import InnerLoop
from fewshot.models.network import Network
from fewshot.theory.closed_forms import adapt_head
from fewshot.theory.features import Features, encode_one


def meta_gradient(
    network: Network, tasks: Task, loop: InnerLoop, eta: Sequence[Tensor] = (), step_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Adds the explicit loss's gradient to the encoder's .grad, and the head's first-order gradient to the head's.

    With noise and interference it is head-only MAML's outer gradient in first order (method.md 2.4). In second order
    only the encoder's part is, and only for one inner step from a head of equal rows (2.5). InnerLoop refuses eta and
    step_weights here. Returns the query loss and the query accuracy after the last inner step, (B,) each.
    """
    head, losses, logits = network.head, [], []
    terms = {"noise": bool(loop.noise), "interference": bool(loop.interference)}
    for task in tasks.one_by_one():
        phi_S, phi_Q = (phi.to(head.weight.dtype) for phi in encode_one(network, task))
        features = Features(phi_S, task.support_labels, phi_Q, task.query_labels, head.weight, head.bias)
        with torch.autocast(phi_Q.device.type, enabled=False):  # the closed forms are of the head's own precision
            adapted = adapt_head(features, inner_lr=loop.inner_lr, inner_steps=loop.inner_steps)
            (adapted.explicit_loss(first_order=loop.first_order, **terms) / len(tasks.support)).backward()
            closed = adapted.gradients(first_order=True)
        for parameter, gradient in ((head.weight, closed.weight), (head.bias, closed.bias)):
            if parameter is not None and gradient is not None:
                gradient = gradient / len(tasks.support)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        losses.append(closed.loss)
        logits.append(adapted.logits)
    return torch.stack(losses), query_accuracy(torch.stack(logits), tasks.query_labels)
