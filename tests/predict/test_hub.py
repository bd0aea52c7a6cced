"""Models on a hub: a small server on the loopback address that answers as huggingface.co does."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from conftest import HANG
from omegaconf import OmegaConf

import fewshot
from fewshot.errors import UserError
from fewshot.files import write_file
from fewshot.predict import hub as hub_module
from fewshot.predict.find import MODELS, names
from fewshot.push import main

huggingface_hub = pytest.importorskip("huggingface_hub")

TOKEN = "hf_secretSecretSecret"
FILES = ("README.md", "config.yaml", "model.safetensors")
# A program of its own, since the library reads its settings when it is imported.
CODE = """
import sys
from fewshot.config.command import one_line_errors
from fewshot.predict.find import find
with one_line_errors():
    print(find(sys.argv[1]))
"""


class Hub(NamedTuple):
    """files: of each commit, {name: bytes}, the newest last; asked: (method, path, whether with the token)."""

    address: str
    files: dict[str, dict[str, bytes]]
    asked: list[tuple[str, str, bool]]
    sizes: dict[str, int]  # what is said of a file in place of its size


class Answers(BaseHTTPRequestHandler):
    protocol_version, hub = "HTTP/1.1", None

    def log_message(self, *words: object) -> None:
        pass

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content)

    def note(self) -> bool:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.hub.asked.append((self.command, self.path, known))
        return known

    def do_GET(self) -> None:
        if self.path.startswith("/api/"):  # what the library asks before it gives up, or of what calls it
            return self.answer(401)
        self.note()
        _, org, name, _, revision, file = self.path.split("/")
        commits = self.hub.files
        commit = list(commits)[-1] if revision == "main" and commits else revision
        if (org, name) != ("lab", "model") or not commits:
            self.answer(404, X_Error_Code="RepoNotFound")
        elif commit not in commits:
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"no such {self.headers}")
        elif file not in commits[commit]:
            self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        else:
            content = commits[commit][file]
            etag, size = hashlib.sha256(content).hexdigest(), self.hub.sizes.get(file, len(content))
            self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=commit, X_Linked_Size=str(size))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        known, body = self.note(), self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/validate-yaml":
            self.answer(200, b'{"errors": [], "warnings": []}')
        elif not known:  # a server need not be discreet
            self.answer(401, json.dumps({"error": f"no rights for {self.headers['Authorization']}"}).encode())
        elif self.path == "/api/repos/create":
            assert json.loads(body) | {"name": "model", "organization": "lab"} == json.loads(body)
            self.answer(200, json.dumps({"url": f"{self.hub.address}/lab/model"}).encode())
        elif self.path == "/api/models/lab/model/preupload/main":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, json.dumps({"files": files}).encode())
        else:
            assert self.path == "/api/models/lab/model/commit/main"
            parts = [json.loads(line) for line in body.splitlines()]
            files = {
                part["value"]["path"]: base64.b64decode(part["value"]["content"])
                for part in parts
                if part["key"] == "file"
            }
            commit = hashlib.sha1(body).hexdigest()
            self.hub.files[commit] = files
            self.answer(
                200,
                json.dumps(
                    {"commitUrl": f"{self.hub.address}/lab/model/commit/{commit}", "commitOid": commit}
                ).encode(),
            )


@pytest.fixture
def hub() -> Iterator[Hub]:
    class Handler(Answers):
        pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Handler.hub = Hub(f"http://127.0.0.1:{server.server_port}", {}, [], {})
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Handler.hub
    server.shutdown()
    server.server_close()


def call(hub: Hub, home: Path, *command: str, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_TOKEN": token} if token else {}
    done = subprocess.run(
        [sys.executable, *command], env=kept | settings, cwd=home, capture_output=True, text=True, timeout=HANG
    )
    assert TOKEN not in done.stdout + done.stderr
    return done


def push(hub: Hub, home: Path, *words: str, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    return call(hub, home, "-m", "fewshot.push", *words, token=token)


def find(hub: Hub, home: Path, address: str, token: str | None = None) -> subprocess.CompletedProcess:
    return call(hub, home, "-c", CODE, address, token=token)


def on_hub(hub: Hub, folder: Path, commit: str = "a" * 40) -> None:
    hub.files[commit] = {name: (folder / name).read_bytes() for name in FILES}


def test_a_model_goes_to_the_hub_and_comes_back(hub, tmp_path):
    name = names()[0]
    done = push(hub, tmp_path, name, "repo=lab/model")
    assert done.returncode == 0, done.stderr
    ((commit, files),) = hub.files.items()
    assert files == {file: (MODELS / name / file).read_bytes() for file in FILES}
    assert done.stdout == f"Written to the hub; fewshot.load('hf://lab/model@{commit}') reads it\n"
    hub.asked.clear()
    done = find(hub, tmp_path, f"hf://lab/model@{commit}")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert not any(with_token for _, _, with_token in hub.asked)
    assert {path.rsplit("/", 1)[1] for method, path, _ in hub.asked if method == "GET"} == {*FILES}
    ours, theirs = fewshot.load(name), fewshot.load(folder)
    assert theirs.config == ours.config
    assert all(weights.equal(theirs.learner.state_dict()[key]) for key, weights in ours.learner.state_dict().items())
    hub.asked.clear()
    assert find(hub, tmp_path, f"hf://lab/model@{commit}").returncode == 0
    assert not hub.asked  # a revision does not change


def test_without_a_revision_it_is_the_newest_and_all_files_are_of_one(hub, tmp_path):
    on_hub(hub, MODELS / names()[0])
    on_hub(hub, MODELS / names()[1], "b" * 40)
    folder = Path(find(hub, tmp_path, "hf://lab/model").stdout.strip())
    assert folder.name == "b" * 40
    assert all((folder / file).read_bytes() == (MODELS / names()[1] / file).read_bytes() for file in FILES)


@pytest.fixture
def downloads(monkeypatch):
    """(sizes, asked): the library answers with these sizes; what it was asked for, of which revision."""
    sizes, asked = dict.fromkeys(FILES, 10), []

    def answer(repository, name, revision, dry_run=False):
        asked.append((name, revision))
        return SimpleNamespace(file_size=sizes[name], commit_hash=revision or "a" * 40) if dry_run else f"/hub/{name}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", answer)
    return sizes, asked


def test_a_commit_while_it_is_downloaded_does_not_mix_two_revisions(downloads):
    hub_module.download("hf://lab/model")
    assert [revision for _, revision in downloads[1]] == [None] + ["a" * 40] * 5


@pytest.mark.parametrize(("name", "most"), [("config.yaml", 2**18), ("README.md", 2**20), ("model.safetensors", 2**31)])
def test_no_file_above_its_limit_is_downloaded(name, most, downloads):
    downloads[0][name] = most
    hub_module.download("hf://lab/model")
    for size in (most + 1, None):
        downloads[0][name] = size
        downloads[1].clear()
        with pytest.raises(UserError, match=f"its {name} has {size} bytes, and may have {most}$"):
            hub_module.download("hf://lab/model")
        assert len(downloads[1]) <= len(FILES)  # what was asked for is sizes alone


@pytest.mark.parametrize("address", ["hf://lab", "hf://lab/../model", "hf://lab/model@../x", "hf://lab/model/x"])
def test_what_is_no_address_is_one_line(address):
    with pytest.raises(UserError, match=f"^model={address}: must be hf://ORG/NAME or hf://ORG/NAME@REVISION$"):
        fewshot.load(address)


@pytest.mark.parametrize(
    ("address", "line"),
    [
        (
            "hf://lab/other",
            "the hub answers 404 (RepositoryNotFoundError); check the name, and log in by hf auth login",
        ),
        ("hf://lab/model@v7", "the hub answers 404 (RevisionNotFoundError)"),
        ("hf://lab/model", "its model.safetensors has 99999999999 bytes, and may have 2147483648"),
    ],
)
def test_what_cannot_be_downloaded_is_one_line(address, line, hub, tmp_path):
    on_hub(hub, MODELS / names()[0])
    hub.sizes["model.safetensors"] = 99_999_999_999
    done = find(hub, tmp_path, address, token=TOKEN)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"model={address}: {line}"), done.stderr
    assert "Traceback" not in done.stderr and not [path for method, path, _ in hub.asked if method == "GET"]


def test_a_file_that_is_missing_or_a_hub_that_is_gone_is_one_line(hub, tmp_path):
    on_hub(hub, MODELS / names()[0])
    del hub.files["a" * 40]["config.yaml"]
    done = find(hub, tmp_path, "hf://lab/model")
    assert "the hub answers 404 (RemoteEntryNotFoundError)" in done.stderr.splitlines()[-1]
    gone = hub._replace(address="http://127.0.0.1:9")
    done = push(gone, tmp_path, names()[0], "repo=lab/model")
    assert done.stderr.splitlines()[-1] == "repo=lab/model: the hub cannot be asked (ConnectError); check the network"


def test_what_a_downloaded_configuration_names_is_not_called(hub, tmp_path):
    on_hub(hub, MODELS / names()[0])
    config = OmegaConf.create(hub.files["a" * 40]["config.yaml"].decode())
    config.model.network = {"_target_": "os.mkdir", "path": str(tmp_path / "MARK")}
    hub.files["a" * 40]["config.yaml"] = OmegaConf.to_yaml(config).encode()
    folder = find(hub, tmp_path, "hf://lab/model").stdout.strip()
    with pytest.raises(UserError, match=r"calls os\.mkdir, and loading would run that"):
        fewshot.load(folder)
    assert not (tmp_path / "MARK").exists()


def test_what_cannot_be_pushed_is_one_line(trained, tmp_path, monkeypatch):
    """And said before the hub is asked for anything."""
    monkeypatch.chdir(tmp_path)
    for name in FILES:
        write_file(tmp_path / "bad" / name, (MODELS / names()[0] / name).read_bytes())
    write_file(tmp_path / "bad" / "README.md", "---\nmodel-index: [{name: x}]\ntags: [\n---\n")
    write_file(tmp_path / "lacking" / "model.safetensors", "")
    shutil.copytree(tmp_path / "bad", tmp_path / "large")
    os.truncate(tmp_path / "large" / "config.yaml", 2**18 + 1)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    for words, line in (
        ([names()[0]], "repo: is missing; give repo=ORG/NAME"),
        ([names()[0], "repo=model"], "repo=model: must be ORG/NAME"),
        ([str(trained), "repo=lab/model"], f"model={trained}: is a run's, with what only training needs; python"),
        (["bad", "repo=lab/model"], "model=bad/README.md: is no card that the hub takes (ParserError)"),
        (["lacking", "repo=lab/model"], "model=lacking/config.yaml: no such file"),
        (["large", "repo=lab/model"], "model=large: its config.yaml has 262145 bytes, and may have 262144"),
        ([names()[0], "repo=lab/model"], "repo=lab/model: the hub takes models of those who are logged in; call hf"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code.startswith(line) and "\n" not in stop.value.code


@pytest.mark.parametrize(("words", "private"), [(["private=true"], True), (["private=false"], False), ([], None)])
def test_a_new_repository_is_private_where_that_is_asked_for(words, private, monkeypatch):
    made = []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    monkeypatch.setattr(huggingface_hub.ModelCard, "load", lambda path: None)  # which asks the hub
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda repository, **knobs: made.append(knobs["private"]))
    monkeypatch.setattr(huggingface_hub, "create_commit", lambda *_, **__: SimpleNamespace(oid="a" * 40))
    main([names()[0], "repo=lab/model", *words])
    assert made == [private]


def test_a_push_that_is_refused_does_not_show_the_token(hub, tmp_path):
    done = push(hub, tmp_path, names()[0], "repo=lab/model", token="hf_other")
    line = (
        "repo=lab/model: the hub answers 401 (HfHubHTTPError); check the name, and log in by hf auth login with a token"
    )
    assert done.returncode == 1 and done.stderr.startswith(line) and done.stderr.count("\n") == 1
    assert "hf_other" not in done.stderr and not hub.files


def test_without_the_library_a_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError) as stop:
        fewshot.load("hf://lab/model")
    assert str(stop.value) == (
        "model=hf://lab/model: needs huggingface_hub; uv sync --extra hub, or pip install huggingface_hub"
    )


@pytest.mark.parametrize("name", names())
def test_the_hubs_own_reader_takes_the_card(name):
    """Its checker of the whole is at the hub alone; this is what its library checks of what it sends there."""
    card = huggingface_hub.ModelCard.load(MODELS / name / "README.md")
    off, on = card.data.eval_results
    assert (off.metric_type, off.dataset_split) == (
        "accuracy",
        "test",
    ) and 0.2 < off.metric_value <= on.metric_value + 0.05
    again = huggingface_hub.repocard_data.eval_results_to_model_index(card.data.model_name, card.data.eval_results)
    assert again == huggingface_hub.metadata_load(MODELS / name / "README.md")["model-index"]
    assert huggingface_hub.ModelCard(str(card)).data.to_dict() == card.data.to_dict()
