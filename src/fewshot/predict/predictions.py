"""A trained model adapts to a few images of each class and says which class new images are of.

Shapes: K ways, S support and Q query images of C channels, H x W pixels.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fewshot.config.command import integer
from fewshot.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from fewshot.predict.pretrained import Picture, Pretrained
    from fewshot.training.meta_learner import MetaLearner


@dataclass(frozen=True)
class Predictions:
    """classes: the K names, in the order of the support; probabilities: (Q, K) float64, rows sum to one."""

    classes: tuple[str, ...]
    probabilities: np.ndarray

    @property
    def labels(self) -> list[str]:
        """The most probable class of each query."""
        return [self.classes[number] for number in self.probabilities.argmax(axis=1)]


def predict(
    model: "Pretrained | str | Path",
    support: Mapping[str, Sequence["Picture"]],
    query: Sequence["Picture"],
    *,
    steps: int | None = None,
    test_zeroing: bool | None = None,
) -> Predictions:
    """Adapts to the support images and classifies the queries; the model is left as it is.

    BatchNorm normalises all queries of a call together, as in training, so the prediction for one depends on the
    others. A single query is normalised together with the support images.

    Args:
        model: from fewshot.load, or what it takes; adapts on the device that its learner is on.
        support: {class: its images}, two classes or more, as many images as there are; class t has row t of the head.
        query: the images to classify. An image is a PIL image, a uint8 array (H, W[, 1|3|4]) or tensor (1|3|4, H, W),
            or the bytes of a file.
        steps: inner steps; None: as in training.
        test_zeroing: adapt from a zeroed head; None: as in training. Without it there can be no more classes than rows.

    Raises:
        UserError: there are no images, or of another type; too many or too few classes; logits that are not finite.
    """
    import torch

    from fewshot.data.task import Task
    from fewshot.predict.pretrained import load
    from fewshot.training.choose_engine import engine_to_predict

    if isinstance(model, str | os.PathLike):
        model = load(model)
    steps = model.config["inner_steps"] if steps is None else integer("steps", str(steps), 1)
    zeroing = model.config["algo"]["zeroing"] if test_zeroing is None else test_zeroing
    if zeroing and model.learner.loop.distance:
        raise UserError("test_zeroing=true: a prototypical network has no head that could be zeroed; use false")
    if zeroing and model.learner.loop.adapted == "encoder":
        raise UserError("test_zeroing=true: this model adapts all but the head, which would stay zero; use false")
    classes, shots = tuple(support), [len(images) for images in support.values()]
    if len(classes) < 2:
        raise UserError(f"support: has {len(classes)} classes; give at least 2 to choose between")
    if 0 in shots:
        raise UserError(f"support: has no images of {classes[shots.index(0)]!r}; give some or leave the class out")
    if not len(query):
        raise UserError("query: has no images; give at least one")
    learner = _with_ways(model.learner, len(classes), zeroing)
    parameter = next(learner.parameters())

    def batch(images: Sequence["Picture"]) -> "Tensor":
        return torch.stack([model.preprocess(image) for image in images]).to(parameter)

    shown, asked = batch([image for images in support.values() for image in images]), batch(query)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(shots)).to(parameter.device)
    if len(query) == 1:
        asked = torch.cat([shown, asked])
    unknown = torch.zeros(len(asked), dtype=torch.int64, device=parameter.device)  # a task has labels; none is read
    task = Task(*(field[None] for field in (shown, labels, asked, unknown)))
    loop = learner.loop.evaluation(steps, zeroing)
    engine = engine_to_predict()
    with torch.enable_grad(), engine.one_line_out_of_memory(task):
        logits = engine.step_logits(learner.network, task, loop, learner.etas, first=loop.inner_steps)[
            0, 0, -len(query) :
        ]
    if not logits.isfinite().all():
        raise UserError(f"steps={steps}: the adapted model's logits are not finite numbers; adapt it in fewer steps")
    return Predictions(classes, logits.double().softmax(dim=1).cpu().numpy())


def _with_ways(learner: "MetaLearner", ways: int, zeroing: bool) -> "MetaLearner":
    """The learner with a head of so many rows: the first of its own, then new ones where their values do not matter."""
    import torch

    rows = len(learner.network.head.weight)
    if ways == rows:
        return learner
    if ways > rows and not zeroing and learner.loop.head == "learned":
        remedy = (
            ", or test_zeroing=true, which lets all rows begin at zero" if learner.loop.adapted != "encoder" else ""
        )
        raise UserError(
            f"test_zeroing=false: support has {ways} classes, the head {rows} rows, each learned for a label of the "
            f"training tasks, and none for label {rows}; give at most {rows} classes{remedy}"
        )
    if len(learner.etas):
        raise UserError(
            f"support: has {ways} classes, the model an inner_lr learned for each number of {rows} rows; give {rows}"
        )
    learner = copy.deepcopy(learner)
    head = learner.network.head
    for name, parameter in list(head.named_parameters()):
        # Where all rows are one vector, one more is the same; elsewhere what is added will be written over.
        added = parameter.detach()[:1].expand(max(0, ways - rows), *parameter.shape[1:])
        setattr(head, name, torch.nn.Parameter(torch.cat([parameter.detach()[:ways], added])))
    head.out_features = ways
    return learner
