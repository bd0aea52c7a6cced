"""Question 3: support features act as prototypes (2.6)."""

from matplotlib.figure import Figure

from fewshot.evidence import page
from fewshot.evidence.model import Model
from fewshot.maml import sequential
from fewshot.results.figures import OFF, ON, plain
from fewshot.theory.features import agreement, tied


def measure(model: Model) -> page.Evidence:
    """The share of the queries that the adapted model and the prototype classifier give one class, 1 .. T steps.

    accuracy: of the prototype classifier, which chooses the first of a tie; ties: queries for which it has one.
    """
    scores, labels = model.features.prototype_scores(), model.tasks.query_labels
    measured: page.Evidence = {
        "queries": labels.numel(),
        "ties": int((tied(scores).sum(-1) > 1).sum()),
        "accuracy": (scores.argmax(-1) == labels).double().mean().item(),
    }
    for name, zeroing in (("this_head", False), ("zeroed_head", True)):
        loop = model.maml(inner_steps=model.test_steps, zeroing=zeroing, adapted=model.loop.adapted)
        (logits,) = sequential.step_logits(model.network, model.tasks, [loop])  # (B, T + 1, Q, K)
        measured[name] = agreement(scores[:, None].expand_as(logits), logits)[:, 1:].double().mean((0, 2)).tolist()
    return {"prototypes": measured}


def draw(evidence: page.Evidence, shown: page.Shown) -> Figure:
    """Agreement of the adapted model and the prototype classifier over inner steps."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    lines = {"this_head": (OFF, "o", "from this model's head"), "zeroed_head": (ON, "s", "from a zeroed head")}
    if page.head_is_zero(evidence):
        lines = {"zeroed_head": (ON, "s", "from this model's head,\nwhich is zero")}
    for name, (colour, marker, label) in lines.items():
        steps = range(1, len(evidence["prototypes"][name]) + 1)
        axes.plot(steps, evidence["prototypes"][name], color=colour, marker=marker, markersize=6, label=label)
    axes.axhline(1 / shown.ways, color="grey", linewidth=0.9, linestyle="--", label="chance")
    axes.set(xlabel="inner step", ylabel="share of queries given\nthe same class", ylim=(0, 1.04))
    axes.set_xticks(steps)
    plain(axes)
    axes.legend(frameon=False, fontsize=10, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def section(evidence: page.Evidence) -> page.Section:
    agreements = evidence["prototypes"]
    shares = zip(agreements["this_head"], agreements["zeroed_head"], strict=True)
    ties, queries = agreements["ties"], agreements["queries"]
    with_ties = f"{ties} of the {queries} queries have a tie, any class of which counts as agreement."
    return page.Section(
        overline="Question 3",
        claim="Support features act as prototypes",
        lead="A classifier made of support features compares a query with them: it chooses the class whose mean "
        "support feature has the largest inner product with the query’s, argmax_{k} φ(q)·μ_{k}.",
        theorem="From a zeroed head one inner step is exactly this classifier, whatever the inner learning rate: the "
        "logits are (η/K)(φ(q)·μ_{k} − what is the same for all k), and the encoder has not moved (§2.6).",
        picture=page.Picture(
            "prototypes",
            "Agreement with the prototype classifier over inner steps",
            "Share of the queries to which the adapted model and the prototype classifier give the same class.",
        ),
        tables=[
            page.Table(
                ("inner step", "from this head", "from a zeroed head"),
                [(str(step), *(page.percent(share) for share in both)) for step, both in enumerate(shares, 1)],
            )
        ],
        note=f"Of {queries} queries the prototype classifier, which adapts nothing, gets "
        f"{page.percent(agreements['accuracy'])} right. {with_ties if ties else 'No query has a tie.'}",
    )


def verdict(evidence: page.Evidence) -> page.Verdicts:
    """Whether predictions agree: from a zeroed head beyond the one step of the theorem, from this head after one."""
    this, zeroed = (evidence["prototypes"][name] for name in page.HEADS)
    agree = f"from a zeroed head {page.percent(zeroed[-1])} of the predictions agree after {len(zeroed)} steps"
    one_step = page.Verdict("untested", "not tested: one inner step is measured, add test_steps=2")
    zeroed = page.by_share(zeroed[-1], agree) if len(zeroed) > 1 else one_step
    with_this = page.by_share(this[0], f"from this head {page.percent(this[0])} agree after one step")
    return {
        "With the head zeroed, beyond the first step.": zeroed,
        "With this head.": page.of_own_head(evidence, with_this),
    }
