"""Comparisons: differences add up, and what is said is true."""

import itertools

import pytest
import torch

from gemkit.errors import ConfigError, UnknownModelError
from gemkit.family import members
from gemkit.inspect import cost, subject, units
from gemkit.inspect.compare import compare, pattern, walk
from gemkit.inspect.explain import EXPLANATIONS, bfloat16, explanation

DISTINCT = list({(m.decoder, m.vision): m.name for m in members() if "pt-448" not in m.name}.values())


def rows(*names):
    return {row.key: row for row in compare([subject(name) for name in names])}


@pytest.mark.parametrize(("a", "b"), list(itertools.pairwise([*DISTINCT, *reversed(DISTINCT)])))
def test_what_differences_cost_adds_up(a, b):
    a, b = subject(a), subject(b)
    steps = [delta for delta in walk(a, b).values() if delta is not None]
    parameters = cost.count(b.decoder, b.vision).total - cost.count(a.decoder, a.vision).total
    cache = cost.cache_bytes_per_token(b.decoder).total - cost.cache_bytes_per_token(a.decoder).total
    assert (sum(d.parameters for d in steps), sum(d.cache for d in steps)) == (parameters, cache)


def test_heads_that_cannot_change_alone_change_with_the_next():
    steps = walk(subject("gemma-7b"), subject("gemma-2-2b"))  # 8 heads on 16 key/value heads is no decoder
    assert steps["heads"] is None
    assert steps["kv_heads"].cache < 0


def test_2b_against_7b():
    found = rows("gemma-2b", "gemma-7b")
    assert found["kv_heads"].values == ("1 (MQA, 8 heads each)", "16 (MHA)")
    assert found["head_dim"].values == ("256 (x 8 = width)", "256 (x 16 = 4,096)")
    assert not found["vocabulary"].differs
    assert found["ffw_width"].differs
    assert found["ffw_width"].costs == ("+2.11B",)  # 28 layers x 3 matrices x 3072 x 8192 more = 2,113,929,216
    assert "window" not in found  # neither has one


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gemma-2b", "18 global"),
        ("gemma-2-2b", "13 x (sliding, global)"),
        ("gemma-3-4b", "5 x (5 sliding, global) + 4 sliding"),
        ("gemma-3-12b", "8 x (5 sliding, global)"),
        ("recurrentgemma-2b", "8 x (2 recurrent, sliding) + 2 recurrent"),
    ],
)
def test_patterns(name, said):
    assert pattern(subject(name).decoder.layers) == said


def test_confusions_are_said_where_they_arise():
    found = rows("gemma-2b", "gemma-7b")
    assert any("32,768" in note and note.startswith("gemma-2b:") for note in found["ffw_width"].confusions)
    assert any("width / heads = 192" in note for note in found["head_dim"].confusions)
    assert any("256,128" in note for note in found["vocabulary"].confusions)
    assert any("9,437,184" in note for note in found["heads"].confusions)
    assert any("post_attention_layernorm" in note for note in found["norms"].confusions)
    assert rows("gemma-3-1b", "gemma-3-4b")["norms"].confusions == ()
    assert any("= 12." in note for note in rows("gemma-2-9b", "gemma-2-27b")["query_scale"].confusions)


def test_where_a_recurrence_pays():
    row = rows("gemma-2b", "recurrentgemma-2b")["crossing"]
    assert row.values[1] == "from 20,108 (state alone: from 46)"
    back = rows("recurrentgemma-2b", "gemma-2b")["crossing"]
    assert back.values[1] == "below 20,108 (state alone: below 46)"
    assert "crossing" not in rows("gemma-2b", "gemma-7b")


def test_every_row_explains_itself_and_no_explanation_is_left_over():
    everything = rows("gemma-2b", "recurrentgemma-2b", "paligemma2-3b-pt-224", "gemma-3-4b")
    assert set(everything) == set(EXPLANATIONS)
    for key in EXPLANATIONS:
        assert explanation(key).endswith(".")
        assert "  " not in explanation(key)


def test_one_model_is_no_comparison():
    with pytest.raises(ConfigError, match="at least two"):
        compare([subject("gemma-2b")])


def test_neither_a_member_nor_a_path():
    with pytest.raises(UnknownModelError, match="gemma-7b"):
        subject("gemma-7bb")


@pytest.mark.parametrize("width", [640, 768, 1152, 2048, 2304, 2560, 3072, 3584, 3840, 4096, 4608, 5376])
def test_bfloat16_rounds_as_torch_does(width):
    assert bfloat16(width**0.5) == torch.tensor(width**0.5).bfloat16().item()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (units.exact(2_506_172_416), "2,506,172,416"),
        (units.short(640), "640"),
        (units.short(999_949), "1.00M"),
        (units.short(268_098_176), "268M"),
        (units.short(-2_506_172_416), "-2.51B"),
        (units.memory(17.25e6), "17.2 MB"),
        (units.memory(0), "0 B"),
        (units.flops(5.012e9), "5.01 GFLOP"),
        (units.kib(18_432), "18 KiB"),
    ],
)
def test_units(said, expected):
    assert said == expected
