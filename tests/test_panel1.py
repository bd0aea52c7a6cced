"""docs/results: what collect.py and kept.py keep of made-up runs, and panel 1's tables and figure of them."""

import json
import re
from pathlib import Path

import collect
import curves
import kept
import panel1
import pytest
import theory

HEADER = "order,setting,test_zeroing,step,iteration,mean,ci95_over_seeds,seeds\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """docs/results with the released code's curves."""
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
    return results


def made_up_run(folder: Path, name: str, accuracy: float) -> Path:
    run = folder / name
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "overrides.yaml").write_text(
        "[algo=zero, dataset.root=/home/somebody/omniglot, seed=1, iterations=1000]"
    )
    scores = {"accuracy": [0.2, accuracy, accuracy + 0.01, accuracy + 0.02], "ci95": [0.003] * 4}
    config = {"dataset": {"root": "/home/somebody/omniglot", "cache": "~/cache", "size": 28}, "checkpoint": None}
    config |= {"iterations": 3000}  # of a later call, with which the run went on
    config |= {"seed": int(name[-1:]), "threads": 1, "callbacks": {"record": {"test_curve_tasks": 300}}}
    results = {
        "test": {"tasks": 992, "zeroing_off": scores, "zeroing_on": scores},
        "val": {"tasks": 100},
        "iterations": 3000,
        "best_iteration": 2850,
        "seconds": {"train": 5.0},
        "config": config,
    }
    (run / "results.json").write_text(json.dumps(results))
    columns = [f"{split}/query_accuracy/step_1" for split in ("test", "test_zeroed")]
    rows = [f"{iteration},{accuracy - 0.1},{accuracy - 0.05}\n" for iteration in (0, 300, 600)]
    (run / "metrics.csv").write_text(f"iteration,{','.join(columns)}\n10,,\n" + "".join(rows))
    run.with_name(f"{name}.time").write_text(
        "90.5 user 1.5 system 99 wall 1000 kB\n10.0 user 0.0 system 9 wall 2000 kB\n"
    )
    run.with_name(f"{name}.log").write_text("stopped by SIGTERM; ... goes on\n")
    return run


def test_a_run_is_kept_without_paths_and_once(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "runs", "zero-first-seed1", 0.93)
    collect.collect("panel1", [run], tmp_path)
    before = (tmp_path / "panel1.csv.gz").read_bytes()
    collect.collect("panel1", [run, run], tmp_path)
    assert (tmp_path / "panel1.csv.gz").read_bytes() == before
    (kept,) = collect.facts("panel1", tmp_path).values()
    assert kept["config"]["dataset"] == {"size": 28} and "/home" not in json.dumps(kept)
    assert kept["command"] == "python train.py algo=zero seed=1 iterations=3000"
    assert kept["seconds"] == {"train": 5.0, "processor": 102.0} and kept["peak_mb"] == 2.0
    assert re.fullmatch(r"\w+ \w+, .+, \d+ cores", kept["kept"]["machine"])


def test_every_accuracy_is_a_row(tmp_path: Path) -> None:
    collect.collect("panel1", [made_up_run(tmp_path / "runs", "zero-first-seed1", 0.93)], tmp_path)
    assert len(collect.rows("panel1", tmp_path)) == 2 * 3 + 2 * 4  # the curve in two modes, the final test
    final, *curve = sorted(collect.rows("panel1", tmp_path, mode="zeroing_on", step=1), key=lambda row: -row.iteration)
    assert final == ("zero-first", 1, 2850, "test", "zeroing_on", 1, 0.93, 0.003, 992)
    assert curve[0] == ("zero-first", 1, 600, "test", "zeroing_on", 1, 0.93 - 0.05, None, 300)


def test_processor_seconds_are_not_known_where_a_call_left_none(tmp_path: Path) -> None:
    run = made_up_run(tmp_path, "zero-first-seed1", 0.93)
    run.with_name(f"{run.name}.log").write_text("stopped by SIGTERM; ...\nstopped by SIGINT; ...\n")
    assert collect.processor_seconds(run) is None


def test_what_measures_the_theory_is_kept_by_dataset_start_and_seed(tmp_path: Path, monkeypatch) -> None:
    run = tmp_path / "sweep" / "job"
    run.mkdir(parents=True)
    config = {"dataset": {"name": "omniglot", "root": "/home/somebody"}, "algo": {"zeroing": False}, "init_scale": 0}
    results = {"config": {**config, "seed": 3}, "versions": {"torch": "2"}, "seconds": {"train": 1.0}}
    (run / "results.json").write_text(json.dumps(results))
    (run / "cosine_similarity.json").write_text('{"updates": [1, 11]}')
    monkeypatch.setattr(theory, "HERE", tmp_path)
    theory.keep([tmp_path])
    assert [path.name for path in tmp_path.glob("*.gz")] == ["cosine_similarity.json.gz"]
    kept = theory.kept("cosine_similarity")["omniglot-zero_init-seed3"]
    assert kept["updates"] == [1, 11] and kept["config"]["dataset"] == {"name": "omniglot"}


@pytest.mark.parametrize("name, reason", [("zero-first", "ALGO-ORDER-seedSEED"), ("zero-first-seed0", "not finished")])
def test_what_is_no_finished_run_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(SystemExit, match=reason):
        panel1.keep([tmp_path / name], tmp_path)
    assert not list(tmp_path.glob("*.*"))


def test_tables_and_figure_of_two_settings(folder: Path, tmp_path: Path) -> None:
    names = {"zero-first-seed0": 0.93, "zero-first-seed1": 0.94, "fomaml-second-seed0": 0.41}
    runs = [made_up_run(tmp_path / "runs", name, accuracy) for name, accuracy in names.items()]
    panel1.main([str(run) for run in runs], folder)
    page = panel1.tables(panel1.read_runs(folder), panel1.read_authors(folder / "omniglot_1shot_curves.csv"))
    final, curve = (page.split("interval over tasks:\n")[1].split("The test curve on the way")[part] for part in (0, 1))
    zeroed = final.split("| FOMAML, zeroed every update |")[1].splitlines()
    assert zeroed[0] == " seed 0 | .930 ± .003 | .940 ± .003 | .930 ± .003 | .940 ± .003 | 2,850 | 102 |"
    assert zeroed[1].startswith("|  | seed 1 | .940 ± .003 |")
    theirs = "| .510 ± .004 | .520 ± .004 | .511 ± .004 | .521 ± .004 |"
    assert zeroed[2] == f"|  | released code, 4 seeds, at 2,010 {theirs}  |  |"
    assert zeroed[3] == "|  | released code, at 3,000 | .937 |  | .937 |  |  |  |"
    assert "| SOMAML, zero at the start | not run yet |  |  |  |  |  |  |" in final
    assert "| released code, 1 seed, at 2,010 | .510 | .520 | .511 | .521 |  |  |" in final
    assert "| SOMAML, random head | seed 0 | .360 | .360 |  |" in curve  # its curve has no iteration 1,500
    assert (folder.parent / "panel1_full_length.png").read_bytes().startswith(b"\x89PNG")


def test_kept_runs_are_settings_as_a_sweep_reads_them() -> None:
    """Of the real files, which the pictures are drawn from."""
    by_label = {setting.label(): setting for setting in curves.settings("panel1", "-first")}
    assert list(by_label) == ["random head", "zero at the start", "zeroed every update"]
    for label, setting in zip(by_label, ("fomaml-first", "zero_init-first", "zero-first"), strict=True):
        rows = collect.rows("panel1", setting=setting, split="test", mode="zeroing_on", step=2)
        split, updates, accuracies = by_label[label].curve("zeroing_on")
        curve = [(row.iteration, row.accuracy) for row in rows if row.ci95 is None and row.seed == 0]
        assert split == "test" and [*zip(updates, accuracies[0], strict=True)] == curve
        assert by_label[label].accuracies("zeroing_on")[0, 2] == next(r.accuracy for r in rows if r.ci95 is not None)


def test_panel_2_has_every_number_of_steps_with_and_without_zeroing() -> None:
    runs = {(run.config["inner_steps"], run.config["algo"]["zeroing"]): run for run in curves.settings("panel2")}
    assert set(runs) == {(steps, zeroing) for steps in (1, 3, 7) for zeroing in (False, True)}
    (row,) = (row for row in collect.rows("panel2", setting="fomaml-7steps", mode="zeroing_on", step=7) if row.ci95)
    assert runs[7, False].accuracies("zeroing_on")[0, 7] == row.accuracy
    (line,) = (line for line in curves.final_tests([runs[7, False]], "inner_steps").splitlines() if "`7`" in line)
    assert f"{100 * row.accuracy:.1f} ± {100 * (row.ci95 or 0):.1f}" in line


def test_the_table_of_the_explicit_loss_has_the_kept_final_tests_of_all_seeds() -> None:
    lines = curves.ablation_table().splitlines()
    for mode, words in (("zeroing_off", "test zeroing off"), ("zeroing_on", "test zeroing on")):
        (row,) = (line for line in lines if line.startswith(f"| {words} | 1 | 4 |"))
        for (noise, interference), cell in zip(curves.LOSSES, row.removesuffix(" |").split(" | ")[3:], strict=True):
            setting = f"noise_{noise}-interference_{interference}-eta4-steps1".lower()
            tests = [r for r in collect.rows("ablation", setting=setting, mode=mode, step=1) if r.ci95 is not None]
            by_seed = {row.seed: f"{100 * row.accuracy:.1f}" for row in tests}
            assert cell.split(", ") == [by_seed[seed] for seed in sorted(by_seed)] and len(by_seed) > 1


def test_what_is_measured_again_takes_the_place_of_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "HERE", tmp_path)
    kept.keep("x", [{"model": "a", "mode": "on", "accuracy": 0.5}], ("model", "mode"))
    again = [{"model": name, "mode": "on", "accuracy": 0.6} for name in ("b", "a")]
    kept.keep("x", again, ("model", "mode"))
    assert kept.rows("x") == again[::-1]
