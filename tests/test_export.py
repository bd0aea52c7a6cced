"""A checkpoint that is shared: the same model comes back, nothing foreign runs."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, copied_before_writes
from omegaconf import OmegaConf

import fewshot
from fewshot import models
from fewshot.config.tree import settings
from fewshot.errors import UserError
from fewshot.export import export, main, model_card
from fewshot.predict import predict


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "shared"
    export(trained / "checkpoints" / "best.ckpt", folder)
    return folder


def test_the_same_model_comes_back_bit_by_bit(trained, exported):
    ours, theirs = fewshot.load(trained / "checkpoints" / "best.ckpt"), fewshot.load(exported)
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    assert theirs.learner.state_dict().keys() == content["state_dict"].keys()
    assert all(torch.equal(theirs.learner.state_dict()[name], w) for name, w in content["state_dict"].items())
    trained_to = {"iteration": content["global_step"], "splits": content["fewshot"]["splits"]["sha256"]}
    assert yaml.safe_load((exported / "config.yaml").read_text()).pop("trained") == trained_to
    assert theirs.config == ours.config  # as that is no setting
    images = np.random.default_rng(0).integers(0, 256, (9, 35, 28), dtype=np.uint8)
    x = torch.stack([theirs.preprocess(image) for image in images])
    assert torch.equal(theirs.head(theirs.encoder(x)), ours.head(ours.encoder(x)))
    assert theirs.head.weight.requires_grad and not theirs.encoder.training
    support = {"a": images[:2], "b": images[2:5]}
    probabilities = [predict(model, support, images[5:]).probabilities for model in (ours, theirs, str(exported))]
    assert np.array_equal(probabilities[0], probabilities[1]) and np.array_equal(probabilities[0], probabilities[2])


def test_the_lines_of_the_docs_load_the_folder(exported):
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "predict.md").read_text(), re.DOTALL)
    images = np.random.default_rng(0).integers(0, 256, (3, 35, 28), dtype=np.uint8)
    names = {"fewshot": fewshot, "torch": torch, "images": images}
    exec(lines.replace('"FOLDER"', repr(str(exported))), names)
    assert names["logits"].shape == (3, 5)


def test_a_runs_folder_stands_for_its_best_model(trained, exported, run, tmp_path, monkeypatch):
    """For export, load and a test."""
    monkeypatch.setenv("HOME", str(trained.parent))
    main([f"checkpoint=~/{trained.name}", "out=~/of-a-run"])
    for name in ("model.safetensors", "config.yaml", "README.md"):
        assert (trained.parent / "of-a-run" / name).read_bytes() == (exported / name).read_bytes()
    ours, theirs = fewshot.load(trained), fewshot.load(exported)
    assert torch.equal(ours.head.weight, theirs.head.weight)
    tested = run(tmp_path / "test", f"checkpoint={trained}", "fit=false")
    results = [json.loads((folder / "results.json").read_text()) for folder in (tested, trained)]
    assert results[0]["test"] == results[1]["test"]


def test_a_checkpoint_in_float64_stays_so(trained, tmp_path):
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    state = {name: tensor.double() + 1e-12 for name, tensor in content["state_dict"].items()}
    torch.save({**content, "state_dict": state}, tmp_path / "double.ckpt")
    export(tmp_path / "double.ckpt", tmp_path / "shared")
    for path in (tmp_path / "double.ckpt", tmp_path / "shared"):
        weights = fewshot.load(path).learner.state_dict()
        assert all(weights[name].dtype == torch.float64 and torch.equal(weights[name], w) for name, w in state.items())
    images = np.zeros((3, 28, 28), np.uint8)
    assert np.isfinite(predict(tmp_path / "shared", {"a": images, "b": images}, images).probabilities).all()


def test_loading_draws_no_random_number_of_the_caller(exported):
    before = torch.get_rng_state()
    fewshot.load(exported)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_folder_holds_weights_settings_and_a_card_and_no_pickle(trained, exported, cache):
    assert sorted(path.name for path in exported.iterdir()) == ["README.md", "config.yaml", "model.safetensors"]
    data = (exported / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")  # a safetensors file: this, a JSON of so many bytes, the numbers
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    state = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert len(data) == 8 + length + 4 * sum(tensor.numel() for tensor in state.values())
    first, last = header["network.head.weight"]["data_offsets"]
    assert data[8 + length :][first:last] == state["network.head.weight"].numpy().tobytes()
    text = (exported / "config.yaml").read_text() + (exported / "README.md").read_text()
    assert (
        not zipfile.is_zipfile(exported / "model.safetensors") and str(cache) not in text and str(trained) not in text
    )
    assert set(re.findall("_target_: (.*)", text)) == {"fewshot.models.conv4_strided"}


def test_how_training_images_were_changed_is_no_part_of_a_model(trained, config, tmp_path):
    """Nor is what changed them called."""
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    content["fewshot"]["config"] |= {"augment": settings(config("augment=standard"))["augment"]}
    torch.save(content, tmp_path / "best.ckpt")
    assert "augment" not in fewshot.load(tmp_path / "best.ckpt").config


def test_the_card_of_a_run_on_one_task_calls_neither_its_classes_nor_its_numbers_those_of_a_test(trained):
    run = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)["fewshot"]
    results = json.loads((trained / "results.json").read_text())
    for config in (run["config"], results["config"]):
        config["dataset"]["tasks"] = "one_task"
    card = model_card(run, {}, results["best_iteration"], results, "")
    assert "on 4 tasks of the split of its one task of glyphs" in card and "trained on | one task of glyphs, " in card
    assert " test classes" not in card and "split: test" not in card and " its one task's classes; SHA-256" in card


def test_the_card_has_the_numbers_or_says_why_not(trained, exported, tmp_path):
    results = json.loads((trained / "results.json").read_text())
    card = (exported / "README.md").read_text()
    for step, (accuracy, ci95) in enumerate(
        zip(results["test"]["zeroing_on"]["accuracy"], results["test"]["zeroing_on"]["ci95"], strict=True)
    ):
        assert re.search(rf"\| {step} \| [^|]+ \| {100 * accuracy:.2f} ± {100 * ci95:.2f} \|", card)
    assert "on 4 tasks of the test split of glyphs" in card and f"torch {results['versions']['torch']}" in card
    assert f"{len(results['splits']['test'])} test classes; SHA-256" in card and results["splits"]["sha256"] in card
    assert "| seed | 0 |" in card and "glyphs, 5-way 5-shot, 28 x 28 pixels, grey" in card
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    alone = shutil.copy(trained / "checkpoints" / "best.ckpt", tmp_path / "run" / "checkpoints")
    for number, (content, line) in enumerate(
        (
            (None, "None: the checkpoint was exported without a results.json"),
            ("{", "None: the results.json beside the checkpoint's folder cannot be read."),
            (json.dumps({**results, "best_iteration": 7}), "None: the results beside it are of outer update 7"),
        )
    ):
        if content:
            (tmp_path / "run" / "results.json").write_text(content)
        export(Path(alone), tmp_path / f"out{number}")
        assert line in (tmp_path / f"out{number}" / "README.md").read_text()


def test_names_of_others_are_no_markdown_and_no_html_in_a_card(trained, tmp_path):
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    name = "<script>alert(1)</script> [a](http://b) | `c` *d* \\| &lt; $e$ ~f~ @g {h}"
    for part in ("dataset", "model"):
        content["fewshot"]["config"][part]["name"] = name
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save(content, tmp_path / "run" / "checkpoints" / "best.ckpt")
    results = json.loads((trained / "results.json").read_text())
    results["config"]["dataset"]["name"] = name
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    export(tmp_path / "run" / "checkpoints" / "best.ckpt", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    escaped = r"\<script\>alert(1)\</script\> \[a\](http\://b) \| \`c\` \*d\* \\\| \&lt; \$e\$ \~f\~ \@g \{h\}"
    assert card.count(escaped) == 5 and name not in card and "<script" not in card.replace(r"\<", "")
    rows = [line for line in card.splitlines() if line.startswith(("| trained on", "| network"))]
    assert all(len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) == 3 for row in rows) and len(rows) == 2


def test_the_card_has_the_command_on_one_line_without_places_of_the_machine(trained, exported, tmp_path):
    command = re.search(r"```bash\n(python train\.py .*)\n```\n", (exported / "README.md").read_text())[1]
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    overrides = content["fewshot"]["overrides"]
    kept = [word for word in overrides if not word.startswith(("trainer=", "logger=", "callbacks.", "dataset.cache="))]
    assert command.split() == ["python", "train.py", *kept] and len(kept) < len(overrides) and "shots=5" in kept
    content["fewshot"]["overrides"] = [
        "+zeroing=true",
        "dataset.root=/home/me",
        "clip_norm=1",
        "seed=0 ```\x85<b>' $(rm)",
    ]
    torch.save(content, tmp_path / "best.ckpt")
    export(tmp_path / "best.ckpt", tmp_path / "out")
    line = "python train.py +zeroing=true clip_norm=1 'seed=0 ```\\x85<b>'\"'\"' $(rm)'"
    assert f"```bash\n{line}\n```\n" in (tmp_path / "out" / "README.md").read_text()


def card_of(config, *words):
    return model_card({"config": settings(config(*words)), "overrides": list(words)}, {}, 4, None, "none")


def test_images_of_ones_own_have_no_licence_that_is_known(config):
    line = "| licence of the images | {} |"
    assert line.format("MIT, Brenden Lake 2015") in card_of(config, "dataset=omniglot", "dataset.root=/a")
    for dataset in ("folder", "huggingface"):
        card = card_of(config, f"dataset={dataset}", "dataset.root=/home/me/omniglot")
        assert line.format("not known to this program") in card and "trained on | omniglot, " in card


def test_a_card_says_what_is_true_of_its_model_alone(config):
    together = "normalises all queries of a call together"
    maml = card_of(config, "algo=zero")
    assert "A model trained with MAML: it" in maml and f"BatchNorm {together}" in maml and "- maml\n" in maml
    card = card_of(config, "algo=protonet", "model.norm=group")
    assert "A model trained with ProtoNet (dot product): it" in card and "adapts to any number of classes.\n\n" in card
    assert together not in card and "maml\n" not in card
    assert "A model trained with ANIL: it" in card_of(config, "algo=anil", "model=resnet12", "dataset=cifarfs")
    own = card_of(config, "model=module", "model.module={_target_: torchvision.models.resnet18}")
    assert f"BatchNorm, if the network has it, {together}" in own
    trusted = ("query=DIR trust=true ", '.load("THIS_FOLDER", trust=True)', "calls code that is not `fewshot`'s own")
    algorithm = card_of(config, "+algo._target_=mine.Mine")
    assert all(words in card for words in trusted for card in (own, algorithm))
    assert not any(words in card for words in ("trust", trusted[2]) for card in (maml, card_of(config, "algo=reptile")))


def test_the_command_of_a_card_has_the_precision_and_callbacks_of_ones_own(config):
    words = ["trainer.precision=64-true", "trainer.max_time=null", "callbacks.record.test_curve_tasks=2"]
    words = [words[0], f"+{words[1]}", words[2], "+callbacks.mine._target_=collections.Counter"]
    assert f"python train.py {words[0]} {words[3]}\n" in card_of(config, *words)


def test_a_folder_of_which_a_part_is_written_is_no_model_yet(trained, tmp_path):
    with copied_before_writes(tmp_path / "shared") as killed:
        export(trained / "checkpoints" / "best.ckpt", tmp_path / "shared")
    assert (tmp_path / "shared" / "model.safetensors").exists()
    assert len(killed) == 3 and not any((folder / "model.safetensors").exists() for folder in killed)


def test_an_export_overwrites_nothing(trained, exported, tmp_path):
    before = (exported / "README.md").stat().st_mtime_ns
    with pytest.raises(SystemExit, match=r"holds a model\.safetensors; name another folder"):
        main([f"checkpoint={trained}/checkpoints/best.ckpt", f"out={exported}"])
    assert (exported / "README.md").stat().st_mtime_ns == before
    for name in ("README.md", "config.yaml"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        with pytest.raises(SystemExit, match=rf"holds a {name}; name another folder"):
            main([f"checkpoint={trained}/checkpoints/best.ckpt", f"out={tmp_path / name}"])
        assert [path.read_text() for path in (tmp_path / name).iterdir()] == ["mine"]
    with pytest.raises(SystemExit, match="no such file"):
        main(["checkpoint=none", f"out={tmp_path / 'new'}"])
    assert not (tmp_path / "new").exists()


# Foreign folders


def altered(exported: Path, folder: Path, knobs: dict) -> Path:
    shutil.copytree(exported, folder)
    config = OmegaConf.load(folder / "config.yaml")
    for key, value in knobs.items():
        OmegaConf.update(config, key, value, merge=False)
    OmegaConf.save(config, folder / "config.yaml")
    return folder


CALLED = []


def foreign(**knobs):
    CALLED.append(knobs)
    return models.conv4_strided(**knobs)


@pytest.mark.parametrize(
    "knobs",
    [
        {"model.network": {"_target_": "os.system", "command": "touch MARK"}},
        {"model.network": {"_target_": "fewshot.config.command.os.system", "command": "touch MARK"}},
        {"model.network": {"_target_": "fewshot.models.torch.os.system", "command": "touch MARK"}},
        {"model.network": {"_target_": "fewshot.processes.ranks.start", "program": "MARK"}},
        {"model.network": {"_target_": "fewshot.models.nothing"}},
        {"model.network": {"_target_": "fewshot.models.any_module.network_from_module", "module": None}},
        {"model.network": {"_target_": "fewshot.models.__builtins__.exec", "_args_": ["open('MARK', 'w')"]}},
        {"model.network.channels": [{"_target_": "os.system", "command": "touch MARK"}]},
        {"model.network": {"_target_": ["os.system"], "command": "touch MARK"}},
        {"algo.first_order": {"_target_": "os.system", "command": "touch MARK"}},
        {"model.network.channels": "\\${oc.create:{_target_: os.system, command: touch MARK}}"},
        {"model.network._target_": "test_export.foreign"},
    ],
)
def test_a_configuration_that_calls_what_is_not_ours_is_refused(knobs, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = altered(exported, tmp_path / "foreign", knobs)
    CALLED.clear()
    with pytest.raises(UserError, match=r"calls .*: trust=true, in Python trust=True|has plain values only") as error:
        fewshot.load(folder)
    assert "\n" not in str(error.value) and not (tmp_path / "MARK").exists() and not CALLED


def test_a_network_of_ones_own_is_loaded_by_trust(exported, tmp_path):
    folder = altered(exported, tmp_path / "own", {"model.network._target_": "test_export.foreign"})
    CALLED.clear()
    model = fewshot.load(folder, trust=True)
    assert len(CALLED) == 1
    assert torch.equal(model.head.weight, fewshot.load(exported).head.weight)


def test_a_tuple_in_a_checkpoint_is_looked_into(trained, tmp_path, monkeypatch):
    """Where it is read as plain data it is still a tuple; where it is called it has become a list."""
    monkeypatch.chdir(tmp_path)
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    content["fewshot"]["config"]["model"]["network"]["channels"] = ({"_target_": "os.mkdir", "path": "MARK"},)
    torch.save(content, tmp_path / "tuple.ckpt")
    with pytest.raises(UserError, match=r"calls os\.mkdir"):
        fewshot.load(tmp_path / "tuple.ckpt")
    assert not (tmp_path / "MARK").exists()


def test_a_checkpoint_is_judged_as_a_folder_is(trained, tmp_path):
    content = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    content["fewshot"]["config"]["model"]["network"]["_target_"] = "test_export.foreign"
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(UserError, match=r"calls test_export\.foreign"):
        fewshot.load(tmp_path / "foreign.ckpt")


def test_a_network_that_cannot_be_made_is_one_line(exported, tmp_path):
    with pytest.raises(UserError, match=r"^model=.*: its model\.network cannot be made \(.*_recursive_ flag must be"):
        fewshot.load(altered(exported, tmp_path / "altered", {"model.network._recursive_": 3}))


def test_weights_that_only_their_owner_may_read_are_one_line(exported, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read everything
    with pytest.raises(UserError, match=r"^model=.*model\.safetensors: cannot be read \(Permission denied\)$"):
        fewshot.load(exported)


def test_a_damaged_folder_is_one_line(exported, tmp_path):
    cases = {
        "model.safetensors": (lambda data: data[:1000], "truncated or no safetensors"),
        "config.yaml": (lambda data: b"{" + data, "cannot be read"),
    }
    for name, (damage, line) in cases.items():
        folder = shutil.copytree(exported, tmp_path / f"damaged {name}")
        (folder / name).write_bytes(damage((folder / name).read_bytes()))
        with pytest.raises(UserError, match=line):
            fewshot.load(folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"has no {name}"):
            fewshot.load(folder)
    with pytest.raises(UserError, match="is not the configuration of a run"):
        folder = shutil.copytree(exported, tmp_path / "bare")
        (folder / "config.yaml").write_text("ways: 5\n")
        fewshot.load(folder)
    with pytest.raises(UserError, match=r"network.head.bias is \(5,\) there and \(7,\) here; it was trained with"):
        fewshot.load(altered(exported, tmp_path / "misfit", {"model.network.ways": 7}))
    with pytest.raises(UserError, match="no such file"):
        fewshot.load(tmp_path / "none")
