"""Images in a folder or zip: which are found, and what becomes of their pixels."""

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewshot.config import UserError
from fewshot.data import folder

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
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
    def load(root, size=8, channels=3):
        root = None if root is None else str(root)
        return folder.load(root=root, size=size, channels=channels, cache=str(tmp_path / "cache"))

    return load


def zipped(root, inside=""):
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in root.rglob("*"):
            archive.write(file, inside + file.relative_to(root).as_posix())
    return path


def loaded_image(root, load, image, name="0.png", **how):
    """What becomes of one image: the first of the first class."""
    save(root / "train" / "apple" / name, image)
    return load(root, **how)["train"].images[0]


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


def test_transparent_pixels_show_white(root, load):
    assert (loaded_image(root, load, Image.new("RGBA", (8, 8), (0, 0, 0, 0))) == 255).all()


# What cannot be right


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "not an image"), (b"text", "not an image"), (b"%!PS-Adobe-3.0 EPSF-3.0", "not an image")],
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


def test_a_decompression_bomb_is_one_line(root, load, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    save(root / "val" / "chair" / "3.png", Image.new("L", (40, 40)))
    with pytest.raises(UserError, match=r"^dataset\.root=.*'val/chair/3\.png': .*decompression bomb.*$"):
        load(root)


def test_a_file_that_unpacks_to_a_flood_is_one_line(root, load, monkeypatch):
    monkeypatch.setattr("fewshot.data.images.LARGEST_FILE", 10)
    with pytest.raises(UserError, match=r"^dataset\.root=.*: it unpacks to \d+ bytes; .*$"):
        load(zipped(root))


@pytest.mark.parametrize("name", ["../train/x/1.png", "/train/x/1.png", "train\\x\\1.png", "C:/train/x/1.png"])
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
def test_a_class_with_no_images(root, load, make):
    for name in "efghi":
        (root / "train" / name).mkdir()
    with pytest.raises(UserError, match=r"^dataset\.root=.*: no images in train/e, train/f, train/g and 2 more; .*$"):
        load(make(root))


def test_a_class_in_two_splits(root, load):
    shutil.copytree(root / "train" / "bear", root / "test" / "bear")
    with pytest.raises(UserError, match=r"^dataset\.root=.*: train/ and test/ share bear; .*$"):
        load(root)


def test_no_root_an_absent_one_and_an_empty_one(tmp_path, load):
    with pytest.raises(UserError, match=r"^dataset\.root=null: .*set dataset\.root to .*train\|val\|test/CLASS/image$"):
        load(None)
    with pytest.raises(UserError, match=r"^dataset\.root=.*absent: no such file or folder; .*$"):
        load(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^dataset\.root=.*empty: no classes in train/, val/, test/; .*$"):
        load(tmp_path / "empty")


def test_channels_that_no_image_has(root, load):
    with pytest.raises(UserError, match=r"^dataset\.channels=2: give 1 .*$"):
        load(root, channels=2)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared CIFAR-FS is not here")
def test_real_cifarfs(load):
    splits = load(SHARED / "cifarfs.zip", size=32)
    assert {name: len(split.names) for name, split in splits.items()} == {"train": 64, "val": 16, "test": 20}
    assert splits["train"].images.shape == (12800, 3, 32, 32)
    assert (splits["test"].counts == 200).all()
    mean = splits["train"].images.double().mean(dim=(0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([0.507, 0.487, 0.441], dtype=torch.double), atol=0.03)  # CIFAR-100's
