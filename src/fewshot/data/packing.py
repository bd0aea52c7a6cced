"""Where images lie that are not where they are looked for: what a message can say to whoever packed them."""

import os
from collections import defaultdict
from pathlib import Path

from fewshot.data.folder_or_zip import Source
from fewshot.data.images import is_image

SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
DEEPEST = 4  # folders that are looked through


def other_packing(source: Source) -> str:
    """What would help: folders called otherwise, or wrapped more than once; "" where nothing is seen."""
    folders = {name.rpartition("/")[0] for name in source.names if is_image(name)}
    inside: dict[str, set[str]] = defaultdict(set)
    for folder in folders:
        parts = folder.split("/")
        for depth in range(min(len(parts), DEEPEST)):
            inside["/".join(parts[:depth])].add(parts[depth])
    for base, names in sorted(inside.items(), key=lambda item: item[0].count("/")):
        called = {
            split: name for split, known in SPELLINGS.items() for name in sorted(names) if name.casefold() in known
        }
        if len(called) == len(SPELLINGS):
            renamed = list(called.values()) != list(SPELLINGS)
            rename = f"call {', '.join(called.values())} train, val and test" if renamed else ""
            return " and ".join(filter(None, [rename, _unwrap(source.root, base) if "/" in base else ""]))
    base = os.path.commonpath(folders) if folders else ""
    return _unwrap(source.root, base) if "/" in base and len(inside[base]) > 1 else ""


def _unwrap(root: Path, base: str) -> str:
    return f"give dataset.root={root / base}" if root.is_dir() else f"make the zip anew of what is in {base}/"
