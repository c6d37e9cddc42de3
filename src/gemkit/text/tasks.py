"""The task prompts that PaliGemma was trained on, in their published words.

    caption en                   a short caption, as in COCO
    cap en, describe en          a longer one (the mix models)
    ocr                          the text in the image, by rows from the top left
    answer en where is the cat?  an answer
    question en under a table    a question that has this answer
    detect cat ; sleeping dog    boxes, as `places.parse` reads them
    segment cat                  the same with masks

Source: PaliGemma report (arXiv:2407.07726), pre-training mixture; google-research/big_vision, pp/proj/paligemma.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from gemkit.errors import ConfigError, TextError

OCR = "ocr"
CaptionStyle = Literal["caption", "cap", "describe"]
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?")


def caption(lang: str = "en", style: CaptionStyle = "caption") -> str:
    """A caption in a language, by its code. Raises ConfigError for what is no code, or no style."""
    if style not in get_args(CaptionStyle):
        raise ConfigError(f"style={style!r} is not one of {', '.join(get_args(CaptionStyle))}")
    return f"{style} {_language(lang)}"


def answer(question: str, lang: str = "en") -> str:
    """The answer to a question. Raises ConfigError for what is no language code, TextError for an empty question."""
    return f"answer {_language(lang)} {_words(question, 'question')}"


def question(answer: str, lang: str = "en") -> str:
    """A question that has this answer. Raises as `answer` does."""
    return f"question {_language(lang)} {_words(answer, 'answer')}"


def detect(things: str | Sequence[str]) -> str:
    """Boxes of things, given as a list or as they are written: "cat ; dog".

    Raises:
        TextError: if there are none, or they are no texts.
    """
    return f"detect {_things(things)}"


def segment(things: str | Sequence[str]) -> str:
    """Boxes and masks of things. Raises as `detect` does."""
    return f"segment {_things(things)}"


def _language(lang: str) -> str:
    if not isinstance(lang, str) or not _LANGUAGE.fullmatch(lang):
        raise ConfigError(f"lang={lang!r} is no language code, such as en, de or zh")
    return lang


def _words(text: str, what: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise TextError(f"the {what} is {text!r}; it must be a text that says something")
    return text.strip()


def _things(things: str | Sequence[str]) -> str:
    given = [things] if isinstance(things, str) else things
    if not isinstance(given, list | tuple) or not all(isinstance(thing, str) for thing in given):
        raise TextError(f"things to look for are texts, one or a list of them, not {things!r}")
    names = [name for thing in given for part in thing.split(";") if (name := part.strip())]
    if not names:
        raise TextError(f"nothing to look for in {things!r}: name a thing, or several as 'cat ; dog'")
    return " ; ".join(names)
