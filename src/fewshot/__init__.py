"""MAML with and without the zeroing trick."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewshot.pretrained import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """fewshot.load is fetched when it is first asked for: `import fewshot` alone does not wait for torch."""
    if name == "load":
        from fewshot.pretrained import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
