"""What older versions stored under names that are others today; every reader of a stored configuration asks here.

Import paths are not a format: what this program makes of its own is never compared by where it lies.
"""

from typing import Any

OWN = "fewshot."
TARGETS = {  # where commit a43819a and those after it had what a `_target_` names
    "fewshot.callbacks.CosineSimilarity": "fewshot.training.cosine_similarity.CosineSimilarity",
    "fewshot.callbacks.Progress": "fewshot.training.record.Progress",
    "fewshot.callbacks.Record": "fewshot.training.record.Record",
    "fewshot.callbacks.ZeroHead": "fewshot.training.zero_head.ZeroHead",
    "fewshot.data.cifar.load": "fewshot.data.sources.cifar.load",
    "fewshot.data.folder.load": "fewshot.data.sources.folder.load",
    "fewshot.data.glyphs.load": "fewshot.data.sources.glyphs.load",
    "fewshot.data.imagenet.miniimagenet": "fewshot.data.sources.imagenet.miniimagenet",
    "fewshot.data.imagenet.tieredimagenet": "fewshot.data.sources.imagenet.tieredimagenet",
    "fewshot.data.omniglot.load": "fewshot.data.sources.omniglot.load",
    "fewshot.distributed.TasksOverRanks": "fewshot.training.ddp.TasksOverRanks",
    "fewshot.foreign.wrapped": "fewshot.models.any_module.network_from_module",
    "fewshot.logger.wandb_logger": "fewshot.training.wandb_run.wandb_logger",
}


def to_today(stored: Any) -> Any:
    """A stored configuration, or a part of one, as plain data with today's names."""
    if isinstance(stored, dict):
        return {
            key: TARGETS.get(value, value) if key == "_target_" and isinstance(value, str) else to_today(value)
            for key, value in stored.items()
        }
    return [to_today(value) for value in stored] if isinstance(stored, list | tuple) else stored


def compared(key: str, value: Any) -> bool:
    """Whether two configurations can differ in this leaf: a place in this program's own code says nothing of a run."""
    return not (key.rsplit(".", 1)[-1] == "_target_" and isinstance(value, str) and value.startswith(OWN))
