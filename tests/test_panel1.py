"""docs/results/panel1.py on made-up runs: what it keeps of a run, and the tables that it writes."""

import gzip
import json
from pathlib import Path

import pytest

from docs.results import panel1

HEADER = "order,setting,test_zeroing,step,iteration,mean,ci95_over_seeds,seeds\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """docs/results with the released code's curves, and beside it the page with its two markers."""
    results = tmp_path / "docs" / "results"
    results.mkdir(parents=True)
    rows = [
        f"{order},{start},{zeroing},{step},{iteration},0.5{step}{zeroing},{',1' if alone else '0.004,4'}\n"
        for order in ("FO", "SO")
        for start in ("vanilla", "zero_init", "zeroing")
        for alone in (order == "SO" and start == "zero_init",)
        for zeroing in (0, 1)
        for step in range(4)
        for iteration in (0, 300, 600, 1500, 2010)
    ]
    (results / "omniglot_1shot_curves.csv").write_text(HEADER + "".join(rows))
    (results.parent / "reproduction.md").write_text("before\n" + "old\n".join(panel1.MARKERS) + "after\n")
    return results


def made_up_run(folder: Path, name: str, accuracy: float) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    scores = {"accuracy": [0.2, accuracy, accuracy + 0.01, accuracy + 0.02], "ci95": [0.003] * 4}
    config = {"dataset": {"root": "/home/somebody/omniglot", "cache": "~/cache", "size": 28}, "checkpoint": None}
    results = {
        "test": {"tasks": 992, "zeroing_off": scores, "zeroing_on": scores},
        "best_iteration": 2850,
        "seconds": {"train": 5.0},
        "config": config,
    }
    (run / "results.json").write_text(json.dumps(results))
    columns = [f"{split}/query_accuracy/step_1" for split in ("test", "test_zeroed")]
    rows = [f"{iteration},{accuracy - 0.1},{accuracy - 0.05}\n" for iteration in (0, 300, 600)]
    (run / "metrics.csv").write_text(f"iteration,{','.join(columns)}\n10,,\n" + "".join(rows))
    run.with_name(f"{name}.time").write_text("90.5 user 1.5 system 99 wall 5 kB\n10.0 user 0.0 system 9 wall 5 kB\n")
    run.with_name(f"{name}.log").write_text("stopped by SIGTERM; ... goes on\n")
    return run


def test_a_run_is_kept_without_paths_and_each_time_as_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "runs", "zero-first-seed1", 0.93)
    files = []
    for kept in ("one", "other"):
        panel1.collect(run, tmp_path / kept)
        files.append([path.read_bytes() for path in sorted((tmp_path / kept / run.name).iterdir())])
    assert files[0] == files[1]
    assert gzip.decompress(files[0][0]).decode() == (run / "metrics.csv").read_text()
    results = json.loads(gzip.decompress(files[0][1]))
    assert results["config"] == {"dataset": {"size": 28}, "checkpoint": None}
    assert results["seconds"] == {"train": 5.0, "processor": 102.0}


def test_processor_seconds_are_not_known_where_a_call_left_none(tmp_path: Path) -> None:
    run = made_up_run(tmp_path, "zero-first-seed1", 0.93)
    run.with_name(f"{run.name}.log").write_text("stopped by SIGTERM; ...\nstopped by SIGINT; ...\n")
    assert panel1.processor_seconds(run) is None


@pytest.mark.parametrize("name, reason", [("zero-first", "ALGO-ORDER-seedSEED"), ("zero-first-seed0", "not finished")])
def test_what_is_no_finished_run_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(SystemExit, match=reason):
        panel1.collect(tmp_path / name, tmp_path / "kept")


def test_tables_and_figure_of_two_settings(folder: Path, tmp_path: Path) -> None:
    names = {"zero-first-seed0": 0.93, "zero-first-seed1": 0.94, "fomaml-second-seed0": 0.41}
    runs = [made_up_run(tmp_path / "runs", name, accuracy) for name, accuracy in names.items()]
    panel1.main([str(run) for run in runs], folder)
    page = (folder.parent / "reproduction.md").read_text()
    assert page.startswith("before\n<!--") and page.endswith("tables -->\nafter\n") and "old" not in page
    final, curve = (page.split("interval over tasks:\n")[1].split("The test curve on the way")[part] for part in (0, 1))
    zeroed = final.split("| FOMAML, zeroed every update |")[1].splitlines()
    assert zeroed[0] == " seed 0 | .930 ± .003 | .940 ± .003 | .930 ± .003 | .940 ± .003 | 2,850 | 102 |"
    assert zeroed[1].startswith("|  | seed 1 | .940 ± .003 |")
    theirs = "| .510 ± .004 | .520 ± .004 | .511 ± .004 | .521 ± .004 |"
    assert zeroed[2] == f"|  | released code, 4 seeds, at 2,010 {theirs}  |  |"
    assert "| SOMAML, zero at the start | not run yet |  |  |  |  |  |  |" in final
    assert "| released code, 1 seed, at 2,010 | .510 | .520 | .511 | .521 |  |  |" in final
    assert "| SOMAML, random head | seed 0 | .360 | .360 |  |" in curve  # its curve has no iteration 1,500
    assert (folder.parent / "panel1_full_length.png").read_bytes().startswith(b"\x89PNG")
