"""A signal ends a run after the outer update at hand, and the run goes on from there as if nothing had happened."""

import os
import re
import signal
import sys
from contextlib import suppress

import pytest
from conftest import HANG, halt_when, let_go, outcome, runner

from fewshot.config.command import one_line_errors
from fewshot.errors import Stopped, UserError
from fewshot.processes.signals import Signals
from fewshot.training import checkpoint
from fewshot.training.meta_learner import MetaLearner
from fewshot.training.record import Record

MANY = ("iterations=9", "val_every=4", "trainer.log_every_n_steps=3")


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """What a run comes to that no signal reaches."""
    return outcome(runner(cache)(tmp_path_factory.mktemp("whole") / "run", *MANY))


def send(monkeypatch, signum, *, at, times=1, to=MetaLearner, when="training_step"):
    """Sends the signal to this process while the given call of a method is under way."""
    method, calls = getattr(to, when), 0

    def sending(self, *args):
        nonlocal calls
        calls += 1
        for _ in range(times if calls == at else 0):
            os.kill(os.getpid(), signum)
        return method(self, *args)

    monkeypatch.setattr(to, when, sending)


@pytest.mark.parametrize(
    "stops", [((signal.SIGTERM, 2), (signal.SIGINT, 8)), ((signal.SIGTERM, 4),), ((signal.SIGTERM, 9),)]
)
def test_the_update_is_finished_and_the_run_goes_on_exactly(run, whole, tmp_path, monkeypatch, stops):
    """Also one in the update after which validation is due, one in the last update, and two in one run."""
    done = 0
    for signum, at in stops:
        before = signal.getsignal(signum)
        with monkeypatch.context() as patch:
            send(patch, signum, at=at - done)
            with pytest.raises(Stopped) as stop:
                run(tmp_path / "run", *MANY)
        assert stop.value.signum == signum and signal.getsignal(signum) is before
        content = checkpoint.read(tmp_path / "run" / "checkpoints" / "last.ckpt")
        assert content["global_step"] == at and not (tmp_path / "run" / "results.json").exists()
        lines = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
        assert len(lines) - 1 == len(content["callbacks"]["Record"]["rows"])
        done = at
    assert outcome(run(tmp_path / "run", *MANY)) == whole


def test_a_second_sigint_leaves_at_once(run, tmp_path, monkeypatch):
    send(monkeypatch, signal.SIGINT, at=6, times=2)
    with pytest.raises(Stopped):
        run(tmp_path, *MANY)
    assert checkpoint.read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 4


def test_a_signal_before_or_after_training_leaves_at_once(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        send(patch, signal.SIGTERM, at=1, to=Record, when="on_train_start")
        with pytest.raises(Stopped):
            run(tmp_path / "early", *MANY)
    assert not (tmp_path / "early" / "checkpoints").exists()
    with monkeypatch.context() as patch:
        send(patch, signal.SIGTERM, at=1, when="test_step")
        with pytest.raises(Stopped):
            run(tmp_path / "late", *MANY)
    assert checkpoint.read(tmp_path / "late" / "checkpoints" / "last.ckpt")["global_step"] == 9


def test_a_handler_that_was_there_before_decides_once_the_checkpoint_is_written(run, whole, tmp_path, monkeypatch):
    """As submitit's: it lets SIGTERM pass, and ends the run itself at SIGUSR2."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    iterations = []

    def bypass(signum, frame):
        iterations.append(checkpoint.read(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"])

    def requeue(signum, frame):
        bypass(signum, frame)
        raise SystemExit(-1)

    handlers = {signal.SIGTERM: bypass, signal.SIGUSR2: requeue}
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        with monkeypatch.context() as patch:
            send(patch, signal.SIGTERM, at=3)
            assert outcome(run(tmp_path / "run", *MANY)) == whole and iterations == [3]
        (tmp_path / "run").rename(tmp_path / "bypassed")
        with monkeypatch.context() as patch:
            send(patch, signal.SIGUSR2, at=5)
            with pytest.raises(SystemExit):
                run(tmp_path / "run", *MANY)
        assert iterations == [3, 5]
        assert outcome(run(tmp_path / "run", *MANY)) == whole
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_the_warning_of_slurm_does_not_kill_a_process_whose_run_has_ended(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        with Signals():
            pass
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_while_a_run_ends_only_sigint_ends_it_sooner():
    with Signals():
        with pytest.raises(Stopped), suppress(Exception):  # as code on the way may do
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # while last.ckpt is written, for example
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGINT)


def test_of_an_array_the_one_job_is_put_back(monkeypatch, tmp_path):
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/calls\n')
    (tmp_path / "scontrol").chmod(0o755)
    here = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    for name, value in {**here, "PATH": f"{tmp_path}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Stopped), Signals(tmp_path):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert (tmp_path / "calls").read_text() == "requeue 7_3\n"


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2])  # the second is submitit's, which asks by itself
def test_a_job_that_gets_no_further_is_put_back_twice(monkeypatch, tmp_path, signum):
    """last.ckpt is written before the third time, so three more follow; then it is not written again."""
    calls = tmp_path / "calls"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    (tmp_path / "scontrol").chmod(0o755)
    for name, value in {"SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, value)

    def requeue(signum, frame):
        with open(calls, "a") as file:
            file.write("requeue 7\n")
        raise SystemExit(-1)

    last = tmp_path / "checkpoints" / "last.ckpt"
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGUSR1, signal.SIGUSR2)}
    try:
        signal.signal(signal.SIGUSR2, requeue)
        for time in range(5):
            if time == 2:
                last.parent.mkdir()
                last.touch()
            with pytest.raises((Stopped, SystemExit)), Signals(tmp_path):
                os.kill(os.getpid(), signum)
        with pytest.raises(UserError, match="put back into the queue 2 times without a new outer update") as error:  # noqa: SIM117
            with Signals(tmp_path):
                os.kill(os.getpid(), signum)
        assert "\n" not in str(error.value) and calls.read_text() == "requeue 7\n" * 5
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("step", ["escaped", "lenient", "record"])  # the folder was just made; Python's handler; ours
def test_a_call_that_is_stopped_before_it_wrote_anything_leaves_no_folder(step, main, tmp_path, monkeypatch, capsys):
    def stopped(*args):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(f"fewshot.config.hydra_call.{step}", stopped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
    try:
        assert main(f"hydra.run.dir={tmp_path}/new/run", small=True) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped by SIGINT" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize(("signum", "files"), [(signal.SIGINT, ("metrics.csv",)), (signal.SIGUSR1, ())])
def test_a_folder_with_results_or_of_a_job_in_the_queue_stays(signum, files, main, tmp_path, monkeypatch):
    def stopped(cfg, call):
        for name in files:
            (call.folder / name).touch()
        raise Stopped(signum)

    monkeypatch.setattr(sys.modules["fewshot.train"], "run", stopped)
    monkeypatch.setattr("fewshot.processes.signals._requeue", lambda: None)
    assert main(f"hydra.run.dir={tmp_path}/new", small=True) == 128 + signum
    assert (tmp_path / "new" / ".hydra" / "config.yaml").exists()


def test_the_exit_status_names_the_signal_and_a_line_says_how_to_go_on(program, tmp_path):
    process = program("iterations=100000", "val_every=3", f"hydra.run.dir={tmp_path}", halting=True)
    halt_when(process, lambda: checkpoint.read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] >= 3)
    process.terminate()
    let_go(process)
    output, errors = process.communicate(timeout=HANG)
    assert process.returncode == 143 and "Traceback" not in errors, errors
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert f"stopped by SIGTERM; python train.py checkpoint={last} goes on" in errors
    (written,) = re.findall(r"iteration (\d+)/100000  last.ckpt written", output)
    assert checkpoint.read(last)["global_step"] == int(written)
    assert "wandb sync" in output
    assert not (tmp_path / "results.json").exists()
    for stop in (Stopped(signal.SIGINT), KeyboardInterrupt()):
        with pytest.raises(SystemExit) as ended, one_line_errors():
            raise stop
        assert ended.value.code == 130
