"""Image files in a folder or zip, and what becomes of their pixels.

Shapes: C x H x W one image.
"""

import functools
import io
import logging
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fewshot.errors import UserError, some

if TYPE_CHECKING:
    from fewshot.data.cache import Unread

log = logging.getLogger(__name__)

# A file that is larger, or unpacks to more, is no photo (a zip bomb is one line, not a full memory).
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


def open_source(root: Path, tops: Iterable[str] = ()) -> Source:
    """What lies under the folders `tops` of a folder or zip, which may wrap them in one enclosing folder.

    Without tops: all that it holds, as it lies there.

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
    if tops and not holds_tops(root):
        wrappers = [path for path in root.iterdir() if path.is_dir() and not _hidden(path.name) and holds_tops(path)]
        base = wrappers[0] if len(wrappers) == 1 else root
    entries = [["", str(base.resolve())]]
    for top in tops or ["."]:
        for folder, folders, files in os.walk(base / top, followlinks=True, onerror=_raise_unless_absent):
            folders[:] = [name for name in folders if not _hidden(name)]
            inside = Path(folder).relative_to(base)
            if inside.parts:
                entries.append([f"{inside.as_posix()}/"])
            for name in files:
                if not _hidden(name):
                    status = os.stat(os.path.join(folder, name))
                    entries.append([(inside / name).as_posix(), status.st_size, status.st_mtime_ns])
    entries.sort(key=lambda entry: entry[0])
    names = tuple(entry[0] for entry in entries[1:])

    def read(name: str) -> bytes:
        if (length := os.path.getsize(base / name)) > LARGEST_FILE:
            raise ValueError(f"it has {length:,} bytes")
        return (base / name).read_bytes()

    return Source(root, names, entries, read)


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
    if tops and not any(name.split("/")[0] in tops for name in members):
        wrappers = {name.split("/")[0] for name in members if name.split("/")[1:2] and name.split("/")[1] in tops}
        base = f"{wrappers.pop()}/" if len(wrappers) == 1 else ""
    names = [name.removeprefix(base) for name in members if name.startswith(base)]
    if tops:
        names = [name for name in names if name.split("/")[0] in tops]

    def read(name: str) -> bytes:
        info = members[base + name]
        if info.file_size > LARGEST_FILE:
            raise ValueError(f"it unpacks to {info.file_size:,} bytes")
        return archive.read(info)

    identity = [str(root.resolve()), status.st_size, status.st_mtime_ns]
    return Source(root, tuple(sorted(names)), identity, read)


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
    return not name.endswith("/") and known.get(os.path.splitext(name)[1].lower()) in formats()


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
) -> "dict[str, Unread]":
    """The splits whose classes are given as lists of files, each read when its turn comes.

    Raises:
        UserError: images cannot be read; then, when they are asked for.
    """
    from fewshot.data.cache import Unread  # imports torch, and a folder can be looked at without it

    how = {"size": size, "channels": channels, "resample": resample}
    files = [file for split in classes.values() for images in split.values() for file in images]
    log.info("reading %d images", len(files))
    splits, first = {}, 0
    for split, members in classes.items():
        counts = [len(images) for images in members.values()]
        last = first + sum(counts)
        names = [name for _, name in files[first:last]]
        splits[split] = Unread(_read_images(files, first, last, how), counts, tuple(members), names)
        first = last
    return splits


def _read_images(files: list[tuple[Source, str]], first: int, last: int, how: dict[str, Any]) -> Iterator[np.ndarray]:
    """The images of files[first:last]; if one cannot be read, all after it are tried, so that all are told at once."""
    for place in range(first, last):
        image = _read_image(*files[place], how)
        if isinstance(image, str):
            broken = [f"{files[place][1]!r}: {image}"]
            for source, name in files[place + 1 :]:
                if isinstance(reason := _read_image(source, name, how), str):
                    broken.append(f"{name!r}: {reason}")
            number = f"{len(broken)} images: " if len(broken) > 1 else "image "
            remedy = "them" if len(broken) > 1 else "it"
            raise UserError(
                f"dataset.root={files[place][0].root}: cannot read {number}{some(broken)}; replace or remove {remedy}"
            )
        yield image


def _read_image(source: Source, name: str, how: dict[str, Any]) -> np.ndarray | str:
    """(C, size, size) uint8, or why not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return decode(source.read(name), **how)
    except UnidentifiedImageError:  # its own text names a memory address
        return "not an image in a format that Pillow knows"
    except Exception as error:  # Pillow's and zipfile's decoders raise nearly every kind on broken data
        return " ".join(str(error).split()) or type(error).__name__
