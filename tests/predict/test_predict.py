"""Prediction against plain SGD written anew, and the command on real files."""

import csv
import io
import os
import subprocess
import sys
import zipfile
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import HANG
from examples import images, untrained
from PIL import Image
from torch import Tensor

import fewshot
from fewshot import export
from fewshot.config.stored import to_today
from fewshot.config.tree import settings
from fewshot.data.meta_batches import TaskDataModule
from fewshot.data.sheet import contact_sheet
from fewshot.data.sources import glyphs
from fewshot.data.task import SPLITS
from fewshot.errors import UserError
from fewshot.predict import Predictions, predict
from fewshot.predict.__main__ import SHEET_CLASSES, Support, _labels, _sheet_rows, main, open_folder, run
from fewshot.predict.pretrained import Preprocess
from fewshot.results.figures import confusion
from fewshot.results.figures import png as drawn
from fewshot.training.choose_engine import engine_to_predict, sequential_engine


def forward(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return encode(parameters, x) @ parameters["head.weight"].T + parameters["head.bias"]


def encode(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """conv4_strided by hand: convolution, ReLU, normalisation on the batch, four times."""
    for layer, stride in zip((0, 3, 6, 9), (2, 2, 2, 1), strict=True):
        weight, bias = (parameters[f"encoder.{layer}.{name}"] for name in ("weight", "bias"))
        x = F.conv2d(x, weight, bias, stride).clamp(min=0)
        mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        gamma, beta = (parameters[f"encoder.{layer + 2}.{name}"].view(1, -1, 1, 1) for name in ("weight", "bias"))
        x = (x - mean) / (variance + 1e-5).sqrt() * gamma + beta
    return x.flatten(1)


@pytest.mark.parametrize(
    ("ways", "zeroing", "queries", "overrides"),
    [
        (3, False, 4, ()),
        (3, True, 4, ()),
        (2, False, 4, ()),
        (2, True, 4, ("algo=anil",)),
        (5, True, 4, ()),
        (5, None, 4, ("algo=zero",)),
        (3, False, 1, ()),
        (5, None, 4, ("algo=protomaml", "inner_lr=0.02")),
        (5, None, 4, ("algo=unicorn",)),
        (3, None, 4, ("algo=metasgd",)),
    ],
    ids=[
        *("learned", "zeroed", "fewer", "fewer-head-alone", "more", "more-as-trained", "one-query"),
        *("prototypes", "one-vector", "learned-rates"),
    ],
)
def test_predict_is_sgd_on_the_support_set(ways, zeroing, queries, overrides):
    model = untrained(*overrides)
    shots = [1 + way % 2 for way in range(ways)]
    support = {f"class {way}": images(count, seed=way) for way, count in enumerate(shots)}
    asked = images(queries, seed=100)
    before = {name: value.clone() for name, value in model.learner.state_dict().items()}
    predictions = predict(model, support, asked, steps=3, test_zeroing=zeroing)

    parameters = {name: value.detach().clone() for name, value in model.learner.network.named_parameters()}
    pixels = torch.tensor(np.stack([image for shots in support.values() for image in shots])[:, None] / 255)
    labels = torch.tensor([way for way, count in enumerate(shots) for _ in range(count)])
    if "algo=protomaml" in overrides:
        features = encode(parameters, pixels)
        prototypes = torch.stack([features[labels == way].mean(0) for way in range(ways)])
        parameters |= {"head.weight": 2 * prototypes, "head.bias": -(prototypes**2).sum(1)}
    for name in ("head.weight", "head.bias"):
        rows = parameters[name]
        if "algo=unicorn" in overrides:
            rows = torch.stack([rows[0]] * ways)
        elif zeroing or "algo=zero" in overrides:
            rows = torch.zeros(ways, *rows.shape[1:]).double()
        parameters[name] = rows[:ways].clone()
    adapted = [name for name in parameters if "algo=anil" not in overrides or name.startswith("head")]
    etas = dict.fromkeys(adapted, model.config["inner_lr"])
    if "algo=metasgd" in overrides:
        etas = dict(zip(adapted, (eta.detach() for eta in model.learner.etas), strict=True))
    for _ in range(3):
        for name in adapted:
            parameters[name].requires_grad_()
        loss = -forward(parameters, pixels).log_softmax(1)[torch.arange(len(labels)), labels].mean()
        gradients = torch.autograd.grad(loss, [parameters[name] for name in adapted])
        for name, gradient in zip(adapted, gradients, strict=True):
            parameters[name] = (parameters[name] - etas[name] * gradient).detach()
    x = torch.tensor(np.stack(asked)[:, None] / 255)
    x = torch.cat([pixels, x]) if queries == 1 else x
    expected = forward(parameters, x)[-queries:].softmax(1).detach().numpy()
    np.testing.assert_allclose(predictions.probabilities, expected, atol=1e-6)  # pixels are normalised in float32
    assert predictions.classes == tuple(support) and predictions.probabilities.shape == (queries, ways)
    assert predictions.labels == [f"class {way}" for way in expected.argmax(1)]
    after = model.learner.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("classes", "queries", "options", "line"),
    [
        (4, 1, {}, "test_zeroing=false: support has 4 classes, the head 3 rows"),
        (1, 1, {}, "support: has 1 classes; give at least 2"),
        (2, 0, {}, "query: has no images"),
        (2, 1, {"steps": 0}, "steps=0: must be an integer of at least 1"),
        (2, 1, {"steps": 2.5}, "steps=2.5: must be an integer"),
    ],
)
def test_predict_refuses_in_one_line(classes, queries, options, line):
    with pytest.raises(UserError) as error:
        predict(untrained(), {str(way): images(1, way) for way in range(classes)}, images(queries, 9), **options)
    assert str(error.value).startswith(line)


def test_boil_has_no_use_for_a_zeroed_head():
    support = {str(way): images(1, way) for way in range(4)}
    with pytest.raises(UserError, match=r"^test_zeroing=true: this model adapts all but the head"):
        predict(untrained("algo=boil"), support, images(1, 9), test_zeroing=True)
    with pytest.raises(UserError, match=r"give at most 3 classes$"):
        predict(untrained("algo=boil"), support, images(1, 9))


def test_learned_rates_are_for_as_many_classes_as_they_were_learned_for():
    model = untrained("algo=metasgd")
    for ways in (2, 4):
        line = f"^support: has {ways} classes, but the model learned inner_lr for each weight of 3 rows; give 3$"
        with pytest.raises(UserError, match=line):
            predict(model, {str(way): images(1, way) for way in range(ways)}, images(1, 9))


def test_numbers_that_are_not_finite_are_no_prediction():
    model = untrained("inner_lr=1e300")
    with pytest.raises(UserError, match="logits are not finite"):
        predict(model, {"a": images(1, 0), "b": images(1, 1)}, images(2, 2))


# Preprocessing

SMOOTH = "dataset.resample=bilinear"


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_an_image_is_seen_as_in_training(config, tmp_path):
    """Bit by bit what the tasks of the training hold of the same files."""
    pictures = np.random.default_rng(0).integers(0, 256, (12, 50, 70, 3), dtype=np.uint8)
    names = [f"{split}/{split}{label}/{number}.png" for split in SPLITS for label in "ab" for number in "01"]
    for name, picture in zip(names, pictures, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png(Image.fromarray(picture)))
    knobs = (f"dataset.root={tmp_path}", f"dataset.cache={tmp_path / 'cache'}", "dataset.size=32")
    cfg = config("dataset=folder", *knobs, "ways=2", "shots=1", "queries=1", "val_tasks=2", "test_tasks=2")
    preprocess = Preprocess.from_config(settings(cfg)["dataset"])
    tasks = TaskDataModule.from_config(cfg).samplers["train"](0, 8)
    seen = {image.numpy().tobytes() for images in (tasks.support, tasks.query) for image in images.flatten(0, 1)}
    assert seen == {preprocess((tmp_path / name).read_bytes()).numpy().tobytes() for name in names[:4]}


@pytest.mark.parametrize(
    ("name", "knobs"), [("omniglot", ()), ("omniglot", ("dataset.resample=bilinear",)), ("glyphs", ())]
)
def test_an_image_is_made_smaller_as_the_dataset_says_and_an_older_omniglot_by_lanczos(config, name, knobs):
    """dataset.resample is a key of today; before, the name of the dataset said it."""
    stored = settings(config(f"dataset={name}", *knobs))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (105, 105), dtype=np.uint8))
    sharp, smooth = (
        torch.tensor(np.asarray(picture.resize((28, 28), resample)))[None]
        for resample in (Image.Resampling.LANCZOS, Image.Resampling.BILINEAR)
    )
    expected = sharp if (name, knobs) == ("omniglot", ()) else smooth
    assert torch.equal(Preprocess.from_config(stored["dataset"]).pixels(picture), expected)
    del stored["dataset"]["source"]
    older = to_today({"dataset": {key: value for key, value in stored["dataset"].items() if key != "resample"}})
    expected = sharp if name == "omniglot" else smooth
    assert torch.equal(Preprocess.from_config(older["dataset"]).pixels(picture), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_image_in_any_form(channels):
    preprocess = Preprocess(28, channels, Image.Resampling.BILINEAR, (0.0,) * channels, (1.0,) * channels)
    array = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    expected = preprocess(Image.fromarray(array))
    assert expected.shape == (channels, 28, 28) and expected.dtype == torch.float32
    assert torch.equal(preprocess(array), expected)
    assert torch.equal(preprocess(torch.tensor(array).permute(2, 0, 1)), expected)
    assert torch.equal(preprocess(png(Image.fromarray(array))), expected)
    grey = array[:, :, 0]
    assert torch.equal(preprocess(grey), preprocess(grey[:, :, None]))
    assert torch.equal(preprocess(grey), preprocess(torch.tensor(grey)[None]))
    opaque = np.concatenate([array, np.full((40, 30, 1), 255, np.uint8)], axis=2)
    assert torch.equal(preprocess(opaque), expected)


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((28, 28)),
        np.zeros((2, 28, 28), np.uint8),
        np.zeros((0, 28), np.uint8),
        torch.zeros(28, 28, dtype=torch.uint8),
        torch.zeros(1, 28, 28),
    ],
    ids=["float", "planes-first", "empty", "no-channel", "float-tensor"],
)
def test_arrays_that_are_no_uint8_images_are_refused(picture):
    with pytest.raises(UserError, match=r"image: a (ndarray|Tensor) of .*; give a PIL image"):
        Preprocess(28, 1, Image.Resampling.BILINEAR, (0.0,), (1.0,))(picture)


# The command


def write_letters(folder: Path, cache: Path, letters: int, shots: int = 12) -> dict[str, str]:
    """Test letters as support/CLASS/x.png and query/SUB/x.png, with one broken PNG; {file in query: its class}."""
    test = glyphs.load(size=28, cache=str(cache))["test"]
    truth = {}
    for letter in range(letters):
        name, first = f"letter{letter}", int(test.offsets[3 + 12 * letter])
        for number in range(20):
            path = f"half{number % 2}/{name}_{number:02d}.png"
            if number >= shots:
                truth[path] = name
            path = folder / (f"query/{path}" if number >= shots else f"support/{name}/{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(test.images[first + number, 0].numpy()).save(path)
    whole = (folder / "support" / "letter0" / "0.png").read_bytes()
    (folder / "query" / "half0" / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "query" / "notes.txt").write_text("no image")
    return truth


def read_csv(path: Path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_the_command_tells_new_letters_apart(trained, cache, tmp_path, monkeypatch, capsys, caplog):
    truth = write_letters(tmp_path, cache, letters=5)
    monkeypatch.chdir(tmp_path)
    main([f"checkpoint={trained}/checkpoints/last.ckpt", "support=support", "query=query", "steps=20", "out=written"])
    assert capsys.readouterr() == ("40 images, 5 classes, 1 skipped: written to written\n", "")
    left_out, warning = caplog.messages
    assert left_out == "query=query: 1 file is left out, no images by their names or in no class: 1 .txt"
    assert warning.startswith("query: half0/broken.png is skipped, it cannot be read: ")
    header, skipped = read_csv(tmp_path / "written" / "skipped.csv")
    assert header == ["set", "file", "reason"] and skipped[:2] == ["query", "half0/broken.png"] and skipped[2]
    header, *rows = read_csv(tmp_path / "written" / "predictions.csv")
    assert header == ["file", "class", *(f"probability of letter{letter}" for letter in range(5))]
    assert [row[0] for row in rows] == sorted(truth)
    for _, name, *probabilities in rows:
        p = np.array(probabilities, dtype=float)
        assert abs(p.sum() - 1) < 1e-4 and name == f"letter{p.argmax()}"
    assert np.mean([truth[file] == name for file, name, *_ in rows]) > 0.5  # chance: 0.2, standard deviation 0.06
    with Image.open(tmp_path / "written" / "contact_sheet.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 1000
    assert len(list((tmp_path / "written").iterdir())) == 3


def test_labelled_queries_are_scored(trained, cache, tmp_path, capsys):
    """A folder of queries that is called like no class of the support labels nothing."""
    truth = write_letters(tmp_path, cache, letters=5)
    for file, label in truth.items():
        (tmp_path / "labelled" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "query" / file).rename(tmp_path / "labelled" / label / Path(file).name)
    knobs = [f"checkpoint={trained}", f"support={tmp_path}/support", f"query={tmp_path}/labelled", "steps=20"]
    main([*knobs, f"out={tmp_path}/out"])
    header, *rows = read_csv(tmp_path / "out" / "predictions.csv")
    assert header[:2] + header[-1:] == ["file", "class", "labelled"]
    assert all(file.startswith(f"{label}/") for file, *_, label in rows)
    right = sum(name == label for _, name, *_, label in rows)
    said = capsys.readouterr().out
    assert said.startswith(
        f"{len(rows)} images, 5 classes, accuracy {right / len(rows):.1%} ({right} of {len(rows)}): "
    )
    with Image.open(tmp_path / "out" / "confusion.png") as picture:
        assert picture.width > 500
    (tmp_path / "labelled" / "letter0").rename(tmp_path / "labelled" / "lettre0")
    main([*knobs, f"out={tmp_path}/other"])
    assert "accuracy" not in capsys.readouterr().out and not (tmp_path / "other" / "confusion.png").exists()


def test_folders_of_queries_that_differ_from_a_class_in_case_alone_are_named(tmp_path, caplog):
    for name in ("named/Cats/1.png", "named/Dogs/1.png", "plain/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28)).save(tmp_path / name)

    def labelled(place, *classes):
        source = open_folder("query", str(tmp_path / place))
        return _labels(f"query={place}", source, [name for name in source.names if not name.endswith("/")], classes)

    assert labelled("named", "Cats", "Dogs") == ["Cats", "Dogs"] and labelled("plain", "cats", "dogs") == []
    assert labelled("named", "birds", "fish") == []
    assert not caplog.records
    Image.new("L", (28, 28)).save(tmp_path / "named" / "loose.png")
    assert labelled("named", "Cats", "Dogs") == []
    assert caplog.messages == ["query=named: some images lie in no folder; no accuracy"]
    (tmp_path / "named" / "loose.png").unlink()
    assert labelled("named", "cats", "dogs") == []
    assert "query=named: 'Cats', 'Dogs' are no classes of the support; no accuracy" in caplog.text


def test_classes_in_letters_that_the_font_lacks_are_told_apart_by_their_numbers(recwarn):
    picture = confusion(["猫", "犬"], ["猫", "猫"], ["犬", "猫"])
    assert [label.get_text() for label in picture.axes[0].get_yticklabels()] == ["1 犬", "2 猫"]
    assert drawn(picture, dpi=20) and not recwarn.list


def test_classes_are_in_the_order_of_their_names_and_not_of_their_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "support.zip", "w") as file:
        for name in ("cat/1.png", "cat-2/1.png", "ant/1.png"):  # - comes before / among letters
            file.writestr(name, b"")
    assert list(Support(str(tmp_path / "support.zip")).classes) == ["ant", "cat", "cat-2"]


def test_a_contact_sheet_of_many_classes_shows_the_first_and_says_so():
    image, number = torch.zeros(3, 4, 4, dtype=torch.uint8), SHEET_CLASSES + 1
    support = {f"class {place}": [image] for place in range(number)}
    predictions = Predictions(tuple(support), np.eye(number)[[number - 1]] / 2)
    rows = _sheet_rows(support, [("sub/a.png", image)], predictions)
    assert rows[0].label == "support, the first 50 of 51 classes: what the model adapted to"
    assert sum(len(row.images) for row in rows) == 50 + 1 and rows[-1].captions == [("51 class 50", "0.50", "a.png")]
    few, more = (
        _sheet_rows({"a": [image] * shots}, [("a.png", image)] * 11, Predictions(("a",), np.ones((11, 1))))
        for shots in (10, 13)
    )
    assert [(row.label, len(row.images)) for row in more[1:]] == [
        ("1 a (+3)", 10),
        ("queries: predicted class and its probability", 0),
        ("", 10),
        ("", 1),
    ]
    drawn, same = np.asarray(contact_sheet(few, side=140)), contact_sheet(few, side=140)
    assert drawn.shape[2] == 3 and np.array_equal(drawn, same) and same.width > 10 * 140


def test_zips_other_ways_and_the_function_say_the_same(trained, cache, tmp_path, monkeypatch):
    """Seven letters where five were trained; the support zipped in an enclosing folder, the query as it is."""
    write_letters(tmp_path, cache, letters=5, shots=18)
    for extra in ("letter5", "letter6"):
        (tmp_path / "support" / extra).mkdir()
        Image.new("L", (28, 28), "white" if extra == "letter5" else "black").save(
            tmp_path / "support" / extra / "0.png"
        )
    for name, wrapper in (("support", "my images/"), ("query", "")):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            for path in sorted((tmp_path / name).rglob("*.*")):
                archive.write(path, wrapper + path.relative_to(tmp_path / name).as_posix())
    checkpoint = f"{trained}/checkpoints/last.ckpt"
    for out, suffix in (("folders", ""), ("zips", ".zip")):
        where = [str(tmp_path / f"{name}{suffix}") for name in ("support", "query")]
        run(checkpoint, *where, tmp_path / out, steps=2, test_zeroing=True)
    monkeypatch.chdir(tmp_path)
    clock = SimpleNamespace(now=lambda: datetime(2026, 1, 2, 3, 4, 5))
    monkeypatch.setattr(sys.modules["fewshot.predict.__main__"], "datetime", clock)
    for _ in range(2):  # at once
        run(checkpoint, *where, None, steps=2, test_zeroing=True)
    assert sorted(path.name for path in Path("outputs/2026-01-02").iterdir()) == ["03-04-05", "03-04-05-1"]
    rows, zipped = (read_csv(tmp_path / out / "predictions.csv") for out in ("folders", "zips"))
    assert rows == zipped and len(rows[0]) == 2 + 7 and len(rows) == 1 + 10
    files = {path.name: sorted(path.iterdir()) for path in sorted((tmp_path / "support").iterdir())}
    support = {name: [Image.open(path) for path in paths] for name, paths in files.items()}
    query = [np.asarray(Image.open(tmp_path / "query" / row[0])) for row in rows[1:]]
    predictions = predict(fewshot.load(checkpoint), support, query, steps=2, test_zeroing=True)
    assert predictions.labels == [row[1] for row in rows[1:]]
    with pytest.raises(UserError, match="test_zeroing=false: support has 7 classes, the head 5 rows"):
        run(checkpoint, str(tmp_path / "support"), str(tmp_path / "query"), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("suport=x", "suport=x: no such knob; did you mean support?"),
        ("support=x", "model: is missing; give model="),
        ("model=c checkpoint=d", "model=d: model is given twice; model=c came first"),
        ("model=c support=x support=y", "support=y: support is given twice"),
        ("model=c support=x query=", "query=: give query=VALUE"),
        ("checkpoint=c support=x query=y test_zeroing=yes", "test_zeroing=yes: must be true or false"),
        ("model=c support=x query=y statistics=all", "statistics=all: must be one of task, support, each"),
        ("checkpoint=c support=x query=y steps=two", "steps=two: must be an integer of at least 1"),
        ("model=c support=x query=y", "model=c: no such file or folder"),
        ("model=none/c support=x query=y", "model=none/c: no such file or folder"),
        (f"model={'c' * 300} support=x query=y", f"model={'c' * 300}: no such file or folder, and no model"),
        ("checkpoint=a.txt support=none query=q", "support=none: no such file or folder"),
        ("checkpoint=a.txt support=loose query=q", "support=loose: 1.png lies in no class"),
        ("checkpoint=a.txt support=empty query=q", "support=empty: no images in 'b'; add images or remove the class"),
        ("checkpoint=a.txt support=one query=q", "support=one: 1 folders with images in it"),
        ("checkpoint=a.txt support=a.txt query=q", "support=a.txt: not a whole zip file"),
        (
            "checkpoint=a.txt support=two query=q/1.png",
            "query=q/1.png: not a whole zip file (File is not a zip file); give a folder of images, or a zip of it",
        ),
        ("checkpoint=a.txt support=unsafe.zip query=q", "support=unsafe.zip: unsafe path '../a/1.png'"),
        ("checkpoint=a.txt support=two query=none", "query=none: no such file or folder"),
        ("checkpoint=a.txt support=two query=noimages", "query=noimages: no images in it"),
        ("checkpoint=a.txt support=two query=q", "model=a.txt: cannot be read"),
        ("checkpoint=a.txt query=q", "support: is missing; give support=FOLDER"),
        ("model=done support=two query=q", "support=two: done has adapted to its images already; leave support out"),
        ("model=done query=q steps=2", "steps=2: done has adapted to its images already; leave steps out"),
        ("model=done query=q", "model=done: has no config.yaml"),
        ("model=two support=two query=q", "model=two: has no model.safetensors"),
        ("checkpoint=a.txt support=two query=q out=one", "out=one: is not empty; name another folder"),
    ],
)
def test_a_mistake_is_one_line(words, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (
        "loose/1.png",
        "loose/a/1.png",
        "empty/a/1.png",
        "one/a/1.png",
        "two/a/1.png",
        "two/b/1.png",
        "q/1.png",
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9)).save(tmp_path / path)
    for folder in ("empty/b", "noimages"):
        (tmp_path / folder).mkdir()
    (tmp_path / "done").mkdir()
    for name in ("model.safetensors", "adapted.safetensors"):
        (tmp_path / "done" / name).touch()
    (tmp_path / "a.txt").write_text("neither zip nor checkpoint")
    with zipfile.ZipFile(tmp_path / "unsafe.zip", "w") as archive:
        archive.writestr("../a/1.png", "")
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert str(stop.value.code).startswith(line) and "\n" not in stop.value.code
    assert not (tmp_path / "outputs").exists()


def test_a_class_of_which_nothing_can_be_read_is_named(trained, tmp_path):
    for name in "ab":
        (tmp_path / "support" / name).mkdir(parents=True)
        Image.new("L", (28, 28)).save(tmp_path / "support" / name / "0.png")
    (tmp_path / "support" / "b" / "0.png").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match="no image of 'b' can be read"):
        run(f"{trained}/checkpoints/last.ckpt", *[str(tmp_path / "support")] * 2, tmp_path / "out")


def test_only_what_is_needed_is_imported(tmp_path):
    """A mistake on the command line does not wait for torch, nor a prediction for what only training needs."""
    for number, name in enumerate(("support/a/0.png", "support/b/0.png", "query/0.png")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images(1, number)[0]).save(tmp_path / name)
    code = """
import sys
import fewshot, fewshot.adapt, fewshot.export, fewshot.predict.__main__, fewshot.push
for module in (fewshot.predict.__main__, fewshot.adapt, fewshot.export, fewshot.push):
    try:
        module.main(["checkpoint=none", "suport=none"])
    except SystemExit as stop:
        print(stop.code)
print("torch" in sys.modules, "load" in vars(fewshot))
fewshot.predict.__main__.main(["model=omniglot-5w1s-zero", "support=support", "query=query", "out=out"])
slow = {"learn2learn", "matplotlib.axes", "pytorch_lightning", "scipy", "torchmetrics", "torchvision"}
print(slow & set(sys.modules))
"""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=HANG, check=True
    )
    assert process.stdout.splitlines() == [
        "suport=none: no such knob; did you mean support?",
        "checkpoint=none: no such knob; known are model, out, statistics, steps, support, test_zeroing, trust",
        "suport=none: no such knob; known are checkpoint, out",
        "checkpoint=none: no such knob; known are model, private, repo",
        "False False",
        "1 images, 2 classes: written to out",
        "set()",
    ]


def test_names_that_are_no_utf8_are_classes_and_files_like_others(trained, tmp_path):
    for number, name in enumerate((b"support/caf\xe9/0.png", b"support/b/0.png", b"query/\xff\x1b[2J.png")):
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images(1, number)[0]).save(path, "png")
    knobs = (f"{knob}={tmp_path / knob}" for knob in ("support", "query", "out"))
    main([f"checkpoint={trained}/checkpoints/last.ckpt", *knobs])
    lines = (tmp_path / "out" / "predictions.csv").read_bytes().splitlines()
    assert lines[0].endswith(rb"probability of b,probability of caf\xe9") and b"[2J.png," in lines[1]  # as escapes
    assert (tmp_path / "out" / "contact_sheet.png").exists()


def test_places_that_cannot_be_are_one_line_at_once(trained, tmp_path):
    (tmp_path / "file").write_text("mine")
    place = f"out={tmp_path / 'file' / 'x'}"
    line = rf"^out=.*/file/x: {tmp_path}/file is no folder; name another place$"
    with pytest.raises(SystemExit, match=line):
        main(["checkpoint=none", "support=none", "query=none", place])
    with pytest.raises(SystemExit, match=line):
        export.main([f"checkpoint={trained}/checkpoints/best.ckpt", place])
    with pytest.raises(SystemExit, match=r"^model=~no-such-user/x: "):
        main(["model=~no-such-user/x", "support=none", "query=none"])
    with pytest.raises(SystemExit, match=r"^checkpoint=~no-such-user/x: "):
        export.main(["checkpoint=~no-such-user/x", "out=none"])


@pytest.mark.parametrize(
    "overrides", [("algo=zero",), ("algo=fomaml", "algo.learned_inner_lr=true"), ("algo=protomaml",)]
)
def test_both_engines_predict_the_same(overrides, monkeypatch):
    model, support = untrained(*overrides), {"a": images(1, 0), "b": images(3, 1), "c": images(2, 2)}
    batched = predict(model, support, images(4, 3)).probabilities
    monkeypatch.setattr("fewshot.predict.adapted.engine_to_predict", lambda network: sequential_engine())
    sequential = predict(model, support, images(4, 3)).probabilities
    assert not np.array_equal(batched, sequential)  # two programs
    np.testing.assert_allclose(batched, sequential, rtol=1e-10)


class OwnLayer(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_learn2learn_predicts_where_a_layer_may_be_beyond_the_batched_engine(monkeypatch):
    network = untrained().learner.network
    assert engine_to_predict(network).name == "batched"
    network.encoder.append(OwnLayer())
    assert engine_to_predict(network).name == "sequential"
    monkeypatch.setitem(sys.modules, "learn2learn.algorithms", None)  # installed, and cannot be imported
    assert engine_to_predict(network).name == "batched"
