"""The networks: sizes, block order, initialisation, BatchNorm, and the images they can take."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fewshot.config import CONF
from fewshot.models import conv4_pooled, conv4_strided, zero_head

NETWORKS = {"conv4_strided": conv4_strided, "conv4_pooled": conv4_pooled}
both = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
MODEL_FILES = sorted((CONF / "model").glob("*.yaml"))
per_model_file = pytest.mark.parametrize("path", MODEL_FILES, ids=[path.stem for path in MODEL_FILES])


def from_file(path, *, size, channels=1, ways=5, init_scale=1):
    """The configuration and the network of a file in conf/model."""
    rest = {"dataset": {"channels": channels, "size": size}, "ways": ways, "init_scale": init_scale}
    cfg = OmegaConf.merge(OmegaConf.load(path), rest)
    return cfg.model, instantiate(cfg.model.network)


def test_the_omniglot_network_has_91781_parameters():
    network = conv4_strided(channels=1, size=28, ways=5)
    assert sum(p.numel() for p in network.parameters()) == 91_781
    assert network.encoder(torch.randn(2, 1, 28, 28)).shape == (2, 64)


def test_the_miniimagenet_network_has_800_features():
    network = conv4_pooled(channels=3, size=84, ways=5)
    assert network.encoder(torch.randn(2, 3, 84, 84)).shape == (2, 800)
    assert network.head.weight.shape == (5, 800)


@both
def test_a_block_is_convolution_relu_batchnorm_then_pool(build):
    """Against the layers written out, with gamma and beta that make every other order give something else."""
    torch.manual_seed(0)
    network = build(channels=2, size=33, ways=4, width=6).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    images = torch.randn(7, 2, 33, 33, dtype=torch.float64)

    parameters = iter(network.parameters())
    features = images
    for block in range(4):
        weight, bias, gamma, beta = (next(parameters) for _ in range(4))
        if build is conv4_strided:
            features = F.conv2d(features, weight, bias, stride=(2, 2, 2, 1)[block])
        else:
            features = F.conv2d(features, weight, bias, padding=1)
        features = features.clamp(min=0)
        mean = features.mean((0, 2, 3), keepdim=True)
        variance = features.var((0, 2, 3), keepdim=True, correction=0)
        features = (features - mean) / (variance + 1e-5).sqrt() * gamma.view(-1, 1, 1) + beta.view(-1, 1, 1)
        if build is conv4_pooled:
            features = F.max_pool2d(features, 2)
    w, b = parameters
    expected = features.flatten(1) @ w.T + b

    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("build", "channels", "size", "std"), [(conv4_strided, 1, 28, 0.177), (conv4_pooled, 3, 84, 0.05)]
)
def test_initialisation(build, channels, size, std):
    torch.manual_seed(0)
    network = build(channels=channels, size=size, ways=400)
    weights = [p for p in network.parameters() if p.dim() > 1]
    assert len(weights) == 5
    assert network.head.weight.std().item() == pytest.approx(std, rel=0.03)
    for weight in weights:  # Kaiming normal: sqrt(2 / fan in); sampling error of the smallest (576 numbers) is 3%
        fan_in = weight[0].numel()
        assert weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.12)
        assert abs(weight.mean().item()) < 5 * (2 / fan_in / weight.numel()) ** 0.5
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):  # of convolutions, BatchNorm and head
            assert parameter.count_nonzero() == 0, name
        elif parameter.dim() == 1:  # gamma of BatchNorm
            assert torch.equal(parameter, torch.ones_like(parameter)), name


@both
@pytest.mark.parametrize("scale", [0.7, 0.5, 0])
def test_init_scale_multiplies_the_weights_of_the_head_and_nothing_else(build, scale):
    torch.manual_seed(3)
    whole = build(channels=1, size=28, ways=5).state_dict()
    torch.manual_seed(3)
    network = build(channels=1, size=28, ways=5, init_scale=scale)
    for name, value in network.state_dict().items():
        assert torch.equal(value, whole[name] * scale if name == "head.weight" else whole[name]), name
    if scale == 0:
        assert network(torch.randn(3, 1, 28, 28)).count_nonzero() == 0


@both
def test_zero_head_zeroes_weight_and_bias_in_place_and_leaves_the_encoder(build):
    network = build(channels=1, size=28, ways=5)
    torch.nn.init.normal_(network.head.bias)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    weight, bias = network.head.weight, network.head.bias
    zero_head(network.head)
    assert network.head.weight is weight and network.head.bias is bias and weight.requires_grad
    assert weight.count_nonzero() == bias.count_nonzero() == 0
    for name, value in network.state_dict().items():
        assert name.startswith("head.") or torch.equal(value, before[name]), name


@both
def test_batchnorm_uses_the_batch_at_hand_always_and_remembers_nothing(build):
    torch.manual_seed(0)
    network = build(channels=1, size=28, ways=5)
    assert list(network.buffers()) == []
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}

    images = torch.randn(12, 1, 28, 28)
    training = network.train()(images)
    network(5 + 3 * torch.randn(12, 1, 28, 28))  # another batch, of other statistics, leaves no trace
    assert torch.equal(network.eval()(images), training)
    assert not torch.allclose(network(images[:6]), training[:6], atol=1e-3)


@per_model_file
@pytest.mark.parametrize("channels", [1, 3])
def test_smallest_image_is_the_smallest_that_leaves_a_feature(path, channels):
    smallest = OmegaConf.load(path).model.smallest_image
    _, network = from_file(path, size=smallest, channels=channels)
    logits = network(torch.randn(10, channels, smallest, smallest))
    assert logits.shape == (10, 5) and logits.isfinite().all()
    assert logits.std() > 0

    with warnings.catch_warnings(), pytest.raises(RuntimeError):
        warnings.simplefilter("ignore")  # torch says that it has no weight to initialise
        _, network = from_file(path, size=smallest - 1, channels=channels)
        network(torch.randn(10, channels, smallest - 1, smallest - 1))


@per_model_file
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [25, 28, 33, 84])
def test_any_larger_image_and_channel_count_works(path, size, channels):
    """The head fits what the encoder gives, odd sizes included."""
    _, network = from_file(path, size=size, channels=channels, ways=3)
    images = torch.randn(4, channels, size, size)
    assert network(images).shape == (4, 3)
    assert network.encoder(images).shape[1] == network.head.in_features


@per_model_file
def test_the_files_of_conf_model_say_their_name_and_hand_over_every_knob(path):
    cfg, network = from_file(path, size=28, channels=3, ways=7, init_scale=0)
    assert cfg.name == path.stem
    assert network.head.out_features == 7 and network.head.weight.count_nonzero() == 0
    convolutions = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)]
    assert convolutions[0].in_channels == 3
    assert [layer.out_channels for layer in convolutions] == [cfg.width] * 4
    assert cfg.width == {"conv4_strided": 64, "conv4_pooled": 32}[path.stem]
