"""iMAML (Rajeswaran et al. 2019): the outer gradient from where the inner loop ends, not from how it came there.

The inner loop minimises L(theta_n, S_n) + lambda/2 |theta_n - theta|^2. At its minimum d theta_N / d theta is
(I + H/lambda)^-1, where H is the Hessian of L(theta_N, S_n).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewshot.algorithms.conjugate_gradients import conjugate_gradients
from fewshot.inner_loop import InnerLoop, Loss, Tensors


@dataclass(frozen=True)
class ImplicitMAML(InnerLoop):
    proximal: float = 2.0  # lambda
    cg_steps: int = 5
    needs: ClassVar = {"first_order": False, "adapted": "all"}
    measures: ClassVar = ("cg_residual",)

    def update(self, theta: Tensors, gradients: Tensors, state: Any) -> tuple[Tensors, Any]:
        start = state or theta  # where the task began
        pulled = {name: g + self.proximal * (theta[name] - start[name]) for name, g in gradients.items()}
        return {name: -self.inner_lr * g for name, g in pulled.items()}, start

    def outer_gradient(self, theta: Tensors, theta_N: Tensors, support_loss: Loss, query_loss: Loss) -> tuple:
        parameters, loss = list(theta_N.values()), query_loss(theta_N)
        b = torch.autograd.grad(loss.sum(), parameters)  # grad L(theta_N, Q_n)
        g = torch.autograd.grad(support_loss(theta_N).sum(), parameters, create_graph=True)

        def product(p: list[Tensor]) -> list[Tensor]:  # (I + H/lambda) p
            H_p = torch.autograd.grad(g, parameters, p, retain_graph=True)
            return [a + h / self.proximal for a, h in zip(p, H_p, strict=True)]

        x, residual = conjugate_gradients(product, b, self.cg_steps, loss.dim())
        return dict(zip(theta_N, x, strict=True)), {"cg_residual": residual}
