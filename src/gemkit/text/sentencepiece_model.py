"""Reading and writing a SentencePiece tokenizer.model: a protocol buffer, by hand.

This much of the format is needed (github.com/google/sentencepiece, src/sentencepiece_model.proto):

    ModelProto      1 pieces (repeated SentencePiece), 2 trainer_spec, 3 normalizer_spec, others
    SentencePiece   1 piece (string), 2 score (float), 3 type (enum; NORMAL where it is left out)

A field is a varint `number << 3 | wire type`, then its value: a varint (wire type 0), 8 bytes (1), a length as varint
and the bytes (2), or 4 bytes (5). A varint holds 7 bits a byte, lowest first; the high bit says that more follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gemkit.errors import WeightsError
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
    pieces: list[str] = []
    scores: list[bytes] = []
    types: list[int] = []
    specs: list[bytes] = []
    settings: dict[tuple[int, int], int | bytes] = {}
    try:
        for number, wire, value, raw in _fields(data):
            if (number, wire) == (1, _BYTES):
                piece, score, kind = _read_piece(value)
                pieces.append(piece)
                scores.append(score)
                types.append(kind)
                continue
            specs.append(raw)
            if wire == _BYTES and number in (2, 3):
                settings |= {(number, inner): setting for inner, _, setting, _ in _fields(value)}
    except ValueError as error:
        raise WeightsError(f"{source}: corrupt after {len(pieces)} pieces: {error}") from None
    if not pieces:
        raise WeightsError(f"{source}: {len(data)} bytes without a single piece: not a SentencePiece model")
    for name, spec, number, default, wanted in _REQUIRED:
        found = settings.get((spec, number), default)
        if found != wanted:
            shown = f"{len(found)} bytes" if isinstance(found, bytes) else found
            raise WeightsError(f"{source}: {name} is {shown}, not {wanted!r}: a tokenizer of another family")
    score_V = np.frombuffer(b"".join(scores), dtype="<f4")
    return Vocabulary.from_pieces(pieces, score_V, np.asarray(types), specs=b"".join(specs), source=source)


def write(vocabulary: Vocabulary) -> bytes:
    """The bytes of a tokenizer.model; of one that was read and not changed, the same bytes again."""
    parts: list[bytes] = []
    around: dict[tuple[int, int], tuple[bytes, bytes]] = {}  # what stands before text and after score, by size and type
    scores = vocabulary.scores.astype("<f4").tobytes()
    for i, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.types.tolist(), strict=True)):
        text = piece.encode()
        if (len(text), kind) not in around:
            type_field = _field(3, kind) if kind != PieceType.NORMAL else b""
            text_header = b"\n" + _varint(len(text))
            size = len(text_header) + len(text) + 5 + len(type_field)
            around[len(text), kind] = b"\n" + _varint(size) + text_header, type_field
        header, type_field = around[len(text), kind]
        parts.append(header)
        parts.append(text)
        parts.append(b"\x15" + scores[4 * i : 4 * i + 4] + type_field)
    parts.append(vocabulary.specs or _family_specs(len(vocabulary.pieces)))
    return b"".join(parts)


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


def _read_piece(message: bytes) -> tuple[str, bytes, int]:
    """Text, score (4 bytes, little-endian) and type of one SentencePiece message."""
    # nearly every piece is a short string and a score, nothing else: taken apart in place, a file reads twice as fast
    size = len(message) - 7
    if 0 < size < 128 and message[0] == 0x0A and message[1] == size and message[-5] == 0x15:
        return message[2:-5].decode(), message[-4:], PieceType.NORMAL
    fields = {(number, wire): value for number, wire, value, _ in _fields(message)}
    piece = fields.get((1, _BYTES), b"").decode()
    return piece, fields.get((2, _FIXED32), bytes(4)), fields.get((3, _VARINT), PieceType.NORMAL)


def _fields(message: bytes) -> Iterator[tuple[int, int, Any, bytes]]:
    """Number, wire type, value (an int for a varint, else bytes) and raw bytes of each field of a message.

    Raises:
        ValueError: where the bytes stop being a message; says at which offset.
    """
    at = 0
    while at < len(message):
        start = at
        key, at = _read_varint(message, at)
        number, wire = key >> 3, key & 7
        if number == 0:
            raise ValueError(f"field number 0 at byte {start}")
        if wire == _VARINT:
            value, at = _read_varint(message, at)
        else:
            if wire == _BYTES:
                size, at = _read_varint(message, at)
            elif wire in (_FIXED32, _FIXED64):
                size = 4 if wire == _FIXED32 else 8
            else:
                raise ValueError(f"wire type {wire} at byte {start}")
            if size > len(message) - at:
                raise ValueError(f"field {number} at byte {start} needs {size} bytes, {len(message) - at} are left")
            value = message[at : at + size]
            at += size
        yield number, wire, value, message[start:at]


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
