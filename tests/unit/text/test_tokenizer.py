import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from gemkit.errors import TextError, WeightsError
from gemkit.text import Tokenizer
from support.vocabularies import small_model, tokenizer

CHARACTERS = st.characters(exclude_categories=["Cs"])  # all but surrogates
TEXT = st.text(CHARACTERS)

# text, ids of Gemma 1 and 2, ids of Gemma 3: printed by the published tokenizers
VECTORS = [
    ("Hello world!", "4521 2134 235341", "9259 1902 236888"),
    ("  leading two spaces", "139 26650 1378 14130", "138 26016 1156 9952"),
    (
        "a\tb\t\tc\n\n\nd  e   f",
        "235250 226 235268 255969 235260 110 235258 139 235249 140 235266",
        "236746 255968 236763 255969 236755 109 236753 138 236744 139 236760",
    ),
    (
        "1234567890 and 3.14159",
        "235274 235284 235304 235310 235308 235318 235324 235321 235315 235276 578 "
        "235248 235304 235265 235274 235310 235274 235308 235315",
        "236770 236778 236800 236812 236810 236825 236832 236828 236819 236771 532 "
        "236743 236800 236761 236770 236812 236770 236810 236819",
    ),
    (
        "def f(x):\n    return x**2\n\r\n",
        "1293 517 235278 235297 1245 108 141 773 1141 688 235284 108 235316 108",
        "2063 517 236769 236781 1473 107 140 2060 1123 1018 236778 107 251 107",
    ),
]


@pytest.mark.parametrize(("text", "gemma2", "gemma3"), VECTORS)
def test_known_ids(text, gemma2, gemma3):
    assert tokenizer("gemma2").encode(text) == [int(i) for i in gemma2.split()]
    assert tokenizer("gemma3").encode(text) == [int(i) for i in gemma3.split()]
    assert tokenizer("gguf").encode(text) == [int(i) for i in gemma3.split()]


def test_known_ids_of_one_vocabulary():
    gemma2 = tokenizer("gemma2")
    assert gemma2.encode("The quick brown fox jumped.") == [651, 4320, 8426, 25341, 32292, 235265]
    assert gemma2.encode(" " * 40 + "x") == [168, 146, 235297]


def test_special_ids():
    for name, turns, user in (("gemma2", (106, 107), 1645), ("gemma3", (105, 106), 2364)):
        ours = tokenizer(name)
        assert (ours.pad, ours.eos, ours.bos, ours.id("<unk>")) == (0, 1, 2, 3)
        assert (ours.start_of_turn, ours.end_of_turn) == turns
        assert ours.end_ids == {1, turns[1]}
        assert ours.id("user") == user
        assert ours.piece(user) == "user"


def test_a_vocabulary_without_turns():
    ours = Tokenizer.from_model(small_model(user_defined_symbols="<a>"))
    assert ours.start_of_turn is None
    assert ours.end_of_turn is None
    assert ours.end_ids == {ours.eos}


# control tokens


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "gguf", "codegemma"])
def test_control_tokens_in_text_are_data(name):
    ours = tokenizer(name)
    control = set(ours.vocabulary.control_ids())
    spelled = [ours.piece(i) for i in sorted(control)]
    for text in ("".join(spelled), "x".join(spelled), " ".join(spelled), *spelled[:200]):
        ids = ours.encode(text)
        assert control.isdisjoint(ids)
        assert ours.decode(ids) == text


def test_control_tokens_are_read_on_request():
    turn = "<start_of_turn>user\nWrite a hello world program<end_of_turn>\n<start_of_turn>model\n"
    expected2 = [2, 106, 1645, 108, 5559, 476, 25612, 2134, 2733, 107, 108, 106, 2516, 108]
    expected3 = [2, 105, 2364, 107, 6974, 496, 29104, 1902, 1948, 106, 107, 105, 4368, 107]
    assert tokenizer("gemma2").encode("<bos>" + turn, control=True) == expected2
    assert tokenizer("gemma3").encode("<bos>" + turn, control=True) == expected3
    assert tokenizer("gguf").encode("<bos>" + turn, control=True) == expected3
    assert tokenizer("codegemma").encode("<|fim_prefix|>a<|fim_suffix|><|fim_middle|>", control=True) == [
        67,
        235250,
        69,
        68,
    ]
    # of overlapping spellings the longest that starts first
    assert tokenizer("gemma3").encode("<unused62<unused6241>>", control=True)[-2:] == [262143, 236813]


def test_markup_and_whitespace_always_match():
    ours = tokenizer("gemma3")
    for text, ids in (
        ("<td>", [175]),
        ("</table>", [176]),
        ("\n" * 31, [137]),
        (" " * 31, [167]),
        ("\t" * 31, [255998]),
    ):
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text


def test_control_tokens_are_hidden_by_decode_unless_asked_for():
    ours = tokenizer("gemma2")
    ids = [2, 106, 1645, 108, 107, 3, 1]
    assert ours.decode(ids) == "user\n"
    assert ours.decode(ids, control=True) == "<bos><start_of_turn>user\n<end_of_turn><unk><eos>"
    assert [ours.is_control(i) for i in ids] == [True, True, False, False, True, True, True]


def test_bos_is_added_once():
    ours = tokenizer("gemma2")
    assert ours.with_bos([]) == [2]
    assert ours.with_bos([5, 6]) == [2, 5, 6]
    assert ours.with_bos([2, 5, 6]) == [2, 5, 6]
    assert ours.with_bos(np.array([5, 2])) == [2, 5, 2]
    assert ours.with_bos(ours.with_bos(ours.encode("<bos> is data"))).count(2) == 1


# exactness


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "codegemma"])
@given(text=TEXT)
def test_decode_undoes_encode(name, text):
    ours = tokenizer(name)
    # U+2581 is how the vocabulary spells a space: the one character that does not come back
    assert ours.decode(ours.encode(text)) == text.replace("▁", " ")
    assert ours.decode(ours.encode(text, control=True), control=True) == text.replace("▁", " ")


@given(text=st.lists(CHARACTERS | st.sampled_from("def self.random(xy):\n\t 0123<t/>")).map("".join))
def test_ids_equal_those_of_sentencepiece_on_its_own_file(text):
    theirs = SentencePieceProcessor(model_proto=small_model())
    assert Tokenizer.from_model(small_model()).encode(text) == theirs.encode(text)


@pytest.mark.parametrize("name", ["gemma3", "codegemma"])
def test_a_saved_model_gives_the_same_ids(name, tmp_path):
    ours = tokenizer(name)
    file = tmp_path / "tokenizer.model"
    ours.save(file)
    again, theirs = Tokenizer.from_model(file), SentencePieceProcessor(model_file=str(file))
    assert again.vocabulary.pieces == ours.vocabulary.pieces
    assert (theirs.bos_id(), theirs.eos_id(), theirs.pad_id(), theirs.unk_id()) == (2, 1, 0, 3)
    for text, *_ in VECTORS:
        assert again.encode(text) == theirs.encode(text) == ours.encode(text)


def test_a_model_may_be_a_path_or_bytes(tmp_path):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(small_model())
    ids = Tokenizer.from_model(small_model()).encode("self.random()")
    assert Tokenizer.from_model(file).encode("self.random()") == ids
    assert Tokenizer.from_model(str(file)).encode("self.random()") == ids
    with pytest.raises(WeightsError, match=r"missing\.model: No such file"):
        Tokenizer.from_model(tmp_path / "missing.model")
    with pytest.raises(WeightsError, match="directory"):
        Tokenizer.from_json(tmp_path)
    file.write_bytes(small_model()[:100])
    with pytest.raises(WeightsError, match=r"tokenizer\.model: corrupt after 5 pieces"):
        Tokenizer.from_model(file)


# errors


@pytest.mark.parametrize("text", [None, b"bytes", 7, ["a"]])
def test_only_text_is_encoded(text):
    with pytest.raises(TextError, match=type(text).__name__):
        tokenizer("gemma2").encode(text)


def test_lone_surrogates_are_refused_with_their_place():
    with pytest.raises(TextError, match=r"character 2 .* U\+D83D"):
        tokenizer("gemma2").encode("ab\ud83d")


def test_ids_out_of_range_are_refused():
    ours = tokenizer("gemma2")
    for bad in (-1, 256_000, 2**70):
        for use in (ours.piece, ours.bytes, ours.is_control, lambda i: ours.decode([5, i]), ours.stream().push):
            with pytest.raises(TextError, match=f"token id {bad} is out of range: the vocabulary has ids 0 to 255999"):
                use(bad)
    for bad in ("5", 5.0, None):
        with pytest.raises(TextError, match="not a whole number"):
            ours.decode([bad])
    assert ours.decode(np.array([4521, 2134])) == "Hello world"


def test_unknown_pieces_are_refused():
    ours = tokenizer("gemma2")
    for bad in ("<|fim_prefix|>", "", " the", "\ud800"):
        assert bad not in ours
        with pytest.raises(TextError, match="no piece"):
            ours.id(bad)
    assert "▁the" in ours


# streaming


@given(st.lists(st.integers(0, 255_999) | st.integers(217, 472) | st.integers(0, 110), max_size=60))
def test_streaming_equals_decoding_at_once(ids):
    ours = tokenizer("gemma2")
    for control in (False, True):
        stream = ours.stream(control=control)
        deltas = [stream.push(i) for i in ids] + [stream.finish()]
        assert "".join(deltas) == ours.decode(ids, control=control)


@given(text=st.text(CHARACTERS | st.sampled_from("👩🏽‍🚀𝔹漢é\u0301🏳️‍🌈"), max_size=40))
def test_streaming_never_splits_a_character(text):
    ours = tokenizer("gemma3")
    stream = ours.stream()
    # every character as bytes, the hardest case: nothing but whole characters may come out, and no stand-in for one
    deltas = [stream.push(ours.id(f"<0x{byte:02X}>")) for byte in text.encode()]
    assert "".join(deltas) == text
    assert [delta for delta in deltas if delta] == list(text)
    assert stream.finish() == ""


def test_bytes_that_are_no_character_come_out_as_soon_as_that_is_certain():
    ours = tokenizer("gemma3")
    stream = ours.stream()
    byte = {value: ours.id(f"<0x{value:02X}>") for value in range(256)}
    assert stream.push(byte[0x80]) == "\ufffd"  # begins no character
    assert stream.push(byte[0xF0]) == ""  # may begin an emoji
    assert stream.push(byte[0x9F]) == ""
    assert stream.push(ours.id("a")) == "\ufffda"  # did not
    assert stream.push(byte[0xE2]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push(ours.id("b")) == "b"  # nothing is left over for the next text
    assert stream.finish() == ""


# speed


@pytest.mark.parametrize("unit", ["a", " ", "😀", "\n", "<", "<start_of_turn", "\x00", "é漢"])
def test_time_is_linear_in_the_text(unit):
    """A quadratic merge of 1 MB is 10^12 steps, beyond the limit of any test."""
    text = unit * (1_000_000 // len(unit.encode()))
    ours = tokenizer("gemma3")
    ours.encode("", control=True)
    assert ours.decode(ours.encode(text)) == text
    assert ours.decode(ours.encode(text, control=True)) == text


def test_text_works_without_torch():
    code = "import sys, gemkit.text; assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
