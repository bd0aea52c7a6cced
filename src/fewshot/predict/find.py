"""The model that a knob or fewshot.load names: a path, the name of one that comes with this program, or hf://ORG/NAME."""

import os
from pathlib import Path

from fewshot.errors import UserError, nearest
from fewshot.files import ADAPTED, EXPORTED, model_path, user_path
from fewshot.predict import hub

# The models that come with this program: beside its packages in a wheel, at the top of a checkout.
PLACES = (Path(__file__).parents[1] / "trained", Path(__file__).parents[3] / "models")
MODELS = next((path for path in PLACES if path.is_dir()), PLACES[0])


def names() -> list[str]:
    """The names of the models that come with this program."""
    return sorted(path.parent.name for path in MODELS.glob(f"*/{EXPORTED}"))


def find(model: str | Path, knob: str = "model") -> Path:
    """A checkpoint, or the folder of an exported model.

    model: a path as files.model_path has it; a name, where no such path is there; or hf://ORG/NAME, which is downloaded
        unless the hub's cache has it.
    knob: the one that names it.

    Raises:
        UserError: it is none of these.
    """
    text = str(model)
    if text.startswith(hub.SCHEME):
        return hub.download(text, knob)
    if os.path.exists(user_path(knob, model)):
        return model_path(model, knob)
    known = names()
    if text in known:
        return MODELS / text
    if "/" in text or not known:
        raise UserError(f"{knob}={text}: no such file or folder")
    remedy = nearest(text, {*known})
    listed = f" ({', '.join(known)})" * remedy.startswith("did you mean")
    raise UserError(f"{knob}={text}: no such file or folder, and no model{listed} of this name; {remedy}")


def refuse_adapted(path: Path) -> None:
    """Raises UserError where the model at this path has adapted: it would adapt on from where it is."""
    if (path / ADAPTED).is_file():
        raise UserError(
            f"model={path}: has adapted to its images already; give the model that it was before, or predict with it"
        )
