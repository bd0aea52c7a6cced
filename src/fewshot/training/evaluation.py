"""What validation and test measure of a model: the accuracy after every inner step, in both modes of the test.

Shapes: B tasks, T inner steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from fewshot.config.tree import MODES, statistics
from fewshot.data.task import Task
from fewshot.errors import UserError
from fewshot.inner_loop import InnerLoop
from fewshot.models.network import Network
from fewshot.results.record_files import Scores, diverged
from fewshot.training.choose_engine import Engine

Measured = dict[tuple[str, str], Tensor]  # by statistics and mode: (B, T + 1)


class Evaluation:
    """How a model is evaluated, and what the final test has measured of it.

    Args:
        steps: T, at least as many as in training.
        statistics: by what BatchNorm normalises the queries, see norms.py; while training, the first one alone.
    """

    def __init__(self, steps: int, statistics: Sequence[str] = ("task",)) -> None:
        self.steps, self.statistics = steps, tuple(statistics)
        self.tested: dict[str, dict[str, dict[str, Tensor]]] = {}  # by statistics, split and mode: (tasks, T + 1)
        self.results: dict[str, dict[str, dict[str, Scores]]] = {}  # likewise

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "Evaluation":
        return cls(cfg.test_steps, statistics(cfg))

    def measure(
        self, engine: Engine, network: Network, loop: InnerLoop, etas: Any, tasks: Task, *, final: bool
    ) -> Measured:
        """Changes nothing in the network. final: by all statistics, as the final test."""
        # One computation for both modes where the head is zero already, or none begins the loop.
        zero = not loop.makes_head and not any(parameter.any() for parameter in network.head.parameters())
        evaluations = [loop.evaluation(self.steps, z) for z in ((True,) if zero or loop.distance else (False, True))]
        asked = self.statistics if final else self.statistics[:1]
        with engine.one_line_out_of_memory(tasks):
            accuracies = engine.step_accuracies(network, tasks, evaluations, etas, asked).cpu()
        accuracies = accuracies.expand(-1, -1, self.steps + 1)  # a prototypical network takes no step
        measured = {}
        for words, modes in zip(asked, accuracies.split(len(evaluations)), strict=True):
            measured |= {(words, "zeroing_off"): modes[0], (words, "zeroing_on"): modes[-1]}
        return measured

    def scores(self, chunks: Sequence[Measured]) -> dict[str, Scores]:
        """Of all tasks, by the first statistics."""
        return {mode: Scores.of(accuracies) for mode, accuracies in self._joined(chunks, self.statistics[0]).items()}

    def keep(self, split: str, chunks: Sequence[Measured], inner_steps: int) -> None:
        """What the final test has measured on the tasks of a split.

        Raises:
            UserError: some logits were not finite.
        """
        for words in self.statistics:
            tested = self._joined(chunks, words)
            results = {mode: Scores.of(accuracies) for mode, accuracies in tested.items()}
            if what := diverged(results, inner_steps, "check dataset.mean and dataset.std"):
                raise UserError(f"{split}_tasks={len(tested['zeroing_on'])}: {what}")
            self.tested.setdefault(words, {})[split] = tested
            self.results.setdefault(words, {})[split] = results

    @staticmethod
    def _joined(chunks: Sequence[Measured], words: str) -> dict[str, Tensor]:
        return {mode: torch.cat([chunk[words, mode] for chunk in chunks]) for mode in MODES}
