"""Which engine computes a run, and what is said when its memory runs out."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from fewshot.batched import engine as batched
from fewshot.batched.execution import CudaGraphs, one_by_one
from fewshot.config.check import REMEDY, check_learn2learn
from fewshot.data.task import Task
from fewshot.errors import UserError, first_line
from fewshot.inner_loop import InnerLoop
from fewshot.maml import explicit_loss
from fewshot.models.network import Network, drops

if TYPE_CHECKING:
    import pytorch_lightning as pl

log = logging.getLogger(__name__)

LARGE = 4_000_000  # numbers; on a CPU threads give so large a tensor's memory back to the system every time


@dataclass(frozen=True)
class Engine:
    """One way to compute what maml/sequential.py computes; its functions are called like their namesakes there."""

    name: str  # sequential, or batched
    meta_gradient: Callable[..., tuple[Tensor, ...]]
    step_accuracies: Callable[..., Tensor]
    step_logits: Callable[..., Tensor]
    adapted: Callable[..., dict[str, Tensor]]
    tasks_at_once: Callable[[Task], int] = lambda tasks: 1  # in memory together

    @contextmanager
    def one_line_out_of_memory(self, tasks: Task, remedy: str = "") -> Iterator[None]:
        """Inside, a lack of memory, or of a second derivative in torch, becomes a UserError that names the knob to set.

        remedy: what may help against a lack of memory besides, said first.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if re.search(r"derivative for \S+ is not implemented", str(error)):
                second = "the second order needs a second derivative of the network, which torch lacks"
                raise UserError(f"algo.first_order=false: {second} ({first_line(error)}); use true") from error
            wants_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
            if not wants_memory and "can't allocate memory" not in str(error):
                raise
            together = min(len(tasks.support), self.tasks_at_once(tasks))
            lower = f"tasks_at_once (now {together})" if together > 1 else "queries, shots or model.width"
            where = f"engine={self.name}: out of memory on {tasks.support.device}"
            raise UserError(f"{where}; {remedy}lower {lower}") from error


def sequential_engine(what: str = "engine=sequential", remedy: str = "") -> Engine:
    """Raises UserError where learn2learn, which `what` needs, is not installed or cannot be imported."""
    check_learn2learn(what, remedy)
    try:
        import learn2learn.algorithms  # pyright: ignore[reportUnusedImport]  # noqa: F401
    except Exception as error:  # whatever a broken installation makes of it
        here = f"cannot be imported here ({first_line(error)})"
        raise UserError(f"{what}: needs learn2learn, which {here}; docs/install.md says how it is{remedy}") from error
    from fewshot.maml import sequential  # not above, since learn2learn takes its time to import

    functions = (sequential.meta_gradient, sequential.step_accuracies, sequential.step_logits, sequential.adapted)
    return Engine("sequential", *functions)


def batched_engine() -> Engine:
    """The functions of batched/engine.py as they are: they choose themselves how many tasks they take at once."""
    functions = (batched.meta_gradient, batched.step_accuracies, batched.step_logits, batched.adapted)
    return Engine("batched", *functions)


def engine_to_predict(network: nn.Module) -> Engine:
    """The batched one, because learn2learn takes longer to import than predicting takes.

    The sequential one where learn2learn is there and a layer of the user's own may be beyond the batched one.
    """
    return batched_engine() if _only_torch(network) or not _has_learn2learn() else sequential_engine()


def _has_learn2learn() -> bool:
    """Whether it can be imported; then it is."""
    try:
        return bool(sequential_engine())
    except UserError:
        return False


def _only_torch(network: nn.Module) -> bool:
    """Whether it is made of this program's and torch's own layers alone, which the batched engine can run."""
    return all(type(layer).__module__.startswith(("fewshot.", "torch.nn.modules.")) for layer in network.modules())


def choose_engine(
    asked: str, network: Network, loop: InnerLoop, tasks_at_once: int | None, trainer: "pl.Trainer"
) -> Engine:
    """The engine of a run.

    Args:
        asked: "sequential" (learn2learn, task after task), "batched" (all tasks at once) or "auto", by a rule that
            docs/performance.md has the measurements for; the gradients are the same.
        tasks_at_once: of the batched engine.

    Raises:
        UserError: the engine that was asked for cannot run the network, or learn2learn is not there for it.
    """
    device, name = trainer.strategy.root_device.type, asked
    if asked == "auto":
        name, reason = ("batched", device) if device != "cpu" else _engine_on_a_cpu(network, tasks_at_once, trainer)
        if name == "sequential" and not _has_learn2learn():
            lacks = "is not installed" if find_spec("learn2learn") is None else "cannot be imported"
            name, reason = "batched", f"learn2learn {lacks}"
        log.info(f"engine=auto: {name} ({reason})")
    if name == "sequential":
        engine = sequential_engine(remedy=REMEDY)
    else:
        execute = CudaGraphs() if device == "cuda" else None
        # Threads would draw from the one generator in any order, and a CUDA graph cannot set it back.
        in_turn = drops(network) and (device == "cpu" or (loop.recompute_steps and not loop.first_order))
        engine, knobs = batched_engine(), {"tasks_at_once": tasks_at_once, "execute": execute}
        engine = replace(
            engine,
            meta_gradient=partial(engine.meta_gradient, **knobs | {"execute": one_by_one if in_turn else execute}),
            step_accuracies=partial(engine.step_accuracies, **knobs),
            step_logits=partial(engine.step_logits, **knobs),
            tasks_at_once=partial(batched.default_tasks_at_once, network, tasks_at_once),
        )
        if reason := _refused(engine, network, loop, trainer):
            if asked == "auto" and _has_learn2learn():
                log.info(f"engine=auto: sequential, since batched cannot run this network ({reason})")
                return choose_engine("sequential", network, loop, tasks_at_once, trainer)
            raise UserError(f"engine=batched: cannot run this network ({reason}); use engine=sequential")
    gradient = explicit_loss.meta_gradient if loop.explicit else engine.meta_gradient
    return replace(engine, meta_gradient=gradient if loop.first_order else _with_plain_attention(gradient))


def _with_plain_attention(gradient: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Inside, scaled_dot_product_attention is computed by what has a second derivative."""

    def meta_gradient(*args: Any) -> tuple[Tensor, ...]:
        with sdpa_kernel(SDPBackend.MATH):
            return gradient(*args)

    return meta_gradient


def _refused(engine: Engine, network: Network, loop: InnerLoop, trainer: "pl.Trainer") -> str:
    """Why the engine cannot compute an inner step of a network of the user's own; empty: it can."""
    if _only_torch(network):
        return ""
    precision, draw = trainer.precision_plugin, trainer.datamodule.samplers["train"]  # pyright: ignore[reportAttributeAccessIssue]
    tasks = Task(*(field.to(next(network.parameters()).device) for field in precision.convert_input(draw(0, 2))))
    try:
        with torch.enable_grad(), precision.forward_context():
            engine.step_accuracies(network, tasks, [loop.evaluation(1, False)])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        return first_line(error)
    return ""


def _engine_on_a_cpu(network: Network, tasks_at_once: int | None, trainer: "pl.Trainer") -> tuple[str, str]:
    """The engine and why: batched, unless there is one task, or one at a time on one thread, or tensors are large."""
    data = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    precision, numbers = trainer.precision_plugin, [0]

    def count(layer: nn.Module, inputs: Any, output: Any) -> None:  # attention and recurrent layers have several
        numbers.extend(part.numel() for part in tree_leaves(output) if isinstance(part, Tensor))

    if data.meta_batch_size == 1:
        return "sequential", "one task"
    tasks = data.samplers["train"](0, 1)
    if torch.get_num_threads() == 1:
        several = batched.tasks_of_a_pass(network, tasks) > 1 and tasks_at_once != 1
        return ("batched", "several tasks in a pass") if several else ("sequential", "one thread")
    hooks = [layer.register_forward_hook(count) for layer in network.modules()]
    with torch.no_grad(), precision.forward_context():
        network(precision.convert_input(tasks).query[0])
    for hook in hooks:
        hook.remove()
    if max(numbers) > LARGE:
        return "sequential", f"a layer's output has {max(numbers) / 1e6:.1f} million numbers, above {LARGE / 1e6:g}"
    return "batched", f"{torch.get_num_threads()} threads"
