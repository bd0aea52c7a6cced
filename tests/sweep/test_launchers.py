"""hydra/launcher of another package: the program asks nothing of it but what Hydra does."""

import json
import sys

import cloudpickle
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import run_job
from hydra.plugins.launcher import Launcher
from omegaconf import open_dict


class Theirs(Launcher):
    """As Ray's: each job is composed here, pickled, and run from what was pickled; the last comes first."""

    __module__ = "hydra_plugins.theirs"  # where Hydra wants to find it

    def setup(self, *, hydra_context, task_function, config):
        self.context, self.task, self.config = hydra_context, task_function, config

    def launch(self, job_overrides, initial_job_idx):
        jobs = []
        for number, overrides in enumerate(job_overrides, initial_job_idx):
            config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id, config.hydra.job.num = f"theirs-{number}", number
            jobs.append(cloudpickle.dumps((self.context, self.task, config, Singleton.get_state())))
        return [self.returned(job) for job in reversed(jobs)][::-1]

    def returned(self, job):
        context, task, config, _ = cloudpickle.loads(job)
        HydraConfig.instance().set_config(config)
        place = {"job_dir_key": "hydra.sweep.dir", "job_subdir_key": "hydra.sweep.subdir"}
        return run_job(task_function=task, config=config, hydra_context=context, **place)


@pytest.fixture
def theirs(monkeypatch):
    target = f"{Theirs.__module__}.{Theirs.__name__}"
    monkeypatch.setitem(sys.modules, Theirs.__module__, sys.modules[__name__])
    monkeypatch.setitem(Plugins.instance().class_name_to_class, target, Theirs)
    groups = ConfigStore.instance().repo["hydra"]["launcher"]
    ConfigStore.instance().store(group="hydra/launcher", name="theirs", node={"_target_": target})
    yield "hydra/launcher=theirs"
    del groups["theirs.yaml"]


def test_a_launcher_of_another_package_runs_what_is_missing_and_no_more(theirs, main, monkeypatch, tmp_path):
    monkeypatch.setattr("fewshot.results.figures.write", lambda folder, results: None)
    monkeypatch.setattr("fewshot.sweep.tables.summarise", lambda *args: None)
    call = ("-m", theirs, "iterations=1", "val_every=1", "logger=none", f"hydra.sweep.dir={tmp_path}")

    def seeds_and_times():
        results = tmp_path.glob("*/results.json")
        return {json.loads(path.read_text())["config"]["seed"]: path.stat().st_mtime_ns for path in results}

    assert main(*call, "seed=1", small=True) == 0
    (first,) = seeds_and_times().items()
    assert main(*call, "seed=0,1", small=True) == 0
    assert set(seeds_and_times()) == {0, 1} and first in seeds_and_times().items()


def test_it_may_start_a_job_on_several_machines_and_a_job_that_it_did_not_is_one_line(theirs, main, tmp_path, capsys):
    """Whether it does is known only to the job: ranks.launcher() there says so."""
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.num_nodes=2", "trainer.devices=1")
    main("-m", theirs, *two, "seed=0", f"hydra.sweep.dir={tmp_path}", small=True)
    (error,) = tmp_path.glob("*/error.txt")
    assert error.read_text() == "trainer.num_nodes=2: several machines need torchrun or srun\n"
    assert "Traceback" not in "".join(capsys.readouterr())
