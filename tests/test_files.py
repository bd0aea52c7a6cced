"""Files are written whole, by one process at a time, and never through a link that somebody else left."""

import errno
import fcntl
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch

from fewshot import files
from fewshot.config.command import one_line_errors
from fewshot.data import cache
from fewshot.data.published import download
from fewshot.errors import UserError
from fewshot.files import exclusive
from fewshot.processes import ranks


def test_a_link_beside_a_file_is_not_written_through(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("mine")
    folder.mkdir()
    for name in (".report.html.part", "report.html", ".probe-1"):
        (folder / name).symlink_to(victim)
    files.write_atomically(folder / "report.html", lambda file: file.write(b"foreign"))
    files.check_writable("hydra.run.dir", folder)
    assert victim.read_text() == "mine" and (folder / "report.html").read_text() == "foreign"
    assert sorted(path.name for path in folder.iterdir()) == [".probe-1", ".report.html.part", "report.html"]


@pytest.mark.parametrize(
    "name",
    [
        *(".hydra", ".hydra/config.yaml", "checkpoints", "error.txt", "evidence", "figures", "train.log", "wandb"),
        *(".lock", ".lock-ranks", ".requeued"),
    ],
)
def test_a_link_in_place_of_a_runs_own_folder_or_file_is_refused(tmp_path, name):
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    path = tmp_path / "run" / name
    if name == ".hydra":
        path.rmdir()
    path.symlink_to(tmp_path / "elsewhere")
    line = f"{path}: is a link to {tmp_path / 'elsewhere'}; a run writes in its own folder alone, so remove it"
    for check, folder in ((files.refuse_links, "run"), (files.refuse_links_of_jobs, ".")):
        with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
            check(tmp_path / folder)
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_file_that_is_a_link_or_a_pipe_is_refused(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / ".lock").symlink_to(tmp_path / "victim")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / ".lock")
    for name in ("link", "pipe"):
        with pytest.raises(UserError, match=r"\.lock: .*remove it$"), ranks.locked(tmp_path / name):
            pass
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize("name", [".lock", ".photos.tar.part", ".photos.json.lock", ".photos-8x8x3-v4-val.npy.1.part"])
@pytest.mark.parametrize("kind", ["dangling", "link", "pipe"])
def test_what_stands_in_the_place_of_a_lock_or_a_part_in_the_cache_is_neither_written_nor_waited_for(
    tmp_path, name, kind
):
    (tmp_path / "photos").mkdir()
    place, victim = tmp_path / "photos" / name, tmp_path / "victim"
    if kind == "link":
        victim.write_text("mine")
    os.mkfifo(place) if kind == "pipe" else place.symlink_to(victim)
    line = rf"^{re.escape(str(place))}: is (a link to {re.escape(str(victim))}|no regular file); remove it$"
    if name.startswith(".photos-"):
        assert cache._save(tmp_path / "photos" / "photos.json", "key", (3, 8, 8), dict)
        assert os.path.lexists(place)
    else:
        with pytest.raises(UserError, match=line):
            if name == ".photos.json.lock":
                with exclusive(place, "makes photos"):
                    pass
            else:
                sources = {"photos.tar": ("file:///nowhere", "0")}
                arguments = {"folder": "photos", "cache": str(tmp_path), "holds": "the photos"}
                download("photos", ["photos.tar"], lambda: sources, **arguments)
    assert (victim.read_text() == "mine") if kind == "link" else not victim.exists()


@pytest.fixture(params=["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def no_locks(request, monkeypatch):
    """A file system without flock, as NFS and FUSE may be; what it says of that."""
    number = getattr(errno, request.param)

    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    return f"[Errno {number}] {os.strerror(number)}"


def test_where_nothing_can_be_locked_one_line_says_so_and_the_run_goes_on(tmp_path, no_locks, caplog):
    with ranks.locked(tmp_path / "run"):
        files.write_atomically(tmp_path / "run" / "last.ckpt", lambda file: file.write(b"1"))
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"hydra.run.dir={tmp_path / 'run'}: cannot be locked ({no_locks}); ")
    assert (tmp_path / "run" / "last.ckpt").read_bytes() == b"1"


def test_no_lock_of_unix_is_needed_to_import_what_locks():
    code = "import sys; sys.modules['fcntl'] = None; import fewshot.files, fewshot.data.published, fewshot.config.check"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_two_writers_at_once_lose_and_tear_nothing_where_there_are_no_locks(tmp_path, no_locks):
    test_two_writers_at_once_never_give_a_torn_file(tmp_path)
    (tmp_path / ".metrics.csv.0.part").touch()  # of a writer that is at work, as far as anyone can tell
    files.write_file(tmp_path / "metrics.csv", "1")
    assert (tmp_path / ".metrics.csv.0.part").exists()


def test_two_writers_at_once_never_give_a_torn_file(tmp_path):
    path, stop, seen = tmp_path / "metrics.csv", threading.Event(), set()
    files.write_atomically(path, lambda file: file.write(b"0" * 2**18))

    def write(letter):
        for _ in range(40):
            files.write_atomically(path, lambda file: [file.write(letter * 2**16) for _ in range(4)])

    def read():
        while not stop.is_set():
            content = path.read_bytes()
            seen.add((len(content), len(set(content))))

    writers = [threading.Thread(target=write, args=(letter,)) for letter in (b"1", b"2")]
    reader = threading.Thread(target=read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert seen == {(2**18, 1)}
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.csv"]


def test_what_a_killed_writer_left_is_removed_by_the_next_and_a_living_ones_file_is_not(tmp_path):
    """One is killed while it writes a cache file, one lives."""
    path = tmp_path / "images.json"
    code = (
        "import sys, time; from pathlib import Path; from fewshot.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as file:\n"
        "    file.write(b'part'); file.flush(); print('now', flush=True); time.sleep(600)"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) for _ in range(2)]
    try:
        assert all(writer.stdout.readline() for writer in writers)
        assert len(list(tmp_path.iterdir())) == 2
        writers[0].kill()
        writers[0].wait()
        assert cache._save(path, "key", (3, 8, 8), dict)
        assert len(list(tmp_path.iterdir())) == 2  # the cache file, and what the other one is writing
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def test_a_file_that_another_process_takes_for_a_leftover_is_left_to_it(tmp_path, monkeypatch):
    """It holds the lock, and has still to remove the file, when the writer asks for the lock."""
    taken = []

    def create_and_lose(path, mode):
        file = open(path, mode)  # noqa: SIM115
        if not taken:
            taken.append((path, os.open(path, os.O_RDWR)))
            assert files.lock_descriptor(taken[0][1], blocking=False)
        return file

    monkeypatch.setattr(files, "open", create_and_lose, raising=False)
    with files.replacing(tmp_path / "images.npy") as file:
        ((leftover, locked),) = taken
        leftover.unlink()
        os.close(locked)
        file.write(b"1")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("images.npy", b"1")]


def test_a_signal_while_a_file_is_written_leaves_nothing_and_names_may_have_any_letters(tmp_path):
    path = tmp_path / "sheet[1]\udcff.csv"
    (tmp_path / f".{path.name}.0.part").touch()  # of a writer that was killed
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, lambda file: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.iterdir())
    files.write_file(path, "\u00e9\udcff")
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [b"\xc3\xa9\\udcff"]


@pytest.mark.parametrize("gone", ["folder", "lock", "replaced"])
def test_a_run_whose_folder_was_removed_ends_in_one_line_and_makes_it_anew_nowhere(tmp_path, gone):
    folder = tmp_path / "run"
    with ranks.locked(folder):
        files.write_atomically(folder / "checkpoints" / "last.ckpt", lambda file: file.write(b"1"))
        if gone == "lock":
            (folder / ".lock").unlink()
        else:
            shutil.rmtree(folder)
        if gone == "replaced":
            with ranks.locked(folder):
                pass
        with pytest.raises(UserError, match=rf"^hydra\.run\.dir={folder}: was removed or replaced during the run"):
            files.write_atomically(folder / "checkpoints" / "last.ckpt", lambda file: file.write(b"2"))
    assert folder.exists() == (gone != "folder")
    assert (folder / "checkpoints" / "last.ckpt").exists() == (gone == "lock")
    with ranks.locked(folder):  # and the folder is free for another run
        files.write_atomically(folder / "checkpoints" / "last.ckpt", lambda file: file.write(b"3"))


def test_a_full_disk_is_named_in_one_line_by_whatever_meets_it(tmp_path, capsys):
    """torch.save reports it as a RuntimeError of its own words, logging as a traceback for each line."""
    kept = tmp_path / "last.ckpt"
    kept.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # errno EFBIG, in place of a disk of that size
    log = logging.FileHandler(tmp_path / "train.log")
    try:
        with pytest.raises(SystemExit) as ended, one_line_errors():
            for _ in range(3):
                log.emit(logging.makeLogRecord({"msg": "x" * 9000}))
            files.write_atomically(kept, lambda file: torch.save({"weights": torch.zeros(10_000)}, file))
        with pytest.raises(UserError, match=rf"^out={tmp_path}: cannot be written \(File too large\); name a folder"):
            files.check_writable("out", tmp_path)  # before a run begins
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        log.close()
    assert str(ended.value) == f"{kept}: cannot be written (File too large); make room there or name another folder"
    assert kept.read_bytes() == b"before" and capsys.readouterr().err == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "train.log"]
