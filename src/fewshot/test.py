"""Tests a trained model in a new folder: fewshot test RUN test_tasks=2000

With datasets=A,B,.. it is tested on all of these, see across/.
"""

import sys

from fewshot.config.command import HELP, Command, Parameter, one_line_errors
from fewshot.config.tree import key_of
from fewshot.errors import UserError
from fewshot.files import override
from fewshot.train import main as train

COMMAND = Command(
    "test",
    "tests a trained model in a new folder: train checkpoint=RUN fit=false. Left out, a knob is as in training.",
    {
        "RUN": Parameter("The folder of a run, whose best model is taken, or one file, RUN/checkpoints/last.ckpt."),
        "test_tasks=N": Parameter("Tasks of the test."),
        "calibration=BOOL": Parameter("true: also measures the calibration of the predictions; see results.json."),
        "test_steps=N": Parameter("Inner steps of the test."),
        "dataset=NAME": Parameter("Another dataset of the same image size, with dataset.other_split=true."),
        "datasets=NAME,...": Parameter(
            "Many datasets, each NAME or NAME:ROOT with its dataset.root, such as omniglot,cifarfs:FILE,folder:PATH. "
            "Then RUN may also be an exported model, or the name of one that comes with this program."
        ),
        "ways=K,... shots=N,...": Parameter(
            "With datasets=: the numbers of classes and support images; see docs/evaluation.md."
        ),
        "hydra.run.dir=FOLDER": Parameter("The new folder; left out: one in outputs/, named after the time."),
    },
    knobs=True,
)


def words_of_train(words: list[str]) -> list[str]:
    """The call of train that tests the run which the first word names."""
    if words and "=" not in words[0] and not words[0].startswith("-"):
        words = [override("checkpoint", words[0]), *words[1:]]
    place = next((number for number, word in enumerate(words) if key_of(word) == "checkpoint"), None)
    if place is None:
        raise UserError(f"RUN: is missing; write {COMMAND.call} RUN, with the folder of a run")
    if fit := [word for word in words if key_of(word) == "fit"]:
        raise UserError(f"{fit[0]}: nothing is trained here; leave it out")
    return [*words[: place + 1], "fit=false", *words[place + 1 :]]


def main() -> None:
    with one_line_errors():
        if HELP & {*sys.argv[1:]}:
            print(COMMAND.help())
            return
        many = any(key_of(word) == "datasets" for word in sys.argv[1:])
        sys.argv[1:] = sys.argv[1:] if many else words_of_train(sys.argv[1:])
    if many:
        from fewshot.across.__main__ import main as across

        across()
    else:
        train()


if __name__ == "__main__":
    main()
