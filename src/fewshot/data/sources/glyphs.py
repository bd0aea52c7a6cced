"""Printed letters from the fonts that matplotlib ships: a few-shot dataset that needs no download.

Split by script as Omniglot is by alphabet, black (0) on white (255) like Omniglot. `glyphs.json` fixes the letters and
says how they were chosen, so the classes never depend on the installed fonts.
"""

import json
import math
import unicodedata
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features
from PIL import __version__ as pillow_version

from fewshot.data.cache import LazySplit, cached
from fewshot.data.task import SPLITS, Split

IMAGES = 20  # per letter, as in Omniglot
VERSION = 1  # of the drawing below: raise it when the pixels change
LETTERS = json.loads((files("fewshot.data.sources") / "glyphs.json").read_text(encoding="utf-8"))
STYLES = {
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
    "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
    "cm": ("r10", "b10", "ss10", "ti10", "tt10", "mi10"),
}
FACES = [family + style for family, styles in STYLES.items() for style in styles]


def load(*, size: int, cache: str | None) -> dict[str, Split]:
    """The letters of `glyphs.json`, 20 images of (1, size, size) each."""
    versions = [VERSION, LETTERS, version("matplotlib"), pillow_version, features.version("freetype2")]
    return cached("glyphs", versions, size=size, channels=1, cache=cache, build=lambda: _build(size))


def _build(size: int) -> dict[str, LazySplit]:
    fonts = _fonts(pixels=6 * size)
    splits = {}
    for split in SPLITS:
        letters = "".join(LETTERS[split].values())
        images = (image for letter in letters for image in draw_letter(letter, fonts, size))
        splits[split] = LazySplit(images, [IMAGES] * len(letters), tuple(map(unicodedata.name, letters)))
    return splits


def _fonts(pixels: int) -> list[tuple[ImageFont.FreeTypeFont, frozenset[str]]]:
    """Each face at so many pixels per em, and the letters that it has."""
    import matplotlib  # only here: images from the cache do without it
    from matplotlib.ft2font import FT2Font

    fonts = []
    for face in FACES:
        path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
        font = ImageFont.truetype(path, pixels, layout_engine=ImageFont.Layout.BASIC)
        letters = {chr(code) for code in FT2Font(str(path)).get_charmap()}
        if face.startswith("cm"):  # beyond ASCII these put other signs where Unicode has letters
            letters = set(filter(str.isascii, letters))
        fonts.append((font, frozenset(letters)))
    return fonts


def draw_letter(letter: str, fonts: list[tuple[ImageFont.FreeTypeFont, frozenset[str]]], size: int) -> np.ndarray:
    """(20, 1, size, size) uint8: the letter in the faces that have it, placed and inked anew each time."""
    random = np.random.Generator(np.random.Philox(key=ord(letter)))  # other letters do not change this one
    faces = [font for font, letters in fonts if letter in letters]
    order = random.permutation(len(faces))
    return np.stack([_draw(letter, faces[order[image % len(faces)]], size, random) for image in range(IMAGES)])


def _draw(letter: str, font: ImageFont.FreeTypeFont, size: int, random: np.random.Generator) -> np.ndarray:
    """(1, size, size) uint8: one image; drawn large, turned and sheared, then reduced."""
    stroke = int(random.integers(0, size // 7 + 1))  # of 6 x size pixels per em
    left, top, right, bottom = font.getbbox(letter, anchor="ls", stroke_width=stroke)
    width, height = int(right - left), int(bottom - top)
    ink = Image.new("L", (width, height), 0)
    ImageDraw.Draw(ink).text((-left, -top), letter, fill=255, font=font, anchor="ls", stroke_width=stroke)

    turn, shear = math.radians(random.uniform(-12, 12)), random.uniform(-0.2, 0.2)
    widen, heighten = random.uniform(0.85, 1.15, size=2)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    matrix = rotation @ np.array([[1, shear], [0, 1]]) @ np.diag([widen, heighten])
    extent = np.abs(matrix) @ [width, height]
    canvas = 4 * size
    matrix *= random.uniform(0.6, 0.8) * canvas / extent.max()
    room = (canvas - np.abs(matrix) @ [width, height]) / 2
    centre = canvas / 2 + np.minimum(room, canvas / 14) * random.uniform(-1, 1, size=2)

    # Pillow wants the way back: where in the ink each pixel of the canvas comes from.
    back = np.linalg.inv(matrix)
    shift = np.array([width, height]) / 2 - back @ centre
    coefficients = (*back[0], shift[0], *back[1], shift[1])
    ink = ink.transform((canvas, canvas), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    return 255 - np.asarray(ink.reduce(4))[None]
