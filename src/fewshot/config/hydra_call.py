"""A command that Hydra composes: what is wrong with a call is said in one line before anything is made for it.

Its output folder is refused before it is made, recorded when a run begins, and removed if nothing is in it.
"""

import argparse
import copy
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import InstantiationException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from fewshot import files
from fewshot.config.advice import not_composed
from fewshot.config.check import check_overrides, refuse
from fewshot.config.command import HELP, Command, how_to_go_on, one_line_errors
from fewshot.config.tree import CONF, folder_of_run, given_overrides, job_folder, key_of
from fewshot.errors import Stopped, UserError, first_line, one_line, shown
from fewshot.files import at_home, claimed, escaped, override, user_path
from fewshot.processes import ranks
from fewshot.processes.signals import OF_SLURM, REQUEUED, Signals
from fewshot.processes.surroundings import as_called, lenient


def hydra_command(
    task: Callable[[DictConfig], Any],
    first: Callable[[argparse.Namespace], None] = lambda asked: None,
    command: Command | None = None,
    added: str | None = None,
) -> Callable[[], None]:
    """`task` as hydra.main makes a command of it, but what Hydra would say at length is said in one line.

    first: raises UserError for what this command in particular does not take.
    command: what its --help tells of; None: of the knobs.
    added: an override that every call has.
    """
    run = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)

    @wraps(task)
    def main() -> None:
        with one_line_errors():
            if any(word.split("=")[0] in HELP for word in sys.argv[1:]):
                from fewshot.config.help import page

                words = [word.removeprefix("--help=") for word in sys.argv[1:] if word not in HELP]
                print(command.help() if command else page(words))
                return
            sys.argv[1:] = words = [_of_launcher(word) for word in at_home(sys.argv[1:])]
            if added:  # before the others, since Hydra takes overrides in one row
                overrides = (place for place, word in enumerate(words) if "=" in word and word[0] != "-")
                sys.argv.insert(1 + next(overrides, len(words)), added)
            asked = _arguments(sys.argv[1:])
            if not (asked.hydra_help or asked.shell_completion):
                check_overrides(asked.overrides)
                if not (asked.cfg or asked.info):
                    first(asked)
            with composing(), nothing_left():
                run()

    return main


def _of_launcher(word: str) -> str:
    """Puts ++ before a knob that is there for keys of the user's own; without it Hydra adds no keys to a knob."""
    return f"++{word}" if word.startswith("hydra.launcher.additional_parameters") else word


@contextmanager
def composing() -> Iterator[None]:
    """Inside, what Hydra would say at length of a call that it cannot compose is said in one line."""
    compose_config = Hydra.compose_config

    def composed(hydra: Hydra, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any) -> DictConfig:
        with one_line_errors():
            try:
                return compose_config(hydra, config_name, overrides, *args, **kwargs)
            except Exception as error:  # of Hydra, of OmegaConf, or what an odd value makes of the two
                raise not_composed(
                    error, overrides, lambda groups: compose_config(hydra, config_name, groups, *args, **kwargs)
                ) from error

    Hydra.compose_config = composed  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        Hydra.compose_config = compose_config


def _arguments(arguments: list[str]) -> argparse.Namespace:
    """Hydra's reading of the words. Raises UserError for what it would refuse with status 2 or a traceback."""
    parser = get_args_parser()
    parser.error = _refuse  # pyright: ignore[reportAttributeAccessIssue]
    asked = parser.parse_args(arguments)
    actions = [asked.run, asked.multirun, asked.cfg, asked.info, asked.shell_completion]
    if sum(map(bool, actions)) > 1 or (asked.resolve and not asked.cfg):
        raise UserError(
            f"{' '.join(arguments)}: --cfg, --info and -m are each for a call alone, --resolve is for --cfg"
        )
    if asked.config_dir and not os.path.isdir(asked.config_dir):
        raise UserError(f"--config-dir={asked.config_dir}: no such folder")
    if asked.experimental_rerun and not os.path.isfile(asked.experimental_rerun):
        raise UserError(f"--experimental-rerun={asked.experimental_rerun}: no such file")
    return asked


def _refuse(message: str) -> None:
    if apart := re.match("unrecognized arguments: ([^-]+=.*)", message):
        raise UserError(f"{apart[1]}: give all KNOB=VALUE in one row, with -m and other flags before or after them")
    raise UserError(f"{message}; --help names what there is")


def refuse_sweep(config: DictConfig, config_name: str) -> None:
    """Raises UserError for the first job of the sweep that `refuse` refuses."""
    seen: set[Any] = set()
    for job in _jobs(config):
        # Composing takes time: of jobs that differ only in their seed one is tried, and one job with each seed.
        seeds = [override for override in job if override.startswith("seed=")]
        parts = {frozenset(job).difference(seeds), *seeds}
        if not parts <= seen:
            refuse(compose(config_name, job), job)
        seen |= parts


def folders_of_jobs(config: DictConfig) -> set[str] | None:
    """The names of the folders of a sweep's jobs; None: only the sweeper, or a subdir of one's own, knows them."""
    written: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    if not _picks_no_values(config) or written["subdir"] != "${job_folder:${hydra.overrides.task}}":
        return None
    return {
        job_folder([word for word in job if not key_of(word).startswith(("hydra.", "hydra/"))]) for job in _jobs(config)
    }


def _picks_no_values(config: DictConfig) -> bool:
    """Whether the sweeper is Hydra's own, which takes every value."""
    return config.hydra.sweeper._target_ == f"{BasicSweeper.__module__}.BasicSweeper"


def _jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of each job; of a sweeper that picks values, each value once beside the first of the other knobs.

    Raises:
        UserError: the values are no sweep.
    """
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    check_overrides(arguments := [*params, *given_overrides(config.hydra)])
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    try:
        parsed = parser.parse_overrides(arguments)
        if _picks_no_values(config):
            batches = BasicSweeper.split_arguments(parsed, config.hydra.sweeper.max_batch_size)
            return [job for batch in batches for job in batch]
        choices = [[f"{knob.get_key_element()}={value}" for value in _values(knob)] for knob in parsed]
        return [[*(first for first, *_ in choices), value] for values in choices for value in values]
    except Exception as error:  # a range without an end, for example
        raise UserError(one_line(f"{' '.join(arguments)}: is no sweep ({first_line(error)})")) from error


def _values(override: Override) -> list[str]:
    """The values that the jobs of a sweep can have; of an interval its ends."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if override.is_interval_sweep():
        interval: Any = override.value()
        return [str(interval.start), str(interval.end)]
    return list(override.sweep_string_iterator())


# The output folder

RECORD = ("config", "hydra", "overrides")  # files of .hydra/


class OutputFolder(Callback):
    """Refuses in one line a call that cannot be carried out, before Hydra makes its folder."""

    made: ClassVar[list[Path]] = []  # folders that were not there before this call, the run's first

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        OutputFolder.made = []
        with one_line_errors(), nothing_left():
            if config.checkpoint is not None:
                user_path("checkpoint", config.checkpoint)  # before a folder is named after it
            refuse(_job(config, config.hydra.run.dir), given_overrides(config.hydra))
            new = _by_the_clock(config, "run") and folder_of_run(config.checkpoint, config.fit) is None
            if ranks.launcher() and new:
                several = f"hydra.run.dir: {ranks.launcher()} starts several processes; name their one folder"
                raise UserError(several + ranks.only_process())
            _settle_folder(config, "run", new)

    def on_multirun_start(self, config: DictConfig, config_name: str, **kwargs: Any) -> None:
        """Every job is looked at before the first one starts."""
        OutputFolder.made = []
        with one_line_errors(), nothing_left():
            if ranks.launcher():
                raise UserError(
                    f"{ranks.launcher()}: a sweep starts the processes of its jobs itself; use {as_called('train')} -m "
                    f"trainer=ddp trainer.devices=N{ranks.only_process()}"
                )
            _job(config, config.hydra.sweep.dir)
            refuse_sweep(config, config_name)
            slurm = config.hydra.launcher._target_ == "hydra_plugins.fewshot_slurm.SlurmLauncher"
            if slurm and not (shutil.which("sbatch") and shutil.which("srun")):
                raise UserError("hydra/launcher=slurm: no sbatch and srun here; call it where jobs are submitted")
            _settle_folder(config, "sweep", _by_the_clock(config, "sweep"))


def _job(config: DictConfig, folder: str) -> DictConfig:
    """The part of the whole configuration that a run gets; ${hydra:...} means here what it will mean there."""
    if "${" in (absolute := os.path.abspath(folder)):
        raise UserError(f"hydra.run.dir={absolute}: Hydra reads ${{ in a folder's path as a knob; name another place")
    job = copy.deepcopy(config)
    with open_dict(job), read_write(job):
        job.hydra.runtime.output_dir = absolute
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


def carry_out(cfg: DictConfig, run: Callable[[DictConfig, Call], float]) -> float:
    """Carries out a run: says in one line what ends it, locks its folder, checks its call and writes that down.

    Returns what `run` returns; for a job of a sweep that failed or was refused 0.0, the worst there is for a search.
    """
    folder, overrides = Path(HydraConfig.get().runtime.output_dir), given_overrides(HydraConfig.get())
    lenient(folder)
    job = folder if HydraConfig.get().mode == RunMode.MULTIRUN else None
    with one_line_errors(job, how_to_go_on), nothing_left(folder), ranks.locked(folder), Signals(folder) as signals:
        refuse(cfg, overrides)
        record(folder, cfg)
        return run(cfg, Call(overrides, folder, signals))
    return 0.0


@contextmanager
def nothing_left(folder: Path | None = None) -> Iterator[None]:
    """Removes the folder that was made for this call, if it is refused or stopped before there is anything in it.

    folder: of the run; None: the one that was made. A job that goes back into Slurm's queue goes on in it.
    """
    try:
        yield
    except (UserError, InstantiationException, Stopped, KeyboardInterrupt) as error:
        folder = folder or next(iter(OutputFolder.made), None)
        queued = isinstance(error, Stopped) and error.signum in OF_SLURM
        if folder in OutputFolder.made and not (queued or ranks.rank()):
            _remove_if_empty(folder)
        raise


def _remove_if_empty(folder: Path) -> None:
    names = (".lock", ranks.RANKS_LOCK, REQUEUED, "train.log", *(f".hydra/{name}.yaml" for name in RECORD))
    files = {path for path in folder.rglob("*") if not path.is_dir()}
    if files <= {folder / name for name in names}:
        for path in files:
            path.unlink()
        folders = sorted(path for path in folder.rglob("*") if path.is_dir())
        for place in (*reversed(folders), *OutputFolder.made):
            with suppress(OSError):
                place.rmdir()


def record(folder: Path, cfg: DictConfig) -> None:
    """Writes the call that starts a run into its .hydra/; one that continues the run leaves that alone."""
    if ranks.rank() or ranks.PARENT in os.environ or (folder / "checkpoints" / "last.ckpt").exists():
        return
    (folder / ".hydra").mkdir(exist_ok=True)
    for name, content in zip(RECORD, (cfg, HydraConfig.instance().cfg, HydraConfig.get().overrides.task), strict=True):
        OmegaConf.save(content, folder / ".hydra" / f"{name}.yaml")


def _by_the_clock(config: DictConfig, kind: str) -> bool:
    """Whether the folder of the run or sweep is named after the time; another call may have started just then."""
    written: Any = OmegaConf.to_container(config.hydra[kind], resolve=False)
    return "${now:" in str(written["dir"])


def _settle_folder(config: DictConfig, kind: str, new: bool) -> None:
    """Fixes the folder's name for this call and its sweep's jobs. A new folder is claimed: no other call has it."""
    knob, name = f"hydra.{kind}.dir", config.hydra[kind].dir
    if not name:
        raise UserError(f"{knob}={shown(name)}: must be a folder")
    folder = Path(os.path.abspath(user_path(knob, name)))
    fresh, missing = new or not folder.exists(), [place for place in folder.parents if not place.exists()]
    with suppress(UserError):  # check_writable says why
        folder = claimed(folder) if new else folder
    OutputFolder.made = [folder] * fresh + missing
    (files.refuse_links if kind == "run" else files.refuse_links_of_jobs)(folder)
    files.check_writable(knob, folder)
    with read_write(config.hydra):
        config.hydra[kind].dir = escaped(folder)
        config.hydra.overrides.hydra.append(override(knob, folder))
