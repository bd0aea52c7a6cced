"""What a picture's file says besides its pixels: EXIF, XMP, colour profiles, text. None of it may stop a picture."""

import struct
import zlib
from contextlib import suppress

from PIL import ExifTags, Image

# What makes the pixels.
PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT"}
JPEG_LEFT_OUT = {0xFE, *range(0xE2, 0xEE), 0xEF}  # comments; of the APPn those that are not JFIF, EXIF, XMP or Adobe
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


def upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation shows it, of which nothing but the number is read."""
    image.load()  # a PNG's EXIF may come after its pixels
    turn = None
    with suppress(Exception):  # whatever broken EXIF makes of Pillow's reader
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return image if turn is None else image.transpose(turn)


def without_side_information(data: bytes) -> bytes:
    """The file less all that does not make its pixels; of a format other than PNG, JPEG and TIFF as it is."""
    with suppress(struct.error, IndexError):
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _bare_png(data)
        if data.startswith(b"\xff\xd8\xff"):
            return _bare_jpeg(data)
        if data[:4] in (b"II*\0", b"MM\0*"):
            return _bare_tiff(data)
    return data


def _bare_png(data: bytes) -> bytes:
    """And its EXIF, for the orientation."""
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
    """The first picture's directory, shorter and in the same place."""
    order = "<" if data.startswith(b"II") else ">"
    (place,) = struct.unpack_from(f"{order}I", data, 4)
    (number,) = struct.unpack_from(f"{order}H", data, place)
    entries = [data[first : first + 12] for first in range(place + 2, place + 2 + 12 * number, 12)]
    kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in TIFF_TAGS]
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:place] + directory + data[place + len(directory) :]
