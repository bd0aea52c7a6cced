"""Crafted checkpoints, exported folders, results and links: one line each, little memory, nothing written elsewhere."""

import json
import os
import re
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import fewshot
from fewshot.config import stored
from fewshot.config.hydra_call import OutputFolder
from fewshot.config.kinds import integer, optional
from fewshot.config.tree import CONF, settings
from fewshot.errors import UserError
from fewshot.results import record_files
from fewshot.sweep.settings import fingerprint, read_job
from fewshot.training import checkpoint, resume
from fewshot.training.checkpoint_io import AtomicCheckpointIO

MADE = Path(__file__).parents[1] / "fixtures" / "a43819a"
BEST = MADE / "run" / "checkpoints" / "best.ckpt"


@pytest.fixture
def little_memory():
    """Half a gigabyte more than there is."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def refused(function, *arguments, line):
    with pytest.raises(UserError, match=line) as error:
        function(*arguments)
    assert "\n" not in str(error.value)


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path, little_memory):
    """Little that becomes much; and a directory that names one member many times."""
    bomb = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("best/data/0", "w") as entry:
        for _ in range(16):
            entry.write(bytes(2**22))
    refused(checkpoint.read, bomb, line="is compressed, as no checkpoint of this program")
    with zipfile.ZipFile(tmp_path / "stored.ckpt", "w") as archive:
        archive.writestr("best/data.pkl", bytes(1000))
        (info,) = archive.infolist()
        archive.filelist = [info] * 50
    refused(checkpoint.read, tmp_path / "stored.ckpt", line="has other bytes than those of its entries")
    whole = (MADE / "run" / "checkpoints" / "best.ckpt").read_bytes()
    bomb.write_bytes(bytes(50_000) + whole)  # where another directory and its compressed entries could be
    refused(checkpoint.read, bomb, line="has other bytes than those of its entries")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("MARK",)


def test_torch_itself_unpickles_plain_data_alone_whatever_the_first_look_at_a_file_lets_pass(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "refuse_bombs", lambda *_: None)
    torch.save({"fewshot": Evil()}, "evil.ckpt")
    refused(checkpoint.read, "evil.ckpt", line=r"cannot be read, truncated or not a checkpoint \(UnpicklingError\)$")
    assert not Path("MARK").exists()


def test_only_a_regular_file_is_read(tmp_path, little_memory):
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "zero.ckpt").symlink_to("/dev/zero")
    for name in ("pipe.ckpt", "zero.ckpt"):
        refused(checkpoint.read, tmp_path / name, line=f"{name}: is a device or pipe, not a file")
        folder = Path(shutil.copytree(MADE / "exported", tmp_path / f"of {name}"))
        (folder / "model.safetensors").unlink()
        (tmp_path / name).rename(folder / "model.safetensors")
        refused(fewshot.load, folder, line="is a device or pipe, not a file|has no model.safetensors")


LARGE = {
    "model.network.width": (10_000, r"network\.head\.weight is \(5, 4\) there and \(5, 10000\) here"),
    "dataset.size": (20_000, "dataset.size must be at most 1024, and is 20000"),
    "model.network.size": (20_000, "model.network.size is 20000, and dataset.size 28"),
    "inner_steps": (10**8, "inner_steps must be at most 1000, and is 100000000"),
    "ways": (10**9, "ways must be at most 10000, and is 1000000000"),
    "dataset.mean": ([0.0, 0.0], "dataset.mean must have dataset.channels=1 numbers"),
    "dataset.std": ([0.0], r"dataset\.std\.0 must be a number above 0, and is 0\.0"),
    "model.network._partial_": (True, "makes no network with .encoder and .head"),
    "algo.head": (None, "algo.head must be one of learned, shared, prototypes, own, and is null"),
}


@pytest.mark.parametrize("key", LARGE)
def test_a_setting_out_of_bounds_is_refused_before_anything_is_built(tmp_path, little_memory, key):
    folder = Path(shutil.copytree(MADE / "exported", tmp_path / "exported"))
    config = node = yaml.safe_load((folder / "config.yaml").read_text())
    *path, last = key.split(".")
    for part in path:
        node = node[part]
    node[last], line = LARGE[key]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    refused(fewshot.load, folder, line=line)


def test_aliases_depth_and_length_in_yaml_are_refused(tmp_path, little_memory):
    folder = Path(shutil.copytree(MADE / "exported", tmp_path / "exported"))
    levels = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))
    for text, line in (
        (f"a0: &a0 [x]\n{levels}\n", "has an alias"),
        ("a: " + "[" * 5000, "levels|cannot be read as"),
        ("#" * 2**18 + "\n", "has more than 262144 bytes, as no such file of this program"),
    ):
        (folder / "config.yaml").write_text(text)
        refused(fewshot.load, folder, line=line)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.long(),
        lambda weight: weight.bool(),
        lambda weight: weight.to(torch.complex64),
        lambda weight: weight.double(),
        lambda weight: weight.half(),
    ],
    ids=["integer", "bool", "complex", "mixed", "half"],
)
def test_weights_of_another_type_are_refused(tmp_path, change):
    folder = Path(shutil.copytree(MADE / "exported", tmp_path / "exported"))
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "network.head.bias": change(weights["network.head.bias"])}, folder / "model.safetensors")
    other = r"state_dict.* (dense tensor of float32|one type)|head.bias is \(5,\) of torch.(int64|bool) there"
    refused(fewshot.load, folder, line=other)


def described(**changes):
    def change(content):
        content["fewshot"].update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda content: content.update(fewshot=None), "fewshot must be a dict, and is null"),
        (lambda content: content.update(state_dict=[1]), "state_dict must be a dict, and is a list"),
        (lambda content: content["state_dict"].update(x="y"), "state_dict.x must be a dense tensor of float"),
        (
            lambda content: content["state_dict"].update(x=torch.eye(3).to_sparse()),
            "names torch._utils _rebuild_sparse_tensor, as no checkpoint",
        ),
        (
            lambda content: content["state_dict"].update(x=bytearray(9)),
            "names (builtins|__builtin__) bytearray, as no checkpoint",
        ),
        (lambda content: content["state_dict"].update(x=torch.ones(1).expand(10**12)), "state_dict.x must be a dense"),
        (lambda content: content.pop("callbacks"), "callbacks is missing"),
        (lambda content: content.pop("state_dict"), "state_dict is missing"),
        (
            lambda content: content["state_dict"].update({"a\0": torch.ones(1)}),
            r"state_dict.a\\x00 must be a line of text, and is",
        ),
        (
            lambda content: content["callbacks"]["Record"]["pending"].append(
                {"loss": torch.ones(()), "query_accuracy": torch.ones(()), "own_measure": "text"}
            ),
            "callbacks.Record.pending.[0-9]+ must be loss, query_accuracy and the like, one number in a tensor each",
        ),
        (lambda content: content.update(global_step=-1), "global_step must be an integer of at least 0, and is -1"),
        (described(overrides=None), "fewshot.overrides must be a list, and is null"),
        (described(run_id="../../x"), "fewshot.run_id must be letters and digits, and is '../../x'"),
        (described(config={"ways": 5}), "is not the configuration of a run: shots is missing"),
    ],
)
def test_a_checkpoint_of_another_form_names_the_key(tmp_path, change, line):
    content = torch.load(BEST, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "other.ckpt")
    refused(checkpoint.read, tmp_path / "other.ckpt", line=line)


@pytest.mark.parametrize(
    ("number", "place", "sound"),
    [
        (-torch.inf, "mask", True),
        (torch.nan, "mask", False),
        (torch.inf, "weight", False),
        (torch.nan, "weight", False),
    ],
)
def test_a_buffer_may_be_infinite_as_the_mask_of_an_attention_is(number, place, sound):
    module = torch.nn.Linear(1, 1, bias=False)
    module.register_buffer("mask", torch.zeros(2))
    weights = {"weight": torch.ones(1, 1), "mask": torch.zeros(2)}
    weights[place] = weights[place] + number
    if sound:
        checkpoint.refuse_misfit("x", weights, {}, module)
    else:
        refused(checkpoint.refuse_misfit, "x", weights, {}, module, line="^x: has weights that are not finite numbers")


def test_what_could_not_be_read_again_is_said_before_the_training(tmp_path):
    content = torch.load(BEST, weights_only=True)
    content["state_dict"]["network.half"] = torch.zeros(1).half()  # a buffer of somebody's network
    for step, line in ((0, "last.ckpt: names torch HalfStorage, as no checkpoint"), (2, None)):
        content["global_step"], save = step, AtomicCheckpointIO().save_checkpoint
        if line:
            refused(save, content, tmp_path / "last.ckpt", line=line)
        else:
            save(content, tmp_path / "last.ckpt")  # nor is each read


def test_a_list_that_holds_itself_many_times_is_refused_at_once(tmp_path, little_memory):
    nested = ["x"]
    for _ in range(40):
        nested = [nested] * 4
    content = torch.load(BEST, weights_only=True)
    content["fewshot"]["config"]["dataset"]["origin"] = nested
    torch.save(content, tmp_path / "nested.ckpt")
    refused(fewshot.load, tmp_path / "nested.ckpt", line="holds more, or deeper, or longer values")


def test_what_a_sweep_cannot_read_is_a_line_of_its_table(tmp_path):
    cases = {
        "results.json": [b"{", b"[" * 100_000, b"\xff", b"{}", b'{"test": null}', b"NaN"],
        ".hydra/config.yaml": [
            b"a: [",
            b"\xff",
            b"- 1",
            b"a: &a [*a]",
            b"algo: {zeroing: '${x}'}\nfit: true",
            b"algo: {zeroing: true}\nfit: true",
        ],
        "metrics.csv": [
            b"iteration,a\nx,1\n",
            b"a,b\n1,2\n",
            b'iteration,a\n0,"' + b"x" * 200_000,
            b"iteration\n1,2,3\n",
            b"iteration,a\n-1,1\n",
            b"iteration,a\n" + b"9" * 400 + b",1\n",
            b"iteration,val/query_accuracy/step_2\n1,1e308\n",
            b"iteration,val/query_accuracy/step_2\n1,nan\n",
        ],
        "error.txt": [b"\xff", b"\x1b[2J"],
    }
    for name, contents in cases.items():
        for number, content in enumerate(contents):
            run = Path(shutil.copytree(MADE / "run", tmp_path / f"{name.split('/')[-1]}-{number}"))
            if name != "results.json":
                (run / "results.json").unlink()
            (run / name).write_bytes(content)
            if name == "results.json":
                refused(record_files.read, run, line=f"{re.escape(str(run))}/results.json: ")
    jobs = {path.name: read_job(path) for path in tmp_path.iterdir()}
    assert len(jobs) == sum(map(len, cases.values())) and not any(job.results for job in jobs.values())
    lines = {name: job.error for name, job in jobs.items()}
    assert all(line.isprintable() for line in lines.values())
    assert "cannot be read as JSON" in lines["results.json-0"] and "cannot be read as YAML" in lines["config.yaml-0"]
    assert lines["error.txt-1"] == "\\x1b[2J"


TWICE = {
    "text": "${{augment.{0}}}${{augment.{0}}}",
    "time": "${{at_least:${{augment.{0}}},${{augment.{0}}}}}",
    "tree": {"x": "${{augment.{0}}}", "y": "${{augment.{0}}}"},
}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        *(
            ({"origin": text}, "cannot be resolved .* is none of this program's forms")
            for text in ("${oc.env:HOME}", "${at_least:1,${oc.env:HOME}}", "${oc.select:${ways},1}", "${.name}")
        ),
        ({"origin": "${dataset.nothing}"}, "cannot be resolved"),
        ({"origin": "${dataset.name}", "name": "${dataset.origin}"}, "cannot be resolved .more would be made"),
        *((kind, "cannot be resolved .*(is none of|more would be made)") for kind in TWICE),
    ],
    ids=str,
)
def test_what_a_run_began_with_is_resolved_only_where_little_is_made_of_it(tmp_path, changes, line):
    """Bombs of 25 levels, of letters, of time and of nested values, would take hours."""
    run = Path(shutil.copytree(MADE / "run", tmp_path / "run"))
    (run / "results.json").unlink()
    config = yaml.safe_load((run / ".hydra" / "config.yaml").read_text())
    if isinstance(changes, dict):
        config["dataset"].update(changes)
    else:
        levels = {f"a{n}": twice(TWICE[changes], f"a{n - 1}") for n in range(25, 0, -1)}
        config["augment"] = {**levels, "a0": "x"}
    (run / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert re.search(line, read_job(run).error)


def twice(form, name):
    return {key: twice(inner, name) for key, inner in form.items()} if isinstance(form, dict) else form.format(name)


@pytest.mark.slow
def test_every_configuration_of_this_program_is_one_that_is_resolved(config):
    for group in ("algo", "dataset", "experiment", "callbacks", "model", "augment"):
        for path in sorted((CONF / group).glob("*.yaml")):
            cfg = OmegaConf.to_container(config(f"{group}={path.stem}"))
            stored.check_interpolations(f"{group}={path.stem}", {k: v for k, v in cfg.items() if k != "hydra"})


def test_a_key_that_older_runs_lack_is_no_difference(config):
    cfg = config("dataset=folder", "dataset.root=photos")
    trained = settings(cfg)
    del trained["dataset"]["needs_root"]
    resume.refuse_difference(cfg, trained, Path("last.ckpt"))
    assert fingerprint(settings(cfg)) == fingerprint(trained)


def test_ranks_of_older_runs_waited_ten_minutes_for_each_other(config):
    trained = settings(config("trainer=ddp"))
    del trained["trainer"]["strategy"]["timeout"]
    assert stored.to_today(trained) == settings(config("trainer=ddp"))


def test_a_foreign_run_folder_with_a_link_is_refused_before_hydra_writes_into_it(config, tmp_path):
    run = Path(shutil.copytree(MADE / "run", tmp_path / "run"))
    (tmp_path / "elsewhere").mkdir()
    (run / "evidence").symlink_to(tmp_path / "elsewhere")
    call = [f"checkpoint={run / 'checkpoints' / 'best.ckpt'}", "hydra.job.name=train"]
    with pytest.raises(SystemExit, match=r"run/evidence: is a link to .*elsewhere; a run writes in its own"):
        OutputFolder().on_run_start(compose("config", call, return_hydra_config=True))
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({1: 2}, "holds keys that are no text"),
        ({"a\x1b[2J": 2}, "holds keys that are no text"),
        ({"a": 2**63}, "holds a int, which is no plain value"),
        ({"a": torch.ones(1)}, "holds a Tensor, which is no plain value"),
    ],
)
def test_a_configuration_holds_plain_values_alone(value, line):
    stored.check_plain("x", {"inner": [{"a": 2**63 - 1}]})
    refused(stored.check_plain, "x", {"inner": [value]}, line=f"^x: {line}$")


def test_the_form_of_a_value_is_named():
    form = stored.form({"a": stored.many(integer(1, 9)), "b?": optional(stored.NUMBER)})
    stored.check("x", {"a": [1, 9], "other": json}, form)
    for value, line in (
        ({"a": [1, True]}, "x: a.1 must be an integer of at least 1, and is true"),
        ({"a": [], "b": float("nan")}, "x: b must be a finite number, or null, and is nan"),
        ({"a": [1, 10]}, "x: a.1 must be at most 9, and is 10"),
        ({"a": 1}, "x: a must be a list, and is 1"),
        ({}, "x: a is missing"),
        ([], "x: it must be a dict, and is a list"),
    ):
        refused(stored.check, "x", value, form, line=f"^{re.escape(line)}$")
