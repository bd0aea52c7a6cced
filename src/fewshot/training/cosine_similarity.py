"""How alike the classes of one task become to the encoder while it is trained on it."""

import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from fewshot.files import write_file
from fewshot.theory.features import class_similarities


class CosineSimilarity(pl.Callback):
    """How alike the classes of the one task are to the unadapted encoder, after outer updates 1, 1 + every, ...

    Needs training tasks of kind "one_task"; the classes stay in its own order, whatever labels training gives them.
    The matrices are part of the checkpoint, so this callback comes before the one that writes it, Record: what a
    checkpoint holds is already in cosine_similarity.json, and a run that goes on writes the same file.
    """

    def __init__(self, *, every: int) -> None:
        self.every = every
        self.content: dict[str, list] = {"updates": [], "query_support": [], "query_query": []}

    def state_dict(self) -> dict[str, Any]:
        return self.content

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.content = state_dict

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        if (trainer.global_step - 1) % self.every:
            return
        precision = trainer.precision_plugin
        with precision.forward_context():
            task = precision.convert_input(trainer.datamodule.samplers["train"].one_task())
            matrices = class_similarities(module.network, task)
        self.content["updates"].append(trainer.global_step)
        for name, matrix in matrices.items():
            self.content[name].append(matrix)
        path = Path(trainer.default_root_dir) / "cosine_similarity.json"
        if trainer.is_global_zero:
            write_file(path, json.dumps(self.content))
