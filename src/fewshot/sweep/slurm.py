"""A sweep as one Slurm job array, submitted by submitit; a job that Slurm ends for good is one failure of the sweep."""

import logging
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from omegaconf import open_dict
from submitit import AutoExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError
from submitit.slurm.slurm import SlurmInfoWatcher, SlurmJob

from fewshot.config.tree import job_folder, settings
from fewshot.errors import one_line
from fewshot.files import write_file
from fewshot.results.record_files import over, read, validation_accuracy

log = logging.getLogger(__name__)


class Accounting(SlurmInfoWatcher):
    """Asks sacct how the jobs are; that a cluster has no accounting is said once and not at every question."""

    told = False

    def update(self) -> None:
        if command := self._make_command():
            self._num_calls, self._last_status_check = self._num_calls + 1, time.time()
            try:
                asked = subprocess.run(command, capture_output=True, text=True, check=True)
                self._info_dict.update(self.read_info(asked.stdout))
            except (OSError, subprocess.CalledProcessError) as error:
                if not self.told:
                    reason = one_line(getattr(error, "stderr", None) or error)
                    log.info(f"sacct does not tell how the jobs are ({reason}); squeue is asked")
                self.told = True


class Job(SlurmJob[Any]):
    """A job that has also ended when the queue no longer knows it: without accounting (sacct) submitit would wait
    forever for a job that was cancelled."""

    watcher = Accounting(delay_s=600)
    asked = 0.0  # when squeue was asked last, at most every five seconds

    def done(self, force_check: bool = False) -> bool:
        if super().done(force_check):
            return True
        if self.state != "UNKNOWN" or time.monotonic() < self.asked + 5:
            return False
        self.asked = time.monotonic()
        command = ["squeue", "--noheader", "--all", "--jobs", self.job_id, "--format=%T"]
        queue = subprocess.run(command, capture_output=True, text=True)
        return "Invalid job id" in queue.stderr or (queue.returncode == 0 and not queue.stdout.strip())


def launch(launcher: Any, job_overrides: Sequence[Sequence[str]], first: int) -> list[JobReturn]:
    """Submits the jobs that have no results yet, and waits for them.

    One that Slurm ended for good, cancelled for example, is one failure.

    Args:
        launcher: called on the node with the arguments of its job.
        first: the number of the first job.

    Raises:
        SystemExit: Slurm takes no job.
    """
    calls: dict[int, tuple[Any, ...]] = {}
    returns: dict[int, JobReturn] = {}
    for number, overrides in enumerate(job_overrides, first):
        finished = _finished(launcher, overrides)
        log.info(f"\t#{number} : {' '.join(filter_overrides(overrides))}{'  has its results' if finished else ''}")
        if finished:
            returns[number] = finished
        else:
            (_folder(launcher, overrides) / "error.txt").unlink(missing_ok=True)  # of an earlier try
            state = Singleton.get_state()
            calls[number] = (list(overrides), "hydra.sweep.dir", number, f"job_id_for_{number}", state)
    try:
        jobs = _submit(launcher, [*calls.values()], **launcher.params) if calls else []
    except (FailedJobError, FailedSubmissionError):  # sbatch has said why
        raise SystemExit("hydra/launcher=slurm: sbatch took no job; change hydra.launcher.*") from None
    for number, job in zip(calls, jobs, strict=True):
        returns[number] = _result(launcher, job, job_overrides[number - first])
    return [returns[number] for number in sorted(returns)]


def _finished(launcher: Any, overrides: Sequence[str]) -> JobReturn | None:
    """What a job returned that has finished with these very settings; None: it has not, or the job itself must say."""
    folder = _folder(launcher, overrides)
    if (folder / "results.json").exists() and not (folder / "error.txt").exists():
        with suppress(Exception):  # whatever is wrong with the call or the file, the job says it in its own line
            cfg = launcher.hydra_context.config_loader.load_sweep_config(launcher.config, list(overrides))
            with open_dict(cfg):
                del cfg["hydra"]
            results = read(folder)
            if results["config"] == settings(cfg) and over(results):
                return JobReturn(_return_value=validation_accuracy(results), status=JobStatus.COMPLETED)
    return None


def _folder(launcher: Any, overrides: Sequence[str]) -> Path:
    own = [override for override in overrides if not override.startswith("hydra")]
    return Path(launcher.config.hydra.sweep.dir) / job_folder(own)


def _submit(
    function: Callable[..., Any], calls: list[tuple[Any, ...]], submitit_folder: str, max_num_timeout: int, **knobs: Any
) -> list[Job]:
    executor = AutoExecutor(submitit_folder, cluster="slurm", slurm_max_num_timeout=max_num_timeout)
    shared = {field.name for field in fields(BaseQueueConf)}  # the knobs of every kind of cluster
    executor.update_parameters(**{knob if knob in shared else f"slurm_{knob}": knobs[knob] for knob in knobs})
    jobs = executor.map_array(function, *zip(*calls, strict=True))
    return [Job(executor.folder, job.job_id, range(job.num_tasks)) for job in jobs]


def _result(launcher: Any, job: Job, overrides: Sequence[str]) -> JobReturn:
    try:
        return job.results()[0]
    except (UncompletedJobError, FailedJobError):
        state = "cancelled, or lost with its node" if job.state == "UNKNOWN" else job.state
        error = _folder(launcher, overrides) / "error.txt"
        if not error.exists():  # else the job itself has said why
            write_file(error, f"Slurm job {job.job_id}: {state}; its log is {job.paths.stderr}\n")
        return JobReturn(_return_value=0.0, status=JobStatus.COMPLETED)
