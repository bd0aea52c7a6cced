"""From a zeroed head the first inner step moves the head alone; later steps move the encoder too (2.6, 2.9)."""

from matplotlib.figure import Figure

from fewshot.evidence import page
from fewshot.evidence.model import Model, relative
from fewshot.results.figures import OFF, ON, plain

STEPS = (1, 2, 3, 5)
ORDERS = {"fomaml": True, "somaml": False}


def measure(model: Model) -> page.Evidence:
    """What changes after N inner steps if the inner loop adapts all parameters and not the head alone.

    fomaml, somaml: relative difference of the encoder's outer gradients; agree: share of the queries that get the same
    class.
    """
    measured: page.Evidence = {}
    for head, own in model.on_few_tasks.by_head.items():
        measured[head] = {}
        for steps in STEPS:
            to_all, to_head = ({"inner_steps": steps, "adapted": adapted} for adapted in ("all", "head"))
            differences = {
                order: relative(
                    own.encoder_gradient(**to_all, first_order=f), own.encoder_gradient(**to_head, first_order=f)
                )
                for order, f in ORDERS.items()
            }
            same = own.logits(**to_all).argmax(-1) == own.logits(**to_head).argmax(-1)
            measured[head][str(steps)] = {**differences, "agree": same.double().mean().item()}
    return {"frozen_encoder": measured}


def draw(evidence: page.Evidence, shown: page.Shown) -> Figure:
    """How far the two gradients are apart over inner steps."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    lines = {"this_head": (OFF, "o", "this head"), "zeroed_head": (ON, "s", "head zeroed")}
    if page.head_is_zero(evidence):
        lines = {"zeroed_head": (ON, "s", "head zero")}
    for axes, order in zip(panels, ORDERS, strict=True):
        for head, (colour, marker, label) in lines.items():
            by_steps = evidence["frozen_encoder"][head]
            differences = [by_steps[str(steps)][order] for steps in STEPS]
            axes.plot(STEPS, differences, color=colour, marker=marker, markersize=6, label=label)
        axes.set(xlabel="inner steps", xticks=STEPS, title=order.upper())
        plain(axes)
    panels[0].set_ylim(0, 1.08 * panels[0].get_ylim()[1])
    panels[0].set_ylabel("relative difference\nof the encoder's gradients")
    panels[1].legend(frameon=False, fontsize=10, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def section(evidence: page.Evidence) -> page.Section:
    rows = [
        (
            f"{page.counted(steps)}, {name}",
            *(page.short(of_steps[order]) for order in ORDERS),
            page.percent(of_steps["agree"]),
        )
        for head, name in page.HEADS.items()
        for steps in STEPS
        if (of_steps := evidence["frozen_encoder"][head][str(steps)])
    ]
    return page.Section(
        overline="The frozen encoder",
        claim="The inner loop may be taken for one of the head alone",
        lead="Sections 2.4 to 2.6 of the method let the inner loop adapt the head alone. The inner loop of MAML adapts "
        "everything. FOMAML’s split into interference and contrastive term holds for both (§2.9), but the gradient is "
        "taken at the adapted encoder or at the initial one. How far apart these gradients are depends on the head.",
        theorem="From a zeroed head the first step moves the head alone, whatever the number of steps and in both "
        "orders: its gradient by the support features is (P − T_{S}) W_{0} / N_{s} = 0 for every θ, so θ_{1} = θ and "
        "dθ_{1}/dθ = 1 in the encoder (§2.6). With one step nothing is left out.",
        picture=page.Picture(
            "frozen_encoder",
            "Relative difference of two gradients over inner steps, FOMAML left and SOMAML right",
            "How far the encoder’s outer gradient with an inner loop of all parameters is from that of the head alone.",
        ),
        tables=[page.Table(("", "FOMAML", "SOMAML", "same prediction"), rows)],
        note=f"Relative differences of gradients that are means over {evidence['tasks']['gradients']} tasks, and the "
        "share of the queries to which both adapted models give the same class.",
    )


def verdict(evidence: page.Evidence) -> page.Verdicts:
    """The verdict is on 2 steps, whatever the model was trained with, so that several models can be compared."""
    verdicts = {}
    for head, name in page.HEADS.items():
        apart = [evidence["frozen_encoder"][head]["2"][order] for order in ORDERS]
        words = (
            f"after 2 steps FOMAML’s gradients are {page.percent(apart[0])} apart, SOMAML’s {page.percent(apart[1])}"
        )
        judged = (
            page.Verdict("partly", f"roughly: {words}")
            if 0.1 < max(apart) <= 0.5
            else page.either(max(apart) <= 0.1, words)
        )
        verdicts[f"It may, with {name}."] = judged if head == "zeroed_head" else page.of_own_head(evidence, judged)
    return verdicts
