"""A model that has adapted: by the command, written and read, and as a network for other programs."""

import csv

import numpy as np
import pytest
import torch
from conftest import ROOT
from examples import images
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.base import clone

import fewshot
from fewshot import models, push
from fewshot.adapt import main as adapt_main
from fewshot.norms import norm
from fewshot.predict import Adapted, adapt
from fewshot.predict.__main__ import main as predict_main

SUPPORT = {"statistics": '"support"'}
MODEL = ROOT / "tests" / "fixtures" / "2f3a4cf" / "exported"


def predicted(folder):
    with open(folder / "predictions.csv", newline="") as file:
        return [(file, label, *map(float, row)) for file, label, *row in list(csv.reader(file))[1:]]


@pytest.fixture
def folders(tmp_path):
    names = ("support/b/0.png", "support/a/0.png", "support/a/1.png", "alone/0.png", "query/1.png")
    for seed, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images(1, seed)[0]).save(tmp_path / name)
    Image.open(tmp_path / "alone" / "0.png").save(tmp_path / "query" / "0.png")
    return tmp_path


@pytest.mark.parametrize("statistics", ["task", "support", "each"])
def test_predict_with_an_adapted_model_says_what_predict_with_its_support_says(folders, statistics, capsys):
    words = [f"model={MODEL}", f"support={folders}/support", "steps=3", f"statistics={statistics}"]
    adapt_main([*words, f"out={folders}/model"])
    assert capsys.readouterr().out == f"Adapted to 3 images of 2 classes: written to {folders}/model\n"
    predict_main([*words, f"query={folders}/query", f"out={folders}/anew"])
    predict_main([f"model={folders}/model", f"query={folders}/query", f"out={folders}/again"])
    assert predicted(folders / "again") == predicted(folders / "anew")
    assert (folders / "again" / "contact_sheet.png").exists()
    predict_main([f"model={folders}/model", f"query={folders}/alone", f"out={folders}/one"])
    alone, together = predicted(folders / "one")[0], predicted(folders / "again")[0]
    assert (np.allclose(alone[2:], together[2:], atol=1e-5)) == (statistics != "task")
    assert fewshot.FewShotClassifier.load(folders / "model").classes_.tolist() == ["a", "b"]
    with pytest.raises(SystemExit, match=r"model: holds a model\.safetensors; name another folder$"):
        adapt_main([*words, f"out={folders}/model"])


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            {"about": {"classes": "[1, 2]", "shots": "[1, 1]", **SUPPORT}, "images": 3},
            "is not of the form",
        ),
        ({"about": {"classes": "[1]", "shots": "[2]", **SUPPORT}}, "is not of the form"),
        ({"about": {"classes": "[1, 1]", "shots": "[1, 1]", **SUPPORT}}, "is not of the form"),
        ({"about": {"classes": "[1, 2]", "shots": "[3, -1]", **SUPPORT}}, "is not of the form"),
        ({"about": {"classes": "{", "shots": "[1, 1]", **SUPPORT}}, "cannot be read"),
        ({"about": {"classes": "[[1], 2]", "shots": "[1, 1]", **SUPPORT}}, "is not of the form"),
        ({"about": {"classes": "[1, 2]", "shots": "[1, 1]", "statistics": '"others"'}}, "must be one of"),
        ({"about": {"classes": "[1, 2]", "shots": "[1, 1]", "statistics": "[1]"}}, r"^statistics=\[1\]: must be"),
        ({"about": {"classes": "[1, 2]", "shots": "[1, 1]", "statistics": '"a\\nb"'}}, "^statistics=a b: must be"),
        ({"about": {"classes": "[" * 10**5, "shots": "[1, 1]", **SUPPORT}}, "cannot be read"),
        ({"about": {"classes": "[1, 2]", "shots": "[1, 1]"}}, "cannot be read"),
        ({"size": 27}, "is not of the form"),
        ({"dtype": torch.float32}, "is not of the form"),
    ],
)
def test_a_folder_that_was_changed_is_refused_in_one_line(change, line, tmp_path):
    adapt(MODEL, {1: images(1, 1), 2: images(1, 2)}).save(tmp_path / "model")
    path = tmp_path / "model" / "adapted.safetensors"
    with safe_open(path, "pt") as file:
        about = change.get("about", file.metadata())
    size, dtype = change.get("size", 28), change.get("dtype", torch.uint8)
    save_file({"support": torch.zeros(change.get("images", 2), 1, size, size, dtype=dtype)}, path, about)
    with pytest.raises(fewshot.UserError, match=line) as error:
        Adapted.load(tmp_path / "model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["config.yaml", "adapted.safetensors"])
def test_nothing_that_is_there_is_overwritten(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(fewshot.UserError, match=rf"^out={tmp_path}: holds a {name}; name another folder$"):
        adapt(MODEL, {1: images(1, 1), 2: images(1, 2)}).save(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


@pytest.mark.parametrize("label", [(1, 2j), ("a", 1), None])
def test_labels_that_cannot_be_written_leave_nothing(label, tmp_path):
    adapted = adapt(MODEL, {label: images(1, 1), "b": images(1, 2)})
    with pytest.raises(fewshot.UserError, match=r"cannot be written; use text or numbers as labels$"):
        adapted.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_labels_of_numpy_and_a_home_folder_are_written_and_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    adapt(MODEL, {np.int64(3): images(1, 1), np.str_("b"): images(1, 2)}).save("~/model")
    assert Adapted.load("~/model").classes == (3, "b") and not (tmp_path / "~").exists()
    assert fewshot.FewShotClassifier.load("~/model").classes_.tolist() == ["3", "b"]


class Scaled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, x):
        return self.scale * x


def with_a_buffer(**knobs):
    network = models.conv4_strided(**knobs)
    network.encoder.append(Scaled())
    return network


@pytest.mark.parametrize("statistics", ["task", "support"])
def test_a_buffer_of_the_network_is_written_too(statistics, tmp_path):
    model, asked = fewshot.load(MODEL), images(3, 9)
    model.encoder.append(Scaled())
    model.encoder[-1].scale.fill_(0.5)
    model.config["model"]["network"]["_target_"] = "test_adapted.with_a_buffer"
    adapted = adapt(model, {"a": images(1, 1), "b": images(1, 2)}, statistics=statistics)
    adapted.save(tmp_path / "model")
    again = Adapted.load(tmp_path / "model", trust=True)
    assert np.array_equal(again.predict(asked).probabilities, adapted.predict(asked).probabilities)


def test_what_has_adapted_does_not_adapt_again(folders):
    """It would adapt on from where it is, and a loaded classifier would know the images of each fold."""
    support = {"a": images(1, 1), "b": images(1, 2)}
    adapt(MODEL, support).save(folders / "model")
    loaded = fewshot.FewShotClassifier.load(folders / "model")
    line = rf"^model={folders}/model: has adapted to its images already; give the model that it was before, or"
    for model in (folders / "model", fewshot.load(folders / "model")):
        with pytest.raises(fewshot.UserError, match=line):
            adapt(model, support)
    with pytest.raises(fewshot.UserError, match=line):
        clone(loaded).fit([*support["a"], *support["b"]], ["a", "b"])
    with pytest.raises(SystemExit, match=line):
        adapt_main([f"model={folders}/model", f"support={folders}/support", f"out={folders}/new"])
    assert not (folders / "new").exists()
    with pytest.raises(SystemExit, match=line):  # the hub would get it without its support and its classes
        push.main([f"model={folders}/model", "repo=lab/model"])


@pytest.fixture(params=["batch", "task"])
def fixed(request):
    """The adapted network that normalises by its support, and images as it takes them."""
    model = fewshot.load(MODEL)
    if request.param == "task":
        for place, layer in enumerate(model.encoder):
            if isinstance(layer, torch.nn.BatchNorm2d):
                model.encoder[place] = norm(layer.num_features, "task")
    adapted = adapt(model, {"a": images(2, 1), "b": images(1, 2)}, statistics="support")
    return adapted.network, torch.stack([adapted.preprocess(image) for image in images(4, 3)])


def test_torch_export_takes_what_is_normalised_by_its_support(fixed):
    network, x = fixed
    program = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("queries")},), strict=False)
    for queries in (x, x[:1], x.repeat(3, 1, 1, 1)):
        torch.testing.assert_close(program.module()(queries), network(queries))


def test_onnxruntime_says_what_torch_says(fixed, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, x = fixed
    names = {"input_names": ["images"], "output_names": ["logits"]}
    dynamic = {"dynamic_shapes": ({0: torch.export.Dim("queries")},)}
    torch.onnx.export(network, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False, **names, **dynamic)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for queries in (x, x[:1]):
        (logits,) = session.run(None, {"images": queries.numpy()})
        np.testing.assert_allclose(logits, network(queries).numpy(), rtol=1e-4, atol=1e-5)
