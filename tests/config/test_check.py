"""Configurations: which file wins, what is refused and in which words, and that none of it needs torch."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from conftest import HANG, composed
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf

from fewshot.config.check import check
from fewshot.config.tree import CONF, settings
from fewshot.errors import UserError, shown
from fewshot.results.record_files import announce

TRAIN = Path(__file__).parents[2] / "train.py"
CONFIGS = [
    f"{group}={path.stem}"
    for group in ("algo", "dataset", "model", "trainer", "logger", "experiment")
    for path in sorted((CONF / group).glob("*.yaml"))
]
PHOTOS = ("cifarfs", "fc100", "miniimagenet", "tieredimagenet", "folder")
ROOT = "dataset.root=photos"  # one's own photos have no default place; whether it exists is not for the YAML to say


def valid(override):
    """The overrides that make a valid configuration with that file."""
    if override == "model=module":
        return [override, "model.module={_target_: torchvision.models.resnet18}"]
    own = ("folder", "huggingface", "cub", "minicub", "aircraft", "flowers", "dtd")
    needs_root = [f"dataset={name}" for name in own]
    return [override, ROOT] if override in needs_root else [override]


def complaint(cfg):
    """The message of the UserError, which is one line."""
    with pytest.raises(UserError) as error:
        check(cfg)
    message = str(error.value)
    assert message.splitlines() == [message]
    return message


# Every file


@pytest.mark.parametrize("override", CONFIGS)
@pytest.mark.slow
def test_every_file_composes_and_is_valid(override):
    cfg = composed(*valid(override))
    check(cfg)
    settings(cfg)  # every interpolation resolves


def test_the_promised_files_are_there():
    assert {f"algo={name}" for name in ("fomaml", "somaml", "zero", "zero_init", "anil", "contrastive")} <= set(CONFIGS)
    datasets = ("glyphs", "omniglot", "cifarfs", "fc100", "miniimagenet", "tieredimagenet", "folder")
    assert {f"dataset={name}" for name in datasets} <= set(CONFIGS)
    assert {"model=conv4_strided", "model=conv4_pooled", "experiment=paper_omniglot_5w1s"} <= set(CONFIGS)


@pytest.mark.parametrize("override", [override for override in CONFIGS if override.startswith("dataset=")])
def test_a_dataset_file_says_what_the_checks_need(override):
    data = composed(override).dataset
    assert data.name == ("folder" if override == "dataset=huggingface" else override.removeprefix("dataset="))
    assert list(data.classes) == ["train", "val", "test"]
    assert len(data.mean) == len(data.std) == data.channels


# Who wins: base < algo < model < dataset < experiment < command line


def test_later_groups_win_over_earlier_ones(tmp_path):
    """Files of our own, all of which set shots; each group in turn leaves it to the one before."""
    order = ("algo", "model", "dataset", "experiment")
    shipped = {"algo": "fomaml", "model": "conv4_strided", "dataset": "glyphs"}
    for value, group in enumerate(order, start=2):
        below = f"defaults: [{shipped[group]}]\n" if group in shipped else ""
        (tmp_path / group).mkdir()
        (tmp_path / group / "own.yaml").write_text(f"# @package _global_\n{below}shots: {value}\n")

    def shots(*groups, last=()):
        return composed(f"hydra.searchpath=[file://{tmp_path}]", *(f"{group}=own" for group in groups), *last).shots

    assert composed().shots == 1
    for n in range(1, len(order) + 1):
        assert shots(*order[:n]) == n + 1
    assert shots(*order, last=["shots=5"]) == 5


def test_the_shipped_files_win_in_that_order_too():
    assert composed("algo=zero_init").init_scale == 0  # algo over base
    assert composed("algo=zero_init", "init_scale=0.5").init_scale == 0.5  # command line over algo
    assert composed("dataset=cifarfs").inner_lr == 0.01  # dataset over base
    assert composed("dataset=cifarfs").model.name == "conv4_pooled"  # dataset over model's default
    assert composed("dataset=cifarfs", "model=conv4_strided").model.name == "conv4_strided"
    assert composed("dataset=omniglot").val_every == 100
    paper = composed("experiment=paper_omniglot_5w1s")  # experiment over dataset
    assert (paper.dataset.name, paper.val_every, paper.test_every) == ("omniglot", 30, 30)
    assert composed("experiment=paper_omniglot_5w1s", "val_every=50").val_every == 50
    assert composed("experiment=paper_omniglot_5w1s", "dataset=glyphs").dataset.name == "glyphs"


def test_the_paper_experiment_has_the_papers_settings():
    cfg = composed("experiment=paper_omniglot_5w1s")
    expected = {
        "ways": 5, "shots": 1, "queries": 15, "inner_steps": 2, "test_steps": 3, "inner_lr": 0.4, "outer_lr": 0.001,
        "meta_batch_size": 32, "iterations": 3000, "test_every": 30, "init_scale": 1,
    }  # fmt: skip
    assert {knob: cfg[knob] for knob in expected} == expected
    assert cfg.model.name == "conv4_strided" and cfg.callbacks.record.test_curve_tasks == 992


def test_the_cosine_similarity_experiment_is_a_sweep_of_one_task():
    cfg = composed("experiment=cosine_similarity")
    expected = {"ways": 5, "shots": 10, "queries": 10, "meta_batch_size": 1, "iterations": 101, "inner_steps": 2}
    assert {knob: cfg[knob] for knob in expected} == expected
    assert (cfg.dataset.name, cfg.dataset.tasks) == ("omniglot", "one_task")
    photos = composed("experiment=cosine_similarity", "dataset=cifarfs")
    assert (photos.dataset.tasks, photos.inner_lr, photos.meta_batch_size) == ("one_task", 0.01, 1)
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        whole = hydra.compose("config", overrides=["experiment=cosine_similarity"], return_hydra_config=True)
    assert whole.hydra.mode.name == "MULTIRUN"
    assert whole.hydra.sweeper.params == {"algo": "fomaml,zero_init,zero", "seed": "0,1,2,3,4,5,6,7,8,9"}


@pytest.mark.parametrize("dataset", PHOTOS)
def test_photo_datasets_have_the_papers_settings(dataset):
    cfg = composed(f"dataset={dataset}")
    assert (cfg.model.name, cfg.inner_lr, cfg.inner_steps, cfg.test_steps) == ("conv4_pooled", 0.01, 5, 10)
    assert cfg.meta_batch_size == 4


# test_steps follows inner_steps


@pytest.mark.parametrize(
    ("dataset", "inner_steps", "test_steps"),
    [("glyphs", 1, 3), ("glyphs", 3, 3), ("glyphs", 7, 7), ("cifarfs", 1, 10), ("folder", 5, 10), ("folder", 12, 12)],
)
def test_test_steps_follow_inner_steps(dataset, inner_steps, test_steps):
    cfg = composed(*valid(f"dataset={dataset}"), f"inner_steps={inner_steps}")
    check(cfg)
    assert cfg.test_steps == test_steps


def test_explicit_test_steps_stand():
    cfg = composed("inner_steps=1", "test_steps=1")
    check(cfg)
    assert cfg.test_steps == 1


# Zeroing


@pytest.mark.parametrize(
    ("overrides", "first_order", "zeroing"),
    [
        (["algo=fomaml"], True, False),
        (["algo=somaml"], False, False),
        (["algo=zero"], True, True),
        (["algo=zero_init"], True, False),
        (["algo=zero", "algo.first_order=false"], False, True),
        (["algo=zero_init", "algo.first_order=false"], False, False),
        (["algo=fomaml", "+zeroing=true"], True, True),
        (["algo=somaml", "+zeroing=true"], False, True),
        (["algo=zero", "+zeroing=false"], True, False),
        (["algo=zero_init", "+zeroing=true"], True, True),
        (["algo=fomaml", "+zeroing=false"], True, False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_algorithm_and_zeroing_in_every_pairing(overrides, first_order, zeroing):
    cfg = composed(*overrides)
    check(cfg)
    assert cfg.algo.first_order is first_order
    assert cfg.callbacks.zero_head.enabled is zeroing  # what acts
    recorded = settings(cfg)  # what is recorded and compared
    assert (recorded["algo"]["first_order"], recorded["algo"]["zeroing"]) == (first_order, zeroing)
    assert "zeroing" not in recorded


def test_settings_do_not_tell_how_zeroing_was_asked_for():
    assert settings(composed("algo=zero")) == settings(composed("algo=fomaml", "+zeroing=true"))
    assert settings(composed("algo=zero")) != settings(composed("algo=fomaml"))


@pytest.mark.parametrize("override", ["algo=fomaml", *(override for override in CONFIGS if "experiment=" in override)])
def test_nothing_takes_the_place_of_plus_zeroing(override):
    """Hydra refuses `+zeroing=true` where there is a top-level key or a config group of that name."""
    assert "zeroing" not in composed(override)
    assert not (CONF / "zeroing").exists()
    assert composed(override, "+zeroing=true").callbacks.zero_head.enabled is True


# Mistakes


COUNTS = (
    "ways", "shots", "queries", "inner_steps", "test_steps", "meta_batch_size", "iterations", "val_every", "val_tasks",
    "test_every", "test_tasks", "tasks_at_once", "threads",
)  # fmt: skip
OPTIONAL = ("test_every", "tasks_at_once", "threads", "save_minutes", "stop_at_accuracy", "checkpoint")


def changed(knob, value):
    """The default configuration but for one knob."""
    cfg = composed()
    cfg[knob] = value
    return cfg


@pytest.mark.parametrize("knob", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 2.5, 3.0, "many", True, [3]])
def test_a_count_is_a_positive_integer(knob, value):
    assert complaint(changed(knob, value)).startswith(f"{knob}={shown(value)}: must be an integer of at least ")


@pytest.mark.parametrize("knob", [knob for knob in COUNTS if knob not in OPTIONAL])
def test_a_count_cannot_be_left_out(knob):
    assert complaint(changed(knob, None)).startswith(f"{knob}=null: must be an integer of at least ")


@pytest.mark.parametrize("knob", OPTIONAL)
def test_optional_knobs_can_be_null(knob):
    check(changed(knob, None))


REAL = "must be a number "
MISTAKES = {  # command line: the beginning of the line, and what it must also say
    # the task
    "ways=1": ("ways=1: ", "at least 2"),
    "ways=31": ("ways=31: ", "glyphs has 30 val classes; at most 30 ways"),
    "ways=216": ("ways=216: ", "glyphs has 215 train classes; at most 215 ways"),
    "dataset=omniglot ways=173": ("ways=173: ", "omniglot has 172 val classes"),
    "dataset=cifarfs dataset.root=photos ways=17": ("ways=17: ", "cifarfs has 16 val classes"),
    "shots=6": ("shots+queries=6+15: ", "glyphs has 20 images per class; lower shots or queries"),
    "queries=20": ("shots+queries=1+20: ", "20 images per class"),
    "dataset=cifarfs dataset.root=photos queries=600": ("shots+queries=1+600: ", "600 images per class"),
    # evaluation
    "evaluation.statistics=queries": ("evaluation.statistics=queries: ", "one of task, support, each, or a list of"),
    "evaluation.statistics=[]": ("evaluation.statistics=[]: ", "as [task,support,each]"),
    "evaluation.statistics=[each,each]": ("evaluation.statistics=[each, each]: ", "as [task,support,each]"),
    "evaluation.statistics=[task,all]": ("evaluation.statistics=[task, all]: ", "as [task,support,each]"),
    "loss=mse calibration=true": ("calibration=true: ", "logits are no probabilities"),
    # steps and rates
    "inner_steps=5 test_steps=4": ("test_steps=4: ", "at least inner_steps=5"),
    "dataset=fc100 ways=21": ("ways=21: ", "fc100 has 20 val classes"),
    "dataset=tieredimagenet ways=98": ("ways=98: ", "tieredimagenet has 97 val classes"),
    "dataset=miniimagenet dataset.trust=yes_please": ("dataset.trust=yes_please: ", "true or false"),
    "dataset=cifarfs test_steps=4": ("test_steps=4: ", "at least inner_steps=5"),
    "inner_lr=0": ("inner_lr=0: ", "above 0"),
    "recompute_steps=1": ("recompute_steps=1: ", "true or false"),
    "inner_lr=fast": ("inner_lr=fast: ", REAL),
    "inner_lr=true": ("inner_lr=true: ", REAL),
    "inner_lr=null": ("inner_lr=null: ", REAL),
    "inner_lr=nan": ("inner_lr=nan: ", REAL),
    "inner_lr=inf": ("inner_lr=inf: ", REAL),
    "outer_lr=0.0": ("outer_lr=0.0: ", "above 0"),
    "outer_lr=-0.1": ("outer_lr=-0.1: ", "above 0"),
    "init_scale=-1": ("init_scale=-1: ", "at least 0"),
    "init_scale=null": ("init_scale=null: ", REAL),
    "dataset.std=[0.0]": ("dataset.std=[0.0]: ", "above 0"),
    "save_minutes=0": ("save_minutes=0: ", "above 0"),
    "trainer=ddp trainer.strategy.timeout=0": ("trainer.strategy.timeout=0: ", "an integer of at least 1"),
    "figures.format=svg": ("figures.format=svg: ", "one of png, pdf"),
    "stop_at_accuracy=0": ("stop_at_accuracy=0: ", "above 0"),
    "stop_at_accuracy=95": ("stop_at_accuracy=95: ", "fraction, at most 1"),
    "stop_at_accuracy=high": ("stop_at_accuracy=high: ", REAL),
    "val_tasks=1": ("val_tasks=1: ", "at least 2"),
    "test_tasks=1": ("test_tasks=1: ", "at least 2"),
    # the rest
    "seed=-1": ("seed=-1: ", "at least 0"),
    "seed=1.5": ("seed=1.5: ", "integer"),
    "seed=null": ("seed=null: ", "integer"),
    "seed=4294967296": ("seed=4294967296: ", "at most 4294967295"),
    "engine=fast": ("engine=fast: ", "one of auto, sequential, batched"),
    "trainer.precision=16-mixed": ("trainer.precision=16-mixed: ", "one of 32-true"),
    "logger.mode=loud": ("logger.mode=loud: ", "one of online, offline, disabled"),
    "algo.first_order=maybe": ("algo.first_order=maybe: ", "true or false"),
    "algo.zeroing=1": ("algo.zeroing=1: ", "true or false"),
    "algo.adapted=tail": ("algo.adapted=tail: ", "one of all, head, encoder"),
    "algo.head=own": ("algo.head=own: ", "one of learned, shared, prototypes"),
    "algo.head=none": ("algo.head=none: ", "one of learned, shared, prototypes"),
    "algo.step_losses=0": ("algo.step_losses=0: ", "at least 1"),
    "algo.learned_inner_lr=1": ("algo.learned_inner_lr=1: ", "true or false"),
    "algo=contrastive algo.head=shared": ("algo.head=shared: ", "explicit loss"),
    "algo=boil +zeroing=true": ("+zeroing=true: ", "algo.adapted=encoder"),
    "algo=protomaml +zeroing=true": ("+zeroing=true: ", "algo.head=prototypes"),
    "algo=protomaml model.head_bias=false": ("model.head_bias=false: ", "algo.head=prototypes"),
    "algo=metasgd probes=true": ("probes=true: ", "single inner_lr"),
    "algo=contrastive algo.noise=much": ("algo.noise=much: ", "true or false"),
    "algo=contrastive inner_steps=2 algo.first_order=false": ("inner_steps=2: ", "first order alone; use 1"),
    "algo=contrastive algo.adapted=all": ("algo.adapted=all: ", "algo.adapted=head"),
    "algo=contrastive loss=mse": ("loss=mse: ", "cross entropy"),
    "loss=absolute": ("loss=absolute: ", "one of cross_entropy, mse"),
    "callbacks=inner_products": ("loss=cross_entropy: ", "loss=mse"),
    "loss=mse probes=true": ("probes=true: ", "leave them out with loss=mse"),
    "algo=protonet +zeroing=true": ("+zeroing=true: ", "could be zeroed; use false"),
    "algo=protonet algo.adapted=head": ("algo.adapted=head: ", "adapts nothing; use all"),
    "algo=protonet algo.head=learned": ("algo.head=learned: ", "algo=protonet"),
    "algo=protonet algo.step_losses=9": ("algo.step_losses=9: ", "algo=protonet"),
    "algo=protonet algo.learned_inner_lr=true": ("algo.learned_inner_lr=true: ", "algo=protonet"),
    "algo=protonet algo.distance=angle": ("algo.distance=angle: ", "one of dot, squared, cosine"),
    "algo=protonet algo.temperature=0": ("algo.temperature=0: ", "above 0"),
    "algo=protonet algo.distance=squared model.head_bias=false": ("model.head_bias=false: ", "has a bias"),
    "algo=protonet probes=true": ("probes=true: ", "algo.head=prototypes"),
    "probes=some": ("probes=some: ", "true or false"),
    "model.head_bias=0": ("model.head_bias=0: ", "true or false"),
    "+zeroing=maybe": ("zeroing=maybe: ", "true or false"),
    "+zeroing=null": ("zeroing=null: ", "true or false"),
    "fit=1": ("fit=1: ", "true or false"),
    "fit=false": ("fit=false: ", "checkpoint=PATH"),
    # the image and the network
    "dataset.size=22": ("dataset.size=22: ", "conv4_strided needs images of at least 23 pixels"),
    "dataset=folder dataset.root=photos dataset.size=15": (
        "dataset.size=15: ",
        "conv4_pooled needs images of at least 16 pixels",
    ),
    "dataset.size=0": ("dataset.size=0: ", "at least 1"),
    "dataset.size=28.5": ("dataset.size=28.5: ", "integer"),
    "dataset.channels=2": ("dataset.channels=2: ", "1 (grey) or 3 (colour)"),
    "dataset.channels=3": ("dataset.channels=3: ", "the images of glyphs are grey"),
    "dataset=cifarfs dataset.channels=1": ("dataset.mean=[0.485, 0.456, 0.406]: ", "dataset.channels=1 numbers"),
    "dataset.std=[1.0,1.0]": ("dataset.std=[1.0, 1.0]: ", "dataset.channels=1 numbers"),
    "model.width=0": ("model.width=0: ", "at least 1"),
    "model=resnet12 model.drop_block=1": ("model.drop_block=1: ", "below 1"),
    "model=resnet12 model.drop_block=true": ("model.drop_block=true: ", "at least 0"),
    "model=resnet12 dataset.size=15": ("dataset.size=15: ", "resnet12 needs images of at least 16 pixels"),
    "model=module": ("model.module=null: ", "{_target_: torchvision.models.resnet18}"),
    "model=module model.module=torchvision.models.resnet18": (
        "model.module=torchvision.models.resnet18: ",
        "must be {_target_: torchvision.models.resnet18}",
    ),
    "model=module model.module={_target_:a.B} model.head=3": ("model.head=3: ", "name of a linear layer"),
    "augment=standard augment.crop=7": ("augment.crop=7: ", "{_target_: kornia.augmentation.NAME}"),
    "augment=standard augment.flip._target_=torchvision.transforms.v2.RandomHorizontalFlip": (
        "augment.flip=",
        "must be {_target_: kornia.augmentation.NAME}",
    ),
    # the tasks of training
    "dataset.tasks=both": (
        "dataset.tasks=both: ",
        "one of mutually_exclusive, non_mutually_exclusive, fixed_blocks, one_task",
    ),
    "dataset.tasks=null": ("dataset.tasks=null: ", "one of mutually_exclusive"),
    "callbacks=cosine_similarity": ("dataset.tasks=mutually_exclusive: ", "dataset.tasks=one_task"),
    "experiment=cosine_similarity queries=1": ("queries=1: ", "at least 2"),
    "experiment=cosine_similarity callbacks.cosine_similarity.every=0": ("callbacks.cosine_similarity.every=0: ", "1"),
    # the split, and where the images lie
    "dataset=omniglot dataset.resample=nearest": ("dataset.resample=nearest: ", "one of bilinear, lanczos"),
    "dataset=fc100 dataset.archive=../x": ("dataset.archive=../x: ", "the name of a folder in the cache"),
    "dataset.device=gpu": ("dataset.device=gpu: ", "one of auto, cpu, cuda"),
    "dataset.other_split=yes": ("dataset.other_split=yes: ", "true or false"),
    "dataset=omniglot dataset.split=mine": ("dataset.split=mine: ", "one of vinyals, random1200, lake"),
    "dataset=omniglot dataset.split_seed=-1": ("dataset.split_seed=-1: ", "at least 0"),
    "dataset=omniglot dataset.rotations=4": ("dataset.rotations=4: ", "true or false"),
    "dataset=omniglot dataset.split=random1200 ways=101": ("ways=101: ", "100 val classes"),
    "dataset=omniglot dataset.rotations=true ways=689": ("ways=689: ", "688 val classes"),
    "dataset=folder dataset.root=photos dataset.fractions.val=0.2": ("dataset.fractions=", "add up to 1"),
    "dataset=folder dataset.root=photos dataset.fractions.val=0": ("dataset.fractions.val=0: ", "above 0"),
    # where the photos are
    "dataset=folder": ("dataset.root=null: ", "a folder or zip with train|val|test/CLASS/image or CLASS/image"),
    "dataset=cub": ("dataset.root=null: ", "the folder CUB_200_2011 of its archive, unpacked"),
    "trainer.max_steps=7": ("trainer.max_steps=7: ", "set iterations=7"),
    # mistyped keys
    "+zerong=true": ("zerong=true: ", "did you mean +zeroing?"),
    "+inner_step=3": ("inner_step=3: ", "did you mean inner_steps?"),
    "+colour=red": ("colour=red: ", "ways"),
    "+algo.zerong=true": ("algo.zerong=true: ", "did you mean algo.zeroing?"),
    "+trainer.max_epoch=3": (
        "trainer.max_epoch=3: ",
        "did you mean trainer.max_epochs? (trainer.max_epochs=3: must be -1; use iterations)",
    ),
    # what is no value at all, or none of this knob
    "dataset.std=1": ("dataset.std=1: ", "a list of numbers above 0"),
    "dataset.std=null": ("dataset.std=null: ", "a list of numbers above 0"),
    "dataset.std=[inf]": ("dataset.std=[inf]: ", "a list of numbers above 0"),
    "dataset.mean=null": ("dataset.mean=null: ", "a list of numbers"),
    "dataset.mean=0": ("dataset.mean=0: ", "a list of numbers"),
    "dataset.mean=[nan]": ("dataset.mean=[nan]: ", "a list of numbers"),
    "dataset.classes=null": ("dataset.classes=null: ", "{train: ..., val: ..., test: ...}"),
    "dataset.classes.train=many": ("dataset.classes.train=many: ", "an integer of at least 1, or null"),
    "dataset.images_per_class=abc": ("dataset.images_per_class=abc: ", "an integer of at least 2, or null"),
    "dataset.name=null": ("dataset.name=null: ", "a name"),
    "dataset.name=a/b": ("dataset.name=a/b: ", "a name of letters, digits and ._-"),
    "dataset.name=[a,b]": ("dataset.name=[a, b]: ", "a name"),
    "dataset.size=???": ("dataset.size=???: ", "give it one"),
    "dataset.source=null": ("dataset.source=null: ", "{_target_: ...}"),
    "dataset=folder dataset.root=photos dataset.fractions=null": ("dataset.fractions=null: ", "{train: ..., val: "),
    "model.smallest_image=abc": ("model.smallest_image=abc: ", "an integer of at least 1"),
    "model.network=null": ("model.network=null: ", "{_target_: ...}"),
    "callbacks.record=null": ("callbacks.record=null: ", "{_target_: ..., val_every: ..., "),
    "callbacks.record.val_every=0": ("callbacks.record.val_every=0: ", "an integer of at least 1"),
    "dataset.source.size=14": ("dataset.source.size=14: ", "set dataset.size=14 instead"),
    "callbacks.record.val_every=7": ("callbacks.record.val_every=7: ", "set val_every=7 instead"),
    "test_every=5 callbacks.record.test_curve_tasks=0": ("callbacks.record.test_curve_tasks=0: ", "at least 2"),
    "callbacks.zero_head.enabled=true": ("callbacks.zero_head.enabled=true: ", "use +zeroing=true"),
    "model.network.ways=3": ("model.network.ways=3: ", "set ways=3 instead"),
    "+trainer.limit_test_batches=0": ("trainer.limit_test_batches=0: ", "use test_tasks"),
    "+trainer.gradient_clip_val=1": (
        "trainer.gradient_clip_val=1: ",
        "no such knob; known are accelerator, benchmark,",
    ),
    "+trainer.deterministic=maybe": ("trainer.deterministic=maybe: ", "true, false or warn"),
    "trainer.inference_mode=true": ("trainer.inference_mode=true: ", "must be false"),
    "trainer.accelerator=cuuda": ("trainer.accelerator=cuuda: ", "one of auto, cpu, gpu, cuda"),
    "trainer=ddp meta_batch_size=4 trainer.devices=4 test_every=1 callbacks.record.test_curve_tasks=2": (
        "callbacks.record.test_curve_tasks=2: ",
        "at least 4",
    ),
    "outer_lr=4e38": ("outer_lr=4e+38: ", "at most 3.4e+38"),
    "threads=1000000": ("threads=1000000: ", "at most 1024"),
    "dataset.size=2048": ("dataset.size=2048: ", "at most 1024"),  # as whoever reads such a run later has it
    "inner_steps=1001": ("inner_steps=1001: ", "at most 1000"),
    "queries=20000": ("queries=20000: ", "at most 10000"),
    "checkpoint=''": ("checkpoint=: ", "a path"),
    "checkpoint=7": ("checkpoint=7: ", "a path, with ./ before a number"),
    "logger.project=a/b": ("logger.project=a/b: ", "none of them /"),
    "ways=${nope}": ("ways=${nope}: ", "give it one"),
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_with_knob_value_and_remedy(command):
    begin, remedy = MISTAKES[command]
    message = complaint(composed(*command.split()))
    assert message.startswith(begin)
    assert remedy in message.removeprefix(begin)


@pytest.mark.parametrize(
    "command",
    [
        "dataset=omniglot dataset.rotations=true ways=688",
        "ways=30", "shots=5", "ways=2", "seed=0", "seed=4294967295", "init_scale=0", "stop_at_accuracy=1", "inner_lr=1",
        "+trainer.deterministic=warn", "+trainer.profiler=simple",
        "dataset.size=23", "dataset=folder dataset.root=photos dataset.size=16", "val_tasks=2",
        "dataset=folder dataset.root=photos ways=500 shots=900",
        "model=module model.module={_target_:a.B,depth:3}", "augment=standard",
        "algo=protonet algo.distance=cosine model.head_bias=false",
        "inner_steps=7 test_steps=7", "fit=false checkpoint=a/checkpoints/best.ckpt", "logger.mode=offline",
    ],
)  # fmt: skip
def test_what_is_just_right_passes(command):
    check(composed(*command.split()))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("zeroing=true", r"\+zeroing=true"),
        ("zerong=true", "zerong"),
        ("inner_step=3", "inner_step"),
        ("algo.zerong=true", "zerong"),
        ("dataset.rot=here", "rot"),
    ],
)
def test_hydra_refuses_an_unknown_key(override, said):
    with pytest.raises(ConfigCompositionException, match=said):
        composed(override)


@pytest.mark.parametrize("group", ["algo", "dataset", "model", "trainer", "logger", "experiment"])
def test_hydra_names_the_choices_of_a_group(group):
    with pytest.raises(MissingConfigException) as error:
        composed(f"{group}=nope")
    for path in (CONF / group).glob("*.yaml"):
        assert path.stem in str(error.value)


# train.py as a user runs it, with a torch that ends the program


@pytest.fixture
def train(tmp_path):
    for module in ("numpy", "torch", "pytorch_lightning", "learn2learn"):
        (tmp_path / "traps" / module).mkdir(parents=True)
        trap = f"import os, sys\nprint('{module} was imported', file=sys.stderr, flush=True)\nos._exit(99)\n"
        (tmp_path / "traps" / module / "__init__.py").write_text(trap)
    (tmp_path / "work").mkdir()

    def run(*arguments, **variables):
        path = os.pathsep.join([str(tmp_path / "traps"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
        return subprocess.run(
            [sys.executable, str(TRAIN), *arguments],
            cwd=tmp_path / "work",
            env={**environment, "PYTHONPATH": path, **variables},
            capture_output=True,
            text=True,
            timeout=HANG,
        )

    return run


def test_what_is_done_and_where_is_said_before_numpy_and_torch_are_imported(train, tmp_path):
    """That the traps catch a program which imports them is shown here too, for the tests below."""
    done = train("algo=somaml", "+zeroing=true", "ways=20", "hydra.run.dir=run")
    assert done.returncode == 99 and "numpy was imported" in done.stderr
    line = "Training SOMAML + zeroing, glyphs 20-way 1-shot, 400 iterations; the results go to"
    assert done.stdout == f"{line} {tmp_path / 'work' / 'run'}\n"


@pytest.mark.parametrize(
    ("overrides", "before", "line"),
    [
        (["checkpoint=model.ckpt", "fit=false"], None, "Testing model.ckpt; the results go to {}"),
        (["checkpoint=c.ckpt"], None, "Going on with the run in {}; if it is finished, its results are shown"),
        ([], "checkpoints/last.ckpt", "Going on with the run in {}; if it is finished, its results are shown"),
        ([], "results.json", "Going on with the run in {}; if it is finished, its results are shown"),
    ],
)
def test_a_test_and_a_run_that_goes_on_say_so_once(overrides, before, line, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    if before:
        (tmp_path / before).parent.mkdir(exist_ok=True)
        (tmp_path / before).touch()
    announce(tmp_path, composed(*overrides))
    monkeypatch.setenv("FEWSHOT_PARENT", "1")  # as in a process that trainer=ddp starts
    announce(tmp_path, composed(*overrides))
    assert caplog.messages == [line.format(tmp_path)]


@pytest.mark.slow
def test_a_mistake_ends_the_program_with_one_line(train):
    """As do those of test_refusals.py."""
    done = train("ways=1")
    assert (done.returncode, done.stderr, done.stdout) == (1, "ways=1: must be an integer of at least 2\n", "")


def test_an_output_folder_that_cannot_be_written_is_one_line(main, tmp_path, capsys):
    """And the first that is said: torch was not imported for it."""
    (tmp_path / "file").touch()
    line = main(f"hydra.run.dir={tmp_path}/file/run")
    assert line.startswith(f"hydra.run.dir={tmp_path}/file/run: cannot be written (")
    assert line.endswith("name a folder that can") and "\n" not in line
    assert capsys.readouterr() == ("", "")


def test_hydra_full_error_shows_the_traceback(train):
    done = train("ways=1", HYDRA_FULL_ERROR="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "UserError: ways=1: must be" in done.stderr


@pytest.mark.slow
def test_help_names_knobs_and_choices(train, main, capsys):
    done = train("--help", COLUMNS="120")
    assert (done.returncode, done.stderr) == (0, "")
    said = " ".join(done.stdout.split())
    for words in (
        "algo fomaml, ablation/without_both, ablation/without_interference, ablation/without_noise, anil, boil,",
        "contrastive, imaml, inner_adam, inner_momentum, metasgd, msl, protomaml, protonet, reptile, somaml, unicorn,",
        "unicorn, zero, zero_init",
        "inner_lr=0.4 The learning rate of the inner loop, eta. [a number above 0] (0.01 with photos)",
        "meta_batch_size=16 Tasks per outer update.",
        "+zeroing true: the zeroing trick",
        "evaluation.statistics=task By whose statistics BatchNorm normalises",
        "figures.format=png png; or pdf:",
    ):
        assert words in said
    assert main("-h", "figures") == 0 and capsys.readouterr().out.startswith("figures.format=png ")
    assert main("-h", "dataset=omniglot", "inner_lr") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "dataset.split=vinyals omniglot: The classes of each split." in said and "inner_lr=0.4 " in said
    assert "dataset.classes={train: 215, val: 30, test: 73} Classes of each split;" in said and "queries" not in said
    assert main("--help", "inner_lrr") == "--help inner_lrr: no such knob or group; did you mean inner_lr?"
    assert main("--hydra-help") == 0 and capsys.readouterr().out.startswith("Hydra (")


def test_cfg_job_prints_the_configuration(train):
    done = train("--cfg", "job", "algo=zero", "inner_steps=7", "+zeroing=false")
    assert (done.returncode, done.stderr) == (0, "")
    cfg = OmegaConf.create(done.stdout)
    assert (cfg.ways, cfg.inner_steps, cfg.test_steps) == (5, 7, 7)
    assert cfg.callbacks.zero_head.enabled is False


@pytest.mark.slow
def test_composing_and_checking_every_file_imports_no_torch():
    """One file of each group at a time."""
    groups = itertools.groupby(CONFIGS, lambda override: override.split("=")[0])
    together = itertools.zip_longest(*(list(files) for _, files in groups))
    calls = [[word for override in row if override for word in valid(override)] for row in together]
    program = f"""
import sys
import hydra
from fewshot.config.check import check
from fewshot.config.tree import CONF, settings
for overrides in {calls!r}:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = hydra.compose("config", overrides=overrides)
    check(cfg)
    settings(cfg)
print([name for name in ("torch", "pytorch_lightning", "learn2learn") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=HANG)
    assert done.stdout == "[]\n"
