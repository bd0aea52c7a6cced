"""python -m fewshot.evidence of an exported model: the page of its checkpoint, without the checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import composed
from safetensors.torch import load_file, save_file

from fewshot.config.tree import portable, settings
from fewshot.errors import UserError
from fewshot.evidence import claims, report
from fewshot.evidence.__main__ import main as evidence_main
from fewshot.evidence.claims import accuracy, similarity
from fewshot.evidence.exported import call_of
from fewshot.export import export
from fewshot.predict import find
from fewshot.training.resume import _merged

OLD = Path(__file__).parents[1] / "fixtures" / "2f3a4cf"


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """The folder of the small run's best model."""
    folder = tmp_path_factory.mktemp("exported") / "letters"
    export(finished / "checkpoints" / "best.ckpt", folder)
    return folder


@pytest.fixture
def evidence(main, cache, tmp_path, monkeypatch):
    """evidence(*words): the command in tmp_path, in this process, of two claims: what it ends with."""
    measure = report.measure
    monkeypatch.setattr(report, "measure", lambda model: {"identities": {}, **measure(model)})
    monkeypatch.setattr(claims, "CLAIMS", [similarity, accuracy])
    for place in ("training.resume", "evidence.exported"):
        monkeypatch.setattr(f"fewshot.{place}.compose", lambda name, overrides: composed(*overrides))
    monkeypatch.setattr(report, "png", lambda figure: b"no picture")
    monkeypatch.chdir(tmp_path)
    return lambda *words: main(*words, f"dataset.cache={cache}", command=evidence_main)


def numbers(folder):
    return json.loads((folder / "evidence" / "evidence.json").read_text())


def changed(exported, folder, change):
    """A copy of the exported folder with config.yaml changed."""
    config = yaml.safe_load((shutil.copytree(exported, folder) / "config.yaml").read_text())
    change(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_it_has_the_numbers_of_the_checkpoint_in_a_new_folder(finished, exported, evidence, tmp_path):
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    assert evidence(f"checkpoint={finished}", f"hydra.run.dir={tmp_path / 'run'}") == 0
    assert evidence(f"checkpoint={exported}") == 0
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    (folder,) = tmp_path.glob("outputs/*/*")
    of_run, of_export = numbers(tmp_path / "run"), numbers(folder)
    for key in ("same_for_all", "probes", "similarity", "test", "tasks"):
        assert of_export[key] == of_run[key], key
    assert of_export["similarity"]["initially_same_class"] not in (None, of_export["similarity"]["same_class"])
    assert of_export["model"]["iteration"] == of_run["model"]["iteration"] > 0
    pages = [(place / "evidence" / "report.html").read_text() for place in (tmp_path / "run", folder)]
    assert all(f"after {of_run['model']['iteration']} outer updates" in page for page in pages)
    assert "letters/model.safetensors" in pages[1]


def test_a_name_stands_for_a_model_that_comes_with_the_program(exported, evidence, tmp_path, monkeypatch):
    monkeypatch.setattr(find, "MODELS", exported.parent)
    assert evidence("checkpoint=letters", f"hydra.run.dir={tmp_path / 'out'}", "test_tasks=4") == 0
    assert numbers(tmp_path / "out")["tasks"]["features"] == 4
    assert evidence("checkpoint=letter", "test_tasks=4").startswith("checkpoint=letter: no such file or folder, and no")
    assert not (tmp_path / "outputs").exists()


def test_a_folder_of_an_earlier_version_does_not_say_all(evidence, tmp_path, capsys):
    """Its classes and images cannot be compared, and its outer updates are not known; all else is measured."""
    assert evidence(f"checkpoint={OLD / 'exported'}", f"hydra.run.dir={tmp_path / 'out'}") == 0
    assert "which classes and images it was trained on" in capsys.readouterr().out
    assert numbers(tmp_path / "out")["model"]["iteration"] is None
    page = (tmp_path / "out" / "evidence" / "report.html").read_text()
    assert "after an unknown number of outer updates" in page and 'class="banner"' not in page


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        ({}, ["ways=4"], "head.bias is (5,) there and (4,) here; it was trained with model=conv4_strided ways=5"),
        ({}, ["shots=30"], "shots+queries=30+3: glyphs has 20 images per class; lower shots or queries"),
        ({}, ["model=letters"], "model=letters: no such choice; known are conv4_64, "),
        ({}, ["dataset.root=nowhere"], "dataset.root=nowhere: a knob of dataset=aircraft, "),
        ({"algo": {"learned_inner_lr": True}}, [], "the theory covers "),
        ({"algo": {"_target_": "os.system"}}, [], "its call sets algo._target_=os.system, which a test would run"),
        ({"algo": {"one": 1}}, [], "algo.one=1: no such knob"),
        (
            {"dataset": {"name": "birds"}},
            [],
            "dataset=birds, which has no YAML file here; add dataset=folder dataset.root",
        ),
        ({"model": {"name": "mine"}}, [], "model=mine, which has no YAML file here; add model=module model.module="),
        ({"model": {"network": {"_target_": "os.system"}}}, [], "its call sets model.network._target_=os.system"),
        ({"seed": "${oc.env:HOME}"}, [], "seed"),
        (
            {"trained": {"splits": "0" * 64}},
            [],
            "(other classes or images); use that one, or add dataset.other_split=true",
        ),
        ({"trained": {"iteration": -1}}, [], "what it says of its training: iteration must be"),
        ({"dataset": 5}, [], "config.yaml: dataset must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_measured_is_refused_in_one_line_and_leaves_nothing(
    exported, evidence, tmp_path, change, words, said
):
    def changing(config):
        for key, value in change.items():
            part = config.get(key)
            if isinstance(part, dict) and isinstance(value, dict):
                inner = value.get("network")
                config[key] = {**part, **value} | ({"network": {**part["network"], **inner}} if inner else {})
            else:
                config[key] = value

    folder = changed(exported, tmp_path / "shared", changing)
    line = evidence(f"checkpoint={folder}", *words)
    assert isinstance(line, str) and said in line and "\n" not in line, line
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_without_a_checkpoint_a_model_is_asked_for(evidence, tmp_path):
    line = evidence("model=omniglot-5w1s-zero")
    assert line.startswith("checkpoint=null: which model? ") and line.endswith("; model= is the network here")


def test_other_images_are_measured_where_the_call_says_so(exported, evidence, tmp_path):
    other = changed(exported, tmp_path / "shared", lambda config: config["trained"].update(splits="0" * 64))
    words = ("dataset.other_split=true", "test_tasks=2", f"hydra.run.dir={tmp_path / 'out'}")
    assert evidence(f"checkpoint={other / 'model.safetensors'}", *words) == 0
    assert numbers(tmp_path / "out")["test"]["tasks"] == 2


def test_a_model_in_float64_is_tested_in_float64(exported, evidence, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "shared")
    weights = {name: weight.double() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    assert evidence(f"checkpoint={folder}", "test_tasks=2", f"hydra.run.dir={tmp_path / 'out'}") == 0
    assert numbers(tmp_path / "out")["config"]["trainer"]["precision"] == "64-true"


@pytest.mark.parametrize(
    "overrides",
    [
        ["algo=zero", "ways=3", "inner_steps=5", "test_steps=9", "dataset.mean=[0.5]", "seed=3"],
        ["algo=reptile", "inner_steps=7", "iterations=50", "optimizer=sgd", "schedule=cosine"],
        ["algo=contrastive", "algo.noise=false", "model=conv4_64", "model.head_bias=false", "model.norm=group"],
        ["+zeroing=true", "algo.first_order=false", "dataset=omniglot", "dataset.split=lake", "dataset.rotations=true"],
        ["dataset=cifarfs", "model=resnet12", "model.width=16", "shots=5", "dataset.size=24"],
        ["experiment=motivating_example", "dataset.tasks=fixed_blocks", "init_scale=2.5"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_the_call_of_a_model_has_all_settings_that_an_export_keeps(config, overrides):
    kept = portable(settings(config(*overrides)))
    call = call_of(kept, [], "")
    assert portable(settings(config(*call))) == kept
    merged = portable(settings(config(*_merged(call, ["shots=2", "inner_steps=1"]))))
    assert merged["shots"] == 2 and merged["inner_steps"] == 1
    assert len(call) < 20  # what follows from other knobs is not named


def test_a_folder_of_images_is_named_by_the_call(config):
    kept = portable(settings(config("dataset=folder", "dataset.root=photos/birds", "dataset.size=40")))
    asked = ["dataset=folder", "dataset.root=other/fish"]
    made = settings(config(*_merged(call_of(kept, asked, ""), asked)))
    assert (made["dataset"]["name"], made["dataset"]["size"]) == ("fish", 40)
    called_so = portable(settings(config("dataset=folder", "dataset.root=photos/omniglot")))
    assert call_of(called_so, asked, "")[0] == "dataset=folder"
    with pytest.raises(UserError, match="dataset=omniglot, which has no YAML file here; add dataset=folder"):
        call_of(called_so, [], "")
