"""What Hydra calls before and after a run or a sweep."""

import copy
import logging
import os
import shutil
import subprocess
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from fewshot import files
from fewshot.config.command import how_to_go_on, one_line_errors
from fewshot.config.refusals import refuse, refuse_sweep
from fewshot.config.resolvers import job_folder
from fewshot.config.tree import given_overrides, settings
from fewshot.errors import UserError, printable, shown
from fewshot.labels import title
from fewshot.paths import claimed, escaped, override, user_path
from fewshot.processes import ranks
from fewshot.processes.signals import Signals
from fewshot.processes.surroundings import lenient

log = logging.getLogger(__name__)

RECORD = ("config", "hydra", "overrides")  # files of .hydra/


class OutputFolder(Callback):
    """Ends a call that cannot be done in one line, before Hydra makes its folder."""

    made: ClassVar[list[Path]] = []  # folders that were not there before this call, the run's first

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with one_line_errors():
            if config.checkpoint is not None:
                user_path("checkpoint", config.checkpoint)  # before a folder is named after it
            refuse(_job(config, config.hydra.run.dir), given_overrides(config.hydra))
            new = _by_the_clock(config, "run") and not (config.checkpoint and config.fit)
            if ranks.launcher() and new:
                several = f"hydra.run.dir: {ranks.launcher()} starts several processes; name their one folder"
                raise UserError(several + ranks.only_process())
            _settle_folder(config, "run", new)

    def on_multirun_start(self, config: DictConfig, config_name: str, **kwargs: Any) -> None:
        """Every job is looked at before the first one starts."""
        with one_line_errors():
            if ranks.launcher():
                raise UserError(
                    f"{ranks.launcher()}: a sweep starts the processes of its jobs itself; use python train.py -m "
                    f"trainer=ddp trainer.devices=N{ranks.only_process()}"
                )
            _job(config, config.hydra.sweep.dir)
            refuse_sweep(config, config_name)
            slurm = config.hydra.launcher._target_.endswith("SlurmLauncher")
            if slurm and not (shutil.which("sbatch") and shutil.which("srun")):
                raise UserError("hydra/launcher=slurm: no sbatch and srun here; call it where jobs are submitted")
            _settle_folder(config, "sweep", _by_the_clock(config, "sweep"))
            if slurm:
                _adapt_submitit(Path(config.hydra.sweep.dir))


def _job(config: DictConfig, folder: str) -> DictConfig:
    """What a run gets of the whole configuration, where ${hydra:...} means what it will mean there."""
    job = copy.deepcopy(config)
    with open_dict(job), read_write(job):
        job.hydra.runtime.output_dir = os.path.abspath(folder)
        HydraConfig.instance().set_config(job)
        del job["hydra"]
    return job


@contextmanager
def calling(cfg: DictConfig) -> Iterator[tuple[list[str], Path, Signals]]:
    """Around a run: whatever ends it is said in one line, its folder is locked, its call is checked and written down.

    Yields the overrides of the call, the run's folder, and what notes signals.
    """
    lenient()
    folder, overrides = Path(HydraConfig.get().runtime.output_dir), given_overrides(HydraConfig.get())
    job = folder if HydraConfig.get().mode == RunMode.MULTIRUN else None
    with one_line_errors(job, how_to_go_on), nothing_left(folder), ranks.locked(folder), Signals() as signals:
        refuse(cfg, overrides)
        record(folder, cfg)
        announce(folder, cfg)
        yield overrides, folder, signals


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Removes the folder that was made for this call, if it is refused before there is anything in it."""
    try:
        yield
    except (UserError, InstantiationException):
        names = (".lock", ranks.RANKS_LOCK, "train.log", *(f".hydra/{name}.yaml" for name in RECORD))
        files = {path for path in folder.rglob("*") if not path.is_dir()}
        if not ranks.rank() and folder in OutputFolder.made and files <= {folder / name for name in names}:
            for path in files:
                path.unlink()
            for place in (folder / ".hydra", *OutputFolder.made):
                with suppress(OSError):
                    place.rmdir()
        raise


def record(folder: Path, cfg: DictConfig) -> None:
    """Writes the call that starts a run into its .hydra/; one that continues the run leaves that alone."""
    if ranks.rank() or ranks.PARENT in os.environ or (folder / "checkpoints" / "last.ckpt").exists():
        return
    (folder / ".hydra").mkdir(exist_ok=True)
    for name, content in zip(RECORD, (cfg, HydraConfig.instance().cfg, HydraConfig.get().overrides.task), strict=True):
        OmegaConf.save(content, folder / ".hydra" / f"{name}.yaml")


def announce(folder: Path, cfg: DictConfig) -> None:
    """The first line of a run, before torch is imported: what is done, with what, and where its results go."""
    if ranks.rank() or ranks.PARENT in os.environ:
        return
    there = cfg.checkpoint is not None or any(
        (folder / name).exists() for name in ("results.json", "checkpoints/last.ckpt")
    )
    if not cfg.fit:
        line = f"Testing {cfg.checkpoint}; the results go to {folder}"
    elif there:
        line = f"Going on with the run in {folder}; if it is finished, its results are shown"
    else:
        line = f"Training {title(settings(cfg))}, {cfg.iterations} iterations; the results go to {folder}"
    log.info(printable(line))


class Summary(Callback):
    """Ends a sweep with its tables and figures, and with status 1 if a job failed.

    Args:
        panels: knobs; panels.png has axes of their own for each of their values.
    """

    def __init__(self, panels: list[str]) -> None:
        self.panels = list(panels)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from fewshot.sweep.tables import conclude

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
                files.write_file(error, line)
                return [JobReturn(_return_value=0.0, status=JobStatus.COMPLETED)]

    submit = slurm.SlurmExecutor._submit_command

    def submit_or_end(self: slurm.SlurmExecutor, command: str) -> Any:
        try:
            return submit(self, command)
        except (FailedJobError, FailedSubmissionError):  # sbatch has said why
            raise SystemExit("hydra/launcher=slurm: sbatch took no job; change hydra.launcher.*") from None

    slurm.SlurmExecutor._submit_command = submit_or_end
    slurm.SlurmJob = slurm.SlurmExecutor.job_class = Job  # of arrays, of single jobs


def _by_the_clock(config: DictConfig, kind: str) -> bool:
    """Whether the folder of the run or sweep is named after the time, which others may have been started at."""
    return "${now:" in str(OmegaConf.to_container(config.hydra[kind], resolve=False)["dir"])


def _settle_folder(config: DictConfig, kind: str, new: bool) -> None:
    """From here on a name and nothing else, for the jobs of a sweep too; a new one is nobody else's."""
    knob, given = f"hydra.{kind}.dir", config.hydra[kind].dir
    if not given:
        raise UserError(f"{knob}={shown(given)}: must be a folder")
    folder = Path(os.path.abspath(user_path(knob, given)))
    fresh, missing = new or not folder.exists(), [place for place in folder.parents if not place.exists()]
    with suppress(OSError):  # the next line but one says why
        folder = claimed(folder) if new else folder
    OutputFolder.made = [folder] * fresh + missing
    (files.refuse_links if kind == "run" else files.refuse_links_of_jobs)(folder)
    files.check_writable(knob, folder)
    with read_write(config.hydra):
        config.hydra[kind].dir = escaped(folder)
        config.hydra.overrides.hydra.append(override(knob, folder))
