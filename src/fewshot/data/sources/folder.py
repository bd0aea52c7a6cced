"""One's own images, or CIFAR-FS, miniImageNet and the like, in a folder or a zip.

Either they lie in train|val|test/CLASS/image; or in CLASS/image, and the classes are split here by seeded fractions; or
a list says which image is of which class.
"""

import hashlib
import logging
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path

from fewshot.data.cache import cached
from fewshot.data.folder_or_zip import Source, canonical, open_source, read_classes, read_file
from fewshot.data.images import NOT_EVERYWHERE, is_image, plain_classes, read_splits, tell_left_out
from fewshot.data.task import SPLITS, Split
from fewshot.errors import UserError, first_few
from fewshot.files import user_path
from fewshot.processes.surroundings import as_called

log = logging.getLogger(__name__)

SPLIT_LAYOUT = "train|val|test/CLASS/image"
SPELLINGS = {  # other names of the splits' folders, for a hint
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
DEEPEST = 4  # how many folders within each other are searched for them
Files = list[tuple[Source, str]]
Classes = dict[str, dict[str, Files]]  # the files of every class of every split
Deal = Callable[[Mapping[str, Files]], Classes]


def load(
    *,
    root: str,
    size: int,
    channels: int,
    cache: str | None,
    labels: str | None = None,
    fractions: Mapping[str, float] | None = None,
    split_seed: int = 0,
    name: str = "folder",
    ways: int = 0,
    shots: int = 0,
    queries: int = 0,
    largest_image: int | None = None,
) -> dict[str, Split]:
    """The splits in a folder or zip; an image is the middle square of its file, resized to (channels, size, size).

    name: of the dataset, in the cache
    fractions: None: the images must come with splits
    ways, shots, queries: as in conf/dataset/folder.yaml; 0: any number of classes, or of images of a class, will do
    """
    layout = f"a folder or a zip with {SPLIT_LAYOUT}{' or CLASS/image' if fractions else ''}"
    where, path = f"dataset.root={root}", user_path("dataset.root", root)
    deal = partial(split_classes, fractions=fractions, seed=split_seed, ways=ways, where=where) if fractions else None
    if labels is not None:
        source, classes = _listed(path, labels, deal)
    else:
        source, classes = _in_folders(path, where, layout, deal)
    used = {name for members in classes.values() for files in members.values() for _, name in files}
    tell_left_out(where, source, used)
    classes = with_enough(classes, shots + queries, where)
    check_left(classes, ways, where)
    contents = {split: list(members) for split, members in classes.items()}
    varying = any(name.lower().endswith(NOT_EVERYWHERE) for name in source.names)
    if labels is not None or varying:  # then the names of the files do not say which are used, and in which class
        contents = {s: {label: [name for _, name in files] for label, files in classes[s].items()} for s in SPLITS}
    shape = {"size": size, "channels": channels}
    build = partial(read_splits, classes, largest_image=largest_image, **shape)
    return cached(name, [source.fingerprint, contents], cache=cache, build=build, **shape)


def _in_folders(path: Path, where: str, layout: str, deal: Deal | None) -> tuple[Source, Classes]:
    """The classes of a folder or zip in one of the two layouts; `deal`, if any, splits those of CLASS/image."""
    source = open_source(path, SPLITS)
    in_splits = any(is_image(name) and name.count("/") > 1 for name in source.names)
    try:
        if in_splits or deal is None:
            return source, find_classes(source, where, layout)
        source = open_source(path)
        classes = {label: [(source, name) for name in names] for label, names in plain_classes(source).items() if label}
        if not any(classes.values()):
            raise UserError(
                f"{where}: no images in folders; it must be {layout}, or have a list, dataset.labels=FILE.csv"
            )
        return source, deal({label: files for label, files in classes.items() if files})
    except UserError as error:
        hint = _other_packing(open_source(path))
        raise UserError(f"{error}; {hint}" if hint else str(error)) from None


def _other_packing(source: Source) -> str:
    """A hint, "" if there is none: the folders have other names, or are wrapped more than once."""
    folders = {name.rpartition("/")[0] for name in source.names if is_image(name)}
    inside: dict[str, set[str]] = defaultdict(set)
    for folder in folders:
        parts = folder.split("/")
        for depth in range(min(len(parts), DEEPEST)):
            inside["/".join(parts[:depth])].add(parts[depth])
    for base, names in sorted(inside.items(), key=lambda item: item[0].count("/")):
        called = {
            split: name for split, known in SPELLINGS.items() for name in sorted(names) if name.casefold() in known
        }
        if len(called) == len(SPELLINGS):
            renamed = list(called.values()) != list(SPELLINGS)
            rename = f"call {', '.join(called.values())} train, val and test" if renamed else ""
            return " and ".join(filter(None, [rename, _unwrap(source.root, base) if "/" in base else ""]))
    base = os.path.commonpath(folders) if folders else ""
    return _unwrap(source.root, base) if "/" in base and len(inside[base]) > 1 else ""


def _unwrap(root: Path, base: str) -> str:
    return f"give dataset.root={root / base}" if root.is_dir() else f"make the zip anew of what is in {base}/"


def _listed(path: Path, labels: str, deal: Deal | None) -> tuple[Source, Classes]:
    """The classes that a list names; classes and their files are sorted.

    The list lies in the folder or zip at `path`, or in the only folder there, or elsewhere. It names files as they lie
    beside it, or in the folder or zip.
    """
    where, source = f"dataset.labels={labels}", open_source(path)
    known = {name for name in source.names if not name.endswith("/")}
    inside = _name(labels)
    wrapped = [name for name in known if name.count("/") == 1 and name.endswith(f"/{inside}")]
    places = [inside, wrapped[0] if len(wrapped) == 1 else ""]
    if path.is_dir():  # it may be named by its path
        list_at, root = (os.path.realpath(place) for place in (user_path("dataset.labels", labels), path))
        places.append(_name(os.path.relpath(list_at, root)))
    inside = next((name for name in places if name in known), "")
    beside = inside[: inside.rfind("/") + 1]

    def find(file: str) -> str | None:
        name = _name(file)
        return next((path for path in (beside + name, name) if path in known), None)

    try:
        table = source.read(inside) if inside else read_file(user_path("dataset.labels", labels))
        splits, absent = read_classes(table, find)
    except (OSError, ValueError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error
        wanted = "a CSV with columns file and label, and split if you like, in UTF-8 and with commas"
        raise UserError(f"{where}: {reason}; give {wanted}") from None
    if absent:
        raise UserError(f"{where}: {path} lacks {first_few(absent)}; name files as they lie in it")
    source = replace(source, names=tuple(name for name in source.names if name != inside))
    classes = {
        split: {label: [(source, name) for name in sorted(files)] for label, files in sorted(members.items())}
        for split, members in splits.items()
    }
    if list(classes) == [""] and deal:
        return source, deal(classes[""])
    if differing := sorted({*classes} ^ {*SPLITS}):
        raise UserError(
            f"{where}: its column split differs from train, val, test in {first_few([*map(repr, differing)])}"
        )
    _refuse_shared(classes, where)
    return source, {split: classes[split] for split in SPLITS}


def _name(file: str) -> str:
    """A file's name in a source; "" if it leads out of that."""
    with suppress(ValueError):
        return canonical(file)
    return ""


def find_classes(source: Source, where: str, layout: str) -> Classes:
    """The classes of SPLIT_LAYOUT, in order of their names; some may have no images."""
    classes = {split: defaultdict(list) for split in SPLITS}
    for name in source.names:
        if name.count("/") > 1:
            split, label, file = name.split("/", 2)
            classes[split][label] += [(source, name)] * is_image(file)
    if missing := [split for split in SPLITS if not classes[split]]:
        raise UserError(f"{where}: no classes in {', '.join(f'{split}/' for split in missing)}; it must be {layout}")
    _refuse_shared(classes, where)
    return {split: dict(members) for split, members in classes.items()}


def _refuse_shared(classes: Mapping[str, Iterable[str]], where: str) -> None:
    for one, other, shared in _shared(classes):
        raise UserError(
            f"{where}: {one}/ and {other}/ share {first_few(shared)}; few-shot splits have classes of their own"
        )


def _shared(classes: Mapping[str, Iterable[str]]) -> Iterator[tuple[str, str, list[str]]]:
    """(split, other split, names) of the classes that both have, where capitals make no difference."""
    folded = {
        split: {unicodedata.normalize("NFC", name.casefold()): name for name in names}
        for split, names in classes.items()
    }
    for one, other in combinations(SPLITS, 2):
        if both := sorted(folded[one].keys() & folded[other].keys()):
            pairs = [(folded[one][name], folded[other][name]) for name in both]
            yield one, other, [first if first == second else f"{first} = {second}" for first, second in pairs]


def in_seeded_order(names: Iterable[str], seed: int) -> list[str]:
    """The names ordered by the SHA-256 of "SEED/NAME", which anyone can repeat without our random numbers."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode(errors="surrogatepass")).digest())


def split_classes(
    classes: Mapping[str, Files], fractions: Mapping[str, float], seed: int, where: str, ways: int = 0
) -> Classes:
    """Deals out the classes by their names, the seed and the fractions; nothing else matters.

    In seeded order the first are train, the next val, the last test. Val and test get their fraction, rounded, but each
    split gets at least two classes, the fewest that a task can have. Fewer than `ways` are a UserError.
    """
    number, least = len(classes), 2
    if number < 3 * least:
        raise UserError(
            f"{where}: {number} classes ({first_few(list(classes))}); to be split into train, val and test "
            f"it needs at least {3 * least}; add classes, or put them into {SPLIT_LAYOUT}{_without_training()}"
        )
    test = min(max(least, round(fractions["test"] * number)), number - 2 * least)
    val = min(max(least, round(fractions["val"] * number)), number - test - least)
    order, train = in_seeded_order(classes, seed), number - test - val
    parts = {"train": order[:train], "val": order[train : train + val], "test": order[train + val :]}
    for one, other, names in _shared(parts):
        shared = first_few(names)
        log.warning(
            "%s: but for capitals %s and %s share %s; rename them if they are one class", where, one, other, shared
        )
    _check_ways({split: len(names) for split, names in parts.items()}, ways, where)
    return {split: {name: classes[name] for name in sorted(names)} for split, names in parts.items()}


def _check_ways(numbers: dict[str, int], ways: int, where: str) -> None:
    """Raises UserError where a split has fewer classes; it names the fractions that would do."""
    total, least = sum(numbers.values()), min(numbers.values())
    if ways <= least:
        return
    possible = min(ways, total // len(SPLITS))
    share = round(possible / total, 4)
    fractions = f'"dataset.fractions={{train: {1 - 2 * share:.4g}, val: {share}, test: {share}}}"'
    more = f", or {f'ways={possible} ' if possible < ways else ''}{fractions}" if possible > least else ""
    dealt = ", ".join(f"{number} {split}" for split, number in numbers.items())
    raise UserError(
        f"ways={ways}: {where} has {total} classes, dealt out as {dealt}; use ways={least}{more}{_without_training()}"
    )


def check_left(classes: Classes, ways: int, where: str) -> None:
    """Raises UserError where a split has fewer classes than `ways`, by its folders or for want of images."""
    numbers = {split: len(members) for split, members in classes.items()}
    if ways > (least := min(numbers.values())):
        left = ", ".join(f"{number} {split}" for split, number in numbers.items())
        remedy = f"use ways={least}" if least > 1 else "each split needs at least 2; add classes"
        raise UserError(f"ways={ways}: {where} has {left} classes; {remedy}{_without_training()}")


def _without_training() -> str:
    return f"; or train nothing: {as_called('predict')} model=omniglot-5w1s-zero tells any classes apart"


def with_enough(classes: Classes, least: int, where: str) -> Classes:
    """The classes with at least so many images; one line names the others. They took part in the split before."""
    counts = {f"{split}/{name}": len(images) for split in SPLITS for name, images in classes[split].items()}
    if not least:
        if empty := [name for name, count in counts.items() if not count]:
            raise UserError(f"{where}: no images in {first_few(empty)}; add images or remove the class")
        return classes
    if short := [f"{name} ({count})" for name, count in counts.items() if count < least]:
        log.warning(
            "%s: classes with fewer than shots+queries=%d images are left out: %s", where, least, first_few(short)
        )
    kept = {s: {name: images for name, images in classes[s].items() if len(images) >= least} for s in SPLITS}
    if bare := [split for split in SPLITS if not kept[split]]:
        raise UserError(
            f"shots+queries={least}: no class of {' and '.join(bare)} in {where} has so many images; "
            "lower shots or queries"
        )
    return kept
