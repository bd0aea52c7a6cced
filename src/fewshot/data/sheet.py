"""A contact sheet: what a run sees of a dataset, some classes of every split with their names."""

import numpy as np
from PIL import Image, ImageDraw

from fewshot.data.task import Split

TEXT = 14  # pixels


def contact_sheet(splits: dict[str, Split], classes: int = 6, images: int = 10, side: int = 64) -> Image.Image:
    """The first images of some classes, evenly spaced, a class a row.

    classes: of each split, at most; images: of each class, at most; side: images smaller than this are enlarged.
    """
    size = next(iter(splits.values())).images.shape[-1]
    cell = size * max(1, side // size)
    rows = []
    for name, split in splits.items():
        number = min(classes, len(split.names))
        for place in (row * len(split.names) // number for row in range(number)):
            rows.append((f"{name}: {split.names[place]}", split, place))
    sheet = Image.new("RGB", (1, 1))
    margin = round(max(ImageDraw.Draw(sheet).textlength(label, font_size=TEXT) for label, _, _ in rows)) + TEXT
    sheet = Image.new("RGB", (margin + images * (cell + 2), len(rows) * (cell + 2)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, split, place) in enumerate(rows):
        top = row * (cell + 2)
        draw.text((TEXT // 2, top + cell // 2), label, fill="black", font_size=TEXT, anchor="lm")
        first, last = split.offsets[place : place + 2].tolist()
        for column, pixels in enumerate(split.images[first : min(last, first + images)].numpy()):
            colours = np.broadcast_to(pixels, (3, size, size)).transpose(1, 2, 0)
            image = Image.fromarray(np.ascontiguousarray(colours)).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(image, (margin + column * (cell + 2), top))
    return sheet
