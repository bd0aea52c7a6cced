"""What the terms of FOMAML's gradient are before training, by eta: python docs/results/terms.py [KNOB=...]

The ratio of the norms of interference and contrastive term, and the share of pairs of different classes that the
coefficients draw together, of networks with random heads on test tasks (docs/method.md 2.4). The knobs are those of
train.py, as in dataset=omniglot dataset.root=FOLDER test_tasks=32. Rows go into terms.json, of which a table of
docs/evidence.md is made.
"""

import sys

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from kept import keep

import fewshot
from fewshot.config.tree import CONF
from fewshot.data.task import Task
from fewshot.models.network import Network
from fewshot.theory.closed_forms import adapt_head
from fewshot.theory.features import Features

SEEDS, ETAS, STEPS = range(5), (0.1, 0.4, 1.0, 4.0), (1, 2, 5)
KEY = ("dataset", "ways", "shots", "inner_steps", "inner_lr", "seed")


@torch.no_grad()
def measure(network: Network, tasks: Task, eta: float, steps: int) -> dict[str, float]:
    """Means over the tasks."""
    features = Features.of(network, tasks)
    head = adapt_head(features, inner_lr=eta, inner_steps=steps)
    terms, c = head.gradients(first_order=True), head.coefficients().sum(0)
    ratio = terms.interference.flatten(1).norm(dim=1) / terms.contrastive.flatten(1).norm(dim=1)
    wrong = features.wrong_signs(c)[~features.same_class()]
    return {"interference_over_contrastive": ratio.mean().item(), "wrong_among_other": wrong.double().mean().item()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", sys.argv[1:])
    images = instantiate(cfg.dataset.source)
    shape = {knob: cfg[knob] for knob in ("ways", "shots", "queries")}
    measured = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        network = instantiate(cfg.model.network).double()
        sampler = fewshot.TaskSampler(images["test"], seed=seed, mean=cfg.dataset.mean, std=cfg.dataset.std, **shape)
        tasks = sampler(0, cfg.test_tasks)
        tasks = tasks._replace(support=tasks.support.double(), query=tasks.query.double())
        for steps in STEPS:
            for eta in ETAS:
                about = {"dataset": cfg.dataset.name, **shape, "inner_steps": steps, "inner_lr": eta, "seed": seed}
                numbers = {name: float(f"{value:.6g}") for name, value in measure(network, tasks, eta, steps).items()}
                measured.append({**about, "tasks": cfg.test_tasks, **numbers})
    keep("terms", measured, KEY)
