"""What Hydra calls before and after a run or a sweep."""

import shutil
import subprocess
import time
import traceback
from os.path import exists
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from fewshot import files, ranks
from fewshot.command import one_line_errors
from fewshot.config import check_overrides, job_folder
from fewshot.errors import UserError


class OutputFolder(Callback):
    """Says in one line that the checkpoint is missing or the output folder cannot be written, before Hydra makes it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with one_line_errors():
            if config.checkpoint is not None and not exists(files.expanded("checkpoint", str(config.checkpoint))):
                raise UserError(f"checkpoint={config.checkpoint}: no such file")
            named = any(each.startswith("hydra.run.dir=") for each in config.hydra.overrides.hydra)
            if ranks.launcher() and not named and not (config.checkpoint and config.fit):
                raise UserError(f"hydra.run.dir: {ranks.launcher()} starts several processes; name their one folder")
            files.refuse_links(Path(config.hydra.run.dir))
            files.check_writable("hydra.run.dir", Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A knob that does not exist ends a sweep before its first job; Hydra sees to those without a +."""
        with one_line_errors():
            if ranks.launcher():
                raise UserError(
                    f"{ranks.launcher()}: a sweep starts the processes of its jobs itself; use python train.py -m "
                    "trainer=ddp trainer.devices=N"
                )
            check_overrides([*config.hydra.overrides.task, *(f"{key}=" for key in config.hydra.sweeper.params or ())])
            files.refuse_links_of_jobs(Path(config.hydra.sweep.dir))
            files.check_writable("hydra.sweep.dir", Path(config.hydra.sweep.dir))
            if config.hydra.launcher._target_.endswith("SlurmLauncher"):
                if not (shutil.which("sbatch") and shutil.which("srun")):
                    raise UserError("hydra/launcher=slurm: no sbatch and srun here; call it where jobs are submitted")
                _adapt_submitit(Path(config.hydra.sweep.dir))


class Summary(Callback):
    """Ends a sweep with its tables and figures, and with status 1 if a job failed.

    Args:
        panels: knobs; panels.png has axes of their own for each of their values.
    """

    def __init__(self, panels: list[str]) -> None:
        self.panels = list(panels)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from fewshot.sweep import conclude

        try:
            with one_line_errors():
                conclude(Path(config.hydra.sweep.dir), self.panels)
        except Exception:  # Hydra would turn it into a warning and status 0
            traceback.print_exc()
            raise SystemExit(1) from None


def _adapt_submitit(sweep: Path) -> None:
    """A job that Slurm ended for good, cancelled for example, is one failure; submitit would end the sweep, or, where
    there is no accounting (sacct), wait for it forever. A job that Slurm refuses is one line.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError, UncompletedJobError
    from submitit.slurm import slurm

    class Job(slurm.SlurmJob):
        asked = 0.0  # when squeue was

        def done(self, force_check: bool = False) -> bool:
            if super().done(force_check):
                return True
            if self.state != "UNKNOWN" or time.monotonic() < self.asked + 5:
                return False
            self.asked = time.monotonic()
            command = ["squeue", "--noheader", "--all", "--jobs", self.job_id, "--format=%T"]
            queue = subprocess.run(command, capture_output=True, text=True)
            return "Invalid job id" in queue.stderr or (queue.returncode == 0 and not queue.stdout.strip())

        def results(self) -> list[Any]:
            try:
                return super().results()
            except (UncompletedJobError, FailedJobError):
                state = "cancelled, or lost with its node" if self.state == "UNKNOWN" else self.state
                overrides = [each for each in self.submission().args[0] if not each.startswith("hydra")]
                error = sweep / job_folder(overrides) / "error.txt"
                line = f"Slurm job {self.job_id}: {state}; its log is {self.paths.stderr}\n"
                files.write_atomically(error, lambda file: file.write(line.encode()))
                return [JobReturn(_return_value=0.0, status=JobStatus.COMPLETED)]

    submit = slurm.SlurmExecutor._submit_command

    def submit_or_end(self: slurm.SlurmExecutor, command: str) -> Any:
        try:
            return submit(self, command)
        except (FailedJobError, FailedSubmissionError):  # sbatch has said why
            raise SystemExit("hydra/launcher=slurm: sbatch took no job; change hydra.launcher.*") from None

    slurm.SlurmExecutor._submit_command = submit_or_end
    slurm.SlurmJob = slurm.SlurmExecutor.job_class = Job  # of arrays, of single jobs
