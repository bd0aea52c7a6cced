"""Files that are written whole or not at all, by one process at a time and never through a link."""

import errno
import fcntl
import os
import platform
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import BinaryIO

from fewshot.errors import AtWork, UserError

# What a run writes into by these names. In a folder of somebody else's each could be a link to a file of the user.
OWN = (".hydra", "train.log", "checkpoints", "figures", "evidence", "wandb", ".lock", ".lock-ranks", "error.txt")
_locked: list[tuple[Path, int]] = []  # the lock files that this process holds, and their descriptors


def check_place(knob: str, folder: Path) -> None:
    """Raises UserError where a folder that may not be there yet would lie in a file."""
    there = next((path for path in (folder, *folder.absolute().parents) if os.path.lexists(path)), Path("/"))
    if not there.is_dir():
        raise UserError(f"{knob}={folder}: {there} is no folder; name another place")


def is_regular(knob: str, path: Path) -> None:
    """Raises UserError where there is no file, or one that is no regular file: a folder, a pipe, a device."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError | NotADirectoryError) else error.strerror
        raise UserError(f"{knob}={path}: {reason}") from None
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


def create(path: Path, flags: int = os.O_WRONLY) -> int:
    """A descriptor of a new file. Nothing that is there is opened, and no link followed."""
    return os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def open_own(path: Path, flags: int = os.O_RDWR) -> int:
    """A descriptor of a regular file; no link is followed and no pipe waited for.

    Raises:
        UserError: something else stands there.
        OSError: it cannot be opened for another reason.
    """
    descriptor = None
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a folder, a socket
            raise
        regular = False
    if not regular:
        if descriptor is not None:
            os.close(descriptor)
        what = f"a link to {os.readlink(path)}" if path.is_symlink() else "no regular file"
        raise UserError(f"{path}: is {what}; remove it")
    return descriptor


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` to write into, which takes its place at the end: a reader sees all of it or nothing.

    Two writers at once have a file each. What a killed one left is removed by the next: whoever writes holds a lock.

    Raises:
        UserError: the run's folder was removed, or another one has taken its place, while this process held its lock.
        OSError: no space or no permission; what was there before is untouched.
    """
    for lock, descriptor in _locked:
        if path.absolute().is_relative_to(lock.parent) and not _is_still(lock, descriptor):
            raise UserError(f"hydra.run.dir={lock.parent}: was removed or replaced during the run, which ends here")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, f".{escape(path.name)}.*.part")
    while True:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        with open(create(temporary), "wb") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:
                continue  # another process took it for a leftover before it was locked
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
    """Calls write(file) on a temporary binary file beside `path` and renames it, as `replacing` does.

    Raises:
        UserError: no space or no permission; what was there before is untouched.
    """
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
    """Writes a whole file, text as UTF-8, as `write_atomically` does."""
    write_atomically(path, lambda file: file.write(content.encode() if isinstance(content, str) else content))


def remove_leftovers(folder: Path, pattern: str) -> None:
    """Removes what processes that were killed left half written."""
    for leftover in folder.glob(pattern):
        with suppress(OSError, UserError), open(open_own(leftover)) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its writer is gone
            leftover.unlink()


def check_writable(knob: str, folder: Path) -> None:
    """Makes the folder.

    Raises:
        UserError: it cannot be made, or nothing be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid.uuid4().hex}"
        with open(create(probe), "wb") as file:
            probe.unlink()
            file.write(bytes(2**16))  # an empty file fits on a full disk
    except OSError as error:
        raise UserError(f"{knob}={folder}: cannot be written ({error.strerror}); name a folder that can") from None


@contextmanager
def locked(lock: Path) -> Iterator[None]:
    """One process at a time writes into the folder of this lock file, and nothing once the lock file is gone.

    The lock goes with the process that holds it, however it ends; the file stays.

    Raises:
        AtWork: another process holds it.
        UserError: the lock file is a link or no file.
    """
    lock = lock.absolute()
    while True:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = open_own(lock, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UserError(f"{lock}: cannot be opened as a lock file ({error.strerror}); remove it") from None
        with open(descriptor, "r+b", buffering=0) as file:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                who = file.read(200).decode(errors="replace").strip()
                raise AtWork(
                    f"hydra.run.dir={lock.parent}: {who} is at work on this run; wait for it or end it"
                ) from None
            except OSError:  # a file system without locks
                pass
            if not _is_still(lock, descriptor):
                continue  # whoever held it has removed it: nobody else will meet this one
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}".encode())
            _locked.append((lock, descriptor))
            try:
                yield
            finally:
                _locked.remove((lock, descriptor))
        return


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the path leads to the file that the descriptor was opened on."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except (FileNotFoundError, NotADirectoryError):
        return False
