"""The order of records: each once an epoch, the same for the same seed, and the same after a stop anywhere."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemkit.errors import ConfigError, ContextError, DataError, ImageError
from gemkit.train.batching import Example
from gemkit.train.data import Data, Steps, open_data
from gemkit.train.data.loader import LOOK_AHEAD, share


class Lengths:
    """Makes of {"text": "7 3"} two examples of 7 and 3 tokens, whose ids are random, and then the record's number."""

    name, forms = "lengths", ("text",)

    def __init__(self):
        self.encoded = 0

    def encode(self, record, rng):
        self.encoded += 1
        return [(self.example(int(length), rng, record["number"]),) for length in record["text"].split()]

    @staticmethod
    def example(length, rng, number=0, learned=1.0):
        ids = np.append(rng.integers(0, 1000, length - 1), number)
        return Example(ids, np.append(np.zeros(length - 1), learned).astype(np.float32))


def data(*lengths):
    return Data.of([{"text": str(text), "number": i} for i, text in enumerate(lengths)])


def ids(step):
    return [[example.ids.tolist() for example in unit] for unit in step]


def numbers(steps):
    return [int(unit[0].ids[-1]) for step in steps for unit in step]


UNITS = st.lists(st.integers(2, 30), max_size=4).map(lambda lengths: " ".join(map(str, lengths)) or "40")
RECORDS = st.lists(UNITS, min_size=1, max_size=120)
BATCH = st.sampled_from([{"batch_size": 1}, {"batch_size": 5}, {"batch_tokens": 30}, {"batch_tokens": 64}])


@given(lengths=RECORDS, batch=BATCH, seed=st.integers(0, 3), stop=st.integers(0, 60), prefetch=st.sampled_from([0, 3]))
def test_each_unit_once_an_epoch_also_across_a_stop(lengths, batch, seed, stop, prefetch):
    """With units left out for their length, by number and by tokens, with a thread and without."""
    records = data(*lengths)
    fitting = [i for i, text in enumerate(lengths) for length in text.split() if int(length) <= 30]
    if not fitting:
        with pytest.raises(DataError, match="records gives anything to learn"):
            next(Steps(records, Lengths(), seed=seed, max_length=30, **batch))
        return

    def steps(**options):
        return Steps(records, Lengths(), seed=seed, max_length=30, epochs=2, **batch, **options)

    whole = list(steps())
    assert Counter(numbers(whole)) == Counter(fitting * 2)
    assert not any(sum(len(unit[0]) for unit in step) > batch.get("batch_tokens", 1e9) for step in whole)
    first = steps(prefetch=prefetch)
    before = [step for _, step in zip(range(stop), first, strict=False)]
    state = json.loads(json.dumps(first.state()))  # it survives its file
    first.close()
    second = steps(prefetch=prefetch)
    second.resume(state)
    assert [ids(step) for step in [*before, *second]] == [ids(step) for step in whole]
    assert second.counts["units"] == 2 * len(fitting)
    second.close()


def test_the_state_is_that_of_what_was_given_out():
    """A thread that is ahead changes neither the steps nor the state."""
    records = data(*range(2, 30))
    plain, ahead = (Steps(records, Lengths(), seed=1, batch_tokens=64, prefetch=n) for n in (0, 4))
    for _ in range(20):
        assert ids(next(plain)) == ids(next(ahead))
        assert (plain.state(), plain.counts, plain.epoch) == (ahead.state(), ahead.counts, ahead.epoch)
    state = plain.state()
    following = [ids(next(plain)) for _ in range(5)]
    for one in (plain, ahead):  # back in time
        one.resume(state)
        assert [ids(next(one)) for _ in range(5)] == following
    ahead.close()


def test_resuming_encodes_only_what_waits():
    """Not all that came before: of 2,000 records at most those that were looked ahead at, and the one being read."""
    records, objective = data(*[10] * 2000), Lengths()
    steps = Steps(records, objective, seed=0, batch_tokens=40)
    for _ in range(400):
        next(steps)
    again = Lengths()
    resumed = Steps(records, again, seed=0, batch_tokens=40)
    resumed.resume(steps.state())
    assert again.encoded <= LOOK_AHEAD + 1
    assert ids(next(resumed)) == ids(next(steps))


def test_epochs_differ_and_seeds_differ():
    records = data(*[5] * 50)

    def order(seed, shuffle=True):
        steps = Steps(records, Lengths(), seed=seed, batch_size=50, shuffle=shuffle, epochs=2)
        return [numbers([step]) for step in steps]

    first, second = order(0)
    assert sorted(first) == sorted(second) == list(range(50))
    assert len({tuple(o) for o in (first, second, *order(1), range(50))}) == 5
    assert order(0, shuffle=False) == [list(range(50))] * 2


def test_chance_is_seeded_by_seed_epoch_and_record():
    """A record is cut the same way whatever came before it, and another way in another epoch."""
    one, two = (next(Steps(data(*many), Lengths(), seed=3, batch_size=9, shuffle=False)) for many in ([9], [9, 9]))
    assert ids(one) == ids(two)[:1]
    assert ids(two)[0][0][:-1] != ids(two)[1][0][:-1]
    steps = Steps(data(9), Lengths(), seed=3, batch_size=1)
    assert ids(next(steps)) != ids(next(steps))


def test_a_budget_is_filled():
    """Of lengths from 2 to 100, steps of 512 tokens are full to the last percent but for the end."""
    lengths = np.random.default_rng(0).integers(2, 101, 2000)
    steps = list(Steps(data(*lengths), Lengths(), seed=0, batch_tokens=512, epochs=1))
    filled = [sum(len(unit[0]) for unit in step) for step in steps]
    assert np.mean(filled[:-4]) > 0.99 * 512
    assert sum(filled) == lengths.sum()


def test_none_waits_for_ever():
    """A short unit is never the largest that fits, but soon the one that has waited longest."""
    steps = list(Steps(data(2, *[8] * 500), Lengths(), seed=0, batch_tokens=8, shuffle=False, epochs=1))
    assert numbers(steps[:1]) == [0]


# ---------------------------------------------------------------- what is left out


class Odd:
    """Records that are too long, teach nothing, cannot be read, or lose turns, as they say."""

    name, forms = "odd", ("text", "prompt")

    def encode(self, record, rng):
        match record.get("text", record.get("prompt")):
            case "long":
                raise ContextError("long")
            case "silent":
                return [(Lengths.example(5, rng, learned=0.0),)]
            case "nothing":
                return []
            case "unreadable":
                raise ImageError("a.png: no such file")
            case "shortened":
                example = Lengths.example(5, rng)
                return [(Example(example.ids, example.weights, extra={"turns_left_out": 2}),)]
        return [(Lengths.example(5, rng),)]


def test_what_is_left_out_is_counted():
    texts = ["a", "long", "silent", "nothing", "shortened", "b"]
    steps = Steps(Data.of([{"text": text} for text in texts]), Odd(), seed=0, batch_size=2, max_length=8, epochs=1)
    assert [len(step) for step in steps] == [2, 1]
    assert dict(steps.counts) == {
        "records": 6, "units": 3, "tokens": 15, "learned": 3, "too_long": 1, "nothing_to_learn": 1, "shortened": 1
    }  # fmt: skip
    assert steps.report() == (
        "6 records, 15 tokens of which 3 are learned; 1 longer than max_length=8; 1 without a token to learn; "
        "1 conversations shortened"
    )


def test_what_cannot_be_read_stops_with_its_place_or_is_skipped(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"text": "{"unreadable" if i == 7 else "a"}"}}\n' for i in range(200)))
    with pytest.raises(DataError, match=r"data\.jsonl:8: a\.png: no such file"):
        list(Steps(open_data(path), Odd(), seed=0, batch_size=50, epochs=1))
    steps = Steps(open_data(path, on_bad="skip"), Odd(), seed=0, batch_size=50, epochs=3)
    assert sum(len(step) for step in steps) == 3 * 199
    assert steps.counts["unreadable"] == 3
    path.write_text('{"text": "a"}\n' * 10 + '{"text": "unreadable"}\n')
    with pytest.raises(DataError, match=r"1 that cannot be read, the last: .*:11: a\.png"):
        list(Steps(open_data(path, on_bad="skip"), Odd(), seed=0, batch_size=50, epochs=1))


def test_prompts_have_nothing_to_learn_yet():
    steps = Steps(Data.of([{"prompt": "silent"}]), Odd(), seed=0, batch_size=1)
    assert len(next(steps)) == 1


def test_nothing_at_all_ends_at_once():
    with pytest.raises(DataError, match=r"none of 2 records gives anything to learn: .* 2 without a token to learn"):
        next(Steps(Data.of([{"text": "silent"}] * 2), Odd(), seed=0, batch_tokens=9))


# ---------------------------------------------------------------- what does not go together


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "batch_size=None and batch_tokens=None: give one of them"),
        ({"batch_size": 1, "batch_tokens": 1}, "give one of them"),
        ({"batch_size": 0}, "batch_size=0 must be 1 or more"),
        ({"batch_tokens": 8, "max_length": 9}, "batch_tokens=8 does not hold one sequence of max_length=9"),
        ({"batch_size": 1, "seed": -1}, "seed=-1"),
    ],
)
def test_settings_that_contradict(options, message):
    with pytest.raises(ConfigError, match=message):
        Steps(data(5), Lengths(), **{"seed": 0, **options})


def test_an_objective_takes_its_forms():
    with pytest.raises(ConfigError, match=r"lengths learns from records of the form text, and record 0 has"):
        Steps(Data.of([{"prompt": "a"}]), Lengths(), seed=0, batch_size=1)


def test_a_state_of_other_data_is_refused(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "5", "number": 0}\n' * 4)
    steps = Steps(open_data(path), Lengths(), seed=0, batch_size=1)
    next(steps)
    state = steps.state()
    path.write_text('{"text": "6", "number": 0}\n' * 4)
    changed = Steps(open_data(path), Lengths(), seed=0, batch_size=1)
    with pytest.raises(ConfigError, match=r"fingerprint was .* the data has changed since; restore it, or force"):
        changed.resume(state)
    changed.resume(state, force=True)
    assert len(next(changed)[0][0]) == 6
    with pytest.raises(ConfigError, match="seed was 0 when the state was saved and is 1: this is another order"):
        Steps(open_data(path), Lengths(), seed=1, batch_size=1).resume(changed.state())


# ---------------------------------------------------------------- several processes


@given(lengths=RECORDS, batch=BATCH, world=st.integers(1, 4))
def test_processes_share_every_step(lengths, batch, world):
    """Of each step every unit goes to one process, in its order; all of them know the position of the run."""
    records = data(*lengths)
    whole = Steps(records, Lengths(), seed=1, epochs=1, **batch)
    shards = [Steps(records, Lengths(), seed=1, epochs=1, rank=rank, world=world, **batch) for rank in range(world)]
    for step in whole:
        parts = [next(shard) for shard in shards]
        dealt = [ids([unit])[0] for part in parts for unit in part]
        assert sorted(map(str, dealt)) == sorted(map(str, ids(step)))
        places = [[ids(step).index(unit) for unit in ids(part)] for part in parts]
        assert all(each == sorted(each) for each in places) or len(set(map(str, dealt))) < len(dealt)
        assert all(shard.state() == whole.state() for shard in shards)
        tokens = [sum(len(example) for unit in part for example in unit) for part in parts]
        assert max(tokens) - min(tokens) <= max(sum(map(len, unit)) for unit in step)
    assert all(next(shard, None) is None for shard in shards)


def test_one_process_has_every_step_as_it_is():
    units = [(Lengths.example(length, np.random.default_rng(0)),) for length in (3, 9, 4)]
    assert share(units, 0, 1) == units
