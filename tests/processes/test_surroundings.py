"""What notebooks, IDEs and clusters export, and who reads the output, do not decide whether a command succeeds."""

import importlib
import io
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
from conftest import ROOT, SMALL

from fewshot.processes.surroundings import keep_memory, lenient

OTHERS = {  # for other programs
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYTHONIOENCODING": "ascii",
    **{"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "1"},
    **{"PL_TRAINER_FAST_DEV_RUN": "1", "PL_TRAINER_LIMIT_TEST_BATCHES": "0"},
    **{"COLUMNS": "10", "TERM": "dumb", "CUDA_VISIBLE_DEVICES": "", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"},
    "HYDRA_MAIN_MODULE": "somebody.elses",
}
COMMANDS = (["train.py"], *(["-m", f"fewshot.{name}"] for name in ("sweep", "predict", "export", "data", "evidence")))


def start(words, folder, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "HYDRA_"))}
    words = [ROOT / word if word == "train.py" else word for word in words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *words], cwd=folder, env=environment | variables, **pipes)


def test_a_run_succeeds_in_an_environment_made_for_others_though_nobody_reads_it_to_the_end(tmp_path, cache):
    """And uploads nothing, with a key at hand: the user has told W&B not to; and does without learn2learn."""
    folder = tmp_path / "a run, zoé's"
    quoted = str(folder).replace("'", "\\'")
    call = [*SMALL, "engine=batched", f"dataset.cache={cache}", f"hydra.run.dir='{quoted}'"]
    (tmp_path / "learn2learn.py").write_text("raise ImportError('it is only for engine=sequential')")
    variables = OTHERS | {"WANDB_DISABLED": "true", "WANDB_API_KEY": "k" * 40, "PYTHONPATH": str(tmp_path)}
    process = start(["train.py", *call], tmp_path, **variables)
    first = process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait() == 0, errors
    assert first and "ignored; torchrun, srun or trainer=ddp start several processes" in errors
    assert errors.count("\n") == 1
    results = json.loads((folder / "results.json").read_text())
    assert results["iterations"] == 6 and results["test"]["tasks"] == 3
    said = (folder / "train.log").read_text(encoding="utf-8")
    *_, where, result = said.splitlines()
    assert where == f"Written to {folder}" and "±" in result and "WANDB_DISABLED=true" in said


def said(program, **variables):
    """What a fresh process prints that has called settle()."""
    words = [sys.executable, "-c", f"from fewshot.processes.surroundings import settle; settle(); {program}"]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP", "GOMP", "MALLOC", "MPL"))
    }
    return subprocess.run(words, env=environment | variables, capture_output=True, text=True, check=True).stdout.strip()


def test_without_a_home_folder_matplotlibs_files_are_temporary_and_it_says_nothing():
    """In a fresh process, where its own import would warn; a user's own folder for them stays."""
    folders = (
        "import os, matplotlib as m; print(os.environ.get('MPLCONFIGDIR')); print(m.get_configdir(), m.get_cachedir())"
    )
    nowhere = {"HOME": "/dev/null", "XDG_CONFIG_HOME": "", "XDG_CACHE_HOME": ""}
    first, second = said(f"import sys; sys.stderr = sys.stdout; {folders}", **nowhere).splitlines()
    assert os.path.basename(first).startswith("matplotlib-") and second == f"{first} {first}"
    assert not os.path.exists(first)
    assert said("import os; print(os.environ['MPLCONFIGDIR'])", MPLCONFIGDIR="/own", **nowhere) == "/own"


def test_threads_that_wait_sleep_unless_the_user_wants_otherwise():
    assert said("import os; print(os.environ['OMP_WAIT_POLICY'])") == "PASSIVE"
    assert said("import os; print(os.environ['OMP_WAIT_POLICY'])", OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
    assert said("import os; print(os.environ.get('OMP_WAIT_POLICY'))", GOMP_SPINCOUNT="7") == "None"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is kept by glibc's mallopt")
def test_memory_that_is_asked_for_again_and_again_is_faulted_in_once():
    """Eight megabytes, forty times: 2,048 pages each. A user's own setting of the allocator is left alone."""
    loop = "import resource\nfor _ in range(40): bytearray(b'x' * 2**23)\n"
    count = f"exec({loop + 'print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)'!r})"
    assert int(said(count)) < 30_000 < int(said(count, MALLOC_ARENA_MAX="8"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is kept by glibc's mallopt")
def test_memory_that_was_kept_is_given_back():
    """Of 512 blocks of 256 KiB every second one is freed: 64 MiB, which no block on top of the heap can hide."""
    resident = "int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGESIZE') / 2**20"
    program = (
        "import os; from fewshot.processes.surroundings import give_memory_back; blocks = [bytearray(b'x' * 2**18) "
        f"for _ in range(512)]; del blocks[::2]; kept = {resident}; give_memory_back(); print(kept - {resident})"
    )
    assert float(said(program)) > 60


@pytest.mark.parametrize("libc", ["glibc", "musl", ""])  # Linux, Alpine, macOS
@pytest.mark.parametrize(
    "name, value", [("MALLOC_TOP_PAD_", "0"), ("GLIBC_TUNABLES", "glibc.malloc.top_pad=0"), ("A", "")]
)
def test_the_allocator_is_told_on_glibc_alone_and_only_what_the_user_has_not_said(monkeypatch, libc, name, value):
    told = []
    monkeypatch.setattr("platform.libc_ver", lambda: (libc, "2"))
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(mallopt=lambda *setting: told.append(setting) or 1))
    for other in [other for other in os.environ if other.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    keep_memory()
    assert bool(told) == (libc == "glibc" and name == "A")


def test_where_only_the_runs_folder_can_be_written_temporary_files_go_there(monkeypatch, tmp_path):
    """As in a container whose root is read-only: matplotlib would end in a traceback."""
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", "/nowhere")
    lenient(tmp_path)
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(tmp_path)


def test_letters_that_a_terminal_lacks_are_replaced_there_and_written_to_the_log_file(monkeypatch, tmp_path):
    terminal, handler = io.TextIOWrapper(io.BytesIO(), "ascii"), logging.FileHandler(tmp_path / "log", encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    lenient(tmp_path)
    print("90 ± 1", flush=True)
    logging.getLogger().warning("90 ± 1")
    handler.close()
    assert terminal.buffer.getvalue() == b"90 ? 1\n" and (tmp_path / "log").read_text(encoding="utf-8") == "90 ± 1\n"


def test_a_line_of_an_error_is_said_at_once():
    assert said("import sys; print(sys.stderr.line_buffering or sys.stderr.write_through)") == "True"


def test_help_of_every_command_may_be_cut_short_by_its_reader(tmp_path):
    started = [start([*words, "--help"], tmp_path, **OTHERS) for words in COMMANDS]
    for words, process in zip(COMMANDS, started, strict=True):
        process.stdout.close()  # before anything is said
        errors = process.stderr.read().decode()
        assert process.wait() == 0 and errors.count("\n") == 1, (words, errors)
        assert "ignored; torchrun" in errors


@pytest.mark.parametrize("command", ["export", "evidence.__main__"])
def test_help_tells_of_every_parameter(main, capsys, command):
    assert not main("--help", command=importlib.import_module(f"fewshot.{command}").main)
    said, errors = capsys.readouterr()
    assert errors == "" and "powered by Hydra" not in said
    for knob in ("checkpoint=PATH", "out=FOLDER" if command == "export" else "hydra.run.dir=FOLDER"):
        (line,) = (line for line in said.splitlines() if line.startswith(knob))
        assert len(line.removeprefix(knob).split()) > 3


GROUND_FLOORS = """
import importlib, pkgutil, signal, sys
import fewshot
del signal.SIGUSR1, signal.SIGUSR2  # as on a system without them
sys.modules["fcntl"] = None
names = ["errors", "files", "inner_loop"]
for package in ("config", "processes", "results", "sweep"):
    places = importlib.import_module(f"fewshot.{package}").__path__
    names += [f"{package}.{module.name}" for module in pkgutil.iter_modules(places)]
for name in names:
    importlib.import_module(f"fewshot.{name}")
print([name for name in ("torch", "pytorch_lightning", "wandb") if name in sys.modules], len(names))
"""


def test_the_ground_floors_import_no_torch_and_need_no_posix_signals():
    imported, number = said(f"exec({GROUND_FLOORS!r})").rsplit(" ", 1)
    assert imported == "[]" and int(number) > 15
