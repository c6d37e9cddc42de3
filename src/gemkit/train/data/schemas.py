"""The forms of training records: what each holds, and what is wrong with one that does not.

    text        {"text": "..."}                                       and "path", where it is a file of source code
    files       {"files": [{"path": "...", "text": "..."}, ...]}      of one repository
    completion  {"prompt": "...", "completion": "..."}
    chat        {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    preference  {"prompt": "...", "chosen": "...", "rejected": "..."}
    image       {"image": "shapes/1.png", "prompt": "detect cat", "suffix": "<loc0100>... cat"}
    prompt      {"prompt": "...", ...}                                and whatever a reward wants to know

A prompt is a text, or a list of messages that ends with one by the user; an answer to it may then be a list too.
Other spellings in use are read as well: `conversations` with `from` and `value` for `messages` (ShareGPT), `prefix` for
the prompt on an image. `check` gives every record the one spelling above. Fields that a form does not know are kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemkit.errors import ConfigError, DataError, nearest

# A record has the first of these forms whose fields it has. Alternatives are separated by a bar.
_FIELDS = {
    "preference": ("chosen", "rejected"),
    "chat": ("messages|conversations",),
    "image": ("image", "suffix"),
    "completion": ("prompt", "completion"),
    "files": ("files",),
    "text": ("text",),
    "prompt": ("prompt",),
}
FORMS = tuple(_FIELDS)

# the names of roles in use -> ours
_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "model": "assistant",
    "gpt": "assistant",
    "system": "system",
}

Message = dict[str, str]


def known(form: str) -> str:
    """The form itself. Raises ConfigError if it is none."""
    if form not in FORMS:
        raise ConfigError(f"form={form!r} is no form of training data; {nearest(str(form), FORMS)}")
    return form


def detect(record: Mapping[str, Any]) -> str:
    """The form of a record, by its fields.

    Raises:
        DataError: if it has none.
    """
    for form, fields in _FIELDS.items():
        if all(any(name in record for name in field.split("|")) for field in fields):
            return form
    wanted = "; ".join(f"{form}: {', '.join(fields)}" for form, fields in _FIELDS.items()).replace("|", " or ")
    raise DataError(f"the fields {', '.join(map(repr, record)) or '(none)'} make no form of training data ({wanted})")


def check(form: str, record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The record in the spelling of its form.

    Args:
        folder: where the paths of images start.

    Raises:
        DataError: if it has not that form; says which field is wrong, and how.
    """
    return {**record, **_CHECKS[form](record, folder)}


def _text(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    path = {"path": _string(record["path"], "path")} if "path" in record else {}
    return {"text": _filled(_field(record, "text"), "text"), **path}


def _files(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    files = _field(record, "files")
    if not isinstance(files, Sequence) or isinstance(files, str) or not files:
        raise DataError(f"files is {_shown(files)}; it must be a list of files, each with path and text")
    for i, file in enumerate(files):
        if not isinstance(file, Mapping):
            raise DataError(f"files[{i}] is {_shown(file)}, not an object with path and text")
        for name in ("path", "text"):
            _filled(_field(file, name, f"files[{i}]."), f"files[{i}].{name}")
        if "\n" in file["path"]:
            raise DataError(f"files[{i}].path {file['path']!r} must be one line")
    return {}


def _completion(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    prompt, completion = _answered(record.get("prompt"), _field(record, "completion"), "completion")
    return {"prompt": prompt, "completion": completion}


def _chat(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    name = "conversations" if "conversations" in record and "messages" not in record else "messages"
    messages = _messages(_field(record, name), name)
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{name} has no turn by the assistant, so there is nothing to learn")
    return {"messages": messages}


def _preference(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    prompt, chosen = _answered(record.get("prompt"), _field(record, "chosen"), "chosen")
    other, rejected = _answered(record.get("prompt"), _field(record, "rejected"), "rejected")
    if prompt != other:
        raise DataError("chosen and rejected answer different prompts")
    if chosen == rejected:
        raise DataError("chosen and rejected are the same, so neither is preferred")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _image(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    given = _field(record, "image")
    sources = [_picture(source, folder) for source in (given if isinstance(given, list) else [given])]
    if not sources:
        raise DataError("image is an empty list; name at least one")
    prompt = record.get("prefix", record.get("prompt"))
    suffix = _field(record, "suffix")
    return {"image": sources, "prompt": _string(prompt, "prompt"), "suffix": _string(suffix, "suffix")}


def _prompt(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return {"prompt": _asked(_field(record, "prompt"))}


_CHECKS = {
    "text": _text,
    "files": _files,
    "completion": _completion,
    "chat": _chat,
    "preference": _preference,
    "image": _image,
    "prompt": _prompt,
}


def _picture(source: Any, folder: Path) -> str | bytes:
    """The path of a picture that exists, or what a Parquet file holds of one."""
    if isinstance(source, Mapping) and isinstance(source.get("bytes"), bytes):
        return source["bytes"]
    if isinstance(source, bytes):
        return source
    path = os.path.join(folder, os.path.expanduser(_filled(source, "image")))
    if "\0" in path or not os.path.isfile(path):
        raise DataError(f"image {source!r}: there is no file {path!r} (paths start at the folder of the data file)")
    return path


def _asked(prompt: Any) -> str | list[Message]:
    """A prompt: a text, or messages of which the last is by the user."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return _filled(prompt, "prompt")
    messages = _messages(prompt, "prompt")
    if messages[-1]["role"] != "user":
        raise DataError(f"prompt[{len(messages) - 1}] is by the {messages[-1]['role']}; it must end with the user")
    return messages


def _answered(prompt: Any, answer: Any, name: str) -> tuple[str | list[Message], str]:
    """A prompt and the text that answers it.

    An answer that is a list of messages has one by the assistant at its end. Those before it are the prompt, where it
    repeats them; a prompt that is a text is then what the user said.
    """
    if isinstance(answer, str) or not isinstance(answer, Sequence):
        return _asked(prompt), _filled(answer, name)
    before = [] if prompt is None else _asked(prompt)
    if isinstance(before, str):
        before = [{"role": "user", "content": before}]
    spelled = [_message(message, f"{name}[{i}]") for i, message in enumerate(answer)]
    if len(spelled) == 1:
        spelled = [*before, *spelled]
    messages = _messages(spelled, name)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{name} must end with a message by the assistant, not by the {messages[-1]['role']}")
    if before and messages[:-1] != before:
        raise DataError(f"{name} has {len(messages) - 1} messages before its answer, and they are not the prompt")
    if len(messages) < 2:
        raise DataError(f"{name} is an answer without a prompt: give one in prompt")
    return messages[:-1], messages[-1]["content"]


def _messages(value: Any, name: str) -> list[Message]:
    """Messages in our spelling, that make a conversation: an optional system message, then user and assistant."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"{name} is {_shown(value)}, not a list of messages")
    if not value:
        raise DataError(f"{name} is empty; a conversation begins with a message by the user")
    messages = [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]
    start = int(messages[0]["role"] == "system")
    if len(messages) == start:
        raise DataError(f"{name} has a system message and no other")
    for i, message in enumerate(messages[start:], start):
        expected = ("user", "assistant")[(i - start) % 2]
        if message["role"] != expected:
            raise DataError(
                f"{name}[{i}] is by the {message['role']}, expected the {expected}: "
                "after an optional system message, user and assistant alternate, the user first"
            )
    return messages


def _message(message: Any, name: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{name} is {_shown(message)}, not an object with role and content")
    by, said = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
    role = _field(message, by, f"{name}.")
    if not isinstance(role, str) or role not in _ROLES:
        raise DataError(f"{name}.{by} is {_shown(role)}; roles are {', '.join(_ROLES)}")
    content = _string(_field(message, said, f"{name}."), f"{name}.{said}")
    if _ROLES[role] == "assistant":
        _filled(content, f"{name}.{said}")
    return {"role": _ROLES[role], "content": content}


def _field(record: Mapping[str, Any], name: str, where: str = "") -> Any:
    if name not in record:
        raise DataError(f"no {where}{name} among the fields {', '.join(map(repr, record)) or '(none)'}")
    return record[name]


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {_shown(value)}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise DataError(f"{name} has the lone surrogate U+{code:04X}, which is no character") from None
    return value


def _filled(value: Any, name: str) -> str:
    if not _string(value, name).strip():
        raise DataError(f"{name} is empty" if not value else f"{name} is only white space")
    return value


def _shown(value: Any) -> str:
    """A value as JSON calls it, short."""
    if value is None:
        return "missing or null"
    kinds = {bool: "a truth value", int: "a number", float: "a number", str: "the text", list: "a list"}
    kind, text = kinds.get(type(value), "an object"), repr(value)
    return f"{kind} {text if len(text) <= 60 else text[:57] + '...'}"
