"""One inner step writes the support features into the classifier: the poster's motivating example (2.1)."""

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from fewshot.evidence import page
from fewshot.evidence.model import Model, largest, plain, relative
from fewshot.theory.features import cosines


def measure(model: Model) -> page.Evidence:
    """One inner step on torch's mean squared error from a zero head without bias.

    classifier: cosines of the classifier's K columns and the K classes' support features, of the first task; logits
    and inner_products: of its first query of each class, (K, K) each; *_error: the worst relative one of all tasks;
    same_class, other_class: mean logits of all tasks; tasks_where_own_is_larger: in how many the former is the larger.
    """
    phi_S, labels_S, phi_Q, labels_Q, weight, _ = model.features
    K, inner_lr = len(weight), model.loop.inner_lr
    eta = 2 * inner_lr / (phi_S.shape[1] * K)  # of 1/2 the sum, what inner_lr is of the mean
    W = phi_S.new_zeros(len(phi_S), K, phi_S.shape[2], requires_grad=True)
    losses = F.mse_loss(phi_S @ W.mT, F.one_hot(labels_S, K).double(), reduction="none").mean((1, 2))
    W_1 = -inner_lr * torch.autograd.grad(losses.sum(), W)[0]
    m = model.features.support_sums()
    logits, products = phi_Q @ W_1.mT, eta * phi_Q @ m.mT
    own = F.one_hot(labels_Q, K).bool()
    chosen = [int((labels_Q[0] == k).nonzero()[0]) for k in range(K)]
    same, other = ((logits * which).sum((1, 2)) / which.sum((1, 2)) for which in (own, ~own))  # of each task
    return {
        "motivating_example": {
            "inner_lr": eta,
            "classifier": plain(cosines(W_1[0], m[0])),
            "logits": plain(logits[0, chosen]),
            "inner_products": plain(products[0, chosen]),
            "classifier_error": largest([relative(*task) for task in zip(W_1, eta * m, strict=True)]),
            "logits_error": largest([relative(*task) for task in zip(logits, products, strict=True)]),
            "same_class": logits[own].mean().item(),
            "other_class": logits[~own].mean().item(),
            "tasks": len(logits),
            "tasks_where_own_is_larger": int((same > other).sum()),
        }
    }


def draw(evidence: page.Evidence, shown: page.Shown) -> Figure:
    """The classifier against the support features, and the logits against the inner products."""
    example = evidence["motivating_example"]
    figure = Figure(figsize=page.size_of(3), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    most = np.abs([example["logits"], example["inner_products"]]).max()
    support, queries = shown.prototypes, shown.queries
    columns = page.heat_map(left, example["classifier"], 1, "column $i$ of $w_1$ and\nsupport of class $j$", support)
    logits = page.heat_map(middle, example["logits"], most, "logit of each query\nafter the step", support, queries)
    products = "inner product\n$\\eta\\,\\phi(q)\\cdot m_j$"
    page.heat_map(right, example["inner_products"], most, products, support, queries)
    figure.colorbar(columns, ax=left, **page.COSINE, shrink=0.9, aspect=18, label="cosine similarity")
    figure.colorbar(logits, ax=[middle, right], **page.BAR, shrink=0.45, aspect=18, label="logit, inner product")
    return figure


def section(evidence: page.Evidence) -> page.Section:
    example = evidence["motivating_example"]
    rows = [
        ("Mean logit of a query’s own class, which the loss wants to be 1", page.decimals(example["same_class"])),
        ("Mean logit of the other classes, which it wants to be 0", page.decimals(example["other_class"])),
        ("Relative difference of the program’s columns from the theorem", page.short(example["classifier_error"])),
        ("The same of its logits", page.short(example["logits_error"])),
    ]
    return page.Section(
        overline="Motivating example",
        claim="One inner step writes the support features into the classifier",
        lead="The simplest case (§2.1): mean squared error, a classifier w that starts at zero and has no bias, one "
        "inner step. A query’s logits are then inner products of features, and the outer loss, which wants them to be "
        "1 within a class and 0 across, is a contrastive loss.",
        theorem="Column i of w becomes η m_{i}, where m_{i} is the sum of class i’s support features, and the logits "
        "become η φ(q)·m_{i}: at w = 0 the gradient of the loss is −m_{i}, for the predictions in it are 0.",
        picture=page.Picture(
            "motivating_example",
            "Three heat maps: cosines of classifier columns and support features, logits, inner products",
            "One test task. A column of each map is a class, shown by its first support image; a row of the two maps "
            "on the right is a query. Left: column i of the classifier has cosine 1 with class i. Middle and right are "
            "the same numbers, one from an inner step, the other from the features alone.",
        ),
        tables=[page.Table((), rows)],
    )


def verdict(evidence: page.Evidence) -> page.Verdicts:
    """Whether the features give the outer loss of the example what it wants."""
    example = evidence["motivating_example"]
    larger, tasks = example["tasks_where_own_is_larger"], example["tasks"]
    own, others = page.decimals(example["same_class"]), page.decimals(example["other_class"])
    words = f"{own} for a query’s own class, {others} for the others; larger in {larger} of {tasks} tasks"
    return {"With these features the logit of a query’s own class is the larger.": page.by_share(larger / tasks, words)}
