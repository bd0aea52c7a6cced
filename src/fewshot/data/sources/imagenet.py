"""miniImageNet (Vinyals et al. 2016; the split of Ravi and Larochelle 2017) and tieredImageNet (Ren et al. 2018).

Both are photos of ImageNet (ILSVRC-12), for non-commercial research only, and are shared as pickles of images of 84 x
84 pixels. A pickle can run any program, so none is opened whose MD5 is not known, unless dataset.trust says so.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from fewshot.data.cache import LazySplit, cached
from fewshot.data.folder_or_zip import open_source, plain_text, read_classes
from fewshot.data.images import decode, read_splits
from fewshot.data.published import as_published, download, fit, gather, open_pickles, zenodo
from fewshot.data.task import SPLITS, Split
from fewshot.errors import UserError, first_few
from fewshot.files import user_path

# learn2learn's copies, at the addresses in its mini_imagenet.py and tiered_imagenet.py, which know no checksums.
PUBLISHER, RECORD = "learn2learn", 7978538
# Ren et al.'s files (github.com/renmengye/few-shot-ssl-public). Whether learn2learn's are the same is not known.
MD5S = {
    "b38f1eb4251fb9459ecc8e7febf9b2eb",  # mini-imagenet.tar.gz: tristandeleu/pytorch-meta, torchmeta/datasets
    "069993a77e65a83bbf8f8de4c9dcca68",  # its train, val and test: tata1661/FSL-Mate, PaddleFSL/paddlefsl/datasets
    "f87ddf9b5211920dd73520274371eb6a",
    "12158d649fd08945294de4ad38cda81d",
    "e07e811b9f29362d159a9edd0d838c62",  # tiered-imagenet.tar: pytorch-meta; no MD5 of the files in it was found
}
MINI_FILES = {  # as learn2learn and Ren et al. call them
    "train": ("mini-imagenet-cache-train.pkl",),
    "val": ("mini-imagenet-cache-validation.pkl", "mini-imagenet-cache-val.pkl"),
    "test": ("mini-imagenet-cache-test.pkl",),
}
TIERED_FILES = {  # as Ren et al. and learn2learn call them, and as they are called where learn2learn gets them
    f"{split} {kind}": (f"{split}_{kind}.pkl", f"tiered-imagenet-{split}_{kind}.pkl")
    for split in SPLITS
    for kind in ("labels", "images_png")
}
MINI_HOLDS = (
    "mini-imagenet.tar.gz, a folder with mini-imagenet-cache-train.pkl, -validation.pkl and -test.pkl, "
    "or a folder or zip with images/, train.csv, val.csv and test.csv"
)
TIERED_HOLDS = "tiered-imagenet.tar or a folder with train|val|test_images_png.pkl and train|val|test_labels.pkl"


def miniimagenet(
    *, root: str | None, classes: Mapping[str, int], size: int, channels: int, trust: bool, cache: str | None
) -> dict[str, Split]:
    """miniImageNet's splits, images of (channels, size, size).

    They come from learn2learn's pickles, each a dictionary of image_data, (M, 84, 84, 3) uint8, and class_dict, the
    numbers of each class's images; or from the photos in images/ and Ravi and Larochelle's tables (filename,label).
    """
    dataset, shape = ("miniImageNet", MINI_FILES, MINI_HOLDS, _mini_split), {"size": size, "channels": channels}
    place, splits = _from_pickles(*dataset, root, classes, trust, cache, **shape)
    return _mini_photos(place, classes, cache, shape) if splits is None else splits


def _mini_split(place: Path, read: Callable[[str], Any], split: str, shape: dict[str, int]) -> LazySplit:
    data = read(split)
    with as_published(place, split, PUBLISHER):
        pixels, members = data["image_data"], data["class_dict"]
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(f"images of {pixels.dtype} and shape {pixels.shape[1:]}")

        @as_published(place, split, PUBLISHER)
        def image(number: int) -> np.ndarray:
            return fit(pixels[number], **shape)

        return gather({str(label): members[label] for label in sorted(members)}, image)


def _mini_photos(place: Path, classes: Mapping[str, int], cache: str | None, shape: dict[str, int]) -> dict[str, Split]:
    source = open_source(place, ["images"])
    images = {PurePosixPath(name).name: name for name in source.names}
    tables, members = {}, {}
    for split in SPLITS:
        try:
            tables[split] = source.read(f"{split}.csv")
            labels, absent = read_classes(tables[split], lambda file: images.get(plain_text(file)))
        except (OSError, LookupError, ValueError) as error:
            reason = "" if isinstance(error, OSError | LookupError) else f" ({error})"
            raise UserError(
                f"dataset.root={place}: no {split}.csv with filename,label in it{reason}; give {MINI_HOLDS}"
            ) from error
        if absent:
            raise UserError(f"dataset.root={place}: images/ lacks {first_few(absent)} of {split}.csv; add them")
        members[split] = {
            label: [(source, name) for name in names]
            for label, names in sorted((label, names) for part in labels.values() for label, names in part.items())
        }
    _check_classes(place, {split: tuple(labels) for split, labels in members.items()}, classes)
    version = [source.fingerprint, [hashlib.sha256(table).hexdigest() for table in tables.values()]]
    return cached("miniimagenet", version, cache=cache, build=functools.partial(read_splits, members, **shape), **shape)


def tieredimagenet(
    *, root: str | None, classes: Mapping[str, int], size: int, channels: int, trust: bool, cache: str | None
) -> dict[str, Split]:
    """tieredImageNet's splits, images of (channels, size, size): 34 categories of ImageNet, split 20/6/8.

    For each split learn2learn has a pickle with a list of PNG files, and one with a dictionary of label_specific, the
    number of each image's class, and label_specific_str, their names.
    """
    dataset, shape = ("tieredImageNet", TIERED_FILES, TIERED_HOLDS, _tiered_split), {"size": size, "channels": channels}
    place, splits = _from_pickles(*dataset, root, classes, trust, cache, **shape)
    if splits is None:
        raise UserError(f"dataset.root={place}: no tieredImageNet in it; give {TIERED_HOLDS}")
    return splits


def _tiered_split(place: Path, read: Callable[[str], Any], split: str, shape: dict[str, int]) -> LazySplit:
    labels = read(f"{split} labels")
    with as_published(place, split, PUBLISHER):
        numbers = np.asarray(labels["label_specific"])

        @functools.cache
        def files() -> Any:  # gigabytes: not before this split's first image is wanted
            pngs = read(f"{split} images_png")
            if numbers.shape != (len(pngs),):
                raise ValueError(f"{len(pngs)} images and labels of shape {numbers.shape}")
            return pngs

        @as_published(place, split, PUBLISHER)
        def image(number: int) -> np.ndarray:
            return decode(bytes(files()[number]), resample=Image.Resampling.BILINEAR, **shape)

        # Two classes of ImageNet are called crane.
        names = enumerate(labels["label_specific_str"])
        return gather({f"{number:03d} {name}": np.flatnonzero(numbers == number) for number, name in names}, image)


def _check_classes(place: Path, names: Mapping[str, Sequence[str]], classes: Mapping[str, int]) -> None:
    for split, wanted in classes.items():
        if len(names[split]) != wanted:
            raise UserError(
                f"dataset.root={place}: {len(names[split])} {split} classes instead of {wanted}; give the files of the "
                "usual split, or use dataset=folder for images of your own"
            )


def _from_pickles(
    title: str,
    files: Mapping[str, Sequence[str]],
    holds: str,
    split_of: Callable[[Path, Callable[[str], Any], str, dict[str, int]], LazySplit],
    root: str | None,
    classes: Mapping[str, int],
    trust: bool,
    cache: str | None,
    **shape: int,
) -> tuple[Path, dict[str, Split] | None]:
    """`root` or the folder of the download, and the splits that `split_of` makes of its pickles; None: it has none."""
    name, names = title.lower(), [choices[0] for choices in files.values()]
    prefix = "tiered-imagenet-" if name == "tieredimagenet" else ""

    def find() -> dict[str, tuple[str, str]]:
        sources = zenodo(RECORD, {name: f"{prefix}{name}" for name in names})
        for url, published in () if trust else sources.values():  # before gigabytes are fetched in vain
            _refuse_unknown(url, published)
        return sources

    if root is None:
        place = download(title, names, find, folder=name, cache=cache, holds=holds)
    else:
        place = user_path("dataset.root", root)
    check = None if trust else _refuse_unknown
    pickles = open_pickles(place, ("tiered-imagenet",), files, PUBLISHER, check)  # where learn2learn keeps it
    if pickles is None:
        return place, None
    read, version = pickles

    def build() -> dict[str, LazySplit]:
        splits = {split: split_of(place, read, split, shape) for split in SPLITS}
        _check_classes(place, {split: part.names for split, part in splits.items()}, classes)
        return splits

    return place, cached(name, version, cache=cache, build=build, **shape)


def _refuse_unknown(place: Path | str, md5: str) -> None:
    if md5 not in MD5S:
        raise UserError(
            f"dataset.trust=false: {place} holds pickles, which could run any program, and its MD5 {md5} is none that "
            "is known; if you trust where it comes from, dataset.trust=true reads it"
        )
