"""Metadata of a GGUF <-> decoders: what is written is read, and what the format cannot say is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest

from gemkit import family
from gemkit.errors import ConfigError, WeightsError
from gemkit.family import Rope, Yarn
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
        ({"attention": {"rope": Rope(fraction=0.5)}}, "rope in the mixer of layer 0"),
        ({"attention": {"rope": Rope(dynamic=2.0)}}, "rope in the mixer of layer 0"),
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
        ({"gemma2.rope.scaling.type": "su"}, ConfigError, "known: none, linear, yarn"),
        ({"gemma2.rope.freq_base": "fast"}, WeightsError, "must be a number"),
    ],
)
def test_other_files_are_refused(change, error, message):
    decoder = family.get("gemma-2-2b").decoder
    with pytest.raises(error, match=message):
        from_gguf({**to_gguf(decoder), **change}, decoder.vocab_size, "x.gguf")


def changed(name, **changes):
    decoder = family.get(name).decoder
    kind = to_gguf(decoder)["general.architecture"]
    keys = {f"{kind}.{key.replace('__', '.')}": value for key, value in changes.items()}
    notes = []
    metadata = {key: value for key, value in {**to_gguf(decoder), **keys}.items() if value is not None}
    return from_gguf(metadata, decoder.vocab_size, "x.gguf", notes), notes


def test_a_factor_without_a_type_stretches_linearly():
    for keys in ({"rope__scaling__factor": 4.0}, {"rope__scale_linear": 4.0}):
        decoder, _ = changed("gemma-2-2b", rope__scaling__type=None, **keys)
        assert {mixer.rope for mixer in decoder.attention} == {Rope(10_000.0, 4.0)}
    decoder, _ = changed("gemma-2-2b", rope__scaling__type="none", rope__scaling__factor=4.0)
    assert {mixer.rope for mixer in decoder.attention} == {Rope(10_000.0)}


def test_yarn_stretches_the_layers_without_a_window():
    keys = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__scaling__original_context_length": 8192}
    decoder, _ = changed("gemma-3-1b", **keys)
    full = next(mixer.rope for mixer in decoder.attention if mixer.window is None)
    assert full == Rope(1_000_000.0, 4.0, yarn=Yarn(8192, 0.1 * math.log(4) + 1))
    assert {mixer.rope for mixer in decoder.attention if mixer.window} == {Rope(10_000.0)}
    assert from_gguf(to_gguf(decoder), decoder.vocab_size, "x") == decoder


def test_a_gemma3_without_a_window_has_none():
    decoder, _ = changed("gemma-3-1b", attention__sliding_window=None)
    assert decoder.windows == ()
    assert {mixer.rope for mixer in decoder.attention} == {Rope(1_000_000.0)}
    assert changed("gemma-2-2b", attention__sliding_window=None)[0].windows == (4096,)  # of gemma2 it is implied


@pytest.mark.parametrize("pattern", [3, np.array([True, True, False] * 9)])
def test_a_pattern_of_windows_in_the_metadata_counts(pattern):
    decoder, _ = changed("gemma-3-1b", attention__sliding_window_pattern=pattern)
    assert [mixer.window is None for mixer in decoder.attention] == [i % 3 == 2 for i in range(26)]
    assert from_gguf(to_gguf(decoder), decoder.vocab_size, "x") == decoder


def test_what_ollama_leaves_out_of_its_larger_files_is_as_published():
    """Its conversions have the local base under another key, and no factor."""
    keys = {"rope__freq_base": None, "rope__freq_base_swa": None, "rope__local__freq_base": 10_000.0}
    keys |= {"rope__global__freq_base": 1e6, "rope__scaling__type": None, "rope__scaling__factor": None}
    decoder, notes = changed("gemma-3-4b", mm__tokens_per_image=256, **keys)
    assert decoder == replace(family.get("gemma-3-4b").decoder)
    assert notes == ["x.gguf: rope.scaling.factor: is not in this file of Ollama's; the published factor of 8 is used"]


def test_a_base_that_is_not_in_the_file_is_noted():
    decoder, notes = changed("gemma-3-1b", rope__freq_base=None)
    assert decoder.attention[5].rope.base == 1_000_000.0
    assert notes == ["x.gguf: rope.freq_base: is not in the file; the published 1,000,000 is used"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope__dimension_count": 128}, "rope.dimension_count=128 of heads of 256"),
        ({"attention__sliding_window_pattern": np.array([1, 0])}, "has 2 int64; one truth value a layer"),
        ({"attention__causal": False}, r"gemma3\.attention\.causal=False is not implemented: text that sees"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50, and llama.cpp's gemma3 has no such cap"),
        ({"expert_count": 8}, r"gemma3\.expert_count=8 is not implemented: of other architectures"),
        ({"rope__scaling__type": "longrope"}, "'longrope' is not implemented; known: none, linear, yarn"),
    ],
)
def test_settings_that_are_not_implemented_are_refused(keys, message):
    with pytest.raises((ConfigError, WeightsError), match=message):
        changed("gemma-3-1b", **keys)


def test_a_cap_that_llama_cpp_would_ignore_is_not_written():
    decoder = family.replace_layers(family.get("gemma-2-2b").decoder, attention={"qk_norm": True})
    with pytest.raises(ConfigError, match=r"llama\.cpp's gemma3 has no such cap"):
        to_gguf(decoder)
