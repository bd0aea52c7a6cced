"""What W&B is told online, by a real server: openwandb, on the loopback address.

It needs the server, which is no dependency of this project (its licence forbids commercial use):

    uv run --with openwandb==0.5.25 pytest tests/training/test_wandb_online.py

or OPENWANDB=/path/to/bin/openwandb in the environment. The server keeps no group, calls every run that ended
finished, and lets none be resumed, so it cannot be asked about those; test_sweep.py asks the offline files.
"""

import csv
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import HANG, ROOT, SMALL

KEY = "local" + 40 * "0"  # what the server makes for its first user
OPENWANDB = os.environ.get("OPENWANDB") or shutil.which("openwandb")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server's address."""
    if not OPENWANDB:
        pytest.skip("no openwandb: uv run --with openwandb==0.5.25 pytest tests/training/test_wandb_online.py")
    folder = tmp_path_factory.mktemp("openwandb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [OPENWANDB, "serve", "--host", "127.0.0.1", "--port", str(port), "--data-dir", str(folder / "data")]
    environment = {**os.environ, "HOME": str(folder), "PYTHONWARNINGS": "ignore"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + HANG
    try:
        while True:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            try:
                urllib.request.urlopen(f"{address}/login", timeout=HANG).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def ask(server: str) -> Callable[[str], Any]:
    """ask(path) is what the server answers, as its pages would get it."""

    def ask(path: str) -> Any:
        request = urllib.request.Request(f"{server}/{path}", headers={"X-WANDB-API-KEY": KEY})
        with urllib.request.urlopen(request, timeout=HANG) as answer:
            text = answer.read().decode()
        return [json.loads(line) for line in text.splitlines()] if path.endswith(".jsonl") else json.loads(text)

    return ask


def train(server: str, cache: Path, *overrides: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "HYDRA"))}
    environment |= {"WANDB_BASE_URL": server, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}
    command = [sys.executable, ROOT / "train.py", *SMALL, f"dataset.cache={cache}", *overrides]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cache, timeout=HANG)


def test_what_a_run_tells_arrives(server, ask, cache, tmp_path):
    done = train(server, cache, "logger.mode=online", "logger.name=my run", "seed=7", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = ask("api/v2/projects/default/fewshot/runs")["runs"]
    assert (run["display_name"], run["state"]) == ("my run", "finished")
    results = json.loads((tmp_path / "results.json").read_text())

    config = {name: value["value"] for name, value in run["config"].items()}
    told = config.pop("_wandb")
    assert config == {name: value for name, value in results["config"].items() if value != {}}  # W&B drops an empty one
    # Every metric against iteration: the first of _wandb.m is it, the others name it by its number.
    against = {metric["2"]: metric["5"] for metric in told["m"] if "2" in metric}
    assert told["m"][0]["1"] == "iteration"
    assert {"train/*", "val/*", "val_zeroed/*", "test/*", "test_zeroed/*", "probe/*"} <= {
        pattern for pattern, number in against.items() if number == 1
    }

    files = f"files/default/fewshot/{run['run_id']}"
    *rows, last = ask(f"{files}/wandb-history.jsonl")
    with open(tmp_path / "metrics.csv", newline="") as file:
        expected = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    own = re.compile("_|trainer/")
    assert [{key: value for key, value in row.items() if not own.match(key)} for row in rows] == expected
    assert [row["_step"] for row in rows] == list(range(len(rows)))

    summary = run["summary"]
    assert (summary["best_iteration"], summary["iterations"]) == (results["best_iteration"], 6)
    for mode, suffix in (("zeroing_off", ""), ("zeroing_on", "_zeroed")):
        accuracy = results["test"][mode]["accuracy"]
        assert [summary[f"final_test{suffix}/query_accuracy/step_{k}"] for k in range(len(accuracy))] == accuracy

    table = last["query_accuracy_by_inner_step_table"]
    content = ask(f"{files}/{table['path']}")
    assert content["columns"] == ["inner_step", "query_accuracy", "ci95", "test_zeroing"]
    assert [row[1] for row in content["data"] if row[3] == "on"] == results["test"]["zeroing_on"]["accuracy"]
    plot = told["visualize"]["query_accuracy_by_inner_step"]["panel_config"]
    assert plot["panelDefId"] == "wandb/line/v0"
    assert plot["fieldSettings"] == {"x": "inner_step", "y": "query_accuracy", "stroke": "test_zeroing"}
