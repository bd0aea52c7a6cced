"""The networks: sizes, block order, initialisation, BatchNorm, and the images they can take."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fewshot.config.tree import CONF
from fewshot.inner_loop import InnerLoop
from fewshot.models import resnet12
from fewshot.models.head import prototype_head, share_gradient, zero_head
from fewshot.models.network import conv4_pooled, conv4_strided, drop_squares, dropping, drops

conv4_64 = partial(conv4_pooled, norm_first=True)
NETWORKS = {"conv4_strided": conv4_strided, "conv4_pooled": conv4_pooled, "conv4_64": conv4_64}
each_conv4 = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
each_network = pytest.mark.parametrize(
    "build", [*NETWORKS.values(), partial(resnet12, width=4)], ids=[*NETWORKS, "resnet12"]
)
MODEL_FILES = sorted(path for path in (CONF / "model").glob("*.yaml") if path.stem != "module")  # test_any_module.py
per_model_file = pytest.mark.parametrize("path", MODEL_FILES, ids=[path.stem for path in MODEL_FILES])


def from_file(path, *, size, channels=1, ways=5, init_scale=1, width=None):
    """The configuration and the network of a file in conf/model."""
    rest = {"dataset": {"channels": channels, "size": size}, "ways": ways, "init_scale": init_scale, "seed": 0}
    cfg = OmegaConf.merge(OmegaConf.load(path), rest, {"model": {"width": width}} if width else {})
    return cfg.model, instantiate(cfg.model.network)


def test_the_omniglot_network_has_91781_parameters():
    network = conv4_strided(channels=1, size=28, ways=5)
    assert sum(p.numel() for p in network.parameters()) == 91_781
    assert network.encoder(torch.randn(2, 1, 28, 28)).shape == (2, 64)


def test_the_miniimagenet_network_has_800_features():
    network = conv4_pooled(channels=3, size=84, ways=5)
    assert network.encoder(torch.randn(2, 3, 84, 84)).shape == (2, 800)
    assert network.head.weight.shape == (5, 800)


def test_the_conv4_of_the_literature_has_113088_parameters_and_1600_features():
    _, network = from_file(CONF / "model" / "conv4_64.yaml", size=84, channels=3)
    assert sum(p.numel() for p in network.encoder.parameters()) == 113_088
    assert network.head.in_features == 1600


def test_resnet12_has_the_12_4_million_parameters_of_the_literature():
    _, network = from_file(CONF / "model" / "resnet12.yaml", size=84, channels=3)
    assert sum(p.numel() for p in network.encoder.parameters()) == 12_424_320
    assert network.head.in_features == 640
    assert not drops(network)


@each_conv4
def test_a_block_is_convolution_relu_batchnorm_then_pool(build):
    """Against the layers written out, with gamma and beta that make every other order give something else.

    In conv4_64 BatchNorm comes before ReLU.
    """
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
        if build is conv4_64:
            features = normalised(features, gamma, beta).clamp(min=0)
        else:
            features = normalised(features.clamp(min=0), gamma, beta)
        if build is not conv4_strided:
            features = F.max_pool2d(features, 2)
    w, b = parameters
    expected = features.flatten(1) @ w.T + b

    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


def normalised(x, gamma, beta):
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
    return (x - mean) / (variance + 1e-5).sqrt() * gamma.view(-1, 1, 1) + beta.view(-1, 1, 1)


def test_resnet12_is_what_is_written_out_here():
    torch.manual_seed(0)
    network = resnet12(channels=2, size=33, ways=4, width=4, drop_block=0.5).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    images = torch.randn(7, 2, 33, 33, dtype=torch.float64)

    parameters, x = iter(network.parameters()), images
    for _ in range(4):
        inside = x
        for layer in range(3):
            inside = normalised(F.conv2d(inside, next(parameters), padding=1), next(parameters), next(parameters))
            if layer < 2:
                inside = torch.where(inside > 0, inside, 0.1 * inside)
        shortcut = normalised(F.conv2d(x, next(parameters)), next(parameters), next(parameters))
        x = inside + shortcut
        x = F.max_pool2d(torch.where(x > 0, x, 0.1 * x), 2)
    w, b = parameters
    expected = x.mean((2, 3)) @ w.T + b

    torch.testing.assert_close(network(images), expected, rtol=1e-10, atol=1e-10)


def test_the_head_of_prototypes_is_exact_under_autocast():
    """In bfloat16 |c|^2 of many features is off by whole logits."""
    features, labels = torch.randn(10, 800, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 5
    loop = InnerLoop(1, 0.1, first_order=True, head="prototypes")
    exact = prototype_head(loop, features.double(), labels, 5)
    with torch.autocast("cpu", torch.bfloat16):
        head = prototype_head(loop, features, labels, 5)
    assert head["bias"].dtype == torch.float32
    torch.testing.assert_close(head["bias"].double(), exact["bias"], rtol=1e-5, atol=0)


# DropBlock


@pytest.mark.parametrize("size", [2, 4, 5, 10])
def test_that_share_of_the_features_is_dropped_and_the_rest_makes_up_for_it(size):
    torch.manual_seed(0)
    dropped = drop_squares(torch.ones(64, 128, size, size), 0.1)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, rel=0.1)  # squares that overlap drop less
    assert dropped.mean().item() == pytest.approx(1, rel=1e-4)
    if size == 5:
        whole = (dropped == 0).flatten(2).float().mean(2)
        assert set(whole.unique().tolist()) == {0, 1}  # squares of 5 x 5


def test_dropblock_drops_inside_dropping_alone_by_seed_and_position():
    def outputs(seed, position):
        torch.manual_seed(0)
        network = resnet12(channels=1, size=16, ways=3, width=4, drop_block=0.3, seed=seed)
        images = torch.randn(6, 1, 16, 16)
        with dropping(network, position):
            first, again = network(images), network(images)
        assert not torch.equal(first, again)  # anew in every forward
        assert torch.equal(network.train()(images), network.eval()(images))
        return torch.cat([first, again])

    torch.testing.assert_close(outputs(0, 5), outputs(0, 5), rtol=0, atol=0)
    assert not torch.equal(outputs(0, 5), outputs(0, 6))
    assert not torch.equal(outputs(0, 5), outputs(1, 5))


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


@each_network
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


@each_network
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


@each_network
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
    _, network = from_file(path, size=smallest, channels=channels, width=8)
    logits = network(torch.randn(10, channels, smallest, smallest))
    assert logits.shape == (10, 5) and logits.isfinite().all()
    assert logits.std() > 0

    with warnings.catch_warnings(), pytest.raises(RuntimeError):
        warnings.simplefilter("ignore")  # torch says that it has no weight to initialise
        _, network = from_file(path, size=smallest - 1, channels=channels, width=8)
        network(torch.randn(10, channels, smallest - 1, smallest - 1))


@per_model_file
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [25, 28, 33, 84])
def test_any_larger_image_and_channel_count_works(path, size, channels):
    """The head fits what the encoder gives, odd sizes included."""
    _, network = from_file(path, size=size, channels=channels, ways=3, width=8)
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
    expected = [64] * 4 + [160] * 4 + [320] * 4 + [640] * 4 if path.stem == "resnet12" else [cfg.width] * 4
    assert [layer.out_channels for layer in convolutions] == expected
    assert cfg.width == (32 if path.stem == "conv4_pooled" else 64)


def test_the_gradient_of_one_vector_for_all_rows_is_the_sum_of_theirs():
    """Of a loss in which it does not vanish, as it does in a softmax."""
    torch.manual_seed(0)
    head, x, wanted = torch.nn.Linear(4, 3).double(), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    v, b = torch.randn(1, 4).double().requires_grad_(), torch.randn(1).double().requires_grad_()
    head.weight.data, head.bias.data = v.detach().expand(3, -1).clone(), b.detach().expand(3).clone()
    F.mse_loss(F.linear(x, v.expand(3, -1), b.expand(3)), wanted).backward()
    F.mse_loss(head(x), wanted).backward()
    share_gradient(head)
    torch.testing.assert_close(head.weight.grad, v.grad.expand(3, -1))
    torch.testing.assert_close(head.bias.grad, b.grad.expand(3))
