"""A trained model on images of one's own."""

from typing import TYPE_CHECKING, Any

from fewshot.predict.predictions import Predictions, predict

if TYPE_CHECKING:
    from fewshot.predict.adapted import Adapted, adapt

__all__ = ["Adapted", "Predictions", "adapt", "predict"]


def __getattr__(name: str) -> Any:
    """adapt is fetched when it is first asked for, with torch."""
    if name in ("Adapted", "adapt"):
        from fewshot.predict import adapted

        return getattr(adapted, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
