"""Birds, aircraft, flowers and textures as their publishers pack them, with published splits of their classes.

CUB-200-2011 (Wah et al. 2011) is split as by Chen et al. 2019, whose filelists/CUB/write_CUB_filelist.py takes every
other class for training, and of the rest every other one for validation. FGVC-Aircraft (Maji et al. 2013), Oxford
Flowers-102 (Nilsback and Zisserman 2008) and DTD (Cimpoi et al. 2014) are split by class name as by Meta-Dataset. An
aircraft is cut out by its box, as there, since other planes and a copyright line are in the photos.

Nothing is downloaded: dataset.root is what torchvision's classes download, or the original archive unpacked.
"""

import functools
import hashlib
import io
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files

import torch
from PIL import Image

from fewshot.data.cache import cached
from fewshot.data.folder_or_zip import Source, open_source
from fewshot.data.images import formats, is_image, read_splits
from fewshot.data.sources import imagenet
from fewshot.data.task import SPLITS, Split
from fewshot.errors import UserError, first_few
from fewshot.files import user_path

# The class splits and the numbers of images, in a file that names its sources.
FACTS = json.loads((files("fewshot.data.sources") / "fine_grained.json").read_text())
HOLDS = {  # title, the folder that torchvision makes or the archive holds, and what must be in it
    "cub": ("CUB-200-2011", "CUB_200_2011", "images/NNN.CLASS/"),
    "aircraft": ("FGVC-Aircraft", "fgvc-aircraft-2013b", "data/images/ and the tables in data/"),
    "flowers": ("Flowers-102", "flowers-102", "jpg/ and imagelabels.mat"),
    "dtd": ("DTD", "dtd", "images/CLASS/"),
}
MINI = {"train": 64, "val": 16, "test": 20}  # miniImageNet's classes


def cub(*, root: str, size: int, channels: int, cache: str | None) -> dict[str, Split]:
    """The birds: class number n of 1..200 trains if n is odd, validates if n = 2, 6, 10, .., else tests."""
    source, where = _open("cub", root, "images")
    members = _by_folder(source)
    if sorted(label[:4] for label in members) != [f"{number:03d}." for number in range(1, 201)]:
        raise UserError(f"{where}: holds {len(members)} classes, not the 200 of CUB-200-2011; give {_wanted('cub')}")
    parts = {"train": (0, 2), "val": (1,), "test": (3,)}
    chosen = {
        split: [label for place, label in enumerate(sorted(members)) if place % 4 in rests]
        for split, rests in parts.items()
    }
    return _splits("cub", where, source, members, chosen, size, channels, cache)


def dtd(*, root: str, size: int, channels: int, cache: str | None) -> dict[str, Split]:
    """The textures."""
    source, where = _open("dtd", root, "images")
    return _splits("dtd", where, source, _by_folder(source), FACTS["dtd"], size, channels, cache)


def flowers(*, root: str, size: int, channels: int, cache: str | None) -> dict[str, Split]:
    """The flowers; which image is of which class is in imagelabels.mat, read only if its MD5 is torchvision's."""
    from scipy.io import loadmat
    from torchvision.datasets import Flowers102

    source, where = _open("flowers", root, "jpg")
    name, md5 = Flowers102._file_dict["label"]
    table = _table(source, name, where, "flowers")
    if hashlib.md5(table, usedforsecurity=False).hexdigest() != md5:
        raise UserError(f"{where}: {name} is not as published, by its MD5; give {_wanted('flowers')}")
    classes = {label[:3]: label for split in SPLITS for label in FACTS["flowers"][split]}
    labels = loadmat(io.BytesIO(table), squeeze_me=True)["labels"].tolist()
    members: dict[str, list[str]] = defaultdict(list)
    for number, label in enumerate(labels, 1):
        members[classes[f"{label:03d}"]].append(f"jpg/image_{number:05d}.jpg")
    return _splits("flowers", where, source, members, FACTS["flowers"], size, channels, cache)


def aircraft(*, root: str, size: int, channels: int, cache: str | None) -> dict[str, Split]:
    """The aircraft variants; each image is what lies in its box, stretched to a square."""
    source, where = _open("aircraft", root, "data")
    members: dict[str, list[str]] = defaultdict(list)
    boxes, photo = {}, source.read
    names = ("variant_trainval", "variant_test", "box")
    tables = [_table(source, f"data/images_{name}.txt", where, "aircraft") for name in names]
    *variants, places = (table.decode("utf-8", "replace").splitlines() for table in tables)
    for line in (line for table in variants for line in table):
        number, _, label = line.strip().partition(" ")
        members[label].append(f"data/images/{number}.jpg")
    for line in places:
        if match := re.fullmatch(r"(\d+) (\d+) (\d+) (\d+) (\d+)", line.strip()):
            boxes[f"data/images/{match[1]}.jpg"] = tuple(map(int, match.groups()[1:]))

    def cut_out(name: str) -> bytes:
        if name not in boxes:
            raise ValueError("it has no box in images_box.txt")
        with Image.open(io.BytesIO(photo(name)), formats=formats()) as image:
            square = image.crop(boxes[name]).resize((size, size), Image.Resampling.BILINEAR)
        file = io.BytesIO()
        square.save(file, "PNG")
        return file.getvalue()

    version = [hashlib.sha256(table).hexdigest() for table in tables]
    source = replace(source, read=cut_out, fingerprint=[source.fingerprint, version])
    return _splits("aircraft", where, source, members, FACTS["aircraft"], size, channels, cache)


def mini_to_cub(
    *, root: str, mini_root: str | None, trust: bool, size: int, channels: int, cache: str | None
) -> dict[str, Split]:
    """All 100 classes of miniImageNet train, CUB's classes validate and test (Chen et al. 2019, section 4.4)."""
    birds = cub(root=root, size=size, channels=channels, cache=cache)
    try:
        mini = imagenet.miniimagenet(
            root=mini_root, classes=MINI, size=size, channels=channels, trust=trust, cache=cache
        )
    except UserError as error:
        raise UserError(str(error).replace("dataset.root", "dataset.mini_root")) from None
    parts = [mini[split] for split in SPLITS]
    counts = torch.cat([part.counts for part in parts])
    train = Split(
        torch.cat([part.images for part in parts]),
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        tuple(name for part in parts for name in part.names),
        hashlib.sha256("".join(part.sha256 for part in parts).encode()).hexdigest(),
    )
    return {"train": train, "val": birds["val"], "test": birds["test"]}


def _wanted(name: str) -> str:
    title, folder, inside = HOLDS[name]
    return f"the folder {folder} of {title}, with {inside}"


def _open(name: str, root: str, top: str) -> tuple[Source, str]:
    """The files in `top`, which lies in the root or in HOLDS' folder there; and how a line about it begins."""
    place, inside = user_path("dataset.root", root), HOLDS[name][1]
    source = open_source(place / inside if (place / inside).is_dir() else place, [top])
    if not any(is_image(file) for file in source.names):
        raise UserError(f"dataset.root={root}: no {HOLDS[name][0]} in it; give {_wanted(name)}")
    return source, f"dataset.root={root}"


def _table(source: Source, file: str, where: str, name: str) -> bytes:
    try:
        return source.read(file)
    except (OSError, LookupError, ValueError):
        raise UserError(f"{where}: {file} is not there, or cannot be read; give {_wanted(name)}") from None


def _by_folder(source: Source) -> dict[str, list[str]]:
    members: dict[str, list[str]] = defaultdict(list)
    for name in source.names:
        if is_image(name) and name.count("/") == 2:
            members[name.split("/")[1]].append(name)
    return members


def _splits(
    name: str,
    where: str,
    source: Source,
    members: Mapping[str, list[str]],
    chosen: Mapping[str, list[str]],
    size: int,
    channels: int,
    cache: str | None,
) -> dict[str, Split]:
    """members: the files of every class; chosen: the classes of every split. Anything less than all is a UserError."""
    wanted = [label for split in SPLITS for label in chosen[split]]
    if differing := sorted({*members} ^ {*wanted}):
        raise UserError(
            f"{where}: differs from {HOLDS[name][0]} in classes {first_few(differing)}; give {_wanted(name)}"
        )
    there = {*source.names}
    lacking = sorted(file for names in members.values() for file in names if file not in there)
    number, all_of_them = sum(map(len, members.values())) - len(lacking), FACTS["images"][name]
    if lacking or number != all_of_them:
        which = f", and lacks {first_few(lacking)}" * bool(lacking)
        raise UserError(f"{where}: holds {number} of {all_of_them} images{which}; give {_wanted(name)}, complete")
    classes = {
        split: {label: [(source, file) for file in sorted(members[label])] for label in labels}
        for split, labels in ((split, chosen[split]) for split in SPLITS)
    }
    shape = {"size": size, "channels": channels}
    version = [source.fingerprint, {split: list(chosen[split]) for split in SPLITS}]
    return cached(name, version, cache=cache, build=functools.partial(read_splits, classes, **shape), **shape)
