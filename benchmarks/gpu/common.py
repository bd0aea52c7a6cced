"""What the steps share: where they run, how long, and how a result is written."""

import json
import os
from pathlib import Path
from typing import Any

import torch

REHEARSE = bool(os.environ.get("REHEARSE"))  # tiny, on the CPU
DEVICE = "cpu" if REHEARSE else "cuda"
OUT = Path(os.environ.get("OUT", "outputs/gpu"))
SECONDS = float(os.environ.get("STEP_SECONDS", "60"))  # that this step has

if REHEARSE:
    torch.set_num_threads(1)


def write(name: str, found: dict[str, Any]) -> None:
    """OUT/NAME.json, whole or not at all. found["lines"] is what the table of all steps shows of it."""
    part = OUT / f".{name}.json.part"
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(OUT / f"{name}.json")
