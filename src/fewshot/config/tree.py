"""A composed configuration as plain data: its settings, its leaves, the words of the call."""

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf


def given_overrides(hydra: DictConfig) -> list[str]:
    """Of this call, as they were given: test_every=${val_every} is no interpolation there."""
    return OmegaConf.to_container(hydra.overrides.task)


GROUPS = ("algo", "model", "dataset", "augment", "trainer", "logger", "callbacks")

# Test zeroing, adapting from a copy with a zeroed head: each mode's name in results.json, and what metrics' names add.
MODES = {"zeroing_off": "", "zeroing_on": "_zeroed"}


def settings(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain data, +zeroing folded into algo.zeroing: what is recorded and compared."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    plain["algo"]["zeroing"] = plain.pop("zeroing", plain["algo"]["zeroing"])
    return plain


def leaves(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (dotted.key, value)."""
    found = []
    for key, value in config.items():
        if isinstance(value, dict):
            found += leaves(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, value))
    return found


def entries(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested dicts, lists and tuples; a `_target_` that is one of them is a value too."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        nested = isinstance(value, dict | list | tuple)
        if not nested or key == "_target_":
            yield f"{prefix}{key}", value
        if nested:
            yield from entries(value, f"{prefix}{key}.")
