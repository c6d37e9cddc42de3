"""A prompt as spans of ids: which are control tokens, which is the format's text and which the caller's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Literal

from gemkit.errors import ModelError, TextError
from gemkit.text.tokenizer import Tokenizer
from gemkit.text.vocabulary import INFILL, SPACE

Format = Literal["complete", "chat", "infill", "image"]
Kind = Literal["control", "template", "content"]


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
    learned: bool = False  # training on the conversation counts its loss: it is an answer, or what ends one

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
        return tokenizer.end_ids | (tokenizer.turn_end_ids if format == "chat" else frozenset())
    return tokenizer.end_ids | {i for piece in INFILL.values() for i in control_span(tokenizer, piece).ids}


def make_prompt(tokenizer: Tokenizer, format: Format, spans: Sequence[Span]) -> Prompt:
    return Prompt(format, tuple(s for s in encode_spans(tokenizer, spans) if s.text), stop_ids(tokenizer, format))


def control_span(tokenizer: Tokenizer, piece: str, role: str = "") -> Span:
    if piece not in tokenizer:
        member = "CodeGemma" if piece in INFILL.values() else "a Gemma model tuned for chat"
        raise ModelError(f"this vocabulary of {len(tokenizer)} pieces has no {piece}; the format is that of {member}")
    return Span("control", piece, (tokenizer.id(piece),), role)


def encode_spans(tokenizer: Tokenizer, spans: Sequence[Span]) -> list[Span]:
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
