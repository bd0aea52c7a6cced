"""A call from Python in place of a command line: knobs as keywords, and what Hydra keeps for the whole process."""

import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from hydra.types import RunMode
from hydra.version import VersionBase, setbase
from omegaconf import DictConfig

from fewshot.config.check import check_overrides
from fewshot.config.hydra_call import composing
from fewshot.config.tree import CONF, key_of
from fewshot.errors import UserError, shown
from fewshot.files import at_home, escaped, user_path

LIGHTNING = ("pytorch_lightning", "lightning_fabric")
HYDRA = (GlobalHydra, HydraConfig, JobRuntime, VersionBase)  # Hydra has one of each for the whole process


def words_of(knobs: dict[str, Any]) -> list[str]:
    """Keywords as the words of a command line: dataset__root="photos" is dataset.root=photos."""
    names = {keyword: keyword.replace("__", ".") for keyword in knobs}
    return [
        f"{'+' * (name == 'zeroing')}{name}={written(name, knobs[keyword])}"  # the one that takes a plus
        for keyword, name in names.items()
    ]


def written(knob: str, value: Any) -> str:
    """A value in Hydra's grammar, which reads it back as what it is."""
    value = value.tolist() if hasattr(value, "tolist") else value  # numbers of numpy's
    if isinstance(value, os.PathLike):
        value = escaped(os.fspath(value))
    if isinstance(value, list | tuple):
        return f"[{','.join(written(knob, member) for member in value)}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{written(knob, member)}' for key, member in value.items())}}}"
    if isinstance(value, str):
        if re.fullmatch(r"[A-Za-z_][\w./-]*", value, re.ASCII):
            read = OverridesParser.create().parse_override(f"key={value}").value()
            if type(read) is str:  # neither null nor true
                return value
        return QuotedString(value, Quote.single).with_quotes()
    if value is None or isinstance(value, bool | int | float):
        return shown(value)
    raise UserError(f"{knob}={value!r}: a {type(value).__name__} is no value of a knob; give text, a number or a path")


class OneRun(Hydra):
    """Hydra for a call that is one run: where a configuration makes a sweep of itself, Hydra alone would fail."""

    def compose_config(self, config_name: str | None, overrides: list[str], *args: Any, **kwargs: Any) -> DictConfig:
        cfg = super().compose_config(config_name, overrides, *args, **kwargs)
        if cfg.hydra.mode == RunMode.MULTIRUN:
            sweep = next((word for word in overrides if key_of(word) == "experiment"), "hydra.mode=MULTIRUN")
            raise UserError(f"{sweep}: is a sweep, which needs the command line; with hydra.mode=RUN it is one run")
        return cfg


def call_hydra(
    task: Callable[[DictConfig], Any],
    words: list[str],
    log: bool = True,
    config_dir: "str | os.PathLike[str] | None" = None,
) -> Path:
    """`task` with the configuration that the words compose, as a command has it. Returns the folder of the call.

    log: whether train.log is written there.
    config_dir: a folder with YAML files of one's own, as --config-dir names one.

    Raises:
        UserError: what a command says in one line.
        KeyboardInterrupt: it was interrupted, after it wrote what lets it go on.
    """

    def logged(cfg: DictConfig) -> Any:
        with logging_to(Path(HydraConfig.get().runtime.output_dir) / "train.log" if log else None):
            return task(cfg)

    with process_kept(), as_error():
        words = at_home(words)
        check_overrides(words)
        with composing():
            places = create_config_search_path(str(CONF))
            if config_dir is not None:
                folder = os.path.abspath(user_path("config_dir", config_dir))
                if not os.path.isdir(folder):
                    raise UserError(f"config_dir={config_dir}: no such folder")
                places.prepend("command-line", f"file://{folder}", anchor="schema")
            hydra = OneRun.create_main_hydra2("train", places)
            done = hydra.run("config", logged, words, with_log_configuration=False)
        assert done.hydra_cfg is not None
        return Path(done.hydra_cfg.hydra.runtime.output_dir)


@contextmanager
def as_error() -> Iterator[None]:
    """Makes an exception of what ends a command."""
    try:
        yield
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:
            raise KeyboardInterrupt from None
        if isinstance(end.code, str):
            raise UserError(end.code) from None
        raise


@contextmanager
def process_kept() -> Iterator[None]:
    """Inside, Hydra and Lightning are as in a new process; afterwards they, logging and warnings are as before."""
    before = {kind: Singleton._instances.pop(kind) for kind in HYDRA if kind in Singleton._instances}
    lightning = {name: os.environ[name] for name in os.environ if name.startswith("PL_")}
    for name in lightning:
        if name.startswith("PL_TRAINER_"):
            del os.environ[name]  # Lightning would take from it what our configuration does not say
    levels = {name: logging.getLogger(name).level for name in ("fewshot", "matplotlib", *LIGHTNING)}
    raises = logging.raiseExceptions
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # at its first start it would say that it looks for fonts
    setbase("1.3")
    try:
        with warnings.catch_warnings():
            yield
    finally:
        for kind in HYDRA:
            Singleton._instances.pop(kind, None)
        Singleton._instances |= before
        for name in [name for name in os.environ if name.startswith("PL_")]:
            del os.environ[name]  # the seed, which Lightning hands to its workers
        os.environ |= lightning
        logging.raiseExceptions = raises
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def logging_to(path: Path | None) -> Iterator[None]:
    """Inside, what is logged goes to the screen and to this file, as conf/config.yaml has it for the commands."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    own: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if path is not None:
        own.append(logging.FileHandler(path, encoding="utf-8", errors="replace"))
    root.handlers[:] = own
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        for handler in own:
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
