"""A trained model as an estimator of scikit-learn: fit adapts it to some images of each class."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from fewshot.errors import UserError, of_extra
from fewshot.predict.adapted import Adapted, adapt
from fewshot.predict.predictions import Predictions
from fewshot.predict.pretrained import Picture, Pretrained, load, stacked

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d
except ImportError:
    raise UserError(f"fewshot.FewShotClassifier: needs {of_extra('sklearn', 'scikit-learn')}") from None


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """FewShotClassifier(model).fit(images, labels).predict(others); scikit-learn scores and searches with it.

    Images are a list or an array of pictures of any sizes: PIL images, uint8 arrays (H, W[, 1|3|4]), uint8 tensors
    (1|3|4, H, W), bytes of files, or paths. Labels are of any kind that scikit-learn classifies by. Classes may have
    different numbers of images.

    Args:
        model: whatever fewshot.load takes, or what it returned.
        steps: inner steps of fit; None: as in training.
        zeroing: adapt from a zeroed head, to any number of classes; None: as in training.
        statistics: by what BatchNorm normalises. "task": by the images of one call of predict together, as in training,
            so that one prediction depends on the others; "support": by the images that it was fitted to; "each": every
            image by itself, together with those.
        trust: as in fewshot.load.

    Attributes:
        classes_: the labels, sorted; the columns of predict_proba.
        adapted_: the adapted model, a fewshot.predict.Adapted.
    """

    def __init__(
        self,
        model: "Pretrained | str | os.PathLike[str]",
        *,
        steps: int | None = None,
        zeroing: bool | None = None,
        statistics: str = "task",
        trust: bool = False,
    ) -> None:
        self.model = model
        self.steps = steps
        self.zeroing = zeroing
        self.statistics = statistics
        self.trust = trust

    def fit(self, images: Sequence[Picture], labels: Sequence[Any]) -> "FewShotClassifier":
        """Adapts the model to the images of each class; what an earlier fit left is forgotten."""
        if labels is None:
            raise ValueError("requires y to be passed, but the target y is None: give a label for each image")
        column = column_or_1d(labels, warn=True)
        try:
            check_classification_targets(column)
            classes, numbers = np.unique(column, return_inverse=True)
        except TypeError as error:  # None beside text, for example
            raise UserError(f"labels: cannot be sorted ({error}); give labels of one kind") from None
        originals = np.array(labels, dtype=object).ravel() if isinstance(labels, list | tuple) else ()
        if column.dtype.kind == "U" and not all(isinstance(label, str) for label in originals):
            raise UserError("labels: texts and numbers, of which NumPy makes texts; give labels of one kind")
        if len(classes) < 2:
            raise ValueError(f"labels: {len(classes)} class; give images of at least 2 to choose between")
        model = self.model if isinstance(self.model, Pretrained) else load(self.model, trust=self.trust)
        pixels = stacked("images", model.preprocess, images)
        check_consistent_length(pixels, column)
        support = {label: list(pixels[numbers == number]) for number, label in enumerate(classes.tolist())}
        self.adapted_: Adapted = adapt(
            model, support, steps=self.steps, test_zeroing=self.zeroing, statistics=self.statistics
        )
        self.classes_ = classes
        return self

    def predict_proba(self, images: Sequence[Picture]) -> np.ndarray:
        """(Q, K), the probability of each of classes_; rows sum to one."""
        check_is_fitted(self)
        pixels = stacked("images", self.adapted_.preprocess, images)
        predictions: Predictions = self.adapted_.predict(list(pixels))
        rows = np.array(self.adapted_.classes)  # of the head; what adapt wrote may have them in any order
        return predictions.probabilities[:, rows.argsort(kind="stable")]

    def predict(self, images: Sequence[Picture]) -> np.ndarray:
        """(Q,), the most probable label of each image."""
        probabilities = self.predict_proba(images)
        return self.classes_[probabilities.argmax(axis=1)]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the adapted model, its labels and the images that it was fitted to; see fewshot.predict.Adapted."""
        check_is_fitted(self)
        self.adapted_.save(folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, trust: bool = False) -> "FewShotClassifier":
        """A fitted classifier, from the folder that save or `python -m fewshot.adapt` wrote."""
        adapted = Adapted.load(folder, trust=trust)
        classifier = cls(folder, statistics=adapted.statistics, trust=trust)
        classifier.adapted_, classifier.classes_ = adapted, np.sort(np.array(adapted.classes))
        return classifier

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.three_d_array = False, True
        return tags
