"""The estimator: scikit-learn's own checks, and what it does with images."""

import io
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from examples import images, untrained
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils.estimator_checks import parametrize_with_checks
from sklearn.utils.validation import check_is_fitted, validate_data

import fewshot
from fewshot import models
from fewshot.predict import adapt, predict
from fewshot.predict.classifier import FewShotClassifier

MODEL = untrained("algo=zero", "dataset.size=24")
PATH = str(ROOT / "tests" / "fixtures" / "2f3a4cf" / "exported")


class OfRows(FewShotClassifier):
    """Rows of numbers stand for images, a stripe for each number, because scikit-learn's checks know no others."""

    def fit(self, X, y):
        X = validate_data(self, X, ensure_min_samples=2)
        self._range = X.min(), np.ptp(X) or 1
        return super().fit(self._images(X), y)

    def predict_proba(self, X):
        check_is_fitted(self)
        return super().predict_proba(self._images(validate_data(self, X, reset=False)))

    def _images(self, X):
        numbers = np.clip((X - self._range[0]) / self._range[1], 0, 1)
        places = np.arange(28) * X.shape[1] // 28
        return [np.tile((255 * row[places]).astype(np.uint8), (28, 1)) for row in numbers]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.three_d_array = True, False
        tags.classifier_tags.poor_score = True  # the encoder is not trained, and certainly not for stripes
        return tags


def others_count(estimator):
    """What does not hold where the images of a call are normalised together."""
    if estimator.statistics == "support":
        return {}
    reason = "BatchNorm normalises all images of a call together, so one prediction depends on the others"
    return {"check_methods_subset_invariance": reason}


@parametrize_with_checks(
    [OfRows(PATH, steps=1), OfRows(PATH, steps=1, statistics="support")],
    expected_failed_checks=others_count,
)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def test_fit_and_predict_are_predict_with_labels_of_any_kind():
    support = {name: images(2, seed) for seed, name in enumerate(("b", "a", "c"))}
    shown, labels = [image for of_class in support.values() for image in of_class], ["b", "b", "a", "a", "c", "c"]
    asked = images(5, 9)
    expected = predict(MODEL, {name: support[name] for name in "abc"}, asked, steps=2)
    for kind in (str, "abc".index, lambda label: label == "a"):
        kinds = [kind(label) for label in labels]
        fitted = FewShotClassifier(MODEL, steps=2).fit(np.stack(shown), np.array(kinds))
        assert fitted.classes_.tolist() == sorted({*kinds}) and {*fitted.predict(asked)} <= {*kinds}
        if len(fitted.classes_) == 3:
            np.testing.assert_allclose(fitted.predict_proba(asked), expected.probabilities, rtol=1e-12)
            assert fitted.predict(asked).tolist() == [kind(label) for label in expected.labels]
            assert fitted.score(asked, [kind(label) for label in expected.labels]) == 1


def test_pictures_of_every_kind_are_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (array,) = images(1, 3)
    file = io.BytesIO()
    Image.fromarray(array).save(file, "png")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    kinds = [array, Image.fromarray(array), file.getvalue(), torch.tensor(array[None])]
    kinds += [str(tmp_path / "a.png"), tmp_path / "a.png", "~/a.png"]
    other = images(6, 4)
    fitted = FewShotClassifier(MODEL, steps=1, statistics="support").fit([*kinds, *other], [0] * 7 + [1] * 6)
    probabilities = fitted.predict_proba(kinds)
    assert np.array_equal(probabilities, np.tile(probabilities[:1], (7, 1)))
    with pytest.raises(fewshot.UserError, match=r"^image=.*b\.png: cannot be read \(No such file or directory\)$"):
        fitted.predict([tmp_path / "b.png"])
    os.mkfifo(tmp_path / "pipe")  # nobody ever writes to it
    with pytest.raises(fewshot.UserError, match=r"pipe: cannot be read \(it is not a regular file\)$"):
        fitted.predict([tmp_path / "pipe"])


def test_clones_searches_and_what_is_no_fit():
    shown, labels = images(6, 1), ["x", "y"] * 3
    estimator = FewShotClassifier(MODEL, steps=1)
    assert clone(estimator).get_params() | {"model": 0} == estimator.set_params(steps=1).get_params() | {"model": 0}
    assert len(cross_val_score(estimator, shown, labels, cv=3)) == 3
    search = GridSearchCV(estimator, {"steps": [1, 2]}, cv=2).fit(shown, labels)
    assert search.best_params_["steps"] in (1, 2)
    with pytest.raises(NotFittedError):
        FewShotClassifier(MODEL).predict(shown)
    with pytest.raises(fewshot.UserError, match=r"^statistics=none: must be one of task, support, each$"):
        FewShotClassifier(MODEL, statistics="none").fit(shown, labels)


@pytest.mark.parametrize(
    ("knobs", "shown", "labels", "line"),
    [
        (
            {},
            ["text.png", "whole.png"],
            "ab",
            r"image=.*text\.png: cannot be read \(not an image in a .*",
        ),
        ({}, ["whole.png", "broken.png"], "ab", r"image=.*broken\.png: cannot be read \(.*truncated\)"),
        ({}, [*images(1, 0), Image.new("F", (9, 9))], "ab", r"images\[1\]: cannot be read \(grey of 32 bits.*"),
        ({}, [*images(1, 0), None], "ab", r"images\[1\]: a NoneType of object, shape \(\); give a PIL image.*"),
        ({}, np.zeros((2, 8, 8)), "ab", r"images\[0\]: a ndarray of float64, shape \(8, 8\); give a PIL image.*"),
        ({}, "whole.png", "ab", "images: a str; give a list of images"),
        ({}, Image.new("L", (9, 9)), "ab", "images: a Image; give a list of images"),
        ({}, iter(images(2, 0)), "ab", "images: a list_iterator; give a list of images"),
        ({}, {"a": images(2, 0)}, "ab", "images: a dict; give a list of images"),
        ({}, np.array(3), "ab", "images: a ndarray; give a list of images"),
        ({}, images(2, 0), ["a", None], "labels: cannot be sorted .*; give labels of one kind"),
        (
            {},
            images(3, 0),
            [1, "1", "2"],
            "labels: texts and numbers, of which NumPy makes texts; give labels of one kind",
        ),
        ({"model": None}, images(2, 0), "ab", "model=None: a NoneType; give a path, or a name as omniglot-5w1s-zero"),
        ({"zeroing": "no"}, images(2, 0), "ab", "test_zeroing=no: must be true or false"),
        ({"steps": 1.5}, images(2, 0), "ab", r"steps=1\.5: must be an integer of at least 1"),
    ],
)
def test_what_is_no_image_and_no_knob_is_one_line(knobs, shown, labels, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(images(1, 0)[0]).save("whole.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    with pytest.raises(fewshot.UserError, match=f"^{line}$"):
        FewShotClassifier(**{"model": MODEL} | knobs).fit(shown, [*labels])
    if labels == "ab" and not knobs:
        with pytest.raises(fewshot.UserError, match=f"^{line}$"):
            FewShotClassifier(MODEL).fit(images(2, 0), ["a", "b"]).predict(shown)


@pytest.mark.parametrize("statistics", ["task", "support"])
def test_what_was_saved_predicts_the_same(statistics, tmp_path):
    shown, labels, asked = images(4, 1), [3, 7, 3, 7], images(3, 2)
    model = untrained("algo=anil", "+zeroing=true")
    model.learner.float()
    fitted = FewShotClassifier(model, statistics=statistics).fit(shown, labels)
    fitted.save(tmp_path / "adapted")
    again = fewshot.FewShotClassifier.load(tmp_path / "adapted")
    for queries in (asked, asked[:1]):
        assert np.array_equal(again.predict_proba(queries), fitted.predict_proba(queries))
    assert again.classes_.tolist() == [3, 7] and again.predict(asked).dtype.kind == "i"
    assert again.statistics == statistics
    alone = np.concatenate([again.predict_proba([image]) for image in asked])
    assert np.allclose(alone, again.predict_proba(asked), atol=1e-6) == (statistics == "support")
    assert repr(again.adapted_) == f"Adapted(conv4_strided, 2 classes, 4 images, statistics={statistics!r})"
    with pytest.raises(fewshot.UserError, match=r"holds a model\.safetensors; name another folder$"):
        fitted.save(tmp_path / "adapted")


def foreign(**knobs):
    return models.conv4_strided(**knobs)


def test_a_network_of_ones_own_is_called_by_trust_alone(tmp_path):
    folder, shown = shutil.copytree(PATH, tmp_path / "own"), images(4, 1)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("fewshot.models.conv4_strided", "test_classifier.foreign"))
    refused = pytest.raises(fewshot.UserError, match=r"calls test_classifier\.foreign, and loading would run that")
    with refused:
        FewShotClassifier(folder).fit(shown, [0, 0, 1, 1])
    fitted = FewShotClassifier(folder, trust=True).fit(shown, [0, 0, 1, 1])
    fitted.save(tmp_path / "adapted")
    with refused:
        FewShotClassifier.load(tmp_path / "adapted")
    again = FewShotClassifier.load(tmp_path / "adapted", trust=True)
    assert again.trust and np.array_equal(again.predict(shown), fitted.predict(shown))


def test_columns_of_a_model_whose_classes_are_in_another_order_are_those_of_its_sorted_labels(tmp_path):
    shown, asked = {name: images(2, seed) for seed, name in enumerate("bca")}, images(4, 9)
    adapt(MODEL, shown).save(tmp_path / "adapted")
    again, expected = FewShotClassifier.load(tmp_path / "adapted"), adapt(MODEL, shown).predict(asked)
    assert again.classes_.tolist() == ["a", "b", "c"] and again.predict(asked).tolist() == expected.labels
    assert np.array_equal(again.predict_proba(asked), expected.probabilities[:, [2, 0, 1]])


def test_support_statistics_are_what_the_adapted_network_sees_of_the_support():
    shown = {0: images(2, 1), 1: images(1, 2)}
    adapted = adapt(MODEL, shown, statistics="queries")
    pixels = torch.stack([MODEL.preprocess(image) for of_class in shown.values() for image in of_class]).double()
    together = adapted.network(pixels)
    fixed = adapt(MODEL, shown, statistics="support").network
    torch.testing.assert_close(fixed(pixels), together)
    torch.testing.assert_close(torch.cat([fixed(image[None]) for image in pixels]), together)
