"""What a checkpoint is: Lightning's own, plus the run's configuration, its call, and the classes and images it used.

Others may have made the file, so it is read without running anything of it.
"""

import pickletools
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from torch import Tensor, nn

from fewshot.config import stored
from fewshot.config.kinds import Flag, integer, must_be, one_of, text
from fewshot.config.stored import form, many, to_today
from fewshot.data.task import SPLITS
from fewshot.errors import UserError, shown
from fewshot.files import is_regular, write_atomically
from fewshot.training.outer_step import state_after_a_step

if TYPE_CHECKING:
    from fewshot.training.meta_learner import MetaLearner

FLOATS = (torch.float32, torch.float64)
COUNTS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # of buffers
# All that a checkpoint of this program names in its pickle. Torch allows more, a bytearray of any length among others.
NAMED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
NAMED |= {f"torch {kind}Storage" for kind in ("Float", "Double", "Bool", "Byte", "Char", "Short", "Int", "Long")}
AROUND = 512  # bytes of a zip around an entry's own: torch's have less than 300


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


def _dense(value: Any, dtypes: tuple[torch.dtype, ...] = FLOATS) -> bool:
    """Whether it is a tensor on the CPU, of one of these types, that is not sparse and stores every number."""
    return (
        type(value) is Tensor
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
        and value.dtype in dtypes
    )


def _is_row(value: Any) -> bool:
    named = isinstance(value, dict) and all(isinstance(name, str) and ROW.fullmatch(name) for name in value)
    return named and type(value.get("iteration")) is int and all(type(n) in (int, float) for n in value.values())


def check_weights(where: str, weights: Any) -> None:
    """Raises UserError where they are not {name: tensor}, all weights in the one precision of 32 or 64 bits.

    A network of one's own may have buffers of whole numbers.
    """
    stored.check(where, {"state_dict": weights}, STATE)
    if len({tensor.dtype for tensor in weights.values()} - {*COUNTS}) != 1:
        raise UserError(f"{where}: state_dict must have tensors of one type, float32 or float64")


# A column's name
ROW = re.compile(r"iteration|(train|(val|test)(_zeroed)?|probe)/[a-zA-Z_]\w*(/step_[0-9]{1,4})?", re.ASCII)
WEIGHTS = must_be(
    "a dense tensor of float32, float64 or whole numbers", Any, refused=lambda value: not _dense(value, FLOATS + COUNTS)
)
STATE = form({"state_dict": dict[stored.KEY, WEIGHTS]})
SCALAR = must_be("one number in a tensor", Any, refused=lambda value: not _dense(value) or value.dim())
RECORD = {
    "rows": many(must_be("a row of metrics.csv", Any, refused=lambda value: not _is_row(value))),
    "best_accuracy": stored.NUMBER,
    "stopped": Flag,
    "pending": many(form({"loss": SCALAR, "query_accuracy": SCALAR, "gradient_norm?": SCALAR, "cg_residual?": SCALAR})),
}
# What this program and Lightning read of a checkpoint
FORM = form(
    {
        "fewshot": form(
            {
                "config": Any,  # see stored.check_config
                "overrides": many(text("text of at most 5000 letters", ".{1,5000}")),
                "run_id": text("letters and digits", "[a-zA-Z0-9]{1,64}"),
                "splits?": form({"sha256": stored.NAME, **dict.fromkeys(SPLITS, many(text("text", ".{1,1000}")))}),
            }
        ),
        "state_dict": Any,  # see STATE
        "global_step": integer(0),
        "pytorch-lightning_version": text("a version of Lightning", r"[2-9]\.[0-9]+\.[0-9]+[\w.+-]{0,40}"),
        "engine?": one_of("sequential", "batched"),
        "callbacks": form(
            {"Record": form(RECORD), "CosineSimilarity?": stored.SIMILARITIES, "InnerProducts?": stored.PRODUCTS}
        ),
    }
)


def read(path: str | Path, knob: str = "checkpoint") -> dict[str, Any]:
    """A checkpoint of this program; only tensors and plain data are ever unpickled.

    knob: the one that named the file.

    Raises:
        UserError: missing, truncated, compressed, or not of the form that this program writes.
    """
    path, where = Path(path), f"{knob}={path}"
    is_regular(knob, path)
    try:
        refuse_bombs(where, path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # whatever a foreign or truncated file makes of the unpickler
        raise UserError(f"{where}: cannot be read, truncated or not a checkpoint ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or "fewshot" not in checkpoint:
        raise UserError(f"{where}: was not written by this program")
    stored.check(where, checkpoint, FORM)
    check_weights(where, checkpoint["state_dict"])
    stored.check_config(f"{where}: what it was trained with", checkpoint["fewshot"]["config"])
    checkpoint["fewshot"]["config"] = to_today(checkpoint["fewshot"]["config"])
    return checkpoint


def refuse_bombs(where: str, path: Path) -> None:
    """Raises UserError where little could become much. where: how its line begins.

    The file must be a zip of uncompressed entries, as torch's are, and of nothing beside them (another directory of
    entries, for example, that torch would read); its pickle may name what this program's checkpoints name.
    """
    with zipfile.ZipFile(path) as archive:
        entries, size = archive.infolist(), path.stat().st_size
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise UserError(f"{where}: is compressed, as no checkpoint of this program")
        inside = sum(max(entry.file_size, entry.compress_size) for entry in entries)
        if not inside <= size <= inside + AROUND * (len(entries) + 2):
            raise UserError(f"{where}: has other bytes than those of its entries")
        (pickle,) = (entry for entry in entries if entry.filename.endswith("/data.pkl"))
        for operation, argument, _ in pickletools.genops(archive.read(pickle)):
            if operation.name in ("STACK_GLOBAL", "INST") or (operation.name == "GLOBAL" and argument not in NAMED):
                name = argument or operation.name
                raise UserError(f"{where}: names {name}, as no checkpoint of this program")


def refuse_unresumable(content: dict[str, Any], trainer: pl.Trainer, module: "MetaLearner") -> None:
    """Raises UserError where Lightning could not train on from the content of the checkpoint at trainer.ckpt_path.

    Its counts must have the form of this trainer's own, and the state of its optimiser that of one for this module.
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
        _dense(value) and value.shape == wanted.shape if isinstance(wanted, Tensor) else type(value) is type(wanted)
        for value, wanted in pairs
    )


def refuse_misfit(where: str, weights: dict[str, Tensor], trained: dict[str, Any], module: nn.Module) -> None:
    """Raises UserError for the first tensor in which the weights are not those of the module, or NaN.

    A buffer may be infinite, as the mask of an attention is.

    where: how its line begins; trained: the configuration beside the weights.
    """
    ours = module.state_dict()
    for name in sorted({*weights, *ours}, key=lambda name: ("head" not in name, name)):
        shapes = [_kind(state[name]) if name in state else "absent" for state in (weights, ours)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{where}: {name} is {shapes[0]} there and {shapes[1]} here; it was trained with "
                f"model={trained['model']['name']} ways={trained['ways']} dataset.size={trained['dataset']['size']} "
                f"algo.learned_inner_lr={shown(trained['algo'].get('learned_inner_lr', False))}"
            )
    parameters = {name for name, _ in module.named_parameters()}
    if any((~w.isfinite() if name in parameters else w.isnan()).any() for name, w in weights.items()):
        raise UserError(f"{where}: has weights that are not finite numbers, with which nothing can be done")


def _kind(tensor: Tensor) -> str:
    """A tensor's shape, and its type if that has no fractions; float32 and float64 are of one kind."""
    return f"{tuple(tensor.shape)}{'' if tensor.is_floating_point() else f' of {tensor.dtype}'}"
