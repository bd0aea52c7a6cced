"""miniImageNet and tieredImageNet out of files in the formats that learn2learn reads, compared with learn2learn."""

import hashlib
import inspect
import io
import json
import os
import pickle
import tarfile
import weakref
import zipfile

import numpy as np
import pytest
import torch
from data_files import MINI, MODES, make_mini, make_tiered, serving
from learn2learn.vision.datasets import MiniImagenet, TieredImagenet
from PIL import Image

from fewshot.data import published
from fewshot.data.sources import imagenet
from fewshot.errors import UserError


@pytest.fixture
def load(tmp_path):
    def load(root, which="miniimagenet", classes=MINI, size=84, channels=3, trust=True, cache="cache"):
        root = None if root is None else str(root)
        knobs = {"size": size, "channels": channels, "trust": trust, "cache": str(tmp_path / cache)}
        return getattr(imagenet, which)(root=root, classes=classes, **knobs)

    return load


def same(one, other):
    return all(torch.equal(one[s].images, other[s].images) and one[s].names == other[s].names for s in one)


def contents(images):
    """Whatever their order."""
    return sorted(np.asarray(image, dtype=np.uint8).tobytes() for image in images)


def by_class(split):
    return [contents(images) for images in split.images.split(split.counts.tolist())]


# The same images as in learn2learn


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_mini_pickles_as_learn2learn_reads_them(tmp_path, load, protocol):
    root = make_mini(tmp_path / "mini", protocol=protocol)
    splits = load(root)
    for split, mode in MODES.items():
        theirs = MiniImagenet(str(root), mode)
        order = list(theirs.data["class_dict"])
        assert list(splits[split].names) == sorted(order)
        for number, images in enumerate(by_class(splits[split])):
            expected = theirs.x[torch.from_numpy(theirs.y == order.index(splits[split].names[number]))]
            assert images == contents(expected)


def test_tiered_pickles_as_learn2learn_reads_them(tmp_path, load):
    make_tiered(tmp_path / "root" / "tiered-imagenet")
    splits = load(tmp_path / "root", "tieredimagenet")
    assert splits["train"].names == ("000 crane", "001 crane", "002 crane")
    for split, mode in MODES.items():
        theirs = TieredImagenet(str(tmp_path / "root"), mode)
        for number, images in enumerate(by_class(splits[split])):
            assert images == contents(
                np.asarray(image).transpose(2, 0, 1) for image, label in theirs if label == number
            )


def test_addresses_are_learn2learns():
    for theirs, files, prefix in (
        (MiniImagenet, imagenet.MINI_FILES, ""),
        (TieredImagenet, imagenet.TIERED_FILES, "tiered-imagenet-"),
    ):
        source = inspect.getsource(theirs)
        for names in files.values():
            assert f"'{published.ZENODO}/record/{imagenet.RECORD}/files/{prefix}{names[0]}'" in source


# Other places and forms


def test_where_the_pickles_may_be(tmp_path, load):
    make_mini(tmp_path / "mini")
    expected = load(tmp_path / "mini")
    (tmp_path / "mini" / "mini-imagenet-cache-validation.pkl").rename(tmp_path / "mini" / "mini-imagenet-cache-val.pkl")
    assert same(load(tmp_path / "mini", cache="2"), expected)
    with tarfile.open(tmp_path / "mini-imagenet.tar.gz", "w:gz", compresslevel=1) as archive:
        archive.add(tmp_path / "mini", "mini")
    assert same(load(tmp_path / "mini-imagenet.tar.gz", cache="3"), expected)

    expected = load(make_tiered(tmp_path / "tiered"), "tieredimagenet")
    make_tiered(tmp_path / "from_zenodo", prefix="tiered-imagenet-")
    assert same(load(tmp_path / "from_zenodo", "tieredimagenet"), expected)
    with tarfile.open(tmp_path / "tiered-imagenet.tar", "w") as archive:
        archive.add(tmp_path / "tiered", "tiered-imagenet")
    assert same(load(tmp_path / "tiered-imagenet.tar", "tieredimagenet"), expected)


@pytest.fixture
def photos(tmp_path):
    """images/ and Ravi and Larochelle's tables; every class of one colour of its own."""
    colour, root = 0, tmp_path / "photos"
    (root / "images").mkdir(parents=True)
    for split, count in MINI.items():
        rows = ["filename,label"]
        for _ in range(count):
            colour += 30
            for image in (1, 2):
                name = f"n{colour:08d}{image:08d}.jpg"
                Image.new("RGB", (100, 84), (colour, 0, 0)).save(root / "images" / name, quality=95)
                rows.append(f"{name},n{colour:08d}")
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return root


def test_photos_with_tables(photos, load, tmp_path):
    splits = load(photos, trust=False)
    assert splits["train"].names == ("n00000030", "n00000060", "n00000090")
    assert splits["test"].names == ("n00000150", "n00000180") and splits["test"].images.shape == (4, 3, 84, 84)
    reds = splits["train"].images[:, 0].float().mean(dim=(1, 2))
    assert torch.allclose(reds, torch.tensor([30.0, 30, 60, 60, 90, 90]), atol=2)
    for inside in ("", "mini/"):
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
            for path in photos.rglob("*.*"):
                archive.write(path, inside + path.relative_to(photos).as_posix())
        assert same(load(tmp_path / "photos.zip", trust=False), splits)


def test_a_changed_table_is_noticed(photos, load):
    load(photos)
    table = photos / "test.csv"
    table.write_text(table.read_text().replace("n00000180\n", "n00000181\n"))
    assert load(photos)["test"].names == ("n00000150", "n00000181")


def test_other_pixels_in_a_pickle_of_as_many_bytes_are_noticed(tmp_path, load):
    path = make_mini(tmp_path / "mini") / "mini-imagenet-cache-test.pkl"
    data, sums = pickle.loads(path.read_bytes()), []
    for number in (0, 1):
        path.write_bytes(pickle.dumps(data | {"image_data": data["image_data"] ^ np.uint8(number)}))
        os.utime(path, (10**9 + number, 10**9 + number))
        sums.append(load(path.parent)["test"].sha256)
    assert sums[0] != sums[1]


def test_tables_that_do_not_fit_are_one_line(photos, load):
    (photos / "images" / "n0000003000000001.jpg").unlink()
    with pytest.raises(UserError, match=r"^dataset\.root=.*: images/ lacks n0000003000000001\.jpg of train\.csv; .*$"):
        load(photos)
    (photos / "train.csv").write_text("file\n1.jpg\n")
    with pytest.raises(UserError, match=r"^dataset\.root=.*: no train\.csv with filename,label in it \(.*\); give .*$"):
        load(photos)
    (photos / "train.csv").unlink()
    with pytest.raises(UserError, match=r"^dataset\.root=.*: no train\.csv .*mini-imagenet-cache-train\.pkl.*$"):
        load(photos)


def test_another_size_and_grey(tmp_path, load):
    make_mini(tmp_path / "mini")
    make_tiered(tmp_path / "tiered")
    data = pickle.loads((tmp_path / "mini" / "mini-imagenet-cache-validation.pkl").read_bytes())
    (png, *_) = pickle.loads((tmp_path / "tiered" / "val_images_png.pkl").read_bytes())
    pictures = {"mini": Image.fromarray(data["image_data"][0]), "tiered": Image.open(io.BytesIO(bytes(png)))}
    for name, picture in pictures.items():
        images = load(tmp_path / name, f"{name}imagenet", size=42, channels=1)["val"].images
        expected = np.asarray(picture.convert("L").resize((42, 42), Image.Resampling.BILINEAR))
        assert images.shape == (2, 1, 42, 42) and any(np.array_equal(image, expected) for image in images[:, 0])


@pytest.mark.parametrize("which", ["miniimagenet", "tieredimagenet"])
def test_other_numbers_of_classes_are_refused(tmp_path, load, which):
    root = (make_mini if which == "miniimagenet" else make_tiered)(tmp_path / "root", {"train": 3, "val": 2, "test": 1})
    with pytest.raises(UserError, match=r"^dataset\.root=.*: 2 val classes instead of 1; .*$"):
        load(root, which)


def test_nothing_there_is_one_line(tmp_path, load):
    with pytest.raises(UserError, match=r"^dataset\.root=.*absent: no such file or folder.*$"):
        load(tmp_path / "absent")
    with pytest.raises(
        UserError, match=r"^dataset\.root=.*absent: no tieredImageNet in it; give tiered-imagenet\.tar.*$"
    ):
        load(tmp_path / "absent", "tieredimagenet")


# Trust


@pytest.mark.parametrize("which", ["miniimagenet", "tieredimagenet"])
def test_an_unknown_checksum_is_not_unpickled_unless_trusted(tmp_path, load, monkeypatch, which):
    root = (make_mini if which == "miniimagenet" else make_tiered)(tmp_path / "root")
    with monkeypatch.context() as patch:
        patch.setattr(published, "unpickle", lambda file: pytest.fail("unpickled"))
        with pytest.raises(
            UserError, match=r"^dataset\.trust=false: .*\.pkl holds pickles, .* MD5 .* dataset\.trust=true .*$"
        ):
            load(root, which, trust=False)
    trusted = load(root, which)
    assert same(load(root, which, trust=False), trusted)  # from the cache, where nothing is unpickled


@pytest.mark.parametrize("packed", [False, True])
def test_a_known_checksum_needs_no_trust(tmp_path, load, monkeypatch, packed):
    root = make_tiered(tmp_path / "tiered-imagenet")
    if packed:
        root = tmp_path / "tiered-imagenet.tar"
        with tarfile.open(root, "w") as archive:
            archive.add(tmp_path / "tiered-imagenet", "tiered-imagenet")
    paths = [root] if packed else root.iterdir()
    monkeypatch.setattr(imagenet, "MD5S", {hashlib.md5(path.read_bytes()).hexdigest() for path in paths})
    assert len(load(root, "tieredimagenet", trust=False)["train"].names) == 3
    with open(root if packed else root / "val_labels.pkl", "ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match=r"^dataset\.trust=false: "):
        load(root, "tieredimagenet", trust=False)


class Evil:
    def __reduce__(self):
        return (print, ("owned",))


@pytest.mark.parametrize(
    "content",
    [
        Evil(),
        {"image_data": Evil()},
        3,
        {"image_data": [1], "class_dict": {}},
        {"image_data": np.zeros((2, 84, 84, 3))},
    ],
)
def test_a_trusted_pickle_of_something_else_is_one_line_and_runs_nothing(tmp_path, load, capsys, content):
    root = make_mini(tmp_path / "mini")
    (root / "mini-imagenet-cache-train.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"^dataset\.root=[^\n]*train[^\n]* is not as learn2learn has it [^\n]*$"):
        load(root)
    assert "owned" not in capsys.readouterr().out


def test_images_that_are_none_are_one_line(tmp_path, load):
    mini, tiered = make_mini(tmp_path / "mini"), make_tiered(tmp_path / "tiered")
    path = mini / "mini-imagenet-cache-test.pkl"
    data = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(data | {"class_dict": {"a": [0], "b": [4]}}))  # of four
    with pytest.raises(
        UserError,
        match=r"^dataset\.root=.*mini: test is not as learn2learn has it .*; get it again, or leave dataset.root out$",
    ):
        load(mini)
    path = tiered / "val_images_png.pkl"
    for files in ([b"no PNG"] * 2, [b"no PNG"]):
        path.write_bytes(pickle.dumps(files))
        with pytest.raises(UserError, match=r"^dataset\.root=.*tiered: val is not as learn2learn has it .*$"):
            load(tiered, "tieredimagenet")
    assert not list((tmp_path / "cache").iterdir())


def test_the_files_of_one_split_at_a_time_are_in_memory(tmp_path, load, monkeypatch):
    class Files(list):
        pass

    def unpickled(file):
        content = unpickle(file)
        if isinstance(content, list):
            assert not [files for files in seen if files() is not None]
            content = Files(content)
            seen.append(weakref.ref(content))
        return content

    unpickle, seen = published.unpickle, []
    monkeypatch.setattr(published, "unpickle", unpickled)
    load(make_tiered(tmp_path / "tiered"), "tieredimagenet")
    assert len(seen) == 3


def test_a_truncated_pickle_is_one_line(tmp_path, load):
    path = make_mini(tmp_path / "mini") / "mini-imagenet-cache-test.pkl"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(UserError, match=r"^dataset\.root=.*mini: mini-imagenet-cache-test\.pkl is not as .*; get it "):
        load(path.parent)


# Downloading


@pytest.fixture
def publish(tmp_path):
    """publish(folder): Zenodo with what is in the folder, on this machine."""

    def publish(folder):
        record = tmp_path / "zenodo" / "record" / str(imagenet.RECORD) / "files"
        record.parent.mkdir(parents=True)
        folder.rename(record)
        files = [
            {"key": path.name, "checksum": f"md5:{hashlib.md5(path.read_bytes()).hexdigest()}"}
            for path in record.iterdir()
        ]
        (tmp_path / "zenodo" / "api" / "records").mkdir(parents=True)
        (tmp_path / "zenodo" / "api" / "records" / str(imagenet.RECORD)).write_text(json.dumps({"files": files}))
        return serving(tmp_path / "zenodo")

    return publish


@pytest.mark.parametrize("which", ["miniimagenet", "tieredimagenet"])
def test_downloads_once_and_only_what_is_known_or_trusted(tmp_path, load, monkeypatch, publish, which):
    make = make_mini if which == "miniimagenet" else lambda folder: make_tiered(folder, prefix="tiered-imagenet-")
    expected = load(make(tmp_path / "folder"), which, cache="other")
    with publish(tmp_path / "folder") as server:
        monkeypatch.setattr(published, "ZENODO", server.address)
        with pytest.raises(UserError, match=r"^dataset\.trust=false: http:.*\.pkl holds pickles, .*$"):
            load(None, which, trust=False)
        assert len(server.asked) == 1  # the checksums, no file
        assert same(load(None, which), expected)
        assert len(server.asked) == (5 if which == "miniimagenet" else 8)
    assert same(load(None, which), expected)  # no server any more


def test_no_network_is_one_line(load, monkeypatch):
    with serving(".") as server:
        pass
    monkeypatch.setattr(published, "ZENODO", server.address)
    with pytest.raises(UserError, match=r"^dataset\.root=null: downloading miniImageNet .* failed .*; try again.*$"):
        load(None)
