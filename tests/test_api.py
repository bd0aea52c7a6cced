"""fewshot.train and fewshot.test: what the commands do, from Python, and what they leave of the process."""

import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import HANG, SMALL, outcome
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

import fewshot
from fewshot.config.python_call import as_error, words_of
from fewshot.evidence import __main__ as evidence

KNOBS = {word.partition("=")[0].replace(".", "__"): word.partition("=")[2] for word in SMALL} | {"logger": "none"}
KNOBS |= {name: int(value) for name, value in KNOBS.items() if value.isdigit()}


def of_the_process():
    """What belongs to the whole process and a run changes."""
    root = logging.getLogger()
    signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    levels = [logging.getLogger(name).level for name in ("fewshot", "matplotlib", "pytorch_lightning")]
    hydra = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    seeds = {name: value for name, value in os.environ.items() if name.startswith("PL_")}
    others = torch.get_num_threads(), threading.active_count(), os.getcwd(), logging.raiseExceptions, seeds
    exact = torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    fast = torch.backends.mha.get_fastpath_enabled()
    return *signals, root.level, root.handlers[:], *levels, *hydra, *others, *exact, fast


def draws():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_train_is_what_the_command_does_and_leaves_the_process_as_it_was(finished, cache, tmp_path, monkeypatch):
    def png(figure):
        torch.backends.mha.set_fastpath_enabled(False)  # as the batched engine does for some networks
        return b"no picture"

    monkeypatch.setenv("PL_TRAINER_MAX_TIME", "00:00:00:00")  # Lightning would obey it
    monkeypatch.setattr("fewshot.results.figures.png", png)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    torch.backends.mha.set_fastpath_enabled(True)
    before = of_the_process()
    run = fewshot.train(folder=tmp_path / "a, b=c", dataset__cache=cache, **KNOBS)
    assert of_the_process() == before and draws() == expected
    ours, theirs = outcome(run.folder), outcome(finished)
    assert ours == theirs
    assert run.folder == tmp_path / "a, b=c" and repr(run) == f"Run({str(run)!r})"
    assert "\n" in (run.folder / "train.log").read_text()

    exact = {"+trainer.deterministic": True}
    monkeypatch.setenv("HOME", str(tmp_path))
    before = of_the_process()
    tested = fewshot.test(run, folder="~/test", test_tasks=2, dataset__cache=cache, logger="none", **exact)
    assert of_the_process() == before and tested.folder == tmp_path / "test"
    assert tested.results["test"]["tasks"] == 2 and tested.metrics == {}
    model = fewshot.load(run)
    assert model.config == run.model().config == fewshot.load(tested.results["config"]["checkpoint"]).config


def test_a_run_shows_what_its_folder_holds(finished):
    run = fewshot.Run(str(finished))
    assert run.metrics["iteration"].tolist() == [0, 2, 4, 6] and run.results["iterations"] == 6
    loss = run.metrics["train/loss"]
    assert np.isnan(loss[0]) and np.isfinite(loss[1:]).all() and loss.dtype == np.float64
    assert {*run.figures} == {"accuracy_over_iterations", "accuracy_over_steps"}
    assert run._repr_png_() == run.figures["accuracy_over_steps"].read_bytes()
    assert fewshot.Run("nowhere")._repr_png_() is None
    assert repr(run.model(trust=True)) == "Pretrained(conv4_strided, FOMAML, glyphs 5-way 1-shot)"


@pytest.mark.parametrize(
    ("knobs", "line"),
    [
        ({"inner_lrr": 0.1}, "inner_lrr=0.1: no such knob; did you mean inner_lr?"),
        ({"ways": 0}, "ways=0: must be an integer of at least 2"),
        ({"algo": "zeroo"}, "algo=zeroo: no such choice; did you mean zero?"),
        ({"seed": [1, 2]}, "seed=[1, 2]: must be an integer of at least 0"),
        ({"dataset": "folder", "dataset__root": "nowhere"}, "dataset.root=nowhere: no such file or folder"),
        ({"seed": {1, 2}}, "seed={1, 2}: a set is no value of a knob"),
        ({"checkpoint": "nowhere"}, "checkpoint=nowhere: no such file"),
        ({"folder": ""}, "folder=: is empty; give a path"),
        ({"experiment": "poster_panel1"}, "experiment=poster_panel1: is a sweep, which needs the command line; with"),
        ({"experiment": "poster_panel1", "hydra__mode": "RUN", "ways": 0}, "ways=0: must be an integer of at least 2"),
    ],
)
def test_a_refused_call_raises_the_commands_line_and_leaves_nothing(knobs, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = of_the_process()
    with pytest.raises(fewshot.UserError) as error:
        fewshot.train(**knobs)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)
    assert not any(tmp_path.iterdir()) and of_the_process() == before


def test_keywords_are_read_back_as_what_they_are(config):
    values = {
        "ways": np.int64(7),
        "inner_lr": 0.25,
        "seed": 3,
        "zeroing": True,
        "test_every": None,
        "checkpoint": Path("a ${b}, c=d's"),
        "dataset__mean": (0.5,),
        "algo__first_order": False,
        "model": "conv4_pooled",
        "dataset__root": "null",
        "dataset__labels": Path("caf\u00e9/photos.csv"),
        "milestones": [1, 2],
        "stop_at_accuracy": 1e-3,
    }
    words = words_of(values)
    assert words[:5] == ["ways=7", "inner_lr=0.25", "seed=3", "+zeroing=true", "test_every=null"]
    assert words_of({"+trainer.max_time": "00:00:01:00"}) == ["+trainer.max_time='00:00:01:00'"]
    cfg = config(*(word for word in words if not word.startswith("dataset.root")), "dataset=folder", words[9])
    for keyword, value in values.items():
        node = cfg
        for part in keyword.split("__"):
            node = node[part]
        expected = str(value) if isinstance(value, Path) else value
        if keyword == "model":
            node = node.name
        assert node == (list(expected) if isinstance(expected, tuple) else expected), keyword


def test_ways_and_shots_may_be_numpys_and_each_is_tested_once(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("fewshot.across.__main__.run", lambda *words: calls.append(words) or tmp_path)
    fewshot.test("omniglot-5w1s-zero", datasets="glyphs", ways=np.int64(7), shots=np.array([1, 5, 5]))
    fewshot.test("omniglot-5w1s-zero", datasets=["glyphs", "omniglot"], ways=range(5, 7))
    assert [call[1:4] for call in calls] == [("glyphs", [7], [1, 5]), ("glyphs,omniglot", [5, 6], None)]
    assert all(type(number) is int for number in (*calls[0][2], *calls[0][3]))


def test_a_run_with_a_yaml_file_of_ones_own_goes_on_and_is_tested_with_its_folder(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("fewshot.results.figures.png", lambda figure: b"no picture")
    own = tmp_path / "own, a=b" / "dataset" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\ndefaults: [glyphs]\ndataset: {name: mine}\n")
    at = {"config_dir": own.parent.parent}
    run = fewshot.train(folder=tmp_path / "run", dataset="mine", dataset__cache=cache, **KNOBS, **at)
    assert run.results["config"]["dataset"]["name"] == "mine"
    again = fewshot.train(checkpoint=run, **at)  # it is finished, and is shown again
    assert again == run
    for call in (lambda: fewshot.train(checkpoint=run), lambda: fewshot.test(run, folder=tmp_path / "test")):
        with pytest.raises(fewshot.UserError) as error:
            call()
        assert re.fullmatch(
            r"dataset=mine: no such choice; .+; a file of your own .+, --config-dir=.+", str(error.value)
        )
    tested = fewshot.test(run, folder=tmp_path / "test", test_tasks=2, **at)
    assert tested.results["splits"] == run.results["splits"]


@pytest.mark.parametrize(
    ("knobs", "line"),
    [
        ({}, "config_dir=nowhere: no such folder"),
        ({"datasets": "glyphs"}, "config_dir=nowhere: datasets= takes those that come with this program; leave it out"),
    ],
)
def test_a_folder_of_ones_own_that_cannot_be_used_is_one_line(knobs, line):
    with pytest.raises(fewshot.UserError, match=f"^{re.escape(line)}$"):
        fewshot.test("run", config_dir="nowhere", **knobs)


def test_evidence_is_the_commands_page(finished, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(evidence, "run", lambda cfg, overrides, folder: asked.append((cfg.test_tasks, folder)))
    assert fewshot.Run(finished).evidence(test_tasks=4) == finished / "evidence" / "report.html"
    assert asked == [(4, finished / "evidence")]
    assert not (finished / "train.log").exists() and not (finished / ".hydra").exists()


def test_an_interrupt_is_one_and_other_ends_stay():
    for code, kind in ((130, KeyboardInterrupt), ("a line", fewshot.UserError), (143, SystemExit)):
        with pytest.raises(kind), as_error():
            raise SystemExit(code)


def test_the_package_is_light_and_its_functions_are_no_modules():
    program = "import fewshot, sys; assert not {'torch', 'hydra', 'numpy', 'pydantic'} & {*sys.modules}\n"
    program += "import fewshot.train, fewshot.test; from fewshot import train, test, Run\n"
    program += "assert fewshot.train is train and train.__module__ == test.__module__ == 'fewshot.api'\n"
    program += "assert 'torch' not in sys.modules and {*fewshot.__all__} <= {*dir(fewshot)}; print(fewshot.__version__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    assert f'\nversion = "{done.stdout.strip()}"\n' in (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert not hasattr(fewshot, "nothing") and SimpleNamespace(**{n: getattr(fewshot, n) for n in fewshot.__all__})


def test_the_calls_in_the_docs_run_as_they_stand(cache, tmp_path, monkeypatch):
    """With small numbers; docs/python.md's export is in test_adapted.py, its loop below."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fewshot.results.figures.png", lambda figure: b"no picture")
    monkeypatch.setattr(evidence, "run", lambda cfg, overrides, folder: None)
    train, test = fewshot.train, fewshot.test
    small = {name: value for name, value in KNOBS.items() if name != "iterations"} | {"dataset__cache": cache}
    monkeypatch.setattr("fewshot.api.train", lambda **knobs: train(**({} if "checkpoint" in knobs else small) | knobs))
    monkeypatch.setattr("fewshot.api.test", lambda run, **knobs: test(run, dataset__cache=cache, **knobs))
    text = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    calls, estimator, adapted, *_ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    numbers = {"omniglot": "glyphs", "=300": "=2", "=600": "=4", "=2000": "=4"}
    for name, other in numbers.items():
        assert name in calls
        calls = calls.replace(f'"{name}"', f'"{other}"').replace(name, other)
    names = {}
    exec(calls, names)
    run, tested = names["run"], names["tested"]
    assert run.results["iterations"] == 4 and tested.results["test"]["tasks"] == 4
    images = list(np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8))
    exec(estimator, {"images": images, "labels": list("aabbcc"), "others": images[:3], "their_labels": list("abc")})
    exec(adapted.replace('"RUN"', repr(str(run))), {"images": images, "image": images[0]})
    assert (tmp_path / "FOLDER" / "adapted.safetensors").exists()


def test_the_loop_of_ones_own_in_the_docs_runs_without_lightning_and_hydra():
    text = (Path(__file__).parents[1] / "docs" / "python.md").read_text()
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "meta_gradient(" in code]
    assert len(example.splitlines()) <= 20 and "16 * iteration, 16" in example
    example = example.replace("16 * iteration, 16", "4 * iteration, 4")
    program = f"{example}\nimport sys; print({{'pytorch_lightning', 'hydra', 'omegaconf', 'wandb'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    accuracies = [float(number) for number in re.findall(r"0\.\d+", done.stdout)]
    assert len(accuracies) == 4 and accuracies[0] == 0.2 and min(accuracies[1:]) > 0.8
    assert done.stdout.endswith("set()\n")


def test_an_interrupted_training_goes_on_bitwise(finished, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fewshot.results.figures.png", lambda figure: b"no picture")
    replace, before, written = os.replace, of_the_process(), []

    def interrupting(source, target):
        replace(source, target)
        written.append(Path(target).name)
        if written.count("last.ckpt") == 2 and written[-1] == "last.ckpt":
            os.kill(os.getpid(), signal.SIGINT)  # as a notebook's stop button does

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupting)
        fewshot.train(folder=tmp_path / "run", dataset__cache=cache, **KNOBS)
    assert "stopped by SIGINT; " in capsys.readouterr().err and of_the_process() == before
    run = fewshot.Run(tmp_path / "run")
    assert not (run.folder / "results.json").exists()
    with pytest.raises(fewshot.UserError, match=r"results\.json: no such file$"):
        _ = run.results
    ours, theirs = outcome(fewshot.train(checkpoint=run).folder), outcome(finished)
    assert (ours["state"], ours["metrics"]) == (theirs["state"], theirs["metrics"])
