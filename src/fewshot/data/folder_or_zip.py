"""The files of a folder or a zip, under names that do not depend on the system or program that wrote them.

Also the tables (CSV) that say which file is of which class.
"""

import csv
import io
import os
import re
import stat
import unicodedata
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewshot.errors import UserError

# A file that is larger, or unpacks to more, is no photo. (So a zip bomb ends in one line, not in a full memory.)
LARGEST_FILE = 256 * 2**20
# Not bzip2 and LZMA: of these Python's zipfile unpacks as much as there is, whatever size the zip claims.
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
UTF8_NAME = 0x800  # flag bit 11 of a zip's entry
# What macOS, Windows, Linux and network drives put beside one's files; names that begin with a dot are hidden anyway.
SYSTEM = frozenset(
    {"__macosx", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini", "lost+found"}
    | {"@eadir", "#recycle", "#snapshot", "@recycle", "@__thumb"}
)
# Control characters, line separators and what turns the direction of a text: a name has to be shown on one line.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

LARGEST_TABLE = 64 * 2**20  # bytes; a million images
COLUMNS = {"file": ("file", "filename"), "label": ("label", "class"), "split": ("split",)}  # the first that is there


@dataclass(frozen=True)
class Source:
    """The files of a folder or a zip.

    root: as the user gave it, for messages
    names: sorted paths relative to the folder that holds the wanted top folders; a folder's own name ends with "/"
    fingerprint: changes whenever a file does
    read: a name's bytes, also of one beside the top folders; raises OSError, LookupError or ValueError
    """

    root: Path
    names: tuple[str, ...]
    fingerprint: Any
    read: Callable[[str], bytes]


def open_source(root: Path, tops: Iterable[str] = (), knob: str = "dataset.root") -> Source:
    """What lies under the folders `tops` of a folder or zip, which may wrap them in one enclosing folder.

    Without `tops`: everything in it, as it lies there. What the system put there is always left out.

    knob: names the root in messages.

    Raises:
        UserError: `root` does not exist, cannot be read, or is a file but not a sound zip; two of its names are one.
    """
    tops, where = frozenset(tops), f"{knob}={root}"
    try:
        if root.is_dir():
            return _open_folder(root, tops, where)
        if root.is_file():
            return _open_zip(root, tops, where)
        if root.exists():
            raise UserError(f"{where}: neither a folder nor a regular file; give a folder or zip")
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error}") from error
    raise UserError(f"{where}: no such file or folder; give the folder or zip that holds the images")


def canonical(path: str) -> str:
    """A path in the form that this program uses: parts joined by "/", their text as `plain_text` makes it.

    A folder's path ends with "/". Raises ValueError where it leads out of its folder or zip.
    """
    path = path.replace("\\", "/")  # as some programs for Windows write them
    parts = path.split("/")
    if parts[0] == "" or ".." in parts or re.match("[A-Za-z]:/", path):
        raise ValueError("unsafe path")
    inside = [plain_text(part) for part in parts if part not in ("", ".")]
    return "/".join(inside) + ("/" if inside and parts[-1] in ("", ".") else "")


def plain_text(text: str) -> str:
    """A name on one line with composed letters (NFC); bytes that are no text and control characters become \\xNN."""
    if text.isascii() and text.isprintable():
        return text
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    text = UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return unicodedata.normalize("NFC", text)


def read_file(path: str | Path) -> bytes:
    """The bytes of a regular file; raises OSError or ValueError for a device, a large file, or none."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > LARGEST_FILE:
        raise ValueError(f"it has {status.st_size:,} bytes")
    with open(path, "rb") as file:
        data = file.read(status.st_size + 1)
    if len(data) != status.st_size:
        raise ValueError("it has another size than its folder says")
    return data


def _add(files: dict[str, str], raw: str, where: str, kind: str) -> str | None:
    """Adds a path to `files` by its canonical name and returns that; None for what the system put there.

    Raises UserError where it leads out of the folder or zip, or another path has the same name.
    """
    try:
        name = canonical(raw)
    except ValueError:
        raise UserError(f"{where}: unsafe path {raw!r} in the {kind}; make the {kind} anew") from None
    if not name or any(_of_the_system(part) for part in name.split("/")):
        return None
    if files.setdefault(name, raw) != raw and not name.endswith("/"):
        raise UserError(f"{where}: {files[name]!r} and {raw!r} are one name; rename or remove one")
    return name


def _of_the_system(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM


def _open_folder(root: Path, tops: frozenset[str], where: str) -> Source:
    def holds_tops(folder: Path) -> bool:
        return any((folder / top).is_dir() for top in tops)

    base = root
    if tops and not holds_tops(root):
        wrappers = [
            path for path in root.iterdir() if path.is_dir() and not _of_the_system(path.name) and holds_tops(path)
        ]
        base = wrappers[0] if len(wrappers) == 1 else root
    files: dict[str, str] = {}
    entries: list[list[Any]] = [["", str(base.resolve())]]
    for raw, status in _walk(base, tops, where):
        if name := _add(files, raw, where, "folder"):
            regular = status is not None and stat.S_ISREG(status.st_mode)
            entries.append([name, status.st_size, status.st_mtime_ns] if status and regular else [name])
    entries.sort(key=lambda entry: entry[0])
    names = tuple(sorted(files))
    return Source(root, names, entries, lambda name: read_file(base / files.get(name, name)))


def _walk(base: Path, tops: frozenset[str], where: str) -> Iterator[tuple[str, os.stat_result | None]]:
    """Path below base and status of all that lies in base, or in its folders `tops`.

    A folder's path ends with "/". A link that leads nowhere has no status; one that leads to a folder that was seen
    before is a UserError, because the walk could go on for ever.
    """
    seen: dict[tuple[int, int], tuple[str, bool]] = {}
    present = [top for top in sorted(tops, reverse=True) if (base / top).is_dir()]
    todo = [(f"{top}/", os.path.islink(base / top)) for top in present] if tops else [("", False)]
    while todo:
        folder, linked = todo.pop()
        status = os.stat(base / folder)
        other, other_linked = seen.setdefault((status.st_dev, status.st_ino), (folder, linked))
        if other != folder and (linked or other_linked):
            raise UserError(f"{where}: {other or '.'} and {folder} are one folder, by a link; remove the link")
        if folder:
            yield folder, status
        with os.scandir(base / folder) as entries:
            for entry in entries:
                try:
                    status = entry.stat()
                except OSError:
                    status = None
                if not status or not stat.S_ISDIR(status.st_mode):
                    yield folder + entry.name, status
                elif not _of_the_system(entry.name):
                    todo.append((f"{folder}{entry.name}/", linked or entry.is_symlink()))


def _open_zip(root: Path, tops: frozenset[str], where: str) -> Source:
    try:
        archive = zipfile.ZipFile(root)
    except OSError:
        raise
    except Exception as error:  # a damaged directory makes zipfile raise nearly any kind
        meant = root.suffix.lower() == ".zip"
        remedy = "copy or download it again, or give a folder" if meant else "give a folder of images, or a zip of it"
        raise UserError(f"{where}: not a whole zip file ({error}); {remedy}") from error
    status = root.stat()
    files: dict[str, str] = {}
    members = {}
    for info in archive.infolist():
        if name := _add(files, _name(info), where, "zip"):
            members[name] = info
    base = ""
    if tops and not any(name.split("/")[0] in tops for name in members):
        wrappers = {name.split("/")[0] for name in members if name.split("/")[1:2] and name.split("/")[1] in tops}
        base = f"{wrappers.pop()}/" if len(wrappers) == 1 else ""
    names = [name.removeprefix(base) for name in members if name.startswith(base) and name != base]
    if tops:
        names = [name for name in names if name.split("/")[0] in tops]
    fingerprint = [str(root.resolve()), status.st_size, status.st_mtime_ns]
    return Source(root, tuple(sorted(names)), fingerprint, lambda name: _read_member(archive, members[base + name]))


def _name(info: zipfile.ZipInfo) -> str:
    """An entry's name. Many programs write UTF-8 without saying so; zipfile then reads it as code page 437."""
    if not info.flag_bits & UTF8_NAME:
        with suppress(ValueError):
            return info.filename.encode("cp437").decode()
    return info.filename


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.compress_type not in METHODS:
        names = getattr(zipfile, "compressor_names", {})
        method = names.get(info.compress_type, f"method {info.compress_type}")
        raise ValueError(f"it is compressed by {method}; make the zip anew with the usual method, deflate")
    if info.file_size > LARGEST_FILE:
        raise ValueError(f"it unpacks to {info.file_size:,} bytes")
    try:
        with archive.open(info) as member:
            data = member.read(info.file_size + 1)
    except Exception as error:  # zipfile and zlib raise nearly any kind on damaged data
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    if len(data) != info.file_size:
        raise ValueError("it has another size than the zip says")
    return data


# Tables


def read_classes(table: bytes, find: Callable[[str], str | None]) -> tuple[dict[str, dict[str, list[str]]], list[str]]:
    """The images of each label of each split ("" without a column for it) in the table's order, and the absent files.

    table: a CSV file's bytes, with columns as COLUMNS names them; else, or with an image twice, it is a ValueError.
    find: gives the image that a file in the table stands for, or None.
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
        names = {column: name for column, names in COLUMNS.items() for name in reversed(names) if name in header}
        if not names.keys() >= {"file", "label"}:
            raise ValueError("its first row names no columns file and label")
        for row in filter(None, reader):
            cells = dict(zip(header, row, strict=False))
            file, label, split = (cells.get(names.get(column, ""), "").strip() for column in COLUMNS)
            if not file or not label:
                raise ValueError(f"line {reader.line_num} has no {'label' if file else 'file'}")
            yield file, label, split
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"after line {reader.line_num} it is not UTF-8") from error
