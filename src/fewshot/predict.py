"""Images of one's own, after training: python -m fewshot.predict checkpoint=PATH support=FOLDER query=FOLDER

checkpoint=PATH       the folder of a run, RUN/checkpoints/best.ckpt, or a folder that python -m fewshot.export wrote
support=FOLDER        one folder of images for each class; a zip of that will do
query=FOLDER          the images to classify, however deep; or a zip
steps=N               inner steps; as many as in training if it is left out
test_zeroing=BOOL     true: adapt from a zeroed head, to any number of classes; as in training if it is left out
out=FOLDER            for predictions.csv and contact_sheet.png; a new one in outputs/ if it is left out
trust=true            build a network that the checkpoint names and fewshot.models does not define

Shapes: K ways, S support and Q query images of C channels, H x W pixels.
"""

import copy
import csv
import io
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewshot.command import flag, integer, one_line_errors, words
from fewshot.errors import UserError, printable
from fewshot.files import check_place, write_atomically
from fewshot.paths import claimed, model_path, user_path

if TYPE_CHECKING:
    from torch import Tensor

    from fewshot.data.folder_or_zip import Source
    from fewshot.module import MetaLearner
    from fewshot.pretrained import Picture, Preprocess, Pretrained

log = logging.getLogger(__name__)


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

    BatchNorm normalises all queries of a call together, as in training: what is said of one depends on the others. A
    single query is normalised together with the support images.

    Args:
        model: from fewshot.load, or the path for it; adapts on the device that its learner is on.
        support: {class: its images}, two classes or more, as many images as there are; class t has row t of the head.
        query: the images to classify. An image is a PIL image, a uint8 array (H, W[, 1|3|4]) or tensor (1|3|4, H, W),
            or the bytes of a file.
        steps: inner steps; None: as in training.
        test_zeroing: adapt from a zeroed head; None: as in training. Without it there can be no more classes than rows.

    Raises:
        UserError: no images, too many or too few classes, images of another type; logits that are not finite.
    """
    import torch

    from fewshot.pretrained import load
    from fewshot.tasks import Task

    if isinstance(model, str | os.PathLike):
        model = load(model)
    steps = model.config["inner_steps"] if steps is None else integer("steps", str(steps), 1)
    zeroing = model.config["algo"]["zeroing"] if test_zeroing is None else test_zeroing
    if zeroing and model.learner.adapted == "encoder":
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

    given, asked = batch([image for images in support.values() for image in images]), batch(query)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(shots)).to(parameter.device)
    if len(query) == 1:
        asked = torch.cat([given, asked])
    unknown = torch.zeros(len(asked), dtype=torch.int64, device=parameter.device)  # a task has labels; none is read
    task = Task(*(field[None] for field in (given, labels, asked, unknown)))
    logits = learner.logits_after(task, steps=steps, zeroing=zeroing)[0, -len(query) :]
    if not logits.isfinite().all():
        raise UserError(f"steps={steps}: the adapted model's logits are not finite numbers; adapt it in fewer steps")
    return Predictions(classes, logits.double().softmax(dim=1).cpu().numpy())


def _with_ways(learner: "MetaLearner", ways: int, zeroing: bool) -> "MetaLearner":
    """The learner with a head of so many rows: the first of its own, then more where they do not matter."""
    import torch

    rows = len(learner.network.head.weight)
    if ways == rows:
        return learner
    if ways > rows and not zeroing and learner.head == "learned":
        remedy = ", or test_zeroing=true, which lets all rows begin at zero" if learner.adapted != "encoder" else ""
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


# The command line


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
    from fewshot import figures
    from fewshot.pretrained import load
    from fewshot.report import write_png

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
    write_atomically(folder / "contact_sheet.png", partial(write_png, sheet))
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
    content = text.getvalue().encode(errors="surrogateescape")  # a file's name in the very bytes that it has
    write_atomically(path, lambda file: file.write(content))


READ: dict[str, Callable[[str], Any]] = {
    "checkpoint": str,
    "support": str,
    "query": str,
    "steps": lambda value: integer("steps", value, 1),
    "test_zeroing": lambda value: flag("test_zeroing", value),
    "out": lambda value: user_path("out", value),
    "trust": lambda value: flag("trust", value),
}
NEEDED = {
    "checkpoint": "RUN, the folder of a run, or a folder that was exported",
    "support": "FOLDER with a folder of images for each class",
    "query": "FOLDER of images to classify",
}


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print((__doc__ or "").split("\n\nShapes")[0])
        return
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    with one_line_errors():
        given = {key: READ[key](value) for key, value in words(arguments, READ, NEEDED).items()}
        run(given.pop("checkpoint"), given.pop("support"), given.pop("query"), given.pop("out", None), **given)


if __name__ == "__main__":
    main()
