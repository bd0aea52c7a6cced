"""What a command inherits from whoever started it, and what of that is not to decide about a run.

Notebooks, IDEs and clusters export variables for themselves; a reader of the output may leave, or not know all signs.
"""

import ctypes
import io
import logging
import os
import platform
import sys
from contextlib import suppress

# Of processes that torch.distributed or MPI started; without torchrun they are left over from somebody else.
RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "JSM_NAMESPACE_RANK")

# Numbers of glibc's mallopt(), from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3


class Output(io.TextIOWrapper):
    """What is said, for whoever listens: from the first that nobody takes on it goes nowhere, and the run goes on."""

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


def settle() -> None:
    """Called once by every command, before it imports anything that is not the standard library's or our own."""
    os.environ["MPLBACKEND"] = "agg"  # figures go to files; that of a notebook would end the import of matplotlib
    os.environ.pop("HYDRA_MAIN_MODULE", None)  # of the program that Hydra was called for; it would name the log file
    for name in [name for name in os.environ if name.startswith("PL_TRAINER_")]:
        del os.environ[name]  # Lightning's own defaults for what our configuration does not say
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):  # what the user has set stays
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that wait sleep: spinning, two programs stop each other
    keep_memory()
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        found = {name: os.environ.pop(name) for name in RANKS if name in os.environ}
        if found.get("WORLD_SIZE", "1") != "1":
            told = " ".join(f"{name}={value}" for name, value in found.items())
            print(f"{told}: ignored; torchrun, srun or trainer=ddp start several processes", file=sys.stderr)
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:
            how = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
            encoding = stream.encoding
            output = Output(stream.detach(), encoding, errors="replace", **how)
            setattr(sys, name, output)
            setattr(sys, f"__{name}__", output)


def keep_memory() -> None:
    """Memory that was freed stays the process's, on glibc: every step asks for as much again.

    By default glibc gives large blocks back at once, and the system then clears every page of the next one.
    """
    told = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.getenv("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] == "glibc" and not told:  # what the user has set stays
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)  # bytes that the heap grows by beyond what is asked for
        mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)  # older versions take no more than 32 MiB


def lenient() -> None:
    """Called by every run, which may be in a worker of a sweep: signs that the terminal lacks are replaced there.

    The log file, train.log, has them all. Memory is kept there too.
    """
    keep_memory()
    for stream in (sys.stdout, sys.stderr):
        if type(stream) is io.TextIOWrapper:
            stream.reconfigure(errors="replace")
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler) and handler.stream is not None:
            handler.stream.reconfigure(encoding="utf-8", errors="replace")
