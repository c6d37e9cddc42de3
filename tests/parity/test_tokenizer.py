"""Our ids against those of the published tokenizer.json, and our turns against the published chat template."""

import json
import random
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fetch_oracles import fetch
from gemkit.text import chat
from gemkit.text.prompts import CHAT_TEMPLATE
from support.vocabularies import library_sources, published, tokenizer

VOCABULARIES = ("gemma2", "gemma3")

ALPHABETS = [
    "0123456789.,eE-+x",
    "abc ABC\n\t  ",
    "一二三漢字かなカナ한국어中文简体",
    "😀👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇩🇪❤️",
    "\x00\x01\x02\x7f\x80\x9f\r\n\x1b\ufeff\u200b\u200d\ufffd\uffff",
    "\u202a\u202e\u2066\u2069אבגעברית العربية",
    "áèñüç̧ạ́Z̷͔á̷l̶g̵o",
    "<>/[]|",
    " ",
    "\n",
    "\t",
    " \n\t\r",
]
WORDS = [
    *("<table>", "</table>", "<td>", "<h1>", "</code>", "<b>", "<div>", "<img>", "<bbox>", "<tr", "</", "<0x0A>", "<|"),
    *("[multi", "<start_of", "<end_of_turn", "word ", "New York", " ", "\n", "'s", "don't", "https://", "__init__"),
]


def varied(rng: random.Random) -> str:
    """Real code, any characters of Unicode, one script, long runs, or tags and fragments of control tokens."""
    kind = rng.randrange(5)
    if kind == 0:
        source = rng.choice(library_sources()).read_text(errors="ignore")
        start = rng.randrange(max(1, len(source)))
        return source[start : start + rng.randrange(1, 500)]
    if kind == 1:
        points = [rng.randrange(0x110000) for _ in range(rng.randrange(1, 30))]
        return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
    if kind == 2:
        alphabet = rng.choice(ALPHABETS)
        return "".join(rng.choice(alphabet) for _ in range(rng.randrange(1, 60)))
    if kind == 3:
        runs = [rng.choice(rng.choice(ALPHABETS)) * rng.choice((1, 2, 3, 5, 31, 32, 33, 62, 70)) for _ in range(9)]
        return "".join(runs)
    return "".join(rng.choice(WORDS) for _ in range(rng.randrange(1, 20)))


def comparable(text: str) -> str:
    """`text` without what the two forms are known to read differently.

    A literal `▁` is a space to SentencePiece, but next to spaces a token of its own in the JSON form. `<unk>` is a
    control token that ours never reads: SentencePiece keeps it to itself.
    """
    return text.replace("▁", "").replace("<unk>", "")


@cache
def control_pieces(name: str) -> list[str]:
    ours = tokenizer(name)
    return [ours.piece(i) for i in ours.vocabulary.control_ids() if ours.piece(i) != "<unk>"]


def theirs(name: str, text: str) -> list[int]:
    return published(name).encode(text, add_special_tokens=False).ids


def check(name: str, text: str) -> bool:
    """Compare the ids of one text; they always read control tokens. Returns whether it was plain, without any."""
    ours, expected = tokenizer(name), theirs("gemma3" if name == "gguf" else name, text)
    assert ours.encode(text, control=True) == expected
    plain = not any(ours.is_control(i) for i in expected)
    if plain:
        assert ours.encode(text) == expected
    return plain


@pytest.mark.parametrize(("name", "seed"), [("gemma2", 0), ("gemma3", 1), ("gguf", 2)])
def test_ids_equal_the_published_ones_on_varied_text(name, seed):
    """2,500 texts, each also with control tokens put into it."""
    rng = random.Random(seed)
    plain = 0
    for _ in range(2_500):
        text = comparable(varied(rng))
        half = len(text) // 2
        plain += check(name, text)
        check(name, text[:half] + rng.choice(control_pieces(name)) + text[half:] + rng.choice(control_pieces(name)))
    assert plain > 2_400


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"])).map(comparable))
def test_ids_equal_the_published_ones_on_any_text(name, text):
    check(name, text)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_equal_the_published_ones_on_whole_files(name):
    """A merge across 100 KB is the same merge."""
    files = [path for path in library_sources() if path.stat().st_size > 60_000][:4]
    assert [check(name, comparable(path.read_text(errors="ignore"))) for path in files] == [True] * 4


@pytest.mark.parametrize("name", VOCABULARIES)
def test_runs_of_one_character(name):
    for character in " \n\tax=-#é漢😀\r":
        for size in (*range(1, 70), 1_000):
            assert check(name, character * size)


@pytest.mark.parametrize("name", VOCABULARIES)
@given(st.lists(st.integers(0, 255_999), max_size=30))
def test_decoding_equals_the_published_one(name, ids):
    """Any ids but bytes that make no character, for which they print one U+FFFD a byte of the whole run."""
    ours = tokenizer(name)
    text = ours.decode(ids, control=True)
    if "\ufffd" not in text:
        assert text == published(name).decode(ids, skip_special_tokens=False)


# the chat template that comes with Gemma 3; the turns of Gemma 1 and 2 are the same, without a system message


@cache
def templated(name: str, template: str | None = None) -> PreTrainedTokenizerFast:
    if template is None:
        template = json.loads((fetch("tokenizer-gemma3") / "tokenizer_config.json").read_text())["chat_template"]
    return PreTrainedTokenizerFast(tokenizer_object=published(name), bos_token="<bos>", chat_template=template)


# joined from parts, because `st.text` also tries constants of our source: control tokens, which theirs would read
CONTENT = st.lists(
    st.characters(exclude_categories=["Cs"], exclude_characters="▁")
    | st.sampled_from(["\n", "\n\n", " ", "\t", "<td>", "user\n", "Hello"]),
    max_size=12,
).map("".join)


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=200)
@given(contents=st.lists(CONTENT, min_size=1, max_size=6), system=st.none() | CONTENT)
def test_turns_equal_the_published_template(name, contents, system):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    if system is not None and name == "gemma3":
        messages.insert(0, {"role": "system", "content": system})
    answer = len(contents) % 2 == 1
    rendered = templated(name).apply_chat_template(messages, add_generation_prompt=answer, tokenize=False)
    saved = templated(name, CHAT_TEMPLATE)  # the template that we write beside a model
    assert saved.apply_chat_template(messages, add_generation_prompt=answer, tokenize=False) == rendered
    prompt = chat(tokenizer(name), messages, answer=answer)
    assert prompt.ids == theirs(name, rendered)
    assert tokenizer(name).with_bos(tokenizer(name).encode(rendered, control=True)) == prompt.ids
    assert tokenizer(name).decode(prompt.ids, control=True) == rendered
