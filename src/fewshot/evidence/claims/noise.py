"""Zeroing the head takes the noise out of the contrastive coefficients, for one inner step (2.3, 2.6)."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fewshot.evidence import page
from fewshot.evidence.model import Model, plain
from fewshot.theory.closed_forms import contrastive_coefficients


def measure(model: Model) -> page.Evidence:
    """C of the first task, (Q, S), where its sign is wrong, [q, s], and the share of wrong signs in all tasks.

    The share is that of all pairs, and of pairs of different classes, for within a class no sign is wrong. The
    coefficients are those of one step from this head and from a zeroed one, and the sum over more steps, at least two,
    from a zeroed one.
    """
    steps, other = max(2, model.loop.inner_steps), ~model.features.same_class()
    measured: page.Evidence = {"inner_steps": steps}
    cases = {name: (features, 1) for name, features in model.heads.items()}
    cases["more_steps"] = (model.features.zeroed(), steps)
    for name, (features, inner_steps) in cases.items():
        c = contrastive_coefficients(features, inner_lr=model.loop.inner_lr, inner_steps=inner_steps).sum(0)
        wrong = features.wrong_signs(c)
        measured[name] = {
            "first_task": plain(c[0]),
            "first_task_wrong": wrong[0].nonzero().tolist(),
            "wrong_sign": wrong.double().mean().item(),
            "wrong_among_other": wrong[other].double().mean().item(),
        }
    return {"coefficients": measured}


def draw(evidence: page.Evidence, shown: page.Shown) -> Figure:
    """c_qs of every query and support image, a dot where the sign is wrong."""
    coefficients = evidence["coefficients"]
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    cases = {name: f"{head},\none step" for name, head in page.HEADS.items()}
    cases["more_steps"] = f"head zeroed,\n{coefficients['inner_steps']} steps, summed"
    if page.head_is_zero(evidence):
        del cases["this_head"]
    values = {name: np.array(coefficients[name]["first_task"]) for name in cases}
    most = max(np.abs(c).max() for c in values.values())
    panels = figure.subplots(1, len(cases), sharey=True)
    for axes, (name, title) in zip(panels, cases.items(), strict=True):
        c = values[name]
        image = axes.imshow(c, cmap=page.SIGNED, vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
        if coefficients[name]["first_task_wrong"]:
            row, column = np.array(coefficients[name]["first_task_wrong"]).T
            axes.plot(column, row, ".", color="black", markersize=3.5)
        for line, labels in ((axes.axhline, shown.query_labels), (axes.axvline, shown.support_labels)):
            for border in np.flatnonzero(np.diff(labels)) + 0.5:
                line(border, color="#888888", linewidth=0.6)
        axes.set_title(title, fontsize=11)
        axes.set_xticks(*_middles(shown.support_labels))
        axes.set_yticks(*_middles(shown.query_labels))
        axes.tick_params(length=0)
        axes.set_xlabel("class of the support image")
    panels[0].set_ylabel("class of the query")
    label = "$c_{qs}$: the query is moved away (below 0) or toward (above 0)"
    figure.colorbar(image, ax=panels, location="bottom", shrink=0.6, aspect=40, label=label)
    wrong = Line2D([], [], marker=".", color="none", markerfacecolor="black", markeredgecolor="black")
    figure.legend([wrong], ["wrong sign"], loc="outside lower right", frameon=False, fontsize=10)
    return figure


def _middles(labels: np.ndarray) -> tuple[list[float], list[str]]:
    """Where each class's rows or columns have their middle, and its name."""
    return [np.flatnonzero(labels == k).mean() for k in np.unique(labels)], [str(k + 1) for k in np.unique(labels)]


def section(evidence: page.Evidence) -> page.Section:
    c = evidence["coefficients"]
    cases = {"this head, one step": c["this_head"], f"head zeroed, {c['inner_steps']} steps": c["more_steps"]}
    keys = ("wrong_sign", "wrong_among_other")
    rows = [(name, *(page.percent(case[key]) for key in keys)) for name, case in cases.items()]
    return page.Section(
        overline="Noise",
        claim="Zeroing the head takes the noise out of the contrastive coefficients, for one inner step",
        lead="How strongly query q is drawn to support image s is the coefficient c_{qs} (§2.3). A head that is not "
        "zero adds noise to it, and images of different classes can be drawn together.",
        theorem="Within a class no sign is ever wrong: c_{qs} = (1 − q_{u})(1 − s_{u}) + Σ_{j≠u} q_{j} s_{j} ≥ 0. From "
        "a zeroed head and in one step no sign at all is wrong: the support predictions are 1/K, so c_{qs} = 1[t=u] − "
        "q_{t}, and 0 < q_{t} < 1 (§2.6).",
        picture=page.Picture(
            "coefficients",
            "Heat maps of the contrastive coefficients of queries and support images",
            "One test task: a row for each query, a column for each support image. Orange draws together, blue pushes "
            "apart. A dot marks a sign that is wrong for the pair.",
        ),
        tables=[page.Table(("wrong signs", "of all pairs", "of pairs of different classes"), rows)],
    )


def verdict(evidence: page.Evidence) -> page.Verdicts:
    """How many pairs of different classes draw together: by this head in one step, by a zeroed one in more."""
    c = evidence["coefficients"]
    this, later = (c[case]["wrong_among_other"] for case in ("this_head", "more_steps"))
    together = "of the pairs of different classes are drawn together"
    with_this = page.either(this > 0, f"in one step {page.percent(this)} {together}")
    with_zero = page.by_share(1 - later, f"over {c['inner_steps']} steps {page.percent(later)} {together}")
    return {
        "This model’s head draws different classes together.": page.of_own_head(evidence, with_this),
        "From a zeroed head, later steps turn no sign.": with_zero,
    }
