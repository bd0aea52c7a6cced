"""The processes of a run: which of them this one is, and how `python train.py trainer=ddp` starts them on one machine.

torchrun and srun can start them instead; then each of them is `train.py`. Rank 0 writes; the others only compute.
"""

import ctypes
import json
import logging
import os
import signal
import socket
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
from fewshot.files import override

PARENT = "FEWSHOT_PARENT"  # start() puts its own process number here, into the environment of the processes it starts
RANKS_LOCK = ".lock-ranks"


def launcher() -> str | None:
    """What started this process as one of several, torchrun or srun; None: this process is the only one so far."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "srun" if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 else None


def only_process() -> str:
    """For messages: what to do in a shell that srun itself started (srun --pty), so that one process runs alone."""
    return "; in a shell inside srun: unset SLURM_STEP_NUM_TASKS" if launcher() == "srun" else ""


def rank() -> int:
    return int(os.environ[{"torchrun": "RANK", "srun": "SLURM_PROCID"}[by]]) if (by := launcher()) else 0


def world_size() -> int:
    return int(os.environ[{"torchrun": "WORLD_SIZE", "srun": "SLURM_STEP_NUM_TASKS"}[by]]) if (by := launcher()) else 1


def local_rank() -> int:
    return int(os.environ[{"torchrun": "LOCAL_RANK", "srun": "SLURM_LOCALID"}[by]]) if (by := launcher()) else 0


def machines() -> int:
    names = {"torchrun": "GROUP_WORLD_SIZE", "srun": "SLURM_STEP_NUM_NODES"}
    return int(os.environ.get(names[by], 1)) if (by := launcher()) else 1


def local_world_size() -> int:
    """How many processes share the CPU threads of this machine; torchrun and srun give each process its own threads."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if PARENT in os.environ else 1


def follow_parent() -> None:
    """Makes Linux send SIGTERM to a process that start() started when start()'s own process ends, even by SIGKILL."""
    if PARENT in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ[PARENT]):
            os.kill(os.getpid(), signal.SIGTERM)


def leave_error(line: str) -> bool:
    """Leaves the line to start(), which says it once for all ranks. False: no start() runs, so say it yourself."""
    if PARENT not in os.environ:
        return False
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": line}))
    return True


@contextmanager
def locked(folder: Path, name: str | None = None) -> Iterator[None]:
    """Holds the lock of a run's folder, so that one process at a time writes there.

    The workers of a killed sweep may outlive it. The lock is gone with the process that held it, however that ended.

    name: the lock's file. None: the process that starts ranks has one and the ranks, which may outlive it, another.

    Raises:
        RunLocked: another process holds the lock.
    """
    if rank():
        yield  # rank 0 holds it
        return
    with files.locked(folder / (name or (RANKS_LOCK if PARENT in os.environ else ".lock"))):
        yield


def _hydra_arguments() -> list[str]:
    """What this call told Hydra itself, without where and how often it runs.

    Used for a sweep's job: also its number and the sweep's folder.
    """
    hydra, left_out = HydraConfig.get(), ("hydra.run.", "hydra.sweep", "hydra.mode", "hydra/launcher", "hydra.launcher")
    arguments = [word for word in hydra.overrides.hydra if not word.startswith((*left_out, "hydra/sweeper"))]
    for source in hydra.runtime.config_sources:
        if source.provider == "command-line":
            arguments += ["--config-dir", source.path]
    if hydra.mode == RunMode.MULTIRUN:
        arguments += [f"hydra.job.num={hydra.job.num}", override("hydra.sweep.dir", Path(hydra.sweep.dir).resolve())]
    return [*arguments, "hydra.mode=RUN"]


def _cause(failures: dict[int, Any], folder: Path, processes: int) -> BaseException:
    """Picks the rank whose failure ended the run; the others were ended by SIGTERM or lost their connection to it."""
    secondary = (1, -signal.SIGTERM, 128 + signal.SIGTERM)
    told = {number: failure for number, failure in failures.items() if Path(failure.error_file).is_file()}
    killed = {number: failure for number, failure in failures.items() if failure.exitcode not in secondary}
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


def start(program: str, overrides: list[str], folder: Path, processes: int) -> bool:
    """Runs a module in `processes` processes of this machine until all of them have ended, or one has failed.

    They import from where this process does: a script has its own folder on Python's path, python -m the current one.

    Args:
        program: the module's name.
        overrides: those of the run, which writes into `folder`.

    Returns False at once where the run has one process, or this one was itself started as one of several.

    Raises:
        UserError: one failed or was killed, and the others were ended too.
        Stopped: this process got a signal, and passed it on to them.
    """
    if processes == 1 or launcher():
        return False
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:  # torch would try for minutes
        raise UserError(
            f"trainer.devices={processes}: the processes of this machine meet at 127.0.0.1, which cannot be reached "
            f"({error.strerror or error}); ip link set lo up"
        ) from None
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    call = ["-P", "-m", program, *_hydra_arguments(), *overrides, override("hydra.run.dir", folder)]
    with locked(folder, RANKS_LOCK):
        pass  # The ranks of an earlier call have ended. Said here, RunLocked is not taken for a rank's failure.
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    path, os.environ[PARENT] = os.environ.get("PYTHONPATH", ""), str(os.getpid())
    os.environ["PYTHONPATH"] = os.pathsep.join(os.path.abspath(place) for place in sys.path)
    # After a signal the ranks have so many seconds to finish an update, the validation that is due, and W&B.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    for name in ("agent.server.api", "agent.server.local_elastic_agent", "multiprocessing.api"):
        # They would say at length what is said below.
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
            os.environ["PYTHONPATH"] = path
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
    return True
