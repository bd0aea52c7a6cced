"""A trained model to use, read from a checkpoint or from the folder of one that was shared.

Shapes: B images of C channels, H x W pixels.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf import OmegaConf
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fewshot.config import stored
from fewshot.config.moved import to_today
from fewshot.config.tree import entries
from fewshot.data.images import decode, square
from fewshot.errors import UserError
from fewshot.files import is_regular
from fewshot.paths import EXPORTED, model_path
from fewshot.training.checkpoint import check_weights, read, refuse_misfit
from fewshot.training.meta_learner import MetaLearner

Picture = Image.Image | np.ndarray | Tensor | bytes

WEIGHTS, CONFIG = EXPORTED, "config.yaml"  # of a shared folder

# No part of a model: what only training needs, and where things lie on the machine that trained.
LEFT_OUT = (
    *("trainer", "logger", "callbacks", "checkpoint", "fit", "augment"),
    *("dataset.root", "dataset.labels", "dataset.cache", "dataset.source", "dataset.device", "dataset.trust"),
)


@dataclass(frozen=True)
class Preprocess:
    """An image as the network was trained to see it.

    size: pixels of a side; channels: 1 (grey) or 3 (colour); resample: how it is resized; mean, std: per channel, of
    images scaled to [0, 1].
    """

    size: int
    channels: int
    resample: Image.Resampling
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_config(cls, dataset: dict[str, Any]) -> "Preprocess":
        """dataset: of a resolved configuration."""
        drawings = dataset["name"] == "omniglot"  # whose source reduces its lines with the sharper filter
        resample = Image.Resampling.LANCZOS if drawings else Image.Resampling.BILINEAR
        return cls(dataset["size"], dataset["channels"], resample, tuple(dataset["mean"]), tuple(dataset["std"]))

    def __call__(self, picture: Picture) -> Tensor:
        """(C, size, size) float32, normalised."""
        return self.normalise(self.pixels(picture))

    def pixels(self, picture: Picture) -> Tensor:
        """(C, size, size) uint8: the right way up, the middle square, resized.

        picture: a PIL image, a uint8 array (H, W) or (H, W, 1|3|4), a uint8 tensor (1|3|4, H, W), or a file's bytes.

        Raises:
            UserError: an array or tensor of another type or shape.
        """
        how = {"size": self.size, "channels": self.channels, "resample": self.resample}
        if isinstance(picture, bytes):
            return torch.tensor(decode(picture, **how))
        return torch.tensor(square(picture if isinstance(picture, Image.Image) else _image(picture), **how))

    def normalise(self, pixels: Tensor) -> Tensor:
        """(..., C, H, W) uint8 -> float32"""
        mean, std = (torch.tensor(each, device=pixels.device).view(-1, 1, 1) for each in (self.mean, self.std))
        return pixels.float().div_(255).sub_(mean).div_(std)


def _image(picture: np.ndarray | Tensor) -> Image.Image:
    if isinstance(picture, Tensor):
        array = picture.detach().cpu().numpy()
        sound = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        array = np.moveaxis(array, 0, -1) if sound else array
    else:
        array = np.asarray(picture)
        sound = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if not sound or array.dtype != np.uint8 or 0 in array.shape:
        raise UserError(
            f"image: a {type(picture).__name__} of {array.dtype}, shape {array.shape}; give a PIL image, a uint8 array "
            "(height, width[, 1|3|4]) or a uint8 tensor (1|3|4, height, width), from 0 to 255"
        )
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.shape[2:] == (1,) else array))


@dataclass(frozen=True)
class Pretrained:
    """A trained model.

    learner: adapts it; preprocess: from an image to what the encoder takes; config: it was trained with, as plain data.
    """

    learner: MetaLearner
    preprocess: Preprocess
    config: dict[str, Any]

    @property
    def encoder(self) -> nn.Module:
        """(B, C, size, size) -> features (B, d)"""
        return self.learner.network.encoder

    @property
    def head(self) -> nn.Module:
        """Features (B, d) -> logits, one for each of the ways it was trained with."""
        return self.learner.network.head


def load(path: str | Path, *, trust: bool = False) -> Pretrained:
    """The model of a run, RUN or RUN/checkpoints/best.ckpt, or of a folder that `python -m fewshot.export` wrote.

    Nothing is unpickled but tensors and plain data. The configuration found there names what makes the network; that is
    called only if it is this program's own.

    path: the file or folder; the model is on the CPU, in evaluation mode.
    trust: call whatever the configuration names: for networks of one's own, in files whose writer one trusts.

    Raises:
        UserError: nothing there that can be read, weights that do not fit, or a network from elsewhere without trust.
    """
    path = model_path(path)
    if path.is_dir():
        config, weights = _read_folder(path)
    else:
        content = read(path)
        config, weights = portable(content["fewshot"]["config"]), content["state_dict"]
    if not trust:
        _refuse_foreign(config, path)
    config = OmegaConf.to_container(OmegaConf.create(config))  # a tuple becomes a list
    stored.check_config(f"checkpoint={path}", config)
    stored.check(f"checkpoint={path}", config, stored.MODEL)
    network, data = config["model"]["network"], config["dataset"]
    for knob in ("size", "channels"):
        if network.get(knob, data[knob]) != data[knob]:
            raise UserError(
                f"checkpoint={path}: model.network.{knob} is {stored.brief(network[knob])}, and dataset.{knob} "
                f"{data[knob]}; they must be the same"
            )
    # A network of fewshot.models takes no memory until its shapes are known to be those of the weights.
    place = "meta" if _own(network["_target_"]) else "cpu"
    try:
        with torch.random.fork_rng(devices=[]), torch.device(place):  # the initial weights are drawn, and replaced
            learner = MetaLearner.from_config(OmegaConf.create(config), engine="sequential")
    except InstantiationException as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"checkpoint={path}: its model.network cannot be made ({reason})") from None
    refuse_misfit(weights, config, path, learner)
    learner.load_state_dict(weights, assign=True)  # assigned, they stay float64 where they are
    return Pretrained(learner.eval(), Preprocess.from_config(data), config)


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """What of a run's settings belongs to its model, and may be shown to others."""

    def kept(node: dict[str, Any], prefix: str) -> dict[str, Any]:
        return {
            key: kept(value, f"{prefix}{key}.") if isinstance(value, dict) else value
            for key, value in node.items()
            if prefix + key not in LEFT_OUT
        }

    return kept(config, "")


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of a shared folder."""
    for name in (WEIGHTS, CONFIG):
        if not (folder / name).exists():
            raise UserError(
                f"checkpoint={folder}: has no {name}; give a folder that python -m fewshot.export wrote, or a file as "
                "RUN/checkpoints/best.ckpt"
            )
        is_regular("checkpoint", folder / name)
    config = stored.read_yaml(folder / CONFIG)
    stored.check(f"checkpoint={folder / CONFIG}", config, {})
    stored.check_plain(f"checkpoint={folder / CONFIG}", config)
    config = to_today(config)
    try:
        weights = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(
            f"checkpoint={folder / WEIGHTS}: cannot be read, truncated or no safetensors ({error})"
        ) from None
    check_weights(f"checkpoint={folder / WEIGHTS}", weights)
    return config, weights


def _refuse_foreign(config: dict[str, Any], path: Path) -> None:
    """Raises UserError where building the model would call, or look up, what fewshot.models does not define.

    A name that begins with fewshot. is not enough: by way of a module's imports it can reach everything.
    """
    for key, value in entries(config):
        if "${" in str(value):  # an interpolation could become anything after this check
            raise UserError(f"checkpoint={path}: {key}={value}: a shared configuration has plain values only")
        if key.rsplit(".", 1)[-1] == "_target_" and not _own(value):
            raise UserError(
                f"checkpoint={path}: its configuration calls {value}, and loading would run that; only what "
                "fewshot.models defines is called, unless you trust whoever wrote it: trust=true, in Python trust=True"
            )


def _own(target: Any) -> bool:
    if not isinstance(target, str) or not re.fullmatch(r"fewshot\.models(\.[a-zA-Z]\w*)+", target):
        return False
    try:
        found = get_object(target)
    except Exception:  # no such name; what Hydra raises there is not said
        return False
    place = str(getattr(found, "__module__", ""))
    return place.startswith("fewshot.models.") and place != "fewshot.models.any_module"  # which is given a module
