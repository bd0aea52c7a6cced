"""The inner loop on learn2learn's MAML, one task at a time.

Shapes: B tasks, K ways, S support and Q query images per task, N inner steps.
"""

import torch
import torch.nn.functional as F
from learn2learn.algorithms import MAML
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy

from fewshot.models import zero_head
from fewshot.tasks import Task


def meta_gradient(
    network: nn.Module, tasks: Task, *, inner_lr: float, inner_steps: int, first_order: bool
) -> tuple[Tensor, Tensor]:
    """Adds the outer gradient, a mean over the tasks, to the .grad of the network's parameters (METHOD section 0).

    Returns the query loss and the query accuracy after the last inner step, (B,) each.
    """
    maml = MAML(network, lr=inner_lr, first_order=first_order)
    losses, accuracies = [], []
    for task in _each(tasks):
        learner = maml.clone()  # theta_n <- theta
        for _ in range(inner_steps):
            learner.adapt(_support_loss(learner, task))  # theta_n <- theta_n - eta grad L(theta_n, S_n)
        logits = learner(task.query)
        loss = F.cross_entropy(logits, task.query_labels)
        (
            loss / len(tasks.support)
        ).backward()  # grad_theta L(theta_n, Q_n); here, so that one task's graph lives at a time
        losses.append(loss.detach())
        accuracies.append(multiclass_accuracy(logits.detach(), task.query_labels, logits.shape[1], average="micro"))
    return torch.stack(losses), torch.stack(accuracies)


def step_accuracies(network: nn.Module, tasks: Task, *, inner_lr: float, steps: int, zeroing: bool) -> Tensor:
    """Query accuracy after every inner step 0 .. steps, (B, steps + 1); with zeroing, adapted from a zeroed head.

    First-order adaptation (the adapted parameters are the same); the network is left as it is.
    """
    maml = MAML(network, lr=inner_lr, first_order=True)
    accuracies = []
    for task in _each(tasks):
        learner = maml.clone()
        if zeroing:
            zero_head(learner.module)
        for step in range(steps + 1):
            if step > 0:
                learner.adapt(_support_loss(learner, task))
            with torch.no_grad():
                logits = learner(task.query)
            accuracies.append(multiclass_accuracy(logits, task.query_labels, logits.shape[1], average="micro"))
    return torch.stack(accuracies).view(-1, steps + 1)


def _each(tasks: Task) -> list[Task]:
    return [Task(*fields) for fields in zip(*tasks, strict=True)]


def _support_loss(learner: MAML, task: Task) -> Tensor:
    return F.cross_entropy(learner(task.support), task.support_labels)
