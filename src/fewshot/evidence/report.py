"""Every claim measured, drawn and judged: evidence.json, pictures, and report.html to be read from top to bottom."""

import json
import math
import re
from base64 import b64encode
from pathlib import Path
from types import ModuleType
from typing import Any

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.figure import Figure
from mdit_py_plugins.dollarmath import dollarmath_plugin

from fewshot.evidence import claims, page
from fewshot.evidence.model import Model
from fewshot.files import write_file
from fewshot.inner_loop import InnerLoop
from fewshot.results.figures import png
from fewshot.results.page import pages
from fewshot.results.record_files import title
from fewshot.theory.probes import probes

HERE = Path(__file__).parent
# In a wheel it lies here, in a checkout where people look for it.
METHOD = next(path for path in (HERE / "method.md", HERE.parents[2] / "docs" / "method.md") if path.is_file())

NORMS = {
    "batch": ("BatchNorm", "statistics of the images at hand: of a task’s support images, or of its queries"),
    "group": ("GroupNorm", "statistics of every image alone"),
    "task": ("TaskNorm", "statistics of a task’s support images, blended with those of every image alone"),
}


def measure(model: Model) -> page.Evidence:
    """What all claims measure, and what several of them read."""
    evidence = {"same_for_all": model.same_for_all, "probes": probes(model.network, [model.tasks], **model.knobs)}
    for claim in claims.CLAIMS:
        evidence |= claim.measure(model)
    return evidence


def write(folder: Path, evidence: page.Evidence, shown: page.Shown) -> None:
    """evidence.json, the pictures, and the page that shows both."""
    evidence = finite(evidence)
    pictures = {name: png(figure) for name, figure in draw(evidence, shown).items()}
    files = {
        "evidence.json": json.dumps(evidence, indent=2, allow_nan=False),
        **{f"{name}.png": picture for name, picture in pictures.items()},
        "report.html": render(evidence, pictures),
    }
    for name, content in files.items():
        write_file(folder / name, content)


def draw(evidence: page.Evidence, shown: page.Shown) -> dict[str, Figure]:
    sections = [(claim, claim.section(evidence)) for claim in claims.CLAIMS]
    return {part.picture.name: claim.draw(evidence, shown) for claim, part in sections if part.picture}


def finite(content: Any) -> Any:
    """JSON has no nan and no infinity; they become null."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def render(evidence: page.Evidence, pictures: dict[str, bytes]) -> str:
    """pictures: PNGs by name. Whatever text is in `evidence` is shown as text; the page needs no network, no script."""
    templates, trained = pages(HERE), evidence["model"]["trained_with"]
    templates.filters["pieces"] = _pieces
    parts = [(anchor(claim), claim.section(evidence), claim.verdict(evidence)) for claim in claims.CLAIMS]
    summary = [page.Statement(section.claim, verdicts, anchor=place) for place, section, verdicts in parts]
    return templates.get_template("report.html.jinja").render(
        subtitle=_subtitle(evidence),
        trained=evidence["model"]["iteration"] != 0,
        head_is_zero=page.head_is_zero(evidence),
        own_outer_gradient=InnerLoop.of(trained).named() if trained["algo"].get("_target_") else "",
        summary=page.Table(("claim", "verdict"), summary, "statements"),
        parts=parts,
        pictures={name: b64encode(png).decode() for name, png in pictures.items()},
        measurement=_measurement(evidence),
        method=_method(METHOD.read_text(encoding="utf-8")),
    )


def anchor(claim: ModuleType) -> str:
    return claim.__name__.rpartition(".")[2].replace("_", "-")


def _pieces(plain: str) -> list[tuple[str, str, str]]:
    """(text, index, number): a piece ends with an index, as in x_{2}, a section's number, as in §2.6, or neither."""
    words = [word or "" for word in re.split(r"_\{(.+?)\}|§(\d(?:\.\d+)?)", plain)]
    return list(zip(words[::3], [*words[1::3], ""], [*words[2::3], ""], strict=True))


def _method(markdown: str) -> list[tuple[str, str, Markup]]:
    """(number, heading, HTML): "2.6" or empty, and the text with its formulas as MathML, which needs no script."""
    _, *pieces = re.split(r"^#+ ((\d(?:\.\d+)?)?.+)$", markdown, flags=re.MULTILINE)
    headings, numbers, texts, to_html = pieces[::3], pieces[1::3], pieces[2::3], _to_html()
    sections = zip(numbers, headings, texts, strict=True)
    return [(number or "", heading, Markup(to_html.render(text))) for number, heading, text in sections]


def _to_html() -> MarkdownIt:
    def mathml(formula: str, options: dict[str, Any]) -> str:
        return convert(formula, display="block" if options["display_mode"] else "inline")

    return MarkdownIt("commonmark", {"html": False}).enable("table").use(dollarmath_plugin, renderer=mathml)


def _subtitle(evidence: page.Evidence) -> str:
    here, model = evidence["config"]["dataset"]["name"], evidence["model"]
    measured = f", measured on {here}" if here != model["trained_with"]["dataset"]["name"] else ""
    return f"{title(model['trained_with'])}, after {page.updates(evidence)}{measured}"


def _measurement(evidence: page.Evidence) -> page.Table:
    """How the numbers were measured."""
    config, model, tasks = evidence["config"], evidence["model"], evidence["tasks"]
    trained = model["trained_with"]
    norm, statistics = NORMS[config["model"].get("norm", "batch")]
    adapts = {"all": "all parameters", "head": "the head alone"}[config["algo"]["adapted"]]
    rows = {
        "Checkpoint": "/".join(Path(model["checkpoint"]).parts[-3:]),
        "Model": f"{title(trained)}, {trained['model']['name']}, {page.updates(evidence)}, seed {trained['seed']}",
        "Test tasks": f"{config['dataset']['name']}, {config['ways']}-way {config['shots']}-shot, "
        f"{config['queries']} queries per class; the same in every run; {evidence['test']['tasks']} for accuracy, the "
        f"first {tasks['features']} for features and predictions, the first {tasks['gradients']} for the identities",
        "Inner loop": f"η = {config['inner_lr']}; {page.counted(config['inner_steps'])}, {config['test_steps']} "
        f"at test; adapts {adapts} (trained with η = {trained['inner_lr']}, "
        f"{page.counted(trained['inner_steps'])}, {trained['shots']}-shot)",
        "Arithmetic": f"accuracy in {config['trainer']['precision']}, all else in float64",
        norm: statistics,
        "Versions": ", ".join(f"{name} {version}" for name, version in evidence["versions"].items()),
    }
    return page.Table((), list(rows.items()), "plain")
