"""Whether an algorithm of one's own is the same in both engines: python -m fewshot.check_algorithm my.module.MyLoop

It is compared on small random tasks in float64 with the loop as plain autograd has it, which is written out here.
"""

import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from fewshot.algorithms.fitting import two
from fewshot.config.advice import configuration
from fewshot.config.command import Command, Parameter, one_line_errors, read
from fewshot.errors import UserError
from fewshot.inner_loop import ORDERS, InnerLoop, Tensors

if TYPE_CHECKING:
    from fewshot.data.task import Task
    from fewshot.models.network import Network

TOLERANCE = 1e-8  # relative, in float64: rounding, as conjugate gradients or a root near zero enlarge it
TASKS, WAYS, SHOTS, QUERIES, SIZE = 3, 3, 2, 2, 9

COMMAND = Command(
    "check-algorithm",
    "compares the two engines with each other and with plain autograd, in first and second order.",
    {
        "my.module.MyLoop": Parameter("The class, as algo._target_ has it; left out: that of algo=NAME.", None),
        "algo=NAME": Parameter("The algorithm whose other knobs it has; left out: fomaml.", None),
    },
    knobs=True,
)


def main(arguments: list[str] | None = None) -> None:
    with one_line_errors():
        words = sys.argv[1:] if arguments is None else arguments
        named = [f"algo._target_={word}" for word in words[:1] if "=" not in word and not word.startswith("-")]
        overrides = [*read(COMMAND, words[len(named) :]).knobs, *named]
        if not any(word.startswith(("algo=", "algo._target_=")) for word in overrides):
            raise UserError("which algorithm? Give its class, my.module.MyLoop, or algo=NAME")
        if not check(overrides):
            raise SystemExit(1)


def check(overrides: list[str]) -> bool:
    """Prints a line for each order, and returns whether all that was compared is the same."""
    cfg = configuration(overrides)
    from fewshot.config.check import check_knobs
    from fewshot.training.learner import inner_loop

    check_knobs(cfg)
    loops, refused = {}, {}
    for first_order, order in ORDERS.items():
        cfg.algo.first_order = first_order
        try:
            loops[order] = inner_loop(cfg)
        except UserError as error:
            refused[order] = error
    if not loops:
        raise next(iter(refused.values()))
    for order, error in refused.items():
        print(f"{order}: not compared ({error})")
    return not [order for order, loop in loops.items() if not _compared(order, loop)]


def _compared(order: str, loop: InnerLoop) -> bool:
    if loop.learned_inner_lr:
        raise UserError("algo.learned_inner_lr=true: is compared by this program's own tests; leave it out here")
    from fewshot.batched import engine as batched
    from fewshot.training.choose_engine import sequential_engine

    engines = {
        "engine=sequential": sequential_engine("check-algorithm").meta_gradient,
        "engine=batched": batched.meta_gradient,
        "engine=batched, one task at a time": partial(batched.meta_gradient, tasks_at_once=1),
    }
    largest, wrong = 0.0, []
    tasks = _tasks()
    for zeroing in (False,) if loop.makes_head or loop.adapted == "encoder" else (False, True):
        network = _network(zeroing)
        for recompute in (False, True):
            one = replace(loop, zeroing=zeroing, recompute_steps=recompute)
            expected = _plain(network, tasks, one)
            for engine, meta_gradient in engines.items():
                network.zero_grad(set_to_none=True)
                measured = meta_gradient(network, tasks, one)
                gradients = {name: p.grad for name, p in network.named_parameters()}
                said = engine + ", zeroing" * zeroing + ", recompute_steps" * recompute
                apart = _apart(expected, gradients | dict(enumerate((measured[0], *measured[2:]))), one)
                largest = max(largest, *apart.values())
                wrong += [f"{said}: {name} is {by:.1e} apart" for name, by in apart.items() if not by < TOLERANCE]
    name = f"{type(loop).__name__}, {order}"
    if wrong:
        print(f"{name}: NOT the same as plain autograd\n  " + "\n  ".join(wrong))
    else:
        print(f"{name}: both engines and plain autograd are the same to {largest:.0e}, with recompute_steps too")
    return not wrong


def _network(zeroing: bool) -> "Network":
    import torch
    from torch import nn

    from fewshot.models.head import zero_head
    from fewshot.models.network import Network

    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.Tanh(), nn.Flatten())
    network = Network(encoder, 12, WAYS).double()
    if zeroing:
        zero_head(network.head)
    return network


def _tasks() -> "Task":
    import torch

    from fewshot.data.task import Task

    draw = torch.Generator().manual_seed(0)
    images = [torch.randn(TASKS, WAYS * number, 1, SIZE, SIZE, generator=draw).double() for number in (SHOTS, QUERIES)]
    labels = [torch.arange(WAYS).repeat_interleave(number).expand(TASKS, -1) for number in (SHOTS, QUERIES)]
    return Task(images[0], labels[0], images[1], labels[1])


def _plain(network: "Network", tasks: "Task", loop: InnerLoop) -> dict[Any, Any]:
    """The outer gradient by name, and by number the query losses and what the algorithm measures, by plain autograd."""
    import torch

    of_tasks = [_plain_task(network, task, loop) for task in tasks.one_by_one()]
    gradients = {name: sum(gradient[name] for gradient, _ in of_tasks) / len(of_tasks) for name in of_tasks[0][0]}
    return gradients | dict(enumerate(map(torch.stack, zip(*(numbers for _, numbers in of_tasks), strict=True))))


def _plain_task(network: "Network", task: "Task", loop: InnerLoop) -> tuple[Tensors, list]:
    import torch
    from torch.func import functional_call

    from fewshot.maml.sequential import LOSSES
    from fewshot.models.head import initial_head

    def at(theta: Tensors, images: Any, labels: Any) -> Any:
        return LOSSES[loop.loss](functional_call(network, theta, images), labels)

    def encoder(theta: Tensors) -> Any:
        inside = {name.removeprefix("encoder."): w for name, w in theta.items() if name.startswith("encoder.")}
        return partial(functional_call, network.encoder, inside)

    support = partial(at, images=task.support, labels=task.support_labels)
    query = partial(at, images=task.query, labels=task.query_labels)
    theta = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}
    begun = theta | loop.start(theta, encoder(theta), task.support, task.support_labels)
    head = {name.removeprefix("head."): w for name, w in begun.items() if name.startswith("head.")}
    made = initial_head(loop, head, encoder(begun), task.support, task.support_labels)
    begun |= {f"head.{name}": w for name, w in made.items()}

    differentiated = not loop.first_order and not loop.overrides("outer_gradient")
    theta_n = {name: w.clone() if differentiated else w.detach().requires_grad_() for name, w in begun.items()}
    before, state = theta_n, None
    for _ in range(loop.inner_steps):
        moves = [name for name in theta_n if loop.adapted in ("all", name.split(".")[0])]
        theta_n = {name: w if w.requires_grad else w.requires_grad_() for name, w in theta_n.items()}
        gradients = torch.autograd.grad(
            support(theta_n), [theta_n[name] for name in moves], create_graph=differentiated
        )
        moving = {name: theta_n[name] for name in moves}
        made = loop.update(moving, dict(zip(moves, gradients, strict=True)), state)
        step, state = two(loop, "update", made)
        after = theta_n | {name: theta_n[name] + step[name] for name in moves}
        theta_n = after if differentiated else {name: w.detach().requires_grad_() for name, w in after.items()}

    loss, measured = query(theta_n), {}
    gradients: Any = {}
    if loop.overrides("outer_gradient"):
        made = loop.outer_gradient(before, theta_n, support, query)
        gradients, measured = two(loop, "outer_gradient", made)
    elif not differentiated:
        gradients = dict(zip(theta_n, torch.autograd.grad(loss, list(theta_n.values())), strict=True))
    if differentiated:
        outer = torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)
    else:  # back to where theta was
        outer = torch.autograd.grad(
            list(begun.values()), list(theta.values()), [gradients[name] for name in begun], materialize_grads=True
        )
    outer = [gradient.detach() for gradient in outer]
    return dict(zip(theta, outer, strict=True)), [loss.detach(), *(measured[name].detach() for name in loop.measures)]


def _apart(expected: dict[Any, Any], measured: dict[Any, Any], loop: InnerLoop) -> dict[str, float]:
    """How far two gradients, losses or measures are apart relative to their size, by their names."""
    names: dict[Any, str] = {0: "the query loss"} | dict(enumerate(loop.measures, 1))
    apart = {}
    size = sum(float(value.norm()) ** 2 for name, value in expected.items() if isinstance(name, str)) ** 0.5
    for name, value in expected.items():
        if isinstance(name, str) and name.startswith("head.") and (loop.zeroing or loop.makes_head):
            continue  # nothing reads it
        whole = size if isinstance(name, str) else float(value.norm())
        apart[names.get(name, name)] = float((measured[name] - value).norm()) / (whole or 1.0)
    return apart


if __name__ == "__main__":
    main()
