"""Exported models on the Hugging Face hub, through its own library: hf://ORG/NAME, or hf://ORG/NAME@REVISION.

Three files are read and written, and no others. What is downloaded is data: fewshot.load calls only this program's own
code, whatever a config.yaml names. The library alone finds the user's token and sends it. No line here repeats what the
library or a server says in an error, since the token could be in it.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from fewshot.errors import UserError, of_extra
from fewshot.files import CARD, EXPORTED, EXPORTED_CONFIG, REPOSITORY, REVISION, SCHEME, is_regular

MEBIBYTE = 2**20
LARGEST = {EXPORTED_CONFIG: MEBIBYTE // 4, CARD: MEBIBYTE, EXPORTED: 2048 * MEBIBYTE}  # bytes of each file


def download(address: str, knob: str = "model") -> Path:
    """The folder of the model in the hub's own cache, all its files of one revision. knob: the one that names it.

    Raises:
        UserError: the address is none, the library is not installed, the hub has no such model, or a file is too large.
    """
    match = re.fullmatch(rf"{SCHEME}({REPOSITORY})(?:@({REVISION}))?", address, re.ASCII)
    if not match:
        raise UserError(f"{knob}={address}: must be {SCHEME}ORG/NAME or {SCHEME}ORG/NAME@REVISION")
    library, (repository, revision) = _library(f"{knob}={address}"), match.groups()
    with _one_line(f"{knob}={address}"):
        for name, most in LARGEST.items():
            file = library.hf_hub_download(repository, name, revision=revision, dry_run=True)
            if file.file_size is None or file.file_size > most:
                raise UserError(f"{knob}={address}: its {name} has {file.file_size} bytes, and may have {most}")
            revision = file.commit_hash
        places = [library.hf_hub_download(repository, name, revision=revision) for name in LARGEST]
    return Path(places[0]).parent


def upload(folder: Path, repository: str, private: bool | None = None) -> str:
    """Writes the files of an exported model into a repository, which is made if it is not there; tells their address.

    private: of a new repository; None: as its owner's settings have it.

    Raises:
        UserError: the library is not installed, there is no token, a file is missing or too large, the hub takes no
            such card, or it refuses.
    """
    if not re.fullmatch(REPOSITORY, repository, re.ASCII):
        raise UserError(f"repo={repository}: must be ORG/NAME, as in repo=my-lab/omniglot-5w1s-fomaml")
    library = _library(f"repo={repository}")
    for name, most in LARGEST.items():
        is_regular("model", folder / name)
        if (size := (folder / name).stat().st_size) > most:
            raise UserError(f"model={folder}: its {name} has {size} bytes, and may have {most}")
    try:
        library.ModelCard.load(folder / CARD)
    except Exception as error:  # of YAML, or of what the library expects in a card
        raise UserError(f"model={folder / CARD}: is no card that the hub takes ({type(error).__name__})") from None
    if library.get_token() is None:
        raise UserError(f"repo={repository}: the hub takes models of those who are logged in; call hf auth login")
    with _one_line(f"repo={repository}"):
        files = [library.CommitOperationAdd(name, folder / name) for name in LARGEST]
        library.create_repo(repository, private=private, exist_ok=True)
        commit = library.create_commit(repository, files, commit_message=f"{folder.name}, by fewshot")
    return f"{SCHEME}{repository}@{commit.oid}"


def _library(where: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{where}: needs {of_extra('hub', 'huggingface_hub')}") from None
    return huggingface_hub


@contextmanager
def _one_line(where: str) -> Iterator[None]:
    """A UserError for whatever the library raises; it does not document all of that."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            remedy = "check the name, and log in by hf auth login with a token that may do this"
            reason = f"the hub answers {status} ({type(error).__name__}); {remedy}"
        elif status:
            reason = f"the hub answers {status} ({type(error).__name__}); try again later"
        else:
            reason = f"the hub cannot be asked ({type(error).__name__}); check the network"
        raise UserError(f"{where}: {reason}") from None
