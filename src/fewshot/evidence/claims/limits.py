"""What does not hold: statements that are in the paper, or easily read into it, measured like the identities."""

from functools import partial

import torch

from fewshot.evidence import page
from fewshot.evidence.model import GRADIENT, Equation, Model, equation, largest, measured, relative
from fewshot.theory.closed_forms import contrastive_coefficients
from fewshot.theory.features import ROUNDING

LIMITS: list[Equation] = []
limit = partial(equation, LIMITS)


@limit(
    ROUNDING,
    "largest difference from step two on, head zeroed",
    "True of one inner step. From step two on the support predictions are not uniform, and the noise is back.",
)
def no_noise_beyond_one_step(own: Model) -> float:
    """With the zeroing trick MAML becomes supervised contrastive learning: c_{qs} = 1[t=u] − q_{t}."""
    zero, steps = own.zeroed, _steps(own)
    later = contrastive_coefficients(zero.features, inner_lr=own.loop.inner_lr, inner_steps=steps)[1:]
    q = zero.predictions(inner_steps=steps, adapted="head")
    return largest(later - zero.features.coefficients_without_noise(q))


@limit(
    GRADIENT,
    "relative difference of FOMAML’s gradient in the encoder, adapting all and the head alone, head zeroed",
    "True of one inner step from a zeroed head; from step two on it is an approximation.",
)
def full_is_head_only_beyond_one_step(own: Model) -> float:
    """The inner loop may as well leave the encoder alone, as the theory assumes."""
    zero, steps = own.zeroed, _steps(own)
    return relative(zero.encoder_gradient(inner_steps=steps), zero.encoder_gradient(inner_steps=steps, adapted="head"))


def _steps(own: Model) -> int:
    return max(2, own.loop.inner_steps)


@limit(
    GRADIENT,
    "relative difference of FOMAML’s gradient in the encoder, one inner step of all and of the head alone",
    "With a head that tells classes apart the first step moves the encoder, and the gradient is taken there. Its split "
    "into interference and contrastive term stays exact (§2.9).",
    ("weight",),
)
def full_is_head_only_with_this_head(own: Model) -> float:
    """The theory’s inner loop, of the head alone, has the gradient of the one that adapts everything."""
    return relative(own.encoder_gradient(), own.encoder_gradient(adapted="head"))


@limit(
    ROUNDING,
    "largest difference of a support prediction from 1/K, this model’s head",
    "A head that is the same for every class, as zero is, says so; any other brings noise or interference.",
    ("weight", "bias"),
)
def uniform_without_zeroing(own: Model) -> float:
    """Before the inner loop every class is as likely, P = 1/K."""
    with torch.no_grad():
        P = own.network.head(own.features.support).softmax(-1)
    return largest(P - 1 / P.shape[-1])


@limit(
    ROUNDING,
    "largest difference from 1/K, weights zeroed and this model’s bias kept",
    "With a bias left, P is not uniform. The trick must zero both.",
    ("bias",),
)
def uniform_with_the_bias_kept(own: Model) -> float | None:
    """It is enough to zero the head’s weights."""
    bias = own.features.bias
    return None if bias is None else largest(bias.softmax(-1) - 1 / len(bias))


@limit(
    GRADIENT,
    "relative difference in the encoder, one step of this model’s head alone",
    "It leaves out a way from the support features to the loss, by w_{0}; exact where all rows of w_{0} are equal.",
    ("weight",),
)
def papers_somaml_loss_with_this_head(own: Model) -> float:
    """The explicit SOMAML loss of the paper’s appendix has the gradient of SOMAML."""
    exact = own.encoder_gradient(first_order=False, adapted="head")
    return relative(own.encoder_gradient(first_order=False, adapted="head", noise=True, interference=True), exact)


def measure(model: Model) -> page.Evidence:
    return {"limits": measured(LIMITS, model.on_few_tasks)}


def section(evidence: page.Evidence) -> page.Section:
    rows = [
        page.Statement(
            f"Expected: {statement.says}", {"": judged}, (statement.why_not, f"Measured: {statement.number}.")
        )
        for statement, judged in _judged(evidence)
    ]
    return page.Section(
        overline="Where it ends",
        claim="What does not hold",
        lead="These statements are in the paper, or easily read into it, and its formulas do not bear them out (§2.5, "
        "§2.6). They are measured like the identities and on the same tasks; those about more than one inner step with "
        f"{evidence['coefficients']['inner_steps']}.",
        tables=[page.Table(("expected and found", "verdict"), rows, "statements")],
    )


def verdict(evidence: page.Evidence) -> page.Verdicts:
    kinds = [judged.kind for _, judged in _judged(evidence)]
    failed, tested = kinds.count("fails"), len(kinds) - kinds.count("untested")
    return {"": page.Verdict("fails" if failed else "holds", f"{failed} of the {tested} statements tested do not hold")}


def _judged(evidence: page.Evidence) -> list[tuple[Equation, page.Verdict]]:
    checks, same = evidence["limits"], evidence["same_for_all"]
    measured = [statement for statement in LIMITS if statement.name in checks]
    return [(statement, verdict_on_limit(statement, checks[statement.name], same)) for statement in measured]


def verdict_on_limit(statement: Equation, check: page.Evidence, same_for_all: dict[str, bool]) -> page.Verdict:
    """same_for_all: of which parts of this model's head all classes have the same."""
    if statement.parts and check["pass"] and all(same_for_all[part] for part in statement.parts):
        part = "bias" if statement.parts == ("bias",) else "head"
        return page.Verdict("untested", page.HEAD_IS_ZERO.words.replace("head", part))
    return page.verdict_on(check)
