"""The explicit loss in MAML's place: the same gradients and weights where the theory says so, others where not."""

from functools import partial

import pytest
import torch
from examples import NETWORKS, assert_close, convolutional, images_for, meta_gradient

from fewshot.maml import explicit_loss as explicit
from fewshot.maml import sequential
from fewshot.models.head import zero_head
from fewshot.theory.closed_forms import adapt_head, closed_form_gradients
from fewshot.theory.features import Features

each_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
each_order = pytest.mark.parametrize("first_order", [True, False], ids=["first", "second"])
EXPLICIT = {"noise": True, "interference": True}


def drawn_features(K=3, d=4, B=2):
    random = torch.Generator().manual_seed(0)

    def features(images):
        return torch.randn(B, images, d, generator=random, dtype=torch.float64, requires_grad=True)

    labels = partial(torch.randint, K, generator=random)
    head = torch.randn(K, d, generator=random, dtype=torch.float64), torch.randn(K, generator=random).double()
    return Features(features(5), labels(size=(B, 5)), features(7), labels(size=(B, 7)), *head)


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_its_terms_are_the_terms_of_the_closed_form(inner_steps):
    features = drawn_features()
    closed = closed_form_gradients(features, inner_lr=0.3, inner_steps=inner_steps, first_order=True)

    def gradient(**terms):
        loss = adapt_head(features, inner_lr=0.3, inner_steps=inner_steps).explicit_loss(first_order=True, **terms)
        assert loss.shape == (2,)
        return torch.autograd.grad(loss.sum(), (features.support, features.query), allow_unused=True)

    for terms, expected in (
        (EXPLICIT, closed.query_features),
        ({"noise": True, "interference": False}, closed.contrastive),
    ):
        by_support, by_query = gradient(**terms)
        assert by_support is None  # phi(s) is constant in first order
        torch.testing.assert_close(by_query, expected, rtol=1e-12, atol=1e-14)
    _, quiet = gradient(noise=False, interference=False)
    assert (quiet - closed.contrastive).norm() > 0.1 * closed.contrastive.norm()
    for task in range(2):  # pair by pair: eta/(N_s N_q) (q_t - 1[t=u]) phi(s) in every step
        adapted = adapt_head(features, inner_lr=0.3, inner_steps=inner_steps)
        for i, u in enumerate(features.query_labels[task]):
            by_hand = sum(
                (adapted.Q[task, i, t] - float(t == u)) * features.support[task, j]
                for j, t in enumerate(features.support_labels[task])
            )
            torch.testing.assert_close(quiet[task, i], inner_steps * 0.3 / 5 / 7 * by_hand, rtol=1e-10, atol=1e-14)


def test_without_noise_the_coefficients_have_the_right_sign():
    """One support image s and one query q: the loss asks for less or more of phi(s)^T phi(q)."""
    for same in (True, False):
        phi_S, _, phi_Q, _, weight, bias = drawn_features(B=1)
        phi_S, phi_Q = phi_S[:, :1], phi_Q[:, :1].detach().requires_grad_()
        features = Features(phi_S, torch.tensor([[0]]), phi_Q, torch.tensor([[0 if same else 1]]), weight, bias)
        adapted = adapt_head(features, inner_lr=0.3, inner_steps=1)
        loss = adapted.explicit_loss(first_order=True, noise=False, interference=False)
        (by_query,) = torch.autograd.grad(loss.sum(), phi_Q)
        assert ((by_query * phi_S).sum() < 0) == same  # descent moves phi(q) along phi(s), or against it


@each_network
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("inner_steps", [1, 2, 5])
def test_first_order_is_head_only_maml_from_any_head(build, bias, shots, inner_steps):
    tasks = images_for(build, tasks=3, shots=shots)
    network = convolutional(partial(build, head_bias=bias), tasks)
    knobs = {"inner_lr": 0.4, "inner_steps": inner_steps, "first_order": True}
    expected, (losses, accuracies) = meta_gradient(sequential, network, tasks, adapted="head", **knobs)
    actual, (loss, accuracy) = meta_gradient(explicit, network, tasks, **EXPLICIT, **knobs)
    assert_close(actual, expected, 1e-10)
    torch.testing.assert_close(loss, losses, rtol=1e-10, atol=0)
    assert torch.equal(accuracy, accuracies)


def test_of_an_encoder_in_bfloat16_the_loss_is_computed_in_the_precision_of_the_head():
    build = NETWORKS["conv4_pooled"]
    tasks = images_for(build, tasks=2)
    network = convolutional(build, tasks).float()
    tasks = tasks._replace(support=tasks.support.float(), query=tasks.query.float())
    with torch.autocast("cpu", torch.bfloat16):
        knobs = {"inner_lr": 0.4, "inner_steps": 2, "first_order": True}
        actual, (loss, _) = meta_gradient(explicit, network, tasks, **EXPLICIT, **knobs)
        features = Features.of(network, tasks)
    closed = closed_form_gradients(features, inner_lr=0.4, inner_steps=2, first_order=True)
    torch.testing.assert_close(actual["head.weight"], closed.weight.mean(0))
    torch.testing.assert_close(loss, closed.loss)


@pytest.mark.parametrize("zeroed", [True, False], ids=["zeroed", "random"])
def test_second_order_is_head_only_maml_from_a_zero_head_alone(zeroed):
    build = NETWORKS["conv4_strided"]
    tasks = images_for(build, tasks=3)
    network = convolutional(build, tasks)
    if zeroed:
        zero_head(network.head)
    knobs = {"inner_lr": 0.4, "inner_steps": 1, "first_order": False}
    expected, _ = meta_gradient(sequential, network, tasks, adapted="head", **knobs)
    actual, _ = meta_gradient(explicit, network, tasks, **EXPLICIT, **knobs)
    actual, expected = (
        {k: g for k, g in gradients.items() if k.startswith("encoder.")} for gradients in (actual, expected)
    )
    if zeroed:
        assert_close(actual, expected, 1e-10)
    else:
        with pytest.raises(AssertionError):
            assert_close(actual, expected, 1e-2)


@each_order
def test_twenty_outer_steps_with_zeroing_give_the_weights_of_maml(run, tmp_path, first_order):
    """Of head-only MAML and, since a zero head leaves the encoder alone in the one inner step, of full MAML too."""
    knobs = (
        *("+zeroing=true", f"algo.first_order={first_order}".lower(), "inner_steps=1", "trainer.precision=64-true"),
        *("iterations=20", "val_every=20", "test_tasks=2", "test_steps=1"),
    )
    weights = {}
    for algo in ("contrastive", "anil", "fomaml"):
        folder = run(tmp_path / algo, f"algo={algo}", *knobs)
        weights[algo] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    start = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    for algo in ("anil", "fomaml"):
        for name, value in weights["contrastive"].items():
            torch.testing.assert_close(value, weights[algo][name], rtol=1e-8, atol=1e-8)
    assert weights["anil"]["network.encoder.0.weight"].dtype == torch.float64
    assert not weights["anil"]["network.head.weight"].any() and set(start) == set(weights["anil"])


def test_the_ablations_train_otherwise(run, tmp_path):
    """Without zeroing: the noise and the interference are there to be left out, and each changes the weights."""
    seen = []
    for noise in ("true", "false"):
        for interference in ("true", "false"):
            folder = run(
                tmp_path / f"{noise}{interference}",
                *("algo=contrastive", f"algo.noise={noise}", f"algo.interference={interference}"),
                *("model.head_bias=false", "iterations=2", "test_tasks=2", "test_steps=2"),
            )
            state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
            assert "network.head.bias" not in state
            seen.append(state["network.encoder.0.weight"])
    assert all(not torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_more_than_one_inner_step_is_refused_in_second_order():
    build = NETWORKS["conv4_strided"]
    with pytest.raises(ValueError, match="inner_steps=2"):
        meta_gradient(
            explicit,
            convolutional(build, images_for(build)),
            images_for(build),
            inner_lr=0.1,
            inner_steps=2,
            first_order=False,
            **EXPLICIT,
        )
