"""Configurations of published formats: decoders that they cannot express are refused when written."""

from dataclasses import replace

import pytest

from gemkit import family
from gemkit.errors import ConfigError
from gemkit.weights import config_hf


def with_layer(decoder: family.DecoderConfig, i: int, mixer: dict | None = None, ffw: dict | None = None):
    layer = decoder.layers[i]
    layer = family.Layer(replace(layer.mixer, **(mixer or {})), replace(layer.ffw, **(ffw or {})))
    return replace(decoder, layers=(*decoder.layers[:i], layer, *decoder.layers[i + 1 :]))


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-2-2b", "gemma-3-1b", "recurrentgemma-2b"])
@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"mixer": {"head_dim": 512}}, "head_dim in the mixer of layer 5"),
        ({"mixer": {"heads": 2, "kv_heads": 2}}, "heads in the mixer of layer 5"),
        ({"mixer": {"scale": 1.0}}, "scale in the mixer of layer 5"),
        ({"mixer": {"softcap": 7.0}}, "softcap in the mixer of layer 5"),
        ({"mixer": {"reach": "all", "window": None}}, r"(reach|window) in the mixer of layer 5"),
        ({"ffw": {"width": 64}}, "width in the ffw of layer 5"),
    ],
)
def test_layers_that_differ_in_shape_are_not_written(name, change, where):
    mixed = with_layer(family.get(name).decoder, 5, **change)
    with pytest.raises(ConfigError, match=f"can express this decoder: its {where}"):
        config_hf.to_hf(mixed)


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-2-27b", "gemma-3-4b", "recurrentgemma-9b"])
def test_members_are_written_and_read(name):
    decoder = family.get(name).decoder
    read = config_hf.from_hf(config_hf.to_hf(decoder), name)
    assert all(abs(a.scale - b.scale) < 1e-9 for a, b in zip(read.attention, decoder.attention, strict=True))
    assert family.replace_layers(read, attention={"scale": decoder.attention[0].scale}) == decoder
