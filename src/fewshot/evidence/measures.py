"""What the poster's panels and questions speak of, as numbers on a model (docs/method.md 0).

Network and tasks in float64; the model is left as it is. Everything comes back as plain numbers and lists. Where two
heads are measured, "this_head" is the model's own and "zeroed_head" that of the same model after zeroing.

Shapes: B tasks, S support and Q query images per task, d features, K ways, N inner steps, T steps of the evaluation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot.data.task import Task
from fewshot.evidence.identities import ROUNDING, features
from fewshot.inner_loop import InnerLoop
from fewshot.maml import sequential
from fewshot.models.network import Network
from fewshot.theory.closed_forms import adapt_head, closed_form_gradients, contrastive_coefficients
from fewshot.theory.features import Features, agreement, centred, class_similarities, cosines, mean_cosines, tied
from fewshot.theory.probes import probes


def heads(given: Features) -> dict[str, Features]:
    return {"this_head": given, "zeroed_head": given.zeroed()}


def same_for_all(given: Features) -> dict[str, bool]:
    """Whether all classes have one weight vector, and one bias: then they have no effect, as if they were zero."""
    bias = given.weight.new_zeros(len(given.weight)) if given.bias is None else given.bias
    return {"weight": not centred(given.weight).any(), "bias": not centred(bias[:, None]).any()}


def motivating_example(given: Features, *, inner_lr: float) -> dict[str, Any]:
    """One inner step on torch's mean squared error from a zero head without bias (2.1).

    classifier: cosines of the classifier's K columns and the K classes' support features, of the first task; logits
    and inner_products: of its first query of each class, (K, K) each; *_error: the worst relative one of all tasks;
    same_class, other_class: mean logits of all tasks; tasks_where_own_is_larger: in how many the former is the larger.
    """
    phi_S, labels_S, phi_Q, labels_Q, weight, _ = given
    K = len(weight)
    eta = 2 * inner_lr / (phi_S.shape[1] * K)  # of 1/2 the sum, what inner_lr is of the mean
    W = phi_S.new_zeros(len(phi_S), K, phi_S.shape[2], requires_grad=True)
    each = F.mse_loss(phi_S @ W.mT, F.one_hot(labels_S, K).double(), reduction="none").mean((1, 2))
    W_1 = -inner_lr * torch.autograd.grad(each.sum(), W)[0]
    m = given.support_sums()
    logits, products = phi_Q @ W_1.mT, eta * phi_Q @ m.mT
    own = F.one_hot(labels_Q, K).bool()
    chosen = [(labels_Q[0] == k).nonzero()[0].item() for k in range(K)]
    same, other = ((logits * which).sum((1, 2)) / which.sum((1, 2)) for which in (own, ~own))  # of each task
    return {
        "inner_lr": eta,
        "classifier": _plain(cosines(W_1[0], m[0])),
        "logits": _plain(logits[0, chosen]),
        "inner_products": _plain(products[0, chosen]),
        "classifier_error": _error(W_1, eta * m),
        "logits_error": _error(logits, products),
        "same_class": logits[own].mean().item(),
        "other_class": logits[~own].mean().item(),
        "tasks": len(logits),
        "tasks_where_own_is_larger": int((same > other).sum()),
    }


def outer_step(given: Features, *, inner_lr: float, inner_steps: int) -> dict[str, Any]:
    """Where an outer step moves the features of the first task, in the plane that shows most of their spread (panel 3).

    support, query: places (S, 2), (Q, 2). For each head and order "arrows" against the gradient, likewise; norm of the
    support's and the query's gradient; and of all tasks the share of pairs (q, s) whose inner product the step, if
    small, moves the right way: up within a class, down across.
    """
    phi = torch.cat([given.support[0], given.query[0]])
    _, spread, axes = torch.linalg.svd(phi - phi.mean(0), full_matrices=False)
    plane = axes[:2] * torch.where(axes[:2].sum(1) < 0, -1.0, 1.0)[:, None]  # one picture, whatever signs svd chose

    def places(vectors: Tensor) -> list:
        return _plain(F.pad(vectors @ plane.mT, (0, 2 - len(plane))))  # of a single feature, a line

    found: dict[str, Any] = {
        "spread_shown": (spread[:2].square().sum() / spread.square().sum()).item(),
        "support": places(given.support[0] - phi.mean(0)),
        "query": places(given.query[0] - phi.mean(0)),
    }
    same = given.same_class()
    for name, each in heads(given).items():
        found[name] = {}
        for order, first_order in (("fomaml", True), ("somaml", False)):
            moved = closed_form_gradients(each, inner_lr=inner_lr, inner_steps=inner_steps, first_order=first_order)
            to_Q, to_S = -moved.query_features, -moved.support_features
            change = to_Q @ given.support.mT + given.query @ to_S.mT  # of phi(q).phi(s), (B, Q, S)
            found[name][order] = {
                "query_arrows": places(to_Q[0]),
                "support_arrows": places(to_S[0]),
                "query_norm": to_Q.flatten(1).norm(dim=1).mean().item(),
                "support_norm": to_S.flatten(1).norm(dim=1).mean().item(),
                "same_class_drawn": (change > 0)[same].double().mean().item(),
                "other_class_pushed": (change < 0)[~same].double().mean().item(),
            }
    return found


def coefficients(given: Features, *, inner_lr: float, inner_steps: int) -> dict[str, Any]:
    """C of the first task, (Q, S), where its sign is wrong, [q, s], and the share of wrong signs in all tasks (2.3).

    Of all pairs and of those of different classes, for within a class no sign is wrong. Of one step from this head and
    from a zeroed one, and the sum over inner_steps > 1 steps from a zeroed one.
    """
    found = {"inner_steps": inner_steps}
    zero, same = given.zeroed(), given.same_class()
    for name, each, steps in (("this_head", given, 1), ("zeroed_head", zero, 1), ("more_steps", zero, inner_steps)):
        c = contrastive_coefficients(each, inner_lr=inner_lr, inner_steps=steps).sum(0)
        wrong = ((c > 0) != same) & (c.abs() > ROUNDING)  # of a smaller one rounding has made the sign
        found[name] = {
            "first_task": _plain(c[0]),
            "first_task_wrong": wrong[0].nonzero().tolist(),
            "wrong_sign": wrong.double().mean().item(),
            "wrong_among_other": wrong[~same].double().mean().item(),
        }
    return found


def similarity(network: Network, tasks: Task, given: Features, initial: Network) -> dict[str, Any]:
    """Cosines between the classes of the first task, (K, K), and of all tasks: means, now and of the initial network.

    tasks_where_the_gap_grew: in how many same class less other class is larger than it was.
    """
    same, other = mean_cosines(given.query, given.support, given.same_class())
    then = features(initial, tasks)
    same_then, other_then = mean_cosines(then.query, then.support, then.same_class())
    return {
        "first_task": class_similarities(network, Task(*(field[0] for field in tasks))),
        "same_class": same.mean().item(),
        "other_class": other.mean().item(),
        "tasks": len(same),
        "initially_same_class": same_then.mean().item(),
        "initially_other_class": other_then.mean().item(),
        "tasks_where_the_gap_grew": int((same - other > same_then - other_then).sum()),
    }


def memory(given: Features, *, inner_lr: float) -> dict[str, Any]:
    """Q2: cosines of the K columns of w, less their mean, and the K classes' support means, before and after one step.

    "first_task" (K, K); "same_class" and "other_class" means of all tasks; "nearest_is_own": the share of the columns
    that are closer to their own class's mean than to any other's. Where nothing is left of the columns there are none.
    """
    mu, found = given.support_means(), {}
    for name, each in heads(given).items():
        w = each.weight
        after = adapt_head(each, inner_lr=inner_lr, inner_steps=1).weight
        for moment, W in (("before", w.expand_as(after)), ("after", after)):
            W = centred(W)
            found[f"{name}_{moment}"] = _column_cosines(W, mu) if W.any() else None
    return found


def _column_cosines(W: Tensor, mu: Tensor) -> dict[str, Any]:
    cosine = cosines(W, mu)  # (B, K, K)
    own = torch.eye(cosine.shape[-1], dtype=torch.bool).expand_as(cosine)
    return {
        "first_task": _plain(cosine[0]),
        "same_class": cosine[own].mean().item(),
        "other_class": cosine[~own].mean().item(),
        "nearest_is_own": tied(cosine)[own].double().mean().item(),
    }


def prototypes(
    network: Network, tasks: Task, given: Features, *, inner_lr: float, steps: int, adapted: str
) -> dict[str, Any]:
    """Q3: the share of the queries that the adapted model and the prototype classifier give one class, 1 .. T steps.

    accuracy: of the prototype classifier, which chooses the first of a tie; ties: queries for which it has one.
    """
    scores = given.prototype_scores()
    found: dict[str, Any] = {
        "queries": tasks.query_labels.numel(),
        "ties": int((tied(scores).sum(-1) > 1).sum()),
        "accuracy": (scores.argmax(-1) == tasks.query_labels).double().mean().item(),
    }
    for name, zeroing in (("this_head", False), ("zeroed_head", True)):
        loop = InnerLoop(steps, inner_lr, first_order=True, zeroing=zeroing, adapted=adapted)
        logits = sequential.step_logits(network, tasks, loop)  # (B, T + 1, Q, K)
        found[name] = agreement(scores[:, None].expand_as(logits), logits)[:, 1:].double().mean((0, 2)).tolist()
    return found


def measure(
    network: Network, tasks: Task, *, initial: Network, inner_lr: float, inner_steps: int, steps: int, adapted: str
) -> dict[str, Any]:
    """All of the above. initial: the network before training; inner_steps: N in training; steps: T."""
    knobs, given = {"inner_lr": inner_lr, "inner_steps": inner_steps}, features(network, tasks)
    return {
        "same_for_all": same_for_all(given),
        "motivating_example": motivating_example(given, inner_lr=inner_lr),
        "outer_step": outer_step(given, **knobs),
        "coefficients": coefficients(given, inner_lr=inner_lr, inner_steps=max(2, inner_steps)),
        "similarity": similarity(network, tasks, given, initial),
        "memory": memory(given, inner_lr=inner_lr),
        "prototypes": prototypes(network, tasks, given, inner_lr=inner_lr, steps=steps, adapted=adapted),
        "probes": probes(network, [tasks], **knobs),
    }


def _error(found: Tensor, expected: Tensor) -> float:
    """The worst relative difference of a task."""
    return ((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max().item()


def _plain(numbers: Tensor) -> list:
    """As lists, to six digits."""
    return [[float(f"{value:.6g}") for value in row] for row in numbers.tolist()]
