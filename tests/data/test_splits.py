"""A source of images of one's own: what it makes is looked at before anything else sees it."""

from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf

from fewshot.data.splits import splits_of
from fewshot.data.task import SPLITS, Split
from fewshot.errors import UserError


def source(made):
    """What a source of one's own makes: a test writes down how, since a configuration holds only plain data."""
    images = torch.arange(24, dtype=torch.uint8).view(-1, 1, 1, 2)
    split = Split(images, torch.tensor([0, 4, 8, 12]), ("a", "b", "c"))
    if made == "failure":
        raise FileNotFoundError("no photos\nin it")
    odd = {
        "no split": lambda: split.names,
        "floats": lambda: replace(split, images=images / 255),
        "an array": lambda: replace(split, images=images.numpy()),
        "colours": lambda: replace(split, images=images.expand(-1, 3, -1, -1)),
        "too few": lambda: replace(split, offsets=split.offsets[:-1]),
        "falling": lambda: replace(split, offsets=torch.tensor([0, 8, 4, 12])),
        "late": lambda: replace(split, offsets=torch.tensor([1, 4, 8, 12])),
        "short": lambda: replace(split, offsets=torch.tensor([0, 4, 8, 11])),
        "a list": lambda: replace(split, offsets=[0, 4, 8, 12]),
        "other pixels": lambda: replace(split, images=images + 1),
        "a sum": lambda: replace(split, sha256="5a"),
    }
    splits = dict.fromkeys(SPLITS, split)
    return {"nothing": None, "no test": {"train": split, "val": split}}.get(
        made, splits | {"val": odd.get(made, lambda: split)()}
    )


def read(made, shape=(1, 1, 2)):
    return splits_of(OmegaConf.create({"_target_": "test_splits.source", "made": made}), shape)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ("failure", r"fails \(no photos\)"),
        ("nothing", "returns NoneType; it must return a dictionary with train, val, test"),
        ("no test", r"returns \['train', 'val'\]; it must return a dictionary with train, val, test"),
        ("no split", r"val is a tuple; it must be a fewshot\.data\.task\.Split, as cached makes one"),
        ("floats", r"the images of val are torch\.float32 \(12, 1, 1, 2\); .* torch\.uint8, \(M, 1, 1, 2\), as .* say"),
        ("an array", r"the images of val are uint8 \(12, 1, 1, 2\); they must be a tensor of torch\.uint8, .*"),
        ("colours", r"the images of val are torch\.uint8 \(12, 3, 1, 2\); .*, \(M, 1, 1, 2\), as dataset\.channels .*"),
        *(
            (made, "the offsets of val must be 4 rising .*, 12")
            for made in ("too few", "falling", "late", "short", "a list")
        ),
    ],
)
def test_what_a_source_of_ones_own_does_wrong_is_one_line(made, why):
    with pytest.raises(UserError, match=rf"^dataset\.source\._target_=test_splits\.source: {why}$"):
        read(made)


def test_a_source_that_cannot_be_imported_is_one_line():
    with pytest.raises(UserError, match=r"^dataset\.source\._target_=gone\.load: fails \(No module named 'gone'\)$"):
        splits_of(OmegaConf.create({"_target_": "gone.load"}))


def test_splits_that_are_not_from_the_cache_have_the_sum_of_their_pixels():
    """So a run knows them again when it goes on or is tested."""
    one, same, other = (read(made)["val"].sha256 for made in ("plain", "plain", "other pixels"))
    assert one == same != other and len(one) == 64
    assert read("a sum")["val"].sha256 == "5a"


def test_without_a_shape_images_of_any_size_are_taken():
    assert read("colours", None)["val"].images.shape == (12, 3, 1, 2)
