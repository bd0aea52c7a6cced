"""What an earlier version left goes on working: a run and an exported folder that were made at commit a43819a."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rows

from fewshot.predict import predict
from fewshot.sweep import tables
from fewshot.training.checkpoint import read

MADE = Path(__file__).parent / "fixtures" / "a43819a"
EXPECTED = json.loads((MADE / "expected.json").read_text())  # as that commit computed it


@pytest.fixture
def made(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MADE / "run", tmp_path / "run"))


def numbers(lines: list[dict[str, str]]) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in row.items() if value} for row in lines]


def test_an_old_run_is_tested_and_goes_on(run, made, tmp_path):
    """Its images are letters that another version of matplotlib or Pillow may draw otherwise."""
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
    header, *lines = (line.split(",") for line in EXPECTED["continued_to_6"]["metrics"])
    expected = numbers([dict(zip(header, line, strict=True)) for line in lines])
    assert [pytest.approx(row, rel=1e-4, abs=0.02) for row in expected] == numbers(rows(made))
    norms = {name: weight.double().norm().item() for name, weight in read(last)["state_dict"].items()}
    assert norms == pytest.approx(EXPECTED["continued_to_6"]["norms"], rel=1e-3, abs=1e-6)
    tables.summarise([made], tmp_path / "summary", [])
    assert (tmp_path / "summary" / "summary.csv").exists()


def test_an_old_checkpoint_and_an_old_exported_folder_predict_what_they_did():
    images = np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    support = {"a": images[:2], "b": images[2:4], "c": images[4:6]}
    for name, expected in EXPECTED["predicted"].items():
        found = predict(MADE / name, support, images[6:]).probabilities
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-3)
