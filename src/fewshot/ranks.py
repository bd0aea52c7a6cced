"""The processes of a run: which of them this one is, and how `python train.py trainer=ddp` starts them on one machine.

torchrun and srun start them too; then `train.py` is each of them. Rank 0 writes, the others compute.
"""

import ctypes
import fcntl
import json
import logging
import os
import platform
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

# In the environment of the processes that start() starts: its own process number, and the folder of the sweep, if any
PARENT, SWEEP = "FEWSHOT_PARENT", "FEWSHOT_SWEEP"


def launcher() -> str | None:
    """What started this process as one of several; None: it is the only one, so far."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "srun" if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 else None


def rank() -> int:
    return int(os.environ[{"torchrun": "RANK", "srun": "SLURM_PROCID"}[by]]) if (by := launcher()) else 0


def world_size() -> int:
    return int(os.environ[{"torchrun": "WORLD_SIZE", "srun": "SLURM_STEP_NUM_TASKS"}[by]]) if (by := launcher()) else 1


def here() -> int:
    """Processes of this run on this machine, which share its CPU threads."""
    if launcher() == "srun":
        return int(os.environ["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0])
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if launcher() else 1


def follow_parent() -> None:
    """A process that start() started gets SIGTERM when start()'s process is gone, even by SIGKILL (on Linux)."""
    if PARENT in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[PARENT]):
            os.kill(os.getpid(), signal.SIGTERM)


def leave_error(line: str) -> bool:
    """Whether there is a start() that the line goes to, which says once what several may have to say."""
    if PARENT not in os.environ:
        return False
    extra = {"timestamp": str(int(time.time()))}
    content = {"message": {"message": line, "extraInfo": extra}}  # as torch.distributed.elastic reads it
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(content))
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time in a run's folder: the workers of a killed sweep may outlive it.

    The lock goes with the process that holds it, however it ends.

    Raises:
        UserError: another process is at work there.
    """
    from fewshot.config import UserError

    if rank() or PARENT in os.environ:
        yield  # rank 0, or the process that started all, holds it
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"hydra.run.dir={folder}: {file.read().strip()} is at work on this run; wait for it or end it"
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def start(script: str, overrides: list[str], folder: Path, processes: int) -> None:
    """Runs `script` in `processes` processes of this machine until all have ended, or one has failed.

    Args:
        overrides: of the run; its folder is `folder`.

    Raises:
        UserError: one failed or was killed; the others were ended too.
        Stopped: a signal was sent to this process; it was passed on to them.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from fewshot.config import Stopped, UserError

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
    quoted = str(folder).replace("'", "\\'")
    call = [script, *overrides, f"hydra.run.dir='{quoted}'", "hydra.output_subdir=null", "hydra.mode=RUN"]
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        os.environ[SWEEP] = str(Path(HydraConfig.get().sweep.dir).resolve())
        call.append(f"hydra.job.num={HydraConfig.get().job.num}")
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    os.environ[PARENT] = str(os.getpid())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it would say all below at length
    try:
        elastic_launch(config, entrypoint=sys.executable)(*call)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:
            last, name = folder / "checkpoints" / "last.ckpt", signal.Signals(-failure.exitcode).name
            kept = f"the same call in this folder goes on from {last}" if last.exists() else "nothing was trained yet"
            raise UserError(f"rank {number} of {processes} was killed by {name}, which ends the run; {kept}") from None
        said = failure.message if failure.timestamp and failure.error_file_data else f"ended with {failure.exitcode}"
        raise UserError(f"rank {number} of {processes}: {said}") from None
    except SignalException as stop:
        raise Stopped(stop.sigval) from None
    finally:
        del os.environ[PARENT]
        os.environ.pop(SWEEP, None)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
