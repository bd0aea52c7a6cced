"""A run over two nodes of a real Slurm: both are this machine, each with a slurmd of its own; gloo between them."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import HANG, ROOT, SMALL, outcome

from fewshot.training.checkpoint import read

pytestmark = pytest.mark.skipif(
    os.environ.get("FEWSHOT_TEST_HOSTS") != "1"
    or not (shutil.which("slurmctld") and shutil.which("munged") and os.geteuid() == 0),
    reason="two nodes take a minute, slurm-wlm, munge and root: FEWSHOT_TEST_HOSTS=1 pytest tests/nodes",
)
KNOBS = ("algo=zero", "trainer.precision=64-true", "iterations=20", "val_every=5")
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.num_nodes=2", "trainer.devices=1")


@pytest.fixture(scope="module", autouse=True)
def slurm():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munge's socket wants to be reached by all
    try:
        started = subprocess.run([ROOT / "tests/slurm/up.sh", folder, "2"], capture_output=True, text=True)
        assert started.returncode == 0, started.stdout + started.stderr
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            patch.setenv(
                "MASTER_ADDR", "127.0.0.1"
            )  # n2 is no name that is known, as docs/cluster.md says of such nodes
            yield
    finally:  # also where only some of the daemons started
        subprocess.run([ROOT / "tests/slurm/down.sh", folder], timeout=HANG)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def by_srun(cache, tmp_path_factory):
    """The folder of a run whose two ranks srun started, each on a node of its own."""
    folder = tmp_path_factory.mktemp("srun")
    call = [*SMALL, *KNOBS, *TWO, "logger=none", f"dataset.cache={cache}", f"hydra.run.dir={folder / 'run'}"]
    ranks = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--mem=1G"]
    ended = subprocess.run([*ranks, sys.executable, ROOT / "train.py", *call], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("model of iteration") == 1
    jobs = subprocess.run(["scontrol", "--oneliner", "show", "job"], capture_output=True, text=True).stdout
    assert "NumNodes=2 " in jobs and "JobState=COMPLETED" in jobs
    return folder / "run"


def test_two_nodes_come_to_the_weights_of_one_process(by_srun, run, tmp_path):
    ours, theirs = (read(at / "checkpoints/last.ckpt") for at in (by_srun, run(tmp_path, *KNOBS)))
    assert ours["global_step"] == theirs["global_step"] == 20
    for name, expected in theirs["state_dict"].items():
        assert (ours["state_dict"][name] - expected).norm() <= 1e-8 * expected.norm(), name


def test_a_sweep_whose_jobs_have_two_nodes_each_is_bitwise_the_run_of_srun(by_srun, program, tmp_path):
    pytest.importorskip("submitit")
    slurm = [f"hydra.launcher.{knob}" for knob in ("cpus_per_task=1", "mem_gb=1", "gpus_per_node=1", "timeout_min=30")]
    process = program("-m", "hydra/launcher=slurm", *slurm, *KNOBS, *TWO, "logger=none", f"hydra.sweep.dir={tmp_path}")
    output, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, output + errors
    (results,) = tmp_path.glob("*/results.json")
    (script,) = (path.read_text() for path in tmp_path.glob(".submitit/**/*.sh") if not path.is_symlink())
    assert "#SBATCH --nodes=2\n" in script
    ended, whole = outcome(results.parent), outcome(by_srun)
    assert ended == whole
