"""Whole runs: what they leave, how they go on, what they refuse."""

import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import HANG, SMALL, copied_before_writes, outcome, rows, told
from PIL import Image

from fewshot.config.tree import CONF
from fewshot.errors import UserError
from fewshot.processes import ranks
from fewshot.results import record_files
from fewshot.training import checkpoint, resume
from fewshot.training.wandb_run import finished_run, wandb_logger


def reported(folder, *, zeroing):
    """results.json, metrics.csv and the figures of a small run are all there and agree; returns metrics.csv."""
    results = json.loads((folder / "results.json").read_text())
    for split, tasks in (("test", 3), ("val", 2)):
        assert results[split]["tasks"] == tasks
        for mode in ("zeroing_off", "zeroing_on"):
            assert len(results[split][mode]["accuracy"]) == len(results[split][mode]["ci95"]) == 4
            assert all(0 <= accuracy <= 1 for accuracy in results[split][mode]["accuracy"])
        assert results[split]["zeroing_on"]["accuracy"][0] == 0.2  # a zero head knows nothing: 1/K
    assert results["iterations"] == 6 and 0 <= results["best_iteration"] <= 6
    assert {"start", "train", "test"} <= results["seconds"].keys() and "torch" in results["versions"]
    assert results["config"]["algo"]["zeroing"] == zeroing
    logged = rows(folder)
    assert next(iter(logged[0])) == "iteration" and logged[0]["train/loss"] == "" and float(logged[1]["train/loss"]) > 0
    for metric in ("val/query_accuracy/step_3", "val_zeroed/query_accuracy/step_0"):
        assert [row["iteration"] for row in logged if row[metric]] == ["0", "2", "4", "6"]
    for picture in ("accuracy_over_iterations.png", "accuracy_over_steps.png"):
        assert (folder / "figures" / picture).read_bytes().startswith(b"\x89PNG")
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.any(state["network.head.weight"]).item() == (not zeroing)
    return logged


def test_train_py_trains_tests_and_reports(program, tmp_path):
    process = program("algo=somaml", "+zeroing=true", "engine=batched", "test_every=3", f"hydra.run.dir={tmp_path}")
    output, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, errors
    logged = reported(tmp_path, zeroing=True)
    assert [int(row["iteration"]) for row in logged] == [0, 2, 3, 4, 6]
    assert [row["iteration"] for row in logged if row["test_zeroed/query_accuracy/step_1"]] == ["0", "3", "6"]
    assert (tmp_path / ".hydra" / "config.yaml").exists()
    assert re.search(r"3 │ +\d+\.\d\d ± \d+\.\d\d", output)  # the table: one line per inner step
    sync = re.search(r"wandb sync (\S+)", output)
    (offline,) = Path(sync[1]).glob("run-*.wandb")  # with no key and no prompt
    said = told(offline)
    for name in ("iteration", "train/loss", "val_zeroed/query_accuracy/step_3", "test/query_accuracy/step_0"):
        assert re.search(rf'"type":"history".*"{name}":', said), name
    assert re.search(r'"type":"summary".*"final_test/query_accuracy/step_3":', said)
    assert re.search(r'"glob_name":"val/\*".*"step_metric":"iteration"', said)


@pytest.mark.parametrize(
    "overrides", [("algo=fomaml",), ("algo=zero", "inner_steps=1", "model=conv4_pooled", "dataset.size=16")]
)
def test_the_other_algorithms_report_the_same(run, tmp_path, overrides):
    logged = reported(run(tmp_path, *overrides, pictures=True), zeroing="algo=zero" in overrides)
    assert [int(row["iteration"]) for row in logged] == [0, 2, 4, 6]


def test_two_processes_cannot_write_one_run(program, tmp_path):
    with ranks.locked(tmp_path):
        process = program(f"hydra.run.dir={tmp_path}")
        _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 1
    assert errors == (
        f"hydra.run.dir={tmp_path}: process {os.getpid()} on {platform.node()} is at work on this run; "
        "wait for it or end it\n"
    )
    assert not (tmp_path / ".hydra").exists()  # the record of a call is that of the run at work
    with ranks.locked(tmp_path):
        pass


def test_the_last_offline_folder_of_a_continued_run_has_all_that_it_logged(tmp_path):
    logged = [{"iteration": iteration, "val/query_accuracy/step_1": iteration / 10} for iteration in (0, 2, 4)]
    knobs = {"project": "fewshot", "mode": "offline", "group": None, "name": None, "run_id": "abcdefgh"}
    with finished_run():
        wandb_logger(**knobs, folder=tmp_path, values={}, rows=logged[:2]).log_metrics(logged[2], step=4)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-abcdefgh.wandb")
    records = map(json.loads, told(file).splitlines())
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [(row["iteration"], row["val/query_accuracy/step_1"]) for row in history] == [(0, 0), (2, 0.2), (4, 0.4)]


def test_another_dataset_leaves_the_knobs_of_the_first_behind():
    trained = ["dataset=folder", "dataset.root=photos", "dataset.size=28", "seed=1", "+zeroing=true"]
    merged = resume._merged(trained, ["dataset=glyphs", "seed=2", "fit=false"])
    assert sorted(merged) == ["+zeroing=true", "dataset=glyphs", "fit=false", "seed=2"]
    kept = resume._merged(trained, ["dataset=folder", "dataset.root=elsewhere", "+zeroing=false"])
    assert sorted(kept) == ["+zeroing=false", "dataset.root=elsewhere", "dataset.size=28", "dataset=folder", "seed=1"]


def test_a_kill_between_any_two_writes_loses_nothing(run, tmp_path):
    knobs = ("algo=zero", "iterations=4", "test_every=3")
    with copied_before_writes(tmp_path / "whole") as killed:
        whole = outcome(run(tmp_path / "whole", *knobs))
    assert len(killed) >= 9  # metrics.csv and last.ckpt at 0, 2, 3 and 4, splits.json and results.json
    for folder in killed:
        assert outcome(run(folder, *knobs)) == whole, folder


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_checkpoint_continues_in_its_own_folder_with_more_iterations(run, config, tmp_path, precision):
    whole = outcome(run(tmp_path / "whole", "iterations=8", f"trainer.precision={precision}"))
    folder = run(tmp_path / "short", "iterations=4", f"trainer.precision={precision}")
    last = folder / "checkpoints" / "last.ckpt"
    assert config(f"checkpoint={last}", "hydra.job.name=x").checkpoint == str(last)
    run(folder, f"checkpoint={last}", "iterations=8")
    assert outcome(folder)["state"] == whole["state"]
    assert outcome(folder)["metrics"] == whole["metrics"]


def test_the_best_model_is_chosen_by_the_mode_that_is_asked_for(run, tmp_path, caplog):
    caplog.set_level("INFO")
    chosen = {}
    for mode, column in {"zeroing_off": "val", "zeroing_on": "val_zeroed"}.items():
        folder = run(tmp_path / mode, f"select={mode}", "iterations=6", "val_every=1", "val_tasks=5")
        validated = {int(row["iteration"]): float(row[f"{column}/query_accuracy/step_2"]) for row in rows(folder)}
        chosen[mode] = max(validated, key=validated.get)  # the first of equals
        results = json.loads((folder / "results.json").read_text())
        assert results["best_iteration"] == chosen[mode]
        assert (
            f"model of iteration {chosen[mode]}, chosen by validation with test {mode.replace('_', ' ')}" in caplog.text
        )
    assert len({*chosen.values()}) == 2  # else nothing was asked


def no_gpu(accelerator, precision):
    raise UserError("there is no CUDA GPU here")


def test_a_finished_run_is_shown_again_and_not_touched(run, finished, tmp_path, caplog, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    caplog.set_level("INFO")
    monkeypatch.setattr("fewshot.training.runtime.check_device", no_gpu)  # as of a run on a GPU, on a machine without
    run(folder)
    assert "inner step" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("seed=1", "seed=1"),
        ("algo=zero", "algo.zeroing=true"),
        ("outer_lr=0.01", "outer_lr"),
        ("iterations=4", "iterations=4"),
    ],
)
def test_another_configuration_is_refused_by_name(run, finished, tmp_path, change, named):
    folder = shutil.copytree(finished, tmp_path / "run")
    (folder / "results.json").unlink()
    with pytest.raises(UserError, match=re.escape(named)):
        run(folder, change)
    with pytest.raises(UserError, match=re.escape(named)):
        run(folder, f"checkpoint={folder / 'checkpoints' / 'last.ckpt'}", change)


def test_a_run_keeps_the_number_that_the_yaml_files_gave_when_it_began(run, config, tmp_path):
    """A checkpoint of commit a43819a, where algo=msl made step_losses of `iterations`: 3, and not the 300 of today."""
    call = (*SMALL, "algo=msl", "iterations=1", "val_every=1", "val_tasks=2", "test_tasks=2", "logger=none")
    call = list({override.split("=")[0]: override for override in call}.values())
    folder = run(tmp_path, *call, "algo.step_losses=3")
    path = folder / "checkpoints" / "last.ckpt"

    def goes_on(*overrides):
        return resume.find_start(config(*overrides), list(overrides), folder).cfg.algo.step_losses

    with pytest.raises(UserError, match=r"algo.step_losses=300: .* was trained with algo.step_losses=3;"):
        goes_on(*call)  # the call that began the run names it
    content = torch.load(path, weights_only=True)
    content["fewshot"]["overrides"].remove("algo.step_losses=3")
    torch.save(content, path)
    assert goes_on(*call) == goes_on(*call, "iterations=9") == goes_on(f"checkpoint={path}", "iterations=9") == 3
    for change, said in (("algo.step_losses=4", "4"), ("algo=fomaml", "null")):
        for beginning in (call, [f"checkpoint={path}"]):
            with pytest.raises(UserError, match=rf"algo.step_losses={said}: .* with algo.step_losses=3;"):
                goes_on(*(word for word in beginning if word != "algo=msl" or change != "algo=fomaml"), change)


def test_fit_false_tests_a_checkpoint_and_leaves_its_run_alone(run, tmp_path):
    folder = run(tmp_path / "run", "algo=zero", "seed=3")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    best = folder / "checkpoints" / "best.ckpt"
    tested = run(tmp_path / "tested", f"checkpoint={best}", "fit=false")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    ours, theirs = (json.loads((run_folder / "results.json").read_text()) for run_folder in (tested, folder))
    assert ours["test"] == theirs["test"] and ours["config"]["seed"] == 3
    assert ours["config"]["trained"] == {"file": "best.ckpt", "dataset.name": "glyphs", "ways": 5, "shots": 1}
    written = (tested / "results.json").stat().st_mtime_ns
    run(tested, f"checkpoint={best}", "fit=false")  # shows them again
    assert (tested / "results.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="goes on only in the folder of its run"):
        run(tmp_path / "elsewhere", f"checkpoint={best}")
    with pytest.raises(UserError, match="holds a training run"):
        run(folder, f"checkpoint={best}", "fit=false")
    more = run(tmp_path / "more", f"checkpoint={best}", "fit=false", "test_tasks=9", "test_steps=5")
    results = json.loads((more / "results.json").read_text())
    assert results["test"]["tasks"] == 9 and len(results["test"]["zeroing_on"]["accuracy"]) == 6
    assert results["test"]["zeroing_off"]["accuracy"][0] == 0.2  # the head it was trained with is zero


def foreign(trained: Path, folder: Path, overrides: list[str]) -> tuple[str, str]:
    """The words that test the model of a run, in a checkpoint whose call has these overrides too."""
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    own = [
        override
        for override in content["fewshot"]["overrides"]
        if "model=module" not in overrides or "model." not in override
    ]
    content["fewshot"]["overrides"] = [*own, *overrides]
    torch.save(content, folder / "foreign.ckpt")
    return f"checkpoint={folder / 'foreign.ckpt'}", "fit=false"


@pytest.mark.parametrize(
    "brought, said",
    [
        (["model=module", "model.module={_target_: os.mkdir, path: MARK}"], "sets model.module._target_=os.mkdir, "),
        (
            ["augment=standard", "augment.crop.padding={_target_: os.mkdir, path: MARK}"],
            "sets augment.crop.padding._target_=os.mkdir, which",
        ),
        (
            ["augment=standard", "augment.crop.size=[{_target_: os.mkdir, path: MARK}]"],
            "sets augment.crop.size.0._target_=os.mkdir, which",
        ),
        (
            ["callbacks.progress='${oc.create:{_target_: os.mkdir, path: MARK}}'"],
            "has callbacks.progress='${oc.create:{_target_: os.mkdir, path: MARK}}'; a test",
        ),
    ],
)
def test_what_a_checkpoint_would_call_is_refused_unless_this_call_names_it(
    run, trained, tmp_path, monkeypatch, brought, said
):
    monkeypatch.chdir(tmp_path)
    test = foreign(trained, tmp_path, brought)
    with pytest.raises(UserError, match=re.escape(f"foreign.ckpt: its call {said}")) as error:
        run(tmp_path / "test", *test)
    assert "\n" not in str(error.value) and not (tmp_path / "MARK").exists()
    with suppress(Exception):  # no callback, no network, no number of pixels
        run(tmp_path / "trusted", *test, *brought)
    assert (tmp_path / "MARK").is_dir()


def test_a_checkpoint_that_would_call_what_the_environment_says_is_refused(run, trained, tmp_path, monkeypatch):
    """It changes between the check and the call: seeding sets this variable."""
    monkeypatch.chdir(tmp_path)
    made = "{_target_: ${oc.select:trainer.p${oc.env:PL_GLOBAL_SEED,9}}, path: MARK}"
    picks = ["+trainer.p9=fewshot.training.record.Progress", "+trainer.p0=os.mkdir"]
    test = foreign(trained, tmp_path, [f'callbacks.progress="${{oc.create:{made}}}"', *picks])
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    with pytest.raises(UserError, match=r"its call has callbacks\.progress=.*; name callbacks\.progress in this call"):
        run(tmp_path / "test", *test)
    assert not (tmp_path / "MARK").exists()


def test_a_yaml_file_elsewhere_that_a_checkpoint_names_is_none_of_this_programs(config, trained, tmp_path):
    """One that was sent with the checkpoint, for example."""
    network = "network: {_target_: os.mkdir, path: MARK}"
    (tmp_path / "sent.yaml").write_text(f"{network}\nname: x\nsmallest_image: 1\nwidth: 1\n")
    test = foreign(trained, tmp_path, [f"model={os.path.relpath(tmp_path / 'sent', CONF / 'model')}"])
    with pytest.raises(UserError, match=r"its call sets model\.network\._target_=os\.mkdir, which a test would run"):
        resume.find_start(config(*test), list(test), tmp_path / "test")


@pytest.mark.parametrize("brought", ["hydra.searchpath=[pkg://this]", "+hydra.searchpath=[pkg://this]", "+model.a=b"])
def test_a_call_that_no_run_writes_into_a_checkpoint_is_refused(run, trained, tmp_path, brought):
    test = foreign(trained, tmp_path, [brought])
    with pytest.raises(UserError, match=r"foreign\.ckpt: its call has .*(hydra\.searchpath|model\.a)"):
        run(tmp_path / "test", *test)


def test_what_a_test_would_call_is_not_for_a_checkpoint_to_say(run, trained, tmp_path):
    test = foreign(trained, tmp_path, ["algo._target_=os.system"])
    with pytest.raises(UserError, match=r"foreign\.ckpt: its call (sets|has|and this one together)"):
        run(tmp_path / "test", *test)


def test_what_only_training_calls_is_not_called_by_a_test(run, trained, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(os, "system", lambda *a, **k: called.append(a))
    test = foreign(trained, tmp_path, ["+callbacks.a._target_=os.system", "optimizer._target_=os.system"])
    run(tmp_path / "test", *test)
    assert (tmp_path / "test" / "results.json").exists() and not called


@pytest.mark.parametrize(
    "brought", [["trainer=ddp", "trainer.devices=12", "dataset.trust=true", "dataset.other_split=true"]]
)
def test_where_a_test_runs_and_whom_it_trusts_is_for_the_call_alone_to_say(config, trained, tmp_path, brought):
    test = foreign(trained, tmp_path, brought)
    cfg = resume.find_start(config(*test), list(test), tmp_path / "test").cfg
    assert cfg.trainer.devices == 1 and not {"strategy", "num_nodes"} & set(cfg.trainer)
    assert cfg.model.width == 32 and cfg.dataset.other_split is False and not cfg.dataset.get("trust")
    test = foreign(trained, tmp_path, ["dataset={other_split: true}"])
    with pytest.raises(UserError, match=r"its call has dataset=\{other_split: true\}"):
        resume.find_start(config(*test), list(test), tmp_path / "test")


LEVELS = ", ".join(f"a{n}: ${{model.module.a{n - 1}}}${{model.module.a{n - 1}}}" for n in range(1, 26))
TREE = [f"+trainer.b{n}.{side}=${{trainer.b{n - 1}}}" for n in range(1, 26) for side in "xy"]


@pytest.mark.parametrize(
    "brought, key",
    [
        (["dataset.origin=${oc.env:HOME}"], "dataset.origin"),
        (["dataset.origin=$\\{oc.env\\:HOME\\}"], "dataset.origin"),
        (["dataset.origin=${dataset.name}${dataset.name}"], "dataset.origin"),
        (["model=module", f"model.module={{a0: aaaa, {LEVELS}}}"], "model.module"),
        (["+trainer.b0=1", *TREE], "+trainer.b2.y"),
    ],
)
def test_what_a_checkpoint_would_make_of_other_values_is_refused_unless_it_is_one_knob(
    config, trained, tmp_path, brought, key
):
    """Before anything is resolved, which would take these bombs of 25 levels hours."""
    test = foreign(trained, tmp_path, ["val_every=7", "test_every=${val_every}", *brought])
    with pytest.raises(
        UserError, match=r"its call has {0}=.*; name {0} in this call too$".format(re.escape(key))
    ) as error:
        resume.find_start(config(*test), list(test), tmp_path / "test")
    assert "\n" not in str(error.value)
    if key == "dataset.origin":
        asked = [*test, "dataset.origin=mine"]
        cfg = resume.find_start(config(*asked), asked, tmp_path / "test").cfg
        assert cfg.test_every == 7 and cfg.dataset.origin == "mine"


def test_a_model_that_was_trained_without_a_logger_is_tested_with_one(config, trained, tmp_path):
    asked = (f"checkpoint={trained / 'checkpoints' / 'best.ckpt'}", "fit=false", "logger.mode=offline")
    asked = [*asked, "logger.project=tests"]
    cfg = resume.find_start(config(*asked), asked, tmp_path / "test").cfg
    assert cfg.logger.mode == "offline" and cfg.logger.project == "tests"


def test_what_ones_own_yaml_calls_is_called(run, own_yaml, tmp_path):
    """With --config-dir: it stands where Hydra looks for configurations, not in the checkpoint."""
    own_yaml("callbacks/own", "defaults: [default]\nmark: {'_target_': 'test_train.Mark'}\n")
    folder = run(tmp_path / "run", "callbacks=own")
    Mark.made = 0
    run(tmp_path / "test", f"checkpoint={folder / 'checkpoints' / 'best.ckpt'}", "fit=false")
    assert Mark.made == 1


class Mark(pl.Callback):
    made = 0

    def __init__(self) -> None:
        Mark.made += 1


def test_same_seed_same_run_other_seed_other_run(run, finished, tmp_path):
    first, again, other = map(outcome, (finished, run(tmp_path / "again"), run(tmp_path / "other", "seed=2")))
    assert first == again
    assert first["state"] != other["state"]


def test_evaluation_does_not_disturb_training(run, finished, tmp_path):
    curve = ("test_every=1", "callbacks.record.test_curve_tasks=3")
    often = outcome(run(tmp_path / "often", "val_every=1", *curve))
    assert often["state"]["last"] == outcome(finished)["state"]["last"]  # which was validated every second update
    best, tested = rows(tmp_path / "often")[often["results"]["best_iteration"]], often["results"]["test"]
    for mode, name in (("zeroing_off", "test"), ("zeroing_on", "test_zeroed")):  # on the tasks of the final test
        assert [float(best[f"{name}/query_accuracy/step_{n}"]) for n in range(4)] == tested[mode]["accuracy"]


@pytest.mark.parametrize("algo", ["zero", "zero_init", "fomaml"])
def test_head_is_zero_whenever_anything_looks(run, tmp_path, monkeypatch, algo):
    from fewshot.maml import sequential

    seen = []
    for name in ("meta_gradient", "step_accuracies"):
        original = getattr(sequential, name)

        def spy(network, *args, original=original, name=name, **kwargs):
            seen.append((name, not network.head.weight.any() and not network.head.bias.any()))
            return original(network, *args, **kwargs)

        monkeypatch.setattr(sequential, name, spy)
    folder = run(tmp_path / "run", f"algo={algo}", "engine=sequential")
    assert seen[0] == ("step_accuracies", algo != "fomaml")  # validation of iteration 0
    updates = [zero for name, zero in seen if name == "meta_gradient"]
    assert updates == {"zero": [True] * 6, "zero_init": [True] + [False] * 5, "fomaml": [False] * 6}[algo]
    head = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["network.head.weight"]
    assert torch.any(head).item() == (algo != "zero")


def test_stop_at_accuracy_ends_the_run_and_it_stays_ended(run, tmp_path):
    folder = run(tmp_path / "run", "stop_at_accuracy=0.01", "iterations=50")
    results = json.loads((folder / "results.json").read_text())
    assert results["iterations"] <= 2
    reached = results["val"]["zeroing_off"]["accuracy"][2]
    for target, over in ((reached, True), (reached + 0.01, False)):
        assert record_files.over(results | {"config": results["config"] | {"stop_at_accuracy": target}}) == over
    (folder / "results.json").unlink()  # as if killed in the test
    run(folder, "stop_at_accuracy=0.01", "iterations=50")
    assert json.loads((folder / "results.json").read_text())["iterations"] == results["iterations"]


def test_weights_that_are_not_finite_are_never_a_checkpoint(run, tmp_path, monkeypatch):
    """The loss of the update that spoils them is still finite, and a validation is due right after it."""
    from fewshot.maml import sequential

    original = sequential.meta_gradient

    def spoiled(network, *args, **kwargs):
        result = original(network, *args, **kwargs)
        network.head.weight.grad.fill_(torch.nan)
        return result

    monkeypatch.setattr(sequential, "meta_gradient", spoiled)
    with pytest.raises(UserError, match=r"weights are not finite after iteration 1: .*last\.ckpt"):
        run(tmp_path / "run", "val_every=1", "engine=sequential")
    assert checkpoint.read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 0


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_checkpoint(run, tmp_path):
    with pytest.raises(UserError, match=r"train/loss=nan at iteration 2: lower .*outer_lr; .*last\.ckpt"):
        run(tmp_path / "run", "outer_lr=1e30", "iterations=20", "val_every=20", "trainer.log_every_n_steps=2")
    kept = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert all(torch.isfinite(value).all() for value in kept["state_dict"].values())


@pytest.mark.parametrize(
    ("knob", "line"),
    [
        ("inner_lr=1e6", "val at iteration 0: .* not finite numbers after inner step [12]; lower inner_lr"),
        ("inner_lr=1e30", "val at iteration 0: .* not finite numbers after inner step [12]; lower inner_lr"),
        ("dataset.mean=[1e38]", "val at iteration 0: .* not finite numbers after inner step 0; .*dataset.mean"),
        ("init_scale=3e38", "(the weights are|val at iteration 0: .*) not finite .*lower init_scale"),
    ],
)
def test_what_is_not_finite_from_the_start_names_its_knob_and_is_never_the_best_model(run, tmp_path, knob, line):
    with pytest.raises(UserError, match=f"^{line}") as error:
        run(tmp_path / "run", knob, "engine=sequential")
    assert "last.ckpt" not in str(error.value) and not (tmp_path / "run" / "checkpoints").exists()


def test_a_test_whose_numbers_are_not_finite_is_one_line_and_not_chance(run, trained, tmp_path):
    best = trained / "checkpoints" / "best.ckpt"
    with pytest.raises(UserError, match=r"val_tasks=2: .* not finite numbers after inner step 1; lower inner_lr"):
        run(tmp_path / "test", f"checkpoint={best}", "fit=false", "inner_lr=1e30")
    content = torch.load(best, weights_only=True)
    content["state_dict"]["network.head.weight"][0, 0] = torch.nan
    torch.save(content, tmp_path / "nan.ckpt")
    with pytest.raises(UserError, match="weights that are not finite numbers"):
        run(tmp_path / "test", f"checkpoint={tmp_path / 'nan.ckpt'}", "fit=false")
    assert not (tmp_path / "test" / "results.json").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", "foreign", "pickle"])
def test_an_unreadable_checkpoint_is_one_line(run, finished, tmp_path, content):
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    if content == "truncated":
        shutil.copytree(finished, tmp_path / "run")
        path.write_bytes(path.read_bytes()[:-1000])
        (tmp_path / "run" / "results.json").unlink()
    else:
        path.parent.mkdir(parents=True)
        if content == "foreign":
            torch.save({"state_dict": {}}, path)
        elif content == "pickle":
            torch.save({"fewshot": subprocess.Popen}, path)  # an object, not data: must never be built
        else:
            path.write_bytes(content)
    for overrides in ((), (f"checkpoint={path}",), (f"checkpoint={path}", "fit=false")):
        folder = tmp_path / "run" if "fit=false" not in overrides else tmp_path / "test"
        with pytest.raises(UserError, match=r"last\.ckpt: .*(cannot be read|not written|names .* Popen)") as error:
            run(folder, *overrides)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["ways=4", "model.width=4", "model=conv4_pooled"])
def test_a_checkpoint_of_another_network_is_refused(run, finished, tmp_path, change):
    with pytest.raises(UserError, match="trained with model=conv4_strided ways=5") as error:
        run(tmp_path / "test", f"checkpoint={finished / 'checkpoints' / 'best.ckpt'}", "fit=false", change)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU")
def test_no_gpu_is_one_line(run, tmp_path):
    with pytest.raises(UserError, match=r"trainer\.accelerator=gpu: .*trainer=cpu"):
        run(tmp_path / "gpu", "trainer=gpu")


def test_a_full_disk_is_one_line_and_keeps_what_there_was(run, tmp_path, monkeypatch):
    folder = run(tmp_path / "run", "iterations=4")
    kept = (folder / "checkpoints" / "last.ckpt").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        run(folder, "iterations=6")
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == kept
    assert not [path for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_terminal_gets_a_progress_bar(run, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "120")
    run(tmp_path / "run", "trainer.log_every_n_steps=1")
    assert re.search(r"training .*6/6.*left +loss \d\.\d+  accuracy \d\.\d+", terminal.getvalue())


def test_a_checkpoint_keeps_to_the_split_that_it_was_trained_with(run, tmp_path):
    for number in range(8):
        for image in range(4):
            path = tmp_path / "photos" / f"class{number}" / f"{image}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (28, 28), (30 * number, 60 * image, 0)).save(path)
    photos = ("dataset=folder", f"dataset.root={tmp_path / 'photos'}", "dataset.size=28", "model=conv4_strided")
    folder = run(tmp_path / "run", *photos, "ways=2", "queries=1", "val_every=6", "dataset.split_seed=5")
    results, best = json.loads((folder / "results.json").read_text()), folder / "checkpoints" / "best.ckpt"
    splits = results["splits"]
    assert splits == json.loads((folder / "splits.json").read_text()) == checkpoint.read(best)["fewshot"]["splits"]
    assert sorted(splits["train"] + splits["val"] + splits["test"]) == [f"class{number}" for number in range(8)]
    assert re.fullmatch("[0-9a-f]{64}", splits["sha256"]) and len(splits["test"]) == 2
    assert '"test": ["class' in (folder / "results.json").read_text()  # on one line

    test = (f"checkpoint={best}", "fit=false")
    another = (*test, "dataset=folder", "dataset.split_seed=6")
    with pytest.raises(UserError, match=r"^dataset=photos: not the split that .*best\.ckpt was .* add dataset\.other_"):
        run(tmp_path / "refused", *another)
    other = run(tmp_path / "other", *another, "dataset.other_split=true")
    assert json.loads((other / "splits.json").read_text())["sha256"] != splits["sha256"]
    (tmp_path / "photos").rename(tmp_path / "moved")
    moved = run(tmp_path / "again", *test, "dataset=folder", f"dataset.root={tmp_path / 'moved'}")
    assert json.loads((moved / "results.json").read_text())["test"] == results["test"]

    Image.new("RGB", (28, 28), "white").save(tmp_path / "moved" / "class0" / "0.png")
    with pytest.raises(UserError, match=r"\(same classes, other images\); .*dataset\.other_split=true$"):
        run(tmp_path / "refused", *test, "dataset=folder", f"dataset.root={tmp_path / 'moved'}")
    (folder / "results.json").unlink()
    last, root = f"checkpoint={folder / 'checkpoints' / 'last.ckpt'}", f"dataset.root={tmp_path / 'moved'}"
    with pytest.raises(UserError, match=r"\(same classes, other images\); .*start anew in another hydra\.run\.dir$"):
        run(folder, last, "dataset=folder", root, "dataset.other_split=true")

    old = torch.load(best, weights_only=True)
    del old["fewshot"]["splits"]
    torch.save(old, tmp_path / "old.ckpt")
    tested = run(tmp_path / "old", f"checkpoint={tmp_path / 'old.ckpt'}", "fit=false", "dataset=folder", root)
    assert (tested / "results.json").exists()
