"""The same inner loop for every task of a meta-batch at once.

Shapes: B tasks, K ways, S support and Q query images per task, I images of C channels, H x W pixels, N inner steps, T
steps of an evaluation; the parameters of adapted networks have a leading B.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fewshot.algorithms import hooks
from fewshot.batched.execution import Execute, Function, on_threads, one_by_one
from fewshot.batched.in_a_row import in_a_row
from fewshot.batched.side_by_side import NotSideBySide, SideBySide
from fewshot.data.task import Task, query_accuracy, squared_errors
from fewshot.inner_loop import InnerLoop
from fewshot.models.head import initial_head
from fewshot.models.network import Network, drops
from fewshot.norms import TOGETHER, Context, of_queries
from fewshot.recompute import recomputed

Parameters = dict[str, Tensor]
FEW_NUMBERS = 300_000  # of the query images in one pass of a thread: beyond, fewer calls from Python save no time
OfImages = Callable[[Parameters, Tensor], Tensor]


def meta_gradient(
    network: Network,
    tasks: Task,
    loop: InnerLoop,
    eta: Sequence[Tensor] = (),
    step_weights: Tensor | None = None,
    *,
    tasks_at_once: int | None = None,
    execute: Execute | None = None,
) -> tuple[Tensor, ...]:
    """Adds the outer gradient, a mean over the tasks, to the .grad of the network's parameters (method.md section 0).

    Args:
        loop, eta, step_weights: as in maml/sequential.py.
        tasks_at_once: in memory together; None: on a CPU tasks_of_a_pass for each thread, on a GPU all.
        execute: of execution.py; None: threads on a CPU, else one chunk after the other.

    Returns the query loss and the query accuracy after the last inner step, and what loop.measures names, (B,) each.
    """
    function = partial(_outer_gradient, loop=loop, eta=tuple(eta), step_weights=step_weights)
    gradients, losses, logits, *measured = zip(*_run(function, network, tasks, tasks_at_once, execute), strict=True)
    mean: Any = sum(gradients) / len(tasks.support)
    parameters = [*network.parameters(), *eta]
    for parameter, gradient in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        gradient = gradient.view_as(parameter)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    accuracies = query_accuracy(torch.cat(logits), tasks.query_labels)
    return torch.cat(losses), accuracies, *map(torch.cat, measured)


def step_accuracies(
    network: Network,
    tasks: Task,
    evaluations: Sequence[InnerLoop],
    eta: Sequence[Tensor] = (),
    statistics: Sequence[str] = ("task",),
    *,
    tasks_at_once: int | None = None,
    execute: Execute | None = None,
) -> Tensor:
    """Query accuracy after every inner step 0 .. T, (evaluations, B, T + 1); the network is left as it is.

    statistics: what the queries are normalised by, see norms.py; with several, the result begins with all evaluations
        by the first of them.
    """
    chunks = {"tasks_at_once": tasks_at_once, "execute": execute}
    logits = step_logits(network, tasks, evaluations, eta, statistics, **chunks)
    return query_accuracy(logits, tasks.query_labels[:, None])


def step_logits(
    network: Network,
    tasks: Task,
    evaluations: Sequence[InnerLoop],
    eta: Sequence[Tensor] = (),
    statistics: Sequence[str] = ("task",),
    *,
    tasks_at_once: int | None = None,
    execute: Execute | None = None,
) -> Tensor:
    """The logits of the queries after every inner step, (evaluations, B, T + 1, Q, K); see step_accuracies."""
    evaluations, statistics = tuple(evaluations), tuple(statistics)
    function = partial(_step_logits, evaluations=evaluations, eta=tuple(eta), statistics=statistics)
    chunks = _run(function, network, tasks, tasks_at_once, execute)
    shape = (len(evaluations), -1, len(statistics))
    logits = torch.cat([torch.stack(steps).unflatten(0, shape) for steps in chunks], dim=3)
    return logits.permute(2, 0, 3, 1, 4, 5).flatten(0, 1)


def adapted(network: Network, task: Task, evaluation: InnerLoop, eta: Sequence[Tensor] = ()) -> Parameters:
    """theta_T of one task, without a leading B, by the names of the network's parameters; the network is left as is."""
    theta, tasks = _copies(network, 1), Task(*(field[None] for field in task))
    encode = cache(torch.no_grad()(partial(_features, network, theta)))
    ((theta_T, _),) = deque(_adapt(network, theta, tasks, evaluation, eta, encode), maxlen=1)
    return {name: parameter.detach()[0] for name, parameter in theta_T.items()}


def _run(
    function: Function, network: Network, tasks: Task, tasks_at_once: int | None, execute: Execute | None
) -> list[tuple[Tensor, ...]]:
    """function(network, chunk) for all chunks of the tasks, in their order."""
    number = len(tasks.support)
    size = tasks_at_once or number
    if execute is None and tasks.support.device.type == "cpu":  # `workers` chunks at a time
        workers = min(torch.get_num_threads(), size)
        together = tasks_at_once // workers if tasks_at_once else tasks_of_a_pass(network, tasks)
        size = min(together, -(-number // workers))
        execute = partial(on_threads, workers=workers)
    chunks = [Task(*fields) for fields in zip(*(field.split(size) for field in tasks), strict=True)]
    return (execute or one_by_one)(function, network, chunks)


def tasks_of_a_pass(network: Network, tasks: Task) -> int:
    """How many tasks a thread of a CPU takes at once: several where they share small matrix products, else one."""
    padded = any(layer.padding != (0, 0) for layer in network.modules() if isinstance(layer, nn.Conv2d))
    return 1 if padded else max(1, min(4, FEW_NUMBERS // tasks.query[0].numel()))


def default_tasks_at_once(network: Network, asked: int | None, tasks: Task) -> int:
    """How many tasks are in memory together. asked: tasks_at_once; None: as many as meta_gradient takes by itself."""
    on_cpu = tasks.support.device.type == "cpu"
    return asked or (tasks_of_a_pass(network, tasks) * torch.get_num_threads() if on_cpu else len(tasks.support))


def _outer_gradient(
    network: Network, tasks: Task, *, loop: InnerLoop, eta: Sequence[Tensor], step_weights: Tensor | None
) -> tuple[Tensor, ...]:
    """The outer gradient, summed over the tasks, as one vector; query losses (B,); query logits (B, Q, K); measures."""
    theta = _copies(network, len(tasks.support))
    outer: Any = 0.0
    differentiated, measured = not loop.overrides("outer_gradient"), []
    encode = cache(partial(_features, network, theta))
    for n, (theta_n, query_logits) in enumerate(_adapt(network, theta, tasks, hooks.inner(loop), eta, encode)):
        if n == 0:
            begun = theta_n
        if n == loop.inner_steps or (n > 0 and step_weights is not None):
            logits = query_logits()
            losses = LOSSES[loop.loss](logits, tasks.query_labels)  # L(theta_n, Q_n)
            outer = losses if step_weights is None else outer + step_weights[n - 1] * losses
    if not differentiated:
        outer, measured = hooks.outer(loop, begun, theta_n, partial(_losses, network, loop, tasks), tasks)
    leaves = list(theta.values())
    gradients = torch.autograd.grad(outer.sum(), [*leaves, *eta], materialize_grads=True)
    summed = [*(gradient.sum(0) for gradient in gradients[: len(leaves)]), *gradients[len(leaves) :]]
    return torch.cat([gradient.flatten() for gradient in summed]), losses.detach(), logits.detach(), *measured


def _step_logits(
    network: Network, tasks: Task, *, evaluations: Sequence[InnerLoop], eta: Sequence[Tensor], statistics: Sequence[str]
) -> tuple[Tensor, ...]:
    """The query logits of one evaluation after every inner step, by all statistics, then of the next."""
    theta, logits = _copies(network, len(tasks.support)), []
    encode = cache(torch.no_grad()(partial(_features, network, theta)))
    for loop in evaluations:
        for _, query_logits in _adapt(network, theta, tasks, loop, eta, encode):
            with torch.no_grad():
                logits += [query_logits(whose) for whose in statistics]
    return tuple(logits)


def _features(network: Network, theta: Parameters, images: Tensor, context: Context = TOGETHER) -> Tensor:
    """(B, I, C, H, W) -> (B, I, d)"""
    encoder = {name.removeprefix("encoder."): p for name, p in theta.items() if name.startswith("encoder.")}
    return _outputs(network.encoder, encoder, images, context)


def _adapt(
    network: Network,
    initial: Parameters,
    tasks: Task,
    loop: InnerLoop,
    eta: Sequence[Tensor],
    encode: Callable[..., Tensor],
) -> Iterator[tuple[Parameters, Callable[..., Tensor]]]:
    """After inner step 0, 1, .., N: yields theta_n and the function that computes the logits of the queries, (B, Q, K).

    That function takes the statistics to normalise by; left out they are those of training, see norms.py.

    encode: images (B, I, C, H, W) to their features at theta (B, I, d), which sees each set of images once.
    """
    # As a view, so that no inner gradient goes through the features of theta that the head was made of.
    theta = {name: p.view_as(p) for name, p in initial.items()}  # theta_n <- theta
    if loop.overrides("start"):
        begun = dict(zip(theta, hooks.start(loop, theta, encode, tasks.support, tasks.support_labels), strict=True))
        encode, theta = cache(partial(_features, network, begun)), {name: p.view_as(p) for name, p in begun.items()}
    heads = [name for name in theta if name.startswith("head.")]
    own = {name.removeprefix("head."): theta[name] for name in heads}
    start = initial_head(loop, own, encode, tasks.support, tasks.support_labels)
    theta |= {f"head.{name}": w for name, w in start.items()}
    adapts = [name for name in theta if loop.adapted in ("all", name.split(".")[0])]
    again = partial(recomputed, draws=drops(network))
    features = cache(partial(of_queries, network.encoder, tasks, encode))  # at theta, by statistics

    def logits(theta: Parameters, images: Tensor) -> Tensor:
        return _outputs(network, theta, images)

    def by_head(theta: Parameters, features: Tensor) -> Tensor:
        return _outputs(network.head, {name.removeprefix("head."): theta[name] for name in heads}, features)

    def at_theta(theta: Parameters, images: Tensor) -> Tensor:
        return by_head(theta, encode(images))

    def queries_at_theta(theta: Parameters, statistics: str = "task") -> Tensor:
        return by_head(theta, features(statistics))

    def queries_of(theta: Parameters, statistics: str = "task") -> Tensor:
        return of_queries(network, tasks, partial(_outputs, network, theta), statistics)

    def moved(outputs: OfImages, names: list[str], inputs: Sequence[Tensor]) -> list[Tensor]:
        """theta_n - eta grad L(theta_n, S_n) of these names; inputs: theta_n, then learned eta."""
        theta = dict(zip(initial, inputs, strict=False))
        rates = dict(zip(adapts, inputs[len(theta) :] or [loop.inner_lr] * len(adapts), strict=True))
        loss = LOSSES[loop.loss](outputs(theta, tasks.support), tasks.support_labels).sum()
        gradients = torch.autograd.grad(loss, [theta[name] for name in names], create_graph=not loop.first_order)
        return [theta[name] - rates[name] * g for name, g in zip(names, gradients, strict=True)]

    def own_step(
        outputs: OfImages, names: list[str], parameters: Sequence[Tensor], state: Any
    ) -> tuple[list[Tensor], Any]:
        theta = dict(zip(initial, parameters, strict=True))
        loss = LOSSES[loop.loss](outputs(theta, tasks.support), tasks.support_labels).sum()
        updates, state = hooks.update(loop, {name: theta[name] for name in names}, loss, state)
        return [p + updates[name] if name in updates else p for name, p in theta.items()], state

    def query_logits_from(inputs: Sequence[Tensor]) -> Tensor:
        return queries_of(dict(zip(initial, inputs, strict=True)))

    state = None
    yield theta, partial(queries_at_theta, theta)
    for n in range(1, loop.inner_steps + 1):
        zero_head = loop.zeroing and loop.adapted == "all" and n == 1 and not loop.overrides("update")
        head_alone = loop.adapted == "head" or zero_head  # (P - T) w = 0
        outputs, names = (at_theta, heads) if head_alone else (logits, adapts)
        inputs, move = [*theta.values(), *eta], partial(moved, outputs, names)
        recompute = loop.recompute_steps and not loop.first_order and not head_alone  # the head's graph is small
        if loop.overrides("update"):
            own = partial(own_step, outputs, names)
            parameters, state = hooks.recomputed(loop, again, own, inputs, state) if recompute else own(inputs, state)
            theta = dict(zip(theta, parameters, strict=True))  # theta_n <- theta_n + update
        else:
            moves = again(move, inputs) if recompute else move(inputs)
            theta = theta | dict(zip(names, moves, strict=True))  # theta_n <- theta_n - eta grad L(theta_n, S_n)
        before_the_last = recompute and n < loop.inner_steps
        query_logits: Any = partial(queries_at_theta if head_alone else queries_of, theta)
        if before_the_last:
            query_logits = partial(again, query_logits_from, list(theta.values()))
        yield theta, query_logits


def _copies(network: Network, tasks: int) -> Parameters:
    return {
        name: p.detach().expand(tasks, *p.shape).clone(memory_format=torch.contiguous_format).requires_grad_()
        for name, p in network.named_parameters()
    }


def _losses(network: Network, loop: InnerLoop, tasks: Task, theta: Parameters, of_support: bool) -> Tensor:
    outputs = partial(_outputs, network, theta)
    if of_support:
        return LOSSES[loop.loss](outputs(tasks.support), tasks.support_labels)
    return LOSSES[loop.loss](of_queries(network, tasks, outputs), tasks.query_labels)


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over each task's images: (B, I, K), (B, I) -> (B,)."""
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(dim=1)


LOSSES = {"cross_entropy": _cross_entropies, "mse": squared_errors}


def tasks_in_a_row(x: Tensor) -> bool:
    """Whether the tasks come one after the other, as suits a CPU, or side by side in the channels, as a GPU."""
    return x.device.type == "cpu"


def _outputs(module: nn.Module, theta: Parameters, x: Tensor, context: Context = TOGETHER) -> Tensor:
    """Every task by its own parameters. Of the network: images (B, I, C, H, W) -> logits (B, I, K)."""
    in_rows = tasks_in_a_row(x)
    mode, images = (in_a_row, x.flatten(0, 1)) if in_rows else (SideBySide, x.transpose(0, 1).flatten(1, 2))
    try:
        with mode(len(x)), context:
            y = _called(module, theta, images)
    except NotSideBySide:  # slower, for whatever vmap takes; right as long as all differentiation stays outside of it
        torch.backends.mha.set_fastpath_enabled(False)  # it has no derivative, and vmap hides that one is needed
        with context:
            return vmap(partial(_called, module))(theta, x)
    return y.unflatten(0, (len(x), -1)) if in_rows else y.unflatten(1, (len(x), -1)).transpose(0, 1)


def _called(module: nn.Module, theta: Parameters, x: Tensor) -> Tensor:
    """Its forward with these parameters, each put once into every layer that has it, by however many names."""
    names = {id(p): name for name, p in module.named_parameters()}
    layers = [(f"{place}." if place else "", layer) for place, layer in module.named_modules()]
    own = {place + key: names.get(id(p)) for place, layer in layers for key, p in layer._parameters.items()}
    of_places = {place: theta[name] for place, name in own.items() if name in theta}
    return functional_call(module, of_places, x, tie_weights=False)
