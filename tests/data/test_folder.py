"""Images in a folder or zip: which are found, and what becomes of their pixels."""

import hashlib
import io
import re
import shlex
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fewshot.data.sources import folder
from fewshot.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
FRACTIONS = {"train": 0.64, "val": 0.16, "test": 0.2}
CLASSES = {"train": ("apple", "bear"), "val": ("chair",), "test": ("dog",)}


def save(path, image=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (8, 8), (250, 10, 60))).save(path)


@pytest.fixture
def root(tmp_path):
    """Two images a class, each of one colour of its own."""
    colour = 0
    for split, labels in CLASSES.items():
        for label in labels:
            for number in (1, 2):
                colour += 20
                save(tmp_path / "photos" / split / label / f"{number}.png", Image.new("RGB", (8, 8), (colour, 0, 255)))
    return tmp_path / "photos"


@pytest.fixture
def load(tmp_path):
    def load(root, size=8, channels=3, **knobs):
        return folder.load(root=str(root), size=size, channels=channels, cache=str(tmp_path / "cache"), **knobs)

    return load


def zipped(root, inside=""):
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in root.rglob("*"):
            archive.write(file, inside + file.relative_to(root).as_posix())
    return path


def loaded_image(root, load, image, name="0.png", **knobs):
    """What becomes of one image: the first of the first class."""
    save(root / "train" / "apple" / name, image)
    return load(root, **knobs)["train"].images[0]


def test_classes_in_order_and_images_in_theirs(root, load):
    splits = load(root)
    assert {name: split.names for name, split in splits.items()} == CLASSES
    assert splits["train"].images.shape == (4, 3, 8, 8)
    assert splits["train"].images.dtype == torch.uint8
    assert splits["train"].offsets.tolist() == [0, 2, 4]
    assert splits["train"].images[:, :, 0, 0].tolist() == [[20, 0, 255], [40, 0, 255], [60, 0, 255], [80, 0, 255]]


def test_a_zip_is_read_in_place_and_gives_the_same(root, load):
    for path in (zipped(root), zipped(root, "photos/")):
        before = sorted(root.parent.iterdir())
        splits = load(path)
        assert sorted(set(root.parent.iterdir()) - {root.parent / "cache"}) == [p for p in before if p.name != "cache"]
        for name, split in load(root).items():
            assert torch.equal(splits[name].images, split.images)
            assert splits[name].names == split.names


def test_an_enclosing_folder_is_looked_through(root, load):
    assert load(root.parent)["val"].names == ("chair",)


def test_what_is_no_image_is_skipped(root, load):
    expected = load(root)
    for junk in ("train/apple/notes.txt", "train/apple/Thumbs.db", "train/apple/.hidden.png", "train/.DS_Store"):
        (root / junk).write_text("no image")
    (root / "val" / "__MACOSX").mkdir()
    (root / "val" / "__MACOSX" / "1.png").touch()
    for source in (root, zipped(root)):
        for name, split in load(source).items():
            assert torch.equal(split.images, expected[name].images)


@pytest.mark.parametrize("name", ["0.jpg", "0.JPEG", "0.gif", "0.bmp", "0.webp", "0.tif", "0.ppm"])
def test_formats(root, load, name):
    assert loaded_image(root, load, Image.new("RGB", (8, 8), "white"), name).min() >= 250


def test_an_image_of_the_right_size_keeps_its_pixels(root, load):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(loaded_image(root, load, Image.fromarray(pixels)), pixels.transpose(2, 0, 1))


@pytest.mark.parametrize("wide", [True, False])
def test_the_middle_square_is_kept(root, load, wide):
    pixels = np.zeros((16, 48), dtype=np.uint8)
    pixels[:, 16:32] = np.random.default_rng(0).integers(0, 256, (16, 16))
    image = Image.fromarray(pixels if wide else pixels.T)
    middle = pixels[:, 16:32] if wide else pixels[:, 16:32].T
    assert np.array_equal(loaded_image(root, load, image, size=16)[0], middle)


def test_shrinking_averages_instead_of_picking(root, load):
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    small = loaded_image(root, load, Image.fromarray(board.astype(np.uint8)))
    assert (small.int() - 127).abs().max() < 12


def test_colour_becomes_grey_and_grey_becomes_colour(root, load):
    grey = loaded_image(root, load, Image.new("RGB", (8, 8), (255, 0, 0)), channels=1)
    assert grey.shape == (1, 8, 8)
    assert (grey == 76).all()  # ITU-R 601 luma of red
    assert (loaded_image(root, load, Image.new("L", (8, 8), 99)) == 99).all()


def test_sixteen_bit_grey_is_scaled(root, load):
    values = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    image = loaded_image(root, load, Image.fromarray(values), size=2, channels=1)
    assert image.tolist() == [[[0, 100], [200, 255]]]


def test_photos_are_turned_upright(root, load):
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[0] = 255  # a white line on top, of a photo that was taken with the camera on its side
    exif = Image.Exif()
    exif[0x0112] = 6
    path = root / "train" / "apple" / "0.png"
    Image.fromarray(pixels).save(path, exif=exif)
    image = load(root)["train"].images[0]
    assert (image[:, :, -1] == 255).all()
    assert (image[:, :, :-1] == 0).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_show_white(root, load, mode):
    assert (loaded_image(root, load, Image.new(mode, (8, 8), 0)) == 255).all()


@pytest.mark.parametrize("name", ["0.gif", "0.png", "0.webp", "0.tif"])
def test_of_an_animation_the_first_frame_is_taken(root, load, name):
    (root / "train" / "apple" / name).parent.mkdir(exist_ok=True)
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black", "red")]
    frames[0].save(root / "train" / "apple" / name, save_all=True, append_images=frames[1:])
    with Image.open(root / "train" / "apple" / name) as written:
        assert written.n_frames == 3
    assert load(root)["train"].images[0].min() >= 250


# CLASS/image


def signature(splits):
    return {name: (split.names, split.offsets.tolist(), split.sha256) for name, split in splits.items()}


@pytest.fixture
def plain(tmp_path):
    """Ten classes in CLASS/image, two images each, one of them called as a split is."""
    for number, label in enumerate(("train", *"abcdefghi")):
        for image in (1, 2):
            save(tmp_path / "all" / "photos" / label / f"{image}.png", Image.new("RGB", (8, 8), (number, image, 0)))
    return tmp_path / "all" / "photos"


def test_classes_are_dealt_out_by_the_hash_of_their_names(plain, load):
    names = sorted((path.name for path in plain.iterdir()), key=lambda n: hashlib.sha256(b"3/" + n.encode()).digest())
    splits = load(plain, fractions=FRACTIONS, split_seed=3)
    assert splits["train"].names == tuple(sorted(names[:6]))
    assert splits["val"].names == tuple(sorted(names[6:8]))  # round(1.6)
    assert splits["test"].names == tuple(sorted(names[8:]))
    for split in splits.values():
        for name, image in zip(split.names, split.images[::2, :, 0, 0].tolist(), strict=True):
            assert image == [("train", *"abcdefghi").index(name), 1, 0]
    assert signature(load(plain, fractions=FRACTIONS, split_seed=4)) != signature(splits)


def test_a_plain_tree_may_be_a_zip_and_enclosed(plain, load):
    expected = signature(load(plain, fractions=FRACTIONS))
    (plain / "notes.txt").write_text("no image")
    (plain / "labels").mkdir()
    (plain / "labels" / "1.txt").write_text("no image")
    for path in (plain, plain.parent, zipped(plain), zipped(plain, "photos/")):
        assert signature(load(path, fractions=FRACTIONS)) == expected


names = st.lists(st.text(min_size=1, max_size=5), min_size=6, max_size=60, unique=True)
cuts = st.tuples(st.integers(1, 98), st.integers(1, 98)).filter(lambda cut: sum(cut) < 100)


@settings(max_examples=30)
@given(names, cuts, st.integers(0, 5), st.randoms())
def test_every_class_is_dealt_out_once_whatever_the_order(names, cut, seed, random):
    fractions = {"val": cut[0] / 100, "test": cut[1] / 100, "train": 1 - sum(cut) / 100}
    splits = folder.split_classes({name: [] for name in names}, fractions, seed, "")
    assert sorted(name for split in splits.values() for name in split) == sorted(names)
    assert all(len(split) >= 2 for split in splits.values())
    random.shuffle(names)
    assert splits == folder.split_classes({name: [] for name in names}, fractions, seed, "")


def test_the_usual_fractions_of_a_hundred_classes():
    splits = folder.split_classes({str(number): [] for number in range(100)}, FRACTIONS, 0, "")
    assert {name: len(split) for name, split in splits.items()} == {"train": 64, "val": 16, "test": 20}


def test_too_few_classes_to_be_split(plain, load):
    for label in "abcde":
        shutil.rmtree(plain / label)
    with pytest.raises(UserError, match=r"^dataset\.root=.*: 5 classes \(f, g, h and 2 more\); .*at least 6; .*$"):
        load(plain, fractions=FRACTIONS)


def test_too_few_classes_left_in_a_split_names_the_ways_that_would_do(plain, load):
    splits = load(plain, fractions=FRACTIONS)
    with pytest.raises(UserError) as error:
        load(in_splits(plain, splits), ways=3)
    assert re.match(r"ways=3: .* has 6 train, 2 val, 2 test classes; use ways=2; or train nothing: ", str(error.value))
    assert {len(split.names) for split in load(plain.parent / "dealt", ways=2).values()} == {6, 2}


def in_splits(plain, splits):
    for split, content in splits.items():
        for label in content.names:
            shutil.copytree(plain / label, plain.parent / "dealt" / split / label)
    return plain.parent / "dealt"


def test_too_few_classes_for_the_ways_names_fractions_that_would_do(plain, load):
    """The ten classes are dealt out as 6, 2 and 2."""
    with pytest.raises(UserError) as error:
        load(plain, fractions=FRACTIONS, ways=3)
    said = "^ways=3: dataset.root=.* has 10 classes, dealt out as 6 train, 2 val, 2 test; use ways=2, or (.*); "
    said += "or train nothing: python -m fewshot.predict model=omniglot-5w1s-zero tells any classes apart$"
    (word,) = shlex.split(re.match(said, str(error.value))[1])
    (override,) = OverridesParser.create().parse_overrides([word])
    assert override.key_or_group == "dataset.fractions" and sum(override.value().values()) == pytest.approx(1)
    splits = load(plain, fractions=override.value(), ways=3)
    assert {name: len(split.names) for name, split in splits.items()} == {"train": 4, "val": 3, "test": 3}
    with pytest.raises(UserError, match=r'use ways=2, or ways=3 "dataset.fractions='):  # 3 x 5 are more than there are
        load(plain, fractions=FRACTIONS, ways=5)


def test_a_dataset_with_a_split_of_its_own_is_never_split_here(plain, load):
    with pytest.raises(UserError, match=r"no classes in .*it must be .*train\|val\|test/CLASS/image$"):
        load(plain)


def test_small_classes_are_left_out_with_a_line_and_change_nothing_else(plain, load, caplog):
    before = load(plain, fractions=FRACTIONS)
    small, empty = before["train"].names[1], before["train"].names[4]
    (plain / small / "2.png").unlink()
    after = load(plain, fractions=FRACTIONS, shots=1, queries=1)
    [line] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    expected = f"dataset.root={plain}: classes with fewer than shots+queries=2 images are left out: train/{small} (1)"
    assert line == expected
    assert after["train"].names == tuple(name for name in before["train"].names if name != small)
    assert [after[name].sha256 for name in ("val", "test")] == [before[name].sha256 for name in ("val", "test")]
    caplog.clear()
    for label in "xyz":
        (plain.parent / "split" / "train" / label).mkdir(parents=True)
        for number in range(2 if label != "x" else 0):
            save(plain.parent / "split" / "train" / label / f"{number}.png")
    for split in ("val", "test"):
        shutil.copytree(plain / empty, plain.parent / "split" / split / split)
    assert load(plain.parent / "split", shots=1, queries=1)["train"].names == ("y", "z")
    assert "left out: train/x (0)" in caplog.text
    with pytest.raises(UserError, match=r"^shots\+queries=3: no class of train and val and test in .*lower shots.*$"):
        load(plain.parent / "split", shots=1, queries=2)


def test_images_in_two_splits_are_told_every_time(root, load, caplog):
    load(root)
    assert not caplog.records
    shutil.copy(root / "train" / "apple" / "1.png", root / "test" / "dog" / "7.png")
    with Image.open(root / "train" / "bear" / "1.png") as image:
        image.save(root / "val" / "chair" / "5.bmp")  # other bytes, the same pixels
    for _ in range(2):
        caplog.clear()
        load(root)
        [record] = [record for record in caplog.records if record.levelname == "WARNING"]
        assert record.message == (
            "the same pixels in two splits, 2 times: val/chair/5.bmp = train/bear/1.png, "
            "test/dog/7.png = train/apple/1.png"
        )


def test_copies_within_a_split_are_told_every_time(root, load, caplog):
    """They can be support and query of one task."""
    for copied in ("bear/3.png", "bear/4.png", "apple/5.png"):
        shutil.copy(root / "train" / "bear" / "1.png", root / "train" / copied)
    for source in (root, root, zipped(root)):
        caplog.clear()
        load(source)
        [record] = [record for record in caplog.records if record.levelname == "WARNING"]
        assert record.getMessage() == (
            "the same pixels twice in one split, 3 times: train/bear/1.png = train/apple/5.png, "
            "train/bear/3.png = train/apple/5.png, train/bear/4.png = train/apple/5.png"
        )


def test_the_sum_of_a_split_is_of_its_pixels_wherever_they_lie(root, load):
    splits = load(root)
    for split in splits.values():
        assert split.sha256 == hashlib.sha256(split.images.numpy().tobytes()).hexdigest()
    assert signature(load(zipped(root))) == signature(splits)
    shutil.copytree(root, root.parent / "elsewhere")
    assert signature(load(root.parent / "elsewhere")) == signature(splits)
    assert len({split.sha256 for split in splits.values()}) == 3


# What cannot be right


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        *((content, "not an image") for content in (b"", b"text", b"%!PS-Adobe-3.0 EPSF-3.0")),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n", "not an image"),  # Ghostscript's
    ],
)
@pytest.mark.parametrize("make", [lambda root: root, zipped])
def test_an_unreadable_image_is_named(root, load, make, content, reason):
    (root / "val" / "chair" / "3.jpg").write_bytes(content)
    source = make(root)
    with pytest.raises(UserError, match=rf"^dataset\.root={source}: cannot read image 'val/chair/3\.jpg': {reason}.*$"):
        load(source)


def test_a_truncated_image_is_named(root, load):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "JPEG")
    (root / "val" / "chair" / "3.jpg").write_bytes(buffer.getvalue()[:2000])
    with pytest.raises(UserError, match=r"^dataset\.root=.*'val/chair/3\.jpg': .*truncated.*; replace or remove it$"):
        load(root)


def test_all_unreadable_images_are_told_at_once(root, load):
    for name in ("train/apple/2.png", "train/bear/0.png", "val/chair/1.png", "test/dog/1.png"):
        (root / name).write_bytes(b"no image")
    with pytest.raises(UserError) as error:
        load(root)
    reason = "not an image in a format that Pillow knows"
    assert str(error.value) == (
        f"dataset.root={root}: cannot read 4 images: 'train/apple/2.png': {reason}, 'train/bear/0.png': {reason}, "
        f"'val/chair/1.png': {reason} and 1 more; replace or remove them"
    )
    assert not list((root.parent / "cache").iterdir())


def test_a_file_that_unpacks_to_a_flood_is_one_line(root, load, monkeypatch):
    monkeypatch.setattr("fewshot.data.folder_or_zip.LARGEST_FILE", 10)
    with pytest.raises(UserError, match=r"^dataset\.root=.*: it unpacks to \d+ bytes.*$"):
        load(zipped(root))
    with pytest.raises(UserError, match=r"^dataset\.root=.*: it has \d+ bytes.*$"):
        load(root)


@pytest.mark.parametrize("name", ["../train/x/1.png", "/train/x/1.png", "train\\..\\1.png", "C:\\train\\1.png"])
def test_a_zip_with_paths_that_lead_out_is_refused(root, load, name):
    path = zipped(root)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, b"")
    with pytest.raises(UserError, match=r"^dataset\.root=.*photos\.zip: unsafe path .*$"):
        load(path)


def test_a_truncated_zip(root, load):
    path = zipped(root)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"^dataset\.root=.*photos\.zip: not a whole zip file .*$"):
        load(path)


def test_a_missing_split(root, load):
    shutil.rmtree(root / "val")
    with pytest.raises(UserError, match=r"^dataset\.root=.*photos: no classes in val/; it must be .*CLASS/image$"):
        load(root)


@pytest.mark.parametrize("make", [lambda root: root, zipped])
@pytest.mark.parametrize(("names", "more"), [("efg", ""), ("efghi", " and 2 more")])
def test_a_class_with_no_images(root, load, make, names, more):
    for name in names:
        (root / "train" / name).mkdir()
    with pytest.raises(UserError, match=rf"^dataset\.root=.*: no images in train/e, train/f, train/g{more}; .*$"):
        load(make(root))


def test_a_class_in_two_splits(root, load):
    shutil.copytree(root / "train" / "bear", root / "test" / "bear")
    with pytest.raises(UserError, match=r"^dataset\.root=.*: train/ and test/ share bear; .*$"):
        load(root)


def test_an_absent_root_and_an_empty_one(tmp_path, load):
    with pytest.raises(UserError, match=r"^dataset\.root=.*absent: no such file or folder; .*$"):
        load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^dataset\.root=.*empty: no classes in train/, val/, test/; .*$"):
        load(tmp_path / "empty")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared CIFAR-FS is not here")
def test_real_cifarfs(cache):
    splits = folder.load(root=str(SHARED / "cifarfs.zip"), size=32, channels=3, cache=str(cache))
    assert {name: len(split.names) for name, split in splits.items()} == {"train": 64, "val": 16, "test": 20}
    assert splits["train"].images.shape == (12800, 3, 32, 32)
    assert (splits["test"].counts == 200).all()
    mean = splits["train"].images.double().mean(dim=(0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.507, 0.487, 0.441], dtype=torch.double), atol=0.03)  # CIFAR-100's


@pytest.mark.parametrize(
    "root, name",
    {
        "photos": "photos",
        "photos/": "photos",
        "a/My Photos (2).zip": "My-Photos-2",
        "v1.5": "v1.5",
        "7": "7",
        "\u5199" * 80: "\u5199" * 56,
    }.items(),
)
def test_a_dataset_is_called_as_its_folder_or_zip_is(root, name, config):
    cfg = config("dataset=folder", f"dataset.root='{root}'")
    assert cfg.dataset.name == cfg.dataset.source.name == name
    assert config("dataset=folder").dataset.name == "folder"
    assert config("dataset=folder", f"dataset.root='{root}'", "dataset.name=mine").dataset.name == "mine"
