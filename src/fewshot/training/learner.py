"""What adapts: the network and the inner loop that a configuration names, those of the user's own among them."""

from dataclasses import fields
from typing import Any

import torch
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig
from torch import nn

from fewshot.config.tree import statistics
from fewshot.errors import UserError, nearest, one_line, reason_of, shown
from fewshot.inner_loop import THEORY, TOP, InnerLoop
from fewshot.models.head import share_rows, unit_length
from fewshot.models.network import Network
from fewshot.norms import InSets, inside

PLAIN = {"int": int, "float": (int, float), "bool": bool, "str": str}  # of a field of one's own algorithm


class Learner(nn.Module):
    """A network, the inner loop that adapts it, and the inner learning rates where they are learned."""

    def __init__(self, network: Network, loop: InnerLoop) -> None:
        super().__init__()
        self.network, self.loop = network, loop
        if loop.head == "shared":
            share_rows(network.head)
        if loop.distance == "cosine":
            network.encoder.register_forward_hook(unit_length)
        adapts = network if loop.adapted == "all" else getattr(network, loop.adapted)
        etas = (torch.full_like(p, loop.inner_lr) for p in adapts.parameters() if loop.learned_inner_lr)
        self.etas = nn.ParameterList(etas)  # one for each parameter that adapts; none: all are loop.inner_lr

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "Learner":
        """The learner of a composed configuration.

        Raises:
            UserError: as inner_loop and check_network do.
        """
        loop = inner_loop(cfg)
        network = instantiate(cfg.model.network)
        check_network(network, cfg)
        return cls(network, loop)


def inner_loop(cfg: DictConfig) -> InnerLoop:
    """The inner loop of a composed configuration, of the class that algo._target_ names.

    Raises:
        UserError: it names no such class, or one that does not take what the configuration says; or probes=true cannot
            measure it.
    """
    if (target := cfg.algo.get("_target_")) is None:
        return InnerLoop.of(cfg)
    try:
        own = get_object(target)
    except Exception as error:  # whatever importing the user's module raises
        raise UserError(one_line(f"algo._target_={target}: cannot be imported ({reason_of(error)})")) from error
    if not (isinstance(own, type) and issubclass(own, InnerLoop)):
        raise UserError(f"algo._target_={target}: must be a class that derives from fewshot.inner_loop.InnerLoop")
    names = {field.name for field in fields(own)} - {*TOP, "target"}
    if unknown := [key for key in cfg.algo if key not in {*names, "_target_"}]:
        remedy = nearest(unknown[0], names)
        raise UserError(f"algo.{unknown[0]}={shown(cfg.algo[unknown[0]])}: {own.__name__} has no such field; {remedy}")
    for field in fields(own):
        kinds = PLAIN.get(name := getattr(field.type, "__name__", str(field.type)))
        if kinds and field.name in cfg.algo and not isinstance(value := cfg.algo[field.name], kinds):
            raise UserError(f"algo.{field.name}={shown(value)}: must be of {own.__name__}'s type for it, {name}")
    try:
        loop = own.of(cfg)
    except UserError:
        raise
    except Exception as error:  # a field that has no default and no knob, or whatever its own checks raise
        raise UserError(one_line(f"algo._target_={target}: cannot be made ({reason_of(error)})")) from error
    if cfg.get("probes") and loop.beyond_theory:
        raise UserError(f"probes=true: they measure {THEORY}; leave them out with {loop.beyond_theory}")
    return loop


def check_network(network: Any, cfg: DictConfig) -> None:
    """Raises UserError where a network of the user's own is not an encoder and a head, and nothing else.

    Also where evaluation.statistics=support, and the network mixes images in other layers than BatchNorm.
    """
    encoder, head = getattr(network, "encoder", None), getattr(network, "head", None)
    if not (isinstance(encoder, nn.Module) and isinstance(head, nn.Module) and hasattr(head, "weight")):
        target = cfg.model.network._target_
        raise UserError(f"model.network={target}: makes no network with .encoder and .head; try model=module")
    if any(hasattr(layer, "_orig_mod") for layer in network.modules()):
        raise UserError("model: torch.compile's modules cannot be adapted; give the module itself")
    own_forward = type(network).forward is not Network.forward
    if not own_forward and "support" not in statistics(cfg):
        return  # nothing has to be tried
    images = torch.linspace(-1, 1, 4 * cfg.dataset.channels * cfg.dataset.size**2).sin()
    images = images.view(4, cfg.dataset.channels, cfg.dataset.size, cfg.dataset.size)
    if "support" in statistics(cfg):  # two images of a support, and one query or two
        with torch.no_grad():
            alone, beside = (inside(network, images[:n], InSets(n, first=2))[2] for n in (3, 4))
        if not torch.allclose(alone, beside, rtol=1e-3, atol=1e-4):
            raise UserError(
                "evaluation.statistics=support: the network mixes images in other layers than BatchNorm; use task"
            )
    if own_forward:
        with torch.no_grad():
            if not torch.allclose(network(images), head(encoder(images))):
                raise UserError(
                    f"model.network={cfg.model.network._target_}: its forward is not head(encoder(images)); "
                    "put what it does besides into the encoder"
                )
