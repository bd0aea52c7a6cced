"""What is claimed, in words, and the verdict that the numbers give.

Texts are plain: x_{i} is an index and §2.6 a section of docs/method.md, which page.py turns into HTML.
"""

from typing import Any, NamedTuple

IDENTITIES = {  # name: (what must hold, what its number is)
    "one_vector_is_none": (
        "What all rows of the head have in common cancels: from a head of one vector a model adapts as from zero.",
        "largest difference of a prediction after the step, a support feature of norm 1 in all rows",
    ),
    "coefficient_is_free_of_noise": (
        "The contrastive coefficient is c_{qs} = 1[t=u] − q_{t}: there is no noise in it.",
        "largest difference, q_{t} as the model adapted by one inner step predicts it",
    ),
    "sign_of_coefficients": (
        "The coefficient is positive for pairs of one class, which are 1/K of all, and negative for all others.",
        "share of the pairs for which it has the other sign",
    ),
    "fomaml_is_the_explicit_loss": (
        "The gradient that FOMAML gives the encoder is that of the explicit contrastive loss l(q).",
        "relative difference of the encoder’s gradient, by differentiating MAML and by differentiating l(q)",
    ),
    "somaml_is_the_explicit_loss": (
        "So is SOMAML’s, with the support features no longer held constant.",
        "relative difference, likewise",
    ),
    "full_fomaml_is_head_only": (
        "FOMAML that adapts all parameters and FOMAML that adapts the head alone give the encoder one gradient.",
        "relative difference",
    ),
    "full_somaml_is_head_only": ("So do the two SOMAMLs.", "relative difference"),
    "inner_step_leaves_the_encoder": (
        "The inner step, though of all parameters, leaves the encoder as it was.",
        "largest entry of the support loss’s gradient in the encoder",
    ),
    "head_after_one_step": (
        "The head after the step is W_{1} = (η/K)(μ_{k} − mean μ).",
        "relative difference from the step that differentiation gives",
    ),
    "bias_after_one_step": ("Its bias is still b_{1} = 0.", "largest entry"),
    "step_0_accuracy": ("Before the step the accuracy is exactly 1/K.", "difference from 1/K"),
    "step_1_is_the_prototype_classifier": (
        "After the step the prediction is argmax_{k} φ(q)·μ_{k}.",
        "share of queries given another class",
    ),
    "step_1_independent_of_inner_lr": ("It is, whatever η.", "the same share at η/10 and at 10 η, the larger"),
}
SPLITS = {
    "fomaml_split_with_this_head": (
        "FOMAML’s gradient is interference + noisy contrastive term (§2.4), for the head’s own gradient too.",
        "relative difference of the whole gradient, by differentiation and by the closed form",
    ),
    "somaml_split_with_this_head": (
        "SOMAML’s is the closed form of §2.5, which also reaches the support features.",
        "relative difference, likewise",
    ),
}
LIMITS = {  # name: (what one might expect, why not, what its number is)
    "no_noise_beyond_one_step": (
        "With the zeroing trick MAML becomes supervised contrastive learning: c_{qs} = 1[t=u] − q_{t}.",
        "True of one inner step. From step two on the support predictions are not uniform, and the noise is back.",
        "largest difference from step two on, head zeroed",
    ),
    "full_is_head_only_beyond_one_step": (
        "The inner loop may as well leave the encoder alone, as the theory assumes.",
        "True of one inner step from a zeroed head; from step two on it is an approximation.",
        "relative difference of FOMAML’s gradient in the encoder, adapting all and the head alone, head zeroed",
    ),
    "full_is_head_only_with_this_head": (
        "The theory’s inner loop, of the head alone, has the gradient of the one that adapts everything.",
        "With a head that tells classes apart the first step already moves the encoder: another gradient.",
        "relative difference of FOMAML’s gradient in the encoder, one inner step of all and of the head alone",
    ),
    "uniform_without_zeroing": (
        "Before the inner loop every class is as likely, P = 1/K.",
        "Only a head that is the same for every class, as zero is, says so; any other brings noise and interference.",
        "largest difference of a support prediction from 1/K, this model’s head",
    ),
    "uniform_with_the_bias_kept": (
        "It is enough to zero the head’s weights.",
        "With a bias left, P is not uniform. The trick must zero both.",
        "largest difference from 1/K, weights zeroed and this model’s bias kept",
    ),
    "papers_somaml_loss_with_this_head": (
        "The explicit SOMAML loss of the paper’s appendix has the gradient of SOMAML.",
        "It leaves out a way from the support features to the loss, by w_{0}; exact where all rows of w_{0} are equal.",
        "relative difference in the encoder, one step of this model’s head alone",
    ),
}


class Verdict(NamedTuple):
    kind: str  # "holds", "fails", "partly" or "untested"
    words: str


def of_check(check: dict[str, Any]) -> Verdict:
    """check: value (None: not a number), bound and pass, as in evidence.json."""
    value, bound = short(check["value"]), short(check["bound"])
    if check["pass"]:
        return Verdict("holds", f"holds exactly ({value} ≤ {bound})")
    return Verdict("fails", f"does not hold ({value if check['value'] is None else f'{value} > {bound}'})")


def of_all(checks: dict[str, dict[str, Any]]) -> Verdict:
    held = sum(check["pass"] for check in checks.values())
    if held == len(checks):
        return Verdict("holds", f"all {held} identities hold exactly")
    return Verdict("fails", f"{len(checks) - held} of {len(checks)} identities do not hold")


SAME_FOR_ALL = "not tested: this model’s head is zero, or the same for every class"
UNTRAINED = "not asked: this model has had no outer update"
OWN_HEAD = {  # limits about the model's own head, and the parts of it without which they say nothing
    "full_is_head_only_with_this_head": ("weight",),
    "uniform_without_zeroing": ("weight", "bias"),
    "uniform_with_the_bias_kept": ("bias",),
    "papers_somaml_loss_with_this_head": ("weight",),
}


def of_limit(name: str, check: dict[str, Any], same_for_all: dict[str, bool]) -> Verdict:
    """same_for_all: of which parts of this model's head all classes have the same."""
    parts = OWN_HEAD.get(name, ())
    if parts and check["pass"] and all(same_for_all[part] for part in parts):
        return Verdict("untested", SAME_FOR_ALL.replace("head", "bias") if parts == ("bias",) else SAME_FOR_ALL)
    return of_check(check)


def of_limits(checks: dict[str, dict[str, Any]], same_for_all: dict[str, bool]) -> Verdict:
    kinds = [of_limit(name, check, same_for_all).kind for name, check in checks.items()]
    failed, tested = kinds.count("fails"), len(kinds) - kinds.count("untested")
    return Verdict("fails" if failed else "holds", f"{failed} of the {tested} statements tested do not hold")


def motivating_example(found: dict[str, Any]) -> Verdict:
    """Whether the features give the outer loss of the example what it wants."""
    larger, tasks = found["tasks_where_own_is_larger"], found["tasks"]
    said = f"{decimals(found['same_class'])} for a query’s own class, {decimals(found['other_class'])} for the others"
    return _share(larger / tasks, f"{said}; larger in {larger} of {tasks} tasks")


def outer_step(found: dict[str, Any]) -> list[Verdict]:
    """Of FOMAML and of SOMAML, with this head: whether pairs of query and support move the right way."""
    verdicts = []
    for order in ("fomaml", "somaml"):
        drawn, pushed = (found["this_head"][order][share] for share in ("same_class_drawn", "other_class_pushed"))
        said = f"{percent(drawn)} of the pairs of a class are drawn together, {percent(pushed)} of the others apart"
        verdicts.append(_share(min(drawn, pushed), said))
    return verdicts


def noise(found: dict[str, Any], head_is_zero: bool) -> list[Verdict]:
    """Of this head in one step, and of a zeroed one in more: how many pairs of different classes draw together."""
    this, later = (found[case]["wrong_among_other"] for case in ("this_head", "more_steps"))
    said = f"in one step {percent(this)} of the pairs of different classes are drawn together"
    steps = f"over {found['inner_steps']} steps {percent(later)} of the pairs of different classes are drawn together"
    return [
        Verdict("untested", SAME_FOR_ALL) if head_is_zero else _either(this > 0, said),
        _share(1 - later, steps),
    ]


def similarity(found: dict[str, Any], trained: bool) -> Verdict:
    """Whether training drew classes apart: an untrained network too finds images of a class more alike than others."""
    grew, tasks = found["tasks_where_the_gap_grew"], found["tasks"]
    now, then = (
        f"{decimals(found[f'{when}same_class'])} within a class, {decimals(found[f'{when}other_class'])} across"
        for when in ("", "initially_")
    )
    said = f"{now}; before training {then}; further apart in {grew} of {tasks} tasks"
    return _share(grew / tasks, said) if trained else Verdict("untested", UNTRAINED)


def memory(found: dict[str, Any]) -> Verdict:
    nearest = found["this_head_after"]["nearest_is_own"]
    return _share(nearest, f"after the step {percent(nearest)} of the columns are nearest to their own class")


def prototypes(found: dict[str, Any], head_is_zero: bool) -> list[Verdict]:
    """From a zeroed head after more than the one step of the theorem, and from this head after one."""
    later, this, steps = found["zeroed_head"][1:], found["this_head"][0], len(found["zeroed_head"])
    return [
        _share(later[-1], f"from a zeroed head {percent(later[-1])} of the predictions agree after {steps} steps")
        if later
        else Verdict("untested", "not tested: one inner step is measured, add test_steps=2"),
        Verdict("untested", SAME_FOR_ALL)
        if head_is_zero
        else _share(this, f"from this head {percent(this)} agree after one step"),
    ]


def accuracy(test: dict[str, Any], step: int, head_is_zero: bool, trained: bool) -> Verdict:
    """Whether test-time zeroing costs accuracy after this many inner steps: the same tasks, so by their differences."""
    gain, ci95 = test["gain"]["accuracy"][step], test["gain"]["ci95"][step]
    if not trained or head_is_zero:
        return Verdict("untested", SAME_FOR_ALL if trained else UNTRAINED)
    said = f"zeroing changes accuracy by {interval(gain, ci95)} after step {step}"
    if gain + ci95 < 0:
        return Verdict("fails", f"does not hold: {said}")
    return Verdict("holds", f"holds, and more: {said}") if gain > ci95 else Verdict("partly", f"not told apart: {said}")


def _either(holds: bool, said: str) -> Verdict:
    return Verdict("holds", f"holds: {said}") if holds else Verdict("fails", f"does not hold: {said}")


def _share(share: float, said: str) -> Verdict:
    if share == 1:
        return Verdict("holds", f"holds: {said}")
    return Verdict("partly", f"holds in part: {said}") if share > 0.5 else Verdict("fails", f"does not hold: {said}")


# Numbers, with a minus sign at which no line is broken


def short(value: float | None) -> str:
    """3e−16, 0.98, 0; None was no finite number."""
    if value is None:
        return "not a number"
    text = f"{value:.2g}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}".replace(".0e", "e")
    return text.replace("e-0", "e-").replace("-", "−")


def decimals(value: float | None) -> str:
    """0.55, −0.12"""
    return "–" if value is None else f"{round(value, 2) + 0.0:.2f}".replace("-", "−")


def percent(share: float | None) -> str:
    """82.8%; 100% and 0% are said of all and of none alone."""
    if share is None:
        return "–"
    text = f"{100 * share:.1f}".removesuffix(".0")
    if text == "100" and share < 1:
        return "> 99.9%"
    return "< 0.1%" if text == "0" and share > 0 else f"{text}%"


def interval(mean: float, half: float) -> str:
    return f"{100 * mean:.1f} ± {100 * half:.1f}%".replace("-", "−")
