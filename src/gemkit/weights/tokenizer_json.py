"""A tokenizer.json beside or instead of a tokenizer.model: Transformers reads the former wherever it is.

A class of Gemma's takes pieces and merges from it and splits and joins texts in its own way; a class of no model does
as the file says (tokenization_auto.py, tokenization_utils_tokenizers.py of Transformers 5.23).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from gemkit.errors import WeightsError
from gemkit.text import PieceType, Tokenizer
from gemkit.text.vocabulary import SPACE
from gemkit.weights.keys_beside import TOKENIZER_JSON
from gemkit.weights.known_keys import check_keys

_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
_JOIN = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
# the family's settings; a text has no space left to split at when the pre-tokenizer sees it, so that null is the same
_FAMILY: dict[str, tuple[Any, ...]] = {
    "normalizer": ({"type": "Replace", "pattern": {"String": " "}, "content": SPACE},),
    "pre_tokenizer": (_SPLIT, None),
    "decoder": ({"type": "Sequence", "decoders": _JOIN},),
    "dropout": (None, 0),
    "byte_fallback": (True,),
    "ignore_merges": (False, None),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
}
_OF_NO_MODEL = ("TokenizersBackend", "PreTrainedTokenizer")


class TokenizerJson:
    """The file without its merges, which are most of it.

    Raises:
        WeightsError: if it cannot be read.
    """

    def __init__(self, path: Path):
        try:
            self.settings: dict[str, Any] = msgspec.json.decode(path.read_bytes(), type=dict[str, msgspec.Raw])
            model = msgspec.json.decode(self.settings.pop("model"), type=dict[str, msgspec.Raw])
            self._vocab = model.pop("vocab")
            model.pop("merges", None)
            self.settings = {key: msgspec.json.decode(value) for key, value in self.settings.items()}
            self.settings |= {f"model.{key}": msgspec.json.decode(value) for key, value in model.items()}
        except (OSError, msgspec.MsgspecError, KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"{path}: not a tokenizer.json: {type(error).__name__}: {error}") from None

    def check(self, tokenizer_class: Any, seeing: bool) -> list[str]:
        """Notes on settings that are not used.

        Args:
            tokenizer_class: of the tokenizer_config.json, or None.
            seeing: the model type is PaliGemma's, which has no class of its own.

        Raises:
            WeightsError: for a setting by which Transformers would give a text other ids, or ids another text.
        """
        name = str(tokenizer_class or (_OF_NO_MODEL[0] if seeing else "GemmaTokenizer")).removesuffix("Fast")
        if name not in ("GemmaTokenizer", *_OF_NO_MODEL):
            raise WeightsError(
                f"tokenizer_config.json: tokenizer_class={tokenizer_class!r} is not implemented: it splits texts in "
                "another way than this family's"
            )
        notes = check_keys({k: v for k, v in self.settings.items() if "." not in k}, TOKENIZER_JSON, "tokenizer.json")
        for key, known in _FAMILY.items():
            found = self.settings.get(key, self.settings.get(f"model.{key}"))
            if found in known:
                continue
            if name in _OF_NO_MODEL:
                raise WeightsError(f"tokenizer.json: {key}={found!r} is not implemented; this family's is {known[0]!r}")
            notes.append(f"tokenizer.json: {key}={found!r} is not used: {name} has one of its own")
        return notes

    def difference(self, plain: Tokenizer, named: Tokenizer) -> str | None:
        """The first piece in which the file differs from a tokenizer.model; None if there is none.

        Args:
            plain: the tokenizer.model.
            named: the same with the names that its member gives to pieces.
        """
        try:
            vocab = msgspec.json.decode(self._vocab, type=dict[str, int])
            added = {token["id"] for token in self.settings.get("added_tokens", ())}
        except (msgspec.MsgspecError, KeyError, TypeError) as error:
            raise WeightsError(f"tokenizer.json: its pieces are damaged: {error}") from None
        ours, theirs, types = named.vocabulary.pieces, plain.vocabulary.pieces, named.vocabulary.types.tolist()
        for piece, i in vocab.items():
            there = i < len(ours)
            if there and (ours[i] == piece or types[i] == PieceType.BYTE or ours[i] == piece.replace(" ", SPACE)):
                continue
            if i not in added and not (i < len(theirs) and theirs[i] == piece):
                return f"{i} is {piece!r} in it, and {ours[i]!r} there" if there else f"{i}, {piece!r}, is not there"
        left = min(set(range(len(theirs))) - set(vocab.values()) - added, default=None)
        return None if left is None else f"{left}, {theirs[left]!r}, is there alone"


def post_processor(settings: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether a tokenizer.json puts special tokens before a text, and after it."""
    return _around(settings.get("post_processor"))


def _around(given: Any) -> tuple[bool, bool]:
    if not isinstance(given, Mapping):
        return False, False
    if given.get("type") == "Sequence":
        each = [_around(part) for part in given.get("processors", ())]
        return any(before for before, _ in each), any(after for _, after in each)
    kinds = ["Sequence" in part for part in given.get("single", ())]
    return (bool(kinds) and not kinds[0]), (bool(kinds) and not kinds[-1])
