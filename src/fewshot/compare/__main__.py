"""Runs -> which differences are larger than noise: python -m fewshot.compare RUN RUN..."""

import logging
from pathlib import Path

from fewshot.config.command import Command, Parameter, integer, one_line_errors, one_of, read
from fewshot.config.tree import MODES
from fewshot.errors import UserError, printable
from fewshot.files import check_place, user_path

log = logging.getLogger(__name__)


def _say(left_out: list[str]) -> None:
    for line in left_out:
        log.warning(printable(f"left out: {line}"))


COMMAND = Command(
    "compare",
    "says which differences between runs are larger than noise, on the same test tasks and seeds.",
    {
        "FOLDER...": Parameter(
            "Folders of runs or of sweeps, or patterns; all are compared to the first run's setting."
        ),
        "into=FOLDER": Parameter("The folder to write into; left out: compare/ in the current folder.", user_path),
        "step=N": Parameter(
            "The inner step after which accuracies are compared; left out: each setting's inner_steps.",
            lambda key, text: integer(key, text, 0),
        ),
        "mode=MODE": Parameter(
            "zeroing_off or zeroing_on, whether the test zeroes the head; left out: both.", one_of(*MODES)
        ),
    },
)


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with one_line_errors():
        words = read(COMMAND, arguments)
        into = words.values.get("into", Path.cwd() / "compare")
        check_place("into", into)
        from fewshot.compare import report  # scipy takes its time to import
        from fewshot.sweep import pairs
        from fewshot.sweep.settings import read_jobs

        runs, left_out = pairs.comparable(read_jobs(pairs.folders(words.plain)))
        if not runs:
            raise UserError(printable(f"{words.plain[0]}: nothing to compare; {left_out[0]}"))
        _say(left_out)  # before it may turn out that too few are left
        modes = [words.values["mode"]] if "mode" in words.values else [*MODES]
        rows, without = pairs.rows(runs, modes, words.values.get("step"))
        settings = list({id(row.setting): row.setting for row in rows}.values())
        report.write(into, rows, settings, left_out + without)
        _say(without)
        report.show(rows)
        print("\n".join(report.NOTES))
        print(f"Written to {into}/compare.html, compare.tex, differences.png and .pdf")


if __name__ == "__main__":
    main()
