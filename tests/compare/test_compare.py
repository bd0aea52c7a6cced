"""fewshot compare: intervals against simulations and by hand, and what is left out and why."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewshot.compare import __main__ as compare
from fewshot.compare import figures, report
from fewshot.config.tree import MODES
from fewshot.errors import UserError
from fewshot.results.task_scores import read_tasks, write_tasks
from fewshot.sweep import pairs, tables
from fewshot.sweep.pairs import Row
from fewshot.sweep.settings import group, read_jobs
from fewshot.sweep.statistics import Difference, holm, paired


def simulated(generator, seeds, tasks, of_seed, of_task, rest, mean=0.0):
    a, b = generator.normal(0, of_seed, (seeds, 1)), generator.normal(0, of_task, (1, tasks))
    return mean + a + b + generator.normal(0, rest, (seeds, tasks))


@pytest.mark.parametrize(("seeds", "of_seed"), [(3, 0.0), (3, 0.01), (5, 0.005), (5, 0.1), (10, 0.02)])
def test_the_interval_over_both_covers_the_truth_as_often_as_it_says(seeds, of_seed):
    generator = np.random.default_rng(seeds)
    drawn = (paired(simulated(generator, seeds, 100, of_seed, 0.05, 0.1, mean=0.02)) for _ in range(2000))
    covered = np.mean([abs(one.mean - 0.02) <= one.over_both for one in drawn])
    assert 0.92 < covered < 0.98  # 0.95 less and more three standard errors of the simulation, and what is admitted


@pytest.mark.parametrize("of_seed", [0.1, 0.0])
def test_the_intervals_of_several_seeds_are_those_of_the_analysis_of_variance(of_seed):
    from scipy.stats import t, ttest_1samp

    d = simulated(np.random.default_rng(4), 3, 8, of_seed, 0.05, 0.1, mean=0.05)
    ours, mean, by_seed, by_task = paired(d), d.mean(), d.mean(axis=1), d.mean(axis=0)
    for half, means in ((ours.over_tasks, by_task), (ours.over_seeds, by_seed)):  # the others are what they are
        low, high = ttest_1samp(means, 0).confidence_interval()
        assert (ours.mean - half, ours.mean + half) == pytest.approx((low, high))
    seeds, tasks = 8 * sum((by_seed - mean) ** 2) / 2, 3 * sum((by_task - mean) ** 2) / 7  # mean squares
    rest = sum((d[s, n] - by_seed[s] - by_task[n] + mean) ** 2 for s in range(3) for n in range(8)) / 14
    assert (seeds > rest) == (of_seed > 0)
    square, freedom = tasks, 7  # of a variance between seeds that is estimated to be none
    if of_seed:
        square = seeds + tasks - rest
        freedom = square**2 / (seeds**2 / 2 + tasks**2 / 7 + rest**2 / 14)
    error = (square / (3 * 8)) ** 0.5
    assert ours.half_width == ours.over_both == pytest.approx(t.ppf(0.975, freedom) * error)
    assert ours.p == pytest.approx(2 * t.sf(mean / error, freedom))


def test_the_interval_over_tasks_of_one_seed_is_that_of_a_paired_t_test():
    from scipy.stats import ttest_1samp

    differences = simulated(np.random.default_rng(0), 1, 50, 0, 0.05, 0.1, mean=0.03)
    ours, theirs = paired(differences), ttest_1samp(differences[0], 0)
    low, high = theirs.confidence_interval()
    assert (ours.mean - ours.over_tasks, ours.mean + ours.over_tasks) == pytest.approx((low, high))
    assert ours.p == pytest.approx(theirs.pvalue) and np.isnan(ours.over_seeds) and np.isnan(ours.over_both)
    assert ours.half_width == ours.over_tasks


def test_what_never_differs_has_no_interval_and_no_doubt():
    nothing = paired(np.zeros((3, 20)))
    assert (nothing.mean, nothing.over_both, nothing.p) == (0, 0, 1)


def test_a_row_says_each_number_under_its_head():
    setting: Any = SimpleNamespace(label=lambda: "zeroing", jobs=[])
    several, one = Difference(-0.0123, 0.01, 0.02, 0.03, 0.5, 3), Difference(0.02, 0.01, np.nan, np.nan, 0.5, 1)
    bold, plain = Row(setting, "zeroing_on", 2, 0.5, several, 0.0499), Row(setting, "zeroing_off", 1, 0.6, one, 0.05)
    said = [dict(zip(report.HEADS, report.cells(row), strict=True)) for row in (bold, plain)]
    halves = [[row[f"± {over}"] for over in ("tasks", "seeds", "both")] for row in said]
    assert halves == [["1.00", "2.00", "3.00"], ["1.00", "–", "–"]]
    rest = [[row[head] for head in ("test zeroing", "step", "accuracy", "difference", "p", "seeds")] for row in said]
    assert rest == [["on", "2", "50.00", "−1.23", ".0499", "3"], ["off", "1", "60.00", "+2.00", ".0500", "1"]]
    tex = report.latex([bold, plain], "glyphs")
    assert r"$\mathbf{-1.23 \pm 3.00}$" in tex and r"& $+2.00 \pm 1.00$" in tex


def test_brackets_in_the_name_of_a_setting_are_shown_as_they_are(capsys):
    setting: Any = SimpleNamespace(label=lambda: "root=a[b]/c[/d]", jobs=[])
    report.show([Row(setting, "zeroing_on", 1, 0.5, None, None)])
    assert "root=a[b]/c[/d]" in capsys.readouterr().out


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


@pytest.fixture
def made(finished, tmp_path):
    """made(name, accuracy, seed=0, zeroing=False): a finished run whose tasks have about this accuracy in step 2."""

    def made(name, accuracy, seed=0, zeroing=False, **changed):
        folder = shutil.copytree(finished, tmp_path / name)
        results = json.loads((folder / "results.json").read_text())
        results["config"] |= {"seed": seed, **changed}
        results["config"]["algo"]["zeroing"] = zeroing
        results["test"]["tasks"] = 200
        (folder / "results.json").write_text(json.dumps(results))
        own = np.random.default_rng([seed, zeroing])
        shared = np.random.default_rng(7).normal(0, 0.05, (200, 1))  # some tasks are hard for all
        steps = 0.05 * (np.arange(4) - 2)
        values = np.clip(accuracy + steps + shared + own.normal(0, 0.02, (200, 4)), 0, 1)
        write_tasks(folder, {"task": {"test": {"zeroing_off": values, "zeroing_on": np.full((200, 4), 0.5)}}})
        return folder

    return made


def text_of(folder):
    return re.sub(r"\s+", " ", (folder / "compare.html").read_text())


def test_a_difference_that_is_larger_than_noise_is_told_from_one_that_is_not(made, tmp_path, capsys):
    runs = [made(f"random{seed}", 0.60, seed) for seed in (0, 1, 2)]
    runs += [made(f"zeroed{seed}", 0.62, seed, zeroing=True) for seed in (0, 1, 2)]
    compare.main([*map(str, runs), f"into={tmp_path / 'out'}"])
    shown = capsys.readouterr().out
    page = text_of(tmp_path / "out")
    row = re.search(r"<td><b>zeroing</b></td><td><b>off</b></td><td><b>2</b></td>(.*?)</tr>", page)[1]
    cells = re.findall(r"<b>(.*?)</b>", row)
    accuracy, difference, tasks, seeds, both, p, number = cells
    assert float(accuracy) == pytest.approx(62, abs=1) and float(difference.lstrip("+")) == pytest.approx(2, abs=0.5)
    assert 0 < float(tasks) < 1 and 0 < float(both) < 1.5 and float(seeds) > 0 and number == "3" and float(p) < 0.05
    assert "<td>zeroing</td><td>on</td><td>2</td><td>50.00</td><td>+0.00</td>" in page  # not in bold
    tex = (tmp_path / "out" / "compare.tex").read_text()
    assert r"zeroing & off & 2 & " in tex and r"$\mathbf{+" in tex and r"\bottomrule" in tex
    assert "zeroing" in shown and "compare.html" in shown
    for name in ("differences", "curves"):
        assert Image.open(tmp_path / "out" / f"{name}.png").width > 300
        assert (tmp_path / "out" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_the_band_of_a_curve_ends_where_accuracies_do(made):
    settings = group(read_jobs([made("first", 0.6), made("again", 0.6, 1)]))
    for job, low in zip(settings[0].jobs, (0.1, 0.9), strict=True):
        job.curves["val/query_accuracy/step_2"] = [(0, low), (2, low)]
    (band,) = figures.curves(settings, "glyphs").axes[0].collections
    assert band.get_paths()[0].get_extents().intervaly.tolist() == [0, 1]


def test_what_cannot_be_compared_is_named_with_its_reason(made, tmp_path, caplog):
    first, other = made("first", 0.6), made("zeroed", 0.7, zeroing=True)
    ways = made("ways", 0.7, 1, ways=4)
    older = made("older", 0.7, 2)
    (older / "tasks.csv.gz").unlink()
    compare.main([str(first), str(other), str(ways), str(older), f"into={tmp_path / 'out'}"])
    assert f"left out: {ways}: was tested on other tasks (ways is 4 there and 5 in the first run)" in caplog.text
    assert "tasks.csv.gz: is not there, the run is older than this file" in caplog.text
    assert "ways is 4 there and 5" in text_of(tmp_path / "out")
    caplog.clear()
    with pytest.raises(SystemExit, match="all runs are of one setting"):
        compare.main([str(first), str(ways), f"into={tmp_path / 'alone'}"])
    assert f"left out: {ways}: was tested on other tasks" in caplog.text


def test_runs_on_other_tasks_are_not_compared_and_a_difference_of_training_tasks_is_none(made):
    (job,) = read_jobs([made("first", 0.6)])
    config, results = job.config, job.results

    def on(**knobs):
        return job._replace(config=config | knobs)

    def with_data(**knobs):
        return on(dataset=config["dataset"] | knobs)

    others = [
        *(on(shots=5), on(queries=4), with_data(name="omniglot"), with_data(tasks="fixed_blocks")),
        job._replace(results=results | {"splits": {"sha256": "of other images"}}),
        job._replace(results=results | {"test": results["test"] | {"tasks": 9}}),
    ]
    named = ("shots", "queries", "dataset.name", "dataset.tasks", "the test's images (splits.sha256)", "test_tasks")
    for other, knob in zip(others, named, strict=True):
        kept, (line,) = pairs.comparable([job, other])
        assert len(kept) == 1 and f"was tested on other tasks ({knob} is " in line
    assert len(pairs.comparable([job, with_data(tasks="one_task"), on(meta_batch_size=9)])[0]) == 3
    kept, (line,) = pairs.comparable(others[-1:])
    assert not kept and line.endswith("its results.json and its tasks.csv.gz are not of one test")


def test_a_difference_over_fewer_seeds_than_the_accuracies_is_named(made):
    runs = [made(f"first{seed}", accuracy, seed) for seed, accuracy in enumerate((0.6, 0.85, 0.8))]
    runs += [made(f"zeroed{seed}", accuracy, seed, zeroing=True) for seed, accuracy in ((0, 0.63), (2, 0.83))]
    line = "in the difference of zeroing and no zeroing, the seeds [1], which only one of them has"
    comparing = pairs.comparable(read_jobs(runs))[0]
    rows, left_out = pairs.rows(comparing, MODES, None)
    assert left_out == [line]
    assert rows[1].accuracy < rows[0].accuracy and rows[1].difference.mean > 0.02  # 73 - 75, and 63 - 60 with 83 - 80
    off, on = (row for row in rows if row.difference)
    assert (off.p, on.p) == (2 * off.difference.p, 1) and 0 < off.p < on.difference.p  # Holm's, of both modes
    other, *_ = pairs.rows(comparing[::-1], ["zeroing_off"], None)
    assert other[0].setting.label() == "zeroing" and other[1].difference.mean == -rows[1].difference.mean
    assert line in "".join(tables.as_markdown(group([job for job, _ in comparing]), []))
    assert pairs.rows([run for run in comparing if run[0].config["seed"] == 0], ["zeroing_off"], None)[1] == []


def test_settings_without_a_common_seed_are_not_averaged_in_silence(made, tmp_path):
    runs = made("first", 0.6, 0), made("zeroed", 0.7, 1, zeroing=True)
    with pytest.raises(SystemExit, match=r"zeroing: has seeds \[1\], none of which no zeroing has \(\[0\]\)"):
        compare.main([*map(str, runs), f"into={tmp_path / 'out'}"])
    with pytest.raises(SystemExit, match="all runs are of one setting; give those of another too"):
        compare.main([str(runs[0]), str(made("again", 0.6, 3)), f"into={tmp_path / 'out'}"])
    with pytest.raises(SystemExit, match=r"step=9: .* was tested after inner steps 0 to 3"):
        compare.main([str(runs[0]), str(made("both", 0.6, 0, zeroing=True)), "step=9", f"into={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_pattern_names_runs(made, tmp_path, monkeypatch):
    made("a_first", 0.6), made("a_second", 0.7, zeroing=True)
    (tmp_path / "a_summary.csv").touch()  # as beside the jobs of a sweep
    monkeypatch.chdir(tmp_path)
    compare.main(["a_*", "mode=zeroing_off", "step=1"])
    assert "<td>1</td>" in text_of(tmp_path / "compare").replace("<b>", "").replace("</b>", "")


def test_a_run_leaves_every_tasks_accuracy_and_results_json_is_their_mean(finished):
    results = json.loads((finished / "results.json").read_text())
    for split in ("test", "val"):
        for mode, accuracies in read_tasks(finished, split).items():
            assert accuracies.shape == (results[split]["tasks"], 4)
            assert accuracies.mean(axis=0) == pytest.approx(results[split][mode]["accuracy"], abs=1e-5)


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", "truncated", "split,position\n", "nan", "minus", "gap", "bomb", "modes"],
)
def test_a_damaged_file_of_tasks_is_one_line(tmp_path, content):
    import gzip

    head = "split,position,mode,step,accuracy\n"
    rows = {
        "split,position\n": "split,position\n",
        "nan": f"{head}test,0,zeroing_off,0,nan\n",
        "minus": f"{head}test,-1,zeroing_off,0,0.5\ntest,-1,zeroing_on,0,0.5\n",
        "gap": f"{head}test,0,zeroing_off,0,0.5\ntest,2,zeroing_off,0,0.5\n",
        "modes": f"{head}test,0,zeroing_off,0,0.5\ntest,1,zeroing_off,0,0.5\ntest,0,zeroing_on,0,0.5\n",
        "bomb": head + "x" * (2**27),
        "truncated": f"{head}test,0,zeroing_off,0,0.5\n" * 9,
    }
    data = content if isinstance(content, bytes) else gzip.compress(rows[content].encode())
    (tmp_path / "tasks.csv.gz").write_bytes(data[:-9] if content == "truncated" else data)
    with pytest.raises(UserError, match=r"tasks\.csv\.gz: is not as a run writes it") as error:
        read_tasks(tmp_path)
    assert "\n" not in str(error.value)


def test_the_command_needs_no_torch(made, tmp_path):
    runs = made("first", 0.6), made("zeroed", 0.7, zeroing=True)
    code = (
        "import sys; from fewshot.compare.__main__ import main; from fewshot.results import figures\n"
        "figures.png = figures.pdf = lambda figure: b'no picture'\n"
        "main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, runs), f"into={tmp_path / 'out'}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
