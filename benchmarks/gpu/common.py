"""What the steps share: the device, their time, and the writing of a result."""

import json
import os
from pathlib import Path
from typing import Any

import torch

REHEARSE = bool(os.environ.get("REHEARSE"))  # tiny, on the CPU
DEVICE = "cpu" if REHEARSE else "cuda"
OUT = Path(os.environ.get("OUT", "outputs/gpu"))
SECONDS = float(os.environ.get("STEP_SECONDS", "60"))  # the time of this step

if REHEARSE:
    torch.set_num_threads(1)


def write(name: str, content: dict[str, Any]) -> None:
    """Writes OUT/NAME.json, whole or not at all. content["lines"] is what the table of all steps shows of it."""
    part = OUT / f".{name}.json.part"
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(OUT / f"{name}.json")
