"""A sweep as one Slurm job array, submitted by submitit; a job that Slurm ends for good is one failure of the sweep."""

import logging
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from submitit import AutoExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError
from submitit.slurm.slurm import SlurmJob

from fewshot.config.tree import job_folder
from fewshot.files import write_file

log = logging.getLogger(__name__)


class Job(SlurmJob[Any]):
    """A job that has also ended when the queue no longer knows it: without accounting (sacct) submitit would wait for
    a job that was cancelled forever."""

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
    """Submits the jobs and waits for them. One that Slurm ended for good, cancelled for example, is one failure.

    Args:
        launcher: called on the node with the arguments of its job.
        first: the number of the first job.

    Raises:
        SystemExit: Slurm takes no job.
    """
    calls = []
    for number, overrides in enumerate(job_overrides, first):
        log.info(f"\t#{number} : {' '.join(filter_overrides(overrides))}")
        calls.append((list(overrides), "hydra.sweep.dir", number, f"job_id_for_{number}", Singleton.get_state()))
    try:
        jobs = _submit(launcher, calls, **launcher.params)
    except (FailedJobError, FailedSubmissionError):  # sbatch has said why
        raise SystemExit("hydra/launcher=slurm: sbatch took no job; change hydra.launcher.*") from None
    return [_result(launcher, *pair) for pair in zip(jobs, job_overrides, strict=True)]


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
        own = [override for override in overrides if not override.startswith("hydra")]
        error = Path(launcher.config.hydra.sweep.dir) / job_folder(own) / "error.txt"
        write_file(error, f"Slurm job {job.job_id}: {state}; its log is {job.paths.stderr}\n")
        return JobReturn(_return_value=0.0, status=JobStatus.COMPLETED)
