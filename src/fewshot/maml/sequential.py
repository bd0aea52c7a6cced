"""The inner loop on learn2learn's MAML, one task after another.

Shapes: B tasks, K ways, I images, S support and Q query images per task, N inner steps, T steps of an evaluation.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from learn2learn import clone_module, update_module
from learn2learn.algorithms import MAML, MetaSGD
from torch import Tensor

from fewshot.algorithms import hooks
from fewshot.data.task import Task, query_accuracy, squared_errors
from fewshot.inner_loop import InnerLoop, Tensors
from fewshot.models.head import initial_head
from fewshot.models.network import Network, drops
from fewshot.norms import inside, of_queries
from fewshot.recompute import recomputed

clone: Any = clone_module  # it has no types
LOSSES = {"cross_entropy": F.cross_entropy, "mse": squared_errors}  # of one task: (I, K), (I,) -> ()


def adapt(
    network: Network,
    task: Task,
    loop: InnerLoop,
    eta: Sequence[Tensor] = (),
    encode: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[Network, Callable[..., Tensor]]]:
    """After inner step 0, 1, .., N: yields theta_n and the function that computes the logits of the queries, (Q, K).

    That function takes the statistics to normalise by; left out they are those of training, see norms.py.

    Args:
        loop: what adapts, from which head, in which order: MAML or a member of its family.
        eta: the learned inner learning rates, one tensor for each parameter that adapts; empty: loop.inner_lr.
        encode: images to their features at theta, which sees each set of images once; None: the network's encoder.
    """
    encode, loss = encode or cache(network.encoder), LOSSES[loop.loss]
    theta_n, state = clone(network), tuple(eta) or None  # theta_n <- theta
    if loop.overrides("start"):
        begun = hooks.start(loop, dict(theta_n.named_parameters()), encode, task.support, task.support_labels)
        encode, theta_n = cache(_with(begun, network).encoder), clone(_with(begun, network))
    own: Tensors = dict(network.head.named_parameters())
    theta_n.head._parameters.update(initial_head(loop, own, encode, task.support, task.support_labels))

    features = cache(partial(of_queries, network.encoder, task, partial(inside, encode)))  # at theta, by statistics

    def at_theta(images: Tensor) -> Tensor:
        return theta_n.head(encode(images))

    def queries_of(theta_n: Network) -> Callable[..., Tensor]:
        return partial(of_queries, theta_n, task, partial(inside, theta_n))

    def queries_at_theta(statistics: str = "task") -> Tensor:
        return theta_n.head(features(statistics))

    def step(theta_n: Network, part: str, state: Any) -> Any:
        logits, moving = at_theta if part == "head" else theta_n, theta_n if part == "all" else getattr(theta_n, part)
        loss_S = loss(logits(task.support), task.support_labels)
        if loop.overrides("update"):
            theta = {name: p for name, p in theta_n.named_parameters() if part in ("all", name.split(".")[0])}
            updates, state = hooks.update(loop, theta, loss_S, state)
            update_module(moving, list(updates.values()))  # theta_n <- theta_n + update
            return state
        if eta:
            names = [name for name, _ in network.named_parameters() if loop.adapted in ("all", name.split(".")[0])]
            rates = [rate for name, rate in zip(names, state, strict=True) if part in ("all", name.split(".")[0])]
            learner = MetaSGD(moving, lrs=rates, first_order=loop.first_order)
        else:
            # With allow_nograd=False its adapt() prints a RuntimeError, out of memory among them, and goes on.
            learner = MAML(
                moving, lr=loop.inner_lr, first_order=loop.first_order, allow_nograd=True, allow_unused=False
            )
        learner.adapt(loss_S)  # theta_n <- theta_n - eta grad L(S_n)
        return state

    def next_theta(parameters: Sequence[Tensor], state: Any) -> tuple[list[Tensor], Any]:
        copy = _with(parameters, theta_n)
        state = step(copy, loop.adapted, state)
        return list(copy.parameters()), state

    def logits_from(inputs: Sequence[Tensor]) -> Tensor:
        return queries_of(_with(inputs, theta_n))()

    yield theta_n, queries_at_theta
    again = partial(recomputed, draws=drops(network))
    for n in range(1, loop.inner_steps + 1):
        zero_head = loop.zeroing and loop.adapted == "all" and n == 1 and not loop.overrides("update")
        head_alone = loop.adapted == "head" or zero_head  # (P - T) w = 0
        if loop.recompute_steps and not loop.first_order and not head_alone:  # the graph of the head alone is small
            parameters, state = hooks.recomputed(loop, again, next_theta, list(theta_n.parameters()), state)
            theta_n = _with(parameters, theta_n)
            before_the_last: Any = partial(again, logits_from, list(theta_n.parameters()))
            yield theta_n, before_the_last if n < loop.inner_steps else queries_of(theta_n)
        else:
            state = step(theta_n, "head" if head_alone else loop.adapted, state)
            yield theta_n, queries_at_theta if head_alone else queries_of(theta_n)


def meta_gradient(
    network: Network, tasks: Task, loop: InnerLoop, eta: Sequence[Tensor] = (), step_weights: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Adds the outer gradient, a mean over the tasks, to the .grad of the network's parameters (method.md section 0).

    With zeroing each task begins with w = 0, a constant, so the network's own head gets a gradient of zero.

    Args:
        eta: as in `adapt`; their .grad is added to as well.
        step_weights: v_1 .. v_N, the weight of the query loss after each inner step (MAML++); None: the last alone.

    Returns the query loss and the query accuracy after the last inner step, and what loop.measures names, (B,) each.
    """
    losses, logits, measured, differentiated = [], [], [], not loop.overrides("outer_gradient")
    for task in tasks.one_by_one():
        outer: Any = 0.0
        for n, (theta_n, query_logits) in enumerate(adapt(network, task, hooks.inner(loop), eta)):
            if n == 0 and not differentiated:
                theta = dict(theta_n.named_parameters())
            if n == loop.inner_steps or (n > 0 and step_weights is not None):
                prediction = query_logits()
                loss = LOSSES[loop.loss](prediction, task.query_labels)  # L(theta_n, Q_n)
                outer = loss if step_weights is None else outer + step_weights[n - 1] * loss
        if not differentiated:
            outer, values = hooks.outer(
                loop, theta, dict(theta_n.named_parameters()), partial(_loss, network, loop, task), task
            )
            measured.append(values)
        (outer / len(tasks.support)).backward()  # grad_theta L(theta_n, Q_n); frees the graph of this task
        losses.append(loss.detach())
        logits.append(prediction.detach())
    for parameter in (*network.parameters(), *eta):  # a head that another stands in for has no part in the loss
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    accuracies = query_accuracy(torch.stack(logits), tasks.query_labels)
    return torch.stack(losses), accuracies, *map(torch.stack, zip(*measured, strict=True))


def step_accuracies(
    network: Network,
    tasks: Task,
    evaluations: Sequence[InnerLoop],
    eta: Sequence[Tensor] = (),
    statistics: Sequence[str] = ("task",),
) -> Tensor:
    """Query accuracy after every inner step 0 .. T, (evaluations, B, T + 1); the network is left as it is.

    Args:
        evaluations: see InnerLoop.evaluation; together they cost less than one by one, for they share theta's features.
        statistics: what the queries are normalised by, see norms.py; with several, the result begins with all
            evaluations by the first of them.
    """
    return query_accuracy(step_logits(network, tasks, evaluations, eta, statistics), tasks.query_labels[:, None])


def adapted(network: Network, task: Task, evaluation: InnerLoop, eta: Sequence[Tensor] = ()) -> dict[str, Tensor]:
    """theta_T of one task, without a leading B, by the names of the network's parameters; the network is left as is."""
    steps = adapt(network, task, evaluation, eta, cache(torch.no_grad()(network.encoder)))
    ((theta_T, _),) = deque(steps, maxlen=1)
    return {name: parameter.detach() for name, parameter in theta_T.named_parameters()}


def step_logits(
    network: Network,
    tasks: Task,
    evaluations: Sequence[InnerLoop],
    eta: Sequence[Tensor] = (),
    statistics: Sequence[str] = ("task",),
    *,
    first: int = 0,
) -> Tensor:
    """The queries' logits after inner steps first .. T, (evaluations, B, T + 1 - first, Q, K); see step_accuracies."""
    logits = []
    for task in tasks.one_by_one():
        encode = cache(torch.no_grad()(network.encoder))
        for loop in evaluations:
            for _, query_logits in islice(adapt(network, task, loop, eta, encode), first, None):
                with torch.no_grad():
                    logits += [query_logits(whose) for whose in statistics]
    shape = (len(tasks.support), len(evaluations), -1, len(statistics))
    return torch.stack(logits).unflatten(0, shape).permute(3, 1, 0, 2, 4, 5).flatten(0, 1)


def _loss(network: Network, loop: InnerLoop, task: Task, theta: Tensors, of_support: bool) -> Tensor:
    outputs = _with([theta.get(name, p) for name, p in network.named_parameters()], network)
    if of_support:
        return LOSSES[loop.loss](outputs(task.support), task.support_labels)
    return LOSSES[loop.loss](of_queries(network, task, partial(inside, outputs)), task.query_labels)


def _with(parameters: Sequence[Tensor], network: Network) -> Network:
    """The network with these parameters in place of its own, in their order."""
    places = (parameter.data_ptr for parameter in network.parameters())  # learn2learn knows them by the bound method
    return clone(network, memo=dict(zip(places, parameters, strict=True)))
