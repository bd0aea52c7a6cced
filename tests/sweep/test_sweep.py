"""Many runs: how their folders are named, what is said of them, how a sweep goes on after a kill."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import hydra
import numpy as np
import pytest
import scipy.stats
from conftest import HANG, SMALL, composed, halt_when, outcome, told
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fewshot.compare.__main__ import main as compare_main
from fewshot.config.check import check
from fewshot.config.tree import CONF, job_folder, settings
from fewshot.errors import UserError
from fewshot.processes import ranks
from fewshot.results.figures import BLUE, GREEN, accuracy_over_steps
from fewshot.results.task_scores import write_tasks
from fewshot.sweep import figures, tables
from fewshot.sweep import settings as grouped
from fewshot.sweep.__main__ import main as sweep_main
from fewshot.sweep.settings import fingerprint
from fewshot.training import checkpoint

KEYS = st.sampled_from(["algo", "inner_steps", "seed", "+zeroing", "dataset.root", "algo.first_order"])
VALUES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60)


@given(st.dictionaries(KEYS, VALUES), st.dictionaries(KEYS, VALUES), st.randoms())
def test_a_jobs_folder_is_named_by_its_overrides_alone(one, other, random):
    overrides = [f"{key}={value}" for key, value in one.items()]
    name = job_folder(overrides)
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,200}", name) and name not in (".", "..")
    random.shuffle(overrides)
    assert job_folder(overrides) == name
    assert (job_folder([f"{key}={value}" for key, value in other.items()]) == name) == (one == other)


def test_a_short_name_says_what_the_job_is():
    assert job_folder(["seed=0", "algo=fomaml", "+zeroing=true"]) == "algo-fomaml__seed-0__zeroing-true"


def make_run(folder, config, *, accuracy=None, curve=(), error=None):
    """What a run leaves: results.json if it has an accuracy, else what Hydra wrote when it began."""
    folder.mkdir(parents=True)
    if accuracy is None:
        (folder / ".hydra").mkdir()
        OmegaConf.save(config, folder / ".hydra" / "config.yaml")
    else:
        scores = {"accuracy": accuracy, "ci95": [0.0] * len(accuracy)}
        test = {"tasks": 6, "zeroing_off": scores, "zeroing_on": scores}
        val = test | {"zeroing_off": {"accuracy": [0.0] * (config.inner_steps + 1), "ci95": []}}
        content = {"test": test, "val": val, "best_iteration": 0, "config": settings(config)}
        (folder / "results.json").write_text(json.dumps(content))
    if curve:
        step = f"val/query_accuracy/step_{config.inner_steps}"
        (folder / "metrics.csv").write_text("\n".join([f"iteration,{step}", *(f"{n},{a}" for n, a in curve)]) + "\n")
    if error:
        (folder / "error.txt").write_text(error)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_settings_are_means_over_seeds_with_their_confidence_interval(config, tmp_path):
    for seed, accuracy in enumerate((0.5, 0.6, 0.8)):
        ends = [(0, 0.2), (10, accuracy), (20, 0.9)]
        make_run(tmp_path / "a" / f"{seed}", config("algo=zero", f"seed={seed}"), accuracy=[0.2, accuracy], curve=ends)
    make_run(tmp_path / "a" / "other", config("algo=somaml", "seed=0"), accuracy=[0.25, 0.75], curve=[(0, 0.25)])
    make_run(tmp_path / "a" / "late", config("algo=somaml", "seed=1"), curve=[(0, 0.3)])
    make_run(tmp_path / "b" / "broken", config("algo=somaml", "seed=2"), error="Traceback\n  ...\nValueError: 1 | 2\n")
    make_run(tmp_path / "b" / "again", config("algo=zero", "seed=2", "logger=none"), accuracy=[0, 0])  # the same
    sweep_main([str(tmp_path / "a"), str(tmp_path / "b"), f"into={tmp_path}"])
    rows = table(tmp_path / "summary.csv")
    assert len(rows) == 2 * 2 * 2  # settings, zeroing modes, steps
    row_of = {(row["setting"], row["test_zeroing"], row["step"]): row for row in rows}
    one = row_of["FOMAML, zeroing", "off", "1"]
    # By hand: mean 19/30, standard deviation sqrt(7/300), Student's t of 2 degrees of freedom 4.302653
    assert (one["accuracy"], one["ci95"], one["n"]) == ("0.633333", "0.379458", "3")
    assert one["algo.first_order"] == "true" and one["algo.zeroing"] == "true"
    other = row_of["SOMAML, no zeroing", "on", "1"]
    assert (other["accuracy"], other["ci95"], other["n"]) == ("0.750000", "", "1")
    text = (tmp_path / "summary.md").read_text()
    assert re.search(r"FOMAML, zeroing +\| 20.00 ± 0.00 \| 63.33 ± 37.95 \| 3 ", text)
    # 50% is first reached at 10 by all three, 80% at 20, 20, 10
    assert re.search(r"FOMAML, zeroing +\| validation \| 10 +\| 13 +\| 17 +\| 17 +\| 20 +\| 20", text)
    assert re.search(r"late +\| unfinished", text) and re.search(r"broken +\| failed +\| ValueError: 1 \\\| 2", text)
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_a_summary_and_the_list_of_datasets_need_no_torch(config, tmp_path):
    make_run(tmp_path / "run", config("algo=zero"), accuracy=[0.2, 0.5], curve=[(0, 0.2), (10, 0.5)])
    program = f"""
import importlib, pkgutil, sys
import fewshot.results, fewshot.sweep
for package in (fewshot.results, fewshot.sweep):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
from fewshot.sweep.__main__ import main as sweep_main
from fewshot.data import __main__ as data
fewshot.results.figures.png = lambda figure: b"no picture"
sweep_main([{str(tmp_path)!r}])
data.main(["list", "dataset=glyphs", "dataset=folder"])
slow = ("torch", "pytorch_lightning", "lightning_fabric", "wandb", "scipy")
print([name for name in slow if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=HANG)
    assert done.stdout.splitlines()[-1] == "[]" and (tmp_path / "summary.png").exists()


def test_a_knob_is_named_by_the_number_that_the_call_gave(config, tmp_path):
    for value in ("0.4", "1.0", "1e30"):
        make_run(tmp_path / value, config(f"inner_lr={value}"), accuracy=[0.5])
    labels = [setting.label() for setting in grouped.group(grouped.read_jobs([tmp_path]))]
    assert labels == ["inner_lr=0.4", "inner_lr=1", "inner_lr=1e+30"]


def test_what_follows_from_a_knob_is_not_named(config, tmp_path):
    for number, overrides in enumerate((["inner_steps=1"], ["inner_steps=5"], ["dataset=cifarfs", "inner_steps=1"])):
        make_run(tmp_path / str(number), config(*overrides), accuracy=[0.5] * 6)
    labels = [setting.label() for setting in grouped.group(grouped.read_jobs([tmp_path]))]
    assert not any("test_steps" in label or "dataset.size" in label or "smallest" in label for label in labels)
    assert sum("dataset.name=cifarfs" in label for label in labels) == 1 and len(set(labels)) == 3


def test_what_an_exported_model_does_not_say_of_its_training_is_not_named(config, tmp_path):
    for algo in ("fomaml", "zero"):
        make_run(tmp_path / algo, config(f"algo={algo}"), accuracy=[0.2])
    results = json.loads((tmp_path / "zero" / "results.json").read_text())
    for part in ("trainer", "callbacks", "optimizer", "schedule", "milestones", "select"):
        del results["config"][part]
    (tmp_path / "zero" / "results.json").write_text(json.dumps(results))
    labels = [setting.label() for setting in grouped.group(grouped.read_jobs([tmp_path]))]
    assert labels == ["no zeroing", "zeroing"]


def test_a_long_name_of_a_setting_leaves_room_for_the_axes(config, tmp_path):
    for number in range(2):
        root = f"/{'folder' * 30}{number}"
        make_run(tmp_path / f"{number}", config("dataset=folder", f"dataset.root={root}"), accuracy=[0.2, 0.5])
    figure = figures.sweep(grouped.group(grouped.read_jobs([tmp_path])))
    figure.draw_without_rendering()
    assert figure.axes[1].get_window_extent().x1 < figure.legends[0].get_window_extent().x0


def test_a_head_that_begins_elsewhere_is_not_called_random(config, tmp_path):
    for algo in ("fomaml", "zero", "unicorn", "protomaml"):
        for scale in (0, 1):
            make_run(tmp_path / f"{algo}{scale}", config(f"algo={algo}", f"init_scale={scale}"), accuracy=[0.2])
    labels = {setting.label() for setting in grouped.group(grouped.read_jobs([tmp_path]))}
    assert len(labels) == 8
    assert {label for label in labels if "random head" in label} == {"FOMAML, random head"}


def test_an_algorithm_is_called_by_its_papers_name(config, tmp_path):
    algos = {
        **{"fomaml": "FOMAML, random head", "zero": "FOMAML, zeroed every update", "anil": "ANIL, random head"},
        **{"zero_init": "FOMAML, zero at the start", "boil": "BOIL, random head", "metasgd": "Meta-SGD, random head"},
        **{"protomaml": "ProtoMAML", "unicorn": "UnicornMAML", "msl": "MSL (300 updates), random head"},
        "protonet": "ProtoNet (dot product)",
    }
    for algo in algos:
        make_run(tmp_path / "family" / algo, config(f"algo={algo}"), accuracy=[0.2])
    assert {setting.label() for setting in grouped.group(grouped.read_jobs([tmp_path / "family"]))} == {*algos.values()}
    orders = (["anil"], ["anil", "algo.first_order=false"], ["fomaml"], ["somaml"], ["anil", "algo.head=shared"])
    for number, (algo, *more) in enumerate(orders):
        make_run(tmp_path / "orders" / str(number), config(f"algo={algo}", *more), accuracy=[0.2])
    (tmp_path / "alone").mkdir()
    make_run(tmp_path / "alone" / "0", config("algo=unicorn", "+zeroing=true"), accuracy=[0.2])
    assert {setting.label() for setting in grouped.group(grouped.read_jobs([tmp_path / "orders"]))} == {
        *("ANIL (first order)", "ANIL (second order)", "FOMAML", "SOMAML", "FOMAML, head only, one head vector")
    }
    (setting,) = grouped.group(grouped.read_jobs([tmp_path / "alone"]))
    assert setting.label() == "UnicornMAML (first order) + zeroing"


def test_an_algorithm_of_ones_own_is_named_and_not_imported(config, tmp_path):
    """A stored configuration may be of anybody; the module that it names is not even there."""
    for name in ("own", "fomaml"):
        make_run(tmp_path / name, config("algo=fomaml"), accuracy=[0.2])
    results = json.loads((tmp_path / "own" / "results.json").read_text())
    results["config"]["algo"] |= {"_target_": "not_there.Reptile", "head": "own"}
    (tmp_path / "own" / "results.json").write_text(json.dumps(results))
    labels = {setting.label() for setting in grouped.group(grouped.read_jobs([tmp_path]))}
    assert labels == {"FOMAML", "Reptile"}


def test_tables_and_figures_give_the_same_interval_over_seeds_and_name_it(config, tmp_path):
    for seed, accuracy in enumerate((0.48, 0.52)):
        curve = [(0, 0.2), (10, accuracy)]
        make_run(tmp_path / f"{seed}", config(f"seed={seed}"), accuracy=[0.2, accuracy], curve=curve)
    settings_ = grouped.group(grouped.read_jobs([tmp_path]))
    ci95 = 12.7062 * 0.02828427 / 2**0.5  # Student's t of one degree of freedom; the range would be .02
    text = tables.as_markdown(settings_, [])
    assert f"50.00 ± {100 * ci95:.2f}" in text
    figure = figures.sweep(settings_)
    for axes in figure.axes[:3]:  # the fourth is of a curve that no run recorded
        (band,) = axes.collections
        assert band.get_paths()[0].get_extents().ymax == pytest.approx(0.5 + ci95, abs=1e-5)
    for said in (text, figure.get_suptitle()):
        assert "95% confidence interval over" in said and "Student t" in said
    assert "All seeds share the test tasks" in text


def test_a_setting_that_was_tested_with_zeroing_alone_has_its_row(config, tmp_path):
    """As with other ways than in training."""
    for number, lr in enumerate((0.1, 0.2)):
        make_run(tmp_path / str(number), config(f"inner_lr={lr}", "fit=false", "checkpoint=a"), accuracy=[0.2, 0.5])
        results = json.loads((tmp_path / str(number) / "results.json").read_text())
        del results["val"], results["test"]["zeroing_off"]
        (tmp_path / str(number) / "results.json").write_text(json.dumps(results))
    settings_ = grouped.group(grouped.read_jobs([tmp_path]))
    text = tables.as_markdown(settings_, [])
    assert "test zeroing off\n" not in text
    assert re.search(r"test zeroing on\n.*inner_lr=0\.1 +\| 20\.00 +\| 50\.00", text, re.DOTALL)
    assert len(figures.sweep(settings_).axes) == 4


def test_the_interval_over_seeds_is_that_of_a_t_test():
    for seeds in (2, 3, 10, 100):
        values = np.random.default_rng(seeds).uniform(size=(seeds, 4))
        interval = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
        mean, half = grouped.mean_and_ci95(values)
        assert np.allclose([mean - half, mean + half], interval, rtol=1e-12)


def test_a_name_is_no_formula(config, tmp_path):
    for number, root in enumerate((r"$\broken$", "$x_{")):
        call = ("dataset=folder", rf"dataset.name='{root}'", rf"dataset.root='{root}'")
        make_run(tmp_path / str(number), config(*call), accuracy=[0.2, 0.5], curve=[(0, 0.2), (10, 0.5)])
    settings_ = grouped.group(grouped.read_jobs([tmp_path]))
    recorded = {"updates": [1], "query_support": [[[1, 0], [0, 1]]], "query_query": [[[1, 0], [0, 1]]]}
    similar = figures.cosine_similarity({setting.label(): [recorded] for setting in settings_}, r"$\broken$")
    drawn = figures.sweep(settings_), figures.panels(settings_, ["dataset.root"])
    for figure in (*drawn, similar, accuracy_over_steps(settings_[0].jobs[0].results, settings_[0].config)):
        figure.draw_without_rendering()


def test_what_a_terminal_obeys_and_what_ends_a_cell_are_escaped_wherever_a_run_is_named(
    config, tmp_path, capsys, caplog, monkeypatch
):
    monkeypatch.setattr("fewshot.results.figures.png", lambda figure: b"no picture")
    wild = "\x1b]0;owned\x07|\u202e"
    configs = []
    for seed in range(2):
        configs.append(config("dataset=folder", "dataset.root=/plain", f"seed={seed}"))
        configs[-1].dataset.name = f"\x9b31m|{seed}"
        OmegaConf.update(configs[-1], "of_another_version", f"{seed}{wild}", force_add=True)
    for number, cfg in enumerate((*configs, configs[0])):
        make_run(tmp_path / f"{wild}{number}", cfg, accuracy=[0.2, 0.5], curve=[(0, 0.2), (10, 0.5)])
    make_run(tmp_path / f"{wild}failed", config("seed=2"), error=f"ValueError: {wild}")
    with pytest.raises(SystemExit):
        tables.conclude(tmp_path, ["dataset.name"])
    said = [capsys.readouterr().out, caplog.text, (tmp_path / "summary.md").read_text()]
    settings_ = grouped.group(grouped.read_jobs([tmp_path]))
    drawn = figures.sweep(settings_[:2]), figures.panels(settings_[:2], ["dataset.name"])
    for figure in drawn:
        said += [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    assert all(line.isprintable() for text in said for line in text.split("\n"))
    assert sum("owned" in text for text in said) > 5 and "left out, the same setting" in caplog.text
    rows = [line for line in said[2].split("\n") if "owned" in line]
    assert rows and all(r"\x07\|\u202e" in row for row in rows)


def test_what_others_call_their_settings_is_text_in_a_summary():
    wild = "<img src=x> ![a](http://b) `c` [0.9, 0.99] | d"
    assert tables.as_text(wild) == r"\<img src=x> ![a]\(http://b) \`c\` [0.9, 0.99] \| d"
    assert wild not in tables._table(wild, ["setting"], [[wild]])


@pytest.mark.parametrize(("matrices", "size"), [(1, 5), (2, 4)])
def test_similarities_that_no_run_writes_are_left_out(matrices, size, config, tmp_path, caplog):
    make_run(tmp_path / "run", config("ways=5"), accuracy=[0.2, 0.5])
    content = {"updates": [1, 11]} | dict.fromkeys(("query_support", "query_query"), [[[0.5] * size] * size] * matrices)
    (tmp_path / "run" / "cosine_similarity.json").write_text(json.dumps(content))
    assert tables._similarities(grouped.group(grouped.read_jobs([tmp_path]))) == {}
    assert "must have a matrix of ways x ways for each of its updates; left out" in caplog.text


def test_a_band_ends_where_accuracies_do(config, tmp_path):
    for seed, accuracy in enumerate((0.1, 0.9)):
        make_run(tmp_path / f"{seed}", config(f"seed={seed}"), accuracy=[0.2, accuracy])
    (band,) = figures.sweep(grouped.group(grouped.read_jobs([tmp_path]))).axes[0].collections
    assert band.get_paths()[0].get_extents().intervaly.tolist() == [0, 1]


def test_panels_have_axes_for_each_value(config, tmp_path):
    for algo in ("fomaml", "somaml", "zero"):
        make_run(tmp_path / algo, config(f"algo={algo}"), accuracy=[0.2, 0.5], curve=[(0, 0.2), (10, 0.5)])
    settings_ = grouped.group(grouped.read_jobs([tmp_path]))
    figure = figures.panels(settings_, ["algo.first_order"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["FOMAML", "SOMAML"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]
    assert figure.axes[0].get_ylabel() == "validation accuracy" and "test zeroing off" in figure.get_suptitle()
    assert [line.get_color() for line in figure.axes[0].lines] == [BLUE, GREEN]  # as where a zero start is drawn, too
    sweep_main([str(tmp_path), "panels=algo.first_order,algo.zeroing"])
    assert (tmp_path / "panels.png").stat().st_size > 10_000


def test_runs_that_ended_at_an_accuracy_are_counted_each_on_its_own_curve(config, tmp_path):
    for seed, (end, accuracy) in enumerate(((80, 0.91), (160, 0.96))):
        curve = [(n, 0.2) for n in range(0, end, 40)] + [(end, accuracy)]
        make_run(tmp_path / f"{seed}", config(f"seed={seed}", "stop_at_accuracy=0.9"), accuracy=[0.2, 0.9], curve=curve)
    (setting,) = grouped.group(grouped.read_jobs([tmp_path]))
    updates = dict(zip(tables.TARGETS, tables.updates_to(setting)[1:], strict=True))
    assert (updates[0.9], updates[0.95]) == ("120", "1 of 2 seeds")


def test_what_cannot_be_read_is_listed_and_a_finished_run_goes_before_an_unfinished_one(
    config, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("fewshot.results.figures.png", lambda figure: b"no picture")
    make_run(tmp_path / "a" / "failed", config("seed=0"), error="no disk\n")
    make_run(tmp_path / "a" / "mistaken", config("inner_steps=x", "seed=x"), error="inner_steps=x\n")
    (tmp_path / "a" / "cut" / ".hydra").mkdir(parents=True)
    (tmp_path / "a" / "cut" / ".hydra" / "config.yaml").touch()
    make_run(tmp_path / "b" / "finished", config("seed=0", "dataset.cache=elsewhere"), accuracy=[0.2, 0.5])
    make_run(tmp_path / "b" / "refused", config("seed=1"), accuracy=[0.2, 0.7], error="another configuration\n")
    sweep_main([str(tmp_path / "a"), str(tmp_path / "b"), f"into={tmp_path}"])
    assert [(row["step"], row["accuracy"], row["n"]) for row in table(tmp_path / "summary.csv")[:2]] == [
        ("0", "0.200000", "2"),
        ("1", "0.600000", "2"),
    ]
    said = re.sub(" +", " ", capsys.readouterr().out)
    for line in (
        "| mistaken | failed | inner_steps=x",
        "| cut | failed | cannot be read",
        "| refused | failed | another",
    ):
        assert line in said
    with pytest.raises(SystemExit):
        tables.conclude(tmp_path / "b", [])


def test_what_was_computed_otherwise_is_another_setting(config, tmp_path):
    calls = (
        ["dataset=folder", "dataset.root=birds"],
        ["dataset=folder", "dataset.root=cars"],
        ["dataset=folder", "dataset.name=mine", "dataset.root=birds"],
        ["dataset=folder", "dataset.name=mine", "dataset.root=cars"],
        ["trainer.precision=64-true"],
        ["augment=standard"],
        ["augment=standard", "augment.crop.padding=8"],
        ["trainer=cpu"],
        ["init_scale=1.0", "seed=1"],  # of the last two one
        *([f"algo={path.stem}", "inner_steps=1"] for path in (CONF / "algo").glob("*.yaml")),
    )
    for number, call in enumerate(calls):
        make_run(tmp_path / str(number), config(*call), accuracy=[0.2, 0.5])
    labels = [setting.label() for setting in grouped.group(grouped.read_jobs([tmp_path]))]
    assert len(labels) == len(set(labels)) == len(calls) - 1


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda folder, config: None, "no run in it; give the folder of a sweep"),
        (lambda folder, config: make_run(folder / "a", config()), "none of the 1 runs in it has finished"),
        (lambda folder, config: make_run(folder / "a", config(), accuracy=[1]), "panels=innersteps: no such knob"),
    ],
)
def test_a_folder_without_a_finished_run_is_one_line(config, tmp_path, make, line):
    make(tmp_path, config)
    with pytest.raises(SystemExit, match=line) as error:
        sweep_main([str(tmp_path), "panels=innersteps"])
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        grouped.read_jobs([tmp_path / "nowhere"])
    for command in (sweep_main, compare_main):  # as with what belongs to somebody else
        with pytest.raises(SystemExit, match=r"a: cannot be read \(File name too long\)$"):
            command(["a" * 300])


def test_results_of_other_lengths_than_their_settings_are_one_line(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fewshot.results.figures.png", lambda figure: b"no picture")
    for seed, steps in enumerate((3, 2)):
        make_run(tmp_path / "lengths" / f"{seed}", config(f"seed={seed}"), accuracy=[0.2] * (steps + 1))
    with pytest.raises(SystemExit, match=r"1: are of one setting, but their results\.json have 3 or 4 test accuracies"):
        sweep_main([str(tmp_path / "lengths")])
    knobs = "select=zeroing_on", "stop_at_accuracy=0.9"
    make_run(tmp_path / "chosen" / "short", config(*knobs), accuracy=[0.2])
    make_run(tmp_path / "chosen" / "whole", config(*knobs, "seed=1"), accuracy=[0.2] * 3)
    sweep_main([str(tmp_path / "chosen")])
    said = capsys.readouterr().out
    assert re.search(r"short +\| failed +\| cannot be read .*val has no accuracy after inner_steps=2", said)


def test_of_a_test_with_other_inner_steps_those_of_the_training_are_marked(config, tmp_path):
    make_run(tmp_path / "run", config("inner_steps=3"), accuracy=[0.2, 0.3, 0.4, 0.5])
    path = tmp_path / "run" / "results.json"
    results = json.loads(path.read_text())
    results["config"] |= {"fit": False, "trained": {"file": "best.ckpt", "inner_steps": 1}}
    path.write_text(json.dumps(results))
    settings = grouped.group(grouped.read_jobs([tmp_path]))
    assert re.findall(r"[.\d]+\*", tables.as_markdown(settings, [])) == ["30.00*"] * 2
    circled = [line for line in figures.sweep(settings).axes[0].lines if line.get_markerfacecolor() == "none"]
    assert [line.get_xdata()[0] for line in circled] == [1]
    path.write_text(json.dumps(results | {"config": results["config"] | {"trained": {"inner_steps": "x"}}}))
    assert "trained.inner_steps must be" in grouped.read_job(tmp_path / "run").error


def jobs_of(experiment):
    """The overrides of every job of an experiment's own sweep."""
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose("config", [f"experiment={experiment}"], return_hydra_config=True)
    params = [f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()]
    overrides = OverridesParser.create().parse_overrides([*params, f"experiment={experiment}", "seed=0"])
    return BasicSweeper.split_arguments(overrides, None)[0]


EXPERIMENTS = {path.stem: path.read_text() for path in (CONF / "experiment").glob("*.yaml")}
SWEEPS = [name for name, text in EXPERIMENTS.items() if "MULTIRUN" in text and "optuna" not in text]


@pytest.mark.parametrize("experiment", sorted(SWEEPS))
def test_every_job_of_an_experiment_is_valid_and_another_setting(experiment):
    jobs, seen = jobs_of(experiment), set()
    assert len(jobs) > 1
    for job in jobs:
        cfg = composed(*job)
        check(cfg)
        seen.add(fingerprint(settings(cfg)))
    assert len(seen) == len(jobs)


def test_memory_and_places_are_no_setting():
    """Runs that are older than recompute_steps and dataset.archive are runs of the same setting."""
    today, older = (settings(composed("dataset=cifarfs")) for _ in range(2))
    del older["recompute_steps"], older["dataset"]["archive"]
    assert fingerprint(older) == fingerprint(today)
    assert fingerprint(settings(composed("dataset=cifarfs", "dataset.archive=other"))) == fingerprint(today)
    assert fingerprint(settings(composed("dataset=cifarfs", "dataset.size=16"))) != fingerprint(today)


def test_tests_of_runs_are_of_one_setting_where_the_runs_and_the_tests_are():
    """Wherever the runs lie; two files of a run are not."""

    def tested(place, *overrides, file="best.ckpt", asked=()):
        trained = settings(composed(*overrides))
        cfg = settings(composed(*overrides, "fit=false", f"checkpoint={place}", "test_tasks=2000", *asked))
        return cfg | {"trained": grouped.tested_model(trained, cfg, file)}

    one = fingerprint(tested("runs/0", "seed=0", "test_tasks=100"))
    assert fingerprint(tested("runs/1", "seed=1")) == one
    assert fingerprint(tested("runs/0", "seed=0", file="last.ckpt")) != one
    other = "dataset=cifarfs", "dataset.other_split=true", "shots=1", "inner_lr=0.1"
    first = tested("a", "dataset=glyphs", asked=other)
    assert fingerprint(first) == fingerprint(tested("b", "seed=1", "dataset=glyphs", asked=other))
    for differs in ("dataset=omniglot", "shots=5", "inner_lr=0.7", "algo=zero", "trainer.precision=64-true"):
        assert fingerprint(tested("b", "dataset=glyphs", differs, asked=other)) != fingerprint(first), differs
    older = [settings(composed("fit=false", f"checkpoint={place}")) for place in "ab"]  # which do not say so
    assert fingerprint(older[0]) != fingerprint(older[1])


def test_a_killed_sweep_goes_on_exactly_and_a_failure_stops_nothing(program, main, run, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "sweep"
    knobs = ("iterations=4", "val_every=2", "test_tasks=2")
    call = ("-m", "inner_lr=1e30,0.4", "seed=0,1", *knobs, "logger=none")
    whole = run(tmp_path / "whole", "seed=1", *knobs)
    process = program(*call, f"hydra.sweep.dir={folder}", halting=True)

    def job(seed):
        for path in folder.glob("*/checkpoints/last.ckpt"):
            content = checkpoint.read(path)
            if (content["fewshot"]["config"]["inner_lr"], content["fewshot"]["config"]["seed"]) == (0.4, seed):
                return path.parents[1], content["global_step"]
        return None, -1

    halt_when(process, lambda: job(1)[1] >= 2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = job(0)[0] / "results.json"
    written = first.stat().st_mtime_ns
    assert not (job(1)[0] / "results.json").exists() and not (folder / "summary.csv").exists()

    capsys.readouterr()
    status = main(*call, f"hydra.sweep.dir={folder}", small=True)  # the same again
    output, errors = capsys.readouterr()
    assert status == 1, output + errors
    assert "Traceback" not in errors
    assert re.search(r"2 failed or unfinished; the same command with hydra.sweep.dir=\S+ tries them again:", output)
    assert len(list(folder.glob("*/error.txt"))) == 2  # 1e30, both seeds
    for error in folder.glob("*/error.txt"):
        assert "lower inner_lr" in error.read_text() and error.read_text().strip() in output
    assert first.stat().st_mtime_ns == written  # finished before: left alone
    ended, undisturbed = outcome(job(1)[0]), outcome(whole)
    for content in (ended, undisturbed):
        del content["results"]["config"]
    assert ended == undisturbed
    (row, *_) = table(folder / "summary.csv")
    assert row["n"] == "2" and {path.name for path in folder.glob("summary.*")} == {
        *("summary.csv", "summary.md", "summary.png")
    }
    monkeypatch.setattr("fewshot.results.figures.png", lambda figure: b"no picture")
    sweep_main([str(folder)])
    assert "| failed |" in re.sub(" +", " ", capsys.readouterr().out)


def test_a_sweep_with_a_job_that_failed_or_was_not_done_ends_so(config, tmp_path, caplog):
    """Though another job with the same settings has finished, which is what a table shows of the two."""
    make_run(tmp_path / "done", config("algo=zero"), accuracy=[0.2, 0.5])
    make_run(tmp_path / "twin", config("algo=fomaml", "+zeroing=true"), error="Slurm job 3: CANCELLED\n")
    make_run(tmp_path / "begun", config("seed=1"))
    make_run(tmp_path / "limited", config("seed=2"), accuracy=[0.2, 0.3])
    results = json.loads((tmp_path / "limited" / "results.json").read_text())
    (tmp_path / "limited" / "results.json").write_text(json.dumps({**results, "iterations": 3}))  # by trainer.max_time
    with pytest.raises(SystemExit) as ended:
        tables.conclude(tmp_path, [])
    assert ended.value.code == 1
    for line in (
        "limited: unfinished",
        "3 failed or unfinished",
        "twin: Slurm job 3: CANCELLED",
        "begun: unfinished; is another process",
    ):
        assert line in caplog.text


def test_a_sweep_tells_its_own_jobs_from_those_of_an_earlier_call(main, config, tmp_path, capsys, monkeypatch):
    """In one folder: an earlier job that failed is named, but is no failure of a call that would not run it again."""

    def run(cfg, call):
        if cfg.inner_lr == 1:
            raise UserError("failed again")
        make_run(call.folder / "made", cfg, accuracy=[0.2] * 4)
        (call.folder / "made" / "results.json").rename(call.folder / "results.json")

    monkeypatch.setattr(sys.modules["fewshot.train"], "run", run)
    make_run(tmp_path / "inner_lr-1", config("inner_lr=1"), error="failed before\n")
    place = f"hydra.sweep.dir={tmp_path}"
    assert main("-m", "inner_lr=0.2", place) == 0
    said = capsys.readouterr().out
    remedy = f"their own values with {place} try them again, or remove their folders"
    assert f"1 of other calls failed or unfinished; {remedy}:\ninner_lr-1: failed before" in said
    assert "the same command" not in said
    assert main("-m", "inner_lr=1", place) == 1
    said = capsys.readouterr().out
    assert "1 failed or unfinished; the same command" in said and "other calls" not in said


def test_a_job_whose_folder_another_process_holds_is_one_line(main, tmp_path, capsys):
    with ranks.locked(tmp_path / "job"):
        ended = main("-m", "seed=0", f"hydra.sweep.dir={tmp_path}", "hydra.sweep.subdir=job", small=True)
    output, errors = capsys.readouterr()
    assert str(ended).startswith(f"{tmp_path}: no run in it")
    assert "Traceback" not in output + errors and f"{tmp_path / 'job'}: " in errors
    assert not (tmp_path / "job" / "error.txt").exists()  # which would be that of the other process


def test_without_slurm_its_launcher_is_refused_in_one_line(main, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    line = main("-m", "hydra/launcher=slurm", "seed=0,1", f"hydra.sweep.dir={tmp_path}", small=True)
    assert line == "hydra/launcher=slurm: no sbatch and srun here; call it where jobs are submitted"


def test_a_job_is_done_that_has_results_of_its_own_settings_and_did_not_fail_after_them(tmp_path, monkeypatch):
    slurm = pytest.importorskip("fewshot.sweep.slurm")
    words = ["seed=1", "logger=none"]

    def load_sweep_config(_, overrides):
        cfg = composed(*overrides)
        OmegaConf.update(cfg, "hydra", {}, force_add=True)
        return cfg

    loader = SimpleNamespace(load_sweep_config=load_sweep_config)
    sweep = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
    launcher = SimpleNamespace(config=sweep, params={}, hydra_context=SimpleNamespace(config_loader=loader))
    monkeypatch.setattr(slurm, "_submit", lambda _, calls: [*calls])
    monkeypatch.setattr(slurm, "_result", lambda *job: "done anew")
    folder = tmp_path / job_folder(words)
    make_run(folder, composed(*words), accuracy=[0.2] * 4)
    assert slurm.launch(launcher, [words], 0) != ["done anew"]
    (folder / "error.txt").write_text("no space left")
    assert slurm.launch(launcher, [words], 0) == ["done anew"]
    assert not (folder / "error.txt").exists()  # else the job would count as failed
    shutil.rmtree(folder)
    make_run(folder, composed(*words, "inner_lr=0.3"), accuracy=[0.2] * 4)
    assert slurm.launch(launcher, [words], 0) == ["done anew"]


def test_slurm_gets_what_is_missing_of_a_sweep_and_a_job_that_it_lost_is_one_failure(
    main, monkeypatch, tmp_path, cache, capfd
):
    """Slurm's programs are scripts here: every job is taken, and soon the queue knows none of them."""
    slurm = pytest.importorskip("fewshot.sweep.slurm")
    monkeypatch.setattr(slurm.Job, "_results_timeout_s", 0)  # nobody writes the results that submitit waits for
    programs = {"sbatch": "echo Submitted batch job 7", "srun": "", "squeue": ""}
    programs["sacct"] = "echo Slurm accounting storage is disabled >&2; exit 1"
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    folder = tmp_path / "sweep"
    call = ("hydra/launcher=slurm", "hydra.launcher.partition=gpu", "hydra.launcher.mem_gb=3", "logger=none")
    call = ("-m", *call, "seed=0,1", "hydra.launcher.additional_parameters={nodelist:vm}", f"hydra.sweep.dir={folder}")
    assert main(*call, small=True) == f"{folder}: none of the 2 runs in it has finished"
    errors = sorted(path.read_text() for path in folder.glob("*/error.txt"))
    for number, error in enumerate(errors):
        assert error.startswith(f"Slurm job 7_{number}: cancelled, or lost with its node; its log is {folder}")
    assert len(errors) == 2
    (asked,) = (path.read_text() for path in folder.glob(".submitit/**/*.sh") if not path.is_symlink())
    for flag in ("--partition=gpu", "--mem=3GB", "--array=0-1%2", "--time=240", "--nodelist=vm"):
        assert f"#SBATCH {flag}\n" in asked
    said = "".join(capfd.readouterr())
    assert said.count("sacct") == said.count("accounting storage is disabled") == 1
    for seed, left in ((0, 1), (1, 0)):
        own = [*SMALL, f"dataset.cache={cache}", "logger=none", f"seed={seed}"]
        shutil.rmtree(folder / job_folder(own))
        shutil.rmtree(folder / ".submitit")
        make_run(folder / job_folder(own), composed(*own), accuracy=[0.2] * 4)
        assert main(*call, small=True) == left
        scripts = [path.read_text() for path in folder.glob(".submitit/**/*.sh") if not path.is_symlink()]
        assert len(scripts) == left and not any("--array" in script for script in scripts)
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.num_nodes=2", "trainer.devices=1")
    call = (*(word for word in call if "sweep.dir" not in word), *two, f"hydra.sweep.dir={tmp_path / 'two'}")
    assert "none of the 2 runs" in main(*call, small=True)  # each of them on two machines
    (asked,) = (path.read_text() for path in tmp_path.glob("two/.submitit/**/*.sh") if not path.is_symlink())
    assert "#SBATCH --nodes=2\n" in asked and "#SBATCH --ntasks-per-node=1\n" in asked


def test_side_by_side_jobs_share_a_group_and_are_the_same_runs(program, finished, tmp_path):
    """Two at a time by joblib, one of which fails; what W&B is to be told, read back from its offline files."""
    folder = tmp_path / "a sweep"
    process = program(
        *("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "inner_lr=0.4,1e30"),
        f"hydra.sweep.dir='{folder}'",
    )
    output, errors = process.communicate(timeout=HANG)
    assert process.returncode == 1 and "Traceback" not in output + errors, output + errors
    said = {}
    for file in folder.glob("*/wandb/offline-run-*/run-*.wandb"):
        text = told(file)
        records = [json.loads(line) for line in text.splitlines()]
        (begun,) = (record["run"] for record in records if record["type"] == "run")
        assert begun["run_group"] == "a sweep" and begun["config"]["update"]["inner_steps"] == 2
        assert f"wandb sync '{file.parent}'" in output
        said[begun["config"]["update"]["inner_lr"]] = file, text, records[-1]["exit"]["exit_code"]
    assert {inner_lr: exit_code for inner_lr, (_, _, exit_code) in said.items()} == {0.4: 0, 1e30: 1}
    file, text, _ = said[0.4]
    assert '"query_accuracy_by_inner_step_table"' in text and '"final_test_zeroed/query_accuracy/step_3"' in text
    (table_file,) = file.parent.glob("files/media/table/*.json")
    rows = json.loads(table_file.read_text())["data"]
    results = json.loads((file.parents[2] / "results.json").read_text())
    assert [row[1] for row in rows if row[3] == "off"] == results["test"]["zeroing_off"]["accuracy"]
    assert outcome(finished)["state"] == outcome(file.parents[2])["state"]
    assert all(re.search(f"^#{number} engine=auto: ", output, re.MULTILINE) for number in (0, 1))


def test_optuna_searches_by_validation_accuracy_and_notes_a_failure(main, tmp_path, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    knobs = ("hydra.sweeper.n_trials=3", "inner_steps=1", "outer_lr=choice(0.001,0.01,1e30)", "iterations=2")
    status = main("experiment=search", *knobs, "logger=none", f"hydra.sweep.dir={tmp_path}", small=True)
    said = capsys.readouterr()
    optimum = OmegaConf.load(tmp_path / "optimization_results.yaml")
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*/results.json")]
    failed = len(list(tmp_path.glob("*/error.txt")))
    assert failed >= 1 and failed + len(results) == 3 and status == min(failed, 1), said
    best = max(results, key=lambda result: result["val"]["zeroing_off"]["accuracy"][1])
    assert optimum.best_value == best["val"]["zeroing_off"]["accuracy"][1]
    assert optimum.best_params.inner_lr == best["config"]["inner_lr"]


def test_a_summary_pairs_its_settings_by_task_and_seed_and_folds_its_steps(config, tmp_path):
    difficulty = np.random.default_rng(0).normal(0, 0.1, (200, 1))  # of the tasks, which all runs share
    for seed in (0, 1, 2):
        for algo, accuracy in (("fomaml", 0.5), ("zero", 0.6)):
            knobs = (f"algo={algo}", f"seed={seed}", "inner_steps=3", "test_steps=8")
            folder = tmp_path / "sweep" / f"{algo}{seed}"
            make_run(folder, config(*knobs), accuracy=[accuracy + 0.01 * step for step in range(9)])
            noise = np.random.default_rng([seed, algo == "zero"]).normal(0, 0.02, (200, 9))
            values = np.clip(accuracy + difficulty + noise, 0, 1)
            write_tasks(folder, {"task": {"test": {"zeroing_off": values, "zeroing_on": values}}})
            results = json.loads((folder / "results.json").read_text())
            results["test"]["tasks"] = 200
            (folder / "results.json").write_text(json.dumps(results))
    make_run(tmp_path / "sweep" / "other", config("algo=zero", "shots=5", "inner_steps=3"), accuracy=[0.5] * 9)
    sweep_main([str(tmp_path / "sweep"), f"into={tmp_path}", "figures.format=pdf"])
    text = (tmp_path / "summary.md").read_text()
    assert re.search(r"\| setting +\| 0 +\| 1 +\| 3 +\| 8 +\| seeds \|", text)
    assert re.search(r"\| 53\.00 ± 0\.00\* \|", text)
    assert "Differences to no zeroing after inner_steps on glyphs 5-way 1-shot, in points\n" in text
    assert "Paired by test task and seed" in text
    assert re.search(r"zeroing +\| off +\| 3 +\| \*\*\+(9\.[5-9]|10\.[0-5])\d ± 0\.\d\d\*\* +\| 3 ", text)
    assert re.search(r"Left out: .*other.*tasks\.csv\.gz: is not there", text)
    assert (tmp_path / "summary.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "summary.png").exists()
    assert len(table(tmp_path / "summary.csv")) == 3 * 2 * 9
    with pytest.raises(SystemExit, match=r"^figures\.format=svg: must be one of png, pdf$"):
        sweep_main([str(tmp_path / "sweep"), "figures.format=svg"])
