"""A stream and a conversation without a model behind them: dropped turns, threads, and an executor that changes."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from gemkit import text
from gemkit.conversation import Completer, Conversation
from gemkit.errors import StateError
from gemkit.generate import Request, complete
from support.fake_executors import HashModel, tiny_decoder
from support.tiny_models import tokenizer

TOKENIZER = tokenizer()
GREEDY = {"temperature": 0, "max_tokens": 6}


class LongHashModel(HashModel):
    """With the test's vocabulary, and as slow as it is told."""

    def __init__(self, max_context: int = 512):
        super().__init__()
        self.decoder = tiny_decoder(max_context, len(TOKENIZER))
        self.running = threading.Lock()  # calls take turns: an executor's own promise
        self.entered = threading.Event()
        self.gate: threading.Event | None = None  # each call waits for it

    def run(self, chunks, state, **options):
        with self.running:
            self.entered.set()
            if self.gate is not None:
                assert self.gate.wait(30)
            return super().run(chunks, state, **options)


class Changing:
    """A runtime whose executor is replaced by the test, and which counts how often it was asked."""

    def __init__(self):
        self.executor = LongHashModel()
        self.asked = 0

    def sync(self):
        self.asked += 1
        return self.executor


@pytest.fixture
def completer():
    return Completer(Changing(), TOKENIZER)


def alone(completer: Completer, ids: list[int]) -> tuple[int, ...]:
    """The answer to the whole, computed at once by an executor that remembers nothing."""
    return complete(completer.runtime.executor, [Request(ids, max_tokens=6, stop_ids=TOKENIZER.end_ids)])[0].ids


def turns(completer: Completer, *words: str) -> list[tuple[int, ...]]:
    """The answers to turns in this order, each to all before it computed anew."""
    ids: list[int] = []
    answers = []
    for word in words:
        prompt = (
            text.next_turn(TOKENIZER, ids, word) if ids else text.chat(TOKENIZER, [{"role": "user", "content": word}])
        )
        ids = [*ids, *prompt.ids]
        answers.append(alone(completer, ids))
        ids += answers[-1]
        if ids[-1] == TOKENIZER.eos:
            ids.pop()
    return answers


def test_each_answer_asks_for_the_executor_once(completer):
    prompt = text.complete(TOKENIZER, "ab")
    completer.complete([prompt, prompt], GREEDY)
    assert completer.runtime.asked == 1
    completer.stream(prompt, GREEDY).finish()
    assert completer.runtime.asked == 2
    talk = Conversation(completer, options=GREEDY)
    talk.say("ab")
    talk.say("cd")
    assert completer.runtime.asked == 4


def test_turns_continue_from_the_state(completer):
    talk = Conversation(completer, options=GREEDY)
    said = [talk.say(words) for words in ("ab", "cd", "ef")]
    assert [result.ids for result in said] == turns(completer, "ab", "cd", "ef")
    assert said[0].timings.cached_tokens == 0 < said[1].timings.cached_tokens < said[2].timings.cached_tokens


def test_a_turn_is_dropped_by_the_next_one(completer):
    talk = Conversation(completer, options=GREEDY)
    talk.say("ab")
    dropped = talk.stream("what nobody waits for")
    next(dropped)
    kept = talk.say("cd")
    assert kept.ids == turns(completer, "ab", "cd")[1]
    assert kept.timings.cached_tokens > 0  # from the snapshot of before the dropped turn
    assert list(dropped) == []
    assert dropped.result is None
    for ask in (dropped.finish, dropped.interrupt):
        with pytest.raises(StateError, match="the next turn of its conversation has begun"):
            ask()
    assert talk.say("ef").ids == turns(completer, "ab", "cd", "ef")[2]


def test_a_changed_model_answers_to_the_whole_conversation(completer):
    talk = Conversation(completer, options=GREEDY)
    talk.say("ab")
    completer.runtime.executor = LongHashModel()
    answer = talk.say("cd")
    assert answer.ids == turns(completer, "ab", "cd")[1]
    assert answer.timings.cached_tokens == 0
    assert talk.say("ef").timings.cached_tokens > 0


def test_turns_of_several_threads_come_one_after_the_other(completer):
    talk = Conversation(completer, options=GREEDY)
    words = ["ab", "cd", "ef", "gh", "ij", "kl"]
    barrier = threading.Barrier(len(words))

    def say(word):
        barrier.wait()
        return word, talk.say(word)

    with ThreadPoolExecutor(len(words)) as pool:
        said = list(pool.map(say, words))
    said.sort(key=lambda turn: turn[1].timings.prompt_tokens)  # the order in which they came
    assert [result.ids for _, result in said] == turns(completer, *[word for word, _ in said])


# Nothing but an interruption ends it: no token ends an answer, and reading it to its length would take minutes.
ENDLESS = {**GREEDY, "max_tokens": 100_000, "logit_bias": dict.fromkeys(TOKENIZER.end_ids, -math.inf)}


def test_a_stream_is_interrupted_from_another_thread(completer):
    executor = completer.runtime.executor = LongHashModel(200_000)
    stream = completer.stream(text.complete(TOKENIZER, "ab"), ENDLESS)
    next(stream)
    executor.gate = threading.Event()
    executor.entered.clear()
    with ThreadPoolExecutor(2) as pool:
        reader = pool.submit(stream.finish)
        assert executor.entered.wait(30)
        stopper = pool.submit(stream.interrupt)
        executor.gate.set()
        result = stopper.result(30)
        assert reader.result(30) is result is stream.result
    assert result.finish_reason == "interrupted"
    assert result.ids


def test_a_stream_may_be_interrupted_before_and_after_all(completer):
    stream = completer.stream(text.complete(TOKENIZER, "ab"), ENDLESS)
    result = stream.interrupt()
    assert (result.ids, result.finish_reason) == ((), "interrupted")
    assert list(stream) == []
    stream = completer.stream(text.complete(TOKENIZER, "ab"), GREEDY)
    assert stream.finish() is stream.interrupt()
    assert stream.result.finish_reason in ("length", "stop")


def test_a_stream_of_two_readers_has_each_piece_once(completer):
    prompt = text.complete(TOKENIZER, "ab")
    options = {**GREEDY, "max_tokens": 60}
    stream = completer.stream(prompt, options)
    with ThreadPoolExecutor(2) as pool:
        pieces = [piece for part in pool.map(lambda _: list(stream), range(2)) for piece in part]
    (whole,) = completer.complete([prompt], options)
    assert stream.result.ids == whole.ids
    assert sorted("".join(pieces)) == sorted(whole.text)
