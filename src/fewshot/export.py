"""A model to share: python -m fewshot.export checkpoint=RUN out=FOLDER

fewshot.load(FOLDER) and python -m fewshot.predict read the folder. There is no pickle in it, no optimiser state and no
path of the machine that trained.
"""

import os
import re
from pathlib import Path
from typing import Any

from fewshot.config.command import Command, Parameter, one_line_errors, read
from fewshot.config.stored import OUTER
from fewshot.config.tree import MODES, portable
from fewshot.errors import UserError, one_line, shown
from fewshot.files import EXPORTED, EXPORTED_CONFIG, check_place, checkpoint_file, user_path, write_file
from fewshot.inner_loop import InnerLoop
from fewshot.results.record_files import read as read_results
from fewshot.results.record_files import versions

CARD = "README.md"


def export(checkpoint: Path, folder: Path) -> None:
    """Writes the model of a checkpoint into a folder; one that holds such files already is a UserError."""
    check_place("out", folder)
    for name in (EXPORTED, EXPORTED_CONFIG, CARD):
        if os.path.lexists(folder / name):
            raise UserError(f"out={folder}: holds a {name}; name another folder")
    # Torch and Lightning take seconds to import, and a mistake in the call should not have to wait for them.
    from omegaconf import OmegaConf
    from safetensors.torch import save

    from fewshot.training import checkpoint as stored_run

    content = stored_run.read(checkpoint)
    trained = content["fewshot"]["config"]
    weights = {name: tensor.contiguous() for name, tensor in content["state_dict"].items()}
    splits = content["fewshot"].get("splits", {})
    card = model_card(trained, weights, splits, content["global_step"], *_results(checkpoint, content["global_step"]))
    files = {
        CARD: card,
        EXPORTED_CONFIG: OmegaConf.to_yaml(OmegaConf.create(portable(trained))),
        EXPORTED: save(weights, {"format": "pt"}),  # last: with it the folder is one that can be loaded
    }
    for name, data in files.items():
        write_file(folder / name, data)


def _results(checkpoint: Path, iteration: int) -> tuple[dict[str, Any] | None, str]:
    """results.json of the checkpoint's run if it was this model that was tested; else None and why not."""
    folder = checkpoint.absolute().parent.parent
    if not (folder / "results.json").exists():
        return None, "the checkpoint was exported without a results.json beside its folder"
    try:
        results = read_results(folder)
    except UserError:
        return None, "the results.json beside the checkpoint's folder cannot be read"
    if (tested := results["best_iteration"]) != iteration:
        return None, f"the results beside it are of outer update {tested}, this model is of {iteration}"
    return results, ""


def model_card(
    config: dict[str, Any],
    weights: dict[str, Any],
    splits: dict[str, Any],
    iteration: int,
    results: dict[str, Any] | None,
    why_not: str,
) -> str:
    """The text of README.md, with the front matter that model hubs read."""
    from fewshot.data.task import SPLITS

    data, algo, ways, shots = config["dataset"], config["algo"], config["ways"], config["shots"]
    numbers = sum(tensor.numel() for name, tensor in weights.items() if name.startswith("network."))
    colour = "grey" if data["channels"] == 1 else "colour"
    facts = {
        "trained on": f"{data['name']}, {ways}-way {shots}-shot, {data['size']} x {data['size']} pixels, {colour}",
        "splits": ", ".join(f"{len(splits[split])} {split} classes" for split in SPLITS)
        + f"; SHA-256 of their names and images {splits['sha256']}"
        if splits
        else "not recorded",
        "network": f"{config['model']['name']}, {numbers:,} parameters",
        "algorithm": ", ".join(f"{knob}={shown(value)}" for knob, value in algo.items()),
        "inner loop": f"inner_steps={config['inner_steps']} inner_lr={config['inner_lr']}"
        + ", where the learned ones began" * algo["learned_inner_lr"],
        "outer loop": f"outer update {iteration} of {config['iterations']}, "
        f"meta_batch_size={config['meta_batch_size']} outer_lr={config['outer_lr']}"
        + "".join(f" {knob}={shown(config[knob])}" for knob in OUTER if config[knob] != OUTER[knob]),
        "seed": str(config["seed"]),
        "versions": ", ".join(
            f"{name} {number}" for name, number in (results or {}).get("versions", versions()).items()
        ),
    }
    return CARD_TEXT.format(
        title=plain_markdown(f"{config['model']['name']} on {data['name']}, {ways}-way {shots}-shot"),
        facts="\n".join(f"| {name} | {plain_markdown(fact)} |" for name, fact in facts.items()),
        numbers=_table(results) if results else f"None: {why_not}.",
        ways=InnerLoop.of(config).ways(ways),
    )


def plain_markdown(text: str) -> str:
    """A line that Markdown and HTML show as it is: names of others may stand in it."""
    return re.sub(r"[\\`*_{}\[\]<>|~&:@$]", r"\\\g<0>", one_line(text))


def _table(results: dict[str, Any]) -> str:
    test, data = results["test"], plain_markdown(results["config"]["dataset"]["name"])
    lines = [
        f"Query accuracy in % on {test['tasks']} tasks of the test split of {data}, with the half width of its 95% "
        f"confidence interval over tasks, from one run (seed {results['config']['seed']}). Test zeroing: the head is "
        "set to zero before it is adapted.",
        "",
        "| inner step | test zeroing off | test zeroing on |",
        "| --- | --- | --- |",
    ]
    for step in range(len(test["zeroing_off"]["accuracy"])):
        cells = (f"{100 * test[mode]['accuracy'][step]:.2f} ± {100 * test[mode]['ci95'][step]:.2f}" for mode in MODES)
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


CARD_TEXT = """---
library_name: fewshot
pipeline_tag: image-classification
tags: [few-shot-learning, meta-learning, maml]
---

# {title}

A model trained with MAML: it adapts to a few images of each of some new classes and tells these classes
apart. By `fewshot`, after *MAML is a Noisy Contrastive Learner in Classification* (Kao, Chiu, Chen; ICLR 2022).

| | |
| --- | --- |
{facts}

## Numbers

{numbers}

## Use

```bash
python -m fewshot.predict checkpoint=THIS_FOLDER support=DIR query=DIR   # support: one folder of images per class
```

```python
import fewshot
from fewshot.predict import predict

model = fewshot.load("THIS_FOLDER")  # model.encoder, model.head, model.preprocess
predict(model, {{"cat": [image, ...], "dog": [image, ...]}}, [image, ...]).labels  # PIL images or uint8 arrays
```

It adapts to {ways}.
BatchNorm normalises all queries of a call together, so the prediction for one depends on the others.

`model.safetensors` holds the weights, `config.yaml` the settings of the training that belong to the model.
"""


COMMAND = Command(
    "export",
    "writes a model to share, which fewshot.load and predict read.",
    {
        "checkpoint=PATH": Parameter(
            "The folder of a run, whose best model is taken, or one file, such as RUN/checkpoints/last.ckpt.",
            lambda key, text: checkpoint_file(text, "best"),
            needed=True,
        ),
        "out=FOLDER": Parameter(
            "The folder for model.safetensors, config.yaml and a model card, README.md; it is made if it is not there.",
            user_path,
            needed=True,
        ),
    },
)


def main(arguments: list[str] | None = None) -> None:
    with one_line_errors():
        values = read(COMMAND, arguments).values
        export(values["checkpoint"], values["out"])
        print(f"Written to {values['out']}; fewshot.load reads it")


if __name__ == "__main__":
    main()
