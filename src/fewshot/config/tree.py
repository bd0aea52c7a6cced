"""A composed configuration as plain data: its settings, its leaves, the overrides of the call."""

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

GROUPS = ("algo", "model", "dataset", "augment", "trainer", "logger", "callbacks")

# The test adapts the head as it was trained, and a copy that was zeroed: each mode's name in results.json, and what the
# names of its metrics add.
MODES = {"zeroing_off": "", "zeroing_on": "_zeroed"}


def given_overrides(hydra: DictConfig) -> list[str]:
    """The overrides of this call as they were written: test_every=${val_every} is no interpolation there."""
    return OmegaConf.to_container(hydra.overrides.task)


def key_of(override: str) -> str:
    """The dotted key of KEY=VALUE, +KEY=VALUE or ~KEY."""
    return override.lstrip("+~").split("=", 1)[0].strip()


def settings(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain data, with +zeroing in algo.zeroing: this is recorded and compared."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    plain["algo"]["zeroing"] = plain.pop("zeroing", plain["algo"]["zeroing"])
    return plain


def leaves(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (dotted.key, value); a list is a value."""
    pairs = []
    for key, value in config.items():
        pairs += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return pairs


def entries(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested dicts, lists and tuples; a `_target_` that is one of them is a value too."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        nested = isinstance(value, dict | list | tuple)
        if not nested or key == "_target_":
            yield f"{prefix}{key}", value
        if nested:
            yield from entries(value, f"{prefix}{key}.")
