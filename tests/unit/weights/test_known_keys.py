"""The reader of tables of keys."""

import numpy as np
import pytest

from gemkit.errors import ConfigError, WeightsError
from gemkit.weights.known_keys import Key, check_keys, find, ignored, noted, refused, used

TABLE = {
    **used("its use", "width", "part.size"),
    **ignored("its reason", "part.*"),
    **refused("a reason", ["mode", "part.mode"], 0, "plain"),
    **noted("a note", ["limit"], []),
}


def test_a_name_has_its_own_entry_before_that_of_its_beginning():
    assert find(TABLE, "part.size").effect == "used"
    assert find(TABLE, "part.mode").effect == "refused"
    assert find(TABLE, "part.else").effect == "ignored"
    assert find(TABLE, "parts") is None


def test_neutral_values_say_nothing():
    said = {"width": 3, "part.name": "x", "mode": "plain", "part.mode": 0, "limit": [], "x.mode": None}
    assert check_keys(said, TABLE, "f", prefix="x.") == []


@pytest.mark.parametrize("value", ["odd", [1], np.arange(3)])
def test_a_refused_value_is_an_error(value):
    with pytest.raises(WeightsError, match=r"f: x\.mode=.* is not implemented: a reason"):
        check_keys({"x.mode": value}, TABLE, "f", prefix="x.", error=WeightsError)


def test_notes_name_the_key_and_its_value():
    assert check_keys({"limit": [1] * 99, "b": 1, "a": 2}, TABLE, "f") == [
        "f: limit=(list) is not used: a note",
        "f: not known here, and not used: a, b",
    ]


def test_unknown_keys_may_be_refused():
    strict = Key("refused", "it is new", (False,))
    assert check_keys({"novel": False}, TABLE, "f", unknown=strict) == []
    with pytest.raises(ConfigError, match=r"novel=1\.5 is not implemented: it is new"):
        check_keys({"novel": 1.5}, TABLE, "f", unknown=strict)
