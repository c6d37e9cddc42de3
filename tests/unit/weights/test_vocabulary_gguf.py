"""The tokenizer in the metadata of a GGUF, as people's files have it, against llama.cpp's reading of the keys."""

import numpy as np
import pytest

from gemkit.errors import WeightsError
from gemkit.text.vocabulary import PieceType
from gemkit.weights.vocabulary_gguf import from_metadata
from support.gguf_files import vocabulary
from support.tiny_models import tokenizer

CODE = tokenizer(code=True)
TEXT = "<end_of_turn> x <bos>|\n<|fim_prefix|> é"


def metadata(of=CODE, **changes):
    keys = {**vocabulary(of), **{f"tokenizer.ggml.{name}": value for name, value in changes.items()}}
    return {key: value for key, value in keys.items() if value is not None}


def read(of=CODE, **changes):
    return from_metadata(metadata(of, **changes), "x.gguf")


def test_a_vocabulary_comes_back():
    ours = read()
    assert ours.vocabulary.pieces == CODE.vocabulary.pieces
    assert np.array_equal(ours.vocabulary.types, CODE.vocabulary.types)
    assert ours.encode(TEXT) == CODE.encode(TEXT)


def test_without_types_the_names_decide():
    ours = read(token_type=None)
    assert np.array_equal(ours.vocabulary.types, CODE.vocabulary.types)


@pytest.mark.parametrize("wrong", [["<end_of_turn>"], ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<|fim_prefix|>"]])
def test_control_pieces_typed_normal_are_control(wrong):
    """As llama.cpp overrides the type of ends of turns, with a warning that it is probably a bug in the file."""
    types = [PieceType.NORMAL if piece in wrong else kind for piece, kind in zip(
        CODE.vocabulary.pieces, CODE.vocabulary.types, strict=True)]  # fmt: skip
    ours = read(token_type=types)
    assert all(ours.is_control(ours.id(piece)) for piece in wrong)
    assert ours.encode(TEXT) == CODE.encode(TEXT)


UNNAMED = {id: f"<unused{number}>" for number, id in enumerate(map(CODE.id, [
    "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_separator|>"]))}  # fmt: skip
NEW = ("fim_pre", "fim_mid", "fim_suf", "fim_sep")
OLD = ("prefix", "middle", "suffix")


def unnamed(names, ids):
    pieces = [UNNAMED.get(i, piece) for i, piece in enumerate(CODE.vocabulary.pieces)]
    return read(tokens=pieces, **{f"{name}_token_id": i for name, i in zip(names, ids, strict=False)})


@pytest.mark.parametrize("names", [NEW, OLD, (*OLD, "fim_sep")])
def test_infilling_tokens_are_those_of_the_metadata(names):
    ours = unnamed(names, UNNAMED)
    wanted = list(UNNAMED)
    found = ["<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|file_separator|>"][: len(names)]
    assert [ours.id(piece) for piece in found] == wanted[: len(names)]
    assert all(ours.is_control(i) for i in wanted)


def test_both_spellings_of_a_key_may_be_there_and_the_new_one_counts():
    first, second, *_ = UNNAMED
    assert unnamed(("fim_pre", "prefix"), (second, first)).id("<|fim_prefix|>") == second


def test_ids_that_are_no_infilling_tokens_are_refused():
    with pytest.raises(WeightsError, match="fim_pre_token_id=9999 is not the id of one of its"):
        read(fim_pre_token_id=9999)
    with pytest.raises(WeightsError, match=r"prefix_token_id=2, and that piece is '<bos>': no infilling token"):
        read(tokenizer(), prefix_token_id=2)
    with pytest.raises(WeightsError, match=r"fim_suf_token_id=\d+, and that piece is '<\|fim_prefix\|>'"):
        read(fim_suf_token_id=CODE.id("<|fim_prefix|>"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, r"holds no vocabulary \(tokenizer\.ggml\.tokens\): take one that was converted with its"),
        ({"scores": None}, r"has no tokenizer\.ggml\.scores, without which pieces are merged in another order"),
        ({"model": "gpt2"}, r"tokenizer\.ggml\.model='gpt2'; this family's is 'llama'"),
        ({"token_type": [1, 2]}, r"\d+ pieces, \d+ scores, 2 types"),
    ],
)
def test_vocabularies_that_cannot_be_read(changes, message):
    with pytest.raises(WeightsError, match=message):
        read(**changes)
