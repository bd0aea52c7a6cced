"""fewshot test RUN datasets=...: the numbers of fewshot test, other ways, other images, and what is refused."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

import fewshot
from fewshot.across import __main__ as across
from fewshot.across import measure, settings
from fewshot.compare import __main__ as compare
from fewshot.config.tree import MODES
from fewshot.data.meta_batches import fixed_tasks
from fewshot.errors import UserError
from fewshot.inner_loop import InnerLoop
from fewshot.maml import sequential
from fewshot.results import record_files
from fewshot.results.task_scores import read_tasks
from fewshot.sweep.settings import group, read_jobs

GREYS = (0.299, 0.587, 0.114)  # ITU-R 601-2, what Pillow makes of red, green and blue


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    for kind in ("png", "pdf"):
        monkeypatch.setattr(f"fewshot.results.figures.{kind}", lambda figure: b"no picture")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of colour images with 9 test classes of 5 images."""
    folder, random = tmp_path_factory.mktemp("photos") / "birds", np.random.default_rng(0)
    for split, classes in (("train", 9), ("val", 9), ("test", 9)):
        for label in range(classes):
            place = folder / split / f"{split}{label}"
            place.mkdir(parents=True)
            for number in range(5):
                colour = random.integers(0, 256, 3)
                Image.fromarray(np.full((30, 30, 3), colour, np.uint8)).save(place / f"{number}.png")
    return folder


def call(model, folder, cache, *words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewshot.training.runtime.prepare", lambda **knobs: "32-true")
        across.main([str(model), *words, f"dataset.cache={cache}", "trainer=cpu", f"hydra.run.dir={folder}"])
    with open(folder / "across.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_its_numbers_are_those_of_the_runs_own_test_and_other_ways_begin_at_a_zeroed_head(
    finished, photos, cache, tmp_path, capsys
):
    out = tmp_path / "out"
    words = [f"datasets=glyphs,folder:{photos}", "ways=5,7,10", "test_tasks=3", "figures.format=pdf"]
    rows = call(finished, out, cache, *words)
    own, tested = record_files.read(finished), record_files.read(out / "glyphs-5w1s", of_run=False)
    assert tested["test"] == own["test"] and tested["splits"] == own["splits"]
    for mode, accuracies in read_tasks(finished).items():
        assert np.array_equal(accuracies, read_tasks(out / "glyphs-5w1s")[mode])
    step2 = {(row["dataset"], row["ways"], row["test_zeroing"]): row for row in rows if row["step"] == "2"}
    assert {key for key in step2 if key[0] == "glyphs"} == {
        ("glyphs", "5", "off"),
        ("glyphs", "5", "on"),
        ("glyphs", "7", "on"),
        ("glyphs", "10", "on"),
    }
    assert [key[1:] for key in step2 if key[0] == "birds"] == [("5", "off"), ("5", "on"), ("7", "on")]
    assert step2["birds", "5", "on"]["images"] == "to grey"
    assert float(step2["glyphs", "5", "on"]["accuracy"]) == own["test"]["zeroing_on"]["accuracy"][2]
    reasons = {(row["dataset"], row["ways"]): row["left_out"] for row in rows if row["left_out"]}
    assert re.fullmatch("ways=10: .* has 9 train, 9 val, 9 test classes; use ways=9; .*", reasons["birds", "10"])
    assert reasons["glyphs", "7"].startswith("the head has learned rows for 5 ways; with others ")
    shown = capsys.readouterr().out
    assert "birds [1]" in shown and "birds [2]" in shown and "\n[2] left out: ways=10: " in shown
    assert "The images are made 28x28 pixels, grey, from colour by luminance" in shown
    assert f"Written to {out}: across.csv, figures/across.png and .pdf, and" in shown
    assert (out / "figures" / "across.pdf").exists()
    with pytest.raises(SystemExit, match=r"hydra.run.dir=.*: is not empty; name another folder$"):
        call(finished, out, cache, "datasets=glyphs")
    knobs = {"dataset__cache": cache, "trainer": "cpu", "test_tasks": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewshot.training.runtime.prepare", lambda **knobs: "32-true")
        run = fewshot.test(finished, folder=tmp_path / "api", datasets=["glyphs"], ways=7, **knobs)
    seven = fewshot.Run(run.folder / "glyphs-7w1s")
    assert seven.results["test"] == record_files.read(out / "glyphs-7w1s", of_run=False)["test"]
    assert run._repr_png_() == b"no picture"
    other = json.loads((out / "glyphs-7w1s" / "results.json").read_text())
    other["config"]["inner_lr"] = 0.3
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text(json.dumps(other))
    (tmp_path / "other" / "tasks.csv.gz").write_bytes((out / "glyphs-7w1s" / "tasks.csv.gz").read_bytes())
    compare.main([str(out / "glyphs-7w1s"), str(tmp_path / "other"), f"into={tmp_path / 'compare'}"])
    assert "was not tested with test zeroing off" in (tmp_path / "compare" / "compare.html").read_text()


def test_models_of_other_training_and_files_are_other_settings(finished, cache, tmp_path, monkeypatch):
    """Their tests have the same tasks and knobs; the seed alone does not tell two settings apart."""
    monkeypatch.setattr(measure.Tester, "_accuracies", lambda *_: dict.fromkeys(MODES, torch.full((3, 4), 0.5)))
    content = torch.load(finished / "checkpoints" / "best.ckpt", weights_only=True)
    for name, change in {"best": {}, "last": {}, "a/best": {"shots": 5}, "b/best": {"seed": 1}}.items():
        changed = content["fewshot"] | {"config": content["fewshot"]["config"] | change}
        (tmp_path / name).parent.mkdir(exist_ok=True)
        torch.save(content | {"fewshot": changed}, tmp_path / f"{name}.ckpt")
        call(tmp_path / f"{name}.ckpt", tmp_path / f"{name}-out", cache, "datasets=glyphs", "shots=1", "test_tasks=3")
    jobs = read_jobs([tmp_path / f"{name}-out" / "glyphs-5w1s" for name in ("best", "last", "a/best", "b/best")])
    labels = {setting.label(): [job.config["seed"] for job in setting.jobs] for setting in group(jobs)}
    assert labels == {
        "trained.file=best.ckpt, trained.shots=1": [0, 1],
        "trained.file=last.ckpt, trained.shots=1": [0],
        "trained.file=best.ckpt, trained.shots=5": [0],
    }


def test_python_can_trust_a_network_of_ones_own(finished, tmp_path):
    content = torch.load(finished / "checkpoints" / "best.ckpt", weights_only=True)
    content["fewshot"]["config"]["model"]["network"]["_target_"] = "not_there.network"
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match=r"calls not_there\.network, .* unless you trust whoever wrote it"):
        fewshot.test(tmp_path / "foreign.ckpt", datasets="glyphs")
    with pytest.raises(UserError, match=r"its model\.network cannot be made \(.*not_there"):
        fewshot.test(tmp_path / "foreign.ckpt", datasets="glyphs", trust=True)


def test_grey_images_are_repeated_and_colours_become_their_luminance(photos, cache):
    def images(channels, place):
        data = {"name": "omniglot", "size": 28, "channels": channels, "mean": [0.5] * channels, "std": [1.0] * channels}
        model = {"queries": 2, "inner_steps": 1, "dataset": data}
        (setting,) = settings.settings(place, model, [f"dataset.cache={cache}"], [2], [1])
        tester = object.__new__(measure.Tester)
        tester.model = type("Model", (), {"preprocess": type("Preprocess", (), {"channels": channels})})
        return setting.images, tester._read_images(OmegaConf.to_yaml(setting.cfg.dataset.source, resolve=True))

    glyphs, birds = settings.places(f"glyphs,folder:{photos}")
    said, grey = images(1, glyphs)
    assert said == "grey"
    said, colour = images(3, glyphs)
    assert said == "to colour" and torch.equal(colour["test"].images, grey["test"].images.repeat(1, 3, 1, 1))
    assert colour["test"].sha256 == grey["test"].sha256
    said, colour = images(3, birds)
    assert said == "colour"
    said, grey = images(1, birds)
    luminance = (colour["test"].images * torch.tensor(GREYS).view(3, 1, 1)).sum(1, keepdim=True)
    assert said == "to grey" and (grey["test"].images - luminance).abs().max() <= 1


def test_queries_are_normalised_by_the_statistics_that_are_asked_for(finished, cache):
    model, stored, file = measure.load(finished, trust=False)
    model.learner.double()  # the engines differ by rounding
    knobs = [f"dataset.cache={cache}", "trainer=cpu", "test_tasks=3"]
    tested = {}
    for whose in ("task", "support"):
        asked = [*knobs, f"evaluation.statistics={whose}"]
        (setting,) = settings.settings(*settings.places("glyphs"), stored, asked, [5], [1])
        tester = measure.Tester(model, stored, file)
        tasks = fixed_tasks(setting.cfg, tester.images(setting)["test"], "test")(0, 3)
        tasks = tasks._replace(support=tasks.support.double(), query=tasks.query.double())
        loops = [model.learner.loop.evaluation(3, zeroing) for zeroing in (False, True)]
        expected = sequential.step_accuracies(model.learner.network, tasks, loops, statistics=(whose,))
        tested[whose] = torch.stack([tester.row(setting).tested[mode] for mode in MODES])
        torch.testing.assert_close(tested[whose], expected)
    assert not torch.equal(tested["task"], tested["support"])


def test_which_models_take_other_ways():
    loop = InnerLoop(1, 0.1, first_order=True)
    both, on = ("zeroing_off", "zeroing_on"), ("zeroing_on",)
    assert measure.possible_modes(loop, 5, False, 5) == (both, "")
    assert measure.possible_modes(loop, 5, False, 4)[0] == measure.possible_modes(loop, 5, False, 9)[0] == on
    assert measure.possible_modes(loop, 5, True, 9) == (both, "")
    assert measure.possible_modes(InnerLoop(1, 0.1, True, head="prototypes"), 5, False, 9) == (both, "")
    assert measure.possible_modes(InnerLoop(1, 0.1, True, adapted="encoder"), 5, False, 9)[0] == ()
    assert measure.possible_modes(InnerLoop(1, 0.1, True, learned_inner_lr=True), 5, True, 4)[0] == ()


def test_places_are_split_at_the_names_of_datasets(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert settings.places("folder:~/x")[0].overrides == ["dataset=folder", "dataset.root=/home/me/x"]
    assert settings.places("omniglot,folder:/a,b:c,cifarfs:x") == [
        ("omniglot", None),
        ("folder", "/a,b:c"),
        ("cifarfs", "x"),
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["datasets=omniglott"],
            r"datasets=omniglott: 'omniglott' must be NAME or NAME:ROOT, with NAME one of .*",
        ),
        (
            ["datasets=glyphs", "inner_lr=1"],
            r"inner_lr=1: with datasets= only test_tasks, .* may be given; leave it out",
        ),
        (
            ["datasets=mine", "--config-dir=FOLDER"],
            r"--config-dir=FOLDER: datasets= takes those that come with this program; .* dataset=NAME .*",
        ),
        (["datasets=glyphs,glyphs"], r"datasets=glyphs,glyphs: two are called glyphs; .*"),
        (["datasets=glyphs", "ways=5,x"], r"ways=x: must be an integer of at least 2"),
        (["datasets=folder:nowhere"], r"dataset.root=nowhere: no such file or folder; .*"),
        (
            ["datasets=glyphs", "ways=10", "shots=20"],
            r"datasets=glyphs: nothing could be measured; shots\+queries=23: .*",
        ),
        (["datasets=glyphs", "test_steps=1"], r"test_steps=1: must be at least inner_steps=2"),
        (["datasets=glyphs", "trainer.precision=64-true"], r"trainer.precision=64-true: with datasets= a model .*"),
        (["datasets=glyphs", "trainer=ddp", "trainer.devices=2"], r"trainer.devices=2: one process tests .*"),
    ],
)
def test_what_is_refused(finished, cache, tmp_path, words, line):
    with pytest.raises(SystemExit) as ended:
        call(finished, tmp_path / "out", cache, *words)
    assert re.fullmatch(line, ended.value.code) and not (tmp_path / "out").exists()


def test_a_run_is_needed():
    with pytest.raises(SystemExit, match=r"^RUN: is missing; write .*test RUN datasets="):
        across.main(["datasets=glyphs"])


def test_a_test_of_a_run_needs_its_validation(finished, tmp_path):
    results = json.loads((finished / "results.json").read_text())
    del results["val"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="val is missing"):
        record_files.read(tmp_path)
    with pytest.raises(UserError, match=r"config\.fit must be false; only a test has no val"):
        record_files.read(tmp_path, of_run=False)
