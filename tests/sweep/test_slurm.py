"""On a real Slurm of this one machine: sweeps as job arrays; what is preempted, out of time or cancelled.

Runs where the programs are (Debian: slurm-wlm and munge) and the user may start them (root); docs/cluster.md says how.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import HANG, ROOT, SMALL, outcome

from fewshot.training.checkpoint import read

pytest.importorskip("submitit")
pytestmark = pytest.mark.skipif(
    not (shutil.which("slurmctld") and shutil.which("munged") and os.geteuid() == 0),
    reason="no Slurm to start here: needs slurm-wlm, munge and root",
)
LAUNCHER = (
    "hydra/launcher=slurm",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=1",
    "hydra.launcher.gpus_per_node=1",
    "hydra.launcher.timeout_min=30",
)
LONG = ("iterations=1500", "val_every=300")


@pytest.fixture(scope="module", autouse=True)
def slurm():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge's socket wants to be reached by all
    try:
        started = subprocess.run([ROOT / "tests/slurm/up.sh", folder], capture_output=True, text=True, timeout=HANG)
        assert started.returncode == 0, started.stdout + started.stderr
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        yield
    finally:  # also where only some of the daemons started
        os.environ.pop("SLURM_CONF", None)
        subprocess.run([ROOT / "tests/slurm/down.sh", folder], timeout=HANG)
        shutil.rmtree(folder)


def wait_until(what):
    deadline = time.monotonic() + HANG
    while not what():
        assert time.monotonic() < deadline, queue()
        time.sleep(0.2)


def wait_for_results(job, folder):
    """Until the job's results are there, or it is no more in the queue, whatever state it ended in."""
    output = folder.parents[1] / f"slurm-{job}.out"
    wait_until(lambda: (folder / "results.json").exists() or not queued(job))
    assert (folder / "results.json").exists(), f"{queue('-t', 'all')}\n{ended(job)}\n{output.read_text()}"


def queued(job):
    return re.search(rf"^{job} ", queue(), re.MULTILINE)


def ended(job):
    """What Slurm wrote of the job each time that it ended."""
    log = Path(os.environ["SLURM_CONF"]).with_name("log") / "jobcomp.txt"
    return "".join(line for line in log.open() if line.startswith(f"JobId={job} "))


def queue(*options):
    return subprocess.run(
        ["squeue", "-a", "-o", "%i %T %r", *options], check=True, capture_output=True, text=True
    ).stdout


def gives_time(job, minutes):
    """Not while Slurm is still ending what the job left. No more than this: a start that is not waited for can fail."""
    command = ["scontrol", "update", f"jobid={job}", f"TimeLimit={minutes}"]
    return subprocess.run(command, capture_output=True).returncode == 0


def preempt():
    command = ["sbatch", "-p", "high", f"-c{os.cpu_count()}", "--mem=50M", "-o/dev/null", "--wrap=sleep 2"]
    subprocess.run(command, check=True, capture_output=True)


def example(tmp_path, cache):
    """Submits the script of docs/cluster.md as it stands, but for its knobs and what it asks of the machine.

    From a plain shell in a checkout in which `uv sync` has made .venv, as the lines above the script say.
    """
    (text,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs/cluster.md").read_text(), re.DOTALL)
    knobs = " ".join((*SMALL, *LONG, "logger=none", f"dataset.cache={cache}"))
    for there, here in (
        ("algo=zero", knobs),
        ("--cpus-per-task=8", "--cpus-per-task=1"),
        ("--gpus-per-node=1", ""),
        ("--mem=16G", "--mem=1G"),
        ("--time=04:00:00", "--time=60"),
        ("USR1@120", "USR1@60"),
    ):
        assert there in text
        text = text.replace(there, here)
    (tmp_path / "job.sh").write_text(text)
    for name, there in (("train.py", ROOT / "train.py"), (".venv", sys.prefix)):
        (tmp_path / name).symlink_to(there)
    plain = {"PATH": "/usr/bin:/bin", "HOME": os.environ["HOME"], "SLURM_CONF": os.environ["SLURM_CONF"]}
    command = [shutil.which("sbatch"), "--parsable", "job.sh"]
    submitted = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=plain)
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.strip()
    return job, tmp_path / "outputs" / job


def test_a_preempted_job_goes_on_exactly(run, tmp_path, cache):
    whole = outcome(run(tmp_path / "whole", *LONG))
    job, folder = example(tmp_path, cache)
    last = folder / "checkpoints/last.ckpt"
    wait_until(lambda: last.exists() and read(last)["global_step"] >= 300)
    preempt()
    output = tmp_path / f"slurm-{job}.out"
    wait_until(lambda: "last.ckpt written" in output.read_text() or (folder / "results.json").exists())
    assert "last.ckpt written" in output.read_text(), f"the job ended before it was preempted: {queue()}"
    wait_for_results(job, folder)
    assert outcome(folder) == whole


def test_a_job_out_of_time_goes_on_exactly(run, tmp_path, cache):
    """Slurm sends the signal 60 to 90 seconds before the end, and wakes a process that was stopped till then."""
    whole = outcome(run(tmp_path / "whole", *LONG))
    began = time.monotonic()
    job, folder = example(tmp_path, cache)
    wait_until((folder / "checkpoints/last.ckpt").exists)
    process = int(re.findall(r"process (\d+) ", (folder / ".lock").read_text())[0])
    os.kill(process, signal.SIGSTOP)
    assert gives_time(job, minutes=int((time.monotonic() - began) / 60) + 2)
    output = tmp_path / f"slurm-{job}.out"
    wait_until(lambda: f"job {job}: put back into the queue" in output.read_text())
    wait_until(lambda: gives_time(job, minutes=60))
    wait_for_results(job, folder)
    assert outcome(folder) == whole


def test_a_sweep_is_an_array_that_outlives_a_cancelled_and_a_preempted_job(program, run, tmp_path):
    call = ("-m", *LAUNCHER, "seed=0,1,2,3", "iterations=400", "val_every=100", "logger=none")
    call = (*call, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    whole = outcome(run(tmp_path / "whole", "iterations=400", "val_every=100", "seed=0"))

    def first(seed):
        checkpoints = (tmp_path / "sweep").glob("*/checkpoints/last.ckpt")
        return next((path for path in checkpoints if read(path)["fewshot"]["config"]["seed"] == seed), None)

    process = program(*call)
    wait_until(lambda: first(0) or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    (array,) = set(re.findall(r"^(\d+)_", queue(), re.MULTILINE))
    subprocess.run(["scancel", f"{array}_3"], check=True)
    preempt()
    wait_until(lambda: process.poll() is not None)
    output, errors = process.communicate()
    assert process.returncode == 1 and "Traceback" not in errors, output + errors
    assert re.search(rf"1 failed or unfinished; .*\n\S+: Slurm job {array}_3: (cancelled|CANCELLED)", output)
    assert len(list((tmp_path / "sweep").glob("*/results.json"))) == 3
    ended = outcome(first(0).parents[1])
    for content in (ended, whole):
        del content["results"]["config"]
    assert ended == whole
    process = program(*call)  # again, for what is missing
    output, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, output + errors
    assert len(list((tmp_path / "sweep").glob("*/results.json"))) == 4


def test_a_job_that_slurm_refuses_is_one_line(program, tmp_path):
    process = program("-m", *LAUNCHER, "hydra.launcher.partition=none", "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    output, errors = process.communicate(timeout=HANG)
    assert process.returncode == 1 and "Traceback" not in output + errors
    assert "partition" in errors  # sbatch's own words
    assert "hydra/launcher=slurm: sbatch took no job; change hydra.launcher.*" in errors


def test_two_processes_of_a_job_are_one_run(program, tmp_path):
    call = ("-m", *LAUNCHER, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "seed=0")
    process = program(*call, f"hydra.sweep.dir={tmp_path}")
    output, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, output + errors
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir() and path.name != ".submitit")
    assert json.loads((folder / "results.json").read_text())["config"]["trainer"]["devices"] == 2
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    logs = [path.read_text() for path in tmp_path.glob(".submitit/*/*_log.out")]
    assert len(logs) == 2 and "".join(logs).count("model of iteration") == 1
