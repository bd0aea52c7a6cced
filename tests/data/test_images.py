"""What becomes of the pixels of files that cameras, scanners and other programs wrote."""

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image, ImageCms, PngImagePlugin

from fewshot.config.check import check
from fewshot.config.tree import settings
from fewshot.data import images
from fewshot.data.images import decode
from fewshot.data.sources import folder
from fewshot.errors import UserError, shown
from fewshot.training.resume import refuse_difference

KNOBS = {"size": 16, "channels": 3, "resample": Image.Resampling.BILINEAR}
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/">nothing</x:xmpmeta>'


def save(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(size=16):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def load(root, tmp_path, **knobs):
    usual = {"size": 16, "channels": 3, "cache": str(tmp_path / "cache")}
    return folder.load(root=str(root), **(usual | knobs))


@pytest.fixture
def root(tmp_path):
    for number, place in enumerate(("train/a", "val/b", "test/c")):
        (tmp_path / "photos" / place).mkdir(parents=True)
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / "photos" / place / "1.png")
    return tmp_path / "photos"


# Side information


def exif_of_a_broken_camera():
    """Orientation 6, and an XResolution of type ASCII."""
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHI4s", 0x011A, 2, 4, b"72 \0")
    return b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + entries + bytes(4)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_resolution_of_a_wrong_type_does_not_stop_a_photo(kind):
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[0:2] = 255  # a white line on top, of a photo that was taken with the camera on its side
    image = decode(save(Image.fromarray(pixels), kind, exif=exif_of_a_broken_camera(), quality=95), **KNOBS)
    assert image[:, :, -1].min() > 240 and image[:, :, 0].max() < 15


def side_parts(data):
    """Where the contents of a file's side information begin and end, and where a checksum over them begins."""
    if data[:4] == b"\x89PNG":
        place = 8
        while place < len(data):
            end = place + 8 + struct.unpack_from(">I", data, place)[0]
            if data[place + 4 : place + 8] not in (b"IHDR", b"IDAT", b"IEND"):
                yield place + 8, end, place + 4
            place = end + 4
    elif data[:2] == b"\xff\xd8":
        place = 2
        while data[place + 1] != 0xDA:
            end = place + 2 + struct.unpack_from(">H", data, place + 2)[0]
            if data[place + 1] == 0xFE or 0xE1 <= data[place + 1] <= 0xED:
                yield place + 4, end, None
            place = end
    else:
        place = 12
        while place < len(data):
            end = place + 8 + struct.unpack_from("<I", data, place + 4)[0]
            if data[place : place + 4] in (b"EXIF", b"XMP ", b"ICCP"):
                yield place + 8, end, None
            place = end + end % 2


def with_all_side_information():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A], exif[0x9003] = 1, "maker", 72.0, "2020:01:01"
    exif.get_ifd(0x8769)[0x920A] = 3.5
    text = PngImagePlugin.PngInfo()
    for key, zipped in (("plain", False), ("zipped", True)):
        text.add_text(key, "text" * 100, zip=zipped)
        text.add_itxt(key, "text" * 100, zip=zipped)
    options = {"exif": exif, "icc_profile": PROFILE, "dpi": (72, 72)}
    yield save(noise(), "PNG", pnginfo=text, **options)
    jpeg = save(noise(), "JPEG", quality=95, xmp=XMP, comment=b"comment", **options)
    photoshop = b"Photoshop 3.0\x008BIM\x03\xed\x00\x00\x00\x00\x00\x10" + bytes(16)
    yield jpeg[:2] + b"\xff\xed" + struct.pack(">H", len(photoshop) + 2) + photoshop + jpeg[2:]
    yield save(noise(), "WEBP", lossless=True, xmp=XMP, **options)


def test_nothing_but_pixels_stops_an_image(recwarn):
    """Whatever bytes are in the side information, the pixels are read; broken EXIF may turn them."""
    chance = random.Random(0)
    for data in with_all_side_information():
        expected, parts = np.sort(decode(data, **KNOBS).ravel()), list(side_parts(data))
        assert len(parts) >= 3
        for _ in range(150):
            broken = bytearray(data)
            first, last, checked = chance.choice(parts)
            for _ in range(chance.choice([1, 3, 20])):
                broken[chance.randrange(first, min(last, first + 80))] = chance.choice([0, 2, 6, 255])
            if checked and chance.random() < 0.8:
                broken[last : last + 4] = struct.pack(">I", zlib.crc32(broken[checked:last]))
            assert np.array_equal(np.sort(decode(bytes(broken), **KNOBS).ravel()), expected), bytes(broken)


@pytest.mark.parametrize("tail", [b"", b"\n", b"\0\0", b"\xff" * 100])  # after the end
@pytest.mark.parametrize("where", ["before", "after"])
def test_a_text_that_unpacks_to_a_flood_does_not_stop_an_image(where, tail):
    data = save(noise(), "PNG")
    body = b"zTXt" + b"key\0\0" + zlib.compress(bytes(2 * 10**6))
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    place = 33 if where == "before" else len(data) - 12
    assert np.array_equal(decode(data[:place] + chunk + data[place:] + tail, **KNOBS), decode(data, **KNOBS))


@pytest.mark.parametrize("tag", [270, 271, 282, 305])
def test_side_information_of_a_tiff_does_not_stop_it(tag, recwarn):
    data = bytearray(save(noise(), "TIFF", dpi=(72, 72), description="long enough a text", software="a program's name"))
    place = struct.unpack_from("<I", data, 4)[0]
    entries = range(place + 2, place + 2 + 12 * struct.unpack_from("<H", data, place)[0], 12)
    for entry in entries:
        if struct.unpack_from("<H", data, entry)[0] in (tag, 271):
            struct.pack_into("<HII", data, entry + 2, 2, 2**31, 2**32 - 1)
    assert np.array_equal(decode(bytes(data), **KNOBS)[:, 3, 3], np.asarray(noise())[3, 3])


def test_a_warning_of_pillow_names_the_file_once(root, tmp_path, caplog, recwarn):
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 1) + struct.pack(">HHII", 0x010F, 2, 50, 9999)
    for name in ("2", "3"):
        noise(16 + int(name)).save(root / "train" / "a" / f"{name}.jpg", exif=exif)
    load(root, tmp_path)
    lines = [record.getMessage() for record in caplog.records if "Pillow" in record.getMessage()]
    assert all(line.startswith("train/a/2.jpg: is read, but Pillow warns: ") for line in lines) and not recwarn.list
    assert ["Skipping tag 271" in line for line in lines].count(True) == 1 and len(set(lines)) == len(lines)


# White


def tiff(bits, data, kind=1, photometric=1):
    """Two by two pixels."""
    tags = {256: 2, 257: 2, 258: bits, 259: 1, 262: photometric, 273: 134, 277: 1, 278: 2, 279: len(data), 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (256, 257, 273, 279) else 3, 1, tags[tag]) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (tiff(16, struct.pack("<4H", 0, 100 * 257, 200 * 257, 65535)), [0, 100, 200, 255]),
        (tiff(16, struct.pack("<4H", 0, 100 * 257, 200 * 257, 65535), photometric=0), [255, 155, 55, 0]),
        (tiff(12, bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x00])), [0, 128, 255, 0]),
        (b"P5 2 2 1023\n" + struct.pack(">4H", 0, 401, 802, 1023), [0, 100, 200, 255]),
    ],
    ids=["16 bits", "16 bits, zero is white", "12 bits", "PGM up to 1023"],
)
def test_white_is_what_the_file_says(data, expected):
    assert decode(data, **(KNOBS | {"size": 2, "channels": 1})).ravel().tolist() == expected


@pytest.mark.parametrize("values", [(0, 1, 100, 255), (0, 1, 40000, 65535), (0, 1, 100, 2**31)])
@pytest.mark.parametrize("kind", [1, 2, 3], ids=["unsigned", "signed", "fractions"])
def test_white_is_never_guessed_from_the_pixels(values, kind):
    with pytest.raises(ValueError, match="no agreed white: save it with 8 or 16 bits"):
        decode(tiff(32, struct.pack("<4I", *values), kind), **KNOBS)


def png(bits, colour, rows, transparent):
    """Two by two pixels; colour: 0 for grey, 2 for red, green and blue."""
    parts = {b"IHDR": struct.pack(">IIBBBBB", 2, 2, bits, colour, 0, 0, 0), b"tRNS": transparent}
    parts |= {b"IDAT": zlib.compress(b"".join(b"\0" + row for row in rows)), b"IEND": b""}
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts.items())
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(2, 0, [b"\x10", b"\x90"], struct.pack(">H", 1)), [0, 255, 170, 255]),
        (png(4, 0, [b"\x07", b"\x87"], struct.pack(">H", 7)), [0, 255, 136, 255]),
        (png(8, 0, [b"\x00\x07", b"\x88\x07"], struct.pack(">H", 7)), [0, 255, 136, 255]),
        (png(16, 0, [b"\x88\x88\0\0", b"\0\1\0\0"], struct.pack(">H", 0)), [136, 255, 0, 255]),
        (png(16, 2, [bytes(6) + b"\x12\x34" * 3, b"\x88" * 6 + bytes(6)], b"\x12\x34" * 3), [0, 255, 136, 0]),
    ],
    ids=["2 bits", "4 bits", "8 bits", "16 bits", "16 bits, colour"],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_grey_or_the_colour_that_a_png_calls_transparent_shows_white(data, expected, channels):
    assert decode(data, **(KNOBS | {"size": 2, "channels": channels}))[0].ravel().tolist() == expected


def test_a_tiff_in_lab_is_read_in_grey_as_in_colour():
    data = save(Image.new("LAB", (16, 16), (200, 128, 128)), "TIFF")
    grey, colour = (decode(data, **(KNOBS | {"channels": channels})) for channels in (1, 3))
    assert np.array_equal(grey[0], colour[0]) and 180 < grey[0, 0, 0] < 210


# Large ones


def test_a_photo_of_a_hundred_megapixels_is_reduced_while_it_is_decoded(monkeypatch):
    data = save(Image.linear_gradient("L").resize((12000, 9000)), "JPEG", quality=50)
    sizes = []
    monkeypatch.setattr(images, "upright", lambda image: sizes.append(image.size) or image)
    image = decode(data, **KNOBS)
    assert sizes == [(1500, 1125)]
    assert np.abs(image[0].mean(axis=1) - np.linspace(8, 247, 16)).max() < 2


def test_an_image_above_the_limit_is_refused_by_the_knobs_name(root, tmp_path):
    Image.new("L", (1001, 1000)).save(root / "train" / "a" / "2.png")
    assert load(root, tmp_path, largest_image=2)["train"].counts.tolist() == [2]
    with pytest.raises(UserError, match=r"'train/a/2\.png': its 1,001,000 pixels are more than .*largest_image=1 mil"):
        load(root, tmp_path, cache=str(tmp_path / "other"), largest_image=1)
    assert Image.MAX_IMAGE_PIXELS == images.REDUCED_ABOVE


def test_the_limit_is_the_yamls_and_checked(config):
    cfg = config("dataset=folder", "dataset.root=x")
    assert cfg.dataset.largest_image == images.LARGEST_IMAGE
    check(cfg)
    for knob, wrong in [("largest_image", wrong) for wrong in (0, 1001, None, "many", 1.5)] + [("labels", 5)]:
        changed = OmegaConf.merge(cfg, {"dataset": {knob: wrong}})
        with pytest.raises(UserError, match=rf"^dataset\.{knob}={shown(wrong)}: "):
            check(changed)


def test_a_run_from_before_these_knobs_goes_on(config):
    cfg = config("dataset=folder", "dataset.root=x")
    before = settings(cfg)
    del before["dataset"]["largest_image"], before["dataset"]["labels"]
    refuse_difference(cfg, before, Path("last.ckpt"))


# HEIC


def test_heic_is_read(root, tmp_path):
    pytest.importorskip("pillow_heif")
    images.formats()
    Image.new("RGB", (64, 48), (200, 30, 90)).save(root / "train" / "a" / "2.HEIC", "HEIF", quality=95)
    image = load(root, tmp_path)["train"].images[1]
    assert np.abs(image.numpy().mean(axis=(1, 2)) - [200, 30, 90]).max() < 4


def test_a_cache_from_before_pillow_heif_was_installed_is_not_used_afterwards(root, tmp_path, monkeypatch):
    pytest.importorskip("pillow_heif")
    images.formats()
    noise().save(root / "train" / "a" / "2.HEIC", "HEIF")
    for installed in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(images, "formats", images.formats if installed else lambda: ("PNG",))
            assert load(root, tmp_path)["train"].counts.tolist() == [1 + installed]


def test_what_is_left_out_is_counted(root, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(images, "formats", lambda: ("PNG",))  # as without pillow-heif
    (root / "train" / "x").mkdir()
    for name in (
        "train/x/1.heic",
        "train/x/2.HEIC",
        "val/b/notes.txt",
        "val/b/Makefile",
        "test/2.png",
        "val/b/.hidden",
    ):
        (root / name).touch()
    with pytest.raises(UserError, match="no images in train/x"):
        load(root, tmp_path)
    [line] = [record.getMessage() for record in caplog.records]
    assert line == (
        f"dataset.root={root}: 5 files are left out, no images by their names or in no class: "
        "2 .heic, 1 .png, 1 without ending, 1 .txt; "
        "HEIC needs pillow-heif; uv sync --extra heic, or pip install pillow-heif"
    )
