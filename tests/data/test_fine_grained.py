"""CUB, FGVC-Aircraft, Flowers-102 and DTD: their published splits, their original files, and what is refused."""

import hashlib
import pickle
import shutil

import numpy as np
import pytest
import torch
from data_files import make_fine_grained, make_mini
from PIL import Image

from fewshot.data.sources import fine_grained
from fewshot.errors import UserError

NAMES = ("cub", "aircraft", "flowers", "dtd")
NUMBERS = {"cub": (100, 50, 50), "aircraft": (70, 15, 15), "flowers": (71, 15, 16), "dtd": (33, 7, 7)}
SHAPE = {"size": 8, "channels": 3}


@pytest.fixture
def made(tmp_path, monkeypatch):
    return lambda name: make_fine_grained(name, tmp_path, monkeypatch)


def load(name, root, **more):
    return getattr(fine_grained, name)(root=str(root), **SHAPE, cache=str(root.parent / "cache"), **more)


@pytest.mark.parametrize("name", NAMES)
def test_the_splits_are_those_that_were_published(made, name):
    root = made(name)
    splits = load(name, root)
    assert tuple(len(split.names) for split in splits.values()) == NUMBERS[name]
    everything = [label for split in splits.values() for label in split.names]
    assert len({*everything}) == len(everything) == sum(NUMBERS[name])
    assert all(set(split.counts.tolist()) == {2} for split in splits.values())
    if name != "cub":
        assert {split: list(one.names) for split, one in splits.items()} == fine_grained.FACTS[name]
    again = load(name, root.parent)  # what torchvision is given, with the folder in it
    assert {split: one.sha256 for split, one in again.items()} == {split: one.sha256 for split, one in splits.items()}


def test_the_classes_have_not_changed_since_they_were_read_at_meta_dataset():
    def fingerprint(name):
        lines = [f"{split}/{label}" for split, labels in fine_grained.FACTS[name].items() for label in labels]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    read = {"aircraft": "6f58e8b6d9a4f998", "flowers": "f8d9537f2b18c438", "dtd": "32c1d2bccb0b5f8f"}
    assert {name: fingerprint(name) for name in read} == read


def test_of_four_birds_two_train_one_validates_and_one_tests(made):
    splits = load("cub", made("cub"))
    numbers = {split: [int(name[:3]) for name in one.names[:3]] for split, one in splits.items()}
    assert numbers == {"train": [1, 3, 5], "val": [2, 6, 10], "test": [4, 8, 12]}  # the first is number 0 in their code


def test_an_aircraft_is_what_lies_in_its_box(made):
    root = made("aircraft")
    splits = load("aircraft", root)
    labels = [label for labels in fine_grained.FACTS["aircraft"].values() for label in labels]
    number = {label: place for place, label in enumerate(labels)}
    for split in splits.values():
        labels = torch.tensor([number[label] for label in split.names]).repeat_interleave(2)
        expected = (255 - labels).view(-1, 1, 1, 1)
        assert (split.images.int() - expected).abs()[..., 1:-1, 1:-1].max() <= 6  # JPEG
    first = root / "data" / "images" / "0000000.jpg"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 60, 3), dtype=np.uint8))
    noise.save(first, "PNG")
    made = np.asarray(noise.crop((10, 4, 50, 24)).resize((8, 8), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert any(np.array_equal(image, made) for image in load("aircraft", root)["train"].images)
    first.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 30\n%%EndComments\n%%EOF\n")
    with pytest.raises(UserError, match="not an image in a format that Pillow knows"):  # and no Ghostscript is started
        load("aircraft", root)


def test_a_flower_is_of_the_class_that_the_table_says(made):
    for split in load("flowers", made("flowers")).values():
        numbers = torch.tensor([int(label[:3]) for label in split.names]).repeat_interleave(2)
        assert (split.images[..., 0, 0].int() - numbers[:, None]).abs().max() <= 6


def test_mini_to_cub_trains_on_all_classes_of_miniimagenet(made, monkeypatch, tmp_path):
    monkeypatch.setattr(fine_grained, "MINI", {"train": 3, "val": 1, "test": 2})
    root, mini = made("cub"), make_mini(tmp_path / "mini")
    splits = load("mini_to_cub", root, mini_root=str(mini), trust=True)
    birds = load("cub", root)
    assert len(splits["train"].names) == 6 and splits["train"].offsets.tolist() == list(range(0, 14, 2))
    assert splits["val"].sha256 == birds["val"].sha256 and splits["test"].names == birds["test"].names
    last = mini / "mini-imagenet-cache-test.pkl"
    last.write_bytes(pickle.dumps((data := pickle.loads(last.read_bytes())) | {"image_data": 255 - data["image_data"]}))
    other = load("mini_to_cub", root, mini_root=str(mini), trust=True)
    assert other["train"].sha256 != splits["train"].sha256  # a run with these images does not go on with others
    with pytest.raises(UserError, match=r"^dataset\.mini_root=nowhere: no such file"):
        load("mini_to_cub", root, mini_root="nowhere", trust=True)


def without(root, pattern):
    for path in sorted(root.glob(pattern))[:1]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("name", "pattern", "line"),
    [
        ("cub", "images/*", r"holds 199 classes, not the 200 of CUB-200-2011; give the folder CUB_200_2011 of .*"),
        ("cub", "images/*/*", r"holds 399 of 400 images; give .*"),
        ("dtd", "images/banded", r"differs from DTD in classes banded; give the folder dtd of DTD, with images/CLASS/"),
        ("aircraft", "data/images/*", r"holds 199 of 200 images, and lacks data/images/0000000\.jpg; give .*"),
        ("aircraft", "data/images_box.txt", r"data/images_box\.txt is not there, or cannot be read; give .*"),
        ("flowers", "imagelabels.mat", r"imagelabels\.mat is not there, or cannot be read; give .*"),
    ],
)
def test_anything_less_than_all_is_refused(made, name, pattern, line):
    root = made(name)
    without(root, pattern)
    with pytest.raises(UserError, match=rf"^dataset\.root=.*: {line}$"):
        load(name, root)


def test_a_table_of_another_md5_is_not_opened(made):
    root = made("flowers")
    (root / "imagelabels.mat").write_bytes(b"MATLAB")
    with pytest.raises(UserError, match="is not as published, by its MD5"):
        load("flowers", root)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^dataset\.root=.*: no DTD in it; give the folder dtd of DTD, with images"):
        load("dtd", tmp_path)
