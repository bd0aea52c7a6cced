"""What Hydra calls before and after a run or a sweep."""

import os
import traceback
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from fewshot.config import UserError, check_overrides, one_line_errors


class OutputFolder(Callback):
    """Says in one line that the checkpoint is missing or the output folder cannot be written, before Hydra makes it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with one_line_errors():
            if config.checkpoint is not None and not Path(str(config.checkpoint)).exists():
                raise UserError(f"checkpoint={config.checkpoint}: no such file")
            _check_writable("hydra.run.dir", Path(config.hydra.run.dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """A knob that does not exist ends a sweep before its first job; Hydra sees to those without a +."""
        with one_line_errors():
            check_overrides([*config.hydra.overrides.task, *(f"{key}=" for key in config.hydra.sweeper.params or ())])
            _check_writable("hydra.sweep.dir", Path(config.hydra.sweep.dir))


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


def _check_writable(knob: str, folder: Path) -> None:
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(2**16))  # an empty file fits on a full disk
        probe.unlink()
    except OSError as error:
        raise UserError(f"{knob}={folder}: cannot be written ({error.strerror}); name a folder that can") from None
