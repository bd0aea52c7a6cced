"""The Conv4 of the paper's released code for Omniglot and for photos.

Shapes: B images of C channels, H x W pixels, K ways.
"""

from torch import nn

from fewshot.models.network import Network, norm


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

    norm_first: BatchNorm before ReLU, as in the Conv4 of Snell et al. 2017 and most others; here it comes after.
    """
    layers: list[nn.Module] = []
    for inputs in (channels, width, width, width):
        relu, norm = _relu_norm(width)
        order = (norm, relu) if norm_first else (relu, norm)
        layers += [nn.Conv2d(inputs, width, 3, padding=1), *order, nn.MaxPool2d(2)]
    return Network(nn.Sequential(*layers, nn.Flatten()), width * (size // 16) ** 2, ways, init_scale, head_bias)


def _relu_norm(width: int) -> tuple[nn.Module, nn.Module]:
    return nn.ReLU(), norm(width)
