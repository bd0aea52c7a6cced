"""What it is worth to normalise the queries of a task together: python docs/results/transductive.py dataset=omniglot

Query accuracy of models that come with the program, or of checkpoint=PATH, on 300 tasks of the test split, by the three
words of evaluation.statistics, after a number of inner steps from a zeroed head; and how much more `task` has, task by
task. It takes the words of train.py that say the tasks: dataset.root=FOLDER, shots=5.
"""

import sys

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

import fewshot
from fewshot.config.tree import CONF, STATISTICS
from fewshot.maml import sequential
from fewshot.results.record_files import Scores
from fewshot.sweep.statistics import paired

MODELS, TASKS = ("omniglot-5w1s-fomaml", "omniglot-5w1s-zero"), 300

torch.set_num_threads(1)
with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
    cfg = compose("config", sys.argv[1:])
test = instantiate(cfg.dataset.source)["test"]
print(f"| model | step | {' | '.join(STATISTICS)} | task - support | task - each |")
for name in (cfg.checkpoint,) if cfg.checkpoint else MODELS:
    model, steps = fewshot.load(name), cfg.test_steps
    evaluation = model.learner.loop.evaluation(steps, zeroing=True)
    shape = {knob: cfg[knob] for knob in ("ways", "shots", "queries")}
    numbers = {"mean": model.preprocess.mean, "std": model.preprocess.std}
    sampler = fewshot.TaskSampler(test, seed=0, **shape, **numbers)
    correct = []
    for first in range(0, TASKS, 10):
        tasks = sampler(first, 10)
        logits = sequential.step_logits(model.learner.network, tasks, [evaluation], (), STATISTICS, first=steps)
        correct.append((logits[:, :, 0].argmax(-1) == tasks.query_labels).double().mean(-1))
    accuracies = torch.cat(correct, 1).numpy()  # (statistics, tasks)
    scores = [Scores.of(of_tasks[:, None]) for of_tasks in accuracies]
    cells = [f"{score.accuracy[0]:.3f} ± {score.ci95[0]:.3f}" for score in scores]
    gains = [paired(accuracies[:1] - accuracies[place : place + 1]) for place in (1, 2)]
    cells += [f"{gain.mean:+.3f} ± {gain.over_tasks:.3f}" for gain in gains]
    print(f"| `{name}` | {steps} | {' | '.join(cells)} |", flush=True)
