"""From the logits of one position to the next token, in NumPy, so that every executor draws the same one.

    logits ─ logit_bias ─ repetition_penalty ─ temperature ─ top_k ─ top_p ─ min_p ─ one draw

Each filter works on what the one before it left; the order is that of Transformers. Two rules make every step exact:

- *Rank* is by logit from high to low, and among equal logits (bf16 models have many) by id from low to high. Greedy
  takes rank 0, top-k the first k ranks and no more, top-p the shortest run of ranks that holds the mass.
- *The draw* inverts the cumulative distribution in the order of ids, not of ranks: two near-equal logits that change
  places between executors do not change what is drawn, and a filter that removes nothing changes nothing.

The random number of a draw is a function of (seed, sequence, position) and of nothing else: not of the batch, the
executor, or how often the caller was interrupted on the way.

There is no time to sort 262,144 logits at every step, and little to read them again: a floor that surely lies below
all that is kept leaves few of them to look at. Nothing is estimated, so the rules above hold to the letter.

A row is all logits, (V,) float32, or the `SparseLogits` that the filter of the same settings (`logits_filter`) left of
them: the token is the same.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from gemkit.errors import ConfigError, ModelError
from gemkit.executors.interface import LogitsFilter, SparseLogits
from gemkit.generate.result import TokenLogprob

_LOWEST_TEMPERATURE = 1e-6  # below it, differences of logits divided by it leave float32


def check_ids(what: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raise ConfigError for the first of `ids` that is not a token of a vocabulary of `vocab_size`."""
    for i in ids:
        if not (_is_whole(i) and 0 <= i < vocab_size):
            raise ConfigError(f"{what} holds {i!r}, which is no token id: the model has ids 0 to {vocab_size - 1}")


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The default is greedy: the most likely token, always.

    At temperature 0 the filters change nothing, since each of them keeps the most likely token.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_k: keep the k best tokens; None keeps all.
        top_p: keep the fewest best tokens that hold this share of the probability; 1 keeps all.
        min_p: drop tokens less likely than this share of the best one's probability; 0 drops none.
        repetition_penalty: logits of tokens already in prompt or answer are divided by it if positive and multiplied
            by it if negative (CTRL, arXiv:1909.05858, with the sign rule of Transformers); 1 is off.
        logit_bias: added to the logits of these ids; -inf bans an id.
        seed: below 2**64; None draws a fresh one for each request (`seeded`).
        sequence: which one of several answers to the same prompt with the same seed; below 2**64.

    Raises:
        ConfigError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    sequence: int = 0

    def __post_init__(self):
        t = self.temperature
        if not (t == 0 or _LOWEST_TEMPERATURE <= t < math.inf):
            raise ConfigError(f"temperature={t!r} must be 0 (greedy) or a finite number from {_LOWEST_TEMPERATURE}")
        if self.top_k is not None and not (_is_whole(self.top_k) and self.top_k >= 1):
            raise ConfigError(f"top_k={self.top_k!r} must be a whole number from 1, or None to keep every token")
        for name, off in (("top_p", 1), ("min_p", 0)):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be between 0 and 1; {off} switches it off")
        if not 0 < self.repetition_penalty < math.inf:
            raise ConfigError(f"repetition_penalty={self.repetition_penalty!r} must be positive; 1 switches it off")
        for token, bias in self.logit_bias.items():
            if not bias < math.inf:
                raise ConfigError(f"logit_bias[{token}]={bias!r} must be a number, or -inf to ban the token")
        for name in ("seed", "sequence"):
            value = getattr(self, name)
            if not (_is_whole(value) and 0 <= value < 2**64) and not (name == "seed" and value is None):
                raise ConfigError(f"{name}={value!r} must be a whole number from 0 below 2**64")

    def seeded(self) -> Sampling:
        """The same with a seed: its own, or a fresh one below 2**53, which JSON carries exactly."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(53))

    @cached_property
    def biases(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids and values of `logit_bias` as arrays, made once: models that pad their table have many banned rows."""
        return np.array([*self.logit_bias], np.int64), np.array([*self.logit_bias.values()], np.float32)


GREEDY = Sampling()

# The released generation configurations of the instruction-tuned Gemma 2 and 3.
INSTRUCTION_TUNED = Sampling(temperature=1.0, top_k=64, top_p=0.95)


@dataclass(frozen=True)
class Defaults:
    """How a model's answers are made where the options say nothing."""

    plain: Sampling = GREEDY  # of everything but conversations
    chat: Sampling = INSTRUCTION_TUNED
    stop: tuple[str, ...] = ()  # texts that end an answer
    source: str = "gemkit's own"  # where they come from, for people

    def __str__(self) -> str:
        parts = [f"{field}={value}" for field, value in self._shown().items()]
        return f"{', '.join(parts) or 'greedy'} ({self.source})"

    def _shown(self) -> dict[str, object]:
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        shown = {name: getattr(self.chat, name) for name in names if getattr(self.chat, name) != getattr(GREEDY, name)}
        banned = {"banned": f"{len(self.chat.logit_bias)} tokens"} if self.chat.logit_bias else {}
        return {**shown, **banned, **({"stop": list(self.stop)} if self.stop else {})}


class Candidates(NamedTuple):
    """The tokens that the filters left, and how likely each is relative to the others."""

    ids: np.ndarray  # (C,) int64, ascending
    weights: np.ndarray  # (C,) float32, 1 for the most likely

    @property
    def probabilities(self) -> np.ndarray:
        """(C,) float64, summing to 1."""
        return self.weights / self.weights.sum(dtype=np.float64)


Row = np.ndarray | SparseLogits


def sample(row: Row, sampling: Sampling, history: Sequence[int] = ()) -> int:
    """The next token after `history`, the ids of prompt and answer so far.

    Raises:
        ModelError: the logits hold NaN or +inf, or every token is banned.
        ConfigError: temperature is not 0 and the seed is None (`Sampling.seeded` gives one).
    """
    if sampling.temperature == 0:
        scores = _adjusted(row, sampling, history)
        return int(_ids(row)[_best_index(scores)])
    if sampling.seed is None:
        raise ConfigError(f"temperature={sampling.temperature} needs a seed to draw with: use Sampling.seeded()")
    kept = candidates(row, sampling, history)
    return int(kept.ids[_inverse_cdf(kept.weights, uniform(sampling.seed, sampling.sequence, len(history)))])


def candidates(row: Row, sampling: Sampling, history: Sequence[int] = ()) -> Candidates:
    """Candidates of a draw. Shapes, errors and order of filters: see `sample` and the head of this file."""
    scores = _adjusted(row, sampling, history)
    best = _best_index(scores)
    if sampling.temperature == 0:
        return Candidates(_ids(row)[[best]], np.ones(1, np.float32))
    peak, at = scores[best], _range(scores.size)  # where the tokens are that are left, ascending
    with np.errstate(over="ignore"):  # a logit masked with the lowest float32 becomes -inf: its weight is 0 either way
        if sampling.top_k is not None and sampling.top_k < scores.size:  # before the temperature: same ranks
            at = _top(scores, sampling.top_k)
        elif sampling.min_p > 0 and sampling.top_p == 1:  # then top_p needs no sum over the others
            # 1 nat below where min_p cuts: weights are rounded, and it is they that are compared in the end
            near = scores >= float(peak) + sampling.temperature * (math.log(sampling.min_p) - 1)
            if 8 * np.count_nonzero(near) < near.size:  # gathering more than that costs more than it saves
                at = np.flatnonzero(near)
        weights = scores[at] - peak if at.size < scores.size else scores - peak
        if sampling.temperature != 1:
            weights /= sampling.temperature
    np.exp(weights, out=weights)
    if sampling.top_p < 1:
        kept = _nucleus(weights, sampling.top_p)
        at, weights = at[kept], weights[kept]
    if sampling.min_p > 0:
        kept = np.flatnonzero(weights >= sampling.min_p)
        at, weights = at[kept], weights[kept]
    return Candidates(_ids(row)[at], weights)


# Of a larger set than this the whole table is computed as cheaply.
_MOST_FILTERED = 256


def logits_filter(sampling: Sampling, history: Sequence[int]) -> LogitsFilter | None:
    """Which logits `sample` looks at with these settings; None: all of them.

    Greedy looks at the best token, top-k at the k best, with whatever filters come after it, and min-p at those within
    a distance of the best. Top-p without top-k and plain temperature weigh every token.
    """
    max_gap = None
    if not sampling.temperature:
        top_n = 1
    elif sampling.top_k is not None and sampling.top_k <= _MOST_FILTERED:
        top_n = sampling.top_k
    elif sampling.min_p > 0 and sampling.top_p == 1:
        # a millionth more than where min_p cuts: weights are rounded, and it is they that are compared in the end
        top_n, max_gap = 1, sampling.temperature * (1e-6 - (1 + 1e-6) * math.log(sampling.min_p))
    else:
        return None
    always = sampling.biases[0]
    if sampling.repetition_penalty != 1:
        always = np.concatenate([always, np.asarray(history, np.int64)])
    return LogitsFilter(top_n, max_gap, always)


def token_logprob(row: Row, token: int, top: int = 0) -> TokenLogprob:
    """Log-probability of `token` in nats under the model's own distribution: no bias, penalty, temperature or filter.

    With `top`, also this many of the most likely tokens, best first; a token that is among them has the identical
    number.

    Raises:
        ConfigError: a row without all logits, whose sum cannot be known.
        ModelError: the logits hold NaN or +inf.
    """
    if isinstance(row, SparseLogits):
        raise ConfigError("a log-probability needs all logits of its row: give the chunk no filter")
    log_total = logsumexp(row)
    best = _top(row, min(top, row.size)) if top else _range(0)
    best = best[np.argsort(-row[best], kind="stable")]  # `_top` is in order of ids: equal logits stay so
    return TokenLogprob(
        id=token,
        logprob=float(row[token]) - log_total,
        top=tuple((int(i), float(row[i]) - log_total) for i in best),
    )


def logsumexp(logits_V: np.ndarray) -> float:
    """log(sum(exp(logits))), safe against overflow: a logit minus it is its log-probability."""
    peak = logits_V[_best_index(logits_V)]
    weights = logits_V - peak
    return float(peak) + math.log(_sums(np.exp(weights, out=weights)).sum())


def uniform(seed: int, sequence: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: the draw for the token at `position` (from 0) of a sequence."""
    low = 0xFFFFFFFF
    words = philox4x32(
        counter=(position & low, position >> 32, sequence & low, sequence >> 32), key=(seed & low, seed >> 32)
    )
    return ((words[0] >> 5) * 2**26 + (words[1] >> 6)) * 2.0**-53


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10: four random 32-bit words from a counter and a key, without any state between calls.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    low = 0xFFFFFFFF
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        ab, cd = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (cd >> 32) ^ b ^ k0, cd & low, (ab >> 32) ^ d ^ k1, ab & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return a, b, c, d


def _adjusted(row: Row, sampling: Sampling, history: Sequence[int]) -> np.ndarray:
    """Logits with bias and penalty, in the order of the row, float32; its own array if there is neither."""
    logits = row.values if isinstance(row, SparseLogits) else row
    penalty = sampling.repetition_penalty
    if not sampling.logit_bias and penalty == 1:
        return logits
    scores = logits.copy()
    ids, values = sampling.biases
    scores[_places(row, ids)] += values
    if penalty != 1:
        seen = _places(row, np.asarray(history, np.int64))
        values = scores[seen]  # read before any is written: a token that occurs twice is penalized once
        scores[seen] = np.where(values < 0, values * penalty, values / penalty)
    return scores


def _ids(row: Row) -> np.ndarray:
    """The token of each logit of a row, ascending."""
    return row.ids if isinstance(row, SparseLogits) else _range(row.size)


def _places(row: Row, ids: np.ndarray) -> np.ndarray:
    """Where the logits of these tokens are in a row, all of which it holds."""
    if not isinstance(row, SparseLogits):
        return ids
    at = np.searchsorted(row.ids, ids)
    assert np.array_equal(row.ids.take(at, mode="clip"), ids), "a filter keeps what a bias or a penalty moves"
    return at


def _best_index(scores: np.ndarray) -> int:
    """Where the highest of the scores is, which must be a finite number; of equal ones the first."""
    best = int(scores.argmax())  # argmax and max stop at NaN, so this one number tells of NaN anywhere
    if not math.isfinite(scores[best]):
        if np.isnan(scores[best]):
            raise ModelError(
                f"the model gave NaN for {np.isnan(scores).sum()} of {scores.size} logits (first: token {best}): "
                "its weights are broken, or its activations overflowed the compute dtype; try float32"
            )
        if scores[best] > 0:
            raise ModelError(f"the model gave an infinite logit for token {best}: try float32 as the compute dtype")
        raise ModelError(f"all {scores.size} tokens have a logit of -inf, so none can follow: ban fewer tokens")
    return best


@lru_cache(maxsize=8)
def _whole_table(size: int) -> np.ndarray:
    ids = np.arange(size)
    ids.flags.writeable = False
    return ids


def _range(size: int) -> np.ndarray:
    """0 to `size` - 1; not to be written to."""
    return _whole_table(size) if size >= 65536 else np.arange(size)  # the sizes of sparse rows are all different


def _top(values: np.ndarray, n: int) -> np.ndarray:
    """Where the n largest of `values` are, ascending; of equal values the first ones. Sorts nothing."""
    pool = _range(values.size)
    columns = values.size // (256 if 1024 * n <= values.size else 64)
    if n <= columns:
        # The n-th best of the maxima of disjoint columns is a floor under the n-th best of all. Only the few columns
        # that reach it are read again, and only what reaches it in them is partitioned.
        whole = values.size // columns * columns
        grid = values[:whole].reshape(-1, columns)
        maxima = grid.max(axis=0)
        floor = np.partition(maxima, -n)[-n]
        high = np.flatnonzero(maxima >= floor)
        at = np.flatnonzero(grid.take(high, axis=1) >= floor)
        row, column = np.divmod(at, high.size)
        pool = np.append(row * columns + high[column], whole + np.flatnonzero(values[whole:] >= floor))
    values = values[pool]
    cutoff = np.partition(values, -n)[-n]
    kept = values > cutoff
    kept[np.flatnonzero(values == cutoff)[: n - np.count_nonzero(kept)]] = True
    return pool[kept]


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Where the top-p tokens are, ascending: those for which all better ones together hold less than `top_p`."""
    total = _sums(weights).sum()
    # Even if every token had it, this weight would leave no more than 1 - top_p out. Most have far less, so that all
    # that is kept is found above 16 times that floor, a few thousand tokens, unless the distribution is nearly flat.
    floor = (1 - top_p) * total / weights.size
    pool = np.flatnonzero(weights >= 16 * floor)
    if weights[pool].sum(dtype=np.float64) <= top_p * total:
        pool = np.flatnonzero(weights >= floor)
    weights = weights[pool]
    # The first bits of a positive float32 are in the order of the numbers: 16 buckets to each power of 2. Mass is added
    # up bucket by bucket, from the best, and only the one in which it reaches the goal is sorted.
    buckets = weights.view(np.uint32) >> 19
    mass = np.bincount(buckets, weights)[::-1].cumsum()
    goal = min(top_p * total, mass[-1])
    reached = int(np.searchsorted(mass, goal))
    bucket = mass.size - 1 - reached
    last = np.flatnonzero(buckets == bucket)
    last = last[np.argsort(-weights[last], kind="stable")]
    held = np.cumsum(weights[last], dtype=np.float64) + (mass[reached - 1] if reached else 0)
    kept = buckets > bucket
    kept[last[: 1 + int(np.searchsorted(held[:-1], goal))]] = True  # kept if what the better ones hold is below
    return pool[kept]


def _inverse_cdf(weights: np.ndarray, u: float) -> int:
    """The first index whose cumulative weight exceeds the share `u` in [0, 1) of the whole; its weight is positive."""
    # By blocks, then within one: a cumulative sum over a whole vocabulary would cost more than all the rest.
    sums = _sums(weights)
    block, rest = _locate(sums, u * sums.sum())
    start = block * _SUMMED
    return start + _locate(weights[start : start + _SUMMED], rest)[0]


_SUMMED = 512  # weights in a block of `_sums`


def _sums(weights: np.ndarray) -> np.ndarray:
    """Sums of blocks of 512, the last one shorter, float64.

    Whole blocks are added up in float32, in a quarter of the time: their errors are no larger than those of the
    weights, and as they have either sign, the sum over a vocabulary is off by about 1e-8 of itself.
    """
    whole = weights.size // _SUMMED * _SUMMED
    sums = np.einsum("bw->b", weights[:whole].reshape(-1, _SUMMED)).astype(np.float64)
    return sums if whole == weights.size else np.append(sums, weights[whole:].sum(dtype=np.float64))


def _locate(weights: np.ndarray, target: float) -> tuple[int, float]:
    """The first index whose cumulative weight exceeds `target`, and the target less the weight before that index."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    # Rounding may put the target at or past the end: it then belongs to the last index with any weight.
    index = int(np.searchsorted(cumulative, min(target, np.nextafter(cumulative[-1], 0)), side="right"))
    return index, target - (cumulative[index - 1] if index else 0.0)
