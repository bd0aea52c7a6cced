"""Every file of conf/ becomes the object that it describes."""

import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from data_files import make_cifar100, make_fine_grained, make_huggingface, make_mini, make_tiered
from hydra.utils import instantiate

from fewshot.config.tree import CONF
from fewshot.data.task import SPLITS

SHARED = Path(__file__).parents[3] / "shared" / "data"
ROOTS = {"omniglot": SHARED / "omniglot", "cifarfs": SHARED / "cifarfs.zip", "folder": SHARED / "tinyimagenet100.zip"}
MADE = {  # few images, but of every class
    "fc100": lambda folder, classes, monkeypatch: make_cifar100(folder, monkeypatch),
    "miniimagenet": lambda folder, classes, monkeypatch: make_mini(folder, classes),
    "tieredimagenet": lambda folder, classes, monkeypatch: make_tiered(folder, classes, images=1),
    "huggingface": lambda folder, classes, monkeypatch: make_huggingface(
        folder, {split: [f"{split}{label}" for label in range(5)] for split in SPLITS}, number=16
    ),
}
MADE |= {
    name: lambda folder, classes, monkeypatch, name=name: make_fine_grained(name, folder, monkeypatch, images=1)
    for name in ("cub", "aircraft", "flowers", "dtd", "minicub")
}


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("name", names("model"))
def test_model(config, name):
    any_module = ["model.module={_target_: fewshot.models.conv4_strided, channels: 1, size: 28, ways: 7}"]
    cfg = config(f"model={name}", "ways=3", *(any_module if name == "module" else []))
    images = torch.rand(4, cfg.dataset.channels, cfg.dataset.size, cfg.dataset.size)
    assert instantiate(cfg.model.network)(images).shape == (4, 3)


@pytest.mark.parametrize("name", names("dataset"))
def test_dataset(config, cache, name, tmp_path, monkeypatch):
    overrides = [f"dataset={name}", f"dataset.cache={cache}"]
    if name in ROOTS:
        if not ROOTS[name].exists():
            pytest.skip(f"no {ROOTS[name].name} in the shared data")
        overrides.append(f"dataset.root={ROOTS[name]}")
    cfg = config(*overrides)
    if name in MADE:
        cfg.dataset.root = str(MADE[name](tmp_path / name, cfg.dataset.classes, monkeypatch))
        if "trust" in cfg.dataset:
            cfg.dataset.trust = True
    if name == "minicub":
        cfg.dataset.mini_root = str(make_mini(tmp_path / "mini", {"train": 64, "val": 16, "test": 20}))
    splits = instantiate(cfg.dataset.source)
    assert tuple(splits) == SPLITS
    for split, classes in cfg.dataset.classes.items():
        assert splits[split].images.shape[1:] == (cfg.dataset.channels, cfg.dataset.size, cfg.dataset.size)
        assert splits[split].images.dtype == torch.uint8
        assert classes is None or len(splits[split].names) == classes
        few = name == "cifarfs" or name in MADE  # the shared zip holds 200 of the 600
        if cfg.dataset.images_per_class is not None and not few:
            assert set(splits[split].counts.tolist()) == {cfg.dataset.images_per_class}


@pytest.mark.parametrize("name", names("augment"))
def test_augment(config, name):
    transforms = instantiate(config("dataset=cifarfs", f"augment={name}").augment)
    images = torch.rand(7, 3, 32, 32)
    assert [transform(images).shape for transform in transforms.values()] == [images.shape] * len(transforms)
    assert len(transforms) == {"none": 0, "standard": 3}[name]


@pytest.mark.parametrize("name", names("trainer"))
def test_trainer(config, tmp_path, name):
    cfg = config(f"trainer={name}")
    if cfg.trainer.accelerator == "gpu" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    assert instantiate(cfg.trainer, logger=False, default_root_dir=tmp_path).max_steps == cfg.iterations


@pytest.mark.parametrize("name", names("callbacks"))
def test_callbacks(config, name):
    callbacks = instantiate(config(f"callbacks={name}", "+zeroing=true").callbacks)
    assert all(isinstance(callback, pl.Callback) for callback in callbacks.values())
    order = [name for name in callbacks if name in ("zero_head", "cosine_similarity")]
    assert max(map(list(callbacks).index, order)) < list(callbacks).index("record")  # nothing is written before them
    assert callbacks["zero_head"].enabled


def test_logger_without_a_key_is_offline_and_says_so(config, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr(sys.stdin, "read", lambda: pytest.fail("a prompt"))
    from fewshot.training.wandb_run import finished_run

    with finished_run():
        start = instantiate(config().logger, _partial_=True)
        logger = start(folder=tmp_path, run_id="abc", values={"ways": 5}, rows=[])
        assert logger.experiment.settings.mode == "offline" and logger.experiment.config["ways"] == 5
    assert list(tmp_path.glob("wandb/offline-run-*-abc/run-abc.wandb"))
    assert all(path.resolve().is_relative_to(tmp_path) for path in tmp_path.rglob("*"))  # no link leads out
