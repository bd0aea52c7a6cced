"""The models that come with the program: exports them from finished runs, and writes the table in models/README.md.

    python docs/results/models.py [RUN ...]

RUN: the output folders of finished runs. With none it makes the table anew, from the files of the models.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from fewshot.export import export
from fewshot.files import CARD, EXPORTED, EXPORTED_CONFIG, checkpoint_file
from fewshot.inner_loop import InnerLoop
from fewshot.results.record_files import read

MODELS = Path(__file__).parents[2] / "models"


def model_name(config: dict[str, Any]) -> str:
    """DATASET-WAYSwSHOTSs-ALGORITHM, as models/README.md explains it."""
    loop = InnerLoop.of(config)
    if not loop.is_maml:
        raise SystemExit(f"{loop.name}: only models of FOMAML and SOMAML, with or without zeroing, have a name")
    words = ["zero"] * loop.zeroing or ["zero-init"] * (config.get("init_scale") == 0)
    algorithm = "-".join(["somaml"] * (not loop.first_order) + words) or "fomaml"
    return f"{config['dataset']['name']}-{config['ways']}w{config['shots']}s-{algorithm}"


def row(folder: Path) -> str:
    """A model's line in the table."""
    config = yaml.safe_load((folder / EXPORTED_CONFIG).read_text(encoding="utf-8"))
    card = yaml.safe_load((folder / CARD).read_text(encoding="utf-8").split("---\n")[1])
    (result,) = card["model-index"][0]["results"]
    accuracies = [f"{100 * metric['value']:.1f} ± {100 * metric['args']['ci95']:.1f}" for metric in result["metrics"]]
    start = ", head starts at zero" * (config["init_scale"] == 0)
    cells = [
        f"[`{folder.name}`]({folder.name}/{CARD})",
        f"{InnerLoop.of(config).name}{start}",
        str(config["seed"]),
        f"{config['iterations']:,} x {config['meta_batch_size']}",
        *accuracies,
        f"{(folder / EXPORTED).stat().st_size / 1000:.0f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def table(models: Path) -> str:
    """All models, with query accuracies after as many inner steps as in training."""
    columns = ["model", "algorithm", "seed", "updates x tasks", "accuracy in %", "head zeroed for the test", "kB"]
    head = f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}\n"
    return head + "".join(row(path.parent) for path in sorted(models.glob(f"*/{EXPORTED}")))


def main() -> None:
    for run in map(Path, sys.argv[1:]):
        export(checkpoint_file(run, "best"), MODELS / model_name(read(run)["config"]))
    subprocess.run([sys.executable, "-m", "cogapp", "-r", "-I", Path(__file__).parent, CARD], cwd=MODELS, check=True)


if __name__ == "__main__":
    main()
