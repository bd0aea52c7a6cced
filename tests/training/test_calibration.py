"""How sure predictions are and how often they are right: by arithmetic, on a simulation, and in what a test leaves."""

import json
from itertools import product

import pytest
import torch
from examples import draw, tiny

from fewshot.compare import report
from fewshot.inner_loop import InnerLoop
from fewshot.maml import sequential
from fewshot.results import record_files
from fewshot.results.task_scores import read_tasks
from fewshot.sweep.pairs import Row
from fewshot.sweep.settings import Job, Setting
from fewshot.training.choose_engine import sequential_engine
from fewshot.training.evaluation import Evaluation, calibration


def calibrated_by_hand(confidence, right):
    """15 bins of equal width, those of which the left end is in them; certainty is in the last."""
    bins = [[] for _ in range(15)]
    for p, correct in zip(confidence, right, strict=True):
        bins[min(int(p * 15), 14)].append((p, correct))
    n = len(confidence)
    gaps = [abs(sum(p for p, _ in b) / len(b) - sum(c for _, c in b) / len(b)) * len(b) / n for b in bins if b]
    return sum(gaps), [len(b) for b in bins], [sum(p for p, _ in b) / len(b) if b else None for b in bins]


def test_the_calibration_error_is_that_of_the_arithmetic_and_nearly_zero_where_predictions_are_calibrated():
    generator = torch.Generator().manual_seed(0)
    confidence = 0.2 + 0.8 * torch.rand(40, 2, 250, generator=generator, dtype=torch.double)
    confidence[:2, 0] = 1.0
    chances = torch.rand(40, 2, 250, generator=generator, dtype=torch.double)
    right = torch.stack([chances[:, 0] < confidence[:, 0], chances[:, 1] < 0.5], 1).double()  # calibrated; or a coin
    right[0, 0, :20] = 0.0  # some of the certain are wrong
    measured = calibration(torch.stack([confidence, right], 2))
    for step in range(2):
        error, counts, means = calibrated_by_hand(
            confidence[:, step].flatten().tolist(), right[:, step].flatten().tolist()
        )
        assert measured["error"][step] == pytest.approx(error, abs=2e-6)
        assert measured["bins"]["queries"][step] == counts and sum(counts) == 10_000
        assert measured["bins"]["confidence"][step] == pytest.approx(means, abs=1e-6)
        assert measured["bins"]["accuracy"][step][:3] == [None] * 3  # below a fifth
    assert measured["error"][0] < 0.02 and measured["error"][1] == pytest.approx(0.2125, abs=0.02)
    assert measured["confidence"] == pytest.approx(confidence.mean((0, 2)).tolist(), abs=1e-5)


def test_the_confidence_of_a_prediction_is_the_probability_of_its_class():
    network, tasks, loop = tiny(), draw(tasks=3, queries=4, spread=1.5), InnerLoop(1, 0.4, first_order=True)
    evaluation = Evaluation(2, calibration=True)
    measured = evaluation.measure(sequential_engine(), network, loop, (), tasks, final=True)
    evaluation.keep("test", [measured], loop.inner_steps)
    for mode, zeroing in (("zeroing_off", False), ("zeroing_on", True)):
        (logits,) = sequential.step_logits(network, tasks, [loop.evaluation(2, zeroing)])
        powers = logits.exp()
        expected = (powers / powers.sum(-1, keepdim=True)).amax(-1).mean((0, 2))
        actual = evaluation.results["task"]["test"][mode].calibration["confidence"]
        assert actual == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_test_with_calibration_has_the_accuracies_of_one_without_it_and_the_errors(run, finished, tmp_path):
    folder = run(tmp_path / "tested", f"checkpoint={finished}", "fit=false", "calibration=true", pictures=True)
    assert (folder / "figures" / "reliability.png").read_bytes().startswith(b"\x89PNG")
    results, usual = (json.loads((path / "results.json").read_text()) for path in (folder, finished))
    for split, mode in product(("val", "test"), ("zeroing_off", "zeroing_on")):
        measured = results[split][mode].pop("calibration")
        queries = 15 * results[split]["tasks"]
        assert [sum(step) for step in measured["bins"]["queries"]] == [queries] * 4
        for step in range(4):
            counts, right = measured["bins"]["queries"][step], measured["bins"]["accuracy"][step]
            share = sum(n * accuracy for n, accuracy in zip(counts, right, strict=True) if n) / queries
            assert share == pytest.approx(results[split][mode]["accuracy"][step], abs=1e-4)
    assert results["test"] == usual["test"]
    assert read_tasks(folder)["zeroing_off"].tolist() == read_tasks(finished)["zeroing_off"].tolist()
    job = Job(folder, record_files.read(folder)["config"], record_files.read(folder), {}, None)
    row = Row(Setting({}, [job]), "zeroing_on", 2, 0.5, None, None)
    heads, table = report.calibration([row])
    read = record_files.read(folder)["test"]["zeroing_on"]["calibration"]
    assert heads[-2:] == ["calibration error", "seeds"] and table[0][-1] == "1"
    assert table[0][-3:-1] == [f"{100 * read[name][2]:.2f}" for name in ("confidence", "error")]
