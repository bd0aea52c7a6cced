"""What a configuration names of the user's own, an algorithm and a network, looked at before anything is trained."""

from typing import Any

import torch
from hydra.utils import get_object
from omegaconf import DictConfig
from torch import nn

from fewshot.errors import UserError, one_line
from fewshot.inner_loop import InnerLoop
from fewshot.models.network import Network


def loop_class(cfg: DictConfig) -> type[InnerLoop]:
    """InnerLoop, or the class of the user's own that algo._target_ names."""
    if (target := cfg.algo.get("_target_")) is None:
        return InnerLoop
    try:
        own = get_object(target)
    except Exception as error:  # whatever importing the user's module raises
        raise UserError(one_line(f"algo._target_={target}: cannot be imported ({error})")) from error
    if not (isinstance(own, type) and issubclass(own, InnerLoop)):
        raise UserError(f"algo._target_={target}: must be a class that derives from fewshot.inner_loop.InnerLoop")
    return own


def check_network(network: Any, cfg: DictConfig) -> None:
    """Raises UserError where a network of the user's own is not an encoder and a head, and nothing else."""
    encoder, head = getattr(network, "encoder", None), getattr(network, "head", None)
    if not (isinstance(encoder, nn.Module) and isinstance(head, nn.Module) and hasattr(head, "weight")):
        raise UserError(f"model.network={cfg.model.network._target_}: makes no network with an encoder and a head")
    if type(network).forward is not Network.forward:
        images = torch.linspace(-1, 1, 2 * cfg.dataset.channels * cfg.dataset.size**2)
        images = images.view(2, cfg.dataset.channels, cfg.dataset.size, cfg.dataset.size)
        with torch.no_grad():
            if not torch.allclose(network(images), head(encoder(images))):
                raise UserError(
                    f"model.network={cfg.model.network._target_}: its forward is not head(encoder(images)); "
                    "put what it does besides into the encoder"
                )
