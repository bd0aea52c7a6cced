"""Arguments of Lightning's Trainer: those that work here, those that are refused, and limits that end a run early."""

import json
import re

import pytest
import torch
from conftest import outcome
from pytorch_lightning.callbacks import Timer

from fewshot.config.check import check
from fewshot.errors import UserError
from fewshot.training import checkpoint


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("gradient_clip_val=1", "no such knob; known are accelerator, benchmark,"),
        ("max_tme=00:00:01:00", "no such knob; did you mean +trainer.max_time?"),
        ("max_time=00:00:00:00", "must be DAYS:HOURS:MINUTES:SECONDS, not all zero"),
        ("plugins=[]", "no such knob"),
        ("accumulate_grad_batches=2", "use meta_batch_size, and tasks_at_once for less memory"),
        ("fast_dev_run=true", "use iterations"),
        ("max_epoch=3", "no such knob"),
        ("limit_test_batches=0", "use test_tasks"),
        ("val_check_interval=2", "use val_every"),
        ("max_time=10", "must be DAYS:HOURS:MINUTES:SECONDS"),
        ("num_sanity_val_steps=2", "use val_tasks"),
        ("inference_mode=true", "the inner loop of the test needs gradients"),
        ("max_epochs=3", "use iterations"),
    ],
)
def test_what_would_not_work_is_refused_in_one_line_that_says_what_does(config, argument, said):
    """From the command line, and from a YAML file of one's own."""
    present = argument.split("=")[0] in config().trainer
    cfg = config(f"trainer.{argument}" if present else f"+trainer.{argument}")
    knob = argument.split("=")[0]
    with pytest.raises(UserError, match=rf"^trainer[.]{knob}.*{re.escape(said)}") as error:
        check(cfg)
    assert "\n" not in str(error.value)


def test_what_works_does_so_and_a_time_limit_is_no_end_for_ever(run, finished, tmp_path, caplog, monkeypatch):
    whole = outcome(finished)
    caplog.set_level("INFO")
    clock = iter([0.0] * 14)  # asked some times for a checkpoint, and once after every update
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, stage=None: next(clock, 3600.0))
    works = [f"+trainer.{argument}=true" for argument in ("deterministic", "benchmark", "detect_anomaly")]
    folder = run(tmp_path / "run, limited", *works, "+trainer.profiler=simple", "+trainer.max_time=00:00:00:01")
    last = folder / "checkpoints" / "last.ckpt"
    reached = checkpoint.read(last)["global_step"]
    assert 0 < reached < 6 and json.loads((folder / "results.json").read_text())["iterations"] == reached
    said = f"""iteration {reached}/6  trainer.max_time is over; python train.py "checkpoint='{last}'" goes on"""
    assert said in caplog.text
    run(folder, *works, "+trainer.max_time=01:00:00:00")  # the same call with another limit, or without
    torch.use_deterministic_algorithms(False)
    ended = outcome(folder)
    assert ended["results"]["iterations"] == 6
    for content in (ended, whole):
        del content["results"]["config"]
    assert ended == whole


def test_a_run_that_had_reached_its_accuracy_and_goes_on_obeys_a_time_limit(run, tmp_path, caplog, monkeypatch):
    folder, last = tmp_path / "run", tmp_path / "run" / "checkpoints" / "last.ckpt"
    run(folder, "stop_at_accuracy=0.01", "val_every=6")
    before = checkpoint.read(last)["global_step"]
    caplog.set_level("INFO")
    clock = iter([0.0] * 4)
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, stage=None: next(clock, 3600.0))
    run(folder, "val_every=6", "+trainer.max_time=00:00:00:01")
    reached = json.loads((folder / "results.json").read_text())["iterations"]
    assert before < reached < 6 and checkpoint.read(last)["global_step"] == reached
    assert "trainer.max_time is over" in caplog.text


def test_the_accuracy_to_stop_at_may_be_another_one_when_a_run_goes_on(run, finished, tmp_path):
    whole = outcome(finished)
    folder = run(tmp_path / "run", "stop_at_accuracy=0.01")
    assert json.loads((folder / "results.json").read_text())["iterations"] < 6
    written = (folder / "results.json").stat().st_mtime_ns
    run(folder, "stop_at_accuracy=0.02")  # reached, too
    assert (folder / "results.json").stat().st_mtime_ns == written
    run(folder)
    assert outcome(folder)["state"] == whole["state"] and outcome(folder)["metrics"] == whole["metrics"]
