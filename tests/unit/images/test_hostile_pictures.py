"""Damaged and malicious files: a picture or ImageError, soon, in small memory, and without a word on stderr."""

import io
import struct
import sys
import threading
import tracemalloc
import warnings
import zlib
from types import FrameType

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemkit.errors import ImageError
from gemkit.images import Limits, Picture, read

QUICK = settings(max_examples=400)
NOISE = np.random.default_rng(0).integers(0, 256, (9, 12, 4), np.uint8)


def file_of(format: str, pixels: np.ndarray = NOISE, **options) -> bytes:
    image = PIL.Image.fromarray(pixels)
    file = io.BytesIO()
    (image.convert("RGB") if format in ("JPEG", "BMP") else image).save(file, format, **options)
    return file.getvalue()


def exif() -> PIL.Image.Exif:
    found = PIL.Image.Exif()
    found[0x0112], found[0x010E] = 6, "a description"
    return found


FILES = {
    "PNG": file_of("PNG", exif=exif()),
    "palette PNG": file_of("PNG", NOISE[:, :, 0] % 4 * 80, bits=2, optimize=True),
    "APNG": file_of("PNG", save_all=True, append_images=[PIL.Image.fromarray(NOISE[::-1].copy())]),
    "JPEG": file_of("JPEG", exif=exif()),
    "progressive JPEG": file_of("JPEG", progressive=True),
    "WebP": file_of("WEBP", exif=exif()),
    "lossless WebP": file_of("WEBP", lossless=True),
    "animated WebP": file_of("WEBP", save_all=True, append_images=[PIL.Image.fromarray(NOISE[::-1].copy())]),
    "GIF": file_of("GIF"),
    "animated GIF": file_of("GIF", save_all=True, append_images=[PIL.Image.fromarray(NOISE[::-1].copy())]),
    "BMP": file_of("BMP"),
}


def picture_or_error(data: bytes) -> Picture | None:
    """Warnings are errors in these tests, so one that leaks fails them."""
    try:
        return read(data, Limits(pixels=1_000_000))
    except ImageError as error:
        message = str(error)
    assert message.startswith("<bytes>")
    assert " at 0x" not in message
    return None


@pytest.mark.parametrize("name", FILES)
def test_every_cut(name, capfd):
    data = FILES[name]
    assert picture_or_error(data) is not None
    whole = sum(picture_or_error(data[:length]) is not None for length in range(len(data)))
    # what is missing of these few is no pixel: a trailer, or of an animation its later frames
    assert whole <= (len(data) // 2 if name in ("APNG", "animated GIF") else 40)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", FILES)
@QUICK
@given(data=st.data())
def test_wounds(name, data):
    wounded = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(wounded) - 1))
        match data.draw(st.sampled_from(["byte", "number", "insert", "remove"])):
            case "byte":
                wounded[at] = data.draw(st.integers(0, 255))
            case "number":
                wounded[at : at + 4] = data.draw(st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff"]))
            case "insert":
                wounded[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "remove":
                del wounded[at : at + data.draw(st.integers(1, 8))]
        if not wounded:
            break
    picture_or_error(bytes(wounded))


@QUICK
@given(data=st.binary(max_size=200), head=st.sampled_from([b"", *(data[:30] for data in FILES.values())]))
def test_noise(data, head):
    picture_or_error(head + data)


@given(text=st.text(max_size=50), head=st.sampled_from(["data:", "data:;base64,", "data:image/png,", ""]))
def test_texts(text, head):
    with pytest.raises(ImageError):
        read(head + text if head else f"no such folder/{text}")


# ---------------------------------------------------------------- bombs


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(4096)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def webp_canvas(width: int, height: int) -> bytes:
    body = b"\0" * 4 + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + body


def gif_canvas(width: int, height: int, screen: int = 1) -> bytes:
    """The frame is larger than the screen, which it then widens."""
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x44\x01\0;"
    return b"GIF89a" + struct.pack("<HHBBB", screen, screen, 0x80, 0, 0) + bytes(6) + frame


def jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(FILES["JPEG"])
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def bmp_of_size(width: int, height: int) -> bytes:
    data = bytearray(FILES["BMP"])
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


@pytest.mark.parametrize("size", [(40_000, 40_000), (12_000, 12_000), (40_000, 1)])
@pytest.mark.parametrize("make", [png, webp_canvas, gif_canvas, jpeg_of_size, bmp_of_size])
def test_pixels_are_counted_before_they_are_decoded(make, size):
    """Of the sizes one is beyond Pillow's own limit, one only makes Pillow warn, and one is long and thin."""
    data = make(*size)
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match=r"and the limit is (100,000,000|32,768)"):
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_a_size_that_is_not_known_is_not_made_up():
    """Pillow refuses some files before it tells their size."""
    with pytest.raises(ImageError, match=r"more than 178,956,970 pixels, and the limit is 100,000,000"):
        read(png(40_000, 40_000))


def test_pillows_own_limit_is_named_when_ours_is_higher():
    with pytest.raises(ImageError, match=r"more than 178,956,970 pixels, which Pillow.*PIL.Image.MAX_IMAGE_PIXELS"):
        read(png(40_000, 40_000), Limits(pixels=10**10, side=10**6))


def test_a_large_picture_within_our_limit_warns_nobody(monkeypatch):
    """108 pixels, where Pillow warns above 60 and refuses above 120: warnings are errors here."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 60)
    with pytest.raises(PIL.Image.DecompressionBombWarning):
        PIL.Image.open(io.BytesIO(FILES["PNG"]))
    assert read(FILES["PNG"], Limits(pixels=110)).width == 9  # upright: EXIF turns it
    assert (PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES) == (60, False)


@pytest.mark.parametrize(
    "hidden",
    [
        chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(10**8))),
        chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(10**8))),
        chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(10**8))),
    ],
    ids=["zTXt", "iTXt", "iCCP"],
)
def test_text_that_unpacks_to_a_hundred_megabytes_is_not_unpacked(hidden):
    tracemalloc.start()
    try:
        picture_or_error(png(8, 8, hidden))
        assert tracemalloc.get_traced_memory()[1] < 8_000_000  # Pillow stops at one
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_of_thousands_of_frames_one_is_decoded(format):
    frames = [PIL.Image.new("L", (64, 64), n % 256) for n in range(2000)]
    file = io.BytesIO()
    frames[0].save(file, format, save_all=True, append_images=frames[1:], duration=10)
    calls = 0

    def count(frame: FrameType, event: str, function: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        assert read(file.getvalue()).width == 64
    finally:
        sys.setprofile(None)
    assert calls < len(frames)  # to decode a frame takes a call at least


def test_a_jpeg_that_repaints_itself_is_refused():
    """A scan of a few bytes repaints the whole picture: a file of 64 MB would keep a processor busy for days."""
    data = FILES["progressive JPEG"]
    again = data[data.rindex(b"\xff\xda") : -2]
    assert picture_or_error(data[:-2] + again * 50 + b"\xff\xd9") is not None
    with pytest.raises(ImageError, match="<bytes>: 1,010 scans of a progressive JPEG, and the limit is 200"):
        read(data[:-2] + again * 1000 + b"\xff\xd9")
    # neither a film behind the picture nor a thumbnail in it is a scan
    comment = b"\xff\xfe" + struct.pack(">H", 2 + 600) + b"\xff\xda" * 300
    assert picture_or_error(data[:2] + comment + data[2:] + b"\xff\xda" * 1000) is not None


def test_readers_in_threads_leave_the_filters_of_warnings_as_they_were():
    before = list(warnings.filters)
    threads = [threading.Thread(target=lambda: [read(FILES["PNG"]) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before
