"""The dialects of training data: how records of other trainers are spelled, and the form that each of them means.

A record has the first dialect of `DIALECTS` whose fields it has; a file may mix them. What a dialect means is what the
trainers that it comes from do with it: which fields they act on, and which turns are learned. A field that changes
what other trainers learn is used or refused; any other that nothing reads is counted in an `Account`, to be told once.

Sources: data preparation of LLaMA-Factory (ShareGPT, Alpaca, their pairs), the dataset formats of TRL, the fine-tuning
formats of OpenAI, the fields of messages of Axolotl and ms-swift.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemkit.errors import ConfigError, DataError, nearest
from gemkit.train.data import schemas
from gemkit.train.data.messages import Account, Message, answered, asked, conversation
from gemkit.train.data.schemas import field, filled, is_empty, listed, shown, string

Read = Callable[[Mapping[str, Any], Path, Account], dict[str, Any]]


@dataclass(frozen=True)
class Dialect:
    """One spelling of a form.

    Attributes:
        fields: a record that has all of them is of this dialect.
        uses: further fields that are read.
        learned: which part of a record the loss is of.
        read: makes of a record the fields of its form.
        matches: asked, where the names of fields are not enough.
    """

    name: str
    form: str
    fields: tuple[str, ...]
    uses: tuple[str, ...]
    learned: str
    read: Read
    matches: Callable[[Mapping[str, Any]], bool] = lambda _: True


# Fields that other trainers act on, in records of these forms; each with the way out.
_TALKS = ("chat", "completion", "preference")
_LABEL = "says which answers are good (KTO), and no objective learns from that: keep the good ones, without the field"
_TOKENS = "holds tokens or masks that were made before: give the text or the messages that they were made of"
_WEIGHT = "weighs a record, and all records count the same here: leave it out, or repeat records"
_MEDIA = "belongs to conversations on pictures or sound, which are not learned: see the form image"
_REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "tools": (
        (*_TALKS, "prompt"),
        "describes tools, which other trainers write into the prompt in a format of their model: "
        "write them into the system message, and leave the field out",
    ),
    "chat_template_kwargs": ((*_TALKS, "prompt"), "are settings of a template; this family's format has none"),
    "chat_template": ((*_TALKS, "prompt"), "is another format of conversations: write such records as text"),
    "label": (_TALKS, _LABEL),
    "kto_tag": (_TALKS, _LABEL),
    "completions": (_TALKS, "are several completions of one prompt: write a record for each"),
    "weight": ((*_TALKS, "text"), _WEIGHT),
    "sample_weight": ((*_TALKS, "text"), _WEIGHT),
    "input_ids": (schemas.FORMS, _TOKENS),
    "labels": ((*_TALKS, "text"), _TOKENS),
    "completion_mask": ((*_TALKS, "text"), _TOKENS),
    "assistant_masks": ((*_TALKS, "text"), _TOKENS),
    "loss_mask": ((*_TALKS, "text"), _TOKENS),
    "image": (_TALKS, _MEDIA),
    "images": (schemas.FORMS, _MEDIA),
    "videos": (schemas.FORMS, _MEDIA),
    "audios": (schemas.FORMS, _MEDIA),
}
_REFUSED["functions"] = _REFUSED["tools"]


def find(record: Mapping[str, Any], form: str = "") -> Dialect:
    """The dialect of a record, of those of one form if it is asked for.

    Raises:
        DataError: if it has none.
    """
    candidates = [dialect for dialect in DIALECTS if form in ("", dialect.form)]
    for dialect in candidates:
        if all(record.get(name) is not None for name in dialect.fields) and dialect.matches(record):
            return dialect
    if form:
        return next(dialect for dialect in candidates if dialect.name == _PLAIN[form])
    for dialect in DIALECTS:  # a field that is null is told by the dialect that wants it
        if all(name in record for name in dialect.fields) and dialect.matches(record):
            return dialect
    wanted = "; ".join(f"{form}: {', '.join(BY_NAME[name].fields)}" for form, name in _PLAIN.items())
    raise DataError(
        f"the fields {listed(record)} make no form of training data ({wanted}; or another dialect of these); "
        "--map FIELD=COLUMN names a column as one of them"
    )


def read(dialect: Dialect, record: Mapping[str, Any], folder: Path, account: Account) -> dict[str, Any]:
    """A record in the spelling of its form; its other fields are kept.

    Args:
        folder: where the paths of images start.

    Raises:
        DataError: with the field that is wrong, or that would change what is learned and is not read.
    """
    for name, (forms, why) in _REFUSED.items():
        if dialect.form in forms and name not in dialect.fields and not is_empty(record.get(name)):
            raise DataError(f"{name} is {shown(record[name])}: it {why}")
    made = dialect.read(record, folder, account)
    if dialect.form != "prompt":  # a reward is given all fields
        for name, value in record.items():
            if name not in (*dialect.fields, *dialect.uses) and not is_empty(value):
                account.unused[name] += 1
    return {**record, **made}


def rename(record: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """A record whose columns have the names of fields: `{"prompt": "q"}` makes column "q" the prompt. "a.b" is field b
    of column a.

    Raises:
        DataError: if there is no such column.
    """
    if not columns:
        return record
    made = {name: value for name, value in record.items() if name not in columns.values()}
    for name, column in columns.items():
        value: Any = record
        for part in [column] if column in record else column.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise DataError(f"no column {column} (for {name}) among the fields {listed(record)}")
            value = value[part]
        made[name] = value
    return made


def check_columns(columns: Mapping[str, str]) -> None:
    """Raises: ConfigError, if columns are given for a field that no dialect has."""
    known = {name for dialect in DIALECTS for name in (*dialect.fields, *dialect.uses)}
    for name in columns:
        if name not in known:
            raise ConfigError(f"{name!r} is a field of no form of training data; {nearest(name, known)}")


# ── one reader for each way of spelling ─────────────────────────────────────────────────────────────────────────────


def _text(record: Mapping[str, Any], folder: Path, account: Account) -> dict[str, Any]:
    return schemas.text(record)


def _files(record: Mapping[str, Any], folder: Path, account: Account) -> dict[str, Any]:
    return schemas.files(record)


def _image(record: Mapping[str, Any], folder: Path, account: Account) -> dict[str, Any]:
    return schemas.image(record, folder)


def _prompt(record: Mapping[str, Any], folder: Path, account: Account) -> dict[str, Any]:
    return {"prompt": asked(field(record, "prompt"), account)}


def _completion(record: Mapping[str, Any], folder: Path, account: Account) -> dict[str, Any]:
    completion = field(record, "completion")
    prompt, said = answered(record.get("prompt"), completion, "completion", account, _system(record))
    return {"prompt": prompt, "completion": said}


def _talk(name: str) -> Read:
    """The messages of a field."""

    def read(record: Mapping[str, Any], folder: Path, account: Account) -> dict[str, Any]:
        return {"messages": conversation(field(record, name), name, account, system=_system(record))}

    return read


def _exchange(question: str, answer: str, beside: str = "") -> Read:
    """A turn of the user in one field, or two, and the answer to it in another."""

    def read(record: Mapping[str, Any], folder: Path, account: Account) -> dict[str, Any]:
        said = {"role": "assistant", "content": string(field(record, answer), answer)}
        return {"messages": [*_before(record, question, beside), {**said, "content": filled(said["content"], answer)}]}

    return read


def _pair(record: Mapping[str, Any], folder: Path, account: Account) -> dict[str, Any]:
    prompt, chosen, rejected = record.get("prompt"), field(record, "chosen"), field(record, "rejected")
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        prompt, chosen, rejected = _common(chosen, rejected)
    made = _preferred(prompt, chosen, rejected, account, _system(record))
    if not is_empty(record.get("margin")):
        margin = record["margin"]
        if isinstance(margin, bool) or not isinstance(margin, int | float):
            raise DataError(f"margin is {shown(margin)}, not a number")
    return made


def _common(chosen: str, rejected: str) -> tuple[str | None, str, str]:
    """Two texts without what both begin with, which is the prompt; a space before an answer belongs to the answer."""
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if not same:
        return None, chosen, rejected
    same -= chosen[same - 1] == " "
    return chosen[:same], chosen[same:], rejected[same:]


def _preferred(prompt: Any, chosen: Any, rejected: Any, account: Account, system: str | None = None) -> dict[str, Any]:
    """Two answers to one prompt."""
    before, good = answered(prompt, chosen, "chosen", account, system)
    other, bad = answered(prompt, rejected, "rejected", account, system)
    if before != other:
        raise DataError("chosen and rejected answer different prompts")
    if good == bad:
        raise DataError("chosen and rejected are the same, so neither is preferred")
    return {"prompt": before, "chosen": good, "rejected": bad}


def _pair_of_turns(name: str) -> Read:
    """A conversation, and two messages that could come next (LLaMA-Factory)."""

    def read(record: Mapping[str, Any], folder: Path, account: Account) -> dict[str, Any]:
        turns = conversation(field(record, name), name, account, system=_system(record), answers=False)
        return _preferred(turns, record["chosen"], record["rejected"], account)

    return read


def _pair_of_answers(question: str, beside: str = "") -> Read:
    """A turn of the user, and two texts that could answer it."""

    def read(record: Mapping[str, Any], folder: Path, account: Account) -> dict[str, Any]:
        good, bad = ({"role": "assistant", "content": string(record[side], side)} for side in ("chosen", "rejected"))
        return _preferred(_before(record, question, beside), good, bad, account)

    return read


def _pair_of_openai(record: Mapping[str, Any], folder: Path, account: Account) -> dict[str, Any]:
    asks = record["input"]
    if not isinstance(asks, Mapping):
        raise DataError(f"input is {shown(asks)}, not an object with messages")
    if not is_empty(asks.get("tools")):
        raise DataError(f"input.tools {_REFUSED['tools'][1]}")
    messages = field(asks, "messages", "input.")
    return _preferred(messages, record["preferred_output"], record["non_preferred_output"], account)


_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def _pair_of_texts(record: Mapping[str, Any], folder: Path, account: Account) -> dict[str, Any]:
    chosen, rejected = (_spoken(string(record[side], side), side) for side in ("chosen", "rejected"))
    return _preferred(None, chosen, rejected, account)


def _spoken(text: str, name: str) -> list[Message]:
    """The turns of a text in which "\\n\\nHuman:" and "\\n\\nAssistant:" begin them."""
    first, *parts = _SPEAKER.split("\n\n" + text.lstrip())
    if first:
        raise DataError(f"{name} has {shown(first)} before its first turn")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[by], "content": said.strip()} for by, said in zip(parts[::2], parts[1::2], strict=True)]


def _is_spoken(record: Mapping[str, Any]) -> bool:
    sides = (record["chosen"], record["rejected"])
    return record.get("prompt") is None and all(
        isinstance(side, str) and side.lstrip().startswith("Human:") and "\n\nAssistant:" in side for side in sides
    )


def _before(record: Mapping[str, Any], question: str, beside: str) -> list[Message]:
    """What comes before an answer: instructions, earlier turns, and the turn of the user."""
    asks = [string(record[name], name) for name in (question, beside) if not is_empty(record.get(name))]
    if not "".join(asks).strip():
        raise DataError(f"{question} is empty")
    past: list[Message] = []
    history = record.get("history")
    if not is_empty(history):
        if not isinstance(history, list):
            raise DataError(f"history is {shown(history)}, not a list of pairs of question and answer")
        for i, pair in enumerate(history):
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise DataError(f"history[{i}] is {shown(pair)}, not a pair of question and answer")
            past += [
                {"role": "user", "content": string(pair[0], f"history[{i}][0]")},
                {"role": "assistant", "content": filled(pair[1], f"history[{i}][1]")},
            ]
    system = _system(record)
    head = [] if system is None else [{"role": "system", "content": system}]
    return [*head, *past, {"role": "user", "content": "\n".join(asks)}]


def _system(record: Mapping[str, Any]) -> str | None:
    """Instructions that stand in a field of their own."""
    for name in ("system", "system_prompt"):
        if not is_empty(record.get(name)):
            return string(record[name], name)
    return None


# ── the table: the first that fits ──────────────────────────────────────────────────────────────────────────────────

_HEAD = ("system", "system_prompt")
_PAST = (*_HEAD, "history")
_EVERY = "every answer is learned"
_PREFERS = "to prefer chosen to rejected"
_SECOND = "the answer to the user's turn is learned"


def _is_message(record: Mapping[str, Any]) -> bool:
    return isinstance(record["chosen"], Mapping)


DIALECTS = (
    Dialect(
        "preferences of OpenAI", "preference", ("input", "preferred_output", "non_preferred_output"), (), _PREFERS,
        _pair_of_openai,
    ),
    Dialect("Human/Assistant texts", "preference", ("chosen", "rejected"), (), _PREFERS, _pair_of_texts, _is_spoken),
    Dialect(
        "ShareGPT pairs", "preference", ("conversations", "chosen", "rejected"), _HEAD, _PREFERS,
        _pair_of_turns("conversations"), _is_message,
    ),
    Dialect(
        "pairs after messages", "preference", ("messages", "chosen", "rejected"), _HEAD, _PREFERS,
        _pair_of_turns("messages"), _is_message,
    ),
    *(
        Dialect(
            f"{asks}/chosen/rejected", "preference", (asks, "chosen", "rejected"), _PAST + beside, _PREFERS,
            _pair_of_answers(asks, *beside),
            lambda record: record.get("prompt") is None and isinstance(record["chosen"], str),
        )
        for asks, beside in (("instruction", ("input",)), ("question", ()), ("input", ()))
    ),
    Dialect("chosen/rejected", "preference", ("chosen", "rejected"), ("prompt", "margin", *_HEAD), _PREFERS, _pair),
    Dialect("messages", "chat", ("messages",), _HEAD, _EVERY, _talk("messages")),
    Dialect("ShareGPT", "chat", ("conversations",), _HEAD, _EVERY, _talk("conversations")),
    Dialect(
        "Alpaca", "chat", ("instruction", "output"), ("input", *_PAST), _EVERY,
        _exchange("instruction", "output", "input"),
    ),
    Dialect(
        "Dolly", "chat", ("instruction", "response"), ("context", *_HEAD), _EVERY,
        _exchange("instruction", "response", "context"),
    ),
    Dialect("image/suffix", "image", ("image", "suffix"), ("prompt", "prefix"), "the suffix is learned", _image),
    Dialect(
        "prompt/completion", "completion", ("prompt", "completion"), _HEAD, "the completion is learned", _completion
    ),
    *(
        Dialect(f"{asks}/{says}", "chat", (asks, says), _PAST, _SECOND, _exchange(asks, says))
        for asks, says in (
            ("prompt", "response"), ("question", "answer"), ("question", "response"), ("query", "response"),
            ("input", "output"),
        )
    ),
    Dialect("files", "files", ("files",), (), "all of it is learned", _files),
    Dialect("text", "text", ("text",), ("path",), "all of it is learned", _text),
    Dialect("prompt", "prompt", ("prompt",), (), "a reward says what is", _prompt),
)  # fmt: skip
BY_NAME = {dialect.name: dialect for dialect in DIALECTS}
# the dialect that a form is known by
_PLAIN = {
    "preference": "chosen/rejected",
    "chat": "messages",
    "image": "image/suffix",
    "completion": "prompt/completion",
    "files": "files",
    "text": "text",
    "prompt": "prompt",
}
