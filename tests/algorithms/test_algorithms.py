"""Momentum, Adam, Reptile and iMAML, each one file, against arithmetic of their own and by every way of computing."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from by_hand import (
    by_name,
    np_adam,
    np_conjugate_gradients,
    np_gradient,
    np_hessian,
    np_momentum,
    np_parts,
    np_proximal,
    np_stepped,
    np_tasks,
    np_theta,
    np_through,
    np_vector,
)
from examples import (
    NETWORKS,
    all_at_once,
    assert_close,
    assert_same,
    convolutional,
    draw,
    each_order,
    each_way,
    gradients,
    images_for,
    one_at_a_time,
    sequential,
    tiny,
)
from torch import Tensor, nn
from torch.nn import functional

from fewshot import check_algorithm
from fewshot.algorithms.conjugate_gradients import conjugate_gradients
from fewshot.algorithms.imaml import ImplicitMAML
from fewshot.algorithms.inner_adam import InnerAdam
from fewshot.algorithms.inner_momentum import InnerMomentum
from fewshot.algorithms.reptile import Reptile
from fewshot.errors import UserError
from fewshot.inner_loop import InnerLoop
from fewshot.models.network import Network
from fewshot.training.choose_engine import sequential_engine
from fewshot.training.evaluation import Evaluation

STEPS, ETA = 3, 0.1
# eps: where a gradient is almost zero, a smaller one makes 1e-8 of rounding
STEPPED = {
    "momentum": (InnerMomentum(STEPS, ETA, True, momentum=0.7), np_momentum(ETA, 0.7)),
    "adam": (InnerAdam(STEPS, ETA, True, beta1=0.8, beta2=0.9, eps=1e-3), np_adam(ETA, 0.8, 0.9, 1e-3)),
    "proximal": (ImplicitMAML(STEPS, ETA, True, proximal=0.5), np_proximal(ETA, 0.5)),
}
SHIPPED = {
    "inner_momentum": InnerMomentum(STEPS, ETA, False),
    "inner_adam": InnerAdam(STEPS, ETA, False, eps=1e-3),
    "reptile": Reptile(STEPS, ETA, True),
    "imaml": ImplicitMAML(STEPS, ETA, False, cg_steps=3),
}


def outer_gradient(engine, network, tasks, loop):
    network.zero_grad(set_to_none=True)
    measured = engine.meta_gradient(network, tasks, loop)
    return gradients(network), measured


def changed(loop: InnerLoop, **fields) -> InnerLoop:
    return type(loop)(**{**vars(loop), **fields})


@each_way
@each_order
@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_an_inner_step_of_ones_own_is_what_arithmetic_says(engine, name, first_order):
    tasks, network = draw(tasks=3, shots=2), tiny()
    loop, step = STEPPED[name]
    actual, (losses, _) = outer_gradient(engine, network, tasks, changed(loop, first_order=first_order))
    expected, expected_losses = np_through(network, tasks, STEPS, step, first_order)
    assert_close(actual, expected, 1e-9)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-10)


@each_way
def test_reptile_is_where_the_inner_loops_ended(engine):
    """As the code that Nichol et al. released has it: theta <- theta + step (mean of theta_N - theta)."""
    tasks, network = draw(tasks=3, shots=2), tiny()
    actual, _ = outer_gradient(engine, network, tasks, SHIPPED["reptile"])
    theta = np_theta(network)
    ends = [np_stepped(theta, x, labels, STEPS, np_momentum(ETA, 0)) for x, labels, *_ in np_tasks(tasks)]
    expected = by_name(network, [tuple(p - q for p, q in zip(theta, end, strict=True)) for end in ends])
    assert_close(actual, expected, 1e-10)
    for start, parameter, new in zip(theta, network.parameters(), by_name(network, ends).values(), strict=True):
        step = torch.optim.SGD([parameter], lr=0.25)
        step.step()
        np.testing.assert_allclose(parameter.detach(), start + 0.25 * (new - start), rtol=1e-10)


@each_way
@pytest.mark.parametrize("cg_steps", [1, 4, 60])
def test_imaml_solves_what_the_paper_says(engine, cg_steps):
    tasks, network = draw(tasks=3, shots=2), tiny()
    loop = ImplicitMAML(STEPS, ETA, False, proximal=3.0, cg_steps=cg_steps)
    actual, (_, _, residual) = outer_gradient(engine, network, tasks, loop)
    theta, exact, solved, residuals = np_theta(network), [], [], []
    for x, labels, *query in np_tasks(tasks):
        end = np_stepped(theta, x, labels, STEPS, np_proximal(ETA, 3.0))
        A, b = np.eye(43) + np_hessian(end, x, labels) / 3.0, np_vector(np_gradient(end, *query))
        exact.append(np_parts(np.linalg.solve(A, b), theta))
        solution = np_conjugate_gradients(A, b, cg_steps) if cg_steps < 43 else np_vector(exact[-1])
        solved.append(np_parts(solution, theta))
        residuals.append(np.linalg.norm(b - A @ solution) / np.linalg.norm(b))
    assert_close(actual, by_name(network, solved), 1e-8)
    if cg_steps < 43:
        np.testing.assert_allclose(residual, residuals, rtol=1e-6)
    else:
        assert residual.max() < 1e-8


def test_imaml_at_the_minimum_of_its_inner_loop_is_the_gradient_through_it():
    """The reason for it: from where the loop has converged the implicit gradient is the one by differentiation."""
    tasks, network = draw(tasks=2, shots=2), tiny()
    loop = ImplicitMAML(400, 0.1, False, proximal=2.0, cg_steps=60)

    @dataclass(frozen=True)
    class Differentiated(InnerLoop):
        update = ImplicitMAML.update
        proximal: float = 2.0

    implicit, _ = outer_gradient(sequential, network, tasks, loop)
    through, _ = outer_gradient(sequential, network, tasks, Differentiated(400, 0.1, False))
    assert_same(implicit, through, 1e-6)


def test_conjugate_gradients_of_several_tasks_and_of_nothing_to_solve():
    draw_ = torch.Generator().manual_seed(0)
    A = torch.randn(3, 5, 5, generator=draw_).double()
    A, b = A @ A.mT + torch.eye(5), torch.randn(3, 5, generator=draw_).double()
    b[1] = 0

    def product(p: list[Tensor]) -> list[Tensor]:
        return list((A @ torch.cat(p, 1).unsqueeze(-1)).squeeze(-1).split([2, 3], 1))

    x, residual = conjugate_gradients(product, b.split([2, 3], 1), 9, task_dimensions=1)
    torch.testing.assert_close(torch.cat(x, 1), torch.linalg.solve(A, b), rtol=1e-8, atol=1e-10)
    assert residual[1] == 0 and residual.isfinite().all() and residual.max() < 1e-8


@pytest.mark.parametrize("zeroing", [False, True])
@pytest.mark.parametrize("name", SHIPPED)
def test_the_engines_agree_on_a_convolutional_network_with_batchnorm(name, zeroing):
    build = NETWORKS["conv4_pooled"]
    tasks = images_for(build, tasks=3, shots=2)
    network = convolutional(build, tasks, zeroed=zeroing)
    loop = changed(SHIPPED[name], zeroing=zeroing)
    expected, (losses, accuracies, *measured) = outer_gradient(sequential, network, tasks, loop)
    for recompute in (False, True):
        again = changed(loop, recompute_steps=recompute)
        actual, (loss, accuracy, *more) = outer_gradient(one_at_a_time, network, tasks, again)
        parts = [n for n in expected if n.startswith("encoder.") or not zeroing]
        assert_same({n: actual[n] for n in parts}, {n: expected[n] for n in parts}, 1e-9)
        torch.testing.assert_close([loss, *more], [losses, *measured], rtol=1e-7, atol=1e-9)
        assert torch.equal(accuracy, accuracies)
    bitwise, _ = outer_gradient(sequential, network, tasks, changed(loop, recompute_steps=True))
    assert all(torch.equal(bitwise[n], expected[n]) for n in parts)
    with_steps = [loop.evaluation(4, zeroing)]
    assert torch.equal(
        sequential.step_accuracies(network, tasks, with_steps),
        one_at_a_time.step_accuracies(network, tasks, with_steps),
    )


def test_adam_where_a_gradient_is_zero_has_a_derivative():
    """From a zeroed head the encoder's first gradient is zero, and the root of its square has no derivative there."""
    tasks, network = draw(tasks=2, shots=2), tiny(zeroed=True)
    outer_gradients, _ = outer_gradient(sequential, network, tasks, InnerAdam(2, 0.05, False, zeroing=True))
    assert all(gradient.isfinite().all() for gradient in outer_gradients.values())


@dataclass(frozen=True)
class Shaken(InnerLoop):
    """Begins elsewhere than at theta, by what the support set's features say, and has a state of several kinds."""

    by: float = 0.1

    def start(self, theta, encode, support, labels):
        moved = 1 + self.by * encode(support).mean((-2, -1))  # (), or (B,)
        weights = {name: w for name, w in theta.items() if name.endswith("weight")}
        return {name: w * moved.view(*moved.shape, *[1] * (w.dim() - moved.dim())) for name, w in weights.items()}

    def update(self, theta, gradients, state):
        state = state or {"n": 0, "rate": torch.tensor(0.5), "last": dict.fromkeys(gradients)}
        n, last = state["n"] + 1, state["last"]
        steps = {
            name: -self.inner_lr * (g / n + (0 if last[name] is None else state["rate"] * last[name]))
            for name, g in gradients.items()
        }
        return steps, {"n": n, "rate": state["rate"], "last": gradients}


@dataclass(frozen=True)
class FromMeans(InnerLoop):
    """The head begins at the means of the classes' features, whatever the network's own is."""

    def start(self, theta, encode, support, labels):
        of_class = functional.one_hot(labels, 3).to(support.dtype).mT
        return {"head.weight": of_class @ encode(support) / of_class.sum(-1, keepdim=True)}


def test_an_evaluation_begins_where_the_algorithm_does_from_a_zero_head_too():
    network, tasks, loop = tiny(zeroed=True), draw(tasks=2, shots=2), FromMeans(1, 0.05, True)
    measured = Evaluation(2).measure(sequential_engine(), network, loop, (), tasks, final=False)
    (off, on) = sequential.step_accuracies(network, tasks, [loop.evaluation(2, zeroed) for zeroed in (False, True)])
    assert torch.equal(measured["task", "zeroing_off"], off) and torch.equal(measured["task", "zeroing_on"], on)
    assert not torch.equal(off[:, 0], on[:, 0])


@dataclass(frozen=True)
class Wrong(InnerLoop):
    """Mixes the tasks of the batched engine."""

    def update(self, theta, gradients, state):
        return {name: -self.inner_lr * (g + g.mean(0)) for name, g in gradients.items()}, None


@dataclass(frozen=True)
class WithoutState(InnerLoop):
    def update(self, theta, gradients, state):
        return {name: -self.inner_lr * g for name, g in gradients.items()}


@dataclass(frozen=True)
class Misshapen(InnerLoop):
    needs = {"first_order": True}  # noqa: RUF012

    def update(self, theta, gradients, state):
        return {name: g[0] for name, g in gradients.items()}, None


@dataclass(frozen=True)
class Picky(Shaken):
    def __post_init__(self):
        if self.by < 0:
            raise ValueError("by must not be negative")


class Needy(InnerLoop):
    needs = {"firstorder": True}  # noqa: RUF012


HERE = "test_algorithms"


@pytest.mark.parametrize("named", [*(f"algo={name}" for name in SHIPPED), f"{HERE}.Shaken", "algo=anil"])
def test_check_algorithm_says_that_all_ways_are_the_same(named, capsys):
    check_algorithm.main([named, "inner_lr=0.05", *["algo.eps=0.01"] * (named == "algo=inner_adam")])
    lines = capsys.readouterr().out.splitlines()
    compared = [line for line in lines if "both engines and plain autograd are the same to" in line]
    assert len(lines) == 2 and len(compared) == (1 if named in ("algo=reptile", "algo=imaml") else 2)


@dataclass(frozen=True)
class OneForTwo(InnerLoop):
    """One tensor is where two parameters begin, as if for a modulation that several layers share."""

    def start(self, theta, encode, support, labels):
        bias = torch.tanh(theta["head.bias"])
        return {"encoder.2.bias": bias, "head.bias": bias}


@dataclass(frozen=True)
class Apart(OneForTwo):
    def start(self, theta, encode, support, labels):
        return {name: bias.clone() for name, bias in super().start(theta, encode, support, labels).items()}


@each_order
def test_two_parameters_that_begin_at_one_tensor_go_their_own_ways(first_order):
    network, tasks = check_algorithm._network(zeroing=False), check_algorithm._tasks()
    expected, _ = outer_gradient(sequential, network, tasks, Apart(STEPS, ETA, first_order))
    for engine in (sequential, all_at_once):
        actual, _ = outer_gradient(engine, network, tasks, OneForTwo(STEPS, ETA, first_order))
        assert_same(actual, expected, 1e-12)


class Held:
    def __init__(self, last):
        self.last = last


class Holding(InnerLoop):
    """Its state is an object of its own."""

    def update(self, theta, gradients, state):
        last = state.last if state else dict.fromkeys(gradients, 0)
        moves = {name: 0.5 * last[name] + g for name, g in gradients.items()}
        return {name: -self.inner_lr * move for name, move in moves.items()}, Held(moves)


@pytest.mark.parametrize("engine", [sequential, all_at_once])
def test_a_state_in_which_tensors_cannot_be_found_is_refused_where_they_are_looked_for(engine):
    loop, tasks = Holding(STEPS, ETA, False), draw()
    outer_gradient(engine, tiny(), tasks, loop)
    with pytest.raises(UserError, match=r"recompute_steps=true: the state of .*Holding\.update has a Held, in which"):
        outer_gradient(engine, tiny(), tasks, changed(loop, recompute_steps=True))


def test_check_algorithm_says_what_is_not_the_same(capsys):
    with pytest.raises(SystemExit) as end:
        check_algorithm.main([f"{HERE}.Wrong"])
    said = capsys.readouterr().out
    assert end.value.code == 1 and "Wrong, first order: NOT the same as plain autograd\n  engine=batched: " in said
    assert "engine=sequential" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which algorithm? Give its class, my.module.MyLoop, or algo=NAME"),
        (["nowhere.Loop"], "algo._target_=nowhere.Loop: cannot be imported"),
        (["pathlib.Path"], "algo._target_=pathlib.Path: must be a class that derives from"),
        ([f"{HERE}.Misshapen"], "its encoder.0.weight is (1, 3, 3); it must be (4, 1, 3, 3), as the network's own"),
        ([f"{HERE}.WithoutState"], "WithoutState.update: gives a dict; it must be two things, the second a state or"),
        ([f"{HERE}.Shaken", "+algo.by=much"], "algo.by=much: must be of Shaken's type for it, float"),
        ([f"{HERE}.Shaken", "+algo.bye=1"], "algo.bye=1: Shaken has no such field; did you mean by?"),
        ([f"{HERE}.Picky", "+algo.by=-1"], "Picky: cannot be made (by must not be negative)"),
        ([f"{HERE}.Needy"], "Needy: cannot be made ('Needy' object has no attribute 'firstorder')"),
    ],
)
def test_check_algorithm_refuses_in_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        check_algorithm.main(words)
    assert said in str(end.value.code) and "\n" not in str(end.value.code)


@pytest.mark.parametrize("knob", ["adapted", "head", "distance", "loss"])
def test_a_word_that_the_inner_loop_does_not_know_is_refused(knob):
    with pytest.raises(UserError, match=rf"^{knob}=shares: must be one of "):
        InnerLoop(1, 0.1, first_order=True, **{knob: "shares"})


def test_what_an_algorithm_does_not_go_with_is_refused():
    config = {"inner_steps": 1, "inner_lr": 0.1, "algo": {"_target_": "x.Y", "first_order": True, "zeroing": False}}
    for cls, fields, said in [
        (Reptile, {"first_order": False}, r"algo\.first_order=false: Reptile works with no other value; use true"),
        (ImplicitMAML, {}, r"algo\.first_order=true: ImplicitMAML works with no other value; use false"),
        (Reptile, {"step_losses": 5}, r"algo\.step_losses=5: x\.Y has an outer gradient of its own; leave it out"),
        (InnerAdam, {"learned_inner_lr": True}, r"algo\.learned_inner_lr=true: x\.Y has an inner loop of its own"),
        (Reptile, {"adapted": "head"}, r"algo\.adapted=head: Reptile works with no other value; use all"),
    ]:
        with pytest.raises(UserError, match=said):
            cls.of(config | {"algo": config["algo"] | fields})


@pytest.mark.parametrize(
    ("returned", "declared", "said"),
    [
        ({}, ("length",), r"measures \[\]; its class says \('length',\)"),
        ({"length": 1.0}, (), r"measures \['length'\]; its class says \(\)"),
        ({"loss": 1.0}, ("loss",), "measures loss, which every run records under that name; name it otherwise"),
        ({"top-5": 1.0}, ("top-5",), "measures 'top-5'; give it a name of letters, digits and _, for metrics.csv"),
        (None, (), r"measures NoneType; its class says \(\)"),
        ({"length": 1}, ("length",), r"its length is a torch.int64 of \(\); it must be floats of \(2,\), one for each"),
        ({"length": 1.0}, ("length",), r"its length is a torch.float32 of \(\); it must be floats of \(2,\)"),
        ({"length": "1"}, ("length",), r"its length is a str; it must be floats of \(2,\), one for each task"),
    ],
)
def test_what_an_outer_gradient_measures_is_declared_and_has_a_name_of_its_own(returned, declared, said):
    class Measuring(InnerLoop):
        measures = declared

        def outer_gradient(self, theta, theta_N, support_loss, query_loss):
            number = {
                name: value if type(value) is str else torch.tensor(value) for name, value in (returned or {}).items()
            }
            return theta_N, number if returned is not None else None

    with pytest.raises(UserError, match=f"Measuring.outer_gradient: {said}"):
        all_at_once.meta_gradient(tiny(), draw(shots=1), Measuring(1, ETA, True))


@pytest.mark.parametrize("name", ["reptile", "imaml"])
def test_a_parameter_may_be_a_single_number(name):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(6, 4), nn.Parameter(torch.tensor(1.3))

        def forward(self, images):
            return torch.tanh(self.scale * self.layer(images.flatten(1)))

    torch.manual_seed(1)
    network, tasks = Network(Scaled(), 4, 3).double(), draw(shots=2)
    actual, expected = (
        outer_gradient(engine, network, tasks, SHIPPED[name])[0] for engine in (all_at_once, sequential)
    )
    assert_close(actual, expected, 1e-10)
