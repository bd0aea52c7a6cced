"""Cosine similarities on one task: what is measured, against a loop in NumPy; how a run records it and goes on."""

import json

import numpy as np
import pytest
import torch
from conftest import copied_before_writes, outcome, rows
from examples import NETWORKS, convolutional, images_for
from hydra.utils import instantiate

from fewshot.data.sampler import TaskSampler
from fewshot.data.task import SPLITS, Task
from fewshot.sweep import figures
from fewshot.theory.features import class_similarities
from fewshot.training import checkpoint

# The experiment, shrunk; `run` shrinks the rest.
EXPERIMENT = ("experiment=cosine_similarity", "dataset=glyphs", "shots=2", "meta_batch_size=1")


def by_hand(network, task):
    """Pair by pair."""
    with torch.no_grad():
        S, Q = (network.encoder(images).double().numpy() for images in (task.support, task.query))
    ways, s_labels, q_labels = len(network.head.weight), task.support_labels.numpy(), task.query_labels.numpy()
    pairs = {name: [[[] for _ in range(ways)] for _ in range(ways)] for name in ("query_support", "query_query")}
    for i, u in enumerate(q_labels):
        for name, others, labels in (("query_support", S, s_labels), ("query_query", Q, q_labels)):
            for j, t in enumerate(labels):
                if name == "query_support" or i != j:
                    cosine = Q[i] @ others[j] / np.linalg.norm(Q[i]) / np.linalg.norm(others[j])
                    pairs[name][u][t].append(cosine)
    return {name: [[np.mean(cell) for cell in row] for row in rows] for name, rows in pairs.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_class_similarities_are_means_over_pairs(name):
    tasks = images_for(NETWORKS[name], tasks=1, shots=2, queries=3)
    network = convolutional(NETWORKS[name], tasks)
    task = Task(*(field[0] for field in tasks))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    actual, expected = class_similarities(network, task), by_hand(network, task)
    for pairs in ("query_support", "query_query"):
        np.testing.assert_allclose(actual[pairs], expected[pairs], atol=2e-6)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not np.allclose(actual["query_support"], np.transpose(actual["query_support"]))  # rows are the queries


def recorded(folder):
    return json.loads((folder / "cosine_similarity.json").read_text())


def test_a_run_records_the_one_task_in_its_own_order_and_is_not_changed_by_it(run, config, cache, tmp_path):
    knobs = (*EXPERIMENT, "iterations=3", "test_tasks=2", "callbacks.cosine_similarity.every=2")
    folder = run(tmp_path / "with", *knobs, "seed=3")
    content = recorded(folder)
    assert content["updates"] == [1, 3]
    assert np.shape(content["query_support"]) == np.shape(content["query_query"]) == (2, 5, 5)

    cfg = config(*knobs, f"dataset.cache={cache}", "model.width=8")
    network = instantiate(cfg.model.network)
    last = checkpoint.read(folder / "checkpoints" / "last.ckpt")
    network.load_state_dict({key.removeprefix("network."): value for key, value in last["state_dict"].items()})
    test_split = instantiate(cfg.dataset.source)["test"]
    sampler = TaskSampler(test_split, ways=5, shots=2, queries=3, seed=3, stream=SPLITS.index("train"), kind="one_task")
    for name, matrix in by_hand(network, sampler.one_task()).items():
        np.testing.assert_allclose(content[name][-1], matrix, atol=1e-5)
    assert last["callbacks"]["CosineSimilarity"] == content

    without = run(tmp_path / "without", *knobs[:-1], "callbacks=default", "seed=3")
    assert rows(without) == rows(folder)
    assert outcome(without)["state"] == outcome(folder)["state"]


def test_a_kill_between_any_two_writes_loses_nothing(run, tmp_path):
    knobs = (*EXPERIMENT, "iterations=2", "val_every=2", "test_tasks=2", "callbacks.cosine_similarity.every=1")
    with copied_before_writes(tmp_path / "whole", (".json", ".ckpt")) as killed:
        whole = run(tmp_path / "whole", *knobs)
    # cosine_similarity.json at 1 and 2, best.ckpt at 0, last.ckpt at 0 and 2, and results.json
    assert len(killed) >= 6
    for folder in killed[2:]:  # the first two are of iteration 0, as in every run
        assert not (folder / "results.json").exists()
        run(folder, *knobs)
        assert outcome(folder) == outcome(whole) and recorded(folder) == recorded(whole), folder


@pytest.mark.parametrize("tasks", ["non_mutually_exclusive", "one_task"])
def test_the_kind_is_of_the_training_tasks_alone(run, tmp_path, tasks):
    """Before any training every run of a seed is the same; its validation must be too."""
    kinds, short = ("mutually_exclusive", tasks), ("iterations=1", "val_every=1", "test_tasks=2", "test_steps=2")
    first, other = (rows(run(tmp_path / kind, f"dataset.tasks={kind}", *short)) for kind in kinds)
    assert first[0] == other[0] and first[-1]["train/loss"] != other[-1]["train/loss"]


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("updates", [[1], [1, 11, 21, 31, 41]])
def test_the_figure_shows_every_setting(seeds, updates):
    random = np.random.default_rng(0)
    run = {"updates": updates, **{pairs: random.random((len(updates), 3, 3)).tolist() for pairs, _ in figures.PAIRS}}
    figure = figures.cosine_similarity({"random": [run] * seeds, "zeroing": [run] * seeds}, "a title")
    text = {artist.get_text() for artist in figure.findobj(lambda artist: hasattr(artist, "get_text"))}
    over = {1: "1 seed", 3: "mean and 95% confidence interval over 3 seeds (Student t)"}[seeds]
    title = f"a title: one task, unadapted encoder; {over}"
    assert {"random", "zeroing", "same class", "other class", title} <= text


def test_the_figure_compares_settings_at_the_updates_at_which_all_were_measured():
    def measured(updates):
        matrices = [[[update, 0.0], [0.0, update]] for update in updates]
        return {"updates": updates, **{pairs: matrices for pairs, _ in figures.PAIRS}}

    runs = {"often": [measured([1, 6, 11, 16])], "seldom": [measured([1, 11, 21])]}
    figure = figures.cosine_similarity(runs, "a title")
    lines = figure.findobj(lambda artist: hasattr(artist, "get_xydata"))
    drawn = [(line.get_label(), line.get_xydata().tolist()) for line in lines if line.axes and line.get_label() in runs]
    assert drawn == [(name, [[1, 1], [11, 11]]) for name in (*runs, *runs)]
