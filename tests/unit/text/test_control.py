"""Control tokens found and broken in text."""

import time

from hypothesis import given
from hypothesis import strategies as st

from gemkit.text.control import Breaker, ControlTable

PIECES = ["<a>", "<aa>", "<|x|>", "[B]", "<a"]
MARK = "\ufdd0"
BREAKER = Breaker(ControlTable(PIECES), MARK)
TEXTS = st.text(alphabet="<>a|xB[] \n", max_size=12)


def test_the_longest_of_those_that_begin_at_one_place_is_found():
    assert BREAKER.controls("<a><aa><a [B]") == [(0, 3), (3, 7), (7, 9), (10, 13)]
    assert BREAKER.controls("a" + MARK) == []


@given(st.lists(TEXTS, max_size=3))
def test_broken_texts_make_no_control_token_alone_joined_or_trimmed(texts):
    broken = [BREAKER.content(text) for text in texts]
    assert [text.replace(MARK, "") for text in broken] == texts
    for join in ("", "<", "<|x|", ">"):
        for made in (broken, [text.strip() for text in broken]):
            whole = join.join(made)
            assert all(whole[a:b] in join for a, b in BREAKER.controls(whole)), whole


def test_a_text_without_spellings_stays_as_it_is():
    for text in ("", "plain", "1 < 2", "x <b> y", " spaced "):
        assert BREAKER.text(text) == text
    assert BREAKER.values({"k": ["x ", 1, None, {"y": True}]}) == {"k": ["x ", 1, None, {"y": True}]}
    assert BREAKER.controls(str(BREAKER.values({"<a>": ["<|x|>"]}))) == []


def test_a_text_full_of_them_takes_no_longer_than_its_length():
    began = time.process_time()
    assert BREAKER.controls(BREAKER.text("<a>" * 300_000)) == []
    assert time.process_time() - began < 5
