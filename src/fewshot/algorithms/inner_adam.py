"""Adam (Kingma and Ba 2015) in the inner loop, as torch.optim.Adam has it."""

from dataclasses import dataclass
from typing import Any

from fewshot.inner_loop import InnerLoop, Tensors


@dataclass(frozen=True)
class InnerAdam(InnerLoop):
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def update(self, theta: Tensors, gradients: Tensors, state: Any) -> tuple[Tensors, Any]:
        n, m, v = state or (0, *({name: g.new_zeros(g.shape) for name, g in gradients.items()} for _ in "mv"))
        n += 1
        m = {name: self.beta1 * m[name] + (1 - self.beta1) * g for name, g in gradients.items()}
        v = {name: self.beta2 * v[name] + (1 - self.beta2) * g * g for name, g in gradients.items()}
        updates = {}
        for name in gradients:
            # At v = 0 the root has no derivative; there every gradient was zero, and m with it.
            root = v[name].where(v[name] > 0, 1.0).sqrt() * (v[name] > 0)
            m_hat, root = m[name] / (1 - self.beta1**n), root / (1 - self.beta2**n) ** 0.5
            updates[name] = -self.inner_lr * m_hat / (root + self.eps)
        return updates, (n, m, v)
