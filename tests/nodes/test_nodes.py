"""torchrun over two hosts: two network namespaces of this machine, a link between them, gloo over it, shared files."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import HALTING, HANG, ROOT, SMALL, halt_when, let_go, outcome

from fewshot.errors import Unreachable
from fewshot.training import ddp
from fewshot.training.checkpoint import read

on_hosts = pytest.mark.skipif(
    os.environ.get("FEWSHOT_TEST_HOSTS") != "1",
    reason="two hosts take two minutes, iproute2 and root: FEWSHOT_TEST_HOSTS=1 pytest tests/nodes",
)
CALL = (
    *SMALL,
    *("trainer=ddp", "trainer.accelerator=cpu", "trainer.num_nodes=2", "trainer.devices=1"),
    *("algo=zero", "trainer.precision=64-true", "iterations=20", "val_every=5", "logger=none"),
)
WAIT = 40  # seconds of trainer.strategy.timeout where a link goes down; as much later may the second host begin


@pytest.fixture
def hosts(request):
    """The name of two hosts, both without a process afterwards, and gone."""
    name = f"fs{os.getpid()}"
    try:
        subprocess.run([ROOT / "tests/nodes/hosts.sh", "up", name], check=True)
        yield name
    finally:
        subprocess.run([ROOT / "tests/nodes/hosts.sh", "down", name], check=True)


@contextmanager
def torchrun(hosts, folder, place, *overrides, restarts=0):
    """The same call on both hosts; host 0 halts at every last.ckpt, for `halt_when` and `let_go`.

    place: a folder that is made. restarts: how often torchrun starts the ranks again; then its hosts meet as they come,
    and without it they are numbered. Afterwards each process has what it wrote in .said.
    """
    place.mkdir()
    (place / "sitecustomize.py").write_text(HALTING)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "HYDRA"))}
    environment |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    processes = []
    for host in (0, 1):
        own = {"GLOO_SOCKET_IFNAME": f"{hosts}-{host}"}
        if not host:
            own |= {"PYTHONPATH": str(place), "FEWSHOT_TEST_HALTED": str(place / "halted")}
        meeting = ["--master-addr=10.77.0.1", "--master-port=29400", f"--node-rank={host}"]
        if restarts:
            meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400", f"--rdzv-conf=is_host={1 - host}"]
            meeting += [f"--local-addr=10.77.0.{host + 1}", f"--max-restarts={restarts}"]
        command = [
            *("ip", "netns", "exec", f"{hosts}-{host}", sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes=2", "--nproc-per-node=1", *meeting, ROOT / "train.py", *CALL, *overrides),
            f"hydra.run.dir={folder}",
        ]
        with open(place / f"{host}.err", "w") as errors:
            processes.append(subprocess.Popen(command, stdout=errors, stderr=errors, env=environment | own))
    processes[0].halted = place / "halted"
    yield processes
    for host, process in enumerate(processes):
        process.wait(HANG)
        process.said = (place / f"{host}.err").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    """What two hosts come to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    name = f"fs{os.getpid()}u"
    subprocess.run([ROOT / "tests/nodes/hosts.sh", "up", name], check=True)
    try:
        with torchrun(name, folder / "run", folder / "place", f"dataset.cache={cache}") as processes:
            (folder / "place" / "halted.free").touch()
        assert not any(process.returncode for process in processes), [process.said for process in processes]
    finally:
        subprocess.run([ROOT / "tests/nodes/hosts.sh", "down", name], check=True)
    return folder / "run"


@on_hosts
def test_two_hosts_come_to_the_weights_of_one_process(undisturbed, run, tmp_path):
    alone = run(tmp_path, *(knob for knob in CALL if "trainer" not in knob), "trainer.precision=64-true")
    ours, theirs = (read(folder / "checkpoints" / "last.ckpt") for folder in (undisturbed, alone))
    assert ours["global_step"] == theirs["global_step"] == 20
    for name, expected in theirs["state_dict"].items():
        assert (ours["state_dict"][name] - expected).norm() <= 1e-8 * expected.norm(), name


@on_hosts
def test_a_link_that_goes_down_and_a_rank_that_is_killed_change_nothing(undisturbed, hosts, cache, tmp_path):
    """Both hosts end in one line within trainer.strategy.timeout. Given again, the call goes on; torchrun restarts."""
    folder = tmp_path / "run"
    last = folder / "checkpoints" / "last.ckpt"
    own = (f"dataset.cache={cache}", f"trainer.strategy.timeout={WAIT}")
    with torchrun(hosts, folder, tmp_path / "first", *own) as processes:
        halt_when(processes[0], lambda: read(last)["global_step"] >= 5)
        subprocess.run(["ip", "-n", f"{hosts}-1", "link", "set", f"{hosts}-1", "down"], check=True)
        began = time.monotonic()
        let_go(processes[0])
    assert time.monotonic() - began < 10 * WAIT
    for host, process in enumerate(processes):
        lines = re.findall(rf"^rank {host} of 2 on \S+ lost the others \(.*$", process.said, re.MULTILINE)
        assert process.returncode == 1 and len(lines) == 1, process.said
        assert "the same call goes on from last.ckpt" in lines[0] and "trainer.strategy.timeout" in lines[0]
    assert read(last)["global_step"] == 5
    subprocess.run(["ip", "-n", f"{hosts}-1", "link", "set", f"{hosts}-1", "up"], check=True)
    with torchrun(hosts, folder, tmp_path / "again", *own[:1], restarts=1) as processes:
        halt_when(processes[0], lambda: read(last)["global_step"] >= 10)
        (victim,) = ranks_on(f"{hosts}-1")
        os.kill(victim, signal.SIGKILL)
        let_go(processes[0])
    assert not any(process.returncode for process in processes), [process.said for process in processes]
    ended, whole = outcome(folder), outcome(undisturbed)
    for content in (ended, whole):
        content["results"]["config"]["trainer"]["strategy"].pop("timeout")
    assert ended == whole


def ranks_on(host):
    """The processes of a host that train."""
    processes = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True, check=True).stdout
    words = {int(number): Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0") for number in processes.split()}
    return [number for number, call in words.items() if b"torch.distributed.run" not in call]


@pytest.mark.parametrize(("rank", "host"), [("0", "nowhere.invalid"), ("1", "nowhere.invalid"), ("1", "127.0.0.1")])
def test_a_machine_that_cannot_be_reached_is_one_line_in_bounded_time(rank, host, monkeypatch):
    """Rank 0 looks up its own machine's name, too."""
    started = {"TORCHELASTIC_RUN_ID": "x", "RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
    for name, value in (started | {"MASTER_ADDR": host, "MASTER_PORT": "9"}).items():
        monkeypatch.setenv(name, value)
    what = {"nowhere.invalid": "which is no name that is known here; give torchrun --local-addr=ADDRESS there"}
    with pytest.raises(
        Unreachable, match=what.get(host, r"127.0.0.1:9 did not answer within .*timeout=1 seconds")
    ) as error:
        ddp.TasksOverRanks(timeout=1, cluster_environment=ddp.cluster()).setup_distributed()
    assert "\n" not in str(error.value) and str(error.value).startswith(f"rank {rank} of 2 on ")


@on_hosts
def test_without_a_loopback_address_several_processes_are_one_line(cache, tmp_path):
    """In a network namespace of its own that address is there only once it is brought up."""
    call = [*CALL, "trainer.num_nodes=1", "trainer.devices=2", f"dataset.cache={cache}", f"hydra.run.dir={tmp_path}"]
    command = ["unshare", "-n", sys.executable, ROOT / "train.py", *(o for o in call if o != "trainer.num_nodes=2")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert re.match(r"trainer.devices=2: .* meet at 127.0.0.1, which cannot be reached \(.*\); ip link", ended.stderr)
