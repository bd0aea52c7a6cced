"""The inner loop on learn2learn's MAML, one task after another.

Shapes: B tasks, K ways, S support and Q query images per task, N inner steps, T steps of an evaluation.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import islice

import torch
import torch.nn.functional as F
from learn2learn import clone_module
from learn2learn.algorithms import MAML, MetaSGD
from torch import Tensor, nn

from fewshot.data.task import Task, query_accuracy, squared_errors
from fewshot.inner_loop import InnerLoop
from fewshot.maml.recompute import recomputed
from fewshot.models.head import initial_head
from fewshot.models.network import drops

LOSSES = {"cross_entropy": F.cross_entropy, "mse": squared_errors}  # of one task: (I, K), (I,) -> ()


def adapt(
    network: nn.Module,
    task: Task,
    loop: InnerLoop,
    eta: Sequence[Tensor] = (),
    encode: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Callable[[], Tensor]]:
    """After inner step 0, 1, .., N: yields the function that computes the logits of the queries, (Q, K).

    Args:
        loop: what adapts, from which head, in which order: MAML or a member of its family.
        eta: the learned inner learning rates, one tensor for each parameter that adapts; empty: loop.inner_lr.
        encode: images to their features at theta, which sees each set of images once; None: the network's encoder.
    """
    encode, loss = encode or cache(network.encoder), LOSSES[loop.loss]
    theta_n = clone_module(network)  # theta_n <- theta
    own = dict(network.head.named_parameters())
    theta_n.head._parameters.update(initial_head(loop, own, encode, task.support, task.support_labels))

    def at_theta(images: Tensor) -> Tensor:
        return theta_n.head(encode(images))

    def step(theta_n: nn.Module, part: str, eta: Sequence[Tensor]) -> None:
        logits, moving = at_theta if part == "head" else theta_n, theta_n if part == "all" else getattr(theta_n, part)
        if eta:
            names = [name for name, _ in network.named_parameters() if loop.adapted in ("all", name.split(".")[0])]
            eta = [lr for name, lr in zip(names, eta, strict=True) if part in ("all", name.split(".")[0])]
            learner = MetaSGD(moving, lrs=eta, first_order=loop.first_order)
        else:
            # With allow_nograd=False its adapt() prints a RuntimeError, out of memory among them, and goes on.
            learner = MAML(
                moving, lr=loop.inner_lr, first_order=loop.first_order, allow_nograd=True, allow_unused=False
            )
        learner.adapt(loss(logits(task.support), task.support_labels))  # theta_n <- theta_n - eta grad L(S_n)

    def next_theta(inputs: Sequence[Tensor]) -> list[Tensor]:
        """theta_{n+1}; inputs: theta_n, then eta."""
        copy = _with(inputs, theta_n)
        step(copy, loop.adapted, inputs[len(list(copy.parameters())) :])
        return list(copy.parameters())

    def logits_from(inputs: Sequence[Tensor]) -> Tensor:
        return _with(inputs, theta_n)(task.query)

    yield partial(at_theta, task.query)
    again = partial(recomputed, draws=drops(network))
    for n in range(1, loop.inner_steps + 1):
        head_alone = loop.adapted == "head" or (loop.zeroing and loop.adapted == "all" and n == 1)  # (P - T) w = 0
        if loop.recompute_steps and not loop.first_order and not head_alone:  # the graph of the head alone is small
            theta_n = _with(again(next_theta, [*theta_n.parameters(), *eta]), theta_n)
            before_the_last = partial(again, logits_from, list(theta_n.parameters()))
            yield before_the_last if n < loop.inner_steps else partial(theta_n, task.query)
        else:
            step(theta_n, "head" if head_alone else loop.adapted, eta)
            yield partial(at_theta if head_alone else theta_n, task.query)


def meta_gradient(
    network: nn.Module, tasks: Task, loop: InnerLoop, eta: Sequence[Tensor] = (), step_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Adds the outer gradient, a mean over the tasks, to the .grad of the network's parameters (method.md section 0).

    With zeroing each task begins with w = 0, a constant, so the network's own head gets a gradient of zero.

    Args:
        eta: as in `adapt`; to the .grad of these is added as well.
        step_weights: v_1 .. v_N, what the query loss after each inner step counts (MAML++); None: the last one alone.

    Returns the query loss and the query accuracy after the last inner step, (B,) each.
    """
    losses, logits = [], []
    for task in _one_by_one(tasks):
        outer = 0.0
        for n, query_logits in enumerate(adapt(network, task, loop, eta)):
            if n == loop.inner_steps or (n > 0 and step_weights is not None):
                prediction = query_logits()
                loss = LOSSES[loop.loss](prediction, task.query_labels)  # L(theta_n, Q_n)
                outer = loss if step_weights is None else outer + step_weights[n - 1] * loss
        (outer / len(tasks.support)).backward()  # grad_theta L(theta_n, Q_n); frees the graph of this task
        losses.append(loss.detach())
        logits.append(prediction.detach())
    for parameter in (*network.parameters(), *eta):  # a head that another stands in for has no part in the loss
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return torch.stack(losses), query_accuracy(torch.stack(logits), tasks.query_labels)


def step_accuracies(
    network: nn.Module, tasks: Task, evaluations: Sequence[InnerLoop], eta: Sequence[Tensor] = ()
) -> Tensor:
    """Query accuracy after every inner step 0 .. T, (evaluations, B, T + 1); the network is left as it is.

    evaluations: see InnerLoop.evaluation; together they cost less than one by one, for they share theta's features.
    """
    return query_accuracy(_step_logits(network, tasks, evaluations, eta), tasks.query_labels[:, None])


def step_logits(
    network: nn.Module, tasks: Task, evaluation: InnerLoop, eta: Sequence[Tensor] = (), *, first: int = 0
) -> Tensor:
    """The queries' logits after inner steps first .. T, (B, T + 1 - first, Q, K); the network is left as it is."""
    return _step_logits(network, tasks, [evaluation], eta, first)[0]


def _step_logits(
    network: nn.Module, tasks: Task, evaluations: Sequence[InnerLoop], eta: Sequence[Tensor], first: int = 0
) -> Tensor:
    """(evaluations, B, T + 1 - first, Q, K)"""
    logits = []
    for task in _one_by_one(tasks):
        encode = cache(torch.no_grad()(network.encoder))
        for loop in evaluations:
            for query_logits in islice(adapt(network, task, loop, eta, encode), first, None):
                with torch.no_grad():
                    logits.append(query_logits())
    return torch.stack(logits).unflatten(0, (len(tasks.support), len(evaluations), -1)).transpose(0, 1)


def _with(parameters: Sequence[Tensor], network: nn.Module) -> nn.Module:
    """The network with these parameters, of which there may be more than it has, in place of its own."""
    places = (parameter.data_ptr for parameter in network.parameters())  # learn2learn knows them by the bound method
    return clone_module(network, memo=dict(zip(places, parameters, strict=False)))


def _one_by_one(tasks: Task) -> list[Task]:
    return [Task(*fields) for fields in zip(*tasks, strict=True)]
