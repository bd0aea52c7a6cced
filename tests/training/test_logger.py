"""Loggers and callbacks that are not this program's: what they write, and that a run with them goes on exactly."""

import csv
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import outcome, rows
from omegaconf import OmegaConf
from pytorch_lightning.loggers import CSVLogger
from torch.utils.tensorboard import SummaryWriter

from fewshot.errors import UserError
from fewshot.training.checkpoint import read
from fewshot.training.logger import logger_of

RATES = "+callbacks.rates._target_=pytorch_lightning.callbacks.LearningRateMonitor"
KNOBS = ("schedule=multistep", "milestones=[1]", "val_every=2", "test_tasks=2", "trainer.log_every_n_steps=1", RATES)


def logged(folder, version):
    with open(folder / "csv" / f"version_{version}" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_lightnings_logger_has_what_metrics_csv_has_and_what_its_callbacks_log(run, tmp_path):
    folder = run(tmp_path, "logger=csv", "iterations=4", *KNOBS)
    theirs, ours = logged(folder, 0), rows(folder)
    for name in ("train/loss", "val/query_accuracy/step_1", "val_zeroed/query_accuracy/step_3"):
        one, other = ({float(row["iteration"]): float(row[name]) for row in t if row[name]} for t in (theirs, ours))
        assert one == pytest.approx(other, abs=1e-6) and len(one) == (4 if name == "train/loss" else 3)
    rates = [float(row["lr-Adam"]) for row in theirs if row["lr-Adam"]]
    assert rates[-4:] == pytest.approx([1e-3, 1e-4, 1e-4, 1e-4])
    (final,) = (row for row in theirs if row["final_test/query_accuracy/step_1"])
    results = json.loads((folder / "results.json").read_text())
    assert float(final["final_test_zeroed/query_accuracy/step_3"]) == results["test"]["zeroing_on"]["accuracy"][3]
    assert float(final["best_iteration"]) == results["best_iteration"]
    settings = OmegaConf.load(folder / "csv" / "version_0" / "hparams.yaml")
    assert (settings.iterations, settings.algo.first_order) == (4, True)


def test_a_run_with_others_loggers_and_callbacks_goes_on_exactly(run, tmp_path):
    whole = outcome(run(tmp_path / "whole", "logger=csv", "iterations=4", *KNOBS))
    folder = run(tmp_path / "short", "logger=csv", "iterations=2", *KNOBS)
    run(folder, f"checkpoint={folder}", "iterations=4", "logger=csv")
    assert outcome(folder)["state"] == whole["state"] and outcome(folder)["metrics"] == whole["metrics"]
    assert "LearningRateMonitor" not in read(folder / "checkpoints" / "last.ckpt")["callbacks"]  # remembers nothing
    run(tmp_path / "test", f"checkpoint={folder}", "fit=false")  # without the callback, which is for training
    assert (tmp_path / "test" / "results.json").exists()
    first, second = logged(folder, 0), logged(folder, 1)
    losses = [[row["train/loss"] for row in table if row["train/loss"]] for table in (first, second)]
    assert losses[1][:2] == losses[0] and len(losses[1]) == 4


def test_tensorboard_has_the_curves_of_a_run_that_goes_on_each_point_once(run, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    knobs = ("logger=tensorboard", "val_every=2", *KNOBS)
    whole = run(tmp_path / "whole", *knobs, "iterations=4")
    folder = run(tmp_path / "short", *knobs, "iterations=2")
    with SummaryWriter(folder / "tensorboard") as beyond:  # what a run had logged that was killed after its last.ckpt
        beyond.add_scalar("train/loss", 9.0, 3)
    run(folder, f"checkpoint={folder}", "iterations=4", "logger=tensorboard")
    assert outcome(folder)["state"] == outcome(whole)["state"]
    assert outcome(folder)["metrics"] == outcome(whole)["metrics"]
    for logs, ends in ((whole, [4]), (folder, [2, 4])):
        events = accumulator.EventAccumulator(str(logs / "tensorboard"))
        events.Reload()
        ours = [(int(row["iteration"]), float(row["train/loss"])) for row in rows(logs) if row["train/loss"]]
        assert [event.step for event in events.Scalars("train/loss")] == [step for step, _ in ours]
        assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([y for _, y in ours], rel=1e-5)
        assert {event.step for event in events.Scalars("lr-Adam")} == {0, 1, 2, 3}
        assert [event.step for event in events.Scalars("final_test/query_accuracy/step_1")] == ends


class Unreachable(CSVLogger):
    @property
    def experiment(self):
        raise ConnectionError  # which says nothing


@pytest.mark.parametrize(
    ("knobs", "line"),
    [
        (["logger=csv", "logger._target_=pytorch_lightning.Nope"], "logger._target_=pytorch_lightning.Nope: cannot be"),
        (["logger=tensorboard", "+logger.nope=1"], "logger._target_=pytorch_lightning.loggers.TensorBoardLogger: cann"),
        (["logger=csv", "+logger.nope=1"], "logger._target_=pytorch_lightning.loggers.CSVLogger: cannot be made ("),
        (["logger=csv", "logger._target_=torch.nn.ReLU", "logger.name=no"], "logger._target_=torch.nn.ReLU: cannot be"),
        (
            ["logger=csv", "logger._target_=test_logger.Unreachable"],
            "logger._target_=test_logger.Unreachable: cannot be made (ConnectionError)",
        ),
        (["logger=csv", "logger._target_=torch.nn.Identity"], "logger._target_=torch.nn.Identity: must be a pytorch_"),
        (["logger=wandb", "+logger.nope=1"], "logger.nope=1: no such knob"),
        (["+callbacks.mine=1"], "callbacks.mine=1: must be {_target_: ..."),
        (
            ["logger=csv", "+callbacks.mine._target_=no.such"],
            "callbacks.mine._target_=no.such: cannot be made (No module",
        ),
        (["+callbacks.mine._target=x"], "callbacks.mine={_target: x}: lacks _target_, the class of the callback"),
        (
            ["callbacks.mine._target_=x.Y"],
            "callbacks.mine._target_=x.Y: no such knob; did you mean +callbacks.mine._ta",
        ),
        (
            ["+callbacks.mine._target_=torch.nn.ReLU"],
            "callbacks.mine._target_=torch.nn.ReLU: must be a py",
        ),
        ([RATES], f"{RATES[1:]}: writes to the logger, and there is none; use logger=csv"),
        (
            ["+callbacks.stop._target_=pytorch_lightning.callbacks.EarlyStopping", "+callbacks.stop.monitor=x"],
            "callbacks.stop._target_=pytorch_lightning.callbacks.EarlyStopping: has no place in these runs; no metric",
        ),
        (
            ["+callbacks.ema._target_=pytorch_lightning.callbacks.EMAWeightAveraging"],
            "callbacks.ema._target_=pytorch_lightning.callbacks.EMAWeightAveraging: has no place in these runs; valid",
        ),
    ],
)
def test_what_cannot_be_made_is_one_line(main, tmp_path, knobs, line):
    ended = main("logger=none", *knobs, f"hydra.run.dir={tmp_path / 'run'}", small=True)
    assert isinstance(ended, str) and re.match(re.escape(line), ended) and "\n" not in ended
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_named_for_the_logger_stays(config, tmp_path):
    for knobs, place in (([], tmp_path / "run"), ([f"+logger.save_dir={tmp_path}/own"], tmp_path / "own")):
        start: Any = SimpleNamespace(cfg=config("logger=csv", *knobs), rows=[], folder=tmp_path / "run")
        assert logger_of(start).save_dir == str(place)


def test_without_tensorboard_a_line_says_how_it_is_installed(config, tmp_path, monkeypatch):
    def absent(*args, **knobs):
        raise ModuleNotFoundError("No module named 'tensorboard'")

    monkeypatch.setattr("fewshot.training.logger.instantiate", absent)
    start: Any = SimpleNamespace(cfg=config("logger=tensorboard"), rows=[], folder=tmp_path)
    with pytest.raises(UserError, match="; it needs tensorboard; uv sync --extra tensorboard, or pip install tensorb"):
        logger_of(start)
