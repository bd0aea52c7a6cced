"""tasks.csv.gz: the accuracy of every task of a run's final test, so that runs can be compared task by task."""

import csv
import gzip
import io
import zlib
from pathlib import Path
from typing import Any

from fewshot.config.tree import MODES
from fewshot.errors import UserError
from fewshot.files import is_regular, write_file

FILE = "tasks.csv.gz"
COLUMNS = ["split", "position", "mode", "step", "accuracy"]
STATISTICS = "statistics"  # a last column, see evaluation.statistics
MOST = 2**27  # bytes, unpacked: a million tasks with ten steps


def write_tasks(folder: Path, tested: dict[str, dict[str, dict[str, Any]]]) -> None:
    """One row for each split, task, mode and inner step; where there are several statistics, a column says which.

    tested: {statistics: {split: {mode: (tasks, T + 1)}}}, in the order of the split's tasks, the same in every run.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    several = len(tested) > 1
    rows.writerow([*COLUMNS, *[STATISTICS] * several])
    for whose, splits in tested.items():
        for split, modes in splits.items():
            for mode, accuracies in modes.items():
                for position, steps in enumerate(accuracies.tolist()):
                    cells = ([split, position, mode, step, f"{value:.6g}"] for step, value in enumerate(steps))
                    rows.writerows([*row, *[whose] * several] for row in cells)
    write_file(folder / FILE, gzip.compress(text.getvalue().encode(), mtime=0))


def read_tasks(folder: Path, split: str = "test", statistics: str | None = None) -> dict[str, Any]:
    """{mode: (tasks, T + 1)} of a finished run, by these statistics; None: by those that lead its tables.

    A test with other ways than in training may be in one mode alone.

    Raises:
        UserError: there is none, or it is not as a run writes it.
    """
    import numpy as np

    path = folder / FILE
    if not path.exists():
        raise UserError(f"{path}: is not there, the run is older than this file; test its model anew for one")
    is_regular("tasks", path)
    cells: dict[str, dict[tuple[int, int], float]] = {mode: {} for mode in MODES}
    try:
        with gzip.open(path) as packed:
            content = packed.read(MOST + 1)
        if len(content) > MOST:
            raise ValueError(f"more than {MOST} bytes")
        header, *rows = csv.reader(io.StringIO(content.decode()))
        if header not in (COLUMNS, [*COLUMNS, STATISTICS]):
            raise ValueError(f"its columns are not {','.join(COLUMNS)}")
        if len(header) > len(COLUMNS):
            wanted = statistics or (rows or [[""]])[0][-1]
            rows = [row[:-1] for row in rows if row[-1:] == [wanted]]
        for of, position, mode, step, accuracy in rows:
            value = float(accuracy)
            if not 0 <= value <= 1:
                raise ValueError(f"an accuracy of {accuracy[:20]}")
            if of == split:
                cells[mode][int(position), int(step)] = value
        arrays = {}
        if not any(cells.values()):
            raise ValueError(f"it has no tasks of {split}")
        for mode, values in cells.items():
            if not values:
                continue
            tasks, steps = (max(place[axis] for place in values) + 1 for axis in (0, 1))
            if len(values) != tasks * steps or min(min(place) for place in values) < 0:
                raise ValueError(f"tasks or steps are missing of {split} {mode}")
            arrays[mode] = np.array([[values[task, step] for step in range(steps)] for task in range(tasks)])
        if len({array.shape for array in arrays.values()}) > 1:
            raise ValueError(f"its modes differ in tasks or steps of {split}")
    except (OSError, EOFError, ValueError, KeyError, csv.Error, zlib.error) as error:
        raise UserError(f"{path}: is not as a run writes it ({str(error)[:100]})") from None
    return arrays
