"""What a command inherits from whoever started it, and what of that must not decide about a run.

Notebooks, IDEs and clusters export variables for their own use. Whoever reads the output may stop reading, or may not
know all letters.
"""

import atexit
import ctypes
import io
import logging
import os
import platform
import shutil
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

CALLED = "FEWSHOT_CALLED"  # how the program was called, for the processes that it starts too; see as_called()
# torch.distributed and MPI set these for the processes that they start; without torchrun they are somebody else's.
RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "JSM_NAMESPACE_RANK")

# The numbers by which glibc's mallopt() knows its parameters, from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


class Output(io.TextIOWrapper):
    """Standard output or error that its reader may close: what is said after that is lost, and the run goes on."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            self._to_nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._to_nowhere()

    def _to_nowhere(self) -> None:
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


def as_called(command: str) -> str:
    """What a hint names a command by: as the program itself was called."""
    if start := os.environ.get(CALLED):
        return f"{start}{command}"
    return "python train.py" if command == "train" else f"python -m fewshot.{command.replace('-', '_')}"


@cache
def settle() -> None:
    """Every command calls this once, before it imports anything but the standard library and this package."""
    os.environ.setdefault(CALLED, "python -m fewshot." if sys.argv[:1] == ["-m"] else "")
    os.environ["MPLBACKEND"] = "agg"  # figures go to files; with a notebook's backend the import of matplotlib fails
    os.environ.pop("HYDRA_MAIN_MODULE", None)  # set by another program that Hydra runs; it would name our log file
    for name in [name for name in os.environ if name.startswith("PL_TRAINER_")]:
        del os.environ[name]  # Lightning would take from it what our configuration does not say
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):  # what the user has set stays
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # waiting threads sleep; if they spin, two programs block each other
    matplotlib_place()
    keep_memory()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        left_over = {name: os.environ.pop(name) for name in RANKS if name in os.environ}
        if left_over.get("WORLD_SIZE", "1") != "1":
            told = " ".join(f"{name}={value}" for name, value in left_over.items())
            print(f"{told}: ignored; torchrun, srun or trainer=ddp start several processes", file=sys.stderr)
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:
            kept = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            encoding = stream.encoding
            output = Output(stream.detach(), encoding, errors="replace", **kept)
            setattr(sys, name, output)
            setattr(sys, f"__{name}__", output)


def matplotlib_place() -> None:
    """Where a home folder cannot be written, Matplotlib's files go to a temporary one without a warning of its own."""
    if "MPLCONFIGDIR" in os.environ:
        return
    for variable, place in (("XDG_CONFIG_HOME", "~/.config"), ("XDG_CACHE_HOME", "~/.cache")):
        folder = Path(os.path.expanduser(os.environ.get(variable) or place)).absolute()
        nearest = next(place for place in (folder, *folder.parents) if os.path.exists(place))
        if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
            with suppress(FileNotFoundError):  # no temporary folder either, before a run's own is known
                os.environ["MPLCONFIGDIR"] = tempfile.mkdtemp(prefix="matplotlib-")
                atexit.register(shutil.rmtree, os.environ["MPLCONFIGDIR"], ignore_errors=True)
            return


def keep_memory() -> None:
    """Tells glibc to keep freed memory in the process, because every step asks for as much again.

    By default glibc gives large blocks back at once, and the system then clears every page of the next one.
    """
    told = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.getenv("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] == "glibc" and not told:  # what the user has set stays
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)  # the heap grows by so many bytes beyond what is asked for
        if not mallopt(M_MMAP_THRESHOLD, 2**30):
            mallopt(M_MMAP_THRESHOLD, 2**25)  # older versions take no more than 32 MiB


def give_memory_back() -> None:
    """Gives the system what is kept and not in use; whoever asks for memory after that has it cleared anew."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def lenient(folder: Path) -> None:
    """Every run calls this, for it may be in a worker of a sweep, where settle() was not called.

    Letters that the terminal lacks are replaced there; the log file, train.log, has them all. Freed memory is kept.
    Where only the run's folder can be written, as in a container whose root cannot, it is the one for temporary files.
    """
    keep_memory()
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    matplotlib_place()
    for stream in (sys.stdout, sys.stderr):
        if type(stream) is io.TextIOWrapper:
            stream.reconfigure(errors="replace")
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler) and handler.stream is not None:
            handler.stream.reconfigure(encoding="utf-8", errors="replace")
