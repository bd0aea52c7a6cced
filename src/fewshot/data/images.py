"""Image files -> arrays: decoded, turned the right way up, cut to a square and resized.

Shapes: C x H x W one image.
"""

import functools
import io
import logging
import os
import re
import struct
import threading
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

from fewshot.data.cache import LazySplit
from fewshot.data.folder_or_zip import Source
from fewshot.errors import UserError, first_few, of_extra, one_line

log = logging.getLogger(__name__)

# Megapixels: what phones take has no more. conf/dataset/folder.yaml has it as dataset.largest_image.
LARGEST_IMAGE = 200
# Pixels: a JPEG with more is reduced while it is decoded. One with fewer is not, because that changes its pixels.
REDUCED_ABOVE = 89_478_485
# Pillow opens these by starting another program, or only recognises them.
NOT_PICTURES = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
HEIC = (".heic", ".heif", ".hif")
NOT_EVERYWHERE = (*HEIC, ".avif")  # whether these are images depends on what is installed
# The PNG chunks and the TIFF tags that make the pixels, and the JPEG segments that do not.
PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"}
JPEG_LEFT_OUT = {0xFE, *range(0xE2, 0xEE), 0xEF}  # comments, and each APPn that is not JFIF, EXIF, XMP or Adobe
TIFF_TAGS = {*range(254, 260), 262, 266, *range(273, 275), *range(277, 280), 284, 292, 293, 317, 320}
TIFF_TAGS |= {*range(322, 326), 332, 338, 339, 347, *range(512, 522), *range(529, 533)}

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DECODING = threading.Lock()  # Pillow's limit and Python's warning filters belong to the whole process

Made = TypeVar("Made")


@functools.cache
def formats() -> tuple[str, ...]:
    """The picture formats that Pillow itself decodes, and HEIC where pillow-heif is installed."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()
    return tuple(name for name in Image.ID if name not in NOT_PICTURES)


def is_image(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    decoded = formats()
    known = Image.registered_extensions()
    return not name.endswith("/") and known.get(os.path.splitext(name)[1].lower()) in decoded


def tell_left_out(where: str, source: Source, used: Collection[str]) -> None:
    """One line that counts the files of a source that are not among the `used`, if there are any."""
    rest = [name for name in source.names if name not in used and not name.endswith("/")]
    if not rest:
        return
    endings = Counter(os.path.splitext(name)[1].lower() or "without ending" for name in rest)
    counts = [f"{number} {ending}" for ending, number in endings.most_common()]
    known = not any(ending in HEIC for ending in endings) or is_image(HEIC[0])
    remedy = "" if known else f"; HEIC needs {of_extra('heic', 'pillow-heif')}"
    log.warning(
        "%s: %d file%s left out, no images by their names or in no class: %s%s",
        *(where, len(rest), "s are" if len(rest) > 1 else " is", first_few(counts, 5), remedy),
    )


def plain_classes(source: Source) -> dict[str, list[str]]:
    """The images of each class of the layout CLASS/image, which one folder may enclose; those in no folder are "".

    A folder without images is a class without images.
    """
    images = [name for name in source.names if is_image(name)]
    tops = {name.split("/")[0] for name in images if "/" in name}
    enclosed = len(tops) == 1 and all(name.count("/") != 1 for name in images)
    wrapper = f"{tops.pop()}/" if enclosed else ""
    classes = defaultdict(list)
    for name in source.names:
        label, inside, _ = name.removeprefix(wrapper).partition("/")
        if is_image(name) or (inside and label):
            classes[label if inside else ""] += [name] * is_image(name)
    return dict(classes)


def decode(
    data: bytes, *, size: int, channels: int, resample: Image.Resampling, largest_image: int | None = None
) -> np.ndarray:
    """(C, size, size) uint8: the middle square of an image file, the right way up and resized.

    largest_image: megapixels; None: LARGEST_IMAGE.
    """
    first = None
    for usable in (bytes, without_side_information):
        try:
            with _opened(usable(data), size, largest_image) as image:
                return square(image, size=size, channels=channels, resample=resample)
        except Exception as error:  # if it comes again, the side information is not the cause
            first = first or error
    raise first


@contextmanager
def _opened(data: bytes, size: int, largest_image: int | None) -> Iterator[Image.Image]:
    """An image file, decoded at a lower resolution if it is a very large JPEG."""
    limit = (largest_image or LARGEST_IMAGE) * 10**6
    with _DECODING, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, limit // 2  # Pillow refuses what is twice as large
        try:
            with Image.open(io.BytesIO(data), formats=formats()) as image:
                if image.width * image.height > REDUCED_ABOVE:
                    image.draft(None, (2 * size, 2 * size))  # only JPEG can
                _scale_transparency(image)
                yield image
        except Image.DecompressionBombError as error:
            pixels = re.search(r"\d+", str(error))
            knob = f"dataset.largest_image={largest_image}" if largest_image else LARGEST_IMAGE
            raise ValueError(f"its {int(pixels[0]) if pixels else 0:,} pixels are more than {knob} million") from None
        finally:
            Image.MAX_IMAGE_PIXELS = usual


def square(image: Image.Image, *, size: int, channels: int, resample: Image.Resampling) -> np.ndarray:
    """`decode` of an image that is open already."""
    black_and_white = _black_and_white(image)
    image = upright(image)
    if black_and_white:
        image = _eight_bits(image, *black_and_white)
    if image.has_transparency_data:  # what lies under transparent pixels is arbitrary, often black: show paper
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    if image.mode == "LAB":  # Pillow has no conversion from it to grey
        image = image.convert("RGB")
    image = image.convert("RGB" if channels == 3 else "L")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), resample, box=(left, top, left + side, top + side))
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def _black_and_white(image: Image.Image) -> tuple[int, int] | None:
    """Which numbers of a grey image of more than 8 bits are black and white, as its file says; None: it has 8 bits.

    Raises ValueError where the file does not say it.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return None
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # which Pillow scales to 65535
        raise ValueError("grey of 32 bits, below 0 or in fractions has no agreed white: save it with 8 or 16 bits")
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    most = 2 ** tags.get(BITSPERSAMPLE, (16,))[0] - 1
    return (most, 0) if tags.get(PHOTOMETRIC_INTERPRETATION) == 0 else (0, most)  # 0: zero is white


def _eight_bits(image: Image.Image, black: int, white: int) -> Image.Image:
    """Grey scaled to 8 bits; Pillow's own conversion would cut 16-bit grey off at 255."""
    span, numbers = abs(white - black), np.asarray(image).astype(np.int32)
    values = np.minimum(np.abs(numbers - black), span)
    grey = Image.fromarray(((values * 255 + span // 2) // span).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(numbers == transparent, 0, 255).astype(np.uint8))))


def _scale_transparency(image: Image.Image) -> None:
    """Scales the transparent grey or colour of a PNG to 8 bits, to which Pillow scales only the pixels."""
    tiles: Any = getattr(image, "tile", ())
    raw, transparent = tiles[0][3] if tiles else None, image.info.get("transparency")
    if transparent is not None and raw in ("L;2", "L;4"):
        image.info["transparency"] = transparent * (85 if raw == "L;2" else 17)
    elif transparent is not None and raw == "RGB;16B":
        image.info["transparency"] = tuple(number >> 8 for number in transparent)


def read_splits(
    classes: Mapping[str, Mapping[str, list[tuple[Source, str]]]],
    *,
    size: int,
    channels: int,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
    largest_image: int | None = None,
) -> dict[str, LazySplit]:
    """The splits whose classes are lists of files; a file is read, or a UserError raised, when its image is due."""
    make = functools.partial(decode, size=size, channels=channels, resample=resample, largest_image=largest_image)
    files = [file for members in classes.values() for images in members.values() for file in images]
    log.info("reading %d images", len(files))
    images, splits = _read_images(files, make), {}
    for split, members in classes.items():  # the cache takes their images in this order
        counts = [len(part) for part in members.values()]
        names = [name for part in members.values() for _, name in part]
        splits[split] = LazySplit(islice(images, len(names)), counts, tuple(members), names)
    return splits


def _read_images(files: list[tuple[Source, str]], make: Callable[[bytes], np.ndarray]) -> Iterator[np.ndarray]:
    """The images of the files. If one cannot be read, all after it are tried, so that one error names all."""
    told: set[str] = set()
    tried = ((file, try_image(*file, make, told)) for file in files)
    for (source, name), image in tried:
        if isinstance(image, str):
            rest = [(name, reason) for (_, name), reason in tried if isinstance(reason, str)]
            broken = [f"{name!r}: {reason}" for name, reason in [(name, image), *rest]]
            number, remedy = (f"{len(broken)} images: ", "them") if rest else ("image ", "it")
            raise UserError(
                f"dataset.root={source.root}: cannot read {number}{first_few(broken)}; replace or remove {remedy}"
            )
        yield image


def try_image(source: Source, name: str, make: Callable[[bytes], Made], told: set[str]) -> Made | str:
    """What `make` makes of a file's bytes, or why they cannot be read.

    A warning of Pillow is logged once, with the file's name; `told` holds the warnings that were logged.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = make(source.read(name))
    except Exception as error:  # Pillow's decoders raise nearly every kind on broken data
        return unreadable(error)
    texts = [str(warning.message) for warning in caught if not issubclass(warning.category, DeprecationWarning)]
    for text in dict.fromkeys(" ".join(text.split()) for text in texts):
        if (kind := re.sub(r"\d+", "0", text)) not in told:
            told.add(kind)
            log.warning("%s: is read, but Pillow warns: %s (not told again of other images)", name, text)
    return made


def unreadable(error: Exception) -> str:
    """Why an image cannot be read, in a line."""
    if isinstance(error, UnidentifiedImageError):  # its own text names a memory address
        return "not an image in a format that Pillow knows"
    return one_line(getattr(error, "strerror", None) or error) or type(error).__name__


# What a picture's file says besides its pixels: EXIF, XMP, colour profiles, text. None of it may stop a picture.


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; nothing else of the EXIF is read."""
    image.load()  # a PNG's EXIF may come after its pixels
    turn = None
    with suppress(Exception):  # whatever broken EXIF makes of Pillow's reader
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def without_side_information(data: bytes) -> bytes:
    """A PNG, JPEG or TIFF without what does not make its pixels; any other file as it is."""
    with suppress(struct.error, IndexError):
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _bare_png(data)
        if data.startswith(b"\xff\xd8\xff"):
            return _bare_jpeg(data)
        if data[:4] in (b"II*\0", b"MM\0*"):
            return _bare_tiff(data)
    return data


def _bare_png(data: bytes) -> bytes:
    """The chunks that make the pixels, and the EXIF for its orientation."""
    kept, place = [data[:8]], 8
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 12 + length
        kind = data[place + 4 : place + 8]
        if kind == b"eXIf":  # whatever it holds, its checksum is right
            kept.append(data[place : end - 4] + struct.pack(">I", zlib.crc32(data[place + 4 : end - 4])))
        elif kind in PNG_CHUNKS:
            kept.append(data[place:end])
        if kind == b"IEND":  # whatever follows is no chunk
            break
        place = end
    return b"".join(kept)


def _bare_jpeg(data: bytes) -> bytes:
    kept, place = [data[:2]], 2
    while data[place] == 0xFF and data[place + 1] != 0xDA:  # the scan begins
        marker, (length,) = data[place + 1], struct.unpack_from(">H", data, place + 2)
        if marker not in JPEG_LEFT_OUT:
            kept.append(data[place : place + 2 + length])
        place += 2 + length
    return b"".join([*kept, data[place:]])


def _bare_tiff(data: bytes) -> bytes:
    """The directory of the first picture becomes shorter and stays in its place."""
    order = "<" if data.startswith(b"II") else ">"
    (place,) = struct.unpack_from(f"{order}I", data, 4)
    (number,) = struct.unpack_from(f"{order}H", data, place)
    entries = [data[first : first + 12] for first in range(place + 2, place + 2 + 12 * number, 12)]
    kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in TIFF_TAGS]
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:place] + directory + data[place + len(directory) :]
