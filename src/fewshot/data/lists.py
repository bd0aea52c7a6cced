"""Tables of others (CSV) that say which image is of which class."""

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Iterator

from fewshot.data.folder_or_zip import plain_text

LARGEST_TABLE = 64 * 2**20  # bytes; a million images
COLUMNS = {"file": ("file", "filename"), "label": ("label", "class"), "split": ("split",)}


def read_classes(table: bytes, find: Callable[[str], str | None]) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
    """The images of each label of each split (of "" where there is none), in their order, and the files not there.

    The columns may be called as COLUMNS has it.

    Args:
        table: a CSV file's bytes.
        find: the image that a file stands for, if there is one.

    Raises:
        ValueError: it is no such table, or has an image twice.
    """
    classes: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    seen, absent = set(), []
    for file, label, split in _rows(table):
        image = find(file)
        if image is None:
            absent.append(file)
        elif image in seen:
            raise ValueError(f"it has {file} twice")
        else:
            seen.add(image)
            classes[split][plain_text(label)].append(image)
    return classes, absent


def _rows(table: bytes) -> Iterator[tuple[str, str, str]]:
    """File, label and split of each row."""
    if len(table) > LARGEST_TABLE:
        raise ValueError(f"it has {len(table):,} bytes, too many for a list of images")
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(table), encoding="utf-8-sig", newline=""))
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        places = {
            column: next((header.index(name) for name in names if name in header), None)
            for column, names in COLUMNS.items()
        }
        if places["file"] is None or places["label"] is None:
            raise ValueError("its first row names no columns file and label")
        for row in reader:
            if not row:
                continue
            cells = {
                column: row[place].strip() if place is not None and place < len(row) else ""
                for column, place in places.items()
            }
            if not cells["file"] or not cells["label"]:
                raise ValueError(f"line {reader.line_num} has no {'label' if cells['file'] else 'file'}")
            yield cells["file"], cells["label"], cells["split"]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"after line {reader.line_num} it is not UTF-8") from error
