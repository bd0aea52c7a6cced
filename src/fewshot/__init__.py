"""MAML with and without the zeroing trick."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fewshot.processes.surroundings import settle

if TYPE_CHECKING:
    from fewshot.api import Run, test, train
    from fewshot.batched.engine import meta_gradient, step_accuracies
    from fewshot.data.sampler import TaskSampler
    from fewshot.errors import UserError
    from fewshot.inner_loop import InnerLoop
    from fewshot.models.any_module import network_from_module
    from fewshot.models.head import zero_head
    from fewshot.predict.classifier import FewShotClassifier
    from fewshot.predict.pretrained import load

    __version__: str

PUBLIC = {  # name: the module that has it, imported when it is first asked for, since torch takes seconds
    "FewShotClassifier": "fewshot.predict.classifier",
    "InnerLoop": "fewshot.inner_loop",
    "Run": "fewshot.api",
    "TaskSampler": "fewshot.data.sampler",
    "UserError": "fewshot.errors",
    "load": "fewshot.predict.pretrained",
    "meta_gradient": "fewshot.batched.engine",
    "network_from_module": "fewshot.models.any_module",
    "step_accuracies": "fewshot.batched.engine",
    "test": "fewshot.api",
    "train": "fewshot.api",
    "zero_head": "fewshot.models.head",
}
__all__ = [
    "FewShotClassifier",
    "InnerLoop",
    "Run",
    "TaskSampler",
    "UserError",
    "__version__",
    "load",
    "meta_gradient",
    "network_from_module",
    "step_accuracies",
    "test",
    "train",
    "zero_head",
]

if sys.argv[:1] == ["-m"]:  # Python is still on its way to the module of python -m fewshot.X
    settle()


class _Package(ModuleType):
    """fewshot.train and fewshot.test are functions, also once the commands, modules of these names, are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fewshot")
    if name in PUBLIC:
        return getattr(import_module(PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
