"""Datasets as others publish them: downloads into the cache folder, checked by their MD5, and pickles of images.

The download is this program's own code, because torchvision's, torch.hub's and pooch's start anew after an
interruption. Pickles are read without running what a pickle could run.

Shapes: C x H x W one image.
"""

import functools
import hashlib
import http.client
import json
import logging
import os
import pickle
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image
from rich import progress

from fewshot.data.cache import LazySplit, cache_folder
from fewshot.errors import UserError, one_line
from fewshot.files import exclusive, open_own

log = logging.getLogger(__name__)

TIMEOUT = 30  # seconds without a byte
PAUSE = 1.0  # seconds before a connection that broke is taken up again
ZENODO = "https://zenodo.org"

TARS = (".tar", ".tar.gz", ".tgz")
# All that an array, a text of Python 2 or a dictionary needs.
HARMLESS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "list"),
    ("__builtin__", "list"),
}

Sources = Mapping[str, tuple[str, str]]  # name: address, MD5


def download(
    title: str, names: Sequence[str], find: Callable[[], Sources], *, folder: str, cache: str | None, holds: str
) -> Path:
    """The folder with the files `names`, downloaded where they are not there yet.

    A file gets its name once it is whole and has its MD5. An interrupted one stays as a hidden .part, which the next
    call continues. Other processes wait for the one that downloads.

    Args:
        title: of the data set, for messages; `holds`, too: what dataset.root could be instead.
        find: tells where they are; it is called only when one is missing.
        folder: of the data set in the cache folder, which is the user's own where `cache` is None.

    Raises:
        UserError: no network, no room, or another checksum.
    """
    place = None
    try:
        place = cache_folder(cache) / folder
        if all((place / name).is_file() for name in names):
            return place
        place.mkdir(parents=True, exist_ok=True)
        with exclusive(place / ".lock", f"downloads into {place}"):
            missing = [name for name in names if not (place / name).is_file()]
            sources: Sources = find() if missing else {}
            for name in missing:
                _fetch(*sources[name], place / name)
        return place
    except (OSError, RuntimeError, ValueError, LookupError, http.client.HTTPException) as error:
        raise UserError(
            f"dataset.root=null: downloading {title} into {place or 'the cache'} failed "
            f"({getattr(error, 'reason', error)}); try again, which goes on where this ended, "
            f"set dataset.root to {holds}, or dataset.cache to a folder with room to write"
        ) from error


def zenodo(record: int, names: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Address and MD5 of files of the Zenodo record of this number; names: {name here: name there}.

    Raises OSError, LookupError or ValueError where there is no answer, or not one with these files in it.
    """
    with urlopen(f"{ZENODO}/api/records/{record}", timeout=TIMEOUT) as response:
        answer = json.load(response)
    # pooch (fatiando/pooch, downloaders.py) has met both forms: key and "md5:...", filename and the bare MD5.
    md5s = {file.get("key") or file["filename"]: file["checksum"].removeprefix("md5:") for file in answer["files"]}
    return {here: (f"{ZENODO}/record/{record}/files/{there}", md5s[there]) for here, there in names.items()}


def md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _fetch(url: str, expected: str, path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    os.close(open_own(part, os.O_RDWR | os.O_CREAT))
    log.info("downloading %s", url)
    while True:
        before = part.stat().st_size
        try:
            _transfer(url, part)
            break
        except (OSError, http.client.HTTPException) as error:
            if part.stat().st_size <= before:  # nothing came
                raise
            log.info("the connection broke, going on after %d bytes (%s)", part.stat().st_size, error)
            time.sleep(PAUSE)
    if (actual := md5(part)) != expected:
        part.unlink()
        raise OSError(f"{url} has the MD5 {actual} instead of {expected}")
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def _transfer(url: str, part: Path) -> None:
    """The rest of the file, or all of it where the server sends no parts."""
    size = part.stat().st_size
    ranges = {"Range": f"bytes={size}-"} if size else {}
    request = Request(url, headers={"User-Agent": "fewshot", **ranges})
    try:
        response = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # the server has nothing beyond what is here; the checksum tells whether that is all
            return
        raise
    with response, open(open_own(part, os.O_RDWR | os.O_APPEND), "ab") as file, _bar() as bar:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            file.truncate(0)
            size = 0
        length = response.headers["Content-Length"]
        total = size + int(length) if length else None
        task = bar.add_task(part.name[1:].removesuffix(".part"), total=total, completed=size)
        while chunk := response.read(2**16):
            file.write(chunk)
            bar.advance(task, len(chunk))
        size = file.tell()
    if total is not None and size < total:
        raise OSError(f"the connection ended after {size:,} of {total:,} bytes")


def _bar() -> progress.Progress:
    sizes = (progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
    return progress.Progress("{task.description}", progress.BarColumn(), *sizes, disable=not sys.stdout.isatty())


# Pickles


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # as numpy before 2 wrote it
        if (module, name) not in HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no images need")
        return super().find_class(module, name)


def unpickle(file: IO[bytes]) -> Any:
    """What a pickle of arrays and plain data holds.

    This is the second safeguard, because numpy's own reading of arrays was not made for hostile data. The first one:
    the caller knows the file's checksum, or the user said that it can be trusted.
    """
    return _PlainUnpickler(file, encoding="latin1").load()  # many come from Python 2


@contextmanager
def as_published(root: Path, name: str, publisher: str) -> Iterator[None]:
    """Turns whatever goes wrong inside into a UserError: what is called `name` is not as its publisher has it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damaged and foreign files make their readers raise nearly any kind
        raise UserError(
            f"dataset.root={root}: {name} is not as {publisher} has it ({type(error).__name__}: {one_line(error)}); "
            "get it again, or leave dataset.root out"
        ) from error


def open_pickles(
    root: Path,
    inside: Sequence[str],
    files: Mapping[str, Sequence[str]],
    publisher: str,
    check: Callable[[Path, str], None] | None,
) -> tuple[Callable[[str], Any], list[Any]] | None:
    """A function that reads the pickle of a key, and the fingerprint of the files; None where they are not there.

    Args:
        root: a folder with the files or a tar of them; or a folder in which one of these lies, called as in `inside`.
        files: {key: the names that its file may have}.
        publisher: of the files, for messages.
        check: raises where a pickle, or a tar, of this path and MD5 must not be opened; None: all may be.
    """
    places = (root, *(root / name for name in inside))
    paths = next(filter(None, (_paths(place, files) for place in places)), None)
    if paths is None:
        return None

    @functools.cache
    def checked(path: Path) -> None:
        if check is not None:
            check(path, md5(path))

    def read(key: str) -> Any:
        path, packed = paths[key], paths[key].name.endswith(TARS)
        with as_published(root, f"{files[key][0]} in it" if packed else path.name, publisher):
            checked(path)  # first: tarfile believes whatever size a header says
            if not packed:
                with open(path, "rb") as file:
                    return unpickle(file)
            with tarfile.open(path) as archive:
                members = {PurePosixPath(member.name).name: member for member in archive if member.isfile()}
                present = [members[name] for name in files[key] if name in members]
                if not present:
                    raise LookupError("there is none")
                file = archive.extractfile(present[0])
                assert file is not None  # it is a regular file
                return unpickle(file)

    statuses = ((path, path.stat()) for path in dict.fromkeys(paths.values()))
    return read, [[str(path.resolve()), status.st_size, status.st_mtime_ns] for path, status in statuses]


def _paths(place: Path, files: Mapping[str, Sequence[str]]) -> dict[str, Path] | None:
    """{key: its file, or the tar of all}; None where one is missing."""
    if place.is_file():
        return dict.fromkeys(files, place) if place.name.endswith(TARS) else None
    paths = {key: [place / name for name in names if (place / name).is_file()] for key, names in files.items()}
    return {key: present[0] for key, present in paths.items()} if all(paths.values()) else None


def gather(classes: Mapping[str, Sequence[int] | np.ndarray], image: Callable[[int], np.ndarray]) -> LazySplit:
    """A split whose classes are lists of numbers; `image` makes an image (C, H, W) of a number.

    What `image` holds, such as the pickle, is let go after the last image.
    """
    images = (image(number) for members in classes.values() for number in members)
    return LazySplit(images, [len(members) for members in classes.values()], tuple(classes))


def fit(pixels: np.ndarray, *, size: int, channels: int) -> np.ndarray:
    """(H, W, 3) uint8 -> (channels, size, size)."""
    if pixels.shape == (size, size, channels):
        return pixels.transpose(2, 0, 1)
    image = Image.fromarray(pixels).convert("RGB" if channels == 3 else "L")
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)
