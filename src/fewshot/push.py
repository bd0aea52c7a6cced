"""A model for everybody: python -m fewshot.push NAME repo=ORG/NAME writes it to the Hugging Face hub.

python -m fewshot.predict model=hf://ORG/NAME and fewshot.load("hf://ORG/NAME") read it there.
"""

import sys

from fewshot.config.command import Command, Parameter, flag, one_line_errors, read
from fewshot.errors import UserError
from fewshot.files import in_shell
from fewshot.predict import hub
from fewshot.predict.find import find, refuse_adapted
from fewshot.processes.surroundings import as_called

COMMAND = Command(
    "push",
    "writes an exported model to the Hugging Face hub.",
    {
        "model=MODEL": Parameter(
            "A folder that export wrote, or the name of a model that comes with this program; model= may be left out.",
            needed=True,
        ),
        "repo=ORG/NAME": Parameter("The repository on the hub, which is made if it is not there.", needed=True),
        "private=BOOL": Parameter(
            "Whether only those with access see a new one; left out: as its owner's settings have it.", flag
        ),
    },
)


def main(arguments: list[str] | None = None) -> None:
    with one_line_errors():
        words = sys.argv[1:] if arguments is None else arguments
        words = [word if "=" in word or word.startswith("-") else f"model={word}" for word in words]
        values = read(COMMAND, words).values
        folder = find(values["model"])
        if not folder.is_dir():
            raise UserError(
                f"model={values['model']}: is a run's, with what only training needs; {as_called('export')} "
                f"{in_shell('checkpoint', values['model'])} out=FOLDER writes the folder to give here"
            )
        refuse_adapted(folder)
        address = hub.upload(folder, values["repo"], values.get("private"))
        print(f"Written to the hub; fewshot.load({address!r}) reads it")


if __name__ == "__main__":
    main()
