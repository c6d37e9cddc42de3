"""Chat templates of other turns than the family's: Jinja, as Transformers' `apply_chat_template` renders them.

    messages ─ marked ─ template (`sandbox.py`) ─ text with marks ─ spans ─ ids

A template makes one text of its own control tokens and of what people wrote, and a tokenizer cannot tell them apart.
So whatever in a message spells a control token, or could become part of one at its border, is broken by a *mark*: a
noncharacter that occurs nowhere in the messages or the template, and so cannot be forged. Control tokens are found in
the text with the marks still in it; then the marks go. A message without such spellings goes in unchanged, and the ids
are those of Transformers to the last.

A template that looks for control tokens inside of a message (`'<think>' in message.content`) does not find a spelling
that was broken. One that cuts messages apart and joins the pieces can make a control token of them, and so can one that
builds control tokens of what it is given (`'<|' + message.role + '|>'`): roles are the caller's to choose.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from gemkit.errors import TextError
from gemkit.text.control import Breaker
from gemkit.text.sandbox import TemplateProcess
from gemkit.text.spans import Prompt, Span, encode_spans, stop_ids
from gemkit.text.tokenizer import Tokenizer

Message = Mapping[str, Any]

# The published templates of the family's turns, by the SHA-256 of their text without the line breaks around it; our
# own code (`prompts.chat`) renders these, and starts no process.
_FAMILY = {
    "1e51d5c0fec2f83da1953fb850b7b532b7da02d0dc35f9201e671e0b9a35a123",  # Gemma 1, 1.1, 2, RecurrentGemma
    "8d9e3a3c114fb2053ec500184677af4f7e5f8ec2582443cd535834e68b3ade29",  # Gemma 3
}
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same thing


def fingerprint(source: str) -> str:
    """The SHA-256 of a template's text, whatever ends its lines and whatever line breaks stand around it."""
    return hashlib.sha256(source.replace("\r\n", "\n").strip("\n").encode(errors="surrogatepass")).hexdigest()


def is_family(source: str) -> bool:
    """Whether a template is a published one of the family's turns."""
    from gemkit.text.prompts import CHAT_TEMPLATE

    digest = fingerprint(source)
    return digest in _FAMILY or digest == fingerprint(CHAT_TEMPLATE)


@lru_cache(maxsize=8)
def _process(source: str, name: str) -> TemplateProcess:
    return TemplateProcess(source, name)


@dataclass(frozen=True)
class _Marks:
    """Noncharacters that occur nowhere in what is rendered."""

    broken: str  # where a control token must not be found
    start: str  # of a content: this, its number, `stop`
    stop: str
    end: str  # of a content
    said: str  # of what the assistant writes, by the template's own word
    done: str
    cut: str  # the end of the message that is to be continued

    @classmethod
    def beside(cls, *values: Any) -> _Marks:
        taken = {char for text in _strings(values) for char in text if "\ufdd0" <= char <= "\ufdef"}
        free = [char for char in _NONCHARACTERS if char not in taken]
        if len(free) < 7:
            raise TextError("the messages hold nearly all noncharacters from U+FDD0 to U+FDEF: take some out")
        return cls(*free[:7])

    def drop(self, text: str) -> str:
        """`text` without marks."""
        text = re.sub(f"{self.start}[0-9]*{self.stop}", "", text)
        return re.sub(f"[{self.broken}{self.start}{self.stop}{self.end}{self.said}{self.done}]", "", text)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template that came with a model and is not the family's.

    Args:
        source: Jinja.
        name: where it came from, for messages.
        tool_use: the template that takes tools, where a file names one of its own.
    """

    source: str
    name: str
    tool_use: str | None = None

    def chat(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        answer: bool = True,
        continue_final: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Prompt:
        """A conversation in the turns of the template, with the ids that `apply_chat_template` gives.

        Args:
            messages: dicts of `role` and `content`, and whatever else the template reads; a content is text, or a list
                of parts `{"type": "text", "text": ...}`.
            answer: open the assistant's turn at the end (`add_generation_prompt`).
            continue_final: end within the last message, for the model to go on with it.
            tools: JSON schemas of functions, for templates that show them.

        Raises:
            TextError: what the template refuses, in its words; one that runs too long; messages of another form.
        """
        rendering = _Rendering(self, tokenizer, messages, tools)
        if continue_final:
            return rendering.prompt(rendering.cut())
        (text,) = rendering.texts([(len(messages), answer)])
        return rendering.prompt(text)

    def training(
        self, tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> Prompt:
        """A finished conversation whose spans say what is learned of it: the assistant's answers and what ends them.

        That is what the template itself marks with `{% generation %}`; else what an answer adds to the conversation
        that asks for it, without the white space after its last control token; else, in a template that writes
        answers otherwise than it asks for them, the content of an answer and the control token after it.

        Raises:
            TextError: as `chat`; or if nothing of this tells where an answer is.
        """
        rendering = _Rendering(self, tokenizer, messages, tools)
        return rendering.prompt(*rendering.learned())

    def continued(self, tokenizer: Tokenizer, history: Sequence[int], messages: Sequence[Message]) -> Prompt | None:
        """The ids that carry a conversation on, after `history`; None if the template does not only add to it.

        Args:
            history: the ids of all messages before the last two, and of the model's answer as it was drawn.
            messages: all of them.
        """
        rendering = _Rendering(self, tokenizer, messages, None)
        (text,) = rendering.texts([(len(messages), True)])
        before = tokenizer.decode(history, control=True)
        at = 0
        for char in before:  # marks are no text
            while at < len(text) and text[at] == rendering.marks.broken:
                at += 1
            if at == len(text) or text[at] != char:
                return None
            at += 1
        return rendering.prompt(text, start=at)

    def turn_ends(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The control token that the template puts after an answer, if it puts one there and says so of itself."""
        probe = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
        try:
            rendering = _Rendering(self, tokenizer, probe, None)
            spans = rendering.spans(*rendering.learned())
        except TextError:
            return frozenset()
        after = [span for span in spans if span.learned and span.kind == "control"]
        return frozenset(after[-1].ids) if after else frozenset()


class _Rendering:
    """Messages on their way through a template."""

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
    ):
        self.template, self.tokenizer = template, tokenizer
        self.messages = [_checked(i, message) for i, message in enumerate(messages)]
        if not self.messages:
            raise TextError("messages is empty; a conversation begins with a message")
        self.source = template.tool_use if tools and template.tool_use is not None else template.source
        self.marks = _Marks.beside(self.source, self.messages, tools)
        self.breaker = safe = Breaker(tokenizer.control_table, "" if tokenizer.spelled_control else self.marks.broken)
        self.safe = [_map_content(safe.values(m), lambda _, text: safe.content(text), 0) for m in self.messages]
        self.tools = None if tools is None else [safe.values(tool) for tool in tools]

    def texts(
        self, asked: Sequence[tuple[int, bool]], messages: list[dict[str, Any]] | None = None, *, said: bool = False
    ) -> list[str]:
        """The texts of so many messages, each with the assistant's turn opened or not."""
        values = self.safe if messages is None else messages
        variables = {**self.tokenizer.settings.special, "messages": values, "tools": self.tools, "documents": None}
        marks = (self.marks.said, self.marks.done) if said else ("", "")
        return _process(self.source, self.template.name).render(variables, asked, marks)

    def cut(self) -> str:
        """The text up to the end of the last message, by the rule of Transformers for a template that trims."""
        last, tag = self.safe[-1], self.marks.cut + " "
        if not isinstance(last.get("content"), str):
            raise TextError("the last message has no text to continue")
        tagged = [*self.safe[:-1], {**last, "content": last["content"] + tag}]
        (text,) = self.texts([(len(tagged), False)], tagged)
        at = text.rfind(self.marks.cut)
        if at < 0:
            raise TextError(f"{self.template.name} leaves out the last message, so that it cannot be continued")
        return text[:at] if text.startswith(tag, at) else text[:at].rstrip()

    def learned(self) -> tuple[str, list[tuple[int, int]]]:
        """The text of the finished conversation, and the (start, end) of the answers in it."""
        said = [i for i, message in enumerate(self.messages) if message["role"] in ("assistant", "model")]
        whole = len(self.messages)
        if _GENERATION.search(self.source):
            (marked,) = self.texts([(whole, False)], said=True)
            return _between(marked, self.marks.said, self.marks.done)
        asked = [(whole, False), *((i, True) for i in said), *((i + 1, False) for i in said)]
        try:
            text, *around = self.texts(asked)
        except TextError:  # a template may refuse a conversation that ends there
            (text,), around = self.texts([(whole, False)]), []
        ranges: list[tuple[int, int]] = []
        if around:
            for before, after in zip(around[: len(said)], around[len(said) :], strict=True):
                if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
                    break
                ranges.append((len(before), len(before) + self._until_end(text[len(before) : len(after)])))
        if len(ranges) == len(said):
            return text, ranges
        return text, self._answers_by_content(text, said)

    def _until_end(self, answer: str) -> int:
        """The length of an answer without the white space after its last control token."""
        short = answer.rstrip()
        ends = [end for _, end in self.breaker.controls(short)]
        return len(short) if ends and ends[-1] == len(short) else len(answer)

    def _answers_by_content(self, text: str, said: list[int]) -> list[tuple[int, int]]:
        contents = self.contents(text)
        found = {number: (start, end) for start, end, number in contents}
        if not set(said) <= set(found):
            raise TextError(
                f"{self.template.name} does not say where the answers of a conversation are: mark them with "
                "{% generation %} and {% endgeneration %}, as Transformers asks for"
            )
        controls = dict(self.breaker.controls(text))
        return [(start, controls.get(end, end)) for start, end in (found[i] for i in said)]

    def contents(self, text: str) -> list[tuple[int, int, int]]:
        """(start, end, number of the message) of each content in a text; none if the template computes with them."""
        m = self.marks

        def marked(number: int, content: str) -> str:
            body = content.strip()
            if not body:
                return content
            at = content.index(body)
            return f"{content[:at]}{m.start}{number}{m.stop}{body}{m.end}{content[at + len(body) :]}"

        values = [_map_content(message, marked, i) for i, message in enumerate(self.safe)]
        found: list[tuple[int, int, int]] = []
        for n, answer in ((len(values), True), (len(values), False)):
            try:
                (other,) = self.texts([(n, answer)], values)
            except TextError:
                continue
            plain, found = _numbers(other, m)
            if plain == text or plain.startswith(text):
                return [part for part in found if part[1] <= len(text)]
        return []

    def prompt(self, text: str, learned: Sequence[tuple[int, int]] = (), start: int = 0) -> Prompt:
        """The text from `start` on as a prompt."""
        return Prompt("chat", tuple(self.spans(text, learned, start)), stop_ids(self.tokenizer, "chat"))

    def spans(self, text: str, learned: Sequence[tuple[int, int]] = (), start: int = 0) -> list[Span]:
        """The text as spans: control tokens where they stand unbroken, contents where they can be told."""
        controls, contents = self.breaker.controls(text), self.contents(text)
        ends = dict(controls)
        borders = sorted({start, len(text), *_edges(controls), *_edges(contents), *_edges(learned)})
        spans: list[Span] = []
        inside = start
        for first, last in pairwise(borders):
            if first < inside:  # told already, or within a control token
                continue
            number = next((number for a, b, number in contents if a <= first < b), None)
            said = any(a <= first < b for a, b in learned)
            role = "assistant" if said else "" if number is None else str(self.messages[number]["role"])
            about: dict[str, Any] = {"role": "model" if role == "assistant" else role, "learned": said}
            if first in ends:
                inside = ends[first]
                piece = text[first:inside]
                spans.append(Span("control", piece, (self.tokenizer.id(piece),), **about))
            elif plain := self.marks.drop(text[first:last]):
                spans.append(Span("template" if number is None else "content", plain, **about))
        return encode_spans(self.tokenizer, spans)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner)


def _checked(index: int, message: Any) -> dict[str, Any]:
    """A message with what Transformers makes of its keys: no None, and reasoning under all of its names. Its `weight`
    is training's own."""
    if not isinstance(message, Mapping):
        raise TextError(f"messages[{index}] is {type(message).__name__}, not a dict with role and content")
    made = {str(key): value for key, value in message.items() if value is not None and key != "weight"}
    if not isinstance(made.get("role"), str):
        raise TextError(f"messages[{index}] has the role {made.get('role')!r}, which is no text")
    content = made.get("content")
    if isinstance(content, list | tuple):
        for part in content:
            if not (isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                raise TextError(f"messages[{index}] has a part that is no text: {str(part)[:60]}")
    elif content is not None and not isinstance(content, str):
        raise TextError(f"messages[{index}] has content of type {type(content).__name__}, not str")
    reasoning = next((made[key] for key in _REASONING if key in made), None)
    if reasoning is not None:
        made = {"thinking": reasoning, **made, "reasoning_content": reasoning}
    if made["role"] == "model":  # the family's name for it, which other templates do not know
        made["role"] = "assistant"
    return made


def _map_content(message: dict[str, Any], change: Any, number: int) -> dict[str, Any]:
    """A message with its content, or the text of each part of it, changed."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": change(number, content)}
    if isinstance(content, list | tuple):
        return {**message, "content": [{**part, "text": change(number, part["text"])} for part in content]}
    return message


def _between(marked: str, start: str, end: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without two marks, and the (start, end) between them."""
    parts, ranges, at, opened = [], [], 0, 0
    for part in re.split(f"([{start}{end}])", marked):
        if part == start:
            opened = at
        elif part == end:
            ranges.append((opened, at))
        else:
            parts.append(part)
            at += len(part)
    return "".join(parts), ranges


def _numbers(marked: str, marks: _Marks) -> tuple[str, list[tuple[int, int, int]]]:
    """A text without the marks of contents, and (start, end, number) of each that is whole."""
    parts, found, at = [], [], 0
    opened: tuple[int, int] | None = None
    for part in re.split(f"({marks.start}[0-9]+{marks.stop}|{marks.end})", marked):
        if part.startswith(marks.start):
            opened = (at, int(part[1:-1]))
        elif part == marks.end:
            if opened is not None:
                found.append((opened[0], at, opened[1]))
            opened = None
        else:
            parts.append(part)
            at += len(part)
    return "".join(parts), found


def _edges(ranges: Sequence[tuple[int, ...]]) -> Iterator[int]:
    for start, end, *_ in ranges:
        yield from (start, end)
