"""What statistics=support costs: python docs/results/support_statistics.py dataset=omniglot dataset.root=FOLDER

Query accuracy of a model that comes with the program, on tasks of the test split, where BatchNorm normalises by the
queries of a task together, as in training, or by its support.
"""

import sys

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

import fewshot
from fewshot.config.tree import CONF
from fewshot.predict import adapt
from fewshot.results.record_files import Scores

MODEL, TASKS, STEPS = "omniglot-5w1s-fomaml", 300, 3

torch.set_num_threads(1)
with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
    test = instantiate(compose("config", sys.argv[1:]).dataset.source)["test"]
model, truth = fewshot.load(MODEL), np.repeat(np.arange(5), 15)
for shots in (1, 5):
    sampler = fewshot.TaskSampler(test, ways=5, shots=shots, queries=15, seed=0)
    for statistics in ("queries", "support"):
        accuracies = []
        for task in sampler.indices(0, TASKS):  # (ways, shots + queries)
            support = {label: list(test.images[images[:shots]]) for label, images in enumerate(task)}
            adapted = adapt(model, support, steps=STEPS, test_zeroing=True, statistics=statistics)
            labels = adapted.predict(list(test.images[task[:, shots:].flatten()])).labels
            accuracies.append([np.mean(labels == truth)])
        scores = Scores.of(accuracies)
        print(f"{shots}-shot, statistics={statistics}: {scores.accuracy[0]:.3f} ± {scores.ci95[0]:.3f}", flush=True)
