"""Files of datasets as others publish them, made small, and a server that has them."""

import hashlib
import http.server
import io
import pickle
import struct
import tarfile
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR100, Flowers102

from fewshot.data.sources import cifar, fine_grained

MINI = {"train": 3, "val": 1, "test": 2}
MODES = {"train": "train", "val": "validation", "test": "test"}  # in learn2learn's words

COARSE = list(cifar.FACTS["superclasses"])
FINE = sorted(label for labels in cifar.FACTS["superclasses"].values() for label in labels)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Knows Range, as servers of large files do; writes down what was asked for."""

    def do_GET(self):
        server, path = self.server, Path(self.translate_path(self.path))
        server.asked.append(self.headers["Range"])
        if not path.is_file():
            self.send_error(404)
            return
        content, first = path.read_bytes(), 0
        if server.ranges and self.headers["Range"]:
            first = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if first >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        stop = server.breaks.pop(0) if server.breaks else len(content)
        self.wfile.write(content[first:stop])

    def log_message(self, *args):
        pass


@contextmanager
def serving(folder):
    """A server of the files in a folder. breaks: before which byte it hangs up, one for each request to come."""
    handler = lambda *args: Handler(*args, directory=str(folder))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked, server.breaks, server.ranges = [], [], True
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def python2(value):
    """A pickle of protocol 2 as Python 2 and its numpy wrote it, less the first and last bytes."""
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(key) + python2(value[key]) for key in value) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    uint8 = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = b"(" + b"".join(map(python2, value.shape)) + b"t"
    return empty + b"(K\x01" + shape + uint8 + b"\x89" + python2(value.tobytes()) + b"tb"


def picture(label, number):
    """(3, 32, 32): the class in red, the row in green, the image's number in blue."""
    pixels = np.empty((3, 32, 32), dtype=np.uint8)
    pixels[0], pixels[1], pixels[2] = label, np.arange(32)[:, None], number
    return pixels


def batch(numbers):
    """Images of every class, mixed."""
    coarse = {fine: COARSE.index(kind) for kind, labels in cifar.FACTS["superclasses"].items() for fine in labels}
    images = [
        (label, number) for number in numbers for label in np.random.default_rng(number).permutation(100).tolist()
    ]
    return {
        "filenames": [f"{FINE[label]}_s_{number:06d}.png" for label, number in images],
        "batch_label": "training batch 1 of 1",
        "fine_labels": [label for label, _ in images],
        "coarse_labels": [coarse[FINE[label]] for label, _ in images],
        "data": np.stack([picture(*image) for image in images]).reshape(len(images), 3072),
    }


def make_cifar100(folder, monkeypatch, train=(0, 1), test=(2,)):
    """The archive and what is in it, small; torchvision is made to know its checksums."""
    contents = {
        "train": batch(train),
        "test": batch(test),
        "meta": {"fine_label_names": FINE, "coarse_label_names": COARSE},
    }
    base = folder / CIFAR100.base_folder
    base.mkdir(parents=True)
    for name, content in contents.items():
        (base / name).write_bytes(b"\x80\x02" + python2(content) + b".")
    with tarfile.open(folder / CIFAR100.filename, "w:gz", compresslevel=1) as archive:
        archive.add(base, CIFAR100.base_folder)
    know(folder, monkeypatch)
    return folder / CIFAR100.filename


def know(folder, monkeypatch):
    def md5(path):
        return hashlib.md5(path.read_bytes()).hexdigest()

    base = folder / CIFAR100.base_folder
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(folder / CIFAR100.filename))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", md5(base / "train")]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", md5(base / "test")]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": md5(base / "meta")})


def make_mini(folder, classes=MINI, images=2, protocol=2):
    """The pickles, the images of the classes mixed."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, count in classes.items():
        place = random.permutation(count * images)
        labels = [f"n{random.integers(10**8):08d}" for _ in range(count)]
        data = {
            "image_data": random.integers(0, 256, (count * images, 84, 84, 3), dtype=np.uint8),
            "class_dict": {label: place[number::count].tolist() for number, label in enumerate(labels)},
        }
        (folder / f"mini-imagenet-cache-{MODES[split]}.pkl").write_bytes(pickle.dumps(data, protocol))
    return folder


def make_tiered(folder, classes=MINI, images=2, prefix=""):
    """Ren et al.'s: PNG files as OpenCV encodes them, (bytes, 1) arrays; labels as arrays, and their names."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, count in classes.items():
        numbers = random.permutation(np.arange(count * images, dtype=np.int32) % count)
        files = []
        for _ in numbers:
            buffer = io.BytesIO()
            pixels = (
                random.integers(0, 256, (84, 84, 3), dtype=np.uint8) if count < 50 else np.zeros((84, 84, 3), np.uint8)
            )
            Image.fromarray(pixels).save(buffer, "PNG")
            files.append(np.frombuffer(buffer.getvalue(), dtype=np.uint8).reshape(-1, 1))
        labels = {
            "label_specific": numbers,
            "label_general": numbers // 2,
            "label_specific_str": ["crane"] * count,  # two of ImageNet's classes are called so
            "label_general_str": ["bird", "machine"],
        }
        (folder / f"{prefix}{split}_images_png.pkl").write_bytes(pickle.dumps(files, 4))
        (folder / f"{prefix}{split}_labels.pkl").write_bytes(pickle.dumps(labels, 2))
    return folder


def make_fine_grained(name, folder, monkeypatch, images=2):
    """As their publishers pack them: few images, but of every class; the program is made to know how many."""
    name = "cub" if name == "minicub" else name
    root = folder / fine_grained.HOLDS[name][1]
    if name == "flowers":
        labels = sorted(range(1, 103), key=lambda label: label % 7) * images
        files = {f"jpg/image_{number:05d}.jpg": label for number, label in enumerate(labels, 1)}
        root.mkdir(parents=True)
        savemat(root / "imagelabels.mat", {"labels": np.array([labels], dtype=np.uint8)})
        md5 = hashlib.md5((root / "imagelabels.mat").read_bytes()).hexdigest()
        monkeypatch.setitem(Flowers102._file_dict, "label", ("imagelabels.mat", md5))
    elif name == "aircraft":
        facts = fine_grained.FACTS["aircraft"]
        variants = [label for labels in facts.values() for label in labels]
        names = [(label, number) for number in range(images) for label in variants]
        files = {f"data/images/{place:07d}.jpg": place % 100 for place in range(len(names))}
        (root / "data").mkdir(parents=True)
        lines = [f"{place:07d} {label}\n" for place, (label, _) in enumerate(names)]
        half = len(lines) // 2
        (root / "data" / "images_variant_trainval.txt").write_text("".join(lines[:half]))
        (root / "data" / "images_variant_test.txt").write_text("".join(lines[half:]))
        boxes = [f"{place:07d} 10 4 50 24\n" for place in range(len(lines))]
        (root / "data" / "images_box.txt").write_text("".join(boxes))
    else:
        birds = [f"{number:03d}.Bird_{number}" for number in range(1, 201)]
        textures = [label for labels in fine_grained.FACTS["dtd"].values() for label in labels]
        labels = enumerate(birds if name == "cub" else textures)
        files = {f"images/{label}/{number}.jpg": place for place, label in labels for number in range(images)}
    for file, label in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((30, 60, 3), label, dtype=np.uint8)
        if name == "aircraft":  # what its box holds
            pixels[4:24, 10:50] = 255 - label
        Image.fromarray(pixels).save(root / file, quality=95)
    monkeypatch.setitem(fine_grained.FACTS["images"], name, len(files))
    return root


def make_huggingface(folder, splits, number=2):
    """As Dataset.save_to_disk writes it; splits: {name: its classes}, each with so many images of one colour each."""
    datasets = pytest.importorskip("datasets")
    names = sorted({label for labels in splits.values() for label in labels})
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    saved = datasets.DatasetDict()
    for place, (split, labels) in enumerate(splits.items()):
        labels = [label for label in labels for _ in range(number)]
        pixels = np.random.default_rng(place).integers(0, 256, (len(labels), 1, 1, 3), np.uint8)
        images = [Image.fromarray(image) for image in np.tile(pixels, (1, 9, 12, 1))]
        saved[split] = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    saved.save_to_disk(folder)
    return folder
