"""Images of one's own: python -m fewshot.predict model=omniglot-5w1s-zero support=FOLDER query=FOLDER

Shapes: K ways, S support and Q query images of C channels, H x W pixels.
"""

import logging
import os
import re
import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewshot.config.command import Command, Parameter, flag, integer, one_line_errors
from fewshot.config.command import read as read_words
from fewshot.errors import UserError, first_few, printable, shown
from fewshot.files import ADAPTED, check_place, claimed, user_path, write_atomically, write_file
from fewshot.predict.find import find
from fewshot.predict.predictions import Predictions, check_statistics
from fewshot.results.record_files import write_csv

if TYPE_CHECKING:
    from torch import Tensor

    from fewshot.data.folder_or_zip import Source
    from fewshot.data.sheet import Row
    from fewshot.predict.pretrained import Preprocess

log = logging.getLogger(__name__)

SHEET_CLASSES, SHEET_QUERIES = 50, 200  # of the contact sheet, at most


def run(
    model: str, support: str | None, query: str, folder: Path | None, *, trust: bool = False, **options: Any
) -> None:
    """Predicts the images in `query` and writes predictions.csv, contact_sheet.png and, if any, skipped.csv.

    Queries in folders that are called like the support's classes are labelled: it says how many it got right, and
    writes confusion.png.

    support: None: the model has adapted already.
    folder: None: a new one in outputs/, named after the time.
    options: steps, test_zeroing and statistics, as adapt has them.
    """
    if folder is not None:
        check_place("out", folder)
    if folder is not None and os.path.isdir(folder) and os.listdir(folder):
        raise UserError(f"out={folder}: is not empty; name another folder")
    path = find(model)
    _refuse_support(path, support, options)
    examples = None if support is None else Support(support)
    query_source = open_folder("query", query)
    from fewshot.data.images import is_image, tell_left_out

    asked = [name for name in query_source.names if is_image(name)]
    tell_left_out(f"query={query}", query_source, set(asked))
    if not asked:
        raise UserError(f"query={query}: no images in it")
    # Torch and Lightning take seconds to import, and a mistake in the call should not have to wait for them.
    from fewshot.data.sheet import contact_sheet
    from fewshot.predict.adapted import Adapted, adapt
    from fewshot.predict.pretrained import load

    skipped: list[tuple[str, str, str]] = []
    if examples is None:
        adapted = Adapted.load(path, trust=trust)
    else:
        pretrained = load(path, trust=trust)
        adapted = adapt(pretrained, examples.read(pretrained.preprocess, skipped), **options)
    queries = _read("query", query_source, asked, preprocess=adapted.preprocess, skipped=skipped, told=set())
    if not queries:
        raise UserError(f"query={query}: none of its {len(asked)} images can be read")
    classes = tuple(map(str, adapted.classes))  # labels of an estimator may be numbers
    predictions = Predictions(classes, adapted.predict(list(queries.values())).probabilities)
    labels = _labels(f"query={query}", query_source, list(queries), classes)
    folder = folder or claimed(Path("outputs") / f"{datetime.now():%Y-%m-%d/%H-%M-%S}")
    if skipped:
        write_csv(folder / "skipped.csv", [("set", "file", "reason"), *skipped])
    _write_predictions(folder, list(queries), predictions, labels)
    rows = _sheet_rows(dict(zip(classes, adapted.examples, strict=True)), list(queries.items()), predictions)
    write_atomically(folder / "contact_sheet.png", partial(contact_sheet(rows, side=140).save, format="PNG"))
    but = f", {len(skipped)} skipped" if skipped else ""
    right = sum(label == said for label, said in zip(labels, predictions.labels, strict=True)) if labels else 0
    accuracy = f", accuracy {right / len(queries):.1%} ({right} of {len(queries)})" if labels else ""
    print(f"{len(queries)} images, {len(classes)} classes{accuracy}{but}: written to {folder}")


def _write_predictions(folder: Path, files: list[str], predictions: Predictions, labels: list[str]) -> None:
    """predictions.csv, and confusion.png if the queries are labelled."""
    header = ["file", "class", *(f"probability of {name}" for name in predictions.classes)]
    rows = zip(files, predictions.labels, predictions.probabilities, strict=True)
    table = [[file, label, *(f"{p:.6g}" for p in probabilities)] for file, label, probabilities in rows]
    if labels:
        from fewshot.results.figures import confusion, png  # matplotlib takes its time to import

        header, table = [*header, "labelled"], [[*row, label] for row, label in zip(table, labels, strict=True)]
        picture = confusion(labels, list(map(str, predictions.labels)), list(map(str, predictions.classes)))
        write_file(folder / "confusion.png", png(picture))
    write_csv(folder / "predictions.csv", [header, *table])


def _labels(where: str, source: "Source", files: list[str], classes: tuple[str, ...]) -> list[str]:
    """The class in whose folder each file lies; empty unless all folders are called like the support's classes."""
    from fewshot.data.images import plain_classes

    label_of = {file: label for label, members in plain_classes(source).items() for file in members}
    labels = [label_of[file] for file in files]
    meant = {label.casefold() for label in labels} & {name.casefold() for name in classes}
    if (others := {*labels} - {*classes}) and meant:
        named = first_few(sorted(repr(label) for label in others if label))
        reason = f"{named} are no classes of the support" if named else "some images lie in no folder"
        log.warning("%s: %s; no accuracy", where, reason)
    return [] if others else labels


def _refuse_support(path: Path, support: str | None, options: dict[str, Any]) -> None:
    """Raises UserError where the model at this path has adapted and is to adapt, or neither."""
    if (path / ADAPTED).is_file():
        asked = ({} if support is None else {"support": support}) | options
        for knob, value in asked.items():
            raise UserError(f"{knob}={shown(value)}: {path} has adapted to its images already; leave {knob} out")
    elif support is None:
        raise UserError(f"support: is missing; give support=FOLDER, a folder of images for each class, to {path}")


def open_folder(knob: str, path: str) -> "Source":
    """A folder or zip of images."""
    from fewshot.data.folder_or_zip import open_source

    if not os.path.exists(user_path(knob, path)):
        raise UserError(f"{knob}={path}: no such file or folder")
    return open_source(user_path(knob, path), knob=knob)


class Support:
    """The support images in a folder or zip with one folder for each class; they are looked for, then read.

    Raises:
        UserError: there are none, or fewer than two classes of them.
    """

    def __init__(self, path: str) -> None:
        from fewshot.data.images import tell_left_out

        self.where, self.source = f"support={path}", open_folder("support", path)
        self.classes = _classes(self.where, self.source)
        tell_left_out(self.where, self.source, {name for files in self.classes.values() for name in files})

    def read(self, preprocess: "Preprocess", skipped: list[tuple[str, str, str]]) -> dict[str, list["Tensor"]]:
        """{class: its images}; those that cannot be read are added to `skipped`, unless a class has no others."""
        read = partial(_read, "support", self.source, preprocess=preprocess, skipped=skipped, told=set())
        examples = {name: list(read(files).values()) for name, files in self.classes.items()}
        if lost := [name for name, images in examples.items() if not images]:
            raise UserError(f"{self.where}: no image of {lost[0]!r} can be read; replace them or remove the class")
        return examples


def _classes(where: str, source: "Source") -> dict[str, list[str]]:
    """{class: its files}, sorted by name; one enclosing folder is taken off, as zips often have it."""
    from fewshot.data.images import plain_classes

    classes = plain_classes(source)
    if loose := classes.pop("", []):
        raise UserError(f"{where}: {loose[0]} lies in no class; give one folder of images for each class")
    if empty := [label for label, files in classes.items() if not files]:
        raise UserError(f"{where}: no images in {empty[0]!r}; add images or remove the class")
    if len(classes) < 2:
        raise UserError(f"{where}: {len(classes)} folders with images in it; give one for each of two classes or more")
    return dict(sorted(classes.items()))


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


def _sheet_rows(
    support: dict[str, list["Tensor"]], queries: list[tuple[str, "Tensor"]], predictions: Predictions
) -> list["Row"]:
    """The support images, a class a row, and below them the queries with what was predicted, in their order."""
    from fewshot.data.sheet import COLUMNS, Row

    numbered = {name: f"{number} {printable(name)}" for number, name in enumerate(support, start=1)}
    of_queries = f", the first {SHEET_QUERIES} of {len(queries)}" if len(queries) > SHEET_QUERIES else ""
    of_classes = f", the first {SHEET_CLASSES} of {len(support)} classes" if len(support) > SHEET_CLASSES else ""
    rows = [Row(f"support{of_classes}: what the model adapted to")]
    for name, images in list(support.items())[:SHEET_CLASSES]:
        more = f" (+{len(images) - COLUMNS})" if len(images) > COLUMNS else ""
        rows.append(Row(numbered[name] + more, images[:COLUMNS]))
    rows.append(Row(f"queries{of_queries}: predicted class and its probability"))
    captions = [
        (numbered[str(label)], f"{probabilities.max():.2f}", printable(file.rsplit("/", 1)[-1]))
        for (file, _), label, probabilities in zip(queries, predictions.labels, predictions.probabilities, strict=True)
    ]
    for first in range(0, min(len(queries), SHEET_QUERIES), COLUMNS):
        members = slice(first, first + COLUMNS)
        rows.append(Row("", [image for _, image in queries[members]], captions[members]))
    return rows


COMMAND = Command(
    "predict",
    "adapts a model to the images in `support` and classifies those in `query`.",
    {
        "model=MODEL": Parameter(
            "A model that comes with this program, such as omniglot-5w1s-zero; the folder of a run, or one that "
            "export wrote; a file RUN/checkpoints/best.ckpt; or hf://ORG/NAME, on Hugging Face.",
            needed=True,
        ),
        "support=FOLDER": Parameter(
            "A folder or zip with one folder of images for each class; left out with a model that adapt wrote."
        ),
        "query=FOLDER": Parameter(
            "A folder or zip of images to classify, however deep. In folders like the support's they are labelled.",
            needed=True,
        ),
        "steps=N": Parameter("Inner steps; left out: as many as in training.", partial(integer, smallest=1)),
        "test_zeroing=BOOL": Parameter(
            "true: adapts from a zeroed head, to any number of classes; left out: as in training.", flag
        ),
        "statistics=WHOSE": Parameter(
            "By what BatchNorm normalises. task, the default: all queries together, as in training; support: the "
            "support images; each: every query by itself, together with the support. The last two look at no other.",
            check_statistics,
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
        words = sys.argv[1:] if arguments is None else arguments
        words = [re.sub("^checkpoint=", "model=", word) for word in words]  # as it was called when only runs had models
        values = read_words(COMMAND, words).values
        run(values.pop("model"), values.pop("support", None), values.pop("query"), values.pop("out", None), **values)


if __name__ == "__main__":
    main()
