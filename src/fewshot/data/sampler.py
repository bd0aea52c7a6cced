"""The seeded sampler that draws tasks, and what becomes of their pixels.

Shapes: B tasks, K ways, S support and Q query images per task, C x H x W one image, M images of a split, N its classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fewshot.data.any_dataset import Labelled, split_of
from fewshot.data.task import SPLITS, Split, Task


def normalised(
    pixels: Tensor,
    mean: Tensor | Sequence[float],
    std: Tensor | Sequence[float],
    augment: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Images (..., C, H, W) as a network sees them: uint8 scaled to [0, 1], augmented, less mean and divided by std."""
    images = pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels.float()
    if augment is not None:
        images = augment(images)
    mean, std = (torch.as_tensor(numbers, device=images.device).view(-1, 1, 1) for numbers in (mean, std))
    return images.sub_(mean).div_(std)


class TaskSampler:
    """Draws tasks from a split; the task at a position depends only on (seed, stream, position).

    Random numbers come from a counter (Philox: key = seed and stream, counter = position), so a resumed run, another
    rank or another chunk size sees the same tasks.

    kind:
        "mutually_exclusive": a class may get any label, so a label means nothing outside of its task.
        "non_mutually_exclusive": label t always comes from the same K-th of the classes, which can be memorised.
        "fixed_blocks": each K classes in a row are a task, so a class has the same label and companions always.
        "one_task": always the task `one_task`, with the order of its labels drawn anew for each position.

    Args:
        split: the images, see `to`; or a torch.utils.data.Dataset of (image, label), see any_dataset.py.
        ways, shots, queries: K, and images per class in support and query.
        mean, std: per channel, applied to images scaled to [0, 1].
        seed: at least 0.
        stream: keeps the draws of train, val and test apart (their place in SPLITS).
        kind: see above; for "one_task" the split is that of the test.
        augment: changes a task's images, (K (shots + queries), C, H, W) in [0, 1], each at random, before mean and std
            are applied. Its random numbers come from torch and depend only on (seed, stream, position), too.

    Raises:
        ValueError: the split has too few classes or images, or a value is none of those above; it names the value.
        UserError: a Dataset whose images or labels cannot be used, see any_dataset.py.
    """

    def __init__(
        self,
        split: Split | Labelled,
        *,
        ways: int,
        shots: int,
        queries: int,
        seed: int = 0,
        stream: int = 0,
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
        kind: str = "mutually_exclusive",
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        split = split if isinstance(split, Split) else split_of(split)
        if kind not in (kinds := ("mutually_exclusive", "non_mutually_exclusive", "fixed_blocks", "one_task")):
            raise ValueError(f"kind={kind}: must be one of {', '.join(kinds)}")
        classes, fewest = len(split.names), int(split.counts.min())
        name = "test" if kind == "one_task" else SPLITS[stream]
        if classes < ways:
            raise ValueError(f"ways={ways}: the {name} split has {classes} classes; lower ways")
        if fewest < shots + queries:
            short = f"class {split.names[int(split.counts.argmin())]!r} of the {name} split has {fewest} images"
            raise ValueError(f"shots+queries={shots + queries}: {short}; lower shots or queries")
        if seed < 0:
            raise ValueError(f"seed={seed}: must be at least 0")
        for name, numbers in (("mean", mean), ("std", std)):
            if len(numbers) not in (1, channels := split.images.shape[1]):
                raise ValueError(f"{name}={numbers}: must be one number, or one for each channel ({channels})")
        self.split, self.ways, self.shots, self.queries, self.kind = split, ways, shots, queries, kind
        self._key = np.array([seed, stream], dtype=np.uint64)
        self._counts, self._offsets = split.counts.numpy(), split.offsets.numpy()
        self._mean, self._std = torch.tensor(mean), torch.tensor(std)
        self._augment = augment

    def __repr__(self) -> str:
        images, classes = len(self.split.images), len(self.split.names)
        kind = f"{self.ways}-way {self.shots}-shot, {self.queries} queries, {self.kind}"
        return f"TaskSampler({classes} classes, {images} images, {kind})"

    def to(self, device: torch.device, images: torch.device) -> None:
        """Moves the images to the device `images`; from now on tasks are made on `device`."""
        self.split = replace(self.split, images=self.split.images.to(images))
        self._mean, self._std = self._mean.to(device), self._std.to(device)

    def indices(self, first: int, tasks: int) -> np.ndarray:
        """(B, K, shots + queries) int64: which images make the tasks at positions first .. first + tasks - 1."""
        if self.kind != "one_task":
            return self._draw(first, tasks)
        keys, _ = self._random(first + 1, tasks)  # position 0 drew the task itself
        return self._draw(0, 1)[0][keys[:, : self.ways].argsort(axis=1, kind="stable")]

    def one_task(self) -> Task:
        """The one task of kind "one_task", without a leading B, the classes in their own order."""
        return Task(*(field[0] for field in self._gather(self._draw(0, 1))))

    def _random(self, first: int, tasks: int) -> tuple[np.ndarray, np.ndarray]:
        """Random numbers for each task, one per class (B, N) and one per image of K classes (B, K, most) uint64."""
        classes, most = len(self._counts), int(self._counts.max())
        words = classes + self.ways * most  # drawn in blocks of four, as Philox makes them
        blocks = -(-words // 4)
        generator = np.random.Philox(key=self._key, counter=first * blocks)
        keys = generator.random_raw(tasks * blocks * 4).reshape(tasks, -1)
        return keys[:, :classes], keys[:, classes:words].reshape(tasks, self.ways, most)

    def _draw(self, first: int, tasks: int) -> np.ndarray:
        """(B, K, shots + queries) int64"""
        keys, image_keys = self._random(first, tasks)
        if self.kind == "non_mutually_exclusive":
            chosen = np.stack([part[keys[:, part].argmin(axis=1)] for part in self._parts()], axis=1)
        elif self.kind == "fixed_blocks":
            block = keys[:, : keys.shape[1] // self.ways].argmin(axis=1)
            chosen = block[:, None] * self.ways + np.arange(self.ways)
        else:
            chosen = keys.argsort(axis=1, kind="stable")[:, : self.ways]  # a random order, so random labels
        most = image_keys.shape[2]
        absent = np.arange(most) >= self._counts[chosen][:, :, None]
        image_keys = np.where(absent, np.iinfo(np.uint64).max, image_keys)
        images = image_keys.argsort(axis=2, kind="stable")[:, :, : self.shots + self.queries]
        return self._offsets[chosen][:, :, None] + images

    def _parts(self) -> list[np.ndarray]:
        """The classes of each label, dealt out in a shuffled order that no seed changes.

        In their own order a label would be a few alphabets, which can be told by their style.
        """
        stream_of_its_own = np.array([0, len(SPLITS)], dtype=np.uint64)
        order = np.random.Philox(key=stream_of_its_own).random_raw(len(self._counts)).argsort(kind="stable")
        return [order[label :: self.ways] for label in range(self.ways)]

    def __call__(self, first: int, tasks: int) -> Task:
        """The tasks at positions first .. first + tasks - 1."""
        return self._gather(self.indices(first, tasks), first)

    def _augmented(self, images: Tensor, first: int) -> Tensor:
        """Tasks of images in [0, 1], (B, K, shots + queries, C, H, W), that are at positions first .. first + B - 1."""
        devices = [images.device] if images.is_cuda else []
        augmented = []
        with torch.random.fork_rng(devices):  # some transforms draw on the device
            for position, task in enumerate(images.flatten(1, 2), first):
                torch.manual_seed(int(np.random.SeedSequence((*self._key.tolist(), position)).generate_state(1)[0]))
                augmented.append(self._augment(task))  # pyright: ignore[reportOptionalCall]
        return torch.stack(augmented).unflatten(1, images.shape[1:3])

    def _gather(self, indices: np.ndarray, first: int | None = None) -> Task:
        """The images of these (B, K, shots + queries) indices as tasks.

        first: position of the first of them, where they are to be augmented.
        """
        tasks, device = len(indices), self._mean.device
        index = torch.from_numpy(indices).to(self.split.images.device)
        images = self.split.images[index]
        if images.device != device:  # as bytes, from memory that a GPU can fetch by itself
            images = (images.pin_memory() if device.type == "cuda" else images).to(device, non_blocking=True)
        augment = None if self._augment is None or first is None else partial(self._augmented, first=first)
        images = normalised(images, self._mean, self._std, augment)
        support, query = images.split([self.shots, self.queries], dim=2)
        labels = torch.arange(self.ways, device=device)
        return Task(
            support.flatten(1, 2),
            labels.repeat_interleave(self.shots).expand(tasks, -1),
            query.flatten(1, 2),
            labels.repeat_interleave(self.queries).expand(tasks, -1),
        )
