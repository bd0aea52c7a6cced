"""Pictures and tables of kept runs, drawn as `fewshot sweep` draws those of folders: python docs/results/curves.py

docs/memorization.png, docs/prototypical.png, docs/ablation.png, docs/init_scale.png, docs/five_shot.png,
docs/panel1_cifarfs.png and docs/panel2_cifarfs.png are of the kept runs of these names, docs/longer_cifarfs.png,
docs/panel2_omniglot.png and docs/head_family_omniglot.png of `cifarfs`, `panel2` and `head_family`.
docs/test_time_zeroing.png and, with seed 0, docs/tutorial_summary.png are of FOMAML's runs of panel 1,
docs/accuracy_over_steps.png is of `default`. The cosine similarities, docs/label_orders_omniglot.png and
docs/motion_over_training.png are of what `theory.py` keeps.
"""

from pathlib import Path
from typing import Any

import collect
import numpy as np
import theory
from matplotlib.figure import Figure
from tables import markdown

from fewshot.config.stored import to_today
from fewshot.config.tree import MODES
from fewshot.errors import shown
from fewshot.files import write_file
from fewshot.results.figures import DRAWN, GREEN, MARKS, accuracy_over_steps, plain, png
from fewshot.results.record_files import title
from fewshot.sweep.figures import COLOURS, HEADS, cosine_similarity, panels, places, sweep
from fewshot.sweep.settings import Job, Setting, group

LINES = {"zeroing_off": "--", "zeroing_on": "-"}
LOSSES = {  # of algo=contrastive: (algo.noise, algo.interference)
    (True, True): "the whole loss",
    (True, False): "without interference",
    (False, True): "without noise",
    (False, False): "without both",
}


def settings(name: str, only: str = "", here: Path = collect.HERE) -> list[Setting]:
    """The kept runs whose names end so but for their seed, as `fewshot sweep` groups those that it reads."""
    facts = {run: about for run, about in collect.facts(name, here).items() if run.partition("-seed")[0].endswith(only)}
    rows: dict[str, list[collect.Row]] = {run: [] for run in facts}
    for row in collect.rows(name, here):
        rows.get(f"{row.setting}-seed{row.seed}", []).append(row)
    return group([_job(run, about["config"], rows[run]) for run, about in facts.items()])


def _job(run: str, config: dict, rows: list[collect.Row]) -> Job:
    curves: dict[str, list[tuple[int, float]]] = {}
    test: dict[str, dict[str, list[float]]] = {mode: {"accuracy": [], "ci95": []} for mode in MODES}
    for row in rows:
        if row.ci95 is None:
            metric = f"{row.split}{MODES[row.mode]}/query_accuracy/step_{row.step}"
            curves.setdefault(metric, []).append((row.iteration, row.accuracy))
        else:  # rows are in the order of their steps
            test[row.mode]["accuracy"].append(row.accuracy)
            test[row.mode]["ci95"].append(row.ci95)
    return Job(Path(run), to_today(config), {"test": test}, curves, None)


def final_tests(runs: list[Setting], *knobs: str) -> str:
    """The final test of each run after as many inner steps as in training, ± its 95% interval over tasks.

    knobs: the values of each are a column of their own, and the rows are in the order of these values.
    """
    rows = []
    for setting in runs:
        for job in setting.jobs:
            step, tests = setting.config["inner_steps"], job.results["test"] if job.results else {}
            scores = [(tests[mode]["accuracy"][step], tests[mode]["ci95"][step]) for mode in MODES]
            cells = [f"{100 * accuracy:.1f} ± {100 * ci95:.1f}" for accuracy, ci95 in scores]
            values = [f"`{shown(setting.value(knob))}`" for knob in knobs]
            rows.append([*values, setting.label(without=knobs), str(job.config["seed"]), *cells])
    for column in reversed(range(len(knobs))):
        seen = [row[column] for row in rows]
        rows.sort(key=lambda row: seen.index(row[column]))
    heads = [*(f"`{knob}`" for knob in knobs), "", "seed", "test zeroing off", "test zeroing on"]
    if knobs and len({row[len(knobs)] for row in rows}) == 1:  # the knobs are all in which they differ
        heads, *rows = ([*row[: len(knobs)], *row[len(knobs) + 1 :]] for row in [heads, *rows])
    return markdown(heads, rows)


def test_time_zeroing(runs: list[Setting], shown: tuple[float, float]) -> Figure:
    """The test curve of each setting with the head as it is and with the head zeroed for the test alone.

    First and second order stand side by side. Of several seeds, those that all settings have.

    shown: the lowest and the highest accuracy that the figure shows.
    """
    orders = list(dict.fromkeys(setting.loop.first_order for setting in runs))
    colours = places(setting.label(without=["algo.first_order"]) for setting in runs)
    figure = Figure(figsize=(3 + 4 * len(orders), 4.4), layout="constrained")
    step, shots = runs[0].config["inner_steps"], runs[0].config["shots"]
    seeds = set.intersection(*({job.config["seed"] for job in setting.jobs} for setting in runs))
    runs = [run._replace(jobs=[job for job in run.jobs if job.config["seed"] in seeds]) for run in runs]
    over = f"mean over {len(seeds)} seeds" if len(seeds) > 1 else "1 seed"
    panels = figure.subplots(1, len(orders), sharey=True, squeeze=False)[0]
    for axes, first_order in zip(panels, orders, strict=True):
        for setting in (setting for setting in runs if setting.loop.first_order == first_order):
            head = setting.label(without=["algo.first_order"])
            style = {"color": COLOURS[colours[head]], "linewidth": 1.4}
            for mode, line in LINES.items():
                _, updates, curve = setting.curve(mode)
                axes.plot(updates, curve.mean(axis=0), line, marker=".", **style)
        axes.set(xlabel="outer iteration", ylabel=f"test accuracy after inner step {step}", ylim=shown)
        name = "FOMAML" if first_order else "SOMAML"
        axes.set_title(f"{name}, Omniglot 5-way {shots}-shot, {over}", fontsize=10, loc="left")
        axes.label_outer()
        plain(axes)
    named = [(head, "-", COLOURS[place]) for head, place in colours.items()]
    named += [(DRAWN[mode][-1], line, "grey") for mode, line in LINES.items()]
    for name, line, colour in named:
        panels[-1].plot([], [], line, color=colour, linewidth=1.4, label=name)
    figure.legend(frameon=False, fontsize=9, ncols=3 * len(orders), loc="outside lower center")
    return figure


def default() -> Figure:
    """What `python train.py` draws at its end."""
    (setting,) = settings("default")
    (job, *_) = setting.jobs
    scores = job.results["test"] if job.results else {}
    tasks = collect.rows("default", split="test", step=0)[-1].tasks
    return accuracy_over_steps({"test": {**scores, "tasks": tasks}}, job.config)


def cosines(dataset: str) -> Figure:
    """What a sweep of experiment=cosine_similarity draws at its end."""
    kept = theory.kept("cosine_similarity")
    runs = {
        start: [run for name, run in kept.items() if name.startswith(f"{dataset}-{loop}-seed")]
        for loop, start in theory.STARTS.items()
    }
    return cosine_similarity(runs, title(next(iter(runs.values()))[0]["config"], algorithm=False))


def label_orders() -> Figure:
    """The accuracy of FOMAML's three models on the same tasks, a dot for each order of a task's labels."""
    models = {start: theory.evidence()[loop.replace("_", "-")] for loop, start in theory.STARTS.items()}
    figure = Figure(figsize=(9.4, 3.4), layout="constrained")
    grid = figure.subplots(1, len(models), sharex=True, sharey=True)
    for axes, (start, model) in zip(grid, models.items(), strict=True):
        for head, (colour, marker, label) in zip(theory.HEADS, DRAWN.values(), strict=True):
            if head == "this_head" and not theory.own_head(model):
                continue
            orders = np.array(model["label_orders"][head]["accuracies"])  # (tasks, orders)
            middle = np.arange(1, 1 + len(orders))[:, None] + (0.2 if head == "zeroed_head" else -0.2)
            places = middle + np.linspace(-0.13, 0.13, orders.shape[1])
            style = {"color": colour, "alpha": 0.35, "markersize": 4, "markeredgewidth": 0}
            axes.plot(orders.ravel(), places.ravel(), marker, label=label, **style)
        axes.set(xlabel=f"accuracy, {orders.shape[1]} orders of labels", title=f"FOMAML, {start}")
        axes.set_yticks(range(1, 1 + len(orders)), [f"task {task}" for task in range(1, 1 + len(orders))])
        plain(axes)
    grid[0].invert_yaxis()
    marks, names = grid[0].get_legend_handles_labels()
    figure.legend(marks, names, frameon=False, fontsize=9, ncols=len(names), loc="outside lower center")
    return figure


def motion_over_training() -> Figure:
    """How far and which way a small outer step moves features, over outer updates."""
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    far, shares, way = figure.subplots(1, 3)
    for name, line in theory.motions().items():
        start, order = name.split(", ")
        style = {"color": COLOURS[HEADS[start]], "marker": "o", "linewidth": 1.4, "markersize": 5}
        style |= {"markerfacecolor": "white"} if order == "second order" else {}
        values = {key: [of[key] for of in line["of"]] for key in line["of"][0]}
        far.plot(line["updates"], np.divide(values["support"], values["query"]), label=name, **style)
        shares.plot(line["updates"], values["same_class_drawn"], **style)
        shares.plot(line["updates"], values["other_class_pushed"], "--", **style)
        way.plot(line["updates"], values["as_drawn"], **style)
    far.set_yscale("log")
    far.set_ylabel("support's motion over the queries'")
    shares.set(ylim=(0.4, 1.02), ylabel="pairs that move the right way")
    shares.set_title("solid: same class, dashed: others", fontsize=9, loc="left")
    way.set_ylabel("cosine with the poster's way")
    for axes in (far, shares, way):
        axes.set_xlabel("outer iteration")
        plain(axes)
    lines, names = far.get_legend_handles_labels()
    figure.legend(lines, names, frameon=False, fontsize=9, ncols=len(names), loc="outside lower center")
    return figure


def prototypes(runs: list[Setting]) -> Figure:
    """Left: MAML with zeroing and one step beside the network of inner products. Right: that network by temperature."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    curves, temperatures = figure.subplots(1, 2)
    (maml,) = (run for run in runs if run.config["algo"]["head"] != "prototypes")
    by_eta = {run.config["inner_lr"]: run for run in runs if run is not maml}
    network = by_eta[maml.config["inner_lr"]]
    styles: dict[str, Any] = {  # MAML's is broad and pale, since the other lies on it
        "MAML with zeroing, one inner step": {"color": GREEN, "linewidth": 5, "alpha": 0.45, "markersize": 11},
        "prototypical network, inner products": {"color": "black", "linewidth": 1.2, "markersize": 4},
    }
    for run, (label, style) in zip((maml, network), styles.items(), strict=True):
        _, updates, curve = run.curve("zeroing_on")
        curves.plot(updates, curve.mean(axis=0), "o-", label=label, **style)
    curves.set(xlabel="outer iteration", ylabel="test accuracy")
    etas = sorted(by_eta)
    finals = [by_eta[eta].accuracies("zeroing_on").mean(axis=0)[1] for eta in etas]
    with_maml, alone = styles.values()
    temperatures.plot(maml.config["inner_lr"], maml.accuracies("zeroing_on").mean(axis=0)[1], "o", **with_maml)
    temperatures.plot(etas, finals, "o-", **alone)
    temperatures.set_xscale("log")
    temperatures.set_xticks(etas, [f"{eta:g}" for eta in etas])
    temperatures.set_xticks([], minor=True)
    temperatures.set(xlabel="eta; the temperature is K/eta", ylabel="test accuracy of the best model")
    for axes in (curves, temperatures):
        plain(axes)
    figure.suptitle("Omniglot 5-way 1-shot, 1 seed, test zeroing on", fontsize=10)
    figure.legend(*curves.get_legend_handles_labels(), frameon=False, fontsize=9, ncols=2, loc="outside lower center")
    return figure


def by_term() -> dict[int, dict[float, dict[str, Setting]]]:
    """The kept runs of the explicit loss: {inner steps: {eta: {a name of LOSSES: its runs}}}."""
    runs: dict[int, dict[float, dict[str, Setting]]] = {}
    for setting in settings("ablation"):
        config = setting.config
        name = LOSSES[config["algo"]["noise"], config["algo"]["interference"]]
        runs.setdefault(config["inner_steps"], {}).setdefault(config["inner_lr"], {})[name] = setting
    return {steps: dict(sorted(runs[steps].items())) for steps in sorted(runs)}


def ablation_table() -> str:
    """The final test in %, of the seeds in their order: with the head as it is, and zeroed for the test."""
    rows = []
    for mode in MODES:
        for steps, etas in by_term().items():
            for eta, losses in etas.items():
                finals = [_finals(losses[name], mode) for name in LOSSES.values()]
                cells = [", ".join(f"{100 * by_seed[seed]:.1f}" for seed in sorted(by_seed)) for by_seed in finals]
                rows.append([DRAWN[mode][-1], str(steps), f"{eta:g}", *cells])
    return markdown(["", "inner steps", "eta", *LOSSES.values()], rows)


def _finals(setting: Setting, mode: str) -> dict[int, float]:
    """By seed: the final test after as many inner steps as in training."""
    tests = setting.accuracies(mode)[:, setting.config["inner_steps"]]
    return dict(zip((job.config["seed"] for job in setting.jobs), map(float, tests), strict=True))


def ablation(runs: dict[int, dict[float, dict[str, Setting]]]) -> Figure:
    """The final test by eta, with the explicit loss whole and without its terms; inner steps across, heads down."""
    figure = Figure(figsize=(1.5 + 3.6 * len(runs), 6.6), layout="constrained")
    grid = figure.subplots(2, len(runs), sharex=True, sharey=True, squeeze=False)
    for row, mode in zip(grid, MODES, strict=True):
        for axes, (steps, etas) in zip(row, runs.items(), strict=True):
            for number, name in enumerate(LOSSES.values()):
                finals = {eta: list(_finals(losses[name], mode).values()) for eta, losses in etas.items()}
                means = [sum(values) / len(values) for values in finals.values()]
                style = {"color": COLOURS[number], "linewidth": 1.4, "markersize": 5}
                axes.plot(list(etas), means, **style)
                points = [(eta, value) for eta, values in finals.items() for value in values]
                axes.plot(*zip(*points, strict=True), MARKS[number], **style)
                axes.plot([], [], f"{MARKS[number]}-", label=name, **style)
            axes.set_xscale("log")
            axes.set_xticks(list(etas), [f"{eta:g}" for eta in etas])
            axes.set_xticks([], minor=True)
            steps_in_words = f"{steps} inner step{'s' * (steps > 1)}"
            axes.set_title(f"{steps_in_words}, {DRAWN[mode][-1]}", fontsize=9, loc="left")
            axes.set(xlabel="eta", ylabel="test accuracy of the best model")
            axes.label_outer()
            plain(axes)
    figure.suptitle(
        "Omniglot 5-way 1-shot, the explicit loss of first order without zeroing, 400 updates of 8 tasks.\n"
        "Marks: single seeds; lines: their means.",
        fontsize=10,
    )
    lines, names = grid[0][0].get_legend_handles_labels()
    figure.legend(lines, names, frameon=False, fontsize=9, ncols=len(names), loc="outside lower center")
    return figure


def longer() -> list[Setting]:
    """The kept runs of `cifarfs`, one shot before five; what has become of the head is their name, not their length."""
    runs = sorted(settings("cifarfs"), key=lambda run: run.config["shots"])
    return [run._replace(knobs={knob: run.knobs[knob] for knob in ("algo.zeroing", "shots")}) for run in runs]


if __name__ == "__main__":
    DOCS = collect.HERE.parent
    for drawn, figure in {
        "memorization": panels(settings("memorization"), ["dataset.tasks", "shots"]),
        "panel2_omniglot": panels(settings("panel2"), ["algo.zeroing"]),
        "prototypical": prototypes(settings("prototypical")),
        "ablation": ablation(by_term()),
        "test_time_zeroing": test_time_zeroing(settings("panel1", "-first"), shown=(0.75, 0.95)),
        "init_scale": test_time_zeroing(settings("init_scale"), shown=(0.6, 0.95)),
        "five_shot": test_time_zeroing(settings("five_shot"), shown=(0.8, 0.99)),
        "exact_reformulation_omniglot": panels(settings("exact_reformulation"), ["algo.first_order", "algo.zeroing"]),
        "head_family_omniglot": sweep(settings("head_family")),
        "panel1_cifarfs": panels(settings("panel1_cifarfs"), ["algo.first_order"]),
        "panel2_cifarfs": panels(settings("panel2_cifarfs"), ["algo.zeroing"]),
        "longer_cifarfs": panels(longer(), ["shots"]),
        "tutorial_summary": sweep(
            [setting._replace(jobs=setting.jobs[:1]) for setting in settings("panel1", "-first")]
        ),
        "accuracy_over_steps": default(),
        "label_orders_omniglot": label_orders(),
        "motion_over_training": motion_over_training(),
        "cosine_similarity_omniglot": cosines("omniglot"),
        "cosine_similarity_cifarfs": cosines("cifarfs"),
    }.items():
        write_file(DOCS / f"{drawn}.png", png(figure, dpi=110))
