"""What validation and test measure of a model: the accuracy after every inner step, in both modes of the test.

Shapes: B tasks, Q query images per task, K ways, T inner steps, n queries of all tasks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from fewshot.config.tree import MODES, statistics
from fewshot.data.task import Task, query_accuracy
from fewshot.errors import UserError
from fewshot.inner_loop import InnerLoop
from fewshot.models.network import Network
from fewshot.results.record_files import Scores, diverged
from fewshot.training.choose_engine import Engine

Measured = dict[tuple[str, str], Tensor]  # by statistics and mode: accuracies (B, T + 1), or what _rated returns
BINS = 15


class Evaluation:
    """How a model is evaluated, and what the final test has measured of it.

    Args:
        steps: T, at least as many as in training.
        statistics: by what BatchNorm normalises the queries, see norms.py; while training, the first one alone.
        calibration: whether the final test measures how well the probabilities of its predictions are calibrated.
    """

    def __init__(self, steps: int, statistics: Sequence[str] = ("task",), calibration: bool = False) -> None:
        self.steps, self.statistics, self.calibration = steps, tuple(statistics), calibration
        self.tested: dict[str, dict[str, dict[str, Tensor]]] = {}  # by statistics, split and mode: (tasks, T + 1)
        self.results: dict[str, dict[str, dict[str, Scores]]] = {}  # likewise

    @classmethod
    def from_config(cls, cfg: DictConfig) -> "Evaluation":
        return cls(cfg.test_steps, statistics(cfg), cfg.get("calibration", False))

    def measure(
        self, engine: Engine, network: Network, loop: InnerLoop, etas: Any, tasks: Task, *, final: bool
    ) -> Measured:
        """Tests the network on the tasks and leaves it as it is. final: by all statistics, as the final test does."""
        # One computation serves both modes where the head is zero already, or the network is prototypical.
        elsewhere = loop.makes_head or loop.overrides("start")  # the loop begins from another head than the network's
        zero = not elsewhere and not any(parameter.any() for parameter in network.head.parameters())
        evaluations = [loop.evaluation(self.steps, z) for z in ((True,) if zero or loop.distance else (False, True))]
        asked = self.statistics if final else self.statistics[:1]
        with engine.one_line_out_of_memory(tasks):
            if final and self.calibration:
                logits = engine.step_logits(network, tasks, evaluations, etas, asked)
                values = _rated(logits, tasks.query_labels[:, None]).cpu()
            else:
                values = engine.step_accuracies(network, tasks, evaluations, etas, asked).cpu()
        values = values.expand(-1, -1, self.steps + 1, *values.shape[3:])  # a prototypical network takes no step
        measured = {}
        for whose, modes in zip(asked, values.split(len(evaluations)), strict=True):
            measured |= {(whose, "zeroing_off"): modes[0], (whose, "zeroing_on"): modes[-1]}
        return measured

    def scores(self, chunks: Sequence[Measured]) -> dict[str, Scores]:
        """The scores over all tasks, by the first statistics."""
        return {mode: Scores.of(accuracies) for mode, accuracies in self._joined(chunks, self.statistics[0]).items()}

    def keep(self, split: str, chunks: Sequence[Measured], inner_steps: int) -> None:
        """Keeps what the final test has measured on the tasks of a split.

        Raises:
            UserError: some logits were not finite.
        """
        for whose in self.statistics:
            measured = self._joined(chunks, whose)
            tested = {mode: values[..., 0] if self.calibration else values for mode, values in measured.items()}
            results = {mode: Scores.of(accuracies) for mode, accuracies in tested.items()}
            if what := diverged(results, inner_steps, "check dataset.mean and dataset.std"):
                raise UserError(f"{split}_tasks={len(tested['zeroing_on'])}: {what}")
            for mode, values in measured.items() if self.calibration else ():
                results[mode] = results[mode]._replace(calibration=calibration(values[..., 1:].unflatten(-1, (2, -1))))
            self.tested.setdefault(whose, {})[split] = tested
            self.results.setdefault(whose, {})[split] = results

    @staticmethod
    def _joined(chunks: Sequence[Measured], whose: str) -> dict[str, Tensor]:
        return {mode: torch.cat([chunk[whose, mode] for chunk in chunks]) for mode in MODES}


def _rated(logits: Tensor, labels: Tensor) -> Tensor:
    """(..., B, T + 1, Q, K) to (..., B, T + 1, 1 + 2 Q): the accuracy; of each query its confidence; which are right.

    A prediction's confidence is the probability of its class, which is the one with the highest.
    """
    confidence, predicted = logits.double().softmax(-1).max(-1)
    accuracy = query_accuracy(logits, labels).double().unsqueeze(-1)
    return torch.cat([accuracy, confidence, (predicted == labels).double()], -1)


def calibration(rated: Tensor) -> dict[str, Any]:
    """How well the confidence says how often a prediction is right, after every inner step.

    error: the expected calibration error (Guo et al. 2017, equation 3), the mean difference of confidence and accuracy
    over 15 bins of equal width, by torchmetrics. bins: of each bin the number of queries, their mean confidence and
    their accuracy; null where it is empty.

    rated: (tasks, T + 1, 2, Q), confidence and whether it is right.
    """
    content: dict[str, Any] = {"error": [], "confidence": [], "bins": {"queries": [], "confidence": [], "accuracy": []}}
    edges = torch.linspace(0, 1, BINS + 1, dtype=rated.dtype)
    for step in rated.unbind(1):
        confidence, right = step.transpose(0, 1).flatten(1)  # (n,) each
        confidence = confidence.clamp(max=1 - 1e-12)  # the library has a bin of its own for 1
        content["error"].append(round(binary_calibration_error(confidence, right.long(), BINS).item(), 6))
        content["confidence"].append(round(confidence.mean().item(), 6))
        bins = torch.bucketize(confidence, edges, right=True) - 1
        counts = torch.bincount(bins, minlength=BINS)
        content["bins"]["queries"].append(counts.tolist())
        for name, values in (("confidence", confidence), ("accuracy", right)):
            means = (torch.bincount(bins, values, minlength=BINS) / counts).tolist()
            content["bins"][name].append([round(mean, 6) if n else None for mean, n in zip(means, counts, strict=True)])
    return content
