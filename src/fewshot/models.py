"""The encoders and the head.

Shapes: B images of C channels, H x W pixels; d features; K ways.
"""

import torch
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
