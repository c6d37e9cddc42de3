"""The dataclasses of a member: what cannot be written, and how layers are made and changed."""

from dataclasses import replace

import pytest

from gemkit.errors import ConfigError
from gemkit.family import Attention, DecoderConfig, Global, Layer, Mlp, Recurrent, Rope, Sliding, repeat, replace_layers

HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 8, "scale": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 0}, "heads=0 of attention must be a whole number from 1"),
        ({"head_dim": 8.0}, "head_dim=8.0"),
        ({"kv_heads": True}, "kv_heads=True"),
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"scale": 0.0}, "scale=0.0 of attention must be positive and finite"),
        ({"softcap": -1.0}, "softcap=-1.0 must be positive, or None"),
        ({"window": 0}, "window=0"),
        ({"reach": "future"}, "reach='future' of attention is not one of past, both, all"),
        ({"reach": "both"}, "'both' needs a window"),
        ({"reach": "all", "window": 4}, "'all' has none"),
        ({"rope": Rope(fraction=0.3)}, "of head_dim=8 is not an even number"),
        ({"rope": Rope(base=0.0)}, "needs a positive base and factor"),
    ],
)
def test_attention_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        Attention(**{**HEADS, **changes})


@pytest.mark.parametrize("numbers", [{"width": 0}, {"width": 9}, {"conv_width": 0}, {"num_blocks": 3}])
def test_a_recurrence_that_cannot_be(numbers):
    with pytest.raises(ConfigError):
        Recurrent(**{"width": 8, "num_blocks": 2, **numbers})


def test_global_and_sliding_are_names_of_attention():
    assert Global(**HEADS) == Attention(4, 2, 8, 0.5)
    assert Sliding(5, **HEADS) == Attention(4, 2, 8, 0.5, window=5)
    assert [mixer.kind for mixer in (Global(**HEADS), Sliding(5, **HEADS), Recurrent(8, 2))] == [
        "global",
        "sliding",
        "recurrent",
    ]
    with pytest.raises(TypeError, match="window"):
        Sliding(**HEADS)


def decoder(*mixers, **changes) -> DecoderConfig:
    layers = repeat(*mixers, ffw=Mlp(16), total=len(mixers))
    return DecoderConfig(**{"vocab_size": 32, "width": 12, "layers": layers, "max_context": 64, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width=0 of the decoder"),
        ({"layers": ()}, "has at least one layer"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
        ({"final_softcap": 0.0}, "final_softcap=0.0 must be positive"),
    ],
)
def test_a_decoder_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        decoder(Global(**HEADS), **changes)


def test_a_pattern_is_repeated_and_cut():
    sliding, full = Sliding(5, **HEADS), Global(**HEADS)
    assert repeat(sliding, full, ffw=Mlp(3), total=3) == tuple(
        Layer(mixer, Mlp(3)) for mixer in (sliding, full, sliding)
    )


def test_a_decoder_lists_its_mixers():
    sliding, recurrent = Sliding(5, **HEADS), Recurrent(8, 2)
    config = decoder(sliding, recurrent, replace(sliding, window=2), Global(**HEADS))
    assert [mixer.window for mixer in config.attention] == [5, 2, None]
    assert config.recurrent == (recurrent,)
    assert config.windows == (2, 5)


def test_numbers_of_all_layers_change_together():
    config = decoder(Sliding(5, **HEADS), Recurrent(8, 2))
    changed = replace_layers(config, attention={"heads": 2}, recurrent={"width": 4}, ffw={"width": 7})
    assert changed.layers == (Layer(Sliding(5, **{**HEADS, "heads": 2}), Mlp(7)), Layer(Recurrent(4, 2), Mlp(7)))
    assert replace(changed, layers=config.layers) == config
