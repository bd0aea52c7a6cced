"""Type and range of every knob. Its default and its sentence stand in conf/, relations between knobs in check.py."""

# pyright: reportInvalidTypeForm=false, reportAssignmentType=false
# The types of knobs are made by functions, which pydantic calls and pyright cannot.

from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError

from fewshot.config.kinds import (
    LARGEST,
    Channels,
    Flag,
    Made,
    Name,
    Part,
    Path,
    Project,
    Target,
    WandbName,
    above_zero,
    from_zero,
    integer,
    must_be,
    numbers,
    one_of,
    only,
    optional,
    part,
    text,
)
from fewshot.config.tree import MODES, STATISTICS
from fewshot.inner_loop import ADAPTED, DISTANCES, HEADS, LOSSES

SCHEDULES = ("none", "cosine", "multistep")
TASKS = ("mutually_exclusive", "non_mutually_exclusive", "fixed_blocks", "one_task")


# The configuration. What is not in every YAML of its group has a default here, which nothing reads.


class OwnAlgo(Part, extra="allow"):
    """One's own algorithm, named by algo._target_; it may make the head of each task itself."""

    target: optional(Target) = Field(None, alias="_target_")
    first_order: Flag
    adapted: one_of(*ADAPTED)
    head: one_of(*HEADS)
    step_losses: optional(integer(1))
    learned_inner_lr: Flag
    zeroing: Flag
    distance: optional(one_of(*DISTANCES)) = None
    temperature: optional(above_zero()) = None
    noise: Flag = True
    interference: Flag = True


class Algo(OwnAlgo, extra="forbid"):
    head: one_of(*(head for head in HEADS if head != "own"))
    momentum: from_zero(below=1) = 0
    beta1: from_zero(below=1) = 0
    beta2: from_zero(below=1) = 0
    eps: above_zero() = 1
    proximal: above_zero() = 1
    cg_steps: integer(1) = 1


class OwnModel(Part, extra="allow"):
    name: Name
    smallest_image: integer(1)
    network: Made


class Model(OwnModel, extra="forbid"):
    head_bias: Flag
    width: integer(1) = 1
    norm: one_of("batch", "group", "task") = "batch"
    drop_block: from_zero(below=1) = 0
    module: must_be("{_target_: torchvision.models.resnet18} or another torch.nn.Module, with its arguments", Made) = (
        None
    )
    head: must_be("the name of a linear layer, or null to find it", str | None) = None


class Classes(Part):
    train: optional(integer(1))
    val: optional(integer(1))
    test: optional(integer(1))


class Fractions(Part):
    train: above_zero(most=1)
    val: above_zero(most=1)
    test: above_zero(most=1)


class Splits(Part):
    vinyals: Classes
    random1200: Classes
    lake: Classes


class OwnDataset(Part, extra="allow"):
    tasks: one_of(*TASKS)
    device: one_of("auto", "cpu", "cuda")
    other_split: Flag
    name: Name
    classes: Classes
    images_per_class: optional(integer(2))
    size: integer(1, 1024)
    channels: Channels
    mean: numbers("numbers", ge=-LARGEST, le=LARGEST)
    std: numbers("numbers above 0, at least 1e-6", ge=1e-6, le=LARGEST)
    source: Made


class Dataset(OwnDataset, extra="forbid"):
    origin: must_be("a text", str)
    cache: optional(Path)
    root: optional(Path) = None
    needs_root: Flag = False
    mini_root: optional(Path) = None
    labels: optional(Path) = None
    subset: must_be("the name of a subset, or null", str | None) = None
    image_column: must_be("the name of a column, or null to find it", str | None) = None
    label_column: must_be("the name of a column, or null to find it", str | None) = None
    largest_image: integer(1, 1000) = 1
    resample: one_of("bilinear", "lanczos") = "bilinear"
    archive: text("the name of a folder in the cache", r"\w[\w.-]*") = ""
    trust: Flag = False
    fractions: Fractions = None
    split: one_of(*Splits.model_fields) = ""
    split_seed: integer(0, 2**32 - 1) = 0
    splits: Splits = None
    rotations: Flag = False


def _of_torchvision(transform: Made) -> bool:  # one set of random numbers for all images of a call
    return transform.target.startswith("torchvision.")


Transform = must_be("{_target_: kornia.augmentation.NAME}", Made, refused=_of_torchvision)
_time = text("", r"\d\d(:\d\d){3}")
_duration = must_be("DAYS:HOURS:MINUTES:SECONDS, not all zero", _time, refused=lambda time: not time.strip("0:"))


class Optimizer(Made):
    weight_decay: from_zero() = 0
    momentum: from_zero(below=1) = 0
    nesterov: Flag = False


class Strategy(Made):
    timeout: integer(1)


class Trainer(Part):
    """Training here is one epoch of outer updates: what Lightning does by its own loops is not among these."""

    instead: ClassVar = {
        **dict.fromkeys(("min_epochs", "min_steps", "limit_train_batches", "fast_dev_run"), "iterations"),
        **dict.fromkeys(("val_check_interval", "check_val_every_n_epoch"), "val_every"),
        "limit_val_batches": "val_tasks",
        "limit_test_batches": "test_tasks",
        "accumulate_grad_batches": "meta_batch_size, and tasks_at_once for less memory",
        "overfit_batches": "dataset.tasks=one_task",
        "default_root_dir": "hydra.run.dir",
        "logger": "logger",
        "callbacks": "callbacks",
    }
    target: Target = Field(alias="_target_")
    accelerator: one_of("auto", "cpu", "gpu", "cuda")
    devices: integer(1)
    num_nodes: integer(1) = 1
    strategy: part(Strategy) = None
    use_distributed_sampler: only(False, "tasks are shared out by their positions") = False
    # float16 would need its gradients scaled, task by task
    precision: one_of("32-true", "tf32", "64-true", "bf16-mixed")
    max_steps: integer(1)
    max_epochs: only(-1, "use iterations")
    log_every_n_steps: integer(1)
    max_time: optional(_duration) = None
    inference_mode: only(False, "the inner loop of the test needs gradients")
    enable_checkpointing: only(False, "use val_every")
    enable_model_summary: Flag
    enable_progress_bar: only(False, "use callbacks")
    num_sanity_val_steps: only(0, "use val_tasks")
    deterministic: must_be("true, false or warn", bool | Literal["warn"]) = False
    benchmark: Flag = False
    detect_anomaly: Flag = False
    profiler: optional(one_of("simple", "advanced", "pytorch")) = None


class Logger(Made, extra="forbid"):
    project: Project
    mode: optional(one_of("online", "offline", "disabled"))
    group: optional(WandbName)
    name: optional(WandbName)


class ZeroHead(Made, extra="forbid"):
    enabled: Flag


class Record(Made, extra="forbid"):
    val_every: integer(1)
    select: one_of(*MODES)
    val_tasks: integer(2)
    test_every: optional(integer(1))
    test_curve_tasks: integer(2)
    stop_at_accuracy: optional(above_zero(most=1))
    probes: Flag


class CosineSimilarity(Made, extra="forbid"):
    every: integer(1)


class Callbacks(Part, extra="allow"):
    """Those of this program, and any of the user's own."""

    __pydantic_extra__: dict[str, Made]
    zero_head: part(ZeroHead)
    record: part(Record)
    cosine_similarity: part(CosineSimilarity) = None
    inner_products: part(CosineSimilarity) = None


def _twice_or_none(statistics: str | list[str]) -> bool:
    return isinstance(statistics, list) and not len({*statistics}) == len(statistics) > 0


class Evaluation(Part):
    statistics: must_be(
        f"one of {', '.join(STATISTICS)}, or a list of some, as [{','.join(STATISTICS)}]",
        Literal[STATISTICS] | list[Literal[STATISTICS]],
        refused=_twice_or_none,
    )


class Figures(Part):
    format: one_of("png", "pdf")


class Config(Part):
    ways: integer(2, 10_000)
    shots: integer(1, 10_000)
    queries: integer(1, 10_000)
    inner_steps: integer(1, 1000)
    test_steps: integer(1, 1000)
    inner_lr: above_zero()
    loss: one_of(*LOSSES)
    recompute_steps: Flag
    outer_lr: above_zero()
    schedule: one_of(*SCHEDULES)
    milestones: must_be("a list of whole numbers above 0", list[Annotated[int, Field(ge=1)]])
    clip_norm: optional(above_zero())
    meta_batch_size: integer(1)
    iterations: integer(1)
    init_scale: from_zero()
    seed: integer(0, 2**32 - 1)
    val_every: integer(1)
    select: one_of(*MODES)
    val_tasks: integer(2)
    test_every: optional(integer(1))
    test_tasks: integer(2)
    evaluation: Evaluation
    calibration: Flag
    probes: Flag
    save_minutes: optional(above_zero())
    stop_at_accuracy: optional(above_zero(most=1))
    figures: Figures
    engine: one_of("auto", "sequential", "batched")
    tasks_at_once: optional(integer(1))
    threads: optional(integer(1, 1024))
    checkpoint: optional(Path)
    fit: Flag
    zeroing: Flag = False
    algo: part(Algo, OwnAlgo)
    dataset: part(Dataset, OwnDataset, maker="source")
    model: part(Model, OwnModel, maker="network")
    augment: dict[str, Transform]
    optimizer: Optimizer
    trainer: Trainer
    logger: optional(part(Logger))
    callbacks: Callbacks


validator = cache(TypeAdapter)  # to make one takes hundredths of a second


def mistakes(values: Any, kind: Any = Config) -> list[tuple[str, Any, str]]:
    """(dotted key, its value, what would be right) for each mistake in plain data, in the order of its kind."""
    words = {"missing": "is missing", "dict_type": "must be a dict", "list_type": "must be a list"}
    try:
        validator(kind).validate_python(values, strict=True)
        return []
    except ValidationError as error:
        wrong = error.errors(include_url=False)
    places = (".".join(map(str, mistake["loc"])).removesuffix(".[key]") for mistake in wrong)
    return [(place, one["input"], words.get(one["type"], one["msg"])) for place, one in zip(places, wrong, strict=True)]
