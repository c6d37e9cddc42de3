"""Requests: one sequence to be continued, and how to make one of a prompt and options."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import numpy as np

from gemkit.errors import ConfigError, ContextError
from gemkit.family.schema import DecoderConfig
from gemkit.generate.sampler import GREEDY, Sampling, check_ids

if TYPE_CHECKING:
    from gemkit.text import Prompt

MAX_TOKENS = 256  # where the options say no number


class TextStream(Protocol):
    """Turns ids to text as they come; holds back bytes that are not yet a whole character (`text.StreamDecoder`)."""

    def push(self, token: int, /) -> str: ...

    def finish(self) -> str: ...


class Options(TypedDict, total=False):
    """How an answer is made; every field may be left out.

    Sampling fields that are left out are greedy for `generate` and `infill`; for `chat` they are those of the model's
    generation_config.json, or those that the instruction-tuned models are published with (temperature 1, top-k 64,
    top-p 0.95). Its repetition penalty, banned tokens and stop strings count everywhere (`Defaults`).
    """

    max_tokens: int | None  # to generate at most (256); None: until a stop or the end of the context
    temperature: float  # 0 is greedy
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: Sequence[str]  # texts that end the answer, and are not part of it
    logprobs: int | None  # log-probabilities of the tokens, and of this many alternatives to each
    beyond_context: bool  # go on past the context the model was trained with; quality is undefined there
    speculate: int | bool  # draft up to this many tokens from earlier text: the same answer, sooner if it repeats


_FILTERS = ("top_k", "top_p", "min_p")
_SAMPLING = ("temperature", *_FILTERS, "repetition_penalty", "logit_bias", "seed")


@dataclass(frozen=True)
class Request:
    """One sequence to be continued.

    Args:
        ids: the whole sequence so far. If `slot` holds its beginning, only the rest is computed.
        sampling: how tokens are chosen.
        max_tokens: tokens to generate at most, from 1; None goes on to a stop or to the end of the context.
        stop_ids: tokens that end the answer; they are the last of the ids and never in the text.
        stop_strings: texts that end the answer, in the sense of `StopStrings`.
        logprobs: None for none; otherwise each token comes with its log-probability and this many alternatives.
        slot: the sequence's slot in the state that is passed to `generate`; None if none is passed.
        spans: (start, end) of `ids`, ascending and disjoint, whose tokens see one another, as a member with images was
            trained; each is computed in one call. A slot that holds a beginning holds none of them in part.
        images: preprocessed, (3, S, S) float32 each. Their placeholders are within the spans: those of all images in
            one, or one image in each.
    """

    ids: Sequence[int]
    sampling: Sampling = GREEDY
    max_tokens: int | None = None
    stop_ids: Collection[int] = ()
    stop_strings: Sequence[str] = ()
    logprobs: int | None = None
    slot: int | None = None
    spans: Sequence[tuple[int, int]] = ()
    images: Sequence[np.ndarray] = ()

    @classmethod
    def from_prompt(
        cls,
        prompt: Prompt,
        options: Options,
        defaults: Sampling = GREEDY,
        *,
        banned: Collection[int] = (),
        history: Sequence[int] = (),
        slot: int | None = None,
        images: Sequence[np.ndarray] = (),
        stop: Sequence[str] = (),
    ) -> Request:
        """A prompt and options as a request.

        Args:
            defaults: sampling where the options say nothing. With temperature 0 in the options it is greedy.
            banned: ids that are never drawn, unless `logit_bias` says otherwise: `unused_ids`.
            history: ids that the prompt continues.
            images: preprocessed, for the placeholders of the prompt.
            stop: texts that end the answer where the options say nothing.

        Raises:
            ConfigError: an option that does not exist, is out of its range, or cannot take effect.
        """
        known: dict[str, Any] = {field: value for field, value in options.items() if field in _SAMPLING}
        if unknown := sorted(set(options) - set(Options.__annotations__)):
            raise ConfigError(f"unknown option {unknown[0]!r}; options are {', '.join(Options.__annotations__)}")
        if known.get("temperature") == 0:  # greedy, whatever was published
            defaults = replace(defaults, temperature=0.0, top_k=None, top_p=1.0, min_p=0.0)
        sampling = replace(defaults, **known)
        if sampling.temperature == 0 and (idle := [f"{f}={known[f]}" for f in _FILTERS if f in known]):
            raise ConfigError(
                f"{', '.join(idle)} cannot take effect at temperature 0, which always takes the best token"
            )
        if banned:
            sampling = replace(sampling, logit_bias={**dict.fromkeys(banned, -math.inf), **sampling.logit_bias})
        return cls(
            ids=[*history, *prompt.ids],
            sampling=sampling,
            max_tokens=options.get("max_tokens", MAX_TOKENS),
            stop_ids=prompt.stop_ids,
            stop_strings=options.get("stop", stop),
            logprobs=options.get("logprobs"),
            slot=slot,
            spans=[(len(history), len(history) + prompt.prefix)] if prompt.prefix else (),
            images=images,
        )

    def check(self, decoder: DecoderConfig, *, has_text: bool = True, beyond_context: bool = False) -> None:
        """Refuse what cannot be continued.

        Args:
            has_text: there is a `TextStream`, in whose text stop strings are found.
            beyond_context: the context that the model was trained on is no limit.

        Raises:
            ConfigError: a field out of its range.
            ContextError: a prompt longer than the context.
        """
        vocab, most = decoder.vocab_size, decoder.max_context
        if not len(self.ids):
            raise ConfigError("ids is empty: a prompt has at least one token, usually <bos>")
        check_ids("ids", self.ids, vocab)
        check_ids("stop_ids", self.stop_ids, vocab)
        check_ids("logit_bias", self.sampling.logit_bias, vocab)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens} must be at least 1; to rate a text as it is, use score")
        if self.logprobs is not None and not 0 <= self.logprobs <= vocab:
            raise ConfigError(f"logprobs={self.logprobs} must be between 0 and the {vocab} tokens of the vocabulary")
        last = 0
        for start, end in self.spans:
            if not last <= start < end <= len(self.ids):
                raise ConfigError(
                    f"spans={[tuple(span) for span in self.spans]} must be (start, end) with start < end, ascending, "
                    f"disjoint and within the {len(self.ids)} ids of the prompt"
                )
            last = end
        if len(self.images) and len(self.spans) not in (1, len(self.images)):
            raise ConfigError(f"{len(self.images)} images and {len(self.spans)} spans: one holds all, or each one")
        if self.stop_strings and not has_text:
            raise ConfigError("stop_strings need a text_stream to be found in")
        if beyond_context and self.max_tokens is None:
            raise ConfigError("beyond_context lifts the limit of the context, so max_tokens must be set")
        decoder.check_length(len(self.ids))
        if len(self.ids) > most and not beyond_context:
            raise ContextError(
                f"the prompt has {len(self.ids)} tokens and the model was trained on {most}; "
                "shorten it, or see with beyond_context=True (--beyond-context) what it does there"
            )


def unused_ids(decoder: DecoderConfig, tokens: int, image_token: int | None = None) -> list[int]:
    """Ids that no answer holds: rows that only pad the table beyond the `tokens` of the tokenizer, and the
    placeholder of images, which holds a place and is never said."""
    return [*range(tokens, decoder.vocab_size), *(() if image_token is None else (image_token,))]


def loop_options(options: Options, text_stream: Callable[[], TextStream]) -> dict[str, Any]:
    """The options of an answer that are arguments of `generate` and not part of a request."""
    return {
        "text_stream": text_stream,
        "beyond_context": options.get("beyond_context", False),
        "speculate": options.get("speculate", False),
    }
