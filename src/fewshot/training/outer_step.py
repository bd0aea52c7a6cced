"""The outer step: what becomes of the outer gradient (method.md section 0: Adam, no schedule, no clipping)."""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from fewshot.errors import UserError, reason_of
from fewshot.models.network import Network


@dataclass(frozen=True)
class OuterStep:
    """theta <- theta - rho grad, by an optimiser.

    outer_lr: rho. optimizer: makes one, of parameters and lr, which is rho. schedule: none, cosine (rho falls to 0 over
    the iterations) or multistep (to a tenth after each of the milestones). clip_norm: the gradient's largest norm;
    None: any.
    """

    outer_lr: float
    optimizer: Callable[..., Optimizer] = torch.optim.Adam
    schedule: str = "none"
    iterations: int = 1
    milestones: list[int] = field(default_factory=list)
    clip_norm: float | None = None
    _began: list[float] = field(default_factory=list, init=False)  # rho of each group of the optimiser's parameters

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "OuterStep":
        if "optimizer" not in cfg:  # an exported model, which is not trained
            return cls(cfg.outer_lr)
        optimizer = partial(_made, cfg.optimizer)
        milestones = list(cfg.milestones)
        return cls(cfg.outer_lr, optimizer, cfg.schedule, cfg.iterations, milestones, cfg.clip_norm)

    def of(self, parameters: Iterable[Tensor]) -> Optimizer:
        optimizer = self.optimizer(parameters, lr=self.outer_lr)
        self._began[:] = [group["lr"] for group in optimizer.param_groups]
        return optimizer

    def rate(self, done: int) -> float:
        """rho after so many outer updates."""
        if self.schedule == "cosine":
            return self.outer_lr * (1 + math.cos(math.pi * done / self.iterations)) / 2
        return self.outer_lr * 0.1 ** sum(done >= milestone for milestone in self.milestones)

    def set_rate(self, optimizer: Optimizer, done: int) -> None:
        """Sets rho for the next update, by the number of updates alone, so that a run goes on exactly."""
        for group, rate in zip(optimizer.param_groups, self.rates(done), strict=True):
            group["lr"] = rate

    def rates(self, done: int) -> list[float]:
        """rho after so many outer updates, of each parameter group of the optimizer that was made last."""
        return [began / self.outer_lr * self.rate(done) for began in self._began]

    def clip(self, optimizer: Optimizer, network: Network, zeroing: bool) -> dict[str, Tensor]:
        """Scales a gradient down that is longer than clip_norm; returns the norm that it had as "gradient_norm".

        With zeroing the head's gradient is left as it is and does not count, since the update of the head is undone.
        """
        if self.clip_norm is None:
            return {}
        head = {*network.head.parameters()} if zeroing else set()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p not in head]
        return {"gradient_norm": nn.utils.clip_grad_norm_(parameters, self.clip_norm)}


def _made(config: DictConfig, parameters: Iterable[Tensor], lr: float) -> Optimizer:
    """Raises UserError where what the configuration names cannot be made, or is no optimiser of gradients."""
    asked = f"optimizer={config._target_}"
    try:
        optimizer = instantiate(config, _partial_=True, _convert_="all")(parameters, lr=lr)
    except Exception as error:  # whatever the class and its arguments make of it
        raise UserError(f"{asked}: cannot be made ({reason_of(error)})") from None
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        raise UserError(f"{asked}: must be a torch.optim.Optimizer whose step needs the gradient alone")
    return optimizer


def state_after_a_step(step: OuterStep, module: nn.Module) -> dict[str, Any]:
    """The state_dict of the module's optimiser after one update: what that of a checkpoint has to look like."""
    parameters = [copy.deepcopy(parameter.detach()).requires_grad_() for parameter in module.parameters()]
    optimizer = step.of(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer.state_dict()
