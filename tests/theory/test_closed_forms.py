"""The closed forms of docs/method.md section 2: against automatic differentiation, and formula by formula."""

import doctest
import itertools
from functools import partial

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from by_hand import adapted, differentiated, linear
from examples import loop, prepared
from hypothesis import strategies as st

from fewshot.data.task import Task
from fewshot.maml import sequential
from fewshot.models.network import conv4_strided
from fewshot.theory import closed_forms
from fewshot.theory.closed_forms import (
    Gradients,
    adapt_head,
    closed_form_gradients,
    contrastive_coefficients,
)
from fewshot.theory.features import Features, centred

each_order = pytest.mark.parametrize("first_order", [True, False], ids=["FOMAML", "SOMAML"])
each_loss = pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
each_head = pytest.mark.parametrize("head", ["random", "zero"])
with_and_without_bias = pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])


def draw(*, tasks=(), counts=(1,) * 5, queries=2, features=7, head="random", biased=True, seed=0):
    """counts: support images of each class; labels in random order; a zero head has a zero bias."""
    random = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=random, dtype=torch.float64)
    ways, scale, tasks = len(counts), float(head == "random"), torch.Size(tasks)

    def images(labels):
        shuffled = [labels[torch.randperm(len(labels), generator=random)] for _ in range(tasks.numel())]
        return normal(*tasks, len(labels), features), torch.stack(shuffled).reshape(*tasks, -1)

    support = images(torch.arange(ways).repeat_interleave(torch.tensor(counts)))
    query = images(torch.arange(ways).repeat_interleave(queries))
    return Features(*support, *query, scale * normal(ways, features), scale * normal(ways) if biased else None)


# The reference: the inner loop and its query loss written plainly for one task, differentiated by torch.


def one_by_one(function, inputs, **knobs):
    """The function of each task by itself, stacked again."""
    tasks = inputs.support.shape[:-2]
    by_task = zip(*(field.reshape(-1, *field.shape[len(tasks) :]) for field in inputs[:4]), strict=True)
    results = [function(*task, inputs.weight, inputs.bias, **knobs) for task in by_task]
    return [torch.stack(field).reshape(tasks + field[0].shape) for field in zip(*results, strict=True)]


def relative(closed, expected):
    assert closed.shape == expected.shape and closed.dtype == expected.dtype
    return ((closed - expected).norm() / expected.norm().clamp_min(1e-3)).item()  # 1e-3: where zeros are expected


def assert_as_differentiated(inputs, *, inner_lr=0.4, inner_steps=1, first_order, loss="cross_entropy"):
    knobs = {"inner_lr": inner_lr, "inner_steps": inner_steps, "first_order": first_order, "loss": loss}
    value, query, support, weight, *bias = one_by_one(differentiated, inputs, **knobs)
    closed = closed_form_gradients(inputs, **knobs)
    assert relative(closed.loss, value) < 1e-10
    assert relative(closed.query_features, query) < 1e-10
    assert relative(closed.support_features, support) < 1e-10
    assert relative(closed.weight, weight) < 1e-10
    assert (closed.bias is None) == (inputs.bias is None)
    if bias:
        assert relative(closed.bias, bias[0]) < 1e-10
    return closed


# Cross entropy (2.4, 2.5) and mean square (2.1)


@each_order
@with_and_without_bias
@each_head
@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("inner_steps", [1, 2, 5])
@pytest.mark.parametrize("tasks", [(), (3,), (2, 3)], ids=str)
def test_the_gradients_are_those_of_automatic_differentiation(first_order, biased, head, shots, inner_steps, tasks):
    inputs = draw(tasks=tasks, counts=(shots,) * 5, head=head, biased=biased)
    closed = assert_as_differentiated(inputs, inner_steps=inner_steps, first_order=first_order)
    assert closed.query_features.norm() > 1e-2 and closed.weight.norm() > 1e-2
    assert (closed.support_features.norm() == 0) if first_order else (closed.support_features.norm() > 1e-3)
    if inner_steps > 1:  # the later steps count: more than the tolerance could hide
        fewer = closed_form_gradients(inputs, inner_lr=0.4, inner_steps=inner_steps - 1, first_order=first_order)
        assert relative(fewer.query_features, closed.query_features) > 1e-3


@each_order
@each_loss
@each_head
@pytest.mark.parametrize("counts", [(3, 1, 2), (4, 0, 1), (0, 0, 2)], ids=str)
def test_the_support_may_be_unbalanced_and_a_class_absent(first_order, loss, head, counts):
    steps, inner_lr = (3, 0.4) if loss == "cross_entropy" else (1, 0.05)
    inputs = draw(tasks=(2,), counts=counts, queries=3, head=head)
    assert_as_differentiated(inputs, inner_lr=inner_lr, inner_steps=steps, first_order=first_order, loss=loss)


@each_order
@with_and_without_bias
@each_head
@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("tasks", [(), (2, 3)], ids=str)
def test_the_gradients_of_the_mean_square_are_those_of_automatic_differentiation(
    first_order, biased, head, shots, tasks
):
    inputs = draw(tasks=tasks, counts=(shots,) * 5, head=head, biased=biased)
    assert_as_differentiated(inputs, inner_lr=0.05, first_order=first_order, loss="mse")


@hypothesis.settings(max_examples=40)
@hypothesis.given(data=st.data())
def test_any_shapes_and_labels(data):
    ways, features, tasks = (data.draw(st.integers(1, most)) for most in (4, 4, 3))
    support, query = (data.draw(st.integers(1, 5)) for _ in range(2))
    labels = [
        torch.tensor(data.draw(st.lists(st.integers(0, ways - 1), min_size=tasks * images, max_size=tasks * images)))
        for images in (support, query)
    ]
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    normal = partial(torch.randn, generator=random, dtype=torch.float64)
    inputs = Features(
        normal(tasks, support, features),
        labels[0].reshape(tasks, support),
        normal(tasks, query, features),
        labels[1].reshape(tasks, query),
        normal(ways, features),
        normal(ways) if data.draw(st.booleans()) else None,
    )
    assert_as_differentiated(inputs, inner_steps=data.draw(st.integers(1, 4)), first_order=data.draw(st.booleans()))


# The parts of the query features' gradient (2.3, 2.4)


def predictions(x, labels, query, query_labels, weight, bias, **knobs):
    """Q (Q, K) and the support predictions P (N, S, K) of one task, by the reference's inner loop."""
    head = tuple(p.clone().requires_grad_() for p in (weight, bias) if p is not None)
    *before, last = adapted(x, labels, head, loss="cross_entropy", **knobs)
    return linear(query, last).softmax(1).detach(), torch.stack(
        [linear(x, head).softmax(1).detach() for head in before]
    )


@with_and_without_bias
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_the_parts_are_interference_and_contrast(biased, inner_steps):
    inputs = draw(tasks=(2,), counts=(2, 1, 3), biased=biased)
    knobs = {"inner_lr": 0.4, "inner_steps": inner_steps}
    closed = closed_form_gradients(inputs, first_order=True, **knobs)
    Q, _ = one_by_one(predictions, inputs, **knobs)
    interference = (Q - F.one_hot(inputs.query_labels, 3)) @ inputs.weight / 6
    C = contrastive_coefficients(inputs, **knobs)
    assert C.shape == (inner_steps, 2, 6, 6)
    assert relative(closed.interference, interference) < 1e-12
    assert relative(closed.contrastive, -0.4 / (6 * 6) * C.sum(0) @ inputs.support) < 1e-12
    assert torch.equal(closed.interference + closed.contrastive, closed.query_features)
    second = closed_form_gradients(inputs, first_order=False, **knobs)
    for part in ("query_features", "interference", "contrastive", "loss"):
        assert torch.equal(getattr(closed, part), getattr(second, part))


@with_and_without_bias
@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("tasks", [(), (2,)], ids=str)
def test_the_coefficients_are_those_of_the_elementwise_formula(biased, inner_steps, tasks):
    inputs = draw(tasks=tasks, counts=(2, 1, 3), biased=biased)
    knobs = {"inner_lr": 0.4, "inner_steps": inner_steps}
    closed = contrastive_coefficients(inputs, **knobs)
    assert closed.shape == (inner_steps, *tasks, 6, 6)
    Q, P = one_by_one(predictions, inputs, **knobs)
    for task in itertools.product(*(range(n) for n in tasks)):
        for p, (query, u), (support, t) in itertools.product(
            range(inner_steps), enumerate(inputs.query_labels[task]), enumerate(inputs.support_labels[task])
        ):
            q, s = Q[task][query], P[task][p, support]
            c = sum(q[j] * s[j] for j in range(3)) - s[u] - q[t] + float(t == u)
            torch.testing.assert_close(closed[p][task][query, support], c, rtol=1e-12, atol=1e-14)


def same_class(inputs):
    """1[t=u], (..., Q, S)"""
    return (inputs.query_labels.unsqueeze(-1) == inputs.support_labels.unsqueeze(-2)).double()


def noise_free(inputs, **knobs):
    """1[t=u] - q_t, (..., Q, S)"""
    Q, _ = one_by_one(predictions, inputs, **knobs)
    return same_class(inputs) - Q.gather(-1, inputs.support_labels.unsqueeze(-2).expand(*Q.shape[:-1], -1))


@with_and_without_bias
@pytest.mark.parametrize("counts", [(1,) * 5, (3,) * 5, (4, 1, 2, 1, 0)], ids=str)
def test_from_a_zero_head_the_coefficients_of_step_one_have_no_noise(biased, counts):
    inputs = draw(tasks=(3,), counts=counts, head="zero", biased=biased)
    knobs = {"inner_lr": 0.4, "inner_steps": 1}
    (closed,) = contrastive_coefficients(inputs, **knobs)
    assert relative(closed, noise_free(inputs, **knobs)) < 1e-12
    assert torch.equal(closed > 0, same_class(inputs) == 1)
    if len(set(counts)) == 1:
        assert (closed > 0).double().mean() == 1 / 5  # exactly 1/K
    assert not closed_form_gradients(inputs, first_order=False, **knobs).interference.any()


@pytest.mark.parametrize("inner_steps", [2, 3, 5])
def test_from_a_zero_head_the_noise_is_back_after_step_one(inner_steps):
    """So that MAML "becomes supervised contrastive learning" holds for one inner step alone (2.6)."""
    inputs = draw(tasks=(3,), counts=(2,) * 5, head="zero")
    knobs = {"inner_lr": 0.4, "inner_steps": inner_steps}
    first, *later = contrastive_coefficients(inputs, **knobs)
    expected = noise_free(inputs, **knobs)
    assert relative(first, expected) < 1e-12
    assert all(relative(c, expected) > 1e-2 for c in later)


def test_from_a_random_head_negative_pairs_get_the_wrong_sign():
    inputs = draw(tasks=(20,))
    knobs = {"inner_lr": 0.4, "inner_steps": 1}
    negative = same_class(inputs) == 0
    assert (noise_free(inputs, **knobs)[negative] < 0).all()
    assert (contrastive_coefficients(inputs, **knobs)[0][negative] > 0).double().mean() > 0.05


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_within_a_class_no_coefficient_is_negative(inner_steps):
    """(1 - q_u)(1 - s_u) + sum_{j != u} q_j s_j, whatever the head; so no sign is ever wrong there."""
    inputs = draw(tasks=(20,), counts=(2,) * 5)
    knobs = {"inner_lr": 0.4, "inner_steps": inner_steps}
    Q, P = one_by_one(predictions, inputs, **knobs)
    u = inputs.query_labels.unsqueeze(-1)
    q_u, s_u = Q.gather(-1, u), P.gather(-1, u.mT.unsqueeze(1).expand(*P.shape[:-1], -1)).movedim(1, 0)  # (N, B, S, Q)
    together = torch.einsum("bqk,bnsk->nbqs", Q, P) - q_u * s_u.mT  # over all classes but u
    closed, same = contrastive_coefficients(inputs, **knobs), same_class(inputs) == 1
    assert relative(closed[:, same], ((1 - q_u) * (1 - s_u.mT) + together)[:, same]) < 1e-10
    assert (closed[:, same] > 0).all() and (closed[:, ~same] > 0).any()


@each_order
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_what_all_classes_share_of_the_head_changes_nothing(first_order, inner_steps):
    inputs, knobs = draw(tasks=(2,), counts=(2, 1, 3)), {"inner_lr": 0.4, "inner_steps": inner_steps}
    shifted = inputs._replace(weight=inputs.weight + 30 * inputs.weight[:1], bias=inputs.bias + 7)
    for field, other in zip(
        *(closed_form_gradients(one, **knobs, first_order=first_order) for one in (inputs, shifted)), strict=True
    ):
        torch.testing.assert_close(other, field, rtol=1e-10, atol=1e-12)
    assert relative(centred(shifted.weight), inputs.weight - inputs.weight.mean(0)) < 1e-12
    assert not centred(inputs.weight[:1].expand(3, -1)).any()


@each_order
def test_labels_have_no_order_where_rows_and_biases_are_equal(first_order):
    """Where the biases differ they have one, though the rows are equal (2.10)."""
    inputs, order = draw(counts=(2,) * 5), torch.tensor([2, 0, 4, 1, 3])
    knobs = {"inner_lr": 0.4, "inner_steps": 2, "first_order": first_order}
    for bias, no_order in ((inputs.bias[:1].expand(5), True), (inputs.bias, False)):
        first = inputs._replace(weight=inputs.weight[:1].expand(5, -1), bias=bias)
        renamed = first._replace(support_labels=order[first.support_labels], query_labels=order[first.query_labels])
        expected, got = (closed_form_gradients(one, **knobs) for one in (first, renamed))
        assert (relative(got.query_features, expected.query_features) < 1e-10) == no_order
        assert (relative(got.weight[order], expected.weight) < 1e-10) == no_order


def test_zero_weights_with_a_bias_are_no_zero_head():
    """P = softmax(b) is not uniform: there is noise, and the share of c > 0 is not 1/K (2.6)."""
    inputs = draw(tasks=(20,), head="zero")._replace(bias=torch.linspace(-2, 2, 5, dtype=torch.float64))
    knobs = {"inner_lr": 0.4, "inner_steps": 1}
    closed = contrastive_coefficients(inputs, **knobs)[0]
    _, P = one_by_one(predictions, inputs, **knobs)
    torch.testing.assert_close(P, inputs.bias.softmax(0).expand_as(P))
    assert relative(closed, noise_free(inputs, **knobs)) > 0.1
    assert (closed > 0).double().mean() != 1 / 5
    assert not closed_form_gradients(inputs, first_order=True, **knobs).interference.any()


@each_head
@pytest.mark.parametrize("bias", [False, True])
def test_the_papers_support_gradient_is_its_first_part_alone(head, bias):
    """-eta/(N_s N_q) C^T Phi_Q: exact where W_0 = 0, whatever the bias, but not from a random head (2.5)."""
    inputs = draw(tasks=(3,), counts=(2,) * 5, head=head)._replace(bias=torch.arange(5.0).double() if bias else None)
    knobs = {"inner_lr": 0.4, "inner_steps": 1}
    closed = closed_form_gradients(inputs, first_order=False, **knobs).support_features
    first_part = -0.4 / (10 * 10) * contrastive_coefficients(inputs, **knobs)[0].mT @ inputs.query
    if head == "zero":
        assert relative(first_part, closed) < 1e-12
    else:
        assert relative(first_part, closed) > 0.1


@with_and_without_bias
@pytest.mark.parametrize("inner_steps", [1, 3])
def test_the_adapted_head_is_that_of_the_inner_loop(biased, inner_steps):
    inputs, knobs = draw(tasks=(2,), counts=(2, 1, 3), biased=biased), {"inner_lr": 0.4, "inner_steps": inner_steps}
    first = tuple(p.clone().requires_grad_() for p in (inputs.weight, inputs.bias) if p is not None)
    head = adapt_head(inputs, **knobs)
    closed = head.weight, head.W[-1][..., 7:].squeeze(-1)  # the bias is the weight of an eighth feature
    assert head.W[-1].shape[-1] == 7 + biased
    for task in range(2):
        last = adapted(inputs.support[task], inputs.support_labels[task], first, loss="cross_entropy", **knobs)[-1]
        for parameter, expected in zip(closed, last, strict=False):
            assert relative(parameter[task], expected.detach()) < 1e-12


# The formulas of 2.1, the motivating example


@pytest.mark.parametrize("counts", [(1,) * 5, (2, 1, 3, 0, 1)], ids=str)
def test_the_motivating_example(counts):
    inputs, eta = draw(counts=counts, head="zero", biased=False), 0.05
    knobs = {"inner_lr": eta, "inner_steps": 1, "loss": "mse"}
    closed = closed_form_gradients(inputs, first_order=False, **knobs)
    (C,) = contrastive_coefficients(inputs, **knobs)

    T_S, T_Q = (F.one_hot(labels, 5).double() for labels in (inputs.support_labels, inputs.query_labels))
    m = torch.stack([inputs.support[inputs.support_labels == k].sum(0) for k in range(5)])
    W_1 = eta * m  # a classifier whose rows are eta times the sums of the classes' support features
    expected = same_class(inputs) - eta * inputs.query @ m[inputs.support_labels].T
    identity = torch.eye(7, dtype=torch.float64)
    assert relative(C, expected) < 1e-12
    assert relative(closed.loss, (eta * inputs.query @ m.T - T_Q).square().sum() / 2) < 1e-12
    assert relative(closed.query_features, -eta * expected @ inputs.support) < 1e-12
    assert relative(closed.support_features, -eta * expected.T @ inputs.query) < 1e-12
    inner = identity - eta * inputs.support.T @ inputs.support
    assert relative(closed.weight, (W_1 @ inputs.query.T - T_Q.T) @ inputs.query @ inner) < 1e-12
    assert relative(W_1, eta * T_S.T @ inputs.support) < 1e-12

    head = draw(counts=counts, biased=False)  # not zero: W_1 has the memory of W_0 that the data leave
    W_1 = head.weight @ inner + eta * T_S.T @ inputs.support
    closed = closed_form_gradients(inputs._replace(weight=head.weight), first_order=False, **knobs)
    assert relative(closed.weight, (W_1 @ inputs.query.T - T_Q.T) @ inputs.query @ inner) < 1e-12
    assert relative(closed.query_features, (inputs.query @ W_1.T - T_Q) @ W_1) < 1e-12


def test_with_the_mean_of_torchs_mse_loss_eta_is_smaller():
    inputs, inner_lr = draw(counts=(2,) * 5), 0.4
    head = tuple(p.clone().requires_grad_() for p in (inputs.weight, inputs.bias))
    T_S, T_Q = (F.one_hot(labels, 5).double() for labels in (inputs.support_labels, inputs.query_labels))
    gradients = torch.autograd.grad(F.mse_loss(linear(inputs.support, head), T_S), head)
    head = tuple(p - inner_lr * g for p, g in zip(head, gradients, strict=True))
    query_loss = (linear(inputs.query, head) - T_Q).square().sum() / 2
    eta = 2 * inner_lr / (10 * 5)
    closed = closed_form_gradients(inputs, inner_lr=eta, inner_steps=1, first_order=True, loss="mse")
    assert relative(closed.loss, query_loss.detach()) < 1e-12


# The encoder's gradient (2.5, 2.6), through convolutions and BatchNorm


def images(*, tasks=2, ways=3, shots=2, queries=3, size=28):
    random = torch.Generator().manual_seed(0)

    def images_of_class(count):
        labels = torch.arange(ways).repeat_interleave(count).expand(tasks, -1)
        return torch.randn(tasks, ways * count, 1, size, size, generator=random, dtype=torch.float64), labels

    return Task(*images_of_class(shots), *images_of_class(queries))


def network(*, zeroed=False):
    torch.manual_seed(1)
    return prepared(conv4_strided(channels=1, size=28, ways=3, width=6), zeroed)


def through_the_closed_form(net, tasks, **knobs):
    """<[dL/dPhi_Q], Phi_Q> + <[dL/dPhi_S], Phi_S>, mean over tasks: the encoder's gradients by name, and Gradients."""
    features = Features.of(net, tasks)
    closed = closed_form_gradients(features, **knobs)
    assert isinstance(closed, Gradients)
    surrogate = (closed.query_features * features.query).sum() + (closed.support_features * features.support).sum()
    parameters = dict(net.encoder.named_parameters())
    gradients = torch.autograd.grad(surrogate / len(tasks.support), parameters.values())
    return dict(zip(parameters, gradients, strict=True)), closed


def with_the_head_alone_adapted(net, tasks, *, first_order, **knobs):
    """The encoder's gradients by torch, support features constant in the first order."""
    parameters, loss = dict(net.encoder.named_parameters()), 0.0
    for x, labels, query, query_labels in zip(*tasks, strict=True):
        support = net.encoder(x)
        head = (net.head.weight, net.head.bias)
        head = adapted(support.detach() if first_order else support, labels, head, loss="cross_entropy", **knobs)[-1]
        loss = loss + F.cross_entropy(linear(net.encoder(query), head), query_labels) / len(tasks.support)
    return dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))


def worst(gradients, expected):
    assert gradients.keys() == expected.keys() and all(value.norm() > 1e-6 for value in expected.values())
    return max(relative(gradients[name] / value.norm(), value / value.norm()) for name, value in expected.items())


@each_order
@pytest.mark.parametrize("inner_steps", [1, 3])
@pytest.mark.parametrize("zeroed", [False, True], ids=["random", "zero"])
def test_the_encoders_gradient_follows_from_the_features(first_order, inner_steps, zeroed):
    net, tasks = network(zeroed=zeroed), images()
    knobs = {"inner_lr": 0.4, "inner_steps": inner_steps, "first_order": first_order}
    expected = with_the_head_alone_adapted(net, tasks, **knobs)
    gradients, _ = through_the_closed_form(net, tasks, **knobs)
    assert worst(gradients, expected) < 1e-10
    other, _ = through_the_closed_form(net, tasks, **{**knobs, "first_order": not first_order})
    assert worst(other, expected) > 1e-2  # the support features' part is seen


@each_order
def test_from_a_zero_head_one_step_of_full_maml_is_head_only_maml(first_order):
    """The encoder's gradient, in both orders; from a random head, or with two steps, it is not (2.6)."""
    tasks = images()
    for zeroed, inner_steps in ((True, 1), (False, 1), (True, 2)):
        net = network(zeroed=zeroed)
        knobs = {"inner_lr": 0.4, "inner_steps": inner_steps, "first_order": first_order}
        gradients, closed = through_the_closed_form(net, tasks, **knobs)
        losses, _ = sequential.meta_gradient(net, tasks, *loop(**knobs))
        full = {name: p.grad for name, p in net.encoder.named_parameters()}
        if zeroed and inner_steps == 1:
            assert worst(gradients, full) < 1e-10
            assert relative(closed.loss, losses) < 1e-12
            if first_order:
                assert relative(closed.weight.mean(0), net.head.weight.grad) < 1e-10
                assert relative(closed.bias.mean(0), net.head.bias.grad) < 1e-10
        else:
            assert worst(gradients, full) > 1e-3


# What comes back, and what is refused


def test_the_example_of_the_docstring_runs():
    results = doctest.testmod(closed_forms)
    assert results.attempted > 5 and results.failed == 0


@each_order
@each_loss
@pytest.mark.parametrize("integer", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_float32_in_is_float32_out(first_order, loss, integer):
    inputs = draw(tasks=(2,), counts=(2,) * 5)
    knobs = {"inner_lr": 0.05, "inner_steps": 3 if loss == "cross_entropy" else 1, "loss": loss}
    single = Features(*(field.float() if field.is_floating_point() else field.to(integer) for field in inputs))
    pairs = zip(
        (*closed_form_gradients(single, first_order=first_order, **knobs), contrastive_coefficients(single, **knobs)),
        (*closed_form_gradients(inputs, first_order=first_order, **knobs), contrastive_coefficients(inputs, **knobs)),
        strict=True,
    )
    for closed, expected in pairs:
        assert closed.dtype == torch.float32
        assert relative(closed.double(), expected) < 1e-5


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_nothing_is_differentiated(requires_grad, enabled):
    inputs = draw(tasks=(2,))
    expected = closed_form_gradients(inputs, inner_lr=0.4, inner_steps=2, first_order=False)
    inputs = Features(
        *(field.requires_grad_(requires_grad) if field.is_floating_point() else field for field in inputs)
    )
    before = [field.detach().clone() for field in inputs]
    with torch.set_grad_enabled(enabled):
        closed = closed_form_gradients(inputs, inner_lr=0.4, inner_steps=2, first_order=False)
        coefficients = contrastive_coefficients(inputs, inner_lr=0.4, inner_steps=2)
        assert torch.is_grad_enabled() == enabled
    assert all(torch.equal(a, b) and not a.requires_grad for a, b in zip(closed, expected, strict=True))
    assert not coefficients.requires_grad
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(inputs, before, strict=True))


MISTAKES = {
    "an unknown loss": ({"loss": "hinge"}, r"loss='hinge': give 'cross_entropy' or 'mse'"),
    "no step": ({"inner_steps": 0}, r"inner_steps=0: give an integer of at least 1"),
    "half a step": ({"inner_steps": 1.5}, r"inner_steps=1.5: give an integer"),
    "mse, two steps": ({"inner_steps": 2, "loss": "mse"}, r"inner_steps=2: loss='mse' takes one step; give 1, or"),
    "a vector as weight": ({"weight": torch.zeros(5)}, r"weight is \(5,\) torch.float32: give \(K, d\)"),
    "integers as weight": ({"weight": torch.zeros(5, 7).long()}, r"weight is \(5, 7\) torch.int64: .*torch.float32 or"),
    "a short bias": ({"bias": torch.zeros(4).double()}, r"bias is \(4,\) torch.float64: give \(5,\)"),
    "a bias of another type": ({"bias": torch.zeros(5)}, r"bias is \(5,\) torch.float32: give \(5,\) torch.float64"),
    "one vector": (
        {"query": torch.zeros(7).double()},
        r"query is \(7,\) torch.float64: give \(\.\.\., images, 7",
    ),
    "fewer features": ({"support": torch.zeros(2, 5, 6).double()}, r"support is \(2, 5, 6\) .* images, 7\)"),
    "features of another type": (
        {"query": torch.zeros(2, 10, 7)},
        r"query is \(2, 10, 7\) torch.float32: give",
    ),
    "too few labels": (
        {"support_labels": torch.zeros(2, 4).long()},
        r"support_labels is \(2, 4\) .* give \(2, 5\) int",
    ),
    "one task's labels": (
        {"query_labels": torch.zeros(10).long()},
        r"query_labels is \(10,\) .* give \(2, 10\) integers",
    ),
    "labels that are no integers": ({"query_labels": torch.zeros(2, 10)}, r"query_labels is .*float32: .* integers"),
    "labels that are yes or no": (
        {"support_labels": torch.zeros(2, 5).bool()},
        r"support_labels is .*torch.bool: give",
    ),
    "a label too large": ({"query_labels": torch.full((2, 10), 5)}, r"query_labels are 5\.\.5: give 0\.\.4"),
    "a negative label": ({"support_labels": torch.full((2, 5), -1)}, r"support_labels are -1\.\.-1: give 0\.\.4"),
    "no image": (
        {"support": torch.zeros(2, 0, 7).double(), "support_labels": torch.zeros(2, 0).long()},
        r"support is \(2, 0, 7\) torch.float64: give at least one image",
    ),
    "other tasks": (
        {"query": torch.zeros(3, 10, 7).double(), "query_labels": torch.zeros(3, 10).long()},
        r"support is \(2, 5, 7\).*query \(3, 10, 7\).*: give both the same task dimensions",
    ),
}


@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_clear_line(change, message):
    knobs = {"inner_lr": 0.4, "inner_steps": 1, "loss": "cross_entropy"}
    knobs |= {name: value for name, value in change.items() if name in knobs}
    inputs = draw(tasks=(2,))._replace(**{name: value for name, value in change.items() if name not in knobs})
    for function in (partial(closed_form_gradients, first_order=True), contrastive_coefficients):
        with pytest.raises(ValueError, match=message) as error:
            function(inputs, **knobs)
        assert "\n" not in str(error.value)
