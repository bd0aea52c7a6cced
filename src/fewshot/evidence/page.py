"""report.html: one file that a person reads from top to bottom; it needs no network and no script."""

from base64 import b64encode
from html import escape
from pathlib import Path
from typing import Any

from fewshot.evidence.sections import Picture, Section, Table, how, sections
from fewshot.figures import title

STYLE = Path(__file__).with_name("style.css")


def page(found: dict[str, Any], pictures: dict[str, bytes]) -> str:
    """found: evidence.json; pictures: PNGs by name."""
    here, trained = found["config"]["dataset"]["name"], found["model"]["trained_with"]
    subtitle = f"{title(trained)}, after {found['model']['iteration']} outer updates"
    if here != trained["dataset"]["name"]:
        subtitle += f", measured on {here}"
    parts = sections(found)
    zero = found["memory"]["this_head_before"] is None
    note = "<p>This model’s head is zero: what is said of it and of a zeroed head is said twice of the same.</p>\n"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Evidence: {escape(subtitle)}</title>
<style>
{STYLE.read_text()}</style>
</head>
<body>
<main>
<p class="overline">Evidence</p>
<h1>Is this model a noisy contrastive learner?</h1>
<p class="subtitle">{escape(subtitle)}</p>
<p><i>MAML is a Noisy Contrastive Learner in Classification</i> (Kao, Chiu, Chen; ICLR 2022) says what MAML’s outer loop
does to the features, and what zeroing the head changes. This page puts each of its claims to one trained model: the
claim, a picture, the numbers, and a verdict that is computed from them. Numbers such as 2.6 are sections of
<code>docs/method.md</code>.</p>
{note if zero else ""}{_table(_summary(parts))}
{"".join(_section(part, pictures) for part in parts)}<section id="how">
<h2>How this was measured</h2>
{_table(how(found))}
<p>Every number is in <code>evidence.json</code>, beside this page.</p>
</section>
</main>
</body>
</html>
"""


def _summary(parts: list[Section]) -> Table:
    rows = [
        (f'<a href="#{part.anchor}">{part.claim}</a>', "".join(verdict.html for _, verdict in part.verdicts))
        for part in parts
    ]
    return Table(("claim", "verdict"), rows, "statements")


def _section(part: Section, pictures: dict[str, bytes]) -> str:
    return "\n".join(
        [
            f'<section id="{part.anchor}">',
            f'<p class="overline">{part.overline}</p>',
            f"<h2>{part.claim}</h2>",
            f"<p>{part.lead}</p>",
            *([_figure(part.picture, pictures[part.picture.name])] if part.picture else []),
            *(_table(table) for table in part.tables),
            *([f"<p>{part.note}</p>"] if part.note else []),
            *(f'<div class="conclusion">{about} {verdict.html}</div>' for about, verdict in part.verdicts),
            "</section>\n",
        ]
    )


def _figure(picture: Picture, png: bytes) -> str:
    kind = ' class="small"' if picture.small else ""
    return f"""<figure{kind}>
<div class="scroll"><img alt="{escape(picture.alt)}" src="data:image/png;base64,{b64encode(png).decode()}"></div>
<figcaption>{picture.caption}</figcaption>
</figure>"""


def _table(table: Table) -> str:
    heading = f"<h3>{table.heading}</h3>\n" if table.heading else ""
    head = f"<tr>{''.join(f'<th>{cell}</th>' for cell in table.heads)}</tr>\n" if table.heads else ""
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in table.rows)
    return f'{heading}<div class="scroll"><table class="{table.kind}">\n{head}{body}\n</table></div>'
