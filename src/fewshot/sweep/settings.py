"""The runs of a sweep, read from their folders, and the settings that they are runs of."""

import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from fewshot.config import stored
from fewshot.config.kinds import Flag
from fewshot.config.stored import compared, to_today
from fewshot.config.tree import MODES, leaves, statistics
from fewshot.config.tree import settings as resolved
from fewshot.errors import UserError, one_line, printable, shown
from fewshot.inner_loop import ORDERS, InnerLoop
from fewshot.results.record_files import over, read, read_metrics

if TYPE_CHECKING:  # every run imports this file, and its first line does not wait for NumPy
    import numpy as np

log = logging.getLogger(__name__)

# No part of a setting: the seed, where and on what a run was computed, its memory, and knobs that repeat others.
ELSEWHERE = (
    *("seed", "fit", "logger", "figures"),
    *(f"dataset.{knob}" for knob in ("mini_root", "cache", "archive", "source", "device", "origin", "trust")),
    *("model.network", "callbacks.zero_head", "augment"),  # of augment, fingerprint keeps a short form
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),
    *("trainer.use_distributed_sampler", "trainer.max_steps", "trainer.log_every_n_steps"),
    *("trainer.max_time", "trainer.profiler", "recompute_steps", "save_minutes", "calibration"),
)
BEGUN = stored.form({"algo": stored.form({"zeroing": Any}), "fit": Flag})  # .hydra/config.yaml, not resolved yet


class Job(NamedTuple):
    """One run. results: results.json, None while there is none; curves: metrics.csv; error: the end of error.txt."""

    folder: Path
    config: dict[str, Any]  # {} where it cannot be read
    results: dict[str, Any] | None
    curves: dict[str, list[tuple[int, float]]]
    error: str | None

    @property
    def state(self) -> str:
        return "failed" if self.error else "unfinished"


def read_jobs(folders: list[Path]) -> list[Job]:
    """The runs in the folders of sweeps or of single runs; of two with one setting and seed, the first that finished.

    Raises:
        UserError: there is no such folder, it cannot be read, or there is no run in it.
    """
    jobs: dict[tuple[str, str], Job] = {}
    for folder in folders:
        try:
            inside = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())] if folder.is_dir() else []
            runs = [job for path in inside if (job := read_job(path))]
        except OSError as error:  # a folder of somebody else, for example
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from None
        if not runs:
            raise UserError(f"{folder}: no run in it; give the folder of a sweep (hydra.sweep.dir) or of a run")
        for job in runs:
            # A run that cannot be read is like no other.
            key = (fingerprint(job.config), shown(job.config["seed"])) if job.config else (str(job.folder), "")
            first = jobs.setdefault(key, job)
            if job.results and not first.results:
                jobs[key] = job
            elif first is not job and first.results and job.results:
                line = f"{job.folder}: left out, the same setting and seed as {first.folder}"
                log.warning(printable(line))
    return list(jobs.values())


def read_job(folder: Path) -> Job | None:
    """The run in a folder; None if there has been none."""
    paths = [folder / name for name in ("results.json", ".hydra/config.yaml", "metrics.csv", "error.txt")]
    result_file, begun, metrics, failed = (path if path.exists() else None for path in paths)
    error = _last_line(failed) if failed else None
    if not (result_file or begun):
        return Job(folder, {}, None, {}, error) if error else None  # of a cluster's job that never began
    try:
        results = read(folder, of_run=False) if result_file else None
        config = results["config"] if results else _begun(folder / ".hydra" / "config.yaml")
        InnerLoop.of(config)  # refuses an algorithm that has no name
        curves = read_metrics(metrics) if metrics else {}
        results = results if results and over(results) else None
    except UserError as problem:
        return Job(folder, {}, None, {}, error or f"cannot be read as a run ({problem})")
    return Job(folder, config, results, curves, error)


def _last_line(path: Path) -> str:
    """The last line of error.txt, or why it cannot be read."""
    try:
        lines = [printable(line) for line in stored.read_text(path, 2**24).split("\n") if line.strip()]
    except UserError as problem:
        return str(problem)
    return lines[-1] if lines else "an empty error.txt"


def _begun(path: Path) -> dict[str, Any]:
    """The settings that Hydra wrote when a run began."""
    config = stored.read_yaml(path)
    stored.check(str(path), config, BEGUN)
    stored.check_interpolations(str(path), config)
    try:
        config = to_today(resolved(DictConfig(config)))
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be resolved ({one_line(error)[:200]})") from None
    stored.check_config(str(path), config)
    return config


def fingerprint(config: dict[str, Any]) -> str:
    """What makes runs one setting, as text: two runs that differ in their seed alone have the same fingerprint."""
    left_out = [*ELSEWHERE]
    if config.get("fit", True) or "trained" in config:
        left_out.append("checkpoint")  # the file from which a run went on; a test says by `trained` what was tested
    if "fractions" not in config["dataset"]:
        left_out.append("dataset.root")  # only the place of a known dataset; any other dataset is what lies there
    kept = {}
    for key, value in leaves(config):
        repeats = key.startswith("callbacks.") and key.split(".")[-1] in config  # a top-level knob
        elsewhere = any(key == part or key.startswith(f"{part}.") for part in left_out)
        if value is None or repeats or elsewhere or not compared(key, value):
            continue
        if key == "evaluation.statistics":
            (value, *_) = statistics(config)  # the others change no number that is compared
        whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
        kept[key] = int(value) if whole else value  # 1.0 is 1
    if transforms := config.get("augment"):
        exact = hashlib.sha256(json.dumps(transforms, sort_keys=True).encode()).hexdigest()
        kept["augment"] = f"{'+'.join(transforms)} ({exact[:4]})"
    return json.dumps(kept, sort_keys=True)


def tested_model(trained: dict[str, Any], config: dict[str, Any], file: str) -> dict[str, Any]:
    """What a test records as `trained`, so that its setting is also that of the training, and not the run's path.

    trained: the configuration of the training; config: that of the test; file: the name of the model's file.
    """
    of_test = ("test_tasks", "test_steps", "evaluation")
    trained = {key: value for key, value in trained.items() if key not in of_test}
    was, now = (json.loads(fingerprint(one)) for one in (trained, config))
    always = ("dataset.name", "ways", "shots")
    return {"file": file} | {key: value for key, value in was.items() if key in always or value != now.get(key)}


NAMED = ("algo._target_", *(f"algo.{field.name}" for field in fields(InnerLoop)))  # in an algorithm's name
HEADS = {  # (zeroing, init_scale): the poster's three
    (False, 1): "random head",
    (False, 0): "zero at the start",
    (True, 1): "zeroed every update",
}


class Setting(NamedTuple):
    """Runs that differ in their seed alone. knobs: those in which the settings of a sweep differ, and their values."""

    knobs: dict[str, Any]
    jobs: list[Job]

    def label(self, without: Iterable[str] = ()) -> str:
        """E.g. "SOMAML, zeroing, inner_steps=3": the algorithm, where settings differ in it, and the knobs that differ.

        without: knobs that are said elsewhere.
        """
        knobs = {knob: value for knob, value in self.knobs.items() if knob not in without}
        parts = _knobs_as_words(knobs)
        if self.loop.head != "learned":  # its name says where the head begins
            said = ("random head", "no zeroing") if self.loop.makes_head else ("random head",)
            parts = [part for part in parts if part not in said]
        if any(knob.startswith("algo.") and knob != "algo.zeroing" for knob in knobs):
            maml = "MAML" if "algo.first_order" in without else ""
            parts = [self.loop.named(maml, order="algo.first_order" in knobs), *parts]
        return printable(", ".join(parts) or self.loop.name)

    @property
    def loop(self) -> InnerLoop:
        return InnerLoop.of(self.config)

    def value(self, knob: str) -> Any:
        return dict(leaves(self.config)).get(knob)

    @property
    def config(self) -> dict[str, Any]:
        return self.jobs[0].config

    def accuracies(self, mode: str) -> "np.ndarray":
        """Accuracies of the final test, (finished jobs that were tested in this mode, test_steps + 1).

        Raises:
            UserError: their results.json have not as many each.
        """
        import numpy as np

        tests = [job.results["test"] for job in self.jobs if job.results]
        curves = [test[mode]["accuracy"] for test in tests if mode in test]
        if len(lengths := {*map(len, curves)}) > 1:
            places, numbers = ", ".join(str(job.folder) for job in self.jobs), " or ".join(map(str, sorted(lengths)))
            raise UserError(f"{places}: are of one setting, but their results.json have {numbers} test accuracies")
        return np.array(curves)

    def curve(self, mode: str) -> "tuple[str, np.ndarray, np.ndarray]":
        """Accuracy after inner_steps over outer updates: the name of its split, (I,) updates, (jobs, I) accuracies.

        The test curve where there is one, else validation. Only updates that all finished jobs have (all jobs, if none
        has finished); otherwise the curve's end would average over a few jobs.
        """
        import numpy as np

        split, curves = self.curves(mode)
        common = sorted(set.intersection(*map(set, curves)))
        return split, np.array(common), np.array([[curve[update] for update in common] for curve in curves])

    def curves(self, mode: str) -> tuple[str, list[dict[int, float]]]:
        """The name of the split, and for each job {outer update: accuracy after inner_steps}, as far as it went."""
        step = f"{MODES[mode]}/query_accuracy/step_{self.config['inner_steps']}"
        jobs = [job for job in self.jobs if job.results] or self.jobs
        split = "test" if all(f"test{step}" in job.curves for job in jobs) else "val"
        return split, [dict(job.curves.get(f"{split}{step}", ())) for job in jobs]


def panel_title(knobs: dict[str, Any], maml: bool) -> str:
    """What all settings in a panel share; maml: they are FOMAML or SOMAML, with or without zeroing."""
    parts = []
    for knob, value in knobs.items():
        if knob == "algo.first_order":
            parts.append(("FOMAML" if value else "SOMAML") if maml else ORDERS[value])
        elif knob in NAMED and knob != "algo.zeroing":
            parts.append(f"{knob}={shown(value)}")
    return printable(", ".join([*parts, *_knobs_as_words(knobs)]))


def _knobs_as_words(knobs: dict[str, Any]) -> list[str]:
    """What becomes of the head, then the other knobs as they are set; those in NAMED are in the algorithm's name."""
    others = {knob: value for knob, value in knobs.items() if knob not in NAMED}
    others = {knob: value for knob, value in others.items() if value is not None or not knob.startswith("algo.")}
    parts = []
    head_of: Any = (knobs.get("algo.zeroing"), others.get("init_scale"))
    if head := HEADS.get(head_of):
        parts = [head]
        del others["init_scale"]
    elif "algo.zeroing" in knobs:
        parts = ["zeroing" if knobs["algo.zeroing"] else "no zeroing"]
    return [*parts, *(f"{knob}={shown(value)}" for knob, value in others.items())]


# Knobs that name a setting only where its other knobs do not tell it from the others; those in TELLING always may.
FOLLOWING = ("test_steps", "dataset", "model", "trained")
TELLING = ("dataset.name", "model.name", "trained.dataset.name", "trained.file")


def group(jobs: list[Job]) -> list[Setting]:
    """Jobs by their resolved settings; each setting by the knobs that tell it from the others."""
    together: dict[str, list[Job]] = {}
    for job in jobs:
        together.setdefault(fingerprint(job.config), []).append(job)
    configs = [json.loads(text) for text in together]

    def different(knobs: list[str]) -> int:
        return len({tuple(shown(config.get(knob)) for knob in knobs) for config in configs})

    varied = [knob for knob in sorted(set().union(*configs)) if different([knob]) > 1]
    exported = [config for config in configs if "trainer.precision" not in config]  # which lack much of the training
    for knob in [*varied]:
        others = [other for other in varied if other != knob]
        follows = knob.split(".")[0] in FOLLOWING or any(knob not in config for config in exported)
        follows = follows and knob not in TELLING
        if follows and different(others) == len(configs):
            varied = others
    settings = [
        Setting({knob: config.get(knob) for knob in varied}, sorted(members, key=lambda job: job.config["seed"]))
        for config, members in zip(configs, together.values(), strict=True)
    ]
    return sorted(settings, key=lambda setting: [_order(*knob) for knob in setting.knobs.items()])


def _order(knob: str, value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    size = float(value) if number else 0.0
    downwards = knob in ("algo.first_order", "init_scale")  # FOMAML before SOMAML, a random head before a zero one
    return number, -size if downwards else size, shown(value)


OVER_SEEDS = (
    "*: after as many inner steps as in training; results.json and summary.csv have all steps.\n"
    "± of an accuracy is the 95% confidence interval over seeds (Student t), as are the bands of the figures.\n"
    "All seeds share the test tasks, so it leaves out what other test tasks would change.\n"
)


def mean_and_ci95(values: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Mean over seeds and half width of its 95% confidence interval (Student t), (n, ...) -> (...); nan for n = 1."""
    import numpy as np

    n = len(values)
    if n < 2:
        return values.mean(axis=0), np.full(values.shape[1:], np.nan)
    from scipy.special import stdtrit  # scipy takes its time to import

    return values.mean(axis=0), stdtrit(n - 1, 0.975) * values.std(axis=0, ddof=1) / n**0.5
