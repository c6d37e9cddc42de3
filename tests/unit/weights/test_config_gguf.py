"""Metadata of a GGUF <-> decoders: what is written is read, and what the format cannot say is refused."""

from dataclasses import replace

import pytest

from gemkit import family
from gemkit.errors import ConfigError, WeightsError
from gemkit.weights.config_gguf import from_gguf, to_gguf

TEXT = [m.name for m in family.members() if m.vision is None and not m.decoder.recurrent]


@pytest.mark.parametrize("name", TEXT)
def test_members_are_written_and_read(name):
    decoder = family.get(name).decoder
    read = from_gguf(to_gguf(decoder), decoder.vocab_size, name)
    scale = {"scale": decoder.attention[0].scale}
    assert abs(read.attention[0].scale - scale["scale"]) < 1e-9
    assert family.replace_layers(read, attention=scale) == decoder


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"attention": {"scale": 1.0}}, "scale in the mixer of layer 0"),
        ({"attention": {"window": 7}}, "window in the mixer of layer"),
        ({"attention": {"qk_norm": True}}, "qk_norm|window|softcap|rope"),
    ],
)
def test_what_no_architecture_has_is_refused(change, where):
    decoder = family.replace_layers(family.get("gemma-2-2b").decoder, **change)
    with pytest.raises(ConfigError, match=rf"no GGUF of architecture .* can express this decoder: its ({where})"):
        to_gguf(decoder)


def test_a_missing_cap_is_the_architectures_own():
    """A GGUF of gemma2 cannot say that there is none: a key that is left out means 50 and 30."""
    decoder = replace(family.get("gemma-2-2b").decoder, final_softcap=None)
    with pytest.raises(ConfigError, match="its final_softcap is None, and would be read as 30"):
        to_gguf(decoder)


def test_a_recurrence_has_no_architecture():
    with pytest.raises(ConfigError, match="no GGUF architecture has the recurrence"):
        to_gguf(family.get("recurrentgemma-2b").decoder)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"general.architecture": "llama"}, WeightsError, "'llama' is not one that is read here"),
        ({"gemma2.block_count": 5000}, ConfigError, "block_count=5000 is beyond any member"),
        ({"gemma2.block_count": -1}, WeightsError, "must be a whole number from 1"),
        ({"gemma2.embedding_length": None}, WeightsError, "embedding_length is missing"),
        ({"gemma2.attention.value_length": 128}, ConfigError, "key_length=256 and value_length=128 differ"),
        ({"gemma2.rope.scaling.type": "yarn"}, ConfigError, "known: none, linear"),
        ({"gemma2.rope.freq_base": "fast"}, WeightsError, "must be a number"),
    ],
)
def test_other_files_are_refused(change, error, message):
    decoder = family.get("gemma-2-2b").decoder
    with pytest.raises(error, match=message):
        from_gguf({**to_gguf(decoder), **change}, decoder.vocab_size, "x.gguf")
