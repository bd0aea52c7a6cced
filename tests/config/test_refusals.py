"""Calls that are refused: in one line, before torch is imported, with nothing written, whatever is mistyped."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANG, composed
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fewshot.config import advice, check, help, schema
from fewshot.config.check import check_overrides
from fewshot.config.tree import CONF, GROUPS
from fewshot.errors import UserError
from fewshot.processes import ranks

ROOT = Path(__file__).parents[2]
# Runs calls one after the other in a process where torch cannot be imported; tells how each ended and what it wrote.
PROGRAM = """
import contextlib, importlib, io, json, sys
from pathlib import Path

class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("torch", "pytorch_lightning", "learn2learn", "wandb", "matplotlib"):
            raise SystemExit(f"{name} was imported")

sys.meta_path.insert(0, Blocked())
sys.path.insert(0, sys.argv[1])
COMMANDS = {"train": "fewshot.train", "evidence": "fewshot.evidence.__main__"}
COMMANDS |= {name: f"fewshot.{name}.__main__" for name in ("data", "predict", "sweep")}

for command, *arguments in json.loads(sys.argv[2]):
    module = importlib.import_module(COMMANDS.get(command, f"fewshot.{command}"))
    sys.argv, written = [command, *arguments], set(Path().rglob("*"))
    said, ended = io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            module.main()
        except SystemExit as end:
            ended = end.code
    print(json.dumps([ended, said.getvalue(), sorted(map(str, set(Path().rglob("*")) - written))]))
"""
CALLS = {  # the line in which it ends
    "train": "torch was imported",  # a valid call gets that far
    "train seed='3'": "seed='3': is a text; leave the quotes out, or write ${oc.decode:${oc.env:NAME}} for",
    "train stop_at_accuracy='0.5'": "stop_at_accuracy='0.5': is a text; leave the quotes out, or write",
    "train fit=${oc.env:NOSUCH,false}": "fit='false': is a text; leave the quotes out, or write",
    "train algo=[zero,anil]": "algo=[zero,anil]: takes one of its files, and a list would merge them; give one",
    "train inner_lrr=0.1": "inner_lrr=0.1: no such knob; did you mean inner_lr?",
    "train model=resnet12 model.norm=group": "model.norm=group: a knob of model=conv4_64, conv4_pooled, conv4_strided",
    "test RUN dataset.mini_root=x": "dataset.mini_root=x: a knob of dataset=minicub; name the model's dataset= in ",
    "train width=8": "width=8: no such knob; did you mean model.width?",
    "train zeroing=true": "zeroing=true: takes a plus, +zeroing=true",
    "train +trainer.max_epoch=3": "trainer.max_epoch=3: no such knob; did you mean trainer.max_epochs? (",
    "train +zerong=true": "+zerong=true: only +zeroing, +trainer.KEY, +optimizer.KEY, +logger.KEY, +callbacks.KEY, "
    "+algo.KEY may be added, nothing can be removed with ~; did you mean +zeroing?",
    "train ~ways": "~ways: only +zeroing, +trainer.KEY, +optimizer.KEY, +logger.KEY, +callbacks.KEY, +algo.KEY may be ",
    "train =3": "=3: must be KNOB=VALUE",
    "train dataset.classes={}": "dataset.classes={}: an empty mapping changes nothing; leave it out",
    "train ways=1": "ways=1: must be an integer of at least 2",
    "train inner_steps=4 test_steps=2": "test_steps=2: must be at least inner_steps=4",
    "train trainer.accelerator=cuuda": "trainer.accelerator=cuuda: must be one of auto, cpu, gpu, cuda",
    "train dataset=omniglott": "dataset=omniglott: no such choice; did you mean omniglot?",
    "train dataset=cifarfs dataset.root=nowhere": "dataset.root=nowhere: no such file or folder; give",
    "train checkpoint=nowhere.ckpt": "checkpoint=nowhere.ckpt: no such file",
    "train checkpoint=nowhere.ckpt fit=false test_tasks=1": "test_tasks=1: must be an integer of at least 2",
    "train checkpoint=model.ckpt dataset=folder dataset.root=nowhere": "dataset.root=nowhere: no such file or folder",
    "train checkpoint=model.ckpt model=module": "torch was imported",  # its model.module stands in that file
    "train checkpoint=tested fit=false": "torch was imported",
    "train hydra.run.dir=": "hydra.run.dir=: must be a folder",
    "train ways=1,2": "ways=1,2: several values are a sweep, with -m;",
    "train hydra.verbose=7": "hydra.verbose=7: cannot be composed (",
    "train dataset.mean={a:1}": "dataset.mean={a:1}: is of another kind",
    "train --nope": "unrecognized arguments: --nope; --help",
    "train algo=zero -m seed=0,1": "seed=0,1: give all KNOB=VALUE in one row",
    "train -m --cfg job": "-m --cfg job: ",
    "train -m ways=5,99 seed=0,1": "ways=99: dataset glyphs has 30 val classes; at most 30 ways",
    "train -m seed=0,1 inner_lrr=1,2": "inner_lrr=1: no such knob; did you mean inner_lr?",
    "train -m seed=0,1 +zerong=true,false": "+zerong=true,false: only +zeroing, +trainer.KEY, +optimizer.KEY, "
    "+logger.KEY, +callbacks.KEY, +algo.KEY may be added, nothing can be removed with ~; did you mean +zeroing?",
    "train -m ways=range(2,9,0)": "ways=range(2,9,0): is no sweep (",
    "evidence checkpoint=nowhere.ckpt fit=true": "fit=true: nothing is trained here",
    "evidence ways=3": "checkpoint=null: which model?",
    "sweep": "FOLDER...: is missing; python -m fewshot.sweep --help says what it is for",
    "sweep --into x empty": "--into: no such knob; write into=VALUE",
    "sweep nowhere": "nowhere: no run in it; give the folder of a sweep",
    "sweep empty": "empty: no run in it; give the folder of a sweep",
    "data": "list|prepare|show: is missing; python -m fewshot.data --help says what it is for",
    "data lst": "lst: no such knob; did you mean list?",
    "data list out=x.png": "out=x.png: only show writes a file; leave it out",
    "export checkpoint=empty": "checkpoint=empty: no checkpoints/best.ckpt in this folder",
    "export": "checkpoint: is missing; give checkpoint=PATH, the folder of a run",
    "predict checkpoint='model.ckpt' support='nowhere' query=empty": "support=nowhere: no such file or folder",
    "data prepare checkpoint=model.ckpt": "checkpoint=model.ckpt: no model is read here; name the dataset itself",
    "data list dataset=omniglot,cifarfs": "dataset=omniglot,cifarfs: give one value, list takes dataset=A dataset=B",
    "data prepare dataset=omniglott": "dataset=omniglott: no such choice; did you mean omniglot?",
    "data prepare dataset=cifarfs dataset.root=nowhere": "dataset.root=nowhere: no such file or folder; give",
    "data list --config-dir=nowhere": "--config-dir=nowhere: no such folder",
    "data list inner_lrr=3": "inner_lrr=3: no such knob; did you mean inner_lr?",
    "predict checkpoint=model.ckpt support=empty query=empty": "support=empty: 0 folders with images in it; give",
}


def test_a_refused_call_is_one_line_without_torch_and_leaves_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.ckpt").touch()
    (tmp_path / "tested" / "checkpoints").mkdir(parents=True)
    (tmp_path / "tested" / "checkpoints" / "best.ckpt").touch()
    calls = json.dumps([call.split() for call in CALLS])
    environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    command = [sys.executable, "-c", PROGRAM, ROOT, calls]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANG)
    assert done.returncode == 0, done.stderr
    for (call, line), result in zip(CALLS.items(), done.stdout.splitlines(), strict=True):
        ended, said, written = json.loads(result)
        assert isinstance(ended, str) and ended.startswith(line) and "\n" not in ended, (call, ended)
        assert (said == "" and written == []) or line == "torch was imported", (call, said, written)


def test_a_call_that_is_refused_after_its_folder_was_made_removes_it(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.ckpt").write_bytes(b"broken")
    (tmp_path / "mine").mkdir()
    for folder in ("outputs/new", "mine"):
        line = main("checkpoint=broken.ckpt", "fit=false", f"hydra.run.dir={folder}")
        assert line.startswith("checkpoint=") and "cannot be read" in line
    assert not (tmp_path / "outputs").exists() and (tmp_path / "mine").is_dir()


def test_a_call_that_is_refused_leaves_the_record_of_the_run_that_is_going_on(main, tmp_path):
    record = tmp_path / ".hydra" / "overrides.yaml"
    record.parent.mkdir()
    record.write_text("- seed=1\n")
    with ranks.locked(tmp_path):
        assert "is at work on this run" in main("seed=2", f"hydra.run.dir={tmp_path}")
    assert record.read_text() == "- seed=1\n" and [path.name for path in record.parent.iterdir()] == [record.name]


def test_a_relative_folder_of_images_and_a_change_of_folder_are_told_apart_from_no_folder(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    call = ("dataset=folder", "dataset.root=photos", "hydra.job.chdir=true", "hydra.run.dir=run")
    monkeypatch.setenv("HOME", str(tmp_path))
    check.check_files(composed("dataset=folder", "dataset.root='~/photos'"))
    assert main(*call) == "dataset.root=photos: hydra.job.chdir=true looks for it elsewhere; write the whole path"
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


# Advice


ADVISED = {  # what is mistyped, and what is then advised, less the value
    "inner_lrr=0.1": "inner_lr",
    "zeroing=true": "+zeroing",
    "zeroin=true": "+zeroing",
    "+zerong=true": "+zeroing",
    "+inner_lrr=0.1": "inner_lr",
    "first_order=false": "algo.first_order",
    "width=8": "model.width",
    "model.widht=8": "model.width",
    "algo.first_ordr=false": "algo.first_order",
    "dataset.clases.val=30": "dataset.classes",
    "dataset=omniglot dataset.roott=.": "dataset.root",
    "dataset=folder dataset.root=. dataset.split_sed=1": "dataset.split_seed",
    "+trainer.max_tim=00:00:01:00": "+trainer.max_time",
    "trainer.max_time=00:00:01:00": "+trainer.max_time",
    "trainer=cpu trainer.deterministic=true": "+trainer.deterministic",
    "algos=zero": "algo",
    "datset=omniglot": "dataset",
    "hydra.run.dirr=new": "hydra.run.dir",
}


@pytest.mark.parametrize("call", ADVISED)
def test_advice_is_taken(call, main, tmp_path, monkeypatch):
    """What is advised is what was meant, with all that one has to write for it, and is not refused in its turn."""
    monkeypatch.chdir(tmp_path)
    *others, word = call.split()
    line = main(*others, word)
    (advised,) = re.findall(r"did you mean ([\w.+]+)\?$|takes a plus, (\+zeroing)=true$", line)
    assert "".join(advised) == ADVISED[call] and not any(tmp_path.iterdir())
    if "clases" not in call:
        right = [*others, f"{ADVISED[call]}={word.partition('=')[2]}"]
        assert main("--cfg", "job", *right) == 0 if "hydra" in call else refusal(right) is None


@pytest.mark.parametrize(
    "group, wrong", {"algo": "fomalm", "dataset": "glyhps", "model": "conv4", "logger": "wand"}.items()
)
def test_an_advised_choice_is_taken(group, wrong, main):
    choices = re.search(r"(?:did you mean|known are) ([\w, ]+)\??$", main(f"{group}={wrong}"))[1].split(", ")
    for choice in choices:
        assert main("--cfg", "job", f"{group}={choice}") == 0 and (CONF / group / f"{choice}.yaml").exists()


@pytest.mark.parametrize(
    "call, reason",
    {
        "inner_lrr=abc": "did you mean inner_lr? (inner_lr=abc: must be a number above 0)",
        "shot=30": "did you mean shots? (shots+queries=30+15: glyphs has 20 images per class; lower shots or queries)",
        "enabled=true": "did you mean callbacks.zero_head.enabled? (callbacks.zero_head.enabled=true: use +zeroing=",
        "zeroing=maybe": "takes a plus, +zeroing=true or +zeroing=false",
    }.items(),
)
def test_advice_that_would_be_refused_says_why(call, reason, main):
    assert reason in main(call)


# The schema and the YAML


PARTS = {
    "algo": schema.Algo,
    "dataset": schema.Dataset,
    "model": schema.Model,
    "trainer": schema.Trainer,
    "optimizer": schema.Optimizer,
    "logger": schema.Logger,
    "callbacks": schema.Callbacks,
    "callbacks.zero_head": schema.ZeroHead,
    "trainer.strategy": schema.Strategy,
    "callbacks.record": schema.Record,
    "callbacks.cosine_similarity": schema.CosineSimilarity,
    "dataset.classes": schema.Classes,
    "dataset.fractions": schema.Fractions,
    "dataset.splits": schema.Splits,
}


def test_the_yaml_has_the_knobs_of_the_schema_and_no_others():
    """No YAML file sets what the schema does not know, and the schema knows nothing that no YAML file sets."""
    in_yaml = {place: set() for place in ("", *PARTS)}
    for path in [CONF / "config.yaml", *(path for group in GROUPS for path in (CONF / group).rglob("*.yaml"))]:
        content = OmegaConf.load(path)
        if path.parent == CONF / "logger" and "fewshot." not in str(content.get("_target_", "fewshot.")):
            continue  # of Lightning's
        group = path.relative_to(CONF).parts[0]
        if group in GROUPS and not path.read_text().startswith("# @package _global_"):
            content = OmegaConf.create({group: content})
        for place, names in in_yaml.items():
            part = OmegaConf.select(content, place) if place else content
            names |= set() if part is None else {*part} - {"defaults", "hydra"}
    assert in_yaml.pop("") | {*GROUPS, "zeroing"} == {*schema.Config.knobs()}
    in_yaml["trainer"] |= {key.removeprefix("trainer.") for key in help.files("trainer")["auto"].added}  # with a plus
    assert in_yaml.pop("callbacks") - {"progress"} == {*schema.Callbacks.knobs()}  # which takes more
    for place, names in in_yaml.items():
        assert names == {*PARTS[place].knobs()}, place


def test_every_knob_has_a_sentence_or_is_another_one():
    """The default of one that has none is that other knob, ${KNOB}; or it is the name of what a part makes."""
    for key, _ in help.knobs():
        values = [file.values.get(key, "") for file in help.files(key.split(".")[0]).values()]
        assert help.entry(key)[1] or any(value.startswith("${") for value in values), key


def test_help_of_a_command_names_each_parameter_with_a_sentence():
    for command in (
        "export",
        "predict.__main__",
        "data.__main__",
        "sweep.__main__",
        "evidence.__main__",
        "check_algorithm",
    ):
        shown = importlib.import_module(f"fewshot.{command}").COMMAND
        said = " ".join(shown.help().split())
        for word, parameter in shown.parameters.items():
            assert f"{word} {parameter.sentence}" in said and parameter.sentence.endswith(".")


def test_knobs_of_ones_own_networks_sources_loggers_and_callbacks_are_free():
    cfg = composed()
    OmegaConf.set_struct(cfg, False)
    cfg.model = {"name": "mine", "smallest_image": 1, "depth": [1, 2], "network": {"_target_": "mine.Net", "size": 7}}
    cfg.dataset.source = {"_target_": "mine.load", "size": 7}
    cfg.dataset.licence = "mine"
    cfg.dataset.update({"channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3})
    cfg.algo.update({"_target_": "mine.Loop", "head": "own", "strength": 3})
    cfg.logger = {"_target_": "mine.logger", "token": 3}
    cfg.callbacks.mine = {"_target_": "mine.Callback", "every": "hour"}
    check.refuse(cfg, [])
    del cfg.dataset["size"]
    with pytest.raises(UserError, match=r"^dataset=null: lacks dataset\.size; must be one of aircraft, cifarfs, "):
        check.refuse(cfg, [])


# Whatever is mistyped


def refusal(call):
    """The line in which train.py would end before it imports torch; None if it would not."""
    try:
        check_overrides(call)
        try:
            cfg = composed(*call)
        except Exception as error:
            raise advice.not_composed(error, call, lambda groups: composed(*groups)) from error
        check.refuse(cfg, call)
    except UserError as error:
        return str(error)
    return None


KNOBS = sorted(advice.names(OmegaConf.to_container(composed("dataset=omniglot", "algo=contrastive"))))
CHOICES = ("dataset=omniglot", "dataset=folder", "algo=contrastive", "model=module", "trainer=ddp")
ODD = """null true false 0 1 2 -1 1.5 -0.0 nan inf 1e400 1e-400 0x10 1_000 100000000000000000000 auto cpu ??? ''
"" a=b ~/x [] [1] [null] [nan,x] {a:1} {_target_:a.B} {_target_:3} 1,2 range(3) interval(1,2) int(x)
${ways} ${nope} ${ways.x} ${oc.env:NOPE} ${share_of:a,b} ${at_least:3,x}"""
VALUES = st.one_of(
    st.sampled_from(ODD.split()),
    st.integers().map(str),
    st.floats().map(str),
    st.text("az09_.,:=+-~/\\[]{}()'\"$ \u00e9\n\t", max_size=8),
)


@pytest.mark.parametrize(
    ("call", "kind", "plugin", "line"),
    [
        (
            "hydra/launcher=slurm",
            "launcher",
            "submitit_slurm",
            "uv sync --extra cluster, or pip install hydra-submitit",
        ),
        ("experiment=search", "sweeper", "optuna", "uv sync --extra optuna, or pip install hydra-optuna-sweeper"),
    ],
)
def test_a_plugin_of_hydra_that_is_not_installed_is_named_with_its_extra(call, kind, plugin, line, monkeypatch):
    Plugins.instance()  # has read those that are installed
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"][kind], f"{plugin}.yaml", raising=False)
    with pytest.raises(UserError, match=f"^hydra/{kind}={plugin}: needs hydra-.*; {line}"):
        advice.configuration([call])


@st.composite
def calls(draw):
    """A choice, then one or two overrides, of which most are wrong in one way or another."""
    call = draw(st.lists(st.sampled_from(CHOICES), max_size=1))
    for _ in range(draw(st.integers(1, 2))):
        knob = draw(st.sampled_from(KNOBS))
        place = draw(st.integers(0, len(knob)))
        typo = draw(st.sampled_from([""] * 20 + ["x", ".", "@", "/", "="]))
        sign = draw(st.sampled_from([""] * 20 + ["+", "++", "~"]))
        call.append(f"{sign}{knob[:place]}{typo}{knob[place:]}={draw(VALUES)}")
    return call


@given(calls())
@settings(max_examples=300)
def test_any_call_is_valid_or_refused_in_one_line(call):
    line = refusal(call)
    assert line is None or (line.splitlines() == [line] and len(line) < 1000)
