"""The table and the figures by which a run ends: which steps they show, what they call the tasks, PNG and PDF."""

import copy
import math
import re

import pytest

from fewshot.results import figures, record_files


@pytest.fixture
def results(finished):
    """Of a run with five inner steps and eleven accuracies."""
    content = copy.deepcopy(record_files.read(finished))
    for mode in ("zeroing_off", "zeroing_on"):
        content["test"][mode] = {"accuracy": [step / 20 for step in range(11)], "ci95": [0.01] * 11}
    content["config"] |= {"inner_steps": 5, "test_steps": 10}
    content["best_iteration"] = 6
    return content


def shown(results, caplog, folder):
    caplog.clear()
    caplog.set_level("INFO")
    record_files.show(results, folder)
    return caplog.messages[-1]


def test_a_table_of_eleven_steps_is_folded_and_marks_inner_steps(results, caplog, tmp_path):
    text = shown(results, caplog, tmp_path)
    assert re.findall(r"│ +(\d+\*?) │", text) == ["0", "1", "5*", "10"]
    assert "confidence interval over tasks; results.json has all 11 steps\n" in text
    numbers = "25.00 ± 1.00 (zeroing off), 25.00 ± 1.00 (zeroing on)"
    assert text.splitlines()[-1] == f"Written to {tmp_path}"
    record_files.tell_result(results)
    assert caplog.messages[-1] == f"FOMAML, glyphs 5-way 1-shot: query accuracy in % after inner step 5: {numbers}"
    for mode in results["test"].keys() - {"tasks"}:
        results["test"][mode] = {name: curve[:4] for name, curve in results["test"][mode].items()}
    results["config"] |= {"inner_steps": 2}
    text = shown(results, caplog, tmp_path)
    assert re.findall(r"│ +(\d+\*?) │", text) == ["0", "1", "2*", "3"] and "results.json" not in text


def test_the_calibration_error_of_a_step_is_beside_its_accuracy(results, caplog, tmp_path):
    for mode, least in (("zeroing_off", 0.1), ("zeroing_on", 0.2)):
        results["test"][mode]["calibration"] = {"error": [least + step / 1000 for step in range(11)]}
    text = shown(results, caplog, tmp_path)
    errors = re.findall(r"│ +(\d+)\*? │.* (0\.\d{4} 0\.\d{4}) │", text)
    assert errors == [(f"{n}", f"{0.1 + n / 1000:.4f} {0.2 + n / 1000:.4f}") for n in (0, 1, 5, 10)]


def test_the_validation_accuracy_is_that_by_which_the_model_was_chosen(results):
    for mode, least in (("zeroing_off", 0.1), ("zeroing_on", 0.2)):
        results["val"][mode]["accuracy"] = [least + step / 1000 for step in range(11)]
    assert record_files.validation_accuracy(results) == pytest.approx(0.105)
    results["config"]["select"] = "zeroing_on"
    assert record_files.validation_accuracy(results) == pytest.approx(0.205)


@pytest.mark.parametrize(
    ("bad", "remedy"),
    [(0, "scale"), (1, "lower inner_lr"), (2, "lower inner_lr"), (3, "lower inner_lr, or use test_steps=2")],
)
def test_where_logits_are_not_finite_after_the_steps_of_training_alone_fewer_are_a_remedy(bad, remedy):
    accuracy = [0.5] * bad + [math.nan] * (5 - bad)
    scores = {"zeroing_off": record_files.Scores(2, [0.5] * 5, []), "zeroing_on": record_files.Scores(2, accuracy, [])}
    assert record_files.diverged(scores, 2, "scale").endswith(f"after inner step {bad}; {remedy}")


def test_a_test_with_other_inner_steps_marks_those_of_the_training(results, caplog, tmp_path):
    def marked():
        axes = figures.accuracy_over_steps(results, results["config"]).axes[0]
        return [line.get_xdata()[0] for line in axes.lines if line.get_label() == "inner_steps of training"]

    results["config"]["trained"] = {"file": "best.ckpt", "inner_steps": 3}
    text = shown(results, caplog, tmp_path)
    assert re.findall(r"│ +(\d+\*?) │", text) == ["0", "1", "3*", "5", "10"] and "*: as many steps as in" in text
    assert marked() == [3]
    results["config"]["trained"] |= {"inner_steps": 12}  # more than the test has
    text = shown(results, caplog, tmp_path)
    assert re.findall(r"│ +(\d+\*?) │", text) == ["0", "1", "5", "10"] and "as in training" not in text
    assert marked() == []


def test_only_a_model_that_validation_chose_is_said_to_be_chosen(results, caplog, tmp_path):
    assert "model of iteration 6, chosen by validation with test zeroing off\n" in shown(results, caplog, tmp_path)
    results["config"] |= {"select": "zeroing_on", "trained": {"file": "best.ckpt", "select": "zeroing_off"}}
    assert "model of iteration 6, chosen by validation with test zeroing off\n" in shown(results, caplog, tmp_path)
    results["config"]["trained"] = {"file": "last.ckpt"}
    assert "model of iteration 6\n" in shown(results, caplog, tmp_path)


def test_a_run_on_one_task_does_not_call_its_classes_test(results, caplog, tmp_path):
    assert "on 3 test tasks" in shown(results, caplog, tmp_path)
    results["config"]["dataset"]["tasks"] = "one_task"
    assert "on 3 tasks of the split of its one task" in shown(results, caplog, tmp_path)
    figure = figures.accuracy_over_steps(results, results["config"])
    assert "over 3 tasks of the split of its one task" in figure.axes[0].get_title()


@pytest.mark.slow
def test_figures_are_png_and_where_asked_for_pdf_too(results, tmp_path, caplog):
    caplog.set_level("INFO")
    figures.write(tmp_path, results)
    assert [path.name for path in sorted((tmp_path / "figures").iterdir())] == ["accuracy_over_steps.png"]
    results["config"]["figures"] = {"format": "pdf"}
    figures.write(tmp_path, results)
    pdf = (tmp_path / "figures" / "accuracy_over_steps.pdf").read_bytes()
    assert pdf.startswith(b"%PDF") and b"/Subtype /Image" not in pdf  # vectors
    figures.write(tmp_path, results)
    assert (tmp_path / "figures" / "accuracy_over_steps.pdf").read_bytes() == pdf
    assert not caplog.messages  # of the fonts' tables


def test_lines_are_told_apart_without_colour(results):
    axes = figures.accuracy_over_steps(results, results["config"]).axes[0]
    off, on = (lines.lines[0] for lines in axes.containers)
    assert off.get_linestyle() != on.get_linestyle() and off.get_marker() != on.get_marker()
    assert "inner_steps of training" in [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize(("shots", "wanted"), [(1, 1), (5, 0.2)])
def test_the_inner_products_of_a_class_are_to_add_up_to_one(results, shots, wanted):
    counts = [[1] * 120]
    content = {"between": [-1, 2], "updates": [0], "same_class": counts, "other_class": counts}
    (axes,) = figures.inner_products(content, results["config"] | {"shots": shots}).axes
    assert [line.get_xdata()[0] for line in axes.lines] == [0, wanted]
    assert ("on average" in axes.get_xlabel()) == (shots > 1)
