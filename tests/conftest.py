"""A run of train.py, small enough for a test, inside this process and as a program of its own."""

import csv
import functools
import gc
import io
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import hypothesis
import omegaconf
import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from fewshot.config.hydra_call import Call
from fewshot.config.tree import CONF, GROUPS
from fewshot.processes.signals import Signals
from fewshot.processes.surroundings import keep_memory
from fewshot.train import main as train_main
from fewshot.train import run as train_run

# The same examples every time, however slow the machine.
hypothesis.settings.register_profile(
    "same", derandomize=True, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("same")

ROOT = Path(__file__).parents[1]
HANG = 3600  # seconds, of every wait: only what will never end takes as long, on however slow a machine
# In a program that is started with it, every last.ckpt that was written is waited at until the test lets it go on.
HALTING = """
import os, time
replace, halted = os.replace, os.environ["FEWSHOT_TEST_HALTED"]
def halting(source, target):
    replace(source, target)
    if str(target).endswith("last.ckpt") and not os.path.exists(halted + ".free"):
        open(halted, "x").close()
        while os.path.exists(halted):
            time.sleep(0.02)
os.replace = halting
"""
# Files whose tests run in one process: they share runs of several ranks, and the one Slurm of a machine.
TOGETHER = ("test_ranks.py", "test_slurm.py", "test_nodes.py", "test_slurm_nodes.py")
# Files whose tests train, start programs or make datasets, and files with very many tests: pytest -m "not slow" leaves
# them out. What is left, gradients, formulas, files, tables and the configuration, takes a minute on two threads of
# one core.
SLOW = re.compile(
    r"/tests/(test_(api|authors_code|bitwise|command|compatibility|export|install|kills|models|mutations|notebooks|train)"
    r"|test_norms|(across|algorithms|compare|nodes|predict|processes|sweep|training)/\w+|batched/test_engine"
    r"|config/test_(instantiate|refusals|trainer_knobs)"
    r"|data/test_(fine_grained|folder|glyphs|huggingface|imagenet|meta_batches|omniglot)"
    r"|evidence/test_(exported|report)|maml/test_(explicit_loss|own_head|prototypical_network|recompute)|models/test_any_module"
    r"|theory/test_probes)\.py$"
)
# The default configuration, shrunk: every part is there, each a second or less.
SMALL = (
    "queries=3",
    "meta_batch_size=2",
    "iterations=6",
    "val_every=2",
    "val_tasks=2",
    "test_tasks=3",
    "threads=1",
    "model.width=8",
    "callbacks.record.test_curve_tasks=2",
    "trainer=cpu",
)


def pytest_configure(config: pytest.Config) -> None:
    """What makes this process and all that it starts faster; so this file imports torch only where it is used.

    Bytecode goes to pytest's cache where Python was told to write none, as it often is in containers: each of the many
    programs below would compile all of torch and sympy anew, which takes longer than the rest of its start. Threads
    that wait do not spin: the cores belong to the tests beside.
    """
    if sys.dont_write_bytecode and config.pluginmanager.hasplugin("cacheprovider"):
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(config.cache.mkdir("bytecode"))
        sys.dont_write_bytecode = False
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    keep_memory()
    os.environ["MPLBACKEND"] = "agg"  # whatever the notebook or IDE that started the tests draws with
    gc.disable()  # while modules are imported, which stay to the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if SLOW.search(item.path.as_posix()):
            item.add_marker("slow")


def pytest_collection_finish() -> None:
    """The garbage collector need not look through the objects of all modules again and again."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries look at what is left over at the end


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each process gets one test after the other; the tests of a file that is in TOGETHER all go to one process.

    The groups of pytest-xdist 3.8 would say the same, but do nothing under pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::")[0]
            return path if path.endswith(TOGETHER) else nodeid

    return Scheduling(config, log) if config.getvalue("dist") == "loadscope" else None


def _remember() -> None:
    """Hydra reads and merges fifty YAML files in each call, which is a sixth of a second: here it does so once.

    A text is parsed once, an interpolation too, and the files of conf/ that a call chooses are merged once. What lies
    in a folder of one's own is merged anew.
    """
    omegaconf.base.parse = omegaconf._utils.parse = functools.cache(omegaconf.grammar_parser.parse)
    load, merge = OmegaConf.load, ConfigLoaderImpl._compose_config_from_defaults_list
    parsed: dict[str, bytes] = {}
    merged: dict[Any, bytes] = {}

    def loaded(file: Any) -> Any:
        if not isinstance(file, io.TextIOBase):
            return load(file)
        text = file.read()
        if text not in parsed:
            file.seek(0)
            parsed[text] = pickle.dumps(load(file))
        return pickle.loads(parsed[text])

    def composed(loader: ConfigLoaderImpl, defaults: list, repo: Any) -> DictConfig:
        places = {place.path for place in loader.get_search_path().get_path()}
        if any(place and place.startswith("file:") for place in places - {f"file://{CONF}"}):
            return merge(loader, defaults, repo)
        key = frozenset(places), tuple(map(astuple, defaults))
        if key not in merged:
            merged[key] = pickle.dumps(merge(loader, defaults, repo))
        return pickle.loads(merged[key])

    OmegaConf.load, ConfigLoaderImpl._compose_config_from_defaults_list = loaded, composed


_remember()


@functools.cache
def _chosen(places: str, *groups: str) -> bytes:
    """The configuration of these files, pickled: a copy of it takes a hundredth of the time that Hydra takes."""
    return pickle.dumps(compose("config", list(groups)))


def composed(*overrides: str) -> DictConfig:
    """The configuration of a call, of which the YAML files are read once: each time takes long."""
    if not GlobalHydra.instance().is_initialized():
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return composed(*overrides)
    groups = tuple(override for override in overrides if override.split("=")[0] in (*GROUPS, "experiment"))
    others = [override for override in overrides if override not in groups]
    if any(override.startswith(("hydra", "~")) for override in others):
        return compose("config", list(overrides))
    places = GlobalHydra.instance().config_loader().get_search_path()
    cfg = pickle.loads(_chosen(str(places), *groups))
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(others), cfg)
    return cfg


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for all processes of the session, so that letters are drawn and photos are read once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """One thread: what is computed here is so small that two would only wait for each other."""
    import torch

    torch.set_num_threads(1)
    yield


@pytest.fixture
def config() -> Iterator[Callable[..., DictConfig]]:
    """Composes the real configuration as the command line would."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        yield composed


@pytest.fixture
def own_yaml(config: Callable[..., DictConfig], tmp_path: Path) -> Callable[[str, str], None]:
    """own_yaml("GROUP/NAME", text) puts a file into a folder of one's own, where Hydra looks as with --config-dir."""

    def own_yaml(name: str, text: str) -> None:
        path = tmp_path / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        places = create_config_search_path(str(CONF))
        places.prepend("command-line", f"file://{tmp_path / 'conf'}", anchor="schema")
        GlobalHydra.instance().clear()
        Hydra.create_main_hydra2("train", places)

    return own_yaml


def runner(cache: Path) -> Callable[..., Path]:
    def run(folder: Path, *overrides: str, pictures: bool = False) -> Path:
        base = () if any(override.startswith("checkpoint=") for override in overrides) else SMALL
        if "model=module" in overrides:  # which has no width
            base = tuple(override for override in base if not override.startswith("model.width="))
        overrides = tuple(
            {o.split("=")[0]: o for o in (*base, f"dataset.cache={cache}", "logger=none", *overrides)}.values()
        )
        with Signals() as signals, pytest.MonkeyPatch.context() as patch:
            patch.setattr("fewshot.training.resume.compose", lambda name, overrides: composed(*overrides))
            if not pictures:
                patch.setattr("fewshot.results.figures.png", lambda figure: b"no picture")
            train_run(composed(*overrides), Call(list(overrides), folder, signals))
        return folder

    return run


@pytest.fixture
def run(config: Callable[..., DictConfig], cache: Path) -> Callable[..., Path]:
    """run(folder, *overrides) does what train.py does, in this process, without W&B.

    pictures: whether its figures are drawn into their files too, which takes a quarter of a small run's time.
    """
    return runner(cache)


@pytest.fixture(scope="session")
def finished(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run, to be read or copied; nothing may be written to it."""
    return runner(cache)(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def main(cache: Path) -> Iterator[Callable[..., str | int | None]]:
    """main(*words) is `python train.py` without a process of its own: what it ends with, a line or a status.

    Its figures are not drawn. small: with the knobs and in the folder of `program`; command: another one that Hydra
    composes.
    """
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]

    def main(*words: str, small: bool = False, command: Callable[[], None] = train_main) -> str | int | None:
        GlobalHydra.instance().clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", *(_words(words, cache) if small else words)])
            patch.setattr("fewshot.results.figures.png", lambda figure: b"no picture")
            for name in [name for name in os.environ if name.startswith(("WANDB", "HYDRA"))]:
                patch.delenv(name)
            if small:
                patch.chdir(cache)
            try:
                command()
            except SystemExit as ended:
                return ended.code
        return 0

    yield main
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    root.setLevel(level)
    root.handlers[:] = handlers


def _words(overrides: Sequence[str], cache: Path, small: bool = True) -> list[str]:
    """Of a call of train.py; Hydra wants flags first."""
    flags = [override for override in overrides if override.startswith("-")]
    base = (*(SMALL if small else ()), f"dataset.cache={cache}")
    return [*flags, *base, *(override for override in overrides if override not in flags)]


@pytest.fixture
def program(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen]:
    """program(*overrides) starts `python train.py` for real; halting: for `halt_when` and `let_go`."""
    started: list[subprocess.Popen] = []

    def program(*overrides: str, small: bool = True, halting: bool = False) -> subprocess.Popen:
        command = [sys.executable, ROOT / "train.py", *_words(overrides, cache, small)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB", "HYDRA"))}
        if halting:
            (place := tmp_path_factory.mktemp("halting")).joinpath("sitecustomize.py").write_text(HALTING)
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(place), environment.get("PYTHONPATH")]))
            environment["FEWSHOT_TEST_HALTED"] = str(place / "halted")
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, cwd=cache))
        started[-1].halted = place / "halted" if halting else None
        return started[-1]

    yield program
    for process in started:
        process.kill()
        process.communicate()


def halt_when(process: subprocess.Popen, what: Callable[[], bool]) -> None:
    """Lets a halting program go on from one last.ckpt to the next, till `what` holds; there it stands still."""
    deadline = time.monotonic() + HANG
    while True:
        while not process.halted.exists():
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
        if what():
            return
        process.halted.unlink()


def let_go(process: subprocess.Popen) -> None:
    """It halts no more."""
    Path(f"{process.halted}.free").touch()
    process.halted.unlink()


@pytest.fixture(scope="session")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, trained for seconds, that tells letters apart far better than by chance."""
    folder = tmp_path_factory.mktemp("trained")
    knobs = (
        "iterations=10",
        "val_every=10",
        "val_tasks=2",
        "test_tasks=4",
        "model.width=32",
        "shots=5",
        "inner_lr=0.1",
    )
    return runner(cache)(folder, *knobs)


@contextmanager
def copied_before_writes(folder: Path, endings: tuple[str, ...] = ("",)) -> Iterator[list[Path]]:
    """The folder is copied before every write of such a file into it: what a kill at this place would leave."""
    replace, copies = os.replace, []

    def copying(source: Any, target: Any) -> None:
        if str(target).startswith(f"{folder}/") and str(target).endswith(endings):
            copies.append(folder.with_name(f"{folder.name}-killed-{len(copies)}"))
            shutil.copytree(folder, copies[-1])
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", copying)
        yield copies


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run computed: weights and optimiser state bit by bit, metrics.csv, results.json less its times."""
    import torch

    state = {}
    for name in ("best", "last"):
        content = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        adam = content["optimizer_states"][0]["state"]
        tensors = {
            **content["state_dict"],
            **{f"adam{i}.{k}": v for i, entries in adam.items() for k, v in entries.items()},
        }
        state[name] = (content["global_step"], {key: value.numpy().tobytes() for key, value in tensors.items()})
    results = json.loads((folder / "results.json").read_text())
    del results["seconds"]
    return {"state": state, "metrics": (folder / "metrics.csv").read_text(), "results": results}


def told(file: Path) -> str:
    """What W&B is to be told, a record a line: `wandb leet inspect --json FILE` without what its start takes."""
    from wandb.util import get_core_path

    place = ["--run-file", file, file.parents[1]]
    inspect = [get_core_path(), "leet", "inspect", "--no-observability", "--json", *place]
    return subprocess.run(inspect, capture_output=True, text=True, check=True, timeout=HANG).stdout


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv"""
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))
