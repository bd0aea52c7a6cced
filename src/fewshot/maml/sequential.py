"""The inner loop on learn2learn's MAML, one task at a time.

Shapes: B tasks, K ways, S support and Q query images per task, N inner steps, T steps of an evaluation.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from learn2learn import clone_module
from learn2learn.algorithms import MAML, MetaSGD
from torch import Tensor, nn

from fewshot.data.task import Task, query_accuracy
from fewshot.maml.recompute import recomputed
from fewshot.models.head import prototype_head
from fewshot.models.resnet12 import drops

OfImages = Callable[[Tensor], Tensor]


def meta_gradient(
    network: nn.Module,
    tasks: Task,
    *,
    inner_lr: float | Sequence[Tensor],
    inner_steps: int,
    first_order: bool,
    zeroing: bool = False,
    adapted: str = "all",
    prototypes: bool = False,
    step_losses: Tensor | None = None,
    recompute_steps: bool = False,
) -> tuple[Tensor, Tensor]:
    """Adds the outer gradient, a mean over the tasks, to the .grad of the network's parameters (method.md section 0).

    Args:
        inner_lr: eta, or one tensor for each parameter that adapts, whose .grad is added to as well (Meta-SGD).
        zeroing: each task begins with w = 0, a constant, so the network's own head gets a gradient of zero; the first
            inner step takes one forward pass of the support, since it moves the head alone (method.md 2.6).
        adapted: what the inner loop does: "all", the "head" (EFIL, method.md section 1) or the "encoder" alone (BOIL).
        prototypes: each task begins with the head of models.prototype_head, in place of the network's.
        step_losses: v_1 .. v_N, by which the query losses after each inner step count (MAML++); None: the last alone.
        recompute_steps: in second order, keep no inner step's graph but make it in the backward pass (recompute.py).

    Returns the query loss and the query accuracy after the last inner step, (B,) each.
    """
    knobs = {"inner_lr": inner_lr, "first_order": first_order, "adapted": adapted, "prototypes": prototypes}
    knobs["recompute_steps"] = recompute_steps
    losses, logits = [], []
    for task in _each(tasks):
        outer = 0.0
        steps = _adapt(network, task, cache(network.encoder), steps=inner_steps, zeroing=zeroing, **knobs)
        for step, query_logits in enumerate(steps):
            if step == inner_steps or (step > 0 and step_losses is not None):
                prediction = query_logits()
                loss = F.cross_entropy(prediction, task.query_labels)
                outer = loss if step_losses is None else outer + step_losses[step - 1] * loss
        (outer / len(tasks.support)).backward()  # grad_theta L(theta_n, Q_n); one task's graph at a time
        losses.append(loss.detach())
        logits.append(prediction.detach())
    learned = [] if isinstance(inner_lr, float | int) else inner_lr
    for parameter in (*network.parameters(), *learned):  # a head that another stands in for has no part in the loss
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return torch.stack(losses), query_accuracy(torch.stack(logits), tasks.query_labels)


def step_accuracies(network: nn.Module, tasks: Task, *, zeroing: Sequence[bool], **knobs: Any) -> Tensor:
    """Query accuracy after every inner step 0 .. T, (modes, B, T + 1).

    zeroing: for each mode whether tasks begin with w = 0; together they cost less, for they share theta's features.
    knobs: of step_logits.
    """
    accuracies = []
    for task in _each(tasks):
        encode = cache(torch.no_grad()(network.encoder))
        logits = torch.stack([_step_logits(network, task, encode, zeroing=zero, **knobs) for zero in zeroing])
        labels = task.query_labels.expand(*logits.shape[:2], -1)
        accuracies.append(query_accuracy(logits.flatten(0, 1), labels.flatten(0, 1)).view(labels.shape[:2]))
    return torch.stack(accuracies, dim=1)


def step_logits(network: nn.Module, tasks: Task, *, first: int = 0, **knobs: Any) -> Tensor:
    """The queries' logits after inner steps first .. T, (B, T + 1 - first, Q, K).

    First-order adaptation (the adapted parameters are the same); the network is left as it is.

    knobs: steps (T); inner_lr, zeroing, adapted and prototypes as meta_gradient has them.
    """
    logits = []
    for task in _each(tasks):
        logits.append(_step_logits(network, task, cache(torch.no_grad()(network.encoder)), first=first, **knobs))
    return torch.stack(logits)


def _step_logits(network: nn.Module, task: Task, encode: OfImages, *, first: int = 0, **knobs: Any) -> Tensor:
    """(T + 1 - first, Q, K)"""
    logits = []
    for step, query_logits in enumerate(_adapt(network, task, encode, first_order=True, **knobs)):
        if step >= first:
            with torch.no_grad():
                logits.append(query_logits())
    return torch.stack(logits)


def _adapt(
    network: nn.Module,
    task: Task,
    encode: OfImages,
    *,
    inner_lr: float | Sequence[Tensor],
    steps: int,
    first_order: bool,
    zeroing: bool,
    adapted: str = "all",
    prototypes: bool = False,
    recompute_steps: bool = False,
) -> Iterator[Callable[[], Tensor]]:
    """After inner step 0, 1, .. N: what computes the logits of the queries, (Q, K).

    encode: images to their features at theta; each set of images passes it once.
    """
    theta_n = clone_module(network)  # theta_n <- theta
    start = {}
    if zeroing:
        start = {name: torch.zeros_like(w) for name, w in network.head.named_parameters()}  # w <- 0
    elif prototypes:  # of theta, of which theta_n is a copy: no inner gradient goes through them
        start = prototype_head(encode(task.support), task.support_labels, network.head.out_features)
    for name, _ in network.head.named_parameters() if start else ():
        theta_n.head._parameters[name] = start[name].requires_grad_()

    def at_theta(images: Tensor) -> Tensor:
        return theta_n.head(encode(images))

    def adapt(theta_n: nn.Module, part: str, etas: Sequence[Tensor]) -> None:
        """An inner step of this part of theta_n; etas: those that are learned, of all that adapts."""
        logits, moving = at_theta if part == "head" else theta_n, theta_n if part == "all" else getattr(theta_n, part)
        if etas:
            names = [name for name, _ in network.named_parameters() if adapted == "all" or name.startswith(adapted)]
            etas = [eta for name, eta in zip(names, etas, strict=True) if part == "all" or name.startswith(part)]
            learner = MetaSGD(moving, lrs=etas, first_order=first_order)
        else:
            # With allow_nograd=False its adapt() prints a RuntimeError, out of memory among them, and goes on.
            learner = MAML(moving, lr=inner_lr, first_order=first_order, allow_nograd=True, allow_unused=False)
        loss = F.cross_entropy(logits(task.support), task.support_labels)
        learner.adapt(loss)  # theta_n <- theta_n - eta grad L(theta_n, S_n)

    def adapted_from(inputs: Sequence[Tensor]) -> list[Tensor]:
        """theta_{n+1}; inputs: theta_n, then learned inner_lr."""
        copy = _with(inputs, theta_n)
        adapt(copy, adapted, inputs[len(list(copy.parameters())) :])
        return list(copy.parameters())

    def query_logits_from(inputs: Sequence[Tensor]) -> Tensor:
        return _with(inputs, theta_n)(task.query)

    yield partial(at_theta, task.query)
    again = partial(recomputed, draws=drops(network))
    etas = [] if isinstance(inner_lr, float | int) else list(inner_lr)
    for step in range(1, steps + 1):
        part = "head" if adapted == "all" and zeroing and step == 1 else adapted  # (P - T) w = 0: the encoder stays
        if recompute_steps and not first_order and part != "head":  # the graph of the head alone is small
            theta_n = _with(again(adapted_from, [*theta_n.parameters(), *etas]), theta_n)
            before_the_last = partial(again, query_logits_from, list(theta_n.parameters()))
            yield before_the_last if step < steps else partial(theta_n, task.query)
        else:
            adapt(theta_n, part, etas)
            yield partial(at_theta if part == "head" else theta_n, task.query)


def _with(parameters: Sequence[Tensor], network: nn.Module) -> nn.Module:
    """The network with these parameters, of which there may be more than it has, in place of its own."""
    places = (parameter.data_ptr for parameter in network.parameters())  # by which learn2learn knows them
    return clone_module(network, memo=dict(zip(places, parameters, strict=False)))


def _each(tasks: Task) -> list[Task]:
    return [Task(*fields) for fields in zip(*tasks, strict=True)]
