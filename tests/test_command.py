"""The command `fewshot`: its words, its hints, and what it needs of the system that it runs on."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG, ROOT

from fewshot.__main__ import COMMANDS, help_text
from fewshot.errors import UserError
from fewshot.test import words_of_train

SCRIPT = Path(sys.executable).with_name("fewshot")
MODULE = (sys.executable, "-m", "fewshot")


def call(*words, cwd=None, **variables):
    """A finished process. The first word is a program."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "HYDRA"))}
    pipes = {"capture_output": True, "text": True, "timeout": HANG}
    return subprocess.run(list(map(str, words)), cwd=cwd, env=environment | variables, **pipes)


def test_every_command_is_the_main_of_its_module_with_a_line_of_help():
    for name, (module, sentence) in COMMANDS.items():
        assert callable(importlib.import_module(module).main)
        assert sentence.endswith(".") and f"\n{name} " in help_text() and f"{sentence}\n" in help_text()


@pytest.mark.parametrize("program", [(SCRIPT,), MODULE])
def test_help_imports_nothing_that_takes_time(program):
    program = program if program == MODULE else (sys.executable, "-X", "importtime", SCRIPT)
    for words in ((), ("--help",)):
        done = call(*program, *words)
        assert done.stdout == help_text() + "\n" and done.returncode == 0
        assert not {"torch", "hydra", "numpy", "pydantic"} & {
            line.split("|")[-1].strip() for line in done.stderr.splitlines()
        }


def test_a_mistyped_command_gets_its_neighbour_and_status_2(tmp_path):
    for program in ((SCRIPT,), MODULE):
        done = call(*program, "tran", "algo=zero", cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", "tran: no such command; did you mean train?\n")
    assert not any(tmp_path.iterdir())


def test_hints_name_the_command_as_it_was_called():
    programs = {(SCRIPT,): "fewshot sweep", MODULE: "python -m fewshot sweep"}
    programs |= {(sys.executable, "-m", "fewshot.sweep"): "python -m fewshot.sweep"}
    for program, name in programs.items():
        done = call(*program, *(["sweep"] if "fewshot.sweep" not in program else []))
        assert done.stderr == f"FOLDER...: is missing; {name} --help says what it is for\n"
    for program, name in {(SCRIPT, "train"): "fewshot train", (sys.executable, "train.py"): "python train.py"}.items():
        assert call(*program, "--help", cwd=ROOT).stdout.startswith(f"{name} KNOB=VALUE ...: trains")
    assert "It also takes the knobs of training, which fewshot train --help" in call(SCRIPT, "data", "--help").stdout


def test_test_is_train_with_a_checkpoint_and_nothing_to_fit():
    assert words_of_train(["RUN", "test_tasks=9"]) == ["checkpoint='RUN'", "fit=false", "test_tasks=9"]
    assert words_of_train(["a/b.ckpt", "-m", "x=1,2"]) == ["checkpoint=a/b.ckpt", "fit=false", "-m", "x=1,2"]
    assert words_of_train(["-m", "x=1", "checkpoint=a"]) == ["-m", "x=1", "checkpoint=a", "fit=false"]
    with pytest.raises(UserError, match=r"^RUN: is missing; write python -m fewshot\.test RUN, "):
        words_of_train(["test_tasks=9"])
    with pytest.raises(UserError, match=r"^fit=true: nothing is trained here; leave it out$"):
        words_of_train(["RUN", "fit=true"])


def test_ones_own_modules_in_the_current_folder_are_found_and_hide_no_others(tmp_path):
    program = f"import sys; sys.argv = [{str(SCRIPT)!r}, 'export', '--help']\n"
    program += "from fewshot.__main__ import main\ntry:\n    main()\nfinally:\n    print(sys.path[-1])"
    done = call(sys.executable, "-c", program, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == str(tmp_path), done.stderr
