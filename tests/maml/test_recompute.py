"""recompute_steps: bitwise the same second-order gradients, in memory that does not grow with the inner steps."""

from functools import partial

import pytest
import torch
from conftest import outcome
from examples import loop
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from fewshot.batched import engine as batched
from fewshot.batched.execution import one_by_one
from fewshot.data.task import Task
from fewshot.errors import UserError
from fewshot.maml import sequential
from fewshot.models import resnet12
from fewshot.models.network import Network, conv4_strided, dropping
from fewshot.recompute import recomputed

each_engine = pytest.mark.parametrize(
    "engine",
    [sequential.meta_gradient, partial(batched.meta_gradient, execute=one_by_one)],
    ids=["sequential", "batched"],
)
WEIGHTS = [0.2, 0.0, 0.8]
FAMILY = {
    "maml": {},
    "zeroing": {"zeroing": True},
    "anil": {"adapted": "head"},
    "boil": {"adapted": "encoder"},
    "protomaml": {"head": "prototypes"},
    "msl": {"step_losses": WEIGHTS},
    "metasgd": {"rates": True},
    "zeroing, msl, metasgd": {"zeroing": True, "step_losses": WEIGHTS, "rates": True},
    "boil, protomaml, msl, metasgd": {
        "adapted": "encoder",
        "head": "prototypes",
        "step_losses": WEIGHTS,
        "rates": True,
    },
}


def draw(size: int, *, ways: int = 3, shots: int = 2, queries: int = 2, tasks: int = 2) -> Task:
    """float32: noise on an image for each class."""
    torch.manual_seed(0)
    centres = torch.randn(tasks, ways, 1, 1, size, size)
    support, query = (
        (centres + 0.5 * torch.randn(tasks, ways, per_class, 1, size, size)).flatten(1, 2)
        for per_class in (shots, queries)
    )
    labels = (torch.arange(ways).repeat_interleave(per_class).expand(tasks, -1) for per_class in (shots, queries))
    return Task(support, next(labels), query, next(labels))


def outer_gradient(engine, network: Network, tasks: Task, **knobs) -> tuple[Tensor, Tensor]:
    """Of the network's parameters and the learned rates, as one vector, and the query losses; from the same seed."""
    network.zero_grad(set_to_none=True)
    knobs = {"inner_lr": 0.1, "inner_steps": 3, "first_order": False, **knobs}
    parameters = list(network.parameters())
    if knobs.pop("rates", False):
        part = getattr(network, knobs.get("adapted", "all"), network)
        knobs["inner_lr"] = [nn.Parameter(0.1 + p.abs()) for p in part.parameters()]
        parameters += knobs["inner_lr"]
    if "step_losses" in knobs:
        knobs["step_losses"] = torch.tensor(knobs["step_losses"])
    with dropping(network, position=7):
        losses, _ = engine(network, tasks, *loop(**knobs))
    return torch.cat([p.grad.flatten() for p in parameters]), losses


def assert_the_same_recomputed(engine, network: Network, tasks: Task, **knobs) -> None:
    expected, losses = outer_gradient(engine, network, tasks, **knobs)
    state = torch.get_rng_state()
    actual, loss = outer_gradient(engine, network, tasks, recompute_steps=True, **knobs)
    assert torch.equal(actual, expected) and torch.equal(loss, losses) and expected.any()
    assert torch.equal(torch.get_rng_state(), state)


@each_engine
@pytest.mark.parametrize("member", FAMILY.values(), ids=FAMILY)
def test_every_member_of_the_family_has_the_same_outer_gradient(engine, member):
    network = conv4_strided(channels=1, size=28, ways=3, width=4)
    assert_the_same_recomputed(engine, network, draw(28), **member)


@each_engine
@pytest.mark.parametrize("inner_steps", [1, 2, 5])
def test_any_number_of_steps_has(engine, inner_steps):
    network = conv4_strided(channels=1, size=28, ways=3, width=4)
    assert_the_same_recomputed(engine, network, draw(28), inner_steps=inner_steps)


@each_engine
def test_what_dropblock_drops_is_dropped_the_second_time(engine):
    """In another order, from the last step to the first, and the generator goes on as if nothing was drawn twice."""
    network = resnet12(channels=1, size=16, ways=3, width=4, drop_block=0.3)
    weights = {"step_losses": WEIGHTS}  # the queries draw between the steps
    assert_the_same_recomputed(engine, network, draw(16), **weights)
    dropped, _ = outer_gradient(engine, network, draw(16), **weights)
    network.encoder[3].share = network.encoder[5].share = 0.0
    assert not torch.equal(outer_gradient(engine, network, draw(16), **weights)[0], dropped)


@each_engine
def test_what_autocast_rounds_is_rounded_the_second_time(engine):
    network, tasks = conv4_strided(channels=1, size=28, ways=3, width=4), draw(28)
    exact, _ = outer_gradient(engine, network, tasks)
    with torch.autocast("cpu", torch.bfloat16):
        assert_the_same_recomputed(engine, network, tasks)
        assert not torch.equal(outer_gradient(engine, network, tasks, recompute_steps=True)[0], exact)


def test_the_backward_pass_has_the_autocast_of_the_forward_pass():
    """Also where it runs on another thread, as on a GPU."""
    torch.manual_seed(0)
    x, w = torch.randn(5, 4), torch.randn(3, 4, requires_grad=True)

    def step(inputs: list[Tensor]) -> Tensor:
        loss = F.linear(x, inputs[0]).float().exp().mean()
        return inputs[0] - torch.autograd.grad(loss, inputs[0], create_graph=True)[0]

    gradients = []
    for take in (step, lambda inputs: recomputed(step, inputs, draws=False)):
        with torch.autocast("cpu", torch.bfloat16):
            moved = take([w])
        gradients.append(torch.autograd.grad(moved.square().sum(), w)[0])
    assert torch.equal(*gradients)


def peak_bytes(function) -> int:
    """Of torch's allocator, beside what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@each_engine
@pytest.mark.parametrize("member", ["maml", "msl", "metasgd"])
def test_memory_does_not_grow_with_the_inner_steps(engine, member):
    network, tasks = conv4_strided(channels=1, size=28, ways=3, width=4), draw(28, shots=4, queries=4, tasks=1)

    def peak(steps: int, recompute_steps: bool) -> int:
        knobs = FAMILY[member] | {"inner_steps": steps, "recompute_steps": recompute_steps}
        if member == "msl":
            knobs["step_losses"] = [1 / steps] * steps
        return peak_bytes(partial(outer_gradient, engine, network, tasks, **knobs))

    (one, ten), (one_again, ten_again) = ([peak(steps, again) for steps in (1, 10)] for again in (False, True))
    assert ten > 3 * one
    assert ten_again < 1.2 * min(one, one_again)


def test_a_run_that_goes_on_may_take_it_up_and_is_the_run_that_never_stopped(run, tmp_path):
    knobs = ("algo=somaml", "val_every=1", "test_tasks=2", "test_steps=2")
    whole = outcome(run(tmp_path / "whole", "iterations=3", *knobs))
    short = run(tmp_path / "short", "iterations=1", *knobs)
    run(short, f"checkpoint={short}", "iterations=2", "recompute_steps=true")
    went_on = outcome(run(short, f"checkpoint={short}", "iterations=3"))
    assert went_on["state"] == whole["state"] and went_on["metrics"] == whole["metrics"]


@pytest.mark.parametrize(
    "overrides, said",
    [
        (("algo=somaml",), "use recompute_steps=true, or lower queries, shots or model.width"),
        (("algo=somaml", "recompute_steps=true"), "lower queries, shots or model.width"),
        (("algo=somaml", "inner_steps=1"), "lower queries, shots or model.width"),
    ],
)
def test_out_of_memory_names_it_where_it_would_help(run, tmp_path, monkeypatch, overrides, said):
    def too_much(*args, **knobs):
        torch.empty(2**50)

    monkeypatch.setattr(sequential, "meta_gradient", too_much)
    with pytest.raises(UserError) as error:
        run(tmp_path, "iterations=2", "val_every=2", "val_tasks=2", "engine=sequential", *overrides)
    assert str(error.value) == f"engine=sequential: out of memory on cpu; {said}"
