"""Downloads from a real server on this machine, which sends parts, or breaks off, or is not there."""

import hashlib
import io
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from data_files import serving

from fewshot.data import published
from fewshot.data.published import download
from fewshot.errors import UserError

CONTENT = bytes(range(256)) * 2000
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def server(tmp_path, monkeypatch):
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "photos.tar").write_bytes(CONTENT)
    monkeypatch.setattr(published, "PAUSE", 0.0)
    with serving(tmp_path / "published") as server:
        yield server


@pytest.fixture
def get(server, tmp_path):
    def get(md5=MD5):
        sources = {"photos.tar": (f"{server.address}/photos.tar", md5)}
        cache = str(tmp_path / "cache")
        return download("Photos", ["photos.tar"], lambda: sources, folder="photos", cache=cache, holds="photos.tar")

    return get


def left(tmp_path):
    return {path.name: path.read_bytes() for path in (tmp_path / "cache" / "photos").iterdir()}


def test_downloads_once(server, get, tmp_path):
    assert get() == tmp_path / "cache" / "photos"
    assert left(tmp_path) == {"photos.tar": CONTENT}
    get()
    assert server.asked == [None]


def test_a_connection_that_breaks_is_taken_up_where_it_broke(server, get, tmp_path):
    server.breaks = [1000, 200_000]
    get()
    assert server.asked == [None, "bytes=1000-", "bytes=200000-"]
    assert left(tmp_path) == {"photos.tar": CONTENT}


def test_an_interrupted_download_is_continued_by_the_next_call(server, get, tmp_path):
    server.breaks = [300_000, 300_000]  # the second time nothing more comes
    with pytest.raises(
        UserError, match=r"^dataset\.root=null: downloading Photos .* ended after 300,000 of 512,000 .*$"
    ):
        get()
    assert left(tmp_path) == {".photos.tar.part": CONTENT[:300_000]}
    get()
    assert server.asked == [None, "bytes=300000-", "bytes=300000-"]
    assert left(tmp_path) == {"photos.tar": CONTENT}


def test_a_server_without_parts_sends_it_anew(server, get, tmp_path):
    server.ranges, server.breaks = False, [1000]
    get()
    assert server.asked == [None, "bytes=1000-"]
    assert left(tmp_path) == {"photos.tar": CONTENT}


def test_a_whole_part_needs_only_its_name(server, get, tmp_path):
    (tmp_path / "cache" / "photos").mkdir(parents=True)
    (tmp_path / "cache" / "photos" / ".photos.tar.part").write_bytes(CONTENT)
    get()
    assert left(tmp_path) == {"photos.tar": CONTENT}


def test_another_checksum_is_refused_and_nothing_is_left(server, get, tmp_path):
    wrong = "0" * 32
    with pytest.raises(UserError, match=rf"^dataset\.root=null: .*MD5 {MD5} instead of {wrong}.*set dataset\.root.*$"):
        get(wrong)
    assert left(tmp_path) == {}
    server.breaks = [100_000, 100_000]
    with pytest.raises(UserError):
        get()
    (tmp_path / "cache" / "photos" / ".photos.tar.part").write_bytes(
        b"x" * 100_000
    )  # a file that has changed meanwhile
    with pytest.raises(UserError, match="instead of"):
        get()
    assert left(tmp_path) == {}
    get()
    assert left(tmp_path) == {"photos.tar": CONTENT}


def test_no_such_file_and_no_server_are_one_line(server, get, tmp_path):
    (tmp_path / "published" / "photos.tar").unlink()
    with pytest.raises(UserError, match=r"^dataset\.root=null: downloading Photos into .* failed \(Not Found\); .*$"):
        get()
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"^dataset\.root=null: .*Connection refused.*; try again.*$"):
        get()


def test_no_room_is_one_line(server, get, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(UserError, match=r"^dataset\.root=null: .*dataset\.cache to a folder with room to write$"):
        get()


def test_several_at_once_download_it_once(server, get, tmp_path):
    with ThreadPoolExecutor(4) as workers:  # what locks them out of each other does so between processes, too
        places = [attempt.result() for attempt in [workers.submit(get) for _ in range(4)]]
    assert set(places) == {tmp_path / "cache" / "photos"}
    assert server.asked == [None]
    assert left(tmp_path) == {"photos.tar": CONTENT}


def test_a_terminal_sees_a_bar_and_a_file_none(server, get, tmp_path, monkeypatch, capsys):
    get()
    assert capsys.readouterr().out == ""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    published._fetch(f"{server.address}/photos.tar", MD5, tmp_path / "again.tar")
    assert "again.tar" in terminal.getvalue() and "512.0/512.0 kB" in terminal.getvalue()


@pytest.mark.parametrize("form", [{"key": "a.pkl", "checksum": "md5:12"}, {"filename": "a.pkl", "checksum": "12"}])
def test_zenodos_checksums(tmp_path, monkeypatch, form):
    (tmp_path / "api" / "records").mkdir(parents=True)
    (tmp_path / "api" / "records" / "7").write_text(json.dumps({"files": [form]}))
    with serving(tmp_path) as server:
        monkeypatch.setattr(published, "ZENODO", server.address)
        assert published.zenodo(7, {"b.pkl": "a.pkl"}) == {"b.pkl": (f"{server.address}/record/7/files/a.pkl", "12")}
        with pytest.raises(LookupError):
            published.zenodo(7, {"b.pkl": "c.pkl"})
