"""What a valid configuration is; every mistake that YAML alone shows, said in one line before torch is imported."""

import hashlib
import math
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fewshot import ranks
from fewshot.errors import UserError, nearest, shown

# Beside this file in a wheel, at the top of a checkout.
CONF = next(path for path in (Path(__file__).parent / "conf", Path(__file__).parents[2] / "conf") if path.is_dir())


def _run_folder(checkpoint: str | None, fit: bool, new: str) -> str:
    """Where a run writes: training that continues from RUN/checkpoints/x.ckpt goes on in RUN, all else in `new`."""
    return str(Path(str(checkpoint)).absolute().parent.parent) if checkpoint and fit else new


def job_folder(overrides: list[str]) -> str:
    """A job's folder in a sweep, named by its overrides alone, in any order; safe in a path and in checkpoint=."""
    pairs = dict(override.lstrip("+").split("=", 1) for override in overrides)
    exact = [f"{key}-{value}" for key, value in sorted(pairs.items())]
    name = re.sub("[^A-Za-z0-9._-]+", "-", "__".join(exact))
    if name != "__".join(exact) or name.count("__") >= max(1, len(pairs)) or len(name) > 150:
        name = f"{name[:150]}-{hashlib.sha256(repr(exact).encode()).hexdigest()[:8]}"
    return name or "defaults"


def _first_call(folder: str) -> str | None:
    """Hydra's record of the call, only where no run has been yet, and from one process."""
    return None if ranks.rank() or (Path(folder) / "checkpoints" / "last.ckpt").exists() else ".hydra"


def _job_number(number: int | None) -> str:
    """What the log lines of a sweep's job begin with: two may run side by side."""
    return "" if number is None else f"#{number} "


RESOLVERS = {
    "at_least": max,
    "rotated": lambda yes, classes: 4 * classes if yes else classes,  # dataset.rotations: a class in four directions
    "run_folder": _run_folder,
    "job_folder": job_folder,
    "job_number": _job_number,
    "first_call": _first_call,
}
for _name, _resolver in RESOLVERS.items():
    OmegaConf.register_new_resolver(_name, _resolver, replace=True)


INTEGERS = {  # knob: smallest value
    "ways": 2, "shots": 1, "queries": 1, "inner_steps": 1, "test_steps": 1, "meta_batch_size": 1, "iterations": 1,
    "seed": 0, "val_every": 1, "val_tasks": 2, "test_every": 1, "test_tasks": 2, "tasks_at_once": 1, "threads": 1,
}  # fmt: skip
OPTIONAL = ("test_every", "tasks_at_once", "threads", "stop_at_accuracy", "checkpoint")
GROUPS = ("algo", "model", "dataset", "augment", "trainer", "logger", "callbacks")
REALS = ("inner_lr", "outer_lr", "init_scale", "stop_at_accuracy")
FLAGS = (
    *("fit", "probes", "zeroing", "algo.first_order", "algo.zeroing", "algo.learned_inner_lr", "algo.noise"),
    *("algo.interference", "model.head_bias", "dataset.trust", "dataset.other_split", "dataset.rotations"),
)
KNOBS = {*INTEGERS, *REALS, *GROUPS, "engine", "checkpoint", "fit", "probes", "zeroing"}
ALGO = ("first_order", "adapted", "head", "step_losses", "learned_inner_lr", "zeroing", "noise", "interference")
ADAPTED = ("all", "head", "encoder")
HEADS = ("learned", "shared", "prototypes")
TASKS = ("mutually_exclusive", "non_mutually_exclusive", "one_task")
ENGINES = ("auto", "sequential", "batched")
PRECISIONS = ("32-true", "tf32", "64-true", "bf16-mixed")  # float16 would need its gradients scaled, task by task
DEVICES = ("auto", "cpu", "cuda")
# Test zeroing, adapting from a copy with a zeroed head: each mode's name in results.json, and what metrics' names add.
MODES = {"zeroing_off": "", "zeroing_on": "_zeroed"}
LOGGER_MODES = (None, "online", "offline", "disabled")


def check_overrides(overrides: list[str]) -> None:
    """Refuses what Hydra would take in silence: a key that is added (+zerong=true) or removed.

    Raises:
        UserError: any + but +zeroing and +trainer.X, which Lightning's Trainer checks; any ~.
    """
    for override in overrides:
        key = override.lstrip("+~").split("=")[0]
        if override[:1] in ("", "~") or (override[0] == "+" and key != "zeroing" and not key.startswith("trainer.")):
            raise UserError(f"{override}: a + is for +zeroing alone, a ~ for nothing; {nearest(key, KNOBS)}")


def check(cfg: DictConfig) -> None:
    """Raises UserError for the first mistake found."""
    for key in cfg:
        if key not in KNOBS:
            raise UserError(f"{key}: no such knob; {nearest(key, KNOBS)}")
    for key in cfg.algo:
        if key not in ALGO:
            raise UserError(f"algo.{key}: no such knob; {nearest(key, set(ALGO))}")
    for knob, smallest in INTEGERS.items():
        if not (cfg[knob] is None and knob in OPTIONAL):
            check_integer(knob, cfg[knob], smallest)
    if cfg.seed > 2**32 - 1:
        raise UserError(f"seed={cfg.seed}: must be at most {2**32 - 1}")
    for knob in REALS:
        if not (cfg[knob] is None and knob in OPTIONAL):
            _real(knob, cfg[knob], above=knob != "init_scale")
    if cfg.stop_at_accuracy is not None and cfg.stop_at_accuracy > 1:
        raise UserError(f"stop_at_accuracy={cfg.stop_at_accuracy}: is a fraction, at most 1")
    for knob in FLAGS:
        value = OmegaConf.select(cfg, knob, default=False)
        if not isinstance(value, bool):
            raise UserError(f"{knob}={shown(value)}: must be true or false")
    _check_algo(cfg)
    if cfg.engine not in ENGINES:
        raise UserError(f"engine={cfg.engine}: must be one of {', '.join(ENGINES)}")
    if cfg.trainer.precision not in PRECISIONS:
        raise UserError(f"trainer.precision={cfg.trainer.precision}: must be one of {', '.join(PRECISIONS)}")
    _check_processes(cfg)
    if cfg.trainer.max_steps != cfg.iterations:
        raise UserError(f"trainer.max_steps={cfg.trainer.max_steps}: set iterations={cfg.trainer.max_steps} instead")
    check_integer("trainer.log_every_n_steps", cfg.trainer.log_every_n_steps, 1)
    if cfg.logger is not None and cfg.logger.get("mode") not in LOGGER_MODES:
        raise UserError(f"logger.mode={cfg.logger.mode}: must be one of online, offline, disabled or null")
    if cfg.test_steps < cfg.inner_steps:
        raise UserError(f"test_steps={cfg.test_steps}: must be at least inner_steps={cfg.inner_steps}")
    if not cfg.fit and cfg.checkpoint is None:
        raise UserError("fit=false: needs checkpoint=PATH, the model to test")
    _check_dataset(cfg)
    _check_model(cfg)


def _check_algo(cfg: DictConfig) -> None:
    algo = cfg.algo
    for knob, known in (("adapted", ADAPTED), ("head", HEADS)):
        if algo[knob] not in known:
            raise UserError(f"algo.{knob}={shown(algo[knob])}: must be one of {', '.join(known)}")
    if algo.step_losses is not None:
        check_integer("algo.step_losses", algo.step_losses, 1)
    if "noise" in algo and (cfg.inner_steps != 1 or algo.adapted != "head"):
        raise UserError(
            f"inner_steps={cfg.inner_steps} algo.adapted={algo.adapted}: the explicit loss of algo=contrastive is "
            "that of one inner step of the head; use inner_steps=1 algo.adapted=head"
        )
    unusual = {"head": "learned", "step_losses": None, "learned_inner_lr": False}
    if "noise" in algo and (changed := [knob for knob, usual in unusual.items() if algo[knob] != usual]):
        raise UserError(f"algo.{changed[0]}={algo[changed[0]]}: algo=contrastive has an explicit loss without it")
    zeroing = cfg.get("zeroing", algo.zeroing)
    if zeroing and algo.adapted == "encoder":
        raise UserError("+zeroing=true: with algo.adapted=encoder the head stays zero and nothing is learned from it")
    if zeroing and algo.head == "prototypes":
        raise UserError("+zeroing=true: with algo.head=prototypes no head is learned that could be zeroed")
    if algo.head == "prototypes" and cfg.model.get("head_bias") is False:
        raise UserError("model.head_bias=false: with algo.head=prototypes the head has a bias, -|c|^2; leave it out")
    if cfg.probes and (algo.head == "prototypes" or algo.learned_inner_lr):
        raise UserError("probes=true: they are of a learned head and one inner_lr; leave them out with this algorithm")


def processes(cfg: DictConfig) -> int:
    """That the run asks for, on all its machines."""
    return cfg.trainer.devices * cfg.trainer.get("num_nodes", 1)


def _check_processes(cfg: DictConfig) -> None:
    for knob in ("devices", "num_nodes"):
        check_integer(f"trainer.{knob}", cfg.trainer.get(knob, 1), 1)
    wanted, started = processes(cfg), ranks.world_size()
    if wanted > 1 and "strategy" not in cfg.trainer:
        raise UserError(f"trainer.devices={cfg.trainer.devices}: use trainer=ddp trainer.devices={cfg.trainer.devices}")
    for knob in ("meta_batch_size", "val_tasks", "test_tasks"):
        if cfg[knob] < wanted or (knob == "meta_batch_size" and cfg[knob] % wanted):
            least = f"a multiple of {wanted}" if knob == "meta_batch_size" else f"at least {wanted}"
            raise UserError(f"{knob}={cfg[knob]}: must be {least}, one share for each of {wanted} processes")
    if ranks.launcher() and started != wanted:
        raise UserError(
            f"trainer.devices={cfg.trainer.devices}: {ranks.launcher()} started {started} processes; use trainer=ddp "
            f"trainer.devices=N with N of them on each of trainer.num_nodes machines"
        )
    if not ranks.launcher() and cfg.trainer.get("num_nodes", 1) > 1:
        raise UserError(f"trainer.num_nodes={cfg.trainer.num_nodes}: several machines need torchrun or srun")


def _check_dataset(cfg: DictConfig) -> None:
    data = cfg.dataset
    check_integer("dataset.size", data.size, 1)
    if data.channels not in (1, 3):
        raise UserError(f"dataset.channels={shown(data.channels)}: must be 1 (grey) or 3 (colour)")
    for knob in ("mean", "std"):
        if len(data[knob]) != data.channels:
            raise UserError(f"dataset.{knob}={data[knob]}: must have dataset.channels={data.channels} numbers")
    if not all(isinstance(std, int | float) and std > 0 for std in data.std):
        raise UserError(f"dataset.std={data.std}: must be numbers above 0")
    if data.source.get("root", "") is None and data.source._target_ == "fewshot.data.folder.load":
        plain = " or CLASS/image" if "fractions" in data else ""
        raise UserError(
            f"dataset.root=null: set dataset.root to a folder or zip with train|val|test/CLASS/image{plain}"
        )
    _check_split(data)
    for split, classes in data.classes.items():
        if classes is not None and cfg.ways > classes:
            raise UserError(
                f"ways={cfg.ways}: dataset {data.name} has {classes} {split} classes; at most {classes} ways"
            )
    if data.images_per_class is not None and cfg.shots + cfg.queries > data.images_per_class:
        raise UserError(
            f"shots+queries={cfg.shots}+{cfg.queries}: {data.name} has {data.images_per_class} images per class; "
            "lower shots or queries"
        )
    if data.tasks not in TASKS:
        raise UserError(f"dataset.tasks={shown(data.tasks)}: must be one of {', '.join(TASKS)}")
    if "cosine_similarity" in cfg.callbacks:
        if data.tasks != "one_task":
            raise UserError(f"dataset.tasks={data.tasks}: callbacks=cosine_similarity needs dataset.tasks=one_task")
        if cfg.queries == 1:
            raise UserError("queries=1: callbacks=cosine_similarity compares queries of a class, it needs at least 2")
        check_integer("callbacks.cosine_similarity.every", cfg.callbacks.cosine_similarity.every, 1)
    for name, transform in cfg.augment.items():
        if not _makes(transform) or transform._target_.startswith("torchvision."):  # which turns all images alike
            raise UserError(f"augment.{name}={shown(transform)}: must be {{_target_: kornia.augmentation.NAME}}")


def _check_model(cfg: DictConfig) -> None:
    model = cfg.model
    if "width" in model:
        check_integer("model.width", model.width, 1)
    if "drop_block" in model:
        _real("model.drop_block", model.drop_block, above=False)
        if model.drop_block >= 1:
            raise UserError(f"model.drop_block={model.drop_block}: is a fraction, below 1")
    if "module" in model:
        if not _makes(model.module):
            raise UserError(
                f"model.module={shown(model.module)}: must be {{_target_: torchvision.models.resnet18}} or another "
                "torch.nn.Module, with its arguments"
            )
        if not isinstance(model.head, str | None):
            raise UserError(f"model.head={shown(model.head)}: must be the name of a linear layer, or null to find it")
    if cfg.dataset.size < model.smallest_image:
        raise UserError(
            f"dataset.size={cfg.dataset.size}: {model.name} needs images of at least {model.smallest_image} pixels"
        )


def _makes(value: Any) -> bool:
    """Whether Hydra makes an object of it."""
    return OmegaConf.is_dict(value) and isinstance(value.get("_target_"), str)


def _check_split(data: DictConfig) -> None:
    if data.device not in DEVICES:
        raise UserError(f"dataset.device={shown(data.device)}: must be one of {', '.join(DEVICES)}")
    if "largest_image" in data:
        check_integer("dataset.largest_image", data.largest_image, 1)
        if data.largest_image > 1000:
            raise UserError(f"dataset.largest_image={data.largest_image}: is in megapixels, at most 1000")
    if not isinstance(data.get("labels"), str | None):
        raise UserError(f"dataset.labels={shown(data.labels)}: must be the path of a CSV file, or null")
    if "split_seed" in data:
        check_integer("dataset.split_seed", data.split_seed, 0)
    if "split" in data and data.split not in data.splits:
        raise UserError(f"dataset.split={shown(data.split)}: must be one of {', '.join(data.splits)}")
    if "fractions" in data:
        for split, fraction in data.fractions.items():
            _real(f"dataset.fractions.{split}", fraction, above=True)
        if abs(sum(data.fractions.values()) - 1) > 1e-6:
            raise UserError(f"dataset.fractions={dict(data.fractions)}: must add up to 1; give all three")


def check_integer(knob: str, value: Any, smallest: int) -> None:
    """Raises UserError for all but an integer of at least `smallest`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise UserError(f"{knob}={shown(value)}: must be an integer of at least {smallest}")


def _real(knob: str, value: Any, above: bool) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (above and value == 0):
        raise UserError(f"{knob}={shown(value)}: must be a number {'above' if above else 'of at least'} 0")


def settings(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain data, +zeroing folded into algo.zeroing: what is recorded and compared."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    plain["algo"]["zeroing"] = plain.pop("zeroing", plain["algo"]["zeroing"])
    return plain
