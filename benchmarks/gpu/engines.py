"""Step engines: do both engines give the same outer gradient on this device, with CUDA graphs and without?

In float64 they must agree to 1e-10. The errors of float32 and TF32 are printed and not judged. Then twenty outer
updates with CUDA graphs are compared with twenty without. They are of FOMAML with zeroing, because training without
zeroing is chaotic and 1e-16 would grow to half the weights.
"""

import copy
from functools import partial

import torch
from common import DEVICE, REHEARSE, write
from instruments import relative_error
from torch import Tensor, nn

from fewshot.batched import engine as batched
from fewshot.batched.execution import CudaGraphs
from fewshot.data.task import Task
from fewshot.inner_loop import InnerLoop
from fewshot.maml import sequential
from fewshot.models.head import zero_head
from fewshot.models.network import conv4_pooled, conv4_strided

SMALL = REHEARSE
CASES = {  # name: network, channels, size, tasks, fields of the InnerLoop
    "omniglot": (conv4_strided, 1, 28, 2 if SMALL else 32, {"inner_lr": 0.4, "inner_steps": 2}),
    "omniglot, head alone": (
        conv4_strided,
        1,
        28,
        2 if SMALL else 8,
        {"inner_lr": 0.4, "inner_steps": 2, "adapted": "head"},
    ),
    "omniglot, prototypes": (
        conv4_strided,
        1,
        28,
        2 if SMALL else 8,
        {"inner_lr": 0.4, "inner_steps": 2, "head": "prototypes"},
    ),
    "photos84": (partial(conv4_pooled, width=32), 3, 42 if SMALL else 84, 2, {"inner_lr": 0.01, "inner_steps": 5}),
}


def draw(network: type, channels: int, size: int, tasks: int, dtype: torch.dtype) -> tuple[nn.Module, Task]:
    """Seeded weights and tasks, 5-way 1-shot with 15 queries. An image is its class's random image and noise."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    made = network(channels=channels, size=size, ways=5)
    centres = torch.randn(tasks, 5, 1, channels, size, size, generator=generator)

    def images(number: int) -> Tensor:
        noise = torch.randn(tasks, 5, number, channels, size, size, generator=generator)
        return (centres + 0.5 * noise).flatten(1, 2).to(DEVICE, dtype)

    def labels(number: int) -> Tensor:
        return torch.arange(5, device=DEVICE).repeat_interleave(number).repeat(tasks, 1)

    queries = 3 if SMALL else 15
    return made.to(DEVICE, dtype), Task(images(1), labels(1), images(queries), labels(queries))


def gradient(engine: object, network: nn.Module, tasks: Task, **knobs: object) -> dict[str, Tensor]:
    network = copy.deepcopy(network)
    execute = {"execute": knobs.pop("execute")} if "execute" in knobs else {}
    engine.meta_gradient(network, tasks, InnerLoop(**knobs), **execute)
    return {name: p.grad.double().cpu() for name, p in network.named_parameters()}


def agreement(case: str, first_order: bool) -> dict[str, float]:
    """Relative differences of the outer gradients from that of the sequential engine in float64."""
    network, channels, size, number, knobs = CASES[case]
    knobs = knobs | {"first_order": first_order}
    differences = {}
    for precision in ("float64", "float32", "tf32"):
        dtype = torch.float64 if precision == "float64" else torch.float32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        weights, tasks = draw(network, channels, size, number, dtype)
        ways = {
            "sequential": partial(gradient, sequential),
            "batched": partial(gradient, batched),
            "graphs": partial(gradient, batched, execute=CudaGraphs() if DEVICE == "cuda" else None),
        }
        gradients = {name: way(weights, tasks, **knobs) for name, way in ways.items()}
        if precision == "float64":
            exact = gradients["sequential"]
        for name, outer in gradients.items():
            differences[f"{name} {precision}"] = relative_error(outer, exact)
        differences[f"graphs against none {precision}"] = relative_error(gradients["graphs"], gradients["batched"])
    return differences


def training(updates: int) -> float:
    """Relative difference of the weights with CUDA graphs and without, after `updates` of FOMAML with zeroing."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    network, tasks = draw(conv4_strided, 1, 28, 2 if SMALL else 32, torch.float64)
    weights = []
    for execute in (CudaGraphs() if DEVICE == "cuda" else None, None):
        trained = copy.deepcopy(network)
        zero_head(trained.head)
        optimizer = torch.optim.Adam(trained.parameters(), lr=0.001)
        for _ in range(updates):
            optimizer.zero_grad()
            batched.meta_gradient(trained, tasks, InnerLoop(2, 0.4, first_order=True), execute=execute)
            optimizer.step()
            zero_head(trained.head)
        weights.append(nn.utils.parameters_to_vector(trained.parameters()))
    return float((weights[0] - weights[1]).norm() / weights[1].norm())


def main() -> None:
    differences, lines = {}, []
    for case in CASES:
        for first_order in (True, False):
            name = f"{case}, {'first' if first_order else 'second'} order"
            differences[name] = values = agreement(case, first_order)
            worst = max(values["batched float64"], values["graphs float64"])
            lines.append(
                f"{name:36} float64 {worst:.0e} {'agree' if worst < 1e-10 else 'DO NOT AGREE'}; from float64, batched: "
                f"float32 {values['batched float32']:.0e}, TF32 {values['batched tf32']:.0e}; with graphs against "
                f"without: {values['graphs against none float64']:.0e}"
            )
            write("engines", {"device": DEVICE, "differences": differences, "lines": lines})
    possible = "" if CudaGraphs.possible else "; CUDA graphs could not be recorded"
    updates = 2 if SMALL else 20
    apart = training(updates)
    lines.append(f"weights after {updates} updates with graphs against without, float64: {apart:.0e} apart{possible}")
    write("engines", {"device": DEVICE, "differences": differences, "training": apart, "lines": lines})


if __name__ == "__main__":
    main()
