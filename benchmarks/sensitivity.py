"""Measures how fast a small change of one weight grows in training: does the same program end in the same place twice?

    python benchmarks/sensitivity.py --json FILE [--updates 200] [overrides, such as shots=5 inner_lr=0.1]
    python benchmarks/sensitivity.py --draw FILE PNG

Of six settings, FOMAML and SOMAML from a random head, from a zero start and with zeroing, each is trained twice on the
same tasks; the first weight of the second training starts 1e-12 beside that of the first (in float32 by its smallest
change). A row of FILE is one setting on one data set with one inner_lr, number of shots and precision: the relative
difference of all weights after some outer updates, the head's norm, and eta times the largest curvature of the support
loss before each inner step. Rows that FILE has are skipped.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.func import functional_call

from fewshot.batched import engine as batched
from fewshot.config.tree import CONF
from fewshot.data.meta_batches import TaskDataModule
from fewshot.data.task import Task
from fewshot.files import write_file
from fewshot.inner_loop import InnerLoop
from fewshot.models.head import zero_head
from fewshot.processes.surroundings import keep_memory
from fewshot.results.figures import plain, png
from fewshot.sweep.figures import COLOURS

SHOWN = (1, 2, 5, 10, 20, 50, 100, 150, 200)  # outer updates
CURVED = (0, 20, 100, 200)  # outer updates before which the curvature is measured
CHANGE = 1e-12
STARTS = {"fomaml": "random head", "zero_init": "zero at the start", "zero": "zeroed every update"}
ORDERS = {"first": "FOMAML", "second": "SOMAML"}
SETTING = ("dataset", "shots", "inner_lr", "inner_steps", "precision", "order", "start")
FLOATS = {"float32": torch.float32, "float64": torch.float64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--draw", type=Path, nargs=2, metavar=("FILE", "PNG"))
    parser.add_argument("--updates", type=int, default=SHOWN[-1])
    parser.add_argument("--precision", choices=FLOATS, default="float64")
    parser.add_argument("--settings", default=",".join(f"{order}:{start}" for order in ORDERS for start in STARTS))
    args, overrides = parser.parse_known_args()
    if args.draw:
        file, place = args.draw
        write_file(place, png(picture(json.loads(file.read_text())), dpi=110))
        return
    keep_memory()
    torch.set_num_threads(1)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", ["meta_batch_size=8", "seed=0", *overrides])
    data = TaskDataModule.from_config(cfg)
    for setting in args.settings.split(","):
        order, start = setting.split(":")
        rows = json.loads(args.json.read_text()) if args.json.exists() else []
        of = (cfg.dataset.name, cfg.shots, cfg.inner_lr, cfg.inner_steps, args.precision, order, start)
        row = dict(zip(SETTING, of, strict=True))
        if any(all(old[name] == row[name] for name in SETTING) for old in rows):
            continue
        row |= {"difference": {}, "head_norm": {}, "sharpness": {}}
        begin = time.process_time()
        for update, difference, head_norm, sharpness in train(cfg, data, row, args.updates):
            if difference is not None:
                row["difference"][update], row["head_norm"][update] = difference, head_norm
            if sharpness:
                row["sharpness"][update] = sharpness
        row["processor_seconds"] = round(time.process_time() - begin)
        print(*(row[name] for name in SETTING), *(f"{value:.1e}" for value in row["difference"].values()), flush=True)
        write_file(args.json, "[\n" + ",\n".join(json.dumps(row) for row in [*rows, row]) + "\n]\n")


def train(
    cfg: DictConfig, data: TaskDataModule, row: dict[str, Any], updates: int
) -> Iterator[tuple[int, float | None, float | None, list[float] | None]]:
    """Trains both; yields the update, the weights' relative difference, the head's norm and the curvatures."""
    dtype, zeroing = FLOATS[row["precision"]], row["start"] == "zero"
    loop = InnerLoop(cfg.inner_steps, cfg.inner_lr, row["order"] == "first", zeroing=zeroing)
    torch.manual_seed(cfg.seed)
    network = instantiate(cfg.model.network).to(dtype)
    if row["start"] != "fomaml":
        zero_head(network.head)
    networks = [network, copy.deepcopy(network)]
    with torch.no_grad():
        weight = next(networks[1].parameters()).view(-1)[:1]
        changed = weight + CHANGE
        weight.copy_(changed if changed != weight else weight.nextafter(weight + 1))
    optimizers = [torch.optim.Adam(trained.parameters(), lr=cfg.outer_lr) for trained in networks]
    for update in range(1, updates + 1):
        tasks = data.samplers["train"]((update - 1) * data.meta_batch_size, data.meta_batch_size)
        tasks = tasks._replace(support=tasks.support.to(dtype), query=tasks.query.to(dtype))
        if update - 1 in CURVED:
            yield update - 1, None, None, sharpness(network, tasks, loop)
        for trained, optimizer in zip(networks, optimizers, strict=True):
            optimizer.zero_grad()
            batched.meta_gradient(trained, tasks, loop)
            optimizer.step()
            if zeroing:
                zero_head(trained.head)
        if update in SHOWN:
            one, other = (nn.utils.parameters_to_vector(trained.parameters()) for trained in networks)
            difference = ((one - other).norm() / one.norm()).item()
            curved = sharpness(network, tasks, loop) if update == updates and update in CURVED else None
            yield update, difference, network.head.weight.norm().item(), curved


def sharpness(network: nn.Module, tasks: Task, loop: InnerLoop, count: int = 2, iterations: int = 15) -> list[float]:
    """eta times the largest absolute eigenvalue of the support loss's Hessian at theta_0 .. theta_N, a mean over tasks.

    By power iteration. Beyond 2 a gradient step grows what it should shrink.
    """
    names = [name for name, _ in network.named_parameters()]
    largest = torch.zeros(loop.inner_steps + 1)
    for support, labels in zip(tasks.support[:count], tasks.support_labels[:count], strict=True):

        def gradient(theta: list[Tensor], support: Tensor = support, labels: Tensor = labels) -> list[Tensor]:
            logits = functional_call(network, dict(zip(names, theta, strict=True)), (support,))
            return list(torch.autograd.grad(F.cross_entropy(logits, labels), theta, create_graph=True))

        theta = [parameter.detach().clone().requires_grad_() for parameter in network.parameters()]
        for step in range(loop.inner_steps + 1):
            gradients = gradient(theta)
            generator = torch.Generator().manual_seed(0)
            vector = [torch.randn(p.shape, generator=generator).to(p) for p in theta]
            for _ in range(iterations):
                norm = torch.sqrt(sum((part**2).sum() for part in vector))
                vector = [part / norm for part in vector]
                vector = torch.autograd.grad(gradients, theta, vector, retain_graph=True)
            largest[step] += loop.inner_lr * torch.sqrt(sum((part**2).sum() for part in vector)).item() / count
            theta = [(p - loop.inner_lr * g).detach().requires_grad_() for p, g in zip(theta, gradients, strict=True)]
    return [round(value, 4) for value in largest.tolist()]


def picture(rows: list[dict[str, Any]]) -> Figure:
    """A panel for each data set, number of shots, inner_lr, inner_steps and precision; a line for each setting."""
    panels = list(dict.fromkeys(tuple(row[name] for name in SETTING[:5]) for row in rows))
    columns = min(3, len(panels))
    down = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 0.8 + 2.8 * down), layout="constrained")
    grid = figure.subplots(down, columns, sharey=True, squeeze=False)
    lines = {}
    for axes, panel in zip(grid.flat, panels, strict=False):
        dataset, shots, inner_lr, steps, precision = panel
        for row in rows:
            if tuple(row[name] for name in SETTING[:5]) == panel:
                label = f"{ORDERS[row['order']]}, {STARTS[row['start']]}"
                (lines[label],) = axes.plot(
                    [int(update) for update in row["difference"]],
                    list(row["difference"].values()),
                    color=COLOURS[list(STARTS).index(row["start"])],
                    linestyle="-" if row["order"] == "first" else "--",
                )
        axes.set(yscale="log", xlabel="outer updates")
        words = f"{dataset} {shots}-shot, inner_lr {inner_lr:g},\n{steps} inner step{'s' * (steps > 1)}, {precision}"
        axes.set_title(words, fontsize=9, loc="left")
        plain(axes)
    for axes in grid[:, 0]:
        axes.set_ylabel("relative difference")
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    figure.legend(lines.values(), lines.keys(), frameon=False, fontsize=9, ncols=columns, loc="outside lower center")
    return figure


if __name__ == "__main__":
    main()
