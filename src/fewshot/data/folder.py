"""Images of one's own, or CIFAR-FS, miniImageNet and the like, in a folder or a zip.

They lie in train|val|test/CLASS/image; or in CLASS/image, and the classes are split here, by seeded fractions.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import combinations

from fewshot.data.cache import cached
from fewshot.data.images import Source, is_image, open_source, read_splits
from fewshot.errors import UserError, some
from fewshot.paths import user_path
from fewshot.tasks import SPLITS, Split

log = logging.getLogger(__name__)

SPLIT_LAYOUT = "train|val|test/CLASS/image"
Classes = dict[str, dict[str, list[tuple[Source, str]]]]  # the files of every class of every split


def load(
    *,
    root: str | None,
    size: int,
    channels: int,
    cache: str | None,
    fractions: Mapping[str, float] | None = None,
    split_seed: int = 0,
    name: str = "folder",
    ways: int = 0,
    shots: int = 0,
    queries: int = 0,
) -> dict[str, Split]:
    """The splits in a folder or zip; every image the middle square of the file, resized to (channels, size, size).

    Args:
        root: the folder or zip.
        size, channels: of the images.
        cache: folder, None for the user's own.
        fractions: of the classes that go to train, val and test where the layout is CLASS/image; None: it may not be.
        split_seed: see `split_classes`.
        name: of the dataset, in the cache.
        ways: classes that each split needs at least; where they are split here, a line says how to. 0: any number.
        shots, queries: a class with fewer images than both together is left out, with a line. 0: none is.

    Raises:
        UserError: the images are not there, not in this layout or not readable.
    """
    layout = f"a folder or a zip with {SPLIT_LAYOUT}{' or CLASS/image' if fractions else ''}"
    if root is None:
        raise UserError(f"dataset.root=null: this dataset is not downloaded; set dataset.root to {layout}")
    if channels not in (1, 3):
        raise UserError(f"dataset.channels={channels}: give 1 (grey) or 3 (colour)")
    where, path = f"dataset.root={root}", user_path("dataset.root", root)
    source = open_source(path, SPLITS)
    if fractions and not any(is_image(name) and name.count("/") > 1 for name in source.names):
        source = open_source(path)
        classes = split_classes(_plain_classes(source, where, layout), fractions, split_seed, where)
        _check_ways({split: len(members) for split, members in classes.items()}, ways, where)
    else:
        classes = find_classes(source, where, layout)
    classes = _with_enough(classes, shots + queries, where)
    return cached(
        name,
        [source.identity, {split: list(members) for split, members in classes.items()}],
        size=size,
        channels=channels,
        cache=cache,
        build=lambda: read_splits(classes, size=size, channels=channels),
    )


def find_classes(source: Source, where: str, layout: str) -> Classes:
    """The classes of SPLIT_LAYOUT, in order of their names; some may have no images."""
    classes = {split: defaultdict(list) for split in SPLITS}
    for name in source.names:
        split, _, rest = name.partition("/")
        label, inside, file = rest.partition("/")
        if inside:
            images = classes[split][label]
            if is_image(file):
                images.append((source, name))
    if missing := [split for split in SPLITS if not classes[split]]:
        raise UserError(f"{where}: no classes in {', '.join(f'{split}/' for split in missing)}; it must be {layout}")
    for one, other in combinations(SPLITS, 2):
        if shared := sorted(classes[one].keys() & classes[other].keys()):
            raise UserError(
                f"{where}: {one}/ and {other}/ share {some(shared)}; few-shot splits have classes of their own"
            )
    return {split: dict(members) for split, members in classes.items()}


def _plain_classes(source: Source, where: str, layout: str) -> dict[str, list[tuple[Source, str]]]:
    """The classes of the layout CLASS/image, which one folder may enclose, in order of their names."""
    images = [name for name in source.names if is_image(name) and "/" in name]
    enclosed = len({name.split("/")[0] for name in images}) == 1 and all(name.count("/") > 1 for name in images)
    classes = defaultdict(list)
    for name in images:
        classes[name.split("/")[enclosed]].append((source, name))
    if not classes:
        raise UserError(f"{where}: no images in folders; it must be {layout}")
    return dict(classes)


def in_seeded_order(names: Iterable[str], seed: int) -> list[str]:
    """The names by the SHA-256 of "SEED/NAME": an order that anyone can make again, whatever their random numbers."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode(errors="surrogatepass")).digest())


def split_classes(
    classes: Mapping[str, list[tuple[Source, str]]], fractions: Mapping[str, float], seed: int, where: str
) -> Classes:
    """Deals out the classes: a function of their names, the seed and the fractions alone.

    In seeded order the first are train, the next val, the last test. Val and test have their fraction, rounded, but
    all three at least two classes, the fewest that a task can have.
    """
    number, least = len(classes), 2
    if number < 3 * least:
        raise UserError(
            f"{where}: {number} classes ({some(list(classes))}); to be split into train, val and test "
            f"it needs at least {3 * least}; add classes, or put them into {SPLIT_LAYOUT}"
        )
    test = min(max(least, round(fractions["test"] * number)), number - 2 * least)
    val = min(max(least, round(fractions["val"] * number)), number - test - least)
    order, train = in_seeded_order(classes, seed), number - test - val
    parts = {"train": order[:train], "val": order[train : train + val], "test": order[train + val :]}
    return {split: {name: classes[name] for name in sorted(names)} for split, names in parts.items()}


def _check_ways(numbers: dict[str, int], ways: int, where: str) -> None:
    """Raises UserError where a split has fewer classes, with the fractions that would do."""
    total, least = sum(numbers.values()), min(numbers.values())
    if ways <= least:
        return
    possible = min(ways, total // len(SPLITS))
    share = round(possible / total, 4)
    fractions = f'"dataset.fractions={{train: {1 - 2 * share:.4g}, val: {share}, test: {share}}}"'
    more = f", or {f'ways={possible} ' if possible < ways else ''}{fractions}" if possible > least else ""
    dealt = ", ".join(f"{number} {split}" for split, number in numbers.items())
    raise UserError(f"ways={ways}: {where} has {total} classes, dealt out as {dealt}; use ways={least}{more}")


def _with_enough(classes: Classes, least: int, where: str) -> Classes:
    """The classes with so many images; the others are named in one line, after the split, which they do not change."""
    counts = {f"{split}/{name}": len(images) for split in SPLITS for name, images in classes[split].items()}
    if not least:
        if empty := [name for name, count in counts.items() if not count]:
            raise UserError(f"{where}: no images in {some(empty)}; add images or remove the class")
        return classes
    if short := [f"{name} ({count})" for name, count in counts.items() if count < least]:
        log.warning("%s: classes with fewer than shots+queries=%d images are left out: %s", where, least, some(short))
    kept = {s: {name: images for name, images in classes[s].items() if len(images) >= least} for s in SPLITS}
    if bare := [split for split in SPLITS if not kept[split]]:
        raise UserError(
            f"shots+queries={least}: no class of {' and '.join(bare)} in {where} has so many images; "
            "lower shots or queries"
        )
    return kept
