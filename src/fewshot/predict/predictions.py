"""What a trained model says of images of one's own."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fewshot.config.tree import STATISTICS
from fewshot.errors import UserError, one_line, shown

if TYPE_CHECKING:
    from fewshot.predict.pretrained import Picture, Pretrained

Label = str | int | float | bool

OLDER = {"queries": "task"}  # what adapted models say that were written before STATISTICS had these names


def check_statistics(knob: str, value: Any) -> str:
    """The value, if it is one of STATISTICS, in today's word."""
    value = OLDER.get(value, value) if isinstance(value, str) else value
    if value not in STATISTICS:
        raise UserError(f"{knob}={one_line(shown(value))}: must be one of {', '.join(STATISTICS)}")
    return value


@dataclass(frozen=True)
class Predictions:
    """classes: the K names, in the order of the support; probabilities: (Q, K) float64, rows sum to one."""

    classes: tuple[Label, ...]
    probabilities: np.ndarray

    @property
    def labels(self) -> list[Label]:
        """The most probable class of each query."""
        return [self.classes[number] for number in self.probabilities.argmax(axis=1)]


def predict(
    model: "Pretrained | str | os.PathLike[str]",
    support: Mapping[Label, Sequence["Picture"]],
    query: Sequence["Picture"],
    *,
    steps: int | None = None,
    test_zeroing: bool | None = None,
    statistics: str = "task",
) -> Predictions:
    """Adapts to the support images and classifies the queries; the model is left as it is.

    Args:
        model: from fewshot.load, or what it takes; adapts on the device that its learner is on.
        support: {class: its images}, two classes or more, any number of images of each; class t has row t of the head.
        query: the images to classify. An image is a PIL image, a uint8 array (H, W[, 1|3|4]) or tensor (1|3|4, H, W),
            or the path or the bytes of a file.
        steps: inner steps; None: as in training.
        test_zeroing: adapt from a zeroed head; None: as in training. A learned head that is not zeroed adapts to no
            more classes than it has rows.
        statistics: by what BatchNorm normalises. "task", as in training: by all queries of a call together, so that the
            prediction for one depends on the others; a single query has the support images beside it. "support": by the
            support images; "each": every query by itself, together with the support images.

    Raises:
        UserError: there are no images, or of another type; too many or too few classes; logits that are not finite.
    """
    from fewshot.predict.adapted import adapt  # with torch, which takes seconds

    return adapt(model, support, steps=steps, test_zeroing=test_zeroing, statistics=statistics).predict(query)
