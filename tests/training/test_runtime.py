"""What a run imports, and what it asks of the machine before it does."""

import importlib
import sys
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import pytest
import torch

from fewshot.errors import UserError
from fewshot.training import runtime


def test_a_package_is_hidden_for_a_while_unless_it_was_imported_before(tmp_path, monkeypatch):
    for name in ("optional_one", "optional_two"):
        (tmp_path / f"{name}.py").touch()
        (tmp_path / f"{name}-1.5.dist-info").mkdir()
        (tmp_path / f"{name}-1.5.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "optional_two", raising=False)
    importlib.import_module("optional_two")
    before = sys.meta_path[:]
    with runtime.not_found("optional_one", "optional_two"):
        assert find_spec("optional_one") is None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("optional_one")
        with pytest.raises(PackageNotFoundError):
            version("optional_one")
        assert find_spec("optional_two") and version("optional_two") == "1.5" and version("torch")
    assert find_spec("optional_one") and version("optional_one") == "1.5" and sys.meta_path == before


@pytest.mark.parametrize(("target", "hidden"), [("fewshot.training.record.Record", True), ("mine.Callback", False)])
def test_what_a_class_of_ones_own_may_use_is_not_hidden(config, monkeypatch, tmp_path, target, hidden):
    cfg = config()
    cfg.callbacks.record._target_ = target
    asked = []
    monkeypatch.setattr(runtime, "not_found", lambda *names: asked.extend(names) or nullcontext())
    runtime.import_lightning(cfg, tmp_path)
    assert ("scipy" in asked) is hidden


def test_a_gpu_that_is_not_there_is_told_before_lightning_is_imported(run, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runtime, "import_module", lambda name: pytest.fail("it was to be imported"))
    with pytest.raises(UserError, match=r"trainer\.accelerator=gpu: there is no CUDA GPU here; use trainer=cpu"):
        run(tmp_path, "trainer=gpu")
