"""Gradient descent with momentum in the inner loop, as torch.optim.SGD has it."""

from dataclasses import dataclass
from typing import Any

from fewshot.inner_loop import InnerLoop, Tensors


@dataclass(frozen=True)
class InnerMomentum(InnerLoop):
    momentum: float = 0.9  # mu

    def update(self, theta: Tensors, gradients: Tensors, state: Any) -> tuple[Tensors, Any]:
        v = {name: self.momentum * state[name] + g for name, g in gradients.items()} if state else gradients
        return {name: -self.inner_lr * v[name] for name in v}, v  # v <- mu v + grad L(S_n); theta_n <- theta_n - eta v
