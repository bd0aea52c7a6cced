"""Images of one's own, or CIFAR-FS, miniImageNet and the like: train|val|test/CLASS/image, in a folder or a zip."""

from collections import defaultdict
from itertools import combinations
from pathlib import Path

from fewshot.config import UserError
from fewshot.data.images import Source, cached, is_image, open_source, read_splits
from fewshot.tasks import SPLITS, Split

LAYOUT = "a folder or a zip with train|val|test/CLASS/image"


def load(*, root: str | None, size: int, channels: int, cache: str | None) -> dict[str, Split]:
    """The splits in a folder or zip; every image the middle square of the file, resized to (channels, size, size).

    Raises:
        UserError: the images are not there, not in this layout or not readable.
    """
    if root is None:
        raise UserError(f"dataset.root=null: this dataset is not downloaded; set dataset.root to {LAYOUT}")
    if channels not in (1, 3):
        raise UserError(f"dataset.channels={channels}: give 1 (grey) or 3 (colour)")
    source = open_source(Path(str(root)).expanduser(), SPLITS)
    classes = find_classes(source)
    return cached(
        "folder",
        source.identity,
        size=size,
        channels=channels,
        cache=cache,
        build=lambda: read_splits(classes, size=size, channels=channels),
    )


def find_classes(source: Source) -> dict[str, dict[str, list[tuple[Source, str]]]]:
    """The files of every class of every split."""
    where = f"dataset.root={source.root}"
    classes = {split: defaultdict(list) for split in SPLITS}
    for name in source.names:
        split, _, rest = name.partition("/")
        label, inside, file = rest.partition("/")
        if inside:
            images = classes[split][label]
            if is_image(file):
                images.append((source, name))
    if missing := [split for split in SPLITS if not classes[split]]:
        raise UserError(f"{where}: no classes in {', '.join(f'{split}/' for split in missing)}; it must be {LAYOUT}")
    if empty := [f"{split}/{label}" for split in SPLITS for label, images in classes[split].items() if not images]:
        raise UserError(f"{where}: no images in {some(empty)}; add images or remove the class")
    for one, other in combinations(SPLITS, 2):
        if shared := sorted(classes[one].keys() & classes[other].keys()):
            raise UserError(
                f"{where}: {one}/ and {other}/ share {some(shared)}; few-shot splits have classes of their own"
            )
    return {split: dict(members) for split, members in classes.items()}


def some(names: list[str], shown: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
