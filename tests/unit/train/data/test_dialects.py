"""What the fields of a record mean: used, refused where they would change what is learned, or told."""

import pytest

from gemkit.errors import ConfigError, DataError
from gemkit.train.data import Data, dialects
from gemkit.train.data.sources import Memory
from support.vocabularies import tokenizer

USER, MODEL = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CHAT = {"messages": [USER, MODEL]}
COMPLETION = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (CHAT | {"tools": [{"name": "f"}]}, r"tools is a list .*: it describes tools"),
        (CHAT | {"functions": [{"name": "f"}]}, "functions is a list"),
        (CHAT | {"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs is an object"),
        (CHAT | {"weight": 0.5}, "weight is a number 0.5: it weighs a record"),
        (CHAT | {"image": "a.png"}, "image is the text 'a.png': it belongs to conversations on pictures"),
        (CHAT | {"images": ["a.png"]}, "images is a list"),
        (CHAT | {"input_ids": [1, 2]}, "input_ids is a list .* made before"),
        (COMPLETION | {"label": True}, r"label is a truth value True: .*KTO"),
        (COMPLETION | {"label": False}, r"label is a truth value False: .*KTO"),
        (COMPLETION | {"completion_mask": [0, 1]}, "completion_mask is a list"),
        (COMPLETION | {"system": "Be brief."}, "system is beside a prompt that is a text"),
        ({"text": "a", "labels": [1]}, "labels is a list"),
        ({"prompt": [USER], "tools": ["f"]}, "tools is a list"),
        ({"conversations": [{"from": "human", "value": "a"}], "kto_tag": False}, "kto_tag is a truth value"),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]},
            r"messages\[1\].tool_calls holds calls of tools",
        ),
        ({"messages": [USER, MODEL | {"function_call": {"name": "f"}}]}, r"messages\[1\].function_call holds"),
        ({"messages": [USER, MODEL | {"train_detail": [{"begin": 0}]}]}, r"messages\[1\].train_detail holds"),
        ({"messages": [USER | {"weight": 1}, MODEL]}, r"messages\[0\].weight .* only answers are learned"),
        ({"messages": [USER, MODEL | {"weight": -1}]}, r"messages\[1\].weight is a number -1, not a number from 0"),
        ({"messages": [USER, MODEL | {"weight": "high"}]}, r"messages\[1\].weight is the text 'high'"),
        ({"messages": [USER, MODEL | {"train": 1}]}, r"messages\[1\].train is a number 1, not true or false"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, MODEL]},
            r"messages\[0\].content\[0\] is of the type 'image_url'; of parts only text",
        ),
        ({"prompt": [USER], "completion": [MODEL | {"weight": 0}]}, "completion has the weight 0"),
        ({"instruction": "", "output": "a"}, "instruction is empty"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, r"history\[0\] is the text 'c', not a pair"),
        ({"instruction": "a", "output": 3}, "output is a number 3, not a text"),
        ({"question": "a", "answer": ""}, "answer is empty"),
        ({"chosen": "a", "rejected": "b", "prompt": "c", "margin": "big"}, "margin is the text 'big', not a number"),
        ({"input": {"messages": [USER], "tools": ["f"]}, "preferred_output": [MODEL], "non_preferred_output": [MODEL]},
         "input.tools describes tools"),
    ],
)  # fmt: skip
def test_a_field_that_changes_what_is_learned_is_not_dropped(record, message):
    with pytest.raises(DataError, match=message):
        Data.of([record])


@pytest.mark.parametrize(
    "nothing", [{"tools": []}, {"tools": "[]"}, {"label": None}, {"images": []}, {"system": ""}, {"weight": None}]
)
def test_a_field_that_says_nothing_is_no_matter(nothing):
    data = Data.of([CHAT | nothing])
    assert not data.unused
    assert data[0]["messages"] == CHAT["messages"]


def test_what_is_done_with_records_is_told_once():
    shared = [{"from": "gpt", "value": "Help?"}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    data = Data.of(
        [
            CHAT | {"id": 1, "source": "web"},
            CHAT | {"id": 2, "messages": [USER | {"name": "Ann"}, MODEL]},
            {"conversations": shared},
            {"instruction": "Say <eos>", "output": "<end_of_turn><end_of_turn> <|im_end|>", "text": "### ..."},
        ]
    )
    assert list(data.account(tokenizer("gemma3"))) == [
        "2 records of messages (form chat): every answer is learned",
        "1 records of ShareGPT (form chat): every answer is learned",
        "1 records of Alpaca (form chat): every answer is learned",
        "fields that nothing reads: id (2), source (1), messages[].name (1), text (1)",
        "1 records begin with the model: what it says before the user is left out",
        "records whose text spells control tokens, trained as text; --control trains them as the tokens: "
        "<end_of_turn> (1), <eos> (1)",
    ] or list(data.account(tokenizer("gemma3")))[-1].endswith("<eos> (1), <end_of_turn> (1)")


def test_pieces_that_are_no_control_tokens_here_are_not_told():
    data = Data.of([{"text": "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"}])
    assert len(list(data.account(tokenizer("gemma2")))) == 1
    assert "trained as the tokens: " in list(data.account(tokenizer("codegemma"), as_control=True))[-1]


def test_a_system_message_comes_before_a_system_field():
    record = {"messages": [{"role": "system", "content": "A"}, USER, MODEL], "system": "B"}
    data = Data.of([record])
    assert data[0]["messages"][0]["content"] == "A"
    assert list(data.unused) == ["system, beside a system message"]


def test_a_reward_is_given_every_field():
    data = Data.of([{"prompt": "a", "answer": 42, "label": True}])
    assert (data.form, data[0], list(data.unused)) == ("prompt", {"prompt": "a", "answer": 42, "label": True}, [])


# ── columns of other names ──────────────────────────────────────────────────────────────────────────────────────────


def mapped(record, columns, form=None):
    return Data([Memory([record])], form, columns=columns)


def test_columns_are_named_as_fields():
    record = {"q": {"en": "Why?"}, "a": "So.", "answer": "no", "id": 3}
    data = mapped(record, {"prompt": "q.en", "completion": "a"})
    assert (data.form, data[0]["prompt"], data[0]["completion"]) == ("completion", "Why?", "So.")
    assert set(data.unused) == {"q", "answer", "id"}
    assert data.fingerprint != mapped(record, {"question": "q.en", "answer": "a"}).fingerprint
    assert mapped({"dialog": CHAT["messages"]}, {"messages": "dialog"})[0] == CHAT
    swapped = mapped({"prompt": "b", "completion": "a"}, {"prompt": "completion", "completion": "prompt"})
    assert swapped[0] == {"prompt": "a", "completion": "b"}


def test_columns_that_cannot_be():
    with pytest.raises(DataError, match=r"no column c \(for text\) among the fields 'a'"):
        mapped({"a": "b"}, {"text": "c"})
    with pytest.raises(ConfigError, match=r"'promt' is a field of no form of training data; did you mean prompt"):
        mapped({"a": "b"}, {"promt": "a"})


def test_every_dialect_is_of_a_form_and_has_a_name_of_its_own():
    assert len(dialects.BY_NAME) == len(dialects.DIALECTS)
    for dialect in dialects.DIALECTS:
        with pytest.raises(DataError):
            dialects.read(dialect, dict.fromkeys(dialect.fields, 3), "", dialects.Account())
