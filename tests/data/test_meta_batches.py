"""Where the images lie, what is written down about them, and the commands for datasets."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from fewshot.data.__main__ import main
from fewshot.data.cache import LazySplit
from fewshot.data.meta_batches import TaskDataModule, images_device, manifest
from fewshot.data.sampler import TaskSampler
from fewshot.data.sources import glyphs
from fewshot.data.task import SPLITS, Split
from fewshot.errors import UserError

CPU, CUDA, GB = torch.device("cpu"), torch.device("cuda", 1), 10**9


@pytest.mark.parametrize(
    ("asked", "compute", "size", "free", "expected"),
    [
        ("auto", CUDA, 4 * GB, 8 * GB, CUDA),
        ("auto", CUDA, 4 * GB + 1, 8 * GB, CPU),
        ("auto", CPU, 4 * GB, 0, CPU),
        ("cuda", CUDA, 4 * GB, 5 * GB, CUDA),
        ("cpu", CUDA, 1, 8 * GB, CPU),
        ("cpu", CPU, 1, 0, CPU),
    ],
)
def test_images_go_to_the_gpu_if_they_fill_half_of_it_at_most(asked, compute, size, free, expected):
    assert images_device(asked, compute, size, free) == expected


def test_images_cannot_go_to_a_gpu_that_the_run_is_not_on(run, tmp_path):
    with pytest.raises(UserError, match=r"^dataset\.device=cuda: the run is on cpu; use dataset\.device=auto or .*$"):
        run(tmp_path, "dataset.device=cuda")


def split(name="a", classes=3):
    images = torch.arange(classes * 4 * 2, dtype=torch.uint8).view(-1, 1, 1, 2)
    return Split(images, torch.arange(classes + 1) * 4, tuple(f"{name}{n}" for n in range(classes)), "5a")


def test_images_that_stay_behind_travel_with_each_task():
    sampler = TaskSampler(split(), ways=2, shots=1, queries=2, seed=0, stream=0)
    before = sampler(3, 2)
    sampler.to(CPU, CPU)
    assert all(torch.equal(one, other) for one, other in zip(before, sampler(3, 2), strict=True))
    sampler.to(torch.device("meta"), CPU)  # stands in for a GPU
    after = sampler(3, 2)
    assert sampler.split.images.device == CPU
    assert {field.device.type for field in after} == {"meta"}
    assert [(field.shape, field.dtype) for field in after] == [(field.shape, field.dtype) for field in before]


@pytest.mark.parametrize(("kind", "evaluated"), [("fixed_blocks", "fixed_blocks"), ("one_task", "mutually_exclusive")])
def test_all_splits_have_fixed_blocks_where_training_has_them(config, kind, evaluated):
    splits = {name: split(name, classes=4) for name in ("train", "val", "test")}
    cfg = config(f"dataset.tasks={kind}", "ways=2", "shots=1", "queries=2", "dataset.mean=[0]", "dataset.std=[1]")
    samplers = TaskDataModule(splits, cfg).samplers
    assert {name: sampler.kind for name, sampler in samplers.items()} == {
        "train": kind,
        "val": evaluated,
        "test": evaluated,
    }


def test_the_manifest_changes_with_names_numbers_and_pixels():
    splits = {name: split(name) for name in ("train", "val", "test")}
    first = manifest(splits)
    assert first["val"] == ["val0", "val1", "val2"] and list(first) == ["sha256", "train", "val", "test"]
    assert first == manifest(dict(reversed(splits.items())))
    sums = {first["sha256"]}
    for change in ({"names": ("x", "y", "z")}, {"offsets": torch.tensor([0, 3, 8, 12])}, {"sha256": "5b"}):
        sums.add(manifest(splits | {"val": dataclasses.replace(splits["val"], **change)})["sha256"])
    assert len(sums) == 4


def test_show_draws_classes_of_every_split_with_their_names(cache, tmp_path, capsys):
    out = tmp_path / "sheet.png"
    main(["show", "dataset=glyphs", f"dataset.cache={cache}", f"out={out}"])
    assert f"Written to {out}" in capsys.readouterr().out
    sheet = np.asarray(Image.open(out).convert("L"))
    assert sheet.shape[0] == 3 * 6 * 58  # six letters of every split, 28 pixels twice as large
    rows = sheet.reshape(18, 58, -1)
    assert (rows[:, :, :100].min(axis=(1, 2)) < 128).all() and (rows[:, :56, -58:].min(axis=(1, 2)) < 128).all()
    for wrong in ([], ["out=sheet.jpg"]):
        with pytest.raises(SystemExit, match=r"^out=.*: give out=FILE\.png"):
            main(["show", "dataset=glyphs", *wrong])


def test_a_dataset_of_ones_own_is_listed_and_shown(cache, tmp_path, capsys):
    own = tmp_path / "own, a=b" / "dataset" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\ndefaults: [glyphs]\ndataset: {name: mine}\n")
    mine = ["dataset=mine", f"dataset.cache={cache}", f"--config-dir={own.parent.parent}"]
    main(["list", *mine])
    assert "\nmine  " in capsys.readouterr().out
    main(["show", *mine, f"out={tmp_path / 'sheet.png'}"])
    assert "mine val: 30 classes, 600 images" in capsys.readouterr().out and (tmp_path / "sheet.png").exists()


def test_a_dataset_of_ones_own_as_the_docs_have_it_needs_no_cache(tmp_path, capsys):
    page = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "mine.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])
    mine = ["dataset=mine", f"--config-dir={tmp_path}"]
    main(["list", *mine])
    assert re.search(r"^mine +20/8/8 .* read by each run$", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(SystemExit, match=r"^dataset=mine: has no dataset\.cache, .* there is nothing to prepare$"):
        main(["prepare", *mine])


def test_list_says_what_there_is_and_what_is_here(cache, tmp_path, capsys):
    main(["prepare", "dataset=glyphs", f"dataset.cache={cache}"])
    capsys.readouterr()
    main(["list", f"dataset.cache={cache}"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert {"glyphs", "omniglot", "cifarfs", "fc100", "miniimagenet", "tieredimagenet", "folder"} <= lines.keys()
    assert (
        lines["glyphs"].split()[1:5] == ["215/30/73", "6,360", "28x28", "grey"] and "prepared, 5 MB" in lines["glyphs"]
    )
    assert "1028/172/423" in lines["omniglot"]
    main(["list", "dataset=glyphs", "dataset=folder", f"dataset.cache={cache}"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["dataset", "glyphs", "folder"]
    (tmp_path / "cifar100").mkdir()
    (tmp_path / "cifar100" / "train").touch()
    main(["list", f"dataset.cache={tmp_path}"])
    ends = {line.split()[0]: line.split("  ")[-1].strip() for line in capsys.readouterr().out.splitlines()}
    assert ends["glyphs"] == "needs nothing" and ends["omniglot"] == ends["miniimagenet"] == "no"
    assert ends["cifarfs"] == ends["fc100"] == "downloaded"


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


@pytest.fixture
def few(monkeypatch):
    """Glyphs that are drawn in no time."""

    def build(size):
        pixels = np.arange(6, dtype=np.uint8).repeat(size * size).reshape(3, 2, 1, size, size)
        return {split: LazySplit(images, [1, 1], ("a", "b")) for split, images in zip(SPLITS, pixels, strict=True)}

    monkeypatch.setattr(glyphs, "_build", build)


def test_what_is_not_in_the_cache_is_not_prepared(few, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^dataset\.cache=.*file/x: cannot be written \(Not a directory\); name"):
        main(["prepare", f"dataset.cache={tmp_path}/file/x"])
    with (
        monkeypatch.context() as patch,
        pytest.raises(SystemExit, match=r"cache=.*: cannot keep the images \(disk full"),
    ):
        patch.setattr(np.lib.format, "write_array_header_1_0", raising(OSError("disk full")))
        main(["prepare", f"dataset.cache={tmp_path}/new"])
    assert "Ready" not in capsys.readouterr().out
    main(["prepare", f"dataset.cache={tmp_path}/new"])
    assert f"Ready in {tmp_path}/new; " in capsys.readouterr().out


def test_without_a_home_folder_datasets_are_listed_and_prepare_asks_for_a_cache(tmp_path, monkeypatch, capsys):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", raising(KeyError("no such user")))
    main(["list", "dataset=omniglot"])
    assert capsys.readouterr().out.rstrip().endswith(" no")
    with pytest.raises(SystemExit, match=r"^dataset\.cache=null: there is no home folder; set dataset\.cache to a"):
        main(["prepare"])


@pytest.mark.parametrize("dataset", ["cifarfs", "miniimagenet"])
def test_a_download_that_failed_is_not_called_downloaded(dataset, tmp_path, monkeypatch, capsys):
    """Also where the place of its files could not be asked for, and nothing of them is there."""
    monkeypatch.setattr("fewshot.data.published.urlopen", raising(OSError("no network")))
    with pytest.raises(SystemExit, match=r"failed \(no network\)"):
        main(["prepare", f"dataset={dataset}", f"dataset.cache={tmp_path}"])
    main(["list", f"dataset={dataset}", f"dataset.cache={tmp_path}"])
    assert capsys.readouterr().out.rstrip().endswith(" no")
