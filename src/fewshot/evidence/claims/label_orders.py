"""From a zeroed head the order of the labels makes no difference (2.10)."""

import itertools

import numpy as np
import torch
from matplotlib.figure import Figure

from fewshot.data.task import Task
from fewshot.evidence import page
from fewshot.evidence.model import Model, largest, plain
from fewshot.maml import sequential
from fewshot.results import figures

TASKS = 4  # the first of the tasks
MOST = 120  # orders: all of up to five labels; of more labels so many, always the same


def orders(ways: int) -> torch.Tensor:
    """(orders, K): what label becomes of every label; the first leaves them as they are."""
    if ways <= 5:
        return torch.tensor(list(itertools.permutations(range(ways))))
    random = np.random.default_rng(0)
    return torch.tensor(np.stack([np.arange(ways), *(random.permutation(ways) for _ in range(MOST - 1))]))


def measure(model: Model) -> page.Evidence:
    """Accuracy of the model on each of some tasks for every order of its labels, after the inner steps of training.

    accuracies: (tasks, orders); spread, largest_spread: best less worst order of a task, mean and largest over tasks;
    apart: the largest difference of a prediction from the one in the first order, its classes put back into that.
    """
    renamed = orders(len(model.features.weight))
    support, labels, query, query_labels = (field[:TASKS] for field in model.tasks)
    measured: page.Evidence = {"orders": len(renamed), "inner_steps": model.loop.inner_steps}
    for head, own in model.by_head.items():
        loop = own.maml(inner_steps=own.loop.inner_steps, adapted=own.loop.adapted)
        logits = []
        for order in renamed:
            tasks = Task(support, order[labels], query, order[query_labels])
            renamed_logits = sequential.step_logits(own.network, tasks, [loop], first=loop.inner_steps)[0, :, 0]
            logits.append(renamed_logits[..., order])  # of the classes that were called 0, 1, ...
        predictions = torch.stack(logits, dim=1).softmax(-1)  # (tasks, orders, Q, K)
        accuracies = (predictions.argmax(-1) == query_labels[:, None]).double().mean(-1)
        spread = accuracies.amax(1) - accuracies.amin(1)
        measured[head] = {
            "accuracies": plain(accuracies),
            "spread": spread.mean().item(),
            "largest_spread": spread.max().item(),
            "apart": largest(predictions - predictions[:, :1]),
        }
    return {"label_orders": measured}


def draw(evidence: page.Evidence, shown: page.Shown) -> Figure:
    """A row of dots for each task, a dot for each order, and the mean of all orders."""
    measured = evidence["label_orders"]
    heads = {"zeroed_head": "head zero"} if page.head_is_zero(evidence) else page.HEADS
    tasks = len(measured["zeroed_head"]["accuracies"])
    figure = Figure(figsize=(8, 1.3 + 0.42 * tasks * len(heads)), layout="constrained")
    axes = figure.subplots()
    random = np.random.default_rng(0)
    places, names = [], []
    for head, name in heads.items():
        colour = {"this_head": figures.OFF, "zeroed_head": figures.ON}[head]
        for task, accuracies in enumerate(measured[head]["accuracies"]):
            place = len(places)
            jitter = place + random.uniform(-0.28, 0.28, len(accuracies))
            axes.plot(accuracies, jitter, "o", color=colour, alpha=0.35, markersize=4.5, markeredgewidth=0)
            axes.plot([np.mean(accuracies)] * 2, [place - 0.4, place + 0.4], color="black", linewidth=1.5)
            places.append(place)
            names.append(f"{name}, task {task + 1}")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set(xlabel="query accuracy of one task, a dot for each order of its labels", xlim=(None, 1.02))
    figures.plain(axes)
    return figure


def section(evidence: page.Evidence) -> page.Section:
    measured = evidence["label_orders"]
    steps = page.counted(measured["inner_steps"])
    rows = [
        (
            name,
            page.percent(np.mean(measured[head]["accuracies"]).item()),
            *(page.percent(measured[head][key]) for key in ("spread", "largest_spread")),
            page.short(measured[head]["apart"]),
        )
        for head, name in page.HEADS.items()
    ]
    heads = ("", "mean accuracy", "best less worst order, mean", "largest", "predictions apart")
    return page.Section(
        overline="The order of the labels",
        claim="From a zeroed head the order of the labels makes no difference",
        lead="Which class of a task is called 1 and which 2 says nothing of the images. To a head that is not zero it "
        f"matters, for its rows differ. So one model gets one task {measured['orders']} times, with its labels in "
        f"another order, and adapts for {steps}.",
        theorem="A head of equal rows has no order: with the labels renamed, a row of W_{p} is the row of the class "
        "that now has its label, and the encoder’s gradients are sums over classes. So adapted encoders, predictions "
        "and accuracy are the same in every order (§2.10).",
        picture=page.Picture(
            "label_orders",
            "Rows of dots, accuracy of one task in many orders of its labels",
            f"A dot is the accuracy of one task in one of {measured['orders']} orders of its labels, a bar the mean.",
        ),
        tables=[page.Table(heads, rows)],
        note="The last column is the largest difference of a prediction, its classes put back into the first order.",
    )


def verdict(evidence: page.Evidence) -> page.Verdicts:
    """Whether accuracy depends on the order with this head; with a zeroed one it is a theorem that it does not."""
    this = evidence["label_orders"]["this_head"]
    words = f"best and worst order are {page.percent(this['spread'])} of the queries apart, in a mean over tasks"
    judged = page.either(this["largest_spread"] > 0, words)
    return {"With this model’s head accuracy depends on the order.": page.of_own_head(evidence, judged)}
