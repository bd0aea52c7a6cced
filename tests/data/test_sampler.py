"""Tasks and their sampler, seen from outside: every image carries its class and place, so a task shows its draws."""

import hashlib
import re
from collections import Counter
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia import augmentation
from torch import nn

from fewshot.config.schema import TASKS
from fewshot.data.meta_batches import augmentation as augmentation_of
from fewshot.data.sampler import TaskSampler
from fewshot.data.task import SPLITS, Split, query_accuracy
from fewshot.errors import UserError

every_case = settings(max_examples=60)


def marked(counts):
    """A split whose image i of class n has the pixels (n, i), and nothing else."""
    pixels = [(n, i) for n, count in enumerate(counts) for i in range(count)]
    images = torch.tensor(pixels, dtype=torch.uint8).view(-1, 1, 1, 2)
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])
    return Split(images, offsets, tuple(f"class {n}" for n in range(len(counts))))


def marks(images):
    """(B, S, 1, 1, 2) in [0, 1] -> (B, S, 2): class and place of every image."""
    return images.mul(255).round().long().flatten(2)


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def at(task, position):
    return tuple(field[position] for field in task)


@st.composite
def samplers(draw):
    """A split with classes of different sizes and a sampler that it can serve, often with nothing to spare."""
    shots, queries = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(shots + queries, 12), min_size=2, max_size=9))
    ways = draw(st.integers(2, len(counts)))
    seed, stream, kind = draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 2)), draw(st.sampled_from(TASKS))
    knobs = {"ways": ways, "shots": shots, "queries": queries, "seed": seed, "stream": stream, "kind": kind}
    return counts, TaskSampler(marked(counts), **knobs)


@every_case
@given(samplers(), st.integers(0, 10**7), st.integers(1, 6))
def test_a_task_is_k_classes_with_disjoint_support_and_query(drawn, first, tasks):
    counts, sampler = drawn
    ways, shots, queries = sampler.ways, sampler.shots, sampler.queries
    batch = sampler(first, tasks)
    assert batch.support.shape == (tasks, ways * shots, 1, 1, 2)
    assert batch.query.shape == (tasks, ways * queries, 1, 1, 2)
    for support, support_labels, query, query_labels in zip(
        marks(batch.support), batch.support_labels, marks(batch.query), batch.query_labels, strict=True
    ):
        assert Counter(support_labels.tolist()) == dict.fromkeys(range(ways), shots)
        assert Counter(query_labels.tolist()) == dict.fromkeys(range(ways), queries)

        drawn_images = [tuple(mark) for mark in torch.cat([support, query]).tolist()]
        assert len(set(drawn_images)) == len(drawn_images), "an image twice in one task"
        assert all(place < counts[n] for n, place in drawn_images)

        classes = torch.cat([support, query])[:, 0]
        labels = torch.cat([support_labels, query_labels])
        class_of = [set(classes[labels == label].tolist()) for label in range(ways)]
        assert all(len(shown) == 1 for shown in class_of), "a label with images of two classes"
        assert len(set.union(*class_of)) == ways, "a class under two labels"


@every_case
@given(samplers(), st.integers(0, 10**9), st.integers(1, 8), st.data())
def test_a_task_does_not_depend_on_its_company(drawn, first, tasks, data):
    _, sampler = drawn
    together = sampler(first, tasks)
    position = data.draw(st.integers(0, tasks - 1))
    begin = max(0, first + position - data.draw(st.integers(0, 3)))
    other_company = sampler(begin, first + position - begin + 2)
    assert same(at(together, position), at(other_company, first + position - begin))
    assert same(at(together, position), at(sampler(first + position, 1), 0))


def test_a_sampler_made_again_draws_the_same_tasks():
    knobs = {"ways": 5, "shots": 1, "queries": 3, "seed": 7, "stream": 0}
    used = TaskSampler(marked([10] * 20), **knobs)
    for first in (0, 5, 100):
        used(first, 3)
    assert same(used(40, 4), TaskSampler(marked([10] * 20), **knobs)(40, 4))


DRAWN = {
    "mutually_exclusive": "af8b372a2fcb73f14697b7ef17efd977c0c7304421155e8a896bfdc3b15a0c75",
    "non_mutually_exclusive": "6831893e8f760708043d55824b305e9667b4ae0e5d2151e3068305fbd1f9ad39",
    "fixed_blocks": "0a39bc684a7b57c5b12df3d6263a8eac93eee921907f9ae46153b02f086950d5",
    "one_task": "26adfa50c28164ab25e520f3e338eef131a339e99dc7a014c0f0898cde7c250b",
}


@pytest.mark.parametrize("kind", TASKS)
def test_the_draws_of_a_seed_are_the_same_in_every_version(kind):
    sampler = TaskSampler(marked([7, 12, 9, 20, 8, 8, 8]), ways=3, shots=2, queries=4, seed=5, stream=0, kind=kind)
    drawn = hashlib.sha256(sampler.indices(11, 50).astype("<i8").tobytes()).hexdigest()
    assert drawn == DRAWN[kind]


def test_positions_seeds_and_streams_all_differ():
    def sampler(seed, stream):
        return TaskSampler(marked([20] * 50), ways=5, shots=1, queries=4, seed=seed, stream=stream)

    drawn = []
    for seed in (0, 1, 2, 2**32 - 1):
        for stream in range(len(SPLITS)):
            task = sampler(seed, stream)(0, 200)
            drawn += [image.tobytes() for image in marks(torch.cat([task.support, task.query], dim=1)).numpy()]
    assert len(set(drawn)) == len(drawn) == 4 * 3 * 200


def chi_square(counts, cells):
    """Of draws that should fall on `cells` equally often."""
    expected = sum(counts.values()) / cells
    return sum((counts[cell] - expected) ** 2 / expected for cell in range(cells))


def test_every_class_is_every_label_equally_often():
    classes, tasks = 6, 6000
    sampler = TaskSampler(marked([4, 9, 4, 30, 5, 4]), ways=3, shots=1, queries=2, seed=3, stream=0)
    batch = sampler(0, tasks)
    drawn = marks(batch.support)[:, :, 0]  # 1-shot: (B, K), in the order of the labels
    assert torch.equal(batch.support_labels, torch.arange(3).expand(tasks, -1))
    for label in range(3):  # 5 degrees of freedom: exceeds 20.5 once in a thousand; the draws are fixed
        assert chi_square(Counter(drawn[:, label].tolist()), classes) < 20.5


def test_every_image_is_support_and_query_equally_often():
    sampler = TaskSampler(marked([7, 12]), ways=2, shots=2, queries=3, seed=11, stream=1)
    batch = sampler(0, 4000)
    for images in (marks(batch.support), marks(batch.query)):
        for n, count in enumerate((7, 12)):  # 11 degrees of freedom at most: 31.3 once in a thousand
            places = images[images[:, :, 0] == n][:, 1]
            assert chi_square(Counter(places.tolist()), count) < 31.3


# Augmentation


COLOURS = Split(
    torch.randint(0, 256, (60, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    torch.arange(0, 61, 6),
    tuple("abcdefghij"),
)
AUGMENTED = {"ways": 3, "shots": 1, "queries": 2, "stream": 0, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
MOVED = [augmentation.RandomCrop((12, 12), padding=2), augmentation.RandomHorizontalFlip()]
TRANSFORMS = nn.Sequential(*MOVED, augmentation.ColorJitter(0.4, 0.4, 0.4))


def test_augmented_images_depend_on_seed_and_position_alone_and_leave_the_random_state():
    sampler = TaskSampler(COLOURS, seed=3, augment=TRANSFORMS, **AUGMENTED)
    state = torch.get_rng_state()
    together = sampler(40, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = TaskSampler(COLOURS, seed=3, augment=TRANSFORMS, **AUGMENTED)
    for position in range(4):  # another rank, or a run that goes on
        assert same(at(together, position), at(again(40 + position, 1), 0))
    assert not same(together, TaskSampler(COLOURS, seed=4, augment=TRANSFORMS, **AUGMENTED)(40, 4))


def test_every_image_is_augmented_on_its_own_in_0_to_1_before_mean_and_std_are_applied():
    seen = []

    def moved(images):
        seen.append(images)
        return nn.Sequential(*MOVED)(images)

    drawn = TaskSampler(COLOURS, seed=0, augment=moved, **AUGMENTED)(5, 2)
    plain = TaskSampler(COLOURS, seed=0, **AUGMENTED | {"mean": (0.0,), "std": (1.0,)})(5, 2)
    assert [images.shape for images in seen] == 2 * [(9, 3, 12, 12)]  # a call per task
    assert all(images.min() >= 0 and 0.9 < images.max() <= 1 for images in seen)
    augmented, images = (torch.cat([task.support, task.query], dim=1).flatten(0, 1) for task in (drawn, plain))
    augmented = augmented * torch.tensor(AUGMENTED["std"]).view(-1, 1, 1) + torch.tensor(AUGMENTED["mean"]).view(
        -1, 1, 1
    )
    ways = [(down, right, turn) for down in range(5) for right in range(5) for turn in (False, True)]
    chosen = []
    for after, before in zip(augmented, nn.functional.pad(images, (2, 2, 2, 2)), strict=True):
        windows = [before[:, down : down + 12, right : right + 12] for down, right, _ in ways]
        windows = [window.flip(-1) if turn else window for window, (*_, turn) in zip(windows, ways, strict=True)]
        (way,) = [way for way, window in zip(ways, windows, strict=True) if torch.allclose(after, window, atol=1e-6)]
        chosen.append(way)
    assert all(len({way[part] for way in chosen}) > 1 for part in range(3)) and len(set(chosen[:9])) > 4
    assert torch.equal(drawn.query_labels, plain.query_labels)


@pytest.mark.parametrize(
    ("augment", "line"),
    [
        (augmentation.CenterCrop(8), "turns images of (3, 12, 12) into (3, 8, 8) torch.float32; use"),
        (torch.Tensor.byte, "turns images of (3, 12, 12) into (3, 12, 12) torch.uint8; use"),
        (augmentation.Normalize([0.5, 0.5], [1.0, 1.0]), "fails on images of (3, 12, 12) ("),
        (augmentation.RandomMixUpV2(p=1.0), "what becomes of an image depends on those beside it"),
        (augmentation.RandomMixUpV2(p=0.5), "what becomes of an image depends on those beside it"),
        (lambda images: images - images.mean(), "what becomes of an image depends on those beside it"),
    ],
    ids=["size", "type", "channels", "mixed", "seldom", "mean"],
)
def test_an_augmentation_that_does_not_give_such_images_is_refused_at_once(augment, line):
    for first in range(0, 40, 8):
        with pytest.raises(UserError, match=re.escape(f"augment: {line}")) as error:
            augmentation_of([augment], COLOURS.images[first:])
        assert "\n" not in str(error.value)
    state = torch.get_rng_state()
    kept = augmentation_of([TRANSFORMS], COLOURS.images)
    assert torch.equal(torch.get_rng_state(), state) and kept(torch.ones(9, 3, 12, 12)).shape == (9, 3, 12, 12)


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_change_for_each_image_on_its_own(channels):
    """One image in every place of a task comes out another in each; in another company it comes out the same."""
    same_image = COLOURS.images[:1, :channels].expand(60, -1, -1, -1)
    knobs = AUGMENTED | {"mean": (0.0,) * channels, "std": (1.0,) * channels, "augment": TRANSFORMS[2]}
    alike = TaskSampler(Split(same_image, COLOURS.offsets, COLOURS.names), seed=0, **knobs)(0, 1)
    assert len({image.numpy().tobytes() for image in torch.cat([alike.support[0], alike.query[0]])}) == 9
    for other in ({"seed": 1}, {"seed": 0, "stream": 1}):  # which draw other changes, and not other tasks alone
        changed = TaskSampler(Split(same_image, COLOURS.offsets, COLOURS.names), **knobs | other)(0, 1)
        assert not torch.equal(changed.support, alike.support)
    black = torch.zeros(60, channels, 12, 12, dtype=torch.uint8)
    sampler = TaskSampler(Split(black, COLOURS.offsets, COLOURS.names), seed=0, **knobs)
    black[sampler.indices(0, 1)[0, 0, 0]] = same_image[0]
    assert torch.equal(sampler(0, 1).support[0, 0], alike.support[0, 0])


# Kinds of training tasks


def classes_of_labels(seed, classes, ways, tasks):
    """[Counter of the classes drawn under label t] of non-mutually-exclusive tasks."""
    sampler = TaskSampler(
        marked([4] * classes), ways=ways, shots=1, queries=2, seed=seed, stream=0, kind="non_mutually_exclusive"
    )
    drawn = marks(sampler(0, tasks).support)[:, :, 0]  # 1-shot: (B, K), in the order of the labels
    return [Counter(drawn[:, label].tolist()) for label in range(ways)]


@every_case
@given(st.integers(2, 6), st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_each_label_has_its_own_kth_of_the_classes_whatever_the_seed(ways, more, seed):
    classes = ways + more
    parts = classes_of_labels(seed, classes, ways, 1000)
    assert sorted(n for part in parts for n in part) == list(range(classes)), "every class under exactly one label"
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert [set(part) for part in parts] == [set(part) for part in classes_of_labels(seed ^ 1, classes, ways, 1000)]


def test_the_classes_of_a_label_are_equally_frequent_and_no_neighbours():
    for part in classes_of_labels(7, 30, 5, 6000):
        members = sorted(part)
        assert members != list(range(members[0], members[0] + 6))
        # 5 degrees of freedom: exceeds 20.5 once in a thousand; the draws are fixed
        assert chi_square(Counter({members.index(n): count for n, count in part.items()}), 6) < 20.5


@every_case
@given(st.integers(2, 6), st.integers(0, 20), st.integers(0, 2**32 - 1))
def test_a_fixed_block_is_k_consecutive_classes_each_with_its_own_label(ways, more, seed):
    classes = ways + more
    knobs = {"ways": ways, "shots": 1, "queries": 2, "stream": 0, "kind": "fixed_blocks"}
    drawn = marks(TaskSampler(marked([4] * classes), seed=seed, **knobs)(0, 1000).support)[:, :, 0]
    blocks = {tuple(task) for task in drawn.tolist()}
    assert blocks == {tuple(range(first, first + ways)) for first in range(0, classes - ways + 1, ways)}


def test_fixed_blocks_are_equally_frequent():
    sampler = TaskSampler(marked([4] * 32), ways=5, shots=1, queries=2, seed=3, stream=0, kind="fixed_blocks")
    drawn = marks(sampler(0, 6000).support)[:, 0, 0]
    assert chi_square(Counter((drawn // 5).tolist()), 6) < 20.5  # 5 degrees of freedom, as above


def test_one_task_is_always_the_same_in_every_order():
    knobs = {"ways": 3, "shots": 2, "queries": 2, "stream": 0, "kind": "one_task"}
    sampler = TaskSampler(marked([9] * 20), seed=5, **knobs)
    task, batch = sampler.one_task(), sampler(0, 6000)
    assert torch.equal(batch.support_labels, task.support_labels.expand(6000, -1))
    assert torch.equal(batch.query_labels, task.query_labels.expand(6000, -1))
    parts = ((task.support, batch.support), (task.query, batch.query))
    own, drawn = (
        torch.cat(
            [marks(images.unsqueeze(0) if images.dim() == 4 else images).unflatten(1, (3, 2)) for images in pair], dim=2
        )
        for pair in zip(*parts, strict=True)
    )  # (1, K, 4, 2), (B, K, 4, 2): a class's two support images, then its two queries
    orders = (drawn[:, :, 0, 0, None] == own[0, :, 0, 0]).int().argmax(-1)  # (B, K), which class is label t
    assert torch.equal(drawn, own[0][orders])
    every = {order: n for n, order in enumerate(permutations(range(3)))}
    seen = Counter(every[tuple(order)] for order in orders.tolist())
    assert chi_square(seen, len(every)) < 20.5  # 5 degrees of freedom, as above
    assert same(task, TaskSampler(marked([9] * 20), seed=5, **knobs).one_task())
    assert not same(task, TaskSampler(marked([9] * 20), seed=6, **knobs).one_task())


def test_one_task_is_of_the_test_split_and_says_so():
    with pytest.raises(ValueError, match="the test split has 5 classes"):
        TaskSampler(marked([9] * 5), ways=6, shots=1, queries=1, seed=0, stream=0, kind="one_task")


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_the_accuracy_of_a_task_with_one_logit_that_is_not_finite_is_no_number(odd):
    logits = torch.eye(3).expand(2, 3, 3).clone()  # of two tasks, whose queries are all right
    logits[1, 2, 0] = odd
    right, unknown = query_accuracy(logits, torch.arange(3).expand(2, 3)).tolist()
    assert right == 1 and unknown != unknown


# Mistakes


def test_a_kind_that_there_is_not_is_refused_and_drawn_as_no_other():
    with pytest.raises(ValueError, match=r"^kind=fixed-blocks: must be one of mutually_exclusive, non_mutuall"):
        TaskSampler(marked([9] * 6), ways=3, shots=1, queries=1, kind="fixed-blocks")


def test_too_many_ways_is_one_clear_line():
    with pytest.raises(ValueError) as error:
        TaskSampler(marked([9] * 5), ways=6, shots=1, queries=1, seed=0, stream=1)
    assert str(error.value) == "ways=6: the val split has 5 classes; lower ways"


def test_too_few_images_is_one_clear_line_that_names_the_class():
    with pytest.raises(ValueError) as error:
        TaskSampler(marked([9, 9, 6, 9]), ways=2, shots=2, queries=5, seed=0, stream=2)
    assert str(error.value) == "shots+queries=7: class 'class 2' of the test split has 6 images; lower shots or queries"


@pytest.mark.parametrize(
    ("knobs", "line"),
    [
        ({"seed": -1}, "seed=-1: must be at least 0"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean=(0.5, 0.5, 0.5): must be one number, or one for each channel (1)"),
        ({"std": ()}, "std=(): must be one number, or one for each channel (1)"),
    ],
)
def test_a_seed_or_a_number_of_channels_that_cannot_be_is_one_clear_line(knobs, line):
    with pytest.raises(ValueError) as error:
        TaskSampler(marked([9] * 5), ways=2, shots=1, queries=1, **knobs)
    assert str(error.value) == line


def test_all_classes_and_all_images_can_be_asked_for():
    sampler = TaskSampler(marked([3, 3]), ways=2, shots=1, queries=2, seed=0, stream=0)
    task = sampler(0, 1)
    drawn = torch.cat([marks(task.support), marks(task.query)], dim=1)[0].tolist()
    assert sorted(drawn) == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_images_are_scaled_to_one_then_normalised_per_channel():
    values = (0, 51, 255)
    images = torch.tensor(values, dtype=torch.uint8).view(1, 3, 1, 1).repeat(4, 1, 2, 2)
    split = Split(images, torch.tensor([0, 2, 4]), ("a", "b"))
    sampler = TaskSampler(
        split, ways=2, shots=1, queries=1, seed=0, stream=0, mean=(0.5, 0.2, 0.25), std=(0.25, 0.1, 0.5)
    )
    task = sampler(0, 3)
    for drawn in (task.support, task.query):
        assert drawn.dtype == torch.float32 and drawn.shape == (3, 2, 3, 2, 2)
        for channel, expected in enumerate(((0 - 0.5) / 0.25, (0.2 - 0.2) / 0.1, (1 - 0.25) / 0.5)):
            torch.testing.assert_close(drawn[:, :, channel], torch.full((3, 2, 2, 2), expected))
    assert task.support_labels.dtype == task.query_labels.dtype == torch.int64
    assert torch.equal(split.images, images), "drawing a task changed the images"


def test_counts_are_the_images_of_each_class():
    assert marked([4, 1, 7]).counts.tolist() == [4, 1, 7]
