"""Records to steps: in an order that depends on the seed and the epoch alone, each once an epoch, without padding.

A step is a list of units: so many of them, or as many as a budget of tokens holds. For the latter some units are looked
ahead at, and of those the largest that fits comes next; the one that has waited longest always begins a step, so none
waits for ever.

What is to come is known from a few numbers: the epoch, how far it was read, and which units wait. `state` gives them,
and `resume` goes on from them with the same steps to the bit: encoding is a function of the record and of a generator
seeded with (seed, epoch, record), never of what came before.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gemkit.errors import ConfigError, ContextError, DataError, GemkitError
from gemkit.train.batching import ExampleGroup
from gemkit.train.data.files import MAX_BAD, Data

LOOK_AHEAD = 64  # units among which a step with a budget of tokens chooses

_ORDER, _ENCODE = 1, 2  # what a generator is for: the same numbers for both would be the same stream


class Encoder(Protocol):
    """What of an objective is needed here."""

    name: str
    forms: tuple[str, ...]

    def encode(self, record: Mapping[str, Any], rng: np.random.Generator) -> list[ExampleGroup]: ...


@dataclass(frozen=True, eq=False)
class _Waiting:
    position: int  # of its record in the order of the epoch
    number: int  # among the units of its record
    unit: ExampleGroup

    @property
    def size(self) -> int:
        return sum(map(len, self.unit))


class Steps(Iterator[list[ExampleGroup]]):
    """An iterator of steps over some epochs, or for ever.

    What is left out is counted: `counts` has, over all epochs so far, "records", "units" and "tokens" given out or
    waiting, "learned" (tokens that carry loss), and, where there were any, "too_long" and "nothing_to_learn" (units),
    "unreadable" (records), "shortened" (conversations that lost turns).
    """

    def __init__(
        self,
        data: Data,
        objective: Encoder,
        *,
        seed: int,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        shuffle: bool = True,
        epochs: int | None = None,
        prefetch: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        """
        Args:
            batch_size: units in a step.
            batch_tokens: tokens in a step at most, unless a single unit has more. Either this or `batch_size`.
            max_length: tokens of a sequence; a unit with a longer one is left out and counted.
            shuffle: False keeps the order of the data.
            epochs: how many; None never ends. The last step of an epoch has what is left.
            prefetch: steps that a thread encodes in advance. It changes nothing else.
            rank, world: this process among those of the run: of every step it gets its `share`. All of them make the
                same steps in the same order, so `state` is that of the run and not of a process.

        Raises:
            ConfigError: if these contradict one another, or the objective takes no records of this form.
        """
        if (batch_size is None) == (batch_tokens is None):
            raise ConfigError(f"batch_size={batch_size} and batch_tokens={batch_tokens}: give one of them")
        for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be 1 or more")
        if max_length and batch_tokens and batch_tokens < max_length:
            raise ConfigError(f"batch_tokens={batch_tokens} does not hold one sequence of max_length={max_length}")
        if seed < 0 or prefetch < 0:
            raise ConfigError(f"seed={seed} and prefetch={prefetch} must be 0 or more")
        for form, first in data.forms.items():
            if form not in objective.forms:
                raise ConfigError(
                    f"{objective.name} learns from records of the form {' or '.join(objective.forms)}, "
                    f"and {data.where(first)} has the form {form} (data.form and data.map say how it is read)"
                )
        self.data, self.objective, self.seed, self.max_length = data, objective, seed, max_length
        self.batch_size, self.batch_tokens, self.shuffle, self.epochs = batch_size, batch_tokens, shuffle, epochs
        self.rank, self.world = rank, world
        self._counts: Counter[str] = Counter()
        self._epoch, self._position, self._number = 0, 0, 0
        self._units: list[ExampleGroup] | None = None  # of the record at `_position`, from which unit `_number` is next
        self._waiting: deque[_Waiting] = deque()
        self._order: tuple[int, np.ndarray] | None = None
        self._prefetch = prefetch
        self._thread = ThreadPoolExecutor(1, "gemkit-data") if prefetch else None
        self._coming: deque[Future[tuple[list[ExampleGroup] | None, dict[str, Any]]]] = deque()
        self._given = self._snapshot()

    def __next__(self) -> list[ExampleGroup]:
        if self._thread is None:
            step, self._given = self._make()
        else:
            while len(self._coming) <= self._prefetch:
                self._coming.append(self._thread.submit(self._make))
            step, self._given = self._coming.popleft().result()
        if step is None:
            raise StopIteration
        return share(step, self.rank, self.world)

    @property
    def epoch(self) -> float:
        """How many epochs have been read, the running one as a fraction."""
        return self._given["epoch"] + self._given["position"] / len(self.data)

    @property
    def counts(self) -> Counter[str]:
        return Counter(self._given["counts"])

    def state(self) -> dict[str, Any]:
        """Where the next step begins, for JSON."""
        return self._given

    def resume(self, state: Mapping[str, Any], *, force: bool = False) -> None:
        """Go on where `state` was taken.

        Args:
            force: although the data or the seed is another: then records may come twice or never.

        Raises:
            ConfigError: if the state is of other data, of another seed or order.
        """
        mine = self._identity()
        for name, value in mine.items():
            if state[name] != value and not force:
                what = "the data has changed since" if name == "fingerprint" else "this is another order of records"
                raise ConfigError(
                    f"{name} was {state[name]} when the state was saved and is {value}: {what}; restore it, or force"
                )
        self._drain()
        self._epoch, self._position, self._number = state["epoch"], state["position"], state["number"]
        self._position = min(self._position, len(self.data))
        self._counts = Counter(state["counts"])
        self._units = self._encode(self._position) if self._number else None
        self._waiting = deque()
        encoded: dict[int, list[ExampleGroup]] = {}
        for position, number in state["waiting"]:
            if position not in encoded:
                encoded[position] = self._encode(position)
            self._waiting.append(_Waiting(position, number, encoded[position][number]))
        self._given = self._snapshot()

    def close(self) -> None:
        """End the thread, if there is one."""
        self._drain()
        if self._thread is not None:
            self._thread.shutdown(wait=True)

    def _drain(self) -> None:
        while self._coming:
            coming = self._coming.pop()
            if not coming.cancel():
                coming.exception()  # waits for the one that runs

    def _identity(self) -> dict[str, Any]:
        return {
            "fingerprint": self.data.fingerprint,
            "records": len(self.data),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "max_length": self.max_length,
        }

    def _snapshot(self) -> dict[str, Any]:
        return {
            **self._identity(),
            "epoch": self._epoch,
            "position": self._position,
            "number": self._number,
            "waiting": [[waiting.position, waiting.number] for waiting in self._waiting],
            "counts": dict(self._counts),
        }

    def _make(self) -> tuple[list[ExampleGroup] | None, dict[str, Any]]:
        """The next step, and the state after it; None at the end."""
        while self.epochs is None or self._epoch < self.epochs:
            chosen = self._by_number(self.batch_size) if self.batch_size else self._by_tokens(self.batch_tokens or 0)
            if chosen:
                return chosen, self._snapshot()
            if not self._counts["units"]:
                raise DataError(f"none of {len(self.data):,} records gives anything to learn: {self.report()}")
            self._epoch, self._position, self._number, self._units = self._epoch + 1, 0, 0, None
        return None, self._snapshot()

    def _by_number(self, size: int) -> list[ExampleGroup]:
        step: list[ExampleGroup] = []
        while len(step) < size and (waiting := self._next()):
            step.append(waiting.unit)
        return step

    def _by_tokens(self, budget: int) -> list[ExampleGroup]:
        step: list[ExampleGroup] = []
        left = budget
        while True:
            while len(self._waiting) < LOOK_AHEAD and (waiting := self._next()):
                self._waiting.append(waiting)
            if not self._waiting:
                return step
            if not step:
                best = 0
            else:
                fitting = [i for i, waiting in enumerate(self._waiting) if waiting.size <= left]
                if not fitting:
                    return step
                best = max(fitting, key=lambda i: (self._waiting[i].size, -i))
            left -= self._waiting[best].size
            step.append(self._waiting[best].unit)
            del self._waiting[best]

    def _next(self) -> _Waiting | None:
        """The next unit of this epoch that is not left out."""
        while self._position < len(self.data):
            if self._units is None:
                self._units = self._encode(self._position)
                self._counts["records"] += 1
            while self._number < len(self._units):
                unit = self._units[self._number]
                self._number += 1
                if self._counted(unit):
                    return _Waiting(self._position, self._number - 1, unit)
            self._position, self._number, self._units = self._position + 1, 0, None
        return None

    def _counted(self, unit: ExampleGroup) -> bool:
        """Whether a unit is to be learned; either way it is counted."""
        if self.max_length is not None and max(map(len, unit)) > self.max_length:
            self._counts["too_long"] += 1
            return False
        learned = sum(int(np.count_nonzero(example.weights)) for example in unit)
        if not learned and self.data.form != "prompt":  # the answers to prompts are yet to come
            self._counts["nothing_to_learn"] += 1
            return False
        self._counts["units"] += 1
        self._counts["tokens"] += sum(map(len, unit))
        self._counts["learned"] += learned
        if any(example.extra.get("turns_left_out") for example in unit):
            self._counts["shortened"] += 1
        return True

    def _encode(self, position: int) -> list[ExampleGroup]:
        index = self._index(position)
        try:
            return self.objective.encode(
                self.data[index], np.random.default_rng((_ENCODE, self.seed, self._epoch, index))
            )
        except ContextError:
            self._counts["too_long"] += 1
        except GemkitError as error:
            if self.data.on_bad == "error":
                raise DataError(f"{self.data.where(index)}: {error}") from error
            self._counts["unreadable"] += 1
            if self._counts["unreadable"] > MAX_BAD * len(self.data) * (self._epoch + 1):
                raise DataError(f"{self.report()}, the last: {self.data.where(index)}: {error}") from error
        return []

    def _index(self, position: int) -> int:
        if not self.shuffle:
            return position
        if self._order is None or self._order[0] != self._epoch:
            rng = np.random.default_rng((_ORDER, self.seed, self._epoch))
            self._order = self._epoch, rng.permutation(len(self.data))
        return int(self._order[1][position])

    def report(self) -> str:
        """What was read and what was left out, in a line."""
        counts = self._counts
        left_out = [
            f"{counts[name]:,} {text}"
            for name, text in (
                ("too_long", f"longer than max_length={self.max_length}"),
                ("nothing_to_learn", "without a token to learn"),
                ("unreadable", "that cannot be read"),
                ("shortened", "conversations shortened"),
            )
            if counts[name]
        ]
        found = f"{counts['records']:,} records, {counts['tokens']:,} tokens of which {counts['learned']:,} are learned"
        return "; ".join([found, *left_out])


def share(units: Sequence[ExampleGroup], rank: int, world: int) -> list[ExampleGroup]:
    """The units of a step that one of several processes computes, in their order: all of one process's own.

    Longest first, each goes to the process that has the fewest tokens so far, so that all have nearly the same number.
    """
    if world == 1:
        return list(units)
    tokens, mine = [0] * world, []
    for i in sorted(range(len(units)), key=lambda i: -sum(map(len, units[i]))):
        least = min(range(world), key=lambda r: tokens[r])
        tokens[least] += sum(map(len, units[i]))
        if least == rank:
            mine.append(i)
    return [units[i] for i in sorted(mine)]
