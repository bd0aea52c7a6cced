"""Images in pickles, as the few-shot literature shares them, read without running what a pickle could run.

Shapes: C x H x W one image.
"""

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from fewshot.data.cache import LazySplit

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

    Raises:
        ValueError: it holds anything else, or is damaged.
    """
    try:
        return _PlainUnpickler(file, encoding="latin1").load()  # many come from Python 2
    except Exception as error:  # a damaged one raises nearly any kind
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


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


def fingerprint(paths: Iterable[Path]) -> list[list[Any]]:
    """Changes whenever one of the files does."""
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
