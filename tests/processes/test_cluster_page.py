"""docs/cluster.md: what each of its calls asks for is valid, with the processes that it starts."""

import re
import shlex

import pytest
from conftest import ROOT

from fewshot.config.check import check, check_overrides, processes

PAGE = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
INLINE = re.findall(r"`(?:uv run |apptainer run --nv |CUDA_VISIBLE_DEVICES=N )?(python train\.py [^`]*=[^`]*)`", PAGE)
PROGRAM = re.compile(r"\s(?:\S*train\.py|(?<!-t )fewshot(?:\.sif)?) (?!-m fewshot|torchrun)(.*=.*)$")
CALLS = [
    line for text in (*BLOCKS, *INLINE) for line in f" {text}".replace("\\\n", " ").splitlines() if PROGRAM.search(line)
]


@pytest.mark.parametrize("line", CALLS)
def test_a_call_is_valid(line, config, monkeypatch):
    words = shlex.split(PROGRAM.search(line)[1], comments=True)
    overrides = [re.sub(r"^(algo|seed)=(\w+),.*$", r"\1=\2", word) for word in words if word[0] != "-"]
    check_overrides(overrides)
    started = re.search(r"torchrun .*?--nproc-per-node=(\d+)", line)
    if started:
        machines = int((re.search(r"--nnodes=(\d+)", line) or "11")[1])
        variables = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "WORLD_SIZE": str(machines * int(started[1]))}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
    cfg = config(*(word for word in overrides if "hydra." not in word and "launcher=ray" not in word))
    check(cfg)
    assert not started or processes(cfg) == int(variables["WORLD_SIZE"])


def test_the_page_has_calls():
    assert len(CALLS) >= 10
