"""What users write, for pyright to accept the types; it is never run."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

import fewshot
from fewshot import FewShotClassifier, InnerLoop, Run, TaskSampler
from fewshot.predict import Adapted, Predictions, adapt, predict

run: Run = fewshot.train(algo="zero", iterations=3, folder="runs/zero")
accuracy: float = run.results["test"]["zeroing_off"]["accuracy"][0]
loss: np.ndarray = run.metrics["train/loss"]
page: Path = run.evidence(test_tasks=9)
tested: Run = fewshot.test(run, test_tasks=3)
version: str = fewshot.__version__

image = np.zeros((28, 28), np.uint8)
model = fewshot.load(run)
features: torch.Tensor = model.encoder(model.preprocess(image)[None])
adapted: Adapted = adapt(model, {"a": [image], "b": [image]}, statistics="support")
adapted.save("folder")
predictions: Predictions = predict(run, {"a": [torch.zeros(1, 28, 28)], "b": [b"a file"]}, [image])
classifier = FewShotClassifier(Path("folder"), steps=3).fit([image, image], [1, 2])
labels: np.ndarray = classifier.predict(["a.png"])

sampler = TaskSampler([(torch.zeros(1, 28, 28), 1)], ways=2, shots=1, queries=1)
network = fewshot.network_from_module(nn.Linear(2, 2), channels=1, size=28, ways=2)
loop = InnerLoop(inner_steps=1, inner_lr=0.1, first_order=True, zeroing=True)
outer_loss = fewshot.meta_gradient(network, sampler(0, 2), loop)[0]
accuracies: torch.Tensor = fewshot.step_accuracies(network, sampler(0, 2), [loop.evaluation(3, zeroing=True)])
fewshot.zero_head(network.head)
try:
    fewshot.load("nowhere")
except fewshot.UserError as error:
    print(error)
