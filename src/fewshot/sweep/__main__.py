"""Many runs -> one table and one figure: python -m fewshot.sweep FOLDER..."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fewshot.config import stored
from fewshot.config.command import Parser, one_line_errors
from fewshot.sweep.tables import summarise

if TYPE_CHECKING:
    pass


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("python -m fewshot.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="of a sweep, or of a run")
    parser.add_argument("--into", type=Path, help="where to write; default: FOLDER, with several the current folder")
    parser.add_argument("--panels", default=None, help="knobs, with commas; panels.png has axes for each value")
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    with one_line_errors():
        asked = parser.parse_args(arguments)
        into = asked.into or (asked.folders[0] if len(asked.folders) == 1 else Path.cwd())
        panels = asked.panels.split(",") if asked.panels is not None else _panels_of(asked.folders[0])
        summarise(asked.folders, into, panels)


def _panels_of(folder: Path) -> list[str]:
    """Those that the sweep in the folder was asked for."""
    path = folder / "multirun.yaml"
    if not path.exists():
        return []
    asked = stored.read_yaml(path)
    for key in ("hydra", "callbacks", "summary", "panels"):
        asked = asked.get(key) if isinstance(asked, dict) else None
    stored.check(f"{path}: hydra.callbacks.summary.panels", asked or [], stored.Each(stored.NAME))
    return asked or []


if __name__ == "__main__":
    main()
