"""Files that are written whole or not at all, by one process at a time and never through a link; and their paths."""

import errno
import logging
import os
import platform
import re
import shlex
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from filelock import lock_descriptor
from hydra.core.override_parser.types import Quote, QuotedString

from fewshot.errors import RunLocked, UserError

log = logging.getLogger(__name__)

# The names that a run writes to. In somebody else's folder each of them could be a link to a file of the user.
OWN = (".hydra", "train.log", "checkpoints", "figures", "evidence", "wandb", "error.txt")
OWN += (".lock", ".lock-ranks", ".requeued")
# In the folder of an exported model: its weights, its settings and its card.
EXPORTED, EXPORTED_CONFIG, CARD = "model.safetensors", "config.yaml", "README.md"
TRAINED = "trained"  # a key of its settings: the outer update of the model, and the SHA-256 of its classes and images
ADAPTED = "adapted.safetensors"  # beside these where the model has adapted: the support images and their classes
SCHEME = "hf://"  # of the Hugging Face hub: hf://ORG/NAME or hf://ORG/NAME@REVISION
REPOSITORY, REVISION = r"[\w-][\w.-]*/[\w-][\w.-]*", r"[\w-][\w.-]*"
PLAIN = re.compile(r"[A-Za-z0-9_.-]*/[A-Za-z0-9_./-]*")  # a path that needs no quotes: neither a number nor null
_HOMES = re.compile(r"(?<![^,])~[^/,]*(?P<rest>(?:[^,\\]|\\.)*)")  # each path that begins with a ~
_locked: list[tuple[Path, int]] = []  # the lock files that this process holds, and their descriptors


def check_place(knob: str, folder: Path, without: Iterable[str] = ()) -> None:
    """Raises UserError where the folder cannot be made, because a file is in its way, or holds one of these names."""
    there = next((path for path in (folder, *folder.absolute().parents) if os.path.lexists(path)), Path("/"))
    if not there.is_dir():
        raise UserError(f"{knob}={folder}: {there} is no folder; name another place")
    for name in without:
        if os.path.lexists(folder / name):
            raise UserError(f"{knob}={folder}: holds a {name}; name another folder")


def is_regular(knob: str, path: Path) -> None:
    """Raises UserError where there is no file, or one that is no regular file: a folder, a pipe, a device."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError | NotADirectoryError) else error.strerror
        raise UserError(f"{knob}={path}: {reason}") from None
    if not os.access(path, os.R_OK):
        raise UserError(f"{knob}={path}: cannot be read (Permission denied)")
    if not stat.S_ISREG(mode):
        raise UserError(f"{knob}={path}: is a {'folder' if stat.S_ISDIR(mode) else 'device or pipe'}, not a file")


def refuse_links(folder: Path) -> None:
    """Raises UserError where a link stands in a run's folder for something that the run writes."""
    record = folder / ".hydra"
    inside = [record / path.name for path in record.iterdir()] if record.is_dir() and not record.is_symlink() else []
    for path in [*(folder / name for name in OWN), *inside]:
        _refuse_link(path)


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(f"{path}: is a link to {os.readlink(path)}; a run writes in its own folder alone, so remove it")


def refuse_links_of_jobs(sweep: Path) -> None:
    """Raises UserError where a link stands in a sweep's folder for a job's folder or for what is written there."""
    for path in sorted(sweep.iterdir()) if sweep.is_dir() else ():
        _refuse_link(path)
        refuse_links(path)


def open_own(path: Path, flags: int = os.O_RDWR) -> int:
    """A descriptor of a regular file. A link or a pipe is a UserError: none is followed, and none is waited for."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a folder, a socket
            raise
    else:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    what = f"a link to {os.readlink(path)}" if path.is_symlink() else "no regular file"
    raise UserError(f"{path}: is {what}; remove it")


# Writing


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` to write into, which takes its place at the end: a reader sees all of it or nothing.

    Two writers at once have a file each. What a killed one left is removed by the next: whoever writes holds a lock.

    Raises:
        UserError: the run's folder was removed or replaced while this process held its lock.
        OSError: no space or no permission; what was there before is untouched.
    """
    for lock, descriptor in _locked:
        if path.absolute().is_relative_to(lock.parent) and not _is_still(lock, descriptor):
            raise UserError(f"hydra.run.dir={lock.parent}: was removed or replaced during the run, which ends here")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, f".{escape(path.name)}.*.part")
    while True:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        with open(temporary, "xb") as file:  # nothing that is there is opened, and no link followed
            taken = False
            with suppress(OSError):  # a file system without locks
                taken = not lock_descriptor(file.fileno(), blocking=False)
            if taken or not os.fstat(file.fileno()).st_nlink:
                continue  # another process took it for a leftover before it was locked, and removes it
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        return


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls write(file) as `replacing` does; no space or no permission is a UserError."""
    try:
        with replacing(path) as file:
            write(file)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides it in a RuntimeError
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"{path}: cannot be written ({cause.strerror}); make room there or name another folder"
        ) from error


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a whole file, text as UTF-8, as `write_atomically` does; what UTF-8 lacks is written as its number."""
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    write_atomically(path, lambda file: file.write(data))


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Removes what processes that were killed left half written; what is locked is still being written."""
    for leftover in folder.glob(pattern):
        with suppress(OSError, UserError), open(open_own(leftover)) as file:
            if lock_descriptor(file.fileno(), blocking=False):
                leftover.unlink()


def check_writable(knob: str, folder: Path) -> None:
    """Makes the folder; raises UserError where that is not possible, or nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))  # an empty file fits on a full disk
    except OSError as error:
        raise UserError(f"{knob}={folder}: cannot be written ({error.strerror}); name a folder that can") from None


# Locks. A lock goes with the process that holds it, however it ends. Only filelock's lock on a descriptor is used: its
# FileLock takes a pipe for a lock file, and keeps to itself the descriptor that shows whether the file is still there.


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """One process at a time writes into the folder of this lock file, and nothing once the lock file is gone.

    Where the file system has no locks, a line says so and the run goes on. The lock file stays.

    Raises:
        RunLocked: another process holds it.
        UserError: the lock file is a link or no file, or cannot be opened.
    """
    lock = lock.absolute()
    try:
        file, problem = _open_locked(lock)
    except OSError as error:
        raise UserError(f"{lock}: cannot be opened as a lock file ({error.strerror}); remove it") from None
    with file:
        if problem:
            log.warning(
                "hydra.run.dir=%s: cannot be locked (%s); start no second process on this run", lock.parent, problem
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}".encode())
        _locked.append((lock, file.fileno()))
        try:
            yield
        finally:
            _locked.remove((lock, file.fileno()))


@contextmanager
def exclusive(lock: Path, doing: str) -> Iterator[None]:
    """One process does the work; the others wait and then find it done.

    Where no file can be written or locked, all do the work. A lock file that is a link or no file is a UserError.

    doing: what the process that works does, for those that wait.
    """
    with ExitStack() as held:
        with suppress(OSError):
            file, problem = _open_locked(lock, doing)
            held.enter_context(file)
            if not problem:
                held.callback(lock.unlink, missing_ok=True)
        yield


def _open_locked(path: Path, doing: str = "") -> tuple[BinaryIO, OSError | None]:
    """The lock file, opened and locked; and where it cannot be locked, why.

    doing: what the process that holds it does; this one waits for it. Without `doing` it raises RunLocked.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file, problem = open(open_own(path, os.O_RDWR | os.O_CREAT), "r+b", buffering=0), None  # noqa: SIM115
        try:
            if not lock_descriptor(file.fileno(), blocking=False):
                if not doing:
                    with file:
                        who = file.read(200).decode(errors="replace").strip()
                    raise RunLocked(f"hydra.run.dir={path.parent}: {who} is at work on this run; wait for it or end it")
                log.info("another process %s, waiting for it", doing)
                lock_descriptor(file.fileno())
        except OSError as error:
            problem = error
        if _is_still(path, file.fileno()):  # else its holder has removed it: no other process will meet this one
            return file, problem
        file.close()


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the path leads to the file that the descriptor was opened on."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False


# Paths as users write them, as a printed command shows them, and new ones that nobody else has.


def user_path(knob: str, value: Any) -> Path:
    """The path that a knob names; a ~ at its beginning is a home folder. No such user, or "", is a UserError."""
    text = os.path.expanduser(str(value))  # pathlib's takes ./~ for ~
    if not text:
        raise UserError(f"{knob}=: is empty; give a path")
    if text.startswith("~"):
        raise UserError(f"{knob}={value}: no home folder of that name; write the path out, or put ./ before it")
    return Path(text)


def at_home(words: list[str]) -> list[str]:
    """The words of a command line, with the home folder for the ~ in KNOB=~/X: not every shell expands that."""
    return [
        f"{knob}={path}" if text.startswith("~") and (path := re.sub(_HOMES, _at_home, text)) != text else word
        for word in words
        for knob, _, text in [word.partition("=")]
    ]


def _at_home(match: re.Match[str]) -> str:
    """One path, its home folder written out, in quotes if Hydra needs them; a comma, $ or \\ keeps its meaning."""
    path = os.path.expanduser(match[0])
    home = path.removesuffix(match["rest"])
    to_be_plain = home if {*match.string} & {*",$\\"} else path
    quoted = path != match[0] and not PLAIN.fullmatch(f"{to_be_plain}/")
    return QuotedString(escaped(home) + match["rest"], Quote.single).with_quotes() if quoted else path


def run_folder(checkpoint: Path) -> Path:
    """The run's folder RUN, for a checkpoint that is named as RUN, RUN/checkpoints or a file in RUN/checkpoints."""
    path = Path(os.path.abspath(checkpoint))
    if not os.path.isdir(path):
        return path.parent.parent
    return path if os.path.isdir(path / "checkpoints") or path.name != "checkpoints" else path.parent


def checkpoint_file(value: Any, name: str, knob: str = "checkpoint") -> Path:
    """The checkpoint that a knob names; if that is a run's folder, RUN/checkpoints/NAME.ckpt. None is a UserError."""
    path = user_path(knob, value)
    if os.path.isdir(path):
        path = run_folder(path) / "checkpoints" / f"{name}.ckpt"
        if not os.path.isfile(path):
            raise UserError(
                f"{knob}={value}: no checkpoints/{name}.ckpt in this folder; give the folder of a run or a .ckpt"
            )
    elif not os.path.exists(path):
        raise UserError(f"{knob}={value}: no such file or folder; give the folder of a run or a .ckpt")
    return path


def model_path(value: Any, knob: str = "model") -> Path:
    """The best checkpoint, as checkpoint_file finds it; the folder of an exported model is returned as it is."""
    path = user_path(knob, value)
    if os.path.isfile(path / EXPORTED):
        return path
    if os.path.isdir(path) and not os.path.exists(run_folder(path) / "checkpoints"):
        raise UserError(f"{knob}={value}: has no {EXPORTED}; give an exported folder, a run's folder or a .ckpt")
    return checkpoint_file(value, "best", knob)


def claimed(folder: Path) -> Path:
    """Makes the folder or, if it is there already, FOLDER-1, FOLDER-2, ...: no other process gets the same one."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for number in count():
            new = folder.with_name(f"{folder.name}-{number}") if number else folder
            with suppress(FileExistsError):
                new.mkdir()
                return new
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); name another folder") from None
    raise AssertionError


def escaped(path: str | Path) -> str:
    """The path as a value of a configuration, where ${...} would be an interpolation and ??? a missing value."""
    text = "./???" if str(path) == "???" else str(path)
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def override(knob: str, path: str | Path) -> str:
    """KNOB=PATH as Hydra reads it back: quoted where it is not plain."""
    text = f"./{path}" if str(path).startswith("~") else str(path)  # a folder whose name begins with ~
    if PLAIN.fullmatch(text):
        return f"{knob}={text}"
    return f"{knob}={QuotedString(escaped(text), Quote.single).with_quotes()}"


def in_shell(knob: str, path: str | Path) -> str:
    """The override as one pastes it into a shell."""
    word = override(knob, path)
    easy = "'" in word and not set(word) & set('"$`\\!')  # easy to read: double quotes leave it as it is
    return f'"{word}"' if easy else shlex.quote(word)
