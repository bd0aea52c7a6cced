"""The output folder of a call: refused before it is made, recorded when a run begins, removed if nothing is in it."""

import copy
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from fewshot import files
from fewshot.config.command import how_to_go_on, one_line_errors
from fewshot.config.refusals import refuse, refuse_sweep
from fewshot.config.tree import given_overrides
from fewshot.errors import UserError, shown
from fewshot.paths import claimed, escaped, override, user_path
from fewshot.processes import ranks
from fewshot.processes.signals import Signals
from fewshot.processes.surroundings import lenient

RECORD = ("config", "hydra", "overrides")  # files of .hydra/


class OutputFolder(Callback):
    """Refuses in one line a call that cannot be carried out, before Hydra makes its folder."""

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


def _job(config: DictConfig, folder: str) -> DictConfig:
    """The part of the whole configuration that a run gets; ${hydra:...} means here what it will mean there."""
    job = copy.deepcopy(config)
    with open_dict(job), read_write(job):
        job.hydra.runtime.output_dir = os.path.abspath(folder)
        HydraConfig.instance().set_config(job)
        del job["hydra"]
    return job


@dataclass(frozen=True)
class Call:
    """A call that trains or tests: its overrides, the run's folder, what notes signals, and when it began."""

    overrides: list[str]
    folder: Path
    signals: Signals
    began: float = field(default_factory=time.monotonic)


@contextmanager
def calling(cfg: DictConfig) -> Iterator[Call]:
    """Around a run: what ends it is said in one line, its folder is locked, its call is checked and written down."""
    lenient()
    folder, overrides = Path(HydraConfig.get().runtime.output_dir), given_overrides(HydraConfig.get())
    job = folder if HydraConfig.get().mode == RunMode.MULTIRUN else None
    with one_line_errors(job, how_to_go_on), nothing_left(folder), ranks.locked(folder), Signals() as signals:
        refuse(cfg, overrides)
        record(folder, cfg)
        yield Call(overrides, folder, signals)


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


def _by_the_clock(config: DictConfig, kind: str) -> bool:
    """Whether the folder of the run or sweep is named after the time, at which another call may have started too."""
    return "${now:" in str(OmegaConf.to_container(config.hydra[kind], resolve=False)["dir"])


def _settle_folder(config: DictConfig, kind: str, new: bool) -> None:
    """Fixes the folder's name for this call and its sweep's jobs. A new folder is claimed: no other call has it."""
    knob, name = f"hydra.{kind}.dir", config.hydra[kind].dir
    if not name:
        raise UserError(f"{knob}={shown(name)}: must be a folder")
    folder = Path(os.path.abspath(user_path(knob, name)))
    fresh, missing = new or not folder.exists(), [place for place in folder.parents if not place.exists()]
    with suppress(OSError):  # check_writable says why
        folder = claimed(folder) if new else folder
    OutputFolder.made = [folder] * fresh + missing
    (files.refuse_links if kind == "run" else files.refuse_links_of_jobs)(folder)
    files.check_writable(knob, folder)
    with read_write(config.hydra):
        config.hydra[kind].dir = escaped(folder)
        config.hydra.overrides.hydra.append(override(knob, folder))
