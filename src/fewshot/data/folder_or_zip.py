"""The files of a folder or a zip, under names that do not depend on the system or program that wrote them."""

import os
import re
import stat
import unicodedata
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewshot.errors import UserError

# A file that is larger, or unpacks to more, is no photo (a zip bomb is one line, not a full memory).
LARGEST_FILE = 256 * 2**20
# Of bzip2 and LZMA, Python's zipfile unpacks as much as there is, whatever size the zip claims.
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
UTF8_NAME = 0x800  # flag bit 11 of a zip's entry
# What macOS, Windows, Linux and network drives put beside one's files; names that begin with a dot are hidden anyway.
SYSTEM = frozenset(
    {"__macosx", "$recycle.bin", "system volume information", "thumbs.db", "desktop.ini", "lost+found"}
    | {"@eadir", "#recycle", "#snapshot", "@recycle", "@__thumb"}
)
# Control characters, line separators and what turns the direction of a text: a name is shown on one line.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Source:
    """The files of a folder or a zip.

    root: as the user gave it, for messages
    names: sorted paths relative to the folder that holds the wanted top folders; a folder's own name ends with "/"
    identity: changes whenever a file does
    read: a name's bytes, also of one beside the top folders; raises OSError, LookupError or ValueError
    """

    root: Path
    names: tuple[str, ...]
    identity: Any
    read: Callable[[str], bytes]


def open_source(root: Path, tops: Iterable[str] = ()) -> Source:
    """What lies under the folders `tops` of a folder or zip, which may wrap them in one enclosing folder.

    Without tops: all that it holds, as it lies there. What the system put there is left out in any case.

    Raises:
        UserError: `root` does not exist, cannot be read, or is a file but not a sound zip; two of its names are one.
    """
    tops = frozenset(tops)
    try:
        if root.is_dir():
            return _open_folder(root, tops)
        if root.is_file():
            return _open_zip(root, tops)
        if root.exists():
            raise UserError(f"dataset.root={root}: neither a folder nor a regular file; give a folder or zip")
    except OSError as error:
        raise UserError(f"dataset.root={root}: cannot be read: {error}") from error
    raise UserError(f"dataset.root={root}: no such file or folder; give the folder or zip that holds the images")


def canonical(path: str) -> str:
    """A path in the one form of this program: parts joined by "/", their text as `plain_text` has it.

    A folder's path ends with "/".

    Raises:
        ValueError: it leads out of the folder or zip that it is in.
    """
    path = path.replace("\\", "/")  # as some programs for Windows write them
    parts = path.split("/")
    if parts[0] == "" or ".." in parts or re.match("[A-Za-z]:/", path):
        raise ValueError("unsafe path")
    inside = [plain_text(part) for part in parts if part not in ("", ".")]
    return "/".join(inside) + ("/" if inside and parts[-1] in ("", ".") else "")


def plain_text(text: str) -> str:
    """A name with its letters composed (NFC) on one line; bytes that are no text, and controls, as \\xNN."""
    if text.isascii() and text.isprintable():
        return text
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    text = UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return unicodedata.normalize("NFC", text)


def read_file(path: str | Path) -> bytes:
    """A regular file's bytes; never those of a device, which may have no end.

    Raises:
        OSError, ValueError: there is none, or it is too large.
    """
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


def _add(files: dict[str, str], root: Path, raw: str) -> str | None:
    """The canonical name of a path, which is noted in `files`; None where the system put it there.

    Raises:
        UserError: it leads out of root, or another path has the same name.
    """
    try:
        name = canonical(raw)
    except ValueError:
        kind = "folder" if root.is_dir() else "zip"
        raise UserError(f"dataset.root={root}: unsafe path {raw!r} in the {kind}; make the {kind} anew") from None
    if not name or any(_of_the_system(part) for part in name.split("/")):
        return None
    if files.setdefault(name, raw) != raw and not name.endswith("/"):
        raise UserError(f"dataset.root={root}: {files[name]!r} and {raw!r} are one name; rename or remove one")
    return name


def _of_the_system(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM


def _open_folder(root: Path, tops: frozenset[str]) -> Source:
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
    for raw, status in _walk(root, base, tops):
        if name := _add(files, root, raw):
            regular = status is not None and stat.S_ISREG(status.st_mode)
            entries.append([name, status.st_size, status.st_mtime_ns] if status and regular else [name])
    entries.sort(key=lambda entry: entry[0])
    names = tuple(sorted(files))
    return Source(root, names, entries, lambda name: read_file(base / files.get(name, name)))


def _walk(root: Path, base: Path, tops: frozenset[str]) -> Iterator[tuple[str, os.stat_result | None]]:
    """Path below base, and status, of all that lies in it or in its folders `tops`.

    A folder's path ends with "/". No status: a link that leads nowhere.

    Raises:
        UserError: a link leads to a folder that is there already, in which one could go on for ever.
    """
    seen: dict[tuple[int, int], tuple[str, bool]] = {}
    pending = [(f"{top}/", os.path.islink(base / top)) for top in sorted(tops) if (base / top).is_dir()]
    for folder, linked in [("", False)] if not tops else pending:
        todo = [(folder, linked)]
        while todo:
            folder, linked = todo.pop()
            status = os.stat(base / folder)
            other, other_linked = seen.setdefault((status.st_dev, status.st_ino), (folder, linked))
            if other != folder and (linked or other_linked):
                raise UserError(
                    f"dataset.root={root}: {other or '.'} and {folder} are one folder, by a link; remove the link"
                )
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


def _open_zip(root: Path, tops: frozenset[str]) -> Source:
    try:
        archive = zipfile.ZipFile(root)
    except OSError:
        raise
    except Exception as error:  # a damaged directory makes zipfile raise nearly any kind
        raise UserError(
            f"dataset.root={root}: not a whole zip file ({error}); copy or download it again, or give a folder"
        ) from error
    status = root.stat()
    files: dict[str, str] = {}
    members = {}
    for info in archive.infolist():
        if name := _add(files, root, _name(info)):
            members[name] = info
    base = ""
    if tops and not any(name.split("/")[0] in tops for name in members):
        wrappers = {name.split("/")[0] for name in members if name.split("/")[1:2] and name.split("/")[1] in tops}
        base = f"{wrappers.pop()}/" if len(wrappers) == 1 else ""
    names = [name.removeprefix(base) for name in members if name.startswith(base) and name != base]
    if tops:
        names = [name for name in names if name.split("/")[0] in tops]
    identity = [str(root.resolve()), status.st_size, status.st_mtime_ns]
    return Source(root, tuple(sorted(names)), identity, lambda name: _read_member(archive, members[base + name]))


def _name(info: zipfile.ZipInfo) -> str:
    """An entry's name: many programs write UTF-8 without saying so, for which zipfile has code page 437."""
    if info.flag_bits & UTF8_NAME:
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except ValueError:
        return info.filename


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.compress_type not in METHODS:
        method = zipfile.compressor_names.get(info.compress_type, f"method {info.compress_type}")
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
