"""What train and evidence build alike."""

from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
from conftest import copied_before_writes, outcome, rows
from hydra.utils import get_object

from fewshot.errors import UserError
from fewshot.training.checkpoint import read
from fewshot.training.meta_learner import MetaLearner
from fewshot.training.record import Record

REVERSED = """
progress: {_target_: fewshot.training.record.Progress}
record:
  _target_: fewshot.training.record.Record
  val_every: ${val_every}
  select: ${select}
  val_tasks: ${val_tasks}
  test_every: ${test_every}
  test_curve_tasks: 992
  stop_at_accuracy: ${stop_at_accuracy}
  probes: ${probes}
cosine_similarity: {_target_: fewshot.training.record.CosineSimilarity, every: 2}
zero_head: {_target_: fewshot.training.zero_head.ZeroHead, enabled: "${oc.select:zeroing,${algo.zeroing}}"}
"""


def test_the_order_of_the_callbacks_is_the_programs_whatever_that_of_the_yaml_is(run, own_yaml, tmp_path):
    """The head is zeroed before anything is measured, and the classes are compared before a checkpoint is written."""
    own_yaml("callbacks/reversed", REVERSED)
    knobs = ("algo=zero", "dataset.tasks=one_task", "shots=2", "iterations=3", "val_every=1")
    usual = run(tmp_path / "usual", *knobs, "callbacks=cosine_similarity", "callbacks.cosine_similarity.every=2")
    other = run(tmp_path / "other", *knobs, "callbacks=reversed")
    for name in ("metrics.csv", "cosine_similarity.json"):
        assert (usual / name).read_bytes() == (other / name).read_bytes()
    for folder in (usual, other):
        last = read(folder / "checkpoints" / "last.ckpt")
        assert not last["state_dict"]["network.head.weight"].any()
        assert last["callbacks"]["CosineSimilarity"]["updates"] == [1, 3]


class Counts(pl.Callback):
    def state_dict(self):
        return {"seen": np.zeros(2)}


class History(pl.Callback):
    """Its state is an empty list before the first update."""

    def __init__(self, kind="numpy.float64"):
        self.kind, self.losses = get_object(kind), []

    def state_dict(self):
        return {"losses": self.losses}

    def on_train_batch_end(self, trainer, module, outputs, *args):
        self.losses.append(self.kind(outputs["loss"].detach()))


def test_a_checkpoint_that_could_not_be_read_again_ends_a_run_before_it_trains(run, tmp_path):
    with pytest.raises(UserError, match=r"best.ckpt: the state of the callback Counts has a ndarray, which could not"):
        run(tmp_path / "run", "+callbacks.counts._target_=test_run.Counts")
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("kind", ["numpy.float64", "torch.nn.Parameter"])
def test_a_checkpoint_that_can_be_read_is_not_replaced_by_one_that_could_not(run, tmp_path, kind):
    own = ("+callbacks.history._target_=test_run.History", f"+callbacks.history.kind={kind}")
    line = rf"last.ckpt: the state of the callback History has a {kind.split('.')[-1]}, which could not"
    with pytest.raises(UserError, match=line):
        run(tmp_path / "run", *own, "val_every=6", "save_minutes=1e-9")
    assert read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 0


def test_of_equal_accuracies_the_first_model_is_the_best_and_the_accuracy_to_stop_at_is_reached_by_itself(tmp_path):
    knobs = {"val_every": 1, "select": "zeroing_off", "val_tasks": 2, "test_every": None, "test_curve_tasks": 2}
    record, written = Record(**knobs, stop_at_accuracy=0.5, probes=False), []
    trainer = SimpleNamespace(
        global_step=0,
        max_steps=3,
        default_root_dir=tmp_path,
        should_stop=False,
        save_checkpoint=lambda path: written.append(path.stem),
    )
    record._began, record._first, record._folder = 0.0, 0, tmp_path
    stops = []
    for iteration, accuracy in enumerate((0.4, 0.4, 0.5)):
        record._write(trainer, {"iteration": iteration}, accuracy)
        stops.append(trainer.should_stop)
    assert written == ["best", "last", "last", "best", "last"] and stops == [False, False, True]


class StopsAfterThree(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == 3


def test_a_run_that_a_callback_ends_keeps_its_updates_and_says_so(run, tmp_path, caplog):
    caplog.set_level("INFO")
    knobs = ("+callbacks.own._target_=test_run.StopsAfterThree", "val_every=6", "+trainer.max_time=01:00:00:00")
    folder = run(tmp_path / "run", *knobs)  # a day, which is not over
    assert read(folder / "checkpoints" / "last.ckpt")["global_step"] == 3
    assert "iteration 3/6  a callback ended the training; " in caplog.text and "max_time" not in caplog.text


def test_checkpoints_between_validations_lose_nothing_and_change_nothing(run, tmp_path, monkeypatch):
    """One after every update here; a run that was killed after the fifth goes on from it exactly."""
    step, losses = MetaLearner.training_step, []

    def watched(self, tasks, batch_idx):
        measured = step(self, tasks, batch_idx)
        losses.append(measured["loss"].item())
        return measured

    monkeypatch.setattr(MetaLearner, "training_step", watched)
    knobs = ("iterations=7", "val_every=4", "trainer.log_every_n_steps=3")
    whole = outcome(run(tmp_path / "whole", *knobs, "save_minutes=null"))
    means = {row["iteration"]: float(row["train/loss"]) for row in rows(tmp_path / "whole")[1:]}
    since = {"3": losses[:3], "4": losses[3:4], "6": losses[4:6], "7": losses[6:]}  # of the updates since the last row
    assert means == pytest.approx({iteration: np.mean(some) for iteration, some in since.items()})
    with copied_before_writes(tmp_path / "run", ("last.ckpt",)) as copies:
        run(tmp_path / "run", *knobs, "save_minutes=1e-9")
    steps = {read(copy / "checkpoints" / "last.ckpt")["global_step"]: copy for copy in copies[1:]}  # [0] has none yet
    assert sorted(steps) == [*range(8)]  # the last one twice
    assert len(read(steps[5] / "checkpoints" / "last.ckpt")["callbacks"]["Record"]["pending"]) == 1
    for folder in (tmp_path / "run", run(steps[5], *knobs)):
        ended = outcome(folder)
        assert ended["results"]["config"].pop("save_minutes") != whole["results"]["config"].get("save_minutes")
        assert ended | {"results": 0} == whole | {"results": 0}
        assert ended["results"]["test"] == whole["results"]["test"]
