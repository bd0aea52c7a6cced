"""Measures what Lightning, the sampler and the record cost: the default job against the same loop without them.

    python benchmarks/default_job.py [rounds]

Two loops take turns of ten meta-iterations each. One is train.py's own, driven by Lightning's Trainer. The other is the
bare inner and outer loop, on one meta-batch that was drawn before. Prints the median seconds of a meta-iteration, and
the median ratio.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from fewshot.batched import engine as batched
from fewshot.config.tree import CONF
from fewshot.data.meta_batches import TaskDataModule
from fewshot.data.task import Task
from fewshot.inner_loop import InnerLoop
from fewshot.maml import sequential
from fewshot.training.meta_learner import MetaLearner

TURN = 10  # meta-iterations


class TakeTurns(pl.Callback):
    """After every TURN meta-iterations of the Trainer, as many bare ones."""

    def __init__(self, bare, rounds: int) -> None:
        self.bare, self.rounds, self.ours, self.theirs = bare, rounds, [], []

    def on_train_start(self, trainer: pl.Trainer, *_) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_) -> None:
        if trainer.global_step % TURN == 0:
            self.ours.append((time.perf_counter() - self.began) / TURN)
            began = time.perf_counter()
            for _ in range(TURN):
                self.bare()
            self.theirs.append((time.perf_counter() - began) / TURN)
            self.began = time.perf_counter()


def main(rounds: int) -> None:
    iterations = (rounds + 2) * TURN
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        # One validation at the start and one at the end, outside of the turns that count.
        cfg = compose("config", [f"iterations={iterations}", f"val_every={iterations}", "val_tasks=2", "logger=none"])
    loop = InnerLoop.of(cfg)
    data, module = TaskDataModule.from_config(cfg), MetaLearner.from_config(cfg, "sequential")
    network = instantiate(cfg.model.network)
    optimizer = torch.optim.Adam(network.parameters(), lr=cfg.outer_lr)
    tasks = data.samplers["train"](0, cfg.meta_batch_size)

    def bare() -> None:
        optimizer.zero_grad()
        sequential.meta_gradient(network, tasks, loop)
        optimizer.step()

    turns = TakeTurns(bare, rounds)
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [*instantiate(cfg.callbacks).values(), turns]
        trainer = instantiate(
            cfg.trainer, accelerator="cpu", logger=False, callbacks=callbacks, default_root_dir=Path(folder)
        )
        trainer.fit(module, data)
    ours, theirs = turns.ours[1:-1], turns.theirs[1:-1]  # the first turn warms up, the last one validates
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    print(
        f"meta-iteration, {cfg.meta_batch_size} tasks, {torch.get_num_threads()} threads, {len(ours)} turns of {TURN}:"
    )
    print(f"  train.py {statistics.median(ours):.4f} s, bare loop {statistics.median(theirs):.4f} s, ratio {ratio:.3f}")
    evaluation(network, tasks, loop, cfg.test_steps, rounds)


def evaluation(network: torch.nn.Module, tasks: Task, loop: InnerLoop, test_steps: int, rounds: int) -> None:
    """Milliseconds per task of training and of evaluation (every step, both zeroing modes), engines in turn."""
    seconds = {}
    for _ in range(rounds):
        for engine in (sequential, batched):
            name = {sequential: "sequential", batched: "batched"}[engine]
            began = time.perf_counter()
            engine.meta_gradient(network, tasks, loop)
            trained = time.perf_counter()
            engine.step_accuracies(network, tasks, [loop.evaluation(test_steps, zeroing) for zeroing in (False, True)])
            seconds.setdefault(f"{name} training", []).append(trained - began)
            seconds.setdefault(f"{name} evaluation", []).append(time.perf_counter() - trained)
    for what, times in seconds.items():
        print(f"  {what}: {1000 * statistics.median(times) / len(tasks.support):.1f} ms per task")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
