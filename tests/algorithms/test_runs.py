"""Runs of algorithms that are one file each: those that are shipped, one's own, and the one of docs/algorithms.md."""

import re
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import ROOT, rows
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import fewshot
from fewshot import check_algorithm, export
from fewshot.algorithms.reptile import Reptile
from fewshot.config.tree import settings
from fewshot.errors import UserError
from fewshot.evidence.__main__ import _refuse_beyond_theory
from fewshot.inner_loop import InnerLoop
from fewshot.predict import predict
from fewshot.sweep.settings import Job, group
from fewshot.training.checkpoint import read
from fewshot.training.learner import inner_loop

SHIPPED = ("inner_momentum", "inner_adam", "reptile", "imaml")
KNOBS = ("val_every=1", "shots=2", "trainer.precision=64-true", "inner_lr=0.02", "inner_steps=2", "test_steps=2")
KNOBS += ("test_tasks=2",)


@dataclass(frozen=True)
class Halved(InnerLoop):
    """Each step is half as long as the one before."""

    by: float = 0.5

    def update(self, theta, gradients, state):
        n = state or 0
        return {name: -self.inner_lr * self.by**n * g for name, g in gradients.items()}, n + 1


NAME = "test_runs.Halved"


@dataclass(frozen=True)
class Measuring(Reptile):
    measures = ("loss_2",)

    def outer_gradient(self, theta, theta_N, support_loss, query_loss):
        gradients, _ = super().outer_gradient(theta, theta_N, support_loss, query_loss)
        return gradients, {"loss_2": query_loss(theta_N)}


def weights(folder):
    return read(folder / "checkpoints" / "last.ckpt")["state_dict"]


@pytest.mark.parametrize("algo", SHIPPED)
def test_a_run_trains_by_both_engines_and_goes_on_exactly(run, tmp_path, algo):
    knobs = (f"algo={algo}", *KNOBS)
    whole = run(tmp_path / "whole", *knobs, "iterations=2", "engine=sequential")
    other = run(tmp_path / "other", *knobs, "iterations=2", "engine=batched")
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weight, weights(other)[name], rtol=0, atol=1e-5 if algo == "inner_adam" else 1e-8)
    begun = run(tmp_path / "begun", *knobs, "iterations=1", "engine=sequential")
    run(begun, *knobs, "iterations=2", "engine=sequential")
    assert (begun / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(begun).items())
    residual = [row.get("train/cg_residual") for row in rows(whole)[1:]]
    assert all(float(number) > 0 for number in residual) if algo == "imaml" else residual == 2 * [None]


def test_a_model_of_a_shipped_algorithm_is_shared_and_loaded_without_trust(run, tmp_path):
    folder = run(tmp_path / "run", "algo=imaml", *KNOBS, "iterations=1")
    export.export(folder / "checkpoints" / "best.ckpt", tmp_path / "shared")
    model = fewshot.load(tmp_path / "shared")
    assert type(model.learner.loop).__name__ == "ImplicitMAML" and model.learner.loop.proximal == 2.0
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    assert predict(model, {"a": images[:2], "b": images[2:4]}, images[4:]).probabilities.shape == (2, 2)


def test_a_checkpoint_with_a_digit_in_the_name_of_what_is_measured_is_read_again(run, tmp_path):
    folder = run(tmp_path / "run", "algo._target_=test_runs.Measuring", *KNOBS, "iterations=2")
    recorded = read(folder / "checkpoints" / "last.ckpt")["callbacks"]["Record"]["rows"]
    assert [row["train/loss_2"] > 0 for row in recorded[1:]] == [True, True]


def test_a_class_is_named_in_the_call_and_only_there(run, tmp_path):
    own = (f"algo._target_={NAME}", "+algo.by=0.25")
    folder = run(tmp_path / "run", *own, *KNOBS, "iterations=1")
    plain = run(tmp_path / "plain", *KNOBS, "iterations=1")
    assert rows(folder)[0] != rows(plain)[0]  # two steps: the second is shorter
    test = (f"checkpoint={folder}", "fit=false")
    with pytest.raises(UserError, match=rf"its call sets algo\._target_={re.escape(NAME)}, which a test would run"):
        run(tmp_path / "test", *test)
    run(tmp_path / "test", *test, *own)
    with pytest.raises(UserError, match=rf"its configuration calls {re.escape(NAME)}, and loading would run that"):
        fewshot.load(folder)
    assert fewshot.load(folder, trust=True).learner.loop.by == 0.25
    with pytest.raises(UserError, match=r"algo\.bye=1: Halved has no such field; did you mean by\?"):
        run(tmp_path / "mistyped", f"algo._target_={NAME}", "+algo.bye=1")
    with pytest.raises(UserError, match=rf"probes=true: .* leave them out with algo\._target_={re.escape(NAME)}"):
        run(tmp_path / "probes", f"algo._target_={NAME}", "probes=true", *KNOBS)


def test_an_unknown_knob_of_the_papers_algorithms_is_still_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"algo\.temperatur=1: no such knob; did you mean algo\.temperature\?"):
        run(tmp_path / "run", "+algo.temperatur=1")


@dataclass(frozen=True)
class Elsewhere(InnerLoop):
    def start(self, theta, encode, support, labels):
        return {"head.bias": theta["head.bias"] + 1}


def test_the_theory_speaks_of_reptile_and_of_no_other_inner_step_or_start(config, tmp_path):
    loops = {algo: inner_loop(config(f"algo={algo}")) for algo in SHIPPED}
    _refuse_beyond_theory(loops["reptile"], tmp_path)
    for algo in set(SHIPPED) - {"reptile"}:
        with pytest.raises(UserError, match=rf"this model has algo\._target_=fewshot\.algorithms\.{algo}\."):
            _refuse_beyond_theory(loops[algo], tmp_path)
    with pytest.raises(UserError, match=r"this model has algo\._target_=test_runs\.Elsewhere"):
        _refuse_beyond_theory(Elsewhere(1, 0.1, True, target="test_runs.Elsewhere"), tmp_path)


def test_a_sweep_tells_algorithms_apart_that_differ_in_their_class_alone(config, tmp_path):
    calls = [["algo=fomaml"], ["algo=reptile"], ["algo=imaml"], ["algo=imaml", "algo.cg_steps=9"]]
    same = ["inner_steps=2", "inner_lr=0.1", "algo.first_order=true"]  # the class is not made
    jobs = [Job(tmp_path / str(n), settings(config(*call, *same)), None, {}, None) for n, call in enumerate(calls)]
    labels = {setting.label() for setting in group(jobs)}
    assert labels == {
        "FOMAML",
        "Reptile",
        "ImplicitMAML, algo.cg_steps=5, algo.proximal=2",
        "ImplicitMAML, algo.cg_steps=9, algo.proximal=2",
    }


def test_the_example_of_the_documentation_runs_as_it_stands(run, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs" / "algorithms.md").read_text()
    (tmp_path / "mine.py").write_text(re.search(r"```python\n# mine\.py\n(.*?)```", text, re.DOTALL)[1])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    check, train = re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1].splitlines()
    GlobalHydra.instance().clear()  # the command composes a configuration of its own
    check_algorithm.main(check.split("#")[0].split()[3:])
    assert capsys.readouterr().out.count("both engines and plain autograd are the same") == 2
    words = train.split("#")[0].split("train.py ")[1].split()
    folder = run(tmp_path / "run", *words, "iterations=1", "val_every=1")
    assert OmegaConf.create(read(folder / "checkpoints" / "best.ckpt")["fewshot"]["config"]).algo._target_ in train
