"""Results of generation and scoring."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "context", "interrupted", "cancelled", "error"]


class TokenLogprob(NamedTuple):
    """A token's log-probability in nats under the model's own distribution, before bias, temperature and filters."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (id, log-probability) of the most likely tokens, best first


@dataclass(frozen=True)
class Timings:
    """Counts and wall-clock seconds of one request, the time its caller took between events included."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt's tokens, those that the state held before
    generated_tokens: int
    first_token_seconds: float | None  # from when the request was taken up; None if no token was generated
    decode_seconds: float  # from the first token to the last
    drafted_tokens: int = 0  # by speculation
    accepted_tokens: int = 0  # of them, those that saved a step each

    @property
    def prompt_tokens_per_second(self) -> float | None:
        """Prompt tokens computed, by the time to the first token; None if there was none."""
        return (
            (self.prompt_tokens - self.cached_tokens) / self.first_token_seconds if self.first_token_seconds else None
        )

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after the first, by the time they took; None if there were none."""
        return (self.generated_tokens - 1) / self.decode_seconds if self.decode_seconds else None


@dataclass(frozen=True)
class Result:
    """All that came of one request.

    `request.ids + result.ids` is the whole sequence, and the state's slot holds its first `computed_tokens` ids: all
    but the last, which was drawn but not run (after an interruption also fewer, or all; after a draft of a recurrent
    member fewer). To go on, ask for the whole sequence and more from the same slot.
    """

    text: str  # without stop strings and what follows them
    ids: tuple[int, ...]  # every token drawn, with the stop id, or the tokens of the stop string, that ended it
    finish_reason: FinishReason
    stopped_by: int | str | None  # the stop id or stop string, if the reason is "stop"
    logprobs: tuple[TokenLogprob, ...] | None  # one for each of `ids`, if asked for
    computed_tokens: int
    seed: int | None  # that the draws were made with, whether given or fresh; None if greedy
    timings: Timings

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Event:
    """One step of one request. The texts of a request's events make up `Result.text`."""

    request: int  # its index in the batch
    id: int | None  # the new token; None if the request ended without one
    text: str  # that became certain with it: empty while a character or a possible stop string is incomplete
    logprob: TokenLogprob | None = None
    result: Result | None = None  # on the last event of the request


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text."""

    logprobs: tuple[TokenLogprob | None, ...]  # one for each id; None for those of a prefix, and for the first

    @property
    def total(self) -> float:
        """Log-probability of the whole in nats, given its first token, or its prefix."""
        return math.fsum(entry.logprob for entry in self.logprobs if entry is not None)

    @property
    def perplexity(self) -> float | None:
        """exp of the mean negative log-probability of the predicted tokens; None if there are none."""
        predicted = sum(entry is not None for entry in self.logprobs)
        return math.exp(-self.total / predicted) if predicted else None
