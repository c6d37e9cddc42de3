"""The tokenizer in the metadata of a GGUF, `tokenizer.ggml.*`, read as llama.cpp reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

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
    types = _types(pieces, metadata.get("tokenizer.ggml.token_type"))
    return Tokenizer(_with_infill(Vocabulary.from_pieces(pieces, scores, types, source=label), metadata, label))


# Pieces that steer the model, in any vocabulary of the family; the rest in brackets is text, such as `<td>`.
_CONTROL = {
    "<pad>", "<eos>", "<bos>", "<mask>", "<2mass>", "[@BOS@]", "[multimodal]", "<start_of_turn>", "<end_of_turn>",
    "<start_of_image>", "<end_of_image>", "<image_soft_token>", *INFILL.values(),
    *(f"<unused{i}>" for i in range(6_242)),
}  # fmt: skip


def _types(pieces: Any, given: Any) -> np.ndarray:
    """The types of a file; control pieces that it calls normal are control, as llama.cpp has it for ends of turns.

    Typed NORMAL, an `<end_of_turn>` in a user's text would end the turn, and in an answer it would be shown. Without
    types the spelling decides.
    """
    types = np.full(len(pieces), PieceType.NORMAL, np.int32) if given is None else np.array(given)
    if types.shape != (len(pieces),):
        return types  # which the vocabulary refuses, with both numbers
    for i in [i for i, piece in enumerate(pieces) if piece in _CONTROL]:
        if types[i] == PieceType.NORMAL:
            types[i] = PieceType.CONTROL
    if given is None:
        types[[i for i, piece in enumerate(pieces) if piece in BYTES]] = PieceType.BYTE
    return types


def _with_infill(vocabulary: Vocabulary, metadata: Mapping[str, Any], label: str) -> Vocabulary:
    """The vocabulary with the names of infilling tokens at the ids that the metadata give.

    llama.cpp's converter writes three of the four. Where these are CodeGemma's the fourth is too.
    """
    pieces, infill = list(vocabulary.pieces), {}
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
        if not pieces[i].startswith("<unused") or name in vocabulary.pieces:
            raise WeightsError(f"{label}: {key}={i}, and that piece is {pieces[i]!r}: no infilling token")
        pieces[i] = name
    named = replace(vocabulary, pieces=pieces)
    return named.with_infill() if len(infill) >= 3 and infill.items() <= INFILL.items() else named
