"""CIFAR-FS and FC100 out of archives in CIFAR-100's own format, as Python 2 pickled it."""

import io
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import FINE, know, make_cifar100, picture, serving
from PIL import Image
from torchvision.datasets import CIFAR100

from fewshot.data import published
from fewshot.data.__main__ import main
from fewshot.data.sources import cifar
from fewshot.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def root(tmp_path, monkeypatch):
    make_cifar100(tmp_path / "cifar100", monkeypatch)
    return tmp_path / "cifar100"


@pytest.fixture
def load(tmp_path):
    def load(root, name="cifarfs", size=32, channels=3, cache="cache"):
        root = None if root is None else str(root)
        return cifar.load(name=name, root=root, size=size, channels=channels, cache=str(tmp_path / cache))

    return load


def same(one, other):
    return all(torch.equal(one[s].images, other[s].images) and one[s].names == other[s].names for s in one)


@pytest.mark.parametrize(("name", "counts"), [("cifarfs", [64, 16, 20]), ("fc100", [60, 20, 20])])
def test_every_class_has_its_own_images_of_both_batches(root, load, name, counts):
    splits = load(root, name)
    assert [len(split.names) for split in splits.values()] == counts
    assert sorted(label for split in splits.values() for label in split.names) == FINE
    for split in splits.values():
        assert split.offsets.tolist() == list(range(0, 3 * len(split.names) + 1, 3))
        expected = [picture(FINE.index(label), number) for label in split.names for number in (0, 1, 2)]
        assert np.array_equal(split.images.numpy(), np.stack(expected))


def test_cifarfs_has_bertinettos_classes(root, load):
    splits = load(root)
    assert splits["val"].names[:4] == ("beaver", "beetle", "butterfly", "camel")
    assert {"baby", "worm", "rocket"} <= set(splits["test"].names)


def test_fc100_never_has_a_superclass_in_two_splits(root, load):
    with tarfile.open(root / CIFAR100.filename) as archive:  # its own superclasses, not ours
        train = published.unpickle(archive.extractfile(f"{CIFAR100.base_folder}/train"))
    kind = {FINE[fine]: coarse for fine, coarse in zip(train["fine_labels"], train["coarse_labels"], strict=True)}
    kinds = {name: {kind[label] for label in split.names} for name, split in load(root, "fc100").items()}
    # Oreshkin et al. 2018, supplementary material and code, by the number of the superclass
    expected = {"train": {1, 2, 3, 4, 5, 6, 9, 10, 15, 17, 18, 19}, "val": {8, 11, 13, 16}, "test": {0, 7, 12, 14}}
    assert kinds == expected


def test_an_archive_and_what_is_in_it_give_the_same(root, load, tmp_path):
    places = [root / CIFAR100.filename, root, root / CIFAR100.base_folder]
    splits = [load(place, cache=f"cache{number}") for number, place in enumerate(places)]
    (tmp_path / "torchvision").mkdir()
    (root / CIFAR100.base_folder).rename(tmp_path / "torchvision" / CIFAR100.base_folder)
    splits.append(load(tmp_path / "torchvision", cache="cache9"))
    assert all(same(splits[0], other) for other in splits[1:])


def test_another_size_and_grey(root, load):
    small = load(root, size=16)["val"].images[0]
    beaver = Image.fromarray(picture(FINE.index("beaver"), 0).transpose(1, 2, 0))
    assert np.array_equal(small, np.asarray(beaver.resize((16, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1))
    grey = load(root, channels=1)["val"].images
    assert grey.shape[1:] == (1, 32, 32)
    red, green, blue = picture(FINE.index("beaver"), 0).astype(float)
    assert np.abs(grey[0, 0].numpy() - (0.299 * red + 0.587 * green + 0.114 * blue)).max() < 1


def test_the_second_load_reads_the_cache(root, load, monkeypatch):
    first = load(root)
    monkeypatch.setattr(published, "unpickle", lambda file: pytest.fail("read again"))
    assert same(load(root), first)


def test_downloads_once(root, load, monkeypatch, tmp_path):
    with serving(root) as server:
        monkeypatch.setattr(CIFAR100, "url", f"{server.address}/{CIFAR100.filename}")
        server.breaks = [5000]
        splits = load(None)
        assert server.asked == [None, "bytes=5000-"]
    assert same(load(None, "cifarfs"), splits)  # no server any more
    assert len(load(None, "fc100")["train"].names) == 60
    assert [path.name for path in (tmp_path / "cache" / "cifar100").iterdir()] == [CIFAR100.filename]


# What cannot be right


def test_files_with_another_checksum_are_never_unpickled(root, load, monkeypatch):
    unpickle, base = published.unpickle, root / CIFAR100.base_folder
    for name in ("meta", "test", "train"):  # the last that is read comes first
        with open(base / name, "ab") as file:
            file.write(b".")

        def checked(file, name=name):
            assert not file.name.endswith(f"/{name}")
            return unpickle(file)

        monkeypatch.setattr(published, "unpickle", checked)
        message = (
            rf"^dataset\.root=.*: {name} is not as {CIFAR100.url} .*{name} has the MD5 .* instead of .*; get it again"
        )
        with pytest.raises(UserError, match=message):
            load(base)


def test_a_pickle_that_would_run_something_does_not(root, load, monkeypatch, tmp_path):
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR."
    (root / CIFAR100.base_folder / "train").write_bytes(evil)
    know(root, monkeypatch)
    with pytest.raises(UserError, match=r"^dataset\.root=.*it asks for (os|posix)\.system, which no images need.*$"):
        load(root / CIFAR100.base_folder)
    assert not (tmp_path / "owned").exists()


def test_a_truncated_archive_is_one_line(root, load):
    path = root / CIFAR100.filename
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"^dataset\.root=.*: .* is not as .*cifar-100.* has it .*; get it again.*$"):
        load(path)


def test_an_archive_with_another_checksum_is_never_opened(root, load, monkeypatch):
    """What a header of it says can take all memory."""
    monkeypatch.setattr(published.tarfile, "open", lambda *_, **__: pytest.fail("opened"))
    with open(root / CIFAR100.filename, "ab") as file:
        file.write(b"\0")
    with pytest.raises(
        UserError, match=rf"^dataset\.root=.*\(ValueError: {CIFAR100.filename} has the MD5 .* instead of .*$"
    ):
        load(root / CIFAR100.filename)


def test_an_archive_of_something_else_is_one_line(root, load):
    path = root / "other.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("notes.txt"), io.BytesIO())
    with pytest.raises(UserError, match=r"^dataset\.root=.*: .* is not as .*cifar-100.* has it .*$"):
        load(path)


# In folders


@pytest.fixture
def tree(tmp_path):
    """train|val|test/CLASS/image of CIFAR-FS."""
    for split, labels in cifar.class_split("cifarfs").items():
        for label in labels:
            (tmp_path / "tree" / split / label).mkdir(parents=True)
            Image.new("RGB", (32, 32), (FINE.index(label), 0, 0)).save(tmp_path / "tree" / split / label / "1.png")
    return tmp_path / "tree"


@pytest.mark.slow
def test_a_folder_or_zip_of_images(tree, load, tmp_path, capsys):
    splits = load(tree)
    main(["list", f"dataset.cache={tmp_path / 'cache'}"])
    assert re.search(r"^cifarfs .* prepared, \d+ MB$", capsys.readouterr().out, re.MULTILINE)
    assert [FINE[red] for red in splits["val"].images[:, 0, 0, 0]] == list(splits["val"].names)
    with zipfile.ZipFile(tmp_path / "tree.zip", "w") as archive:
        for path in tree.rglob("*.png"):
            archive.write(path, path.relative_to(tree))
    assert same(load(tmp_path / "tree.zip"), splits)


def test_a_folder_of_other_classes_is_refused(tree, load):
    with pytest.raises(
        UserError, match=r"^dataset\.root=.*: train/ does not hold FC100's classes, .* dataset=folder .*$"
    ):
        load(tree, "fc100")
    (tree / "val" / "crab").rename(tree / "val" / "crabs")
    with pytest.raises(
        UserError, match=r"^dataset\.root=.*: val/ .* CIFAR-FS's classes, but differs in crab, crabs; .*$"
    ):
        load(tree)


def test_the_facts_add_up():
    superclasses = cifar.FACTS["superclasses"]
    assert list(superclasses) == sorted(superclasses) and all(len(labels) == 5 for labels in superclasses.values())
    assert len(superclasses) == 20 and len(set(FINE)) == 100


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared CIFAR-FS is not here")
def test_the_real_cifarfs_has_these_classes():
    with zipfile.ZipFile(SHARED / "cifarfs.zip") as archive:
        classes = {tuple(name.split("/")[:2]) for name in archive.namelist() if name.endswith(".png")}
    assert classes == {(split, label) for split, labels in cifar.class_split("cifarfs").items() for label in labels}
