"""What a signal does: the run finishes the outer update at hand, writes last.ckpt and ends."""

import logging
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from fewshot.errors import Stopped, UserError
from fewshot.files import write_file
from fewshot.processes import ranks

log = logging.getLogger(__name__)

# A job can ask Slurm for these before its time is up: sbatch --signal=USR1@60; submitit asks for USR2. Not every system
# has them.
SIGUSR1, SIGUSR2 = (getattr(signal, name, None) for name in ("SIGUSR1", "SIGUSR2"))
OF_SLURM = tuple(filter(None, (SIGUSR1, SIGUSR2)))
REQUEUED = ".requeued"  # in the run's folder: how often its job was put back since last.ckpt was written, and when
IN_VAIN = 2  # times that a job is put back without a new outer update


class Signals:
    """Notes signals while a run trains; the callback training.run.Stop obeys them between two outer updates.

    At any other time, and at a second SIGINT, the run ends at once: its last checkpoint holds all there is. A handler
    that was there before, such as submitit's, decides whether the run ends. SIGUSR1 under Slurm puts the job back into
    the queue, from where it goes on in the same folder.

    folder: of the run. A job that was put back IN_VAIN times without a new outer update there is not put back again:
        its time limit is below what a start takes, or what the final test takes.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.in_vain: str | None = None  # the line that ends the run then
        self.noted: int | None = None
        self.training = self._ending = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # Python handles signals in no other
            handled = (signal.SIGTERM, signal.SIGINT, *(OF_SLURM if "SLURM_JOB_ID" in os.environ else ()))
            self._before = {signum: signal.getsignal(signum) for signum in handled}
            self.install()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # Last of all, while SIGTERM is still ignored, because Slurm ends what is left of the job at once. Where one
        # process started the ranks, that one asks.
        asks = not ranks.rank() and ranks.PARENT not in os.environ
        if isinstance(error, Stopped) and error.signum == SIGUSR1 and asks and not self.in_vain and self._put_back():
            _requeue()
        for signum, handler in self._before.items():
            # Slurm's warning may come when the run has ended and its process has not: by default it would kill it.
            fatal = signum in OF_SLURM and handler == signal.SIG_DFL
            signal.signal(signum, signal.SIG_IGN if fatal else handler)
        if self.in_vain:
            raise UserError(self.in_vain) from None

    def install(self) -> None:
        for signum in self._before:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: Any) -> None:
        if self._ending and signum != signal.SIGINT:
            return
        # A second SIGINT reaches ranks that another process started as SIGTERM.
        again = self.noted == signal.SIGINT and signum in (signal.SIGINT, signal.SIGTERM)
        if self.training and not again:
            # The first signal counts: SIGTERM soon follows Slurm's warning, which asks for more than to end.
            self.noted = signum if self.noted is None or signum == signal.SIGINT else self.noted
            log.info(f"{signal.Signals(signum).name}: finishing the outer update")
        else:
            self.obey(signum)

    def obey(self, signum: int) -> None:
        """Ends the run, unless a handler that was there before lets it go on.

        Raises:
            Stopped: the run ends.
        """
        self.noted, before = None, self._before.get(signum)
        foreign = callable(before) and before is not signal.default_int_handler
        if foreign and signum == SIGUSR2 and not ranks.rank() and not self._put_back():
            foreign = False
        if foreign and before is not None:
            before(signum, None)  # submitit's: puts the job back into the queue and exits, or lets it go on
        while ranks.launcher() == "srun" and ranks.rank() and signum in OF_SLURM:
            time.sleep(1)  # rank 0 queues the job again, which ends this process too; exiting first could end rank 0
        if foreign:
            return
        self._ending, self.training = True, False
        raise Stopped(signum)

    def _put_back(self) -> bool:
        """Counts that the job is put back into the queue. False: it was IN_VAIN, as self.in_vain then says."""
        if self.folder is None:
            return True
        last, path = self.folder / "checkpoints" / "last.ckpt", self.folder / REQUEUED
        written = str(last.stat().st_mtime_ns) if last.exists() else "never"
        times, before = 0, "never"
        with suppress(OSError, ValueError):
            count, before = path.read_text().split()
            times = int(count)
        times = times + 1 if written == before else 0
        if times > IN_VAIN:
            self.in_vain = (
                f"hydra.run.dir={self.folder}: its job was put back into the queue {IN_VAIN} times without a new outer "
                "update and is not put back again; give it more time, or an earlier signal"
            )
            path.unlink(missing_ok=True)  # whoever calls again may have given it that
            return False
        with suppress(UserError):  # a full disk; the job is put back uncounted
            write_file(path, f"{times} {written}\n")
        return True


def _requeue() -> None:
    """Asks Slurm to run the job again; a job of an array is named by the array and its number in it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        said = "put back into the queue" if asked.returncode == 0 else asked.stderr.strip()
    except FileNotFoundError:
        said = "not put back into the queue, there is no scontrol here"
    log.info(f"job {job}: {said}")
