"""The head need not be remembered between tasks (2.7)."""

from matplotlib.figure import Figure

from fewshot.config.tree import MODES
from fewshot.evidence import page
from fewshot.evidence.model import Model
from fewshot.results.figures import accuracy_over_steps
from fewshot.results.record_files import Scores


def measure(model: Model) -> page.Evidence:
    """Accuracies in each mode, and what zeroing gains, which is paired, for the tasks are the same."""
    tested = {**model.tested, "gain": model.tested["zeroing_on"] - model.tested["zeroing_off"]}
    scores = {name: Scores.of(accuracies) for name, accuracies in tested.items()}
    columns = {name: {"accuracy": score.accuracy, "ci95": score.ci95} for name, score in scores.items()}
    return {"test": {"tasks": scores["gain"].tasks, **columns}}


def draw(evidence: page.Evidence, shown: page.Shown) -> Figure:
    return accuracy_over_steps(evidence, evidence["config"])


def section(evidence: page.Evidence) -> page.Section:
    test = evidence["test"]
    modes = [zip(test[mode]["accuracy"], test[mode]["ci95"], strict=True) for mode in MODES]
    rows = [
        (str(step), *(page.interval(*score) for score in both)) for step, both in enumerate(zip(*modes, strict=True))
    ]
    return page.Section(
        overline="Accuracy",
        claim="The head need not be remembered between tasks",
        lead="What a head keeps from one task to the next are features of unrelated tasks (§2.7). If that is mere "
        "noise, a head that is zeroed before it adapts to a test task does as well.",
        picture=page.Picture(
            "accuracy",
            "Test accuracy over inner steps, with and without zeroing the head",
            f"Query accuracy after every inner step: mean over {test['tasks']} test tasks and 95% confidence interval.",
        ),
        tables=[page.Table(("inner step", "test zeroing off", "test zeroing on"), rows)],
    )


def verdict(evidence: page.Evidence) -> page.Verdicts:
    """Whether test-time zeroing costs accuracy after the inner steps of training."""
    step, gained = evidence["config"]["inner_steps"], evidence["test"]["gain"]
    gain, ci95 = gained["accuracy"][step], gained["ci95"][step]
    judged = ("fails", "does not hold") if gain + ci95 < 0 else ("partly", "not told apart")
    kind, words = ("holds", "holds, and more") if gain > ci95 else judged
    judged = page.Verdict(kind, f"{words}: zeroing changes accuracy by {page.interval(gain, ci95)} after step {step}")
    judged = page.of_training(evidence, page.of_own_head(evidence, judged))
    return {"Zeroing the head at test time costs nothing.": judged}
