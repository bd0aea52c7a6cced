"""Files from the network, into the cache folder: checked against their published MD5, continued after an interruption.

Own code, because torchvision's, torch.hub's and pooch's downloads start anew after an interruption.
"""

import hashlib
import http.client
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rich import progress

from fewshot.data.cache import cache_folder
from fewshot.errors import UserError
from fewshot.files import exclusive, open_own

log = logging.getLogger(__name__)

TIMEOUT = 30  # seconds without a byte
PAUSE = 1.0  # seconds before a connection that broke is taken up again
ZENODO = "https://zenodo.org"

Sources = Mapping[str, tuple[str, str]]  # name: address, MD5


def download(
    title: str, names: Sequence[str], find: Callable[[], Sources], *, folder: str, cache: str | None, holds: str
) -> Path:
    """The folder with the files `names`, downloaded where they are not there yet.

    A file gets its name once it is whole and has its MD5. An interrupted one stays as a hidden .part, which the next
    call continues. Other processes wait for the one that downloads.

    Args:
        title: of the data set, for messages; `holds`, too: what dataset.root could be instead.
        find: tells where they are; it is called only when one is missing.
        folder: of the data set, in the cache folder.
        cache: the cache folder, None for the user's own.

    Raises:
        UserError: no network, no room, or another checksum.
    """
    place = None
    try:
        place = cache_folder(cache) / folder
        if all((place / name).is_file() for name in names):
            return place
        place.mkdir(parents=True, exist_ok=True)
        with exclusive(place / ".lock", f"downloads into {place}"):
            missing = [name for name in names if not (place / name).is_file()]
            sources = find() if missing else {}
            for name in missing:
                _fetch(*sources[name], place / name)
        return place
    except (OSError, RuntimeError, ValueError, LookupError, http.client.HTTPException) as error:
        raise UserError(
            f"dataset.root=null: downloading {title} into {place or 'the cache'} failed "
            f"({getattr(error, 'reason', error)}); try again, which goes on where this ended, "
            f"set dataset.root to {holds}, or dataset.cache to a folder with room to write"
        ) from error


def zenodo(record: int, names: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Address and MD5 of files of the Zenodo record of this number; names: {name here: name there}.

    Raises OSError, LookupError or ValueError where there is no answer, or not one with these files in it.
    """
    with urlopen(f"{ZENODO}/api/records/{record}", timeout=TIMEOUT) as response:
        answer = json.load(response)
    # pooch (fatiando/pooch, downloaders.py) has met both forms: key and "md5:...", filename and the bare MD5.
    md5s = {file.get("key") or file["filename"]: file["checksum"].removeprefix("md5:") for file in answer["files"]}
    return {here: (f"{ZENODO}/record/{record}/files/{there}", md5s[there]) for here, there in names.items()}


def md5(file: BinaryIO) -> str:
    """The MD5 of a whole file, which is at its beginning afterwards."""
    file.seek(0)
    digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    file.seek(0)
    return digest


def _fetch(url: str, expected: str, path: Path) -> None:
    part = path.with_name(f".{path.name}.part")
    os.close(open_own(part, os.O_RDWR | os.O_CREAT))
    log.info("downloading %s", url)
    while True:
        before = part.stat().st_size
        try:
            _transfer(url, part)
            break
        except (OSError, http.client.HTTPException) as error:
            if part.stat().st_size <= before:  # nothing came
                raise
            log.info("the connection broke, going on after %d bytes (%s)", part.stat().st_size, error)
            time.sleep(PAUSE)
    with open(part, "rb") as file:
        actual = md5(file)
        os.fsync(file.fileno())
    if actual != expected:
        part.unlink()
        raise OSError(f"{url} has the MD5 {actual} instead of {expected}")
    os.replace(part, path)


def _transfer(url: str, part: Path) -> None:
    """The rest of the file, or all of it where the server sends no parts."""
    size = part.stat().st_size
    ranges = {"Range": f"bytes={size}-"} if size else {}
    request = Request(url, headers={"User-Agent": "fewshot", **ranges})
    try:
        response = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # the server has nothing beyond what is here; the checksum tells whether that is all
            return
        raise
    with response, open(open_own(part, os.O_RDWR | os.O_APPEND), "ab") as file, _bar() as bar:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            file.truncate(0)
            size = 0
        length = response.headers["Content-Length"]
        total = size + int(length) if length else None
        task = bar.add_task(part.name[1:].removesuffix(".part"), total=total, completed=size)
        shutil.copyfileobj(bar.wrap_file(response, task_id=task), file)
        size = file.tell()
    if total is not None and size < total:
        raise OSError(f"the connection ended after {size:,} of {total:,} bytes")


def _bar() -> progress.Progress:
    sizes = (progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
    return progress.Progress("{task.description}", progress.BarColumn(), *sizes, disable=not sys.stdout.isatty())
