"""Keras' layout maps: each device holds the numbers that Keras gives it (data/keras_layouts.json, by Keras' own code on
eight simulated devices: golden_keras_layouts.py)."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gemkit import family
from gemkit.errors import ConfigError
from gemkit.family import replace_layers
from gemkit.parallel.keras import MAPS, _variable, from_keras
from gemkit.parallel.mesh import Mesh

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "keras_layouts.json").read_text())
KV_HEADS = {"gemma-7b": 8, "gemma-2-2b": 4, "gemma-3-4b": 4, "gemma-2b": 1}


def small(name, ffw):
    """The decoder of the sizes that Keras was asked about."""
    real = family.get(name).decoder
    heads = {"heads": 8, "kv_heads": KV_HEADS[name], "head_dim": 6}
    return replace_layers(
        replace(real, vocab_size=64, width=32, layers=real.layers[:2]), attention=heads, ffw={"width": ffw}
    )


def as_ours(numbered, path):
    """A kernel of Keras in our order of axes, from the shapes alone."""
    if path.endswith("attention_output/kernel"):
        return numbered.reshape(-1, numbered.shape[2]).T  # (heads, size, out)
    if numbered.ndim == 3:
        return numbered.transpose(0, 2, 1).reshape(-1, numbered.shape[1])  # (heads, in, size)
    return numbered.T if path.endswith("kernel") else numbered


def test_the_published_maps_are_those_that_keras_was_asked_with():
    assert {name: {k: list(v) for k, v in map_.items()} for name, map_ in MAPS.items()} == GOLDEN["maps"]


@pytest.mark.parametrize("case", GOLDEN["placed"], ids=lambda c: f"{c['member']}-{c['map']}-{c['mesh'][0]}")
def test_every_device_holds_the_numbers_that_keras_gives_it(case):
    weights = case["weights"]
    mesh = Mesh(tuple(case["mesh"]))
    if "refused" in weights:  # one key/value head on four devices, which Keras cannot; here it is whole on each
        decoder = small(case["member"], 24)
        found = from_keras(MAPS[case["map"]], decoder).place(mesh, decoder)
        assert "1 key/value head is not divided over model=4: k_proj and v_proj" in found.notes[0]
        return
    decoder = small(case["member"], weights["decoder_block_0/ffw_linear/kernel"]["shape"][0])
    found = from_keras(MAPS[case["map"]], decoder).place(mesh, decoder)
    assert found.without_rule == found.notes == ()
    seen = set()
    for name, weight in found.weights.items():
        variable = _variable(name)
        assert variable is not None
        seen.add(variable.path)
        of = weights[variable.path]
        numbered = np.arange(np.prod(of["shape"])).reshape(of["shape"])
        ours = as_ours(numbered, variable.path)
        assert ours.shape == weight.shape
        for device, spans in enumerate(of["devices"]):
            theirs = numbered[tuple(slice(*span) for span in spans)]
            assert np.array_equal(ours[weight.place(mesh, device)], as_ours(theirs, variable.path)), (name, device)
    assert seen == set(weights)


def test_images_and_recurrences_have_no_names_there():
    member = family.get("paligemma-3b-pt-224")
    found = from_keras(MAPS["keras-hub"], member.decoder, member.vision).place(
        Mesh.parse("1x8"), member.decoder, member.vision
    )
    assert found.weights["language_model.layers.0.self_attn.q_proj.weight"].local == (256, 2048)
    assert {name.split(".")[0] for name in found.without_rule} == {"vision_tower", "multi_modal_projector"}
    decoder = family.get("recurrentgemma-9b").decoder
    found = from_keras(MAPS["announcement"], decoder).place(Mesh.parse("1x8"), decoder)
    assert any("recurrent" in name for name in found.without_rule)
    assert "no rule of the layout matches" in found.notes[-1]


def test_data_is_our_batch_and_missing_axes_are_whole():
    decoder = family.get("gemma-7b").decoder
    found = from_keras({"token_embedding/embeddings": ("data",)}, decoder).place(Mesh.parse("2x4"), decoder)
    assert found.weights["embed_tokens.weight"].local == (128_000, 3072)


def test_an_exact_path_comes_before_expressions():
    decoder = family.get("gemma-7b").decoder
    keys = {"decoder_block_3/ffw_linear/kernel": (None, None), ".*ffw_linear/kernel": ("model", None)}
    found = from_keras(keys, decoder).place(Mesh.parse("1x8"), decoder).weights
    assert found["layers.3.mlp.down_proj.weight"].local == (3072, 24_576)
    assert found["layers.4.mlp.down_proj.weight"].local == (3072, 3072)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({".*kernel": (None,), ".*query.*": (None,)}, "'decoder_block_0/attention/query/kernel' matches several keys"),
        (
            {"ffw_linear/kernel": ("model", None)},
            "matches no path of this model as a whole; did you mean decoder_block",
        ),
        ({".*ffw_linear/kernel": ("model", None, None)}, "has 3 axes, and decoder_block_0/ffw_linear/kernel has 2"),
        ({".*query/kernel": (None, None, "model")}, "divides the inside of every head of decoder_block_0/attention/q"),
        ({".*ffw_linear/kernel": ("rows", None)}, "axis 'rows' of key .* is not one of data, pod, batch, model"),
        ({".*ffw_linear/kernel": ("model", "model")}, "names axis 'model' twice"),
        ({"(": ()}, "no regular expression"),
    ],
)
def test_a_map_that_does_not_fit(keys, message):
    with pytest.raises(ConfigError, match=message):
        from_keras(keys, family.get("gemma-7b").decoder)
