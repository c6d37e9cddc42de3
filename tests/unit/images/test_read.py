"""What a picture is read from, and the pixels that come out, against values written out by hand."""

import base64
import io
import os
import struct
import sys
import urllib.parse
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from gemkit.errors import GemkitError, ImageError, MissingExtraError
from gemkit.images import Limits, Picture, read

# every corner another colour, and not square: a flip or a turn shows
RED, GREEN, BLUE, GREY = (200, 10, 20), (0, 180, 30), (7, 8, 190), (90, 90, 90)
PIXELS = np.array([[RED, GREEN], [GREY, GREY], [BLUE, (255, 255, 255)]], np.uint8)


def file_of(image, format="PNG", **options) -> bytes:
    if isinstance(image, np.ndarray):
        image = PIL.Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


PNG = file_of(PIXELS)


def sources(folder: Path):
    path = folder / "three rows.png"
    path.write_bytes(PNG)
    encoded = base64.b64encode(PNG).decode()
    yield "str", str(path)
    yield "Path", path
    yield "bytes", PNG
    yield "bytearray", bytearray(PNG)
    yield "memoryview", memoryview(PNG)
    yield "every other byte", memoryview(np.repeat(np.frombuffer(PNG, np.uint8), 2).tobytes())[::2]
    yield "image", PIL.Image.open(path)
    yield "array", PIXELS
    yield "Picture", Picture(PIXELS)
    yield "base64", f"data:image/png;base64,{encoded}"
    yield "base64 of another type", f"DATA:text/plain;charset=utf-8;BASE64,{encoded}"
    yield "base64 without padding", f"data:;base64,{encoded.rstrip('=')}"
    yield "base64 in lines", f"data:image/png;base64,{base64.encodebytes(PNG).decode()}"
    yield "base64 escaped", f"data:image/png;base64,{urllib.parse.quote(encoded, safe='')}"
    yield "percent-encoded", f"data:image/png,{urllib.parse.quote_from_bytes(PNG)}"


def test_every_kind_of_source_is_the_same_picture(tmp_path):
    for kind, source in sources(tmp_path):
        picture = read(source)
        assert (picture.width, picture.height) == (2, 3), kind
        np.testing.assert_array_equal(picture.pixels, PIXELS, kind)


def test_labels(tmp_path):
    path = tmp_path / "a\nb.png"
    path.write_bytes(PNG)
    assert read(path).label == repr(str(path))
    assert read(PIL.Image.open(path)).label == repr(str(path))
    assert read(PNG).label == "<bytes>"
    assert read(PIXELS).label == "<array>"
    assert read(PIL.Image.fromarray(PIXELS)).label == "<PIL image>"
    assert read(PNG, label="messages[0].content[1]").label == "messages[0].content[1]"
    assert repr(read(PNG, label="x")) == "Picture('x', 2 x 3)"


def test_a_picture_is_returned_as_it_is_and_cannot_be_written_to():
    mine = PIXELS.copy()
    picture = read(mine)
    mine[:] = 0
    np.testing.assert_array_equal(picture.pixels, PIXELS)
    assert read(picture) is picture
    assert picture.pixels.flags.c_contiguous
    with pytest.raises(ValueError, match="read-only"):
        picture.pixels[0] = 0


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 4), (0, 4, 3)])
def test_a_picture_is_made_of_rgb_only(shape):
    with pytest.raises(ImageError, match=r"uint8 pixels of the shape \(height, width, 3\)"):
        Picture(np.zeros(shape, np.uint8))


@pytest.mark.parametrize(
    ("format", "options", "off"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("GIF", {}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 4),  # lossy
    ],
)
def test_formats_by_content_whatever_the_name_says(tmp_path, format, options, off):
    large = PIXELS.repeat(8, axis=0).repeat(8, axis=1)  # blocks of JPEG, so that it is almost exact
    path = tmp_path / "picture.txt"
    path.write_bytes(file_of(large, format, **options))
    assert np.abs(read(path).pixels.astype(int) - large).max() <= off


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_it_is_the_first_frame(format):
    frames = [PIL.Image.fromarray(np.roll(PIXELS, n, axis=0)) for n in range(3)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = file_of(frames[0], format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(read(data).pixels, PIXELS)


def test_of_a_jpeg_with_several_pictures_it_is_the_first():
    """Cameras write such files (MPO) under the name .jpg: a preview or a depth map follows the picture."""
    grey = PIL.Image.new("RGB", (16, 16), GREY)
    picture = read(file_of(grey, "MPO", save_all=True, append_images=[PIL.Image.new("RGB", (8, 8), RED)]))
    assert np.abs(picture.pixels.astype(int) - GREY).max() <= 1
    assert picture.width == 16


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP", "JPEG"])
def test_the_camera_is_set_upright(format, orientation):
    """Stored so that the orientation of EXIF turns it upright: what each value means is its specification's table."""
    stored = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: PIXELS.transpose(1, 0, 2)[::-1],  # the top row is at the right side: turn it clockwise
        7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
        8: PIXELS.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}}[format]
    picture = read(file_of(stored.repeat(8, axis=0).repeat(8, axis=1), format, exif=exif, **options))
    assert (picture.width, picture.height) == (16, 24)
    assert np.abs(picture.pixels[::8, ::8].astype(int) - PIXELS).max() <= (8 if format == "JPEG" else 0)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"]
)
def test_damaged_exif_leaves_the_picture_as_it_is_stored(exif):
    np.testing.assert_array_equal(read(file_of(PIXELS, exif=exif)).pixels, PIXELS)


def test_transparency_is_laid_on_white():
    """Half of a colour is halfway to white; nothing of a colour is white, whatever colour that nothing has."""
    rgba = np.array([[[*RED, 255], [*RED, 128], [*RED, 0]]], np.uint8)
    white = np.array([[RED, (227, 132, 137), (255, 255, 255)]], np.uint8)
    for source in (rgba, PIL.Image.fromarray(rgba), file_of(rgba), file_of(rgba, "WEBP", lossless=True, exact=True)):
        np.testing.assert_array_equal(read(source).pixels, white)
    grey_alpha = np.array([[[100, 255], [100, 0]]], np.uint8)
    np.testing.assert_array_equal(read(file_of(grey_alpha)).pixels[0, :, 0], [100, 255])
    palette = PIL.Image.new("P", (3, 1))
    palette.putpalette([*RED, *GREEN, *BLUE])
    palette.putdata([0, 1, 2])
    for transparency, second in [(1, (255, 255, 255)), (bytes([255, 0, 255]), (255, 255, 255)), (None, GREEN)]:
        options = {} if transparency is None else {"transparency": transparency}
        np.testing.assert_array_equal(read(file_of(palette, **options)).pixels, [[RED, second, BLUE]])
    np.testing.assert_array_equal(read(file_of(PIXELS, transparency=RED)).pixels[0, 0], [255, 255, 255])


def test_what_pillow_opens_elsewhere_can_be_handed_over():
    """TIFF files are not opened here; the frame that the caller has chosen is what counts."""
    frames = [PIL.Image.fromarray(np.roll(PIXELS, n, axis=0)) for n in range(3)]
    with PIL.Image.open(io.BytesIO(file_of(frames[0], "TIFF", save_all=True, append_images=frames[1:]))) as image:
        image.seek(2)
        np.testing.assert_array_equal(read(image).pixels, np.roll(PIXELS, 2, axis=0))
    image = PIL.Image.open(io.BytesIO(PNG))
    image.close()
    with pytest.raises(ImageError, match="<PIL image>: a PNG picture that is incomplete, damaged"):
        read(image)


def test_other_modes():
    grey = np.array([[0, 100, 255]], np.uint8)
    np.testing.assert_array_equal(read(file_of(grey)).pixels, np.stack([grey] * 3, axis=2))
    np.testing.assert_array_equal(read(PIL.Image.fromarray(grey).convert("1")).pixels[0, :, 1] // 255, [0, 0, 1])
    cmyk = PIL.Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    cyan = read(file_of(cmyk, "JPEG", quality=100)).pixels
    np.testing.assert_allclose(cyan.reshape(-1, 3) - np.array([0.0, 255, 255]), 0, atol=2)  # lossy
    for mode in ("I", "F"):
        with pytest.raises(ImageError, match="32-bit numbers of an unknown range"):
            read(PIL.Image.fromarray(grey).convert(mode))


def test_16_bits_keep_their_high_byte():
    """8 bits widened either way come back, and what is between is cut in grey as in colour."""
    levels = np.arange(256, dtype=np.uint16)[None]
    for wide in (levels * 257, levels * 256, levels * 256 + 255):
        for source in (file_of(wide), wide, wide[:, :, None], wide.astype(">u2"), PIL.Image.fromarray(wide)):
            np.testing.assert_array_equal(read(source).pixels[:, :, 2], levels)
    with_key = file_of(levels * 257, transparency=50 * 257)
    np.testing.assert_array_equal(read(with_key).pixels[0, 49:52, 0], [49, 255, 51])
    colour = np.stack([levels * 257, levels * 256, levels[:, ::-1] * 256 + 255], axis=2)
    expected = np.stack([levels, levels, levels[:, ::-1]], axis=2)
    np.testing.assert_array_equal(read(colour).pixels, expected)
    np.testing.assert_array_equal(read(png_of_16_bits(colour)).pixels, expected)


def png_of_16_bits(rgb: np.ndarray) -> bytes:
    """Pillow writes none of these, so chunk by chunk (PNG specification, third edition, section 5)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = rgb.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4, 3)), r'float64.*white is 1.0, pass \(array \* 255\).round\(\).astype\("uint8"\)'),
        (np.zeros((4, 4), bool), r"bool.*pass array \* 255"),
        (np.zeros((4, 4), np.int64), "int64, a picture is uint8 or uint16"),
        (np.zeros((4, 4), object), "object, a picture is uint8 or uint16"),
        (np.zeros((3, 40, 50), np.uint8), r"\(3, 40, 50\).*channels come last, so pass array.transpose\(1, 2, 0\)"),
        (np.zeros((4, 4, 2), np.uint8), r"\(4, 4, 2\); a picture is \(height, width\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"\(1, 4, 4, 3\); a picture is"),
        (np.zeros((0, 4, 3), np.uint8), "4 x 0 pixels are no picture"),
    ],
)
def test_arrays_that_are_refused(array, message):
    with pytest.raises(ImageError, match=message):
        read(array)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.com/cat.png", "https://example.com/cat.png is a URL.*download it first and pass the file"),
        ("file:///tmp/cat.png", "file:///tmp/cat.png is a URL.*pass the path alone"),
        ("", "the path is empty"),
        ("no/such.png", "no/such.png: no such file"),
        ("a\0b", r"'a\\x00b' cannot be opened: embedded null byte"),
        ("iVBORw0KGgo" * 1000, r"iVBORw0KGgo.*\(11,000 characters\) is no path; if it is base64, put 'data:"),
        ("data:image/png;base64", "<data URL>: a data URL without a comma"),
        ("data:image/png;base64,iVBORw0KGgo*", "<data URL>: its base64 is damaged"),
        ("data:,", "<data URL> is empty"),
        (None, "<source> is of the type NoneType, which is not read; a path, bytes"),
        (7, "of the type int"),
        (io.BytesIO(PNG), r"of the type BytesIO.*pass what its .read\(\) returns"),
        ([PNG], "of the type list.*one picture at a time"),
    ],
)
def test_sources_that_are_refused(source, message):
    with pytest.raises(ImageError, match=message):
        read(source)


def test_a_tensor_is_refused_with_the_way_out():
    import torch

    with pytest.raises(ImageError, match=r"of the type Tensor.*pass its .numpy\(\), with the channels last"):
        read(torch.zeros(3, 4, 4))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="', "an SVG drawing"),
        (b"\n<svg>", "an SVG drawing"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        (b"\0\0\0\x18ftypheic", "a HEIC or AVIF picture"),
        (b"\0\0\0\x1cftypavif", "a HEIC or AVIF picture"),
        (b"II*\0", "a TIFF picture.*open it with Pillow and pass the image"),
        (b"\xff\x0a", "a JPEG XL or JPEG 2000"),
        (b"%PDF-1.7", "a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "a PostScript drawing, which is a program"),
        (b"8BPS", "a Photoshop file"),
        (b"just a text", r"of an unknown format \(it starts with b'just a t'\); PNG, JPEG, WEBP, GIF, BMP are read"),
    ],
)
def test_what_is_mistaken_for_a_picture(tmp_path, data, message):
    path = tmp_path / "cat.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=f"cat.png is {message}"):
        read(path)


def test_only_regular_files_are_opened(tmp_path):
    """None of these hangs, which opening a pipe or reading a device to its end would do."""
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(ImageError, match=f"{path} is not a regular file"):
            read(path)
    with pytest.raises(ImageError, match="is a folder, not a picture"):
        read(tmp_path)
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    with pytest.raises(ImageError, match=r"circle.png cannot be opened: Too many levels"):
        read(tmp_path / "circle.png")


@pytest.mark.parametrize(
    ("source", "limits", "message"),
    [
        (
            PNG,
            Limits(encoded_bytes=50),
            r"<bytes>: \d+ bytes, and the limit is 50; .*limits=Limits\(encoded_bytes=...\)",
        ),
        (f"data:,{'%00' * 60}", Limits(encoded_bytes=50), "<data URL>: 60 bytes, and the limit is 50"),
        (PNG, Limits(pixels=5), r"<bytes>: 6 pixels, and the limit is 5; .*limits=Limits\(pixels=...\)"),
        (PIXELS, Limits(pixels=5), "<array>: 6 pixels, and the limit is 5"),
        (PIL.Image.fromarray(PIXELS), Limits(side=2), "<PIL image>: 3 pixels on its longer side, and the limit is 2"),
    ],
)
def test_limits(source, limits, message):
    with pytest.raises(ImageError, match=message):
        read(source, limits)


def test_a_file_is_not_read_beyond_the_limit(tmp_path):
    path = tmp_path / "holes.png"
    with path.open("wb") as file:
        file.truncate(2**40)  # a hole: no disk is used
    with pytest.raises(ImageError, match="1,099,511,627,776 bytes, and the limit is 67,108,864"):
        read(path)


def test_without_pillow_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'gemkit\[vision\]'") as caught:
        read(PNG)
    assert caught.value.extra == "vision"
    np.testing.assert_array_equal(read(PIXELS).pixels, PIXELS)  # nothing to decode


def test_the_error_is_in_the_tree():
    assert issubclass(ImageError, GemkitError)
    assert issubclass(ImageError, ValueError)
