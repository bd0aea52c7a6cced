"""The processes of a run: which of them this one is, and how `python train.py trainer=ddp` starts them on one machine.

torchrun and srun start them too; then `train.py` is each of them. Rank 0 writes, the others compute.
"""

import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from fewshot import files
from fewshot.errors import Stopped, UserError
from fewshot.paths import override

PARENT = "FEWSHOT_PARENT"  # in the environment of the processes that start() starts: its own process number
RANKS_LOCK = ".lock-ranks"


def launcher() -> str | None:
    """What started this process as one of several; None: it is the only one, so far."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "srun" if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 else None


def only_process() -> str:
    """For messages: how a shell that srun started, as with srun --pty, starts one process that is the only one."""
    return "; in a shell inside srun: unset SLURM_STEP_NUM_TASKS" if launcher() == "srun" else ""


def rank() -> int:
    return int(os.environ[{"torchrun": "RANK", "srun": "SLURM_PROCID"}[by]]) if (by := launcher()) else 0


def world_size() -> int:
    return int(os.environ[{"torchrun": "WORLD_SIZE", "srun": "SLURM_STEP_NUM_TASKS"}[by]]) if (by := launcher()) else 1


def here() -> int:
    """Processes that share the CPU threads of this machine; torchrun and srun give each its own."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if PARENT in os.environ else 1


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
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": line}))
    return True


@contextmanager
def locked(folder: Path, name: str | None = None) -> Iterator[None]:
    """One process at a time in a run's folder: the workers of a killed sweep may outlive it.

    The lock goes with the process that holds it, however it ends.

    name: of its file; None: one for the process that starts ranks, another for the ranks, which outlive it for a while.

    Raises:
        AtWork: another process is at work there.
    """
    if rank():
        yield  # rank 0 holds it
        return
    with files.locked(folder / (name or (RANKS_LOCK if PARENT in os.environ else ".lock"))):
        yield


def _hydra_arguments() -> list[str]:
    """What this call told Hydra itself, less where and how often it runs; of a job of a sweep, which it is of which."""
    hydra, own = HydraConfig.get(), ("hydra.run.", "hydra.sweep", "hydra.mode", "hydra/launcher", "hydra.launcher")
    arguments = [each for each in hydra.overrides.hydra if not each.startswith((*own, "hydra/sweeper"))]
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            arguments += ["--config-dir", source.path]
    if hydra.mode == RunMode.MULTIRUN:
        arguments += [f"hydra.job.num={hydra.job.num}", override("hydra.sweep.dir", Path(hydra.sweep.dir).resolve())]
    return [*arguments, "hydra.mode=RUN"]


def _cause(failures: dict[int, Any], folder: Path, processes: int) -> BaseException:
    """Of the end of all ranks: of one, the others ended by SIGTERM, or since that one was gone."""
    secondary = (1, -signal.SIGTERM, 128 + signal.SIGTERM)
    told = {number: each for number, each in failures.items() if Path(each.error_file).is_file()}
    killed = {number: each for number, each in failures.items() if each.exitcode not in secondary}
    number, failure = next(iter((told or killed or failures).items()))
    rank_number = f"rank {number} of {processes}"
    if failure.exitcode < 0:
        last, name = folder / "checkpoints" / "last.ckpt", signal.Signals(-failure.exitcode).name
        kept = f"the same call in this folder goes on from {last}" if last.exists() else "nothing was trained yet"
        return UserError(f"{rank_number} was killed by {name}, which ends the run; {kept}")
    if failure.exitcode > 128:
        return Stopped(failure.exitcode - 128)
    return UserError(
        f"{rank_number}: {failure.message if told else f'ended with status {failure.exitcode}, as its own lines tell'}"
    )


def start(script: str, overrides: list[str], folder: Path, processes: int) -> None:
    """Runs `script` in `processes` processes of this machine until all have ended, or one has failed.

    Args:
        overrides: of the run; its folder is `folder`.

    Raises:
        UserError: one failed or was killed; the others were ended too.
        Stopped: a signal was sent to this process; it was passed on to them.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    call = [script, *_hydra_arguments(), *overrides, override("hydra.run.dir", folder)]
    with locked(folder, RANKS_LOCK):
        pass  # those of an earlier call have ended; raised here and not in a rank it is no failure of the run
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    os.environ[PARENT] = str(os.getpid())
    # Seconds that the ranks have after a signal: an update, the validation due, and W&B.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    for name in ("agent.server.api", "agent.server.local_elastic_agent", "multiprocessing.api"):
        # It would say all below at length.
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as logs:
        try:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=processes,
                logs_specs=DefaultLogsSpecs(log_dir=logs),
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="127.0.0.1:0",
                local_addr="127.0.0.1",
                max_restarts=0,
                monitor_interval=0.1,
                signals_to_handle="SIGTERM,SIGINT",
            )
            elastic_launch(config, entrypoint=sys.executable)(*call)
        except ChildFailedError as error:
            raise _cause(error.failures, folder, processes) from None
        except SignalException as stop:
            raise Stopped(stop.sigval) from None
        finally:
            del os.environ[PARENT]
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
