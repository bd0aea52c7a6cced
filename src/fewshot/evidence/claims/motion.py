"""Where an outer step really moves the features: panel 3 of the poster, asked of the encoder that serves all images."""

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fewshot.data.task import Task
from fewshot.evidence import page
from fewshot.evidence.claims.outer_step import ORDERS, panels, plane_of
from fewshot.evidence.model import Model, plain
from fewshot.theory.closed_forms import closed_form_gradients
from fewshot.theory.features import encode

LENGTH = 1e-6  # of a step, whatever the gradient's is: so small that features move as their derivative says
STILL = page.Verdict("untested", "not tested: this model’s outer gradient is zero, so that nothing moves")


def measure(model: Model) -> page.Evidence:
    """For every task the encoder takes a small SGD step; how far and where its features move, divided by rho.

    query, support: mean length of an image's motion; same_class, other_class: mean change of phi(q).phi(s);
    same_class_drawn, other_class_pushed: share of the pairs that it changes the right way; as_drawn: cosine of the
    queries' motion and the way against the features' own gradient, which the poster draws. Arrows: as in outer_step.
    """
    few = model.on_few_tasks
    return {
        "motion": {
            head: {order: _of(own, first_order) for order, first_order in ORDERS.items()}
            for head, own in few.by_head.items()
        }
    }


def _of(own: Model, first_order: bool) -> page.Evidence:
    features = own.features
    tasks = [Task(*(field[i : i + 1] for field in own.tasks)) for i in range(len(features.query))]
    moved = [_motion(replace(own, tasks=task), first_order) for task in tasks]
    to_Q, to_S = (torch.cat(both) for both in zip(*moved, strict=True))
    change = to_Q @ features.support.mT + features.query @ to_S.mT  # of phi(q).phi(s), (B, Q, S)
    against = -closed_form_gradients(features, **own.knobs, first_order=first_order).query_features
    same, (_, plane, _) = features.same_class(), plane_of(features)
    return {
        "query": to_Q.norm(dim=-1).mean().item(),
        "support": to_S.norm(dim=-1).mean().item(),
        "same_class": change[same].mean().item(),
        "other_class": change[~same].mean().item(),
        "same_class_drawn": (change > 0)[same].double().mean().item(),
        "other_class_pushed": (change < 0)[~same].double().mean().item(),
        "as_drawn": F.cosine_similarity(to_Q.flatten(1), against.flatten(1)).mean().item(),
        "query_arrows": plain(to_Q[0] @ plane),
        "support_arrows": plain(to_S[0] @ plane),
    }


@torch.no_grad()
def _motion(alone: Model, first_order: bool) -> tuple[Tensor, Tensor]:
    """How queries and support of the one task move, (1, Q, d) and (1, S, d): their derivative along the step."""
    knobs = {"inner_steps": alone.loop.inner_steps, "adapted": alone.loop.adapted, "first_order": first_order}
    with torch.enable_grad():
        gradient = alone.encoder_gradient(**knobs)
    scale = gradient.abs().max().clamp(min=torch.finfo(gradient.dtype).tiny)  # squares of what is tiny would be zero
    direction = F.normalize(gradient / scale, dim=0)
    moved = copy.deepcopy(alone.network)
    theta, step = parameters_to_vector(moved.encoder.parameters()), LENGTH * direction
    phi = []
    for there in (theta - step, theta + step):  # the difference of both is the derivative up to third order
        vector_to_parameters(there, moved.encoder.parameters())
        phi.append(encode(moved, alone.tasks))
    (phi_S, phi_Q), (back_S, back_Q) = phi
    per_rho = gradient @ direction / (2 * LENGTH)
    return per_rho * (phi_Q - back_Q), per_rho * (phi_S - back_S)


def draw(evidence: page.Evidence, shown: page.Shown) -> Figure:
    """The poster's drawing above, the motion below."""
    head = "zeroed_head" if page.head_is_zero(evidence) else "this_head"
    rows = {"as drawn": evidence["outer_step"][head], "as it moves": evidence["motion"][head]}
    return panels(evidence["outer_step"], rows, shown, to_scale="as it moves")


def section(evidence: page.Evidence) -> page.Section:
    motion = evidence["motion"]
    rows = [
        (
            f"{order.upper()}, {name}",
            *(page.short(of_order[key]) for key in ("query", "support")),
            *(page.percent(of_order[key]) for key in ("same_class_drawn", "other_class_pushed")),
            page.decimals(of_order["as_drawn"]),
        )
        for head, name in page.HEADS.items()
        for order in ORDERS
        if (of_order := motion[head][order])
    ]
    heads = ("", "queries move", "support moves", "same class drawn", "other classes pushed", "as drawn")
    return page.Section(
        overline="The contrastive perspective, as it happens",
        claim="The encoder moves support features too, whatever the order",
        lead="The poster’s third panel draws the features’ own gradient. But features do not move by themselves: an "
        "outer step moves the encoder, which serves all images at once. So the encoder takes a small step on a task, "
        "and its features are compared before and after.",
        theorem="A small step θ ← θ − ρg moves every feature φ(x) by −ρJ(x)g, J(x) being the encoder’s derivative at "
        "image x. FOMAML’s g is made of the queries alone, but a support feature stands still only where J(s)g = 0, "
        "which an encoder that shares its weights between images does not give (§2.11).",
        picture=page.Picture(
            "motion",
            "Features of a task with arrows, as the poster draws them above and as they move below",
            "The features of one test task, as in the picture of the outer step. Above: against the features’ "
            "own gradient, queries and support with a scale each. Below: the motion of the same features when the "
            "encoder takes a small step, both with one scale, which is each panel’s own.",
        ),
        tables=[page.Table(heads, rows)],
        note=f"A step of SGD on one task, {evidence['tasks']['gradients']} tasks, the inner loop as in training. "
        "Lengths are means over images, divided by the step’s size. The next two columns count the pairs of a query "
        "and a support image whose inner product changes the right way. The last is the cosine of the queries’ motion "
        "and the way that the poster draws.",
    )


def verdict(evidence: page.Evidence) -> page.Verdicts:
    """Whether the support stands still, and whether pairs move the right way, in both orders with this head."""
    motion, verdicts = evidence["motion"]["this_head"], {}
    about = "FOMAML leaves support features where they are."
    if motion["fomaml"]["query"]:
        ratio = motion["fomaml"]["support"] / motion["fomaml"]["query"]
        verdicts[about] = page.either(ratio < 0.01, f"they move {page.decimals(ratio)} as far as the queries")
    else:
        verdicts[about] = STILL
    for order in ORDERS:
        about = f"{order.upper()}’s step moves pairs the right way."
        if not motion[order]["query"]:
            verdicts[about] = STILL
            continue
        drawn, pushed = (motion[order][key] for key in ("same_class_drawn", "other_class_pushed"))
        words = (
            f"{page.percent(drawn)} of the pairs of a class are drawn together, {page.percent(pushed)} of others apart"
        )
        verdicts[about] = page.by_share(min(drawn, pushed), words)
    return verdicts
