"""An outer step leaves query features in the head, which hinder the next task: cross-task interference (2.7)."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fewshot.evidence import page
from fewshot.evidence.model import Model
from fewshot.results.record_files import Scores
from fewshot.theory.closed_forms import adapt_head, closed_form_gradients
from fewshot.theory.features import Features

RHO = 1.0  # of the outer step, from a zeroed head


def measure(model: Model) -> page.Evidence:
    """What a head does to a task, the head alone adapting: mean of the tasks and 95% confidence interval.

    own_task: the head is what one outer step on this very task leaves; next_task: what one on the task before leaves;
    this_head: the model's own. gain: accuracy less that from a zeroed head; aligned: cosine of the interference and the
    contrastive term; ratio: the former's norm over the latter's.
    """
    features, knobs = model.features, model.knobs
    zeroed = [_task(features.zeroed(), n) for n in range(len(features.query))]
    steps = [closed_form_gradients(task, **knobs, first_order=True) for task in zeroed]
    heads = [(-RHO * step.weight[0], None if step.bias is None else -RHO * step.bias[0]) for step in steps]
    own = [(features.weight, features.bias)] * len(heads)
    measured: page.Evidence = {}
    for name, met in (("own_task", heads), ("next_task", [heads[-1], *heads[:-1]]), ("this_head", own)):
        numbers = [_of(task, w, b, knobs) for task, (w, b) in zip(zeroed, met, strict=True)]
        scores = Scores.of(numbers)
        gain, aligned, ratio = scores.accuracy
        measured[name] = {
            "gain": gain,
            "gain_ci95": scores.ci95[0],
            "aligned": aligned,
            "aligned_ci95": scores.ci95[1],
            "ratio": ratio,
        }
    return {"cross_task": measured}


def _of(zeroed: Features, w: Tensor, b: Tensor | None, knobs: dict[str, Any]) -> list[float]:
    """gain, aligned and ratio of one task."""
    before, after = (adapt_head(task, **knobs) for task in (zeroed, zeroed._replace(weight=w, bias=b)))
    right = [(head.logits.argmax(-1) == zeroed.query_labels).double().mean() for head in (before, after)]
    terms = after.gradients(first_order=True)
    interference, contrastive = terms.interference.flatten(), terms.contrastive.flatten()
    cosine = F.cosine_similarity(interference, contrastive, dim=0)
    return [(right[1] - right[0]).item(), cosine.item(), (interference.norm() / contrastive.norm()).item()]


def _task(features: Features, n: int) -> Features:
    S, labels, Q, query_labels, w, b = features
    return Features(S[n : n + 1], labels[n : n + 1], Q[n : n + 1], query_labels[n : n + 1], w, b)


HEADS = {
    "own_task": "of one step on this task",
    "next_task": "of one step on another task",
    "this_head": "this model’s head",
}


def section(evidence: page.Evidence) -> page.Section:
    rows = [
        (
            name,
            page.interval(of_head["gain"], of_head["gain_ci95"]),
            f"{page.decimals(of_head['aligned'])} ± {page.decimals(of_head['aligned_ci95'])}",
            page.short(of_head["ratio"]),
        )
        for head, name in HEADS.items()
        if (of_head := evidence["cross_task"][head])
    ]
    heads = ("the head a task meets", "accuracy less that from zero", "interference: cosine", "relative size")
    return page.Section(
        overline="Cross-task interference",
        claim="What the head keeps of one task hinders the next",
        lead="Where the head is not zeroed it keeps what outer steps have written into it, and the next task meets it "
        "as interference (§2.7). Does that help or hinder? So a zeroed head takes one outer step on a task. Then the "
        "same task meets it, and another one does.",
        theorem="An outer step of SGD adds to row k ρ times the mean of (1[k=u] − q_{k}) φ(q) over the queries: the "
        "head stores query features of the class that was called k, and takes those of the others away. In the next "
        "task k is the name of another class: averaged over all orders of its labels, the stored part of a logit is "
        "the same for every class, and says nothing.",
        tables=[page.Table(heads, rows)],
        note=f"Means over {evidence['tasks']['features']} tasks with 95% confidence intervals; the head alone adapts, "
        "and the outer step has ρ = 1. The cosine is that of the interference term and the contrastive term, the "
        "relative size the norm of the former over that of the latter. A cosine below zero says that the two work "
        "against each other: the inner loop has to undo what the head says.",
    )


def verdict(evidence: page.Evidence) -> page.Verdicts:
    own, other, this = (evidence["cross_task"][head] for head in HEADS)
    return {
        "The task that wrote it gains from it.": _judged(own, 1),
        "Another task loses by it.": _judged(other, -1),
        "Test tasks lose by this model’s head.": page.of_own_head(evidence, _judged(this, -1)),
    }


def _judged(of_head: page.Evidence, sign: int) -> page.Verdict:
    gain, ci95 = of_head["gain"], of_head["gain_ci95"]
    words = f"accuracy changes by {page.interval(gain, ci95)}"
    told_apart = abs(gain) > ci95
    return page.either(sign * gain > 0, words) if told_apart else page.Verdict("partly", f"not told apart: {words}")
