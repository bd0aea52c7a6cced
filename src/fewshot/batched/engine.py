"""The same inner loop for every task of a meta-batch at once.

Shapes: B tasks, K ways, S support and Q query images per task, I images of C channels, H x W pixels, N inner steps, T
steps of an evaluation; the parameters of adapted networks have a leading B.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fewshot.batched.execution import Execute, Function, on_threads, one_by_one
from fewshot.batched.side_by_side import NotSideBySide, SideBySide
from fewshot.data.task import Task, query_accuracy
from fewshot.maml.recompute import recomputed
from fewshot.models.head import prototype_head
from fewshot.models.resnet12 import drops

Parameters = dict[str, Tensor]
OfImages = Callable[[Parameters, Tensor], Tensor]


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
    tasks_at_once: int | None = None,
    execute: Execute | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds the outer gradient, a mean over the tasks, to the .grad of the network's parameters (method.md section 0).

    Args:
        inner_lr, zeroing, adapted, prototypes, step_losses, recompute_steps: as in learner.py.
        tasks_at_once: in memory together; None: on a CPU as many as there are threads, on a GPU all.
        execute: of execution.py; None: threads on a CPU, else one chunk after the other.

    Returns the query loss and the query accuracy after the last inner step, (B,) each.
    """
    knobs = {"inner_lr": inner_lr, "steps": inner_steps, "first_order": first_order, "zeroing": zeroing}
    knobs |= {"adapted": adapted, "prototypes": prototypes, "recompute_steps": recompute_steps}
    function = partial(_outer_gradient, step_losses=step_losses, **knobs)
    gradients, losses, logits = zip(*_run(function, network, tasks, tasks_at_once, execute), strict=True)
    mean = sum(gradients) / len(tasks.support)
    parameters = [*network.parameters(), *_rates(inner_lr)]
    for parameter, gradient in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        gradient = gradient.view_as(parameter)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return torch.cat(losses), query_accuracy(torch.cat(logits), tasks.query_labels)


def step_accuracies(
    network: nn.Module,
    tasks: Task,
    *,
    tasks_at_once: int | None = None,
    execute: Execute | None = None,
    **knobs: Any,
) -> Tensor:
    """Query accuracy after every inner step 0 .. T, (modes, B, T + 1); knobs: as in learner.py."""
    chunks = _run(partial(_step_logits, **knobs), network, tasks, tasks_at_once, execute)
    logits = torch.cat([torch.stack(each).unflatten(0, (len(knobs["zeroing"]), -1)) for each in chunks], dim=2)
    labels = tasks.query_labels.expand(*logits.shape[:2], -1, -1)
    return query_accuracy(logits.flatten(0, 2), labels.flatten(0, 2)).view(labels.shape[:3]).transpose(1, 2)


def _run(
    function: Function, network: nn.Module, tasks: Task, tasks_at_once: int | None, execute: Execute | None
) -> list[tuple[Tensor, ...]]:
    """function(network, chunk) for all chunks of the tasks, in their order."""
    number = len(tasks.support)
    size = tasks_at_once or number
    if execute is None and tasks.support.device.type == "cpu":  # `workers` chunks at a time
        workers = min(torch.get_num_threads(), size)
        size = min((tasks_at_once or workers) // workers, -(-number // workers))
        execute = partial(on_threads, workers=workers)
    chunks = [Task(*fields) for fields in zip(*(field.split(size) for field in tasks), strict=True)]
    return (execute or one_by_one)(function, network, chunks)


def _outer_gradient(
    network: nn.Module, tasks: Task, *, steps: int, step_losses: Tensor | None, **knobs: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The outer gradient, summed over the tasks, as one vector; query losses (B,); query logits (B, Q, K)."""
    theta = _copies(network, len(tasks.support))
    outer = 0.0
    encode = cache(partial(_features, network, theta))
    for step, query_logits in enumerate(_adapt(network, theta, tasks, encode, steps=steps, **knobs)):
        if step == steps or (step > 0 and step_losses is not None):
            logits = query_logits()
            losses = _losses(logits, tasks.query_labels)  # L(theta_n, Q_n)
            outer = losses if step_losses is None else outer + step_losses[step - 1] * losses
    leaves, rates = list(theta.values()), _rates(knobs["inner_lr"])
    gradients = torch.autograd.grad(outer.sum(), [*leaves, *rates], materialize_grads=True)
    summed = [*(each.sum(0) for each in gradients[: len(leaves)]), *gradients[len(leaves) :]]
    return torch.cat([each.flatten() for each in summed]), losses.detach(), logits.detach()


def _step_logits(network: nn.Module, tasks: Task, *, zeroing: Sequence[bool], **knobs: Any) -> tuple[Tensor, ...]:
    """The query logits of one mode after every inner step, then of the next: T + 1 times (B, Q, K) each.

    First-order adaptation (the adapted parameters are the same); the network is left as it is.
    """
    theta, logits = _copies(network, len(tasks.support)), []
    encode = cache(torch.no_grad()(partial(_features, network, theta)))
    for zero in zeroing:
        for query_logits in _adapt(network, theta, tasks, encode, first_order=True, zeroing=zero, **knobs):
            with torch.no_grad():
                logits.append(query_logits())
    return tuple(logits)


def _features(network: nn.Module, theta: Parameters, images: Tensor) -> Tensor:
    """(B, I, C, H, W) -> (B, I, d)"""
    encoder = {name.removeprefix("encoder."): p for name, p in theta.items() if name.startswith("encoder.")}
    return _outputs(network.encoder, encoder, images)


def _adapt(
    network: nn.Module,
    initial: Parameters,
    tasks: Task,
    encode: Callable[[Tensor], Tensor],
    *,
    inner_lr: float | Sequence[Tensor],
    steps: int,
    first_order: bool,
    zeroing: bool,
    adapted: str = "all",
    prototypes: bool = False,
    recompute_steps: bool = False,
) -> Iterator[Callable[[], Tensor]]:
    """After inner step 0, 1, .. N: what computes the logits of the queries, (B, Q, K).

    encode: images (B, I, C, H, W) to their features at theta (B, I, d); each set of images passes it once.
    """
    # As a view, so that no inner gradient goes through the features of theta that the head was made of.
    theta = {name: p.view_as(p) for name, p in initial.items()}  # theta_n <- theta
    heads = [name for name in theta if name.startswith("head.")]
    if zeroing:
        theta |= {name: torch.zeros_like(theta[name]).requires_grad_() for name in heads}  # w <- 0
    elif prototypes:
        start = prototype_head(encode(tasks.support), tasks.support_labels, network.head.out_features)
        theta |= {name: start[name.removeprefix("head.")].requires_grad_() for name in heads}
    adapts = [name for name in theta if adapted == "all" or name.startswith(f"{adapted}.")]
    rates, again = _rates(inner_lr), partial(recomputed, draws=drops(network))

    def logits(theta: Parameters, images: Tensor) -> Tensor:
        return _outputs(network, theta, images)

    def at_theta(theta: Parameters, images: Tensor) -> Tensor:
        head = {name.removeprefix("head."): theta[name] for name in heads}
        return _outputs(network.head, head, encode(images))

    def moved(outputs: OfImages, names: list[str], inputs: Sequence[Tensor]) -> list[Tensor]:
        """theta_n - eta grad L(theta_n, S_n) of these names; inputs: theta_n, then learned inner_lr."""
        theta = dict(zip(initial, inputs, strict=False))
        eta = dict(zip(adapts, inputs[len(theta) :] or [inner_lr] * len(adapts), strict=True))
        loss = _losses(outputs(theta, tasks.support), tasks.support_labels).sum()
        gradients = torch.autograd.grad(loss, [theta[name] for name in names], create_graph=not first_order)
        return [theta[name] - eta[name] * g for name, g in zip(names, gradients, strict=True)]

    def query_logits_from(inputs: Sequence[Tensor]) -> Tensor:
        return logits(dict(zip(initial, inputs, strict=True)), tasks.query)

    yield partial(at_theta, theta, tasks.query)
    for step in range(1, steps + 1):
        by_zero = adapted == "all" and zeroing and step == 1  # (P - T) w = 0: the encoder stays
        head_alone = by_zero or adapted == "head"
        outputs, names = (at_theta, heads) if head_alone else (logits, adapts)
        inputs, move = [*theta.values(), *rates], partial(moved, outputs, names)
        if recompute_steps and not first_order and not head_alone:  # the graph of the head alone is small
            theta = theta | dict(zip(names, again(move, inputs), strict=True))
            before_the_last = partial(again, query_logits_from, list(theta.values()))
            yield before_the_last if step < steps else partial(outputs, theta, tasks.query)
        else:
            theta = theta | dict(zip(names, move(inputs), strict=True))  # theta_n <- theta_n - eta grad L(theta_n, S_n)
            yield partial(outputs, theta, tasks.query)


def _copies(network: nn.Module, tasks: int) -> Parameters:
    return {
        name: p.detach().expand(tasks, *p.shape).clone(memory_format=torch.contiguous_format).requires_grad_()
        for name, p in network.named_parameters()
    }


def _rates(inner_lr: float | Sequence[Tensor]) -> list[Tensor]:
    """The inner_lr that are learned."""
    return [] if isinstance(inner_lr, float | int) else list(inner_lr)


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each task: (B, I, K), (B, I) -> (B,)."""
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(dim=1)


def _outputs(module: nn.Module, theta: Parameters, x: Tensor) -> Tensor:
    """Every task by its own parameters. Of the network: images (B, I, C, H, W) -> logits (B, I, K)."""
    side_by_side = x.transpose(0, 1).flatten(1, 2)  # (I, B*C, H, W)
    try:
        with SideBySide(len(x)):
            y = functional_call(module, theta, side_by_side)
    except NotSideBySide:  # slower, for whatever vmap takes; right as long as all differentiation stays outside of it
        return vmap(partial(functional_call, module))(theta, x)
    return y.unflatten(1, (len(x), -1)).transpose(0, 1)
