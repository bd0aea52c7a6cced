"""The command `fewshot`: its first word says what to do, the others are those of python -m fewshot.WORD."""

import os
import sys
from importlib import import_module
from pathlib import Path

from fewshot.errors import nearest
from fewshot.processes.surroundings import CALLED, settle

COMMANDS = {  # a line each: (the module whose main() it is, what it does)
    "train": ("fewshot.train", "Trains, validates, tests and reports; with -m and several values it is a sweep."),
    "test": ("fewshot.test", "Tests a trained model in a new folder."),
    "predict": ("fewshot.predict.__main__", "Adapts a model to a few images of your classes and classifies others."),
    "adapt": ("fewshot.adapt", "Adapts a model once, for predict to classify with again and again."),
    "evidence": ("fewshot.evidence.__main__", "Writes a page that says whether the theory holds on a trained model."),
    "export": ("fewshot.export", "Writes a model to share, without pickle."),
    "push": ("fewshot.push", "Writes an exported model to the Hugging Face hub."),
    "check-algorithm": ("fewshot.check_algorithm", "Compares the engines on an algorithm of your own."),
    "data": ("fewshot.data.__main__", "Lists, prepares and shows the datasets."),
    "compare": ("fewshot.compare.__main__", "Says which differences between runs are larger than noise."),
    "sweep": ("fewshot.sweep.__main__", "Makes one table and one figure of many runs."),
}


def help_text() -> str:
    """What each command does, a line each."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"{name:{width}}{sentence}" for name, (_, sentence) in COMMANDS.items()]
    call = "fewshot COMMAND [WORD ...]: MAML with and without the zeroing trick."
    return "\n".join([call, "", *lines, "", "fewshot COMMAND --help tells which words a command takes."])


def main() -> None:
    settle()
    command, *words = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help", "help"):
        print(help_text())
    elif command == "--version":
        from importlib.metadata import version  # takes longer to import than all else here

        print(f"fewshot {version('fewshot')}")
    elif command not in COMMANDS:
        sys.stderr.write(f"{command}: no such command; {nearest(command, {*COMMANDS})}\n")
        raise SystemExit(2)
    else:
        as_module = Path(sys.argv[0]).name == "__main__.py"
        os.environ[CALLED] = "python -m fewshot " if as_module else "fewshot "
        if not as_module and not sys.flags.safe_path:
            sys.path.append(os.getcwd())  # where one's own modules lie, as with python -m; they hide no others
        sys.argv[1:] = words
        import_module(COMMANDS[command][0]).main()


if __name__ == "__main__":
    main()
