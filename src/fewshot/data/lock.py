"""One process at a time, for what several would do at once in vain: the ranks of a run, the jobs of a sweep."""

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fewshot.files import open_own

log = logging.getLogger(__name__)


@contextmanager
def alone(path: Path, doing: str) -> Iterator[None]:
    """Waits while another process is in here with the same lock file, and says that it is `doing` something.

    The lock goes with the process that holds it, however it ends. Where no file can be written or locked, all go on.

    Raises:
        UserError: the lock file is a link or no file.
    """
    with ExitStack() as held:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                descriptor = open_own(
                    path, os.O_RDWR | os.O_CREAT
                )  # over NFS only what is open for writing can be locked
                file = held.enter_context(open(descriptor, "ab"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    log.info("another process %s, waiting for it", doing)
                    fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_nlink:  # else whoever held it has removed it: no one else will meet it
                    held.callback(_remove, path)
                    break
        yield


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
