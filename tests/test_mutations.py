"""Files that others changed: hundreds of mutated checkpoints, exported folders, results and settings in one process.

Each is taken, or refused by a UserError of one line, in 20 seconds and 4 GB; nothing else is ever raised.
"""

import copy
import json
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import fewshot
from fewshot import export
from fewshot.errors import UserError
from fewshot.predict import predict
from fewshot.results import record_files
from fewshot.sweep import settings as grouped
from fewshot.sweep import tables
from fewshot.training import checkpoint
from fewshot.training.checkpoint_io import refuse_unresumable
from fewshot.training.meta_learner import MetaLearner
from fewshot.training.resume import find_start

MADE = Path(__file__).parent / "fixtures" / "a43819a"
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)

PLAIN = st.sampled_from(
    [
        *(None, True, False, -1, 0, 1, 2, 7, 20_000, 10**8, 10**12, 10**30, -1.5, 0.5, 1e-300, 1e30, 1e308),
        *(float("nan"), float("inf"), "", "x", "1", "true", "x" * 20_000, "\n", "\x1b[2J", "\udcff", "é", "$\\frac"),
        *("${ways}", "${oc.env:HOME}", "${", "???", "a=b", "2026-01-01"),
        *("fewshot.models.resnet12", "fewshot.models.zero_head", "os.system"),
        *([], {}, [[]], [1.0] * 7, ["x"], {"x": 1}, {1: 2}, {"_target_": "os.system", "_args_": ["false"]}),
        {"_target_": "fewshot.models.conv4_strided", "channels": 1, "size": 28, "ways": 5, "width": 10_000},
    ]
)
TENSORS = st.sampled_from(
    [
        *(torch.zeros(()), torch.zeros(5), torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.bool)),
        *(torch.zeros(5, dtype=torch.complex64), torch.zeros(5, dtype=torch.float64), torch.zeros(5).half()),
        *(torch.zeros(5, 4).to_sparse(), torch.zeros(1).expand(10**9), torch.full((5,), torch.nan)),
        *(torch.zeros(4, 5).T, torch.zeros(5, device="meta"), torch.Size([3])),
    ]
)
OVERRIDES = st.sampled_from(
    [
        *(
            "",
            "=",
            "a b c",
            "algo=nonsense",
            "model=[",
            "[" * 3000,
            "ways=" + "[" * 3000,
            "+x=1",
            "~ways",
            "hydra.run.dir=x",
        ),
        *("ways=x", "ways=null", "inner_steps=-1", "model.width=10000000", "dataset.size=20000", "dataset.mean=[1,2]"),
        *("dataset=null", "model=null", "algo=null", "dataset.source=null", "model.network=null", "trainer=null"),
        *(
            "trainer={devices: 12}",
            "logger=none",
            "experiment=nonsense",
            "experiment=photos",
            "test_steps=${oc.env:HOME}",
        ),
        *("ways=${at_least:x,y}", "inner_lr=nan", "model.network._target_=os.system", "callbacks.record=null", "é=é"),
        "test_steps=${oc.env:HOME}",
    ]
)


def examples(number: int) -> Callable:
    """Without the phase that makes a failing one small, which takes minutes."""
    return settings(max_examples=number, phases=[Phase.generate])


class TooLong(BaseException):
    pass


@contextmanager
def bounded() -> Iterator[None]:
    """At most 20 seconds, and 4 GB more than there are; a UserError must be one line."""

    def stop(*_: Any) -> None:
        raise TooLong

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 10**9, limits[1]))
    signal.alarm(20)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError as error:
        assert str(error).isprintable() and 10 < len(str(error)) < 3000, repr(str(error))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def mutated(data: st.DataObject, content: Any, new: st.SearchStrategy) -> Any:
    """A copy in which one value, however deep, is another, gone, or there under another key."""
    content = copy.deepcopy(content)
    node, places = content, []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(min(3, len(node))))
        place = data.draw(st.sampled_from(keys))
        places.append(place)
        if not isinstance(node[place], dict | list) or not node[place] or data.draw(st.integers(0, 3)) == 0:
            break
        node = node[place]
    kind = data.draw(st.sampled_from(["new", "new", "new", "gone", "moved"]))
    if kind == "new":
        node[place] = data.draw(new)
    else:
        value = node.pop(place)
        if kind == "moved" and isinstance(node, dict):
            node[data.draw(st.sampled_from(["x", "", 1, None]))] = value
    return content


GARBAGE = st.sampled_from([b"", b"\0", b"\xff", b"9" * 5000, b"{[(&a *a", b"[" * 100_000])


def garbled(data: st.DataObject, content: bytes) -> bytes:
    """A few bytes cut out, put in or turned into others."""
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.sampled_from([start, start + 1, start + 30, len(content)]))
    return content[:start] + data.draw(GARBAGE) + content[stop:]


def used(path: Path) -> None:
    """What loads a model also predicts with it."""
    predict(fewshot.load(path), {"a": IMAGES[:2], "b": IMAGES[2:4]}, IMAGES[4:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(MADE, tmp_path_factory.mktemp("mutated") / "made"))


@cache
def last() -> dict[str, Any]:
    return checkpoint.read(MADE / "run" / "checkpoints" / "last.ckpt")


@examples(120)
@given(data=st.data())
def test_checkpoints_with_another_value(folder, data):
    torch.save(mutated(data, last(), st.one_of(PLAIN, TENSORS)), folder / "mutated.ckpt")
    with bounded():
        used(folder / "mutated.ckpt")


@examples(60)
@given(data=st.data())
def test_checkpoints_with_another_description(folder, data):
    torch.save({**last(), "fewshot": mutated(data, last()["fewshot"], PLAIN)}, folder / "mutated.ckpt")
    with bounded():
        export.export(folder / "mutated.ckpt", Path(mkdtemp(dir=folder)))


@examples(30)
@given(override=OVERRIDES)
def test_checkpoints_with_another_call(folder, config, override):
    described = {**last()["fewshot"], "overrides": [*last()["fewshot"]["overrides"], override]}
    torch.save({**last(), "fewshot": described}, folder / "mutated.ckpt")
    asked = [f"checkpoint={folder / 'mutated.ckpt'}", "fit=false"]
    with bounded():
        find_start(config(*asked), asked, folder / "test")


@cache
def continuing() -> tuple[pl.Trainer, MetaLearner]:
    module = MetaLearner.from_config(OmegaConf.create(last()["fewshot"]["config"]), "sequential")
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), module


@examples(80)
@given(data=st.data())
def test_checkpoints_that_lightning_could_not_go_on_from_are_refused(data):
    name = data.draw(st.sampled_from(["loops", "optimizer_states"]))
    content = {**last(), **mutated(data, {name: last()[name]}, st.one_of(PLAIN, TENSORS))}
    with bounded():
        refuse_unresumable(content, *continuing())
        optimizer = continuing()[1].configure_optimizers()
        optimizer.load_state_dict(content["optimizer_states"][0])
        continuing()[0].fit_loop.load_state_dict(copy.deepcopy(content["loops"]["fit_loop"]))


@examples(120)
@given(data=st.data())
def test_exported_folders_with_another_setting(folder, data):
    config = yaml.safe_load((MADE / "exported" / "config.yaml").read_text())
    (folder / "exported" / "config.yaml").write_text(yaml.safe_dump(mutated(data, config, PLAIN)))
    with bounded():
        used(folder / "exported")


def writable(value: Any) -> bool:
    """Whether safetensors would write it."""
    dense = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    return dense and value.is_contiguous()


@examples(30)
@given(data=st.data())
def test_exported_folders_with_other_weights(folder, data):
    weights = load_file(MADE / "exported" / "model.safetensors")
    dense = TENSORS.filter(
        lambda value: isinstance(value, torch.Tensor) and value.numel() < 1000 and value.is_contiguous()
    )
    weights = mutated(
        data, weights, dense.filter(lambda tensor: tensor.layout == torch.strided and tensor.device.type == "cpu")
    )
    other = Path(shutil.copytree(MADE / "exported", mkdtemp(dir=folder), dirs_exist_ok=True))
    save_file({str(name): tensor for name, tensor in weights.items()}, other / "model.safetensors")
    with bounded():
        used(other)


FILES = ("run/checkpoints/best.ckpt", "exported/config.yaml", "exported/model.safetensors")


@examples(120)
@given(data=st.data())
def test_files_with_other_bytes(folder, data):
    name = data.draw(
        st.sampled_from(["run/checkpoints/best.ckpt", "exported/config.yaml", "exported/model.safetensors"])
    )
    other = Path(shutil.copytree(MADE, mkdtemp(dir=folder), dirs_exist_ok=True))
    (other / name).write_bytes(garbled(data, (MADE / name).read_bytes()))
    with bounded():
        used(other / ("exported" if name.startswith("exported") else name))


def summarised(folder: Path) -> None:
    """What a sweep says of it, less its pictures."""
    settings = grouped.group([job for job in grouped.read_jobs([folder]) if job.results or job.curves])
    if settings:
        tables.as_rows(settings)
        tables.as_markdown(settings, [])


@examples(100)
@given(data=st.data())
def test_results_and_settings_of_runs(folder, data):
    run = Path(shutil.copytree(MADE / "run", mkdtemp(dir=folder), dirs_exist_ok=True))
    name = data.draw(st.sampled_from(["results.json", ".hydra/config.yaml", "metrics.csv", "error.txt"]))
    text = (run / name).read_bytes() if (run / name).exists() else b"no space left"
    if name == ".hydra/config.yaml":
        (run / "results.json").unlink()
    if name == "results.json" and data.draw(st.booleans()):
        text = json.dumps(mutated(data, json.loads(text), PLAIN)).encode()
    elif name == ".hydra/config.yaml" and data.draw(st.booleans()):
        text = yaml.safe_dump(mutated(data, yaml.safe_load(text), PLAIN)).encode()
    else:
        text = garbled(data, text)
    (run / name).write_bytes(text)
    with bounded():
        summarised(run)
    with bounded():
        record_files.read(run)
    shutil.rmtree(run)
