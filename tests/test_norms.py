"""By whose statistics queries are normalised: every engine against plain arithmetic, and what a run leaves of it."""

import json
from functools import cache, partial

import pytest
import torch
from by_hand import conv4_gradient, logits_by_statistics
from conftest import outcome
from examples import NETWORKS, assert_close, convolutional, evaluations, images_for, meta_gradient
from torch import nn

from fewshot.algorithms.reptile import Reptile
from fewshot.batched import engine as batched
from fewshot.batched.side_by_side import NotSideBySide
from fewshot.config.tree import STATISTICS
from fewshot.data.task import Task
from fewshot.errors import UserError
from fewshot.export import export
from fewshot.files import checkpoint_file
from fewshot.maml import sequential
from fewshot.models.network import conv4_strided
from fewshot.norms import norm as norm_of
from fewshot.predict import Adapted, adapt
from fewshot.predict.pretrained import load
from fewshot.results.task_scores import read_tasks

BUILD = NETWORKS["conv4_strided"]


def refused(*args, **knobs):
    raise NotSideBySide


def example():
    tasks = images_for(BUILD, tasks=2, shots=2, queries=2)
    return convolutional(BUILD, tasks), tasks


@cache
def by_arithmetic():
    network, tasks = example()
    tasks = [Task(*fields) for fields in zip(*tasks, strict=True)]
    of_all = [
        torch.stack([logits_by_statistics(network, task, 0.1, 2, zeroing, words) for task in tasks])
        for words in STATISTICS
        for zeroing in (False, True)
    ]
    return torch.stack(of_all)


@pytest.mark.parametrize("engine", ["sequential", "in a row", "one at a time", "side by side", "vmap"])
def test_every_engine_normalises_as_the_arithmetic_does(engine, monkeypatch):
    network, tasks = example()
    options = {"tasks_at_once": 1} if engine == "one at a time" else {}
    if engine == "side by side":
        monkeypatch.setattr(batched, "tasks_in_a_row", lambda x: False)
    if engine == "vmap":
        monkeypatch.setattr(batched, "in_a_row", refused)
    modes = evaluations(inner_lr=0.1, steps=2, zeroing=(False, True))
    step_logits = sequential.step_logits if engine == "sequential" else batched.step_logits
    logits = step_logits(network, tasks, *modes, STATISTICS, **options)  # (statistics x modes, B, T + 1, Q, K)
    expected = by_arithmetic()
    assert (logits - expected).abs().max() < 1e-10 * expected.abs().max()
    alone = step_logits(network, tasks, *modes, **options)
    assert torch.equal(alone, logits[:2])  # asked for others or not, bit by bit
    apart = [(logits[a] - logits[b]).abs().max() for a, b in ((0, 2), (2, 4), (0, 4))]
    assert min(apart) > 1e-3  # three different questions


SMALL = partial(conv4_strided, channels=1, size=27, width=16)  # two groups of eight channels


@pytest.mark.parametrize("first_order", [True, False], ids=["FOMAML", "SOMAML"])
@pytest.mark.parametrize("norm, width", [("group", 16), ("task", 8)])
def test_the_outer_gradient_through_a_norm_is_that_of_the_arithmetic(norm, width, first_order, monkeypatch):
    tasks = images_for(SMALL, tasks=2, shots=2, queries=1, ways=2)
    network = convolutional(partial(SMALL, norm=norm, width=width), tasks)
    for name, parameter in network.named_parameters():
        if name.endswith(("scale", "offset")):
            parameter.data.fill_(0.1)
    knobs = {"inner_lr": 0.1, "inner_steps": 2, "first_order": first_order}
    expected = conv4_gradient(network, tasks, 0.1, 2, first_order, norm)
    assert_close(meta_gradient(sequential, network, tasks, **knobs)[0], expected, 1e-10)
    ways = {"in a row": {}, "one at a time": {"tasks_at_once": 1}, "recomputed": {"recompute_steps": True}}
    for options in ways.values():
        assert_close(meta_gradient(batched, network, tasks, **knobs, **options)[0], expected, 1e-10)
    assert_close(meta_gradient(sequential, network, tasks, **knobs, recompute_steps=True)[0], expected, 1e-10)
    monkeypatch.setattr(batched, "tasks_in_a_row", lambda x: False)
    assert_close(meta_gradient(batched, network, tasks, **knobs)[0], expected, 1e-10)
    monkeypatch.setattr(batched, "SideBySide", refused)
    assert_close(meta_gradient(batched, network, tasks, **knobs)[0], expected, 1e-10)


@pytest.mark.parametrize("engine", [sequential, batched])
def test_an_outer_gradient_of_ones_own_has_the_query_loss_by_the_statistics_of_the_support(engine):
    tasks = images_for(SMALL, tasks=2, shots=1, queries=2)
    network = convolutional(partial(SMALL, norm="task", width=8), tasks)
    losses, _, measured = engine.meta_gradient(network, tasks, Measuring(1, 0.1, first_order=True))
    torch.testing.assert_close(measured, losses, rtol=1e-10, atol=0)


class Measuring(Reptile):
    measures = ("query_loss",)

    def outer_gradient(self, theta, theta_N, support_loss, query_loss):
        gradients, _ = super().outer_gradient(theta, theta_N, support_loss, query_loss)
        return gradients, {"query_loss": query_loss(theta_N)}


def test_the_groups_of_a_width_are_of_eight_channels_or_of_the_fewest_above():
    groups = {width: norm_of(width, "group").num_groups for width in (4, 8, 12, 20, 28, 64)}
    assert groups == {4: 1, 8: 1, 12: 1, 20: 2, 28: 2, 64: 8}


@pytest.mark.parametrize("norm", ["group", "task"])
def test_a_norm_looks_at_no_other_query_and_the_statistics_change_nothing(norm):
    tasks = images_for(SMALL, tasks=2, shots=1, queries=2)
    network = convolutional(partial(SMALL, norm=norm), tasks)
    modes = evaluations(inner_lr=0.1, steps=1, zeroing=(False, True))
    for step_logits in (sequential.step_logits, batched.step_logits):
        by_task, by_support, by_each = step_logits(network, tasks, *modes, STATISTICS).split(2)
        torch.testing.assert_close(by_support, by_task, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(by_each, by_task, rtol=1e-10, atol=1e-10)
        fewer = tasks._replace(query=tasks.query[:, :3], query_labels=tasks.query_labels[:, :3])
        alone = step_logits(network, fewer, *modes)
        torch.testing.assert_close(alone, by_task[:, :, :, :3], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["group", "task"])
def test_a_network_with_another_norm_is_trained_continued_exported_and_predicts(run, tmp_path, norm):
    knobs = (f"model.norm={norm}", "+zeroing=true", "iterations=1", "val_every=1", "test_tasks=2", "test_steps=2")
    folder = run(tmp_path / "run", *knobs)
    run(folder, f"checkpoint={folder}", "iterations=2")
    export(checkpoint_file(folder, "best"), tmp_path / "exported")
    pixels = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    said = []
    for words in STATISTICS:
        adapted = adapt(tmp_path / "exported", {"a": pixels[:1], "b": pixels[1:3]}, statistics=words)
        together, alone = (adapted.predict(images).probabilities for images in (pixels[3:], pixels[3:4]))
        assert together[:1] == pytest.approx(alone, abs=1e-5)
        said.append(together)
        adapted.save(tmp_path / words)
        assert Adapted.load(tmp_path / words).predict(pixels[3:]).probabilities == pytest.approx(together, abs=1e-6)
    assert said[1] == pytest.approx(said[0], abs=1e-5) and said[2] == pytest.approx(said[0], abs=1e-5)


def test_a_run_reports_all_side_by_side_and_is_led_by_the_first(run, finished, tmp_path):
    several, usual = run(tmp_path / "several", "evaluation.statistics=[support,task,each]"), finished
    both = [outcome(folder) for folder in (several, usual)]
    assert both[0]["state"]["last"] == both[1]["state"]["last"] and both[0]["metrics"] != both[1]["metrics"]
    results, by_task = (json.loads((folder / "results.json").read_text()) for folder in (several, usual))
    assert list(results["test"]["statistics"]) == ["support", "task", "each"]
    assert "statistics" not in by_task["test"] and read_tasks(usual).keys() == {"zeroing_off", "zeroing_on"}
    for split in ("val", "test"):
        for mode in ("zeroing_off", "zeroing_on"):
            assert results[split][mode] == results[split]["statistics"]["support"][mode]
            for words in STATISTICS:
                accuracies = read_tasks(several, split, words)[mode].mean(axis=0)
                assert accuracies == pytest.approx(results[split]["statistics"][words][mode]["accuracy"], abs=1e-5)
    assert (read_tasks(several)["zeroing_off"] == read_tasks(several, "test", "support")["zeroing_off"]).all()
    again = run(tmp_path / "again", f"checkpoint={several}", "fit=false", "evaluation.statistics=each")
    tested = json.loads((again / "results.json").read_text())["test"]
    assert tested["zeroing_on"] == results["test"]["statistics"]["each"]["zeroing_on"]


@pytest.mark.parametrize("statistics", ["support", "each"])
def test_a_prediction_is_normalised_as_in_an_evaluation(statistics, finished):
    model = load(finished)
    model.learner.double()  # the engines differ by rounding, which two steps multiply
    pixels = torch.randint(0, 256, (9, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    adapted = adapt(model, {"a": pixels[:2], "b": pixels[2:3]}, steps=2, statistics=statistics)
    seen, labels = model.preprocess.normalised(pixels).double(), torch.tensor([0, 0, 1])
    task = Task(*(field[None] for field in (seen[:3], labels, seen[3:], labels[:0])))
    network = load(finished).learner.double().network
    network.head.weight.data, network.head.bias.data = network.head.weight.data[:2], network.head.bias.data[:2]
    loop = model.learner.loop.evaluation(2, zeroing=False)
    logits = sequential.step_logits(network, task, [loop], statistics=(statistics,))[0, 0, -1]
    expected = logits.softmax(1).numpy()
    assert adapted.predict(pixels[3:]).probabilities == pytest.approx(expected, abs=1e-10)
    assert adapted.predict(pixels[3:4]).probabilities == pytest.approx(expected[:1], abs=1e-10)


class Mixing(nn.Module):
    def forward(self, x):
        return x - x.mean(0, keepdim=True)


def test_a_network_that_mixes_images_elsewhere_has_no_support_statistics(run, tmp_path):
    layers = "{_target_: torch.nn.Sequential, _args_: [{_target_: test_norms.Mixing}, {_target_: torch.nn.Flatten}, "
    layers += "{_target_: torch.nn.Linear, in_features: 784, out_features: 5}]}"
    with pytest.raises(UserError, match="statistics=support: the network mixes images in other layers than BatchNorm"):
        run(tmp_path, "model=module", f"model.module={layers}", "evaluation.statistics=[task,support]")
