"""New models: the tables of `[model.new]`, and what cannot be."""

import pytest

from gemkit.errors import ConfigError
from gemkit.family import Global, Layer, Mlp, Recurrent, Rope, Sliding, repeat
from gemkit.train.new_model import new_model

SIZES = {"width": 64, "ffw_width": 128, "heads": 4, "kv_heads": 2, "head_dim": 16, "max_context": 512}


def test_a_model_of_its_own():
    layers = [{"kind": "sliding", "window": 32, "rope": {"base": 5000}}, {"kind": "global"}]
    decoder, vision = new_model({**SIZES, "layers": layers, "depth": 3, "qk_norm": True}, 300)
    heads = {"heads": 4, "kv_heads": 2, "head_dim": 16, "scale": 0.25, "qk_norm": True}
    sliding = Sliding(32, rope=Rope(5000.0), **heads)
    assert decoder.layers == repeat(sliding, Global(**heads), ffw=Mlp(128), total=3)
    assert (decoder.vocab_size, vision) == (300, None)


def test_layers_of_their_own_shape():
    layers = [{"kind": "sliding", "window": 32}, {"kind": "global", "head_dim": 32, "kv_heads": 1, "softcap": 50}]
    decoder, _ = new_model({**SIZES, "layers": layers}, 300)
    assert decoder.attention == (
        Sliding(32, heads=4, kv_heads=2, head_dim=16, scale=0.25),
        Global(heads=4, kv_heads=1, head_dim=32, scale=32**-0.5, softcap=50.0),
    )


def test_a_model_like_a_member():
    decoder, _ = new_model({"like": "gemma-2-2b", **SIZES, "depth": 4}, 300)
    heads = {"heads": 4, "kv_heads": 2, "head_dim": 16, "scale": 0.25, "softcap": 50.0}
    assert decoder.layers == repeat(Sliding(4096, **heads), Global(**heads), ffw=Mlp(128), total=4)
    assert (decoder.final_softcap, decoder.post_norms) == (30.0, True)
    griffin, _ = new_model(
        {"like": "recurrentgemma-2b", "layers": [{"kind": "recurrent", "width": 64, "num_blocks": 4}]}, 9
    )
    assert griffin.layers == (Layer(Recurrent(64, 4), Mlp(7680)),)
    _, vision = new_model({"like": "paligemma-3b-pt-224", "vision": {"image_size": 28, "depth": 2}}, 9)
    assert vision is not None
    assert (vision.tower.image_size, vision.tower.depth, vision.tower.width) == (28, 2, 1152)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"widht": 3}, "there is no widht; did you mean width"),
        ({**SIZES}, "depth=0 must be"),
        ({"layers": [{"kind": "global"}]}, "heads is missing; `like` takes"),
        ({**SIZES, "layers": [{"kind": "global"}], "ffw_width": 0}, "width=0 of the feed-forward must be"),
        (
            {k: v for k, v in SIZES.items() if k != "width"} | {"layers": [{"kind": "global"}]},
            "width is missing; `like`",
        ),
        ({**SIZES, "layers": [{"kind": "sliding"}]}, r"layers\[0\]: window is missing"),
        ({**SIZES, "layers": [{"kind": "linear"}]}, "kind is one of global, sliding, recurrent"),
        ({**SIZES, "layers": [{"kind": "global", "window": 3}]}, r"layers\[0\]: there is no window"),
        ({"like": "gemma-9"}, "no member of the family is called 'gemma-9'"),
        ({"like": "gemma-2-2b", "depth": 10**9}, "depth=1000000000 must be"),
        ({"like": "gemma-2-2b", "kv_heads": 3}, "does not divide heads"),
        ({"like": "gemma-2-2b", "width": "wide"}, "width='wide': Expected `int`, got `str`"),
    ],
)
def test_models_that_cannot_be(values, message):
    with pytest.raises((ConfigError, LookupError), match=message):
        new_model(values, 300)
