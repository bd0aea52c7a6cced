"""What a signal does: the outer update at hand is finished, last.ckpt written, and the run ends."""

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

# SIGUSR1 and 2 are what a job can ask Slurm for before its time is up: sbatch --signal=USR1@60, submitit's USR2
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Signals:
    """While a run trains, signals are noted and its callback obeys them between two outer updates (callbacks.Stop).

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
            slurm = "SLURM_JOB_ID" in os.environ
            wanted = [each for each in HANDLED if slurm or each in (signal.SIGTERM, signal.SIGINT)]
            self._before = {signum: signal.getsignal(signum) for signum in wanted}
            self.install()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # Last of all, while SIGTERM is still ignored: Slurm ends what is left of the job at once. Where one process
        # started the ranks it is that one's to ask.
        ours = not ranks.rank() and ranks.PARENT not in os.environ
        if isinstance(error, Stopped) and error.signum == signal.SIGUSR1 and ours:
            _requeue()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def install(self) -> None:
        for signum in self._before:
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, frame: Any) -> None:
        if self._ending and signum != signal.SIGINT:
            return
        # A second SIGINT, or SIGTERM, which it becomes for ranks that another process started.
        again = self.noted == signal.SIGINT and signum in (signal.SIGINT, signal.SIGTERM)
        if self.training and not again:
            # The first counts: SIGTERM soon follows Slurm's warning, which asks for more than to end.
            self.noted = signum if self.noted is None or signum == signal.SIGINT else self.noted
            log.info(f"{signal.Signals(signum).name}: finishing the outer update")
        else:
            self.obey(signum)

    def obey(self, signum: int) -> None:
        """
        Raises:
            Stopped: the run is to end.
        """
        self.noted, before = None, self._before.get(signum)
        foreign = callable(before) and before is not signal.default_int_handler
        if foreign:
            before(signum, None)  # submitit's: puts the job back into the queue and exits, or lets it go on
        while ranks.launcher() == "srun" and ranks.rank() and signum in (signal.SIGUSR1, signal.SIGUSR2):
            time.sleep(1)  # rank 0 puts the job back, which ends this process too; to exit before could end rank 0
        if foreign:
            return
        self._ending, self.training = True, False
        raise Stopped(signum)


def _requeue() -> None:
    """Asks Slurm to run the job again: as one of an array by that name."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    try:
        asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        said = "put back into the queue" if asked.returncode == 0 else asked.stderr.strip()
    except FileNotFoundError:
        said = "not put back into the queue, there is no scontrol here"
    log.info(f"job {job}: {said}")
