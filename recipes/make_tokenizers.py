"""The small vocabularies of the recipes, made anew: `python recipes/make_tokenizers.py`.

    code.model      2,048 pieces of the Python standard library's own files, with CodeGemma's infilling tokens
    shapes.model    words of colours and shapes, for pictures
    letters.model   characters one by one

They lie in `tokenizers/`, for the standard library of another Python would make another code.model.
"""

from __future__ import annotations

import string
import sys
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent))

from common import FAMILY, TOKENIZERS, library_files, small_tokenizer

from gemkit.text import PieceType, Tokenizer, tasks
from gemkit.text.vocabulary import BYTES


def code() -> Tokenizer:
    texts = [path.read_text(encoding="utf-8") for path in library_files()]
    return small_tokenizer(texts, 2048, infill=True)


def shapes() -> Tokenizer:
    colours = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white")
    things = [f"{colour} {shape}" for colour in colours for shape in ("circle", "square", "triangle", "star")]
    texts = [f"{tasks.detect(thing)} ; {other}" for thing in things for other in things]
    return small_tokenizer([*texts, "caption en answer en segment ocr"], 640)


def letters() -> Tokenizer:
    """No merges: every character that is no letter of this alphabet is spelled in bytes."""
    pieces = {
        **dict.fromkeys(("<pad>", "<eos>", "<bos>"), PieceType.CONTROL),
        "<unk>": PieceType.UNKNOWN,
        **dict.fromkeys(FAMILY, PieceType.USER_DEFINED),
        **dict.fromkeys(BYTES, PieceType.BYTE),
        **dict.fromkeys(["▁", *string.ascii_letters, *string.digits, *".,:;!?<>=+-*()"], PieceType.NORMAL),
    }
    return Tokenizer.from_pieces(list(pieces), np.zeros(len(pieces), np.float32), [*pieces.values()])


def main() -> None:
    TOKENIZERS.mkdir(exist_ok=True)
    for make in (code, shapes, letters):
        made = make()
        made.save(TOKENIZERS / f"{make.__name__}.model")
        print(f"{make.__name__}.model: {len(made)} pieces")


if __name__ == "__main__":
    main()
