"""report.html: one file that a person reads from top to bottom; it needs no network and no script."""

import re
from base64 import b64encode
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from fewshot.evidence.sections import Section, Statement, Statements, Table, counted_steps, head_is_zero, is_trained
from fewshot.evidence.sections import sections as sections_of
from fewshot.results.record_files import title

HERE = Path(__file__).parent
# In a wheel it lies here, in a checkout where people look for it.
METHOD = next(path for path in (HERE / "method.md", HERE.parents[2] / "docs" / "method.md") if path.is_file())


def page(found: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """found: evidence.json; pictures: PNGs by name. Whatever text is in them is shown as text."""
    templates = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters["text"] = _text
    parts = sections_of(found)
    return templates.get_template("report.html.jinja").render(
        subtitle=_subtitle(found),
        trained=is_trained(found),
        head_is_zero=head_is_zero(found),
        summary=_summary(parts),
        sections=parts,
        pictures={name: b64encode(png).decode() for name, png in pictures.items()},
        how=_how(found),
        method=_method(METHOD.read_text(encoding="utf-8")),
    )


def _text(plain: str) -> Markup:
    """HTML of a plain text: x_{i} is an index, §2.6 a link to the method."""
    html = re.sub(r"_\{(.+?)\}", r"<sub>\1</sub>", str(escape(plain)))
    return Markup(re.sub(r"§(\d(?:\.\d)?)", r'<a href="#method-\1">\1</a>', html))


class _Chapter(NamedTuple):
    number: str  # "2.6"; empty: of the title
    heading: str
    text: str


def _method(markdown: str) -> list[_Chapter]:
    """The method by its headings, each with the text below it as it is written: formulas in plain characters."""
    _, *pieces = re.split(r"^#+ (.+)$", markdown, flags=re.MULTILINE)
    return [
        _Chapter(number[1] if (number := re.match(r"(\d(?:\.\d)?)", heading)) else "", heading, text.strip("\n"))
        for heading, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _subtitle(found: dict[str, Any]) -> str:
    here, trained = found["config"]["dataset"]["name"], found["model"]["trained_with"]
    measured = f", measured on {here}" if here != trained["dataset"]["name"] else ""
    return f"{title(trained)}, after {found['model']['iteration']} outer updates{measured}"


def _summary(parts: list[Section]) -> Statements:
    rows = [Statement(part.claim, part.verdicts, anchor=part.anchor) for part in parts]
    return Statements(("claim", "verdict"), rows)


def _how(found: dict[str, Any]) -> Table:
    """How it was measured."""
    config, model, tasks = found["config"], found["model"], found["tasks"]
    trained = model["trained_with"]
    adapts = {"all": "all parameters", "head": "the head alone"}[config["algo"]["adapted"]]
    rows = {
        "Checkpoint": "/".join(Path(model["checkpoint"]).parts[-3:]),
        "Model": f"{title(trained)}, {trained['model']['name']}, {model['iteration']} outer updates, "
        f"seed {trained['seed']}",
        "Test tasks": f"{config['dataset']['name']}, {config['ways']}-way {config['shots']}-shot, "
        f"{config['queries']} queries per class; the same in every run; {found['test']['tasks']} for accuracy, the "
        f"first {tasks['features']} for features and predictions, the first {tasks['gradients']} for the identities",
        "Inner loop": f"η = {config['inner_lr']}; {counted_steps(config['inner_steps'])}, {config['test_steps']} at "
        f"test; adapts {adapts} (trained with η = {trained['inner_lr']}, {counted_steps(trained['inner_steps'])}, "
        f"{trained['shots']}-shot)",
        "Arithmetic": f"accuracy in {config['trainer']['precision']}, all else in float64",
        "BatchNorm": "statistics of the images at hand: of a task’s support images, or of its queries",
        "Versions": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
    }
    return Table((), list(rows.items()), "plain")
