"""Both engines against what the paper's released code computes from the same weights and tasks.

authors_code.json holds its figures, computed in float64 on a CPU, for inputs that the formula below makes: no
random generator, no dataset. Its gradients are stored as their norm and their product with a direction.
"""

import copy
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from examples import evaluations, loop

from fewshot.batched import engine as batched
from fewshot.data.task import Task
from fewshot.maml import sequential
from fewshot.models.network import conv4_strided
from fewshot.training.outer_step import OuterStep

FIGURES = json.loads((Path(__file__).parent / "authors_code.json").read_text())
WAYS, TASKS, QUERIES, INNER_LR = 5, 2, 3, FIGURES["inner_lr"]
# All parameters: four blocks of convolution (weight, bias) and BatchNorm (weight, bias), then the head.
SHAPES = [(64, 1, 3, 3), (64,), (64,), (64,)] + 2 * [(64, 64, 3, 3), (64,), (64,), (64,)]
SHAPES += [(64, 64, 2, 2), (64,), (64,), (64,), (WAYS, 64), (WAYS,)]
each_engine = pytest.mark.parametrize("engine", [sequential, batched], ids=["sequential", "batched"])


@cache
def uniform(shape, key):
    """Numbers in [0, 1) that look random, float64: a hash of each element's number, the same on every machine."""
    with np.errstate(over="ignore"):
        h = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        h += np.uint64(key + 1) * np.uint64(0xD1B54A32D192ED03)
        for shift, factor in ((31, 0xBF58476D1CE4E5B9), (29, 0x94D049BB133111EB)):
            h = (h ^ (h >> np.uint64(shift))) * np.uint64(factor)
        h ^= h >> np.uint64(32)
    return ((h >> np.uint64(11)).astype(np.float64) / 2.0**53).reshape(shape)


def draw(shots):
    """Two tasks: an image that looks random for each class, and noise on it, class after class."""
    fields = []
    for number in (shots, QUERIES):
        images = [
            0.6 * uniform((28, 28), 1000 * b + c)
            + 0.4 * uniform((28, 28), 50_000 + 10_000 * number + 1000 * b + 20 * c + i)
            for b in range(TASKS)
            for c in range(WAYS)
            for i in range(number)
        ]
        fields.append(torch.from_numpy(np.stack(images)).view(TASKS, WAYS * number, 1, 28, 28))
        fields.append(torch.arange(WAYS).repeat_interleave(number).expand(TASKS, -1))
    return Task(*fields)


def weights(number, zeroed):
    """The value of parameter `number`: as spread as Kaiming's initialisation, or near 1 (BatchNorm's weight) or 0."""
    shape = SHAPES[number]
    centred = 2 * uniform(shape, 900_000 + number) - 1
    if zeroed and number >= 16:
        return 0 * centred
    if len(shape) > 1:
        return centred * (6 / np.prod(shape[1:])) ** 0.5
    return 1 + 0.2 * centred if number % 4 == 2 and number < 16 else 0.1 * centred


def directions():
    """One for every parameter, which look random: the gradient's product with it is one of the figures."""
    return [torch.from_numpy(2 * uniform(shape, 990_000 + number) - 1) for number, shape in enumerate(SHAPES)]


def exact(accuracies):
    """Means over the tasks, in float64, of shares of the queries in float32."""
    queries = WAYS * QUERIES
    return (accuracies.double() * queries).round().mean(0) / queries


def computed(engine, inner_lr, *, first_order, zeroed_head, shots):
    """{inner_steps: what this program computes, under the names that the figures have}"""
    network, tasks = conv4_strided(channels=1, size=28, ways=WAYS).double(), draw(shots)
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters()):
            parameter.copy_(torch.from_numpy(weights(number, zeroed_head)))
        before = [
            torch.stack([F.cross_entropy(network(x), y) for x, y in zip(*half, strict=True)]).mean().item()
            for half in (tasks[:2], tasks[2:])
        ]
    off, on = engine.step_accuracies(network, tasks, *evaluations(inner_lr=inner_lr, steps=3, zeroing=(False, True)))
    test = {"zeroing_off": exact(off), "zeroing_on": exact(on)}
    losses, results = [before[1]], {}
    for steps in (1, 2, 3):
        theta = copy.deepcopy(network)
        loss, _ = engine.meta_gradient(
            theta, tasks, *loop(inner_lr=inner_lr, inner_steps=steps, first_order=first_order)
        )
        losses.append(loss.mean().item())
        gradients = [parameter.grad.clone() for parameter in theta.parameters()]
        OuterStep(0.001).of(theta.parameters()).step()
        results[steps] = {
            "support_loss_before": before[0],
            "query_loss_after_step": list(losses),
            "query_accuracy_after_step": test["zeroing_off"][: steps + 1],
            "gradient_norm": [gradient.norm() for gradient in gradients],
            "gradient_along_direction": [(g * d).sum() for g, d in zip(gradients, directions(), strict=True)],
            "after_one_adam_step_along_direction": [
                (p.detach() * d).sum() for p, d in zip(theta.parameters(), directions(), strict=True)
            ],
            "test_accuracy_after_step_3_steps": torch.stack(list(test.values())),
        }
    return results


def stated(setting):
    """The figures of a setting, after two and after three inner steps."""
    two = [figures for figures in FIGURES["settings"] if setting.items() <= figures.items()]
    assert [figures["inner_steps"] for figures in two] == [2, 3]
    return two


def differences(ours, figures):
    """{figure: the largest difference, relative to its size}; of a product, to the norms of what is multiplied."""
    of_directions = torch.stack([direction.norm() for direction in directions()])
    gradient = torch.tensor(figures["gradient_norm"], dtype=torch.float64)
    sizes = {"gradient_along_direction": gradient * of_directions, "after_one_adam_step_along_direction": of_directions}
    largest = {}
    for name, value in ours.items():
        stored = figures[name]
        stored = torch.tensor(list(stored.values()) if isinstance(stored, dict) else stored, dtype=torch.float64)
        difference = (torch.as_tensor(value, dtype=torch.float64) - stored).abs()
        largest[name] = (difference / sizes.get(name, stored)).max().item()
    return largest


@each_engine
@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("zeroed_head", [False, True], ids=["random", "zeroed"])
@pytest.mark.parametrize("first_order", [True, False], ids=["FOMAML", "SOMAML"])
def test_this_program_computes_what_the_released_code_computes(engine, first_order, zeroed_head, shots):
    setting = {"first_order": first_order, "zeroed_head": zeroed_head, "shots": shots}
    ours = computed(engine, INNER_LR, **setting)
    for figures in stated(setting):
        for name, difference in differences(ours[figures["inner_steps"]], figures).items():
            assert difference < 1e-10, (name, figures["inner_steps"])


@each_engine
def test_another_inner_lr_by_a_millionth_would_be_seen(engine):
    setting = {"first_order": True, "zeroed_head": True, "shots": 1}
    ours = computed(engine, INNER_LR + 1e-6, **setting)
    for figures in stated(setting):
        largest = differences(ours[figures["inner_steps"]], figures)
        moved = {name for name, difference in largest.items() if difference > 1e-9}
        assert moved == {
            "query_loss_after_step",
            "gradient_norm",
            "gradient_along_direction",
            "after_one_adam_step_along_direction",
        }
