"""Step machine: versions, the card, and its highest rates of copying and of multiplying matrices."""

import importlib.metadata
import subprocess

import torch
from common import DEVICE, write
from instruments import Machine

PACKAGES = ("torch", "triton", "pytorch-lightning", "numpy", "learn2learn", "hydra-core", "jax", "higher", "torchopt")


def main() -> None:
    ceilings = {}
    for precision in ("float32", "tf32"):
        ceilings[precision] = Machine(DEVICE, None, tf32=precision == "tf32").describe()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    card = "no GPU"
    if DEVICE == "cuda":
        query = "name,driver_version,memory.total,clocks.max.sm"
        card = subprocess.check_output(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], text=True
        ).strip()
        versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    rates = ", ".join(
        f"{name} {ceiling['matmul_gflop_per_second'] / 1000:.1f} TFLOP/s" for name, ceiling in ceilings.items()
    )
    lines = [
        f"{card}; copy {ceilings['float32']['copy_gb_per_second']:.0f} GB/s; products of matrices: {rates}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    write("machine", {"machine": ceilings, "versions": versions, "card": card, "lines": lines})


if __name__ == "__main__":
    main()
