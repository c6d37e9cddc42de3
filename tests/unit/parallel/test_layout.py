"""Which device holds which part of a weight: every member by the default rules, and what rules are refused."""

import re
from collections import Counter

import numpy as np
import pytest

from gemkit import family
from gemkit.errors import ConfigError
from gemkit.parallel.layout import Layout, Shard, default
from gemkit.parallel.mesh import Mesh


def placed(name, mesh="1x8", layout=None):
    member = family.get(name)
    layout = layout or default(member.decoder, member.vision)
    return layout.place(Mesh.parse(mesh), member.decoder, member.vision)


def architectures():
    return list({(m.decoder, m.vision): m.name for m in family.members()}.values())


@pytest.mark.parametrize("name", architectures())
def test_every_weight_of_every_member_has_a_rule(name):
    """A new kind of weight fails here: bring its rule."""
    found = placed(name)
    assert found.without_rule == ()
    member = family.get(name)
    assert {n: w.shape for n, w in found.weights.items()} == dict(family.parameters(member.decoder, member.vision))


@pytest.mark.parametrize("name", architectures())
def test_pairs_of_projections_fit_on_every_device(name):
    """What the first gives in pieces the second takes in the same pieces; a query head is where its key/value head is,
    or that one is everywhere."""
    found = placed(name, "1x4").weights

    def local(path, like, dim):
        return found[re.sub(r"[a-z_0-9]+(\.weight)$", rf"{path}\1", like)].local[dim]

    for weight in found:
        if weight.endswith("self_attn.o_proj.weight"):
            assert found[weight].local[1] == local("q_proj", weight, 0)
            assert local("k_proj", weight, 0) == local("v_proj", weight, 0)
        elif weight.endswith("mlp.down_proj.weight"):
            assert found[weight].local[1] == local("gate_proj", weight, 0) == local("up_proj", weight, 0)
        elif weight.endswith(("out_proj.weight", "fc2.weight")) and "vision_tower" in weight:
            assert found[weight].local[1] == local("q_proj" if "out_proj" in weight else "fc1", weight, 0)
        elif weight.endswith("recurrent.linear_out.weight"):
            r = found[weight].local[1]
            assert r == local("linear_x", weight, 0) == local("linear_y", weight, 0) == local("conv_1d", weight, 0)
            gate = found[weight.replace("linear_out", "rg_lru.input_gate")].local
            assert gate[0] * gate[2] == r


@pytest.mark.parametrize("name", ["gemma-2-2b", "recurrentgemma-9b", "paligemma-3b-pt-224"])
@pytest.mark.parametrize("mesh", ["2x4", "1x8", "2x2x2"])
def test_the_parts_of_a_weight_are_the_weight(name, mesh):
    """Every element of a numbered array is on as many devices as hold copies of it, and parts are those of JAX's
    NamedSharding: equal, in the order of the axis."""
    found = placed(name, mesh)
    layer = ("layers.0.", "layers.2.", "embeddings.", "norm.weight")
    for weight in (w for n, w in found.weights.items() if any(part in n for part in layer)):
        held = Counter[tuple[tuple[int, int], ...]]()
        for device in range(found.mesh.devices):
            place = weight.place(found.mesh, device)
            assert tuple(s.stop - s.start for s in place) == weight.local
            for shard in weight.shards:
                i = found.mesh.coordinates(device)[shard.axis]
                assert place[shard.dim].start == i * weight.shape[shard.dim] // found.mesh.size(shard.axis)
            held[tuple((s.start, s.stop) for s in place)] += 1
        parts = np.prod([found.mesh.size(shard.axis) for shard in weight.shards], dtype=int)
        assert set(held.values()) == {found.mesh.devices // parts}
        assert len(held) == parts
        assert len(held) * np.prod(weight.local) == np.prod(weight.shape)


def test_what_heads_cannot_divide_is_whole_and_said_once():
    assert placed("gemma-7b").notes == ()
    assert placed("gemma-2b").notes == (
        "1 key/value head is not divided over model=8: k_proj and v_proj are whole on each of the 8",
    )
    assert placed("gemma-2b").weights["layers.0.self_attn.k_proj.weight"].local == (256, 2048)
    recurrent = placed("recurrentgemma-2b").notes
    assert len(recurrent) == 3
    assert recurrent[0].startswith("10 blocks of the recurrence are not divided over model=8: linear_x, linear_y, conv")
    assert placed("paligemma-3b-pt-224", "1x32").notes[0].startswith("16 heads of the image tower are not divided over")
    (note,) = placed("gemma-7b", "1x7", Layout({"mlp": Shard(0, "model")})).notes[:1]
    assert note.startswith("24,576 elements of dim 0 are not divided over model=7: gate_proj and up_proj are whole")


def test_heads_are_whole_where_elements_are_not():
    """8 heads of 256 on 16 devices: half a head each by elements, none by heads."""
    halves = Layout({"q_proj": Shard(0, "model")})
    assert placed("gemma-2b", "1x16", halves).weights["layers.0.self_attn.q_proj.weight"].local == (128, 2048)
    assert placed("gemma-2b", "1x16").weights["layers.0.self_attn.q_proj.weight"].local == (2048, 2048)


def test_the_first_match_wins_and_the_rest_is_noted():
    layout = Layout({r"layers\.3\.mlp\.up": None, "up_proj": Shard(1, "model")})
    found = placed("gemma-2b", layout=layout)
    assert found.weights["layers.3.mlp.up_proj.weight"].local == (16_384, 2048)
    assert found.weights["layers.4.mlp.up_proj.weight"].local == (16_384, 256)
    assert found.notes[0].startswith("no rule of the layout matches embed_tokens, input_layernorm, q_proj")
    assert "layers.0.mlp.up_proj.weight" not in found.without_rule


def test_two_axes_divide_two_dimensions_and_a_bias_has_one():
    layout = Layout({"o_proj": (Shard(0, "batch"), Shard(1, "model", "heads")), "linear_out": Shard(1, "model")})
    found = placed("recurrentgemma-9b", "2x4", layout).weights
    assert found["layers.2.self_attn.o_proj.weight"].local == (2048, 1024)
    assert found["layers.2.self_attn.o_proj.bias"].local == (2048,)
    assert found["layers.0.recurrent.linear_out.bias"].local == (4096,)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({r"self_atn\.q_proj": None}, r"matches no weight; did you mean layers\.0\.self_attn\.q_proj\.weight"),
        ({r"layers\.\d+\.mlp\.gate_prj": None}, r"did you mean layers\.0\.mlp\.gate_proj\.weight"),
        ({"xyz": None}, "'xyz' matches no weight; known: embed_tokens.weight"),
        ({"mlp": None, "up_proj": None}, r"'up_proj' is never used: 'mlp' before it matches layers\.0\.mlp\.up_proj"),
        ({"up_proj": Shard(0, "pod")}, "'pod', which mesh batch=1,model=8 does not have; batch=1,model=8,pod=1 has it"),
        ({"norm": Shard(1, "model")}, r"input_layernorm\.weight of shape \(2048,\) has no dim 1"),
        ({"up_proj": Shard(0, "model", "heads")}, "it has no heads along it"),
        ({"q_proj": Shard(1, "model", "heads")}, "it has no heads along it"),
    ],
)
def test_a_rule_that_does_not_fit_the_model(rules, message):
    with pytest.raises(ConfigError, match=message):
        placed("gemma-2b", layout=Layout(rules))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout({"a": (Shard(0, "model"), Shard(1, "model"))}), "'a' names axis 'model' twice"),
        (lambda: Layout({"a": (Shard(0, "model"), Shard(0, "batch"))}), "'a' names dim 0 twice"),
        (lambda: Layout({"(": None}), "no regular expression"),
        (lambda: Shard(-1, "model"), "dim=-1"),
        (lambda: Shard(0, "data"), "axis='data' of a shard is not one of pod, batch, model"),
        (lambda: Shard(0, "model", "rows"), "unit='rows'"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_what_is_no_rule(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_a_layout_is_read_from_a_file(tmp_path):
    path = tmp_path / "layout.toml"
    path.write_text(
        '"q_proj" = { dim = 0, axis = "model", unit = "heads" }\n'
        '"down_proj" = [{ dim = 0, axis = "batch" }, { dim = 1, axis = "model" }]\n'
        '"norm" = []\n'
    )
    assert Layout.read(path) == Layout(
        {
            "q_proj": (Shard(0, "model", "heads"),),
            "down_proj": (Shard(0, "batch"), Shard(1, "model")),
            "norm": None,
        }
    )
    for text, message in (
        ('"q_proj" = "model"', "'q_proj' is 'model': write"),
        ('"q_proj" = { dim = 0 }', "write"),
        ('"q_proj" = { dim = 0, axis = "model", axes = 2 }', "write"),
        ('"q_proj = 3', "is no layout"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            Layout.read(path)
    with pytest.raises(ConfigError, match="is no layout"):
        Layout.read(tmp_path / "none.toml")
