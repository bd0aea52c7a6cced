"""FOMAML moves the queries, SOMAML moves queries and support: panel 3 of the poster (2.4, 2.5)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from fewshot.evidence import page
from fewshot.evidence.model import Model, plain
from fewshot.theory.closed_forms import closed_form_gradients
from fewshot.theory.features import Features

ORDERS = {"fomaml": True, "somaml": False}
# Okabe-Ito, and a marker each: eight classes are told apart without colour too, 64 by both.
CLASSES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
STEP: dict[str, Any] = {"marker": r"$\rightarrow$", "markeredgewidth": 0, "markersize": 16}


def measure(model: Model) -> page.Evidence:
    """Where an outer step moves the features of the first task, in the plane that shows most of their spread.

    support, query: places (S, 2), (Q, 2). For each head and order "arrows" against the gradient, likewise; and of all
    tasks the mean norm of the support's and of the query's gradient, and the share of pairs (q, s) whose inner product
    the step, if small, moves the right way: up within a class, down across.
    """
    features = model.features
    middle, plane, spread_shown = plane_of(features)
    measured: page.Evidence = {
        "spread_shown": spread_shown,
        "support": plain((features.support[0] - middle) @ plane),
        "query": plain((features.query[0] - middle) @ plane),
    }
    same = features.same_class()
    for head, with_head in model.heads.items():
        measured[head] = {}
        for order, first_order in ORDERS.items():
            gradients = closed_form_gradients(with_head, **model.knobs, first_order=first_order)
            to_Q, to_S = -gradients.query_features, -gradients.support_features
            change = to_Q @ features.support.mT + features.query @ to_S.mT  # of phi(q).phi(s), (B, Q, S)
            measured[head][order] = {
                "query_arrows": plain(to_Q[0] @ plane),
                "support_arrows": plain(to_S[0] @ plane),
                "query_norm": to_Q.flatten(1).norm(dim=1).mean().item(),
                "support_norm": to_S.flatten(1).norm(dim=1).mean().item(),
                "same_class_drawn": (change > 0)[same].double().mean().item(),
                "other_class_pushed": (change < 0)[~same].double().mean().item(),
            }
    return {"outer_step": measured}


def plane_of(features: Features) -> tuple[Tensor, Tensor, float]:
    """The first task's middle (d,), its two directions of most spread (d, 2), and their share of the spread."""
    phi = torch.cat([features.support[0], features.query[0]])
    _, spread, axes = torch.linalg.svd(phi - phi.mean(0), full_matrices=False)
    plane = axes[:2] * torch.where(axes[:2].sum(1) < 0, -1.0, 1.0)[:, None]  # one picture, whatever signs svd chose
    shown = (spread[:2].square().sum() / spread.square().sum()).item()
    return phi.mean(0), F.pad(plane.mT, (0, 2 - len(plane))), shown  # of a single feature, a line


def draw(evidence: page.Evidence, shown: page.Shown) -> Figure:
    """FOMAML beside SOMAML, from this model's head and from a zeroed one."""
    step = evidence["outer_step"]
    heads = {"zeroed_head": "head zero"} if page.head_is_zero(evidence) else page.HEADS
    return panels(step, {name: step[head] for head, name in heads.items()}, shown)


def panels(step: page.Evidence, rows: dict[str, page.Evidence], shown: page.Shown, to_scale: str = "") -> Figure:
    """The features of `step` and a row of arrows for each title, FOMAML left.

    Queries and support have a scale each, the same left and right; in row `to_scale` each panel has one for both.
    """
    everything = np.array(step["support"] + step["query"])
    low, high = everything.min(0), everything.max(0)
    span = max(high - low)
    margin = 0.22 * span  # more than the longest arrow
    wide, tall = high - low + 2 * margin
    figure = Figure(figsize=(9, 0.7 + (0.4 + 4.4 * tall / wide) * len(rows)), layout="constrained")
    for row, (title, orders) in zip(figure.subplots(len(rows), 2, squeeze=False), rows.items(), strict=True):
        arrows = {
            (kind, order): np.array(orders[order][f"{kind}_arrows"])
            for kind in ("query", "support")
            for order in ORDERS
        }
        lengths = {key: np.hypot(*of_both.T).max() for key, of_both in arrows.items()}
        for axes, order in zip(row, ORDERS, strict=True):
            for kind, labels in (("query", shown.query_labels), ("support", shown.support_labels)):
                alike = order if title == to_scale else kind
                longest = max(length for key, length in lengths.items() if alike in key)
                scale = longest / (0.2 * span)  # of the longest arrow, in the picture
                _moved(axes, np.array(step[kind]), arrows[kind, order], labels, scale, kind == "support")
            axes.set_title(f"{order.upper()}, {title}", fontsize=11)
            limits = zip(("xlim", "ylim"), zip(low - margin, high + margin, strict=True), strict=True)
            axes.set(xticks=[], yticks=[], aspect="equal", **dict(limits))
            axes.spines[:].set_color("#BBBBBB")
    grey: dict[str, Any] = {"marker": "o", "color": "none", "markerfacecolor": "grey"}
    legend = {
        "support image": Line2D([], [], **grey, markeredgecolor="black", markersize=11),
        "and its step": Line2D([], [], **STEP, color="none", markerfacecolor="black"),
        "query": Line2D([], [], **grey, markeredgecolor="none", markersize=5),
        "and the query's step": Line2D([], [], **STEP, color="none", markerfacecolor="grey"),
    }
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    return figure


def _moved(axes: Axes, places: np.ndarray, arrows: np.ndarray, labels: np.ndarray, scale: float, large: bool) -> None:
    """Images at their places (I, 2), their class in colour and shape; arrows (I, 2), drawn divided by scale."""
    for k in np.unique(labels):
        colour, marker = CLASSES[k % len(CLASSES)], MARKERS[(k + k // len(CLASSES)) % len(MARKERS)]
        x, y = places[labels == k].T
        edge: dict[str, Any] = {"edgecolors": "black", "linewidths": 1.2} if large else {"linewidths": 0}
        axes.scatter(x, y, s=150 if large else 22, c=colour, marker=marker, zorder=3 if large else 2, **edge)
        u, v = arrows[labels == k].T
        if (moves := np.hypot(u, v) > 0).any():
            style = {"color": "black" if large else colour, "width": 0.008 if large else 0.0045}
            ends = (values[moves] for values in (x, y, u, v))
            axes.quiver(*ends, angles="xy", scale_units="xy", scale=scale, zorder=4 if large else 2, **style)


def section(evidence: page.Evidence) -> page.Section:
    step, terms, steps = evidence["outer_step"], evidence["probes"], evidence["config"]["inner_steps"]
    rows = [
        (
            f"{order.upper()}, {name}",
            *(page.short(step[head][order][key]) for key in ("query_norm", "support_norm")),
            *(page.percent(step[head][order][key]) for key in ("same_class_drawn", "other_class_pushed")),
        )
        for head, name in page.HEADS.items()
        for order in ORDERS
    ]
    return page.Section(
        overline="The contrastive perspective",
        claim="FOMAML moves the queries, SOMAML moves queries and support",
        lead="Seen from the features, the outer step moves a query toward the support features of its class and away "
        "from the others (§2.4), and under SOMAML the support features too (§2.5). As in most of the theory, the "
        "inner loop is that of the head alone.",
        theorem="FOMAML moves queries only: it takes what the inner loop made of the support features for constants, "
        "so their gradient is 0. SOMAML’s gradient goes back through the inner loop, which is made of them.",
        picture=page.Picture(
            "outer_step",
            "Features of a task in two dimensions with arrows, FOMAML left and SOMAML right",
            "The features of one test task along their two principal directions, which hold "
            f"{page.percent(step['spread_shown'])} of their variance. Colour and shape are the class. Arrows go "
            f"against the gradient with respect to the features after {page.counted(steps)}; queries and support "
            "have a scale each in every row, the same left and right. The encoder, which serves all images at once, "
            "can follow them only roughly.",
        ),
        tables=[
            page.Table(
                ("", "step of the queries", "step of the support", "same class drawn", "other classes pushed"), rows
            )
        ],
        note=f"Steps are norms of the gradient, means over {evidence['tasks']['features']} tasks. The last two columns "
        "count the pairs of a query and a support image whose inner product a small step moves the right way, up "
        "within a class and down across; steps add up, so not every pair moves its way. With this model’s head the "
        f"queries’ step is the sum of an interference term of norm {page.short(terms['interference_norm'])} and a "
        f"contrastive term of norm {page.short(terms['contrastive_norm'])}; with a zeroed head it is the latter alone.",
    )


def verdict(evidence: page.Evidence) -> page.Verdicts:
    """Whether pairs of query and support move the right way, under FOMAML and SOMAML with this head."""
    verdicts = {}
    for order in ORDERS:
        of_order = evidence["outer_step"]["this_head"][order]
        drawn, pushed = page.percent(of_order["same_class_drawn"]), page.percent(of_order["other_class_pushed"])
        about = f"{order.upper()}’s outer step moves pairs of a query and a support image the right way."
        words = f"{drawn} of the pairs of a class are drawn together, {pushed} of the others apart"
        verdicts[about] = page.by_share(min(of_order["same_class_drawn"], of_order["other_class_pushed"]), words)
    return verdicts
