"""Images from the Hugging Face hub, or from a folder, through its library `datasets`, which is an extra.

No code of a repository is run: since version 4 the library runs none. It gives the files of the images, which are
decoded here like all others.
"""

import logging
import os
import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

from fewshot.data.cache import cached
from fewshot.data.folder_or_zip import Source, plain_text, read_file
from fewshot.data.images import read_splits
from fewshot.data.sources.folder import SPELLINGS, Files, check_left, split_classes, with_enough
from fewshot.data.task import Split
from fewshot.errors import UserError, first_few, of_extra, one_line
from fewshot.files import REPOSITORY, REVISION, SCHEME, user_path

log = logging.getLogger(__name__)

OLDEST = 4  # version of the library
LABELS = ("label", "class")  # names of a column of classes, where none says by its type that it is one


def load(
    *,
    root: str,
    subset: str | None,
    image_column: str | None,
    label_column: str | None,
    name: str,
    size: int,
    channels: int,
    cache: str | None,
    fractions: Mapping[str, float],
    split_seed: int = 0,
    ways: int = 0,
    shots: int = 0,
    queries: int = 0,
    largest_image: int | None = None,
) -> dict[str, Split]:
    """The splits of a dataset: its own if they share no class; else all of its classes are dealt out, as of a folder.

    The arguments are those of conf/dataset/huggingface.yaml, and of folder.load.
    """
    where = f"dataset.root={root}"
    tables, column = _tables(root, where, subset), ""
    classes: dict[str, dict[str, Files]] = {}
    for split, table in tables.items():
        image = _column(where, table, image_column, "image_column", "Image", ())
        column = _column(where, table, label_column, "label_column", "ClassLabel", LABELS)
        classes[split] = _classes(_source(root, where, table, image), split, table, column, where)
    own = _own_splits(classes)
    if own is None:
        pooled: dict[str, Files] = defaultdict(list)
        for members in classes.values():
            for label, files in members.items():
                pooled[label] += files
        log.info("%s: the classes of %s are dealt out by dataset.fractions", where, ", ".join(tables))
        own = split_classes(pooled, fractions, split_seed, where, ways)
    own = with_enough(own, shots + queries, where)
    check_left(own, ways, where)
    version = [[split, table._fingerprint, len(table)] for split, table in tables.items()]
    contents = {split: list(members) for split, members in own.items()}
    shape = {"size": size, "channels": channels}
    build = partial(read_splits, own, largest_image=largest_image, **shape)
    return cached(name, [version, image_column, column, contents], cache=cache, build=build, **shape)


def _tables(root: str, where: str, subset: str | None) -> dict[str, Any]:
    """{split: datasets.Dataset}"""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{where}: needs the library {of_extra('datasets', 'datasets')}") from None
    if int(datasets.__version__.partition(".")[0]) < OLDEST:
        old = f"datasets {datasets.__version__} may run code of a repository"
        raise UserError(f'{where}: {old}; it needs version {OLDEST} or later, pip install "datasets>={OLDEST}"')
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    address = re.fullmatch(rf"{SCHEME}({REPOSITORY})(?:@({REVISION}))?", root, re.ASCII)
    if root.startswith(SCHEME) and not address:
        raise UserError(f"{where}: must be {SCHEME}ORG/NAME or {SCHEME}ORG/NAME@REVISION")
    try:
        if address:
            repository, revision = address.groups()
            loaded: Any = datasets.load_dataset(repository, subset, revision=revision)
        else:
            place = user_path("dataset.root", root)
            saved = any((place / file).is_file() for file in ("dataset_dict.json", "state.json"))
            loaded = datasets.load_from_disk(place) if saved else datasets.load_dataset(str(place), subset)
    except Exception as error:  # the library does not document what it raises
        # Of the hub nothing is repeated: a token could be in it.
        reason = type(error).__name__ if address else f"{type(error).__name__}: {one_line(error)}"
        hint = "check it and dataset.subset" + (", and the network" if address else "")
        raise UserError(f"{where}: the library datasets cannot read it ({reason}); {hint}") from None
    return dict(loaded) if isinstance(loaded, dict) else {"all": loaded}


def _column(where: str, table: Any, column: str | None, knob: str, kind: str, names: tuple[str, ...]) -> str:
    """The column that the knob names; else the only one of this kind; else the one of these names that is there."""
    there = list(table.column_names)
    if column is not None:
        if column not in there:
            raise UserError(f"dataset.{knob}={column}: {where} has the columns {first_few(there, 10)}")
        return column
    fitting = [name for name, feature in table.features.items() if type(feature).__name__ == kind]
    fitting = fitting or [name for name in names if name in there]
    if len(fitting) != 1:
        several = f"several columns of type {kind}" if fitting else f"no column of type {kind}"
        raise UserError(f"{where}: has {several} among {first_few(there, 10)}; name one by dataset.{knob}")
    return fitting[0]


def _source(root: str, where: str, table: Any, column: str) -> Source:
    """The files of the images of one split, each called SPLIT/ROW."""
    from datasets import Image, config
    from huggingface_hub import constants

    try:
        table = table.select_columns([column]).cast_column(column, Image(decode=False))
    except Exception as error:
        raise UserError(f"{where}: {column} is no column of images ({type(error).__name__}); name another") from None

    def read(name: str) -> bytes:
        picture = table[int(name.rpartition("/")[2])][column]
        if picture is None:
            raise ValueError("there is no image")
        if picture["bytes"] is not None:
            return picture["bytes"]
        path = os.path.abspath(picture["path"])
        if not path.startswith(tuple(os.path.join(folder, "") for folder in folders)):  # a table may name any file
            raise ValueError(f"{path} is neither in the dataset's folder nor in the cache of Hugging Face")
        return read_file(path)

    folders = [config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE]
    folders += [] if root.startswith(SCHEME) else [user_path("dataset.root", root)]
    folders = [os.path.abspath(folder) for folder in folders]
    as_given: Any = root  # an address is no path
    return Source(as_given, (), table._fingerprint, read)


def _classes(source: Source, split: str, table: Any, column: str, where: str) -> dict[str, Files]:
    """The images of each class, in the order of their rows; the classes in order of their names."""
    names, members = getattr(table.features[column], "names", None), defaultdict(list)
    labels = table.select_columns([column]).to_dict()[column]
    for row, value in enumerate(labels):
        if value not in (None, "") and (names is None or value >= 0):  # below 0 where a test's labels are kept back
            label = plain_text(str(value if names is None else names[value]))
            members[label].append((source, f"{split}/{row}"))
    if unknown := len(labels) - sum(map(len, members.values())):
        log.warning("%s: %d of %s without a class left out", where, unknown, split)
    return {label: members[label] for label in sorted(members)}


def _own_splits(classes: Mapping[str, dict[str, Files]]) -> dict[str, dict[str, Files]] | None:
    """The dataset's own train, validation and test, if each has classes and they share none; else None."""
    own = {}
    for split, known in SPELLINGS.items():
        called = [name for name in classes if name.casefold() in known and classes[name]]
        if len(called) != 1:
            return None
        own[split] = classes[called[0]]
    number = len({label for members in own.values() for label in members})
    return own if number == sum(map(len, own.values())) and len(own) == len(classes) else None
