"""The Weights & Biases run: online where there is an API key and W&B is not told to keep it offline; never a prompt."""

import logging
import os
import re
import shlex
import socket
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from pytorch_lightning.loggers import WandbLogger

from fewshot.config.tree import MODES
from fewshot.errors import Stopped, UserError, one_line, shown
from fewshot.processes import ranks

log = logging.getLogger(__name__)

PATIENCE = 5  # seconds for W&B's server to answer, where nobody has asked for logger.mode=online
STARTED: list[Any] = []  # what finished_run finishes; W&B's global run may be a notebook's own
SILENT: list[bool] = []  # whether W&B was, before wandb_logger silenced it
METRICS = ("train/*", "val/*", "val_zeroed/*", "test/*", "test_zeroed/*", "probe/*")


class EachOnce(WandbLogger):
    """Leaves out the rows up to iteration `last`: the server has them from before the run was continued."""

    last = -1

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if metrics.get("iteration", step or 0) > self.last:
            super().log_metrics(metrics, step)


def wandb_logger(
    *,
    project: str,
    mode: str | None,
    group: str | None,
    name: str | None,
    folder: Path,
    run_id: str,
    values: dict[str, Any],
    rows: list[dict[str, float]],
) -> WandbLogger | None:
    """Starts the run in `folder`/wandb with every metric against `iteration`; a continued run keeps its run_id.

    rows: what a continued run logged before. Rows that the server has are skipped. Offline, all rows are logged again,
    because each start writes its own folder and the last upload replaces the others.

    Returns None on all ranks but the first.

    Raises:
        UserError: mode="online" without an API key, or against a wish of the user's that nothing be uploaded.
    """
    if ranks.rank():
        return None
    if not os.access(os.path.expanduser("~"), os.W_OK):  # where W&B keeps what it is about to upload
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            os.environ.setdefault(name, str(folder / "wandb"))
    import wandb.errors  # only here: a run with logger=none does without the package

    if sweep := _sweep():
        by_time = re.fullmatch(r"\d\d-\d\d-\d\d(-\d+)?", sweep.name)  # multirun/DATE/TIME
        group = group or (f"{sweep.parent.name}_{sweep.name}" if by_time else sweep.name)
        name = name or (folder.name if len(folder.name) <= 128 else folder.name[:119] + folder.name[-9:])  # W&B's limit
    try:
        SILENT.append(wandb.setup().settings.silent)
        _silence(True)  # its login would tell who is logged in
        asked, mode = mode, _mode(mode)
        knobs: dict[str, Any] = {"project": project, "group": group, "name": name, "id": run_id}
        knobs |= {"dir": folder, "config": values, "mode": mode}
        # finish_timeout: seconds, if the server is gone; the folder has everything
        settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, finish_timeout=120)
        knobs |= {"settings": settings, "reinit": "create_new"}  # beside one of a notebook
        try:
            run = wandb.init(**knobs, resume="allow" if mode == "online" else None)
        except wandb.errors.CommError as error:
            if asked or isinstance(error, wandb.errors.AuthenticationError):
                raise
            log.warning(f"W&B: {one_line(error)}; the run is kept offline")
            run = wandb.init(**{**knobs, "mode": "offline"})
    except (wandb.errors.Error, ValueError) as error:
        raise UserError(
            f"logger.mode={shown(mode)}: {one_line(error)}; use logger.mode=offline, or logger=none"
        ) from error
    STARTED.append(run)
    logger = EachOnce(experiment=run, save_dir=folder)
    run.define_metric("iteration", hidden=True)
    for pattern in METRICS:
        run.define_metric(pattern, step_metric="iteration")
    if run.resumed:
        logger.last = run.summary.get("iteration", -1)
    for row in rows:
        logger.log_metrics(row, step=int(row["iteration"]))
    if run.url:
        log.info(f"W&B: {run.url}")
    return logger


def _mode(asked: str | None) -> str:
    """What W&B is to do: what was asked for, unless the user has told W&B itself to do less.

    WANDB_DISABLED, WANDB_MODE and W&B's settings files (`wandb offline`, `wandb disabled`) speak for all programs: what
    they keep back is not uploaded here either. Without them and without logger.mode: online where there is an API key.
    """
    import wandb

    told = wandb.setup().settings.mode  # by the variable or a file, else "online"
    wish = {"dryrun": "offline", "run": "online"}.get(told, told)
    whose = f"WANDB_MODE={told}" if "WANDB_MODE" in os.environ else "a settings file of W&B's"
    if (disabled := os.environ.get("WANDB_DISABLED", "")).lower() not in ("", "0", "false", "no", "off"):
        wish, whose = "disabled", f"WANDB_DISABLED={disabled}"
    if wish in ("offline", "disabled"):
        if asked == "online":
            remedy = "take that back, or leave logger.mode out"
            raise UserError(f"logger.mode=online: {whose} asks W&B to upload nothing; {remedy}")
        if wish == "disabled" and asked != "disabled":
            log.info(f"W&B records nothing: {whose}; without it, wandb sync could upload the run later")
        return "disabled" if "disabled" in (wish, asked) else "offline"
    if asked in ("offline", "disabled"):
        return asked
    has_key = wandb.login(prompt=False, verify=False)
    if asked == "online":
        if not has_key:
            raise UserError("logger.mode=online: no API key; set WANDB_API_KEY or use logger.mode=offline")
        return "online"
    if has_key and not _answers(server := wandb.setup().settings.base_url):
        log.warning(f"W&B: there is an API key, but {server} cannot be reached; the run is kept offline")
        return "offline"
    return "online" if has_key else "offline"


def _answers(server: str) -> bool:
    """Whether the server, or the proxy on the way to it, takes a connection within PATIENCE seconds."""
    place, proxies, opened = urlsplit(server), urllib.request.getproxies(), threading.Event()
    if place.scheme in proxies and not urllib.request.proxy_bypass(place.hostname or ""):
        proxy = proxies[place.scheme]
        place = urlsplit(proxy if "://" in proxy else f"http://{proxy}")

    def connect() -> None:
        port = place.port or (443 if place.scheme == "https" else 80)
        with suppress(OSError), socket.create_connection((place.hostname, port), PATIENCE):
            opened.set()

    thread = threading.Thread(target=connect, daemon=True)  # to look a name up can take minutes and cannot be stopped
    thread.start()
    thread.join(PATIENCE)
    return opened.is_set()


def _sweep() -> Path | None:
    """The folder of the sweep that this run is a job of."""
    if not HydraConfig.initialized() or OmegaConf.is_missing(HydraConfig.get().job, "num"):
        return None
    return Path(HydraConfig.get().sweep.dir).resolve()


def _silence(silent: bool) -> None:
    import wandb

    wandb.termsetup(wandb.setup(wandb.Settings(silent=silent)).settings, None)


@contextmanager
def finished_run() -> Iterator[None]:
    """Finishes the W&B runs that were started inside, as what they are; an offline one says how to upload it.

    One that a notebook has begun itself is left as it is.
    """
    exit_code, theirs = 1, getattr(sys.modules.get("wandb"), "run", None)
    try:
        yield
        exit_code = 0
    except Stopped as stop:
        exit_code = 128 + stop.signum
        raise
    finally:
        wandb: Any = sys.modules.get("wandb")
        of_a_logger = getattr(wandb, "run", None)  # Lightning's WandbLogger makes the global one
        for run in [*STARTED, *[of_a_logger] * (of_a_logger is not theirs)]:
            _finish(run, exit_code)
        STARTED.clear()
        while SILENT:
            _silence(SILENT.pop())


def _finish(run: Any, exit_code: int) -> None:
    place, offline = Path(run.dir).parent, run.settings.mode == "offline"
    folder, linked = shlex.quote(str(place)), place / "logs" / "debug-core.log"
    try:
        if exit_code > 128:
            run.mark_preempting()
        run.finish(exit_code=exit_code)
    except Exception as error:  # its own process may have been ended by the same signal
        log.warning(
            f"W&B could not finish its run ({type(error).__name__}: {error}); to upload what it has: "
            f"wandb sync --no-skip-online {folder}"
        )
    with suppress(OSError):
        if linked.is_symlink():  # to a log in the home folder, which a container does not keep
            linked.unlink()
    if offline:
        log.info(f"W&B run kept offline; to upload it: wandb sync {folder}")


def summarise(logger: WandbLogger, summary: dict[str, float], results: dict[str, Any]) -> None:
    """The final test: a table and a line plot, and the summary beside them."""
    import wandb

    rows = []
    for mode in MODES:
        scores = results["test"][mode]
        for step, (accuracy, ci95) in enumerate(zip(scores["accuracy"], scores["ci95"], strict=True)):
            rows.append([step, accuracy, ci95, mode.removeprefix("zeroing_")])
    table = wandb.Table(columns=["inner_step", "query_accuracy", "ci95", "test_zeroing"], data=rows)
    plot = wandb.plot.line(table, "inner_step", "query_accuracy", "test_zeroing", "query accuracy by inner step")
    logger.experiment.summary.update(summary)
    try:
        logger.experiment.log({"query_accuracy_by_inner_step": plot})
    except wandb.Error as error:
        log.warning(f"W&B has no table of the final test: {error}")
