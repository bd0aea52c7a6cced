"""Measures how fast rounding drives two trainings apart that are the same in exact arithmetic.

    python benchmarks/rounding.py [overrides, such as dataset=omniglot dataset.root=FOLDER]

One training is head-only MAML with zeroing, the other descends the explicit contrastive loss that equals it
(docs/method.md, 2.6). Both start from the same weights and have the same tasks. Prints the relative difference of the
encoders' weights after some outer updates, in float32 and float64.
"""

import copy
import sys
from functools import partial

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from fewshot.config.tree import CONF
from fewshot.data.meta_batches import TaskDataModule
from fewshot.inner_loop import InnerLoop
from fewshot.maml import explicit_loss, sequential
from fewshot.models.head import zero_head

SHOWN = (1, 2, 4, 8, 16)  # outer updates


def main(overrides: list[str]) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", ["model.head_bias=false", "meta_batch_size=8", "seed=0", *overrides])
    torch.set_num_threads(1)
    data = TaskDataModule.from_config(cfg)
    torch.manual_seed(cfg.seed)
    network = instantiate(cfg.model.network)
    zero_head(network.head)
    print("precision  order   ", *(f"update {update:<3}" for update in SHOWN))
    for dtype in (torch.float32, torch.float64):
        for first_order in (True, False):
            apart = difference(network.to(dtype), data, first_order)
            order = "first " if first_order else "second"
            print(f"{str(dtype)[6:]}    {order}  ", *(f"{distance:.1e}   " for distance in apart))


def difference(network: nn.Module, data: TaskDataModule, first_order: bool) -> list[float]:
    """Of the two encoders' weights, relative to their size, after the updates SHOWN."""
    ways = (
        partial(sequential.meta_gradient, loop=InnerLoop(1, 0.1, first_order, adapted="head")),
        partial(explicit_loss.meta_gradient, loop=InnerLoop(1, 0.1, first_order, noise=False, interference=False)),
    )
    networks = [copy.deepcopy(network) for _ in ways]
    optimizers = [torch.optim.Adam(trained.parameters(), lr=0.001) for trained in networks]
    distances = []
    for update in range(1, SHOWN[-1] + 1):
        tasks = data.samplers["train"]((update - 1) * data.meta_batch_size, data.meta_batch_size)
        dtype = network.head.weight.dtype
        tasks = tasks._replace(support=tasks.support.to(dtype), query=tasks.query.to(dtype))
        for trained, optimizer, meta_gradient in zip(networks, optimizers, ways, strict=True):
            optimizer.zero_grad()
            meta_gradient(trained, tasks)
            optimizer.step()
            zero_head(trained.head)
        if update in SHOWN:
            one, other = (nn.utils.parameters_to_vector(trained.encoder.parameters()) for trained in networks)
            distances.append(((one - other).norm() / one.norm()).item())
    return distances


if __name__ == "__main__":
    main(sys.argv[1:])
