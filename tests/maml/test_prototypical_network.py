"""A prototypical network: against arithmetic in NumPy, and as what MAML with zeroing is after one inner step."""

import copy
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from by_hand import np_prototypical_network
from conftest import rows
from examples import (
    assert_close,
    convolutional,
    draw,
    each_network,
    each_order,
    each_way,
    images_for,
    meta_gradient,
    tiny,
)

import fewshot
from fewshot.batched import engine as batched
from fewshot.errors import UserError
from fewshot.inner_loop import InnerLoop
from fewshot.models.head import prototype_head, unit_length
from fewshot.predict import predict
from fewshot.training.checkpoint import read

PROTONET = {"inner_steps": 0, "head": "prototypes"}
each_distance = pytest.mark.parametrize("distance", ["dot", "squared", "cosine"])


def of_encoder(gradients):
    return {name: gradient for name, gradient in gradients.items() if name.startswith("encoder.")}


@each_way
@each_order
@each_distance
@pytest.mark.parametrize("temperature", [None, 2.0])
def test_the_outer_gradient_is_that_of_the_arithmetic(engine, first_order, distance, temperature):
    network, tasks = tiny(), draw(tasks=3, shots=2, queries=4)
    scale = temperature or {"dot": 3 / 0.4, "squared": 1, "cosine": 0.1}[distance]  # 3 ways, inner_lr 0.4
    expected, losses = np_prototypical_network(network, tasks, distance, scale, first_order)
    if distance == "cosine":
        network.encoder.register_forward_hook(unit_length)
    knobs = {"inner_lr": 0.4, "first_order": first_order, "distance": distance, "temperature": temperature}
    ours, (loss, _) = meta_gradient(engine, network, tasks, **PROTONET, **knobs)
    assert not (ours.pop("head.weight").any() or ours.pop("head.bias").any())
    assert_close(ours, expected, 1e-10)
    np.testing.assert_allclose(loss.numpy(), losses, rtol=1e-12)


@each_way
@each_network
@each_order
@pytest.mark.parametrize("adapted", ["all", "head"])
@pytest.mark.parametrize(("ways", "shots"), [(3, 1), (2, 3)])
def test_maml_with_zeroing_and_one_step_is_the_network_of_dot_products(
    engine, build, first_order, adapted, ways, shots
):
    """The loss itself: in first order with constant prototypes, in second order with those that learn too."""
    tasks = images_for(build, tasks=3, ways=ways, shots=shots)
    network = convolutional(build, tasks)
    knobs = {"inner_lr": 0.3, "first_order": first_order}
    maml, (losses, accuracies) = meta_gradient(
        engine, network, tasks, inner_steps=1, zeroing=True, adapted=adapted, **knobs
    )
    ours, (loss, accuracy) = meta_gradient(engine, network, tasks, distance="dot", **PROTONET, **knobs)
    assert_close(of_encoder(ours), of_encoder(maml), 1e-10)
    torch.testing.assert_close(loss, losses, rtol=1e-12, atol=0)
    assert torch.equal(accuracy, accuracies)

    other, _ = meta_gradient(engine, network, tasks, distance="dot", temperature=1.0, **PROTONET, **knobs)
    with pytest.raises(AssertionError):
        assert_close(of_encoder(other), of_encoder(maml), 1e-2)


@pytest.mark.parametrize("distance", [None, "dot", "squared", "cosine"])
def test_of_features_in_bfloat16_the_head_is_made_in_float32(distance):
    loop = InnerLoop(0, 0.4, first_order=True, head="prototypes", distance=distance)
    features = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = prototype_head(loop, features.float(), torch.arange(9) % 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        actual = prototype_head(loop, features, torch.arange(9) % 3, 3)
    assert all(torch.equal(actual[name], expected[name]) for name in ("weight", "bias"))


@each_network
def test_features_of_length_one_lie_side_by_side_too(build, monkeypatch):
    """As on a GPU: without the slower way that is right for any network."""
    tasks = images_for(build, tasks=3, shots=2)
    network = convolutional(build, tasks)
    network.encoder.register_forward_hook(unit_length)
    gradient = partial(meta_gradient, batched, network, tasks, distance="cosine", inner_lr=0.4, **PROTONET)
    expected, _ = gradient(tasks_at_once=1)
    monkeypatch.setattr(batched, "vmap", None)
    for in_rows in (True, False):
        monkeypatch.setattr(batched, "tasks_in_a_row", lambda x, in_rows=in_rows: in_rows)
        ours, _ = gradient(tasks_at_once=3)
        assert_close(of_encoder(ours), of_encoder(expected), 1e-10)


KNOBS = ("trainer.precision=64-true", "iterations=4", "val_every=2")


@pytest.mark.parametrize("first_order", ["true", "false"])
def test_its_curve_lies_on_that_of_maml_with_zeroing_and_one_step(run, tmp_path, first_order):
    knobs = (*KNOBS, "inner_steps=1", f"algo.first_order={first_order}")
    folders = [run(tmp_path / algo, f"algo={algo}", *knobs) for algo in ("zero", "protonet")]
    curves = [[row["val/query_accuracy/step_1"] for row in rows(folder)] for folder in folders]
    assert curves[0] == curves[1]
    zero, protonet = (read(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in folders)
    for name, weight in protonet.items():
        if "encoder" in name:
            torch.testing.assert_close(weight, zero[name], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("engine, distance", [("sequential", "dot"), ("batched", "squared"), ("batched", "cosine")])
def test_a_run_trains_tests_predicts_and_goes_on(run, tmp_path, engine, distance):
    """Whatever inner_steps is, its accuracy is the same after every step and in both modes of test zeroing.

    The gradients above are of every distance in every engine; so a run of each is enough.
    """
    knobs = ("algo=protonet", f"algo.distance={distance}", "inner_steps=2", f"engine={engine}", *KNOBS)
    whole, parts = run(tmp_path / "whole", *knobs), tmp_path / "parts"
    tested = json.loads((whole / "results.json").read_text())["test"]
    accuracies = tested["zeroing_off"]["accuracy"]
    assert len(accuracies) == 4 and set(accuracies) == {accuracies[0]}
    assert tested["zeroing_on"]["accuracy"] == accuracies

    run(parts, *knobs, "iterations=2")
    run(parts, *knobs)
    assert (parts / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()

    run(tmp_path / "test", f"checkpoint={whole}", "fit=false")
    assert json.loads((tmp_path / "test" / "results.json").read_text())["test"] == tested

    model = fewshot.load(whole)
    images = np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8)
    support = {name: images[place : place + 1] for place, name in enumerate("abcdefg")}  # more than it was trained with
    predictions = [predict(model, support, images, steps=steps).probabilities for steps in (None, 1, 5)]
    assert predictions[0].shape == (9, 7)
    assert all(np.array_equal(predictions[0], others) for others in predictions[1:])
    with pytest.raises(UserError, match="a prototypical network has no head that could be zeroed"):
        predict(model, support, images, test_zeroing=True)


@pytest.mark.parametrize(("knob", "beyond"), [("algo=protonet", "algo.head=prototypes"), ("loss=mse", "loss=mse")])
def test_evidence_says_in_one_line_what_it_covers(run, tmp_path, config, knob, beyond):
    from fewshot.evidence.__main__ import run as evidence

    folder = run(tmp_path / "run", knob, "inner_lr=0.01", "iterations=1", "val_every=1")
    said = f"covers a learned, adapting head, a single inner_lr and cross entropy; this model has {beyond}"
    with pytest.raises(UserError, match=said):
        overrides = [f"checkpoint={folder}", "fit=false"]
        evidence(config(*overrides), overrides, tmp_path / "evidence")


@each_distance
def test_an_exported_model_predicts_the_same(run, tmp_path, distance):
    from fewshot.export import export

    folder = run(tmp_path / "run", "algo=protonet", f"algo.distance={distance}", "iterations=1", "val_every=1")
    export(folder / "checkpoints" / "best.ckpt", tmp_path / "exported")
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    support = {"a": images[:2], "b": images[2:4]}
    ours, theirs = (predict(fewshot.load(path), support, images[4:]) for path in (folder, tmp_path / "exported"))
    assert np.array_equal(ours.probabilities, theirs.probabilities)
    assert f"distance={distance}" in (tmp_path / "exported" / "README.md").read_text()


def test_its_name_says_what_the_scores_are():
    loop = InnerLoop(0, 0.4, first_order=True, head="prototypes", distance="dot")
    assert loop.name == "ProtoNet (dot product, first order)"
    assert replace(loop, distance="squared", temperature=2.0).named(order=False) == (
        "ProtoNet (squared distance, temperature 2)"
    )
    assert copy.deepcopy(loop) == loop and not loop.is_maml and loop.ways(5) == "any number of classes"
