"""Where the YAML files lie, and the functions that they call as ${name:...}."""

import hashlib
import re
from pathlib import Path

from omegaconf import ListConfig, OmegaConf

from fewshot.config.tree import key_of
from fewshot.paths import run_folder, user_path

# Beside this file in a wheel, at the top of a checkout.
CONF = next(path for path in (Path(__file__).parents[1] / "conf", Path(__file__).parents[3] / "conf") if path.is_dir())


def _run_folder(checkpoint: str | None, fit: bool, new: str) -> str:
    """Where a run writes: training that goes on from RUN or RUN/checkpoints/x.ckpt writes in RUN, all else in `new`."""
    return str(run_folder(user_path("checkpoint", checkpoint))) if checkpoint and fit else new


def job_folder(overrides: list[str] | ListConfig) -> str:
    """A job's folder in a sweep: a pure function of its overrides, in any order; safe in a path and in checkpoint=."""
    overrides = OmegaConf.to_container(overrides) if OmegaConf.is_list(overrides) else overrides
    pairs = {key_of(override): override.partition("=")[2] for override in overrides}
    exact = [f"{key}-{value}" for key, value in sorted(pairs.items())]
    name = re.sub("[^A-Za-z0-9._-]+", "-", "__".join(exact))
    if name != "__".join(exact) or name.count("__") >= max(1, len(pairs)) or len(name) > 150:
        name = f"{name[:150]}-{hashlib.sha256(repr(exact).encode()).hexdigest()[:8]}"
    return name or "defaults"


def _job_number(number: int | None) -> str:
    """What the log lines of a sweep's job begin with, since two jobs may run side by side."""
    return "" if number is None else f"#{number} "


RESOLVERS = {
    "at_least": max,
    "rotated": lambda yes, classes: 4 * classes if yes else classes,  # dataset.rotations: each class in four directions
    "run_folder": _run_folder,
    "job_folder": job_folder,
    "job_number": _job_number,
}
for _name, _resolver in RESOLVERS.items():
    OmegaConf.register_new_resolver(_name, _resolver, replace=True)
