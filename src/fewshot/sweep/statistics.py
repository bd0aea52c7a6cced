"""How sure a difference is: over other tasks, over other seeds, and over both.

Shapes: S seeds, T tasks. d_{st} is the difference of two accuracies of seed s on task t, taken to be mu + a_s + b_t +
e_{st} with independent random a, b and e (two-way crossed random effects, without replication; Searle, Casella and
McCulloch 1992, section 4.3).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """A mean difference, and half widths of its 95% confidence intervals; nan where they cannot be known.

    over_tasks: were other tasks drawn and these very models tested; over_seeds: were other seeds trained and tested on
    these very tasks; over_both: the one to be believed where there are several seeds. p: of "there is no difference",
    by over_both, or by over_tasks where there is one seed.
    """

    mean: float
    over_tasks: float
    over_seeds: float
    over_both: float
    p: float
    seeds: int

    @property
    def half_width(self) -> float:
        """The half width of the interval to be believed: over both, or over tasks where there is one seed."""
        return self.over_tasks if np.isnan(self.over_both) else self.over_both


def paired(differences: np.ndarray) -> Difference:
    """The mean of differences (S, T), each of one seed on one task, with its intervals."""
    seeds, tasks = differences.shape
    mean, of_task, of_seed = differences.mean(), differences.mean(axis=0), differences.mean(axis=1)
    # Mean squares: of tasks, of seeds, and of what neither explains.
    ms_tasks = seeds * of_task.var(ddof=1)
    over_tasks = _half_width(ms_tasks / (seeds * tasks), tasks - 1)
    if seeds == 1:
        return Difference(mean, over_tasks, np.nan, np.nan, _p(mean, ms_tasks / tasks, tasks - 1), seeds)
    ms_seeds = tasks * of_seed.var(ddof=1)
    rest = differences - of_task - of_seed[:, None] + mean
    ms_rest = (rest**2).sum() / ((seeds - 1) * (tasks - 1))
    # Var(mean) = var(a)/S + var(b)/T + var(e)/(S T). Where the estimate of var(a) is negative, it is taken to be 0.
    if ms_seeds > ms_rest:
        square = ms_seeds + ms_tasks - ms_rest
        parts = ((ms_seeds, seeds - 1), (ms_tasks, tasks - 1), (ms_rest, (seeds - 1) * (tasks - 1)))
        freedom = square**2 / max(sum(ms**2 / df for ms, df in parts), np.finfo(float).tiny)  # Satterthwaite
    else:
        square, freedom = ms_tasks, tasks - 1
    variance = square / (seeds * tasks)
    over_seeds = _half_width(ms_seeds / (seeds * tasks), seeds - 1)
    return Difference(mean, over_tasks, over_seeds, _half_width(variance, freedom), _p(mean, variance, freedom), seeds)


def _half_width(variance: float, freedom: float) -> float:
    from scipy.special import stdtrit  # scipy takes its time to import

    return float(stdtrit(freedom, 0.975) * variance**0.5)


def _p(mean: float, variance: float, freedom: float) -> float:
    if variance == 0:
        return 1.0 if mean == 0 else 0.0
    from scipy.special import stdtr

    return float(2 * stdtr(freedom, -abs(mean) / variance**0.5))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several questions, corrected so that one of twenty such tables is wrong anywhere (Holm 1979)."""
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected
