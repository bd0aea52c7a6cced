"""Folders and zips as other systems and programs make them, and as nobody should."""

import fcntl
import io
import os
import random
import resource
import shutil
import socket
import sys
import unicodedata
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fewshot.data import folder_or_zip
from fewshot.data.folder_or_zip import canonical, open_source
from fewshot.data.sources import folder, imagenet
from fewshot.errors import UserError
from fewshot.predict.__main__ import main

FRACTIONS = {"train": 0.64, "val": 0.16, "test": 0.2}
COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def png(colour, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(colour).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


FILES = {
    f"{split}/{label}/{number}.png": png(10 * place + number)
    for place, (split, label) in enumerate((("train", COMPOSED), ("train", "dog"), ("val", "cow"), ("test", "pig")))
    for number in (1, 2)
}
PLAIN = {f"{label}/{number}.png": png(10 * place + number) for place, label in enumerate("abcdefgh") for number in (1,)}


def write(root, files=FILES):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def zipped(path, files=FILES, method=zipfile.ZIP_DEFLATED, flag=0x800):
    """As a program writes them that sets, or does not set, the bit for names in UTF-8."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, method
            archive.writestr(info, data)
    data = path.read_bytes()
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # flags in the headers of members and in the directory
        parts = data.split(mark)
        flags = [part[: place - 4] + (flag | (part[place - 4] & ~0x800)).to_bytes(2, "little") for part in parts[1:]]
        data = parts[0] + b"".join(mark + new + part[place - 2 :] for new, part in zip(flags, parts[1:], strict=True))
    path.write_bytes(data)
    return path


@pytest.fixture
def load(tmp_path):
    def load(root, **knobs):
        usual = {"size": 8, "channels": 3, "cache": str(tmp_path / "cache"), "fractions": FRACTIONS}
        return folder.load(root=str(root), **(usual | knobs))

    return load


def signature(splits):
    return {name: (split.names, split.offsets.tolist(), split.sha256) for name, split in splits.items()}


# One form


def test_a_zip_that_does_not_say_its_names_are_utf8_is_the_folder_it_was_made_of(tmp_path, load):
    expected = signature(load(write(tmp_path / "photos")))
    assert expected["train"][0] == (COMPOSED, "dog")
    for flag in (0, 0x800):
        for form in ("NFC", "NFD"):
            files = {unicodedata.normalize(form, name): data for name, data in FILES.items()}
            assert signature(load(zipped(tmp_path / f"{flag}{form}.zip", files, flag=flag))) == expected
    decomposed = {unicodedata.normalize("NFD", name): data for name, data in FILES.items()}
    assert signature(load(write(tmp_path / "from a Mac", decomposed))) == expected


def test_a_zip_in_code_page_437_stays_one(tmp_path, load):
    path = tmp_path / "old.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in FILES.items():
            archive.writestr(name.replace("\u00e9", "\u00e9".encode("cp437").decode("latin1")), data)
    data = path.read_bytes().replace("\u0082".encode(), b"\x82\x82").replace(b"PK\3\4\x14\0\0\x08", b"PK\3\4\x14\0\0\0")
    path.write_bytes(data.replace(b"PK\1\2\x14\3\x14\0\0\x08", b"PK\1\2\x14\3\x14\0\0\0"))
    assert load(path)["train"].names == ("caf\u00e9\u00e9", "dog")


@pytest.mark.parametrize("pair", [(COMPOSED, DECOMPOSED), ("Cat", "cat"), ("STRASSE", "stra\u00dfe")])
def test_one_class_in_two_splits_however_it_is_written(tmp_path, load, pair):
    files = FILES | {f"train/{pair[0]}/7.png": png(7), f"test/{pair[1]}/8.png": png(8)}
    with pytest.raises(UserError, match=r": train/ and test/ share .*; few-shot splits have classes of their own$"):
        load(write(tmp_path / "photos", files))


def test_classes_that_differ_in_capitals_are_told_where_they_are_dealt_out_to_two_splits(tmp_path, load, caplog):
    letters = {f"{label}/1.png": png(place) for place, label in enumerate("abcdefABCDEF")}
    splits = load(write(tmp_path / "letters", letters))
    assert sum(len(split.names) for split in splits.values()) == 12
    assert any("but for capitals train and " in record.getMessage() for record in caplog.records)


def test_two_files_of_one_name_are_refused(tmp_path):
    write(tmp_path / "photos", {f"train/{form}/1.png": png(1) for form in (COMPOSED, DECOMPOSED)})
    with pytest.raises(UserError, match=r"^dataset\.root=.*: 'train/.*' and 'train/.*' are one name; rename or remove"):
        open_source(tmp_path / "photos")


def test_names_are_shown_on_one_line_and_can_be_written(tmp_path):
    raw = os.fsencode(write(tmp_path / "photos", {"train/\x1b[31m\nred/1.png": png(1)})) + b"/train/caf\xe9"
    for name in (raw, raw + "\u202egnp.\u2066".encode()):  # these would turn what follows
        os.mkdir(name)
    names = open_source(tmp_path / "photos").names
    assert names[:3] == ("train/", r"train/\x1b[31m\nred/", r"train/\x1b[31m\nred/1.png")
    assert names[3:] == (r"train/caf\xe9/", r"train/caf\xe9\u202egnp.\u2066/")
    assert len(open_source(tmp_path / "photos").read(names[2])) == len(png(1))


@pytest.mark.parametrize(
    ("path", "expected"),
    [("./a//b/./1.png", "a/b/1.png"), ("a\\b\\1.png", "a/b/1.png"), ("a\\", "a/"), ("./", ""), ("a/.", "a/")],
)
def test_a_path_has_one_form(path, expected):
    assert canonical(path) == expected


@pytest.mark.parametrize("path", ["/a", "\\a", "a/../b", "..", "a\\..", "C:/a", "c:\\a", ""])
def test_a_path_that_leads_out_has_none(path):
    with pytest.raises(ValueError, match="unsafe path"):
        canonical(path)


# Packed otherwise


@pytest.mark.parametrize("begin", ["./", "./photos/", ".//photos/./"])
@pytest.mark.parametrize("files", [FILES, PLAIN], ids=["splits", "classes"])
def test_entries_that_begin_with_a_dot(tmp_path, load, begin, files):
    expected = signature(load(write(tmp_path / "photos", files)))
    path = zipped(tmp_path / "photos.zip", {"./": b""} | {begin + name: data for name, data in files.items()})
    assert signature(load(path)) == expected


@pytest.mark.parametrize("files", [FILES, PLAIN], ids=["splits", "classes"])
def test_entries_with_backslashes(tmp_path, load, files):
    expected = signature(load(write(tmp_path / "photos", files)))
    windows = {f"photos/{name}".replace("/", "\\"): data for name, data in files.items()}
    assert signature(load(zipped(tmp_path / "photos.zip", {"photos\\": b""} | windows))) == expected


def wrapped(files):
    return {f"one/two/{name}": data for name, data in files.items()}


def spelled(files):
    spellings = (("train/", "Train/"), ("val/", "Validation/"), ("test/", "TEST/"))
    return {next(name.replace(*pair) for pair in spellings if pair[0] in name): data for name, data in files.items()}


@pytest.mark.parametrize(
    ("files", "of_folder", "of_zip"),
    [
        (wrapped(FILES), "give dataset.root={root}/one/two", "make the zip anew of what is in one/two/"),
        (wrapped(PLAIN), "give dataset.root={root}/one/two", "make the zip anew of what is in one/two/"),
        (spelled(FILES), "call Train, Validation, TEST train, val and test", None),
        (wrapped(spelled(FILES)), "call Train, Validation, TEST train, val and test and give dataset.root=", None),
    ],
    ids=["splits", "classes", "spelling", "both"],
)
@pytest.mark.parametrize("fractions", [FRACTIONS, None])
def test_what_helps_is_said(tmp_path, load, files, of_folder, of_zip, fractions):
    root = write(tmp_path / "photos", files)
    for path, hint in ((root, of_folder), (zipped(tmp_path / "photos.zip", files), of_zip or of_folder[:30])):
        if fractions is None and hint.endswith("one/two") and "a/1.png" in str(files):
            continue
        with pytest.raises(UserError) as error:
            load(path, fractions=fractions)
        assert hint.format(root=root) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("make", [write, zipped])
def test_of_two_folders_with_splits_in_them_none_is_taken_in_silence(tmp_path, load, make):
    files = {f"{wrapper}/{name}": data for wrapper in ("one", "two") for name, data in FILES.items()}
    with pytest.raises(UserError, match="no classes in train/, val/, test/; it must be a folder or a zip with train"):
        load(make(tmp_path / "photos.zip", files), fractions=None)


SYSTEMS = ["@eaDir", "__MACOSX", ".ipynb_checkpoints", "$RECYCLE.BIN", "lost+found", "System Volume Information"]


@pytest.mark.parametrize("files", [FILES, PLAIN], ids=["splits", "classes"])
def test_folders_that_systems_add_are_no_classes(tmp_path, load, files, caplog):
    expected = signature(load(write(tmp_path / "photos", files)))
    below = next(iter(files)).rpartition("/")[0]
    added = {
        f"{place}{name}/1.png": b"" for name in SYSTEMS for place in ("", f"{below}/", f"{below}/1.png.d/", "train/")
    }
    added |= {f"{below}/{name}": b"" for name in (".DS_Store", "._1.png", "Thumbs.db", "desktop.ini")}
    for path in (write(tmp_path / "photos", added), zipped(tmp_path / "photos.zip", files | added)):
        assert signature(load(path)) == expected
    assert not caplog.records


# What is no file, or leads elsewhere


def of_devices(root, kind, name):
    path = root / "train" / "dog" / name
    if kind == "socket":
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's whole path must be short
        socket.socket(socket.AF_UNIX).bind(name)
        os.chdir(here)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"zero": "/dev/zero", "nowhere": "/nowhere", "itself": name}[kind])


@pytest.mark.parametrize("kind", ["pipe", "socket", "zero", "nowhere", "itself"])
def test_only_regular_files_are_read(tmp_path, load, kind):
    root = write(tmp_path / "photos")
    expected = signature(load(root))
    of_devices(root, kind, "notes.txt")
    assert signature(load(root)) == expected
    of_devices(root, kind, "9.png")
    reason = "No such file|Too many levels" if kind in ("nowhere", "itself") else "it is not a regular file"
    with pytest.raises(UserError, match=rf"^dataset\.root=.*cannot read image 'train/dog/9\.png': .*({reason})"):
        load(root)
    with pytest.raises(UserError, match=r"9\.png: neither a folder nor a regular file|no such file or folder"):
        load(root / "train" / "dog" / "9.png")


@pytest.mark.parametrize("files", [FILES, PLAIN], ids=["splits", "classes"])
@pytest.mark.parametrize("loop", [{"again": "."}, {"again": "../dog"}, {"one/two": "../two", "two/one": "../one"}])
def test_a_loop_of_links_is_one_short_line(tmp_path, load, files, loop):
    root = write(tmp_path / "photos", files)
    place = (root / next(iter(files))).parent
    place.rename(place.with_name("dog2" if (place.with_name("dog")).exists() else "dog"))
    for link, target in loop.items():
        (root / "train" / "dog" / link).parent.mkdir(parents=True, exist_ok=True)
        (place.with_name("dog") / link).parent.mkdir(parents=True, exist_ok=True)
        (place.with_name("dog") / link).symlink_to(target)
    with pytest.raises(UserError, match=r" are one folder, by a link; remove the link$") as error:
        load(root)
    assert len(str(error.value)) < 300


def test_images_by_way_of_links_are_read(tmp_path, load):
    expected = signature(load(write(tmp_path / "photos")))
    pool = tmp_path / "pool"
    (tmp_path / "photos").rename(pool)
    for split in ("train", "val", "test"):
        (tmp_path / "linked" / split).mkdir(parents=True)
        for label in (pool / split).iterdir():
            (tmp_path / "linked" / split / label.name).symlink_to(label)
    assert signature(load(tmp_path / "linked")) == expected


# Bombs


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_unpack_without_end_are_refused(tmp_path, load, method):
    bomb = bytearray(zipped(tmp_path / "bomb.zip", FILES | {"val/cow/9.png": bytes(10**7)}, method).read_bytes())
    (tmp_path / "bomb.zip").write_bytes(bomb)
    with pytest.raises(UserError, match=r"it is compressed by (bzip2|lzma); make the zip anew with .* deflate"):
        load(tmp_path / "bomb.zip")


def test_no_more_is_read_than_a_member_claims(tmp_path, load):
    data = zipped(tmp_path / "photos.zip", FILES | {"val/cow/9.png": bytes(10**7)}).read_bytes()
    for claimed in (10, 10**8):
        (tmp_path / f"{claimed}.zip").write_bytes(
            data.replace((10**7).to_bytes(4, "little"), claimed.to_bytes(4, "little"))
        )
        with pytest.raises(UserError, match=r"cannot read image 'val/cow/9\.png': \w"):
            load(tmp_path / f"{claimed}.zip")


def bytes_in_use():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


@pytest.fixture(scope="module")
def bounded():
    """No more than 4 GB on top of what is in use."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (bytes_in_use() + 4 * 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


KINDS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "TGA", "JPEG2000", "PCX", "ICO", "SGI")


def mutated(data, chance, in_place=False):
    """Some bytes changed, cut out, doubled, or all after a place gone."""
    data = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5, 20])):
        place, length = chance.randrange(len(data) + 1), chance.choice([1, 2, 4, chance.randrange(1, 200)])
        change = "change" if in_place else chance.choice(["change", "change", "change", "cut", "double", "end"])
        if change == "change":
            new = chance.choice([b"\0", b"\xff", b",", b'"', b"\n", b"/", b"\\", b"..", b"PK", chance.randbytes(1)])
            data[place : place + len(new)] = new
        else:
            data[place : None if change == "end" else place + length] = (
                data[place : place + length] * 2 * (change == "double")
            )
    return bytes(data)


def mutated_directory(data, chance):
    """Of a zip; of the bytes of its members only those of the first."""
    first = data.index(b"PK\1\2")
    return mutated(data[:60], chance, True) + data[60:first] + mutated(data[first:], chance, chance.random() < 0.9)


@settings(max_examples=250)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["image", "list", "directory"]))
@pytest.mark.slow
def test_mutated_zips_and_lists_are_read_or_refused_in_one_line(bounded, tmp_path_factory, seed, changed):
    chance, place = random.Random(seed), tmp_path_factory.mktemp("mutated")
    kinds = [chance.choice(KINDS) for _ in FILES]
    names = {name: f"{name[:-4]}.{kind.replace('JPEG2000', 'jp2')}" for name, kind in zip(FILES, kinds, strict=True)}
    files = {names[name]: png(number, kind) for number, (name, kind) in enumerate(zip(FILES, kinds, strict=True))}
    rows = [f"{file},{name.split('/')[1]},{name.split('/')[0]}" for name, file in names.items()]
    table = "\n".join(["file,label,split", *rows]).encode()
    if changed == "image":
        files |= {name: mutated(files[name], chance) for name in chance.sample(sorted(files), 2)}
    if changed == "list":
        table = mutated(table, chance)
    path = zipped(place / "photos.zip", files | {"labels.csv": table}, flag=chance.choice([0, 0x800]))
    if changed == "directory":
        path.write_bytes(mutated_directory(path.read_bytes(), chance))
    labels = "labels.csv" if changed == "list" or chance.random() < 0.2 else None
    try:
        knobs = {"size": 8, "channels": 3, "cache": str(place), "fractions": chance.choice([FRACTIONS, None])}
        folder.load(root=str(path), labels=labels, **knobs)
    except UserError as error:
        assert "\n" not in str(error) and "memory" not in str(error).lower()
    finally:
        shutil.rmtree(place)


# Lists


@pytest.mark.parametrize("columns", ["file,label,split", "split,Class,note,filename"])
def test_a_list_says_classes_and_splits(tmp_path, load, columns, caplog):
    pool = {f"pool/{place}.png": data for place, data in enumerate(FILES.values())}
    rows = []
    for (split, label, _), file in zip((name.split("/") for name in FILES), pool, strict=True):
        cells = {"file": file[5:], "filename": f"./{file[5:]}", "label": label, "Class": f" {label}", "split": split}
        rows.append(",".join(cells.get(column, "-") for column in columns.split(",")))
    table = "\ufeff" + "\r\n".join([columns, *rows, ""])  # as Excel writes it
    expected = signature(load(write(tmp_path / "photos")))
    root = write(tmp_path / "flat", pool | {"pool/labels.csv": table.encode()})
    (tmp_path / "elsewhere.csv").write_bytes(table.replace("./", "").encode())
    for path, labels in (
        (root, "pool/labels.csv"),
        (root, "labels.csv"),
        (root, "./pool/labels.csv"),
        (root, root / "pool" / "labels.csv"),
        (root / "pool", tmp_path / "elsewhere.csv"),
        (zipped(tmp_path / "flat.zip", pool | {"pool/labels.csv": table.encode()}), "labels.csv"),
    ):
        assert signature(load(path, labels=str(labels))) == expected
    [line] = [record.getMessage() for record in caplog.records]  # a list that is used is none of the files left out
    assert line.startswith(f"dataset.root={root}/pool: 1 file is left out")
    before = (root / "pool" / "labels.csv").stat()
    (root / "pool" / "labels.csv").write_text(table.replace("dog", "cat"), newline="")
    os.utime(root / "pool" / "labels.csv", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert {*load(root, labels="labels.csv")["train"].names} == {COMPOSED, "cat"}


def test_a_list_without_splits_is_dealt_out_as_folders_are(tmp_path, load):
    root = write(tmp_path / "photos", PLAIN)
    table = "label,file\n" + "".join(f"{name[0]},{name}\n" for name in reversed(PLAIN))
    (tmp_path / "labels.csv").write_text(table)
    assert signature(load(root, labels=str(tmp_path / "labels.csv"))) == signature(load(root))


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (b"", "its first row names no columns file and label"),
        (b"name;label\n", "its first row names no columns file and label"),
        (b"file,label\na/1.png\n", "line 2 has no label"),
        (b"file,label\na/1.png,a\n\n,b\n", "line 4 has no file"),
        (b"file,label\na/1.png,a\n./a/1.png,b\n", "it has ./a/1.png twice"),
        (b"file,label\na/9.png,a\n../x.png,b\n", "lacks a/9.png, ../x.png; name files as they lie in it"),
        (b"file,label\na/1.png,caf\xe9\n", "is not UTF-8"),
        (b"file;label\na/1.png;a\n", "names no columns file and label; give a CSV with columns file and label, and "),
        (b"file,label\n" + b"a" * 200000 + b",a\n", "field larger than field limit"),
        (b"file,label,split\na/1.png,a,training\n", "differs from train, val, test in 'test', 'train', 'training'"),
        (b"file,label\na/1.png,a\n", "1 classes (a); to be split"),
        (
            b"file,label,split\na/1.png,A,train\nb/1.png,B,val\nc/1.png,a,test\n",
            "train/ and test/ share A = a; few-shot",
        ),
        (None, "no such file; give a CSV with columns file and label"),
    ],
)
def test_a_list_that_cannot_be_is_one_line(tmp_path, load, table, line):
    if table is not None:
        (tmp_path / "labels.csv").write_bytes(table)
    with pytest.raises(UserError) as error:
        load(write(tmp_path / "photos", PLAIN), labels=str(tmp_path / "labels.csv"))
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_list_of_more_bytes_than_any_is_not_parsed(tmp_path, load, monkeypatch):
    monkeypatch.setattr(folder_or_zip, "LARGEST_TABLE", 30)
    (tmp_path / "labels.csv").write_text("file,label\n" + "a/1.png,a\n" * 2)
    with pytest.raises(UserError, match="it has 31 bytes, too many for a list of images; give a CSV"):
        load(write(tmp_path / "photos", PLAIN), labels=str(tmp_path / "labels.csv"))


def test_tables_of_many_classes_take_a_time_in_proportion(tmp_path, monkeypatch):
    def steps(number):
        counted = 0

        def count(frame, *_):
            nonlocal counted
            counted += "fewshot" in frame.f_code.co_filename
            return count

        names = [f"{split}{place}.jpg" for split in ("train", "val", "test") for place in range(number)]
        files = {f"images/{name}": b"" for name in names}
        for split in ("train", "val", "test"):
            rows = "".join(f"{name},{name}\n" for name in names if name.startswith(split))
            files[f"{split}.csv"] = b"\xef\xbb\xbffilename,label\n" + rows.encode()
        path = zipped(tmp_path / f"{number}.zip", files)
        classes = dict.fromkeys(("train", "val", "test"), number)
        knobs = {"classes": classes, "size": 8, "channels": 3, "trust": False, "cache": None}
        before = sys.gettrace()  # of a debugger, or of what measures the coverage of these tests
        sys.settrace(count)
        try:
            assert imagenet.miniimagenet(root=str(path), **knobs) is None
        finally:
            sys.settrace(before)
        return counted

    monkeypatch.setattr(imagenet, "cached", lambda *_, **__: None)
    assert steps(400) < 3 * steps(200)


# The cache


@pytest.mark.parametrize("make", [write, lambda root, files: zipped(root, files, zipfile.ZIP_STORED)])
def test_other_pixels_in_as_many_bytes_are_noticed(tmp_path, load, make):
    before, after = ({name: png(colour + place, "BMP") for place, name in enumerate(FILES)} for colour in (0, 9))
    files = [{name.replace("png", "bmp"): data for name, data in photos.items()} for photos in (before, after)]
    sums = []
    for number, content in enumerate(files):
        root = make(tmp_path / "photos", content)
        for path in (root, *root.rglob("*.bmp")):
            os.utime(path, (10**9 + number, 10**9 + number))
        sums.append(load(root)["train"].sha256)
    assert sums[0] != sums[1]


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path, load):
    (tmp_path / "cache").mkdir()
    files = ("v3", ".bin"), ("v4", "-train.npy")
    names = [f".folder-8x8x3-{version}-{'0' * 16}{end}.{'a' * 32}.part" for version, end in files]
    for name in (*names, "mine.part"):
        (tmp_path / "cache" / name).write_bytes(b"half")
    with open(tmp_path / "cache" / names[1], "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # that one is still being written
        load(write(tmp_path / "photos"))
    left = {path.name for path in (tmp_path / "cache").iterdir() if path.suffix == ".part"}
    assert left == {names[1], "mine.part"}


# Predict


def test_predict_takes_and_refuses_the_same(tmp_path, monkeypatch):
    """As far as it gets without a checkpoint that can be read: then its line is of the checkpoint."""
    monkeypatch.chdir(tmp_path)
    support = {f"{COMPOSED}/1.png": png(1), "dog/1.png": png(2), "@eaDir/1.png": b"", "dog/notes.txt": b""}
    zipped(tmp_path / "good.zip", {f"./{name}": data for name, data in support.items()}, flag=0)
    write(tmp_path / "loop", support)
    (tmp_path / "loop" / "dog" / "again").symlink_to(".")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "checkpoint").write_bytes(b"none")
    (tmp_path / "bytes" / "dog").mkdir(parents=True)
    os.mkdir(os.fsencode(tmp_path / "bytes") + b"/caf\xe9")
    for name, line in {
        "bytes": r"support=bytes: no images in 'caf\\xe9'",
        "good.zip": "model=checkpoint: cannot be read",
        "loop": "support=loop: dog/ and dog/again/ are one folder",
        "pipe": "support=pipe: neither a folder nor a regular file",
    }.items():
        with pytest.raises(SystemExit) as stop:
            main(["checkpoint=checkpoint", f"support={name}", "query=good.zip"])
        assert str(stop.value.code).startswith(line) and "\n" not in str(stop.value.code)
