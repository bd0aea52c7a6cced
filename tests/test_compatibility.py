"""What earlier versions left goes on working: the runs, exported folders and sweeps that they made."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import rows

from fewshot.predict import predict
from fewshot.sweep.__main__ import main as sweep_main
from fewshot.sweep.settings import group, read_jobs
from fewshot.training.checkpoint import read

FIXTURES = Path(__file__).parent / "fixtures"
COMMITS = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())


def expected(commit: str) -> dict:
    """What that commit itself computed from what it had left."""
    return json.loads((FIXTURES / commit / "expected.json").read_text())


def numbers(lines: list[dict[str, str]]) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in row.items() if value} for row in lines]


@pytest.mark.parametrize("commit", COMMITS)
def test_an_old_run_is_tested_and_goes_on(run, tmp_path, commit):
    """Its images are letters that another version of matplotlib or Pillow may draw otherwise."""
    made = Path(shutil.copytree(FIXTURES / commit / "run", tmp_path / "run"))
    best, last = (made / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    tested = run(tmp_path / "test", f"checkpoint={best}", "fit=false", "dataset.other_split=true")
    splits = [json.loads((folder / "splits.json").read_text()) for folder in (tested, made)]
    assert all(splits[0][name] == splits[1][name] for name in ("train", "val", "test"))
    if splits[0]["sha256"] != splits[1]["sha256"]:
        pytest.skip("other versions draw other letters")
    old = json.loads((made / "results.json").read_text())
    for split in ("test", "val"):
        for mode in ("zeroing_off", "zeroing_on"):
            new = json.loads((tested / "results.json").read_text())[split][mode]
            assert new["accuracy"] == pytest.approx(old[split][mode]["accuracy"], abs=0.02)

    run(made, f"checkpoint={last}", "iterations=6")
    continued = expected(commit)["continued_to_6"]
    header, *lines = (line.split(",") for line in continued["metrics"])
    known = numbers([dict(zip(header, line, strict=True)) for line in lines])
    assert [pytest.approx(row, rel=1e-4, abs=0.02) for row in known] == numbers(rows(made))
    norms = {name: weight.double().norm().item() for name, weight in read(last)["state_dict"].items()}
    assert norms == pytest.approx(continued["norms"], rel=1e-3, abs=1e-6)
    sweep_main([str(made), f"into={tmp_path / 'summary'}"])
    assert (tmp_path / "summary" / "summary.csv").exists()


@pytest.mark.parametrize("commit", COMMITS)
def test_an_old_checkpoint_and_an_old_exported_folder_predict_what_they_did(commit):
    images = np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    support = {"a": images[:2], "b": images[2:4], "c": images[4:6]}
    for name, probabilities in expected(commit)["predicted"].items():
        predicted = torch.tensor(predict(FIXTURES / commit / name, support, images[6:]).probabilities)
        torch.testing.assert_close(predicted, torch.tensor(probabilities).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("commit", COMMITS)
def test_an_old_sweep_has_the_table_that_it_had(tmp_path, commit):
    sweep_main([str(FIXTURES / commit / "sweep"), f"into={tmp_path}"])
    assert (tmp_path / "summary.csv").read_bytes() == (FIXTURES / commit / "sweep" / "summary.csv").read_bytes()


def sizes(*folders: Path) -> dict[str, int]:
    """How many jobs each setting in these folders has."""
    return {setting.label(): len(setting.jobs) for setting in group(read_jobs(list(folders)))}


@pytest.mark.parametrize("commit", COMMITS)
def test_a_run_of_today_is_of_the_setting_that_an_old_sweep_has(run, tmp_path, commit):
    sweep = FIXTURES / commit / "sweep"
    call = yaml.safe_load(next(sweep.glob("algo-zero*seed-1*/.hydra/overrides.yaml")).read_text())
    today = run(tmp_path, *call, "seed=2", "callbacks.record.test_curve_tasks=992")
    assert sizes(sweep) == {"no zeroing": 2, "zeroing": 2}
    assert sizes(sweep, today) == {"no zeroing": 2, "zeroing": 3}


def test_settings_do_not_differ_in_where_this_programs_code_lies(tmp_path):
    first, second = (FIXTURES / commit / "sweep" for commit in COMMITS)
    assert sizes(first, second) == sizes(first)  # the same seeds, so the same runs
    moved = Path(shutil.copytree(next(first.glob("algo-zero*seed-1*")), tmp_path / "moved"))
    results = json.loads((moved / "results.json").read_text())
    results["config"]["seed"] = 2
    results["config"]["callbacks"]["record"]["_target_"] = "fewshot.elsewhere.Record"
    (moved / "results.json").write_text(json.dumps(results))
    assert sizes(first, moved) == {"no zeroing": 2, "zeroing": 3}
    results["config"]["callbacks"]["record"]["_target_"] = "theirs.Record"
    (moved / "results.json").write_text(json.dumps(results))
    assert len(sizes(first, moved)) == 3
