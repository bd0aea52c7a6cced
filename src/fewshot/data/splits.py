"""What `dataset.source` makes, of one's own too: looked at before anything else sees it.

Shapes: M images of a split, N its classes, C x H x W one image.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import Tensor

from fewshot.data.task import SPLITS, Split
from fewshot.errors import UserError, one_line, reason_of


def splits_of(source: Any, shape: Sequence[int] | None = None) -> dict[str, Split]:
    """The splits that `dataset.source` makes, each with the SHA-256 of its pixels.

    shape: (C, H, W) that the configuration says its images have; None: any.

    Raises:
        UserError: whatever the source says of its files; it fails, or what it makes are no such splits.
    """
    asked = f"dataset.source._target_={source._target_}"
    try:
        splits = instantiate(source)
    except InstantiationException as error:  # Hydra wraps what the source raises
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(one_line(f"{asked}: fails ({reason_of(error)})")) from error
    if wrong := _wrong(splits, shape):
        raise UserError(one_line(f"{asked}: {wrong}"))
    return {name: _with_sum(splits[name]) for name in SPLITS}


def _wrong(splits: Any, shape: Sequence[int] | None) -> str | None:
    """What is wrong with what a source has returned, and what would be right; None: nothing is."""
    if not isinstance(splits, dict) or {*SPLITS} - {*splits}:
        kind = sorted(map(str, splits)) if isinstance(splits, dict) else type(splits).__name__
        return f"returns {kind}; it must return a dictionary with {', '.join(SPLITS)}"
    for name in SPLITS:
        split: Any = splits[name]
        if not isinstance(split, Split):
            return f"{name} is a {type(split).__name__}; it must be a fewshot.data.task.Split, as cached makes one"
        images, offsets, classes = split.images, split.offsets, len(split.names)
        right = isinstance(images, Tensor) and images.dim() == 4 and images.dtype == torch.uint8
        if not right or (shape is not None and tuple(images.shape[1:]) != tuple(shape)):
            kind = f"{getattr(images, 'dtype', type(images).__name__)} {tuple(getattr(images, 'shape', ()))}"
            wanted = "C, H, W" if shape is None else ", ".join(map(str, shape))
            said = "" if shape is None else ", as dataset.channels and dataset.size say"
            return f"the images of {name} are {kind}; they must be a tensor of torch.uint8, (M, {wanted}){said}"
        whole = isinstance(offsets, Tensor) and offsets.dtype == torch.int64 and offsets.shape == (classes + 1,)
        if not whole or offsets[0] != 0 or offsets[-1] != len(images) or bool((offsets.diff() < 0).any()):
            numbers = f"from 0 to the number of its images, {len(images)}"
            return f"the offsets of {name} must be {classes + 1} rising numbers, a tensor of torch.int64, {numbers}"
    return None


def _with_sum(split: Split) -> Split:
    """A split that did not come from the cache has its pixels summed up here."""
    pixels = split.images.cpu().contiguous().numpy()
    return split if split.sha256 else replace(split, sha256=hashlib.sha256(pixels.data).hexdigest())
