"""Images of one's own, after training: python -m fewshot.predict checkpoint=PATH support=FOLDER query=FOLDER

Shapes: K ways, S support and Q query images of C channels, H x W pixels.
"""

import csv
import io
import logging
import os
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fewshot.config.command import Command, Parameter, flag, integer, one_line_errors
from fewshot.config.command import read as read_words
from fewshot.errors import UserError, printable
from fewshot.files import check_place, write_file
from fewshot.paths import claimed, model_path, user_path
from fewshot.predict.predictions import predict

if TYPE_CHECKING:
    from torch import Tensor

    from fewshot.data.folder_or_zip import Source
    from fewshot.predict.pretrained import Preprocess

log = logging.getLogger(__name__)


def run(
    checkpoint: str, support: str, query: str, folder: Path | None, *, trust: bool = False, **how: int | bool | None
) -> None:
    """Predicts the images in `query` and writes predictions.csv, contact_sheet.png and, if any, skipped.csv.

    folder: None: a new one in outputs/, named after the time.
    how: steps and test_zeroing, as predict has them.

    Raises:
        UserError: nothing to read, or what predict does not take.
    """
    if folder is not None:
        check_place("out", folder)
    if folder is not None and os.path.isdir(folder) and os.listdir(folder):
        raise UserError(f"out={folder}: is not empty; name another folder")
    for knob, path in {"checkpoint": checkpoint, "support": support, "query": query}.items():
        if not os.path.exists(user_path(knob, path)):
            raise UserError(f"{knob}={path}: no such file or folder")
    model_path(checkpoint)
    from fewshot.data.images import tell_left_out

    classes = _classes(f"support={support}", support_source := _open("support", support))
    asked = _images(query_source := _open("query", query))
    tell_left_out(f"support={support}", support_source, {name for files in classes.values() for name in files})
    tell_left_out(f"query={query}", query_source, set(asked))
    if not asked:
        raise UserError(f"query={query}: no images in it")
    # Torch and Lightning take seconds to import, and a mistake in the call should not have to wait for them.
    from fewshot.predict.pretrained import load
    from fewshot.results import figures

    model = load(checkpoint, trust=trust)
    skipped: list[tuple[str, str, str]] = []
    read = partial(_read, preprocess=model.preprocess, skipped=skipped, told=set())
    given = {name: list(read("support", support_source, files).values()) for name, files in classes.items()}
    if lost := [name for name, images in given.items() if not images]:
        raise UserError(f"support={support}: no image of {lost[0]!r} can be read; replace them or remove the class")
    queries = read("query", query_source, asked)
    if not queries:
        raise UserError(f"query={query}: none of its {len(asked)} images can be read")
    found = predict(model, given, list(queries.values()), **how)
    rows = list(zip(queries, found.labels, found.probabilities, strict=True))
    folder = folder or claimed(Path("outputs") / f"{datetime.now():%Y-%m-%d/%H-%M-%S}")
    if skipped:
        _write_csv(folder / "skipped.csv", ["set", "file", "reason"], skipped)
    header = ["file", "class", *(f"probability of {name}" for name in found.classes)]
    table = [[file, label, *(f"{p:.6g}" for p in probabilities)] for file, label, probabilities in rows]
    _write_csv(folder / "predictions.csv", header, table)
    sheet = figures.contact_sheet(
        {printable(name): [_shown(image) for image in images] for name, images in given.items()},
        [
            (_shown(image), printable(file), printable(label), probabilities.max())
            for image, (file, label, probabilities) in zip(queries.values(), rows, strict=True)
        ],
    )
    write_file(folder / "contact_sheet.png", figures.png(sheet))
    but = f", {len(skipped)} skipped" if skipped else ""
    print(f"{len(rows)} images, {len(found.classes)} classes{but}: written to {folder}")


def _open(knob: str, given: str) -> "Source":
    """The files of a folder or zip, named relative to it."""
    from fewshot.data.folder_or_zip import open_source

    try:
        return open_source(user_path(knob, given))
    except UserError as error:
        raise UserError(str(error).replace("dataset.root=", f"{knob}=", 1)) from None


def _images(source: "Source") -> list[str]:
    from fewshot.data.images import is_image

    return [name for name in source.names if is_image(name)]


def _classes(where: str, source: "Source") -> dict[str, list[str]]:
    """{class: its files}, sorted by name; one enclosing folder is taken off, as zips often have it."""
    tops = {name.split("/")[0] for name in source.names}
    images = _images(source)
    wrapped = len(tops) == 1 and all(name.count("/") > 1 for name in images)
    prefix = f"{tops.pop()}/" if wrapped else ""
    classes: dict[str, list[str]] = {}
    for name in source.names:
        label, inside, _ = name.removeprefix(prefix).partition("/")
        if inside and label:
            classes.setdefault(label, [])
    for name in images:
        label, inside, _ = name.removeprefix(prefix).partition("/")
        if not inside:
            raise UserError(f"{where}: {name} lies in no class; give one folder of images for each class")
        classes[label].append(name)
    if empty := [label for label, files in classes.items() if not files]:
        raise UserError(f"{where}: no images in {empty[0]!r}; add images or remove the class")
    if len(classes) < 2:
        raise UserError(f"{where}: {len(classes)} folders with images in it; give one for each of two classes or more")
    return classes


def _read(
    knob: str,
    source: "Source",
    names: list[str],
    *,
    preprocess: "Preprocess",
    skipped: list[tuple[str, str, str]],
    told: set[str],
) -> dict[str, "Tensor"]:
    """{file: (C, H, W) uint8} of those that can be read; the others are warned of and added to `skipped`."""
    from fewshot.data.images import try_image

    images = {}
    for name in names:
        made = try_image(source, name, preprocess.pixels, told)
        if isinstance(made, str):
            log.warning("%s: %s is skipped, it cannot be read: %s", knob, printable(name), printable(made))
            skipped.append((knob, name, made))
        else:
            images[name] = made
    return images


def _shown(pixels: "Tensor") -> np.ndarray:
    """(C, H, W) -> (H, W[, 3])"""
    return pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy()


def _write_csv(path: Path, header: list[str], rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_file(path, text.getvalue().encode(errors="surrogateescape"))  # a file's name in the very bytes that it has


COMMAND = Command(
    "python -m fewshot.predict",
    "adapts a model to the images in `support` and classifies those in `query`.",
    {
        "checkpoint=PATH": Parameter(
            "The folder of a run, RUN/checkpoints/best.ckpt, or a folder that python -m fewshot.export wrote.",
            needed=True,
        ),
        "support=FOLDER": Parameter("A folder or zip with one folder of images for each class.", needed=True),
        "query=FOLDER": Parameter("A folder or zip of images to classify, however deep.", needed=True),
        "steps=N": Parameter("Inner steps; left out: as many as in training.", partial(integer, smallest=1)),
        "test_zeroing=BOOL": Parameter(
            "true: adapts from a zeroed head, to any number of classes; left out: as in training.", flag
        ),
        "out=FOLDER": Parameter(
            "The folder for predictions.csv and contact_sheet.png; left out: a new one in outputs/.", user_path
        ),
        "trust=BOOL": Parameter(
            "true: builds a network that the checkpoint names and fewshot.models does not define.", flag
        ),
    },
)


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    with one_line_errors():
        values = read_words(COMMAND, arguments).values
        run(values.pop("checkpoint"), values.pop("support"), values.pop("query"), values.pop("out", None), **values)


if __name__ == "__main__":
    main()
