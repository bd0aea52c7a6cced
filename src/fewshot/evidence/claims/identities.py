"""With a zeroed head and one inner step, MAML is supervised contrastive learning (docs/method.md 2.4 to 2.6)."""

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from fewshot.evidence.equations import (
    GRADIENT,
    NONE,
    Equation,
    largest,
    measured,
    relative,
    verdict_on,
    without_noise,
    worst,
)
from fewshot.evidence.model import Model
from fewshot.evidence.section import Section, Statement, Statements, Verdict, Verdicts, counted_steps
from fewshot.theory.closed_forms import closed_form_gradients, contrastive_coefficients
from fewshot.theory.features import ROUNDING, Features, agreement


def _one_vector(zero: Model) -> float:
    shared = replace(zero, network=copy.deepcopy(zero.network))
    with torch.no_grad():
        weight = shared.network.head.weight
        weight.copy_(F.normalize(zero.features.support[0, :1]).expand_as(weight))
    return largest(shared.predictions() - zero.predictions())


def _coefficients(zero: Model) -> torch.Tensor:
    """(B, Q, S)"""
    return contrastive_coefficients(zero.features, inner_lr=zero.loop.inner_lr, inner_steps=1)[0]


def _signs(zero: Model) -> float:
    c = _coefficients(zero)
    undecided = c.abs() <= ROUNDING  # a prediction so sure that its sign is rounding
    return (((c > 0) != zero.features.same_class()) & ~undecided).double().mean().item()


def _full_and_explicit(first_order: bool) -> Any:
    order, terms = {"first_order": first_order}, {"noise": False, "interference": False}
    return lambda zero: relative(
        zero.encoder_gradient(**order, **terms, adapted="head"), zero.encoder_gradient(**order)
    )


def _full_and_head_only(first_order: bool) -> Any:
    order = {"first_order": first_order}
    return lambda zero: relative(zero.encoder_gradient(**order, adapted="head"), zero.encoder_gradient(**order))


def _inner_gradients(zero: Model) -> list[dict[str, torch.Tensor]]:
    """Of the support loss of each task, by differentiation; by name."""
    names, parameters = zip(*zero.network.named_parameters(), strict=True)
    losses = (
        F.cross_entropy(zero.network(images), labels)
        for images, labels in zip(zero.tasks.support, zero.tasks.support_labels, strict=True)
    )
    return [dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)) for loss in losses]


def _inner_gradient_of_encoder(zero: Model) -> float:
    gradients = [
        gradient for task in _inner_gradients(zero) for name, gradient in task.items() if name.startswith("encoder.")
    ]
    return worst([largest(gradient) for gradient in gradients])


def _adapted_weight(zero: Model) -> float:
    eta, mu = zero.loop.inner_lr, zero.features.support_means()
    expected = eta / mu.shape[1] * (mu - mu.mean(1, keepdim=True))
    pairs = zip(_inner_gradients(zero), expected, strict=True)
    return worst([relative(-eta * task["head.weight"], W_1) for task, W_1 in pairs])


def _adapted_bias(zero: Model) -> float | None:
    if zero.network.head.bias is None:
        return None
    return zero.loop.inner_lr * worst([largest(task["head.bias"]) for task in _inner_gradients(zero)])


def _untaught_accuracy(zero: Model) -> float:
    right = (zero.logits(inner_steps=0).argmax(-1) == zero.tasks.query_labels).sum().item()
    queries = zero.tasks.query_labels.numel()
    return abs(right * len(zero.features.weight) - queries) / queries


def _from_prototypes(*factors: float) -> Any:
    def apart(zero: Model) -> float:
        scores, eta = zero.features.prototype_scores(), zero.loop.inner_lr
        agree = [agreement(scores, zero.logits(inner_lr=eta * factor)).double().mean().item() for factor in factors]
        return worst([1 - share for share in agree])

    return apart


def _split(first_order: bool) -> Any:
    """Encoder and head gradient of head-only MAML: by differentiation and through the features."""

    def apart(own: Model) -> float:
        knobs = {"inner_steps": own.loop.inner_steps, "first_order": first_order}
        expected, head = own.gradient(**knobs, adapted="head"), own.network.head
        features = Features.of(own.network, own.tasks)
        closed = closed_form_gradients(features, inner_lr=own.loop.inner_lr, **knobs)
        # <[dL/dPhi_Q], Phi_Q> + <[dL/dPhi_S], Phi_S>
        surrogate = (closed.query_features * features.query).sum() + (closed.support_features * features.support).sum()
        (surrogate / len(own.tasks.support)).backward()
        head.weight.grad = closed.weight.mean(0)
        if head.bias is not None:
            head.bias.grad = closed.bias.mean(0)
        return relative(own.taken_gradient(), expected)

    return apart


IDENTITIES = {  # with a zero head, one inner step
    "one_vector_is_none": Equation(
        "What all rows of the head have in common cancels: from a head of one vector a model adapts as from zero.",
        "largest difference of a prediction after the step, a support feature of norm 1 in all rows",
        ROUNDING,
        _one_vector,
    ),
    "coefficient_is_free_of_noise": Equation(
        "The contrastive coefficient is c_{qs} = 1[t=u] − q_{t}: there is no noise in it.",
        "largest difference, q_{t} as the model adapted by one inner step predicts it",
        ROUNDING,
        lambda zero: largest(_coefficients(zero) - without_noise(zero.features, zero.predictions())),
    ),
    "sign_of_coefficients": Equation(
        "The coefficient is positive for pairs of one class, which are 1/K of all, and negative for all others.",
        "share of the pairs for which it has the other sign",
        NONE,
        _signs,
    ),
    "fomaml_is_the_explicit_loss": Equation(
        "The gradient that FOMAML gives the encoder is that of the explicit contrastive loss l(q).",
        "relative difference of the encoder’s gradient, by differentiating MAML and by differentiating l(q)",
        GRADIENT,
        _full_and_explicit(first_order=True),
    ),
    "somaml_is_the_explicit_loss": Equation(
        "So is SOMAML’s, with the support features no longer held constant.",
        "relative difference, likewise",
        GRADIENT,
        _full_and_explicit(first_order=False),
    ),
    "full_fomaml_is_head_only": Equation(
        "FOMAML that adapts all parameters and FOMAML that adapts the head alone give the encoder one gradient.",
        "relative difference",
        GRADIENT,
        _full_and_head_only(first_order=True),
    ),
    "full_somaml_is_head_only": Equation(
        "So do the two SOMAMLs.", "relative difference", GRADIENT, _full_and_head_only(first_order=False)
    ),
    "inner_step_leaves_the_encoder": Equation(
        "The inner step, though of all parameters, leaves the encoder as it was.",
        "largest entry of the support loss’s gradient in the encoder",
        NONE,
        _inner_gradient_of_encoder,
    ),
    "head_after_one_step": Equation(
        "The head after the step is W_{1} = (η/K)(μ_{k} − mean μ).",
        "relative difference from the step that differentiation gives",
        ROUNDING,
        _adapted_weight,
    ),
    "bias_after_one_step": Equation("Its bias is still b_{1} = 0.", "largest entry", ROUNDING, _adapted_bias),
    "step_0_accuracy": Equation(
        "Before the step the accuracy is exactly 1/K.", "difference from 1/K", NONE, _untaught_accuracy
    ),
    "step_1_is_the_prototype_classifier": Equation(
        "After the step the prediction is argmax_{k} φ(q)·μ_{k}.",
        "share of queries given another class",
        NONE,
        _from_prototypes(1),
    ),
    "step_1_independent_of_inner_lr": Equation(
        "It is, whatever η.", "the same share at η/10 and at 10 η, the larger", NONE, _from_prototypes(1 / 10, 10)
    ),
}
SPLITS = {  # with this model's own head, N inner steps of the head
    "fomaml_split_with_this_head": Equation(
        "FOMAML’s gradient is interference + noisy contrastive term (§2.4), for the head’s own gradient too.",
        "relative difference of the whole gradient, by differentiation and by the closed form",
        GRADIENT,
        _split(first_order=True),
    ),
    "somaml_split_with_this_head": Equation(
        "SOMAML’s is the closed form of §2.5, which also reaches the support features.",
        "relative difference, likewise",
        GRADIENT,
        _split(first_order=False),
    ),
}


def measure(model: Model) -> dict[str, Any]:
    own = model.on_few_tasks()
    return {"identities": {**measured(IDENTITIES, own.zeroed()), **measured(SPLITS, own)}}


def section(evidence: dict[str, Any]) -> Section:
    checks, config = evidence["identities"], evidence["config"]

    def table(equations: dict[str, Equation], heading: str) -> Statements:
        rows = [
            Statement(equation.says, {"": verdict_on(checks[name])}, (equation.number,))
            for name, equation in equations.items()
            if name in checks
        ]
        return Statements(("statement, and what its number is", "verdict"), rows, heading)

    return Section(
        anchor="identities",
        overline="Identities",
        claim="With a zeroed head and one inner step, MAML is supervised contrastive learning",
        lead="The theory is no tendency: for one inner step from a zeroed head it is a set of equations (§2.6), true "
        "of any model. What is checked is that this program, on this model, does what they are about: their two sides "
        "are computed apart, by the program’s own inner loop and automatic differentiation wherever the other is a "
        f"closed form, in float64, on {evidence['tasks']['gradients']} test tasks of K = {config['ways']} "
        "classes. Counts must agree to the last unit. Sums may differ by their rounding: 1e−12 is some thousand times "
        "what float64 rounds near one, and 1e−10 leaves room for the same after convolutions and BatchNorm.",
        theorem="The interference term E_{Q} W_{0} of the queries’ gradient vanishes, for W_{0} = 0 (§2.4). Rows of "
        "E_{Q} sum to 0, so it vanishes too where all classes have the same weights.",
        tables=[
            table(IDENTITIES, "With the head zeroed, one inner step"),
            table(SPLITS, f"With this model’s own head, {counted_steps(config['inner_steps'])} of the head"),
        ],
        note="" if "bias_after_one_step" in checks else "This model’s head has no bias.",
    )


def verdict(evidence: dict[str, Any]) -> Verdicts:
    checks = evidence["identities"].values()
    held = sum(check["pass"] for check in checks)
    if held == len(checks):
        return {"": Verdict("holds", f"all {held} identities hold exactly")}
    return {"": Verdict("fails", f"{len(checks) - held} of {len(checks)} identities do not hold")}
