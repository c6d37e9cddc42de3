"""Policies: which sequences the next step advances, and by how many tokens. None of them changes an answer.

A policy is any function of the unfinished sequences that gives a plan. A plan names each sequence at most once, with a
count of its next tokens that `Sequence.fit` allows, and at least one sequence.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from gemkit.errors import ConfigError
from gemkit.generate.sequence import Sequence

Plan: TypeAlias = abc.Sequence[tuple[Sequence, int]]
Policy: TypeAlias = Callable[[abc.Sequence[Sequence]], Plan]


@dataclass(frozen=True)
class PromptsFirst:
    """Steps of prompts, then steps of one token for each sequence.

    The policy of a batch whose requests come together. Sharing steps would not make the batch shorter: it ends with
    the answer to the prompt that was read last, which takes as many steps either way, and in these the others then
    have fewer sequences to share the reading of the weights with.

    Args:
        chunk: prompt tokens a step at most, over all sequences. A longer span is a step of its own.
    """

    chunk: int = 512

    def __post_init__(self):
        _check(self.chunk)

    def __call__(self, live: abc.Sequence[Sequence], /) -> Plan:
        return _prompts(live, self.chunk) or [(sequence, sequence.pending) for sequence in live]


@dataclass(frozen=True)
class Mixed:
    """Every sequence that decodes gets its token in every step, and prompts take the rest of the step (chunked prefill:
    Sarathi-Serve, arXiv:2403.02310).

    The policy of requests that come and go: a long prompt does not stop the others.

    Args:
        chunk: tokens a step at most; prompts take at least one token, and a span that is longer is not cut.
    """

    chunk: int = 512

    def __post_init__(self):
        _check(self.chunk)

    def __call__(self, live: abc.Sequence[Sequence], /) -> Plan:
        plan = [(sequence, sequence.pending) for sequence in live if sequence.prefilled]
        return plan + _prompts(live, max(1, self.chunk - sum(tokens for _, tokens in plan)))


def _prompts(live: abc.Sequence[Sequence], budget: int) -> list[tuple[Sequence, int]]:
    """At most `budget` tokens of prompts, in their order.

    A span is computed whole: if there is no room left for it, it waits for a step that it can begin, however long
    it is.
    """
    plan: list[tuple[Sequence, int]] = []
    for sequence in live:
        if not sequence.prefilled and budget > 0:
            tokens = sequence.fit(budget) or (0 if plan else sequence.unit)
            if tokens:
                plan.append((sequence, tokens))
                budget -= tokens
    return plan


def _check(chunk: int) -> None:
    if chunk < 1:
        raise ConfigError(f"chunk={chunk} must be at least 1 token")
