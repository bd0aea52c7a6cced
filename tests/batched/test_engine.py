"""The batched engine: tasks side by side in the channels, on threads, as CUDA graphs. Its numbers: test_learner.py."""

import contextlib
import logging
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from conftest import HANG
from examples import (
    KNOBS,
    NETWORKS,
    assert_same,
    convolutional,
    draw,
    evaluations,
    images_for,
    loop,
    meta_gradient,
    prepared,
    vector,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from fewshot.batched import engine as batched
from fewshot.batched.execution import CaptureFailed, CudaGraphs, on_threads, one_by_one
from fewshot.batched.in_a_row import in_a_row
from fewshot.batched.side_by_side import Convolution, SideBySide
from fewshot.data.task import Task
from fewshot.maml import sequential
from fewshot.models.network import Network, conv4_pooled, conv4_strided

each_network = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS)
each_order = pytest.mark.parametrize("first_order", [True, False], ids=["FOMAML", "SOMAML"])


# Side by side in the channels


@each_network
def test_the_projects_networks_lie_side_by_side(build):
    """So they never take the slower way that is right for any network."""
    tasks = images_for(build, tasks=3)
    network = convolutional(build, tasks)
    images, in_rows = tasks.query.transpose(0, 1).flatten(1, 2), tasks.query.flatten(0, 1)
    theta = batched._copies(network, 3)
    with SideBySide(3):
        logits = functional_call(network, theta, images)
    with in_a_row(3):
        rows = functional_call(network, theta, in_rows)
    expected = torch.stack([network(query) for query in tasks.query])
    torch.testing.assert_close(logits, expected.transpose(0, 1).flatten(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rows, expected.flatten(0, 1), rtol=1e-10, atol=1e-12)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, affine=False, track_running_stats=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.inside(x))


class Keywords(nn.Module):
    """The functions by their keywords and defaults."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.line = nn.Parameter(torch.randn(6, 2, 3, 3)), nn.Parameter(torch.randn(6, 150))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, stride=2, padding=1)
        x = torch.flatten(F.pad(F.relu(x), (0, 1, 1, 0)), start_dim=1)
        return F.linear(x, self.line)


class Shortcut(nn.Module):
    """Twice the channels, the new ones zero."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, 3))


class Blur(nn.Module):
    """A kernel that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.ones(6, 1, 2, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, groups=6)


class Reshaped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1)


class Scaled(nn.Module):
    """A parameter that broadcasts over the images."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, other=self.scale)


def norm(width: int = 6) -> nn.Module:
    return nn.BatchNorm2d(width, track_running_stats=False)


SIDE_BY_SIDE = {
    "keywords": lambda: [Keywords()],
    "residual": lambda: [nn.Conv2d(2, 6, 3), norm(), Residual(), nn.AvgPool2d(5), nn.Flatten()],
    "grouped": lambda: [nn.Conv2d(2, 6, 3, groups=2, dilation=2), nn.ReLU(), norm(), nn.MaxPool2d(3), nn.Flatten()],
    "padding=reflect": lambda: [
        *(nn.Conv2d(2, 6, 3, padding=1, padding_mode="reflect"), nn.ReLU(), norm(), nn.MaxPool2d(7), nn.Flatten())
    ],
    "groups of channels": lambda: [nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.MaxPool2d(5), nn.Flatten()],
}
BY_VMAP = {
    "padding=same": lambda: [nn.Conv2d(2, 6, 3, padding="same"), nn.ReLU(), norm(), nn.MaxPool2d(7), nn.Flatten()],
    "more channels": lambda: [nn.Conv2d(2, 3, 3), nn.ReLU(), norm(3), Shortcut(), nn.MaxPool2d(5), nn.Flatten()],
    "constant kernel": lambda: [nn.Conv2d(2, 6, 3), nn.ReLU(), norm(), Blur(), nn.MaxPool2d(4), nn.Flatten()],
    "pooled lines": lambda: [
        *(nn.Conv2d(2, 4, 3), nn.ReLU(), norm(4), nn.Flatten(2), nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(26, 6))
    ],
    "channels mixed": lambda: [nn.Conv2d(2, 6, 3), norm(), nn.Softmax(dim=1), nn.AvgPool2d(5), nn.Flatten()],
    "layer norm": lambda: [nn.Conv2d(2, 6, 3), norm(), nn.LayerNorm([6, 5, 5]), nn.MaxPool2d(5), nn.Flatten()],
    "own reshape": lambda: [nn.Conv2d(2, 6, 3), nn.ReLU(), norm(), nn.MaxPool2d(5), Reshaped()],
    "own parameter": lambda: [nn.Conv2d(2, 6, 3), nn.ReLU(), norm(), Scaled(), nn.MaxPool2d(5), nn.Flatten()],
    "linear on images": lambda: [
        nn.Conv2d(2, 6, 3),
        nn.ReLU(),
        norm(),
        nn.Linear(5, 1),
        nn.AvgPool2d((5, 1)),
        nn.Flatten(),
    ],
}


@pytest.mark.parametrize("name", [*SIDE_BY_SIDE, *BY_VMAP])
@each_order
def test_any_network_has_the_gradient_of_the_loop(name, first_order, monkeypatch):
    """What may mix channels goes through vmap: with BatchNorm, where a vmap of gradients is wrong in second order."""
    torch.manual_seed(0)
    encoder = nn.Sequential(*(SIDE_BY_SIDE | BY_VMAP)[name]())
    network, tasks = prepared(Network(encoder, 6, 3), False), draw(tasks=3, shape=(2, 7, 7), queries=3)
    expected, (_, accuracies) = meta_gradient(sequential, network, tasks, first_order=first_order, **KNOBS)
    used = []
    monkeypatch.setattr(batched, "vmap", lambda *args: used.append(1) or torch.func.vmap(*args))
    for rows in (False, True):  # as on a GPU, as on a CPU
        monkeypatch.setattr(batched, "tasks_in_a_row", lambda x, rows=rows: rows)
        actual, (_, accuracy) = meta_gradient(
            batched, network, tasks, first_order=first_order, tasks_at_once=9, **KNOBS
        )
        assert bool(used) == (name in BY_VMAP)
        assert_same(actual, expected)
        assert torch.equal(accuracy, accuracies)


@pytest.mark.parametrize(
    "geometry", [((1, 1), (0, 0), (1, 1), 1), ((2, 2), (1, 1), (1, 1), 3), ((2, 1), (0, 2), (1, 2), 1)]
)
@pytest.mark.parametrize("bias", [True, False])
def test_the_convolution_has_the_first_and_second_derivatives_of_finite_differences(geometry, bias):
    torch.manual_seed(0)
    *_, groups = geometry
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, 3 // groups, 3, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(6, dtype=torch.float64, requires_grad=True) if bias else None
    assert torch.equal(Convolution.apply(x, w, b, geometry), F.conv2d(x, w, b, *geometry))
    assert torch.autograd.gradcheck(Convolution.apply, (x, w, b, geometry))
    assert torch.autograd.gradgradcheck(Convolution.apply, (x, w, b, geometry), gen_non_contig_grad_outputs=True)


@pytest.mark.parametrize(
    "stride, shape", [((2, 1), (4, 2, 6, 3)), ((4, 2), (4, 2, 7, 5)), ((2, 1), (2, 8, 6, 3))], ids=str
)
def test_the_convolution_by_columns_has_them_too(stride, shape):
    """Also where strides leave pixels out and where the kernel's places are side by side; with few channels or more."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 3, shape[1], 3, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def convolution(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        with in_a_row(2):
            return F.conv2d(x, w, b, stride)

    y = convolution(x, w, b)
    expected = torch.cat([F.conv2d(*arguments, stride) for arguments in zip(x.chunk(2), w, b, strict=True)])
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.autograd.gradgradcheck(convolution, (x, w, b), gen_non_contig_grad_outputs=True)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("tasks", [1, 2])
def test_batch_norm_has_the_second_derivatives_of_finite_differences(tasks, layout):
    torch.manual_seed(0)
    x = torch.randn(3 * tasks, 2, 2, 3, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    gamma, beta = (torch.randn(tasks, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        with in_a_row(tasks):
            return F.batch_norm(x, None, None, gamma, beta, training=True)

    with in_a_row(tasks):  # a scale alone is left to torch
        scaled = F.batch_norm(x, None, None, gamma, None, training=True)
    assert torch.autograd.grad(scaled.sum(), gamma)[0].abs().max() < 1e-12
    by_task = zip(x.chunk(tasks), gamma, beta, strict=True)
    expected = torch.cat([F.batch_norm(x, None, None, *affine, training=True) for x, *affine in by_task])
    torch.testing.assert_close(norm(x, gamma, beta), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(norm(x.mT, gamma, beta), expected.mT, rtol=1e-10, atol=1e-12)  # in no usual order
    assert torch.autograd.gradgradcheck(norm, (x, gamma, beta), gen_non_contig_grad_outputs=True)


def test_batch_norm_is_as_exact_where_channels_lie_together():
    torch.manual_seed(0)
    x = torch.randn(75, 8, 13, 13).relu().contiguous(memory_format=torch.channels_last)
    gamma, beta = torch.rand(2, 1, 8)
    with in_a_row(1):
        actual = F.batch_norm(x, None, None, gamma, beta, training=True)
    expected = F.batch_norm(x.double(), None, None, gamma[0].double(), beta[0].double(), training=True)
    assert (actual - expected).norm() < 5e-7 * expected.norm()


# How much is launched, and how much memory it takes


class Count(TorchDispatchMode):
    """Operations that compute something: no views."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += not function.is_view
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("build, size, tasks, share", [(conv4_strided, 28, 32, 0.1), (conv4_pooled, 32, 4, 0.4)])
@each_order
@pytest.mark.parametrize("inner_steps", [1, 5])
def test_few_operations_do_the_work_of_all_tasks(build, size, tasks, share, first_order, inner_steps, monkeypatch):
    """On a GPU each would be a launch: at most a tenth of the loop's with 32 tasks, 40% with four.

    The loop does the same for every task, so what a second task adds is counted.
    """
    monkeypatch.setattr(batched, "tasks_in_a_row", lambda x: False)
    network = build(channels=1, size=size, ways=3, width=4)
    drawn = draw(tasks=tasks, shape=(1, size, size))
    drawn = drawn._replace(support=drawn.support.float(), query=drawn.query.float())
    numbers = []
    all_at_once = partial(batched.meta_gradient, tasks_at_once=tasks)
    for engine, drawn_of in ((sequential.meta_gradient, 1), (sequential.meta_gradient, 2), (all_at_once, tasks)):
        with Count() as count:
            some = Task(*(field[:drawn_of] for field in drawn))
            engine(network, some, *loop(inner_lr=0.01, inner_steps=inner_steps, first_order=first_order))
        numbers.append(count.number)
    one, two, together = numbers
    assert together < share * tasks * (two - one)


def peak_bytes(function) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("engine", [sequential.meta_gradient, partial(batched.meta_gradient, tasks_at_once=4)])
def test_the_memory_of_fomaml_does_not_grow_with_the_inner_steps(engine):
    network = conv4_strided(channels=1, size=28, ways=5, width=16)
    tasks = draw(tasks=4, ways=5, queries=8, shape=(1, 28, 28))
    tasks = tasks._replace(support=tasks.support.float(), query=tasks.query.float())
    one, six = (peak_bytes(partial(engine, network, tasks, *loop(inner_lr=0.1, inner_steps=steps))) for steps in (1, 6))
    assert one > 4 * 5 * 8 * 16 * 13 * 13  # something was measured
    assert six < 1.05 * one


# On threads


EVALUATION = {"inner_lr": 0.1, "steps": 3, "zeroing": (False, True)}


@cache
def of_one_thread(first_order):
    """A network, tasks, and what the loop computes of them."""
    tasks = images_for(NETWORKS["conv4_pooled"], tasks=5)
    network = convolutional(NETWORKS["conv4_pooled"], tasks)
    computed = meta_gradient(sequential, network, tasks, first_order=first_order, **KNOBS)
    return network, tasks, computed, sequential.step_accuracies(network, tasks, *evaluations(**EVALUATION))


@each_order
@pytest.mark.parametrize("tasks_at_once", [None, 1, 2, 4, 7])
def test_threads_compute_what_one_computes(first_order, tasks_at_once):
    network, tasks, (expected, (losses, accuracies)), evaluated = of_one_thread(first_order)
    knobs = {"first_order": first_order, **KNOBS}
    torch.set_num_threads(3)
    several = partial(meta_gradient, batched, network, tasks, tasks_at_once=tasks_at_once, **knobs)
    actual, (loss, accuracy) = several()
    assert_same(actual, expected)
    torch.testing.assert_close(loss, losses, rtol=1e-10, atol=0)
    assert torch.equal(accuracy, accuracies)
    again, _ = several()
    # Bit by bit: the order of the sum does not depend on who is first.
    assert torch.equal(vector(again), vector(actual))
    step_accuracies = batched.step_accuracies(network, tasks, *evaluations(**EVALUATION), tasks_at_once=tasks_at_once)
    assert torch.equal(step_accuracies, evaluated)
    assert torch.get_num_threads() == threads_of_a_new_thread() == 3


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("tasks_at_once", [None, 1, 2, 4])
def test_no_more_tasks_are_in_memory_than_asked_for(monkeypatch, threads, tasks_at_once):
    """And no fewer at a time than there are threads for."""
    lock, now, most = threading.Lock(), [0], [0]
    together = min(threads, tasks_at_once or threads)
    meeting, early = threading.Barrier(together, timeout=HANG), iter(range(together))  # the first wait for each other
    original = batched._outer_gradient

    def counted(network, chunk, **knobs):
        with lock:
            now[0] += len(chunk.support)
            most[0] = max(most[0], now[0])
            first = next(early, None) is not None
        if first:
            meeting.wait()
        results = original(network, chunk, **knobs)
        with lock:
            now[0] -= len(chunk.support)
        return results

    monkeypatch.setattr(batched, "_outer_gradient", counted)
    torch.set_num_threads(threads)
    network, tasks = Network(nn.Flatten(), 2, 3).double(), draw(tasks=8, shape=(1, 2))
    meta_gradient(batched, network, tasks, first_order=True, tasks_at_once=tasks_at_once, **KNOBS)
    if tasks_at_once is None:
        assert threads <= most[0] <= 4 * threads
    else:
        assert min(threads, tasks_at_once) <= most[0] <= tasks_at_once


def test_a_forked_process_has_threads_of_its_own():
    torch.set_num_threads(2)
    network, tasks = Network(nn.Flatten(), 2, 3).double(), draw(tasks=4, shape=(1, 2))
    meta_gradient(batched, network, tasks, first_order=True, **KNOBS)
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            meta_gradient(batched, network, tasks, first_order=True, **KNOBS)
            os._exit(7)
        os._exit(1)
    deadline = time.monotonic() + HANG
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.05)
    if not ended[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended[0] and os.waitstatus_to_exitcode(ended[1]) == 7


def test_an_error_in_a_thread_is_raised_and_the_number_of_threads_restored():
    tasks = draw(tasks=4, shape=(1, 2))
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError):
        meta_gradient(batched, Network(nn.Flatten(), 5, 3).double(), tasks, first_order=True, **KNOBS)
    assert torch.get_num_threads() == threads_of_a_new_thread() == 2


@pytest.mark.parametrize("threads, tasks_at_once", [(1, 9), (2, None)])
def test_autocast_reaches_the_convolutions(threads, tasks_at_once):
    """bf16-mixed: coarser than float32, and the same direction."""
    tasks = images_for(NETWORKS["conv4_pooled"], tasks=4, queries=4)
    tasks = tasks._replace(support=tasks.support.float(), query=tasks.query.float())
    network = convolutional(NETWORKS["conv4_pooled"], tasks).float()
    knobs = {"inner_lr": 0.01, "inner_steps": 1, "first_order": True, "tasks_at_once": tasks_at_once}
    exact, _ = meta_gradient(batched, network, tasks, **knobs)
    torch.set_num_threads(threads)
    seen = []
    hook = network.encoder[0].register_forward_hook(lambda layer, passed, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        coarse, _ = meta_gradient(batched, network, tasks, **knobs)
    hook.remove()
    assert set(seen) == {torch.bfloat16}
    actual, expected = vector(coarse), vector(exact)
    assert not torch.equal(actual, expected)
    assert F.cosine_similarity(actual, expected, dim=0) > 0.8
    assert actual.dtype == torch.float32


def test_on_threads_with_one_thread_is_one_by_one():
    chunks = [draw(seed=seed) for seed in range(3)]
    network = Network(nn.Flatten(), 6, 3)
    seen = []

    def function(passed_network, chunk):
        seen.append(passed_network)
        return (chunk.support,)

    results = on_threads(function, network, chunks)
    assert [result[0] is chunk.support for result, chunk in zip(results, chunks, strict=True)] == [True] * 3
    assert seen == [network] * 3


# As CUDA graphs


@pytest.fixture
def graphs(monkeypatch):
    """CudaGraphs on a CPU: nothing is warmed up, and a graph is a call that writes where the recorded one did."""
    monkeypatch.setattr(CudaGraphs, "possible", True)
    monkeypatch.setattr(CudaGraphs, "_warm_up", lambda *args: None)

    class Replayed:
        def __init__(self, function, network, inputs, outputs):
            self.recorded_call = function, network, inputs, outputs

        def replay(self):
            function, network, inputs, outputs = self.recorded_call
            for place, value in zip(outputs, function(network, inputs), strict=True):
                place.copy_(value)

    def record(self, function, network, inputs):
        outputs = tuple(torch.zeros_like(output) for output in function(network, inputs))
        return Replayed(function, network, inputs, outputs), inputs, outputs

    monkeypatch.setattr(CudaGraphs, "_record", record)
    return CudaGraphs()


def assert_recorded_is_direct(build, execute, first_order, device, tensors=False):
    """On other tasks and other weights than those it was recorded with; evaluation likewise.

    tensors: learned rates and weights of the step losses, too, changed where they lie; and with recompute_steps.
    """
    drawn = [images_for(build, tasks=5, seed=seed) for seed in range(2)]
    drawn = [type(tasks)(*(field.to(device) for field in tasks)) for tasks in drawn]
    network = convolutional(build, images_for(build)).to(device)
    etas = tuple(nn.Parameter(torch.full_like(p, 0.1)) for p in network.parameters() if tensors)
    optimizer = torch.optim.Adam([*network.parameters(), *etas])
    knobs = {"first_order": first_order, "tasks_at_once": 2, **KNOBS, "inner_lr": etas or 0.1}
    if tensors:
        knobs["step_losses"] = torch.tensor([0.0, 1.0], dtype=torch.float64, device=device)
        knobs["recompute_steps"] = True
    for number, tasks in enumerate(drawn):
        if tensors:
            knobs["step_losses"].copy_(torch.tensor([0.1, 0.2], dtype=torch.float64) * (number + 1))
        optimizer.zero_grad()
        expected, (losses, accuracies) = meta_gradient(batched, network, tasks, execute=one_by_one, **knobs)
        expected |= {f"eta {place}": eta.grad.clone() for place, eta in enumerate(etas)}
        optimizer.zero_grad()
        actual, (loss, accuracy) = meta_gradient(batched, network, tasks, execute=execute, **knobs)
        actual |= {f"eta {place}": eta.grad for place, eta in enumerate(etas)}
        assert_same(actual, expected)
        torch.testing.assert_close(loss, losses, rtol=1e-10, atol=0)
        assert torch.equal(accuracy, accuracies)
        for zeroing in ((True,), (False, True)):
            evaluate = partial(batched.step_accuracies, network, tasks, tasks_at_once=2)
            call = evaluations(inner_lr=etas or 0.1, steps=2, zeroing=zeroing)
            assert torch.equal(evaluate(*call, execute=execute), evaluate(*call, execute=one_by_one))
        optimizer.step()
    assert CudaGraphs.possible and len(execute._recorded) == 6  # two shapes of chunk; training and both evaluations


@each_order
@pytest.mark.parametrize("tensors", [False, True])
def test_what_is_recorded_is_found_again_and_given_the_tasks_at_hand(graphs, first_order, tensors):
    assert_recorded_is_direct(NETWORKS["conv4_strided"], graphs, first_order, "cpu", tensors)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@each_network
@each_order
@pytest.mark.parametrize("tensors", [False, True])
def test_a_recorded_meta_step_is_the_meta_step(build, first_order, tensors):
    assert_recorded_is_direct(build, CudaGraphs(), first_order, "cuda", tensors)


def test_where_recording_is_impossible_one_line_says_so_and_the_numbers_are_the_same(graphs, monkeypatch, caplog):
    tried = []

    def record(self, function, network, inputs):
        tried.append(1)
        raise CaptureFailed from RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(CudaGraphs, "_record", record)
    tasks = images_for(NETWORKS["conv4_strided"], tasks=4)
    network = convolutional(NETWORKS["conv4_strided"], tasks)
    knobs = {"first_order": True, "tasks_at_once": 2, **KNOBS}
    expected, _ = meta_gradient(batched, network, tasks, **knobs)
    with caplog.at_level(logging.INFO):
        for execute in (graphs, graphs, CudaGraphs()):  # the last is of the test that follows training
            actual, _ = meta_gradient(batched, network, tasks, execute=execute, **knobs)
            assert torch.equal(vector(actual), vector(expected))
    assert len(tried) == 1
    assert [record.message for record in caplog.records] == [
        "engine=batched: no CUDA graph (operation not permitted when stream is capturing); "
        "kernels are launched one by one"
    ]


def test_an_error_of_the_function_itself_is_not_taken_for_that(graphs, monkeypatch):
    monkeypatch.setattr(CudaGraphs, "_warm_up", lambda self, function, network, inputs: function(network, inputs))
    network = Network(nn.Flatten(), 5, 3).double()
    with pytest.raises(RuntimeError):
        meta_gradient(batched, network, draw(shape=(1, 2)), first_order=True, execute=graphs, **KNOBS)
    assert CudaGraphs.possible


def test_out_of_memory_while_recording_is_no_reason_to_go_on(graphs, monkeypatch):
    def record(self, function, network, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CudaGraphs, "_record", record)
    network = Network(nn.Flatten(), 2, 3).double()
    with pytest.raises(torch.OutOfMemoryError):
        meta_gradient(batched, network, draw(shape=(1, 2)), first_order=True, execute=graphs, **KNOBS)
