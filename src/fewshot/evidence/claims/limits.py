"""What does not hold: statements that are in the paper, or easily read into it, measured like the identities."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fewshot.evidence.equations import GRADIENT, largest, measured, relative, verdict_on, without_noise
from fewshot.evidence.model import Model
from fewshot.evidence.section import HEAD_IS_ZERO, Section, Statement, Statements, Verdict, Verdicts
from fewshot.theory.closed_forms import contrastive_coefficients
from fewshot.theory.features import ROUNDING


class Limit(NamedTuple):
    """An Equation that one might expect to hold."""

    says: str
    why_not: str
    number: str
    bound: float
    apart: Callable[[Model], float | None]
    parts: tuple[str, ...] = ()  # of the model's own head: where all classes have the same, it says nothing


def _steps(model: Model) -> int:
    return max(2, model.loop.inner_steps)


def _later_noise(own: Model) -> float:
    zero, steps = own.zeroed(), _steps(own)
    later = contrastive_coefficients(zero.features, inner_lr=own.loop.inner_lr, inner_steps=steps)[1:]
    q = zero.predictions(inner_steps=steps, adapted="head")
    return largest(later - without_noise(zero.features, q))


def _head_only(model: Model, steps: int) -> float:
    full, head_only = (model.encoder_gradient(inner_steps=steps, adapted=adapted) for adapted in ("all", "head"))
    return relative(full, head_only)


def _first_predictions(own: Model) -> float:
    with torch.no_grad():
        P = own.network.head(own.features.support).softmax(-1)
    return largest(P - 1 / P.shape[-1])


def _bias_kept(own: Model) -> float | None:
    if own.features.bias is None:
        return None
    P = own.features.bias.softmax(-1)
    return largest(P - 1 / len(P))


def _papers_loss(own: Model) -> float:
    exact = own.encoder_gradient(first_order=False, adapted="head")
    return relative(own.encoder_gradient(first_order=False, adapted="head", noise=True, interference=True), exact)


LIMITS = {
    "no_noise_beyond_one_step": Limit(
        "With the zeroing trick MAML becomes supervised contrastive learning: c_{qs} = 1[t=u] − q_{t}.",
        "True of one inner step. From step two on the support predictions are not uniform, and the noise is back.",
        "largest difference from step two on, head zeroed",
        ROUNDING,
        _later_noise,
    ),
    "full_is_head_only_beyond_one_step": Limit(
        "The inner loop may as well leave the encoder alone, as the theory assumes.",
        "True of one inner step from a zeroed head; from step two on it is an approximation.",
        "relative difference of FOMAML’s gradient in the encoder, adapting all and the head alone, head zeroed",
        GRADIENT,
        lambda own: _head_only(own.zeroed(), _steps(own)),
    ),
    "full_is_head_only_with_this_head": Limit(
        "The theory’s inner loop, of the head alone, has the gradient of the one that adapts everything.",
        "With a head that tells classes apart the first step already moves the encoder: another gradient.",
        "relative difference of FOMAML’s gradient in the encoder, one inner step of all and of the head alone",
        GRADIENT,
        lambda own: _head_only(own, 1),
        parts=("weight",),
    ),
    "uniform_without_zeroing": Limit(
        "Before the inner loop every class is as likely, P = 1/K.",
        "Only a head that is the same for every class, as zero is, says so; any other brings noise and interference.",
        "largest difference of a support prediction from 1/K, this model’s head",
        ROUNDING,
        _first_predictions,
        parts=("weight", "bias"),
    ),
    "uniform_with_the_bias_kept": Limit(
        "It is enough to zero the head’s weights.",
        "With a bias left, P is not uniform. The trick must zero both.",
        "largest difference from 1/K, weights zeroed and this model’s bias kept",
        ROUNDING,
        _bias_kept,
        parts=("bias",),
    ),
    "papers_somaml_loss_with_this_head": Limit(
        "The explicit SOMAML loss of the paper’s appendix has the gradient of SOMAML.",
        "It leaves out a way from the support features to the loss, by w_{0}; exact where all rows of w_{0} are equal.",
        "relative difference in the encoder, one step of this model’s head alone",
        GRADIENT,
        _papers_loss,
        parts=("weight",),
    ),
}


def measure(model: Model) -> dict[str, Any]:
    return {"limits": measured(LIMITS, model.on_few_tasks())}


def section(evidence: dict[str, Any]) -> Section:
    rows = [
        Statement(f"Expected: {limit.says}", {"": judged}, (limit.why_not, f"Measured: {limit.number}."))
        for limit, judged in _judged(evidence)
    ]
    return Section(
        anchor="limits",
        overline="Where it ends",
        claim="What does not hold",
        lead="Statements that are in the paper, or easily read into it, and that its formulas do not bear out (§2.5, "
        "§2.6), measured like the identities and on the same tasks; where it takes more than one inner step, with "
        f"{evidence['coefficients']['inner_steps']}.",
        tables=[Statements(("expected and found", "verdict"), rows)],
    )


def verdict(evidence: dict[str, Any]) -> Verdicts:
    kinds = [judged.kind for _, judged in _judged(evidence)]
    failed, tested = kinds.count("fails"), len(kinds) - kinds.count("untested")
    return {"": Verdict("fails" if failed else "holds", f"{failed} of the {tested} statements tested do not hold")}


def _judged(evidence: dict[str, Any]) -> list[tuple[Limit, Verdict]]:
    checks, same = evidence["limits"], evidence["same_for_all"]
    return [(limit, verdict_on_limit(limit, checks[name], same)) for name, limit in LIMITS.items() if name in checks]


def verdict_on_limit(limit: Limit, check: dict[str, Any], same_for_all: dict[str, bool]) -> Verdict:
    """same_for_all: of which parts of this model's head all classes have the same."""
    if limit.parts and check["pass"] and all(same_for_all[part] for part in limit.parts):
        words = HEAD_IS_ZERO.words
        return HEAD_IS_ZERO._replace(words=words.replace("head", "bias") if limit.parts == ("bias",) else words)
    return verdict_on(check)
