"""python -m fewshot.evidence: its numbers against loops in NumPy and differentiation, its verdicts, its files."""

import copy
import functools
import importlib
import itertools
import json
import re
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from by_hand import (
    Features,
    by_hand,
    cosine,
    differentiated,
    np_accuracy,
    np_adapted,
    np_meta_gradient,
    np_tasks,
    np_theta,
    softmax,
)
from conftest import SMALL
from examples import NETWORKS, convolutional, draw, images_for, meta_gradient, tiny, vector
from hydra import compose, initialize_config_dir
from matplotlib.collections import PathCollection
from PIL import Image
from torch.func import functional_call

from fewshot.config.hydra_call import Call
from fewshot.config.tree import CONF
from fewshot.data.task import Task
from fewshot.errors import UserError
from fewshot.evidence import claims, page, report
from fewshot.evidence import model as measured
from fewshot.evidence.__main__ import main as evidence_main
from fewshot.evidence.__main__ import run
from fewshot.evidence.claims import (
    accuracy,
    cross_task,
    frozen_encoder,
    identities,
    label_orders,
    limits,
    memory,
    motion,
    motivating_example,
    noise,
    outer_step,
    prototypes,
    similarity,
)
from fewshot.evidence.model import Model
from fewshot.evidence.page import Shown
from fewshot.evidence.report import render
from fewshot.inner_loop import InnerLoop
from fewshot.maml import sequential
from fewshot.models.head import zero_head
from fewshot.models.network import Network
from fewshot.processes.signals import Signals
from fewshot.results.figures import png
from fewshot.theory import closed_forms
from fewshot.theory.features import agreement, class_similarities
from fewshot.train import run as train_run

SHARED = Path(__file__).parents[3] / "shared" / "data"
KNOBS = {"inner_lr": 0.4, "inner_steps": 2}
LIMITS = {"no_noise_beyond_one_step", "full_is_head_only_beyond_one_step", "papers_somaml_loss_with_this_head"}
LIMITS |= {"uniform_without_zeroing", "uniform_with_the_bias_kept", "full_is_head_only_with_this_head"}


def model(name="conv4_strided", *, bias=True, **shape):
    """A network in float64 with a head that is not zero, and tasks for it."""
    tasks = images_for(NETWORKS[name], **{"tasks": 2, "shots": 1, "queries": 3, **shape})
    network = convolutional(NETWORKS[name], tasks)
    if not bias:
        network.head.bias = None
    return network, tasks


def measuring(network, tasks, *, initial=None, adapted="all", steps=2):
    """What a claim measures."""
    loop = InnerLoop(**KNOBS, first_order=True, adapted=adapted)
    tested = {mode: torch.full((6, steps + 1), 0.5) for mode in ("zeroing_off", "zeroing_on")}
    return Model(network, initial or network, loop, steps, tasks, len(tasks.support), tested)


def features(network, task):
    """Of one task in NumPy: support, its labels, query, its labels."""
    with torch.no_grad():
        S, Q = (network.encoder(x).numpy() for x in (task.support, task.query))
    return S, task.support_labels.numpy(), Q, task.query_labels.numpy()


def one_by_one(tasks):
    return [Task(*fields) for fields in zip(*tasks, strict=True)]


def head(network):
    return network.head.weight.detach().numpy(), network.head.bias.detach().numpy()


def stepped(S, labels, w, b, eta):
    """One inner step of the head."""
    E = (softmax(S @ w.T + b) - np.eye(len(w))[labels]) / len(S)
    return w - eta * E.T @ S, b - eta * E.sum(0)


def predicted(w, b, S, labels, Q, steps):
    """Of the support before each of the steps of the head by .4, P^(p), and last of the queries after them."""
    P = []
    for _ in range(steps):
        P.append(softmax(S @ w.T + b))
        w, b = stepped(S, labels, w, b, 0.4)
    return [*P, softmax(Q @ w.T + b)]


# The identities, and what does not hold


def names(equations):
    return {equation.name for equation in equations}


def limits_of(network, tasks):
    return limits.measure(measuring(network, tasks))["limits"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("bias", "shots", "queries"), [(True, 1, 3), (False, 2, 2)])
def test_the_identities_hold_for_any_model_and_the_limits_do_not(name, bias, shots, queries):
    network, tasks = model(name, bias=bias, shots=shots, queries=queries)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    checks = identities.measure(measuring(network, tasks))["identities"]
    assert checks.keys() | {"bias_after_one_step"} == names(identities.IDENTITIES) | names(identities.SPLITS)
    assert ("bias_after_one_step" in checks) == bias
    assert {key: check for key, check in checks.items() if not check["pass"]} == {}
    beyond = limits_of(network, tasks)
    assert beyond.keys() | {"uniform_with_the_bias_kept"} == names(limits.LIMITS) == LIMITS
    assert ("uniform_with_the_bias_kept" in beyond) == bias
    assert all(check["value"] > 1e-3 and not check["pass"] for check in beyond.values())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_the_limits_about_its_own_head_hold_for_a_model_whose_head_is_zero():
    network, tasks = model()
    zero_head(network.head)
    assert {name for name, check in limits_of(network, tasks).items() if check["pass"]} == {
        *("uniform_without_zeroing", "uniform_with_the_bias_kept", "papers_somaml_loss_with_this_head"),
        "full_is_head_only_with_this_head",
    }


@pytest.mark.parametrize("steps", [2, 3])
def test_the_limits_are_what_the_formulas_say(steps):
    network, tasks = model()
    own = replace(measuring(network, tasks), loop=InnerLoop(steps, 0.4, first_order=True))
    beyond = {name: check["value"] for name, check in limits.measure(own)["limits"].items()}
    w, b = head(network)
    noise = uniform = 0.0
    for task in one_by_one(tasks):
        S, labels, Q, q_labels = features(network, task)
        uniform = max(uniform, np.abs(softmax(S @ w.T + b) - 1 / 3).max())
        _, *later, q = predicted(0 * w, 0 * b, S, labels, Q, steps)
        for i, u in enumerate(q_labels):
            for P, j in itertools.product(later, range(len(S))):
                noise = max(noise, abs(q[i] @ P[j] - P[j][u]))
    assert beyond["no_noise_beyond_one_step"] == pytest.approx(noise, rel=1e-9)
    zeroed = copy.deepcopy(network)
    zero_head(zeroed.head)
    both = apart(zeroed, tasks, inner_steps=steps, first_order=True)
    assert beyond["full_is_head_only_beyond_one_step"] == pytest.approx(both)
    assert beyond["uniform_without_zeroing"] == pytest.approx(uniform, rel=1e-9)
    kept = np.abs(softmax(b[None]) - 1 / 3).max()
    assert beyond["uniform_with_the_bias_kept"] == pytest.approx(kept, rel=1e-9)


def failing(network, tasks):
    checks = identities.measure(measuring(network, tasks))["identities"]
    return {name for name, check in checks.items() if not check["pass"]}


def test_a_trick_that_zeroes_half_of_the_head_is_found_out(monkeypatch):
    network, tasks = model(seed=2)  # tasks in which a bias turns signs of coefficients
    monkeypatch.setattr(measured, "zero_head", lambda head: torch.nn.init.zeros_(head.weight))
    assert failing(network, tasks) == {
        *("coefficient_is_free_of_noise", "sign_of_coefficients", "head_after_one_step"),
        *("bias_after_one_step", "fomaml_is_the_explicit_loss", "somaml_is_the_explicit_loss"),
        *("fomaml_first_step_is_of_the_head", "somaml_first_step_is_of_the_head", "step_1_independent_of_inner_lr"),
        *("fomaml_is_a_prototypical_network", "somaml_is_a_prototypical_network", "labels_have_no_order"),
    }
    monkeypatch.setattr(measured, "zero_head", lambda head: torch.nn.init.zeros_(head.bias))
    assert failing(network, tasks) == names(identities.IDENTITIES)


def test_an_unbalanced_support_is_found_out():
    network, tasks = model(shots=2)
    labels = tasks.support_labels.clone()
    labels[:, 1] = 1
    assert failing(network, tasks._replace(support_labels=labels)) >= {"head_after_one_step", "bias_after_one_step"}


def test_a_wrong_formula_is_found_out(monkeypatch):
    network, tasks = model()
    step = closed_forms.AdaptedHead._back_through_inner_loop

    def wrong(task, D, G):
        D, G = step(task, D, G)
        return D * 1.001, G

    monkeypatch.setattr(closed_forms.AdaptedHead, "_back_through_inner_loop", wrong)
    assert failing(network, tasks) == {"somaml_split_with_this_head"}

    def stronger(task):
        return torch.stack([-(task.Q - task.T_Q) @ (1.01 * task.T_S - P).mT for P in task.P])

    monkeypatch.setattr(closed_forms.AdaptedHead, "coefficients", stronger)
    assert "coefficient_is_free_of_noise" in failing(network, tasks)


def test_a_check_of_what_is_no_number_fails():
    no_number = measured.equation([], 1.0, "no number")(lambda model: float("nan"))
    (check,) = measured.measured([no_number], measuring(*model())).values()
    assert check["value"] != check["value"] and check["bound"] == 1.0 and not check["pass"]
    for numbers in ([0.0, float("nan"), 1.0], torch.tensor([0.0, float("nan"), 1.0])):
        assert np.isnan(measured.largest(numbers))
    assert page.verdict_on({"value": None, "bound": 0.0, "pass": False}).words == "does not hold (not a number)"


# What is measured


def test_the_motivating_example_is_what_the_formulas_say():
    network, tasks = model(shots=2)
    numbers = motivating_example.measure(measuring(network, tasks))["motivating_example"]
    S, labels, Q, q_labels = features(network, one_by_one(tasks)[0])
    eta = 2 * 0.4 / (6 * 3)
    m = [S[labels == k].sum(0) for k in range(3)]
    firsts = [int(np.argmax(q_labels == k)) for k in range(3)]
    assert numbers["inner_lr"] == pytest.approx(eta)
    np.testing.assert_allclose(numbers["classifier"], [[cosine(a, b) for b in m] for a in m], atol=1e-5)
    np.testing.assert_allclose(numbers["inner_products"], [[eta * Q[i] @ mk for mk in m] for i in firsts], rtol=1e-4)
    np.testing.assert_allclose(numbers["logits"], numbers["inner_products"], rtol=1e-4)
    assert max(numbers["classifier_error"], numbers["logits_error"]) < 1e-12
    logits = np.stack([eta * features(network, t)[2] @ np.stack(sums(network, t)).T for t in one_by_one(tasks)])
    own = np.stack([np.eye(3, dtype=bool)[t.query_labels] for t in one_by_one(tasks)])
    assert numbers["same_class"] == pytest.approx(logits[own].mean())
    assert numbers["other_class"] == pytest.approx(logits[~own].mean())
    larger = [one[mine].mean() > one[~mine].mean() for one, mine in zip(logits, own, strict=True)]
    assert (numbers["tasks_where_own_is_larger"], numbers["tasks"]) == (sum(larger), 2)


def sums(network, task):
    S, labels, *_ = features(network, task)
    return [S[labels == k].sum(0) for k in range(3)]


def test_the_outer_step_is_that_of_differentiation():
    network, tasks = model()
    numbers = outer_step.measure(measuring(network, tasks))["outer_step"]
    weight, bias = (p.detach() for p in (network.head.weight, network.head.bias))
    for order, first_order in (("fomaml", True), ("somaml", False)):
        norms, drawn, pushed, arrows = [], [], [], []
        for task in one_by_one(tasks):
            S, labels, Q, q_labels = (torch.as_tensor(x) for x in features(network, task))
            task_features = Features(S, labels, Q, q_labels, weight, bias)
            _, to_Q, to_S, *_ = differentiated(*task_features, **KNOBS, first_order=first_order, loss="cross_entropy")
            norms.append([to_Q.norm().item(), to_S.norm().item()])
            arrows.append((-to_Q.numpy(), -to_S.numpy()))
            small = 1e-7
            change = (Q - small * to_Q) @ (S - small * to_S).T - Q @ S.T
            same = q_labels[:, None] == labels[None]
            drawn += (change[same] > 0).tolist()
            pushed += (change[~same] < 0).tolist()
        measured = numbers["this_head"][order]
        assert [measured["query_norm"], measured["support_norm"]] == pytest.approx(np.mean(norms, axis=0).tolist())
        assert [measured["same_class_drawn"], measured["other_class_pushed"]] == [np.mean(drawn), np.mean(pushed)]
        S, _, Q, _ = features(network, one_by_one(tasks)[0])
        both = np.concatenate([S, Q]) - np.concatenate([S, Q]).mean(0)
        _, directions = np.linalg.eigh(both.T @ both)
        plane = directions[:, :-3:-1] * np.where(directions[:, :-3:-1].sum(0) < 0, -1, 1)
        np.testing.assert_allclose(numbers["support"], both[: len(S)] @ plane, atol=1e-4)
        np.testing.assert_allclose(measured["query_arrows"], arrows[0][0] @ plane, atol=1e-6)
        np.testing.assert_allclose(measured["support_arrows"], arrows[0][1] @ plane, atol=1e-6)
    assert numbers["this_head"]["fomaml"]["support_norm"] == numbers["zeroed_head"]["fomaml"]["support_norm"] == 0
    assert numbers["zeroed_head"]["somaml"]["support_norm"] > 0
    values = np.linalg.eigvalsh(both.T @ both)
    assert numbers["spread_shown"] == pytest.approx(values[-2:].sum() / values.sum())


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_from_a_zero_head_the_first_step_moves_the_head_alone(steps):
    """Exactly, for any N: theta_1 = theta and d theta_1 / d theta = 1 in the encoder, so both orders may skip it."""
    network, tasks = tiny(zeroed=True), draw(shots=2, queries=3)
    theta = np_theta(network)
    for x, labels, *_ in np_tasks(tasks):
        A, a, *_ = np_adapted(theta, x, labels, 0.7, 1)
        assert np.array_equal(A, theta[0]) and np.array_equal(a, theta[1])
        for place in range(2):  # of theta's encoder; a complex step of any of its numbers stays where it is
            moved = [p.astype(complex) for p in theta]
            moved[place] = moved[place] + 1e-30j * np.arange(1, theta[place].size + 1).reshape(theta[place].shape)
            stepped = np_adapted(tuple(moved), x, labels, 0.7, 1)
            assert all(np.array_equal(after, before) for after, before in zip(stepped[:2], moved[:2], strict=True))
    for first_order in (True, False):
        knobs = {"inner_lr": 0.7, "inner_steps": steps, "first_order": first_order}
        expected, *_ = np_meta_gradient(network, tasks, **knobs)
        skipped, _ = meta_gradient(sequential, network, tasks, **knobs, zeroing=True)
        for name in ("encoder.1.weight", "encoder.1.bias"):
            np.testing.assert_allclose(skipped[name], expected[name], rtol=1e-10, atol=1e-15)


def apart(network, tasks, **knobs):
    """Relative difference of the encoder's gradients where all adapts and where the head alone does."""
    expected = {}
    for adapted in ("all", "head"):
        gradients, _ = meta_gradient(sequential, network, tasks, inner_lr=0.4, adapted=adapted, **knobs)
        expected[adapted] = vector({name: g for name, g in gradients.items() if name.startswith("encoder.")})
    return ((expected["all"] - expected["head"]).norm() / expected["head"].norm()).item()


def test_the_frozen_encoder_is_exact_for_one_step_and_measured_beyond():
    network, tasks = model(queries=6)
    numbers = frozen_encoder.measure(measuring(network, tasks))["frozen_encoder"]
    two = numbers["this_head"]["2"]
    assert two["fomaml"] == pytest.approx(apart(network, tasks, inner_steps=2, first_order=True))
    assert two["somaml"] == pytest.approx(apart(network, tasks, inner_steps=2, first_order=False))
    loops = [InnerLoop(2, 0.4, first_order=True, adapted=adapted) for adapted in ("all", "head")]
    by_all, by_head = (sequential.step_logits(network, tasks, [loop])[0, :, -1].argmax(-1) for loop in loops)
    assert two["agree"] == (by_all == by_head).double().mean() < 1
    one, two = numbers["zeroed_head"]["1"], numbers["zeroed_head"]["2"]
    assert max(one["fomaml"], one["somaml"]) < 1e-12 and one["agree"] == 1
    assert min(two["fomaml"], two["somaml"]) > 1e-3
    said = {"same_for_all": {"weight": False, "bias": True}, "frozen_encoder": {"this_head": {}, "zeroed_head": {}}}
    for distance, kind in ((0.05, "holds"), (0.3, "partly"), (0.9, "fails")):
        for head in ("this_head", "zeroed_head"):
            said["frozen_encoder"][head]["2"] = {"fomaml": distance, "somaml": 0.01}
        assert kinds(frozen_encoder.verdict(said)) == [kind, kind]


def test_the_accuracies_of_all_label_orders_are_those_of_a_head_whose_rows_are_in_that_order():
    """A task with its labels renamed, against the head's rows renamed the other way, by loops in NumPy."""
    network, tasks = tiny(), draw(tasks=5, shots=1, queries=8, spread=2.0)
    numbers = label_orders.measure(measuring(network, tasks))["label_orders"]
    A, a, W, b = np_theta(network)
    assert numbers["orders"] == 6 and len(numbers["this_head"]["accuracies"]) == label_orders.TASKS
    for task, accuracies in zip(np_tasks(tasks), numbers["this_head"]["accuracies"], strict=False):
        x, labels, query, query_labels = task
        expected = []
        for order in itertools.permutations(range(3)):
            theta = np_adapted((A, a, W[list(order)], b[list(order)]), x, labels, 0.4, 2)
            expected.append(np_accuracy(theta, query, query_labels))
        assert list(accuracies) == pytest.approx(expected, abs=1e-6)
    spreads = [max(values) - min(values) for values in numbers["this_head"]["accuracies"]]
    assert numbers["this_head"]["spread"] == pytest.approx(np.mean(spreads), abs=2e-6) and max(spreads) > 0
    assert numbers["this_head"]["largest_spread"] == pytest.approx(max(spreads), abs=2e-6)
    zeroed = numbers["zeroed_head"]
    assert zeroed["spread"] == zeroed["largest_spread"] == 0 and zeroed["apart"] < 1e-12 < numbers["this_head"]["apart"]


def test_of_many_labels_some_orders_are_taken():
    assert label_orders.orders(5).shape == (120, 5) and len(label_orders.orders(5).unique(dim=0)) == 120
    many = label_orders.orders(9)
    assert many.shape == (120, 9) and torch.equal(many.sort(dim=1).values, torch.arange(9).expand(120, -1))
    assert torch.equal(many[0], torch.arange(9)) and torch.equal(many, label_orders.orders(9))


def test_the_motion_is_that_of_the_encoder_by_hand():
    """tanh's derivative by the chain rule, on the gradient that complex steps and formulas give in NumPy."""
    network, tasks = tiny(), draw(tasks=2, shots=2, queries=3)
    numbers = motion.measure(measuring(network, tasks))["motion"]["this_head"]
    A, a, *_ = np_theta(network)
    for order, first_order in (("fomaml", True), ("somaml", False)):
        queries, supports, same, other, cosines = [], [], [], [], []
        for i, (x, labels, query, query_labels) in enumerate(np_tasks(tasks)):
            one = Task(*(field[i : i + 1] for field in tasks))
            gradients, *_ = np_meta_gradient(network, one, **KNOBS, first_order=first_order)
            to_A, to_a = -gradients["encoder.1.weight"], -gradients["encoder.1.bias"]
            S, Q = np.tanh(x @ A.T + a), np.tanh(query @ A.T + a)
            to_S, to_Q = (1 - S**2) * (x @ to_A.T + to_a), (1 - Q**2) * (query @ to_A.T + to_a)
            queries += np.linalg.norm(to_Q, axis=1).tolist()
            supports += np.linalg.norm(to_S, axis=1).tolist()
            change = to_Q @ S.T + Q @ to_S.T
            own = query_labels[:, None] == labels[None]
            same += change[own].tolist()
            other += change[~own].tolist()
            arguments = (torch.as_tensor(part) for part in (S, labels, Q, query_labels))
            head = (p.detach() for p in (network.head.weight, network.head.bias))
            _, drawn, *_ = differentiated(*arguments, *head, **KNOBS, first_order=first_order, loss="cross_entropy")
            cosines.append(cosine(-drawn.numpy().ravel(), to_Q.ravel()))
        moved = numbers[order]
        assert [moved["query"], moved["support"]] == pytest.approx([np.mean(queries), np.mean(supports)], rel=1e-5)
        assert [moved["same_class"], moved["other_class"]] == pytest.approx([np.mean(same), np.mean(other)], rel=1e-4)
        assert moved["same_class_drawn"] == np.mean(np.array(same) > 0)
        assert moved["other_class_pushed"] == np.mean(np.array(other) < 0)
        assert moved["as_drawn"] == pytest.approx(np.mean(cosines), rel=1e-4)
    assert numbers["fomaml"]["support"] > 0.1 * numbers["fomaml"]["query"]  # FOMAML moves them too


@pytest.mark.parametrize("eta", [1e-9, 1e5])
def test_features_move_as_their_derivative_says_however_long_the_gradient_is(eta):
    network, tasks = tiny(zeroed=True), draw(tasks=1, shots=1, spread=1.0)
    own = replace(measuring(network, tasks), loop=InnerLoop(1, eta, first_order=False))
    names, parameters = zip(*network.encoder.named_parameters(), strict=True)
    theta = tuple(p.detach() for p in parameters)

    def features(images, *theta):
        return functional_call(network.encoder, dict(zip(names, theta, strict=True)), images)

    for order, first_order in motion.ORDERS.items():
        gradient = own.encoder_gradient(first_order=first_order).split([p.numel() for p in theta])
        step = tuple(-g.view_as(p) for g, p in zip(gradient, theta, strict=True))
        numbers = motion.measure(own)["motion"]["this_head"][order]
        for kind, images in (("query", tasks.query[0]), ("support", tasks.support[0])):
            _, moved = torch.autograd.functional.jvp(partial(features, images), theta, step)
            assert numbers[kind] == pytest.approx(moved.norm(dim=1).mean().item(), rel=1e-5, abs=0)
            assert numbers[kind] > 0


def test_where_the_outer_gradient_is_zero_the_motion_is_not_judged():
    """Every query is right, and so surely that float64 has no doubt left."""
    network, tasks = tiny(zeroed=True), draw(tasks=1, shots=1, spread=0.0)
    own = replace(measuring(network, tasks), loop=InnerLoop(1, 1e6, first_order=False))
    assert not own.encoder_gradient().any()
    assert kinds(motion.verdict(motion.measure(own))) == ["untested"] * 3


def test_cross_task_interference_is_what_the_formulas_say():
    """One outer step of the head on a task, then the same and the next task from this head."""
    network, tasks = tiny(), draw(tasks=8, shots=1, queries=6, spread=2.0)
    numbers = cross_task.measure(measuring(network, tasks))["cross_task"]
    A, a, W, b = np_theta(network)
    heads = []
    by_task = list(np_tasks(tasks))

    def terms(weight, bias, task):
        """Interference and contrastive term, head gradient and accuracy: the head alone adapts, two steps of .4."""
        x, labels, query, query_labels = task
        S, Q = np.tanh(x @ A.T + a), np.tanh(query @ A.T + a)
        w1, b1 = stepped(S, labels, weight, bias, 0.4)
        w2, b2 = stepped(S, labels, w1, b1, 0.4)
        q = softmax(Q @ w2.T + b2)
        E = (q - np.eye(3)[query_labels]) / len(Q)
        return (
            (E @ weight).ravel(),
            (E @ (w2 - weight)).ravel(),
            E.T @ Q,
            E.sum(0),
            (q.argmax(1) == query_labels).mean(),
        )

    from_zero = []
    for task in by_task:
        *_, to_w, to_b, right = terms(0 * W, 0 * b, task)
        heads.append((-to_w, -to_b))
        from_zero.append(right)
    for name, met in (("own_task", heads), ("next_task", [heads[-1], *heads[:-1]]), ("this_head", [(W, b)] * 8)):
        after = [terms(*head, task) for head, task in zip(met, by_task, strict=True)]
        gains = [right - before for (*_, right), before in zip(after, from_zero, strict=True)]
        aligned = [cosine(*both) for *both, _, _, _ in after]
        ratios = [np.linalg.norm(interference) / np.linalg.norm(contrastive) for interference, contrastive, *_ in after]
        for key, values in (("gain", gains), ("aligned", aligned), ("ratio", ratios)):
            assert numbers[name][key] == pytest.approx(np.mean(values), abs=2e-6)
        for key, values in (("gain_ci95", gains), ("aligned_ci95", aligned)):
            assert numbers[name][key] == pytest.approx(1.96 * np.std(values, ddof=1) / 8**0.5, abs=2e-6)
    assert numbers["own_task"]["gain"] != numbers["next_task"]["gain"]


def test_the_memory_is_what_the_formulas_say():
    network, tasks = model(shots=2)
    numbers, (w, b) = memory.measure(measuring(network, tasks))["memory"], head(network)
    cosines = []
    for task in one_by_one(tasks):
        S, labels, *_ = features(network, task)
        mu = [S[labels == k].mean(0) for k in range(3)]
        W = stepped(S, labels, w, b, 0.4)[0]
        cosines.append([[cosine(column, mean) for mean in mu] for column in W - W.mean(0)])
    cosines, own = np.array(cosines), np.eye(3, dtype=bool)
    after = numbers["this_head_after"]
    np.testing.assert_allclose(after["first_task"], cosines[0], atol=1e-5)
    assert after["same_class"] == pytest.approx(cosines[:, own].mean())
    assert after["other_class"] == pytest.approx(cosines[:, ~own].mean())
    assert after["nearest_is_own"] == (cosines.argmax(2) == np.arange(3)).mean()
    assert numbers["zeroed_head_before"] is None and numbers["zeroed_head_after"]["same_class"] > after["same_class"]


def test_the_noise_is_what_the_formulas_say():
    network, tasks = model(shots=2)
    numbers = noise.measure(measuring(network, tasks))["coefficients"]
    by_task = [features(network, task) for task in one_by_one(tasks)]
    same = np.array([q_labels[:, None] == labels for _, labels, _, q_labels in by_task])
    wrong = np.mean([by_hand(network, task, 0.4)["wrong_sign"] for task in one_by_one(tasks)])
    assert numbers["this_head"]["wrong_sign"] == pytest.approx(wrong) and wrong > 0
    assert numbers["this_head"]["wrong_among_other"] == pytest.approx(
        wrong * 3 / 2
    )  # none within a class: two thirds of all
    assert numbers["zeroed_head"]["wrong_sign"] == 0 and numbers["zeroed_head"]["first_task_wrong"] == []
    w, b = head(network)
    for name, zero, steps in (("this_head", 1, 1), ("zeroed_head", 0, 1), ("more_steps", 0, 2)):
        c = [coefficients(*predicted(zero * w, zero * b, *one[:3], steps), *one[1::2]) for one in by_task]
        np.testing.assert_allclose(numbers[name]["first_task"], c[0], rtol=1e-5, atol=1e-9)
        wrong = (np.array(c) > 0) != same
        assert numbers[name]["first_task_wrong"] == np.argwhere(wrong[0]).tolist()
        assert numbers[name]["wrong_among_other"] == pytest.approx(wrong[~same].mean())


def coefficients(*predictions_and_labels):
    """sum_p q.s^(p) - s^(p)_u - q_t + 1[t=u], (Q, S), pair by pair."""
    *P, q, labels, q_labels = predictions_and_labels
    return [
        [sum(q[i] @ p[j] - p[j][u] - q[i][t] + (t == u) for p in P) for j, t in enumerate(labels)]
        for i, u in enumerate(q_labels)
    ]


@pytest.mark.parametrize("adapted", ["all", "head"])
def test_agreement_is_counted_query_by_query(adapted):
    network, tasks = model(tasks=4, queries=5)
    numbers = prototypes.measure(measuring(network, tasks, adapted=adapted))["prototypes"]
    agree, right = [], []
    for task in one_by_one(tasks):
        S, labels, Q, q_labels = features(network, task)
        nearest = np.argmax(Q @ np.stack([S[labels == k].mean(0) for k in range(3)]).T, axis=1)
        w, b = head(network)
        right.append((nearest == q_labels).mean())
        agree.append(np.argmax(Q @ stepped(S, labels, w, b, 0.4)[0].T + stepped(S, labels, w, b, 0.4)[1], 1) == nearest)
    assert numbers["accuracy"] == pytest.approx(np.mean(right)) and numbers["ties"] == 0 and numbers["queries"] == 60
    assert numbers["zeroed_head"][0] == 1 and len(numbers["zeroed_head"]) == 2
    if adapted == "head":  # a step of the encoder changes the features that are compared
        assert numbers["this_head"][0] == pytest.approx(np.mean(agree))


def test_a_tie_counts_as_agreement_with_any_of_its_classes():
    network, tasks = model()
    support = tasks.support.clone()
    support[:, 1] = support[:, 0]  # two classes with one image
    tied = tasks._replace(support=support)
    numbers = prototypes.measure(measuring(network, tied, steps=1))["prototypes"]
    assert 0 < numbers["ties"] < numbers["queries"] and numbers["zeroed_head"] == [1.0]
    assert "step_1_is_the_prototype_classifier" not in failing(network, tied)
    scores = torch.tensor([[1.0, 1.0 - 1e-15, 0.0]])
    for chosen, agrees in ((0, True), (1, True), (2, False)):
        assert agreement(scores, torch.eye(3)[[chosen]]).tolist() == [agrees]


def test_similarity_counts_the_tasks():
    network, tasks = model(tasks=3)
    initial = copy.deepcopy(network)
    torch.nn.init.normal_(initial.encoder[0].weight)
    numbers = similarity.measure(measuring(network, tasks, initial=initial))["similarity"]
    grew, same, other = 0, [], []
    for task in one_by_one(tasks):
        gaps = []
        for net in (network, initial):
            S, labels, Q, q_labels = features(net, task)
            pairs = [
                (u == t, cosine(q, s)) for q, u in zip(Q, q_labels, strict=True) for s, t in zip(S, labels, strict=True)
            ]
            means = [np.mean([value for is_same, value in pairs if is_same == which]) for which in (True, False)]
            gaps.append(means[0] - means[1])
            same.append(means[0])
            other.append(means[1])
        grew += gaps[0] > gaps[1]
    assert numbers["tasks_where_the_gap_grew"] == grew
    assert numbers["same_class"] == pytest.approx(np.mean(same[::2]))
    assert numbers["initially_same_class"] == pytest.approx(np.mean(same[1::2]))
    both = numbers["other_class"], numbers["initially_other_class"]
    assert both == pytest.approx((np.mean(other[::2]), np.mean(other[1::2])))
    assert numbers["first_task"] == class_similarities(network, one_by_one(tasks)[0])


def test_a_head_may_have_one_feature_two_ways_and_many():
    for ways, width in ((2, 1), (9, 5)):
        torch.manual_seed(0)
        encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, width))
        network = Network(encoder, width, ways).double()
        labels = torch.arange(ways)[None]
        tasks = Task(torch.randn(1, ways, 1, 4, 4).double(), labels, torch.randn(1, ways, 1, 4, 4).double(), labels)
        numbers = report.finite({**report.measure(measuring(network, tasks)), "tasks": {"features": 1, "gradients": 1}})
        shown = Shown(*(np.random.rand(ways, 4, 4), labels[0].numpy()) * 2)
        assert np.isnan(np.array(numbers["similarity"]["first_task"]["query_query"], float)[0, 0])  # one query a class
        numbers["config"] = config_of(ways)
        for name, figure in report.draw(numbers, shown).items():
            if ways == 2 or name in ("motivating_example", "outer_step"):  # what many classes change, and one feature
                figure.draw_without_rendering()


def config_of(ways):
    algo = {"first_order": True, "adapted": "all", "zeroing": False}
    return {"algo": algo, "dataset": {"name": "none"}, "ways": ways, "shots": 1, "inner_steps": 2, "inner_lr": 0.4}


# The words


@pytest.mark.parametrize(
    ("value", "said"),
    [(3.3e-16, "3.3e−16"), (1e-12, "1e−12"), (0.0, "0"), (0.98, "0.98"), (-0.25, "−0.25"), (None, "not a number")],
)
def test_numbers_in_short(value, said):
    assert page.short(value) == said


def test_all_and_none_are_said_of_all_and_none_alone():
    assert [page.percent(x) for x in (1.0, 0.99999, 0.8279, 0.00001, 0.0)] == [
        *("100%", "> 99.9%", "82.8%", "< 0.1%", "0%")
    ]
    assert page.decimals(-0.001) == "0.00"


def kinds(verdicts):
    return [verdict.kind for verdict in verdicts.values()]


def test_a_verdict_follows_its_number():
    no_head = {"same_for_all": {"weight": True, "bias": True}}
    own_head = {"same_for_all": {"weight": False, "bias": True}, "model": {"iteration": 1}}
    assert page.verdict_on({"value": 3e-16, "bound": 1e-12, "pass": True}) == (
        *("holds", "holds exactly (3e−16 ≤ 1e−12)"),
    )
    assert page.verdict_on({"value": 0.4, "bound": 1e-12, "pass": False}) == (
        *("fails", "does not hold (0.4 > 1e−12)"),
    )
    for kept, kind in ((32, "holds"), (31, "partly"), (3, "fails")):
        assert kinds(similarity.verdict({**own_head, "similarity": alike(kept)})) == [kind]
    for share, kind in ((1, "holds"), (0.999, "partly"), (0.4, "fails")):
        shares = {"zeroed_head": [1, share], "this_head": [share, 1]}
        assert kinds(prototypes.verdict({**own_head, "prototypes": shares})) == [kind, kind]
    shares = {"zeroed_head": [1], "this_head": [0.4]}
    assert kinds(prototypes.verdict({**own_head, "prototypes": shares})) == ["untested", "fails"]
    for spread, kind in ((0.1, "holds"), (0, "fails")):
        numbers = {"this_head": {"spread": spread, "largest_spread": spread}}
        assert kinds(label_orders.verdict({**own_head, "label_orders": numbers})) == [kind]
    right_way = {"same_class_drawn": 1.0, "other_class_pushed": 0.9}
    moved = {"this_head": {"fomaml": right_way, "somaml": {**right_way, "same_class_drawn": 0.2}}}
    assert kinds(outer_step.verdict({"outer_step": moved})) == ["partly", "fails"]
    for this, later, expected in ((0.2, 0, ["holds", "holds"]), (0, 0.01, ["fails", "partly"])):
        signs = {"this_head": {"wrong_among_other": this}, "more_steps": {"wrong_among_other": later}, "inner_steps": 2}
        assert kinds(noise.verdict({**own_head, "coefficients": signs})) == expected
    for gain, expected in (
        (0.3, ["holds", "fails", "fails"]),
        (-0.3, ["fails", "holds", "holds"]),
        (0.01, ["partly"] * 3),
    ):
        numbers = {head: {"gain": gain, "gain_ci95": 0.02} for head in ("own_task", "next_task", "this_head")}
        assert kinds(cross_task.verdict({**own_head, "cross_task": numbers})) == expected
    for support, kind in ((0.001, "holds"), (0.8, "fails")):
        moves = {"query": 1.0, "support": support, **right_way}
        somaml = {**moves, "same_class_drawn": 1.0, "query": support, "support": 1.0}
        numbers = {"motion": {"this_head": {"fomaml": moves, "somaml": somaml}}}
        assert kinds(motion.verdict(numbers)) == [kind, "partly", "partly"]
    for larger, kind in ((4, "holds"), (3, "partly"), (1, "fails")):
        example = {"tasks": 4, "tasks_where_own_is_larger": larger, "same_class": 0.5, "other_class": 0.1}
        assert kinds(motivating_example.verdict({"motivating_example": example})) == [kind]
    for gain, kind in ((0.02, "holds"), (0.005, "partly"), (-0.005, "partly"), (-0.02, "fails")):
        test = {"gain": {"accuracy": [-gain, gain, -gain], "ci95": [0.0, 0.01, 0.0]}}
        assert kinds(accuracy.verdict({**own_head, "config": {"inner_steps": 1}, "test": test})) == [kind]
    passed, failed = ({"value": value, "bound": 1e-12, "pass": value == 0} for value in (0, 1))
    zero, own = ({"weight": same, "bias": same} for same in (True, False))
    for name, same, kind in (
        ("weight", zero, "untested"),
        ("weight", own, "holds"),
        ("bias", {**zero, "bias": False}, "holds"),
    ):
        limit = {"weight": "papers_somaml_loss_with_this_head", "bias": "uniform_with_the_bias_kept"}[name]
        assert limits.verdict_on_limit(getattr(limits, limit), passed, same).kind == kind
    both = {**no_head, "limits": {"uniform_without_zeroing": passed, "no_noise_beyond_one_step": failed}}
    assert limits.verdict(both)[""].words.startswith("1 of the 1 ")


def alike(kept):
    cosines = {"same_class": 0.5, "other_class": -0.1, "initially_same_class": 0.1, "initially_other_class": 0.0}
    return {"tasks": 32, "tasks_where_the_gap_grew": kept, **cosines}


def everything(network, tasks):
    """evidence.json, as far as the page reads it, less the accuracy of a test."""
    scores = {"accuracy": [0.2, 0.5, 0.6], "ci95": [0.0, 0.1, 0.1]}
    modes = dict.fromkeys(("zeroing_off", "zeroing_on", "gain"), scores)
    config = {**config_of(3), "queries": 3, "inner_lr": 0.4, "inner_steps": 2, "test_steps": 2, "seed": 0}
    config |= {"model": {"name": "none"}, "trainer": {"precision": "32-true"}}
    initial = convolutional(
        NETWORKS["conv4_strided"], images_for(NETWORKS["conv4_strided"], tasks=1, shots=1, queries=3)
    )
    return report.finite(
        {
            **report.measure(measuring(network, tasks, initial=initial)),
            "test": {"tasks": 6, **modes},
            "tasks": {"features": 2, "gradients": 2},
            "model": {"checkpoint": "runs/one/checkpoints/best.ckpt", "iteration": 3, "trained_with": config},
            "config": config,
            "versions": {"python": "3"},
        }
    )


@functools.cache
def _of_the_model():
    return everything(*model())


def of_the_model():
    """`everything` of the model, to be changed: it is measured once."""
    return copy.deepcopy(_of_the_model())


CLAIM = """
from matplotlib.figure import Figure
from fewshot.evidence import page

def measure(model):
    return {"spread": {"norm": model.features.query.norm(dim=-1).mean().item()}}

def section(evidence):
    picture = page.Picture("spread", "An empty picture", "Nothing to see.")
    return page.Section("One's own", "Features are not zero", "As if they could (§2.1).", [], picture=picture)

def draw(evidence, shown):
    return Figure()

def verdict(evidence):
    return {"They are not.": page.either(evidence["spread"]["norm"] > 0, "really <b>")}
"""


def test_a_claim_is_added_in_one_file_and_one_entry(tmp_path, monkeypatch):
    (tmp_path / "spread.py").write_text(CLAIM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(claims, "CLAIMS", [*claims.CLAIMS, importlib.import_module("spread")])
    monkeypatch.setattr(report, "png", partial(png, dpi=20))
    network, tasks = model()
    numbers = everything(network, tasks)
    report.write(tmp_path, numbers, Shown(*images_of(tasks)))
    assert json.loads((tmp_path / "evidence.json").read_text())["spread"]["norm"] > 0
    text = assert_self_contained((tmp_path / "report.html").read_text(), len(PICTURES) + 1)
    assert text.count("Features are not zero") == 2 and text.count("holds: really <b>") == 2  # summary and section
    assert Image.open(tmp_path / "spread.png").size[0] > 0


PICTURES = dict.fromkeys(
    [
        *("motivating_example", "outer_step", "coefficients", "similarity", "memory", "prototypes", "accuracy"),
        *("label_orders", "frozen_encoder", "motion"),
    ],
    b"png",
)


def verdicts(numbers):
    """Of every section and statement: its words, and how it is judged; numbers of rounding's size left out."""
    said = []
    for claim in claims.CLAIMS:
        part = claim.section(numbers)
        rows = [row for table in part.tables if table.kind == "statements" for row in table.rows]
        for about, verdict in [
            *claim.verdict(numbers).items(),
            *(item for row in rows for item in row.verdicts.items()),
        ]:
            said.append((report.anchor(claim), about, verdict.kind, re.sub(r"\([^)]* ≤ [^)]*\)", "", verdict.words)))
    return said


def test_twenty_classes_are_told_apart_in_the_picture_of_an_outer_step():
    network, tasks = tiny(ways=20), draw(tasks=1, ways=20, shape=(1, 2, 3))
    evidence = outer_step.measure(measuring(network, tasks))
    shown = Shown.first_of(tasks, {"mean": [0], "std": [1]})
    axes = outer_step.panels(evidence["outer_step"], {"": evidence["outer_step"]["this_head"]}, shown).axes[0]
    drawn = [images for images in axes.collections if isinstance(images, PathCollection)]  # queries, then support
    looks = {(tuple(images.get_facecolor()[0]), str(images.get_paths()[0].vertices)) for images in drawn[:20]}
    assert len(drawn) == 40 and len(looks) == 20


@pytest.mark.parametrize("norm", ["batch", "group", "task"])
def test_the_page_says_whose_statistics_normalise(norm):
    config = {**config_of(3), "queries": 3, "inner_lr": 0.4, "inner_steps": 2, "test_steps": 2, "seed": 0}
    config |= {"model": {"name": "none", "norm": norm}, "trainer": {"precision": "32-true"}}
    evidence = {"config": config, "versions": {}, "test": {"tasks": 6}, "tasks": {"features": 2, "gradients": 2}}
    evidence["model"] = {"checkpoint": "best.ckpt", "iteration": 3, "trained_with": config}
    (said,) = [name for name, _ in report._measurement(evidence).rows if name.endswith("Norm")]
    assert said.lower() == f"{norm}norm"


def test_a_head_of_one_vector_gets_the_verdicts_of_a_zero_head():
    """As UnicornMAML's: whatever its size, its predictions are those of a zero head."""
    network, tasks = model(queries=4)
    zero_head(network.head)
    zero = everything(network, tasks)
    with torch.no_grad():
        network.head.weight += 30 * torch.randn(network.head.in_features).double()
        network.head.bias += 7
    numbers = everything(network, tasks)
    assert numbers["same_for_all"] == {"weight": True, "bias": True} and numbers["memory"]["this_head_before"] is None
    assert verdicts(numbers) == verdicts(zero)
    assert len([kind for *_, kind, _ in verdicts(numbers) if kind == "untested"]) >= 7
    assert "the same for every class" in render(numbers, PICTURES)
    with torch.no_grad():
        network.head.bias[0] += 1  # predictions before the step are no longer uniform
    other = everything(network, tasks)
    kinds = {words: kind for *_, kind, words in verdicts(other)}
    assert kinds["4 of the 4 statements tested do not hold"] == "fails"
    assert not any(page.HEAD_IS_ZERO.words in words for anchor, _, _, words in verdicts(numbers) if anchor == "memory")
    for figure in report.draw(other, Shown(*images_of(tasks))).values():
        assert figure.axes


def images_of(tasks):
    task = one_by_one(tasks)[0]
    return task.support[:, 0].numpy(), task.support_labels.numpy(), task.query[:, 0].numpy(), task.query_labels.numpy()


def test_an_untrained_model_gets_a_banner_and_no_verdict_on_training():
    numbers = of_the_model()
    numbers["model"]["iteration"] = 0
    html = render(numbers, PICTURES)
    assert "has had no outer update" in html.split("<section")[0] and 'class="banner"' in html
    judged = {anchor: kind for anchor, _, kind, _ in verdicts(numbers)}
    assert judged["similarity"] == judged["accuracy"] == "untested"
    numbers["model"]["iteration"] = 1
    judged = {anchor: kind for anchor, _, kind, _ in verdicts(numbers)}
    html = render(numbers, PICTURES)
    assert "untested" not in (judged["similarity"], judged["accuracy"]) and 'class="banner"' not in html
    assert "own outer gradient the theory says nothing" not in html
    trained = numbers["model"]["trained_with"]
    numbers["model"]["trained_with"] = trained | {
        "algo": trained["algo"] | {"_target_": "fewshot.algorithms.x.Reptile"}
    }
    html = " ".join(render(numbers, PICTURES).split())
    assert "trained by Reptile (first order). Of that algorithm’s own outer gradient the theory says nothing" in html


def test_what_holds_by_construction_is_a_theorem_and_gets_no_verdict():
    numbers = of_the_model()
    parts = {report.anchor(claim): (claim.section(numbers), claim.verdict(numbers)) for claim in claims.CLAIMS}
    for anchor, said in (
        ("outer-step", "FOMAML moves queries only"),
        ("noise", "(1 − q_{u})(1 − s_{u}) + Σ_{j≠u} q_{j} s_{j} ≥ 0"),
        ("identities", "The interference term E_{Q} W_{0} of the queries’ gradient vanishes"),
        ("motivating-example", "Column i of w becomes η m_{i}"),
        ("prototypes", "From a zeroed head one inner step is exactly this classifier"),
        ("motion", "a support feature stands still only where J(s)g = 0"),
        ("cross-task", "the head stores query features of the class that was called k"),
        ("label-orders", "A head of equal rows has no order"),
        ("frozen-encoder", "From a zeroed head the first step moves the head alone"),
    ):
        part, judged = parts[anchor]
        assert said in part.theorem and not any(said in about for about in judged)
    assert not any("same class" in head for table in parts["noise"][0].tables for head in table.heads)
    assert "interference" not in " ".join(names(identities.IDENTITIES))


def test_every_section_of_the_method_that_is_named_is_on_the_page():
    html = render(of_the_model(), PICTURES)
    checked = Page(html)
    assert {f"#method-2.{number}" for number in (*range(1, 8), 9, 10, 11, 12, 13)} <= set(checked.links)
    assert_links_lead_somewhere(checked)
    assert "§" not in html and "$" not in "".join(checked.text)
    assert "cqs(p)=∑jqjsj(p)−su(p)−qt+1[t=u]" in "".join(checked.text)  # the letters of its MathML


EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


def test_no_text_becomes_a_tag():
    """Whatever stands in evidence.json where the program does not choose the words."""
    numbers = of_the_model()
    trained = {**numbers["config"], **dict.fromkeys(("seed", "shots", "ways", "inner_lr", "inner_steps"), EVIL)}
    config = {**numbers["config"], **dict.fromkeys(("shots", "queries", "inner_lr", "test_steps"), EVIL)}
    trained |= {"dataset": {"name": EVIL}, "model": {"name": EVIL}}
    config |= {"dataset": {"name": f"{EVIL} 2"}, "trainer": {"precision": EVIL}}
    checkpoint = f"run/{EVIL.replace('/', '')}/a.ckpt"
    numbers["model"] = {"checkpoint": checkpoint, "iteration": 3, "trained_with": trained}
    checked = Page(render({**numbers, "config": config, "versions": {EVIL: EVIL}}, PICTURES))
    assert all(source.startswith("data:image/png") for source in checked.images)
    assert len(checked.images) == len(PICTURES) and "".join(checked.text).count(EVIL) >= 12


# The program


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory):
    """The folder of a small run."""
    folder = tmp_path_factory.mktemp("run")
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        overrides = [*SMALL, "ways=3", "val_tasks=4", "test_tasks=6", f"dataset.cache={cache}", "logger=none"]
        train_run(compose("config", overrides), Call(overrides, folder, Signals()))
    return folder


@pytest.fixture
def rough(monkeypatch):
    """Rough pictures, and what takes long on fewer tasks."""
    monkeypatch.setattr(report, "png", partial(png, dpi=20))
    monkeypatch.setattr(label_orders, "TASKS", 1)
    monkeypatch.setattr(frozen_encoder, "STEPS", (1, 2))


@pytest.fixture
def evidence(config, rough, monkeypatch):
    """evidence(checkpoint, folder, *overrides): what the program does, once Hydra has read its words.

    pictures: whether they are drawn into their files too.
    """

    def evidence(checkpoint, folder, *overrides, pictures=False):
        if not pictures:
            monkeypatch.setattr(report, "png", lambda figure: b"no picture")
        overrides = [f"checkpoint={checkpoint}", *overrides, "fit=false"]
        run(config(*overrides), overrides, folder)
        return json.loads((folder / "evidence.json").read_text()), (folder / "report.html").read_text()

    return evidence


@pytest.fixture
def program(main, monkeypatch, tmp_path):
    """program(*words): the program in tmp_path, in this process; test_notebooks.py has it in a new one."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: main(*words, command=evidence_main)


class Page(HTMLParser):
    """Every start tag must have its end; collects sources, links and anchors."""

    def __init__(self, html):
        super().__init__()
        self.open, self.images, self.links, self.anchors, self.text = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("script", "link", "iframe", "object")
        if tag == "img":
            assert attributes["alt"]
            self.images.append(attributes["src"])
        else:
            assert "src" not in attributes
        if "href" in attributes:
            self.links.append(attributes["href"])
        if "id" in attributes:
            self.anchors.append(attributes["id"])
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)


def assert_links_lead_somewhere(checked):
    """To a place on the page, or to an address that the method names."""
    names = report.METHOD.read_text()
    for link in checked.links:
        assert link[1:] in checked.anchors if link.startswith("#") else f"]({link})" in names, link
    assert checked.links


def assert_self_contained(html, pictures):
    checked = Page(html)
    assert len(checked.images) == pictures and all(
        source.startswith("data:image/png;base64,") for source in checked.images
    )
    assert_links_lead_somewhere(checked)
    above, method = html.split('id="method"')  # the method has addresses and braces
    assert "@import" not in html and "url(" not in html and "http" not in re.sub(r"base64,[^\"]*", "", above)
    of_markdown = "p|a|ul|ol|li|code|strong|table|thead|tbody|tr|th|td|span|div"
    of_formulas = "math|mrow|mi|mn|mo|mspace|mfrac|msqrt|mover|msub|msup|msubsup|munder"
    assert not re.search(rf"<(?!/?(h3|{of_markdown}|{of_formulas}|section|body|html)\b)", method)
    text = "".join(checked.text).split("0. The poster's claims")[0]
    assert not re.search(r"[{}]|\bNone\b|\bnan\b|\binf\b|tensor\(", text), "something was not filled in"
    return text


def test_the_program_writes_its_folder_and_nothing_else(trained, program, rough, tmp_path, capsys):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert program(f"checkpoint={trained}/checkpoints/best.ckpt") == 0
    said = capsys.readouterr().out
    assert "22 of 22 identities hold" in said and "report.html" in said
    after = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    new = {path.relative_to(trained).as_posix() for path in after.keys() - before.keys()}
    names = tuple(PICTURES)
    assert new == {"evidence/evidence.json", "evidence/report.html", *(f"evidence/{name}.png" for name in names)}
    assert all(after[path] == content for path, content in before.items())
    assert list(tmp_path.iterdir()) == []
    numbers = json.loads(after[trained / "evidence" / "evidence.json"])
    assert {"identities", "limits", "test", "tasks", "model", "config", "versions", *names} - {
        "accuracy"
    } <= numbers.keys()
    for check in [*numbers["identities"].values(), *numbers["limits"].values()]:
        assert check.keys() == {"value", "bound", "pass"} and check["pass"] == (check["value"] <= check["bound"])
    gain = numbers["test"].pop("gain")["accuracy"]
    assert numbers["test"] == json.loads((trained / "results.json").read_text())["test"]  # the very same numbers
    on, off = (numbers["test"][mode]["accuracy"] for mode in ("zeroing_on", "zeroing_off"))
    assert gain == pytest.approx([x - y for x, y in zip(on, off, strict=True)], abs=2e-6)
    assert numbers["tasks"] == {"features": 6, "gradients": 6}
    text = assert_self_contained(after[trained / "evidence" / "report.html"].decode(), len(names))
    assert "all 22 identities hold exactly" in text and "6 of the 6 statements tested do not hold" in text


def test_without_a_bias_with_shots_and_another_folder(evidence, run_of, tmp_path):
    other = "model=conv4_pooled", "model.head_bias=false", "dataset.size=16"
    folder = run_of(*other, "shots=2", "ways=3", "algo=zero", "inner_steps=1")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    numbers, html = evidence(checkpoint, tmp_path / "elsewhere" / "evidence", "test_steps=4", pictures=True)
    assert not (folder / "evidence").exists()
    assert (
        all(check["pass"] for check in numbers["identities"].values())
        and "bias_after_one_step" not in numbers["identities"]
    )
    assert len(numbers["prototypes"]["this_head"]) == 4 and numbers["prototypes"]["this_head"][0] == 1
    assert numbers["memory"]["this_head_before"] is None and numbers["limits"]["uniform_without_zeroing"]["pass"]
    text = assert_self_contained(html, len(PICTURES))
    assert "has no bias" in text and "head is zero" in text and "2 of the 2 statements tested do not hold" in text


@pytest.fixture
def run_of(run, tmp_path):
    return lambda *overrides: run(tmp_path / "run", *overrides)


def photos(root, *, classes, images):
    for split, number in (("train", 5), ("val", 5), ("test", classes)):
        for label in range(number):
            (root / split / f"{split}{label}").mkdir(parents=True)
            for name in range(images):
                pixels = np.random.default_rng((label, name)).integers(0, 255, (28, 28), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / f"{split}{label}" / f"{name}.png")
    return (
        *("dataset=folder", f"dataset.root={root}", "dataset.channels=1", "dataset.size=28", "dataset.mean=[0.0]"),
        "dataset.other_split=true",
        *("dataset.std=[1.0]", "model=conv4_strided"),
    )


def test_on_another_dataset_of_the_same_size(trained, evidence, tmp_path):
    dataset = photos(tmp_path / "photos", classes=6, images=4)
    numbers, html = evidence(trained / "checkpoints" / "best.ckpt", tmp_path / "evidence", *dataset, "test_steps=5")
    assert (
        numbers["config"]["dataset"]["name"] == "photos"
        and numbers["model"]["trained_with"]["dataset"]["name"] == "glyphs"
    )
    assert all(check["pass"] for check in numbers["identities"].values())
    assert "measured on photos" in assert_self_contained(html, len(PICTURES))


def test_what_a_checkpoint_stores_is_refused_or_shown_as_text(trained, evidence, tmp_path):
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    stored = content["fewshot"]["config"]
    stored |= {"seed": EVIL, "shots": EVIL, "inner_lr": EVIL, "dataset": {**stored["dataset"], "name": EVIL}}
    torch.save(content, tmp_path / "evil.ckpt")
    try:
        _, html = evidence(tmp_path / "evil.ckpt", tmp_path / "evidence", "test_tasks=2")
    except UserError as refusal:
        assert "\n" not in str(refusal)
    else:
        assert EVIL in assert_self_contained(html, len(PICTURES))


def test_images_are_shown_as_they_were():
    pixels = torch.rand(1, 2, 3, 4, 4, dtype=torch.float64)
    config = {"dataset": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in config["dataset"].values())
    labels = torch.arange(2)[None]
    shown = Shown.first_of(Task((pixels - mean) / std, labels, (pixels - mean) / std, labels), config["dataset"])
    np.testing.assert_allclose(shown.support, pixels[0].permute(0, 2, 3, 1), atol=1e-12)
    grey = {"dataset": {"mean": [0.0], "std": [1.0]}}
    shown = Shown.first_of(Task(pixels[:, :, :1], labels, pixels[:, :, :1], labels), grey["dataset"])
    assert shown.query.shape == (2, 4, 4)


def test_a_page_says_so_where_something_fails(trained, evidence, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "zero_head", lambda head: None)
    numbers, html = evidence(trained / "checkpoints" / "best.ckpt", tmp_path / "evidence")
    failed = [name for name, check in numbers["identities"].items() if not check["pass"]]
    text = assert_self_contained(html, len(PICTURES))
    assert len(failed) > 5 and f"{len(failed)} of 22 identities do not hold" in text and "all 22" not in text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), r"checkpoint=null: which model\? Give checkpoint=RUN, the folder of a run, or an exported model's .*"),
        (
            ("checkpoint=run/checkpoints",),
            r"checkpoint=run/checkpoints: no checkpoints/best\.ckpt in this folder; give .*",
        ),
        (("checkpoint=nowhere.ckpt",), r"checkpoint=nowhere.ckpt: no such file or folder, and no model .*"),
        (("checkpoint=FILE", "fit=false"), r"fit=false: nothing is trained here; leave it out"),
        (("checkpoint=FILE", "+zerong=true"), r"\+zerong=true: .* did you mean \+zeroing\?"),
    ],
    ids=["no checkpoint", "no checkpoint in it", "no such file", "fit", "unknown"],
)
def test_a_mistake_is_one_line(program, tmp_path, overrides, said, capsys):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (file := tmp_path / "run" / "checkpoints" / "a.ckpt").write_text("no checkpoint")
    line = program(*(override.replace("FILE", str(file)) for override in overrides))
    assert re.fullmatch(said, line) and capsys.readouterr() == ("", "")
    assert not (tmp_path / "run" / "evidence").exists()


def test_an_unknown_knob_has_hydras_words(program, trained, capsys):
    line = program(f"checkpoint={trained}/checkpoints/best.ckpt", "zerong=true")
    assert isinstance(line, str) and "zerong" in line and "Traceback" not in line + capsys.readouterr().err


def test_a_mistake_that_the_checkpoint_shows_is_one_line(trained, evidence, tmp_path):
    best = trained / "checkpoints" / "best.ckpt"
    few = photos(tmp_path / "few", classes=2, images=4)
    for overrides, said in (
        (("model.width=9",), "checkpoint=.*head.weight is .* there and .* here; it was trained with"),
        (("ways=4",), "checkpoint=.*trained with model=conv4_strided ways=3"),
        (("ways=80",), "ways=80: dataset glyphs has 30 val classes; at most 30 ways"),
        (few, "ways=3: dataset.root=.* has .* 2 test classes; use ways=2; or train nothing"),
    ):
        with pytest.raises(UserError, match=said) as error:
            evidence(best, tmp_path / "evidence", *overrides)
        assert "\n" not in str(error.value)
    content = torch.load(best, weights_only=True)
    content["state_dict"]["network.head.weight"][0] = float("nan")
    torch.save(content, tmp_path / "nan.ckpt")
    with pytest.raises(UserError, match="weights that are not finite numbers"):
        evidence(tmp_path / "nan.ckpt", tmp_path / "evidence")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(UserError, match="cannot be read, truncated or not a checkpoint"):
        evidence(tmp_path / "text.ckpt", tmp_path / "evidence")
    assert not (tmp_path / "evidence").exists()


@pytest.mark.skipif(not (SHARED / "omniglot").exists(), reason="no omniglot in the shared data")
def test_on_real_images(trained, evidence, tmp_path):
    dataset = ("dataset=omniglot", f"dataset.root={SHARED / 'omniglot'}", "dataset.other_split=true", "test_tasks=3")
    numbers, html = evidence(trained / "checkpoints" / "last.ckpt", tmp_path / "evidence", *dataset)
    assert all(check["pass"] for check in numbers["identities"].values())
    assert "glyphs 3-way 1-shot, after 6 outer updates, measured on omniglot" in assert_self_contained(
        html, len(PICTURES)
    )
