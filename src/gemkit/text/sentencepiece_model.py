"""Reading and writing a SentencePiece tokenizer.model: a protocol buffer, by hand.

This much of the format is needed (github.com/google/sentencepiece, src/sentencepiece_model.proto):

    ModelProto      1 pieces (repeated SentencePiece), 2 trainer_spec, 3 normalizer_spec, others
    SentencePiece   1 piece (string), 2 score (float), 3 type (enum; NORMAL where it is left out)

A field is a varint `number << 3 | wire type`, then its value: a varint (wire type 0), 8 bytes (1), a length as varint
and the bytes (2), or 4 bytes (5). A varint holds 7 bits a byte, lowest first; the high bit says that more follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gemkit.errors import WeightsError
from gemkit.files import CHUNK_OF_STRINGS, decode_strings
from gemkit.text.vocabulary import BOS, EOS, PAD, UNK, PieceType, Vocabulary

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_MODEL_BPE = 2  # TrainerSpec.ModelType

# name, field of ModelProto, field inside, default of the format, value in this family
_REQUIRED = (
    ("trainer_spec.model_type", 2, 3, 1, _MODEL_BPE),
    ("trainer_spec.treat_whitespace_as_suffix", 2, 24, 0, 0),
    ("trainer_spec.byte_fallback", 2, 35, 0, 1),
    ("normalizer_spec.precompiled_charsmap", 3, 2, b"", b""),
    ("normalizer_spec.add_dummy_prefix", 3, 3, 1, 0),
    ("normalizer_spec.remove_extra_whitespaces", 3, 4, 1, 0),
    ("normalizer_spec.escape_whitespaces", 3, 5, 1, 1),
)


def read(data: bytes, *, source: str = "tokenizer.model") -> Vocabulary:
    """The vocabulary in the bytes of a tokenizer.model.

    Raises:
        WeightsError: if the bytes are truncated or corrupt, or hold another kind of tokenizer than this family's.
    """
    starts: list[int] = []  # of the pieces' messages
    ends: list[int] = []
    specs: list[bytes] = []
    settings: dict[tuple[int, int], int | bytes] = {}
    at, size = 0, len(data)
    try:
        while at < size:
            # nearly all are short pieces; only their places are found one by one
            if data[at] == 0x0A and at + 1 < size and data[at + 1] < 0x80 and (end := at + 2 + data[at + 1]) <= size:
                starts.append(at + 2)
                ends.append(at := end)
                continue
            start = at
            number, wire, value, at = _read_field(data, start)
            if (number, wire) == (1, _BYTES):
                starts.append(at - len(value))
                ends.append(at)
                continue
            specs.append(data[start:at])
            if wire == _BYTES and number in (2, 3):
                settings |= {(number, inner): setting for inner, _, setting in _fields(value)}
    except ValueError as error:
        raise WeightsError(f"{source}: corrupt after {len(starts)} pieces: {error}") from None
    if not starts:
        raise WeightsError(f"{source}: {size} bytes without a single piece: not a SentencePiece model")
    pieces, score_V, type_V = _read_pieces(data, np.array(starts), np.array(ends), source)
    for name, spec, number, default, wanted in _REQUIRED:
        found = settings.get((spec, number), default)
        if found != wanted:
            shown = f"{len(found)} bytes" if isinstance(found, bytes) else found
            raise WeightsError(f"{source}: {name} is {shown}, not {wanted!r}: a tokenizer of another family")
    return Vocabulary.from_pieces(pieces, score_V, type_V, specs=b"".join(specs), source=source)


def write(vocabulary: Vocabulary) -> bytes:
    """The bytes of a tokenizer.model; of one that was read and not changed, the same bytes again."""
    chunks = [slice(i, i + CHUNK_OF_STRINGS) for i in range(0, len(vocabulary.pieces), CHUNK_OF_STRINGS)]
    messages = [_write_pieces(vocabulary.pieces[c], vocabulary.scores[c], vocabulary.types[c]) for c in chunks]
    return b"".join([*messages, vocabulary.specs or _family_specs(len(vocabulary.pieces))])


def _write_pieces(pieces: list[str], scores: np.ndarray, types: np.ndarray) -> bytes:
    text = np.frombuffer("\0".join([*pieces, ""]).encode(), np.uint8)  # no piece holds a NUL
    text_sizes = np.diff(np.flatnonzero(text == 0), prepend=-1) - 1
    score_fields = np.full((len(pieces), 5), 0x15, np.uint8)
    score_fields[:, 1:] = scores.astype("<f4").view(np.uint8).reshape(-1, 4)
    typed = types != PieceType.NORMAL
    type_fields = np.stack([np.full_like(types, 0x18), types], axis=1)[typed]
    message = [
        _header(text_sizes),
        (text[text != 0], text_sizes),
        (score_fields.ravel(), np.full_like(text_sizes, 5)),
        (type_fields.ravel(), 2 * typed),
    ]
    return _interleave([_header(np.sum([sizes for _, sizes in message], axis=0)), *message])


# One field of many messages: the bytes of all of them end to end, and how many each has. A vocabulary is written at
# every start of a program: piece by piece that is a quarter of a second.
_Column = tuple[np.ndarray, np.ndarray]


def _header(sizes: np.ndarray) -> _Column:
    """What stands before field 1 of each message, of so many bytes: its key, and its size as a varint."""
    limits = 1 << np.arange(7, max(8, int(sizes.max(initial=0)).bit_length() + 1), 7)
    bytes_each = 1 + np.searchsorted(limits, sizes, side="right")
    place = np.arange(bytes_each.max(initial=1))
    varints = sizes[:, None] >> 7 * place & 0x7F | np.where(place < bytes_each[:, None] - 1, 0x80, 0)
    headers = np.insert(varints.astype(np.uint8), 0, 1 << 3 | _BYTES, axis=1)
    return headers[np.arange(len(place) + 1) <= bytes_each[:, None]], 1 + bytes_each


def _interleave(columns: Sequence[_Column]) -> bytes:
    """The columns row by row."""
    sizes = np.stack([sizes for _, sizes in columns], axis=1)
    starts = (np.cumsum(sizes) - sizes.ravel()).reshape(sizes.shape)
    out = np.empty(int(sizes.sum()), np.uint8)
    for start, (data, size) in zip(starts.T, columns, strict=True):
        out[np.repeat(start - (np.cumsum(size) - size), size) + np.arange(len(data))] = data
    return out.tobytes()


def _family_specs(size: int) -> bytes:
    """Trainer and normalizer settings of this family, as far as they bear on encoding and decoding."""
    trainer = b"".join(
        [
            _field(3, _MODEL_BPE),
            _field(4, size),
            _field(25, 1),  # split_digits
            _field(26, 1),  # allow_whitespace_only_pieces
            _field(35, 1),  # byte_fallback
            *(_field(40 + i, id_) for i, id_ in enumerate((3, 2, 1, 0))),  # ids of unk, bos, eos, pad
            *(_field(45 + i, piece.encode()) for i, piece in enumerate((UNK, BOS, EOS, PAD))),
        ]
    )
    normalizer = _field(1, b"identity") + _field(3, 0) + _field(4, 0) + _field(5, 1)
    return _field(2, trainer) + _field(3, normalizer)


def _read_pieces(
    data: bytes, starts: np.ndarray, ends: np.ndarray, source: str
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts, scores (V,) and types (V,) of the SentencePiece messages at these places."""
    array, sizes = np.frombuffer(data, np.uint8), ends - starts
    # of a text and a score alone, as nearly all are: key, size, text, key, 4 bytes. Those are read at once
    is_plain = (sizes > 7) & (sizes < 128)
    is_plain[is_plain] = (
        (array[starts[is_plain]] == 0x0A)
        & (array[starts[is_plain] + 1] == sizes[is_plain] - 7)
        & (array[ends[is_plain] - 5] == 0x15)
    )
    texts = decode_strings(data, starts[is_plain] + 2, ends[is_plain] - 5)
    if texts is None:
        texts, is_plain = [], np.zeros_like(is_plain)
    pieces: dict[int, str] = dict(zip(np.flatnonzero(is_plain).tolist(), texts, strict=True))
    scores = np.zeros((len(starts), 4), np.uint8)
    scores[is_plain] = array[ends[is_plain, None] - np.array([4, 3, 2, 1])]
    types = np.full(len(starts), PieceType.NORMAL, np.int64)
    i = 0
    try:
        for i in np.flatnonzero(~is_plain).tolist():
            fields = {(number, wire): value for number, wire, value in _fields(data[starts[i] : ends[i]])}
            pieces[i] = fields.get((1, _BYTES), b"").decode()
            scores[i] = np.frombuffer(fields.get((2, _FIXED32), bytes(4)), np.uint8)
            types[i] = fields.get((3, _VARINT), PieceType.NORMAL)
    except ValueError as error:
        raise WeightsError(f"{source}: corrupt after {i} pieces: {error}") from None
    return [pieces[i] for i in range(len(starts))], scores.view("<f4").ravel(), types


def _fields(message: bytes) -> Iterator[tuple[int, int, Any]]:
    """Number, wire type and value (an int for a varint, else bytes) of each field of a message.

    Raises:
        ValueError: where the bytes stop being a message; says at which offset.
    """
    at = 0
    while at < len(message):
        number, wire, value, at = _read_field(message, at)
        yield number, wire, value


def _read_field(message: bytes, start: int) -> tuple[int, int, Any, int]:
    """Number, wire type and value of the field at offset `start`, and the offset after it."""
    key, at = _read_varint(message, start)
    number, wire = key >> 3, key & 7
    if number == 0:
        raise ValueError(f"field number 0 at byte {start}")
    if wire == _VARINT:
        return number, wire, *_read_varint(message, at)
    if wire == _BYTES:
        size, at = _read_varint(message, at)
    elif wire in (_FIXED32, _FIXED64):
        size = 4 if wire == _FIXED32 else 8
    else:
        raise ValueError(f"wire type {wire} at byte {start}")
    if size > len(message) - at:
        raise ValueError(f"field {number} at byte {start} needs {size} bytes, {len(message) - at} are left")
    return number, wire, message[at : at + size], at + size


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """The varint at offset `at`, and the offset after it."""
    if at < len(message) and message[at] < 0x80:  # by far the most common
        return message[at], at + 1
    value = 0
    for i, byte in enumerate(message[at : at + 10]):  # 64 bits are the most that the format allows
        value |= (byte & 0x7F) << 7 * i
        if byte < 0x80:
            return value, at + i + 1
    raise ValueError(f"a number at byte {at} does not end")


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | _BYTES) + _varint(len(value)) + value
    return _varint(number << 3 | _VARINT) + _varint(value)
