"""dataset=huggingface: the classes, splits and pixels of dataset=folder, and what is refused in one line."""

import logging
import sys

import numpy as np
import pytest
import torch
from data_files import make_huggingface
from PIL import Image

from fewshot.data.sources import folder, huggingface
from fewshot.errors import UserError

datasets = pytest.importorskip("datasets")

FRACTIONS = {"train": 0.64, "val": 0.16, "test": 0.2}
SHAPE = {"size": 8, "channels": 3, "fractions": FRACTIONS}
OWN = {"train": ["apple", "bear"], "validation": ["chair"], "test": ["dog"]}
SHARED = {"train": list("abcdefgh"), "test": list("abcdefgh")}


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "huggingface")  # not the user's

    def load(root, cache="cache", **knobs):
        knobs = {"subset": None, "image_column": None, "label_column": None, "name": "hf", **SHAPE, **knobs}
        return huggingface.load(root=str(root), cache=str(tmp_path / cache), **knobs)

    return load


def as_folder(saved, root, place):
    """The same images as files, in the folder that `place` makes of split and class; read by dataset=folder."""
    for split, table in datasets.load_from_disk(saved).items():
        names = table.features["label"].names
        for number, row in enumerate(table):
            path = root / place(split, names[row["label"]]) / f"{split == 'test':d}{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    return folder.load(root=str(root), cache=str(root.parent / "cache"), **SHAPE)


@pytest.mark.parametrize(
    ("splits", "place"),
    [
        (OWN, lambda split, label: f"{split.removesuffix('idation')}/{label}"),
        (SHARED, lambda split, label: label),
    ],
    ids=["own", "dealt"],
)
def test_it_has_the_splits_and_pixels_of_the_same_images_in_a_folder(splits, place, load, tmp_path, monkeypatch):
    saved = make_huggingface(tmp_path / "saved", splits)
    ours, theirs = load(saved), as_folder(saved, tmp_path / "photos", place)
    for split, other in theirs.items():
        assert ours[split].names == other.names and ours[split].sha256 == other.sha256
        assert torch.equal(ours[split].images, other.images) and torch.equal(ours[split].offsets, other.offsets)
    monkeypatch.setattr("fewshot.data.images.decode", None)  # the second time they come from the cache
    assert load(saved)["test"].sha256 == theirs["test"].sha256


def test_where_there_is_a_fourth_split_all_classes_are_dealt_out(load, tmp_path):
    splits = load(make_huggingface(tmp_path / "saved", OWN | {"extra": ["egg", "fig"]}, number=1))
    assert sorted(name[0] for split in splits.values() for name in split.names) == list("abcdef")


def table(**columns):
    features = {name: value[0] for name, value in columns.items()}
    return datasets.Dataset.from_dict({name: value[1] for name, value in columns.items()}, datasets.Features(features))


def test_labels_may_be_text_be_kept_back_or_lie_in_a_column_that_is_named(load, tmp_path, caplog):
    images = [Image.new("RGB", (4, 4), (place, 0, 0)) for place in range(14)]
    words = [f"{place // 2}" for place in range(14)]
    fine = datasets.ClassLabel(names=list("abcdefg"))
    numbers = [-1, *(place // 2 for place in range(1, 14))]
    columns = {"img": (datasets.Image(), images), "label": (datasets.Value("string"), words)}
    table(**columns).save_to_disk(tmp_path / "text")
    splits = load(tmp_path / "text")
    assert sorted(name for split in splits.values() for name in split.names) == list("0123456")
    kinds = {"fine": (fine, numbers), "coarse": (fine, numbers[::-1])}
    table(**columns, **kinds).save_to_disk(tmp_path / "two")
    with pytest.raises(UserError, match="several columns of type ClassLabel among img, label, fine, coarse; name one "):
        load(tmp_path / "two")
    with caplog.at_level(logging.WARNING):
        splits = load(tmp_path / "two", label_column="fine")
    assert sum(len(split.images) for split in splits.values()) == 13 and "1 of all without a class left" in caplog.text
    assert load(tmp_path / "two", label_column="coarse")["train"].sha256 != splits["train"].sha256  # not from the cache
    table(**columns, word=(datasets.Value("string"), ["", *words[1:]])).save_to_disk(tmp_path / "empty")
    splits = load(tmp_path / "empty", label_column="word")
    assert sorted(name for split in splits.values() for name in split.names) == list("0123456")
    with pytest.raises(UserError, match=r"dataset.label_column=color: .* has the columns img, label, fine, coarse$"):
        load(tmp_path / "two", label_column="color")
    with pytest.raises(UserError, match="fine is no column of images"):
        load(tmp_path / "two", image_column="fine", label_column="fine")
    with pytest.raises(UserError, match=r"ways=5: .*/text has 7 classes, dealt out as .*; use ways=2"):
        load(tmp_path / "text", ways=5)


def test_what_cannot_be_read_is_said_in_one_line_without_a_word_of_the_hubs(load, tmp_path, monkeypatch):
    def refuses(*arguments, **knobs):
        raise OSError("the token hf_secret was refused")

    monkeypatch.setattr(datasets, "load_dataset", refuses)
    with pytest.raises(UserError, match=r"=hf://lab/birds: the library datasets cannot read it \(OSError\); check it"):
        load("hf://lab/birds")
    for address in ("hf://birds", "hf://lab/birds@", "hf://../x"):
        with pytest.raises(UserError, match=r"must be hf://ORG/NAME or hf://ORG/NAME@REVISION$"):
            load(address)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the library datasets; uv sync --extra datasets, or pip install d"):
        load("hf://lab/birds")


def test_the_hub_is_asked_for_the_revision_and_subset_and_broken_images_are_named(load, tmp_path, monkeypatch):
    asked = []
    bad = [{"bytes": b"no picture" * (place == 3) or None, "path": None} for place in range(14)]
    good = np.zeros((14, 4, 4, 3), np.uint8)
    good[:, 0, 0, 0] = range(14)
    pictures = [one if one["bytes"] else Image.fromarray(pixels) for one, pixels in zip(bad, good, strict=True)]
    read = table(image=(datasets.Image(), pictures), label=(datasets.Value("int64"), [n // 2 for n in range(14)]))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or read)
    with pytest.raises(UserError, match=r"^dataset.root=hf://lab/birds@v1: cannot read image 'all/3': not an image in"):
        load("hf://lab/birds@v1", subset="small")
    assert asked == [(("lab/birds", "small"), {"revision": "v1"})]


def test_a_version_of_the_library_that_would_run_code_is_refused(load, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "__version__", "2.14.6")
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **knobs: pytest.fail("it was asked"))
    with pytest.raises(UserError, match=r"birds: datasets 2\.14\.6 may run code .* needs version 4 or later, pip inst"):
        load("hf://lab/birds")


def test_the_code_of_a_repository_does_not_run(load, tmp_path):
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "birds.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(UserError, match="the library datasets cannot read it") as error:
        load(tmp_path / "birds")
    assert not (tmp_path / "ran").exists() and "\n" not in str(error.value)


def test_images_may_be_files_of_the_datasets_folder_and_no_others(load, tmp_path, monkeypatch):
    folder, outside = tmp_path / "photos", tmp_path / "tables of others" / "outside.png"
    for place in range(14):
        path = folder / f"{place // 2}" / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (place, 0, 0)).save(path)
    assert sum(len(split.images) for split in load(folder).values()) == 14  # of load_dataset's own "imagefolder"
    monkeypatch.setenv("HOME", str(tmp_path))  # as fewshot.train hands a path on
    assert sum(len(split.images) for split in load("~/photos", cache="another").values()) == 14
    outside.parent.mkdir()  # whose name begins as that of the dataset's folder
    Image.new("RGB", (4, 4)).save(outside)
    pictures = [{"bytes": None, "path": str(outside)}] * 14
    read = table(
        image=(datasets.Image(decode=False), pictures), label=(datasets.Value("int64"), [n // 2 for n in range(14)])
    )
    (tmp_path / "tables").mkdir()
    read.to_parquet(tmp_path / "tables" / "train.parquet")
    with pytest.raises(
        UserError,
        match=r"cannot read 14 images: 'train/0': \S+ of others/outside.png is neither in the dataset's folder",
    ):
        load(tmp_path / "tables")
