"""The forms of training records: what each holds, and what is wrong with one that does not.

    text        {"text": "..."}                                       and "path", where it is a file of source code
    files       {"files": [{"path": "...", "text": "..."}, ...]}      of one repository
    completion  {"prompt": "...", "completion": "..."}
    chat        {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}
    preference  {"prompt": "...", "chosen": "...", "rejected": "..."}
    image       {"image": "shapes/1.png", "prompt": "detect cat", "suffix": "<loc0100>... cat"}
    prompt      {"prompt": "...", ...}                                and whatever a reward wants to know

A prompt is a text, or a list of messages that ends with one by the user; an answer to it may then be a list too.
Other spellings are dialects of these forms, and `dialects.py` reads them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemkit.errors import ConfigError, DataError, nearest

FORMS = ("preference", "chat", "image", "completion", "files", "text", "prompt")


def known(form: str) -> str:
    """The form itself. Raises ConfigError if it is none."""
    if form not in FORMS:
        raise ConfigError(f"form={form!r} is no form of training data; {nearest(str(form), FORMS)}")
    return form


def text(record: Mapping[str, Any]) -> dict[str, Any]:
    """A document. Raises DataError, as all functions here do, with the field that is wrong."""
    path = {"path": string(record["path"], "path")} if record.get("path") is not None else {}
    return {"text": filled(field(record, "text"), "text"), **path}


def files(record: Mapping[str, Any]) -> dict[str, Any]:
    """Files of one repository."""
    given = field(record, "files")
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise DataError(f"files is {shown(given)}; it must be a list of files, each with path and text")
    for i, file in enumerate(given):
        if not isinstance(file, Mapping):
            raise DataError(f"files[{i}] is {shown(file)}, not an object with path and text")
        for name in ("path", "text"):
            filled(field(file, name, f"files[{i}]."), f"files[{i}].{name}")
        if "\n" in file["path"]:
            raise DataError(f"files[{i}].path {file['path']!r} must be one line")
    return {"files": given}


def image(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A task on pictures; their paths start at `folder`."""
    given = field(record, "image")
    sources = [_picture(source, folder) for source in (given if isinstance(given, list) else [given])]
    if not sources:
        raise DataError("image is an empty list; name at least one")
    prompt = record.get("prefix", record.get("prompt"))
    suffix = field(record, "suffix")
    return {"image": sources, "prompt": string(prompt, "prompt"), "suffix": string(suffix, "suffix")}


def _picture(source: Any, folder: Path) -> str | bytes:
    """The path of a picture that exists, or what a Parquet file holds of one."""
    if isinstance(source, Mapping) and isinstance(source.get("bytes"), bytes):
        return source["bytes"]
    if isinstance(source, bytes):
        return source
    path = os.path.join(folder, os.path.expanduser(filled(source, "image")))
    if "\0" in path or not os.path.isfile(path):
        raise DataError(f"image {source!r}: there is no file {path!r} (paths start at the folder of the data file)")
    return path


# ── fields ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def field(record: Mapping[str, Any], name: str, where: str = "") -> Any:
    """A field that must be there."""
    if name not in record:
        raise DataError(f"no {where}{name} among the fields {listed(record)}")
    return record[name]


def listed(record: Iterable[str]) -> str:
    """The names of a record's fields."""
    return ", ".join(map(repr, record)) or "(none)"


def is_empty(value: Any) -> bool:
    """Whether a field says nothing: null, an empty text or list, or JSON of one."""
    return value is None or value in ("", "[]", "{}", "null") or (isinstance(value, list | dict) and not value)


def string(value: Any, name: str) -> str:
    """A text that can be encoded."""
    if not isinstance(value, str):
        raise DataError(f"{name} is {shown(value)}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise DataError(f"{name} has the lone surrogate U+{code:04X}, which is no character") from None
    return value


def filled(value: Any, name: str) -> str:
    """A text with something in it."""
    if not string(value, name).strip():
        raise DataError(f"{name} is empty" if not value else f"{name} is only white space")
    return value


def shown(value: Any) -> str:
    """A value as JSON calls it, short."""
    if value is None:
        return "missing or null"
    kinds = {bool: "a truth value", int: "a number", float: "a number", str: "the text", list: "a list"}
    kind, text = kinds.get(type(value), "an object"), repr(value)
    return f"{kind} {text if len(text) <= 60 else text[:57] + '...'}"
