"""The images of a dataset on this machine: uint8, made once, verified, mapped into memory.

A cache file holds the pixels of all images, split after split, then a text (JSON) that describes them, then the length
of that text and its SHA-256. The text has the SHA-256 of each split's pixels. A run checks both sums before it takes
the pixels, about a second for each gigabyte, and then maps the file: the system keeps in memory what is used.

Shapes: M images of a split, N its classes, C x H x W one image.
"""

import hashlib
import io
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from fewshot.data.lock import alone
from fewshot.files import remove_leftovers, replacing
from fewshot.paths import user_path

if TYPE_CHECKING:  # to look for a cache file needs no torch
    from torch import Tensor

    from fewshot.data.task import Split

log = logging.getLogger(__name__)

# Part of every cache key: raise it whenever the same files would give other pixels than before.
CACHE_VERSION = 3
LENGTH, DIGEST = 8, 32  # bytes of the last two parts


@dataclass(frozen=True)
class Unread:
    """A split whose images are yet to be made.

    images: yields them one by one, class after class, (C, H, W) uint8
    counts: N numbers, images per class
    names: the N class names
    files: what each of the M images is called in messages; may be left out
    """

    images: "Iterable[np.ndarray | Tensor]"
    counts: Sequence[int]
    names: tuple[str, ...]
    files: Sequence[str] = ()


def cache_folder(cache: str | None) -> Path:
    """`dataset.cache`, or the user's cache folder."""
    if cache is not None:
        return user_path("dataset.cache", cache)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # A relative XDG_CACHE_HOME is to be ignored, says its specification.
    return (Path(shared) if os.path.isabs(shared) else Path("~/.cache").expanduser()) / "fewshot"


def file_stem(name: str, size: int, channels: int) -> str:
    """How the cache files of a source of images begin."""
    return f"{name}-{size}x{size}x{channels}-v{CACHE_VERSION}"


def cached(
    name: str,
    identity: Any,
    *,
    size: int,
    channels: int,
    cache: str | None,
    build: "Callable[[], Mapping[str, Unread | Split]]",
) -> "dict[str, Split]":
    """The splits that `build` makes, from the cache where it holds just those. Nobody may write to their images.

    Other processes wait for the one that makes the cache file.

    Args:
        name: of the source of images.
        identity: whatever the images depend on besides size and channels; plain lists, numbers and text.
        size, channels: of the images.
        cache: folder, None for the user's own.
        build: makes the splits; one that is Unread is written image by image, so it may be larger than the memory.
    """
    key = hashlib.sha256(json.dumps([CACHE_VERSION, name, identity, size, channels]).encode()).hexdigest()
    splits = None
    try:
        path = cache_folder(cache) / f"{file_stem(name, size, channels)}-{key[:16]}.bin"
    except RuntimeError as error:  # no home folder
        log.warning("no cache: %s; set dataset.cache to a folder to keep the images in", error)
    else:
        splits = _load(path, key, quietly=True)
        if splits is None:
            with alone(path.with_name(f".{path.name}.lock"), f"makes {path}"):
                splits = _load(path, key)  # another process may just have made it
                if splits is None and _save(path, key, build):
                    splits = _load(path, key)
    if splits is None:
        held = io.BytesIO()
        _write(held, key, build())
        splits = _splits(np.frombuffer(held.getbuffer(), np.uint8), key)
    return splits


def _load(path: Path, key: str, quietly: bool = False) -> "dict[str, Split] | None":
    try:
        content = np.memmap(path, np.uint8, mode="r")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if not quietly:
            log.warning("cache file cannot be read, building the images anew: %s", error)
        return None
    except ValueError:  # an empty file
        content = np.empty(0, np.uint8)
    splits = _splits(content, key)
    if splits is None and not quietly:
        log.warning("cache file %s is damaged, building the images anew", path)
    return splits


def _splits(content: np.ndarray, key: str) -> "dict[str, Split] | None":
    """What a cache file with this content holds; None where a sum is not right."""
    import torch

    from fewshot.data.task import Split

    end = len(content) - DIGEST - LENGTH
    begin = end - int.from_bytes(content[max(0, end) : -DIGEST].tobytes(), "little")
    if begin < 0 or hashlib.sha256(content[begin:end]).digest() != content[-DIGEST:].tobytes():
        return None
    described = json.loads(content[begin:end].tobytes())
    splits, first, shape = {}, 0, described["shape"]
    for name, split in described["splits"].items():
        offsets = np.cumsum([0, *split["counts"]])
        last = first + int(offsets[-1]) * math.prod(shape)
        pixels = content[first:last]
        if last > begin or hashlib.sha256(pixels).hexdigest() != split["sha256"]:
            return None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to it
            images = torch.from_numpy(pixels.reshape(-1, *shape))
        splits[name] = Split(images, torch.from_numpy(offsets), tuple(split["names"]), split["sha256"])
        first = last
    if first != begin or described["key"] != key:
        return None
    for where, (number, first_few) in described["twins"].items():
        if number:
            rest = " ..." if number > len(first_few) else ""
            shown = ", ".join(first_few) + rest
            log.warning("the same pixels %s, %d time%s: %s", where, number, "s" * (number > 1), shown)
    return splits


def _save(path: Path, key: str, build: "Callable[[], Mapping[str, Unread | Split]]") -> bool:
    """Whether the file could be written."""
    try:
        remove_leftovers(path.parent, ".*-v*.bin.*.part")  # of whichever images
        with replacing(path) as file:
            _write(file, key, build())
        return True
    except OSError as error:
        log.warning("going on without a cache, set dataset.cache to a folder with room to write: %s", error)
        return False


def _write(file: BinaryIO, key: str, splits: "Mapping[str, Unread | Split]") -> None:
    """A cache file's content; holds one image at a time, and eight bytes of every other."""
    described = {"key": key, "shape": [], "splits": {}}
    marks = {}
    for name, split in splits.items():
        digest, marks[name] = hashlib.sha256(), []
        for image in split.images:
            pixels = np.ascontiguousarray(image)
            file.write(pixels)
            digest.update(pixels)
            marks[name].append(int.from_bytes(hashlib.blake2b(pixels, digest_size=8).digest(), "little"))
            described["shape"] = list(pixels.shape)
        counts = [int(count) for count in split.counts]
        described["splits"][name] = {"names": list(split.names), "counts": counts, "sha256": digest.hexdigest()}
    text = json.dumps(described | {"twins": _twins(splits, marks)}).encode()
    file.write(text + len(text).to_bytes(LENGTH, "little") + hashlib.sha256(text).digest())


def _twins(splits: "Mapping[str, Unread | Split]", marks: dict[str, list[int]], shown: int = 3) -> dict[str, Any]:
    """How many images are in another split too, or in their own once more, and the first few of each kind.

    Those of one split can be support and query of one task.
    """
    arrays = {name: np.array(each, dtype=np.uint64) for name, each in marks.items() if each}
    told: dict[str, Any] = {"in two splits": [0, []], "twice in one split": [0, []]}
    for one, other in combinations_with_replacement(arrays, 2):
        known, firsts = np.unique(arrays[one], return_index=True)
        nearest = np.searchsorted(known, arrays[other]).clip(max=len(known) - 1)
        twins = firsts[nearest]  # the first image of `one` with these pixels, where there is one
        itself = (one == other) & (twins == np.arange(len(twins)))
        places = np.flatnonzero((known[nearest] == arrays[other]) & ~itself)
        kind = told["twice in one split" if one == other else "in two splits"]
        kind[0] += len(places)
        for place in places[: shown - len(kind[1])]:
            kind[1].append(f"{_called(splits[other], other, place)} = {_called(splits[one], one, twins[place])}")
    return told


def _called(split: "Unread | Split", name: str, place: int) -> str:
    """An image's name for messages."""
    if files := getattr(split, "files", ()):
        return files[place]
    ends = np.cumsum([int(count) for count in split.counts])
    return f"{name}/{split.names[int(np.searchsorted(ends, place, side='right'))]}"
