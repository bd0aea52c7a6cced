"""Reptile (Nichol, Achiam and Schulman 2018): theta moves to where the inner loops ended; no query has a part in it."""

from dataclasses import dataclass
from typing import ClassVar

from fewshot.inner_loop import InnerLoop, Loss, Tensors


@dataclass(frozen=True)
class Reptile(InnerLoop):
    needs: ClassVar = {"first_order": True, "adapted": "all"}

    def outer_gradient(self, theta: Tensors, theta_N: Tensors, support_loss: Loss, query_loss: Loss) -> tuple:
        return {name: theta[name] - theta_N[name] for name in theta}, {}  # theta <- theta + rho (theta_N - theta)
