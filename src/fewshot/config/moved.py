"""Names in stored configurations that have changed since; every reader of a stored configuration asks here.

Import paths are not a format: two configurations never differ by where something lies in this program.
"""

from typing import Any

OWN = "fewshot."
TARGETS = {  # what a `_target_` named at commit a43819a or later, and what it is called today
    "fewshot.callbacks.CosineSimilarity": "fewshot.training.record.CosineSimilarity",
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
    "fewshot.training.cosine_similarity.CosineSimilarity": "fewshot.training.record.CosineSimilarity",
    "fewshot.logger.wandb_logger": "fewshot.training.wandb_run.wandb_logger",
}
ADDED = {  # keys of datasets that those commits did not have, by the dataset's name
    "omniglot": {"resample": "lanczos"},
    "cifarfs": {"archive": "cifar100"},
    "fc100": {"archive": "cifar100"},
}


def to_today(stored: Any) -> Any:
    """A stored configuration, or a part of one, as plain data with today's names."""
    if isinstance(stored, dict):
        today = {
            key: TARGETS.get(value, value) if key == "_target_" and isinstance(value, str) else to_today(value)
            for key, value in stored.items()
        }
        dataset = today.get("dataset")
        if isinstance(dataset, dict) and isinstance(dataset.get("name"), str):
            today["dataset"] = ADDED.get(dataset["name"], {}) | dataset
        return today
    return [to_today(value) for value in stored] if isinstance(stored, list | tuple) else stored


def compared(key: str, value: Any) -> bool:
    """Whether two configurations can differ in this leaf: what this program calls its own says nothing of a run."""
    own = key.rsplit(".", 1)[-1] == "_target_" and isinstance(value, str) and value.startswith(OWN)
    return not own and key != "dataset.needs_root"  # which older runs lack
