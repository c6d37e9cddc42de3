"""Text to token ids and back.

One `Tokenizer`, whatever file it came from. SentencePiece does the merging; what is ours is the rule that a control
token spelled in text is data, exact decoding, and streaming that never splits a character.
"""

from __future__ import annotations

import codecs
import copy
import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import SupportsIndex

import numpy as np
from sentencepiece import SentencePieceProcessor

from gemkit.errors import TextError, WeightsError
from gemkit.text import sentencepiece_model
from gemkit.text.control import ControlTable
from gemkit.text.settings import Settings
from gemkit.text.vocabulary import BOS, BYTES, EOS, PAD, SPACE, PieceType, Vocabulary


class Tokenizer:
    """Text to ids and back, with one vocabulary.

    Control tokens (`<bos>`, `<start_of_turn>`, `<|fim_prefix|>`, `<unused7>`, ...) that are spelled in text are data:
    `encode` takes them apart into ordinary pieces, so that no prompt can pretend to be a turn. A prompt format puts
    their ids where they belong (`prompts.py`); a text that is known to hold them is read with `control=True`. Runs of
    spaces, newlines or tabs and tags such as `<td>` are ordinary pieces and always match.

    `decode(encode(text)) == text` for every text without U+2581 (`▁`), which the vocabulary cannot tell from a space.
    """

    spelled_control = False  # whether text that spells a control token is that token

    def __init__(self, vocabulary: Vocabulary, settings: Settings | None = None):
        self.vocabulary = vocabulary
        self.settings = Settings() if settings is None else settings
        self._control = frozenset(vocabulary.control_ids())
        self._byte = {
            int(i): bytes([BYTES[vocabulary.pieces[i]]]) for i in np.flatnonzero(vocabulary.types == PieceType.BYTE)
        }
        self._text_processor = self._processor(PieceType.CONTROL)
        self.bos: int = self.id(BOS)
        self.eos: int = self.id(EOS)
        self.pad: int = self.id(PAD)

    @classmethod
    def from_model(cls, model: bytes | str | Path) -> Tokenizer:
        """A tokenizer from a SentencePiece `tokenizer.model`, its path or its bytes.

        Raises:
            WeightsError: if it cannot be read, is corrupt, or is a tokenizer of another family.
        """
        if isinstance(model, bytes):
            return cls(sentencepiece_model.read(model))
        return cls(sentencepiece_model.read(_read(model), source=str(model)))

    @classmethod
    def from_json(cls, path: str | Path) -> Tokenizer:
        """A tokenizer from a Hugging Face `tokenizer.json`. Raises as `from_model` does."""
        return cls(Vocabulary.from_json(_read(path), source=str(path)))

    @classmethod
    def from_pieces(
        cls, pieces: Sequence[str], scores: Sequence[float] | np.ndarray, types: Sequence[int] | np.ndarray
    ) -> Tokenizer:
        """A tokenizer from parallel lists, as the metadata of a GGUF holds them (`Vocabulary.from_pieces`).

        Raises:
            WeightsError: if the lists do not make a vocabulary of this family.
        """
        return cls(Vocabulary.from_pieces(pieces, scores, types))

    def with_infill(self) -> Tokenizer:
        """This tokenizer with CodeGemma's names for pieces 67 to 70; for a member whose vocabulary is "codegemma".

        Raises:
            WeightsError: if these pieces are in other use.
        """
        return Tokenizer(self.vocabulary.with_infill(), self.settings)

    def with_places(self) -> Tokenizer:
        """This tokenizer with PaliGemma's places, mask codes and `<image>`; for a member whose vocabulary is
        "paligemma"."""
        return Tokenizer(self.vocabulary.with_places(), self.settings)

    def with_settings(self, settings: Settings) -> Tokenizer:
        """This tokenizer, used as other settings say."""
        made = copy.copy(self)
        made.__dict__.pop("turn_end_ids", None)
        made.settings = settings
        return made

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.model`, with every piece typed as in the file that this tokenizer came from."""
        Path(path).write_bytes(sentencepiece_model.write(self.vocabulary))

    def __len__(self) -> int:
        return len(self.vocabulary.pieces)

    def __repr__(self) -> str:
        return f"Tokenizer({len(self)} pieces)"

    # ids and pieces

    def __contains__(self, piece: str) -> bool:
        return piece in self.vocabulary.ids

    def id(self, piece: str) -> int:
        """The id of a piece by its exact spelling: `<bos>`, `▁the`, `<0x0A>`.

        Raises:
            TextError: if the vocabulary has no such piece.
        """
        if piece not in self:
            raise TextError(f"no piece {piece!r} in this vocabulary of {len(self)} (a space in a piece is {SPACE})")
        return self.vocabulary.ids[piece]

    def piece(self, id: SupportsIndex) -> str:
        """The spelling of an id.

        Raises:
            TextError: if the id is out of range.
        """
        return self.vocabulary.pieces[self._check(id)]

    def is_control(self, id: SupportsIndex) -> bool:
        """Whether an id steers the model and is no text."""
        return self._check(id) in self._control

    @property
    def start_of_turn(self) -> int | None:
        return self.id("<start_of_turn>") if "<start_of_turn>" in self else None

    @property
    def end_of_turn(self) -> int | None:
        return self.id("<end_of_turn>") if "<end_of_turn>" in self else None

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids after which a model has nothing more to say: `<eos>`, `<end_of_turn>` where there is one, and those that
        its files name."""
        return self.settings.ends | ({self.eos} if self.end_of_turn is None else {self.eos, self.end_of_turn})

    @cached_property
    def turn_end_ids(self) -> frozenset[int]:
        """Ids with which a foreign chat template ends an answer; none for the family's turns (`end_ids` has theirs)."""
        template = self.settings.chat_template
        return frozenset() if template is None else template.turn_ends(self)

    @cached_property
    def control_table(self) -> ControlTable:
        """The spellings of the control tokens."""
        return ControlTable(self.vocabulary.pieces[i] for i in self._control)

    # encoding

    def encode(self, text: str, *, control: bool = False) -> list[int]:
        """The ids of `text`, without `<bos>`.

        Args:
            control: read control tokens that are spelled in `text` as such (all but `<unk>`). Only for text that was
                not written by a user, for example a template rendered by another program.

        Raises:
            TextError: if `text` is not a str, or holds a lone surrogate.
        """
        if not isinstance(text, str):
            raise TextError(f"text to encode must be str, not {type(text).__name__}")
        try:
            utf8 = text.encode()
        except UnicodeEncodeError as error:
            raise TextError(
                f"character {error.start} of the text is the lone surrogate U+{ord(text[error.start]):04X}, which is "
                "no character; text read with errors='surrogateescape' must be decoded otherwise"
            ) from None
        return (self._control_processor if control else self._text_processor).encode(utf8)

    def with_bos(self, ids: Sequence[int]) -> list[int]:
        """`ids` with `<bos>` in front, which every member needs; unchanged if it is there already."""
        return [*ids] if len(ids) and ids[0] == self.bos else [self.bos, *ids]

    # decoding

    def decode(self, ids: Iterable[SupportsIndex], *, control: bool = False) -> str:
        """The exact text of `ids`: nothing is stripped; bytes that are not valid UTF-8 become U+FFFD.

        Args:
            control: show control tokens, spelled out, instead of leaving them out.

        Raises:
            TextError: if an id is out of range.
        """
        return b"".join([self.bytes(i, control=control) for i in ids]).decode(errors="replace")

    def bytes(self, id: SupportsIndex, *, control: bool = False) -> bytes:
        """The UTF-8 bytes that one id stands for, which may be part of a character; see `decode`."""
        i = self._check(id)
        if i in self._byte:
            return self._byte[i]
        if i in self._control and not control:
            return b""
        return self.vocabulary.pieces[i].replace(SPACE, " ").encode()

    def stream(self, *, control: bool = False) -> StreamDecoder:
        """A decoder for ids that come one at a time."""
        return StreamDecoder(self, control=control)

    def _check(self, id: SupportsIndex) -> int:
        try:
            i = operator.index(id)
        except TypeError:
            raise TextError(f"token id {id!r} is not a whole number") from None
        if not 0 <= i < len(self):
            raise TextError(f"token id {i} is out of range: the vocabulary has ids 0 to {len(self) - 1}")
        return i

    @cached_property
    def _control_processor(self) -> SentencePieceProcessor:
        return self._processor(PieceType.USER_DEFINED)

    def _processor(self, control_type: PieceType) -> SentencePieceProcessor:
        """SentencePiece over the vocabulary with all control pieces typed as given: CONTROL never matches text,
        USER_DEFINED always does. `<unk>` stays the one unknown piece that SentencePiece insists on."""
        types = self.vocabulary.types.copy()
        types[list(self._control)] = control_type
        types[self.vocabulary.types == PieceType.UNKNOWN] = PieceType.UNKNOWN
        processor = SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(sentencepiece_model.write(replace(self.vocabulary, types=types)))
        except RuntimeError as error:
            raise WeightsError(f"SentencePiece refuses this vocabulary of {len(self)} pieces: {error}") from None
        return processor


class StreamDecoder:
    """Text from ids that come one at a time.

    The pieces of a character that is still incomplete are held back. The deltas joined are exactly `decode` of all ids;
    a byte that can no longer become part of a character comes out as U+FFFD at once, one that never did at `finish`.
    """

    def __init__(self, tokenizer: Tokenizer, *, control: bool = False):
        self._tokenizer = tokenizer
        self._show_control = control
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: SupportsIndex) -> str:
        """The text that `id` completes, often empty. Raises TextError if the id is out of range."""
        return self._utf8.decode(self._tokenizer.bytes(id, control=self._show_control))

    def finish(self) -> str:
        """The rest of an incomplete character, as U+FFFD. The decoder may then be used for another text."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}") from None
