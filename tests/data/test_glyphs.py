"""The embedded letters: that they are what `glyphs.json` says, and look as they should."""

import re
import unicodedata
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw, ImageFilter

from fewshot.data import __main__ as prepare
from fewshot.data.cache import LazySplit
from fewshot.data.sources import glyphs

CONF = Path(__file__).parents[2] / "conf" / "dataset" / "glyphs.yaml"


@pytest.fixture(scope="module")
def splits(cache):
    return glyphs.load(size=28, cache=str(cache))


@pytest.fixture(scope="module")
def drawings():
    """letter -> face -> the letter fitted to one square, as `glyphs.json` compares them."""
    fitted = {}
    for face, (font, letters) in enumerate(glyphs._fonts(pixels=96)):
        for letter in letters.intersection("".join(alphabet())):
            canvas = Image.new("L", (400, 300))
            ImageDraw.Draw(canvas).text((130, 180), letter, fill=255, font=font, anchor="ls")
            ink = canvas.crop(canvas.getbbox())
            scale = 26 / max(ink.size)
            ink = ink.resize([max(1, round(side * scale)) for side in ink.size], Image.Resampling.LANCZOS)
            square = Image.new("L", (32, 32))
            square.paste(ink, ((32 - ink.width) // 2, (32 - ink.height) // 2))
            fitted.setdefault(letter, {})[face] = square
    return fitted


def alphabet():
    splits = [glyphs.LETTERS[split] for split in ("train", "val", "test")]
    return [letter for scripts in splits for letters in scripts.values() for letter in letters]


def test_sizes_are_those_of_the_yaml(splits):
    stated = yaml.safe_load(CONF.read_text())["dataset"]
    assert {name: len(split.names) for name, split in splits.items()} == stated["classes"]
    for split in splits.values():
        assert (split.counts == stated["images_per_class"]).all()
        assert split.images.shape == (len(split.names) * 20, stated["channels"], stated["size"], stated["size"])
        assert split.images.dtype == torch.uint8


def test_black_on_white_and_nothing_cut_off(splits):
    images = torch.cat([split.images[:, 0] for split in splits.values()])
    edges = torch.cat([images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1]], dim=1)
    assert (edges > 200).all()
    assert (images.amin(dim=(1, 2)) < 128).all()
    assert 0.05 < 1 - images.float().mean() / 255 < 0.25


def test_no_two_images_are_the_same(splits):
    images = torch.cat([split.images for split in splits.values()])
    assert len(images.flatten(1).unique(dim=0)) == len(images)


def test_the_same_bytes_every_time(splits):
    fonts = glyphs._fonts(pixels=6 * 28)
    for split, position in (("train", 0), ("val", 7), ("test", -1)):
        letter = "".join(glyphs.LETTERS[split].values())[position]
        assert unicodedata.name(letter) == splits[split].names[position]
        images = splits[split].images.view(-1, 20, 1, 28, 28)[position]
        assert np.array_equal(images, glyphs.draw_letter(letter, fonts, 28))


def as_drawn(splits):
    return {name: LazySplit(split.images, split.counts.tolist(), split.names) for name, split in splits.items()}


def test_the_cache_gives_what_was_drawn(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "_build", lambda size: as_drawn(splits))
    glyphs.load(size=28, cache=str(tmp_path))
    monkeypatch.delattr(glyphs, "_build")
    loaded = glyphs.load(size=28, cache=str(tmp_path))
    for name, split in splits.items():
        assert torch.equal(loaded[name].images, split.images)
        assert loaded[name].names == split.names


def test_any_size():
    letter = glyphs.draw_letter("A", glyphs._fonts(pixels=6 * 84), 84)
    assert letter.shape == (20, 1, 84, 84)


def test_letters_have_no_decomposition_and_the_script_they_stand_under():
    assert len(set(alphabet())) == len(alphabet())
    for split in ("train", "val", "test"):
        for script, letters in glyphs.LETTERS[split].items():
            for letter in letters:
                assert unicodedata.category(letter) in ("Lu", "Ll", "Lo")
                assert not unicodedata.decomposition(letter)
                assert unicodedata.name(letter).split()[0] == script.upper()
    scripts = [set(glyphs.LETTERS[split]) for split in ("train", "val", "test")]
    assert not any(one & other for one, other in combinations(scripts, 2))


def test_ten_faces_draw_each_letter_differently(drawings):
    for letter in alphabet():
        kept = []
        for square in drawings[letter].values():
            pixels = np.asarray(square, dtype=float)
            if all(np.abs(pixels - other).mean() > 4 for other in kept):
                kept.append(pixels)
        assert len(kept) >= 10, letter


def test_no_two_letters_are_near_twins(drawings):
    letters, faces = alphabet(), range(len(glyphs.FACES))
    likeness = np.full((len(faces), len(letters), len(letters)), np.nan)
    for face in faces:
        having = [number for number, letter in enumerate(letters) if face in drawings[letter]]
        blurred = [drawings[letters[number]][face].filter(ImageFilter.GaussianBlur(1)) for number in having]
        vectors = np.stack([np.asarray(square, dtype=float).ravel() for square in blurred])
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        likeness[face][np.ix_(having, having)] = vectors @ vectors.T
    pairs = likeness[:, *np.triu_indices(len(letters), k=1)]
    pairs = pairs[:, np.nanmax(pairs, axis=0) > 0.9]
    slack = 0.01  # another release of the font engine
    assert np.nanmean(pairs, axis=0).max() < 0.9 + slack
    assert np.nanpercentile(pairs, 75, axis=0).max() < 0.94 + slack


def test_prepare_leaves_the_images_in_the_cache_and_says_so(splits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(glyphs, "_build", lambda size: as_drawn(splits))
    prepare.main(["prepare", f"dataset.cache={tmp_path}"])
    assert f"glyphs train: {len(splits['train'].names)} classes" in capsys.readouterr().out
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", *[".npy"] * 3]
    for mistake, line in (
        ("dataset=glyph", "dataset=glyph: no such choice; did you mean glyphs?"),
        (
            "+dataset.roto=1",
            "only +zeroing, +trainer.KEY, +optimizer.KEY, +logger.KEY, +callbacks.KEY, +algo.KEY",
        ),
    ):
        with pytest.raises(SystemExit, match=re.escape(line)):
            prepare.main(["prepare", mistake])
