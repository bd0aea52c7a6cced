"""Networks of other people: found apart, refused in one line, and through both engines like the project's own."""

import logging

import pytest
import torch
import torch.nn.functional as F
import torchvision
from examples import KNOBS, assert_same, draw, meta_gradient, prepared
from torch import Tensor, nn

from fewshot.batched import engine as batched
from fewshot.errors import UserError
from fewshot.maml import sequential
from fewshot.models import resnet12
from fewshot.models.any_module import network_from_module
from fewshot.models.network import conv4_pooled, dropping
from fewshot.theory.closed_forms import closed_form_gradients
from fewshot.theory.features import Features


class Small(nn.Module):
    """Everything that torch.nn lets one do in place, and a mean written by hand."""

    def __init__(self, tail: nn.Module | None = None) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(0.1, inplace=True))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8))
        self.norm, self.pool = nn.LayerNorm(8), nn.AdaptiveAvgPool2d(2)
        self.hidden, self.output = nn.Linear(8, 8), nn.Linear(8, 9)
        self.tail = tail

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        y = self.second(x)
        y += x
        x = self.norm(self.pool(y.relu_()).mean((2, 3)))
        x = self.output(F.silu(self.hidden(x)))
        return x if self.tail is None else self.tail(x)


def resnet18() -> nn.Module:
    """torchvision's, less what makes it large: the first block of each of the first two stages."""
    module = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    module.layer3, module.layer4, module.fc = nn.Identity(), nn.Identity(), nn.Linear(128, 10)
    return module


def mobilenet_v2() -> nn.Module:
    return torchvision.models.MobileNetV2(
        width_mult=0.1, inverted_residual_setting=[[1, 8, 1, 1], [3, 16, 2, 1], [3, 16, 2, 1]], round_nearest=8
    )


FOREIGN = {  # what makes it, its channels, its head, whether tasks lie side by side in the channels
    "resnet18": (resnet18, 3, "fc", True),
    "mobilenet_v2": (mobilenet_v2, 3, "classifier.1", True),
    "in place and by hand": (Small, 2, "output", False),
}
each_foreign = pytest.mark.parametrize("name", FOREIGN)
each_order = pytest.mark.parametrize("first_order", [True, False], ids=["FOMAML", "SOMAML"])


@each_foreign
def test_the_head_is_found_and_made_anew_and_the_encoder_keeps_its_weights(name):
    build, channels, head, _ = FOREIGN[name]
    torch.manual_seed(0)
    module = build()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    images, last = torch.randn(4, channels, 16, 16), module.get_submodule(head)
    for layer in module.modules():  # what the whole gives where BatchNorm takes the batch at hand and nothing drops
        layer.training = isinstance(layer, nn.BatchNorm2d)
    expected = module(images)

    network = network_from_module(module, channels=channels, size=16, ways=5, head=head)
    assert network.head.out_features == 5 and network.head is not last
    torch.testing.assert_close(last(network.encoder(images)), expected)
    for key, value in network.encoder.state_dict().items():
        assert torch.equal(value, state[key]), key
    left_out = {key for key in state if key.startswith(f"{head}.") or "running" in key or "num_batches" in key}
    assert network.encoder.state_dict().keys() == state.keys() - left_out
    assert {key.split(".")[0] for key, _ in network.named_parameters()} == {"encoder", "head"}
    assert list(network.buffers()) == []
    assert torch.equal(network.train()(images), network.eval()(images))

    network = network_from_module(build(), channels=channels, size=16, ways=5, init_scale=0, head_bias=False)
    assert network.head.in_features == last.in_features
    assert network.head.bias is None and network.head.weight.count_nonzero() == 0
    assert network.encoder.get_submodule(head).__class__ is nn.Identity


def test_the_new_head_begins_as_the_projects_does():
    torch.manual_seed(0)
    head = network_from_module(Small(), channels=2, size=16, ways=500).head
    assert head.weight.std().item() == pytest.approx((2 / 8) ** 0.5, rel=0.05)
    assert head.bias.count_nonzero() == 0


OURS = {
    "resnet12": lambda: resnet12(channels=2, size=17, ways=3, width=4),
    "conv4_64": lambda: conv4_pooled(channels=2, size=17, ways=3, width=6, norm_first=True),
}


@pytest.mark.parametrize("name", [*OURS, *FOREIGN])
@each_order
def test_both_engines_give_the_same_gradient(name, first_order, monkeypatch):
    torch.manual_seed(0)
    build, channels, _, side_by_side = FOREIGN.get(name, (None, 2, None, True))
    network = OURS[name]() if name in OURS else network_from_module(build(), channels=channels, size=17, ways=3)
    network, tasks = prepared(network, False), draw(shape=(channels, 17, 17))
    before = [field.clone() for field in tasks]
    expected, (_, accuracies) = meta_gradient(sequential, network, tasks, first_order=first_order, **KNOBS)
    used = []
    monkeypatch.setattr(batched, "vmap", lambda *args: used.append(1) or torch.func.vmap(*args))
    for together in (1, 2):
        gradient, (_, accuracy) = meta_gradient(
            batched, network, tasks, first_order=first_order, tasks_at_once=together, **KNOBS
        )
        assert_same(gradient, expected)
        assert torch.equal(accuracy, accuracies)
    assert bool(used) != side_by_side
    assert all(torch.equal(field, value) for field, value in zip(tasks, before, strict=True))


@pytest.mark.parametrize("name", ["resnet12", "in place and by hand"])
def test_the_outer_gradient_is_that_of_the_loop_written_out(name):
    """Second order, by autograd through plain SGD on the functional network: neither engine has a part in it."""
    torch.manual_seed(0)
    network = OURS[name]() if name in OURS else network_from_module(Small(), channels=2, size=17, ways=3)
    network, tasks = prepared(network, False), draw(tasks=1, shape=(2, 17, 17))
    theta = adapted = dict(network.named_parameters())
    for _ in range(KNOBS["inner_steps"]):
        loss = F.cross_entropy(torch.func.functional_call(network, adapted, tasks.support[0]), tasks.support_labels[0])
        steps = torch.autograd.grad(loss, list(adapted.values()), create_graph=True)
        adapted = {key: p - KNOBS["inner_lr"] * step for (key, p), step in zip(adapted.items(), steps, strict=True)}
    loss = F.cross_entropy(torch.func.functional_call(network, adapted, tasks.query[0]), tasks.query_labels[0])
    expected = dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))
    for engine in (sequential, batched):
        gradient, _ = meta_gradient(engine, network, tasks, first_order=False, **KNOBS)
        assert_same(gradient, expected)


def test_dropblock_in_the_batched_engine_treats_each_task_alone():
    """Of each a share is dropped, and the rest makes up for its own share."""
    network = resnet12(channels=1, size=40, ways=3, width=4, drop_block=0.3)
    seen = []
    network.encoder[3].register_forward_hook(lambda layer, inputs, output: seen.append((inputs[0], output)))
    tasks = draw(tasks=3, shape=(1, 40, 40), queries=8)
    tasks = tasks._replace(support=tasks.support.float(), query=tasks.query.float())
    with dropping(network, 0):
        meta_gradient(batched, network, tasks, first_order=True, tasks_at_once=3, **KNOBS)
    assert len(seen) == 3  # two inner steps and the queries
    for x, y in seen:
        kept = (y / x).chunk(3)
        assert all(part.mean().item() == pytest.approx(1, rel=1e-4) for part in kept)
        assert all(0.05 < (part == 0).float().mean().item() < 0.5 for part in kept)
        assert not any(torch.equal(kept[0], part) for part in kept[1:])


def test_the_closed_forms_hold_for_a_foreign_encoder():
    """docs/method.md 2.5, which knows of .encoder and .head alone."""
    torch.manual_seed(0)
    network, tasks = (
        prepared(network_from_module(resnet18(), channels=3, size=16, ways=3), False),
        draw(tasks=1, shape=(3, 16, 16)),
    )
    expected, _ = meta_gradient(sequential, network, tasks, first_order=False, adapted="head", **KNOBS)
    phi_s, phi_q = network.encoder(tasks.support[0]), network.encoder(tasks.query[0])
    labels = tasks.support_labels[0], tasks.query_labels[0]
    features = Features(
        phi_s.detach(),
        labels[0],
        phi_q.detach(),
        labels[1],
        network.head.weight.detach(),
        network.head.bias.detach(),
    )
    closed = closed_form_gradients(features, first_order=False, **KNOBS)
    contrast = (closed.query_features * phi_q).sum() + (closed.support_features * phi_s).sum()
    parameters = {f"encoder.{name}": p for name, p in network.encoder.named_parameters()}
    gradient = dict(zip(parameters, torch.autograd.grad(contrast, list(parameters.values())), strict=True))
    assert_same(gradient, {name: expected[name] for name in gradient})


class NoLinear(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.fc(x.flatten(1)[:, :12])


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.dropout(x.flatten(1)[:, :12]))


def flat(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), *layers)


def frozen() -> nn.Module:
    module = resnet18()
    module.conv1.requires_grad_(False)
    return module


class Overwrites(nn.Module):
    """What the convolution's gradient needs is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), flat(nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x += self.two(x)
        return self.fc(x)


def tied() -> nn.Module:
    line = nn.Linear(12, 12)
    return flat(line, nn.ReLU(), line)


class Cosine(nn.Linear):
    """The inner loop would adapt a plain linear layer in its place."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.normalize(x), F.normalize(self.weight), self.bias)


def hooked() -> nn.Module:
    module = flat(nn.Linear(12, 4))
    module[2].register_forward_hook(lambda layer, inputs, output: output.mul_(2))
    return module


REFUSED = {  # what makes it, model.head, how the line begins, what it says
    "no linear layer": (NoLinear, None, "model.module: NoLinear has no torch.nn.Linear", "give one that ends in it"),
    "no such name": (resnet18, "classifier", "model.head=classifier: ", "it has fc"),
    "no linear layer of that name": (resnet18, "layer1", "model.head=layer1: ", "it has fc"),
    "another is last": (Small, "hidden", "model.head=hidden: ", "use model.head=output"),
    "softmax after it": (lambda: Small(nn.Softmax(1)), "output", "model.module: the output of Small ", "(logits)"),
    "no module": (lambda: 3, None, "model.module: gives a int", "must make a torch.nn.Module"),
    "run twice": (tied, None, "model.module: Sequential runs 2 several times", "once, at the end"),
    "lines of numbers": (
        lambda: nn.Sequential(nn.Linear(16, 4)),
        None,
        "model.module: Sequential turns",
        "(2, classes)",
    ),
    "not used": (lambda: torchvision.models.GoogLeNet(init_weights=False), None, "model.module: aux1.", "no gradient"),
    "frozen": (frozen, None, "model.module: conv1.weight of ResNet gets no gradient", "must be trained"),
    "no gradient": (Overwrites, None, "model.module: Overwrites cannot be differentiated (one of", "in place"),
    "a buffer that changes": (Counts, None, "model.module: Counts changes its buffer calls", "no trace"),
    "dropout always": (Drops, None, "model.module: the output of Drops is not fc.weight times", "may be random"),
    "a head of cosines": (
        lambda: flat(Cosine(12, 4)),
        None,
        "model.module: the output of Sequential is not 2.",
        "plain",
    ),
    "a hook on the head": (hooked, None, "model.module: the output of Sequential is not 2.weight times", "plain"),
    "writes into its images": (
        lambda: nn.Sequential(nn.Hardtanh(0.2, 0.3, inplace=True), flat(nn.Linear(12, 3))),
        None,
        "model.module: Sequential writes into its images",
        "not work in place",
    ),
    "of float64": (lambda: flat(nn.Linear(12, 3)).double(), None, "dataset.channels=3 ", "weights of torch.float32"),
    "other size": (lambda: flat(nn.Linear(5, 3)), None, "dataset.channels=3 dataset.size=16: ", "mat1 and mat2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_encoder_and_head_is_refused_in_one_line(name):
    build, head, begin, remedy = REFUSED[name]
    with pytest.raises(UserError) as error:
        network_from_module(
            build(), channels=3 if build is not Small and name != "softmax after it" else 2, size=16, ways=5, head=head
        )
    message = str(error.value)
    assert message.startswith(begin), message
    assert remedy in message and "\n" not in message


def test_grey_images_for_a_network_of_colour_ones_are_refused():
    with pytest.raises(UserError, match=r"^dataset.channels=1 dataset.size=28: ResNet .* 3 channels.*; use a dataset"):
        network_from_module(resnet18(), channels=1, size=28, ways=5)


def test_dropout_is_left_out_and_a_line_says_so(caplog):
    with caplog.at_level(logging.INFO):
        network_from_module(mobilenet_v2(), channels=3, size=16, ways=5)
    assert [r.message for r in caplog.records] == [
        "model=module: the dropout of MobileNetV2 (classifier.0) is left out"
    ]


class Ordered(nn.Module):
    """With buffers of whole numbers and of infinite ones; the memory of a weight is in another order than its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.arange(12).flip(0))
        self.register_buffer("mask", torch.full((5, 5), -torch.inf).triu(1))
        self.first, self.fc = nn.Linear(12, 6), nn.Linear(6, 5)
        self.first.weight = nn.Parameter(self.first.weight.detach().T.contiguous().T)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.first(x.flatten(1)[:, self.order]))


def test_a_network_with_whole_numbers_and_a_mask_in_it_is_tested_and_goes_on(run, tmp_path):
    call, folder = ("model=module", "model.module={_target_: test_any_module.Ordered}"), tmp_path / "run"
    run(folder, *call)
    (folder / "results.json").unlink()
    assert (run(folder, *call, "iterations=8") / "results.json").exists()
    content = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    (mask,) = (name for name in content["state_dict"] if name.endswith("mask"))
    content["state_dict"][mask][0, 0] = torch.nan
    torch.save(content, tmp_path / "nan.ckpt")
    with pytest.raises(UserError, match="weights that are not finite numbers"):
        run(tmp_path / "test", *call, f"checkpoint={tmp_path / 'nan.ckpt'}", "fit=false")


class Shares(nn.Module):
    """One layer by two names, and one weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(2, 6, 3), nn.Linear(6, 6)
        self.again, self.tied, self.fc = self.inner, nn.Linear(6, 6), nn.Linear(6, 4)
        self.tied.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).mean((2, 3))
        for layer in (self.inner, self.again, self.tied):
            x = torch.tanh(layer(x))
        return self.fc(x)


@each_order
def test_a_layer_by_two_names_and_a_weight_in_two_layers_are_each_one(first_order):
    torch.manual_seed(0)
    network = prepared(network_from_module(Shares(), channels=2, size=9, ways=3), False)
    tasks, weight = draw(shape=(2, 9, 9)), network.encoder.inner.weight
    expected, _ = meta_gradient(sequential, network, tasks, first_order=first_order, **KNOBS)
    for together in (2, 1):
        actual, _ = meta_gradient(batched, network, tasks, first_order=first_order, tasks_at_once=together, **KNOBS)
        assert_same(actual, expected)
    assert network.encoder.inner.weight is weight and isinstance(weight, nn.Parameter)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).mT[:, :6, :].repeat(1, 1, 2)
        return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_attention_has_a_derivative_in_the_batched_engine_too():
    torch.manual_seed(0)
    network, tasks = prepared(network_from_module(Attends(), channels=2, size=5, ways=3), False), draw(shape=(2, 5, 5))
    expected, _ = meta_gradient(sequential, network, tasks, first_order=True, **KNOBS)
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        actual, _ = meta_gradient(batched, network, tasks, first_order=True, **KNOBS)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    assert_same(actual, expected)


class Keeps(nn.Module):
    """Keeps its features for whoever looks at them later, and a weight that is made anew in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.fc = nn.utils.weight_norm(nn.Conv2d(2, 6, 3)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.first(x).relu().mean((2, 3))
        return self.fc(self.features)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_network_that_keeps_what_it_computes_is_shared_out_over_threads():
    torch.manual_seed(0)
    network, tasks = prepared(network_from_module(Keeps(), channels=2, size=9, ways=3), False), draw(shape=(2, 9, 9))
    expected, _ = meta_gradient(sequential, network, tasks, first_order=True, **KNOBS)
    torch.set_num_threads(2)  # the next test sets it back
    actual, _ = meta_gradient(batched, network, tasks, first_order=True, **KNOBS)
    assert_same(actual, expected)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.fc = nn.GRU(28, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rows(x[:, 0])[0][:, -1])


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(28, 2, batch_first=True), nn.Linear(28, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0]
        return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_a_network_that_only_one_engine_can_run_is_run_by_that_one(run, tmp_path, caplog):
    call = ("model=module", "model.module={_target_: test_any_module.Recurrent}", "iterations=1", "val_every=1")
    with pytest.raises(
        UserError, match=r"^engine=batched: cannot run this network \(.*gru.*\); use engine=sequential$"
    ):
        run(tmp_path / "batched", *call, "engine=batched")
    with caplog.at_level(logging.INFO):
        run(tmp_path / "auto", *call, "engine=auto", "threads=2")
    assert any("engine=auto: sequential, since batched cannot run this network" in r.message for r in caplog.records)


@pytest.mark.parametrize("engine", ["sequential", "batched"])
def test_a_network_with_attention_trains_in_second_order(run, tmp_path, engine):
    call = ("model=module", "model.module={_target_: test_any_module.Patches}", "iterations=1", "val_every=1")
    run(tmp_path / "run", *call, "algo=somaml", "inner_steps=2", f"engine={engine}")


def compiled() -> nn.Module:
    return torch.compile(flat(nn.Linear(4, 4)), backend="eager")


def partly_compiled() -> nn.Module:
    return nn.Sequential(compiled(), nn.ReLU(), nn.Linear(4, 5))


@pytest.mark.parametrize("makes", ["compiled", "partly_compiled"])
def test_a_compiled_module_is_refused_in_one_line(run, tmp_path, makes):
    with pytest.raises(UserError, match=r"^model: torch\.compile's modules cannot be adapted; give the module itself$"):
        run(tmp_path / "run", "model=module", f"model.module={{_target_: test_any_module.{makes}}}")
