"""A model that has adapted to the images of some classes: it classifies, is written down and read again.

Shapes: K ways, S support and Q query images of C channels, H x W pixels.
"""

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fewshot.batched.execution import copied
from fewshot.config.command import integer
from fewshot.config.tree import portable
from fewshot.data.task import Task
from fewshot.errors import UserError
from fewshot.files import ADAPTED, EXPORTED, EXPORTED_CONFIG, check_place, user_path, write_file
from fewshot.norms import TaskNorm, inside, of_queries
from fewshot.predict.find import refuse_adapted
from fewshot.predict.predictions import Label, Predictions, check_statistics
from fewshot.predict.pretrained import Picture, Preprocess, Pretrained, load, stacked
from fewshot.training.choose_engine import engine_to_predict
from fewshot.training.learner import Learner


@dataclass(frozen=True)
class Adapted:
    """A model at theta_N of one task, whose head has a row for each of the K classes.

    statistics: by what BatchNorm normalises, in the words of evaluation.statistics. "task": by all queries of a call
        together, as in training, so that one prediction depends on the others; a single query has the support beside
        it. "support": by the support images as the adapted network sees them; "each": every query by itself, together
        with the support. With these two an image is classified by itself.
    support: its images, (S, C, H, W) uint8; shots: how many of them each class has, class after class.
    """

    model: Pretrained
    classes: tuple[Label, ...]
    support: Tensor
    shots: tuple[int, ...]
    statistics: str = "task"
    _weights: frozenset[str] = field(init=False, repr=False, compare=False)  # names of those that save writes

    def __post_init__(self) -> None:
        object.__setattr__(self, "_weights", frozenset(self.model.learner.state_dict()))
        object.__setattr__(self, "statistics", check_statistics("statistics", self.statistics))
        if self.statistics == "support":
            fix_statistics(self.network, self._seen(self.support))

    @property
    def network(self) -> nn.Module:
        """Preprocessed images (Q, C, H, W) to logits (Q, K). With statistics="support" torch.export takes it."""
        return self.model.learner.network

    @property
    def preprocess(self) -> Preprocess:
        """Turns a picture into what the network takes, without the leading dimension."""
        return self.model.preprocess

    @property
    def examples(self) -> list[list[Tensor]]:
        """The support images of each class."""
        return [list(images) for images in self.support.split(list(self.shots))]

    def __repr__(self) -> str:
        classes = f"{len(self.classes)} classes, {len(self.support)} images"
        return f"Adapted({self.model.config['model']['name']}, {classes}, statistics={self.statistics!r})"

    def predict(self, query: Sequence[Picture]) -> Predictions:
        """Classifies the queries.

        Raises:
            UserError: there is none, one is no image, or the logits are not finite.
        """
        images = stacked("query", self.preprocess, query)
        labels = torch.arange(len(self.classes)).repeat_interleave(torch.tensor(self.shots))
        task = Task(self._seen(self.support), labels, self._seen(images), labels[:0])
        # The moments of the support are part of the network; a single query has no other beside it.
        statistics = {"support": "task", "task": "task" if len(query) > 1 else "each"}.get(self.statistics, "each")
        batch = Task(*(field[None] for field in task))
        with torch.no_grad(), engine_to_predict(self.model.learner.network).one_line_out_of_memory(batch):
            logits = of_queries(self.network, task, partial(inside, self.network), statistics)
        if not logits.isfinite().all():
            raise UserError("the adapted model's logits are not finite numbers; adapt it in fewer steps")
        return Predictions(self.classes, logits.double().softmax(dim=1).cpu().numpy())

    def _seen(self, pixels: Tensor) -> Tensor:
        return self.preprocess.normalised(pixels).to(next(self.network.parameters()))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes model.safetensors and config.yaml, as export does, and adapted.safetensors, the support images.

        Raises:
            UserError: something is there already, or a label is neither text nor a number.
        """
        folder = user_path("out", folder)
        check_place("out", folder, without=(EXPORTED, EXPORTED_CONFIG, ADAPTED))
        labels = [label.item() if isinstance(label, np.generic) else label for label in self.classes]
        if not all(isinstance(label, Label) for label in labels):
            raise UserError(f"classes: {self.classes!r} cannot be written; use text or numbers as labels")
        about = {"classes": labels, "shots": self.shots, "statistics": self.statistics}
        about = {name: json.dumps(value) for name, value in about.items()}
        weights = {name: w.contiguous() for name, w in self.model.learner.state_dict().items() if name in self._weights}
        write_file(folder / EXPORTED_CONFIG, OmegaConf.to_yaml(OmegaConf.create(portable(self.model.config))))
        write_file(folder / ADAPTED, save({"support": self.support.contiguous()}, about))
        write_file(folder / EXPORTED, save(weights, {"format": "pt"}))  # last: with it the folder is one to load

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, trust: bool = False) -> "Adapted":
        """Reads what save wrote; trust: as in fewshot.load.

        Raises:
            UserError: it cannot be read, or is not of this form.
        """
        model, path = load(folder, trust=trust), user_path("model", folder) / ADAPTED
        try:
            with safe_open(path, "pt") as file:
                about, support = file.metadata() or {}, file.get_tensor("support")
            classes, shots, statistics = (json.loads(about[name]) for name in ("classes", "shots", "statistics"))
        except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise UserError(f"model={path}: cannot be read ({error}); give a folder that fewshot adapt wrote") from None
        preprocess, rows = model.preprocess, model.config["ways"]
        shape = (preprocess.channels, preprocess.size, preprocess.size)
        plain = isinstance(classes, list) and all(isinstance(label, Label) for label in classes)
        counts = isinstance(shots, list) and all(type(number) is int and number > 0 for number in shots)
        sound = support.dtype == torch.uint8 and support.shape[1:] == shape and plain and counts
        if not sound or not (len({*classes}) == rows == len(shots) and sum(shots) == len(support)):
            raise UserError(f"model={path}: is not of the form that fewshot adapt writes, for {rows} classes")
        return cls(model, tuple(classes), support, tuple(shots), statistics)


def adapt(
    model: Pretrained | str | os.PathLike[str],
    support: Mapping[Any, Sequence[Picture]],
    *,
    steps: int | None = None,
    test_zeroing: bool | None = None,
    statistics: str = "task",
) -> Adapted:
    """Adapts to the support images once; the model is left as it is, and may not have adapted before.

    The arguments are those of predict.

    statistics: see Adapted.
    """
    if not isinstance(model, Pretrained):
        model = load(model)
    if model.adapted_in:
        refuse_adapted(model.adapted_in)
    if not isinstance(support, Mapping):
        raise UserError(f"support: a {type(support).__name__}; give {{class: its images}}")
    if test_zeroing not in (None, True, False):
        raise UserError(f"test_zeroing={test_zeroing}: must be true or false")
    steps = integer("steps", str(model.config["inner_steps"] if steps is None else steps), 1)
    zeroing = model.config["algo"]["zeroing"] if test_zeroing is None else test_zeroing
    if zeroing and model.learner.loop.distance:
        raise UserError("test_zeroing=true: a prototypical network has no head that could be zeroed; use false")
    if zeroing and model.learner.loop.adapted == "encoder":
        raise UserError("test_zeroing=true: this model adapts all but the head, which would stay zero; use false")
    classes = tuple(support)
    if len(classes) < 2:
        raise UserError(f"support: has {len(classes)} classes; give at least 2 to choose between")
    learner = with_ways(model.learner, len(classes), zeroing)
    parameter = next(learner.parameters())
    examples = [stacked(f"support[{name!r}]", model.preprocess, images) for name, images in support.items()]
    pixels, shots = torch.cat(examples), [len(images) for images in examples]
    shown = model.preprocess.normalised(pixels).to(parameter)
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(shots)).to(parameter.device)
    task, engine = Task(shown, labels, shown, labels), engine_to_predict(learner.network)
    loop = learner.loop.evaluation(steps, zeroing)
    with torch.enable_grad(), engine.one_line_out_of_memory(Task(*(field[None] for field in task))):
        theta = engine.adapted(learner.network, task, loop, learner.etas)
    if not all(weights.isfinite().all() for weights in theta.values()):
        raise UserError(f"steps={steps}: the adapted model's logits are not finite numbers; adapt it in fewer steps")
    learner = copied(learner).requires_grad_(False)
    for name, weights in theta.items():
        learner.network.get_parameter(name).copy_(weights)
    config: dict[str, Any] = copy.deepcopy(model.config) | {"ways": len(classes)}
    config["model"]["network"] |= {"ways": len(classes)} if "ways" in config["model"]["network"] else {}
    return Adapted(Pretrained(learner, model.preprocess, config), classes, pixels, tuple(shots), statistics)


def fix_statistics(network: nn.Module, images: Tensor) -> None:
    """Lets every BatchNorm and TaskNorm normalise by what it sees of these images, (S, C, H, W), from now on.

    Raises:
        UserError: the network mixes images elsewhere too.
    """

    def fix(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        others = [dimension for dimension in range(inputs[0].dim()) if dimension != 1]
        mean, variance = inputs[0].mean(others), inputs[0].var(others, correction=0)
        if isinstance(layer, TaskNorm):
            layer.mean, layer.variance, layer.images = mean, variance, len(inputs[0])
        else:
            layer.running_mean, layer.running_var, layer.track_running_stats = mean, variance, True

    layers = [layer for layer in network.modules() if isinstance(layer, _BatchNorm | TaskNorm)]
    hooks = [layer.register_forward_pre_hook(fix) for layer in layers]
    with torch.no_grad():
        together = network(images)
        for hook in hooks:
            hook.remove()
        if not torch.allclose(network(images[:1]), together[:1], rtol=1e-3, atol=1e-4):
            raise UserError("statistics=support: the network mixes images in other layers than BatchNorm; use task")


def with_ways(learner: Learner, ways: int, zeroing: bool) -> Learner:
    """The learner with a head of so many rows: the first of its own, then new ones where their values do not matter."""
    head: Any = learner.network.head
    rows = len(head.weight)
    if ways == rows:
        return learner
    if len(learner.etas):
        raise UserError(
            f"support: has {ways} classes, but the model learned inner_lr for each weight of {rows} rows; give {rows}"
        )
    if ways > rows and not zeroing and learner.loop.head == "learned":
        remedy = (
            ", or test_zeroing=true, which lets all rows begin at zero" if learner.loop.adapted != "encoder" else ""
        )
        raise UserError(
            f"test_zeroing=false: support has {ways} classes, the head {rows} rows, each learned for a label of the "
            f"training tasks, and none for label {rows}; give at most {rows} classes{remedy}"
        )
    learner = copied(learner)
    head = learner.network.head
    for name, parameter in list(head.named_parameters()):
        # Where all rows are one vector, one more is the same; elsewhere what is added will be written over.
        added = parameter.detach()[:1].expand(max(0, ways - rows), *parameter.shape[1:])
        setattr(head, name, nn.Parameter(torch.cat([parameter.detach()[:ways], added])))
    head.out_features = ways
    return learner
