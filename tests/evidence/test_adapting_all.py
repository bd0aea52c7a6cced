"""The split of FOMAML's gradient where everything adapts (docs/method.md 2.9), against loops in NumPy."""

from functools import partial

import numpy as np
import pytest
import torch
from by_hand import np_adapted, np_gradient, np_logits, np_split_adapting_all, np_tasks, np_theta, softmax
from examples import convolutional, draw, tiny

from fewshot.data.task import Task
from fewshot.evidence.adapting_all import split_adapting_all
from fewshot.evidence.claims import identities
from fewshot.evidence.model import GRADIENT, Model
from fewshot.inner_loop import InnerLoop
from fewshot.models.network import conv4_strided


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("zeroed", [False, True], ids=["random", "zeroed"])
def test_interference_and_contrast_are_the_whole_gradient_whatever_adapts(steps, zeroed):
    network, tasks, eta = tiny(zeroed=zeroed), draw(shots=2, queries=3), 0.7
    theta = np_theta(network)
    model = Model(network, network, InnerLoop(steps, eta, first_order=True), steps, tasks, len(tasks.support), {})
    for task, by_hand in zip((Task(*fields) for fields in zip(*tasks, strict=True)), np_tasks(tasks), strict=True):
        x, labels, query, query_labels = by_hand
        last = np_adapted(theta, x, labels, eta, steps)
        interference, contrastive = np_split_adapting_all(theta, by_hand, eta, steps)
        terms = split_adapting_all(model, task, steps)
        np.testing.assert_allclose(terms.interference, interference, atol=1e-14)
        np.testing.assert_allclose(terms.contrastive, contrastive, atol=1e-14)
        E_Q = (softmax(np_logits(last, query)) - np.eye(3)[query_labels]) / len(query)
        np.testing.assert_allclose(interference + contrastive, E_Q @ last[2], atol=1e-14)  # dL/dPhi_Q(theta_N)
        assert np.abs(contrastive).max() > 1e-3 and (interference.any() == (not zeroed))
        surrogate = ((terms.interference + terms.contrastive) * terms.query).sum()
        pulled_back = (*torch.autograd.grad(surrogate, terms.encoder), *terms.head_gradient)
        for gradient, expected in zip(pulled_back, np_gradient(last, query, query_labels), strict=True):
            np.testing.assert_allclose(gradient.detach(), expected, atol=1e-14)


def test_it_is_so_where_queries_are_normalised_by_their_support():
    tasks = draw(shape=(1, 23, 23), queries=1)
    network = convolutional(partial(conv4_strided, channels=1, size=23, width=4, norm="task"), tasks)
    model = Model(network, network, InnerLoop(2, 0.4, first_order=True), 2, tasks, len(tasks.support), {})
    assert identities.fomaml_split_adapting_all.apart(model) < GRADIENT
