"""Keeps what measures the theory, and writes the tables of docs/evidence.md: python docs/results/theory.py FOLDER...

In the folders and below them it looks for what the commands of that page leave: evidence.json of a model,
cosine_similarity.json, inner_products.json and motion.json of runs. It keeps each kind in one file of this folder.
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import collect
import numpy as np
from kept import rows as measured_rows
from tables import STARTS, markdown

from fewshot.files import EXPORTED, write_file
from fewshot.sweep.settings import mean_and_ci95
from models import model_name

HERE = Path(__file__).parent
KINDS = ("evidence", "cosine_similarity", "inner_products", "motion")
PAIRS = {"query_support": "query and support", "query_query": "two queries"}
HEADS = {"this_head": "its own head", "zeroed_head": "head zeroed"}
MODELS = ("fomaml", "zero-init", "zero", "somaml", "somaml-zero")  # in the order of the tables
LIMITS = {  # what is read into the paper, and what is measured of it
    "no_noise_beyond_one_step": "zeroing removes the noise, beyond one inner step: largest noise in a coefficient",
    "full_is_head_only_beyond_one_step": "the inner loop may leave the encoder alone, two steps, head zeroed: relative "
    "difference of the encoder's gradient of first order",
    "full_is_head_only_with_this_head": "the same, one step, the model's own head",
    "papers_somaml_loss_with_this_head": "the paper's explicit SOMAML loss is exact: relative difference with the "
    "model's own head",
    "uniform_with_the_bias_kept": "zeroing the weights is enough: largest difference from 1/K with the bias kept",
}


def kept(kind: str) -> dict[str, Any]:
    path = HERE / f"{kind}.json.gz"
    return json.loads(gzip.decompress(path.read_bytes())) if path.exists() else {}


def keep(folders: list[Path]) -> None:
    for kind in KINDS:
        content = kept(kind)
        for path in sorted(path for folder in folders for path in folder.rglob(f"{kind}.json")):
            name, about = _about_evidence(path) if kind == "evidence" else _about_run(path)
            content[name] = {**json.loads(path.read_text(encoding="utf-8")), **about, "machine": collect.machine()}
        if not content:
            continue
        text = json.dumps(collect.without_paths(dict(sorted(content.items()))))
        write_file(HERE / f"{kind}.json.gz", gzip.compress(text.encode(), mtime=0))


def _about_evidence(path: Path) -> tuple[str, dict[str, Any]]:
    evidence = json.loads(path.read_text(encoding="utf-8"))
    config, file = evidence["config"], Path(evidence["model"]["checkpoint"])
    model = f"{file.parent.name} dataset.root=FOLDER" if file.name == EXPORTED else "RUN"
    tasks = f"test_tasks={config['test_tasks']} threads={config['threads']}"
    command = f"python -m fewshot.evidence checkpoint={model} {tasks}"
    trained = evidence["model"]["trained_with"]
    return model_name(trained) + (f"-seed{trained['seed']}" if trained["seed"] else ""), {"command": command}


def _about_run(path: Path) -> tuple[str, dict[str, Any]]:
    results = json.loads((path.parent / "results.json").read_text(encoding="utf-8"))
    config = results["config"]
    loop = "zero" if config["algo"]["zeroing"] else "zero_init" if config["init_scale"] == 0 else "fomaml"
    about = {key: results[key] for key in ("versions", "seconds", "config")}
    return f"{config['dataset']['name']}-{loop}-seed{config['seed']}", about


def evidence(seed: int = 0) -> dict[str, Any]:
    """{model: its evidence.json}, the models of this seed that are kept, without what their names share."""
    of = {name.removeprefix("omniglot-5w1s-"): content for name, content in kept("evidence").items()}
    ending = f"-seed{seed}" if seed else ""
    return {name: of[name + ending] for name in MODELS if name + ending in of}


def own_head(model: dict[str, Any]) -> bool:
    """Whether the model has a head of its own: after training with zeroing it is zero."""
    return not model["same_for_all"]["weight"]


def _fraction(number: float, digits: int = 2) -> str:
    """.93; the digits of one alone, 0 or 1, where it is that."""
    return "0" if number == 0 else f"{number:.{digits}f}".replace("0.", ".", 1)


def _percent(number: float) -> str:
    return f"{100 * number:.1f}"


def summary() -> str:
    """What the page of a model says first, a column for each model."""
    return _by_model(evidence(), _SUMMARY)


def photos() -> str:
    """The same of a model of photos beside one of pen drawings, both with zeroing, and what its other sections say."""
    of = kept("evidence")
    models = {name: of[name] for name in ("omniglot-5w1s-zero", "cifarfs-5w1s-zero")}
    return _by_model(models, _SUMMARY | _OTHERS)


def _by_model(models: dict[str, Any], about: dict[str, Any]) -> str:
    rows = [[words, *(cell(model) for model in models.values())] for words, cell in about.items()]
    return markdown(["", *(f"`{name}`" for name in models)], [row for row in rows if any(row[1:])])


def _identities(model: dict[str, Any]) -> str:
    checks = model["identities"].values()
    largest = max(check["value"] for check in checks)
    return f"{sum(check['pass'] for check in checks)} of {len(checks)}, {largest:.1e}".replace("e-0", "e-")


def _both_heads(model: dict[str, Any], claim: str, cell: Any, key: str = "{}") -> str:
    """With the model's own head, if it has one, and from a zeroed one."""
    heads = list(HEADS) if own_head(model) else ["zeroed_head"]
    return " / ".join(cell(model[claim][key.format(head)]) for head in heads)


def _wrong_after_two_steps(model: dict[str, Any]) -> str:
    return f"{100 * model['coefficients']['more_steps']['wrong_among_other']:.2f}"


def _tested(model: dict[str, Any], mode: str) -> str:
    return _percent(model["test"][mode]["accuracy"][model["coefficients"]["inner_steps"]])


def _accuracy(model: dict[str, Any]) -> str:
    step = model["coefficients"]["inner_steps"]
    modes = ("zeroing_off", "zeroing_on") if own_head(model) else ("zeroing_on",)
    test = model["test"]
    return " / ".join(f"{_tested(model, m)} ± {_percent(test[m]['ci95'][step])}" for m in modes)


def _gain(model: dict[str, Any]) -> str:
    step, gain = model["coefficients"]["inner_steps"], model["test"]["gain"]
    return f"{100 * gain['accuracy'][step]:+.1f} ± {_percent(gain['ci95'][step])}" if own_head(model) else ""


_SUMMARY: dict[str, Any] = {
    "identities that hold (2.4 to 2.6, 2.8 to 2.10, 2.12, 2.13), largest difference": _identities,
    "wrong signs of c among pairs of different classes, one step, %: own head / zeroed": lambda m: _both_heads(
        m, "coefficients", lambda c: _percent(c["wrong_among_other"])
    ),
    "the same from a zeroed head after two steps, summed, %": _wrong_after_two_steps,
    "norm of the interference / of the contrastive term": lambda m: " / ".join(
        _fraction(m["probes"][name], 3) for name in ("interference_norm", "contrastive_norm")
    ),
    "cosine of query and support: same class / other": lambda m: " / ".join(
        _fraction(m["similarity"][name]) for name in ("same_class", "other_class")
    ),
    "the same before training": lambda m: " / ".join(
        _fraction(m["similarity"][f"initially_{name}"]) for name in ("same_class", "other_class")
    ),
    "rows of the head nearest to their class's mean after one step, %: own head / zeroed": lambda m: _both_heads(
        m, "memory", lambda c: _percent(c["nearest_is_own"]), key="{}_after"
    ),
    "agreement with the prototype classifier after 1, 2, 3 steps, %, own head": lambda m: (
        ", ".join(map(_percent, m["prototypes"]["this_head"])) if own_head(m) else ""
    ),
    "agreement with the prototype classifier after 1, 2, 3 steps, %, head zeroed": lambda m: ", ".join(
        map(_percent, m["prototypes"]["zeroed_head"])
    ),
    "the prototype classifier's accuracy, %": lambda m: _percent(m["prototypes"]["accuracy"]),
    "accuracy after `inner_steps`, %: head not zeroed for the test / zeroed": _accuracy,
    "what zeroing for the test changes on the same tasks, points": _gain,
}


def _difference_from_frozen(model: dict[str, Any]) -> str:
    by_steps = {steps: of for steps, of in model["frozen_encoder"]["zeroed_head"].items() if steps != "1"}
    return " / ".join(", ".join(_fraction(of[order]) for of in by_steps.values()) for order in ("fomaml", "somaml"))


def _help_and_harm(model: dict[str, Any]) -> str:
    of = [model["cross_task"][place] for place in ("own_task", "next_task")]
    return " / ".join(f"{100 * place['gain']:+.1f} ± {_percent(place['gain_ci95'])}" for place in of)


_OTHERS: dict[str, Any] = {
    "encoder's gradient after 2, 3, 5 steps, difference from that with a frozen encoder: first order / second": (
        _difference_from_frozen
    ),
    "support's motion over the queries': first order / second": lambda m: " / ".join(
        f"{of['support'] / of['query']:.2f}" for of in m["motion"]["zeroed_head"].values()
    ),
    "what the head's own outer step on a task changes there / on another task, points": _help_and_harm,
}


def limits() -> str:
    """Statements that do not hold, as numbers."""
    models = evidence()
    rows = []
    for name, words in LIMITS.items():
        cells = [model["limits"].get(name) for model in models.values()]
        rows.append([words, *(f"{cell['value']:.2g}" if cell and not cell["pass"] else "" for cell in cells)])
    return markdown(["", *(f"`{name}`" for name in models)], rows)


def _heads(models: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(model, key of the head, words) of the rows."""
    return [
        (name, head, f"`{name}`, {words}")
        for name, model in models.items()
        for head, words in HEADS.items()
        if head == "zeroed_head" or own_head(model)
    ]


def frozen_encoder() -> str:
    models, rows = evidence(), []
    for name, head, words in _heads(models):
        by_steps = models[name]["frozen_encoder"][head]
        orders = [", ".join(_fraction(of[order]) for of in by_steps.values()) for order in ("fomaml", "somaml")]
        rows.append([words, *orders, ", ".join(_percent(of["agree"]) for of in by_steps.values())])
    steps = ", ".join(next(iter(models.values()))["frozen_encoder"]["zeroed_head"])
    heads = [f"after {steps} steps", "first order", "second order", "same prediction, %"]
    return markdown(heads, rows)


def label_orders() -> str:
    models, rows = evidence(), []
    for name, head, words in _heads(models):
        of = models[name]["label_orders"][head]
        spread = f"{_percent(of['spread'])} / {_percent(of['largest_spread'])}"
        rows.append(
            [words, spread, _percent(float(np.mean(of["accuracies"]))), f"{of['apart']:.0e}".replace("1e+00", "1")]
        )
    heads = ["", "best less worst order, points: mean / largest", "mean accuracy, %", "predictions apart by"]
    return markdown(heads, rows)


def motion() -> str:
    models, rows = evidence(), []
    for name, head, words in _heads(models):
        for order, of in zip(("first", "second"), models[name]["motion"][head].values(), strict=True):
            cells = [f"{of['support'] / of['query']:.2f}"]
            cells += [_percent(of[key]) for key in ("same_class_drawn", "other_class_pushed")]
            rows.append([f"{words}, {order} order", *cells, _fraction(of["as_drawn"])])
    heads = ["", "support's motion over the queries'", "pairs of a class drawn together, %", "others pushed apart, %"]
    return markdown([*heads, "cosine with the poster's way"], rows)


def motions() -> dict[str, dict[str, Any]]:
    """{whose step: updates, and for each of them what `motion.py` measures} of the runs that are kept."""
    lines = {}
    for name, run in kept("motion").items():
        start = STARTS[name.removeprefix("omniglot-").partition("-seed")[0]]
        for order, words in (("fomaml", "first"), ("somaml", "second")):
            lines[f"{start}, {words} order"] = {"updates": run["updates"], "of": run[order]}
    return lines


def motion_over_training() -> str:
    lines = motions()
    updates = next(iter(lines.values()))["updates"]
    rows = []
    for words, line in lines.items():
        cells = []
        for of in line["of"]:
            shares = [f"{100 * of[key]:.0f}" for key in ("same_class_drawn", "other_class_pushed")]
            cells.append(f"{of['support'] / of['query']:.2f}: {', '.join(shares)}")
        rows.append([words, *cells])
    return markdown(["after updates", *map(str, updates)], rows)


def cross_task() -> str:
    models, rows = evidence(), []
    for name, model in models.items():
        places = ["own_task", "next_task", *["this_head"] * own_head(model)]
        of = [model["cross_task"][place] for place in places]
        gains = [f"{100 * place['gain']:+.1f} ± {_percent(place['gain_ci95'])}" for place in of]
        aligned = ", ".join(_fraction(place["aligned"]) for place in of)
        rows.append([f"`{name}`", *gains, *[""] * (3 - len(gains)), aligned])
    heads = ["accuracy, points", "the task of the step", "another task", "the model's own head, test tasks"]
    return markdown([*heads, "cosine of interference and contrastive term"], rows)


def cosine_similarity(dataset: str = "omniglot") -> str:
    """Mean cosines at the first and last measured update, ± 95% over seeds (Student t)."""
    of, rows = kept("cosine_similarity"), []
    for pairs, words in PAIRS.items():
        for loop, start in STARTS.items():
            runs = [run for name, run in of.items() if name.startswith(f"{dataset}-{loop}-seed")]
            matrices = np.array([run[pairs] for run in runs])  # (seeds, updates, K, K)
            itself = np.eye(matrices.shape[-1], dtype=bool)
            columns = [matrices[..., mask].mean(-1)[:, place] for place in (0, -1) for mask in (itself, ~itself)]
            cells = [f"{_fraction(mean, 3)} ± {_fraction(ci95, 3)}" for mean, ci95 in map(mean_and_ci95, columns)]
            rows.append([f"{words}, {start}", *cells])
    first, last = (next(iter(of.values()))["updates"][place] for place in (0, -1))
    heads = [f"update {first}: same class", "other", f"update {last}: same class", "other"]
    return markdown(["", *heads], rows)


def both_seeds() -> str:
    """What training makes of a model, of seed 0 and of seed 1: the models of which both are kept."""
    seeds, rows = [evidence(0), evidence(1)], []
    names = [name for name in seeds[0] if name in seeds[1]]
    for words, (needs_head, value) in _BY_SEED.items():
        models = {name: [seed[name] for seed in seeds] for name in names}
        cells = [", ".join(map(value, of)) if own_head(of[0]) or not needs_head else "" for of in models.values()]
        rows.append([words, *cells])
    return markdown(["seed 0, seed 1", *(f"`{name}`" for name in names)], rows)


_BY_SEED: dict[str, tuple[bool, Any]] = {  # whether it is asked of the model's own head, and what is shown
    "accuracy after `inner_steps`, own head, %": (True, lambda m: _tested(m, "zeroing_off")),
    "accuracy after `inner_steps`, head zeroed, %": (False, lambda m: _tested(m, "zeroing_on")),
    "wrong signs of c among pairs of different classes, own head, %": (
        True,
        lambda m: _percent(m["coefficients"]["this_head"]["wrong_among_other"]),
    ),
    "norm of the interference over that of the contrastive term": (
        True,
        lambda m: f"{m['probes']['interference_norm'] / m['probes']['contrastive_norm']:.2f}",
    ),
    "wrong signs of c from a zeroed head after two steps, summed, %": (False, _wrong_after_two_steps),
    "cosine of query and support, same class": (False, lambda m: _fraction(m["similarity"]["same_class"])),
    "the same, other class": (False, lambda m: _fraction(m["similarity"]["other_class"])),
    "gradient's difference from that with a frozen encoder, two steps, first order, own head": (
        True,
        lambda m: _fraction(m["frozen_encoder"]["this_head"]["2"]["fomaml"]),
    ),
    "the same, head zeroed": (False, lambda m: _fraction(m["frozen_encoder"]["zeroed_head"]["2"]["fomaml"])),
    "the same, head zeroed, second order": (
        False,
        lambda m: _fraction(m["frozen_encoder"]["zeroed_head"]["2"]["somaml"]),
    ),
    "best less worst order of the labels, own head, mean, points": (
        True,
        lambda m: _percent(m["label_orders"]["this_head"]["spread"]),
    ),
    "support's motion over the queries', head zeroed, first order": (
        False,
        lambda m: f"{(of := m['motion']['zeroed_head']['fomaml'])['support'] / of['query']:.2f}",
    ),
    "the same, second order": (
        False,
        lambda m: f"{(of := m['motion']['zeroed_head']['somaml'])['support'] / of['query']:.2f}",
    ),
    "what the head's step on a task gives there, points": (
        False,
        lambda m: f"{100 * m['cross_task']['own_task']['gain']:+.1f}",
    ),
    "what it gives on another task, points": (False, lambda m: f"{100 * m['cross_task']['next_task']['gain']:+.1f}"),
}


def initial_terms() -> str:
    """What the two terms of the queries' gradient are before training, by inner steps and eta, ± 95% over seeds."""
    cells: dict[int, dict[float, list[dict[str, Any]]]] = {}
    for row in measured_rows("terms"):
        cells.setdefault(row["inner_steps"], {}).setdefault(row["inner_lr"], []).append(row)
    names = {
        "interference_over_contrastive": ("norm of the interference over that of the contrastive term", 1, 2),
        "wrong_among_other": ("wrong signs of c among pairs of different classes, %", 100, 1),
    }
    rows = []
    for name, (words, times, digits) in names.items():
        for steps, by_eta in sorted(cells.items()):
            of_seeds = [np.array([times * row[name] for row in by_eta[eta]]) for eta in sorted(by_eta)]
            numbers = map(mean_and_ci95, of_seeds)
            rows.append([words, str(steps), *(f"{mean:.{digits}f} ± {ci95:.{digits}f}" for mean, ci95 in numbers)])
    etas = sorted({eta for by_eta in cells.values() for eta in by_eta})
    return markdown(["before training", "inner steps", *(f"eta {eta:g}" for eta in etas)], rows)


def motivating_example() -> str:
    """Means of the histograms of inner products, and validation accuracy."""
    (run,) = kept("inner_products").values()
    low, high = run["between"]
    updates = run["updates"][:2] + run["updates"][2::2]
    accuracy = {
        row.iteration: row.accuracy
        for row in collect.rows("motivating_example", split="val", mode="zeroing_off", step=1)
        if row.ci95 is None
    }
    rows = []
    for name, words in (("same_class", "mean within a class"), ("other_class", "mean across")):
        histograms = np.array(run[name], dtype=float)
        edges = np.linspace(low, high, histograms.shape[1] + 1)
        means = histograms @ ((edges[1:] + edges[:-1]) / 2) / histograms.sum(1)
        rows.append([words, *(_fraction(means[run["updates"].index(update)]) for update in updates)])
    rows.append(["validation accuracy", *(_fraction(accuracy[u], 3) if u in accuracy else "" for u in updates)])
    return markdown(["outer updates", *map(str, updates)], rows)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("python docs/results/theory.py FOLDER...")
    keep([Path(word) for word in sys.argv[1:]])
