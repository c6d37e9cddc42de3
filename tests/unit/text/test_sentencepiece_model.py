import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from gemkit.errors import WeightsError
from gemkit.text import PieceType, Tokenizer
from gemkit.text.sentencepiece_model import read, write
from support.vocabularies import small_model


def test_reads_what_sentencepiece_reads():
    vocabulary, theirs = read(small_model()), SentencePieceProcessor(model_proto=small_model())
    ids = range(theirs.vocab_size())
    assert vocabulary.pieces == [theirs.id_to_piece(i) for i in ids]
    assert vocabulary.scores.tolist() == [theirs.get_score(i) for i in ids]
    for kind, has_type in (
        (PieceType.UNKNOWN, theirs.is_unknown),
        (PieceType.CONTROL, theirs.is_control),
        (PieceType.BYTE, theirs.is_byte),
        (PieceType.UNUSED, theirs.is_unused),
    ):
        assert (vocabulary.types == kind).tolist() == [has_type(i) for i in ids]


def test_writes_the_bytes_that_sentencepiece_wrote():
    assert write(read(small_model())) == small_model()


def test_long_pieces_and_every_type_survive():
    vocabulary = read(small_model())
    vocabulary.pieces[-3:] = ["x" * 127, "y" * 128, "z" * 40_000]
    vocabulary.types[-4] = PieceType.UNUSED
    vocabulary.scores[-1] = -1e30
    again = read(write(vocabulary))
    assert again.pieces == vocabulary.pieces
    assert np.array_equal(again.types, vocabulary.types)
    assert np.array_equal(again.scores, vocabulary.scores)
    with pytest.raises(WeightsError, match="SentencePiece refuses"):
        Tokenizer(vocabulary)  # 40,000 bytes are more than it takes


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"model_type": "unigram"}, "trainer_spec.model_type is 1"),
        ({"byte_fallback": False}, "trainer_spec.byte_fallback is 0"),
        ({"add_dummy_prefix": True}, "normalizer_spec.add_dummy_prefix is 1"),
        ({"remove_extra_whitespaces": True}, "normalizer_spec.remove_extra_whitespaces is 1"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizer_spec.precompiled_charsmap is"),
        ({"treat_whitespace_as_suffix": True}, "trainer_spec.treat_whitespace_as_suffix is 1"),
        ({"bos_piece": "<s>"}, "no piece <bos>"),
    ],
)
def test_tokenizers_of_other_families_are_refused_by_name(options, setting):
    with pytest.raises(WeightsError, match=setting):
        read(small_model(**options), source="a.model")


def test_every_truncation_is_refused():
    """At many places among the pieces, and at every place in the settings behind them."""
    model = small_model()
    for size in [*range(0, len(model) - 200, 31), *range(len(model) - 200, len(model))]:
        with pytest.raises(WeightsError):
            read(model[:size])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes without a single piece"),
        (b"<!DOCTYPE html><html>", "corrupt after 0 pieces"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "needs 9223372036854775807 bytes, 0 are left"),
        (b"\x0a" + b"\xff" * 1000, "number at byte 1 does not end"),
        (b"\x02\x00", "field number 0 at byte 0"),
        (b"\x0b", "wire type 3 at byte 0"),
        (b"\x0a\x03\x0a\x01\xff", "corrupt after 0 pieces: 'utf-8'"),
    ],
)
def test_corrupt_bytes_say_what_is_wrong(data, message):
    with pytest.raises(WeightsError, match=message):
        read(data)


@given(data=st.data())
def test_a_damaged_file_is_an_error_or_a_working_tokenizer(data):
    """Also SentencePiece, which is C++, only ever sees what passed the checks."""
    model = bytearray(small_model())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(model)))
        cut = data.draw(st.integers(0, 40))
        model[at : at + cut] = data.draw(st.binary(max_size=40))
    try:
        tokenizer = Tokenizer.from_model(bytes(model))
    except WeightsError:
        return
    assert isinstance(tokenizer.decode(tokenizer.encode("any text \n 12 é")), str)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(data):
    with pytest.raises(WeightsError):
        read(data)
