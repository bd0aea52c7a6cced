"""How both engines call what an algorithm of one's own overrides; of the paper's algorithms none comes here.

Parameters are by name: those of one task, or of B tasks with a leading B. Shapes: S support and Q query images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fewshot.algorithms.fitting import fitting, method, two
from fewshot.errors import UserError
from fewshot.inner_loop import InnerLoop, Tensors

LossOf = Callable[[Tensors, bool], Tensor]  # parameters, and whether of the support or the queries, to (), or (B,)
RECORDED = {"loss", "query_accuracy", "gradient_norm"}  # in metrics.csv, of every algorithm
PLAIN = (Tensor, Number, str, type(None))  # what a state is made of, beside lists, tuples and dictionaries
_MADE = object()
Step = Callable[[Sequence[Tensor], Any], tuple[list[Tensor], Any]]  # theta_n and the state to the next ones


def start(
    loop: InnerLoop, theta: Tensors, encode: Callable[[Tensor], Tensor], support: Tensor, labels: Tensor
) -> list[Tensor]:
    """The parameters that a task begins with, in the order of theta."""
    begun = fitting(loop, "start", loop.start(theta, encode, support, labels), theta, all_of_them=False)
    # A view: where one tensor is given to two parameters, each goes its own way.
    return [w.view_as(w) if w.requires_grad else w.view_as(w).requires_grad_() for w in (theta | begun).values()]


def update(loop: InnerLoop, theta: Tensors, loss: Tensor, state: Any) -> tuple[Tensors, Any]:
    """What an inner step adds to theta_n, and the state after it; in first order neither has a derivative.

    theta: theta_n of what moves; loss: L(theta_n, S_n), summed over the tasks.
    """
    gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=not loop.first_order)
    with torch.set_grad_enabled(not loop.first_order):
        made = loop.update(theta, dict(zip(theta, gradients, strict=True)), state)
    updates, state = two(loop, "update", made)
    return fitting(loop, "update", updates, theta), state


def recomputed(
    loop: InnerLoop, again: Callable[..., Any], step: Step, theta_n: Sequence[Tensor], state: Any
) -> tuple[list, Any]:
    """step(theta_n, state) by recompute.py, which keeps no more than its inputs: they include the state's tensors.

    again: recompute.recomputed with its `draws`. What a step hands on unchanged, such as learned rates, is no output.
    """
    leaves, form = pytree.tree_flatten(state)
    if odd := [leaf for leaf in leaves if not isinstance(leaf, PLAIN)]:
        raise UserError(
            f"recompute_steps=true: the state of {method(loop, 'update')} has a {type(odd[0]).__name__}, in which "
            "tensors would not be found; use tensors, numbers, and lists or dictionaries of them"
        )
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    after: list[Any] = []  # the state after the step, in parts, with _MADE for its tensors, whose graph is not kept

    def function(inputs: Sequence[Tensor]) -> list[Tensor]:
        inside = inputs[len(theta_n) :]
        rest, same = iter(inside), {id(tensor): outside for tensor, outside in zip(inside, tensors, strict=True)}
        before = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        theta, state = step(inputs[: len(theta_n)], pytree.tree_unflatten(before, form))
        parts, form_after = pytree.tree_flatten(state)
        made = [part for part in parts if isinstance(part, Tensor) and id(part) not in same]
        parts = [same.get(id(part), _MADE) if isinstance(part, Tensor) else part for part in parts]
        after[:] = parts, form_after
        return [*theta, *made]

    outputs = again(function, [*theta_n, *tensors])
    made = iter(outputs[len(theta_n) :])
    parts = [next(made) if part is _MADE else part for part in after[0]]
    return outputs[: len(theta_n)], pytree.tree_unflatten(parts, after[1])


def inner(loop: InnerLoop) -> InnerLoop:
    """The inner loop as the engines run it: in first order where the algorithm has an outer gradient of its own."""
    return replace(loop, first_order=True) if loop.overrides("outer_gradient") else loop


def outer(loop: InnerLoop, theta: Tensors, theta_N: Tensors, loss_of: LossOf, task: Any) -> tuple[Tensor, list[Tensor]]:
    """A number whose derivative by theta, where a task begins, is loop.outer_gradient; and what it measures.

    task: has support, support_labels, query and query_labels.
    """
    before, after = ({name: w.detach().requires_grad_() for name, w in theta.items()} for theta in (theta, theta_N))
    made = loop.outer_gradient(before, after, lambda at: loss_of(at, True), lambda at: loss_of(at, False))
    gradients, measured = two(loop, "outer_gradient", made)
    gradients = fitting(loop, "outer_gradient", gradients, theta)
    by = method(loop, "outer_gradient")
    if not isinstance(measured, Mapping) or {*measured} != {*loop.measures}:
        said = sorted(measured) if isinstance(measured, Mapping) else type(measured).__name__
        raise UserError(f"{by}: measures {said}; its class says {loop.measures}")
    if taken := {*measured} & RECORDED:
        raise UserError(f"{by}: measures {min(taken)}, which every run records under that name; name it otherwise")
    if odd := [name for name in loop.measures if not (name.isascii() and name.isidentifier())]:
        raise UserError(f"{by}: measures {odd[0]!r}; give it a name of letters, digits and _, for metrics.csv")
    shape = task.support_labels.shape[:-1]
    for name, value in measured.items():
        if not (isinstance(value, Tensor) and value.is_floating_point() and value.shape == shape):
            kind = f"{value.dtype} of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"{by}: its {name} is a {kind}; it must be floats of {tuple(shape)}, one for each task")
    tasks = len(shape)
    products = (theta[name] * gradients[name].detach() for name in theta)
    total: Any = sum(product.reshape(*product.shape[:tasks], -1).sum(-1) for product in products)
    return total, [measured[name].detach() for name in loop.measures]
