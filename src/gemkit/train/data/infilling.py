"""Files of code to sequences that teach infilling: a middle is cut out and comes last, after what stands around it.

    PSM    [path \\n] <|fim_prefix|> before <|fim_suffix|> after <|fim_middle|> MIDDLE <|file_separator|>
    SPM    [path \\n] <|fim_suffix|> after <|fim_prefix|> before <|fim_middle|> MIDDLE <|file_separator|>
    plain  [path \\n] text <|file_separator|>

A row is <bos> and one or more such files, those that others build on first. Up to <|fim_middle|>, PSM is to the id what
`prompts.infill` asks a model with.

What is published (CodeGemma report, arXiv:2406.11409, and model card): the control tokens; PSM and SPM half and half; a
rate of 80 % of documents, 90 % for the 2B model of version 1.1; rows of several files by dependency and by unit test;
that the middle is followed by <|file_separator|>. What is not, and decided here: both cuts are uniform over the
characters of a document, as in the paper that began it (arXiv:2207.14255); SPM as it is written above, whose order of
tokens no source shows; in a row of several files each is cut or left whole by itself; every token is learned, as in
that paper, unless only middles are asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gemkit.errors import ConfigError, ContextError
from gemkit.text import Tokenizer, prompts
from gemkit.train.batching import Example

File = tuple[str | None, str]  # path and text; without a path, its line is left out

_LINE = re.compile(r"[^\n]*\S[^\n]*")  # one that is not empty
_BODY = re.compile(r"[^\s](?:[^\n]*[^\s])?")  # what such a line is but for the space around it
_NAME = re.compile(r"\b[^\W\d]\w*")
_ALL = re.compile(r"(?s).*")
_WORD = re.compile(r"\w+|\s+|[^\w\s]")
_SLACK = 8  # tokens that a text may have more of when it is cut in three


@dataclass(frozen=True)
class Infilling:
    """How files are cut.

    Raises:
        ConfigError: if a rate is no share, or a choice none of those there are.
    """

    rate: float = 0.8  # of files that are cut; the others are read from left to right
    spm: float = 0.5  # of those, the share in the order suffix, prefix, middle
    within_line: float = 0.0  # of those, the share whose middle is part of one line; not published, for small models
    words: float = 0.0  # of the cuts within a line, the share at borders of words, in any line alike; not published
    lines: float = 0.0  # of files that are cut, the share whose middle is a line but for its indentation; not published
    names: float = 0.0  # of those, the share whose middle is a name that stands elsewhere in the file; not published
    learn: Literal["all", "middle"] = "all"  # "middle": of a file that is cut only that, with the token that ends it
    weight: float = 1.0  # what the loss of a middle's tokens counts, beside 1 of all others; not published
    end: Literal["separator", "eos"] = "separator"  # what ends a row; within it files end with <|file_separator|>

    def __post_init__(self):
        for name in ("rate", "spm", "within_line", "words", "lines", "names"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be a share from 0 to 1")
        if self.lines + self.names > 1:
            raise ConfigError(
                f"lines={self.lines} and names={self.names} are shares of the same files: together 1 at most"
            )
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"weight={self.weight} must be above 0, and finite")
        if self.learn not in ("all", "middle"):
            raise ConfigError(f"learn={self.learn!r} must be 'all' or 'middle'")
        if self.end not in ("separator", "eos"):
            raise ConfigError(f"end={self.end!r} must be 'separator' or 'eos'")


def encode_infill(
    tokenizer: Tokenizer,
    files: Sequence[File],
    rng: np.random.Generator,
    *,
    how: Infilling = Infilling(),  # it is frozen
    context: int | None = None,
) -> list[Example]:
    """Rows of files, in the order given.

    Args:
        context: tokens of a row at most. A file that needs more is cut in parts, at line ends where there are some,
            each treated as a file of its own; a path that would take more than a quarter is left out. None: one row.

    Raises:
        ModelError: if the vocabulary is not CodeGemma's.
        ContextError: if `context` does not even hold the format.
        TextError: if a text cannot be encoded.
    """
    prompts.stop_ids(tokenizer, "infill")  # raises for other vocabularies
    rows: list[list[_Part]] = [[]]
    length = 1
    for path, text in files:
        for part in _parts(tokenizer, path, text, rng, how, context):
            if rows[-1] and context is not None and length + len(part.ids) > context:
                rows.append([])
                length = 1
            rows[-1].append(part)
            length += len(part.ids)
    return [_row(tokenizer, row, how) for row in rows if row]


@dataclass(frozen=True)
class _Part:
    """A file in a row, or a part of one."""

    ids: list[int]
    middle: int  # so many tokens at its end are one that was cut out, 0 of a file that is whole


def _row(tokenizer: Tokenizer, parts: Sequence[_Part], how: Infilling) -> Example:
    ids, weights = [tokenizer.bos], [0.0]
    for part in parts:
        ids += part.ids
        around = 0.0 if part.middle and how.learn == "middle" else 1.0
        weights += [around] * (len(part.ids) - part.middle) + [how.weight] * part.middle
    if how.end == "eos":
        ids[-1] = tokenizer.eos
    return Example(np.array(ids, np.int64), np.array(weights, np.float32))


def _parts(
    tokenizer: Tokenizer, path: str | None, text: str, rng: np.random.Generator, how: Infilling, context: int | None
) -> Iterator[_Part]:
    line = [] if path is None else tokenizer.encode(f"{path}\n")
    if context is None:
        yield _part(tokenizer, line, text, rng, how, None)
        return
    if len(line) > context // 4:
        line = []
    room = context - 1 - len(line) - 3 - 1 - _SLACK  # <bos>, three marks, the end
    if room < 1:
        raise ContextError(f"context={context} has no room to cut code in three: give at least 64")
    for piece in _pieces(tokenizer, text, room):
        yield _part(tokenizer, line, piece, rng, how, context - 1)


def _part(
    tokenizer: Tokenizer, line: list[int], text: str, rng: np.random.Generator, how: Infilling, room: int | None
) -> _Part:
    separator = tokenizer.id(prompts.FILE_SEPARATOR)
    if rng.random() < how.rate:
        start, end = _middle(text, rng, how)
        before, after = ([tokenizer.id(mark), *tokenizer.encode(part)] for mark, part in (
            (prompts.FIM_PREFIX, text[:start]), (prompts.FIM_SUFFIX, text[end:])
        ))  # fmt: skip
        around = after + before if rng.random() < how.spm else before + after
        middle = [*tokenizer.encode(text[start:end]), separator]
        ids = [*line, *around, tokenizer.id(prompts.FIM_MIDDLE), *middle]
        if room is None or len(ids) <= room:  # cut in three it may have a few tokens more
            return _Part(ids, len(middle))
    ids = [*line, *tokenizer.encode(text), separator]
    return _Part(ids, 0)


def _middle(text: str, rng: np.random.Generator, how: Infilling) -> tuple[int, int]:
    """Where the middle begins and ends, in characters."""
    if how.lines or how.names:
        chosen = rng.random()
        if chosen < how.lines and (bodies := list(_BODY.finditer(text))):
            return bodies[int(rng.integers(len(bodies)))].span()
        if how.lines <= chosen < how.lines + how.names and (named := _name(text, rng)):
            return named
    first, last = 0, len(text)
    if rng.random() < how.within_line:
        if how.words and rng.random() < how.words:
            lines = list(_LINE.finditer(text)) or [_ALL.match(text)]
            line = lines[int(rng.integers(len(lines)))]
            assert line is not None
            borders = [line.start(), *(word.end() for word in _WORD.finditer(text, line.start(), line.end()))]
            # never an empty middle: at so few borders they would be a quarter of all, and the end all that is learned
            start, end = np.sort(rng.choice(borders, size=2, replace=len(borders) < 2)).tolist()
            return start, end
        at = int(rng.integers(0, len(text) + 1))
        first = text.rfind("\n", 0, at) + 1
        last = text.find("\n", at)
        last = len(text) if last < 0 else last
    start, end = np.sort(rng.integers(first, last + 1, size=2)).tolist()
    return start, end


def _name(text: str, rng: np.random.Generator) -> tuple[int, int] | None:
    """Where one of the names that stand more than once does: every such name alike, and the first of its places, where
    it is imported or defined, as often as all others together. None: there is no such name."""
    places: dict[str, list[tuple[int, int]]] = {}
    for found in _NAME.finditer(text):
        places.setdefault(found[0], []).append(found.span())
    repeated = [spans for spans in places.values() if len(spans) > 1]
    if not repeated:
        return None
    spans = repeated[int(rng.integers(len(repeated)))]
    return spans[0 if rng.random() < 0.5 else int(rng.integers(1, len(spans)))]


def _pieces(tokenizer: Tokenizer, text: str, room: int) -> Iterator[str]:
    """The text in pieces of at most `room` tokens, about as long as one another; cut at line ends, else between
    characters."""
    count = math.ceil(len(tokenizer.encode(text)) / room)
    if count <= 1 or len(text) < 2:  # a character of more bytes than there is room for stays whole
        yield text
        return
    wanted = max(1, len(text) * (count // 2) // count)
    before, after = text.rfind("\n", 0, wanted) + 1, text.find("\n", wanted) + 1
    near = [cut for cut in (before, after) if 0 < cut < len(text)]
    cut = min(near, key=lambda cut: abs(cut - wanted)) if near else wanted
    if abs(cut - wanted) > wanted // 2:
        cut = wanted
    yield from _pieces(tokenizer, text[:cut], room)
    yield from _pieces(tokenizer, text[cut:], room)
