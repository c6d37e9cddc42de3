"""Records to sequences: the ids are those of a prompt at inference, and what is learned is what the model must say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemkit.errors import ContextError, ImageError, ModelError, TextError
from gemkit.family import Modality, Vision
from gemkit.images import preprocess, read
from gemkit.text import chat, complete, image
from gemkit.train.data import (
    encode_answer,
    encode_chat,
    encode_image,
    encode_text,
    prompt_ids,
)
from support.vocabularies import tokenizer

TOWER = Modality(Vision(56, patch_size=14, width=36, depth=1, num_heads=2, mlp_width=44), placeholder=257152)
CONTENT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t<>|_"), max_size=20)
SAID = CONTENT.filter(str.strip)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is 2 + 2?\n"},
    {"role": "assistant", "content": "\n4.\n\n    Four.  "},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6"},
]


def learned(example):
    return example.ids[example.weights > 0].tolist()


# ---------------------------------------------------------------- chats


def test_a_chat_by_hand():
    """Gemma 2's ids: 106 and 107 begin and end a turn, 108 is a line break, 1645 user, 2516 model."""
    example = encode_chat(
        tokenizer("gemma2"),
        [{"role": "user", "content": "Hello world!"}, {"role": "assistant", "content": "Hello world!"}],
    )
    hello = [4521, 2134, 235341]
    assert example.ids.tolist() == [2, 106, 1645, 108, *hello, 107, 108, 106, 2516, 108, *hello, 107, 108]
    assert example.weights.tolist() == [0] * 12 + [1] * 4 + [0]
    assert (example.ids.dtype, example.weights.dtype) == (np.int64, np.float32)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "codegemma"])
@given(
    system=CONTENT | st.none(),
    turns=st.lists(st.tuples(CONTENT, SAID), min_size=1, max_size=3),
    asked=CONTENT | st.none(),
)
def test_each_answer_comes_after_the_prompt_of_inference(name, system, turns, asked):
    """For every answer of a conversation: what comes before it is what `chat` feeds, it is what the content encodes to,
    and it ends with <end_of_turn>. Nothing else is learned."""
    ours = tokenizer(name)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    extended = messages if asked is None else [*messages, {"role": "user", "content": asked}]
    example = encode_chat(ours, extended)
    assert example.ids.tolist() == chat(ours, messages, answer=False).ids
    expected = np.zeros(len(example))
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = chat(ours, messages[:i]).ids
            said = [*ours.encode(message["content"].strip()), ours.end_of_turn]
            assert example.ids[: len(prompt) + len(said)].tolist() == prompt + said
            expected[len(prompt) : len(prompt) + len(said)] = 1
    assert example.weights.tolist() == expected.tolist()


def test_a_chat_longer_than_the_context_loses_whole_turns():
    ours = tokenizer("gemma3")
    whole, first = encode_chat(ours, CONVERSATION), encode_chat(ours, CONVERSATION[:3])
    assert encode_chat(ours, CONVERSATION, context=len(whole)).extra == {}
    for context in (len(whole) - 1, len(first)):
        short = encode_chat(ours, CONVERSATION, context=context)
        assert (short.ids.tolist(), short.weights.tolist()) == (first.ids.tolist(), first.weights.tolist())
        assert short.extra == {"turns_left_out": 2}
    with pytest.raises(ContextError, match=rf"tokens, {len(first)} to the end of its first answer, and context=10"):
        encode_chat(ours, CONVERSATION, context=10)


def test_a_chat_that_teaches_nothing():
    with pytest.raises(TextError, match="no message is by the assistant"):
        encode_chat(tokenizer("gemma3"), [{"role": "user", "content": "Hi"}])
    with pytest.raises(TextError, match="has the role 'assistant', expected 'user'"):
        encode_chat(tokenizer("gemma3"), [{"role": "assistant", "content": "Hi"}])


# ---------------------------------------------------------------- completions and answers


@given(prompt=CONTENT, completion=CONTENT)
def test_a_completion_comes_after_its_prompt(prompt, completion):
    ours = tokenizer("gemma3")
    example = encode_answer(ours, prompt, completion)
    before = complete(ours, prompt).ids
    assert example.ids.tolist() == [*before, *ours.encode(completion), ours.eos]
    assert learned(example) == [*ours.encode(completion), ours.eos]


def test_an_answer_to_messages_ends_its_turn():
    ours = tokenizer("gemma3")
    example = encode_answer(ours, CONVERSATION[:4], " 6 ")
    assert example.ids.tolist() == encode_chat(ours, CONVERSATION).ids[:-1].tolist()  # without the line break
    assert learned(example) == [*ours.encode("6"), ours.end_of_turn]
    assert prompt_ids(ours, CONVERSATION[:4]) == chat(ours, CONVERSATION[:4]).ids
    everything = encode_answer(ours, CONVERSATION[:4], "6", learn_prompt=True)
    assert everything.weights.tolist() == [0, *[1] * (len(everything) - 1)]
    with pytest.raises(ContextError, match="prompt and answer are 10 tokens, and context=5"):
        encode_answer(ours, "a b c d", "e f g h", context=5)


# ---------------------------------------------------------------- texts


@given(text=CONTENT.filter(bool), context=st.integers(2, 12))
def test_a_document_is_cut_and_nothing_is_lost(text, context):
    ours = tokenizer("gemma3")
    pieces = encode_text(ours, text, context=context)
    assert all(len(piece) <= context and piece.ids[0] == ours.bos for piece in pieces)
    assert all(piece.weights.tolist() == [0, *[1] * (len(piece) - 1)] for piece in pieces)
    assert np.concatenate([piece.ids[1:] for piece in pieces]).tolist() == [*ours.encode(text), ours.eos]
    (whole,) = encode_text(ours, text)
    assert whole.ids.tolist() == [ours.bos, *ours.encode(text), ours.eos]


def test_control_tokens_that_a_text_spells_are_text():
    ours = tokenizer("gemma3")
    (example,) = encode_text(ours, "a<eos><end_of_turn>b")
    assert not any(ours.is_control(i) for i in example.ids[1:-1])
    with pytest.raises(ContextError, match="context=1 has no room"):
        encode_text(ours, "a", context=1)


# ---------------------------------------------------------------- pictures


def test_an_answer_to_a_picture():
    ours, picture = tokenizer("paligemma"), np.arange(60 * 40 * 3, dtype=np.uint8).reshape(60, 40, 3)
    suffix = "<loc0001><loc0002><loc0003><loc0004> cat"
    example = encode_image(ours, picture, "detect cat", suffix, vision=TOWER, average="token")
    prompt = image(ours, "detect cat", patches=16).ids
    said = [256001, 256002, 256003, 256004, *ours.encode(" cat"), 1]
    assert example.ids.tolist() == prompt + said
    assert example.weights.tolist() == [0] * len(prompt) + [1] * len(said)
    assert (example.prefix, example.image_token) == (len(prompt), 257152)
    (pixels,) = example.images
    assert np.array_equal(pixels, preprocess(read(picture), 56))


def test_nothing_to_say_is_learned_too():
    ours, picture = tokenizer("paligemma"), np.zeros((8, 8, 3), np.uint8)
    empty = encode_image(ours, [picture, picture], "detect cat", "", vision=TOWER)
    assert learned(empty) == [ours.eos]
    assert len(empty.images) == 2
    assert (empty.ids == 257152).sum() == 32
    full = encode_image(ours, picture, "cap en", "a black square", vision=TOWER)
    assert full.weights.sum() == pytest.approx(1)


def test_pictures_that_cannot_be_learned_from(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    ours = tokenizer("paligemma")
    with pytest.raises(ImageError, match=r"a\.png is of an unknown format"):
        encode_image(ours, str(tmp_path / "a.png"), "cap en", "a", vision=TOWER)
    picture = np.zeros((8, 8, 3), np.uint8)
    with pytest.raises(ContextError, match="pictures, prompt and suffix are 22 tokens, and context=20"):
        encode_image(ours, picture, "cap en", "a", vision=TOWER, context=20)
    with pytest.raises(ModelError, match="prompts with images are for PaliGemma"):
        encode_image(tokenizer("gemma2"), picture, "cap en", "a", vision=TOWER)
