"""The motivating example, trained: how inner products are distributed, counted by hand; how a run records it."""

import json

import numpy as np
import torch
from conftest import SMALL, outcome

from fewshot.data.meta_batches import TaskDataModule
from fewshot.theory.features import Features
from fewshot.training.meta_learner import MetaLearner

EXPERIMENT = ("experiment=motivating_example", "callbacks.inner_products.every=2", "iterations=4", "val_every=2")


def recorded(folder):
    return json.loads((folder / "inner_products.json").read_text())


def test_a_run_counts_the_inner_products_of_validation_tasks(run, config, cache, tmp_path):
    folder = run(tmp_path / "run", *EXPERIMENT, "iterations=2", "trainer.precision=64-true", pictures=True)
    assert recorded(folder)["updates"] == [0, 2]
    assert (folder / "figures" / "inner_products.png").stat().st_size > 10_000

    cfg = config(*EXPERIMENT, f"dataset.cache={cache}", *SMALL)
    torch.manual_seed(cfg.seed)
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    learner = MetaLearner.from_config(cfg, "sequential").double()
    learner.load_state_dict(state)
    tasks = TaskDataModule.from_config(cfg)
    counts = {"same_class": np.zeros(120, int), "other_class": np.zeros(120, int)}
    for batch in tasks.fixed("val", 20, shared=False):
        for support, s_labels, query, q_labels in zip(*batch, strict=True):
            with torch.no_grad():
                S, Q = (learner.network.encoder(images.double()).numpy() for images in (support, query))
            for phi_q, u in zip(Q, q_labels, strict=True):
                for phi_s, t in zip(S, s_labels, strict=True):
                    place = int((min(max(0.03 * phi_q @ phi_s, -1), 2) + 1) / 3 * 120)
                    counts["same_class" if t == u else "other_class"][min(place, 119)] += 1
    for name, expected in counts.items():
        assert np.abs(np.array(recorded(folder)[name][1]) - expected).sum() <= 4  # float32 at the edge of a bin
        assert sum(recorded(folder)[name][1]) == expected.sum()


def test_in_bf16_mixed_the_products_of_the_features_are_those_of_float32(run, config, cache, tmp_path):
    folder = run(tmp_path / "run", *EXPERIMENT, "iterations=2", "trainer.precision=bf16-mixed")
    cfg = config(*EXPERIMENT, f"dataset.cache={cache}", *SMALL)
    learner = MetaLearner.from_config(cfg, "sequential")
    learner.load_state_dict(torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"])
    counts = {"same_class": torch.zeros(120), "other_class": torch.zeros(120)}
    for tasks in TaskDataModule.from_config(cfg).fixed("val", 20, shared=False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            features = Features.of(learner.network, tasks)
        products = 0.03 * features.query @ features.support.mT
        same = features.same_class()
        for name, which in (("same_class", same), ("other_class", ~same)):
            counts[name] += torch.histc(products[which].detach().clamp(-1, 2), 120, -1, 2)
    assert {name: row.int().tolist() for name, row in counts.items()} == {n: recorded(folder)[n][1] for n in counts}


def test_it_changes_nothing_and_a_run_that_goes_on_writes_the_same(run, tmp_path):
    whole = run(tmp_path / "whole", *EXPERIMENT)
    parts = run(tmp_path / "parts", *EXPERIMENT, "iterations=2")
    run(parts, *EXPERIMENT)
    assert recorded(parts) == recorded(whole)
    without = run(tmp_path / "without", "experiment=motivating_example", "callbacks=default", *EXPERIMENT[2:])
    both = [outcome(folder) for folder in (whole, without)]
    assert both[0]["metrics"] == both[1]["metrics"] and both[0]["state"] == both[1]["state"]
