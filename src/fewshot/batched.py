"""The same inner loop for every task of a meta-batch at once (torch.func).

Shapes: B tasks, K ways, S support and Q query images per task, N inner steps; while adapting,
parameters have a leading B.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, vmap

from fewshot.tasks import Task, query_accuracy

Parameters = dict[str, Tensor]


def meta_gradient(
    network: nn.Module,
    tasks: Task,
    *,
    inner_lr: float,
    inner_steps: int,
    first_order: bool,
    tasks_at_once: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds the outer gradient, a mean over the tasks, to the .grad of the network's parameters (method.md section 0).

    tasks_at_once bounds how many tasks are in memory together.
    Returns the query loss and the query accuracy after the last inner step, (B,) each.
    """
    theta = {name: p.detach() for name, p in network.named_parameters()}

    def adapted(theta: Parameters, task: Task) -> Parameters:
        for _ in range(inner_steps):
            theta = _step(network, theta, task, inner_lr)
        return theta

    def query_loss(theta: Parameters, task: Task) -> tuple[Tensor, Tensor]:
        logits = functional_call(network, theta, task.query)
        return F.cross_entropy(logits, task.query_labels), logits

    def first(theta: Parameters, task: Task):  # the gradient at theta_n, applied to theta
        return grad_and_value(query_loss, has_aux=True)(adapted(theta, task), task)

    def second(theta: Parameters, task: Task):  # the gradient through all inner steps
        return grad_and_value(lambda theta, task: query_loss(adapted(theta, task), task), has_aux=True)(theta, task)

    per_task = vmap(first if first_order else second, in_dims=(None, 0), chunk_size=tasks_at_once)
    gradients, (losses, logits) = per_task(theta, tasks)
    for name, parameter in network.named_parameters():
        mean = gradients[name].mean(0)
        parameter.grad = mean if parameter.grad is None else parameter.grad + mean
    return losses, query_accuracy(logits, tasks.query_labels)


def step_accuracies(network: nn.Module, tasks: Task, *, inner_lr: float, steps: int, zeroing: bool) -> Tensor:
    """Query accuracy after every inner step 0 .. steps, (B, steps + 1); with zeroing, adapted from a zeroed head."""
    theta = {name: p.detach().clone() for name, p in network.named_parameters()}
    if zeroing:
        theta["head.weight"].zero_(), theta["head.bias"].zero_()
    theta = {name: p.expand(len(tasks.support), *p.shape) for name, p in theta.items()}
    accuracies = []
    with torch.no_grad():
        for step in range(steps + 1):
            if step > 0:
                theta = vmap(partial(_step, network, inner_lr=inner_lr))(theta, tasks)
            logits = vmap(partial(functional_call, network))(theta, tasks.query)
            accuracies.append(query_accuracy(logits, tasks.query_labels))
    return torch.stack(accuracies, dim=1)


def _step(network: nn.Module, theta: Parameters, task: Task, inner_lr: float) -> Parameters:
    def support_loss(theta: Parameters) -> Tensor:
        return F.cross_entropy(functional_call(network, theta, task.support), task.support_labels)

    gradients = grad(support_loss)(theta)
    return {name: p - inner_lr * gradients[name] for name, p in theta.items()}  # theta_n <- theta_n - eta grad L(S_n)
