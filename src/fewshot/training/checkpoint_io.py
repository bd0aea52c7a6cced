"""How Lightning writes a checkpoint, and what it may go on from."""

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch import Tensor

from fewshot.config import stored
from fewshot.config.kinds import Flag, integer
from fewshot.config.stored import form
from fewshot.errors import UserError
from fewshot.files import write_atomically
from fewshot.training.checkpoint import COUNTS, FLOATS, dense, read
from fewshot.training.outer_step import state_after_a_step

if TYPE_CHECKING:
    from fewshot.training.meta_learner import MetaLearner


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary file in the same folder, syncs it and renames it; reads without unpickling objects."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        for name, state in checkpoint["callbacks"].items():
            if odd := _odd(state):
                raise UserError(
                    f"{path}: the state of the callback {name} has a {odd}, which could not be read again; "
                    "use numbers, text, tensors, lists and dictionaries"
                )
        if odd := _odd(checkpoint["optimizer_states"]):
            raise UserError(
                f"{path}: the state of the optimizer has a {odd}, which could not be read again; "
                "use numbers, text, tensors of float32 or float64, lists and dictionaries"
            )
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))
        if checkpoint["global_step"] == 0:
            read(path)  # what it refuses is said before the training

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = True) -> Any:
        content = read(path)  # to the CPU, whatever it was trained on; Lightning moves it where it belongs
        content["callbacks"].pop("Timer", None)  # trainer.max_time is of each call
        return content


class Describe(pl.Callback):
    """Puts what describes the run (configuration, call, logger run, splits) into every checkpoint."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.description = description

    def on_save_checkpoint(self, trainer: pl.Trainer, module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["fewshot"] = self.description

    def on_load_checkpoint(self, trainer: pl.Trainer, module: "MetaLearner", checkpoint: dict[str, Any]) -> None:
        if trainer.training:
            refuse_unresumable(checkpoint, trainer, module)


def _odd(state: Any) -> str:
    """The type of what is neither plain data nor a tensor that a checkpoint can have; empty if there is none."""
    if type(state) is Tensor:
        return "" if state.dtype in FLOATS + COUNTS else f"tensor of {state.dtype}"
    if type(state) in (dict, OrderedDict):
        return next((odd for entry in state.items() for part in entry if (odd := _odd(part))), "")
    if type(state) in (list, tuple):
        return next((odd for part in state if (odd := _odd(part))), "")
    return "" if state is None or type(state) in (bool, int, float, str) else type(state).__name__


def refuse_unresumable(content: dict[str, Any], trainer: pl.Trainer, module: "MetaLearner") -> None:
    """Raises UserError where Lightning could not train on from the content of the checkpoint at trainer.ckpt_path.

    Its counts must have the form of this trainer's, and its optimiser's state that of an optimiser of this module.
    """
    where = f"checkpoint={trainer.ckpt_path}"
    loops = {name: getattr(trainer, name).state_dict() for name in ("fit_loop", "validate_loop", "test_loop")}
    stored.check(where, content, form({"epoch": integer(0), "loops": _form_of(loops)}))
    own = state_after_a_step(module.outer, module)
    match content.get("optimizer_states"), content.get("lr_schedulers"):
        case [{"state": dict(states), "param_groups": [dict(), *_] as groups}], []:
            stored.check_plain(where, groups)
            rates = zip(own["param_groups"], module.outer.rates(content["global_step"]), strict=True)
            as_now = [group | {"lr": rate} for group, rate in rates]
            pairs = list(zip(groups, as_now, strict=False))
            alike = all(isinstance(group, dict) and group.items() <= now.items() for group, now in pairs)
            sound = alike and len(groups) == len(as_now)
            if sound and all(_alike(state, own["state"].get(number)) for number, state in states.items()):
                return
    name = type(module.configure_optimizers()).__name__
    raise UserError(f"{where}: its optimizer_states are not those of {name} for these weights; start anew")


def _form_of(counts: Any) -> Any:
    if isinstance(counts, dict):
        return form({name: _form_of(inner) for name, inner in counts.items()})
    return Flag if isinstance(counts, bool) else integer(0)


def _alike(state: Any, own: dict[str, Any] | None) -> bool:
    """Whether what an optimiser remembers of a parameter has the names, kinds and shapes of what it would remember."""
    if own is None or not isinstance(state, dict) or state.keys() != own.keys():
        return False
    pairs = [(state[name], own[name]) for name in own]
    return all(
        dense(value) and value.shape == wanted.shape if isinstance(wanted, Tensor) else type(value) is type(wanted)
        for value, wanted in pairs
    )
