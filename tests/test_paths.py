"""Paths: a printed one can be pasted, a new one is nobody else's, a ~ is a home folder wherever it stands."""

import os
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fewshot.config.hydra_call import OutputFolder
from fewshot.config.tree import CONF
from fewshot.errors import UserError
from fewshot.files import at_home, checkpoint_file, claimed, escaped, in_shell, override, run_folder, user_path

SIGNS = "ab1.-_/ ,;:=[](){}<>'\"`~!@#$%^&*|?+\\\n\täé漢\u0301\udcff"  # the last: a byte that is no UTF-8


@settings(max_examples=100)
@given(st.text(SIGNS, min_size=1))
@example("runs/lr=0.1,seed=0")
@example("null")
@example("1e3")
@example("~/run")
@example("a/${now:%Y}/\\${b}")
@example("trailing\\")
@example("\\'")
@example("???")
def test_a_printed_path_comes_back_from_the_shell_and_from_hydra(text):
    path = os.path.normpath(text)
    (word,) = shlex.split(in_shell("checkpoint", path))
    (override,) = OverridesParser.create().parse_overrides([word])
    cfg = OmegaConf.create({override.key_or_group: override.value()})
    assert str(user_path("checkpoint", cfg.checkpoint)) == str(Path(path))
    assert Path(OmegaConf.create({"dir": escaped(path)}).dir) == Path(path)


def test_a_runs_folder_will_do_for_its_checkpoint(tmp_path, monkeypatch):
    file = tmp_path / "home" / "run" / "checkpoints" / "best.ckpt"
    file.parent.mkdir(parents=True)
    file.touch()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(file.parent)
    for place in (file, file.parent, file.parents[1], "~/run", "~/run/checkpoints/best.ckpt", "best.ckpt", "..", "."):
        assert os.path.samefile(checkpoint_file(place, "best"), file), place
        assert run_folder(checkpoint_file(place, "best")) == file.parents[1], place
        assert run_folder(user_path("checkpoint", place)) == file.parents[1], place
    (tmp_path / "loop").symlink_to("loop")
    for place, said in (
        (file.parent, "no checkpoints/last.ckpt in this folder; give the folder of a run or a .ckpt"),
        (tmp_path, "no checkpoints/last.ckpt in this folder"),
        ("", "is empty; give a path"),
        ("nowhere", "no such file or folder; give the folder of a run or a .ckpt"),
        (tmp_path / "loop", "no such file"),
        ("x" * 300, "no such file"),
        ("~no-such-user/x", "no home folder of that name; write the path out, or put ./ before it"),
    ):
        with pytest.raises(UserError) as error:
            checkpoint_file(place, "last")
        assert str(error.value).startswith(f"checkpoint={place}: {said}" if place else f"checkpoint=: {said}")


def test_of_many_at_once_each_gets_a_folder_of_its_own(tmp_path):
    with ThreadPoolExecutor(6) as pool:
        folders = list(pool.map(claimed, [tmp_path / "2026-01-01" / "10-00-00"] * 6))
    assert len(set(folders)) == 6 and all(folder.is_dir() for folder in folders)
    assert {folder.name for folder in folders} == {"10-00-00", *(f"10-00-00-{number}" for number in range(1, 6))}


def test_where_no_folder_can_be_made_is_one_line(tmp_path):
    (tmp_path / "outputs").touch()
    with pytest.raises(UserError, match=r"2026-01-01/10-00-00: cannot be made \(Not a directory\); name another"):
        claimed(tmp_path / "outputs" / "2026-01-01" / "10-00-00")


@pytest.mark.parametrize("kind", ["run", "sweep"])
@pytest.mark.slow
def test_a_folder_named_after_the_clock_is_ones_own_and_any_other_is_as_given(kind, tmp_path, monkeypatch):
    """A clock that stands still."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folders = []
    for name in ["${now:now}", "${now:now}", "${now:now}/~", "~/named", "~/named", "a=b, 'c'"]:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            knob = f"hydra.{kind}.dir"
            own = {"$": f"{knob}='{tmp_path}/{name}'", "~": f"{knob}='{name}'"}
            cfg = compose(
                "config",
                [own.get(name[0], override(knob, tmp_path / name)), "hydra.job.name=x"],
                return_hydra_config=True,
            )
            start = OutputFolder().on_run_start if kind == "run" else OutputFolder().on_multirun_start
            start(config=cfg, config_name="config")
            (again,) = OverridesParser.create().parse_overrides(OmegaConf.to_container(cfg.hydra.overrides.hydra)[-1:])
        folders.append(cfg.hydra[kind].dir)
        assert again.key_or_group == f"hydra.{kind}.dir" and Path(folders[-1]).is_dir()  # for the jobs of a sweep
        assert OmegaConf.create({"dir": again.value()}).dir == folders[-1]
    names = [os.path.relpath(folder, tmp_path) for folder in folders]
    assert names == ["now", "now-1", "now/~", "home/named", "home/named", "a=b, 'c'"]


def test_a_folder_that_hydra_would_read_as_a_knob_is_refused(tmp_path):
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        words = [override("hydra.run.dir", tmp_path / "${x}"), "hydra.job.name=x"]
        cfg = compose("config", words, return_hydra_config=True)
    with pytest.raises(SystemExit) as end:
        OutputFolder().on_run_start(config=cfg, config_name="config")
    assert (
        end.value.code
        == f"hydra.run.dir={tmp_path}/${{x}}: Hydra reads ${{ in a folder's path as a knob; name another place"
    )
    assert not list(tmp_path.iterdir())


def test_a_home_folder_is_found_for_every_knob_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["-m", "hydra.run.dir=~/a b", "checkpoint=~/c.ckpt", "ways=5", "dataset.root=~nobody-here/x", "seed=0,1"]
    expected = ["-m", f"hydra.run.dir='{tmp_path}/a b'", f"checkpoint={tmp_path}/c.ckpt", *words[3:]]
    assert at_home(words) == expected


@pytest.mark.parametrize("home", ["home", "h\u00f6me ${x}"])
def test_a_tilde_means_what_the_home_folder_written_out_means(home, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / home))

    def read(word):
        parser = OverridesParser.create()
        (override,) = parser.parse_overrides(at_home([f"dataset.root={word}"]))
        jobs = [f"key={value}" for value in override.sweep_string_iterator()] if override.is_sweep_override() else []
        values = [job.value() for job in parser.parse_overrides(jobs)] or [override.value()]
        return [OmegaConf.create({"seed": 3, "path": value}).path for value in values]

    home = str(tmp_path / home)
    assert read("~/a,~/b c,/d") == [f"{home}/a", f"{home}/b c", "/d"]
    assert read("~/s-${seed}") == [f"{home}/s-3"]
    assert read("~/it's") == [f"{home}/it's"] and read("~") == [home]
