"""Tasks from a torch.utils.data.Dataset of (image, label)."""

import numpy as np
import pytest
import torch
from examples import gradients
from PIL import Image
from torch import nn
from torch.utils.data import Subset, TensorDataset

import fewshot
from fewshot.data.any_dataset import split_of
from fewshot.maml import sequential


def pixels(count, seed=0, shape=(1, 6, 5)):
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_images_lie_class_after_class_in_the_order_of_the_labels():
    images, labels = pixels(6), torch.tensor([7, 3, 7, 5, 3, 7])
    split = split_of(TensorDataset(images, labels))
    assert split.names == ("3", "5", "7") and split.offsets.tolist() == [0, 2, 3, 6]
    assert torch.equal(split.images, images[[1, 4, 3, 0, 2, 5]])
    part = split_of(Subset(TensorDataset(images, labels), [0, 3]))
    assert part.names == ("5", "7") and torch.equal(part.images, images[[3, 0]])


@pytest.mark.parametrize("channels", [1, 3])
def test_pil_arrays_and_tensors_are_the_same_images(channels):
    images = pixels(4, shape=(channels, 6, 5))
    arrays = [image.movedim(0, -1).numpy() for image in images]
    arrays = [array[..., 0] if channels == 1 else array for array in arrays]
    for kind in (np.asarray, Image.fromarray):
        split = split_of([(kind(array), "ab"[place % 2]) for place, array in enumerate(arrays)])
        assert split.names == ("a", "b") and torch.equal(split.images, images[[0, 2, 1, 3]])


def test_an_image_with_a_palette_has_its_colours_and_not_their_places_in_the_palette():
    plain = Image.fromarray(np.uint8([[[250, 10, 20], [10, 250, 20]]] * 2))
    split = split_of([(plain.convert("P", palette=Image.Palette.ADAPTIVE), 0), (plain, 1)])
    assert torch.equal(split.images[0], split.images[1])


def test_a_label_is_text_on_one_line():
    names = split_of([(pixels(1)[0], "cat\x1b[2J\n"), (pixels(1)[0], "dog")]).names
    assert names == (r"cat\x1b[2J\n", "dog")


def test_black_and_white_images_and_arrays_of_another_byte_order_are_read():
    values = np.float32([[0, 255], [255, 0]])
    images = (values.astype(">f4"), values, Image.fromarray(values.astype(np.uint8)).convert("1"))
    big, little, black_and_white = (split_of([(image, 0)]).images for image in images)
    assert torch.equal(big, little) and torch.equal(black_and_white.float(), little)


def test_bytes_are_scaled_and_floats_stay_as_they_are():
    images, labels = pixels(40), torch.arange(4).repeat(10)
    knobs = {"ways": 3, "shots": 2, "queries": 3, "seed": 5}
    of_bytes = fewshot.TaskSampler(TensorDataset(images, labels), **knobs)
    of_floats = fewshot.TaskSampler(TensorDataset(images / 255, labels), **knobs)
    for one, other in zip(of_bytes(7, 4), of_floats(7, 4), strict=True):
        torch.testing.assert_close(one, other)
    assert repr(of_bytes) == "TaskSampler(4 classes, 40 images, 3-way 2-shot, 3 queries, mutually_exclusive)"
    before = of_floats.split.images.clone()
    fewshot.TaskSampler(of_floats.split, **knobs, mean=(0.5,), std=(2.0,))(0, 2)
    assert torch.equal(of_floats.split.images, before)


@pytest.mark.parametrize(
    ("dataset", "line"),
    [
        ([], "dataset: has no images"),
        ([(pixels(1)[0], 1), (pixels(1)[0], "a")], "dataset: its labels have no order"),
        ([(pixels(1)[0], 1), (pixels(1, shape=(1, 6, 6))[0], 1)], "dataset[1]: images of (1, 6, 5)"),
        ([(pixels(1)[0], 1), (pixels(1)[0].float(), 1)], "dataset[1]: images of (1, 6, 5) torch.uint8"),
        ([(torch.zeros(6, 5), 1)], "dataset[0]: a tensor of torch.float32, shape (6, 5)"),
        ([(torch.zeros(1, 6, 5, dtype=torch.int64), 1)], "dataset[0]: a tensor of torch.int64"),
        ([(pixels(1)[0], torch.eye(3)[1])], "dataset[0]: a label of several numbers; give one number"),
        ([(pixels(1)[0], np.eye(3)[1])], "dataset[0]: a label of several numbers; give one number"),
        ([(pixels(1)[0], [0, 1, 0])], "dataset[0]: a label of several numbers; give one number"),
        ([(Image.fromarray(np.zeros((6, 5), np.dtype(">u2"))), 1)], "dataset[0]: a tensor of torch.uint16"),
        ([("a.png", 1)], "dataset[0]: a str of <U5, shape ()"),
    ],
)
def test_what_makes_no_tasks_is_one_line(dataset, line):
    with pytest.raises(fewshot.UserError) as error:
        split_of(dataset)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_both_engines_take_any_module_and_agree():
    dataset = TensorDataset(pixels(60, shape=(1, 9, 9)), torch.arange(6).repeat(10))
    tasks = fewshot.TaskSampler(dataset, ways=4, shots=1, queries=3)(0, 3)
    tasks = type(tasks)(*(field.double() if field.is_floating_point() else field for field in tasks))
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(196, 10))
    network = fewshot.network_from_module(module, channels=1, size=9, ways=4).double()
    for zeroing in (False, True):
        loop, results = fewshot.InnerLoop(2, 0.1, first_order=False, zeroing=zeroing), []
        for meta_gradient in (fewshot.meta_gradient, sequential.meta_gradient):
            network.zero_grad()
            meta_gradient(network, tasks, loop)
            results.append(gradients(network))
        for name, gradient in results[0].items():
            torch.testing.assert_close(gradient, results[1][name], rtol=1e-9, atol=1e-12)
