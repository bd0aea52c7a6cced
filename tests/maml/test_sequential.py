"""The inner loop of both engines: against arithmetic written out in NumPy, docs/method.md's closed forms, each other.

The arithmetic is a one-layer tanh encoder and a linear head with their gradients by hand; second order is the complex
step derivative Im f(x + ih) / h of inner loop and query loss together, exact to rounding, with no differentiation.
"""

from functools import cache, partial

import numpy as np
import pytest
import torch
from by_hand import (
    complex_step,
    head_only_gradient,
    np_accuracy,
    np_adapted,
    np_etas,
    np_family,
    np_gradient,
    np_loss,
    np_meta_gradient,
    np_steps,
    np_tasks,
    np_theta,
)
from examples import (
    NETWORKS,
    all_at_once,
    assert_close,
    convolutional,
    draw,
    each_engine,
    each_head,
    each_network,
    each_order,
    each_way,
    evaluations,
    gradients,
    images_for,
    loop,
    meta_gradient,
    tiny,
)
from torch import nn

from fewshot.batched import engine as batched
from fewshot.data.task import Task
from fewshot.maml import sequential
from fewshot.theory.closed_forms import closed_form_gradients
from fewshot.theory.features import Features

# The arithmetic. theta: A (d, p), a (d,), W (K, d), b (K,).


def test_the_arithmetic_itself_is_right():
    """The gradient by hand is the complex step derivative of the loss: the two halves of the reference agree."""
    network, tasks = tiny(), draw()
    x, labels, _, _ = next(np_tasks(tasks))
    for loss in ("cross_entropy", "mse"):
        by_hand = np_gradient(np_theta(network), x, labels, loss)
        by_step = complex_step(lambda theta, loss=loss: np_loss(theta, x, labels, loss), np_theta(network))
        for hand, step in zip(by_hand, by_step, strict=True):
            np.testing.assert_allclose(hand, step, rtol=1e-12, atol=1e-14)


@each_engine
@each_order
@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("shots", [1, 5])
@each_head
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_the_outer_gradient_is_that_of_the_arithmetic(engine, first_order, inner_steps, shots, zeroed, loss):
    network, tasks = tiny(zeroed=zeroed), draw(tasks=3, shots=shots, queries=4)
    inner_lr = 0.4 if loss == "cross_entropy" else 0.05
    knobs = {"inner_lr": inner_lr, "inner_steps": inner_steps, "first_order": first_order, "loss": loss}
    expected, losses, accuracies = np_meta_gradient(network, tasks, **knobs)
    actual, (loss, accuracy) = meta_gradient(engine, network, tasks, **knobs)
    assert_close(actual, expected, 1e-10)
    np.testing.assert_allclose(loss.numpy(), losses, rtol=1e-12)
    np.testing.assert_allclose(accuracy.numpy(), accuracies, rtol=1e-6)
    assert not loss.requires_grad and not accuracy.requires_grad


def test_first_and_second_order_are_not_the_same_gradient():
    """Else the tests above could not tell which of the two an engine computes."""
    network, tasks = tiny(), draw(tasks=3, queries=4)
    knobs = {"inner_lr": 0.4, "inner_steps": 1}
    first, second = (np_meta_gradient(network, tasks, first_order=order, **knobs)[0] for order in (True, False))
    for name in first:
        assert np.linalg.norm(first[name] - second[name]) > 0.01 * np.linalg.norm(second[name])


@each_way
@each_network
@each_order
@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.slow
def test_the_head_alone_adapts(engine, build, first_order, inner_steps, bias):
    """Against the closed forms of method.md 2.4 and 2.5, whose cotangents the encoder is given."""
    tasks = images_for(build, tasks=3, shots=2)
    network = convolutional(partial(build, head_bias=bias), tasks)
    knobs = {"inner_lr": 0.4, "inner_steps": inner_steps, "first_order": first_order}
    phi_S, phi_Q = (torch.stack([network.encoder(x) for x in images]) for images in (tasks.support, tasks.query))
    head = network.head.weight, network.head.bias
    closed = closed_form_gradients(Features(phi_S, tasks.support_labels, phi_Q, tasks.query_labels, *head), **knobs)
    surrogate = (closed.query_features * phi_Q).sum() + (closed.support_features * phi_S).sum()
    parameters = dict(network.encoder.named_parameters())
    by_encoder = torch.autograd.grad(surrogate / 3, parameters.values())
    expected = {f"encoder.{name}": g for name, g in zip(parameters, by_encoder, strict=True)}
    expected["head.weight"] = closed.weight.mean(0)
    if bias:
        expected["head.bias"] = closed.bias.mean(0)
    actual, (losses, accuracies) = meta_gradient(engine, network, tasks, adapted="head", **knobs)
    assert_close(actual, expected, 1e-10)
    torch.testing.assert_close(losses, closed.loss, rtol=1e-10, atol=0)
    evaluation = {"inner_lr": 0.4, "steps": inner_steps, "zeroing": (False, True), "adapted": "head"}
    evaluated, zeroed = engine.step_accuracies(network, tasks, *evaluations(**evaluation))
    assert torch.equal(evaluated[:, -1], accuracies)
    torch.testing.assert_close(zeroed[:, 0], torch.full((3,), 1 / 3))


@each_network
@each_order
@pytest.mark.parametrize("inner_steps", [1, 2, 3])
@pytest.mark.parametrize("shots", [1, 5])
@each_head
def test_the_engines_give_the_same_gradient(build, first_order, inner_steps, shots, zeroed):
    tasks = images_for(build, shots=shots)
    network = convolutional(build, tasks, zeroed=zeroed)
    knobs = {"inner_lr": 0.1, "inner_steps": inner_steps, "first_order": first_order}
    expected, (losses, accuracies) = meta_gradient(sequential, network, tasks, **knobs)
    actual, (loss, accuracy) = meta_gradient(all_at_once, network, tasks, **knobs)
    assert_close(actual, expected, 1e-10)
    torch.testing.assert_close(loss, losses, rtol=1e-10, atol=0)
    assert torch.equal(accuracy, accuracies)


@each_engine
@each_order
def test_the_gradient_is_a_mean_over_tasks_and_is_added_to_what_is_there(engine, first_order):
    build = NETWORKS["conv4_strided"]
    tasks = images_for(build, tasks=3)
    network = convolutional(build, tasks)
    knobs = {"inner_lr": 0.1, "inner_steps": 2, "first_order": first_order}
    alone = [meta_gradient(engine, network, Task(*(field[n : n + 1] for field in tasks)), **knobs)[0] for n in range(3)]
    mean = {name: sum(gradient[name] for gradient in alone) / 3 for name in alone[0]}
    together, _ = meta_gradient(engine, network, tasks, **knobs)
    assert_close(together, mean, 1e-10)  # so no task has seen another's images or BatchNorm statistics

    engine.meta_gradient(network, tasks, *loop(**knobs))  # without zero_grad
    assert_close(gradients(network), {name: 2 * value for name, value in mean.items()}, 1e-10)


@each_order
@pytest.mark.parametrize("tasks_at_once", [1, 2, 3, 7])
def test_how_many_tasks_are_in_memory_together_does_not_change_the_gradient(first_order, tasks_at_once):
    build = NETWORKS["conv4_strided"]
    tasks = images_for(build, tasks=5)
    network = convolutional(build, tasks)
    knobs = {"inner_lr": 0.1, "inner_steps": 2, "first_order": first_order}
    expected, (losses, accuracies) = meta_gradient(all_at_once, network, tasks, **knobs)
    actual, (loss, accuracy) = meta_gradient(batched, network, tasks, tasks_at_once=tasks_at_once, **knobs)
    assert_close(actual, expected, 1e-10)
    torch.testing.assert_close(loss, losses, rtol=1e-10, atol=0)
    assert torch.equal(accuracy, accuracies)


@each_way
@each_order
def test_the_gradient_leaves_the_parameters_as_they_are(engine, first_order):
    build = NETWORKS["conv4_pooled"]
    tasks = images_for(build)
    network = convolutional(build, tasks)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    engine.meta_gradient(network, tasks, *loop(inner_lr=0.4, inner_steps=2, first_order=first_order))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.is_leaf and p.requires_grad for p in network.parameters())


@each_engine
@each_network
@each_order
@each_head
@pytest.mark.slow
def test_training_with_one_inner_step_changes_every_parameter_and_learns(engine, build, first_order, zeroed):
    """The published code takes the step-1 query loss without a gradient, so that there it cannot."""
    tasks = images_for(build, queries=4)
    network = convolutional(build, tasks, zeroed=zeroed)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss, _ = engine.meta_gradient(network, tasks, *loop(inner_lr=0.1, first_order=first_order))
        optimizer.step()
        losses.append(loss.mean().item())
    for name, value in network.state_dict().items():
        assert not torch.equal(value, before[name]), name
    assert losses[-1] < losses[0]


# What else the inner loop may adapt, start its head from and be judged by: the family of conf/algo


FAMILY = {
    "boil": {"adapted": "encoder"},
    "protomaml": {"head": "prototypes"},
    "protomaml, head only": {"head": "prototypes", "adapted": "head"},
    "msl": {"step_losses": torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)},
    "metasgd": {"rates": True},
    "metasgd, head only": {"rates": True, "adapted": "head"},
    "all of it": {
        "adapted": "encoder",
        "head": "prototypes",
        "rates": True,
        "step_losses": torch.tensor([0.1, 0.0, 0.9], dtype=torch.float64),
    },
}
each_member = pytest.mark.parametrize("member", FAMILY.values(), ids=FAMILY)


@cache
def of_the_arithmetic(name, first_order):
    """np_family of a member with three inner steps, which each way of the engines is held against."""
    network, tasks = tiny(), draw(tasks=3, shots=2, queries=4)
    return np_family(network, tasks, **member_knobs(network, FAMILY[name]), inner_steps=3, first_order=first_order)


def member_knobs(network, member):
    """A member's knobs for an engine, with rates of their own for what adapts."""
    knobs = dict(member)
    if knobs.pop("rates", False):
        part = {"all": network, "head": network.head, "encoder": network.encoder}[member.get("adapted", "all")]
        generator = torch.Generator().manual_seed(2)
        draws = (torch.rand(p.shape, generator=generator, dtype=torch.float64) for p in part.parameters())
        return knobs | {"inner_lr": [nn.Parameter(0.2 + 0.4 * draw) for draw in draws]}
    return knobs | {"inner_lr": 0.4}


@each_way
@each_order
@pytest.mark.parametrize("name", FAMILY)
def test_the_outer_gradient_of_the_family_is_that_of_the_arithmetic(engine, first_order, name):
    network, tasks, member = tiny(), draw(tasks=3, shots=2, queries=4), FAMILY[name]
    knobs = member_knobs(network, member) | {"inner_steps": 3, "first_order": first_order}
    of_all, by_rate = of_the_arithmetic(name, first_order)
    expected = dict(of_all)
    actual, _ = meta_gradient(engine, network, tasks, **knobs)
    if "head" in member:
        assert not any(actual.pop(name).any() or expected.pop(name).any() for name in ("head.weight", "head.bias"))
    assert_close(actual, expected, 1e-10)
    if "rates" in member:
        engine.meta_gradient(network, tasks, *loop(**knobs))  # adds to what is there
        assert_close(dict(enumerate(p.grad / 2 for p in knobs["inner_lr"])), dict(enumerate(by_rate)), 1e-10)


@each_way
@each_member
def test_the_step_accuracies_of_the_family_are_those_of_the_arithmetic(engine, member):
    """A zeroed head takes the place of the prototypes, too."""
    network, tasks = tiny(), draw(tasks=4, shots=2, queries=25, spread=1.5)
    knobs = {name: value for name, value in member_knobs(network, member).items() if name != "step_losses"}
    etas, _ = np_etas(network, knobs["inner_lr"], knobs.get("adapted", "all"))
    expected = []
    for zeroing in (False, True):
        theta, prototypes = np_theta(tiny(zeroed=zeroing)), "head" in knobs and not zeroing
        trajectories = (np_steps(theta, etas, task, 4, prototypes)[0] for task in np_tasks(tasks))
        expected.append(
            [
                [np_accuracy(at, *task[2:]) for at in passed]
                for passed, task in zip(trajectories, np_tasks(tasks), strict=True)
            ]
        )
    actual = engine.step_accuracies(network, tasks, *evaluations(steps=4, zeroing=(False, True), **knobs))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6)


@each_network
@each_order
@each_member
@pytest.mark.slow
def test_the_engines_agree_on_the_family(build, first_order, member):
    tasks = images_for(build, shots=2)
    network = convolutional(build, tasks)
    knobs = member_knobs(network, member) | {"inner_steps": 3, "first_order": first_order}
    expected, (losses, _) = meta_gradient(sequential, network, tasks, **knobs)
    actual, (loss, _) = meta_gradient(all_at_once, network, tasks, **knobs)
    actual, expected = (torch.cat([g.flatten() for g in gradient.values()]) for gradient in (actual, expected))
    assert (actual - expected).norm() < 1e-10 * expected.norm()
    torch.testing.assert_close(loss, losses, rtol=1e-10, atol=0)


# method.md 2.6: with w = 0 and one inner step


@each_engine
@each_network
@each_order
@pytest.mark.parametrize("shots", [1, 5])
def test_with_a_zeroed_head_one_inner_step_leaves_the_encoder(engine, build, first_order, shots):
    """So the encoder's outer gradient is that of head-only MAML; from a random head it is not."""
    tasks = images_for(build, shots=shots)
    for zeroed in (True, False):
        network = convolutional(build, tasks, zeroed=zeroed)
        expected = head_only_gradient(network, tasks, inner_lr=0.4, first_order=first_order)
        actual, _ = meta_gradient(engine, network, tasks, inner_lr=0.4, inner_steps=1, first_order=first_order)
        actual = {name.removeprefix("encoder."): actual[name] for name in actual if name.startswith("encoder.")}
        if zeroed:
            assert_close(actual, expected, 1e-10)
        else:
            with pytest.raises(AssertionError):
                assert_close(actual, expected, 1e-2)


@each_engine
@each_network
@pytest.mark.parametrize("shots", [1, 5])
def test_with_a_zeroed_head_step_one_is_the_inner_product_prototype_classifier(engine, build, shots):
    tasks = images_for(build, tasks=3, ways=5, shots=shots, queries=12, spread=0.6)
    network = convolutional(build, tasks)
    expected = []
    with torch.no_grad():
        for support, support_labels, query, query_labels in zip(*tasks, strict=True):
            phi = network.encoder(support)
            prototypes = torch.stack([phi[support_labels == k].mean(0) for k in range(5)])
            predicted = (network.encoder(query) @ prototypes.T).argmax(1)
            expected.append((predicted == query_labels).double().mean().item())
    assert 0.2 < np.mean(expected) < 1  # neither all wrong nor all right
    for inner_lr in (0.01, 0.4, 3.0):
        (actual,) = engine.step_accuracies(network, tasks, *evaluations(inner_lr=inner_lr, steps=1, zeroing=(True,)))
        np.testing.assert_allclose(actual[:, 1].numpy(), expected, rtol=1e-6)


@each_way
@each_order
@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_zeroing_is_the_arithmetic_from_a_zeroed_head(engine, first_order, inner_steps, bias):
    """Whatever the network's own head is, which the loss then does not depend on."""
    network, tasks = tiny(), draw(tasks=3, shots=2, queries=4)
    knobs = {"inner_lr": 0.4, "inner_steps": inner_steps, "first_order": first_order}
    expected, losses, accuracies = np_meta_gradient(tiny(zeroed=True), tasks, **knobs)
    actual, (loss, accuracy) = meta_gradient(engine, network, tasks, zeroing=True, **knobs)
    for name in ("head.weight", "head.bias"):
        assert not actual.pop(name).any() and np.any(expected.pop(name))
    assert_close(actual, expected, 1e-10)
    np.testing.assert_allclose(loss.numpy(), losses, rtol=1e-12)
    np.testing.assert_allclose(accuracy.numpy(), accuracies, rtol=1e-6)


@each_way
@each_network
@each_order
@pytest.mark.parametrize("inner_steps, shots", [(1, 1), (2, 5), (3, 1)])
@pytest.mark.slow
def test_zeroing_leaves_out_what_is_zero(engine, build, first_order, inner_steps, shots):
    """The encoder's outer gradient is that of all of it computed; so is that of learned rates, and with all losses."""
    tasks = images_for(build, shots=shots)
    network = convolutional(build, tasks, zeroed=True)
    losses = {"step_losses": torch.linspace(0.1, 0.5, inner_steps, dtype=torch.float64)}
    for more in ({"inner_lr": 0.1}, member_knobs(network, {"rates": True}) | losses):
        knobs, outcomes = {"inner_steps": inner_steps, "first_order": first_order, **more}, []
        for zeroing in (True, False):
            rates = more["inner_lr"] if "step_losses" in more else []
            for eta in rates:
                eta.grad = None
            gradient, (loss, accuracy) = meta_gradient(engine, network, tasks, zeroing=zeroing, **knobs)
            encoder = [value for name, value in gradient.items() if name.startswith("encoder.")]
            outcomes.append(
                torch.cat([tensor.flatten() for tensor in (*encoder, *(eta.grad for eta in rates), loss, accuracy)])
            )
        assert (outcomes[0] - outcomes[1]).norm() < 1e-10 * outcomes[1].norm()


# Evaluation


@each_way
@pytest.mark.parametrize("zeroing, support, query", [((False, True), 6, 6), ((False,), 3, 4), ((True,), 3, 3)])
def test_how_often_an_evaluation_of_three_steps_encodes_the_images(engine, zeroing, support, query):
    """Both modes begin with theta's features; from w = 0 the first step moves the head alone."""
    network, tasks, sizes = tiny(), draw(tasks=1, queries=4), []
    network.encoder.register_forward_hook(lambda encoder, images, features: sizes.append(len(features)))
    engine.step_accuracies(network, tasks, *evaluations(inner_lr=0.4, steps=3, zeroing=zeroing))
    assert {size: sizes.count(size) for size in (3, 12)} == {3: support, 12: query}


@each_engine
@pytest.mark.parametrize("zeroing", [False, True])
def test_step_accuracies_are_those_of_the_arithmetic(engine, zeroing):
    network, tasks = tiny(), draw(tasks=4, shots=2, queries=25, spread=1.5)
    theta = np_theta(tiny(zeroed=zeroing))
    expected = [
        [np_accuracy(np_adapted(theta, x, labels, 0.4, step), query, query_labels) for step in range(6)]
        for x, labels, query, query_labels in np_tasks(tasks)
    ]
    (actual,) = engine.step_accuracies(network, tasks, *evaluations(inner_lr=0.4, steps=5, zeroing=(zeroing,)))
    assert actual.shape == (4, 6)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6)
    assert len(set(actual.flatten().tolist())) > 5  # they move from step to step and task to task


@each_network
@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.slow
def test_the_engines_give_the_same_step_accuracies(build, shots):
    tasks = images_for(build, tasks=3, ways=5, shots=shots, queries=6, spread=2.0)
    network = convolutional(build, tasks)
    knobs = {"inner_lr": 0.1, "steps": 4, "zeroing": (False, True)}
    accuracies = all_at_once.step_accuracies(network, tasks, *evaluations(**knobs))
    assert torch.equal(accuracies, sequential.step_accuracies(network, tasks, *evaluations(**knobs)))
    # After step 0 with zeroing all logits are zero, so all queries get one label.
    torch.testing.assert_close(accuracies[1, :, 0], torch.full((3,), 1 / 5), rtol=0, atol=1e-7)
    for mode, zeroing in enumerate((False, True)):  # what the modes share changes neither
        assert torch.equal(
            all_at_once.step_accuracies(network, tasks, *evaluations(**knobs | {"zeroing": (zeroing,)}))[0],
            accuracies[mode],
        )


@each_engine
@each_network
@each_order
@pytest.mark.slow
def test_training_and_evaluation_adapt_alike(engine, build, first_order):
    """Step N of the evaluation, always first order, is where the training of either order arrives after N steps."""
    tasks = images_for(build, tasks=3, ways=5, shots=2, queries=6, spread=2.0)
    network = convolutional(build, tasks)
    (evaluated,) = engine.step_accuracies(network, tasks, *evaluations(inner_lr=0.1, steps=3, zeroing=(False,)))
    for steps in (1, 3):
        _, (_, accuracy) = meta_gradient(
            engine, network, tasks, inner_lr=0.1, inner_steps=steps, first_order=first_order
        )
        assert torch.equal(accuracy, evaluated[:, steps])


@each_way
@each_network
def test_evaluation_leaves_the_network_its_gradients_and_the_random_state(engine, build):
    tasks = images_for(build)
    network = convolutional(build, tasks)
    engine.meta_gradient(network, tasks, *loop(inner_lr=0.1))
    before = {name: (p.detach().clone(), p.grad.clone()) for name, p in network.named_parameters()}
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    mode = network.training

    accuracies = engine.step_accuracies(network, tasks, *evaluations(inner_lr=0.4, steps=3, zeroing=(False, True)))

    assert not accuracies.requires_grad
    assert network.training == mode and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)
    for name, parameter in network.named_parameters():
        value, gradient = before[name]
        assert torch.equal(parameter, value) and torch.equal(parameter.grad, gradient), name
        assert parameter.is_leaf and parameter.requires_grad
