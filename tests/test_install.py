"""What an installation or a system may lack: learn2learn, and on Windows fcntl, resource and most signals."""

import json
import os
import subprocess
import sys

from conftest import HANG, SMALL

# Started with it, Python finds no learn2learn, wherever that is installed.
WITHOUT_LEARN2LEARN = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, *arguments):
        return None if name.split(".")[0] == "learn2learn" else PathFinder.find_spec(name, *arguments)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""
# As on a system that has none of these: imports all modules but the sequential engine, loads and predicts; then trains,
# and `fewshot test` tests.
PROGRAM = """
import importlib, json, pkgutil, signal, sys, warnings
OF_WINDOWS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"}
names = {name for name in vars(signal) if name.startswith("SIG") and name[3] != "_"} - OF_WINDOWS
removed = {name: vars(signal).pop(name) for name in names}
sys.modules["fcntl"] = sys.modules["resource"] = None
warnings.filterwarnings("ignore", "only soft file lock")  # of filelock, which locks by other means on Windows

import fewshot
from fewshot.__main__ import main as fewshot_command
from fewshot.evidence.__main__ import main as evidence
from fewshot.train import main as train
run, *words = json.loads(sys.argv[1])

def ended(main, *words):
    sys.argv[1:] = words
    try:
        main()
    except SystemExit as end:
        return end.code

print(ended(train, "engine=sequential"))
print(ended(evidence, f"checkpoint={run}"))
print([name for name in ("torch", "pytorch_lightning") if name in sys.modules])
failed = []
for module in pkgutil.walk_packages(fewshot.__path__, "fewshot."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        failed.append((module.name, error.name))
print(failed)

import numpy as np
from fewshot.predict import predict
images = list(np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8))
print(predict(fewshot.load(run), {"a": images[:1], "b": images[1:3]}, images[3:]).probabilities.shape)
vars(signal).update(removed)  # Lightning uses them wherever sys.platform is not Windows
print(ended(train, *words, "meta_batch_size=1", "hydra.run.dir=run"))
print(ended(fewshot_command, "test", run, *words[-2:], "test_tasks=2", "hydra.run.dir=new", "trainer=cpu"))
"""
NEEDS = "needs learn2learn, which is not installed here; docs/install.md says how it is"


def test_without_learn2learn_all_but_its_engine_works_and_neither_fcntl_nor_posix_signals_are_needed(
    finished, cache, tmp_path
):
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_LEARN2LEARN)
    words = [f"{finished}", *SMALL, f"dataset.cache={cache}", "logger=none"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(words)],
        **{"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path)}},
        **{"capture_output": True, "text": True, "timeout": HANG},
    )
    lines = iter(done.stdout.splitlines())
    assert next(lines) == f"engine=sequential: {NEEDS}, or begin a run with engine=batched", done.stderr
    assert next(lines) == f"evidence: {NEEDS}"
    assert next(lines) == "[]"  # neither was imported so far
    unimported = eval(next(lines))
    assert {name for _, name in unimported} == {"learn2learn"}
    assert {module.split(".")[1] for module, _ in unimported} == {"maml", "evidence"}
    assert next(lines) == "(2, 2)"
    said = list(lines)
    assert said.count("None") == 2 and said[-1] == "None", done.stderr
    assert "engine=auto: batched (learn2learn is not installed)" in said[: said.index("None")]
    assert (tmp_path / "run" / "results.json").exists()
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert results["test"]["tasks"] == 2 and results["config"]["fit"] is False
