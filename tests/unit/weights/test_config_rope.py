"""Ropes through `config.json` and back; their numbers against Transformers are in tests/parity/test_folders.py."""

from dataclasses import replace

import pytest

from gemkit import family
from gemkit.errors import ContextError, WeightsError
from gemkit.family import Rope, Yarn, replace_layers
from gemkit.weights.config_hf import from_hf, to_hf
from gemkit.weights.config_rope import rope_to_hf, yarn_attention_factor

YARN = Rope(1e6, factor=4.0, yarn=Yarn(4096, yarn_attention_factor(4.0), beta_fast=16.0))
ROPES = {"linear": Rope(5e4, factor=3.0), "dynamic": Rope(5e4, dynamic=2.0), "yarn": YARN}


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-2-2b", "gemma-3-1b-pt"])
@pytest.mark.parametrize(
    "rope", [Rope(5e4, factor=3.0), Rope(5e4, dynamic=2.0), YARN], ids=["linear", "dynamic", "yarn"]
)
def test_stretched_ropes_are_written_and_read(name, rope):
    decoder = replace_layers(family.get(name).decoder, attention={"rope": rope})
    assert from_hf(to_hf(decoder), name) == decoder


def test_untruncated_yarn_is_written_and_read():
    rope = replace(YARN, yarn=replace(YARN.yarn, truncate=False))
    decoder = replace_layers(family.get("gemma-3-1b-pt").decoder, attention={"rope": rope})
    assert from_hf(to_hf(decoder), "config.json") == decoder


def test_a_dynamic_rope_ends_at_the_context():
    decoder = replace_layers(family.get("gemma-2b").decoder, attention={"rope": Rope(dynamic=2.0)})
    decoder.check_length(8192)
    with pytest.raises(ContextError, match=r"8,193 tokens.*dynamically"):
        decoder.check_length(8193)


def test_the_ends_of_a_ramp_are_those_of_the_paper():
    # arXiv:2309.00071, section 3.2: pair d turns context / (2 pi base**(2d/R)) times
    low, high = Yarn(4096, truncate=False).ramp(rotated=128, base=10_000.0)
    for pair, turns in ((low, 32), (high, 1)):
        assert 4096 / (2 * 3.141592653589793 * 10_000 ** (2 * pair / 128)) == pytest.approx(turns)
    assert Yarn(4096).ramp(128, 10_000.0) == (int(low), int(high) + 1)


def test_a_section_that_is_none_is_refused():
    with pytest.raises(WeightsError, match="rope_scaling='linear' must be an object"):
        from_hf({**to_hf(family.get("gemma-2b").decoder), "rope_scaling": "linear"}, "config.json")


def test_plain_ropes_say_no_factor():
    assert rope_to_hf(Rope(1e4)) == {"rope_theta": 1e4, "rope_type": "default"}
