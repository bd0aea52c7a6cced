"""One model on many datasets: fewshot test RUN datasets=omniglot,folder:PATH ways=5,20 shots=1,5"""

import logging
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fewshot.across.settings import places, settings
from fewshot.config.command import Command, Parameter, flag, integer, one_line_errors, read
from fewshot.errors import UserError
from fewshot.files import check_place, claimed, user_path

log = logging.getLogger(__name__)


def numbers(knob: str, text: str, smallest: int) -> list[int]:
    """The numbers in a text as "5,20", each of them once."""
    return list(dict.fromkeys(integer(knob, word, smallest) for word in text.split(",")))


COMMAND = Command(
    "test",
    "with datasets= tests one model on many datasets, with whatever ways and shots.",
    {
        "RUN": Parameter(
            "The folder of a run, whose best model is taken; a checkpoint; the folder of an exported model; the name "
            "of one that comes with this program, such as omniglot-5w1s-zero; or hf://ORG/NAME.",
            None,
        ),
        "datasets=NAME,...": Parameter(
            "The datasets, each NAME or NAME:ROOT with its dataset.root, such as omniglot,cifarfs:FILE,folder:PATH.",
            needed=True,
        ),
        "ways=K,...": Parameter("Classes per task; left out: as in training.", partial(numbers, smallest=2)),
        "shots=N,...": Parameter("Support images per class; left out: as in training.", partial(numbers, smallest=1)),
        "hydra.run.dir=FOLDER": Parameter(
            "The new folder; left out: one in outputs/, named after the time.", user_path
        ),
        "trust=BOOL": Parameter(
            "true: builds a network that the checkpoint names and fewshot.models does not define.", flag
        ),
    },
    knobs=True,
)


def run(
    model: str | Path,
    datasets: str,
    ways: list[int] | None = None,
    shots: list[int] | None = None,
    knobs: Sequence[str] = (),
    folder: Path | None = None,
    trust: bool = False,
) -> Path:
    """Measures, writes and shows; the arguments are those of the command. Returns the folder.

    Raises:
        UserError: the model or a dataset cannot be read, a knob is wrong, or nothing could be measured.
    """
    if folder is not None:
        check_place("hydra.run.dir", folder)
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"hydra.run.dir={folder}: is not empty; name another folder")
    chosen = places(datasets)
    from fewshot.across import measure, report  # torch takes seconds to import
    from fewshot.training.runtime import prepare

    loaded, stored, file = measure.load(model, trust)
    config = loaded.config
    numbers_of = (ways or [config["ways"]], shots or [config["shots"]])
    of_datasets = [settings(place, stored, [*knobs], *numbers_of) for place in chosen]
    names = [first.cfg.dataset.name for first, *_ in of_datasets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"datasets={datasets}: two are called {twice[0]}; give each once, or rename a folder")
    all_settings = [one for own in of_datasets for one in own]
    cfg = all_settings[0].cfg
    prepare(seed=0, threads=cfg.threads, accelerator=cfg.trainer.accelerator, precision="32-true")
    tester = measure.Tester(loaded, stored, file)
    for one in all_settings:  # what cannot be read is said before anything is measured
        tester.images(one)
    folder = claimed(Path(time.strftime("outputs/%Y-%m-%d/%H-%M-%S"))) if folder is None else folder
    rows = []
    for one in all_settings:
        rows.append(row := tester.row(one))
        log.info(report.line(row, config))
        if row.tested:
            report.write_test(folder / row.name, row)
    if not any(row.tested for row in rows):
        raise UserError(f"datasets={datasets}: nothing could be measured; {rows[0].left_out}")
    report.write(folder, rows, config, cfg.figures.format)
    print(report.table(rows, config))
    figures = "figures/across.png" + " and .pdf" * (cfg.figures.format == "pdf")
    print(f"Written to {folder}: across.csv, {figures}, and a folder for each setting, for compare")
    return folder


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with one_line_errors():
        words = sys.argv[1:] if arguments is None else arguments
        model = ""
        if words and "=" not in words[0] and not words[0].startswith("-"):
            model, *words = words
        if config_dir := next((word for word in words if word.startswith("--config-dir")), None):
            own = "one of your own is tested by dataset=NAME dataset.other_split=true"
            raise UserError(f"{config_dir}: datasets= takes those that come with this program; {own}")
        call = read(COMMAND, words)
        if not model:
            raise UserError(f"RUN: is missing; write {COMMAND.call} RUN datasets=..., with a run or a model's name")
        values = {{"hydra.run.dir": "folder"}.get(key, key): value for key, value in call.values.items()}
        run(model, knobs=call.knobs, **values)


if __name__ == "__main__":
    main()
