"""The images of a dataset on this machine: uint8, made once, verified, mapped into memory.

Each split is an array in a .npy file. A JSON beside them, which is written last, describes them: class names, images
per class, and the SHA-256 of each array's pixels. A run checks these before it takes the pixels, about a second for
each gigabyte, and then maps the files: the system keeps in memory what is used.

Shapes: M images of a split, N its classes, C x H x W one image.
"""

import hashlib
import io
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np

from fewshot.files import exclusive, remove_leftovers, replacing, user_path

if TYPE_CHECKING:  # to look for the files of a cache needs no torch
    from fewshot.data.task import Split

log = logging.getLogger(__name__)

# Part of every cache key: raise it whenever the same files would give other pixels than before. (It was not raised when
# the one transparent grey or colour of PNGs of 2, 4 and 16 bits became white, which few have: all would be read anew.)
CACHE_VERSION = 4
not_kept: list[OSError] = []  # why this process could not write images into a cache


@dataclass(frozen=True)
class LazySplit:
    """A split whose images are yet to be made.

    images: yields them one by one, class after class, (C, H, W) uint8
    counts: N numbers, images per class
    names: the N class names
    files: what each of the M images is called in messages; may be left out
    """

    images: Iterable[np.ndarray]
    counts: Sequence[int]
    names: tuple[str, ...]
    files: Sequence[str] = ()


Splits: TypeAlias = Mapping[str, LazySplit]


def cache_folder(cache: str | None) -> Path:
    """`dataset.cache`, or the user's cache folder."""
    if cache is not None:
        return user_path("dataset.cache", cache)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # A relative XDG_CACHE_HOME is to be ignored, says its specification.
    return (Path(shared) if os.path.isabs(shared) else Path("~/.cache").expanduser()) / "fewshot"


def file_stem(name: str, size: int, channels: int) -> str:
    """How the names of the cache files of a source of images begin."""
    return f"{name}-{size}x{size}x{channels}-v{CACHE_VERSION}"


def cached(
    name: str, fingerprint: Any, *, size: int, channels: int, cache: str | None, build: Callable[[], Splits]
) -> "dict[str, Split]":
    """The splits that `build` makes, from the cache where it holds just those. Nobody may write to their images.

    Other processes wait for the one that makes the cache files.

    name: of the source of images
    fingerprint: whatever the images depend on besides size and channels; plain lists, numbers and text
    cache: folder, None for the user's own
    build: makes the splits, which are written image by image, so they may be larger than the memory

    Raises:
        ValueError: `build` makes images of another kind or shape, or other numbers of them, than it says.
    """
    key = hashlib.sha256(json.dumps([CACHE_VERSION, name, fingerprint, size, channels]).encode()).hexdigest()
    shape, splits = (channels, size, size), None
    try:
        path = cache_folder(cache) / f"{file_stem(name, size, channels)}-{key[:16]}.json"
    except RuntimeError as error:  # no home folder
        log.warning("no cache: %s; set dataset.cache to a folder to keep the images in", error)
    else:
        splits = _load(path, key, quietly=True)
        if splits is None:
            with exclusive(path.with_name(f".{path.name}.lock"), f"makes {path}"):
                splits = _load(path, key)  # another process may just have made it
                if splits is None and _save(path, key, shape, build):
                    splits = _load(path, key)
    if splits is None:
        held: dict[str, io.BytesIO] = {}
        content = _write(build(), key, shape, lambda split, _: held.setdefault(split, io.BytesIO()))
        arrays = {split: np.frombuffer(file.getbuffer(), np.uint8).reshape(-1, *shape) for split, file in held.items()}
        splits = _checked(content, key, arrays.__getitem__)
    return splits


def _load(path: Path, key: str, quietly: bool = False) -> "dict[str, Split] | None":
    """What the cache holds; None where there is nothing, or nothing that can be used."""

    def mapped(split: str) -> np.ndarray:
        array = np.lib.format.open_memmap(_array_path(path, split), mode="r")
        if array.offset + array.nbytes != _array_path(path, split).stat().st_size:
            raise ValueError("an array ends before its file")
        return array

    if not os.path.isfile(path):
        return None
    try:
        return _checked(path.read_bytes(), key, mapped)
    except Exception as error:  # damage makes the readers of JSON and NumPy raise nearly any kind
        if not quietly:
            log.warning("cache file %s is damaged or cannot be read (%s), building the images anew", path, error)
        return None


def _array_path(path: Path, split: str) -> Path:
    return path.with_name(f"{path.stem}-{split}.npy")


def _checked(content: bytes, key: str, array: Callable[[str], np.ndarray]) -> "dict[str, Split]":
    """The splits that `content` (JSON) describes, with their arrays; raises where anything is wrong."""
    import torch

    from fewshot.data.task import Split

    described = json.loads(content)
    if described.pop("sha256") != _sum(described) or described["key"] != key:
        raise ValueError("not as it was written")
    splits = {}
    for name, split in described["splits"].items():
        pixels, offsets = array(name), np.cumsum([0, *split["counts"]])
        as_written = pixels.dtype == np.uint8 and pixels.shape == (offsets[-1], *described["shape"])
        if not as_written or hashlib.sha256(pixels.data).hexdigest() != split["sha256"]:
            raise ValueError("not as it was written")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nobody writes to it
            images = torch.from_numpy(pixels)
        splits[name] = Split(images, torch.from_numpy(offsets), tuple(split["names"]), split["sha256"])
    for where, (number, examples) in described["duplicates"].items():
        if number:
            text = ", ".join(examples) + " ..." * (number > len(examples))
            log.warning("the same pixels %s, %d time%s: %s", where, number, "s" * (number > 1), text)
    return splits


def _save(path: Path, key: str, shape: tuple[int, int, int], build: Callable[[], Splits]) -> bool:
    """Writes the cache files; returns whether that was possible."""
    try:
        remove_leftovers(path.parent, ".*x*x*-v*.part")  # of whichever images
        with ExitStack() as files:  # they take their places in reverse order, the arrays first
            description = files.enter_context(replacing(path))

            def new_array(split: str, shape: tuple[int, ...]) -> BinaryIO:
                file = files.enter_context(replacing(_array_path(path, split)))
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                return file

            description.write(_write(build(), key, shape, new_array))
        return True
    except OSError as error:
        not_kept.append(error)
        log.warning("going on without a cache, set dataset.cache to a folder with room to write: %s", error)
        return False


def _write(
    splits: Splits, key: str, shape: tuple[int, int, int], new_array: Callable[[str, tuple[int, ...]], BinaryIO]
) -> bytes:
    """Writes each split into a file of its own and gives the JSON that describes them.

    Holds one image at a time, and a hash of every other. Images with the same pixels are counted: in two splits they
    test what was trained on, in one split they can be support and query of one task. (Written as files: a full disk
    ends a process that writes to memory-mapped ones.)

    Raises:
        ValueError: a source makes images of another kind or shape, or other numbers of them, than it says.
    """
    described: dict[str, Any] = {"key": key, "shape": shape, "splits": {}}
    described["duplicates"] = duplicates = {"in two splits": [0, []], "twice in one split": [0, []]}
    firsts: dict[str, dict[bytes, int]] = {}  # for each split where its pixels come first
    for name, split in splits.items():
        total, place = sum(split.counts), -1
        file, digest, firsts[name] = new_array(name, (total, *shape)), hashlib.sha256(), {}
        for place, image in enumerate(split.images):
            pixels = np.ascontiguousarray(image)
            if (pixels.dtype, pixels.shape) != (np.uint8, shape):
                raise ValueError(f"image {place} of {name} is {pixels.dtype} {pixels.shape}; it must be uint8 {shape}")
            if place == total:
                raise ValueError(f"{name} has more images than its counts say, {total}")
            file.write(pixels.data)
            digest.update(pixels.data)
            mark = hashlib.blake2b(pixels.data, digest_size=8).digest()
            for other, places in firsts.items():
                if mark in places:
                    kind = duplicates["twice in one split" if other == name else "in two splits"]
                    kind[0] += 1
                    if len(kind[1]) < 3:
                        first = _called(splits[other], other, places[mark])
                        kind[1].append(f"{_called(split, name, place)} = {first}")
            firsts[name].setdefault(mark, place)
        if place + 1 < total:
            raise ValueError(f"{name} has {place + 1} images, fewer than its counts say, {total}")
        described["splits"][name] = {"names": split.names, "counts": split.counts, "sha256": digest.hexdigest()}
    return json.dumps(described | {"sha256": _sum(described)}).encode()


def _sum(described: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _called(split: LazySplit, name: str, place: int) -> str:
    """An image's name for messages."""
    label = int(np.searchsorted(np.cumsum(split.counts), place, side="right"))
    return split.files[place] if split.files else f"{name}/{split.names[label]}"
