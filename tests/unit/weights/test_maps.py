"""The name tables, both ways: every parameter has one name in each format, and its layout an inverse."""

import pytest
import torch

from gemkit import family
from gemkit.weights.maps import HF_GEMMA2, Layout, Part, by_file_name, name_map

FORMATS = {member.name: ["safetensors", "gguf", "ckpt"] for member in family.members()}
for _member in family.members():
    if _member.decoder.recurrent:
        FORMATS[_member.name] = ["safetensors", "ckpt"]
    if _member.vision is not None:
        FORMATS[_member.name] = ["safetensors"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_parameter_has_a_place_of_its_own(name):
    """No two parameters share numbers of a file, and fused tensors are covered from the first row to the last."""
    member = family.get(name)
    shapes = dict(family.parameters(member.decoder, member.vision))
    for format in FORMATS[name]:
        parts = name_map(format, member.decoder, member.vision).parts(member.decoder, shapes)
        assert [part.param_name for part in parts] == list(shapes)
        for sharing in by_file_name(parts).values():
            if len(sharing) == 1:
                assert sharing[0].layout.rows is None
                continue
            assert len({part.layout.shape for part in sharing}) == 1
            rows = [part.layout.rows for part in sharing]
            assert [row[0] for row in rows] == [0, *(row[1] for row in rows[:-1])]
            assert rows[-1][1] == sharing[0].layout.shape[0]


LAYOUTS = [
    ((6, 4), Layout((6, 4))),
    ((6, 4), Layout((6, 1, 4))),
    ((6, 4), Layout((4, 6), transposed=True)),
    ((6, 4), Layout((20, 4), rows=(6, 12))),
    ((6, 4), Layout((2, 4, 6), rows=(1, 2), transposed=True)),
    ((6,), Layout((2, 1, 1, 6), rows=(0, 1))),
]


@pytest.mark.parametrize(("shape", "layout"), LAYOUTS, ids=str)
def test_give_is_the_inverse_of_take(shape, layout):
    part = Part("theirs", "ours", shape, layout)
    stored = torch.randn(layout.shape, generator=torch.Generator().manual_seed(0))
    value = part.take(stored)
    assert value.shape == shape
    mine = stored if layout.rows is None else stored[slice(*layout.rows)]
    given = part.give(value)
    assert given.is_contiguous()
    assert torch.equal(given, mine)
    assert part.plain == (layout == Layout(shape))


def test_one_plus_w_is_float32_in_the_file():
    part = Part("x", "x", (3,), Layout((3,), plus_one=True))
    given = part.give(torch.tensor([-1.0, 0.0, 0.5], dtype=torch.bfloat16))
    assert given.dtype == torch.float32
    assert given.tolist() == [0.0, 1.0, 1.5]
    assert part.take(given).tolist() == [-1.0, 0.0, 0.5]


def test_submodels_are_found_under_each_prefix_that_was_published():
    decoder = family.get("gemma-2-2b").decoder
    shapes = dict(family.parameters(decoder))
    for prefix in ("model.", "language_model.model.", "model.language_model.", ""):
        published = {f"{prefix}{name}" for name in shapes}
        assert {part.file_name for part in HF_GEMMA2.parts(decoder, shapes, published)} == published
    assert HF_GEMMA2.file_name("norm.weight") == "model.norm.weight"  # the one that we write
    with pytest.raises(KeyError):
        HF_GEMMA2.file_name("layers.0.recurrent.linear_x.weight")


def test_what_may_be_left_unread():
    assert HF_GEMMA2.ignores("model.vision_tower.x")
    assert not HF_GEMMA2.ignores("model.layers.0.mlp.up_proj.bias")
