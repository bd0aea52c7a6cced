"""Where an outer step moves the features, over training: a callback of one's own for train.py, with this folder on
PYTHONPATH and the knob +callbacks.motion={_target_:motion.Motion,after:[0,10,100]}

It leaves motion.json in the folder of the run, which `theory.py` keeps.
"""

import copy

import pytorch_lightning as pl

from fewshot.evidence.claims import motion
from fewshot.evidence.model import Model
from fewshot.training.meta_learner import MetaLearner
from fewshot.training.record import Measurement

TASKS = 8  # the first of the test tasks, as on the evidence page


class Motion(Measurement):
    """The evidence page's motion (docs/method.md 2.11) with the model's head, after these numbers of outer updates."""

    file = "motion.json"

    def __init__(self, *, after: list[int]) -> None:
        super().__init__(1, {"updates": [], "fomaml": [], "somaml": []})
        self.after = set(after)

    def on_train_start(self, trainer: pl.Trainer, module: MetaLearner) -> None:
        self._measure(trainer, module)

    def on_train_batch_end(self, trainer: pl.Trainer, module: MetaLearner, *args: object) -> None:
        self._measure(trainer, module)

    def _measure(self, trainer: pl.Trainer, module: MetaLearner) -> None:
        if trainer.global_step not in self.after - set(self.content["updates"]):
            return
        network = copy.deepcopy(module.network).double()
        tasks = trainer.datamodule.samplers["test"](0, TASKS)
        tasks = tasks._replace(support=tasks.support.double(), query=tasks.query.double())
        own = Model(network, network, module.loop, module.loop.inner_steps, tasks, TASKS, {})
        of_head = motion.measure(own)["motion"]["this_head"]
        numbers = {order: {k: v for k, v in of.items() if isinstance(v, float)} for order, of in of_head.items()}
        self._add(trainer, numbers)
