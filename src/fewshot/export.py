"""A model to share: python -m fewshot.export checkpoint=RUN out=FOLDER

fewshot.load(FOLDER) and python -m fewshot.predict read the folder. There is no pickle in it, no optimiser state and no
path of the machine that trained.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from fewshot.config.command import Command, Parameter, one_line_errors, read
from fewshot.config.stored import OUTER
from fewshot.config.tree import MODES, NOT_THE_MODEL, OF_TRAINING, key_of, portable
from fewshot.errors import UserError, one_line, printable, shown
from fewshot.files import CARD, EXPORTED, EXPORTED_CONFIG, TRAINED, check_place, checkpoint_file, user_path, write_file
from fewshot.inner_loop import InnerLoop
from fewshot.results.record_files import percent, versions
from fewshot.results.record_files import read as read_results


def export(checkpoint: Path, folder: Path) -> None:
    """Writes the model of a checkpoint into a folder; one that holds such files already is a UserError."""
    check_place("out", folder, without=(EXPORTED, EXPORTED_CONFIG, CARD))
    # Torch and Lightning take seconds to import, and a mistake in the call should not have to wait for them.
    from omegaconf import OmegaConf
    from safetensors.torch import save

    from fewshot.training import checkpoint as stored_run

    content = stored_run.read(checkpoint)
    run = content["fewshot"]
    weights = {name: tensor.contiguous() for name, tensor in content["state_dict"].items()}
    trained = {"iteration": content["global_step"]}
    trained |= {"splits": run["splits"]["sha256"]} if "splits" in run else {}
    card = model_card(run, weights, content["global_step"], *_results(checkpoint, content["global_step"]))
    files = {
        CARD: card,
        EXPORTED_CONFIG: OmegaConf.to_yaml(OmegaConf.create(portable(run["config"]) | {TRAINED: trained})),
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
    run: dict[str, Any], weights: dict[str, Any], iteration: int, results: dict[str, Any] | None, why_not: str
) -> str:
    """The text of README.md, with the front matter that model hubs read. run: what a checkpoint says of its run."""
    config, loop = run["config"], InnerLoop.of(run["config"])
    numbers = sum(tensor.numel() for name, tensor in weights.items() if name.startswith("network."))
    facts = _facts(config, run.get("splits"), numbers, iteration, (results or {}).get("versions", versions()))
    title = f"{config['model']['name']} on {config['dataset']['name']}, {config['ways']}-way {config['shots']}-shot"
    ours = _ours(config)
    return CARD_TEXT.format(
        metadata=yaml.safe_dump(_metadata(title, config, results), sort_keys=False),
        title=plain_markdown(title),
        facts="\n".join(f"| {name} | {plain_markdown(fact)} |" for name, fact in facts.items()),
        numbers=_table(results) if results else f"None: {why_not}.",
        command=_command(run["overrides"]),
        algorithm=plain_markdown(loop.named("MAML", order=False)),
        ways=loop.ways(config["ways"]),
        together=_together(config["model"]),
        foreign=FOREIGN * (not ours),
        word=" trust=true" * (not ours),
        argument=", trust=True" * (not ours),
    )


def _facts(
    config: dict[str, Any], splits: dict[str, Any] | None, numbers: int, iteration: int, packages: dict[str, str]
) -> dict[str, str]:
    """The rows of the card's first table; numbers: how many the weights of the network have."""
    from fewshot.data.sources import LICENCES
    from fewshot.data.task import SPLITS

    data, algo, split = config["dataset"], config["algo"], "not recorded"
    if splits:
        names = {"test": "its one task's"} if _of_one_task(config) else {}
        split = ", ".join(f"{len(splits[name])} {names.get(name, name)} classes" for name in SPLITS)
        split += f"; SHA-256 of their names and images {splits['sha256']}"
    licences = {} if "fractions" in data else LICENCES  # images of one's own are named after the user's folder
    tasks = f"{'one task of ' * _of_one_task(config)}{data['name']}, {config['ways']}-way {config['shots']}-shot"
    pixels = f"{data['size']} x {data['size']} pixels, {'grey' if data['channels'] == 1 else 'colour'}"
    knobs = {**algo, "init_scale": config.get("init_scale", 1)}
    settings = ", ".join(f"{knob}={shown(value)}" for knob, value in knobs.items() if knob != "_target_" or value)
    inner = f"inner_steps={config['inner_steps']} inner_lr={config['inner_lr']}"
    outer = f"meta_batch_size={config['meta_batch_size']} outer_lr={config['outer_lr']}"
    outer += "".join(f" {knob}={shown(config[knob])}" for knob in OUTER if config.get(knob, OUTER[knob]) != OUTER[knob])
    return {
        "trained on": f"{tasks}, {pixels}",
        "splits": split,
        "licence of the images": licences.get(data["name"], "not known to this program"),
        "network": f"{config['model']['name']}, {numbers:,} parameters",
        "algorithm": f"{InnerLoop.of(config).name}: {settings}",
        "inner loop": inner + ", where the learned ones began" * bool(algo.get("learned_inner_lr")),
        "outer loop": f"outer update {iteration} of {config['iterations']}, {outer}",
        "seed": str(config["seed"]),
        "versions": ", ".join(f"{name} {number}" for name, number in packages.items()),
    }


def _ours(config: dict[str, Any]) -> bool:
    """Whether this program's own code makes the network and adapts it, for which nobody has to be trusted."""
    algorithm = config["algo"].get("_target_") or "fewshot.algorithms."
    return _our_network(config["model"]) and algorithm.startswith("fewshot.algorithms.")


def _our_network(model: dict[str, Any]) -> bool:
    target = model["network"]["_target_"]
    return target.startswith("fewshot.models.") and "any_module" not in target


def _together(model: dict[str, Any]) -> str:
    """Whether the prediction for an image depends on the other queries of a call, as far as this is known."""
    if (ours := _our_network(model)) and model.get("norm", "batch") != "batch":
        return ""
    layer = "BatchNorm" if ours else "BatchNorm, if the network has it,"
    return f"\n{layer} normalises all queries of a call together, so the prediction for one depends on the others."


def plain_markdown(text: str) -> str:
    """A line that Markdown and HTML show as it is: names of others may stand in it."""
    return re.sub(r"[\\`*_{}\[\]<>|~&:@$]", r"\\\g<0>", one_line(text))


def _of_one_task(config: dict[str, Any]) -> bool:
    """Whether it was trained on one task, which is of the test split."""
    return config["dataset"].get("tasks") == "one_task"


def _table(results: dict[str, Any]) -> str:
    test, data = results["test"], plain_markdown(results["config"]["dataset"]["name"])
    split = "the split of its one task" if _of_one_task(results["config"]) else "the test split"
    lines = [
        f"Query accuracy in % on {test['tasks']} tasks of {split} of {data}, with the half width of its 95% "
        f"confidence interval over tasks, from one run (seed {results['config']['seed']}). Test zeroing: the head is "
        "set to zero before it is adapted.",
        "",
        "| inner step | test zeroing off | test zeroing on |",
        "| --- | --- | --- |",
    ]
    for step in range(len(test["zeroing_off"]["accuracy"])):
        cells = (percent(test[mode]["accuracy"][step], test[mode]["ci95"][step]) for mode in MODES)
        lines.append(f"| {step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _metadata(title: str, config: dict[str, Any], results: dict[str, Any] | None) -> dict[str, Any]:
    """The card's front matter; the accuracies as model hubs read them, after as many inner steps as in training."""

    def plain(text: str) -> str:
        """Some viewers show this part as Markdown, in which no escape would hold in YAML too."""
        return re.sub(r"[^A-Za-z0-9_.,+ -]+", "-", text)

    metadata = {
        "library_name": "fewshot",
        "pipeline_tag": "image-classification",
        "tags": ["few-shot-learning", "meta-learning", *["maml"] * (InnerLoop.of(config).distance is None)],
    }
    if not results:
        return metadata
    test, data = results["test"], plain(config["dataset"]["name"])
    steps = min(config["inner_steps"], len(test["zeroing_on"]["accuracy"]) - 1)
    metrics = [
        {
            "type": "accuracy",
            "name": f"query accuracy, test zeroing {mode.removeprefix('zeroing_')}",
            "value": test[mode]["accuracy"][steps],
            "args": {"inner_steps": steps, "tasks": test["tasks"], "ci95": test[mode]["ci95"][steps]},
        }
        for mode in MODES
    ]
    task = {"type": "image-classification", "name": f"{config['ways']}-way {config['shots']}-shot classification"}
    dataset = {"name": data, "type": data} | ({} if _of_one_task(config) else {"split": "test"})
    return metadata | {
        "model-index": [{"name": plain(title), "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]
    }


def _command(overrides: list[str]) -> str:
    """The call that trained it, on one line, without places of the machine and what changes nothing in the model."""
    left_out = {*NOT_THE_MODEL} - {"augment", *OUTER}
    words = [
        shlex.quote(printable(override))
        for override in overrides
        if key_of(override) == "trainer.precision"
        or override.startswith(OF_TRAINING)
        or not any(f"{key_of(override)}.".startswith(f"{key}.") for key in left_out)
    ]
    return " ".join(["python train.py", *words])


FOREIGN = """
Loading the model calls code that is not `fewshot`'s own; each `_target_` in `config.yaml` names what is called."""
CARD_TEXT = """---
{metadata}---

# {title}

A model trained with {algorithm}: it adapts to a few images of each of some new classes and tells these classes
apart. By `fewshot`, after *MAML is a Noisy Contrastive Learner in Classification* (Kao, Chiu, Chen; ICLR 2022).

| | |
| --- | --- |
{facts}

## Numbers

{numbers}

## Training

```bash
{command}
```

## Use

```bash
python -m fewshot.predict model=THIS_FOLDER support=DIR query=DIR{word}   # support: one folder of images per class
```

```python
import fewshot
from fewshot.predict import predict

model = fewshot.load("THIS_FOLDER"{argument})  # model.encoder, model.head, model.preprocess
predict(model, {{"cat": [image, ...], "dog": [image, ...]}}, [image, ...]).labels  # PIL images or uint8 arrays
```

On the Hugging Face hub `hf://ORG/NAME` stands for the folder. The model adapts to {ways}.{together}{foreign}

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
