"""The LightningModule: which engine computes, and what is said when memory runs out."""

import logging
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, outcome, rows
from examples import draw, loop
from hydra.utils import instantiate
from torch import nn
from torch.func import functional_call

from fewshot.batched import engine as batched
from fewshot.data.meta_batches import TaskDataModule
from fewshot.errors import UserError
from fewshot.maml import sequential
from fewshot.models.network import Network
from fewshot.training import choose_engine, meta_learner
from fewshot.training.runtime import prepare

BEGAN = ("iterations=1", "val_every=1", "test_steps=2", "test_tasks=2")


def engine_of(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["engine"]


@pytest.mark.parametrize(
    "threads, meta_batch_size, large, engine",
    [
        (1, 2, 12_000, "batched (several tasks in a pass)"),
        (2, 1, 12_000, "sequential (one task)"),
        (2, 2, 20_279, "sequential (a layer's output has 0.0 million numbers, above 0.020279)"),
        (2, 2, 20_280, "batched (2 threads)"),  # 15 queries, 8 channels of 13 x 13
    ],
)
def test_engine_auto_is_a_rule_and_says_why(
    run, tmp_path, caplog, monkeypatch, threads, meta_batch_size, large, engine
):
    monkeypatch.setattr(choose_engine, "LARGE", large)
    with caplog.at_level(logging.INFO):
        run(tmp_path, *BEGAN, f"threads={threads}", f"meta_batch_size={meta_batch_size}")
    said = [record.message for record in caplog.records if "engine=" in record.message]
    assert said and set(said) == {f"engine=auto: {engine}"}
    assert engine_of(tmp_path) == engine.split()[0]


def test_a_broken_learn2learn_is_one_line_and_auto_does_without_it(run, tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "learn2learn.algorithms", None)  # installed, and cannot be imported
    broken = (
        r"engine=sequential: needs learn2learn, which cannot be imported here \(.*\); docs/install\.md says how it is"
    )
    with pytest.raises(UserError, match=f"^{broken}, or begin a run with engine=batched$"):
        run(tmp_path, *BEGAN, "engine=sequential")
    assert not (tmp_path / "checkpoints").exists()
    with caplog.at_level(logging.INFO):
        run(tmp_path, *BEGAN, "meta_batch_size=1")
    assert "engine=auto: batched (learn2learn cannot be imported)" in caplog.messages


def test_a_continued_run_keeps_its_engine(run, tmp_path, caplog):
    """A checkpoint from where auto meant something else, as on a machine with more cores."""
    run(tmp_path, *BEGAN)
    path = tmp_path / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    torch.save(content | {"engine": "batched"}, path)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run(tmp_path, f"checkpoint={path}", "iterations=2")
    assert engine_of(tmp_path) == "batched"
    assert not [record for record in caplog.records if "engine=auto" in record.message]


def test_a_run_on_threads_that_goes_on_is_the_run_that_never_stopped(run, tmp_path):
    knobs = ("threads=2", "meta_batch_size=3", "val_every=1", "test_steps=2", "test_tasks=2")
    whole = outcome(run(tmp_path / "whole", "iterations=2", *knobs))
    short = run(tmp_path / "short", "iterations=1", *knobs)
    went_on = outcome(run(short, f"checkpoint={short}/checkpoints/last.ckpt", "iterations=2"))
    assert went_on["state"] == whole["state"] and went_on["metrics"] == whole["metrics"]


DROPPING = ("model=resnet12", "model.width=4", "model.drop_block=0.3", "dataset.size=16", "queries=2", "inner_steps=1")
DROPPING += ("test_steps=1",)


@pytest.mark.parametrize(
    "knobs",
    [
        (*DROPPING, "engine=sequential", "meta_batch_size=1"),
        (*DROPPING, "engine=batched", "threads=2"),
        ("augment=standard", "engine=batched", "test_steps=2"),
    ],
    ids=["dropblock", "dropblock batched", "augment"],
)
def test_what_is_random_is_the_same_in_a_run_that_goes_on_and_absent_from_evaluation(run, tmp_path, monkeypatch, knobs):
    dropping, positions = meta_learner.dropping, []
    monkeypatch.setattr(meta_learner, "dropping", lambda *at: positions.append(at[1]) or dropping(*at))
    knobs = (*knobs, "val_every=1", "test_tasks=2")
    whole = outcome(run(tmp_path / "whole", "iterations=2", *knobs))
    assert positions == [0, 1]  # by which each update draws other blocks
    short = run(tmp_path / "short", "iterations=1", *knobs)
    begun = outcome(short)
    went_on = outcome(run(short, f"checkpoint={short}/checkpoints/last.ckpt", "iterations=2"))
    assert went_on["state"] == whole["state"] and went_on["metrics"] == whole["metrics"]
    off = "augment=none" if "augment=standard" in knobs else "model.drop_block=0"
    without = run(tmp_path / "without", "iterations=1", *knobs, off)
    assert rows(tmp_path / "whole")[0] == rows(without)[0]  # the validation before anything is trained
    assert outcome(without)["state"]["last"] != begun["state"]["last"]


@pytest.mark.parametrize("algo", ["fomaml", "zero"])
def test_whole_runs_of_two_engines_part_without_zeroing_and_stay_together_with_it(run, tmp_path, monkeypatch, algo):
    """The default job's network. Every update is the same but for rounding; without zeroing training is chaotic."""
    step, weights = meta_learner.MetaLearner.training_step, {"sequential": [], "batched": []}

    def watched(self, tasks, batch_idx):
        result = step(self, tasks, batch_idx)
        weights[self.engine.name].append(torch.cat([parameter.detach().flatten() for parameter in self.parameters()]))
        return result

    monkeypatch.setattr(meta_learner.MetaLearner, "training_step", watched)
    knobs = ("iterations=20", "val_every=20", "test_tasks=2", "test_steps=2", "model.width=64")
    for engine in weights:
        run(tmp_path / engine, f"algo={algo}", f"engine={engine}", "trainer.precision=64-true", *knobs)
    both = zip(*weights.values(), strict=True)
    parted = [((ours - theirs).norm() / theirs.norm()).item() for theirs, ours in both]
    assert len(parted) == 20 and max(parted[:2]) <= 1e-10
    assert parted[19] <= 1e-8 if algo == "zero" else parted[19] > 1e-3


def too_much(*args, **knobs):
    torch.empty(2**50)


@pytest.mark.parametrize(
    "overrides, name, lower",
    [
        (("engine=sequential",), "sequential", "lower queries, shots or model.width"),
        (("engine=batched", "threads=2"), "batched", "lower tasks_at_once (now 2)"),
        (("engine=batched",), "batched", "lower tasks_at_once (now 2)"),
        (("engine=batched", "tasks_at_once=1"), "batched", "lower queries, shots or model.width"),
    ],
)
@pytest.mark.parametrize("function", ["meta_gradient", "step_accuracies"])
def test_out_of_memory_names_the_knob_to_lower(run, tmp_path, monkeypatch, overrides, name, lower, function):
    monkeypatch.setattr({"sequential": sequential, "batched": batched}[name], function, too_much)
    with pytest.raises(UserError) as error:
        run(tmp_path, *BEGAN, *overrides)
    assert str(error.value) == f"{overrides[0]}: out of memory on cpu; {lower}"


@pytest.mark.parametrize("name", ["boil", "metasgd", "msl", "protomaml", "unicorn"])
def test_the_family_goes_on_as_if_it_had_not_been_stopped(run, tmp_path, monkeypatch, name):
    engine, seen_weights, returned = batched.meta_gradient, [], []

    def watched(network, tasks, loop, eta, weights, **options):
        seen_weights.append(weights if weights is None else weights.tolist())
        returned.append(engine(network, tasks, loop, eta, weights, **options))
        return returned[-1]

    monkeypatch.setattr(batched, "meta_gradient", watched)
    knobs = ("val_every=1", "test_tasks=2", "test_steps=2", f"algo={name}", "inner_lr=0.1", "engine=batched")
    iterations = "iterations=2"
    if name == "msl":
        knobs, iterations = (*knobs, "algo.step_losses=2"), "iterations=3"
    whole = outcome(run(tmp_path / "whole", iterations, *knobs))
    weights = [pytest.approx(meta_learner.step_weights(2, done)) for done in (0, 0.5)] if name == "msl" else []
    assert seen_weights == [*weights, *[None] * (len(seen_weights) - len(weights))] and len(seen_weights) in (2, 3)
    for row, (losses, accuracies) in zip(rows(tmp_path / "whole")[1:], returned, strict=True):
        means = losses.mean().item(), accuracies.mean().item()
        assert (float(row["train/loss"]), float(row["train/query_accuracy"])) == pytest.approx(means)
    short = run(tmp_path / "short", "iterations=1", *knobs)
    went_on = outcome(run(short, f"checkpoint={short}/checkpoints/last.ckpt", iterations))
    assert went_on["state"]["last"] == whole["state"]["last"]
    assert went_on["results"]["test"] == whole["results"]["test"]


def test_unicorn_trains_one_vector_that_every_class_starts_from(run, config, cache, tmp_path):
    """Against an encoder, one vector v and one number b, with plain autograd.

    With a black that is not 0, where the first convolution would be 0 but for rounding, just where ReLU bends.
    """
    knobs = (
        "algo=unicorn",
        "iterations=3",
        "val_every=3",
        "test_steps=2",
        "trainer.precision=64-true",
        "dataset.mean=[0.3]",
    )
    run(tmp_path, *knobs)
    cfg = config(*SMALL, *knobs, f"dataset.cache={cache}")
    prepare(seed=cfg.seed, threads=1, accelerator="cpu", precision="64-true")
    network, sampler = instantiate(cfg.model.network).double(), TaskDataModule.from_config(cfg).samplers["train"]
    head = [nn.Parameter(p[0].detach().clone()) for p in network.head.parameters()]
    optimizer = torch.optim.Adam([*network.encoder.parameters(), *head], lr=cfg.outer_lr)

    def loss(theta, images, labels):
        return F.cross_entropy(functional_call(network, theta, images.double()), labels)

    for iteration in range(3):
        optimizer.zero_grad()
        for task in zip(*sampler(2 * iteration, 2), strict=True):
            theta = {f"encoder.{name}": p for name, p in network.encoder.named_parameters()}
            theta |= {"head.weight": head[0].expand(5, -1), "head.bias": head[1].expand(5)}
            for _ in range(cfg.inner_steps):
                gradients = torch.autograd.grad(loss(theta, *task[:2]), theta.values())
                theta = {n: p - cfg.inner_lr * g for (n, p), g in zip(theta.items(), gradients, strict=True)}
            (loss(theta, *task[2:]) / 2).backward()
        optimizer.step()
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, p in network.encoder.named_parameters():
        torch.testing.assert_close(saved[f"network.encoder.{name}"], p.data, rtol=0, atol=1e-8)
    torch.testing.assert_close(saved["network.head.weight"], head[0].data.expand(5, -1), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    # at iterations 0 and 1, then on the validation and the test tasks of the final test
    "engine, algo, twice",
    [
        (sequential, "fomaml", [True, True, True, True]),
        (sequential, "zero_init", [False, True, True, True]),
        (batched, "zero", [False, False, False, False]),
        (sequential, "protomaml", [True, True, True, True]),  # does not begin with the head that is zero
    ],
    ids=["random", "zero at the start", "zeroed, batched", "prototypes"],
)
def test_a_head_that_is_zero_is_evaluated_once(run, tmp_path, monkeypatch, engine, algo, twice):
    evaluate, calls = engine.step_accuracies, []

    def evaluated(network, tasks, evaluations, *rest, **options):
        both = [replace(evaluations[0], zeroing=zeroing) for zeroing in (False, True)]
        zeroing = tuple(evaluation.zeroing for evaluation in evaluations)
        calls.append((zeroing, evaluate(network, tasks, both, *rest, **options)))
        return evaluate(network, tasks, evaluations, *rest, **options)

    monkeypatch.setattr(engine, "step_accuracies", evaluated)
    # The later model counts as the better.
    monkeypatch.setattr(
        meta_learner.Scores, "of", lambda accuracies: meta_learner.Scores(2, [0.2] * 3 + [len(calls) / 8], [0.0] * 4)
    )
    name = engine.__name__.rsplit(".")[-1].replace("engine", "batched")
    knobs = (f"engine={name}", "iterations=1", "val_every=1", "val_tasks=2", "test_tasks=2", "inner_steps=3")
    run(tmp_path, f"algo={algo}", *["init_scale=0"] * (algo == "protomaml"), *knobs)
    assert [zeroing for zeroing, _ in calls] == [(False, True) if two else (True,) for two in twice]
    for zeroing, (off, on) in calls:
        assert torch.equal(off, on) or len(zeroing) == 2


@pytest.mark.parametrize("first_order", ["true", "false"], ids=["FOMAML", "SOMAML"])
def test_one_head_vector_for_all_classes_is_the_zeroing_trick(run, tmp_path, first_order):
    """What all rows have in common changes no softmax, so neither losses nor gradients: of any step, in both orders."""
    knobs = ("trainer.precision=64-true", "dataset.mean=[0.3]", "iterations=3", f"algo.first_order={first_order}")
    knobs += ("test_steps=2", "test_tasks=2")
    weights, accuracies = [], []
    for algo in ("unicorn", "zero", "fomaml"):
        folder = run(tmp_path / algo, f"algo={algo}", *knobs)
        state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        weights.append(torch.cat([w.flatten() for name, w in state.items() if "encoder" in name]))
        accuracies.append([row["val/query_accuracy/step_2"] for row in rows(folder)])
    unicorn, zero, fomaml = weights
    assert (unicorn - zero).abs().max() < 1e-8 < 1e-4 < (fomaml - zero).abs().max()
    assert accuracies[0] == accuracies[1] != accuracies[2]


def test_the_weights_of_the_step_losses_are_those_of_maml_plus_plus():
    """Its code, with numbers: five steps, annealed over 15 epochs."""
    for epoch in range(15):
        weights, decay, least = [1 / 5] * 5, 1 / 5 / 15, 0.03 / 5
        weights[:4] = [max(weight - epoch * decay, least) for weight in weights[:4]]
        weights[4] = min(weights[4] + epoch * 4 * decay, 1 - 4 * least)
        assert meta_learner.step_weights(5, epoch / 15) == pytest.approx(weights)
    assert meta_learner.step_weights(1, 0.5) == [1]


def test_an_error_in_the_inner_loop_is_the_error_that_is_raised():
    """learn2learn's adapt() would print it and fail later, for want of gradients."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise torch.OutOfMemoryError("no memory")

    network, tasks = Network(torch.nn.Linear(2, 2), 2, 2), draw(ways=2, shape=(2,))
    network.register_forward_hook(lambda module, passed, out: Fails.apply(out))
    with pytest.raises(torch.OutOfMemoryError):
        sequential.meta_gradient(network.double(), tasks, *loop(inner_lr=0.1))


def test_tf32_is_asked_for_or_off(monkeypatch):
    with pytest.raises(UserError, match="tf32: only a CUDA GPU has it"):
        prepare(seed=0, threads=None, accelerator="auto", precision="tf32")
    for precision, lightning, allowed in (("tf32", "32-true", True), ("bf16-mixed", "bf16-mixed", False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda precision=precision: precision == "tf32")
        assert prepare(seed=0, threads=None, accelerator="auto", precision=precision) == lightning
        assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is allowed


class Scaled(Network):
    def forward(self, images):
        return 2 * super().forward(images)


def test_a_network_that_does_more_than_its_encoder_and_head_is_refused(config):
    """Its features would be taken for what the head is given."""
    cfg = config("model.width=8")
    cfg.model.network = {"_target_": "test_meta_learner.scaled"}
    with pytest.raises(UserError, match=r"^model.network=test_meta_learner.scaled: its forward is not head\(encoder"):
        meta_learner.MetaLearner.from_config(cfg, "sequential")


def scaled():
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(28 * 28, 3))
    return Scaled(encoder, 3, 5)
