"""learn2learn's own Omniglot program, which end_to_end.py times beside train.py.

    python benchmarks/learn2learn_omniglot.py ROOT ITERATIONS cpu|cuda [threads]

The calls and their order are those of learn2learn's examples/vision/maml_omniglot.py and of its Omniglot benchmark:
FullOmniglot reads PNG files, a task is drawn by FusedNWaysKShots, LoadData, RemapLabels and ConsecutiveLabels, and
every task is cloned, adapted and differentiated alone. Its settings were changed to those that train.py has here:
conv4_strided, first order, 2 steps at 0.4, 15 queries, Adam at 0.001, no rotated classes. It only trains.

ROOT: a folder in which torchvision finds Omniglot (omniglot-py/images_background and so on).
"""

import random
import sys

import learn2learn as l2l
import numpy as np
import torch
from PIL.Image import LANCZOS
from torch import nn, optim
from torchvision import transforms
from torchvision.datasets import Omniglot

from fewshot.models.network import conv4_strided

WAYS, SHOTS, QUERIES = 5, 1, 15
INNER_STEPS, INNER_LR, OUTER_LR, META_BATCH_SIZE = 2, 0.4, 0.001, 32


def training_tasks(root: str) -> l2l.data.TaskDataset:
    Omniglot._check_integrity = lambda self: True  # the PNG files are there; the zips may be nobody's published ones
    shrink = transforms.Resize(28, interpolation=LANCZOS)
    images = transforms.Compose([shrink, transforms.ToTensor(), lambda x: 1.0 - x])
    dataset = l2l.data.MetaDataset(l2l.vision.datasets.FullOmniglot(root=root, transform=images, download=False))
    classes = list(range(1623))
    random.shuffle(classes)
    train = l2l.data.FilteredMetaDataset(dataset, labels=classes[:1100])
    task_transforms = [
        l2l.data.transforms.FusedNWaysKShots(train, n=WAYS, k=SHOTS + QUERIES),
        l2l.data.transforms.LoadData(train),
        l2l.data.transforms.RemapLabels(train),
        l2l.data.transforms.ConsecutiveLabels(train),
    ]
    return l2l.data.TaskDataset(train, task_transforms=task_transforms, num_tasks=20000)


def accuracy(predictions, targets):
    predictions = predictions.argmax(dim=1).view(targets.shape)
    return (predictions == targets).sum().float() / targets.size(0)


def fast_adapt(batch, learner, loss, device):
    data, labels = batch
    data, labels = data.to(device), labels.to(device)
    in_support = np.zeros(data.size(0), dtype=bool)
    in_support[np.arange(data.size(0)) % (SHOTS + QUERIES) < SHOTS] = True  # the images of a class lie together
    support, query = torch.from_numpy(in_support), torch.from_numpy(~in_support)
    for _ in range(INNER_STEPS):
        learner.adapt(loss(learner(data[support]), labels[support]))
    predictions = learner(data[query])
    return loss(predictions, labels[query]), accuracy(predictions, labels[query])


def main(root: str, iterations: int, device: str) -> None:
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    tasks = training_tasks(root)
    model = conv4_strided(channels=1, size=28, ways=WAYS).to(device)
    maml = l2l.algorithms.MAML(model, lr=INNER_LR, first_order=True)
    optimizer = optim.Adam(maml.parameters(), OUTER_LR)
    loss = nn.CrossEntropyLoss(reduction="mean")
    for iteration in range(iterations):
        optimizer.zero_grad()
        train_error = train_accuracy = 0.0
        for _ in range(META_BATCH_SIZE):
            error, correct = fast_adapt(tasks.sample(), maml.clone(), loss, device)
            error.backward()
            train_error += error.item()
            train_accuracy += correct.item()
        print(iteration, "error", train_error / META_BATCH_SIZE, "accuracy", train_accuracy / META_BATCH_SIZE)
        for p in maml.parameters():
            p.grad.data.mul_(1.0 / META_BATCH_SIZE)
        optimizer.step()


if __name__ == "__main__":
    if len(sys.argv) > 4:
        torch.set_num_threads(int(sys.argv[4]))
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
