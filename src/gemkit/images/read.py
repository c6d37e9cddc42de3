"""A picture, from wherever it is, to RGB pixels: within limits that are checked before anything is decoded.

Decided here, for all callers:

- The content says what a file is, never its name, and only the formats of `_MAGIC` are decoded.
- Of an animation it is the first frame.
- The orientation that a camera notes in EXIF is applied: width and height are those of the upright picture.
- Transparency is laid on white, as the published image processor does (Transformers 5, `convert_to_rgb`).
- 16 bits a channel become 8 by keeping the high byte. That is what Pillow does to colour, so grey and colour agree, and
  8 bits that were widened by either custom, x * 257 or x * 256, come back as they were.
- Colour profiles are not applied: published preprocessing reads the stored numbers too.

Pillow is imported when a picture has to be decoded, and none of its settings is changed.
"""

from __future__ import annotations

import binascii
import io
import os
import re
import stat
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote_to_bytes

import numpy as np

from gemkit.errors import ImageError, MissingExtraError

if TYPE_CHECKING:
    import PIL.Image

Source: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | np.ndarray | PIL.Image.Image | Picture"


@dataclass(frozen=True, eq=False, repr=False)
class Picture:
    """A decoded picture. Its pixels cannot be written to, so that a mask or a box drawn elsewhere still fits them.

    Attributes:
        pixels: uint8 (height, width, 3), RGB.
        label: what it is called in messages: its path, or the field of a request that it came in.
    """

    pixels: np.ndarray
    label: str = "<picture>"

    def __post_init__(self):
        pixels = self.pixels
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
            raise ImageError(
                f"{self.label}: a Picture holds uint8 pixels of the shape (height, width, 3), "
                f"these are {pixels.dtype} {pixels.shape}; read() makes one from other arrays"
            )
        pixels = np.ascontiguousarray(pixels).view()
        pixels.flags.writeable = False
        object.__setattr__(self, "pixels", pixels)

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    def __repr__(self) -> str:
        return f"Picture({self.label!r}, {self.width} x {self.height})"


@dataclass(frozen=True)
class Limits:
    """How large a picture may be. Decoding one of `pixels` pixels takes up to 16 bytes for each."""

    encoded_bytes: int = 64 * 2**20
    pixels: int = 100_000_000
    side: int = 32_768
    # A progressive JPEG repaints all its pixels with each scan; about ten are usual, and a file of 64 MB has room for
    # millions.
    scans: int = 200


LIMITS = Limits()


def read(source: Source, limits: Limits = LIMITS, label: str = "") -> Picture:
    """Read a picture.

    Args:
        source: a path; the bytes of a file; a `data:` URL; an image of Pillow's (its current frame); an array of uint8
            or uint16 and of the shape (height, width) or (height, width, 1, 3 or 4), in the order RGB(A). A `Picture`
            is returned as it is.
        label: what messages and the picture call it. By default it is the path, or says what kind of source it was.

    Raises:
        ImageError: if it is no picture, one of a format that is not read, damaged, or beyond a limit. Arrays of floats
            and of bools are refused: whether 1 means white or almost black is not for this function to guess.
        MissingExtraError: if Pillow is needed and not installed.
    """
    if isinstance(source, Picture):
        return source
    if isinstance(source, str) and source[:5].lower() == "data:":
        label = label or "<data URL>"
        return _decode(_from_data_url(source, limits, label), limits, label)
    if isinstance(source, str | os.PathLike):
        path = os.fsdecode(source)
        label = label or _shown(path)
        return _decode(_from_file(path, limits, label), limits, label)
    if isinstance(source, bytes | bytearray | memoryview):
        label = label or f"<{type(source).__name__}>"
        _check_encoded(memoryview(source).nbytes, limits, label)
        return _decode(bytes(source), limits, label)
    if isinstance(source, np.ndarray):
        label = label or "<array>"
        return Picture(_from_array(source, limits, label), label)
    pillow = sys.modules.get("PIL.Image")  # who has an image of Pillow's has imported it
    if pillow and isinstance(source, pillow.Image):
        label = label or _shown(str(getattr(source, "filename", ""))) or "<PIL image>"
        _check_size(source.size, limits, label)
        with _guarded(limits, label, source.format or source.mode):
            return Picture(_upright_rgb(source, label), label)
    raise ImageError(f"{label or '<source>'} is {_no_source(source)}")


# ---------------------------------------------------------------- from a source to bytes


def _from_file(path: str, limits: Limits, label: str) -> bytes:
    if scheme := re.match(r"(?i)([a-z][a-z0-9+.-]+)://", path):  # two letters or more: C:// is a drive
        way_out = "pass the path alone" if scheme[1].lower() == "file" else "download it first and pass the file"
        raise ImageError(f"{label} is a URL, and pictures are read from files only: {way_out}")
    if not path:
        raise ImageError("'' names no picture: the path is empty")
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would wait for its writer, a device may never end
            what = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise ImageError(f"{label} is {what}, not a picture; name one file")
        with open(path, "rb") as file:
            _check_encoded(os.fstat(file.fileno()).st_size, limits, label)
            data = file.read(limits.encoded_bytes + 1)  # it may grow meanwhile, and /proc says that all is empty
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{label}: no such file") from None
    except (OSError, ValueError) as error:
        if len(path) > 255 and re.fullmatch(r"[A-Za-z0-9+/=_\s-]+", path):
            raise ImageError(f"{label} is no path; if it is base64, put 'data:image/png;base64,' before it") from None
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"{label} cannot be opened: {reason}") from None
    _check_encoded(len(data), limits, label)
    return data


def _from_data_url(url: str, limits: Limits, label: str) -> bytes:
    """The bytes in `data:[<media type>][;base64],<data>` (RFC 2397). What the media type claims is not looked at."""
    head, comma, payload = url.partition(",")
    if not comma:
        raise ImageError(f"{label}: a data URL without a comma, after which the picture would begin")
    _check_encoded(len(payload) // 4 * 3 if head.lower().endswith(";base64") else len(payload) // 3, limits, label)
    data = unquote_to_bytes(payload)
    if head.lower().endswith(";base64"):
        data = b"".join(data.split()).rstrip(b"=")  # many encoders break lines, some leave out the padding
        try:
            data = binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)
        except binascii.Error as error:
            raise ImageError(f"{label}: its base64 is damaged: {error}") from None
    _check_encoded(len(data), limits, label)
    return data


# ---------------------------------------------------------------- from bytes to pixels

_MAGIC = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM",
}

# Files that are mistaken for one of them, and the way out.
_FOREIGN = {
    rb"$": "empty (0 bytes): an interrupted download? Fetch it again.",
    rb"version https://git-lfs": "a Git LFS pointer, not the picture itself: run `git lfs pull` in its folder.",
    rb"(?is)\s*(<\?xml.*|<!doctype svg.*|<!--.*)?<svg": "an SVG drawing, which has no pixels: export it as PNG first.",
    rb"(?i)\s*<(!doctype|html|\?xml)": "a web page or XML, not a picture: was an error page saved under its name?",
    rb"....ftyp(hei|hev|mif|msf|avi)": "a HEIC or AVIF picture: save it as JPEG or PNG first.",
    rb"II\*\0|MM\0\*|II\+\0|MM\0\+": "a TIFF picture: save it as PNG first, or open it with Pillow and pass the image.",
    rb"\xff\x0a|\0\0\0\x0cJXL |\0\0\0\x0cjP  ": "a JPEG XL or JPEG 2000 picture: save it as JPEG or PNG first.",
    rb"%PDF": "a PDF: export the page as PNG first.",
    rb"%!PS|\xc5\xd0\xd3\xc6": "a PostScript drawing, which is a program: export it as PNG first.",
    rb"8BPS": "a Photoshop file: export it as PNG first.",
}


def _decode(data: bytes, limits: Limits, label: str) -> Picture:
    format = next((name for name, magic in _MAGIC.items() if re.match(magic, data, re.DOTALL)), None)
    if format is None:
        raise ImageError(f"{label} is {_foreigner(data)}")
    if format == "WEBP":
        _check_size(_webp_canvas(data), limits, label)
    if format == "JPEG":
        _check("scans", _jpeg_scans(data), limits, label)
    with _guarded(limits, label, format):
        image = _pillow().open(io.BytesIO(data), formats=[format])
        _check_size(image.size, limits, label)  # from the header: nothing is decoded yet
        return Picture(_upright_rgb(image, label), label)


def _foreigner(data: bytes) -> str:
    for magic, what in _FOREIGN.items():
        if re.match(magic, data[:512], re.DOTALL):
            return what
    return f"of an unknown format (it starts with {data[:8]!r}); {', '.join(_MAGIC)} are read"


def _webp_canvas(data: bytes) -> tuple[int, int]:
    """Width and height from the first chunk: Pillow makes room for a WebP's canvas as soon as it opens it.

    Source: WebP container specification and RFC 6386, section 9.1. A header that ends early gives small numbers here,
    and an error in Pillow.
    """

    def number(start: int, end: int) -> int:
        return int.from_bytes(data[start:end], "little")

    if data[12:16] == b"VP8X":
        return number(24, 27) + 1, number(27, 30) + 1
    if data[12:16] == b"VP8L":
        bits = number(21, 25)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return number(26, 28) & 0x3FFF, number(28, 30) & 0x3FFF


def _jpeg_scans(data: bytes) -> int:
    """How often a JPEG paints its pixels, by its markers (ITU-T T.81, annex B).

    Segments are stepped over by their length, for a thumbnail in one has markers of its own; in coded data a byte ff is
    followed by 00 or by a restart marker. What follows the end, say the film of a moving photo, is not looked at.
    """
    scans, at = 0, 2
    while marker := _MARKER.search(data, at):
        at, kind = marker.end(), marker[1]
        if kind == b"\xd9":  # end of image
            break
        scans += kind == b"\xda"  # start of scan
        at += int.from_bytes(data[at : at + 2], "big")
    return scans


_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)


def _upright_rgb(image: PIL.Image.Image, label: str) -> np.ndarray:
    """uint8 (H, W, 3) of an image of Pillow's in any mode."""
    Image = _pillow()
    image.load()
    turn = _turn(image)
    if image.mode.startswith("I;16"):
        # Pillow's own conversion would clip all above 255 to white
        values = np.asarray(image)
        grey = (values >> 8).astype(np.uint8)
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        image = Image.fromarray(grey)
    elif image.mode in ("I", "F"):
        raise ImageError(
            f"{label}: its pixels are 32-bit numbers of an unknown range; scale them to 0..255 and pass a uint8 array"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    image = image.convert("RGB")
    return np.array(image if turn is None else image.transpose(turn))


def _turn(image: PIL.Image.Image) -> PIL.Image.Transpose | None:
    """The transposition that sets the picture upright, by EXIF tag 0x0112."""
    turns = _pillow().Transpose
    try:
        return {
            2: turns.FLIP_LEFT_RIGHT,
            3: turns.ROTATE_180,
            4: turns.FLIP_TOP_BOTTOM,
            5: turns.TRANSPOSE,
            6: turns.ROTATE_270,
            7: turns.TRANSVERSE,
            8: turns.ROTATE_90,
        }.get(image.getexif().get(0x0112, 1))
    except Exception:
        return None  # damaged EXIF beside a whole picture is common, and every viewer shows it as it is stored


def _from_array(array: np.ndarray, limits: Limits, label: str) -> np.ndarray:
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        raise ImageError(
            f"{label} has the shape {array.shape}; a picture is (height, width) or (height, width, 1, 3 or 4)"
            + (": channels come last, so pass array.transpose(1, 2, 0)" if first else "")
        )
    if array.dtype.kind != "u" or array.dtype.itemsize > 2:
        way_out = {"f": '; if white is 1.0, pass (array * 255).round().astype("uint8")', "b": "; pass array * 255"}
        raise ImageError(
            f"{label} holds {array.dtype}, a picture is uint8 or uint16{way_out.get(array.dtype.kind, '')}"
        )
    _check_size((array.shape[1], array.shape[0]), limits, label)
    if array.dtype.itemsize == 2:
        array = (array >> 8).astype(np.uint8)
    if array.shape[2] == 4:
        return _upright_rgb(_pillow().fromarray(np.ascontiguousarray(array)), label)
    # a copy even of what fits already: the caller may go on writing to it
    return np.array(np.broadcast_to(array, (*array.shape[:2], 3)), order="C")


# ---------------------------------------------------------------- limits, and what Pillow may do

_UNITS = {
    "encoded_bytes": "bytes",
    "pixels": "pixels",
    "side": "pixels on its longer side",
    "scans": "scans of a progressive JPEG",
}


def _check(limit: str, value: int, limits: Limits, label: str) -> None:
    if value > getattr(limits, limit):
        raise ImageError(_beyond(limit, f"{value:,}", limits, label))


def _beyond(limit: str, value: str, limits: Limits, label: str) -> str:
    return (
        f"{label}: {value} {_UNITS[limit]}, and the limit is {getattr(limits, limit):,}; make it smaller, or in Python "
        f"read it yourself with gemkit.images.read(..., limits=Limits({limit}=...))"
    )


def _check_encoded(size: int, limits: Limits, label: str) -> None:
    _check("encoded_bytes", size, limits, label)


def _check_size(size: tuple[int, int], limits: Limits, label: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{label}: {width} x {height} pixels are no picture")
    _check("side", max(width, height), limits, label)
    _check("pixels", width * height, limits, label)


def _pillow() -> Any:
    try:
        import PIL.Image
    except ImportError:
        raise MissingExtraError("reading pictures", "vision") from None
    return PIL.Image


# `catch_warnings` puts back for the whole process what it found: two at once could leave the other's filters behind.
_FILTERS = threading.Lock()


@contextmanager
def _guarded(limits: Limits, label: str, format: str) -> Iterator[None]:
    """Turn every exception of Pillow into an ImageError, and silence its warnings.

    `except Exception`, because its decoders let out whatever they stumble over: OSError, SyntaxError, ValueError,
    struct.error, zlib.error, EOFError, KeyError, AssertionError, OverflowError and others.
    """
    Image = _pillow()
    with _FILTERS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        try:
            yield
        except ImageError:
            raise
        except Image.DecompressionBombError:
            pillows = 2 * Image.MAX_IMAGE_PIXELS
            if limits.pixels <= pillows:  # its size is not told, only that it is beyond Pillow's limit
                raise ImageError(_beyond("pixels", f"more than {pillows:,}", limits, label)) from None
            raise ImageError(
                f"{label}: more than {pillows:,} pixels, which Pillow does not decode "
                "unless PIL.Image.MAX_IMAGE_PIXELS says so"
            ) from None
        except MemoryError:
            raise ImageError(f"{label}: there is not enough memory to decode this {format} picture") from None
        except Exception as error:
            reason = str(error)
            if not reason or " at 0x" in reason:  # the address of a buffer tells nobody anything
                reason = "its header is damaged" if isinstance(error, OSError) else type(error).__name__
            raise ImageError(
                f"{label}: a {format} picture that is incomplete, damaged or of a kind that is not decoded: {reason}"
            ) from None


def _shown(path: str) -> str:
    """A path as messages show it: text that was taken for one can be megabytes, or hold line breaks."""
    path = path if len(path) <= 300 else f"{path[:60]}... ({len(path):,} characters)"
    return path if path.isprintable() else repr(path)


def _no_source(source: object) -> str:
    name = type(source).__name__
    way_out = ""
    if hasattr(source, "read"):
        way_out = ": pass what its .read() returns"
    elif hasattr(source, "numpy"):
        way_out = ": pass its .numpy(), with the channels last"
    elif isinstance(source, list | tuple):
        way_out = ": pass one picture at a time"
    return f"of the type {name}, which is not read{way_out or '; a path, bytes, an array or an image of Pillow is'}"
