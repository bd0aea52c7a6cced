"""With a zeroed head and one inner step, MAML is supervised contrastive learning (docs/method.md 2.4 to 2.6)."""

import copy
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fewshot.evidence import page
from fewshot.evidence.adapting_all import split_adapting_all
from fewshot.evidence.model import GRADIENT, Equation, Model, equation, largest, measured, relative
from fewshot.theory.closed_forms import closed_form_gradients, contrastive_coefficients
from fewshot.theory.features import ROUNDING, Features, agreement

IDENTITIES: list[Equation] = []  # with a zero head, one inner step
SPLITS: list[Equation] = []  # with the model's own head, N steps of the head
identity, split = partial(equation, IDENTITIES), partial(equation, SPLITS)


@identity(ROUNDING, "largest difference of a prediction after the step, a support feature of norm 1 in all rows")
def one_vector_is_none(zero: Model) -> float:
    """What all rows of the head have in common cancels: from a head of one vector a model adapts as from zero."""
    shared = replace(zero, network=copy.deepcopy(zero.network))
    with torch.no_grad():
        weight = shared.network.head.weight
        weight.copy_(F.normalize(zero.features.support[0, :1]).expand_as(weight))
    return largest(shared.predictions() - zero.predictions())


@identity(GRADIENT, "largest difference of a prediction, the labels in the opposite order and put back, 3 steps")
def labels_have_no_order(zero: Model) -> float:
    """The order of the labels makes no difference to any prediction (§2.10)."""
    last = len(zero.features.weight) - 1
    tasks = zero.tasks
    opposite = tasks._replace(support_labels=last - tasks.support_labels, query_labels=last - tasks.query_labels)
    return largest(replace(zero, tasks=opposite).predictions(inner_steps=3).flip(-1) - zero.predictions(inner_steps=3))


@identity(ROUNDING, "largest difference, q_{t} as the model adapted by one inner step predicts it")
def coefficient_is_free_of_noise(zero: Model) -> float:
    """The contrastive coefficient is c_{qs} = 1[t=u] − q_{t}: there is no noise in it."""
    return largest(_coefficients(zero) - zero.features.coefficients_without_noise(zero.predictions()))


@identity(0, "share of the pairs for which it has the other sign")
def sign_of_coefficients(zero: Model) -> float:
    """The coefficient is positive for pairs of one class, which are 1/K of all, and negative for all others."""
    return zero.features.wrong_signs(_coefficients(zero)).double().mean().item()


def _coefficients(zero: Model) -> Tensor:
    """(B, Q, S)"""
    return contrastive_coefficients(zero.features, inner_lr=zero.loop.inner_lr, inner_steps=1)[0]


L_Q = {"adapted": "head", "noise": False, "interference": False}  # the explicit loss l(q)


@identity(GRADIENT, "relative difference of the encoder’s gradients, by differentiating MAML and differentiating l(q)")
def fomaml_is_the_explicit_loss(zero: Model) -> float:
    """The gradient that FOMAML gives the encoder is that of the explicit contrastive loss l(q)."""
    return relative(zero.encoder_gradient(**L_Q), zero.encoder_gradient())


@identity(GRADIENT, "relative difference, likewise")
def somaml_is_the_explicit_loss(zero: Model) -> float:
    """So is SOMAML’s, with the support features no longer held constant."""
    return relative(zero.encoder_gradient(**L_Q, first_order=False), zero.encoder_gradient(first_order=False))


@identity(GRADIENT, "relative difference")
def full_fomaml_is_head_only(zero: Model) -> float:
    """FOMAML that adapts all parameters and FOMAML that adapts the head alone give the encoder one gradient."""
    return relative(zero.encoder_gradient(adapted="head"), zero.encoder_gradient())


@identity(GRADIENT, "relative difference")
def full_somaml_is_head_only(zero: Model) -> float:
    """So do the two SOMAMLs."""
    head_only = zero.encoder_gradient(adapted="head", first_order=False)
    return relative(head_only, zero.encoder_gradient(first_order=False))


@identity(
    GRADIENT, "relative difference of the encoder’s gradient after 3 steps, the first of the head alone or of all"
)
def fomaml_first_step_is_of_the_head(zero: Model) -> float:
    """The first of any number of steps may as well adapt the head alone: FOMAML’s gradient is the same (§2.6)."""
    return _first_step(zero, first_order=True)


@identity(GRADIENT, "relative difference, likewise")
def somaml_first_step_is_of_the_head(zero: Model) -> float:
    """So is SOMAML’s, which goes back through that step: θ_{1} = θ for every θ, so its derivative is 1."""
    return _first_step(zero, first_order=False)


def _first_step(zero: Model, first_order: bool) -> float:
    """With zeroing the program takes the first step for one of the head; without it, it differentiates them all."""
    of_head, of_all = (zero.encoder_gradient(inner_steps=3, first_order=first_order, zeroing=z) for z in (True, False))
    return relative(of_head, of_all)


@identity(0, "largest entry of the support loss’s gradient in the encoder")
def inner_step_leaves_the_encoder(zero: Model) -> float:
    """The inner step, though of all parameters, leaves the encoder as it was."""
    gradients = [task[name] for task in _inner_gradients(zero) for name in task if name.startswith("encoder.")]
    return largest([largest(gradient) for gradient in gradients])


@identity(ROUNDING, "relative difference from the step that differentiation gives")
def head_after_one_step(zero: Model) -> float:
    """The head after the step has the weights (η/K)(μ_{k} − mean μ) for class k."""
    eta, mu = zero.loop.inner_lr, zero.features.support_means()
    expected = eta / mu.shape[1] * (mu - mu.mean(1, keepdim=True))
    pairs = zip(_inner_gradients(zero), expected, strict=True)
    return largest([relative(-eta * task["head.weight"], W_1) for task, W_1 in pairs])


@identity(ROUNDING, "largest entry")
def bias_after_one_step(zero: Model) -> float | None:
    """Its bias is still b_{1} = 0."""
    if zero.network.head.bias is None:
        return None
    return zero.loop.inner_lr * largest([largest(task["head.bias"]) for task in _inner_gradients(zero)])


def _inner_gradients(zero: Model) -> list[dict[str, Tensor]]:
    """The gradients of each task's support loss by the parameters' names, by automatic differentiation."""
    names, parameters = zip(*zero.network.named_parameters(), strict=True)
    supports = zip(zero.tasks.support, zero.tasks.support_labels, strict=True)
    losses = (F.cross_entropy(zero.network(images), labels) for images, labels in supports)
    return [dict(zip(names, torch.autograd.grad(loss, parameters), strict=True)) for loss in losses]


@identity(0, "difference from 1/K")
def step_0_accuracy(zero: Model) -> float:
    """Before the step the accuracy is exactly 1/K."""
    right = (zero.logits(inner_steps=0).argmax(-1) == zero.tasks.query_labels).sum().item()
    queries = zero.tasks.query_labels.numel()
    return abs(right * len(zero.features.weight) - queries) / queries


@identity(0, "share of queries given another class")
def step_1_is_the_prototype_classifier(zero: Model) -> float:
    """After the step the prediction is argmax_{k} φ(q)·μ_{k}."""
    return _from_prototypes(zero, zero.loop.inner_lr)


@identity(0, "the same share at η/10 and at 10 η, the larger")
def step_1_independent_of_inner_lr(zero: Model) -> float:
    """It is, whatever η."""
    return largest([_from_prototypes(zero, zero.loop.inner_lr / 10), _from_prototypes(zero, zero.loop.inner_lr * 10)])


def _from_prototypes(zero: Model, eta: float) -> float:
    return 1 - agreement(zero.features.prototype_scores(), zero.logits(inner_lr=eta)).double().mean().item()


@identity(GRADIENT, "relative difference of the tasks’ losses or of the encoder’s gradient, the larger")
def fomaml_is_a_prototypical_network(zero: Model) -> float:
    """FOMAML has the loss and gradient of the logits φ(q)·μ_{k} / T with T = K/η, μ_{k} held constant (§2.13)."""
    return _from_prototypical_network(zero, first_order=True)


@identity(GRADIENT, "relative difference, likewise")
def somaml_is_a_prototypical_network(zero: Model) -> float:
    """So has SOMAML, with the prototypes μ_{k} no longer held constant."""
    return _from_prototypical_network(zero, first_order=False)


def _from_prototypical_network(zero: Model, first_order: bool) -> float:
    losses, gradient = _losses(zero.logits(), zero), zero.encoder_gradient(first_order=first_order)
    features = Features.of(zero.network, zero.tasks)
    mu, temperature = features.support_means(), len(features.weight) / zero.loop.inner_lr
    expected = _losses(features.query @ (mu.detach() if first_order else mu).mT / temperature, zero)
    expected.mean().backward()
    return largest([relative(losses, expected.detach()), relative(gradient, zero.taken_gradient())])


def _losses(logits: Tensor, zero: Model) -> Tensor:
    """Of each task's queries, (B,)"""
    return F.cross_entropy(logits.mT, zero.tasks.query_labels, reduction="none").mean(1)


@split(GRADIENT, "relative difference of the whole gradient, by differentiation and by the closed form")
def fomaml_split_with_this_head(own: Model) -> float:
    """FOMAML’s gradient is interference + noisy contrastive term (§2.4), here if the head alone adapts."""
    return _split(own, first_order=True)


@split(GRADIENT, "relative difference, likewise")
def somaml_split_with_this_head(own: Model) -> float:
    """SOMAML’s is the closed form of §2.5, which also reaches the support features."""
    return _split(own, first_order=False)


@split(GRADIENT, "relative difference of the whole gradient, where the program’s inner loop adapts all parameters")
def fomaml_split_adapting_all(own: Model) -> float:
    """FOMAML’s is that sum too if everything adapts, with the support features of every step’s own encoder (§2.9)."""
    for task in own.tasks.one_by_one():
        terms = split_adapting_all(own, task, own.loop.inner_steps)
        surrogate = ((terms.interference + terms.contrastive) * terms.query).sum()  # pulled back at theta_N
        gradients = (*torch.autograd.grad(surrogate, terms.encoder), *terms.head_gradient)
        for parameter, gradient in zip(own.network.parameters(), gradients, strict=True):
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    return relative(own.taken_gradient() / len(own.tasks.support), own.gradient(inner_steps=own.loop.inner_steps))


@split(GRADIENT, "relative difference of the whole gradient, FOMAML’s of all parameters")
def heads_are_centred(own: Model) -> float:
    """Only what sets the head’s rows apart has an effect: taking their mean off changes nothing (§2.12)."""
    apart = replace(own, network=copy.deepcopy(own.network))
    with torch.no_grad():
        for parameter in apart.network.head.parameters():
            parameter.copy_(parameter - parameter.mean(0))
    steps = own.loop.inner_steps
    return relative(apart.gradient(inner_steps=steps), own.gradient(inner_steps=steps))


def _split(own: Model, first_order: bool) -> float:
    """Encoder and head gradient of head-only MAML: by differentiation and through the features."""
    expected = own.gradient(inner_steps=own.loop.inner_steps, first_order=first_order, adapted="head")
    features = Features.of(own.network, own.tasks)
    closed = closed_form_gradients(features, **own.knobs, first_order=first_order)
    # <[dL/dPhi_Q], Phi_Q> + <[dL/dPhi_S], Phi_S>
    surrogate = (closed.query_features * features.query).sum() + (closed.support_features * features.support).sum()
    (surrogate / len(own.tasks.support)).backward()
    for parameter, gradient in zip(own.network.head.parameters(), (closed.weight, closed.bias), strict=False):
        parameter.grad = None if gradient is None else gradient.mean(0)
    return relative(own.taken_gradient(), expected)


def measure(model: Model) -> page.Evidence:
    own = model.on_few_tasks
    return {"identities": {**measured(IDENTITIES, own.zeroed), **measured(SPLITS, own)}}


def section(evidence: page.Evidence) -> page.Section:
    checks, config = evidence["identities"], evidence["config"]

    def table(equations: list[Equation], heading: str) -> page.Table:
        rows = [
            page.Statement(equation.says, {"": page.verdict_on(checks[equation.name])}, (equation.number,))
            for equation in equations
            if equation.name in checks
        ]
        return page.Table(("statement, and what its number is", "verdict"), rows, "statements", heading)

    return page.Section(
        overline="Identities",
        claim="With a zeroed head and one inner step, MAML is supervised contrastive learning",
        lead="For one inner step from a zeroed head the theory is a set of equations (§2.6), true of any model. What "
        "is checked is that this program does what they say, on this model: one side comes from its own inner loop and "
        f"automatic differentiation, the other from a formula, in float64, on {evidence['tasks']['gradients']} test "
        f"tasks of K = {config['ways']} classes. Counts must agree to the last unit. Sums may differ by their "
        "rounding, some thousand times that of float64 (1e−12), or what convolutions make of it (1e−10).",
        theorem="The interference term E_{Q} W_{0} of the queries’ gradient vanishes, for W_{0} = 0 (§2.4). Rows of "
        "E_{Q} sum to 0, so it vanishes too where all classes have the same weights.",
        tables=[
            table(IDENTITIES, "With the head zeroed, one inner step where no other number is named"),
            table(SPLITS, f"With this model’s own head, {page.counted(config['inner_steps'])}"),
        ],
        note="" if "bias_after_one_step" in checks else "This model’s head has no bias.",
    )


def verdict(evidence: page.Evidence) -> page.Verdicts:
    checks = evidence["identities"].values()
    held = sum(check["pass"] for check in checks)
    failed = page.Verdict("fails", f"{len(checks) - held} of {len(checks)} identities do not hold")
    return {"": failed if held < len(checks) else page.Verdict("holds", f"all {held} identities hold exactly")}
