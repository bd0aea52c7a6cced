"""Adapts once, to classify often: python -m fewshot.adapt model=MODEL support=FOLDER out=FOLDER

predict model=FOLDER query=DIR, fewshot.predict.Adapted.load and fewshot.FewShotClassifier.load read what it writes.
"""

import logging
from pathlib import Path
from typing import Any

from fewshot.config.command import Command, Parameter, one_line_errors, read
from fewshot.files import ADAPTED, EXPORTED, EXPORTED_CONFIG, check_place, user_path
from fewshot.predict.__main__ import COMMAND as PREDICT
from fewshot.predict.__main__ import Support
from fewshot.predict.find import find, refuse_adapted


def run(model: str, support: str, folder: Path, *, trust: bool = False, **options: Any) -> None:
    """Adapts to the images in `support` and writes the adapted model. options: those of fewshot.predict.adapt."""
    check_place("out", folder, without=(EXPORTED, EXPORTED_CONFIG, ADAPTED))
    path = find(model)
    refuse_adapted(path)
    examples = Support(support)
    from fewshot.predict.adapted import adapt  # with torch, for which no mistake has to wait
    from fewshot.predict.pretrained import load

    pretrained, skipped = load(path, trust=trust), []
    adapted = adapt(pretrained, examples.read(pretrained.preprocess, skipped), **options)
    adapted.save(folder)
    but = f", {len(skipped)} skipped" if skipped else ""
    print(f"Adapted to {len(adapted.support)} images of {len(adapted.classes)} classes{but}: written to {folder}")


OPTIONS = ("steps=N", "test_zeroing=BOOL", "statistics=WHOSE", "trust=BOOL")
COMMAND = Command(
    "adapt",
    "adapts a model to the images in `support`, for predict to classify others without adapting anew.",
    {
        "model=MODEL": PREDICT.parameters["model=MODEL"],
        "support=FOLDER": Parameter("A folder or zip with one folder of images for each class.", needed=True),
        "out=FOLDER": Parameter(
            "The folder for model.safetensors, config.yaml and adapted.safetensors, which has the support images.",
            user_path,
            needed=True,
        ),
        **{word: PREDICT.parameters[word] for word in OPTIONS},
    },
)


def main(arguments: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    with one_line_errors():
        values = read(COMMAND, arguments).values
        run(values.pop("model"), values.pop("support"), values.pop("out"), **values)


if __name__ == "__main__":
    main()
