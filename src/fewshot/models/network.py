"""The encoders and the head.

Shapes: B images of C channels, H x W pixels; d features; K ways; S support images of a task.
"""

import torch
from torch import Tensor, nn


class Network(nn.Module):
    """An encoder phi and a linear head (w, b): logits = w phi(x) + b.

    Kaiming-normal weights (fan in, gain sqrt 2) and zero biases everywhere, docs/method.md section 3; then the head's
    weights are multiplied by init_scale, once. With own_weights the encoder keeps those it comes with.
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
    """BatchNorm on the statistics of the batch at hand, in training and test alike."""
    return nn.BatchNorm2d(width, track_running_stats=False)
