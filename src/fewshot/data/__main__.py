"""The datasets: which there are, made ready before any run needs them, and shown.

python -m fewshot.data list
python -m fewshot.data prepare dataset=omniglot
python -m fewshot.data show dataset=omniglot dataset.rotations=true out=omniglot.png
"""

import logging
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from fewshot.config.advice import configuration
from fewshot.config.check import refuse
from fewshot.config.command import Command, Parameter, one_line_errors, read
from fewshot.config.tree import choices
from fewshot.data.cache import cache_folder, file_stem, not_kept
from fewshot.errors import UserError, shown
from fewshot.files import check_writable, user_path, write_atomically


def checked(overrides: list[str]) -> DictConfig:
    """The configuration, as far as it says which images to read."""
    refuse(cfg := configuration(overrides), overrides)
    if cfg.checkpoint is not None:
        raise UserError(f"checkpoint={cfg.checkpoint}: no model is read here; name the dataset itself, dataset=NAME")
    return cfg


def read_images(cfg: DictConfig) -> dict[str, Any]:
    """The splits, which are downloaded, decoded and put into the cache where they are not yet."""
    from fewshot.data.splits import splits_of  # imports torch

    data = cfg.dataset
    splits = splits_of(data.source, (data.channels, data.size, data.size))
    for name, split in splits.items():
        print(f"{data.name} {name}: {len(split.names)} classes, {len(split.images)} images")
    return splits


def prepare(overrides: list[str]) -> None:
    """Leaves the images in the cache; says which and where."""
    cfg = checked(overrides)
    if "cache" not in cfg.dataset:
        words = "has no dataset.cache, so each run reads its images itself and there is nothing to prepare"
        raise UserError(f"dataset={cfg.dataset.name}: {words}")
    try:
        folder = cache_folder(cfg.dataset.cache)
    except RuntimeError:
        raise UserError("dataset.cache=null: there is no home folder; set dataset.cache to a folder") from None
    if not _on_this_machine(cfg.dataset).startswith("prepared"):
        check_writable("dataset.cache", folder)  # before anything is downloaded
    not_kept.clear()
    read_images(cfg)
    if not_kept:
        raise UserError(f"dataset.cache={folder}: cannot keep the images ({not_kept[-1]}); name another folder")
    print(f"Ready in {folder}; where runs use another cache, give them dataset.cache")


def show(overrides: list[str], out: Path | None = None) -> None:
    """Writes a contact sheet to the PNG file `out`."""
    if out is None or out.suffix.lower() != ".png":
        raise UserError(f"out={shown(out)}: give out=FILE.png, the contact sheet to be written")
    splits = read_images(checked(overrides))
    from fewshot.data.sheet import contact_sheet, dataset_rows  # imports torch

    write_atomically(out, partial(contact_sheet(dataset_rows(splits)).save, format="PNG"))
    print(f"Written to {out}")


def list_datasets(overrides: list[str]) -> None:
    """A line for every dataset=NAME, or only for those that are named."""
    rows = [("dataset", "train/val/test classes", "images", "size", "images from", "on this machine")]
    named = [override for override in overrides if override.startswith("dataset=")]
    overrides = [override for override in overrides if override not in named]
    for choice in named or [f"dataset={name}" for name in choices("dataset")]:
        data = configuration([choice, *overrides]).dataset
        classes = [data.classes[split] for split in ("train", "val", "test")]
        numbers = "as found" if None in classes else "/".join(map(str, classes))
        images = f"{sum(classes) * data.images_per_class:,}" if data.images_per_class else "as found"
        size = f"{data.size}x{data.size} {'grey' if data.channels == 1 else 'colour'}"
        rows.append(
            (choice.removeprefix("dataset="), numbers, images, size, data.get("origin", ""), _on_this_machine(data))
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _on_this_machine(data: DictConfig) -> str:
    if "cache" not in data:
        return "read by each run"  # a source of one's own
    stem = file_stem(data.name, data.size, data.channels)
    with suppress(RuntimeError):  # no home folder
        folder = cache_folder(data.cache)
        if list(folder.glob(f"{stem}-*.json")):
            return f"prepared, {sum(file.stat().st_size for file in folder.glob(f'{stem}-*')) / 1e6:.0f} MB"
        archive = folder / data.get("archive", data.name)
        names = {path.name for path in archive.iterdir()} if archive.is_dir() else set()
        interrupted = any(name.startswith(".") and name.endswith(".part") for name in names)
        if any(not name.startswith(".") for name in names) and not interrupted:
            return "downloaded"
    return "no" if "root" in data else "needs nothing"


COMMAND = Command(
    "data",
    "lists, prepares and shows the datasets.",
    {
        "list": Parameter("Which datasets there are, and which of them are on this machine."),
        "prepare": Parameter(
            "Downloads and decodes the images of a dataset into the cache, for a cluster whose nodes have no network."
        ),
        "show": Parameter("Draws some images of each split into a file."),
        "dataset=NAME": Parameter("The dataset; left out: glyphs, and `list` lists them all.", None),
        "out=FILE.png": Parameter("The file that `show` writes.", user_path),
    },
    knobs=True,
)


def _several_values(word: str) -> bool:
    with suppress(Exception):  # of the grammar: it is told of later
        return OverridesParser.create().parse_override(word).is_sweep_override()
    return False


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with one_line_errors():
        words = read(COMMAND, arguments)
        if len(words.plain) > 1:
            raise UserError(f"{' '.join(words.plain)}: give one of them at a time")
        if words.values and words.plain != ["show"]:
            raise UserError(f"out={words.values['out']}: only show writes a file; leave it out")
        if several := next(filter(_several_values, words.knobs), None):
            remedy = "list takes dataset=A dataset=B" if words.plain == ["list"] else "the others by calls of their own"
            raise UserError(f"{several}: give one value, {remedy}")
        does = {"list": list_datasets, "prepare": prepare, "show": partial(show, **words.values)}
        does[words.plain[0]](words.knobs)


if __name__ == "__main__":
    main()
