"""The encoders and the head.

Shapes: B images of C channels, H x W pixels; d features; K ways; S support images of a task.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Network(nn.Module):
    """An encoder phi and a linear head (w, b): logits = w phi(x) + b.

    Kaiming-normal weights (fan in, gain sqrt 2) and zero biases everywhere, docs/method.md section 3; then the head's
    weights are multiplied by init_scale, once.
    """

    def __init__(
        self, encoder: nn.Module, features: int, ways: int, init_scale: float = 1.0, head_bias: bool = True
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(features, ways, bias=head_bias)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.head.weight.mul_(init_scale)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        return self.head(self.encoder(images))


def zero_head(head: nn.Linear) -> None:
    """w <- 0, b <- 0, in place. The bias too: with b != 0 the first inner step is not uniform over classes."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()


def prototype_head(features: Tensor, labels: Tensor, ways: int) -> dict[str, Tensor]:
    """The head that gives each class -|phi(x) - c_k|^2 up to what all share: w_k = 2 c_k, b_k = -|c_k|^2.

    Args:
        features: of the support, (..., S, d); c_k, the prototype, is the mean of class k's.
        labels: (..., S).

    Returns weight (..., K, d) and bias (..., K), as ProtoMAML begins with (Triantafillou et al. 2020, section 3).
    """
    members = F.one_hot(labels, ways).to(features).mT  # (..., K, S)
    c = members @ features / members.sum(-1, keepdim=True)
    return {"weight": 2 * c, "bias": -c.square().sum(-1)}


def share_rows(head: nn.Linear) -> None:
    """Every class begins with the first one's weights: one vector for all (UnicornMAML, Ye and Chao 2022)."""
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))


def share_gradient(head: nn.Linear) -> None:
    """The gradient of the one vector that all rows are, given to every row: so they stay one vector."""
    for parameter in head.parameters():
        parameter.grad = parameter.grad.sum(0, keepdim=True).expand_as(parameter).clone()


def conv4_strided(
    *, channels: int, size: int, ways: int, width: int = 64, init_scale: float = 1.0, head_bias: bool = True
) -> Network:
    """Four strided convolutions, (B, channels, size, size) -> (B, K): method.md section 4; 64 features at size 28."""
    layers: list[nn.Module] = []
    pixels = size
    for inputs, kernel, stride in ((channels, 3, 2), (width, 3, 2), (width, 3, 2), (width, 2, 1)):
        layers += [nn.Conv2d(inputs, width, kernel, stride), *_relu_norm(width)]
        pixels = (pixels - kernel) // stride + 1
    return Network(nn.Sequential(*layers, nn.Flatten()), width * pixels**2, ways, init_scale, head_bias)


def conv4_pooled(
    *, channels: int, size: int, ways: int, width: int = 32, init_scale: float = 1.0, head_bias: bool = True
) -> Network:
    """Four pooled convolutions, (B, channels, size, size) -> (B, K): method.md section 5; 800 features at size 84."""
    layers: list[nn.Module] = []
    for inputs in (channels, width, width, width):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), *_relu_norm(width), nn.MaxPool2d(2)]
    return Network(nn.Sequential(*layers, nn.Flatten()), width * (size // 16) ** 2, ways, init_scale, head_bias)


def _relu_norm(width: int) -> tuple[nn.Module, nn.Module]:
    """ReLU, then BatchNorm on the statistics of the batch at hand, in training and test alike."""
    return nn.ReLU(), nn.BatchNorm2d(width, track_running_stats=False)
