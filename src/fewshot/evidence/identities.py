"""The identities of docs/method.md 2.4 to 2.6, each as a number on this very model, and where they stop to hold.

Each compares the program itself (learner.py, automatic differentiation) with a closed form, or with what the theory
says must come out, on float64 copies of the model and on real tasks. The model is left as it is.

Shapes: B tasks, S support and Q query images per task, d features, K ways, N inner steps.
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot.data.task import Task
from fewshot.inner_loop import InnerLoop
from fewshot.maml import explicit_loss, sequential
from fewshot.models.head import zero_head
from fewshot.models.network import Network
from fewshot.theory.closed_forms import closed_form_gradients, contrastive_coefficients
from fewshot.theory.features import ROUNDING, Features, agreement

NONE = 0.0  # counts, and products with an exact zero: nothing is rounded
GRADIENT = 1e-10  # relative; what rounding becomes through convolutions and BatchNorm, as between the engines


@torch.no_grad()
def features(network: Network, tasks: Task) -> Features:
    return Features.of(network, tasks)


class Check(NamedTuple):
    """A statement that holds where value, how far it is from being true, is at most bound."""

    value: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.value <= self.bound  # False for nan


def zeroed(network: Network) -> Network:
    """A copy whose head is zero."""
    network = copy.deepcopy(network)
    zero_head(network.head)
    return network


def identities(network: Network, tasks: Task, *, inner_lr: float, inner_steps: int) -> dict[str, Check]:
    """What must hold: with a zeroed head (2.6), and the split of the gradients with this model's own (2.4, 2.5).

    network and tasks in float64; inner_steps is N of the split, everything else is about one step.
    """
    zero = zeroed(network)
    given = features(zero, tasks)
    return {
        "one_vector_is_none": _one_vector(zero, tasks, given, inner_lr),
        **_coefficients(zero, tasks, given, inner_lr),
        **_explicit_loss(zero, tasks, inner_lr),
        **_first_step(zero, tasks, given, inner_lr),
        **_predictions(zero, tasks, given, inner_lr),
        **_split(network, tasks, inner_lr, inner_steps),
    }


def limits(network: Network, tasks: Task, *, inner_lr: float, inner_steps: int) -> dict[str, Check]:
    """What one might expect to hold and what the theory says does not, measured alike (2.5, 2.6).

    network and tasks in float64; inner_steps: N > 1 of the statements about more than one step.
    """
    zero, more_steps = zeroed(network), {"inner_lr": inner_lr, "inner_steps": inner_steps}
    given = features(zero, tasks)
    later = contrastive_coefficients(given, **more_steps)[1:]  # C^(p), p >= 1
    q = _logits_after(zero, tasks, InnerLoop(inner_steps, inner_lr, first_order=True, adapted="head"))
    full, head_only = (
        _encoder_gradient(zero, sequential.meta_gradient, tasks, **more_steps, first_order=True, adapted=adapted)
        for adapted in ("all", "head")
    )
    own_full, own_head_only = (
        _encoder_gradient(
            network,
            sequential.meta_gradient,
            tasks,
            inner_lr=inner_lr,
            inner_steps=1,
            first_order=True,
            adapted=adapted,
        )
        for adapted in ("all", "head")
    )
    one_step = {"inner_lr": inner_lr, "inner_steps": 1, "first_order": False}
    exact = _encoder_gradient(network, sequential.meta_gradient, tasks, **one_step, adapted="head")
    terms = {"noise": True, "interference": True}
    papers = _encoder_gradient(network, explicit_loss.meta_gradient, tasks, **one_step, **terms)
    with torch.no_grad():
        P = network.head(given.support).softmax(-1)
    found = {
        "no_noise_beyond_one_step": Check(_largest(later - _without_noise(given, q.softmax(-1))), ROUNDING),
        "full_is_head_only_beyond_one_step": Check(_relative(full, head_only), GRADIENT),
        "full_is_head_only_with_this_head": Check(_relative(own_full, own_head_only), GRADIENT),
        "uniform_without_zeroing": Check(_largest(P - 1 / P.shape[-1]), ROUNDING),
        "papers_somaml_loss_with_this_head": Check(_relative(papers, exact), GRADIENT),
    }
    if network.head.bias is not None:
        P = network.head.bias.detach().softmax(-1)
        found["uniform_with_the_bias_kept"] = Check(_largest(P - 1 / len(P)), ROUNDING)
    return found


def _one_vector(zero: Network, tasks: Task, given: Features, inner_lr: float) -> Check:
    """What all rows of the head share cancels: predictions after a step from zero, and from one vector in every row."""
    shared = copy.deepcopy(zero)
    with torch.no_grad():
        shared.head.weight.copy_(F.normalize(given.support[0, :1]).expand_as(shared.head.weight))
    from_zero, from_one = (
        _logits_after(network, tasks, InnerLoop(1, inner_lr, first_order=True)).softmax(-1)
        for network in (zero, shared)
    )
    return Check(_largest(from_one - from_zero), ROUNDING)


def _coefficients(zero: Network, tasks: Task, given: Features, inner_lr: float) -> dict[str, Check]:
    """c_qs = 1[t=u] - q_t, with q as the program predicts it, and its sign."""
    (c,) = contrastive_coefficients(given, inner_lr=inner_lr, inner_steps=1)  # (B, Q, S)
    q = _logits_after(zero, tasks, InnerLoop(1, inner_lr, first_order=True)).softmax(-1)
    undecided = c.abs() <= ROUNDING  # a prediction so sure that its sign is rounding
    off = (((c > 0) != given.same_class()) & ~undecided).double().mean().item()
    return {
        "coefficient_is_free_of_noise": Check(_largest(c - _without_noise(given, q)), ROUNDING),
        "sign_of_coefficients": Check(off, NONE),
    }


def _explicit_loss(zero: Network, tasks: Task, inner_lr: float) -> dict[str, Check]:
    """The encoder's gradient by full MAML, by head-only MAML and by the explicit loss l(q), in both orders."""
    found = {}
    terms = {"noise": False, "interference": False}
    for order, first_order in (("fomaml", True), ("somaml", False)):
        knobs = {"inner_lr": inner_lr, "inner_steps": 1, "first_order": first_order}
        full, head_only = (
            _encoder_gradient(zero, sequential.meta_gradient, tasks, **knobs, adapted=adapted)
            for adapted in ("all", "head")
        )
        explicit = _encoder_gradient(zero, explicit_loss.meta_gradient, tasks, **knobs, **terms)
        found[f"{order}_is_the_explicit_loss"] = Check(_relative(explicit, full), GRADIENT)
        found[f"full_{order}_is_head_only"] = Check(_relative(head_only, full), GRADIENT)
    return found


def _first_step(zero: Network, tasks: Task, given: Features, inner_lr: float) -> dict[str, Check]:
    """A full inner step by differentiation: W_1 = (eta/K) (mu_k - mean_k mu_k), b_1 = 0, the encoder as it was."""
    K, weights, biases, encoders = zero.head.out_features, [], [], []
    for support, labels, mu in zip(tasks.support, tasks.support_labels, given.support_means(), strict=True):
        loss = F.cross_entropy(zero(support), labels)
        names, parameters = zip(*zero.named_parameters(), strict=True)
        gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        expected = inner_lr / K * (mu - mu.mean(0))
        weights.append(_relative(-inner_lr * gradients.pop("head.weight"), expected))
        biases.append(_largest(gradients.pop("head.bias", torch.zeros(K))))
        encoders += [_largest(gradient) for gradient in gradients.values()]
    found = {
        "inner_step_leaves_the_encoder": Check(_worst(encoders), NONE),
        "head_after_one_step": Check(_worst(weights), ROUNDING),
    }
    if zero.head.bias is not None:
        found["bias_after_one_step"] = Check(inner_lr * _worst(biases), ROUNDING)
    return found


def _predictions(zero: Network, tasks: Task, given: Features, inner_lr: float) -> dict[str, Check]:
    scores = given.prototype_scores()

    def apart(eta: float) -> float:
        logits = _logits_after(zero, tasks, InnerLoop(1, eta, first_order=True))
        return 1 - agreement(scores, logits).double().mean().item()

    untaught = _logits_after(zero, tasks, InnerLoop(0, inner_lr, first_order=True))
    right = (untaught.argmax(-1) == tasks.query_labels).sum().item()
    K, queries = zero.head.out_features, tasks.query_labels.numel()
    return {
        "step_0_accuracy": Check(abs(right * K - queries) / queries, NONE),
        "step_1_is_the_prototype_classifier": Check(apart(inner_lr), NONE),
        "step_1_independent_of_inner_lr": Check(_worst([apart(inner_lr / 10), apart(inner_lr * 10)]), NONE),
    }


def _split(network: Network, tasks: Task, inner_lr: float, inner_steps: int) -> dict[str, Check]:
    """Encoder and head gradient of head-only MAML from this head: by differentiation and through the features."""
    found = {}
    for order, first_order in (("fomaml", True), ("somaml", False)):
        knobs = {"inner_lr": inner_lr, "inner_steps": inner_steps, "first_order": first_order}
        expected = _gradient(network, sequential.meta_gradient, tasks, **knobs, adapted="head")
        by_closed_form = _gradient(network, _through_the_features, tasks, **knobs)
        found[f"{order}_split_with_this_head"] = Check(_relative(by_closed_form, expected), GRADIENT)
    return found


def _through_the_features(network: Network, tasks: Task, loop: InnerLoop) -> None:
    """Adds to .grad what <[dL/dPhi_Q], Phi_Q> + <[dL/dPhi_S], Phi_S> gives the encoder, and the head's own (2.5)."""
    head, given = network.head, Features.of(network, tasks)
    knobs = {"inner_lr": loop.inner_lr, "inner_steps": loop.inner_steps, "first_order": loop.first_order}
    closed = closed_form_gradients(given, **knobs)
    by_features = (closed.query_features * given.query).sum() + (closed.support_features * given.support).sum()
    (by_features / len(tasks.support)).backward()
    head.weight.grad = closed.weight.mean(0)
    if head.bias is not None:
        head.bias.grad = closed.bias.mean(0)


def _without_noise(given: Features, q: Tensor) -> Tensor:
    """1[t=u] - q_t, (B, Q, S); q (B, Q, K)."""
    return given.same_class().double() - q.gather(-1, given.support_labels[:, None].expand(-1, q.shape[1], -1))


def _logits_after(network: Network, tasks: Task, loop: InnerLoop) -> Tensor:
    """The queries' logits after the last inner step, (B, Q, K)."""
    return sequential.step_logits(network, tasks, loop, first=loop.inner_steps)[:, 0]


def _gradient(network: Network, meta_gradient: Callable, tasks: Task, **knobs: float | bool | str) -> Tensor:
    """What meta_gradient adds to .grad, as one vector, the head's part last."""
    network.zero_grad(set_to_none=True)
    meta_gradient(network, tasks, InnerLoop(**knobs))
    parts = [p.grad.flatten() for module in (network.encoder, network.head) for p in module.parameters()]
    network.zero_grad(set_to_none=True)
    return torch.cat(parts)


def _encoder_gradient(network: Network, meta_gradient: Callable, tasks: Task, **knobs: float | bool | str) -> Tensor:
    heads = sum(p.numel() for p in network.head.parameters())
    return _gradient(network, meta_gradient, tasks, **knobs)[:-heads]


def _largest(differences: Tensor) -> float:
    return differences.abs().max().item()


def _worst(values: list[float]) -> float:
    """The largest; unlike max, nan where there is one."""
    return torch.tensor(values, dtype=torch.double).max().item()


def _relative(found: Tensor, expected: Tensor) -> float:
    difference, size = (found - expected).norm().item(), expected.norm().item()
    return difference / size if size else math.inf if difference else 0.0
