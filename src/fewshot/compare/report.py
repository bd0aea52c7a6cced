"""The comparison as a table in the terminal, as a page, as figures and in LaTeX."""

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.table
from rich.text import Text

from fewshot.errors import printable
from fewshot.files import write_file
from fewshot.results.page import pages
from fewshot.results.record_files import title
from fewshot.sweep.pairs import Row
from fewshot.sweep.settings import Setting
from fewshot.sweep.tables import to_accuracy

HEADS = ("setting", "test zeroing", "step", "accuracy", "difference", "± tasks", "± seeds", "± both", "p", "seeds")
NOTES = (
    "Accuracies in %, differences to the first setting in points, on the same test tasks and with the same seeds.",
    "± are half widths of 95% confidence intervals of the difference. Tasks: these models on other tasks of the test "
    "classes. Seeds: other seeds of the training on these tasks (Student t). Both: two crossed random effects; this is "
    "the one to go by. In simulations it covers 93 to 97 of 100 true differences with four to ten seeds, 92 to 97 with "
    "three and 86 to 97 with two. With one seed nothing is known of other seeds, and p is over tasks alone.",
    "p is Holm's, over all rows: below .05 a difference is larger than noise, and stands in bold.",
)


def cells(row: Row) -> list[str]:
    """One for each of HEADS."""
    zeroing = row.mode.removeprefix("zeroing_")
    start = [row.setting.label(), zeroing, str(row.step), f"{100 * row.accuracy:.2f}"]
    if row.difference is None or row.p is None:
        return [*start, "", "", "", "", "", str(len(row.setting.jobs))]
    d = row.difference
    halves = ["–" if np.isnan(half) else f"{100 * half:.2f}" for half in (d.over_tasks, d.over_seeds, d.over_both)]
    p = "< .0001" if row.p < 1e-4 else f"{row.p:.4f}".removeprefix("0")
    return [*start, f"{100 * d.mean:+.2f}".replace("-", "−"), *halves, p, str(d.seeds)]


def calibration(rows: list[Row]) -> tuple[list[str], list[list[str]]] | None:
    """The expected calibration error of each row whose runs have it, means over seeds; None where none has."""
    table = []
    for row in rows:
        modes = [job.results["test"].get(row.mode, {}) for job in row.setting.jobs if job.results]
        measured = [mode["calibration"] for mode in modes if "calibration" in mode]
        if measured and all(row.step < len(one["error"]) for one in measured):
            means = (np.mean([one[name][row.step] for one in measured]) for name in ("confidence", "error"))
            table.append([*cells(row)[:4], *(f"{100 * mean:.2f}" for mean in means), str(len(measured))])
    return ([*HEADS[:4], "confidence", "calibration error", "seeds"], table) if table else None


def show(rows: list[Row]) -> None:
    _print_table(HEADS, [(cells(row), row.larger_than_noise) for row in rows])
    if calibrated := calibration(rows):
        heads, table = calibrated
        heading = "Mean probability of the predicted class and expected calibration error, in %"
        _print_table(heads, [(row, False) for row in table], heading)


def _print_table(heads: Sequence[str], rows: list[tuple[list[str], bool]], heading: str | None = None) -> None:
    """rows: the cells of each, and whether they are bold."""
    table = rich.table.Table(title=heading)
    for head in heads:
        table.add_column(head, justify="left" if head == "setting" else "right")
    for row, bold in rows:
        table.add_row(*map(Text, row), style="bold" if bold else None)
    rich.console.Console(width=120).print(table)


def latex(rows: list[Row], heading: str) -> str:
    """A table for booktabs, with what a paper needs of it."""
    lines = [
        f"% {heading}. Needs \\usepackage{{booktabs}}. Differences to the first row in points; $\\pm$: 95\\%",
        "% confidence interval over tasks and seeds (over tasks where there is one seed); bold: p < .05 after Holm's",
        "% correction.",
        "\\begin{tabular}{llrrr}",
        "\\toprule",
        "Setting & Test zeroing & Step & Accuracy (\\%) & Difference \\\\",
        "\\midrule",
    ]
    for row in rows:
        label, zeroing, step, accuracy, *_ = cells(row)
        difference = "--"
        if d := row.difference:
            difference = f"${100 * d.mean:+.2f} \\pm {100 * d.half_width:.2f}$"
            difference = f"$\\mathbf{{{difference.strip('$')}}}$" if row.larger_than_noise else difference
        lines.append(f"{_tex(label)} & {zeroing} & {step} & {accuracy} & {difference} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _tex(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in printable(text))


def write(folder: Path, rows: list[Row], settings: list[Setting], left_out: list[str]) -> None:
    """compare.html, compare.tex, differences.png and .pdf and, where runs have curves, curves.png and .pdf."""
    from fewshot.compare import figures  # matplotlib takes seconds to import
    from fewshot.results.figures import pdf, png

    heading = title(rows[0].setting.config, algorithm=False)
    pictures = {"differences": figures.differences(rows, heading)}
    if all(any(job.curves for job in setting.jobs) for setting in settings):
        pictures["curves"] = figures.curves(settings, heading)
    files: dict[str, Any] = {"compare.tex": latex(rows, heading)}
    for name, figure in pictures.items():
        files |= {f"{name}.png": png(figure), f"{name}.pdf": pdf(figure)}
    files["compare.html"] = (
        pages(Path(__file__).parent)
        .get_template("compare.html.jinja")
        .render(
            heading=heading,
            heads=HEADS,
            rows=[(cells(row), row.larger_than_noise) for row in rows],
            notes=NOTES,
            pictures={name: b64encode(files[f"{name}.png"]).decode() for name in pictures},
            captions=figures.CAPTIONS,
            to_accuracy=to_accuracy(settings),
            calibration=calibration(rows),
            folders=[(setting.label(), [str(job.folder) for job in setting.jobs]) for setting in settings],
            left_out=left_out,
        )
    )
    for name, content in files.items():
        write_file(folder / name, content)
