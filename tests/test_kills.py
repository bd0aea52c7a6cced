"""Two SIGKILLs at random moments; a person gives more: python tests/kills.py 20"""

import os
import subprocess
import sys
from pathlib import Path


def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(cache, tmp_path):
    (tmp_path / "fewshot").symlink_to(cache)
    command = [sys.executable, Path(__file__).with_name("kills.py"), "2", "plain"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "plain: the same end after 2 kills, bit by bit: checkpoints/best.ckpt, checkpoints/last" in process.stdout
