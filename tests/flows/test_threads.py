"""One process, several threads: calls of the native executor take turns, and every answer is the one it is alone.

The starter model, since its output table is large enough to be screened: the executor then writes to more arrays of the
call. At test size the same is seen by `tests/sanitize.py threads`.
"""

import asyncio
import threading
import time

import pytest

import gemkit
from gemkit.errors import Stopped
from gemkit.executors.interface import Chunk, StopFlag

PROMPTS = ["The capital", "Once upon", "Roses", "1 + 1"]
TOKENS = 2
ROUNDS = 50


@pytest.fixture(scope="module")
def model():
    return gemkit.load(executor="native")


@pytest.fixture(scope="module")
def alone(model):
    return [model.generate(prompt, max_tokens=TOKENS).text for prompt in PROMPTS]


def in_threads(work, count: int) -> None:
    """`work(i)` in `count` threads at once; the first exception of any is raised."""
    errors: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("models", [1, 2])
def test_answers_of_four_threads_are_those_of_one(model, alone, models):
    asked = [model, gemkit.load(executor="native") if models == 2 else model]

    def ask(i: int) -> None:
        for turn in range(ROUNDS):
            which = (i + turn) % len(PROMPTS)
            assert asked[i % 2].generate(PROMPTS[which], max_tokens=TOKENS).text == alone[which]

    in_threads(ask, 4)


def test_streams_that_interleave(model, alone):
    """Every thread reads two streams in turn."""

    def read(i: int) -> None:
        which = i % 4, (i + 1) % 4
        streams = [model.stream(PROMPTS[w], max_tokens=TOKENS) for w in which]
        texts = ["", ""]
        for _ in range(TOKENS + 1):
            for k, stream in enumerate(streams):
                texts[k] += next(iter(stream), "")
        assert texts == [alone[w] for w in which]

    in_threads(read, 4)


def test_calls_of_an_event_loop(model, alone):
    async def ask_all() -> list[str]:
        calls = [asyncio.to_thread(model.generate, prompt, max_tokens=TOKENS) for prompt in PROMPTS * 3]
        return [result.text for result in await asyncio.gather(*calls)]

    assert asyncio.run(ask_all()) == alone * 3


def test_a_cancelled_call_leaves_the_others_as_they_are(model, alone):
    """Threads generate while a long prompt is computed in between and stopped; it alone ends."""
    executor, flag = model.executor, StopFlag()
    prompt = [2, *[1000 + i for i in range(4000)]]  # a minute of it
    ended: list[str] = []

    def work(i: int) -> None:
        if i == 0:
            state = executor.new_state(1)
            try:
                executor.run([Chunk(0, prompt)], state, stop=flag)
            except Stopped:
                ended.append("stopped")
            assert state.lengths == {0: 0}
            return
        time.sleep(0.05 * i)
        flag.set()
        for which in range(len(PROMPTS)):
            assert model.generate(PROMPTS[which], max_tokens=TOKENS).text == alone[which]

    in_threads(work, 4)
    assert ended == ["stopped"]
