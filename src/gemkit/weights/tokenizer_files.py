"""What stands beside a vocabulary: added tokens, special tokens, ends of answers and the chat template.

    tokenizer.json              added_tokens, post_processor: whether `<bos>` is put in front
    tokenizer_config.json       special tokens, added_tokens_decoder, chat_template as text or as a list with names
    special_tokens_map.json     special tokens, where the one above has no added_tokens_decoder
    added_tokens.json           piece -> id, of older versions
    chat_template.jinja, additional_chat_templates/NAME.jinja       before tokenizer_config.json
    chat_template.json          of a processor: where there is no other
    generation_config.json, config.json                             eos_token_id

Each is used as Transformers 5 uses it (tokenization_utils_base.py); what has no effect there has none here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemkit.errors import WeightsError
from gemkit.text import Tokenizer
from gemkit.text.chat_template import ChatTemplate, is_family
from gemkit.text.settings import SPECIAL, Settings
from gemkit.text.vocabulary import AddedToken
from gemkit.weights.formats.base import MAX_HEADER, parse_json
from gemkit.weights.keys_beside import TOKENIZER
from gemkit.weights.known_keys import check_keys
from gemkit.weights.tokenizer_json import TokenizerJson, post_processor

TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a small file.

    Raises:
        WeightsError: if it is something else.
    """
    try:
        if path.stat().st_size > MAX_HEADER:
            raise WeightsError(f"{path}: {path.stat().st_size:,} bytes is too large for a configuration")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error


def _if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


# ── chat templates ──────────────────────────────────────────────────────────────────────────────────────────────────


def chat_template(folder: Path) -> tuple[bool, ChatTemplate | None]:
    """Whether a folder has a chat template, and the template if it is not the family's.

    Raises:
        WeightsError: if it has several with names, and none is the default; or one that is no text.
    """
    templates, name = _templates(folder)
    if not templates:
        return False, None
    if "default" not in templates:
        raise WeightsError(
            f"{folder}: its chat templates are {', '.join(templates)}, and none is the default: save the one that you "
            "mean as chat_template.jinja"
        )
    return True, _foreign(templates["default"], f"the chat template in {folder / name}", templates.get("tool_use"))


def _foreign(source: str, name: str, tool_use: str | None = None) -> ChatTemplate | None:
    return None if is_family(source) and tool_use is None else ChatTemplate(source, name, tool_use)


def _templates(folder: Path) -> tuple[dict[str, str], str]:
    """Templates by their names, and the file of the default one."""
    found = {path.stem: _text(path) for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        return {"default": _text(folder / "chat_template.jinja"), **found}, "chat_template.jinja"
    if found:
        return found, "additional_chat_templates"
    for file in ("tokenizer_config.json", "chat_template.json", "processor_config.json"):
        given = _if_there(folder / file).get("chat_template")
        if given is not None:
            return _named(given, folder / file), file
    return {}, ""


def _named(given: Any, where: Path) -> dict[str, str]:
    """Templates by their names from a text, a list of names and texts, or an object of them."""
    if isinstance(given, str):
        return {"default": given}
    try:
        named = dict(given) if isinstance(given, Mapping) else {each["name"]: each["template"] for each in given}
    except (TypeError, KeyError):
        named = {}
    if not named or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise WeightsError(f"{where}: chat_template is neither a text nor a list of names and templates")
    return named


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_HEADER:
            raise WeightsError(f"{path}: {path.stat().st_size:,} bytes is too large for a template")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise WeightsError(f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}") from None


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


def with_files(tokenizer: Tokenizer, folder: Path, file: TokenizerJson | None, *, seeing: bool = False) -> Tokenizer:
    """A tokenizer of a folder, with the added tokens and the settings of the files beside it.

    Args:
        file: its tokenizer.json, if it has one.
        seeing: it belongs to a PaliGemma.

    Raises:
        WeightsError: if they contradict the vocabulary, or ask for what is not implemented.
    """
    config, head = _if_there(folder / "tokenizer_config.json"), {} if file is None else file.settings
    vocabulary = tokenizer.vocabulary.with_added(_added(config, head, folder), source=str(folder))
    if vocabulary is not tokenizer.vocabulary:  # most files add nothing, and SentencePiece takes its time
        tokenizer = Tokenizer(vocabulary)
    special, notes = _special(config, folder, tokenizer)
    if file is not None:
        notes += file.check(config.get("tokenizer_class"), seeing)
    notes += check_keys(config, TOKENIZER, "tokenizer_config.json", error=WeightsError)
    if head:
        add_bos, add_eos = post_processor(head)
    else:
        add_bos, add_eos = (bool(config.get(f"add_{x}_token", x == "bos")) for x in ("bos", "eos"))
    if not add_bos:
        notes.append("its tokenizer puts no <bos> before a text (add_bos_token), so none is put there")
    if add_eos and head:
        notes.append("tokenizer.json puts <eos> after a text; it is not put there, since that ends an answer")
    _, template = chat_template(folder)
    ends = frozenset(eos_ids(folder, len(tokenizer)))
    if special["eos_token"] in tokenizer:
        ends |= {tokenizer.id(special["eos_token"])}
    return tokenizer.with_settings(Settings(special, add_bos, ends, template, tuple(notes)))


def with_metadata(tokenizer: Tokenizer, metadata: Mapping[str, Any], label: str) -> Tokenizer:
    """A tokenizer of a GGUF, with the settings in its metadata, as llama.cpp uses them.

    Raises:
        WeightsError: if they contradict the vocabulary.
    """
    keys = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    named = {f"{role}_token": keys.get(f"{id}_token_id") for role, id in _ROLES.items()}
    special = dict(SPECIAL)
    for name, token in named.items():
        if token is not None:
            if not _is_id(token, len(tokenizer)):
                raise WeightsError(f"{label}: {name}_id={token!r} is no piece of its {len(tokenizer)}")
            special[name] = tokenizer.piece(token)
    ends = {keys[f"{end}_token_id"] for end in _ENDS if f"{end}_token_id" in keys}
    for end in ends:
        if not _is_id(end, len(tokenizer)):
            raise WeightsError(f"{label}: the end {end!r} of its metadata is no piece of its {len(tokenizer)}")
    notes = []
    add_bos = bool(keys.get("add_bos_token", True))
    if not add_bos:
        notes.append("tokenizer.ggml.add_bos_token is false: no <bos> is put before a text")
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise WeightsError(f"{label}: tokenizer.chat_template is no text")
    tools = metadata.get("tokenizer.chat_template.tool_use")
    own = None if template is None else _foreign(template, f"tokenizer.chat_template of {label}", tools)
    return tokenizer.with_settings(Settings(special, add_bos, frozenset(ends), own, tuple(notes)))


_ENDS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")  # llama.cpp ends an answer with any of them
_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


def eos_ids(folder: Path, tokens: int) -> list[int]:
    """`eos_token_id` of generation_config.json, or of config.json where that says nothing.

    Raises:
        WeightsError: if it is no id, nor a list of them.
    """
    for file in ("generation_config.json", "config.json"):
        given = _if_there(folder / file).get("eos_token_id")
        if given is None:
            continue
        ids = given if isinstance(given, list) else [given]
        for id in ids:
            if not _is_id(id, tokens):
                raise WeightsError(f"{folder / file}: eos_token_id={given!r}, and ids are 0 to {tokens - 1}")
        return ids
    return []


def _is_id(value: Any, tokens: int) -> bool:
    return type(value) is int and 0 <= value < tokens


def _added(config: Mapping[str, Any], head: Mapping[str, Any], folder: Path) -> list[AddedToken]:
    """Tokens that the files add to a vocabulary, or rename in it; what a later file says of an id counts."""
    found: dict[int, AddedToken] = {}
    try:
        for piece, id in _if_there(folder / "added_tokens.json").items():
            found[int(id)] = AddedToken(int(id), piece, special=False)
        for each in head.get("added_tokens", ()):
            found[each["id"]] = AddedToken.from_json(each["id"], each)
        for id, each in config.get("added_tokens_decoder", {}).items():
            found[int(id)] = AddedToken.from_json(int(id), each)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise WeightsError(f"{folder}: its added tokens are damaged: {type(error).__name__}: {error}") from None
    special = set(_names(config, folder).values())
    return [replace(token, special=token.special or token.piece in special) for _, token in sorted(found.items())]


def _names(config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Name -> piece of the special tokens that the files name."""
    legacy = {} if "added_tokens_decoder" in config else _if_there(folder / "special_tokens_map.json")
    given = {**config, **legacy}
    extra = given.get("extra_special_tokens")
    given |= extra if isinstance(extra, dict) else {}
    pieces = {name: value.get("content") if isinstance(value, dict) else value for name, value in given.items()}
    return {name: piece for name, piece in pieces.items() if name.endswith("_token") and isinstance(piece, str)}


def _special(config: Mapping[str, Any], folder: Path, tokenizer: Tokenizer) -> tuple[dict[str, str], list[str]]:
    special, notes = {**SPECIAL, "mask_token": "<mask>", **_names(config, folder)}, []
    if special["bos_token"] not in tokenizer:
        raise WeightsError(f"{folder}: its bos_token {special['bos_token']!r} is no piece of its vocabulary")
    if special["eos_token"] not in tokenizer:
        notes.append(f"the eos_token {special['eos_token']!r} is no piece of its vocabulary, and so ends no answer")
    return special, notes
