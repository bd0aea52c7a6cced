"""What the program computes is bit by bit what it computed at commit 2f3a4cf, before the house was rebuilt.

The batched engine has since come to add up in another order: its hashes are of the commit that changed that.
"""

import hashlib
import json
import platform
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

EXPECTED = json.loads((ROOT / "tests" / "fixtures" / "2f3a4cf" / "hashes.json").read_text())
ALGORITHMS = {
    "fomaml": ("algo=fomaml",),
    "somaml_zeroing": ("algo=somaml", "+zeroing=true"),
    "protomaml": ("algo=protomaml",),
    "contrastive": ("algo=contrastive",),
}


def sha256(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(contents)).hexdigest()


def how_this_machine_rounds() -> str:
    """Other processors and other versions of torch add up in another order, so their last digits differ."""
    torch.manual_seed(0)
    images, weight = torch.randn(15, 8, 13, 13), torch.randn(8, 8, 3, 3, requires_grad=True)
    features = F.batch_norm(F.conv2d(images, weight, stride=2), None, None, training=True)
    (gradient,) = torch.autograd.grad((features.flatten(1) @ features.flatten(1).T).exp().log1p().mean(), weight)
    cpuinfo = Path("/proc/cpuinfo")
    processor = re.findall(r"^(?:model|flags|cache size).*", cpuinfo.read_text(), re.M) if cpuinfo.exists() else []
    kind = "".join(sorted({*processor, platform.processor(), torch.__version__}))
    return sha256(kind.encode(), features.detach().numpy().tobytes(), gradient.numpy().tobytes())


@pytest.mark.parametrize("engine", ["sequential", "batched"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_run_is_bitwise_what_it_was(run, tmp_path, algorithm, engine):
    if how_this_machine_rounds() != EXPECTED["rounding"]:
        pytest.skip("another processor or torch, which rounds in another way")
    folder = run(tmp_path / "run", *ALGORITHMS[algorithm], f"engine={engine}")
    if json.loads((folder / "splits.json").read_text())["sha256"] != EXPECTED["images"]:
        pytest.skip("another matplotlib or Pillow, which draws other letters")
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    hashes = {
        "metrics.csv": sha256((folder / "metrics.csv").read_bytes()),
        "weights": sha256(*(state[name].numpy().tobytes() for name in sorted(state))),
    }
    assert hashes == EXPECTED[f"{algorithm}-{engine}"]
