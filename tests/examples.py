"""Small networks and tasks that the tests of several packages compute on, and what they compare."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from fewshot.batched import engine as batched
from fewshot.config.tree import CONF, settings
from fewshot.data.task import Task
from fewshot.inner_loop import InnerLoop
from fewshot.maml import sequential
from fewshot.models.head import share_rows, zero_head
from fewshot.models.network import Network, conv4_pooled, conv4_strided
from fewshot.predict.pretrained import Preprocess, Pretrained
from fewshot.training.learner import Learner

KNOBS = {"inner_lr": 0.1, "inner_steps": 2}

NETWORKS = {
    "conv4_strided": partial(conv4_strided, channels=1, size=33, width=8),
    "conv4_pooled": partial(conv4_pooled, channels=2, size=17, width=10),
}
all_at_once, one_at_a_time = (
    SimpleNamespace(
        meta_gradient=partial(batched.meta_gradient, tasks_at_once=number),
        step_accuracies=partial(batched.step_accuracies, tasks_at_once=number),
    )
    for number in (99, 1)
)
each_engine = pytest.mark.parametrize("engine", [sequential, all_at_once], ids=["sequential", "batched"])
each_way = pytest.mark.parametrize(
    "engine", [sequential, all_at_once, one_at_a_time], ids=["sequential", "batched", "batched one at a time"]
)
each_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
each_order = pytest.mark.parametrize("first_order", [True, False], ids=["FOMAML", "SOMAML"])
each_head = pytest.mark.parametrize("zeroed", [False, True], ids=["random", "zeroed"])


def draw(*, tasks=2, ways=3, shots=1, queries=2, shape=(2, 3), seed=0, spread=0.5):
    """float64 tasks whose classes are clouds around random centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(tasks, ways, 1, *shape, generator=generator, dtype=torch.float64)

    def images(per_class):
        noise = torch.randn(tasks, ways, per_class, *shape, generator=generator, dtype=torch.float64)
        labels = torch.arange(ways).repeat_interleave(per_class).expand(tasks, -1)
        return (centres + spread * noise).flatten(1, 2), labels

    return Task(*images(shots), *images(queries))


def tiny(*, ways=3, features=4, inputs=6, zeroed=False):
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(inputs, features), nn.Tanh())
    return prepared(Network(encoder, features, ways), zeroed)


def convolutional(build, tasks, *, zeroed=False):
    torch.manual_seed(1)
    return prepared(build(ways=int(tasks.query_labels.max()) + 1), zeroed)


def prepared(network, zeroed):
    """In float64, with biases that are not the zeros they start from."""
    network = network.double()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    if zeroed:
        zero_head(network.head)
    return network


def images_for(build, **knobs):
    return draw(shape=(build.keywords["channels"], build.keywords["size"], build.keywords["size"]), **knobs)


def gradients(network):
    return {name: p.grad.clone() for name, p in network.named_parameters()}


def loop(*, inner_lr=0.0, inner_steps=1, first_order=True, **fields):
    """An inner loop by its fields, and what travels beside it: what an engine takes after network and tasks.

    inner_lr: one number, or the learned rates; step_losses: the weights of the step losses, or None.
    """
    learned = not isinstance(inner_lr, float | int)
    weights = fields.pop("step_losses", None)
    value = InnerLoop(inner_steps, 0.0 if learned else inner_lr, first_order, learned_inner_lr=learned, **fields)
    return value, tuple(inner_lr) if learned else (), weights


def evaluations(*, steps, zeroing, **fields):
    """For step_accuracies: an evaluation of so many steps for each of the modes, and the learned rates."""
    value, eta, _ = loop(**fields)
    return [value.evaluation(steps, mode) for mode in zeroing], eta


def meta_gradient(engine, network, tasks, tasks_at_once=None, execute=None, **knobs):
    """The outer gradient by name, from .grad = None, and what the engine returns; knobs: see `loop`."""
    network.zero_grad(set_to_none=True)
    engine_knobs = {"tasks_at_once": tasks_at_once, "execute": execute}
    engine_knobs = {name: value for name, value in engine_knobs.items() if value is not None}
    returned = engine.meta_gradient(network, tasks, *loop(**knobs), **engine_knobs)
    return gradients(network), returned


def assert_close(actual, expected, tolerance):
    """Every parameter's gradient, relative to that gradient's own size."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        value = torch.as_tensor(value)
        assert value.norm() > 0, f"{name}: nothing to compare"
        assert ((actual[name] - value).norm() / value.norm()).item() < tolerance, name


def vector(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """As a whole: a foreign network may have parameters whose gradient is zero but for rounding."""
    actual, expected = vector(actual), vector(expected)
    assert ((actual - expected).norm() / expected.norm()).item() < tolerance


def untrained(*overrides: str) -> Pretrained:
    """A model of three ways in float64, with small random biases, so that none of them is without effect."""
    overrides = ("ways=3", "model.width=4", *overrides)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", [*overrides])
    torch.manual_seed(1)
    learner = Learner.from_config(cfg).double()
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if cfg.algo.head == "shared":
        share_rows(learner.network.head)
    return Pretrained(learner, Preprocess.from_config(settings(cfg)["dataset"]), settings(cfg))


def images(count: int, seed: int) -> list[np.ndarray]:
    """(28, 28) uint8 each."""
    return list(np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8))
