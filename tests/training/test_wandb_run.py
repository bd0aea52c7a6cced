"""W&B is never told to upload what the user has told it to keep back."""

import importlib.util
import json
import os
import socket
import sys
from types import SimpleNamespace

import pytest
import wandb
from conftest import rows

from fewshot.errors import UserError
from fewshot.results import record_files
from fewshot.training import wandb_run


@pytest.mark.parametrize(
    ("asked", "told", "variables", "expected"),
    [
        (None, "online", {}, "online"),
        ("offline", "online", {}, "offline"),
        ("disabled", "online", {}, "disabled"),
        (None, "online", {"WANDB_DISABLED": "false"}, "online"),
        (None, "online", {"WANDB_DISABLED": "true"}, "disabled"),
        ("offline", "online", {"WANDB_DISABLED": "1"}, "disabled"),
        (
            "online",
            "online",
            {"WANDB_DISABLED": "true"},
            "logger.mode=online: WANDB_DISABLED=true asks W&B to",
        ),
        (None, "offline", {"WANDB_MODE": "offline"}, "offline"),
        (None, "dryrun", {"WANDB_MODE": "dryrun"}, "offline"),
        ("disabled", "offline", {"WANDB_MODE": "offline"}, "disabled"),
        ("online", "offline", {"WANDB_MODE": "offline"}, "logger.mode=online: WANDB_MODE=offline asks W&B to"),
        ("online", "offline", {}, "logger.mode=online: a settings file of W&B's asks W&B to upload nothing"),
        (None, "disabled", {}, "disabled"),
        ("offline", "online", {"WANDB_MODE": "online"}, "offline"),
    ],
)
def test_the_users_own_switches_of_wandb_come_first(asked, told, variables, expected, monkeypatch):
    """There is a key. told: what W&B makes of its settings files and WANDB_MODE."""
    for name in ("WANDB_MODE", "WANDB_DISABLED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = SimpleNamespace(mode=told, base_url="https://somewhere")
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=settings))
    monkeypatch.setattr(wandb, "login", lambda **options: True)
    monkeypatch.setattr(wandb_run, "_answers", lambda server: True)
    try:
        actual = wandb_run._mode(asked)
    except UserError as error:
        actual = str(error)
    assert actual.startswith(expected) and "\n" not in actual


@pytest.mark.parametrize("server", ["https://nowhere.invalid", "http://127.0.0.1:9", "the proxy"])
def test_a_key_without_network_is_offline_in_one_line_and_at_once(server, monkeypatch, caplog, tmp_path):
    """As on a cluster's nodes; nobody has asked for logger.mode=online."""
    for name in [name for name in os.environ if name.startswith("WANDB") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    if server == "the proxy":
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
        server = "https://127.0.0.1:9"
        monkeypatch.setattr(wandb_run.urllib.request, "proxy_bypass", lambda host: False)
    settings = SimpleNamespace(mode="online", base_url=server)
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=settings))
    monkeypatch.setattr(wandb, "login", lambda **options: True)
    monkeypatch.setattr(wandb_run, "PATIENCE", 1)
    assert wandb_run._mode(None) == "offline"
    assert caplog.messages == [f"W&B: there is an API key, but {server} cannot be reached; the run is kept offline"]
    assert wandb_run._mode("online") == "online"  # who has asked for it sees why it fails


def test_a_server_that_answers_is_one(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"127.0.0.1:{server.getsockname()[1]}"
        assert wandb_run._answers(f"http://{place}")
        monkeypatch.setattr(wandb_run.urllib.request, "proxy_bypass", lambda host: False)
        for proxy in (place, f"http://{place}"):  # as curl and urllib take both
            monkeypatch.setenv("https_proxy", proxy)
            assert wandb_run._answers("https://nowhere.invalid")


def test_without_a_key_only_an_explicit_wish_is_a_mistake(monkeypatch):
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=SimpleNamespace(mode="online")))
    monkeypatch.setattr(wandb, "login", lambda **options: False)
    assert wandb_run._mode(None) == "offline"
    with pytest.raises(UserError, match=r"logger\.mode=online: no API key"):
        wandb_run._mode("online")


def test_a_run_that_a_notebook_has_begun_is_left_alone(tmp_path):
    own = wandb.init(dir=tmp_path, project="own", mode="offline", settings=wandb.Settings(console="off", silent=True))
    silent = wandb.setup().settings.silent
    knobs = {"project": "fewshot", "mode": "offline", "group": None, "name": None, "run_id": "abcdefgh", "rows": []}
    with wandb_run.finished_run():
        logger = wandb_run.wandb_logger(**knobs, folder=tmp_path / "run", values={})
        assert wandb.run is own and logger.experiment.id == "abcdefgh"
        settings = logger.experiment.settings
        assert settings.disable_git and not settings.save_code and settings.console == "off"  # the user's code stays
        logger.log_metrics({"iteration": 1, "train/loss": 2.0}, step=1)
    with wandb_run.finished_run():  # of a call with logger=none
        pass
    assert logger.experiment._is_finished and wandb.setup().settings.silent == silent
    own.log({"mine": 1})
    assert wandb.run is own and not own._is_finished
    own.finish()
    assert len(list(tmp_path.glob("run/wandb/offline-run-*-abcdefgh"))) == 1


class Shown(BaseException):
    """Stands for a terminal that cannot show the table."""


def test_results_are_written_and_handed_to_the_logger_before_anything_is_shown(run, tmp_path, monkeypatch):
    def show(*arguments):
        raise Shown

    handed = []
    monkeypatch.setattr(record_files, "show", show)
    monkeypatch.setattr(wandb_run, "summarise", lambda logger, summary, content: handed.append(content))
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(Shown):
        run(tmp_path, "logger=wandb")
    assert handed[0]["test"] == json.loads((tmp_path / "results.json").read_text())["test"] and rows(tmp_path)
    wandb.teardown()  # it would keep the mode for the tests to come


def test_a_run_without_a_logger_does_without_wandb(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    spec = importlib.util.find_spec("fewshot.training.wandb_run")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert (run(tmp_path, "logger=none") / "results.json").exists()
