"""Images in pickles, as the few-shot literature shares them, read without running what a pickle could run.

Shapes: C x H x W one image.
"""

import functools
import pickle
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from fewshot.data.cache import LazySplit
from fewshot.data.download import md5
from fewshot.errors import UserError, one_line

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


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # as numpy before 2 wrote it
        if (module, name) not in HARMLESS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no images need")
        return super().find_class(module, name)


def unpickle(file: BinaryIO) -> Any:
    """What a pickle of arrays and plain data holds.

    This is the second safeguard, because numpy's own reading of arrays was not made for hostile data. The first one:
    the caller knows the file's checksum, or the user said that it can be trusted.
    """
    return _PlainUnpickler(file, encoding="latin1").load()  # many come from Python 2


@contextmanager
def as_published(root: Path, name: str, publisher: str) -> Iterator[None]:
    """Whatever goes wrong inside is a UserError: what is called `name` is not as its publisher has it."""
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
        with open(path, "rb") as file:
            check(path, md5(file))

    def read(key: str) -> Any:
        path, packed = paths[key], paths[key].name.endswith(TARS)
        with as_published(root, f"{files[key][0]} in it" if packed else path.name, publisher):
            if check is not None:
                checked(path)  # first: tarfile believes whatever size a header says
            if not packed:
                with open(path, "rb") as file:
                    return unpickle(file)
            with tarfile.open(path) as archive:
                members = {PurePosixPath(member.name).name: member for member in archive if member.isfile()}
                present = [members[name] for name in files[key] if name in members]
                if not present:
                    raise LookupError("there is none")
                return unpickle(archive.extractfile(present[0]))

    statuses = ((path, path.stat()) for path in dict.fromkeys(paths.values()))
    return read, [[str(path.resolve()), status.st_size, status.st_mtime_ns] for path, status in statuses]


def _paths(place: Path, files: Mapping[str, Sequence[str]]) -> dict[str, Path] | None:
    """{key: its file, or the tar of all}; None where one is missing."""
    if place.is_file():
        return dict.fromkeys(files, place) if place.name.endswith(TARS) else None
    paths = {key: [place / name for name in names if (place / name).is_file()] for key, names in files.items()}
    return {key: present[0] for key, present in paths.items()} if all(paths.values()) else None


def gather(classes: Mapping[str, Sequence[int]], image: Callable[[int], np.ndarray]) -> LazySplit:
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
