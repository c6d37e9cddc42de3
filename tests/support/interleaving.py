"""Sequences that come, go, share steps, are set aside, moved and cancelled at random, driven by `generate.step`."""

from __future__ import annotations

from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from random import Random
from typing import Any

from gemkit.executors.interface import Executor, State
from gemkit.generate import Request, Result, Sequence, SpeculationController, TextStream, step


class AlwaysDraft(SpeculationController):
    """Drafts in every step that may, whether it pays or not."""

    @property
    def most(self) -> int:
        return self._most


@dataclass(frozen=True)
class _Kept:
    """A snapshot, and the beginning of a sequence that it holds."""

    ids: list[int]
    request: Request
    snapshot: Any

    def begins(self, sequence: Sequence) -> bool:
        if len(self.ids) >= len(sequence.ids) or self.ids != sequence.ids[: len(self.ids)].tolist():
            return False
        pictured = len(self.request.spans) or len(sequence.request.spans)  # the same ids need not be the same pictures
        return self.request is sequence.request or not pictured


class Interleaving:
    """Requests whose sequences join, leave, move and end in an order that `rng` says.

    Args:
        cancelled: indices of the requests that are cancelled at some time, if they are not over before.
        most: tokens to draft at most; 0 for no speculation.
    """

    def __init__(
        self,
        executor: Executor,
        requests: Seq[Request],
        rng: Random,
        *,
        cancelled: Collection[int] = (),
        most: int = 0,
        text_stream: Callable[[], TextStream] | None = None,
    ):
        limit = executor.decoder.max_context
        self.executor, self.rng, self.most = executor, rng, most
        self.state: State = executor.new_state()
        self.waiting = [
            Sequence(request, index=i, limit=limit, stream=text_stream() if text_stream else None, most=most)
            for i, request in enumerate(requests)
        ]
        self.cancelled = set(cancelled)
        self.live: list[Sequence] = []
        self.kept: list[_Kept] = []
        self.results: dict[int, Result] = {}
        self.texts = [""] * len(requests)

    def run(self) -> list[Result]:
        """All results, in the order of the requests; the state is empty then."""
        speculation = AlwaysDraft(self.most) if self.most else None
        while self.waiting or self.live:
            for change in (self._join, self._snapshot, self._set_aside, self._move, self._cancel):
                if self.rng.random() < (0.5 if change == self._join else 0.15):
                    change()
            if self.live:
                plan = [(sequence, self._tokens(sequence)) for sequence in self._some()]
                for event in step(self.executor, self.state, plan, speculation=speculation):
                    self._told(event)
        self.kept.clear()
        return [self.results[i] for i in range(len(self.results))]

    def _some(self) -> list[Sequence]:
        """Sequences for one step; often only those that decode, so that there are drafts."""
        decoding = [sequence for sequence in self.live if sequence.prefilled]
        pool = decoding if decoding and self.rng.random() < 0.5 else self.live
        return self.rng.sample(pool, self.rng.randint(1, len(pool)))

    def _tokens(self, sequence: Sequence) -> int:
        most = sequence.pending if self.rng.random() < 0.5 else self.rng.randint(1, sequence.pending)
        return sequence.fit(most) or sequence.unit

    def _told(self, event) -> None:
        self.texts[event.request] += event.text
        if event.result is not None:
            assert event.result.text == self.texts[event.request]
            self.results[event.request] = event.result
            for sequence in [sequence for sequence in self.live if sequence.finished]:
                self.live.remove(sequence)
                self.state.free(sequence.leave())

    def _join(self) -> None:
        if self.waiting:
            sequence = self.waiting.pop(self.rng.randrange(len(self.waiting)))
            self._place(sequence)

    def _place(self, sequence: Sequence) -> None:
        usable = [kept for kept in self.kept if kept.begins(sequence)]
        if usable and self.rng.random() < 0.7:
            slot = self.state.restore(self.rng.choice(usable).snapshot)
        else:
            slot = self.state.add()
        sequence.place(self.state, slot)
        self.live.append(sequence)
        if sequence.is_full:
            self._told(sequence.finish("context"))

    def _snapshot(self) -> None:
        if self.live:
            sequence = self.rng.choice(self.live)
            ids = sequence.ids[: sequence.computed].tolist()
            self.kept.append(_Kept(ids, sequence.request, self.state.snapshot(sequence.slot)))
            assert self.kept[-1].snapshot.length == len(ids)
            del self.kept[: self.rng.randint(0, 1) if len(self.kept) > 3 else 0]

    def _leave(self) -> Sequence:
        sequence = self.live.pop(self.rng.randrange(len(self.live)))
        self.state.free(sequence.leave())
        return sequence

    def _set_aside(self) -> None:
        if self.live:
            self.waiting.append(self._leave())

    def _move(self) -> None:
        """To another slot, with all that it has."""
        if self.live:
            self._snapshot()
            self._place(self._leave())

    def _cancel(self) -> None:
        for sequence in self.live:
            if sequence.index in self.cancelled and self.rng.random() < 0.3:
                self._told(sequence.cancel())
                assert sequence.cancel() is None  # once
                return


def assert_same_answers(requests: Seq[Request], results: Seq[Result], alone: Seq[Result], close: float = 0.0) -> None:
    """Each answer is that of its request alone, or as much of it as there was when it was cancelled.

    Args:
        close: log-probabilities may differ by this much.
    """
    for request, got, expected in zip(requests, results, alone, strict=True):
        if got.finish_reason == "cancelled":
            assert got.ids == expected.ids[: len(got.ids)]
        else:
            fields = ("ids", "text", "finish_reason", "stopped_by", "seed")
            assert [getattr(got, f) for f in fields] == [getattr(expected, f) for f in fields]
        assert (got.logprobs is None) == (request.logprobs is None)
        for a, b in zip(got.logprobs or (), expected.logprobs or (), strict=False):
            assert a.id == b.id
            assert abs(a.logprob - b.logprob) <= close
            assert close or a.top == b.top
