"""Runs the steps of measure.sh in their order, each in processes of its own and under a time limit of its own.

Every step writes OUT/NAME.json as soon as it has a result. When the step is over, this goes into OUT/steps.json. So
there are few files, and a call that is cut off loses the step at hand alone. A step that fails says why in one line,
and the next one begins. The last lines are a table of all steps, which is written to OUT/table.txt too.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SECONDS = 525  # all steps together; the command has nine minutes
REHEARSAL = 1500  # the same in a rehearsal, on a machine that may be busy with other things


@dataclass(frozen=True)
class Step:
    """Commands that run one after the other.

    seconds: what the step is sure to get; it also gets what earlier steps have left, up to `most` in all.
    """

    name: str
    seconds: int
    commands: list[list[str]]
    most: int | None = None


def steps(rehearse: bool, out: Path) -> list[Step]:
    def meta_step(settings: str, contestants: str, name: str) -> list[str]:
        asked = ["--settings", settings, "--contestants", contestants, "--json", str(out / name)]
        return ["../meta_step.py", *asked, *rounds]

    rounds = ["--rounds", "1" if rehearse else "3", "--cap", "5"]
    rounds += ["--device", "cpu", "--tasks", "2"] if rehearse else ["--device", "cuda"]
    torch = "sequential,batched,eager,im2col,learn2learn"
    omniglot = "omniglot 5w1s 1 step" if rehearse else "omniglot 5w1s"
    peers = "batched" if rehearse else f"{torch},jax"
    photos = "photos84 5w1s 5 steps first" if rehearse else "photos84 5w1s"
    return [
        Step("machine", 40, [["machine.py"]]),
        Step("engines", 45, [["engines.py"]]),
        Step("paper", 75, [["runs.py", "paper"]]),
        Step("panel1", 225, [["runs.py", "panel1"]], most=240),
        Step(
            "omniglot",
            80,
            [
                meta_step(omniglot, torch, "omniglot.json"),
                meta_step(omniglot, "batched,learn2learn,jax", "omniglot_jax.json"),
            ],
        ),
        Step("photos", 35, [meta_step(photos, peers, "photos.json")]),
        Step("kernels", 25, [["kernels.py"]]),
    ]


def run(command: list[str], limit: float, log: Path) -> str:
    """Runs benchmarks/gpu/COMMAND for at most `limit` seconds and returns what ended it, "ok" or one line."""
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, str(HERE / command[0]), *command[1:]],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"STEP_SECONDS": f"{limit:.0f}"},
            start_new_session=True,  # so that its own processes end with it
        )
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code == 0:
        return "ok"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"failed ({code}): {lines[-1][:200] if lines else 'it said nothing'}"


def lines(content: dict[str, Any]) -> list[str]:
    """What a step has measured, one line for each result."""
    if isinstance(content.get("lines"), list):
        return content["lines"]
    told = []
    for row in content.get("rows", []):
        speedup = "" if row["speedup"] is None else f"{row['speedup']:.2f} x"
        told.append(
            f"{row['setting']:34} {row['contestant']:12} {row['milliseconds']:8.1f} ms {speedup:>8} "
            f"{row['times_floor']:6.1f} x floor {row['peak_mib']:7.0f} MiB {row['relative_error']:.0e}"
        )
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    parser.add_argument("steps", nargs="*", help="names of the steps to run; all if left out")
    arguments = parser.parse_args()
    out = Path(os.environ["OUT"]).resolve()
    known = steps(arguments.rehearse, out)
    if unknown := set(arguments.steps) - {step.name for step in known}:
        parser.error(f"no step {', '.join(sorted(unknown))}; there are {', '.join(step.name for step in known)}")
    chosen = [step for step in known if not arguments.steps or step.name in arguments.steps]
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"OUT": str(out), "REHEARSE": "1" if arguments.rehearse else ""}
    end = time.monotonic() + (REHEARSAL if arguments.rehearse else SECONDS)
    log, table, results = out / "log.txt", [], {}
    for place, step in enumerate(chosen):
        began = time.monotonic()
        limit = max(5, end - began - sum(later.seconds for later in chosen[place + 1 :]))
        limit, outcomes = min(limit, step.most or limit), []
        for command in step.commands:
            left = limit - (time.monotonic() - began)
            outcomes.append(run(command, left, log) if left > 3 else "no time left")
        outcome = next((reason for reason in outcomes if reason != "ok"), "ok")
        table.append(f"== {step.name}: {outcome} ({time.monotonic() - began:.0f} s)")
        for file in (out / f"{step.name}.json", out / f"{step.name}_jax.json"):
            if file.exists():
                results[file.stem] = json.loads(file.read_text())
                (out / "steps.json").write_text(json.dumps(results, indent=1) + "\n")
                file.unlink()
                table += lines(results[file.stem])
        (out / "table.txt").write_text("\n".join(table) + "\n")
        print(f"{step.name}: {outcome}", flush=True)
    print("\n".join(["", "All steps", *table]))


if __name__ == "__main__":
    main()
