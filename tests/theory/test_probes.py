"""What is measured on a model, against loops in NumPy; and in a run."""

import numpy as np
import pytest
import torch
from by_hand import by_hand
from conftest import rows
from examples import NETWORKS, convolutional, images_for

from fewshot.data.task import Task
from fewshot.models.head import zero_head
from fewshot.theory.features import Features
from fewshot.theory.probes import probes

NAMES = {
    *("interference_norm", "contrastive_norm", "wrong_sign", "head_norm", "cross_task"),
    *("cosine_same", "cosine_other", "cosine_same_queries", "cosine_other_queries"),
}


def test_probes_are_what_the_formulas_say():
    build = NETWORKS["conv4_strided"]
    tasks = images_for(build, tasks=3, shots=2, queries=3)
    network = convolutional(build, tasks)
    by_task = [by_hand(network, Task(*fields), 0.4) for fields in zip(*tasks, strict=True)]
    batches = [Task(*(field[:2] for field in tasks)), Task(*(field[2:] for field in tasks))]  # of unequal size
    probed = probes(network, batches, inner_lr=0.4, inner_steps=1)
    assert probed.keys() == NAMES
    for name, value in probed.items():
        assert value == pytest.approx(np.mean([one[name] for one in by_task]), abs=2e-6), name
    assert probed["wrong_sign"] > 0  # or nothing would be seen of the noise


def test_of_features_in_bfloat16_they_are_measured_in_float32(monkeypatch):
    build = NETWORKS["conv4_strided"]
    tasks = images_for(build, tasks=3, shots=2, queries=3)
    network = convolutional(build, tasks).float()
    tasks = tasks._replace(support=tasks.support.float(), query=tasks.query.float())
    with torch.autocast("cpu", torch.bfloat16):
        probed = probes(network, [tasks], inner_lr=0.4, inner_steps=2)
        features = Features.of(network, tasks)
    monkeypatch.setattr(Features, "of", lambda network, tasks: features)
    assert probed == probes(network, [tasks], inner_lr=0.4, inner_steps=2)


def test_a_zero_head_interferes_with_nothing_and_has_no_wrong_sign_in_one_step():
    build = NETWORKS["conv4_pooled"]
    tasks = images_for(build, tasks=3, shots=2, queries=3)
    network = convolutional(build, tasks)
    zero_head(network.head)
    probed = probes(network, [tasks], inner_lr=0.4, inner_steps=1)
    assert probed["interference_norm"] == probed["head_norm"] == probed["cross_task"] == probed["wrong_sign"] == 0
    assert probed["contrastive_norm"] > 0


def test_a_head_of_one_vector_is_no_head_and_a_bias_that_differs_is_one():
    build = NETWORKS["conv4_strided"]
    tasks = images_for(build, tasks=2, shots=1, queries=2)
    network = convolutional(build, tasks)
    zero_head(network.head)
    from_zero = probes(network, [tasks], inner_lr=0.4, inner_steps=2)
    with torch.no_grad():
        network.head.weight += 30 * torch.randn(network.head.in_features).double()
        network.head.bias += 7
    assert probes(network, [tasks], inner_lr=0.4, inner_steps=2) == pytest.approx(from_zero, abs=2e-6)
    with torch.no_grad():
        network.head.bias[0] += 1
    biased = probes(network, [tasks], inner_lr=0.4, inner_steps=2)
    assert biased["interference_norm"] == 0 and biased["wrong_sign"] > 0
    assert biased["head_norm"] == pytest.approx((2 / 3) ** 0.5, abs=1e-6) and biased["cross_task"] != 0


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_a_run_records_and_draws_them_and_is_otherwise_the_same(run, tmp_path, precision):
    knobs, drawn = ("iterations=2", f"trainer.precision={precision}"), precision == "32-true"
    with_probes = rows(run(tmp_path / "with", "probes=true", *knobs, pictures=drawn))
    without = rows(run(tmp_path / "without", *knobs))
    names = {f"probe/{name}" for name in NAMES}
    assert names <= set(with_probes[0]) and not names & set(without[0])
    assert [{k: v for k, v in row.items() if k not in names} for row in with_probes] == without
    assert all(row[name] for row in with_probes for name in names)  # validated at every row of these
    assert (tmp_path / "with" / "figures" / "probes.png").stat().st_size > (10_000 if drawn else 0)
    assert not (tmp_path / "without" / "figures" / "probes.png").exists()


def test_of_one_query_for_each_class_no_other_one_is_alike(run, tmp_path):
    """And what has no value has no column, in place of one of NaN."""
    folder = run(tmp_path / "run", "probes=true", "queries=1", "iterations=1")
    recorded = {name.removeprefix("probe/") for name in rows(folder)[0] if name.startswith("probe/")}
    assert recorded == NAMES - {"cosine_same_queries"}
    assert "nan" not in (folder / "metrics.csv").read_text() and (folder / "figures" / "probes.png").exists()
