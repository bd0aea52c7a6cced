"""What a notebook calls: fewshot.train, fewshot.test, and a Run, which is the folder that they leave."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import DictConfig

from fewshot.config.python_call import as_error, call_hydra, logging_to, process_kept, words_of
from fewshot.errors import UserError
from fewshot.files import override, user_path
from fewshot.results import record_files
from fewshot.test import words_of_train

if TYPE_CHECKING:
    from fewshot.predict.pretrained import Pretrained


@dataclass(frozen=True)
class Run(os.PathLike[str]):
    """A finished run, by its folder. It stands for that folder wherever a run or a model is asked for."""

    folder: Path

    def __init__(self, folder: "str | os.PathLike[str]") -> None:
        object.__setattr__(self, "folder", Path(folder))

    def __fspath__(self) -> str:
        return str(self.folder)

    __str__ = __fspath__

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    def _repr_png_(self) -> bytes | None:
        """The picture that a notebook shows: accuracy over inner steps."""
        path = self.figures.get("accuracy_over_steps") or self.figures.get("across")
        return path.read_bytes() if path else None

    @property
    def results(self) -> dict[str, Any]:
        """results.json: `results["test"]["zeroing_off"]["accuracy"]` is that of the test after inner step 0, 1, .."""
        return record_files.read(self.folder, of_run=False)

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """metrics.csv by its columns, one number for each logged iteration; NaN: that one was not logged then."""
        if not (path := self.folder / "metrics.csv").exists():
            return {}  # of a test
        curves = {name: dict(curve) for name, curve in record_files.read_metrics(path).items()}
        iterations = sorted({iteration for curve in curves.values() for iteration in curve})
        columns = {name: [curve.get(n, np.nan) for n in iterations] for name, curve in curves.items()}
        return {name: np.array(column) for name, column in ({"iteration": iterations} | columns).items()}

    @property
    def figures(self) -> dict[str, Path]:
        """The pictures in figures/ by their names without .png."""
        return {path.stem: path for path in sorted((self.folder / "figures").glob("*.png"))}

    def model(self, *, trust: bool = False) -> "Pretrained":
        """The best model of the run, as fewshot.load gives it."""
        from fewshot.predict.pretrained import load

        return load(self.folder, trust=trust)

    def evidence(self, *, config_dir: "str | os.PathLike[str] | None" = None, **knobs: Any) -> Path:
        """Measures whether the theory holds on the best model. Returns the page, RUN/evidence/report.html.

        config_dir, knobs: as in fewshot.train; the knobs are those of `python -m fewshot.evidence`, as test_tasks.
        """
        from fewshot.evidence.__main__ import main

        _call(main, [override("checkpoint", self.folder), *words_of(knobs)], log=False, config_dir=config_dir)
        return self.folder / "evidence" / "report.html"


def train(
    *,
    folder: "str | os.PathLike[str] | None" = None,
    config_dir: "str | os.PathLike[str] | None" = None,
    **knobs: Any,
) -> Run:
    """Trains, validates and tests, as `python train.py` does: fewshot.train(algo="zero", dataset="omniglot", seed=1)

    It runs in this process and prints what the command prints. Random states, threads, logging, signal handlers and
    Hydra are afterwards as they were before. Ctrl-C, or a notebook's stop button, finishes the outer update and writes
    last.ckpt; then train(checkpoint=FOLDER) goes on.

    Args:
        folder: what is hydra.run.dir to the command; None: a new one in outputs/, named after the time.
        config_dir: what is --config-dir to the command: a folder with YAML files of your own.
        knobs: those of train.py with their names and values (`python train.py --help`). A dot in a name is written as
            two underscores, dataset__root="photos"; None is null, and a list or dict is one value. zeroing=True is
            +zeroing=true; another knob that needs a plus is written with it, **{"+trainer.max_time": "00:01:00:00"}.

    Raises:
        fewshot.UserError: a knob, its value and what would work, in the line that the command prints; nothing is left.
    """
    from fewshot.train import main

    return Run(_call(main, words_of(knobs), folder, config_dir=config_dir))


def test(
    run: "Run | str | os.PathLike[str]",
    *,
    folder: "str | os.PathLike[str] | None" = None,
    config_dir: "str | os.PathLike[str] | None" = None,
    **knobs: Any,
) -> Run:
    """Tests a trained model in a new folder, as `fewshot test` does: fewshot.test(run, test_tasks=2000)

    Args:
        run: what train returned, the folder of a run, or one checkpoint, RUN/checkpoints/last.ckpt.
        folder, config_dir, knobs: as in train. Left out, a knob is as in training. With datasets=["omniglot",
            "folder:birds"] it is tested on all of these, and ways and shots may be lists. Then run may also be an
            exported model, or the name of one that comes with this program, and what is returned holds a folder for
            each setting, named as "omniglot-5w1s"; across.csv has them all. trust is then as in fewshot.load.
    """
    if "datasets" in knobs:
        if config_dir is not None:
            raise UserError(f"config_dir={config_dir}: datasets= takes those that come with this program; leave it out")
        return _test_across(run, folder, **knobs)
    from fewshot.train import main

    words = words_of_train([override("checkpoint", os.fspath(run)), *words_of(knobs)])
    return Run(_call(main, words, folder, config_dir=config_dir))


def _test_across(
    run: str | os.PathLike[str],
    folder: Any,
    datasets: Any,
    ways: Any = None,
    shots: Any = None,
    trust: bool = False,
    **knobs: Any,
) -> Run:
    from fewshot.across.__main__ import run as across
    from fewshot.training.runtime import torch_kept

    names = datasets if isinstance(datasets, str) else ",".join(map(str, datasets))
    with process_kept(), as_error(), logging_to(None), torch_kept():
        place = None if folder is None else user_path("folder", os.fspath(folder))
        model = os.fspath(run)
        return Run(across(model, names, _listed(ways), _listed(shots), words_of(knobs), place, trust))


def _listed(numbers: Any) -> Any:
    """Each once, as plain numbers; None: as in training."""
    if numbers is None:
        return None
    listed: list[Any] = [numbers] if isinstance(numbers, int | float | str | np.generic) else list(numbers)
    plain: list[Any] = [number.item() if isinstance(number, np.generic) else number for number in listed]
    return list(dict.fromkeys(plain))


def _call(
    command: Any,
    words: list[str],
    folder: "str | os.PathLike[str] | None" = None,
    log: bool = True,
    config_dir: "str | os.PathLike[str] | None" = None,
) -> Path:
    """Does in this process what a command of hydra_command's does. log: whether it writes train.log."""
    if folder is not None:
        words = [*words, override("hydra.run.dir", str(user_path("folder", os.fspath(folder))))]
    return call_hydra(partial(_leaving_torch_as_it_was, command.__wrapped__), words, log, config_dir)


def _leaving_torch_as_it_was(task: Any, cfg: DictConfig) -> Any:
    from fewshot.training.runtime import torch_kept

    with torch_kept():
        return task(cfg)
