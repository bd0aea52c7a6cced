"""What a task is, and the images of a split that tasks are drawn from.

Shapes: B tasks, K ways, S support and Q query images per task, C x H x W one image, M images of a split, N its classes.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """The images of one split, class after class.

    images: (M, C, H, W) uint8
    offsets: (N + 1,) int64; the images of class n are images[offsets[n]:offsets[n + 1]]
    names: the N class names
    sha256: of the pixels, or of the cached pixels that they are made of; "" where it is not known
    """

    images: Tensor
    offsets: Tensor
    names: tuple[str, ...]
    sha256: str = ""

    @property
    def counts(self) -> Tensor:
        """(N,) int64, images per class."""
        return self.offsets.diff()


class Task(NamedTuple):
    """One task, or with a leading B a batch of them.

    support: ([B,] S, C, H, W) float, support_labels: ([B,] S) int64 in 0..K-1; query and query_labels likewise with Q.
    The images of a class lie together. TaskSampler says by its kind which class gets which label.
    """

    support: Tensor  # S_n, images s
    support_labels: Tensor  # t
    query: Tensor  # Q_n, images q
    query_labels: Tensor  # u

    def one_by_one(self) -> list["Task"]:
        """The tasks of a batch, each without the leading B."""
        return [Task(*fields) for fields in zip(*self, strict=True)]


def squared_errors(logits: Tensor, labels: Tensor) -> Tensor:
    """1/2 sum over a task's I images and K ways of (logits - one-hot labels)^2: (..., I, K), (..., I) -> (...)."""
    one_hot = F.one_hot(labels, logits.shape[-1]).to(logits)
    return F.mse_loss(logits, one_hot, reduction="none").sum((-2, -1)) / 2


def query_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of a task's queries whose largest logit is the right one: (..., Q, K), (..., Q) -> (...).

    NaN where a logit of the task is not finite: otherwise the one called largest would look like a guess.
    """
    # Not above: it imports torchvision and SciPy, which takes seconds, and nothing is measured where one predicts.
    from torchmetrics.functional.classification import multiclass_accuracy

    knobs = {"average": "micro", "multidim_average": "samplewise", "validate_args": False}
    flat, labels = logits.flatten(0, -3), labels.expand(logits.shape[:-1]).flatten(0, -2)
    shares = multiclass_accuracy(flat.mT, labels, flat.shape[2], **knobs)
    return shares.masked_fill(~flat.isfinite().all(dim=2).all(dim=1), math.nan).view(logits.shape[:-2])
