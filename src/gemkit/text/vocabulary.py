"""The pieces of a tokenizer, checked once: what a tokenizer.model, a tokenizer.json and a GGUF all come down to.

The family's vocabularies are SentencePiece BPE with byte fallback. In memory they are always spelled as SentencePiece
spells them: a space inside a piece is `▁` (U+2581), a byte is `<0x0A>`, and a score is minus the rank of a merge.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np

from gemkit.errors import WeightsError

SPACE = "▁"
BOS, EOS, PAD, UNK = "<bos>", "<eos>", "<pad>", "<unk>"
BYTES = {f"<0x{value:02X}>": value for value in range(256)}

# CodeGemma's vocabulary is Gemma's with four unused pieces put to use (arXiv:2406.11409).
INFILL = {67: "<|fim_prefix|>", 68: "<|fim_middle|>", 69: "<|fim_suffix|>", 70: "<|file_separator|>"}

# PaliGemma's vocabulary is Gemma's with places and mask codes after it, which are text that a model reads and writes,
# and in Hugging Face's layout the placeholder of an image's patches (arXiv:2407.07726).
PLACES = [*(f"<loc{i:04}>" for i in range(1024)), *(f"<seg{i:03}>" for i in range(128))]
IMAGE = "<image>"

# The tags that are pieces, of HTML and two like it, and places: text, unlike whatever else is a piece in brackets.
MARKUP = re.compile(
    r"</?(a|b|bbox|blockquote|body|caption|code|div|em|footer|h[1-6]|html|i|iframe|img|li|s|span|strong|su[bp]|"
    r"table|tbody|td|tfoot|th|thead|tr|u|ul)>|<loc[0-9]{4}>|<seg[0-9]{3}>"
)


class PieceType(IntEnum):
    """The type of a piece, with the numbers that SentencePiece and GGUF share."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3  # never matched in text
    USER_DEFINED = 4  # matched in text before anything is merged
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class AddedToken:
    """A token that a file adds to a vocabulary, or whose name it changes."""

    id: int
    piece: str
    special: bool  # steers the model; others are text that is always one token

    @classmethod
    def from_json(cls, id: int, given: Mapping[str, Any]) -> AddedToken:
        """A token as tokenizer.json and `added_tokens_decoder` write it.

        Raises:
            WeightsError: for one that takes in the space beside it, or is found in whole words only.
        """
        for key in ("lstrip", "rstrip", "single_word"):
            if given.get(key):
                raise WeightsError(f"the added token {given['content']!r} has {key}, which is not implemented")
        return cls(id, str(given["content"]), bool(given.get("special", False)))


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Pieces in the order of their ids. Its makers, `from_pieces`, `from_json` and `from_model`, check them.

    `specs` is what a tokenizer.model says besides its pieces, kept as it came so that saving loses nothing; a
    vocabulary from elsewhere leaves it empty.
    """

    pieces: list[str]
    scores: np.ndarray  # (V,) float32: of two possible merges the one that makes the higher score comes first
    types: np.ndarray  # (V,) uint8 of PieceType
    specs: bytes = b""

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each piece."""
        return dict(zip(self.pieces, range(len(self.pieces)), strict=True))

    @classmethod
    def from_pieces(
        cls,
        pieces: Sequence[str],
        scores: Sequence[float] | np.ndarray,
        types: Sequence[int] | np.ndarray,
        *,
        specs: bytes = b"",
        source: str = "vocabulary",
    ) -> Vocabulary:
        """A vocabulary from three parallel lists, as the metadata of a GGUF holds them.

        Spaces inside pieces may be spelled ` ` or `▁`, and `<unk>` may be typed as a control piece.

        Args:
            source: what errors call the lists, such as the name of a file.

        Raises:
            WeightsError: if the lists differ in length or have the wrong dtype; if a piece is empty, repeated, or not
                valid text; if one of the 256 bytes, `<bos>`, `<eos>`, `<pad>` or `<unk>` is missing.
        """
        score_V, type_V = np.asarray(scores), np.asarray(types)
        for name, array, kinds, wanted in (("scores", score_V, "f", "float"), ("types", type_V, "iu", "integer")):
            if array.ndim != 1 or array.dtype.kind not in kinds:
                raise WeightsError(f"{source}: {name} of dtype {array.dtype}, shape {array.shape}; need (V,) {wanted}s")
        if not len(pieces) == len(score_V) == len(type_V):
            raise WeightsError(
                f"{source}: {len(pieces)} pieces, {len(score_V)} scores, {len(type_V)} types; every piece has one each"
            )
        spelled, score_V = _spell(pieces, source), score_V.astype(np.float32)
        for i in np.flatnonzero(~np.isfinite(score_V)):
            raise WeightsError(f"{source}: piece {i}, {spelled[i]!r}, has the score {score_V[i]}")
        for i in np.flatnonzero((type_V < min(PieceType)) | (type_V > max(PieceType))):
            raise WeightsError(f"{source}: piece {i}, {spelled[i]!r}, has the type {type_V[i]}; types are 1 to 6")
        type_V = type_V.astype(np.uint8)
        vocabulary = cls(spelled, score_V, type_V, specs)
        ids = vocabulary.ids
        if len(ids) < len(spelled):
            i, piece = next((i, piece) for i, piece in enumerate(spelled) if ids[piece] != i)
            raise WeightsError(f"{source}: pieces {i} and {ids[piece]} are both {piece!r}")
        if "" in ids:
            raise WeightsError(f"{source}: piece {ids['']} is empty")
        for piece in (BOS, EOS, PAD, UNK):
            if piece not in ids:
                raise WeightsError(f"{source}: no piece {piece} among {len(ids)}: not a vocabulary of this family")
        type_V[ids[UNK]] = PieceType.UNKNOWN
        for i in np.flatnonzero(type_V == PieceType.UNKNOWN):
            if spelled[i] != UNK:
                raise WeightsError(f"{source}: piece {i}, {spelled[i]!r}, has the type UNKNOWN, as only {UNK} may")
        byte_ids = np.flatnonzero(type_V == PieceType.BYTE)
        for i in byte_ids:
            if spelled[i] not in BYTES:
                raise WeightsError(f"{source}: byte piece {i} is {spelled[i]!r}; bytes are <0x00> to <0xFF>")
        if len(byte_ids) < len(BYTES):
            missing = min(BYTES.keys() - {spelled[i] for i in byte_ids})
            raise WeightsError(f"{source}: no byte piece {missing}; characters without a piece need all 256")
        return vocabulary

    @classmethod
    def from_json(cls, data: bytes, *, source: str = "tokenizer.json") -> Vocabulary:
        """A vocabulary from the bytes of a Hugging Face tokenizer.json.

        Such a file ranks merges where SentencePiece ranks the pieces they make. The two agree when the merges come in
        the order of their pieces, as in every file converted from SentencePiece; this is checked.

        Raises:
            WeightsError: if the file is corrupt, describes another kind of tokenizer, or ranks its merges otherwise.
        """
        try:
            root = json.loads(data)
            model, added = root["model"], root["added_tokens"]
            if model["type"] != "BPE" or model["byte_fallback"] is not True:
                raise WeightsError(f"{source}: a {model['type']} model; this family has BPE with byte fallback")
            if root["normalizer"] != {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
                raise WeightsError(
                    f"{source}: normalizer {root['normalizer']}; this family's only replaces ' ' by {SPACE}"
                )
            ids: dict[str, int] = {token["content"]: token["id"] for token in added} | model["vocab"]
            special = {token["content"] for token in added if token["special"]}
            merged = np.array(
                [ids[m.replace(" ", "", 1) if isinstance(m, str) else "".join(m)] for m in model["merges"]]
            )
            pieces = sorted(ids, key=ids.__getitem__)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(f"{source}: not a tokenizer.json: {type(error).__name__}: {error}") from None
        if [ids[piece] for piece in pieces] != list(range(len(pieces))) or {*map(type, ids.values())} != {int}:
            raise WeightsError(f"{source}: the ids of its {len(pieces)} pieces do not run from 0 without a gap")
        if "<0x09>" not in ids and "\t" in ids:  # some published files show this one byte as the character it is
            pieces[ids["\t"]] = "<0x09>"

        types = np.full(len(pieces), PieceType.NORMAL, dtype=np.uint8)
        types[[ids[token["content"]] for token in added]] = PieceType.USER_DEFINED
        types[[ids[piece] for piece in special]] = PieceType.CONTROL
        types[[i for i, piece in enumerate(pieces) if piece in BYTES]] = PieceType.BYTE
        normal = np.flatnonzero(types == PieceType.NORMAL)
        ranks = merged[types[merged] == PieceType.NORMAL] if merged.size else merged
        if (np.diff(ranks) < 0).any():
            raise WeightsError(
                f"{source}: merges are not in the order of the pieces they make; use the tokenizer.model"
            )
        scores = np.zeros(len(pieces), dtype=np.float32)
        scores[normal] = normal[:1] - normal
        return cls.from_pieces(pieces, scores, types, source=source)

    def with_added(self, tokens: Sequence[AddedToken], *, source: str = "vocabulary") -> Vocabulary:
        """The vocabulary with tokens that were added or renamed, in ascending order of their ids.

        Files of one model repeat its own added tokens, so nearly all are there already and stay as they are.

        Raises:
            WeightsError: if there is a gap before an id, or a piece would be there twice.
        """
        pieces, types = list(self.pieces), self.types.tolist()
        for token in tokens:
            spelled = token.piece.replace(" ", SPACE)
            if token.id < len(pieces):
                if pieces[token.id] == spelled or types[token.id] == PieceType.BYTE:
                    continue
                pieces[token.id] = spelled
            elif token.id == len(pieces):
                pieces.append(spelled)
                types.append(PieceType.NORMAL)
            else:
                raise WeightsError(
                    f"{source}: the added token {spelled!r} has the id {token.id} of {len(pieces)} pieces"
                )
            types[token.id] = PieceType.CONTROL if token.special else PieceType.USER_DEFINED
        if pieces == self.pieces:
            return self
        scores = np.concatenate([self.scores, np.zeros(len(pieces) - len(self.scores), np.float32)])
        return Vocabulary.from_pieces(pieces, scores, np.array(types), specs=self.specs, source=source)

    def with_infill(self) -> Vocabulary:
        """The CodeGemma vocabulary: unused pieces 67 to 70 renamed to the infilling tokens, if they are not already.

        Raises:
            WeightsError: if these ids are other pieces, as in Gemma 3.
        """
        pieces = list(self.pieces)
        for i, name in INFILL.items():
            if i >= len(pieces) or pieces[i] not in (name, f"<unused{i - 7}>"):
                found = repr(pieces[i]) if i < len(pieces) else "missing"
                raise WeightsError(f"piece {i} is {found}; to become {name} it must be <unused{i - 7}>, as in Gemma 1")
            pieces[i] = name
        return replace(self, pieces=pieces)

    def with_places(self) -> Vocabulary:
        """The PaliGemma vocabulary: places, mask codes and the placeholder of an image, as far as they are not there.

        Files of the vocabulary hold all of them, or the first two, or are Gemma's own.
        """
        pieces, added = list(self.pieces), [piece for piece in (*PLACES, IMAGE) if piece not in self.ids]
        types = np.concatenate([self.types, np.full(len(added), PieceType.USER_DEFINED, dtype=np.uint8)])
        pieces += added
        ids = self.ids | {piece: len(self.pieces) + i for i, piece in enumerate(added)}
        types[[ids[piece] for piece in PLACES]] = PieceType.USER_DEFINED  # found in text
        types[ids[IMAGE]] = PieceType.CONTROL
        scores = np.concatenate([self.scores, np.zeros(len(added), np.float32)])
        return replace(self, pieces=pieces, scores=scores, types=types)

    def control_ids(self) -> list[int]:
        """Ids of pieces that steer the model and are no text: `<bos>`, turns, image and infilling tokens, unused ones.

        Files disagree on their types (`<start_of_turn>` is control in one and user-defined in another), so that a
        user-defined piece in brackets counts as one too unless it is markup or a place.
        """
        control = [
            int(i) for i in np.flatnonzero((self.types == PieceType.CONTROL) | (self.types == PieceType.UNKNOWN))
        ]
        for i in np.flatnonzero(self.types == PieceType.USER_DEFINED):
            piece = self.pieces[i]
            if piece[0] + piece[-1] in ("<>", "[]") and not MARKUP.fullmatch(piece):
                control.append(int(i))
        return sorted(control)


def _spell(pieces: Sequence[str], source: str) -> list[str]:
    """Pieces with spaces written as `▁`, after checking that SentencePiece can hold each."""
    if not all(issubclass(kind, str) for kind in {*map(type, pieces)}):
        i, piece = next((i, piece) for i, piece in enumerate(pieces) if not isinstance(piece, str))
        raise WeightsError(f"{source}: piece {i} is of type {type(piece).__name__}, not str")
    spelled = [piece.replace(" ", SPACE) if " " in piece else piece for piece in pieces]
    try:
        text = "".join(spelled).encode()
    except UnicodeEncodeError:
        text = b"\0"
    if b"\0" in text:  # SentencePiece looks pieces up as NUL-terminated UTF-8
        i, piece = next((i, p) for i, p in enumerate(spelled) if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in p))
        raise WeightsError(f"{source}: piece {i} is {piece!r}, which is not UTF-8 text without NUL")
    return spelled
