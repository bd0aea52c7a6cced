"""Several processes: the same tasks, gradient and weights as one; one folder; a rank that dies ends the run usably."""

import csv
import json
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.launcher.api as launcher
from conftest import HANG, ROOT, SMALL, halt_when, let_go, outcome
from hydra import compose, initialize_config_dir
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from fewshot.config.check import check
from fewshot.config.hydra_call import Call
from fewshot.config.tree import CONF
from fewshot.data import meta_batches as data_module  # noqa: F401
from fewshot.errors import UserError
from fewshot.processes.ranks import PARENT, leave_error
from fewshot.processes.signals import Signals
from fewshot.results import figures, record_files  # noqa: F401  what train.py imports late
from fewshot.train import run as train_run
from fewshot.training.checkpoint import read
from fewshot.training.meta_learner import MetaLearner

DDP = (
    *("trainer=ddp", "trainer.accelerator=cpu", "meta_batch_size=4", "iterations=8"),
    *("val_every=4", "val_tasks=7", "test_tasks=6"),
)


def one_rank(rank, world, port, folder, cfg, overrides):
    """A run as torchrun would start it, which leaves its rank's tasks, first outer gradient and weights."""
    number = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    if world > 1:
        os.environ |= {name: str(value) for name, value in number.items()}
        os.environ |= {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    step, seen, weights = MetaLearner.training_step, [], []

    def watched(self, tasks, batch_idx):
        result = step(self, tasks, batch_idx)
        images = [task.double().numpy().tobytes() for task in tasks.query]
        seen.append((images, [parameter.grad.clone() for parameter in self.parameters()]))
        weights.append(torch.cat([parameter.detach().flatten() for parameter in self.parameters()]))
        return result

    MetaLearner.training_step = watched
    with Signals() as signals:
        train_run(cfg, Call(overrides, folder, signals))
    torch.save(seen[0][1], folder / f"gradient_{rank}.pt")
    torch.save(weights, folder / f"weights_{rank}.pt")
    (folder / f"tasks_{rank}.pickle").write_bytes(pickle.dumps([images for images, _ in seen]))


if __name__ == "__main__":  # a process that forks ranks, before anything has made threads of its own
    base, cache = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    figures.png = lambda figure: b"no picture"
    common = (*SMALL, f"dataset.cache={cache}", "logger=none", *DDP)
    for name, world, overrides in zip(sys.argv[3::3], map(int, sys.argv[4::3]), sys.argv[5::3], strict=True):
        call = [*{o.split("=")[0]: o for o in (*common, *overrides.split(), f"trainer.devices={world}")}.values()]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (base / name).mkdir()
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            cfg = compose("config", call)
        context = multiprocessing.get_context("fork")
        ranks = [context.Process(target=one_rank, args=(r, world, port, base / name, cfg, call)) for r in range(world)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        assert not any(process.exitcode for process in ranks)


def fork(folder, cache, *runs):
    """Runs (name, world, overrides): each by `world` processes, into folder/name."""
    folder.mkdir()
    call = [sys.executable, __file__, folder, cache, *(str(word) for run in runs for word in run)]
    path = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    subprocess.run(call, check=True, env=os.environ | {"PYTHONPATH": path})


CLIP_NORM = 0.05
WORLDS = {"small": (1, 4), "fomaml": (1, 2), "zero": (1, 2)}


@pytest.fixture(scope="module")
def runs(cache, tmp_path_factory):
    """The folder with the same run by one process and by several, named by what it is and their number.

    small: with rates that are learned too, images that are augmented and a gradient that is clipped, which a plain run
        has less of.
    fomaml, zero: for longer, with the default job's network.
    undisturbed: what a run that was killed is to end as.
    """
    wide = "model.width=64 iterations=20 val_every=20 val_tasks=2 test_tasks=2 test_steps=2"
    calls = {
        "small": f"algo=metasgd augment=standard clip_norm={CLIP_NORM}",
        "fomaml": wide,
        "zero": f"{wide} algo=zero",
    }
    folder = tmp_path_factory.mktemp("ranks") / "runs"
    every = (
        (f"{name}{world}", world, f"trainer.precision=64-true {calls[name]}")
        for name in calls
        for world in WORLDS[name]
    )
    fork(folder, cache, *every, ("undisturbed", 2, "seed=3"))
    return folder


def test_ranks_share_the_meta_batch_and_agree_with_one_process(runs):
    alone, shared, world = runs / "small1", runs / "small4", 4
    whole = pickle.loads((alone / "tasks_0.pickle").read_bytes())
    shares = [pickle.loads((shared / f"tasks_{rank}.pickle").read_bytes()) for rank in range(world)]
    assert len(whole) == 8 and len(set(whole[0])) == 4
    for iteration, tasks in enumerate(whole):
        assert [task for share in shares for task in share[iteration]] == tasks  # disjoint, and all of them
    ours, theirs = (read(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in (shared, alone))
    for name, expected in theirs.items():
        # Rounding grows from update to update, over 20 to 1.1e-8 in a small bias on an AMD EPYC.
        bound = 1e-7 if name.endswith("bias") else 1e-8
        assert (ours[name] - expected).norm() <= bound * expected.norm(), name
    columns = []
    for folder in (shared, alone):
        with open(folder / "metrics.csv", newline="") as file:
            columns.append(list(csv.DictReader(file)))
    for ours, theirs in zip(*columns, strict=True):
        assert {key: float(value) for key, value in ours.items() if value} == pytest.approx(
            {key: float(value) for key, value in theirs.items() if value}, rel=1e-6
        )
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (shared, alone))
    assert (ours["test"], ours["val"]) == (theirs["test"], theirs["val"])


@pytest.mark.parametrize("name", WORLDS)
def test_ranks_compute_the_gradient_of_one_process(runs, name):
    alone, world = WORLDS[name]
    expected = torch.load(runs / f"{name}{alone}" / "gradient_0.pt")
    for rank in range(world):
        for ours, theirs in zip(torch.load(runs / f"{name}{world}" / f"gradient_{rank}.pt"), expected, strict=True):
            assert (ours - theirs).norm() <= 1e-10 * theirs.norm()


def test_what_is_clipped_is_the_mean_gradient_of_all_ranks(runs):
    """Its norm is that which one process records, and above clip_norm."""
    with open(runs / "small4" / "metrics.csv", newline="") as file:  # compared with one process's above
        norms = [float(row["train/gradient_norm"]) for row in csv.DictReader(file) if row["train/gradient_norm"]]
    assert min(norms) > CLIP_NORM
    for rank in range(4):
        gradient = torch.cat([part.flatten() for part in torch.load(runs / "small4" / f"gradient_{rank}.pt")])
        assert gradient.norm().item() == pytest.approx(CLIP_NORM, rel=1e-4)  # of the first update, as it was taken


def test_ranks_and_one_process_part_without_zeroing_and_stay_together_with_it(runs):
    """Every update is the same but for rounding, which training without zeroing, being chaotic, makes large."""
    parted = {}
    for name in ("fomaml", "zero"):
        both = (torch.load(runs / f"{name}{world}" / "weights_0.pt") for world in WORLDS[name])
        parted[name] = [((ours - theirs).norm() / theirs.norm()).item() for theirs, ours in zip(*both, strict=True)]
        assert max(parted[name][:2]) <= 1e-10
    assert parted["zero"][19] <= 1e-8 < 1e-3 < parted["fomaml"][19]


def test_a_rank_that_dies_ends_its_job_and_the_sweep_given_again_goes_on_exactly(runs, program, main, capfd, tmp_path):
    """Two processes for the job of a sweep; one of them gets a real SIGKILL; one folder and one W&B run come of it."""
    sweep = tmp_path / "sweep"
    call = ("-m", *DDP, "trainer.devices=2", "seed=3", f"hydra.sweep.dir={sweep}")
    process = program(*call, halting=True)
    halt_when(process, lambda: any(read(path)["global_step"] >= 4 for path in sweep.glob("*/checkpoints/last.ckpt")))
    children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(process.pid)], capture_output=True, text=True)
    ranks = [int(line.split()[0]) for line in children.stdout.splitlines() if "-m fewshot.train" in line]
    environment = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in ranks]
    (victim,) = (pid for pid, has in zip(ranks, environment, strict=True) if b"RANK=1" in has)
    os.kill(victim, signal.SIGKILL)
    let_go(process)
    output, errors = process.communicate(timeout=HANG)
    assert process.returncode == 1 and "Traceback" not in errors, output + errors
    line = r"rank 1 of 2 was killed by SIGKILL, .*; the same call in this folder goes on from \S+last.ckpt"
    assert re.search(line, errors) and re.search(line, output)  # at once, and at the end of the sweep
    for pid in ranks:
        assert not Path(f"/proc/{pid}").exists()
    capfd.readouterr()
    status = main(*call, small=True)
    output, errors = capfd.readouterr()
    assert status == 0, output + errors
    (folder,) = (path for path in sweep.iterdir() if path.is_dir())
    ended, undisturbed = outcome(folder), outcome(runs / "undisturbed")
    for content in (ended, undisturbed):
        del content["results"]["config"]
    assert ended == undisturbed
    assert (sweep / "summary.csv").exists() and output.count("model of iteration") == 1
    names = {path.name.split("-")[-1] for path in folder.glob("wandb/offline-run-*")}
    assert len(names) == 1 and len(list(folder.glob("wandb/offline-run-*"))) == 2  # one run, begun twice


@pytest.mark.parametrize(
    ("ended", "said"),  # {rank: its exit status, and the line that it left}
    [
        ({0: (-6, ""), 1: (1, "no room")}, "rank 1 of 2: no room"),
        ({0: (-15, ""), 1: (3, "")}, "rank 1 of 2: ended with status 3, as its own lines tell"),
        ({0: (1, ""), 1: (-9, "")}, "rank 1 of 2 was killed by SIGKILL, which ends the run; nothing was trained yet"),
        ({0: (1, ""), 1: (143, "")}, "rank 0 of 2: ended with status 1, as its own lines tell"),
        ({0: (-15, ""), 1: (130, "")}, 130),
    ],
)
def test_the_rank_that_ended_a_run_is_told_and_the_next_run_can_start(main, tmp_path, monkeypatch, ended, said):
    calls = []

    def elastic_launch(config, entrypoint):
        def launch(*call):
            calls.append(call)
            for number, (_, line) in ended.items():
                monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"error{number}"))
                assert not line or leave_error(line)
            statuses = {number: status for number, (status, _) in ended.items()}
            failures = {n: ProcessFailure(n, 1, status, str(tmp_path / f"error{n}")) for n, status in statuses.items()}
            raise ChildFailedError("train", failures)

        return launch

    monkeypatch.setattr(launcher, "elastic_launch", elastic_launch)
    monkeypatch.setenv("PYTHONPATH", "mine")
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "9")
    (own := tmp_path / "conf").mkdir()
    assert main(f"--config-dir={own}", *DDP, "trainer.devices=2", f"hydra.run.dir={tmp_path}/run", small=True) == said
    assert PARENT not in os.environ and os.environ["PYTHONPATH"] == "mine"
    [call] = calls
    assert call[call.index("--config-dir") + 1] == str(own) and "trainer.devices=2" in call
    assert [word for word in call if word.startswith("hydra.run.dir=")] == [f"hydra.run.dir={tmp_path}/run"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process is not told that its parent has ended")
def test_a_rank_does_not_outlive_the_process_that_started_it():
    waits = "import time; from fewshot.processes.ranks import follow_parent; follow_parent(); "
    waits += "print('here', flush=True); time.sleep(20); print('outlived')"
    starts = f"import os, subprocess, sys; os.environ['{PARENT}'] = str(os.getpid()); "
    starts += f"subprocess.run([sys.executable, '-c', {waits!r}])"
    with subprocess.Popen([sys.executable, "-c", starts], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        process.kill()
        assert process.stdout.read() == b""  # which ends when the rank has
    orphan = subprocess.run([sys.executable, "-c", waits], env=os.environ | {PARENT: "0"}, capture_output=True)
    assert orphan.returncode == -signal.SIGTERM and orphan.stdout == b""


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["trainer=ddp", "trainer.devices=3"], "meta_batch_size=16: must be a multiple of 3"),
        (["trainer=ddp", "trainer.devices=4", "val_tasks=3"], "val_tasks=3: must be at least 4"),
        (["trainer=ddp", "trainer.devices=4", "test_tasks=3"], "test_tasks=3: must be at least 4"),
        (["trainer=ddp", "trainer.devices=auto"], "trainer.devices=auto: must be an integer"),
        (["trainer.devices=2"], "trainer.devices=2: use trainer=ddp trainer.devices=2"),
        (["trainer=ddp", "trainer.num_nodes=2"], "trainer.num_nodes=2: several machines need torchrun or srun"),
    ],
)
def test_what_does_not_divide_is_one_line(config, overrides, line):
    with pytest.raises(UserError, match=re.escape(line)):
        check(config(*overrides))


def test_processes_that_others_started_must_be_as_many_and_name_one_folder(config, main, monkeypatch, tmp_path, capsys):
    started = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="torchrun started 2 processes; use trainer=ddp"):
        check(config())
    check(config("trainer=ddp", "trainer.devices=2"))
    with monkeypatch.context() as patch:  # a shell that srun --pty started
        patch.delenv("TORCHELASTIC_RUN_ID")
        for name, value in {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"}.items():
            patch.setenv(name, value)
        with pytest.raises(
            UserError, match=r"srun started 8 processes; .*in a shell inside srun: unset SLURM_STEP_NUM"
        ):
            check(config())
        patch.setenv("SLURM_STEP_NUM_TASKS", "1")  # one that asked for a single task, or sbatch
        check(config())
        check(config("trainer=ddp", "trainer.devices=2"))
    for call, line in (
        (("trainer=ddp",), "hydra.run.dir: torchrun starts several processes; name their one folder"),
        (
            ("-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}"),
            "torchrun: a sweep starts the processes of its jobs itself",
        ),
    ):
        ended = main(*call, small=True)
        assert ended.startswith(line) and "\n" not in ended and capsys.readouterr() == ("", "")
