"""The results of a run: written once it is tested, shown again where they are there already."""

from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from fewshot.config.tree import settings
from fewshot.errors import UserError
from fewshot.processes import ranks
from fewshot.results import record_files
from fewshot.results.scores import Scores
from fewshot.training import wandb_run
from fewshot.training.checkpoint import Start, refuse_difference


def finished(folder: Path, start: Start) -> dict[str, Any] | None:
    """The results of this very configuration that the folder holds, shown again; None where there are none.

    Those of a run that a limit ended before its last iteration are none either: it goes on.

    Raises:
        UserError: they are of another configuration.
    """
    path = folder / "results.json"
    if not path.exists():
        return None
    results, asked = record_files.read(folder), settings(start.cfg)
    if results["config"]["fit"] and asked["fit"]:
        refuse_difference(start.cfg, results["config"], path)
        reached = results["iterations"] if start.content else results["config"]["iterations"]
        if reached < asked["iterations"] and not start.trained:
            return None
    elif results["config"] | {"recompute_steps": asked["recompute_steps"]} != asked:  # older results have none
        raise UserError(f"hydra.run.dir={folder}: holds the results of another call; name another folder")
    record_files.show(results, folder)
    return results


def write(folder: Path, scores: dict[str, dict[str, Scores]], loggers: list[Logger], **facts: Any) -> dict[str, Any]:
    """results.json, which is returned, the figures and the logger's summary; then the table on the terminal.

    facts: the rest of what results.json holds. Rank 0 writes.
    """
    results = record_files.content(scores, **facts)
    if not ranks.rank():
        record_files.write(folder, results)
        for logger in loggers:
            wandb_run.summarise(logger, results)
        record_files.show(results, folder)
    return results
