"""The prompt formats of the family, each defined once: what a model was trained to see.

    complete    <bos> text
    chat        <bos> <start_of_turn> user\\n question <end_of_turn> \\n <start_of_turn> model\\n
    infill      <bos> <|fim_prefix|> before the caret <|fim_suffix|> after the caret <|fim_middle|>
    image       <image> for each patch of each image <bos> task \n

A `Prompt` is ids together with the account of where each comes from. Control tokens are placed here by id; what a user
wrote is encoded as text, so a message that spells `<end_of_turn>` ends no turn.

Sources: formatting section of the Gemma 1 and 2 reports (arXiv:2403.08295, 2408.00118) and the chat template published
with Gemma 3; CodeGemma report (arXiv:2406.11409), inference recommendations; PaliGemma report (arXiv:2407.07726) and
google-research/big_vision, pp/proj/paligemma.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Literal

from gemkit.errors import ConfigError, ContextError, ModelError, TextError
from gemkit.text.tokenizer import Tokenizer
from gemkit.text.vocabulary import BOS, IMAGE, INFILL, SPACE

FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX, FILE_SEPARATOR = INFILL.values()
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"

Format = Literal["complete", "chat", "infill", "image"]
Kind = Literal["control", "template", "content"]

# the role of a message -> the role that the format knows
ROLES = {"user": "user", "assistant": "model", "model": "model", "system": "system"}


@dataclass(frozen=True)
class Span:
    """A stretch of a prompt with one origin.

    Text between two control tokens is encoded in one go, as in training. A piece that reaches over the border of two
    spans (line breaks do, when content begins with some) counts to the span where it begins.
    """

    kind: Kind  # control: a token placed by its id; template: text of the format; content: text of the caller
    text: str
    ids: tuple[int, ...] = ()
    role: str = ""  # of the turn that it belongs to: "user", "model", "system"

    @property
    def is_run(self) -> bool:
        """Whether it is one control token many times over: the placeholders of an image."""
        return self.kind == "control" and len(self.ids) > 1

    def __str__(self) -> str:
        """The text and the ids; the placeholders of an image as their number."""
        if self.is_run:
            return f"{len(self.ids):,} x {self.text[: len(self.text) // len(self.ids)]!r}  {self.ids[0]}"
        return f"{self.text!r}  {' '.join(map(str, self.ids))}"


@dataclass(frozen=True)
class Prompt:
    """Ids for a model, and what each of them is. `print(prompt)` shows it span by span."""

    format: Format
    spans: tuple[Span, ...]
    stop_ids: frozenset[int]  # an answer ends before the first of these
    notes: tuple[str, ...] = ()  # what was left out to keep within a budget

    @cached_property
    def ids(self) -> list[int]:
        return [i for span in self.spans for i in span.ids]

    @property
    def text(self) -> str:
        return "".join(span.text for span in self.spans)

    @property
    def prefix(self) -> int:
        """How many of its tokens see one another, before and after: all of a prompt with images, else none."""
        return len(self) if self.format == "image" else 0

    def __len__(self) -> int:
        return len(self.ids)

    def __str__(self) -> str:
        lines = [f"{span.kind:<8}  {span}" for span in self.spans]
        return "\n".join([f"{self.format} prompt, {len(self)} tokens", *lines, *self.notes])


def stop_ids(tokenizer: Tokenizer, format: Format) -> frozenset[int]:
    """The ids that end an answer to a prompt of this format.

    A model tuned for chat ends what it says with `<end_of_turn>`, whatever it was asked to continue, and one for
    infilling ends its middle with `<|file_separator|>`; neither is sure to say `<eos>`.
    """
    if format != "infill":
        return tokenizer.end_ids
    return tokenizer.end_ids | {i for piece in INFILL.values() for i in _control(tokenizer, piece).ids}


def complete(tokenizer: Tokenizer, text: str, *, control: bool = False) -> Prompt:
    """`text` for a model to go on with.

    Args:
        control: control tokens that `text` spells are meant as such: it is a whole prompt made elsewhere, say by a chat
            template. A `<bos>` at its head is not doubled, and an answer ends as in the format that it shows.

    Raises:
        TextError: if `text` cannot be encoded.
    """
    if control:
        spans: list[Span] = []
        ids = tokenizer.with_bos(tokenizer.encode(text, control=True))
        for is_control, group in groupby(ids, key=tokenizer.is_control):
            if is_control:
                spans += [Span("control", tokenizer.piece(i), (i,)) for i in group]
            else:
                content = tuple(group)
                spans.append(Span("content", tokenizer.decode(content), content))
        marks = {span.text for span in spans if span.kind == "control"}
        shown = "infill" if FIM_PREFIX in marks else "chat" if START_OF_TURN in marks else "complete"
        return Prompt(shown, tuple(spans), stop_ids(tokenizer, shown))
    return _prompt(tokenizer, "complete", [_control(tokenizer, BOS), Span("content", text)])


def chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    system: Literal["merge", "reject"] = "merge",
    answer: bool = True,
) -> Prompt:
    """A conversation in the turn format of Gemma 1, 2, 3, CodeGemma and RecurrentGemma.

    Args:
        messages: dicts of `role` ("user", "assistant" or its other name "model", and "system" for the first one) and
            `content` (str). User and model alternate, the user begins. Whitespace around the content of a turn is
            dropped, as the published templates do.
        system: the family has no system turn. "merge" puts a system message and a blank line before the first user
            message, as Gemma 3's template does; "reject" refuses it, as those of Gemma 1 and 2 do.
        answer: open the model's turn at the end, which needs a last message by the user. False encodes a finished
            conversation, for example to train on.

    Raises:
        TextError: if the messages make no such conversation; names the message by its index.
    """
    if system not in ("merge", "reject"):
        raise ConfigError(f"system={system!r} must be 'merge' or 'reject'")
    if not messages:
        raise TextError("messages is empty; a conversation begins with a message by the user")
    checked = [_check_message(i, message) for i, message in enumerate(messages)]
    spans = [_control(tokenizer, BOS)]
    preamble = []
    if checked[0][0] == "system":
        if system == "reject":
            raise TextError(
                "messages[0] has the role 'system', which this format lacks; begin the first user message with it"
            )
        preamble = [Span("content", checked[0][1], role="system"), Span("template", "\n\n", role="user")]
    start = 1 if preamble else 0
    if len(checked) == start:
        raise TextError(f"messages[{start}] is missing: a system message needs a message by the user after it")
    for i, (role, content) in enumerate(checked[start:], start):
        expected = ("user", "model")[(i - start) % 2]
        if role != expected:
            raise TextError(
                f"messages[{i}] has the role {messages[i]['role']!r}, expected {expected!r}: "
                "after an optional system message, user and model alternate, the user first"
            )
        body = [*preamble, Span("content", content.strip(), role=role)]
        preamble = []
        spans += [*_open_turn(tokenizer, role), *body, *_close_turn(tokenizer, role)]
    if answer:
        if checked[-1][0] != "user":
            raise TextError(
                f"messages[{len(checked) - 1}] is by the model, so there is nothing to answer; "
                "end with a message by the user, or encode a finished conversation with answer=False"
            )
        spans += _open_turn(tokenizer, "model")
    return _prompt(tokenizer, "chat", spans)


# The same format as `chat`, for tools that read templates: it is saved with a model that was tuned for it.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set ns = namespace(preamble='', expected='user') -%}
{%- for message in messages -%}
{%- if loop.first and message.role == 'system' -%}
{%- set ns.preamble = message.content + '\\n\\n' -%}
{%- else -%}
{%- set role = 'model' if message.role == 'assistant' else message.role -%}
{%- if role != ns.expected -%}
{{- raise_exception('user and assistant must alternate, the user first') -}}
{%- endif -%}
{{- '<start_of_turn>' + role + '\\n' + ns.preamble + message.content | trim + '<end_of_turn>\\n' -}}
{%- set ns.preamble = '' -%}
{%- set ns.expected = 'user' if role == 'model' else 'model' -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""


def next_turn(tokenizer: Tokenizer, history: Sequence[int], content: str) -> Prompt:
    """Only the ids that carry a conversation on: the user's next turn and the opening of the model's answer.

    `history` is encoded already and stays as it is, so that what a model remembers of it can be used again.

    Args:
        history: the ids so far, or at least the last two: a chat prompt and the model's answer to it. The model's turn
            is closed exactly once, whether or not the answer ends in `<end_of_turn>` already.
        content: what the user says next; surrounding whitespace is dropped.

    Raises:
        TextError: if `history` is empty or ends in `<eos>`, which belongs to no running conversation: drop that id.
    """
    if not isinstance(content, str):
        raise TextError(f"content of the next turn is {type(content).__name__}, not str")
    tail = [int(i) for i in history[-2:]]
    if not tail or tail[-1] == tokenizer.eos:
        raise TextError(
            "history ends in <eos>; drop it and go on from there" if tail else "history is empty; use chat()"
        )
    close = _encode(tokenizer, _close_turn(tokenizer, "model"))
    end, line_break = (span.ids[0] for span in close)
    done = 2 if tail == [end, line_break] else 1 if tail[-1] == end else 0
    body = Span("content", content.strip(), role="user")
    turns = [*_open_turn(tokenizer, "user"), body, *_close_turn(tokenizer, "user"), *_open_turn(tokenizer, "model")]
    return _prompt(tokenizer, "chat", [*close[done:], *turns])


def infill(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    *,
    path: str | None = None,
    files: Iterable[tuple[str, str]] = (),
    max_tokens: int | None = None,
) -> Prompt:
    """Code around a caret, for CodeGemma to write what goes between: prefix, suffix, middle.

    Args:
        prefix: everything before the caret; a space before the caret belongs here.
        suffix: everything after it; the line break that ends the caret's line belongs here.
        path: of the file, relative to its repository; optional, helps.
        files: path and code of other files of the repository that matter, the most relevant last.
        max_tokens: of the whole prompt. What is too much is left out and noted in the prompt: `files` from the first
            on, whole; then the start of the prefix and the end of the suffix, which keep three quarters and one
            quarter of the room, or more where the other needs less.

    Raises:
        TextError: if a text cannot be encoded, or a path is empty or spans lines.
        ModelError: if the vocabulary is not CodeGemma's.
        ContextError: if `max_tokens` does not even hold the format.
    """
    opening = [_control(tokenizer, BOS)]
    context = []
    for other_path, code in files:
        context.append(_encode(tokenizer, [*_path_line(other_path), Span("content", code)]))
        context[-1].append(_control(tokenizer, FILE_SEPARATOR))
    path_line = _encode(tokenizer, _path_line(path) if path is not None else [])
    (before,) = _encode(tokenizer, [Span("content", prefix)])
    (after,) = _encode(tokenizer, [Span("content", suffix)])
    marks = [_control(tokenizer, piece) for piece in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)]

    format_size = _count([*opening, *path_line, *marks])
    everything = format_size + _count([before, after]) + sum(map(_count, context))
    room = (everything if max_tokens is None else max_tokens) - format_size
    if room < 0:
        raise ContextError(
            f"max_tokens={max_tokens} cannot hold an infilling prompt: its format alone is {format_size}"
        )
    after_size = min(len(after.ids), max(room // 4, room - len(before.ids)))
    before_size = min(len(before.ids), room - after_size)
    notes = []
    # a border between pieces inside a character (they are bytes then) moves outwards, to a whole character
    if before_size < len(before.ids):
        cut = _character_border(tokenizer, before.ids, len(before.ids) - before_size, +1)
        notes.append(f"left out: the first {cut} of {len(before.ids)} tokens of the prefix")
        kept = before.ids[cut:]
        before = replace(before, ids=kept, text=before.text[len(before.text) - len(tokenizer.decode(kept)) :])
    if after_size < len(after.ids):
        cut = _character_border(tokenizer, after.ids, after_size, -1)
        notes.append(f"left out: the last {len(after.ids) - cut} of {len(after.ids)} tokens of the suffix")
        kept = after.ids[:cut]
        after = replace(after, ids=kept, text=after.text[: len(tokenizer.decode(kept))])
    room -= before_size + after_size
    first = len(context)
    while first and _count(context[first - 1]) <= room:
        first -= 1
        room -= _count(context[first])
    if first:
        notes.append(
            f"left out: {first} of {len(context)} files: {', '.join(spans[0].text for spans in context[:first])}"
        )

    spans = [*opening, *(span for file in context[first:] for span in file), *path_line]
    spans += [marks[0], before, marks[1], after, marks[2]]
    return Prompt("infill", tuple(s for s in spans if s.text), stop_ids(tokenizer, "infill"), tuple(notes))


def infill_at(
    tokenizer: Tokenizer,
    text: str,
    offset: int,
    *,
    path: str | None = None,
    files: Iterable[tuple[str, str]] = (),
    max_tokens: int | None = None,
) -> Prompt:
    """`infill` at a caret in `text`, which stands before the character number `offset`.

    Raises:
        TextError: if `offset` is not in 0..len(text), and as `infill` does.
    """
    if not isinstance(text, str):
        raise TextError(f"text of a prompt must be str, not {type(text).__name__}")
    if not 0 <= offset <= len(text):
        raise TextError(f"offset={offset} is outside of the text, which has {len(text)} characters")
    return infill(tokenizer, text[:offset], text[offset:], path=path, files=files, max_tokens=max_tokens)


def image(tokenizer: Tokenizer, text: str, *, patches: int, images: int = 1) -> Prompt:
    """A task on images, which come first, for PaliGemma; `tasks.py` has the texts that it was trained on.

    The line break that ends the text is a token of its own and never part of a longer run of them, as in training.

    Args:
        text: the task. Line breaks at its end are dropped.
        patches: placeholders of each image.

    Raises:
        TextError: if `text` cannot be encoded.
        ModelError: if the vocabulary is not PaliGemma's.
    """
    if IMAGE not in tokenizer:
        raise ModelError(f"no piece {IMAGE} in this vocabulary: prompts with images are for PaliGemma")
    if not isinstance(text, str):
        raise TextError(f"text of a prompt must be str, not {type(text).__name__}")
    shown = [Span("control", IMAGE * patches, (tokenizer.id(IMAGE),) * patches)] * images
    task = _encode(tokenizer, [Span("content", text.rstrip("\n"))])
    separator = _encode(tokenizer, [Span("template", "\n")])
    spans = [*shown, _control(tokenizer, BOS), *(span for span in task if span.text), *separator]
    return Prompt("image", tuple(spans), stop_ids(tokenizer, "image"))


def _prompt(tokenizer: Tokenizer, format: Format, spans: Sequence[Span]) -> Prompt:
    return Prompt(format, tuple(s for s in _encode(tokenizer, spans) if s.text), stop_ids(tokenizer, format))


def _control(tokenizer: Tokenizer, piece: str, role: str = "") -> Span:
    if piece not in tokenizer:
        member = "CodeGemma" if piece in INFILL.values() else "a Gemma model tuned for chat"
        raise ModelError(f"this vocabulary of {len(tokenizer)} pieces has no {piece}; the format is that of {member}")
    return Span("control", piece, (tokenizer.id(piece),), role)


def _open_turn(tokenizer: Tokenizer, role: str) -> list[Span]:
    return [_control(tokenizer, START_OF_TURN, role), Span("template", f"{role}\n", role=role)]


def _close_turn(tokenizer: Tokenizer, role: str) -> list[Span]:
    return [_control(tokenizer, END_OF_TURN, role), Span("template", "\n", role=role)]


def _check_message(index: int, message: Mapping[str, str]) -> tuple[str, str]:
    """Role, as the format knows it, and content of a message."""
    if not isinstance(message, Mapping):
        raise TextError(f"messages[{index}] is {type(message).__name__}, not a dict with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise TextError(f"messages[{index}] has the role {role!r}; roles are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise TextError(f"messages[{index}] has content of type {type(content).__name__}, not str")
    return ROLES[role], content


def _path_line(path: str) -> list[Span]:
    if not isinstance(path, str) or not path or "\n" in path:
        raise TextError(f"path {path!r} must be one line, such as 'src/main.py'")
    return [Span("content", path), Span("template", "\n")]


def _encode(tokenizer: Tokenizer, spans: Sequence[Span]) -> list[Span]:
    """The spans with their ids: text between two control tokens is encoded as one and shared out (see `Span`)."""
    done: list[Span] = []
    for is_control, group in groupby(spans, key=lambda span: span.kind == "control"):
        texts = list(group)
        if is_control:
            done += texts
            continue
        for span in texts:
            if not isinstance(span.text, str):
                raise TextError(f"text of a prompt must be str, not {type(span.text).__name__}")
        ids = tokenizer.encode("".join(span.text for span in texts))
        at, reached, border = 0, 0, 0  # the last two in bytes, with a space and a literal `▁` both as one
        for span in texts[:-1]:
            start, border = at, border + len(span.text.replace(SPACE, " ").encode())
            while reached < border:
                reached += len(tokenizer.bytes(ids[at]))
                at += 1
            done.append(replace(span, ids=tuple(ids[start:at])))
        done.append(replace(texts[-1], ids=tuple(ids[at:])))
    return done


def _count(spans: Sequence[Span]) -> int:
    return sum(len(span.ids) for span in spans)


def _character_border(tokenizer: Tokenizer, ids: Sequence[int], cut: int, step: int) -> int:
    """The first place from `cut` on, in steps of +1 or -1, that cuts `ids` between two characters."""
    while 0 < cut < len(ids) and 0x80 <= tokenizer.bytes(ids[cut])[0] < 0xC0:  # inside of a UTF-8 sequence
        cut += step
    return cut
