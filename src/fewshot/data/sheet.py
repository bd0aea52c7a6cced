"""A contact sheet: images in rows, with the names of what they show.

Shapes: C x H x W one image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewshot.data.task import Split

TEXT, GAP, COLUMNS = 14, 2, 10  # height of a text and space around an image, in pixels; images of a row, at most
CLASSES = 6  # of each split, at most


class Row(NamedTuple):
    """Images (C, H, W) uint8, all of one size, with a label to their left; a label without images is a heading.

    captions: lines of text under each image.
    """

    label: str
    images: Sequence[Tensor] = ()
    captions: Sequence[Sequence[str]] = ()


def contact_sheet(rows: Sequence[Row], side: int = 64) -> Image.Image:
    """The picture of the rows; side: pixels, which smaller images come near by growing a whole number of times."""
    size = next(image.shape[-1] for row in rows for image in row.images)
    cell = size * max(1, round(side / size))
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", TEXT - 2)
    labels = [shortened(row.label, 40 if row.images else 100) for row in rows]
    margin = round(max(font.getlength(label) for row, label in zip(rows, labels, strict=True) if row.images)) + TEXT
    under = [TEXT * (len(row.captions[0]) + 1) if row.captions else 0 for row in rows]
    heights = [cell + GAP + more if row.images else 2 * TEXT for row, more in zip(rows, under, strict=True)]
    columns = max(len(row.images) for row in rows)
    sheet = Image.new("RGB", (margin + columns * (cell + GAP), sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, label, height, bottom in zip(rows, labels, heights, np.cumsum(heights).tolist(), strict=True):
        top = bottom - height
        draw.text((TEXT // 2, top + (cell if row.images else height) // 2), label, fill="black", font=font, anchor="lm")
        for column, image in enumerate(row.images):
            left = margin + column * (cell + GAP)
            colours = np.broadcast_to(image, (3, size, size)).transpose(1, 2, 0)
            picture = Image.fromarray(np.ascontiguousarray(colours)).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(picture, (left, top))
            draw.rectangle((left - 1, top - 1, left + cell, top + cell), outline="lightgrey")
            for line, text in enumerate(row.captions[column] if row.captions else ()):
                place = (left + cell // 2, top + cell + GAP + line * TEXT)
                draw.text(place, shortened(text, cell // 8), fill="black", font=font, anchor="ma")
    return sheet


def shortened(text: str, most: int) -> str:
    """The text with at most so many letters, its beginning and its end."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"


def dataset_rows(splits: dict[str, Split]) -> list[Row]:
    """The first images of some classes of each split, evenly spaced; a row shows a class."""
    rows = []
    for name, split in splits.items():
        number = min(CLASSES, len(split.names))
        for place in (row * len(split.names) // number for row in range(number)):
            first, last = split.offsets[place : place + 2].tolist()
            rows.append(Row(f"{name}: {split.names[place]}", list(split.images[first : min(last, first + COLUMNS)])))
    return rows
