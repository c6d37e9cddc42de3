import json
from contextlib import suppress
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemkit.errors import WeightsError
from gemkit.text import PieceType, Tokenizer, Vocabulary
from gemkit.text.sentencepiece_model import read
from support.vocabularies import gguf_lists, small_model, tokenizer, tokenizer_json


def small_lists() -> tuple[list, np.ndarray, np.ndarray]:
    vocabulary = read(small_model())
    return vocabulary.pieces.copy(), vocabulary.scores.copy(), vocabulary.types.copy()


@cache
def small_json_text() -> str:
    """The small vocabulary in the layout of a tokenizer.json."""
    pieces, _, types = small_lists()
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        [piece[:i], piece[i:]]
        for piece, kind in zip(pieces, types, strict=True)
        for i in range(1, len(piece))
        if kind == PieceType.NORMAL and piece[:i] in vocab and piece[i:] in vocab
    ]
    added = [
        {"id": i, "content": pieces[i], "special": bool(types[i] != PieceType.USER_DEFINED)}
        for i in np.flatnonzero(np.isin(types, (PieceType.CONTROL, PieceType.UNKNOWN, PieceType.USER_DEFINED))).tolist()
    ]
    return json.dumps(
        {
            "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            "added_tokens": added,
            "model": {"type": "BPE", "byte_fallback": True, "vocab": vocab, "merges": merges},
        }
    )


def test_json_and_gguf_of_gemma3_agree():
    """The two published files list the same pieces in the same order of merging; the JSON adds one image token."""
    ours, theirs = tokenizer("gemma3").vocabulary, tokenizer("gguf").vocabulary
    assert ours.pieces[:-1] == theirs.pieces
    assert ours.pieces[-1] == "<image_soft_token>"
    normal = np.flatnonzero(theirs.types == PieceType.NORMAL)
    assert (ours.types[normal] == PieceType.NORMAL).all()
    assert (np.diff(ours.scores[normal]) < 0).all()
    assert (np.diff(theirs.scores[normal]) < 0).all()
    assert ours.control_ids()[:-1] == theirs.control_ids()


def test_the_gguf_spells_runs_of_spaces_with_spaces():
    pieces, _, types = gguf_lists()
    assert pieces[138] == "  "
    assert types[3] == PieceType.CONTROL
    vocabulary = tokenizer("gguf").vocabulary
    assert vocabulary.pieces[138] == "▁▁"
    assert vocabulary.types[3] == PieceType.UNKNOWN


def test_control_pieces():
    vocabulary = tokenizer("gemma2").vocabulary
    control = {vocabulary.pieces[i] for i in vocabulary.control_ids()}
    unused = {f"<unused{i}>" for i in range(100)}
    assert control - unused == {
        *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]"),
        *("<start_of_turn>", "<end_of_turn>", "[toxicity=0]"),
    }
    assert unused < control


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p, s, t: (p[:-1], s, t), "511 pieces, 512 scores, 512 types"),
        (lambda p, s, t: (p, s[1:], t), "512 pieces, 511 scores, 512 types"),
        (lambda p, s, t: (p, s.astype(np.uint8), t), "scores of dtype uint8"),
        (lambda p, s, t: (p, s, t.astype(np.float32)), "types of dtype float32"),
        (lambda p, s, t: (p, s[None], t), r"shape \(1, 512\)"),
        (lambda p, s, t: (p, s, [2**70] * 512), "types of dtype object"),
        (lambda p, s, t: ([b"x", *p[1:]], s, t), "piece 0 is of type bytes"),
        (lambda p, s, t: (["", *p[1:]], s, t), "piece 0 is empty"),
        (lambda p, s, t: ([*p[:-1], p[300]], s, t), "pieces 300 and 511 are both"),
        (lambda p, s, t: ([*p[:-1], "a\0"], s, t), "piece 511 is 'a.x00'"),
        (lambda p, s, t: ([*p[:-1], "\udc80"], s, t), "piece 511 is '.udc80'"),
        (lambda p, s, t: (p, np.where(np.arange(512) == 400, np.nan, s), t), "piece 400.* has the score nan"),
        (lambda p, s, t: (p, s, np.where(np.arange(512) == 400, 7, t)), "piece 400.* has the type 7"),
        (lambda p, s, t: (p, s, np.where(np.arange(512) == 400, -1, t.astype(int))), "piece 400.* has the type -1"),
        (lambda p, s, t: (p, s, np.where(np.arange(512) == 400, 2, t)), "piece 400.* has the type UNKNOWN"),
        (lambda p, s, t: (["x<pad>", *p[1:]], s, t), "no piece <pad>"),
        (lambda p, s, t: ([*p[:2], "x<bos>", *p[3:]], s, t), "no piece <bos>"),
        (lambda p, s, t: ([x if x != "<0x0A>" else "<0xZZ>" for x in p], s, t), "byte piece 21 is '<0xZZ>'; bytes are"),
        (lambda p, s, t: ([x if x != "<0x0A>" else "<0x-1>" for x in p], s, t), "byte piece 21 is '<0x-1>'; bytes are"),
        (lambda p, s, t: ([x if x != "<0x0A>" else "<0x0a>" for x in p], s, t), "byte piece 21 is '<0x0a>'; bytes are"),
        (lambda p, s, t: (p, s, np.where(np.arange(512) == 21, 1, t)), "no byte piece <0x0A>"),
        (lambda p, s, t: ([], np.zeros(0, np.float32), np.zeros(0, np.int32)), "no piece <bos> among 0"),
    ],
)
def test_lists_that_make_no_vocabulary_are_refused(break_it, message):
    with pytest.raises(WeightsError, match=message):
        Tokenizer.from_pieces(*break_it(*small_lists()))


def test_a_json_gives_the_same_ids_as_the_model(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text(small_json_text())
    text = "def random(self):\n\n    <td>x</td> 123 <end_of_turn> é"
    assert Tokenizer.from_json(file).encode(text) == Tokenizer.from_model(small_model()).encode(text)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["model"], None, "not a tokenizer.json: TypeError"),
        (["model", "type"], "Unigram", "a Unigram model"),
        (["model", "byte_fallback"], False, "byte fallback"),
        (["model", "vocab", "x"], "1", "not a tokenizer.json: TypeError"),
        (["model", "vocab", "new piece"], 600, "do not run from 0 without a gap"),
        (["model", "vocab", "new piece"], 512.0, "do not run from 0 without a gap"),
        (["model", "merges"], [["no", "such piece"]], "not a tokenizer.json: KeyError: 'nosuch piece'"),
        (["model", "merges"], 7, "not a tokenizer.json: TypeError"),
        (["added_tokens"], [{"id": 0}], "not a tokenizer.json: KeyError: 'content'"),
        (["normalizer"], {"type": "Prepend", "prepend": "▁"}, "normalizer .*Prepend"),
    ],
)
def test_a_json_of_another_kind_is_refused(path, value, message):
    root = json.loads(small_json_text())
    *parents, last = path
    node = root
    for key in parents:
        node = node[key]
    node[last] = value
    with pytest.raises(WeightsError, match=message):
        Vocabulary.from_json(json.dumps(root).encode())


def test_a_json_with_another_order_of_merges_is_refused():
    root = json.loads(small_json_text())
    root["model"]["merges"].reverse()
    with pytest.raises(WeightsError, match="not in the order of the pieces"):
        Vocabulary.from_json(json.dumps(root).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"<html>", b"\xff\xfe", b"[" * 100_000, b'{"model": 1e999}', b"null"])
def test_what_is_no_json_of_a_tokenizer_is_refused(data):
    with pytest.raises(WeightsError, match=r"not a tokenizer\.json"):
        Vocabulary.from_json(data)


@given(st.data())
def test_a_damaged_json_is_an_error_or_a_vocabulary(data):
    damaged = bytearray(small_json_text().encode())
    at = data.draw(st.integers(0, len(damaged)))
    damaged[at : at + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=5))
    with suppress(WeightsError):
        assert len(Vocabulary.from_json(bytes(damaged)).pieces) >= 260


def test_infilling_pieces_are_renamed_in_the_codegemma_vocabulary_only():
    gemma, codegemma = tokenizer("gemma2"), tokenizer("codegemma")
    assert [codegemma.piece(i) for i in range(67, 71)] == [
        "<|fim_prefix|>",
        "<|fim_middle|>",
        "<|fim_suffix|>",
        "<|file_separator|>",
    ]
    assert [gemma.piece(i) for i in range(67, 71)] == ["<unused60>", "<unused61>", "<unused62>", "<unused63>"]
    assert len(codegemma) == len(gemma) == 256_000
    assert codegemma.vocabulary.with_infill().pieces == codegemma.vocabulary.pieces
    with pytest.raises(WeightsError, match="piece 67 is '<unused61>'"):
        tokenizer("gemma3").vocabulary.with_infill()
    with pytest.raises(WeightsError, match="piece 67 is"):
        read(small_model()).with_infill()


def test_the_published_json_is_not_changed_by_loading():
    assert tokenizer("gemma2").piece(226) == "<0x09>"  # which that file shows as a tab
    assert json.loads(tokenizer_json("gemma2").read_bytes())["model"]["vocab"]["\t"] == 226


def test_places_have_the_published_ids_and_are_text():
    """As in google-research/big_vision: <loc0000> is 256000, <seg000> 257024; Hugging Face's <image> 257152."""
    ours = tokenizer("paligemma")
    ids = {"<loc0000>": 256_000, "<loc1023>": 257_023, "<seg000>": 257_024, "<seg127>": 257_151, "<image>": 257_152}
    assert {piece: ours.id(piece) for piece in ids} == ids
    assert len(ours) == 257_153
    assert ours.encode("<loc0012><loc1023> cat") == [256_012, 257_023, *ours.encode(" cat")]
    assert ours.decode([256_012, 257_024]) == "<loc0012><seg000>"
    assert not ours.is_control(256_012)
    assert ours.is_control(257_152)
    assert 257_152 not in ours.encode("<image>")  # spelled by a user it is text
    assert ours.encode("Hello world!") == tokenizer("gemma2").encode("Hello world!")


def test_places_are_added_to_what_a_file_lacks(tmp_path):
    """Files hold all of them, all but <image>, or none; saved and read again they are the same."""
    ours = tokenizer("paligemma")
    ours.save(tmp_path / "tokenizer.model")
    again = Tokenizer.from_model(tmp_path / "tokenizer.model")
    assert again.vocabulary.pieces == ours.vocabulary.pieces
    assert again.encode("<loc0012>") == [256_012]
    without_image = Tokenizer.from_pieces(*(column[:-1] for column in columns(ours)))
    for each in (again, without_image):
        done = each.with_places()
        assert done.vocabulary.pieces == ours.vocabulary.pieces
        assert done.is_control(257_152)
        assert not done.is_control(256_012)


def columns(ours):
    return ours.vocabulary.pieces, ours.vocabulary.scores, ours.vocabulary.types
