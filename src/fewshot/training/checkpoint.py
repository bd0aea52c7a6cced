"""What a checkpoint is: Lightning's own, plus the run's configuration, its call, and the classes and images it used.

Others may have made the file, so it is read without running anything of it.
"""

import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewshot.config import stored
from fewshot.config.kinds import Flag, integer, must_be, one_of, text
from fewshot.config.stored import form, many, to_today
from fewshot.data.task import SPLITS
from fewshot.errors import UserError, shown
from fewshot.files import is_regular

FLOATS = (torch.float32, torch.float64)
COUNTS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)  # of buffers
# All that a checkpoint of this program names in its pickle. Torch allows more, a bytearray of any length among others.
NAMED = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
NAMED |= {f"torch {kind}Storage" for kind in ("Float", "Double", "Bool", "Byte", "Char", "Short", "Int", "Long")}
AROUND = 512  # bytes of a zip around an entry's own: torch's have less than 300


def dense(value: Any, dtypes: tuple[torch.dtype, ...] = FLOATS) -> bool:
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


def _is_update(value: Any) -> bool:
    numbers = isinstance(value, dict) and all(dense(number) and not number.dim() for number in value.values())
    return numbers and {"loss", "query_accuracy"} <= value.keys()


def check_weights(where: str, weights: Any) -> None:
    """Raises UserError where they are not {name: tensor}, all weights of one type, float32 or float64.

    A network of one's own may have buffers of whole numbers.
    """
    stored.check(where, {"state_dict": weights}, STATE)
    if len({tensor.dtype for tensor in weights.values()} - {*COUNTS}) != 1:
        raise UserError(f"{where}: state_dict must have tensors of one type, float32 or float64")


# A column's name
ROW = re.compile(r"iteration|(train|(val|test)(_zeroed)?|probe)/[a-zA-Z_]\w*(/step_[0-9]{1,4})?", re.ASCII)
WEIGHTS = must_be(
    "a dense tensor of float32, float64 or whole numbers", Any, refused=lambda value: not dense(value, FLOATS + COUNTS)
)
STATE = form({"state_dict": dict[stored.KEY, WEIGHTS]})
UPDATE = must_be(
    "loss, query_accuracy and the like, one number in a tensor each", Any, refused=lambda value: not _is_update(value)
)
RECORD = {
    "rows": many(must_be("a row of metrics.csv", Any, refused=lambda value: not _is_row(value))),
    "best_accuracy": stored.NUMBER,
    "stopped": Flag,
    "pending": many(UPDATE),
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
    """Raises UserError where reading the file could take far more memory than its size. where: how its line begins.

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


def refuse_misfit(where: str, weights: dict[str, Tensor], trained: dict[str, Any], module: nn.Module) -> None:
    """Raises UserError where weights and module differ in a tensor's name or shape, or a number is not finite.

    A buffer may be infinite, as the mask of an attention is, but not NaN.

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
