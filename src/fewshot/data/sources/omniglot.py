"""Omniglot (Lake et al. 2015): 50 alphabets, 1,623 characters, 20 drawings of each, black (0) on white (255).

docs/datasets.md lists the splits. MAML's code (github.com/cbfinn/maml, data_generator.py) and learn2learn's
omniglot_tasksets draw the 1,200 of random1200 by shuffles that hang on the machine or on the run's seed; this one does
not. Lake's split came without a validation set, and torchmeta has none for it: here the 172 characters that validate in
Vinyals' split do so, five whole alphabets of the background set.
"""

import json
import logging
import os
import re
from functools import partial
from importlib.resources import files
from pathlib import Path

import torch
from PIL import Image

from fewshot.data.cache import cached
from fewshot.data.folder_or_zip import Source, open_source
from fewshot.data.images import read_splits
from fewshot.data.published import download
from fewshot.data.sources.folder import in_seeded_order
from fewshot.data.task import SPLITS, Split
from fewshot.errors import UserError, first_few
from fewshot.files import user_path

log = logging.getLogger(__name__)

PARTS = ("images_background", "images_evaluation")
DRAWINGS = 20
HOLDS = "images_background.zip and images_evaluation.zip, or the folders in them"
# The characters and Vinyals' classes, in a file that names its sources.
FACTS = json.loads((files("fewshot.data.sources") / "omniglot.json").read_text())


def load(
    *,
    root: str | None,
    size: int,
    cache: str | None,
    resample: str = "lanczos",
    split: str = "vinyals",
    split_seed: int = 0,
    rotations: bool = False,
) -> dict[str, Split]:
    """The characters of a split, images of (1, size, size); see conf/dataset/omniglot.yaml."""
    if split_seed and split != "random1200":
        log.warning("dataset.split_seed=%d: changes nothing, dataset.split=%s is not drawn", split_seed, split)
    folder = _download(cache) if root is None else user_path("dataset.root", root)
    sources = {part: _open_part(folder, part) for part in PARTS}
    classes = find_classes(sources, folder, split, split_seed)
    shape, names = {"size": size, "channels": 1}, {name: list(members) for name, members in classes.items()}
    fingerprint = [*(sources[part].fingerprint for part in PARTS), resample, names]
    build = partial(read_splits, classes, resample=Image.Resampling[resample.upper()], **shape)
    splits = cached("omniglot", fingerprint, cache=cache, build=build, **shape)
    return {name: rotated(split) for name, split in splits.items()} if rotations else splits


def rotated(split: Split) -> Split:
    """All classes four times: as they are, then turned by 90, 180 and 270 degrees to the left."""
    turned = [torch.rot90(split.images, quarters, dims=(2, 3)) for quarters in range(4)]
    return Split(
        torch.cat(turned),
        torch.cat([split.offsets[:1], *(split.offsets[1:] + quarters * len(split.images) for quarters in range(4))]),
        tuple(f"{name}{turn}" for turn in ("", "/rot090", "/rot180", "/rot270") for name in split.names),
        split.sha256,
    )


def _open_part(root: Path, part: str) -> Source:
    for folder in (root, root / "omniglot-py"):  # where torchvision keeps them
        if os.path.isfile(folder / f"{part}.zip"):
            return open_source(folder / f"{part}.zip", [part])
    return open_source(root, [part])


def find_classes(
    sources: dict[str, Source], root: Path, split: str, split_seed: int
) -> dict[str, dict[str, list[tuple[Source, str]]]]:
    """The files of every character of every split; anything less than all of Omniglot is a UserError."""
    drawn = {}
    for source in sources.values():
        for name in source.names:
            if drawing := re.fullmatch(r"\w+/([^/]+/character\d\d)/\d+_(\d\d)\.png", name):
                drawn.setdefault(drawing[1], {})[drawing[2]] = (source, name)
    members = characters_of(split, split_seed)
    everything = [character for characters in members.values() for character in characters]
    _check_complete(root, everything, {character: len(drawings) for character, drawings in drawn.items()})
    return {
        name: {character: [file for _, file in sorted(drawn[character].items())] for character in characters}
        for name, characters in members.items()
    }


def characters_of(split: str, split_seed: int) -> dict[str, list[str]]:
    """The characters of train, val and test, alphabet by alphabet."""
    splits = {}
    for part in PARTS:
        for alphabet, count in FACTS["characters"][part].items():
            for number in range(1, count + 1):
                name = _vinyals(alphabet, number)
                if split == "lake" and name != "val":
                    name = "train" if part == "images_background" else "test"
                splits[f"{alphabet}/character{number:02d}"] = name
    if split == "random1200":
        for place, character in enumerate(in_seeded_order(splits, split_seed)):
            splits[character] = "train" if place < 1100 else "val" if place < 1200 else "test"
    return {name: [character for character in splits if splits[character] == name] for name in SPLITS}


def _vinyals(alphabet: str, number: int) -> str:
    for split in ("val", "test"):
        first, last = FACTS[split].get(alphabet, (1, 0))
        if first <= number <= last:
            return split
    return "train"


def _check_complete(root: Path, characters: list[str], drawings: dict[str, int]) -> None:
    if not drawings:
        raise UserError(f"dataset.root={root}: no Omniglot in it; give a folder with {HOLDS}")
    alphabets = {os.path.dirname(character) for character in drawings}
    lacking = set()
    for character in characters:
        if (number := drawings.get(character, 0)) < DRAWINGS:
            alphabet = os.path.dirname(character)
            lacking.add(f"{character} has {number}" if alphabet in alphabets else f"all of {alphabet}")
    if lacking:
        raise UserError(
            f"dataset.root={root}: not all of Omniglot, {DRAWINGS} drawings of each character: it lacks "
            f"{first_few(sorted(lacking), 5)}; give a folder with {HOLDS}, completely extracted"
        )


def _download(cache: str | None) -> Path:
    """The folder with the two original zips, each checked against its published checksum before it gets its name."""

    def find() -> dict[str, tuple[str, str]]:
        from torchvision.datasets.omniglot import Omniglot

        return {
            f"{part}.zip": (f"{Omniglot.download_url_prefix}/{part}.zip", Omniglot.zips_md5[part]) for part in PARTS
        }

    names = [f"{part}.zip" for part in PARTS]
    return download("Omniglot", names, find, folder="omniglot", cache=cache, holds=f"a folder with {HOLDS}")
