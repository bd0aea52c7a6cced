"""The figures of a comparison; lines are told apart by their marks as well as by colour."""

from textwrap import fill

import numpy as np
from matplotlib.figure import Figure

from fewshot.config.tree import MODES
from fewshot.results.figures import DRAWN, MARKS, STYLES, plain, with_legend
from fewshot.sweep.figures import COLOURS
from fewshot.sweep.pairs import Row
from fewshot.sweep.settings import Setting, mean_and_ci95

CAPTIONS = {
    "differences": "Differences to the first setting, in points. Thick bars: 95% confidence interval over tasks; thin "
    "bars: over tasks and seeds, where there are several seeds. Filled marks: larger than noise.",
    "curves": "Accuracy after inner_steps over outer updates, test zeroing off: means over seeds; bands: their 95% "
    "confidence interval (Student t), where there are several.",
}


def differences(rows: list[Row], heading: str) -> Figure:
    """Every setting's difference to the first, with its intervals."""
    others = [row for row in rows if row.difference]
    labels = list(dict.fromkeys(row.setting.label() for row in others))
    figure = Figure(figsize=(7, 1.4 + 0.5 * len(labels)), layout="constrained")
    axes = figure.subplots()
    for row in others:
        colour, marker, _ = DRAWN[row.mode]
        shift = 0.14 * (1 if row.mode == "zeroing_on" else -1) * (len({row.mode for row in others}) > 1)
        place = labels.index(row.setting.label()) + shift
        assert row.difference is not None  # of all but the first
        mean, tasks, _, both = (100 * value for value in row.difference[:4])
        if not np.isnan(both):
            axes.errorbar(mean, place, xerr=both, color=colour, linewidth=1, capsize=3)
        axes.errorbar(mean, place, xerr=tasks, color=colour, linewidth=3)
        face = colour if row.larger_than_noise else "white"
        axes.plot(mean, place, marker=marker, color=colour, markerfacecolor=face, markersize=7, zorder=3)
    for mode, (colour, marker, label) in DRAWN.items():
        if any(row.mode == mode for row in others):
            axes.plot([], [], marker=marker, color=colour, label=label)
    axes.axvline(0, color="grey", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(labels)), [fill(label, 36) for label in labels], fontsize=9, parse_math=False)
    axes.set(ylim=(len(labels) - 0.5, -0.5), xlabel="difference in points")
    title = fill(f"{heading}: beside {rows[0].setting.label()}", 90)
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize=10, parse_math=False)
    plain(axes)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def curves(settings: list[Setting], heading: str) -> Figure:
    """The curves of all settings on one pair of axes."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, setting in enumerate(settings):
        split, updates, values = setting.curve(next(iter(MODES)))
        if not len(updates):
            continue
        mean, half = mean_and_ci95(values)
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(
            updates,
            mean,
            STYLES[number % len(STYLES)],
            color=colour,
            marker=MARKS[number % len(MARKS)],
            markevery=max(1, len(updates) // 8),
            markersize=5,
            label=f"{setting.label()} ({'test' if split == 'test' else 'validation'})".replace("$", r"\$"),
        )
        if not np.isnan(half).any():
            low, high = (mean - half).clip(min=0), (mean + half).clip(max=1)
            axes.fill_between(updates, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="outer update", ylabel="query accuracy after inner_steps")
    axes.set_title(heading, fontsize=10, loc="left", parse_math=False)
    plain(axes)
    return with_legend(figure, axes)
