"""A head rule of one's own: this file is all that it takes in Python, and ALGO all that it takes in YAML."""

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import ROOT, rows
from examples import NETWORKS, assert_same, convolutional, each_order, each_way, gradients, images_for, meta_gradient
from torch import Tensor
from torch.nn import functional as F

import fewshot
from fewshot.errors import UserError
from fewshot.inner_loop import InnerLoop
from fewshot.maml import sequential
from fewshot.predict import predict
from fewshot.training.checkpoint import read


@dataclass(frozen=True)
class MedianHead(InnerLoop):
    """As ProtoMAML, with the median of each class's features in place of their mean."""

    scale: float = 1.0  # a knob of its own, algo.scale

    def initial_head(self, features: Tensor, labels: Tensor, ways: int) -> dict[str, Tensor]:
        members = F.one_hot(labels, ways).mT.bool().unsqueeze(-1)  # (..., K, S, 1)
        c = torch.where(members, features.unsqueeze(-3), torch.nan).nanmedian(-2).values  # (..., K, d)
        return {"weight": 2 * self.scale * c, "bias": -self.scale * c.square().sum(-1)}


ALGO = """# @package _global_
# ProtoMAML with medians.
algo:
  _target_: test_own_head.MedianHead
  head: own
  scale: 0.5
  first_order: true
  zeroing: false
"""
NAME = "test_own_head.MedianHead"


def outer_gradient(engine, network, tasks, loop):
    network.zero_grad(set_to_none=True)
    engine.meta_gradient(network, tasks, loop)
    return {name: gradient for name, gradient in gradients(network).items() if name.startswith("encoder.")}


@each_way
@each_order
@pytest.mark.parametrize("shots", [1, 3])
def test_both_engines_take_it_and_with_one_shot_it_is_protomaml(engine, first_order, shots):
    build = NETWORKS["conv4_strided"]
    tasks = images_for(build, tasks=3, shots=shots)
    network = convolutional(build, tasks)
    knobs = {"inner_lr": 0.1, "inner_steps": 2, "first_order": first_order}
    medians = outer_gradient(engine, network, tasks, MedianHead(head="own", target=NAME, **knobs))
    means, _ = meta_gradient(engine, network, tasks, head="prototypes", **knobs)
    means = {name: means[name] for name in medians}
    if shots == 1:  # the median of one is their mean
        assert_same(medians, means)
    else:
        assert_same(medians, outer_gradient(sequential, network, tasks, MedianHead(head="own", **knobs)))
        with pytest.raises(AssertionError):
            assert_same(medians, means, 1e-2)


@dataclass(frozen=True)
class Chained(InnerLoop):
    """As ProtoMAML, but the bias is made of the weight itself."""

    def initial_head(self, features: Tensor, labels: Tensor, ways: int) -> dict[str, Tensor]:
        members = F.one_hot(labels, ways).to(features).mT
        weight = 2 * members @ features / members.sum(-1, keepdim=True)
        return {"weight": weight, "bias": -(weight / 2).square().sum(-1)}


@each_way
@each_order
def test_an_inner_gradient_does_not_go_from_one_part_of_the_head_to_another(engine, first_order):
    build = NETWORKS["conv4_strided"]
    tasks = images_for(build, tasks=2, shots=2)
    network = convolutional(build, tasks)
    knobs = {"inner_lr": 0.1, "inner_steps": 2, "first_order": first_order}
    actual = outer_gradient(engine, network, tasks, Chained(head="own", target=NAME, **knobs))
    expected, _ = meta_gradient(sequential, network, tasks, head="prototypes", **knobs)
    assert_same(actual, {name: expected[name] for name in actual})


def test_the_files_in_the_docs_are_whole_and_say_the_same(config, own_yaml):
    page = (ROOT / "docs" / "networks.md").read_text(encoding="utf-8")
    (file,) = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "MedianHead" in code]
    exec(file, names := {})
    features, labels = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3
    theirs, ours = (kind(1, 0.1, True, head="own", scale=0.5) for kind in (names["MedianHead"], MedianHead))
    assert_same(theirs.initial_head(features, labels, 3), ours.initial_head(features, labels, 3))
    (settings,) = [code for code in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "MedianHead" in code]
    own_yaml("algo/mine", settings)
    algo = config("algo=mine").algo
    assert (algo._target_, algo.head, algo.scale) == ("mine.MedianHead", "own", 0.5)


def test_a_run_trains_with_it_by_both_engines(run, own_yaml, tmp_path):
    own_yaml("algo/median", ALGO)
    knobs = ("algo=median", "iterations=2", "val_every=1", "shots=3", "trainer.precision=64-true", "inner_lr=0.1")
    knobs += ("test_steps=2", "test_tasks=2")
    folders = [run(tmp_path / engine, *knobs, f"engine={engine}") for engine in ("sequential", "batched")]
    states = [read(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in folders]
    for name, weight in states[0].items():
        torch.testing.assert_close(weight, states[1][name], rtol=0, atol=1e-8)
    assert rows(folders[0])[0] == rows(folders[1])[0]
    prototypes = run(tmp_path / "prototypes", *knobs[1:], "algo=protomaml")
    assert rows(prototypes)[0] != rows(folders[0])[0]

    run(folders[0], "iterations=3", *(knob for knob in knobs if not knob.startswith("iterations")), "engine=sequential")
    assert read(folders[0] / "checkpoints" / "last.ckpt")["global_step"] == 3


def test_what_a_file_names_is_called_only_for_who_names_it_too(run, own_yaml, tmp_path):
    own_yaml("algo/median", ALGO)
    folder = run(tmp_path / "run", "algo=median", "iterations=1", "val_every=1")
    run(tmp_path / "test", f"checkpoint={folder}", "fit=false")  # the YAML file names it
    with pytest.raises(UserError, match=rf"its configuration calls {NAME}, and loading would run that"):
        fewshot.load(folder)
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    predictions = predict(fewshot.load(folder, trust=True), {"a": images[:2], "b": images[2:4]}, images[4:])
    assert predictions.probabilities.shape == (2, 2)

    path = folder / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    for brought, said in (
        (["algo=median", "algo._target_=os.mkdir"], r"its call sets algo\._target_=os\.mkdir, which a test would run"),
        ([f"algo={{head: own, _target_: {NAME}}}"], r"its call has algo=\{head: own, _target_: .*must be one of anil"),
    ):
        content["fewshot"]["overrides"] = brought
        torch.save(content, path)
        with pytest.raises(UserError, match=said):
            run(tmp_path / "refused", f"checkpoint={path}", "fit=false")


@pytest.mark.parametrize(
    ("algo", "said"),
    [
        ("{_target_: nowhere.Head, head: own}", r"algo\._target_=nowhere\.Head: cannot be imported"),
        ("{_target_: pathlib.Path, head: own}", r"algo\._target_=pathlib\.Path: must be a class that derives from"),
        ("{_target_: test_own_head.MedianHead, head: learned}", r"algo\.head=learned algo\._target_=test_own_head"),
    ],
)
def test_a_class_that_is_none_is_refused_in_one_line(run, own_yaml, tmp_path, algo, said):
    own_yaml("algo/wrong", f"# @package _global_\nalgo: {algo[:-1]}, first_order: true, zeroing: false}}\n")
    with pytest.raises(UserError, match=said):
        run(tmp_path / "run", "algo=wrong")
