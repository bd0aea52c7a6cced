"""Many runs -> one table and one figure: python -m fewshot.sweep FOLDER..."""

import logging
import os
from pathlib import Path

from fewshot.config import stored
from fewshot.config.command import Command, Parameter, one_line_errors, one_of, read
from fewshot.files import user_path
from fewshot.sweep.tables import summarise

COMMAND = Command(
    "sweep",
    "makes one table and one figure of many runs.",
    {
        "FOLDER...": Parameter("The folders of sweeps, or of runs."),
        "into=FOLDER": Parameter(
            "The folder to write into; left out: FOLDER, or the current folder if there are several.", user_path
        ),
        "panels=KNOBS": Parameter(
            "Knobs, with commas between them; panels.png has axes of their own for each of their values.",
            lambda key, text: text.split(","),
        ),
        "figures.format=KIND": Parameter(
            "png, or pdf: each figure also as a PDF of vectors; left out: png.", one_of("png", "pdf")
        ),
    },
)


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with one_line_errors():
        words = read(COMMAND, arguments)
        folders = [user_path("FOLDER", word) for word in words.plain]
        into = words.values.get("into", folders[0] if len(folders) == 1 else Path.cwd())
        panels, kind = words.values.get("panels", _panels_of(folders[0])), words.values.get("figures.format", "png")
        summarise(folders, into, panels, kind)


def _panels_of(folder: Path) -> list[str]:
    """The panels that the sweep in the folder was asked for."""
    path = folder / "multirun.yaml"
    if not os.path.exists(path):  # nor one that may not be read, of which the runs' reader tells
        return []
    asked = stored.read_yaml(path)
    for key in ("hydra", "callbacks", "summary", "panels"):
        asked = asked.get(key) if isinstance(asked, dict) else None
    stored.check(f"{path}: hydra.callbacks.summary.panels", asked or [], stored.many(stored.NAME))
    return asked or []


if __name__ == "__main__":
    main()
