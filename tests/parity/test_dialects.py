"""Records in the dialects of other trainers: the ids and the tokens with loss that those trainers would have.

What can be asked is asked: TRL's data utilities, and Transformers with the template published for Gemma 3, in which
the answers are marked. What LLaMA-Factory, OpenAI and others make of a record before a template is asked is written by
hand from their documentation, as messages.
"""

import copy
import json

import numpy as np
import pytest
import trl.data_utils as trl

from gemkit.train.data import ControlTokenizer, Data, open_data
from gemkit.train.objectives.dpo import Dpo
from gemkit.train.objectives.pretrain import Pretrain
from gemkit.train.objectives.sft import Sft
from support.chat_templates import marked
from support.vocabularies import tokenizer


def user(text):
    return {"role": "user", "content": text}


def model(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def encoded(objective, data):
    """The units of all records."""
    return [unit for record in data for unit in objective.encode(record, np.random.default_rng(0))]


TALK = [user("Hi, who are you?"), model("A model.\n\nYours."), user("  Sing! "), model("La la")]
TOOL = '{"name": "weather", "arguments": {"city": "Rome"}}'
ALPACA = {"instruction": "Translate to French.", "input": "Good morning", "output": "Bonjour"}

# name: (record, the messages that its trainer makes of it, the answers that it does not learn)
CHATS = {
    "OpenAI": ({"messages": [system("Be brief."), *TALK]}, [system("Be brief."), *TALK], ()),
    "OpenAI, content in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "text", "text": "a cat"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Indeed."}]},
            ]
        },
        [
            {"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "text", "text": "a cat"}]},
            model("Indeed."),
        ],
        (),
    ),
    "OpenAI, developer": (
        {"messages": [{"role": "developer", "content": "Be brief."}, *TALK]},
        [system("Be brief."), *TALK],
        (),
    ),
    "OpenAI, weight": (
        {"messages": [TALK[0], TALK[1] | {"weight": 0}, TALK[2], TALK[3] | {"weight": 1}]},
        TALK,
        (0,),
    ),
    "OpenAI, tool": (
        {"messages": [user("Weather?"), model(TOOL), {"role": "tool", "content": "sunny"}, model("It is sunny.")]},
        [user("Weather?"), model(TOOL), user("sunny"), model("It is sunny.")],
        (),
    ),
    "Axolotl, train": (
        {"messages": [TALK[0], TALK[1] | {"train": True}, TALK[2], TALK[3] | {"train": False}]},
        TALK,
        (1,),
    ),
    "ms-swift, loss": ({"messages": [TALK[0], TALK[1] | {"loss": False}, *TALK[2:]]}, TALK, (0,)),
    "a trailing turn of the user": ({"messages": [*TALK, user("More?")]}, TALK, ()),
    "ShareGPT": (
        {"conversations": [human("Hi"), gpt("Ahoy"), human("Bye"), gpt("Farewell")]},
        [user("Hi"), model("Ahoy"), user("Bye"), model("Farewell")],
        (),
    ),
    "ShareGPT, system beside": (
        {"system": "Talk like a pirate.", "conversations": [human("Hi"), gpt("Arr, ahoy!")]},
        [system("Talk like a pirate."), user("Hi"), model("Arr, ahoy!")],
        (),
    ),
    "ShareGPT, system as a turn": (
        {"conversations": [{"from": "system", "value": "Be kind."}, human("Hi"), gpt("Hello")], "system": "Be kind."},
        [system("Be kind."), user("Hi"), model("Hello")],
        (),
    ),
    "ShareGPT, functions": (
        {
            "conversations": [
                human("Weather?"),
                {"from": "function_call", "value": TOOL},
                {"from": "observation", "value": "sunny"},
                gpt("It is sunny."),
            ],
            "tools": "[]",
        },
        [user("Weather?"), model(TOOL), user("sunny"), model("It is sunny.")],
        (),
    ),
    "ShareGPT, begun by gpt": (
        {"conversations": [gpt("How can I help?"), human("Hi"), gpt("Hello")]},
        [user("Hi"), model("Hello")],
        (),
    ),
    "Alpaca": (ALPACA, [user("Translate to French.\nGood morning"), model("Bonjour")], ()),
    "Alpaca, without input": (
        {"instruction": "Say hi.", "input": "", "output": "Hi", "text": "Below is an instruction ..."},
        [user("Say hi."), model("Hi")],
        (),
    ),
    "Alpaca, history and system": (
        ALPACA | {"system": "You translate.", "history": [["Ready?", "Yes."], ["Sure?", "Sure."]]},
        [
            system("You translate."),
            *(user("Ready?"), model("Yes."), user("Sure?"), model("Sure.")),
            *(user("Translate to French.\nGood morning"), model("Bonjour")),
        ],
        (),
    ),
    "Dolly": (
        {"instruction": "When?", "context": "It was 1900.", "response": "In 1900.", "category": "closed_qa"},
        [user("When?\nIt was 1900."), model("In 1900.")],
        (),
    ),
    "prompt/response": ({"prompt": "2 + 2?", "response": "4"}, [user("2 + 2?"), model("4")], ()),
    "question/answer": ({"question": "2 + 2?", "answer": "4"}, [user("2 + 2?"), model("4")], ()),
    "query/response": (
        {"system": "Count.", "query": "2 + 2?", "response": "4", "history": [["1 + 1?", "2"]]},
        [system("Count."), user("1 + 1?"), model("2"), user("2 + 2?"), model("4")],
        (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHATS)
def test_what_is_learned_of_a_conversation(name):
    record, messages, left_out = CHATS[name]
    theirs, _ = marked("gemma3")
    made = theirs.apply_chat_template(
        [m if isinstance(m["content"], str) else m | {"content": trimmed(m["content"])} for m in messages],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert rendered(theirs, messages) == theirs.decode(made["input_ids"])
    mask = np.array(made["assistant_masks"])
    starts = np.flatnonzero(np.diff(mask, prepend=0) == 1)
    for answer in left_out:
        mask[starts[answer] : starts[answer] + np.argmin(mask[starts[answer] :])] = 0
    ((ours,),) = encoded(Sft(tokenizer("gemma3")), Data.of([record]))
    assert ours.ids.tolist() == made["input_ids"]
    assert ours.weights.tolist() == mask.tolist()


def trimmed(parts):
    """What the published template makes of parts; the marked one takes texts."""
    return "".join(part["text"].strip() for part in parts)


def rendered(theirs, messages):
    """By the template as it is published."""
    return theirs.apply_chat_template(messages, chat_template=marked("gemma3")[1], tokenize=False)


# ── completions and preferences: TRL ────────────────────────────────────────────────────────────────────────────────


def ids(text):
    return marked("gemma3")[0](text, add_special_tokens=False)["input_ids"]


def answer_of(example, size):
    return example.ids[: len(example) - size].tolist(), example.ids[len(example) - size :].tolist()


@pytest.mark.parametrize("before", [[user("Hi")], [system("Be brief."), *TALK[:3]]])
def test_completions_in_messages(before):
    record = {"prompt": before, "completion": [model("Hello")]}
    texts = trl.apply_chat_template(copy.deepcopy(record), marked("gemma3")[0])
    ((ours,),) = encoded(Sft(tokenizer("gemma3")), Data.of([record]))
    # theirs ends with the line break after <end_of_turn>, which is never asked of a model
    assert [*ours.ids.tolist(), *ids("\n")] == ids(texts["prompt"] + texts["completion"])
    assert int(ours.weights.sum()) == len(ids(texts["completion"])) - 1


def test_completions_in_text():
    """TRL puts <eos> after a completion; neither puts anything between."""
    ((ours,),) = encoded(Sft(tokenizer("gemma3")), Data.of([{"prompt": "2 + 2 =", "completion": " 4"}]))
    assert ours.ids.tolist() == ids("<bos>2 + 2 = 4<eos>")
    assert ours.weights.sum() == len(ids(" 4<eos>"))


GOOD, BAD = "Hello there", "Go away"
# the record, and what TRL is given: by itself, or by hand from the documentation of the dialect
PAIRS = {
    "TRL, messages": (pair := {"prompt": [user("Hi")], "chosen": [model(GOOD)], "rejected": [model(BAD)]}, pair),
    "TRL, prompt inside": (
        {"chosen": [*TALK[:3], model(GOOD)], "rejected": [*TALK[:3], model(BAD)]},
        {"chosen": [*TALK[:3], model(GOOD)], "rejected": [*TALK[:3], model(BAD)]},
    ),
    "UltraFeedback": (
        {"prompt": "Hi", "chosen": [user("Hi"), model(GOOD)], "rejected": [user("Hi"), model(BAD)], "score_chosen": 8},
        pair,
    ),
    "ShareGPT pair": (
        {"conversations": [human("Hi")], "chosen": gpt(GOOD), "rejected": gpt(BAD), "system": "Be kind."},
        {"prompt": [system("Be kind."), user("Hi")], "chosen": [model(GOOD)], "rejected": [model(BAD)]},
    ),
    "Alpaca pair": (
        {"instruction": "Greet", "input": "Bob", "chosen": GOOD, "rejected": BAD},
        {"prompt": [user("Greet\nBob")], "chosen": [model(GOOD)], "rejected": [model(BAD)]},
    ),
    "question and system": (
        {"system": "Be kind.", "question": "Hi", "chosen": GOOD, "rejected": BAD},
        {"prompt": [system("Be kind."), user("Hi")], "chosen": [model(GOOD)], "rejected": [model(BAD)]},
    ),
    "OpenAI preferences": (
        {
            "input": {"messages": [user("Hi")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [model(GOOD)],
            "non_preferred_output": [model(BAD)],
        },
        pair,
    ),
    "Human/Assistant texts": (
        {
            "chosen": f"\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Greet\n\nAssistant: {GOOD}",
            "rejected": f"\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Greet\n\nAssistant: {BAD}",
        },
        {
            "prompt": [user("Hi"), model("Yes?"), user("Greet")],
            "chosen": [model(GOOD)],
            "rejected": [model(BAD)],
        },
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_preferences_in_messages(name):
    record, theirs = PAIRS[name]
    theirs = trl.maybe_extract_prompt(copy.deepcopy(theirs))
    texts = trl.apply_chat_template(theirs, marked("gemma3")[0])
    (pair,) = encoded(Dpo(tokenizer("gemma3")), Data.of([record]))
    for ours, side in zip(pair, ("chosen", "rejected"), strict=True):
        assert [*ours.ids.tolist(), *ids("\n")] == ids(texts["prompt"] + texts[side])
        assert int(ours.weights.sum()) == len(ids(texts[side])) - 1


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "The sky is", "chosen": " blue", "rejected": " green"},
        {"chosen": "The sky is blue", "rejected": "The sky is green"},
    ],
)
def test_preferences_in_text(record):
    theirs = trl.maybe_extract_prompt(dict(record))
    (pair,) = encoded(Dpo(tokenizer("gemma3")), Data.of([record]))
    for ours, side in zip(pair, ("chosen", "rejected"), strict=True):
        assert ours.ids.tolist() == ids(f"<bos>{theirs['prompt']}{theirs[side]}<eos>")
        assert ours.weights.sum() == len(ids(f"{theirs[side]}<eos>"))


def test_from_and_value_are_role_and_content_for_trl_too():
    record = {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]}
    theirs = trl.maybe_convert_to_chatml(copy.deepcopy(record))
    assert Data.of([record])[0]["messages"] == theirs["messages"]


# ── texts that were rendered elsewhere ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("end", ["", "<eos>"])
def test_text_with_control_tokens(end):
    """Rendered by the template and read with `--control`: the ids that Transformers gives the conversation."""
    theirs, _ = marked("gemma3")
    text = theirs.apply_chat_template(TALK, tokenize=False) + end
    ((ours,),) = encoded(Pretrain(ControlTokenizer(tokenizer("gemma3"))), Data.of([{"text": text}]))
    assert ours.ids.tolist() == [*theirs.apply_chat_template(TALK, return_dict=True)["input_ids"], *ids("<eos>")]
    ((plain,),) = encoded(Pretrain(tokenizer("gemma3")), Data.of([{"text": text}]))
    assert len(plain.ids) > len(ours.ids)  # without it, control tokens are spelled


def test_completions_and_conversations_with_control_tokens():
    ours, (theirs, _) = ControlTokenizer(tokenizer("gemma3")), marked("gemma3")
    before, after = theirs.apply_chat_template(TALK[:3], tokenize=False, add_generation_prompt=True), "La<end_of_turn>"
    ((example,),) = encoded(Sft(ours), Data.of([{"prompt": before, "completion": after}]))
    assert example.ids.tolist() == ids(before + after + "<eos>")
    assert example.weights.sum() == 3
    spelled = [user("<start_of_image> What?"), model("A<eos>cat")]
    made = theirs.apply_chat_template(spelled, return_dict=True, return_assistant_tokens_mask=True)
    ((example,),) = encoded(Sft(ours), Data.of([{"messages": spelled}]))
    assert example.ids.tolist() == made["input_ids"]
    assert example.weights.tolist() == made["assistant_masks"]


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_dialects_of_conversations_in_one_file(tmp_path):
    """As JSON lines and as one list: each record is what it is alone."""
    records = [record for record, _, _ in CHATS.values()]
    listed, lines = tmp_path / "list.json", tmp_path / "lines.jsonl"
    listed.write_text(json.dumps(records, indent=2, ensure_ascii=False), encoding="utf-8")
    lines.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    objective = Sft(tokenizer("gemma3"))
    alone = [encoded(objective, Data.of([record]))[0][0].ids.tolist() for record in records]
    for path in (listed, lines):
        data = open_data(path)
        assert [example.ids.tolist() for (example,) in encoded(objective, data)] == alone
        assert sum(data.dialects.values()) == len(records)
