"""The pages that commands write: everything is escaped, and they need neither network nor scripts."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def pages(folder: Path) -> Environment:
    """The templates in a folder, which may include the style.css beside this file."""
    places = FileSystemLoader([folder, Path(__file__).parent])
    return Environment(loader=places, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
