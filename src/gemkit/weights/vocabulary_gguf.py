"""The tokenizer in the metadata of a GGUF, `tokenizer.ggml.*`, read as llama.cpp reads it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from gemkit.errors import WeightsError
from gemkit.text import Tokenizer
from gemkit.text.vocabulary import BYTES, INFILL, PieceType, Vocabulary

# Keys of the infilling tokens, today's first; with llama.cpp the ids count, whatever the pieces are called.
_INFILL_KEYS = {
    "<|fim_prefix|>": ("fim_pre_token_id", "prefix_token_id"),
    "<|fim_middle|>": ("fim_mid_token_id", "middle_token_id"),
    "<|fim_suffix|>": ("fim_suf_token_id", "suffix_token_id"),
    "<|file_separator|>": ("fim_sep_token_id",),
}


def from_metadata(metadata: Mapping[str, Any], label: str) -> Tokenizer:
    """The tokenizer of a GGUF.

    Raises:
        WeightsError: if there is none, if it is of another kind than the family's, or if its scores, by which pieces
            are merged, are not there.
    """
    pieces = metadata.get("tokenizer.ggml.tokens")
    if pieces is None:
        raise WeightsError(
            f"{label}: the GGUF holds no vocabulary (tokenizer.ggml.tokens): take one that was converted with its "
            "tokenizer, or the Hugging Face folder of the model"
        )
    model = metadata.get("tokenizer.ggml.model", "llama")
    if model != "llama":
        raise WeightsError(f"{label}: tokenizer.ggml.model={model!r}; this family's is 'llama': SentencePiece's merges")
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None:
        raise WeightsError(
            f"{label}: the GGUF has no tokenizer.ggml.scores, without which pieces are merged in another order than in "
            "training: convert the model again"
        )
    types = metadata.get("tokenizer.ggml.token_type")
    vocabulary = Vocabulary.from_pieces(pieces, scores, _spelled(pieces) if types is None else types, source=label)
    _type_control(vocabulary)
    return Tokenizer(_with_infill(vocabulary, metadata, label))


# Pieces that steer the model, in any vocabulary of the family; the rest in brackets is text, such as `<td>`.
_CONTROL = {
    "<pad>", "<eos>", "<bos>", "<mask>", "<2mass>", "[@BOS@]", "[multimodal]", "<start_of_turn>", "<end_of_turn>",
    "<start_of_image>", "<end_of_image>", "<image_soft_token>", *INFILL.values(),
    *(f"<unused{i}>" for i in range(6_242)),
}  # fmt: skip


def _spelled(pieces: Iterable[str]) -> list[int]:
    """The types of pieces by their spelling, for a file without types."""
    return [PieceType.BYTE if piece in BYTES else PieceType.NORMAL for piece in pieces]


def _type_control(vocabulary: Vocabulary) -> None:
    """Control pieces that a file calls normal are made control, as llama.cpp has it for ends of turns.

    Typed NORMAL, an `<end_of_turn>` in a user's text would end the turn, and in an answer it would be shown.
    """
    for i in [vocabulary.ids[piece] for piece in _CONTROL if piece in vocabulary.ids]:
        if vocabulary.types[i] == PieceType.NORMAL:
            vocabulary.types[i] = PieceType.CONTROL


def _with_infill(vocabulary: Vocabulary, metadata: Mapping[str, Any], label: str) -> Vocabulary:
    """The vocabulary with the names of infilling tokens at the ids that the metadata give.

    llama.cpp's converter writes three of the four. Where these are CodeGemma's the fourth is too.
    """
    pieces, renamed, infill = vocabulary.pieces, {}, {}
    for name, keys in _INFILL_KEYS.items():
        key = next((f"tokenizer.ggml.{key}" for key in keys if f"tokenizer.ggml.{key}" in metadata), None)
        if key is None:
            continue
        i = metadata[key]
        if type(i) is not int or not 0 <= i < len(pieces):
            raise WeightsError(f"{label}: {key}={i!r} is not the id of one of its {len(pieces)} pieces")
        infill[i] = name
        if pieces[i] == name:
            continue
        if not pieces[i].startswith("<unused") or name in vocabulary.ids:
            raise WeightsError(f"{label}: {key}={i}, and that piece is {pieces[i]!r}: no infilling token")
        renamed[i] = name
    named = vocabulary
    if renamed:
        named = replace(vocabulary, pieces=[renamed.get(i, piece) for i, piece in enumerate(pieces)])
    return named.with_infill() if len(infill) >= 3 and infill.items() <= INFILL.items() else named
