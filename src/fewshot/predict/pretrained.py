"""A trained model to use, read from a checkpoint or from the folder of one that was shared.

Shapes: B images of C channels, H x W pixels.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fewshot.config import stored
from fewshot.config.stored import to_today
from fewshot.config.tree import entries, portable
from fewshot.data.folder_or_zip import read_file
from fewshot.data.images import decode, square, unreadable
from fewshot.data.sampler import normalised
from fewshot.errors import UserError
from fewshot.files import ADAPTED, EXPORTED, EXPORTED_CONFIG, TRAINED, is_regular
from fewshot.predict.find import find
from fewshot.results import record_files
from fewshot.training.checkpoint import check_weights, read, refuse_misfit
from fewshot.training.learner import Learner

Picture = Image.Image | np.ndarray | Tensor | bytes | str | os.PathLike[str]


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
        resample = Image.Resampling[dataset.get("resample", "bilinear").upper()]
        return cls(dataset["size"], dataset["channels"], resample, tuple(dataset["mean"]), tuple(dataset["std"]))

    def __call__(self, picture: Picture) -> Tensor:
        """(C, size, size) float32, normalised."""
        return self.normalised(self.pixels(picture))

    def normalised(self, pixels: Tensor) -> Tensor:
        """(..., C, size, size) uint8 as the network sees it."""
        return normalised(pixels, self.mean, self.std)

    def pixels(self, picture: Picture) -> Tensor:
        """(C, size, size) uint8: the right way up, the middle square, resized.

        picture: a PIL image, a uint8 array (H, W) or (H, W, 1|3|4), a uint8 tensor (1|3|4, H, W), a file's path or its
            bytes; an array or tensor of another type or shape, and a path where no image is, is a UserError.
        """
        shape = {"size": self.size, "channels": self.channels, "resample": self.resample}
        if isinstance(picture, str | os.PathLike):
            try:
                return torch.tensor(decode(read_file(os.path.expanduser(picture)), **shape))
            except Exception as error:  # of the file, or of Pillow's decoders
                raise UserError(f"image={picture}: cannot be read ({unreadable(error)})") from None
        if isinstance(picture, bytes):
            return torch.tensor(decode(picture, **shape))
        return torch.tensor(square(picture if isinstance(picture, Image.Image) else _image(picture), **shape))


def stacked(where: str, preprocess: Preprocess, pictures: Sequence[Picture]) -> Tensor:
    """(I, C, size, size) uint8

    where: what the pictures are called, before a number, in the line that says which of them is none.
    """
    none = isinstance(pictures, str | bytes | os.PathLike | Image.Image | Mapping)
    if none or not hasattr(pictures, "__len__") or getattr(pictures, "ndim", 1) == 0:
        raise UserError(f"{where}: a {type(pictures).__name__}; give a list of images")
    if not len(pictures):
        raise UserError(f"{where}: has no images; give at least one")
    read = []
    for number, picture in enumerate(pictures):
        try:
            read.append(preprocess.pixels(picture))
        except UserError as error:
            raise UserError(str(error).replace("image: ", f"{where}[{number}]: ", 1)) from None
        except Exception as error:  # Pillow's decoders raise nearly every kind on broken data
            raise UserError(f"{where}[{number}]: cannot be read ({unreadable(error)})") from None
    return torch.stack(read)


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

    learner: adapts it; preprocess: makes of an image what the encoder takes; config: of its training, as plain data.
    adapted_in: the folder of a model that has adapted already.
    """

    learner: Learner
    preprocess: Preprocess
    config: dict[str, Any]
    adapted_in: Path | None = None

    def __repr__(self) -> str:
        return f"Pretrained({self.config['model']['name']}, {record_files.title(self.config)})"

    @property
    def encoder(self) -> nn.Module:
        """(B, C, size, size) -> features (B, d)"""
        return self.learner.network.encoder

    @property
    def head(self) -> nn.Linear:
        """Features (B, d) -> logits, one for each of the ways it was trained with."""
        return self.learner.network.head


def load(path: str | os.PathLike[str], *, trust: bool = False) -> Pretrained:
    """The model of a run, RUN or RUN/checkpoints/best.ckpt; of a folder that `python -m fewshot.export` wrote; one that
    comes with this program, by its name, as "omniglot-5w1s-zero"; or one on the Hugging Face hub, "hf://ORG/NAME".

    The model is on the CPU, in evaluation mode. Only tensors and plain data are unpickled. The stored configuration
    names what makes the network; that is called only if it is this program's own.

    trust: call whatever the configuration names, for networks of one's own in files whose writer one trusts.

    Raises:
        UserError: nothing there can be read, the weights do not fit, or the network is foreign and not trusted.
    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"model={path!r}: a {type(path).__name__}; give a path, or a name as omniglot-5w1s-zero")
    path = find(os.fspath(path))
    where = f"model={path}"
    if path.is_dir():
        config, weights, _ = read_folder(path)
    else:
        content = read(path, "model")
        config, weights = portable(content["fewshot"]["config"]), content["state_dict"]
    if not trust:
        _refuse_foreign(where, config)
    config: Any = OmegaConf.to_container(OmegaConf.create(config))  # a tuple becomes a list
    stored.check_config(where, config)
    stored.check(where, config, stored.MODEL)
    network, data = config["model"]["network"], config["dataset"]
    for knob in ("size", "channels"):
        if network.get(knob, data[knob]) != data[knob]:
            raise UserError(
                f"{where}: model.network.{knob} is {stored.brief(network[knob])}, and dataset.{knob} "
                f"{data[knob]}; they must be the same"
            )
    # On "meta" a network of fewshot.models takes no memory until its shapes are known to fit the weights.
    place = "meta" if _own(network["_target_"]) else "cpu"
    try:
        with torch.random.fork_rng(devices=[]), torch.device(place):  # the initial weights are drawn, and replaced
            learner = Learner.from_config(DictConfig(config))
    except (InstantiationException, TypeError) as error:  # the latter of Hydra, for a key as _recursive_
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise UserError(f"{where}: its model.network cannot be made ({reason})") from None
    refuse_misfit(where, weights, config, learner)
    learner.load_state_dict(weights, assign=True)  # assigned, they stay float64 where they are
    adapted_in = path if (path / ADAPTED).is_file() else None
    return Pretrained(learner.eval(), Preprocess.from_config(data), config, adapted_in)


def read_folder(folder: Path, knob: str = "model") -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    """Configuration and weights of a shared folder, and what stands as TRAINED in its config.yaml, {} for nothing."""
    for name in (EXPORTED, EXPORTED_CONFIG):
        if not (folder / name).exists():
            raise UserError(
                f"{knob}={folder}: has no {name}; give a folder that python -m fewshot.export wrote, or a file as "
                "RUN/checkpoints/best.ckpt"
            )
        is_regular(knob, folder / name)
    where = f"{knob}={folder / EXPORTED_CONFIG}"
    config = stored.read_yaml(folder / EXPORTED_CONFIG)
    stored.check(where, config, dict[str, Any])
    stored.check_plain(where, config)
    config = to_today(config)
    try:
        weights = load_file(folder / EXPORTED)
    except SafetensorError as error:
        raise UserError(f"{knob}={folder / EXPORTED}: cannot be read, truncated or no safetensors ({error})") from None
    check_weights(f"{knob}={folder / EXPORTED}", weights)
    # Mapped from the file they lie at addresses where sums can be rounded otherwise than in the model that was written.
    return config, {name: tensor.clone() for name, tensor in weights.items()}, config.pop(TRAINED, {})


def _refuse_foreign(where: str, config: dict[str, Any]) -> None:
    """Raises UserError where building the model would call, or look up, what fewshot.models does not define.

    It is not enough that a name begins with fewshot., because through a module's imports it can reach everything.
    """
    for key, value in entries(config):
        if "${" in str(value):  # an interpolation could become anything after this check
            raise UserError(f"{where}: {key}={value}: a shared configuration has plain values only")
        if key == "algo._target_" and (value is None or _own(value, "algorithms")):
            continue
        if key.rsplit(".", 1)[-1] == "_target_" and not _own(value):
            raise UserError(
                f"{where}: its configuration calls {value}, and loading would run that; only what "
                "fewshot.models defines is called, unless you trust whoever wrote it: trust=true, in Python trust=True"
            )


def _own(target: Any, package: str = "models") -> bool:
    if not isinstance(target, str) or not re.fullmatch(rf"fewshot\.{package}(\.[a-zA-Z]\w*)+", target):
        return False
    try:
        target_object = get_object(target)
    except Exception:  # no such name; Hydra does not document what it raises
        return False
    place = str(getattr(target_object, "__module__", ""))
    return place.startswith(f"fewshot.{package}.") and place != "fewshot.models.any_module"  # which is given a module
