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
from dataclasses import replace
from itertools import groupby
from typing import Literal

from gemkit.errors import ConfigError, ContextError, ModelError, TextError
from gemkit.text.spans import Prompt, Span, control_span, encode_spans, make_prompt, stop_ids
from gemkit.text.tokenizer import Tokenizer
from gemkit.text.vocabulary import BOS, IMAGE, INFILL

FIM_PREFIX, FIM_MIDDLE, FIM_SUFFIX, FILE_SEPARATOR = INFILL.values()
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"

# the role of a message -> the role that the format knows
ROLES = {"user": "user", "assistant": "model", "model": "model", "system": "system"}


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
        ids = tokenizer.encode(text, control=True)
        ids = tokenizer.with_bos(ids) if tokenizer.settings.add_bos else ids
        for is_control, group in groupby(ids, key=tokenizer.is_control):
            if is_control:
                spans += [Span("control", tokenizer.piece(i), (i,)) for i in group]
            else:
                content = tuple(group)
                spans.append(Span("content", tokenizer.decode(content), content))
        marks = {span.text for span in spans if span.kind == "control"}
        shown = "infill" if FIM_PREFIX in marks else "chat" if START_OF_TURN in marks else "complete"
        return Prompt(shown, tuple(spans), stop_ids(tokenizer, shown))
    opening = [control_span(tokenizer, BOS)] if tokenizer.settings.add_bos else []
    return make_prompt(tokenizer, "complete", [*opening, Span("content", text)])


def chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    *,
    system: Literal["merge", "reject"] = "merge",
    answer: bool = True,
    continue_final: bool = False,
) -> Prompt:
    """A conversation in the turn format of Gemma 1, 2, 3, CodeGemma and RecurrentGemma, or in that of the chat template
    that came with the tokenizer, whose roles and contents are then what it takes (`chat_template.ChatTemplate.chat`).

    Args:
        messages: dicts of `role` ("user", "assistant" or its other name "model", and "system" for the first one) and
            `content` (str). User and model alternate, the user begins. Whitespace around the content of a turn is
            dropped, as the published templates do.
        system: the family has no system turn. "merge" puts a system message and a blank line before the first user
            message, as Gemma 3's template does; "reject" refuses it, as those of Gemma 1 and 2 do.
        answer: open the model's turn at the end, which needs a last message by the user. False encodes a finished
            conversation, for example to train on.
        continue_final: the last message is by the model and not at its end: its turn stays open.

    Raises:
        TextError: if the messages make no such conversation; names the message by its index.
    """
    if (template := tokenizer.settings.chat_template) is not None:
        return template.chat(tokenizer, messages, answer=answer, continue_final=continue_final)
    if system not in ("merge", "reject"):
        raise ConfigError(f"system={system!r} must be 'merge' or 'reject'")
    if not messages:
        raise TextError("messages is empty; a conversation begins with a message by the user")
    checked = [_check_message(i, message) for i, message in enumerate(messages)]
    spans = [control_span(tokenizer, BOS)]
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
        body = [*preamble, Span("content", content.strip(), role=role, learned=role == "model")]
        preamble = []
        spans += [*_open_turn(tokenizer, role), *body, *_close_turn(tokenizer, role)]
    if continue_final:
        if checked[-1][0] != "model":
            raise TextError(f"messages[{len(checked) - 1}] is by the user, and only the model's turn can go on")
        del spans[-2:]
    elif answer:
        if checked[-1][0] != "user":
            raise TextError(
                f"messages[{len(checked) - 1}] is by the model, so there is nothing to answer; "
                "end with a message by the user, or encode a finished conversation with answer=False"
            )
        spans += _open_turn(tokenizer, "model")
    return make_prompt(tokenizer, "chat", spans)


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


def templates_of(tokenizer: Tokenizer) -> dict[str, str]:
    """The chat template of a tokenizer's turns, as "default", and the one for tools where it has its own."""
    template = tokenizer.settings.chat_template
    if template is None:
        return {"default": CHAT_TEMPLATE}
    tools = {} if template.tool_use is None else {"tool_use": template.tool_use}
    return {"default": template.source, **tools}


def next_turn(tokenizer: Tokenizer, history: Sequence[int], content: str) -> Prompt:
    """Only the ids that carry a conversation in the family's turns on: the user's next turn, and the opening of the
    model's answer.

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
    close = encode_spans(tokenizer, _close_turn(tokenizer, "model"))
    end, line_break = (span.ids[0] for span in close)
    done = 2 if tail == [end, line_break] else 1 if tail[-1] == end else 0
    body = Span("content", content.strip(), role="user")
    turns = [*_open_turn(tokenizer, "user"), body, *_close_turn(tokenizer, "user"), *_open_turn(tokenizer, "model")]
    return make_prompt(tokenizer, "chat", [*close[done:], *turns])


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
    opening = [control_span(tokenizer, BOS)]
    context = []
    for other_path, code in files:
        context.append(encode_spans(tokenizer, [*_path_line(other_path), Span("content", code)]))
        context[-1].append(control_span(tokenizer, FILE_SEPARATOR))
    path_line = encode_spans(tokenizer, _path_line(path) if path is not None else [])
    (before,) = encode_spans(tokenizer, [Span("content", prefix)])
    (after,) = encode_spans(tokenizer, [Span("content", suffix)])
    marks = [control_span(tokenizer, piece) for piece in (FIM_PREFIX, FIM_SUFFIX, FIM_MIDDLE)]

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
        text: the task. Line breaks at its end are dropped, and so are the placeholders that Transformers' processor
            asks for: `<image>` once for each image at its head, and a `<bos>` after them.
        patches: placeholders of each image.

    Raises:
        TextError: if `text` cannot be encoded, or spells `<image>` for other images than these or at another place.
        ModelError: if the vocabulary is not PaliGemma's.
    """
    if IMAGE not in tokenizer:
        raise ModelError(f"no piece {IMAGE} in this vocabulary: prompts with images are for PaliGemma")
    if not isinstance(text, str):
        raise TextError(f"text of a prompt must be str, not {type(text).__name__}")
    shown = [Span("control", IMAGE * patches, (tokenizer.id(IMAGE),) * patches)] * images
    task = encode_spans(tokenizer, [Span("content", _without_placeholders(text.rstrip("\n"), images))])
    separator = encode_spans(tokenizer, [Span("template", "\n")])
    spans = [*shown, control_span(tokenizer, BOS), *(span for span in task if span.text), *separator]
    return Prompt("image", tuple(spans), stop_ids(tokenizer, "image"))


def _without_placeholders(text: str, images: int) -> str:
    """A task without the `<image>` of each image, and the `<bos>`, that it may begin with."""
    number = text.count(IMAGE)
    if number == 0:
        return text
    head = IMAGE * number
    if number != images or not text.startswith(head):
        raise TextError(
            f"the prompt spells {IMAGE} {number} times with {images} images: leave it out, or put it once for each at "
            "the head of the prompt, as Transformers' processor takes it"
        )
    return text.removeprefix(head).removeprefix(BOS)


def _open_turn(tokenizer: Tokenizer, role: str) -> list[Span]:
    return [control_span(tokenizer, START_OF_TURN, role), Span("template", f"{role}\n", role=role)]


def _close_turn(tokenizer: Tokenizer, role: str) -> list[Span]:
    end = replace(control_span(tokenizer, END_OF_TURN, role), learned=role == "model")
    return [end, Span("template", "\n", role=role)]


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


def _count(spans: Sequence[Span]) -> int:
    return sum(len(span.ids) for span in spans)


def _character_border(tokenizer: Tokenizer, ids: Sequence[int], cut: int, step: int) -> int:
    """The first place from `cut` on, in steps of +1 or -1, that cuts `ids` between two characters."""
    while 0 < cut < len(ids) and 0x80 <= tokenizer.bytes(ids[cut])[0] < 0xC0:  # inside of a UTF-8 sequence
        cut += step
    return cut
