"""The tree against PyTorch's own print of the modules."""

import pytest
import torch

from gemkit import nn
from gemkit.family import get, parameters
from gemkit.inspect.tree import lines, tree

TEXT = ("gemma-2b", "gemma-7b", "gemma-2-2b", "gemma-2-27b", "gemma-3-270m", "gemma-3-4b", "recurrentgemma-9b")


@pytest.mark.parametrize("name", [*TEXT, "paligemma-3b-pt-224", "paligemma2-3b-mix-448"])
def test_prints_as_pytorch_prints_the_module(name):
    member = get(name)
    with torch.device("meta"):
        module = nn.build(member.decoder, member.vision)
    assert str(tree(member.decoder, member.vision)) == str(module)
    listed = list(parameters(member.decoder, member.vision))
    assert [(n, tuple(p.shape)) for n, p in module.named_parameters()] == listed


@pytest.mark.parametrize("name", [*TEXT, "paligemma2-3b-mix-448"])
@pytest.mark.parametrize("by_kind", [False, True])
def test_counts_add_up(name, by_kind):
    member = get(name)
    total = sum(torch.Size(shape).numel() for _, shape in parameters(member.decoder, member.vision))
    printed = lines(tree(member.decoder, member.vision), by_kind)
    assert printed[0].count == total
    apart = ("(vision_tower)", "(multi_modal_projector)", "(embed_tokens)", "(norm)")
    parts = [line.count for line in printed if line.text.lstrip().startswith(apart) or line.text.endswith(" Block(")]
    assert sum(parts) == total


def test_by_kind_gathers_layers_wherever_they_are():
    text = [line.text.strip() for line in lines(tree(get("gemma-3-4b").decoder), by_kind=True)]
    assert "(0-4, 6-10, ..., 30-33): 29 x Block(" in text
    assert "(5, 11, ..., 29): 5 x Block(" in text
    assert "(0-27): 28 x Block(" in str(tree(get("gemma-7b").decoder))


def test_published_names_stand_beside_ours():
    def renamed(name):
        member = get(name)
        return {line.published for line in lines(tree(member.decoder, member.vision))} - {""}

    assert renamed("gemma-7b") == renamed("paligemma-3b-pt-224") == {"post_attention_layernorm"}
    assert {"temporal_block.linear_x", "temporal_block.rg_lru.input_gate_*", "final_norm"} < renamed(
        "recurrentgemma-2b"
    )
    assert renamed("gemma-2-2b") == renamed("gemma-3-1b") == set()
