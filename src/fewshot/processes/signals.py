"""What a signal does: the run finishes the outer update at hand, writes last.ckpt and ends."""

import logging
import os
import signal
import subprocess
import threading
import time
from typing import Any

from fewshot.errors import Stopped
from fewshot.processes import ranks

log = logging.getLogger(__name__)

# A job can ask Slurm for these before its time is up: sbatch --signal=USR1@60; submitit asks for USR2. Not every system
# has them.
SIGUSR1, SIGUSR2 = (getattr(signal, name, None) for name in ("SIGUSR1", "SIGUSR2"))
OF_SLURM = tuple(filter(None, (SIGUSR1, SIGUSR2)))


class Signals:
    """Notes signals while a run trains; the callback training.run.Stop obeys them between two outer updates.

    At any other time, and at a second SIGINT, the run ends at once: its last checkpoint holds all there is. A handler
    that was there before, such as submitit's, decides whether the run ends. SIGUSR1 under Slurm puts the job back into
    the queue, from where it goes on in the same folder.
    """

    def __init__(self) -> None:
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
        if isinstance(error, Stopped) and error.signum == SIGUSR1 and asks:
            _requeue()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

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
        if foreign:
            before(signum, None)  # submitit's: puts the job back into the queue and exits, or lets it go on
        while ranks.launcher() == "srun" and ranks.rank() and signum in OF_SLURM:
            time.sleep(1)  # rank 0 queues the job again, which ends this process too; exiting first could end rank 0
        if foreign:
            return
        self._ending, self.training = True, False
        raise Stopped(signum)


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
