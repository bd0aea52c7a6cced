"""What normalising the queries of a task together is worth: python docs/results/transductive.py MODEL... [KNOB=...]

Query accuracy of models on tasks of a test split after their own number of inner steps, with the head as it was trained
and from zero, by each of evaluation.statistics; how much more the first of them has, task by task; and the processor
time that each takes for its inner loop and its queries, chunk by chunk in turn. MODEL: as in `fewshot test MODEL
datasets=`. The knobs are those of train.py that say the tasks: dataset=cifarfs dataset.root=FILE test_tasks=200.
Rows go into transductive.json, of which the tables of docs/evaluation.md are made.
"""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from kept import called, keep, training

import fewshot
from fewshot.config.tree import CONF, MODES, settings
from fewshot.config.tree import statistics as statistics_of
from fewshot.data.task import Split
from fewshot.maml import sequential
from fewshot.predict.find import find
from fewshot.results.record_files import Scores
from fewshot.sweep.statistics import paired

CHUNK = 10
KEY = ("dataset", "ways", "shots", "model", "mode")


def measure(name: str, cfg, splits: Mapping[str, Split]) -> list[dict]:
    """A row for each mode of the test."""
    model = fewshot.load(find(name))
    steps = model.config["inner_steps"]
    shape = {knob: cfg[knob] for knob in ("ways", "shots", "queries")}
    numbers = {"mean": model.preprocess.mean, "std": model.preprocess.std}
    sampler = fewshot.TaskSampler(splits["test"], seed=0, **shape, **numbers)
    words_of = list(statistics_of(settings(cfg)))
    zero = not any(weights.any() for weights in model.head.parameters())  # then both modes are the same
    modes = [mode for mode in MODES if mode == "zeroing_on" or not zero]
    evaluations = [model.learner.loop.evaluation(steps, mode == "zeroing_on") for mode in modes]
    correct, milliseconds = defaultdict(list), defaultdict(list)
    for first in range(0, cfg.test_tasks, CHUNK):
        tasks = sampler(first, CHUNK)
        turn = first // CHUNK % len(words_of)  # none is always the first
        for words in words_of[turn:] + words_of[:turn]:
            began = time.process_time()
            logits = sequential.step_logits(model.learner.network, tasks, evaluations, (), (words,), first=steps)
            milliseconds[words].append(1000 * (time.process_time() - began) / CHUNK / len(evaluations))
            correct[words].append((logits[:, :, 0].argmax(-1) == tasks.query_labels).double().mean(-1))
    rows = []
    for place, mode in enumerate(modes):
        accuracies = {words: torch.cat(chunks, 1)[place].numpy() for words, chunks in correct.items()}
        scores = {words: Scores.of(values[:, None]) for words, values in accuracies.items()}
        gains = {words: paired((accuracies[words_of[0]] - values)[None]) for words, values in accuracies.items()}
        cells = {
            words: {
                "accuracy": scores[words].accuracy[0],
                "ci95": scores[words].ci95[0],
                "first_has_more": round(float(gains[words].mean), 6),
                "more_ci95": round(float(gains[words].over_tasks), 6),
                "processor_milliseconds": round(statistics.median(milliseconds[words]), 1),
            }
            for words in words_of
        }
        about = {"model": called(name), **training(name), "dataset": cfg.dataset.name, **shape}
        rows.append({**about, "inner_steps": steps, "mode": mode, "tasks": cfg.test_tasks, **cells})
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    models, knobs = ([word for word in sys.argv[1:] if ("=" in word) == is_knob] for is_knob in (False, True))
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        config = compose("config", knobs)
    images = instantiate(config.dataset.source)
    for model_name in models:
        keep("transductive", measured := measure(model_name, config, images), KEY)
        for row in measured:
            print(row, flush=True)
