"""A network is an encoder and a linear head: Conv4 as the paper's released code has it, and ResNet-12 with DropBlock.

Shapes: B images of C channels, H x W pixels; d features; K ways.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from fewshot import norms


class Network(nn.Module):
    """An encoder phi and a linear head (w, b): logits = w phi(x) + b.

    Convolutions and linear layers start Kaiming-normal (fan in, gain sqrt 2), biases zero, docs/method.md section 3;
    then the head's weights are multiplied by init_scale, once. With own_weights the encoder keeps its weights.
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
            if isinstance(layer, nn.Conv2d | nn.Linear) and not layer.weight.is_meta:  # there nothing can be drawn
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


def conv4_strided(
    *,
    channels: int,
    size: int,
    ways: int,
    width: int = 64,
    norm: str = "batch",
    init_scale: float = 1.0,
    head_bias: bool = True,
) -> Network:
    """Four strided convolutions, (B, channels, size, size) -> (B, K): method.md section 4; 64 features at size 28.

    norm: a kind of norms.norm; the paper has "batch".
    """
    layers: list[nn.Module] = []
    pixels = size
    for inputs, kernel, stride in ((channels, 3, 2), (width, 3, 2), (width, 3, 2), (width, 2, 1)):
        layers += [nn.Conv2d(inputs, width, kernel, stride), nn.ReLU(), norms.norm(width, norm)]
        pixels = (pixels - kernel) // stride + 1
    return Network(nn.Sequential(*layers, nn.Flatten()), width * pixels**2, ways, init_scale, head_bias)


def conv4_pooled(
    *,
    channels: int,
    size: int,
    ways: int,
    width: int = 32,
    norm: str = "batch",
    norm_first: bool = False,
    init_scale: float = 1.0,
    head_bias: bool = True,
) -> Network:
    """Four pooled convolutions, (B, channels, size, size) -> (B, K): method.md section 5; 800 features at size 84.

    norm: a kind of norms.norm; the paper has "batch".
    norm_first: BatchNorm before ReLU, as in the Conv4 of Snell et al. 2017 and most others; the paper has it after.
    """
    layers: list[nn.Module] = []
    for inputs in (channels, width, width, width):
        order = [nn.ReLU(), norms.norm(width, norm)][:: -1 if norm_first else 1]
        layers += [nn.Conv2d(inputs, width, 3, padding=1), *order, nn.MaxPool2d(2)]
    return Network(nn.Sequential(*layers, nn.Flatten()), width * (size // 16) ** 2, ways, init_scale, head_bias)


def resnet12(
    *,
    channels: int,
    size: int,
    ways: int,
    width: int = 64,
    drop_block: float = 0.0,
    seed: int = 0,
    init_scale: float = 1.0,
    head_bias: bool = True,
) -> Network:
    """Four residual blocks of widths 64, 160, 320, 640, (B, channels, size, size) -> (B, K).

    As in Lee et al. 2019 (MetaOptNet) and Tian et al. 2020; 640 features, the mean over the pixels that are left.

    Args:
        width: of the first block; the others have 2.5, 5 and 10 times as many channels.
        drop_block: the share of the features of the last two blocks that training drops, see DropBlock.
        seed: of what it drops.
    """
    widths = (channels, width, width * 5 // 2, width * 5, width * 10)
    blocks: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        blocks.append(Residual(inputs, outputs))
        if drop_block > 0 and number >= 2:
            blocks.append(DropBlock(drop_block, seed))
    encoder = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Network(encoder, widths[-1], ways, init_scale, head_bias)


class Residual(nn.Module):
    """Three convolutions beside one of a single pixel, then a max-pool: (B, inputs, H, W) -> (B, outputs, H/2, W/2)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in (inputs, outputs, outputs):
            layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), norms.norm(outputs), nn.LeakyReLU(0.1)]
        self.inside = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), norms.norm(outputs))
        self.outside = nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.outside(self.inside(x) + self.shortcut(x))


class DropBlock(nn.Module):
    """Drops squares of features (Ghiasi et al. 2018), but only inside `dropping`; elsewhere nothing is random.

    The squares are drawn anew in every inner step and for every image. The engines draw in different orders, so they
    drop different squares, equally often.
    """

    def __init__(self, share: float, seed: int) -> None:
        super().__init__()
        self.share, self.seed, self.active = share, seed, False

    def forward(self, x: Tensor) -> Tensor:
        return drop_squares(x, self.share) if self.active else x


def drop_squares(x: Tensor, share: float) -> Tensor:
    """(B, C, H, W) of one task: this share becomes zero, in squares of 5 x 5 where they fit; the rest is scaled up."""
    if has_torch_function((x,)):  # the batched engine has several tasks in x
        return handle_torch_function(drop_squares, (x,), x, share)
    from torchvision.ops import drop_block2d  # torchvision takes seconds to import

    side = min(5, *x.shape[2:])
    return drop_block2d(x, share, side - (side + 1) % 2)  # it takes only odd sides


def drops(network: nn.Module) -> bool:
    return any(isinstance(layer, DropBlock) for layer in network.modules())


@contextmanager
def dropping(network: nn.Module, position: int) -> Iterator[None]:
    """Inside, DropBlock drops what its seed and the position say: a run that goes on drops what it would have.

    position: outer updates done, times the number of ranks, plus the rank.
    """
    blocks = [layer for layer in network.modules() if isinstance(layer, DropBlock)]
    if blocks:
        torch.manual_seed(int(np.random.SeedSequence((blocks[0].seed, position)).generate_state(1)[0]))
    for block in blocks:
        block.active = True
    try:
        yield
    finally:
        for block in blocks:
            block.active = False
