"""Question 1: MAML learns features that are alike within a class."""

from dataclasses import replace

from matplotlib.figure import Figure

from fewshot.data.task import Task
from fewshot.evidence import page
from fewshot.evidence.model import Model
from fewshot.theory.features import class_similarities, mean_cosines


def measure(model: Model) -> page.Evidence:
    """Cosines between the classes of the first task, (K, K), and of all tasks: means, now and of the initial network.

    tasks_where_the_gap_grew: in how many same class less other class is larger than it was.
    """
    now, then = model.features, replace(model, network=model.initial).features
    (same, other), (same_then, other_then) = (mean_cosines(f.query, f.support, f.same_class()) for f in (now, then))
    return {
        "similarity": {
            "first_task": class_similarities(model.network, Task(*(field[0] for field in model.tasks))),
            "same_class": same.mean().item(),
            "other_class": other.mean().item(),
            "tasks": len(same),
            "initially_same_class": same_then.mean().item(),
            "initially_other_class": other_then.mean().item(),
            "tasks_where_the_gap_grew": int((same - other > same_then - other_then).sum()),
        }
    }


def draw(evidence: page.Evidence, shown: page.Shown) -> Figure:
    """Mean cosines between the classes, query x support and query x query."""
    matrices = evidence["similarity"]["first_task"]
    figure = Figure(figsize=page.size_of(2), layout="constrained")
    left, right = panels = figure.subplots(1, 2)
    title, queries = "queries (rows)\nand {} (columns)", shown.queries
    page.heat_map(left, matrices["query_support"], 1, title.format("support images"), shown.prototypes, queries)
    image = page.heat_map(right, matrices["query_query"], 1, title.format("other queries"), queries, queries)
    figure.colorbar(image, ax=panels, **page.COSINE, shrink=0.5, aspect=30, label="mean cosine similarity")
    return figure


def section(evidence: page.Evidence) -> page.Section:
    means = evidence["probes"]
    rows = [
        (name, page.decimals(means[f"cosine_same{suffix}"]), page.decimals(means[f"cosine_other{suffix}"]))
        for name, suffix in (("a query and a support image", ""), ("two queries", "_queries"))
    ]
    return page.Section(
        overline="Question 1",
        claim="MAML learns features that are alike within a class",
        lead="If the outer loop is a contrastive learner, then images of one class must have similar features and "
        "images of different classes must not, before anything is adapted.",
        picture=page.Picture(
            "similarity",
            "Heat maps of mean cosine similarity between classes",
            "One test task, features of the unadapted encoder: mean cosine similarity of the images of every two "
            "classes, an image with itself left out.",
        ),
        tables=[page.Table(("mean cosine similarity", "within a class", "across classes"), rows)],
    )


def verdict(evidence: page.Evidence) -> page.Verdicts:
    """Whether training drew classes apart: an untrained network too finds images of a class more alike than others."""
    means = evidence["similarity"]
    grew, tasks = means["tasks_where_the_gap_grew"], means["tasks"]
    same, other, same_then, other_then = (
        page.decimals(means[f"{when}{which}_class"]) for when in ("", "initially_") for which in ("same", "other")
    )
    before = f"before training {same_then} within a class, {other_then} across"
    words = f"{same} within a class, {other} across; {before}; further apart in {grew} of {tasks} tasks"
    judged = page.of_training(evidence, page.by_share(grew / tasks, words))
    return {"Training made them alike within a class, unlike across.": judged}
