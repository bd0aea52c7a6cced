"""The images of a torch.utils.data.Dataset of (image, label), as a split that tasks are drawn from.

Shapes: C x H x W one image.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewshot.data.task import Split
from fewshot.errors import UserError, printable


class Labelled(Protocol):
    """What is asked of a dataset: a length, and for each position an image and its label."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int, /) -> Sequence[Any]: ...


def split_of(dataset: Labelled) -> Split:
    """Reads all images of a dataset into memory, class after class, the classes in the order of their labels.

    An image may be a PIL image, an array (H, W[, C]) or a tensor (C, H, W): uint8, or floats, which stay as they are.

    Raises:
        UserError: it has no images, or they are of no such kind or differ in type or shape; or a label is several
            numbers, or the labels have no order.
    """
    classes: dict[Any, list[Tensor]] = defaultdict(list)
    first: Tensor | None = None
    for position in range(len(dataset)):
        image, label = dataset[position][:2]
        pixels = _pixels(image, position)
        first = pixels if first is None else first
        if (pixels.shape, pixels.dtype) != (first.shape, first.dtype):
            kinds = " and ".join(f"{tuple(one.shape)} {one.dtype}" for one in (first, pixels))
            raise UserError(f"dataset[{position}]: images of {kinds}; let the dataset's transform make them alike")
        try:
            classes[label.item() if hasattr(label, "item") else label].append(pixels)
        except (TypeError, RuntimeError, ValueError):  # of a list, a tensor, an array
            wanted = "give one number or text, of a one-hot label its argmax"
            raise UserError(f"dataset[{position}]: a label of several numbers; {wanted}") from None
    try:
        labels = sorted(classes)
    except TypeError as error:
        raise UserError(f"dataset: its labels have no order ({error}); use numbers or text alone") from None
    if not labels:
        raise UserError("dataset: has no images")
    images = torch.stack([image for label in labels for image in classes[label]])
    offsets = torch.tensor([0, *accumulate(len(classes[label]) for label in labels)])
    return Split(images, offsets, tuple(printable(str(label)) for label in labels))


def _pixels(image: Any, position: int) -> Tensor:
    """(C, H, W)"""
    if not isinstance(image, Tensor):
        if isinstance(image, Image.Image) and image.mode in ("P", "PA"):
            image = image.convert("RGB")  # else its numbers are places in a palette
        elif isinstance(image, Image.Image) and image.mode == "1":
            image = image.convert("L")
        array = np.array(image)  # a copy that may be written to
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        if array.ndim not in (2, 3) or array.dtype.kind not in "uf":
            kind = f"a {type(image).__name__} of {array.dtype}, shape {array.shape}"
            raise UserError(
                f"dataset[{position}]: {kind}; give a PIL image, an array (H, W[, C]) or a tensor (C, H, W)"
            )
        array = array[..., None] if array.ndim == 2 else array
        image = torch.from_numpy(array).movedim(-1, 0)  # pyright: ignore[reportUnknownMemberType]
    if image.dim() != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        kind = f"a tensor of {image.dtype}, shape {tuple(image.shape)}"
        raise UserError(f"dataset[{position}]: {kind}; give uint8 or floats of shape (C, H, W)")
    return image
