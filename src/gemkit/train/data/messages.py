"""Messages of any dialect in one spelling: `{"role": "user" | "assistant" | "system", "content": str}`.

    OpenAI      {"role": "user", "content": "..."}, content also as parts [{"type": "text", "text": "..."}]
    ShareGPT    {"from": "human", "value": "..."}

The family's format has turns of the user and of the model alone. What a tool answers is a turn of the user, as the
documentation of Gemma 3 has it; a call that is written as text is a turn of the model. An answer may carry `weight`
(OpenAI; 0: it is read and not learned), or `train` or `loss`, which are true or false (Axolotl, ms-swift).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gemkit.errors import DataError
from gemkit.train.data.schemas import field, filled, is_empty, shown, string

Message = dict[str, Any]

# the names of roles in use -> ours
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "model": "assistant",
    "gpt": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "user",
    "function": "user",
    "observation": "user",
    "function_call": "assistant",
}
_TOOLS = ("tool", "function", "observation")
_WEIGHTS = ("weight", "train", "loss")
_REFUSED = {
    "tool_calls": "calls of tools, for which this family's format has no place: write the call as text into content",
    "function_call": "a call of a function, for which this family's format has no place: write it as text into content",
    "train_detail": "parts of a message that are learned or not: split the message, or leave the field out",
    "training_detail": "parts of a message that are learned or not: split the message, or leave the field out",
}


class Account:
    """Counters of what reading found: fields without effect, and what was changed, in words."""

    def __init__(self) -> None:
        self.unused: Counter[str] = Counter()  # by the name of the field
        self.changed: Counter[str] = Counter()


def conversation(
    value: Any, name: str, account: Account, *, system: str | None = None, answers: bool = True
) -> list[Message]:
    """Messages that make a conversation: an optional system message, then user and assistant in turn.

    What the model says before the user has said anything is left out, as the trainers of this dialect do and the
    templates of this family ask for.

    Args:
        system: instructions that stand beside the messages; those of a system message come before them.
        answers: one message must be by the assistant.

    Raises:
        DataError: with the message that is wrong.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{name} is {shown(value)}, not a list of messages")
    if not value:
        raise DataError(f"{name} is empty; a conversation begins with a message by the user")
    messages = [_message(message, f"{name}[{i}]", account) for i, message in enumerate(value)]
    head = messages[:1] if messages[0]["role"] == "system" else []
    first = len(head)
    if system is not None and not head:
        head = [{"role": "system", "content": system}]
    elif system is not None and head[0]["content"] != system:
        account.unused["system, beside a system message"] += 1
    if len(messages) == first:
        raise DataError(f"{name} has a system message and no other")
    while first < len(messages) - 1 and messages[first]["role"] == "assistant":
        first += 1
        account.changed["begin with the model: what it says before the user is left out"] += 1
    turns = messages[first:]
    if answers and not any(message["role"] == "assistant" for message in turns):
        raise DataError(f"{name} has no answer by the assistant to the user, so there is nothing to learn")
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise DataError(
                f"{name}[{first + i}] is by the {message['role']}, expected the {expected}: "
                "after an optional system message, user and assistant alternate, the user first"
            )
    return [*head, *turns]


def asked(prompt: Any, account: Account, system: str | None = None) -> str | list[Message]:
    """A prompt: a text, or messages of which the last is by the user."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        if system is not None:
            raise DataError("system is beside a prompt that is a text: make the prompt a list of messages")
        return filled(prompt, "prompt")
    messages = conversation(prompt, "prompt", account, system=system, answers=False)
    if messages[-1]["role"] != "user":
        raise DataError(f"prompt[{len(prompt) - 1}] is by the {messages[-1]['role']}; it must end with the user")
    return messages


def answered(
    prompt: Any, answer: Any, name: str, account: Account, system: str | None = None
) -> tuple[str | list[Message], str]:
    """A prompt and the text that answers it.

    An answer that is a list of messages has one by the assistant at its end. Those before it are the prompt, where it
    repeats them; a prompt that is a text is then what the user said. A message alone is a list of one.
    """
    if isinstance(answer, Mapping):
        answer = [answer]
    if isinstance(answer, str) or not isinstance(answer, Sequence):
        return asked(prompt, account, system), filled(answer, name)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": filled(prompt, "prompt")}]
    before: list[Message] = [] if prompt is None else asked(prompt, account, system)  # type: ignore[assignment]
    spelled = [_message(message, f"{name}[{i}]", account) for i, message in enumerate(answer)]
    if before and len(spelled) > 1 and before[0]["role"] == "system" and spelled[0]["role"] != "system":
        spelled = [before[0], *spelled]
    if len(spelled) == 1:
        spelled = [*before, *spelled]
    messages = conversation(spelled, name, account, answers=False)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{name} must end with a message by the assistant, not by the {messages[-1]['role']}")
    if before and messages[:-1] != before:
        raise DataError(f"{name} has {len(messages) - 1} messages before its answer, and they are not the prompt")
    if len(messages) < 2:
        raise DataError(f"{name} is an answer without a prompt: give one in prompt")
    if messages[-1].get("weight", 1) != 1:
        raise DataError(f"{name} has the weight {messages[-1]['weight']}: an answer alone is learned or left out")
    return messages[:-1], messages[-1]["content"]


def _message(message: Any, name: str, account: Account) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{name} is {shown(message)}, not an object with role and content")
    by, said = (
        "from" if "from" in message and "role" not in message else "role",
        "value" if "value" in message and "content" not in message else "content",
    )
    role = field(message, by, f"{name}.")
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{name}.{by} is {shown(role)}; roles are {', '.join(ROLES)}")
    for other, why in _REFUSED.items():
        if not is_empty(message.get(other)):
            raise DataError(f"{name}.{other} holds {why}")
    content = _content(field(message, said, f"{name}."), f"{name}.{said}", trim=ROLES[role] != "system")
    made: Message = {"role": ROLES[role], "content": content}
    if made["role"] == "assistant":
        filled(content, f"{name}.{said}")
    if (weight := _weight(message, name, made["role"])) != 1:
        made["weight"] = weight
    if role in _TOOLS:
        account.changed["have answers of tools, which are turns of the user here"] += 1
    for other, value in message.items():
        if other not in (by, said, *_WEIGHTS, *_REFUSED) and not is_empty(value):
            account.unused[f"messages[].{other}"] += 1
    return made


def _content(value: Any, name: str, *, trim: bool) -> str:
    """A text, or the text of parts: each without the white space around it, as the published template has them."""
    if not isinstance(value, list) or not value:
        return string(value, name)
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind is None:
            raise DataError(f"{name}[{i}] is {shown(part)}, not an object with type and text")
        if kind not in ("text", "input_text", "output_text"):
            raise DataError(f"{name}[{i}] is of the type {kind!r}; of parts only text is learned from here")
        text = string(part.get("text"), f"{name}[{i}].text")
        texts.append(text.strip() if trim else text)
    return "".join(texts)


def _weight(message: Mapping[str, Any], name: str, role: str) -> float:
    """What the loss of an answer counts."""
    weight = 1.0
    for other in _WEIGHTS:
        value = message.get(other)
        if value is None:
            continue
        good = isinstance(value, bool) if other != "weight" else isinstance(value, int | float) and math.isfinite(value)
        if not good or value < 0:
            kind = "a number from 0 on" if other == "weight" else "true or false"
            raise DataError(f"{name}.{other} is {shown(value)}, not {kind}")
        if role != "assistant" and value:
            raise DataError(f"{name}.{other} is {shown(value)} on a turn of the {role}; only answers are learned")
        weight *= float(value) if role == "assistant" else 1.0
    return weight
