"""An outer step leaves query features in the head, which are noise to the next task: cross-task interference (2.7)."""

import torch
import torch.nn.functional as F

from fewshot.evidence import page
from fewshot.evidence.model import Model
from fewshot.results.record_files import Scores
from fewshot.theory.closed_forms import closed_form_gradients
from fewshot.theory.features import Features

RHO = 1.0  # of the outer step, from a zeroed head


def measure(model: Model) -> page.Evidence:
    """Cosine of the interference and the contrastive term of a task's queries, and their norms' ratio, mean and ci95.

    own_task: the head is what one outer step on this very task leaves; next_task: what one on the task before leaves;
    this_head: the model's own.
    """
    features, knobs = model.features, model.knobs
    alone = [_task(features.zeroed(), n) for n in range(len(features.query))]
    steps = [closed_form_gradients(task, **knobs, first_order=True) for task in alone]
    heads = [(-RHO * step.weight[0], None if step.bias is None else -RHO * step.bias[0]) for step in steps]
    after = {
        "own_task": heads,
        "next_task": [heads[-1], *heads[:-1]],
        "this_head": [(features.weight, features.bias)] * len(heads),
    }
    measured: page.Evidence = {}
    for name, met in after.items():
        terms = [
            closed_form_gradients(task._replace(weight=w, bias=b), **knobs, first_order=True)
            for task, (w, b) in zip(alone, met, strict=True)
        ]
        both = [(term.interference.flatten(), term.contrastive.flatten()) for term in terms]
        pairs = torch.stack([torch.stack([F.cosine_similarity(i, c, dim=0), i.norm() / c.norm()]) for i, c in both])
        scores = Scores.of(pairs)
        measured[name] = {"aligned": scores.accuracy[0], "ci95": scores.ci95[0], "ratio": scores.accuracy[1]}
    return {"cross_task": measured}


def _task(features: Features, n: int) -> Features:
    S, labels, Q, query_labels, *head = features
    return Features(S[n : n + 1], labels[n : n + 1], Q[n : n + 1], query_labels[n : n + 1], *head)


HEADS = {
    "own_task": "the step was on this task",
    "next_task": "the step was on another task",
    "this_head": "this model’s head",
}


def section(evidence: page.Evidence) -> page.Section:
    rows = [
        (name, f"{page.decimals(of_head['aligned'])} ± {page.decimals(of_head['ci95'])}", page.short(of_head["ratio"]))
        for head, name in HEADS.items()
        if (of_head := evidence["cross_task"][head])
    ]
    return page.Section(
        overline="Cross-task interference",
        claim="What an outer step leaves in the head is noise to the next task",
        lead="Where the head is not zeroed it keeps what outer steps have written into it, and the next task meets it "
        "as interference (§2.7). Does that help or hinder? So a zeroed head takes one outer step on a task. Then the "
        "same task meets it, and another one does: does the interference term point where the contrastive term does?",
        theorem="An outer step of SGD adds ρ E(1[k=u] − q_{k}) φ(q) to row k: the head stores query features of the "
        "class that was called k, and takes those of the others away. In the next task k is the name of another class. "
        "Averaged over all orders of its labels, the stored part of the logits is the same for every class, so in a "
        "mean over orders it favours none.",
        tables=[page.Table(("interference where", "cosine with the contrastive term", "size over its size"), rows)],
        note=f"Means over {evidence['tasks']['features']} tasks with 95% confidence intervals, the encoder unadapted; "
        "the outer step has ρ = 1.",
    )


def verdict(evidence: page.Evidence) -> page.Verdicts:
    own, other, this = (evidence["cross_task"][head] for head in HEADS)
    words = "its cosine with the contrastive term is {} ± {}"
    own_words, other_words, this_words = (
        words.format(page.decimals(head["aligned"]), page.decimals(head["ci95"])) for head in (own, other, this)
    )
    return {
        "To the task that wrote it, the stored head is of use.": page.either(own["aligned"] > own["ci95"], own_words),
        "To another task it is noise.": page.either(abs(other["aligned"]) <= other["ci95"], other_words),
        "This model’s head is noise to its test tasks.": page.of_own_head(
            evidence, page.either(abs(this["aligned"]) <= this["ci95"], this_words)
        ),
    }
