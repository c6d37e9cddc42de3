"""Stop strings against the definition spelled out: no stream, no buffer, one character after the other."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gemkit.errors import ConfigError
from gemkit.generate import StopStrings

strings = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4)
pieces = st.lists(st.text("ab\n", max_size=5), max_size=12)


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """At the first character that completes a stop string, before the longest one that ends there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def stream(parts: list[str], stops: list[str]) -> tuple[list[str], str | None]:
    watch = StopStrings(stops)
    out = [watch.push(part) for part in parts]
    return [*out, watch.finish()], watch.matched


@given(pieces, strings)
@example(["a", "b", "a", "b", "\n"], ["abab\n", "ba"])  # the longer one begins first, the shorter one ends first
@example(["abab\n"], ["abab\n", "ba"])  # and the same text in one piece
@example(["aa", "b"], ["aab", "ab", "b"])
def test_the_outcome_is_that_of_the_definition_however_the_text_is_cut(parts, stops):
    out, matched = stream(parts, stops)
    assert ("".join(out), matched) == cut("".join(parts), stops)


@given(pieces, strings)
def test_without_nested_stop_strings_the_cut_is_the_earliest_occurrence(parts, stops):
    stops = [s for s in stops if not any(s != other and s in other for other in stops)]
    text = "".join(parts)
    earliest = min((at for s in stops if (at := text.find(s)) >= 0), default=len(text))
    assert "".join(stream(parts, stops)[0]) == text[:earliest]


@given(pieces, strings)
def test_text_is_held_back_only_while_it_may_become_a_stop_string(parts, stops):
    watch, seen, out = StopStrings(stops), "", ""
    for part in parts:
        seen, out = seen + part, out + watch.push(part)
        if watch.matched is not None:
            return
        assert seen.startswith(out)
        held = seen[len(out) :]
        assert not held or any(s.startswith(held) for s in stops)
        assert not any(s.startswith(seen[i:]) for s in stops for i in range(len(out)))


def test_a_stop_string_over_several_tokens_is_neither_emitted_nor_missed():
    assert stream(["Yes.", "\n", "\nUs", "er", ": no"], ["\n\nUser:"]) == (["Yes.", "", "", "", "", ""], "\n\nUser:")
    assert stream(["Yes.", "\n", "\nUs", "e"], ["\n\nUser:"]) == (["Yes.", "", "", "", "\n\nUse"], None)


@pytest.mark.parametrize("bad", [[""], ["a", ""], [1], "User:"])
def test_what_is_no_stop_string_is_refused(bad):
    with pytest.raises(ConfigError, match="stop_strings"):
        StopStrings(bad)
