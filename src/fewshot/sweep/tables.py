"""The tables of a sweep, and the files that they are written to with its figures.

Runs that differ in their seed alone are one setting; what is said of a setting is a mean over its seeds.
"""

import logging
import math
import re
import traceback
from itertools import product
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from fewshot.config import stored
from fewshot.config.command import one_line_errors
from fewshot.config.hydra_call import folders_of_jobs
from fewshot.config.tree import MODES, leaves
from fewshot.errors import UserError, first_few, printable, shown
from fewshot.files import in_shell, write_file
from fewshot.results.record_files import percent, steps_of_training, steps_that_matter, tested_on, title, write_csv
from fewshot.sweep.settings import OVER_SEEDS, Job, Setting, group, mean_and_ci95, read_job, read_jobs

log = logging.getLogger(__name__)

PAIRED = (
    "Paired by test task and seed; ± is the 95% confidence interval over tasks and seeds, with one seed over tasks.\n"
    "Bold: larger than noise (p < .05 after Holm's correction over this table). `fewshot compare` says more.\n"
)
TARGETS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)  # accuracies; the outer updates that each takes are counted


class Summary(Callback):
    """Ends a sweep with its tables and figures, and with status 1 if a job failed.

    Args:
        panels: knobs; panels.png has axes of their own for each of their values.
    """

    def __init__(self, panels: list[str]) -> None:
        self.panels = list(panels)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            with one_line_errors():
                folder, own = Path(config.hydra.sweep.dir), folders_of_jobs(config)
                conclude(folder, self.panels, config.figures.format, own)
        except Exception:  # Hydra would turn it into a warning and status 0
            traceback.print_exc()
            raise SystemExit(1) from None


def conclude(folder: Path, panels: list[str], kind: str = "png", own: set[str] | None = None) -> None:
    """Summarises the sweep in `folder` and names the jobs that have no result.

    own: the names of the folders of this call's jobs; None: all are.

    Raises:
        SystemExit: status 1, such a job is one of this call; or the line that says why nothing can be summarised.
    """
    # read_jobs would leave out a failed job if another one with the same settings has finished.
    jobs = [job for path in sorted(folder.iterdir()) if path.is_dir() and (job := read_job(path))]
    without, complaint = [job for job in jobs if job.error or not job.results], None
    missing = [job for job in without if own is None or job.folder.name in own]
    try:
        summarise([folder], folder, panels, kind)
    except UserError as error:
        complaint = str(error)
    place = in_shell("hydra.sweep.dir", folder)
    if others := [job for job in without if job not in missing]:
        again = f"their own values with {place} try them again, or remove their folders"
        log.warning(f"{len(others)} of other calls failed or unfinished; {again}:{_lines(others)}")
    if missing:
        again = f"the same command with {place} tries them again"
        log.error(f"{len(missing)} failed or unfinished; {again}:{_lines(missing)}")
    if missing or complaint:
        raise SystemExit(complaint or 1)


def _lines(jobs: list[Job]) -> str:
    unfinished = "unfinished; is another process at work on it?"
    return "".join(f"\n{printable(f'{job.folder.name}: {job.error or unfinished}')}" for job in jobs)


def summarise(folders: list[Path], into: Path, panels: list[str], kind: str = "png") -> None:
    """summary.csv, summary.md, summary.png and, with panels, panels.png, written into a folder.

    Args:
        folders: of sweeps or of single runs, finished or not.
        panels: knobs whose values get axes of their own.
        kind: of the figures, png, or pdf for both.

    Raises:
        UserError: no run has finished, or a panel is no knob.
    """
    jobs = read_jobs(folders)
    if not any(job.results for job in jobs):
        raise UserError(f"{', '.join(map(str, folders))}: none of the {len(jobs)} runs in it has finished")
    # Matplotlib takes seconds to import, and a mistake should not have to wait for it.
    from fewshot.results.figures import write_picture
    from fewshot.sweep import figures

    settings = group([job for job in jobs if job.results or job.curves])
    text = as_markdown(settings, [job for job in jobs if job.error or not job.results])
    write_csv(into / "summary.csv", as_rows(settings))
    write_file(into / "summary.md", text)
    write_picture(into / "summary", figures.sweep(settings), kind)
    print(f"{text}\nWritten to {into}/summary.csv, .md, .png")
    known = {key for setting in settings for key, _ in leaves(setting.config)}
    if unknown := [knob for knob in panels if knob not in known]:
        raise UserError(f"panels={unknown[0]}: no such knob of these runs, such as algo.first_order or inner_steps")
    if len(panels) > 2:
        raise UserError(f"panels={','.join(panels)}: at most two knobs, one across and one down")
    if panels:
        write_picture(into / "panels", figures.panels(settings, panels), kind)
        print(f"Written to {into}/panels.png")
    if (recorded := _similarities(settings)) and figures.shared_updates(recorded):
        of = title(settings[0].config, algorithm=False)
        write_picture(into / "cosine_similarity", figures.cosine_similarity(recorded, of), kind)
        print(f"Written to {into}/cosine_similarity.png")


def as_rows(settings: list[Setting]) -> list[list[Any]]:
    """Long: one row per setting, zeroing mode and step."""
    rows: list[list[Any]] = [["setting", *settings[0].knobs, "test_zeroing", "step", "accuracy", "ci95", "n"]]
    for setting, mode in product(settings, MODES):
        if len(values := setting.accuracies(mode)):
            named = [setting.label(), *map(shown, setting.knobs.values()), mode.removeprefix("zeroing_")]
            for step, (mean, ci95) in enumerate(zip(*mean_and_ci95(values), strict=True)):
                rows.append([*named, step, f"{mean:.6f}", "" if math.isnan(ci95) else f"{ci95:.6f}", len(values)])
    return rows


def as_markdown(settings: list[Setting], without: list[Job]) -> str:
    """Accuracy of the final test after every inner step, outer updates to an accuracy, jobs without (new) results."""
    parts = []
    for mode in MODES:  # with other ways than in training a model may be tested in one of them alone
        inside = [(setting, values) for setting in settings if len(values := setting.accuracies(mode))]
        if not inside:
            continue
        last = {id(setting): values.shape[1] - 1 for setting, values in inside}
        steps = sorted({n for one, _ in inside for n in steps_that_matter(one.config, last[id(one)])})
        rows = []
        for setting, values in inside:
            cells = list(map(percent, *mean_and_ci95(values)))
            if (trained := steps_of_training(setting.config)) < len(cells):
                cells[trained] += "*"
            shown = [cells[step] if step < len(cells) else "" for step in steps]
            rows.append([setting.label(), *shown, str(len(values))])
        kinds = " or ".join(dict.fromkeys(tested_on(setting.config) for setting, _ in inside))
        heading = f"Query accuracy in % on {kinds} after inner step ..., test {mode.replace('_', ' ')}"
        parts.append(_table(heading, ["setting", *map(str, steps), "seeds"], rows))
    parts += _differences(settings)
    if reached := to_accuracy(settings):
        heading = "Outer updates until the curve after inner_steps first reaches an accuracy, test zeroing off"
        parts.append(_table(heading, *reached))
    if without:
        rows = [[job.folder.name, job.state, job.error or ""] for job in without]
        parts.append(_table("Runs without results", ["run", "", ""], rows))
    return "\n".join([*parts, OVER_SEEDS])


def _differences(settings: list[Setting]) -> list[str]:
    """A table of each setting beside the first one, test task by test task and seed by seed, where that can be done."""
    from fewshot.sweep import pairs  # scipy takes its time to import

    runs, left_out = pairs.comparable([job for setting in settings for job in setting.jobs if job.results])
    try:
        rows, without = pairs.rows(runs, MODES, None) if runs else ([], [])
    except UserError:  # one setting alone
        return []
    table = []
    for row in rows:
        if d := row.difference:
            text = f"{100 * d.mean:+.2f} ± {100 * d.half_width:.2f}".replace("-", "−")
            text = f"**{text}**" if row.larger_than_noise else text
            table.append([row.setting.label(), row.mode.removeprefix("zeroing_"), str(row.step), text, str(d.seeds)])
    if not table:
        return []
    of = title(rows[0].setting.config, algorithm=False)  # settings of other tasks are left out
    heading = f"Differences to {rows[0].setting.label()} after inner_steps on {of}, in points"
    notes = [f"Left out: {as_text(first_few([*left_out, *without]))}\n"] * bool(left_out or without)
    return [_table(heading, ["setting", "test zeroing", "step", "difference", "seeds"], table), PAIRED, *notes]


def to_accuracy(settings: list[Setting]) -> tuple[list[str], list[list[str]]] | None:
    """Columns and rows: outer updates until a setting's curve first reaches an accuracy.

    There is a column for each accuracy that a setting reaches; None where none reaches any.
    """
    rows = [[setting.label(), *updates_to(setting)] for setting in settings]
    reached = [2 + target for target in range(len(TARGETS)) if any(row[2 + target] != "-" for row in rows)]
    columns = ["setting", "curve", *(f"{TARGETS[column - 2]:.0%}" for column in reached)]
    return (columns, [[*row[:2], *(row[column] for column in reached)] for row in rows]) if reached else None


def updates_to(setting: Setting) -> list[str]:
    """The curve's name, and for each target the mean over seeds; "1 of 3 seeds" if not all get there, "-" if none."""
    split, curves = setting.curves("zeroing_off")
    cells = []
    for target in TARGETS:
        reached = [[update for update, accuracy in curve.items() if accuracy >= target] for curve in curves]
        there = [min(updates) for updates in reached if updates]
        if len(there) == len(curves):
            cells.append(f"{sum(there) / len(there):.0f}")
        else:
            cells.append(f"{len(there)} of {len(curves)} seeds" if there else "-")
    return [{"val": "validation", "test": "test"}[split], *cells]


def _table(heading: str, columns: list[str], rows: list[list[str]]) -> str:
    rows = [[as_text(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join(
        [f"{as_text(heading)}\n", line(columns), line(["-" * max(3, width) for width in widths]), *map(line, rows), ""]
    )


def as_text(text: str) -> str:
    """What others wrote, in Markdown: no tag, link, picture, code or cell begins in it."""
    return re.sub(r"[|<`]|(?<=\])\(", r"\\\g<0>", printable(text))


def _similarities(settings: list[Setting]) -> dict[str, list[dict[str, Any]]]:
    """For each setting, the cosine_similarity.json of its finished jobs; what is not as a run writes it is left out."""
    recorded: dict[str, list[dict[str, Any]]] = {}
    for setting in settings:
        for job in setting.jobs:
            path = job.folder / "cosine_similarity.json"
            if job.results and path.exists():
                try:
                    stored.check(str(path), content := stored.read_json(path), stored.SIMILARITIES)
                    matrices = [content[pairs] for pairs in ("query_support", "query_query")]
                    sizes = {len(matrix) for of_pairs in matrices for matrix in of_pairs}
                    if {*map(len, matrices)} != {len(content["updates"])} or sizes != {setting.config["ways"]}:
                        raise UserError(f"{path}: must have a matrix of ways x ways for each of its updates")
                    recorded.setdefault(setting.label(), []).append(content)
                except UserError as problem:
                    log.warning(f"{problem}; left out")
    return recorded
