"""What the contract itself checks: spans, images and ids of chunks, and the stop flag."""

import ctypes
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemkit.errors import ConfigError, TextError
from gemkit.executors.interface import Chunk, StopFlag, check_ids, span_rows
from support.fake_executors import tiny_decoder


@pytest.mark.parametrize(
    ("spans", "position", "count", "rows"),
    [
        ([], 0, 4, []),
        ([(0, 3)], 0, 4, [(0, 3)]),
        ([(2, 4), (5, 6)], 1, 6, [(1, 3), (4, 5)]),
        ([(0, 3)], 3, 2, []),  # wholly before
        ([(4, 9)], 0, 4, []),  # wholly after
        ([(0, 2), (2, 5), (8, 9)], 2, 3, [(0, 3)]),
    ],
)
def test_the_rows_of_spans(spans, position, count, rows):
    assert span_rows([Chunk(7, [1] * count, spans=spans)], {7: position}) == rows


def test_rows_are_counted_over_all_chunks():
    chunks = [Chunk(1, [1, 2], spans=[(0, 2)]), Chunk(0, [1]), Chunk(4, [1, 2, 3], spans=[(6, 8)])]
    assert span_rows(chunks, {0: 3, 1: 0, 4: 5}) == [(0, 2), (4, 6)]


@given(st.integers(0, 12), st.integers(1, 12), st.integers(0, 12), st.integers(1, 12))
def test_a_span_is_refused_if_and_only_if_a_chunk_cuts_it(position, count, start, length):
    chunk, end, until = Chunk(0, [1] * count, spans=[(start, start + length)]), start + length, position + count
    inside, outside = position <= start and end <= until, end <= position or until <= start
    if inside or outside:
        assert span_rows([chunk], {0: position}) == ([(start - position, end - position)] if inside else [])
    else:
        with pytest.raises(ConfigError, match=f"the span of tokens {start} to {end} is cut by a chunk of those from"):
            span_rows([chunk], {0: position})


@pytest.mark.parametrize("spans", [[(1, 1)], [(2, 1)], [(-1, 2)], [(0, 2), (1, 3)], [(2, 3), (0, 1)]])
def test_spans_must_ascend_and_be_disjoint(spans):
    with pytest.raises(ConfigError, match="ascending and disjoint"):
        span_rows([Chunk(0, [1, 2, 3], spans=spans)], {0: 0})


def test_ids_must_be_of_the_vocabulary():
    check_ids([0, 11], tiny_decoder())
    for ids in ([12], [3, -1]):
        with pytest.raises(TextError, match="token ids run from 0 to 11"):
            check_ids(ids, tiny_decoder())


def test_a_stop_flag_is_seen_from_any_thread_and_by_native_code():
    flag, other = StopFlag(), StopFlag()
    word = ctypes.cast(flag.address, ctypes.POINTER(ctypes.c_int32))
    assert (flag.is_set(), word[0]) == (False, 0)
    thread = threading.Thread(target=flag.set)
    thread.start()
    thread.join()
    assert flag.is_set()
    assert word[0] != 0
    assert not other.is_set()
