"""Omniglot on disk, and the cache that all image sources share."""

import copy
import fcntl
import functools
import hashlib
import http.server
import itertools
import logging
import shutil
import threading
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.datasets.omniglot import Omniglot

from fewshot.data import cache as cache_module
from fewshot.data.sources import omniglot
from fewshot.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "omniglot"
SMALL = {
    "characters": {"images_background": {"Greek": 3, "Hebrew": 2}, "images_evaluation": {"Gurmukhi": 2, "ULOG": 1}},
    "val": {"Hebrew": [1, 2]},
    "test": {"Gurmukhi": [2, 2], "ULOG": [1, 1]},
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A small Omniglot, extracted: every drawing a black line of its own on white."""
    monkeypatch.setattr(omniglot, "FACTS", SMALL)
    identity = itertools.count(1)
    for part, alphabets in SMALL["characters"].items():
        for alphabet, characters in alphabets.items():
            for character in range(1, characters + 1):
                folder = tmp_path / "omniglot" / part / alphabet / f"character{character:02d}"
                folder.mkdir(parents=True)
                number = next(identity)
                for drawing in range(1, 21):
                    image = Image.new("1", (105, 105), 1)
                    ImageDraw.Draw(image).line((20, 10 * number, 40 + 2 * drawing, 80), fill=0, width=4)
                    image.save(folder / f"{number:04d}_{drawing:02d}.png")
    return tmp_path / "omniglot"


@pytest.fixture
def load(tmp_path):
    def load(root, size=28, cache=tmp_path / "cache", **knobs):
        return omniglot.load(root=None if root is None else str(root), size=size, cache=str(cache), **knobs)

    return load


def zip_part(root, part):
    with zipfile.ZipFile(root / f"{part}.zip", "w") as archive:
        for path in sorted((root / part).rglob("*.png")):
            archive.write(path, path.relative_to(root))
    shutil.rmtree(root / part)


def same(one, other):
    return all(
        torch.equal(one[split].images, other[split].images)
        and torch.equal(one[split].offsets, other[split].offsets)
        and one[split].names == other[split].names
        for split in ("train", "val", "test")
    )


def test_classes_go_where_the_split_says(root, load):
    splits = load(root)
    greek = [f"Greek/character0{n}" for n in (1, 2, 3)]
    assert splits["train"].names == (*greek, "Gurmukhi/character01")
    assert splits["val"].names == ("Hebrew/character01", "Hebrew/character02")
    assert splits["test"].names == ("Gurmukhi/character02", "ULOG/character01")
    assert splits["train"].offsets.tolist() == [0, 20, 40, 60, 80]
    assert splits["train"].images.shape == (80, 1, 28, 28)
    assert splits["train"].images.dtype == torch.uint8


def test_drawings_are_black_on_white_and_all_different(root, load):
    drawings = load(root)["train"].images
    assert (drawings[:, :, -1] == 255).all()
    assert (drawings.amin(dim=(1, 2, 3)) < 60).all()
    assert len(drawings.flatten(1).unique(dim=0)) == 80


def test_lake_keeps_background_and_evaluation_apart(root, load):
    splits = load(root, split="lake")
    assert splits["train"].names == tuple(f"Greek/character0{n}" for n in (1, 2, 3))
    assert splits["val"].names == ("Hebrew/character01", "Hebrew/character02")
    assert splits["test"].names == ("Gurmukhi/character01", "Gurmukhi/character02", "ULOG/character01")


def test_rotations_are_classes(root, load):
    plain, turned = load(root), load(root, rotations=True)
    for name, split in turned.items():
        before, classes = plain[name], len(plain[name].names)
        assert len(split.names) == len(set(split.names)) == 4 * classes
        assert split.counts.tolist() == [20] * 4 * classes
        for number, label in enumerate(split.names):
            number, quarters = number % classes, number // classes
            assert label == before.names[number] + ("", "/rot090", "/rot180", "/rot270")[quarters]
            images = split.images[split.offsets[split.names.index(label)] :][:20]
            for image, upright in zip(images, before.images[before.offsets[number] :][:20], strict=True):
                expected = Image.fromarray(upright[0].numpy()).rotate(90 * quarters)  # to the left
                assert image[0].tolist() == [[expected.getpixel((x, y)) for x in range(28)] for y in range(28)]
                break
    assert len(cache_files(root.parent)) == 4  # upright in the cache, for both


@pytest.mark.parametrize("zipped", [["images_evaluation"], ["images_background", "images_evaluation"]])
def test_zips_and_folders_give_the_same(root, load, zipped):
    extracted = load(root)
    for part in zipped:
        zip_part(root, part)
    assert same(load(root), extracted)


def test_reads_what_torchvision_extracted(root, load):
    expected = load(root)
    (root.parent / "torchvision").mkdir()
    root.rename(root.parent / "torchvision" / "omniglot-py")
    assert same(load(root.parent / "torchvision"), expected)


def test_says_which_alphabets_characters_and_drawings_are_missing(root, load):
    shutil.rmtree(root / "images_evaluation" / "ULOG")
    shutil.rmtree(root / "images_background" / "Greek" / "character02")
    (root / "images_background" / "Hebrew" / "character01" / "0004_07.png").unlink()
    with pytest.raises(UserError) as error:
        load(root)
    line = str(error.value)
    lacking = "Greek/character02 has 0, Hebrew/character01 has 19, all of ULOG"
    start = (
        f"dataset.root={root}: not all of Omniglot, 20 drawings of each character: it lacks {lacking}; give a folder"
    )
    assert line.startswith(start) and "\n" not in line


def test_a_part_that_is_not_there_is_missing_too(root, load):
    shutil.rmtree(root / "images_evaluation")
    with pytest.raises(UserError, match=r" it lacks all of Gurmukhi, all of ULOG; "):
        load(root)


def test_missing_and_empty_roots(tmp_path, load):
    with pytest.raises(UserError, match=r"^dataset\.root=.*nowhere: no such file or folder; give .*$"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^dataset\.root=.*empty: no Omniglot in it; give .*images_background.zip.*$"):
        load(tmp_path / "empty")


def test_a_truncated_zip_is_named(root, load):
    zip_part(root, "images_background")
    path = root / "images_background.zip"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"^dataset\.root=.*images_background\.zip: not a whole zip file .*$"):
        load(root)


def test_an_unreadable_image_is_named_and_leaves_no_cache(root, load, tmp_path):
    path = root / "images_background" / "Greek" / "character01" / "0001_05.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(UserError, match=r"^dataset\.root=.*Greek/character01/0001_05\.png'.*$"):
        load(root)
    assert not list(tmp_path.glob("cache/*"))


# Downloading


@pytest.fixture
def server(root, monkeypatch):
    """The two zips, published on this machine."""
    for part in omniglot.PARTS:
        zip_part(root, part)
    sums = {part: hashlib.md5((root / f"{part}.zip").read_bytes()).hexdigest() for part in omniglot.PARTS}
    handler = functools.partial(QuietHandler, directory=root)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(Omniglot, "download_url_prefix", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(Omniglot, "zips_md5", sums)
        yield root
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_downloads_once(server, load, tmp_path):
    downloaded = load(None)
    assert sorted(path.name for path in (tmp_path / "cache" / "omniglot").iterdir()) == [
        "images_background.zip",
        "images_evaluation.zip",
    ]
    expected = load(server, cache=tmp_path / "other")
    shutil.rmtree(server)
    assert same(load(None), downloaded)
    assert same(downloaded, expected)


def test_a_download_with_another_checksum_is_not_kept(server, load, tmp_path):
    with open(server / "images_evaluation.zip", "ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=r"^dataset\.root=null: downloading Omniglot .* failed .*set dataset\.root.*$"):
        load(None)
    assert [path.name for path in (tmp_path / "cache" / "omniglot").iterdir()] == ["images_background.zip"]


def test_a_failed_download_is_one_line(server, load, tmp_path):
    shutil.rmtree(server)
    with pytest.raises(UserError, match=r"^dataset\.root=null: .*$"):
        load(None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^dataset\.root=null: .*dataset\.cache to a folder with room to write$"):
        load(None, cache=tmp_path / "file")


# The cache


@pytest.fixture
def built(monkeypatch):
    """How often images were read from their files."""
    calls = []
    read_splits = omniglot.read_splits
    monkeypatch.setattr(omniglot, "read_splits", lambda *args, **knobs: calls.append(1) or read_splits(*args, **knobs))
    return calls


def cache_files(tmp_path):
    """{what of it: a file of the one cache in the folder}, the description as "json"."""
    description, *arrays = sorted((tmp_path / "cache").iterdir(), key=lambda path: (path.suffix, path.name))
    files = {path.stem.removeprefix(f"{description.stem}-"): path for path in arrays}
    assert list(files) == ["test", "train", "val"] and description.suffix == ".json"
    return {"json": description, **files}


def test_the_second_load_reads_the_cache(root, load, built):
    first = load(root)
    assert same(load(root), first)
    assert len(built) == 1


def test_each_size_split_and_way_to_resize_has_its_own(root, load, built):
    assert load(root, size=28)["val"].images.shape[-1] == 28
    small = load(root, size=14)
    assert small["val"].images.shape[-1] == 14
    assert load(root, size=14, split="lake")["test"].counts.tolist() == [20] * 3
    assert not torch.equal(load(root, size=14, resample="bilinear")["val"].images, small["val"].images)
    assert len(built) == 4


def test_changed_files_are_noticed(root, load, built):
    before = load(root)
    path = root / "images_background" / "Greek" / "character01" / "0001_05.png"
    Image.new("1", (105, 105), 0).save(path)
    after = load(root)
    assert len(built) == 2
    assert not same(before, after)
    assert (after["train"].images[4] == 0).all()


def test_a_seed_that_draws_no_split_is_told(tmp_path, caplog):
    for split, told in (("vinyals", True), ("random1200", False)):
        caplog.clear()
        with pytest.raises(UserError, match="no such file or folder"):
            omniglot.load(root=str(tmp_path / "nowhere"), size=28, cache=None, split=split, split_seed=7)
        line = f"dataset.split_seed=7: changes nothing, dataset.split={split} is not drawn"
        assert [record.getMessage() for record in caplog.records] == [line] * told


@pytest.mark.parametrize("kind", ["json", "val"])
@pytest.mark.parametrize("damage", ["header", "pixel", "short", "long", "empty", "gone"])
def test_a_damaged_cache_is_never_trusted(root, load, built, tmp_path, caplog, damage, kind):
    first = copy.deepcopy(load(root))  # what was loaded is the file itself
    path = cache_files(tmp_path)[kind]
    content = bytearray(path.read_bytes())
    if damage in ("header", "pixel"):
        content[100 if damage == "header" else -100] ^= 1
    path.write_bytes({"short": content[:-1], "long": content + b"x", "empty": b""}.get(damage, content))
    if damage == "gone":
        path.unlink()
    assert same(load(root), first)
    assert len(built) == 2
    told = f"cache file {cache_files(tmp_path)['json']} is damaged" in caplog.text
    assert told != (damage == "gone" and kind == "json")  # then nothing is there
    assert same(load(root), first)
    assert len(built) == 2


def test_images_are_mapped_and_written_as_they_come(tmp_path):
    def images(number):
        random = np.random.default_rng(number)
        for _ in range(number):
            yield random.integers(0, 256, (3, 64, 64), dtype=np.uint8)

    def build():
        return {name: cache_module.LazySplit(images(n), [n], (name,)) for name, n in (("train", 1600), ("test", 400))}

    tracemalloc.start()
    splits = cache_module.cached("made", [], size=64, channels=3, cache=str(tmp_path), build=build)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(split.images.nbytes for split in splits.values()) > 24e6 and most < 2e6
    for name, number in (("train", 1600), ("test", 400)):
        assert np.array_equal(splits[name].images, np.stack(list(images(number))))
    if Path("/proc/self/maps").exists():
        for path in tmp_path.glob("*.npy"):
            [mapping] = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
            assert mapping[1].startswith("r-")


@pytest.mark.parametrize(
    ("images", "count", "why"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), 2, r"image 0 of train is uint8 \(8, 8, 3\); it must be uint8 \(3, 8, 8\)"),
        (np.zeros((2, 3, 8, 8)), 2, r"image 0 of train is float64 \(3, 8, 8\); it must be uint8 \(3, 8, 8\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), 3, "train has 2 images, fewer than its counts say, 3"),
        (np.zeros((2, 3, 8, 8), np.uint8), 1, "train has more images than its counts say, 1"),
    ],
)
def test_a_source_of_ones_own_that_makes_other_images_than_it_says_leaves_no_cache(images, count, why, tmp_path):
    """Pixels whose axes lie in another order would fit into the file as well."""
    splits = {"train": cache_module.LazySplit(images, [count], ("a",))}
    with pytest.raises(ValueError, match=f"^{why}$"):
        cache_module.cached("made", [], size=8, channels=3, cache=str(tmp_path), build=lambda: splits)
    assert not list(tmp_path.iterdir())


def test_copies_whose_files_have_no_names_are_told_by_their_classes(tmp_path, caplog):
    image = np.zeros((1, 2, 2), np.uint8)
    splits = {
        "train": cache_module.LazySplit([image] * 5, [1, 4], ("a", "b")),
        "test": cache_module.LazySplit([image], [1], ("c",)),
    }
    cache_module.cached("made", [], size=2, channels=1, cache=str(tmp_path), build=lambda: splits)
    assert [record.getMessage() for record in caplog.records] == [
        "the same pixels in two splits, 1 time: test/c = train/a",
        "the same pixels twice in one split, 4 times: train/b = train/a, train/b = train/a, train/b = train/a ...",
    ]


def test_no_partial_file_stays_when_writing_fails(root, load, tmp_path, monkeypatch, caplog):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", full)
    assert len(load(root)["train"].names) == 4
    assert not list((tmp_path / "cache").iterdir())
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "No space left" in record.message
    assert "dataset.cache" in record.message


def test_goes_on_without_a_cache_where_none_can_be_written(root, load, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert len(load(root, cache=tmp_path / "file" / "cache")["train"].names) == 4
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_a_user_without_a_home_folder_is_told_what_to_set_and_has_the_images(monkeypatch, caplog):
    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    splits = {"train": cache_module.LazySplit([np.full((1, 2, 2), 7, np.uint8)], [1], ("a",))}
    made = cache_module.cached("made", [], size=2, channels=1, cache=None, build=lambda: splits)
    assert made["train"].images.tolist() == [[[[7, 7], [7, 7]]]]
    [line] = caplog.messages
    assert line.startswith("no cache: ") and line.endswith("; set dataset.cache to a folder to keep the images in")


def test_several_at_once_make_the_images_once(tmp_path):
    def build():
        made.append(None)
        time.sleep(0.2)  # the others come meanwhile
        return {"train": cache_module.LazySplit([np.full((1, 2, 2), 7, np.uint8)], [1], ("a",))}

    def rank(_):
        return cache_module.cached("made", [], size=2, channels=1, cache=str(tmp_path / "cache"), build=build)

    made = []
    with ThreadPoolExecutor(4) as ranks:  # what locks them out of each other does so between processes, too
        loaded = list(ranks.map(rank, range(4)))
    assert len(made) == 1 and [int(splits["train"].images.sum()) for splits in loaded] == [28] * 4
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".npy"]


def test_two_at_once_do_not_hurt_each_other_where_nothing_can_be_locked(root, load, tmp_path, monkeypatch):
    replace, inner = cache_module.os.replace, []

    def replace_late(*paths):  # another process starts and ends between our writing and our moving into place
        if not inner:
            inner.append(None)
            inner[0] = load(root)
        replace(*paths)

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(cache_module.os, "replace", replace_late)
    outer = load(root)
    assert same(outer, inner[0])
    assert same(outer, load(root))
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".lock", *[".npy"] * 3]


def test_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_module.cache_folder(None) == tmp_path / "fewshot"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_module.cache_folder(None) == tmp_path / ".cache" / "fewshot"
    assert cache_module.cache_folder("~/images") == tmp_path / "images"


# The real thing


def test_the_facts_add_up():
    characters = {alphabet: n for part in omniglot.PARTS for alphabet, n in omniglot.FACTS["characters"][part].items()}
    assert (len(characters), sum(characters.values())) == (50, 1623)
    for split, classes in (("val", 172), ("test", 423)):
        assert sum(last - first + 1 for first, last in omniglot.FACTS[split].values()) == classes
        assert all(last <= characters[alphabet] for alphabet, (_, last) in omniglot.FACTS[split].items())
    assert not omniglot.FACTS["val"].keys() & omniglot.FACTS["test"].keys()


@pytest.mark.parametrize("split", ["vinyals", "random1200", "lake"])
def test_every_split_has_all_characters_and_as_many_as_its_yaml_says(config, split):
    cfg = config("dataset=omniglot", f"dataset.split={split}")
    members = omniglot.characters_of(split, 0)
    assert {name: len(characters) for name, characters in members.items()} == cfg.dataset.classes
    assert len({character for characters in members.values() for character in characters}) == 1623
    turned = config("dataset=omniglot", f"dataset.split={split}", "dataset.rotations=true").dataset.classes
    assert all(turned[name] == 4 * len(characters) for name, characters in members.items())


def test_random1200_is_drawn_by_its_own_seed():
    everything = list(chain.from_iterable(omniglot.characters_of("vinyals", 0).values()))
    order = sorted(everything, key=lambda character: hashlib.sha256(f"7/{character}".encode()).hexdigest())
    drawn = omniglot.characters_of("random1200", 7)
    assert [set(drawn[name]) for name in drawn] == [set(order[:1100]), set(order[1100:1200]), set(order[1200:])]
    assert drawn != omniglot.characters_of("random1200", 8)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared Omniglot is not here")
def test_real_omniglot(load, cache):
    splits = load(SHARED, cache=cache)
    assert {name: len(split.names) for name, split in splits.items()} == {"train": 1028, "val": 172, "test": 423}
    assert all((split.counts == 20).all() for split in splits.values())
    assert len({name for split in splits.values() for name in split.names}) == 1623
    ink = 1 - splits["train"].images.float().mean() / 255
    assert 0.05 < ink < 0.12
    assert same(load(SHARED, cache=cache), splits)
