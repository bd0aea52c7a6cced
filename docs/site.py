"""What mkdocs does not do by itself for the site: pages of other folders, the reference, formulas as MathML.

mkdocs.yml names this file as a hook. Pages are the Markdown files of the repository as they are.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

import fewshot
from fewshot.config import help
from fewshot.config.tree import GROUPS

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md"}  # of the repository: of the site; all else keeps its place, docs/ being the top
OUTSIDE = ("*.md", "LICENSE", "CITATION.cff", "models/**/README.md", "benchmarks/README.md", "benchmarks/*.json")
LINK = re.compile(r"(\]\()(?![a-z]+:|#)([^)\s#]+)")
ALSO_PUBLIC = (
    "fewshot.predict.predictions.predict",
    "fewshot.predict.adapted.adapt",
    "fewshot.predict.adapted.Adapted",
)


def on_files(files: Files, config: Any) -> Files:
    for path in sorted(path for pattern in OUTSIDE for path in ROOT.glob(pattern)):
        source = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place_of(source), abs_src_path=str(path)))
    files.append(File.generated(config, "reference/python.md", content=python_reference()))
    files.append(File.generated(config, "reference/knobs.md", content=knob_reference()))
    return files


def place_of(source: str) -> str:
    """Where a file of the repository is on the site."""
    return PAGES.get(source, source.removeprefix("docs/"))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files of the repository become links between those of the site."""
    generated = page.file.src_uri.startswith("reference/")
    if generated or page.file.abs_src_path is None:
        return markdown
    here = Path(page.file.abs_src_path).relative_to(ROOT).parent.as_posix()
    start = posixpath.dirname(page.file.src_uri)

    def linked(match: re.Match[str]) -> str:
        target = place_of(posixpath.normpath(posixpath.join(here, match[2])))
        return match[1] + posixpath.relpath(target, start or ".")

    return LINK.sub(linked, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """MathML, which browsers show by themselves. A cell as short as 3.6e-14 does not break at its hyphen."""
    html = re.sub(r"<td>(?=[^<]{1,14}</td>)", '<td class="short">', html)
    html = re.sub(r'<span class="arithmatex">\\\((.+?)\\\)</span>', lambda match: _mathml(match[1], "inline"), html)
    block = r'<div class="arithmatex">\s*\\\[(.+?)\\\]\s*</div>'
    return re.sub(block, lambda match: _mathml(match[1], "block"), html, flags=re.DOTALL)


def _mathml(escaped: str, display: str) -> str:
    latex = escaped.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").strip()
    return convert(latex, display=display)


def python_reference() -> str:
    """The public functions and classes; their docstrings are read by mkdocstrings."""
    names = [f"{module}.{name}" for name, module in sorted(fewshot.PUBLIC.items())]
    sections = "\n\n".join(f"::: {name}" for name in (*names, *ALSO_PUBLIC))
    short = f"`import fewshot` has {', '.join(f'`{name}`' for name in sorted(fewshot.PUBLIC))}."
    return f"# Python\n\n{short} `from fewshot.predict import predict, adapt, Adapted` has the rest.\n\n{sections}\n"


def knob_reference() -> str:
    """Every knob of the schema with its sentence in the YAML, as --help has them, and the choices of every group."""
    known = dict(help.knobs())
    top = [key for key in known if "." not in key and key not in GROUPS]
    parts = ["# Knobs", "`KNOB=VALUE` in a call; `python train.py --help` has the same.", _table(top, known)]
    for group in (*GROUPS, "experiment"):
        choices = "".join(f"| `{group}={name}` | {_cell(text)} |\n" for name, text in help.choices(group).items())
        parts += [f"## {group}", f"| choice | |\n| --- | --- |\n{choices}"]
        if own := [key for key in known if key.startswith(f"{group}.")]:
            parts.append(_table(own, known))
    return "\n\n".join(parts) + "\n"


def _table(keys: list[str], known: dict[str, str]) -> str:
    rows = (help.entry(key, known[key]) for key in keys)
    cells = "".join(f"| `{word.replace('|', chr(92) + '|')}` | {_cell(text)} |\n" for word, text in rows if text)
    return f"| knob and default | |\n| --- | --- |\n{cells}"


def _cell(text: str) -> str:
    """As text of a table's cell."""
    return re.sub(r"([\\|$<*])", r"\\\1", text)
