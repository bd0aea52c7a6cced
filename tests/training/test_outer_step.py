"""Optimisers, schedules and the gradient's largest norm: by hand, beside torch's own, and in whole runs."""

import io
import re

import pytest
import torch
from conftest import outcome, rows
from torch import nn

from fewshot.errors import UserError
from fewshot.training.checkpoint import read
from fewshot.training.outer_step import OuterStep

LAST = "checkpoints/last.ckpt"


def network():
    torch.manual_seed(0)
    module = nn.Module()
    module.encoder, module.head = nn.Linear(4, 3), nn.Linear(3, 2)
    for number, parameter in enumerate(module.parameters(), 1):
        parameter.grad = torch.full_like(parameter, number)
    return module


@pytest.mark.parametrize(
    ("schedule", "milestones", "make"),
    [
        ("none", [], lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1)),
        ("cosine", [], lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20)),
        ("multistep", [3, 11], lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 11], 0.1)),
    ],
)
def test_rho_is_that_of_torchs_schedules(schedule, milestones, make):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs, ours = make(optimizer), OuterStep(0.3, schedule=schedule, iterations=20, milestones=milestones)
    for done in range(20):
        assert ours.rate(done) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_a_larger_gradient_is_scaled_down_to_clip_norm():
    module, step = network(), OuterStep(1.0, clip_norm=0.5)
    before = [parameter.grad.clone() for parameter in module.parameters()]
    norm = sum((gradient**2).sum() for gradient in before).sqrt()  # 12 * 1 + 3 * 4 + 6 * 9 + 2 * 16 = 110
    logged = step.clip(step.of(module.parameters()), module, zeroing=False)
    assert norm**2 == pytest.approx(110) and logged["gradient_norm"] == pytest.approx(norm)
    for parameter, gradient in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * 0.5 / norm, rtol=1e-5, atol=0)
    large = OuterStep(1.0, clip_norm=11.0)
    logged = large.clip(large.of(module.parameters()), module, zeroing=False)
    assert logged["gradient_norm"] == pytest.approx(0.5)
    torch.testing.assert_close(module.head.bias.grad, before[3] * 0.5 / norm, rtol=1e-5, atol=0)  # as it was


def test_with_zeroing_the_heads_gradient_does_not_count():
    module, step = network(), OuterStep(1.0, clip_norm=0.5)
    logged = step.clip(step.of(module.parameters()), module, zeroing=True)
    assert logged["gradient_norm"] ** 2 == pytest.approx(12 * 1 + 3 * 4)
    assert torch.equal(module.head.bias.grad, torch.full((2,), 4.0))


OPTIMIZERS = {
    "adamw": ("optimizer=adamw", "optimizer.weight_decay=0.5"),
    "sgd": ("optimizer=sgd", "optimizer.momentum=0.9", "optimizer.weight_decay=0.1", "outer_lr=0.1", "clip_norm=0.05"),
    "rmsprop": ("optimizer._target_=torch.optim.RMSprop", "+optimizer.momentum=0.9"),
}


class Slower(torch.optim.SGD):
    """The last two parameters, those of the head, at a tenth of the rate."""

    def __init__(self, params, lr):
        *encoder, weight, bias = params
        super().__init__([{"params": encoder}, {"params": [weight, bias], "lr": lr / 10}], lr=lr)


class Odd(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        self.state[self.param_groups[0]["params"][0]]["seen"] = {1, 2}


def test_groups_of_parameters_keep_their_own_rates_and_the_run_goes_on_exactly(run, tmp_path):
    knobs = ("optimizer._target_=test_outer_step.Slower", "schedule=multistep", "milestones=[1]", "val_every=1")
    knobs += ("iterations=3", "outer_lr=0.1", "engine=sequential", "test_steps=2", "test_tasks=2")
    whole = run(tmp_path / "whole", *knobs)
    content = read(whole / LAST)
    rates = [group["lr"] for group in content["optimizer_states"][0]["param_groups"]]
    assert rates == pytest.approx([0.01, 0.001])
    half = run(tmp_path / "half", *knobs, "iterations=2")
    run(half, *knobs)
    assert outcome(half)["state"] == outcome(whole)["state"]


def test_a_state_of_an_optimiser_that_could_not_be_read_again_ends_the_run_before_it_is_written(run, tmp_path):
    with pytest.raises(UserError, match=r"ckpt: the state of the optimizer has a set, which could not be read"):
        run(tmp_path / "run", "optimizer._target_=test_outer_step.Odd", "iterations=2", "val_every=2")
    assert read(tmp_path / "run" / LAST)["global_step"] == 0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_zeroing_nothing_that_an_optimiser_does_to_the_head_outlives_the_update(
    run, tmp_path, monkeypatch, optimizer
):
    """The encoder is what it is where the optimiser never hears of the head."""
    knobs = ("algo=zero", "iterations=3", "val_every=3", "test_steps=2", "test_tasks=2", *OPTIMIZERS[optimizer])
    run(tmp_path / "both", *knobs)
    run(tmp_path / "test", f"checkpoint={tmp_path / 'both'}", "fit=false")  # makes none, so it need not be named again
    state = read(tmp_path / "both" / LAST)["state_dict"]
    assert not state["network.head.weight"].any() and not state["network.head.bias"].any()
    of = OuterStep.of
    monkeypatch.setattr(OuterStep, "of", lambda self, parameters: of(self, [*parameters][:-2]))  # the head comes last
    run(tmp_path / "encoder", *knobs)
    alone = read(tmp_path / "encoder" / LAST)
    assert len(alone["optimizer_states"][0]["param_groups"][0]["params"]) == len(state) - 2
    assert all(torch.equal(alone["state_dict"][name], weight) for name, weight in state.items())


def test_sgd_takes_rho_times_the_gradient(run, tmp_path):
    """Of two runs of one update with another rho, the weights have moved by as much more."""
    weights, knobs = {}, ("optimizer=sgd", "iterations=1", "trainer.precision=64-true", "test_steps=2", "test_tasks=2")
    for rho in ("1e-300", "0.0625", "0.125"):
        folder = run(tmp_path / rho, f"outer_lr={rho}", *knobs)
        weights[rho] = read(folder / LAST)["state_dict"]
    start, *trained = weights.values()
    for name, weight in start.items():
        moved = [state[name] - weight for state in trained]
        torch.testing.assert_close(moved[1], 2 * moved[0], rtol=1e-9, atol=1e-14)
    assert (trained[1]["network.head.weight"] - start["network.head.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "knobs",
    [
        ("optimizer=sgd", "optimizer.momentum=0.9", "schedule=multistep", "milestones=[1,3]"),
        ("optimizer=adamw", "clip_norm=0.1", "trainer.log_every_n_steps=3"),
        ("optimizer=sgd", "outer_lr=0.1"),  # remembers nothing
    ],
)
def test_a_run_goes_on_exactly(run, tmp_path, knobs):
    knobs = ("val_every=2", "test_steps=2", "test_tasks=2", *knobs)
    whole = outcome(run(tmp_path / "whole", "iterations=4", *knobs))
    folder = run(tmp_path / "short", "iterations=2", *knobs)
    run(folder, f"checkpoint={folder}", "iterations=4")
    assert outcome(folder)["state"] == whole["state"] and outcome(folder)["metrics"] == whole["metrics"]


def test_a_cosine_goes_on_only_to_where_it_was_to_end(run, tmp_path):
    folder = run(tmp_path, "schedule=cosine", "iterations=4", "val_every=2")
    with pytest.raises(UserError, match=r"iterations=8: .* schedule=cosine, which ends at its iterations=4"):
        run(folder, f"checkpoint={folder}", "iterations=8")
    best = read(folder / LAST)["optimizer_states"][0]["param_groups"][0]
    assert best["lr"] == 0 and OuterStep(1, schedule="cosine", iterations=4).rate(3) == pytest.approx(0.1464466)


def test_the_norm_of_the_gradient_is_recorded(run, tmp_path):
    folder = run(tmp_path, "clip_norm=0.5", "iterations=2", "val_every=2", "trainer.log_every_n_steps=1")
    assert all(float(row["train/gradient_norm"]) > 0 for row in rows(folder)[1:])


def test_another_optimisers_memory_is_refused(run, tmp_path):
    folder = run(tmp_path / "run", "optimizer=sgd", "optimizer.momentum=0.9", "iterations=2", "val_every=2")
    before = (folder / LAST).read_bytes()
    for part, other in (
        ("state", {"momentum_buffer": torch.zeros(3)}),
        ("param_groups", {"momentum": 0.5}),  # with which Lightning would go on
    ):
        content = torch.load(io.BytesIO(before), weights_only=True)
        content["optimizer_states"][0][part][0].update(other)
        torch.save(content, folder / LAST)
        with pytest.raises(UserError, match="its optimizer_states are not those of SGD for these weights"):
            run(folder, f"checkpoint={folder}", "iterations=4")
    (folder / LAST).write_bytes(before)
    with pytest.raises(UserError, match=r"optimizer\._target_=torch\.optim\.Adam: .* was trained with optimizer"):
        run(folder, f"checkpoint={folder}", "iterations=4", "optimizer=adam")


@pytest.mark.parametrize(
    ("knobs", "line"),
    [
        (["+optimizer.lr=0.1"], "optimizer.lr=0.1: leave it out; outer_lr is the learning rate"),
        (["optimizer._target_=torch.optim.Nope"], "optimizer=torch.optim.Nope: cannot be made (No module named "),
        (
            ["optimizer._target_=torch.optim.RMSprop", "optimizer.nope=1"],
            "optimizer.nope=1: no such knob; did you mean +",
        ),
        (["+optimizer.momentum=0.9"], "optimizer=torch.optim.Adam: cannot be made ("),
        (["optimizer._target_=torch.optim.LBFGS"], "optimizer=torch.optim.LBFGS: must be a torch.optim.Optimizer"),
        (["optimizer._target_=torch.nn.ParameterList"], "optimizer=torch.nn.ParameterList: cannot be made ("),
        (["optimizer=null"], "optimizer=null: must be one of adam, adamw, sgd"),
        (["schedule=step"], "schedule=step: must be one of none, cosine, multistep"),
        (["schedule=multistep"], "milestones=[]: schedule=multistep needs one below iterations=6"),
        (["schedule=multistep", "milestones=[6]"], "milestones=[6]: schedule=multistep needs one below iterations=6"),
        (["milestones=[3]"], "milestones=[3]: add schedule=multistep, or leave them out"),
        (["schedule=multistep", "milestones=[0]"], "milestones=[0]: must be a list of whole numbers above 0"),
        (["clip_norm=0"], "clip_norm=0: must be a number above 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(main, tmp_path, knobs, line):
    ended = main(*knobs, f"hydra.run.dir={tmp_path / 'run'}", "logger=none", small=True)
    assert isinstance(ended, str) and re.match(re.escape(line), ended) and "\n" not in ended
    assert not (tmp_path / "run").exists()
