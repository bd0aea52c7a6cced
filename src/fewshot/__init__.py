"""MAML with and without the zeroing trick."""

import sys
from typing import TYPE_CHECKING, Any

from fewshot.processes.surroundings import settle

if TYPE_CHECKING:
    from fewshot.predict.pretrained import load

__all__ = ["load"]

if sys.argv[:1] == ["-m"]:  # Python is still on its way to the module of python -m fewshot.X
    settle()


def __getattr__(name: str) -> Any:
    """fewshot.load is fetched when it is first asked for: `import fewshot` alone does not wait for torch."""
    if name == "load":
        from fewshot.predict.pretrained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
