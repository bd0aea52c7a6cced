"""Images on disk as uint8 tensors: a folder or zip, decoding, and the cache that saves doing it twice.

Shapes: M images of a split, N its classes, C x H x W one image.
"""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import re
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from fewshot.config import UserError
from fewshot.tasks import Split

log = logging.getLogger(__name__)

# Part of every cache key: raise it whenever the same files would give other pixels than before.
CACHE_VERSION = 1
# A member that unpacks to more is no photo (a zip bomb is one line, not a full memory).
LARGEST_FILE = 256 * 2**20
# Pillow opens these by starting another program, or only recognises them.
NOT_PICTURES = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}


@dataclass(frozen=True)
class Source:
    """The files of a folder or a zip.

    root: as the user gave it, for messages
    names: sorted paths relative to the folder that holds the wanted top folders; a folder's own name ends with "/"
    identity: changes whenever a file does
    read: a name's bytes
    """

    root: Path
    names: tuple[str, ...]
    identity: Any
    read: Callable[[str], bytes]


def open_source(root: Path, tops: Iterable[str]) -> Source:
    """What lies under the folders `tops` of a folder or zip, which may wrap them in one enclosing folder.

    Raises:
        UserError: `root` does not exist, cannot be read, or is a file but not a sound zip.
    """
    tops = frozenset(tops)
    try:
        if root.is_dir():
            return _open_folder(root, tops)
        if root.exists():
            return _open_zip(root, tops)
    except zipfile.BadZipFile as error:
        raise UserError(
            f"dataset.root={root}: not a whole zip file ({error}); copy or download it again, or give a folder"
        ) from error
    except OSError as error:
        raise UserError(f"dataset.root={root}: cannot be read: {error}") from error
    raise UserError(f"dataset.root={root}: no such file or folder; give the folder or zip that holds the images")


def _open_folder(root: Path, tops: frozenset[str]) -> Source:
    def holds_tops(folder: Path) -> bool:
        return any((folder / top).is_dir() for top in tops)

    base = root
    if not holds_tops(root):
        wrappers = [path for path in root.iterdir() if path.is_dir() and not _hidden(path.name) and holds_tops(path)]
        base = wrappers[0] if len(wrappers) == 1 else root
    entries = [["", str(base.resolve())]]
    for top in tops:
        for folder, folders, files in os.walk(base / top, followlinks=True, onerror=_raise_unless_absent):
            folders[:] = [name for name in folders if not _hidden(name)]
            relative = Path(folder).relative_to(base).as_posix()
            entries.append([f"{relative}/"])
            for name in files:
                if not _hidden(name):
                    status = os.stat(os.path.join(folder, name))
                    entries.append([f"{relative}/{name}", status.st_size, status.st_mtime_ns])
    entries.sort(key=lambda entry: entry[0])
    names = tuple(entry[0] for entry in entries[1:])
    return Source(root, names, entries, lambda name: (base / name).read_bytes())


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # an absent top folder is for the caller to judge
        raise error


def _open_zip(root: Path, tops: frozenset[str]) -> Source:
    archive = zipfile.ZipFile(root)
    status = root.stat()
    members = {}
    for info in archive.infolist():
        parts = info.filename.split("/")
        # Nothing is ever extracted; but a zip with such names is not what it says it is.
        if parts[0] == "" or ".." in parts or "\\" in info.filename or re.match("[A-Za-z]:", info.filename):
            raise UserError(f"dataset.root={root}: unsafe path {info.filename!r} in the zip; make the zip anew")
        if not any(_hidden(part) for part in parts):
            members[info.filename] = info
    base = ""
    if not any(name.split("/")[0] in tops for name in members):
        wrappers = {name.split("/")[0] for name in members if name.split("/")[1:2] and name.split("/")[1] in tops}
        base = f"{wrappers.pop()}/" if len(wrappers) == 1 else ""
    names = (name.removeprefix(base) for name in members if name.startswith(base))

    def read(name: str) -> bytes:
        info = members[base + name]
        if info.file_size > LARGEST_FILE:
            raise ValueError(f"it unpacks to {info.file_size:,} bytes")
        return archive.read(info)

    identity = [str(root.resolve()), status.st_size, status.st_mtime_ns]
    return Source(root, tuple(sorted(name for name in names if name.split("/")[0] in tops)), identity, read)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


@functools.cache
def formats() -> tuple[str, ...]:
    """The picture formats that Pillow itself decodes."""
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_PICTURES)


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    known = Image.registered_extensions()
    return not name.endswith("/") and known.get(PurePosixPath(name).suffix.lower()) in formats()


def decode(data: bytes, *, size: int, channels: int, resample: Image.Resampling) -> np.ndarray:
    """(C, size, size) uint8: an image file the right way up, the middle square of it, resized."""
    with Image.open(io.BytesIO(data), formats=formats()) as opened:
        return square(opened, size=size, channels=channels, resample=resample)


def square(image: Image.Image, *, size: int, channels: int, resample: Image.Resampling) -> np.ndarray:
    """`decode` of an image that is open already."""
    image = _eight_bits(ImageOps.exif_transpose(image))
    if image.has_transparency_data:  # what lies under transparent pixels is arbitrary, often black: show paper
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB" if channels == 3 else "L")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), resample, box=(left, top, left + side, top + side))
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow's own conversion cuts 16-bit grey off at 255 instead of scaling it."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("pixels of more than 16 bits, or fractions, have no agreed white: save it with 8 or 16 bits")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def read_splits(
    classes: Mapping[str, Mapping[str, list[tuple[Source, str]]]],
    *,
    size: int,
    channels: int,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> dict[str, Split]:
    """The splits whose classes are given as lists of files.

    Raises:
        UserError: an image cannot be read.
    """
    log.info("reading %d images", sum(len(files) for split in classes.values() for files in split.values()))
    splits = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for split, members in classes.items():
            files = [file for images in members.values() for file in images]
            images = np.empty((len(files), channels, size, size), dtype=np.uint8)
            for image, (source, name) in zip(images, files, strict=True):
                image[:] = _read_image(source, name, size=size, channels=channels, resample=resample)
            offsets = np.cumsum([0, *map(len, members.values())])
            splits[split] = Split(torch.from_numpy(images), torch.from_numpy(offsets), tuple(members))
    return splits


def _read_image(source: Source, name: str, **how: Any) -> np.ndarray:
    try:
        return decode(source.read(name), **how)
    except UnidentifiedImageError:  # its own text names a memory address
        reason = "not an image in a format that Pillow knows"
    except Exception as error:  # Pillow's and zipfile's decoders raise nearly every kind on broken data
        reason = " ".join(str(error).split()) or type(error).__name__
    raise UserError(f"dataset.root={source.root}: cannot read image {name!r}: {reason}; replace or remove it")


def cache_folder(cache: str | None) -> Path:
    """`dataset.cache`, or the user's cache folder."""
    if cache is not None:
        return Path(str(cache)).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # A relative XDG_CACHE_HOME is to be ignored, says its specification.
    return (Path(shared) if os.path.isabs(shared) else Path("~/.cache").expanduser()) / "fewshot"


def cached(
    name: str, identity: Any, *, size: int, channels: int, cache: str | None, build: Callable[[], dict[str, Split]]
) -> dict[str, Split]:
    """What `build` returns, from the cache where it holds just that.

    Args:
        name: of the source of images.
        identity: whatever the images depend on besides size and channels; plain lists, numbers and text.
        size, channels: of the images.
        cache: folder, None for the user's own.
        build: makes the splits.
    """
    key = hashlib.sha256(json.dumps([CACHE_VERSION, name, identity, size, channels]).encode()).hexdigest()
    try:
        path = cache_folder(cache) / f"{name}-{size}x{size}x{channels}-{key[:16]}.bin"
    except RuntimeError as error:  # no home folder
        log.warning("no cache: %s; set dataset.cache to a folder to keep the images in", error)
        return build()
    splits = _load(path, key)
    if splits is None:
        splits = build()
        _save(path, key, splits)
    return splits


# A cache file: the SHA-256 of the rest, a line of JSON that describes the images, the pixels.


def _load(path: Path, key: str) -> dict[str, Split] | None:
    try:
        with open(path, "rb") as file:
            digest, header = file.readline(), file.readline()
            pixels = np.fromfile(file, dtype=np.uint8)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        log.warning("cache file cannot be read, building the images anew: %s", error)
        return None
    if digest != _digest(header, pixels) or (described := json.loads(header))["key"] != key:
        log.warning("cache file %s is damaged, building the images anew", path)
        return None
    splits, first, shape = {}, 0, described["shape"]
    for split, (names, offsets) in described["splits"].items():
        last = first + offsets[-1] * int(np.prod(shape))
        images = torch.from_numpy(pixels[first:last].reshape(-1, *shape))
        splits[split], first = Split(images, torch.tensor(offsets, dtype=torch.int64), tuple(names)), last
    return splits


def _save(path: Path, key: str, splits: dict[str, Split]) -> None:
    shape = next(iter(splits.values())).images.shape[1:]
    described = {"key": key, "shape": list(shape), "splits": {}}
    for name, split in splits.items():
        described["splits"][name] = [list(split.names), split.offsets.tolist()]
    header = json.dumps(described).encode() + b"\n"
    pixels = np.concatenate([split.images.numpy().reshape(-1) for split in splits.values()])
    # A name of its own for each process, moved into place whole: whoever is last wins, with the same content.
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb") as file:
            file.write(_digest(header, pixels) + header)
            file.write(pixels)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        log.warning("going on without a cache, set dataset.cache to a folder with room to write: %s", error)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _digest(header: bytes, pixels: np.ndarray) -> bytes:
    digest = hashlib.sha256(header)
    digest.update(pixels)
    return digest.hexdigest().encode() + b"\n"
