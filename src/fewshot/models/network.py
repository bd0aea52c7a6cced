"""The network of the paper: an encoder, here Conv4 as its released code has it, and a linear head.

Shapes: B images of C channels, H x W pixels; d features; K ways.
"""

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """An encoder phi and a linear head (w, b): logits = w phi(x) + b.

    All weights are drawn Kaiming-normal (fan in, gain sqrt 2) and all biases are zero, docs/method.md section 3; then
    the head's weights are multiplied by init_scale, once. With own_weights the encoder keeps the weights it comes with.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        ways: int,
        init_scale: float = 1.0,
        head_bias: bool = True,
        own_weights: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(features, ways, bias=head_bias)
        for layer in (self.head if own_weights else self).modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.head.weight.mul_(init_scale)
        self.eval()

    def train(self, mode: bool = True) -> "Network":
        """Always in eval mode: BatchNorm uses the batch's statistics, and only DropBlock drops features."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, K)."""
        return self.head(self.encoder(images))


def norm(width: int) -> nn.Module:
    """BatchNorm that uses the batch's statistics, in training and test alike."""
    return nn.BatchNorm2d(width, track_running_stats=False)


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
    *,
    channels: int,
    size: int,
    ways: int,
    width: int = 32,
    norm_first: bool = False,
    init_scale: float = 1.0,
    head_bias: bool = True,
) -> Network:
    """Four pooled convolutions, (B, channels, size, size) -> (B, K): method.md section 5; 800 features at size 84.

    norm_first: BatchNorm before ReLU, as in the Conv4 of Snell et al. 2017 and most others; the paper has it after.
    """
    layers: list[nn.Module] = []
    for inputs in (channels, width, width, width):
        relu, norm = _relu_norm(width)
        order = (norm, relu) if norm_first else (relu, norm)
        layers += [nn.Conv2d(inputs, width, 3, padding=1), *order, nn.MaxPool2d(2)]
    return Network(nn.Sequential(*layers, nn.Flatten()), width * (size // 16) ** 2, ways, init_scale, head_bias)


def _relu_norm(width: int) -> tuple[nn.Module, nn.Module]:
    return nn.ReLU(), norm(width)
