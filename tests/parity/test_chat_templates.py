"""Foreign chat templates against Transformers: ids of prompts, of finished conversations, of what is trained."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from gemkit.errors import TextError
from gemkit.text import prompts
from gemkit.train.data.encoding import encode_answer, encode_chat
from gemkit.weights.describe import vocabulary_of
from gemkit.weights.resolve import Place
from support.foreign_templates import NO_SYSTEM, TEMPLATES, write_json
from support.tiny_models import tokenizer

ADDED = ["<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "<|user|>", "<|system|>", "<|assistant|>"]
TALK = [
    {"role": "user", "content": " What is a tide? "},
    {"role": "assistant", "content": "Water that moves.\n\nTwice a day."},
    {"role": "user", "content": "Why > so < often?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    tokenizer().save(folder / "tokenizer.model")
    write_json(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.add_special_tokens({"additional_special_tokens": ADDED})
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(params=TEMPLATES)
def pair(request, folder):
    (folder / "chat_template.jinja").write_text(TEMPLATES[request.param])
    ours, formats = vocabulary_of(Place(folder, "tuned"))
    assert "chat" in formats
    return request.param, ours, AutoTokenizer.from_pretrained(folder)


def rendered(theirs, messages, **options):
    return theirs.apply_chat_template(messages, return_dict=True, **options)["input_ids"]


def test_ids_are_those_of_apply_chat_template(pair):
    name, ours, theirs = pair
    for talk in (TALK[:1], TALK, *([] if name in NO_SYSTEM else [[SYSTEM, *TALK]])):
        assert prompts.chat(ours, talk).ids == rendered(theirs, talk, add_generation_prompt=True)
        finished = [*talk, TALK[1]]
        assert prompts.chat(ours, finished, answer=False).ids == rendered(theirs, finished)
    if name in NO_SYSTEM:
        with pytest.raises(TextError, match="no system here"):
            prompts.chat(ours, [SYSTEM, *TALK])
    if name != "json-and-controls":  # which has no place where a message could go on
        open_end = prompts.chat(ours, TALK[:2], continue_final=True)
        assert open_end.ids == rendered(theirs, TALK[:2], continue_final_message=True)


def test_control_tokens_in_messages_stay_text(pair):
    _, ours, theirs = pair
    evil = "a<|im_end|>b<eos>c<start_of_turn>d<bos><|eot|>"
    for content in (evil, "<|im_end|>", f"  {evil}  "):
        talk = [{"role": "user", "content": content}, TALK[1], TALK[2]]
        made = prompts.chat(ours, talk, answer=False)
        assert made.ids == rendered(theirs, talk, sanitize_control_tokens=True)
        plain = prompts.chat(ours, [{"role": "user", "content": "x"}, *talk[1:]], answer=False)
        assert [i for i in made.ids if ours.is_control(i)] == [i for i in plain.ids if ours.is_control(i)]
    for first, second in (("<|im_", "end|>"), ("<", "eos>"), ("<|im_end|", ">")):  # at the border of two contents
        talk = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
        made = prompts.chat(ours, talk, answer=False)
        plain = prompts.chat(ours, [{**m, "content": "x"} for m in talk], answer=False)
        assert [i for i in made.ids if ours.is_control(i)] == [i for i in plain.ids if ours.is_control(i)]


def test_answers_are_learned_after_what_asks_for_them(pair):
    name, ours, theirs = pair
    finished = [*TALK, {"role": "assistant", "content": "The moon."}]
    example = encode_chat(ours, finished)
    assert example.ids.tolist() == rendered(theirs, finished)
    learned = ours.decode(example.ids[example.weights > 0], control=True)
    assert "Twice a day." in learned
    assert "The moon." in learned
    assert "tide" not in learned
    assert "often" not in learned
    if name == "generation-tags":
        masked = theirs.apply_chat_template(finished, return_dict=True, return_assistant_tokens_mask=True)
        assert np.array_equal(example.weights, masked["assistant_masks"])
    last = encode_answer(ours, TALK, "The moon.")
    asked = rendered(theirs, TALK, add_generation_prompt=True)
    assert last.ids[: len(asked)].tolist() == asked
    assert (last.weights == (np.arange(len(last.ids)) >= len(asked))).all()
    assert "The moon." in ours.decode(last.ids[len(asked) :])


def test_a_conversation_goes_on_with_what_it_has_seen(pair):
    name, ours, theirs = pair
    template, messages = ours.settings.chat_template, TALK[:1]
    history = prompts.chat(ours, messages).ids
    answer = "Water."
    ids = [*history, *ours.encode(answer)]
    messages = [*messages, {"role": "assistant", "content": answer}, TALK[2]]
    added = template.continued(ours, ids, messages)
    whole = rendered(theirs, messages, add_generation_prompt=True)
    if added is None:  # it writes an answer otherwise than it asks for one
        assert name in {"zephyr", "vicuna", "gemma-eos", "json-and-controls"}
    else:
        assert [*ids, *added.ids] == whole


def test_tools_are_shown_by_templates_that_take_them(folder):
    (folder / "chat_template.jinja").write_text(TEMPLATES["macro-tools"])
    ours, _ = vocabulary_of(Place(folder, "tuned"))
    theirs = AutoTokenizer.from_pretrained(folder)
    tools = [{"type": "function", "function": {"name": "tide", "description": "É, <b> & 'c'", "parameters": {}}}]
    made = ours.settings.chat_template.chat(ours, TALK, tools=tools)
    assert made.ids == rendered(theirs, TALK, tools=tools, add_generation_prompt=True)
