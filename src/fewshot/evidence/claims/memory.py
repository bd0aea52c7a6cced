"""Question 2: in the inner loop the classifier memorises support features (2.2, 2.6)."""

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fewshot.evidence import page
from fewshot.evidence.model import Model, plain
from fewshot.theory.closed_forms import adapt_head
from fewshot.theory.features import centred, cosines, tied

CASES = {
    "this_head_before": "this head, before the step",
    "this_head_after": "this head, after one step",
    "zeroed_head_after": "head zeroed, after one step",
}


def measure(model: Model) -> page.Evidence:
    """Cosines of the K columns of w, less their mean, and the K classes' support means, before and after one step.

    "first_task" (K, K); "same_class" and "other_class" means of all tasks; "nearest_is_own": the share of the columns
    that are closer to their own class's mean than to any other's. Where nothing is left of the columns there are none.
    """
    mu, measured = model.features.support_means(), {}
    for name, features in model.heads.items():
        after = adapt_head(features, inner_lr=model.loop.inner_lr, inner_steps=1).weight
        for moment, W in (("before", features.weight.expand_as(after)), ("after", after)):
            measured[f"{name}_{moment}"] = _columns(centred(W), mu)
    return {"memory": measured}


def _columns(W: Tensor, mu: Tensor) -> page.Evidence | None:
    if not W.any():
        return None
    cosine = cosines(W, mu)  # (B, K, K)
    own = torch.eye(cosine.shape[-1], dtype=torch.bool).expand_as(cosine)
    return {
        "first_task": plain(cosine[0]),
        "same_class": cosine[own].mean().item(),
        "other_class": cosine[~own].mean().item(),
        "nearest_is_own": tied(cosine)[own].double().mean().item(),
    }


def draw(evidence: page.Evidence, shown: page.Shown) -> Figure:
    """Before and after one inner step."""
    memory = evidence["memory"]
    cases = {"zeroed_head_after": "head zero, after one step"} if page.head_is_zero(evidence) else CASES
    cases = {name: title for name, title in cases.items() if memory[name]}
    figure = Figure(figsize=page.size_of(len(cases)), layout="constrained")
    panels = figure.subplots(1, len(cases), squeeze=False)[0]
    for axes, (name, title) in zip(panels, cases.items(), strict=True):
        image = page.heat_map(axes, memory[name]["first_task"], 1, title.replace(", ", ",\n"), shown.prototypes)
    panels[0].set_ylabel("column of the classifier", fontsize=10)
    figure.colorbar(image, ax=panels, **page.COSINE, shrink=0.5, aspect=30, label="cosine similarity")
    return figure


def section(evidence: page.Evidence) -> page.Section:
    rows = [
        (name, *(page.decimals(w[f"{which}_class"]) for which in ("same", "other")), page.percent(w["nearest_is_own"]))
        for case, name in CASES.items()
        if (w := evidence["memory"][case])
    ]
    return page.Section(
        overline="Question 2",
        claim="In the inner loop the classifier memorises support features",
        lead="One inner step on cross entropy adds the support features of class i to column i of the classifier and "
        "takes those of the others away (§2.2). So afterwards column i should look like the mean support feature of "
        "its class. What all columns have in common changes no prediction, so their mean is taken off first.",
        theorem="From a zeroed head column i becomes (η/K)(μ_{i} − mean μ), as the support predictions are 1/K (§2.6).",
        picture=page.Picture(
            "memory",
            "Heat maps of cosines between classifier columns and support means",
            "One test task: cosine similarity of column i of the classifier, less the mean of all columns, and each "
            "class’s mean support feature.",
            small=page.head_is_zero(evidence),
        ),
        tables=[page.Table(("mean cosine similarity", "own class", "other classes", "nearest is own class"), rows)],
    )


def verdict(evidence: page.Evidence) -> page.Verdicts:
    nearest = evidence["memory"]["this_head_after"]["nearest_is_own"]
    words = f"after the step {page.percent(nearest)} of the columns are nearest to their own class"
    return {"Columns memorise the support of their class.": page.by_share(nearest, words)}
