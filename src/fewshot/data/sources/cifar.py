"""CIFAR-FS (Bertinetto et al. 2019) and FC100 (Oreshkin et al. 2018): the classes of CIFAR-100, split anew.

CIFAR-FS splits its 100 classes by chance. FC100 splits their 20 superclasses, so that the test classes are of another
kind than the training classes. What is read is torchvision's download, the archive or the pickles in it, and only if it
has the MD5 that torchvision knows. (CIFAR-100 without pickles exists, at an address that torchvision does not know.)
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets import CIFAR100

from fewshot.data.cache import LazySplit, cached
from fewshot.data.published import download, fit, gather, open_pickles
from fewshot.data.sources import folder
from fewshot.data.task import SPLITS, Split
from fewshot.errors import UserError, first_few
from fewshot.files import user_path

TITLES = {"cifarfs": "CIFAR-FS", "fc100": "FC100"}
HOLDS = f"{CIFAR100.filename}, the folder {CIFAR100.base_folder} in it, or a folder or zip with {folder.SPLIT_LAYOUT}"
# The classes and both splits of them, in a file that names its sources.
FACTS = json.loads((files("fewshot.data.sources") / "cifar.json").read_text())


def load(
    *, name: str, root: str | None, size: int, channels: int, cache: str | None, archive: str = "cifar100"
) -> dict[str, Split]:
    """The splits of `name`, cifarfs or fc100; from CIFAR-100 600 images a class, its training images first."""
    if root is None:
        title, source = f"CIFAR-100 for {TITLES[name]}", {CIFAR100.filename: (CIFAR100.url, CIFAR100.tgz_md5)}
        place = download(title, list(source), lambda: source, folder=archive, cache=cache, holds=HOLDS)
    else:
        place = user_path("dataset.root", root)
    classes = class_split(name)
    files = {file: (file,) for file in _checksums()}
    pickles = open_pickles(place, (CIFAR100.filename, CIFAR100.base_folder), files, CIFAR100.url, _check)
    if pickles is None:
        splits = folder.load(root=str(place), name=name, size=size, channels=channels, cache=cache)
        _check_classes(name, place, splits, classes)
        return splits
    read, version = pickles

    def build() -> dict[str, LazySplit]:
        parts = [read(file) for file, _ in (*CIFAR100.train_list, *CIFAR100.test_list)]
        pixels = np.concatenate([part["data"] for part in parts]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = np.concatenate([part["fine_labels"] for part in parts])
        names = read(CIFAR100.meta["filename"])[CIFAR100.meta["key"]]
        numbers = {label: np.flatnonzero(labels == number).tolist() for number, label in enumerate(names)}
        return {
            split: gather(
                {label: numbers[label] for label in members},
                lambda number: fit(pixels[number], size=size, channels=channels),
            )
            for split, members in classes.items()
        }

    return cached(name, [version, classes], size=size, channels=channels, cache=cache, build=build)


def class_split(name: str) -> dict[str, list[str]]:
    """The class names of each split, in alphabetical order."""
    chosen = FACTS[name]
    if name == "fc100":
        chosen = {
            split: [label for kind in kinds for label in FACTS["superclasses"][kind]] for split, kinds in chosen.items()
        }
    held_out = {label for labels in chosen.values() for label in labels}
    rest = {label for labels in FACTS["superclasses"].values() for label in labels} - held_out
    return {split: sorted({"train": rest, **chosen}[split]) for split in SPLITS}


def _check_classes(name: str, place: Path, splits: dict[str, Split], classes: dict[str, list[str]]) -> None:
    for split, expected in classes.items():
        if differing := sorted({*splits[split].names} ^ {*expected}):
            raise UserError(
                f"dataset.root={place}: {split}/ does not hold {TITLES[name]}'s classes, but differs in "
                f"{first_few(differing)}; give {HOLDS}, or use dataset=folder for images of your own"
            )


def _checksums() -> dict[str, str]:
    """MD5 by file."""
    listed: Any = (*CIFAR100.train_list, *CIFAR100.test_list, (CIFAR100.meta["filename"], CIFAR100.meta["md5"]))
    return dict(listed)


def _check(path: Path, md5: str) -> None:
    expected = _checksums().get(path.name, CIFAR100.tgz_md5)
    if md5 != expected:
        raise ValueError(f"{path.name} has the MD5 {md5} instead of {expected}")
