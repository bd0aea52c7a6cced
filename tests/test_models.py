"""The models in models/: the same for all who have the program, and as good as their cards say."""

import functools
import math
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT
from safetensors.numpy import load_file

import fewshot
import models as script
from fewshot.config.tree import NOT_THE_MODEL
from fewshot.data.sources import cifar, omniglot
from fewshot.data.task import Split
from fewshot.errors import UserError
from fewshot.predict import predict
from fewshot.predict.find import MODELS, PLACES, find, names

DATA = ROOT.parent / "shared" / "data"
TASKS, QUERIES = 40, 15


@functools.cache
def images_of(dataset: str, cache: Path) -> Split:
    root = DATA / {"omniglot": "omniglot", "cifarfs": "cifarfs.zip"}[dataset]
    if not root.exists():
        pytest.skip(f"needs {root}")
    if dataset == "omniglot":
        return omniglot.load(root=str(root), size=28, cache=str(cache))["test"]
    return cifar.load(name=dataset, root=str(root), size=32, channels=3, cache=str(cache))["test"]


def front_matter(name: str) -> dict:
    return yaml.safe_load((MODELS / name / "README.md").read_text().split("---\n")[1])


@pytest.mark.parametrize("name", names())
def test_a_model_tells_new_classes_apart_as_well_as_its_card_says(name, cache):
    """On 40 tasks that are drawn here, where the card has 992 others."""
    model, rng, scores = fewshot.load(name), np.random.default_rng(0), {"off": [], "on": []}
    ways, shots, split = model.config["ways"], model.config["shots"], images_of(model.config["dataset"]["name"], cache)
    ends = split.offsets.tolist()
    for _ in range(TASKS):
        classes = rng.choice(len(split.names), ways, replace=False)
        drawn = [rng.permutation(np.arange(*ends[label : label + 2]))[: shots + QUERIES] for label in classes]
        chosen = [split.images[numbers] for numbers in drawn]
        support = {str(label): list(images[:shots]) for label, images in enumerate(chosen)}
        queries = [image for images in chosen for image in images[shots:]]
        truth = [str(label) for label in range(ways) for _ in range(QUERIES)]
        for mode, of_mode in scores.items():
            labels = predict(model, support, queries, test_zeroing=mode == "on").labels
            of_mode.append(np.mean([label == right for label, right in zip(labels, truth, strict=True)]))
    for metric in front_matter(name)["model-index"][0]["results"][0]["metrics"]:
        seen = scores[metric["name"].rsplit(" ", 1)[1]]
        error = math.hypot(np.std(seen) / math.sqrt(TASKS), metric["args"]["ci95"] / 1.96)
        assert abs(np.mean(seen) - metric["value"]) < 3 * error < 0.06, (metric["name"], np.mean(seen))


@pytest.mark.parametrize("name", names())
def test_a_folder_is_what_an_export_writes_and_says_whose_it_is(name):
    folder, model = MODELS / name, fewshot.load(name)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.yaml", "model.safetensors"]
    assert name == script.model_name(model.config)
    assert all(np.isfinite(weights).all() for weights in load_file(folder / "model.safetensors").values())
    assert not {*model.config} & {*NOT_THE_MODEL}
    card = (folder / "README.md").read_text()
    trained = yaml.safe_load((folder / "config.yaml").read_text())["trained"]
    assert f"outer update {trained['iteration']} of " in card and f"names and images {trained['splits']} |" in card
    command = re.search(r"```bash\n(python train\.py .*)\n```", card)[1].split()
    assert f"seed={model.config['seed']}" in command and f"| seed | {model.config['seed']} |" in card
    assert re.search(r"\| licence of the images \| (MIT, Brenden Lake|none is stated; the authors of CIFAR)", card)
    assert not [word for word in command if re.search("=['\"]?[/~]", word)]  # a place on somebody's machine


def test_all_of_them_are_small():
    assert names() and sum(path.stat().st_size for path in MODELS.rglob("*") if path.is_file()) < 6e6


def test_the_table_is_made_of_their_files():
    assert script.table(MODELS) in (MODELS / "README.md").read_text()
    assert script.table(MODELS).count("\n") == 2 + len(names())


def test_what_the_docs_name_is_there():
    text = "".join((ROOT / page).read_text() for page in ("README.md", "docs/predict.md", "models/README.md"))
    text += (ROOT / "src" / "fewshot" / "predict" / "__main__.py").read_text()
    assert {*re.findall(r"(?:omniglot|cifarfs)-\d+w\d+s-[a-z-]+[a-z]", text)} <= {*names()}


def test_a_wheel_has_them_where_an_installed_program_looks():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert PLACES[0].relative_to(ROOT) == Path("src", wheel["force-include"]["models"])
    assert PLACES[1] == MODELS == ROOT / "models"
    assert "!models" in (ROOT / ".dockerignore").read_text().split()  # the image is made of a wheel


def test_a_name_stands_for_a_model_unless_something_here_is_called_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = names()[0]
    assert find(name) == MODELS / name
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"^model={name}: has no model\.safetensors"):
        find(name)
    with pytest.raises(UserError, match=rf"^checkpoint={name}: has no model\.safetensors"):
        find(name, "checkpoint")
    with pytest.raises(UserError, match=r"^checkpoint=no/model: no such file or folder$"):
        find("no/model", "checkpoint")
    with pytest.raises(UserError, match=r"^checkpoint=hf://model: must be hf://ORG/NAME"):
        find("hf://model", "checkpoint")


def test_an_unknown_name_lists_those_that_there_are_and_its_neighbour():
    all_names = ", ".join(names())
    with pytest.raises(UserError) as stop:
        find(f"{names()[0]}s")
    assert str(stop.value) == (
        f"model={names()[0]}s: no such file or folder, and no model ({all_names}) of this name; "
        f"did you mean {names()[0]}?"
    )
    with pytest.raises(UserError, match=rf"^model=nothing: .*; known are {all_names}$"):
        fewshot.load("nothing")


def test_a_name_says_algorithm_and_task():
    config = {"dataset": {"name": "omniglot"}, "ways": 5, "shots": 1, "inner_steps": 1, "inner_lr": 0.4}
    for knobs, algorithm in (
        ({"first_order": True, "zeroing": False}, "fomaml"),
        ({"first_order": True, "zeroing": True}, "zero"),
        ({"first_order": False, "zeroing": False}, "somaml"),
        ({"first_order": False, "zeroing": True}, "somaml-zero"),
    ):
        assert script.model_name({**config, "algo": knobs, "init_scale": 1}) == f"omniglot-5w1s-{algorithm}"
    assert script.model_name({**config, "algo": {"first_order": True, "zeroing": False}, "init_scale": 0}).endswith(
        "-zero-init"
    )
    with pytest.raises(SystemExit, match="ANIL"):
        script.model_name({**config, "algo": {"first_order": True, "zeroing": False, "adapted": "head"}})
