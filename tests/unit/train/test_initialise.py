"""First weights against the distributions of the published code, and what they make of a model."""

import math

import pytest
import torch

from gemkit import family
from gemkit.family import replace_layers
from gemkit.nn import Batch
from gemkit.train.initialise import draw, new_module
from support.deepmind import layers
from support.tiny import TOWER, VOCAB, tiny
from support.training import replace

WIDE = replace(replace_layers(tiny("recurrentgemma-2b"), attention={"head_dim": 64}), width=640, vocab_size=2000)


def drawn(name: str, *shape: int) -> torch.Tensor:
    return draw(name, shape, WIDE, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "shape", "variance"),
    [
        ("embed_tokens.weight", (2000, 640), 1 / 640),
        ("layers.0.mlp.up_proj.weight", (900, 640), 1 / 640),
        ("layers.0.mlp.down_proj.weight", (640, 900), 2 / 26 / 900),
        ("layers.0.recurrent.linear_out.weight", (640, 600), 2 / 26 / 600),
        ("layers.0.recurrent.conv_1d.weight", (4000, 4), 0.01 / 4),
        ("layers.0.recurrent.rg_lru.input_gate.weight", (10, 64, 64), 1 / 64),
        ("vision_tower.encoder.layers.0.mlp.fc1.weight", (300, 200), 2 / 500),
    ],
)
def test_variances(name, shape, variance):
    value = drawn(name, *shape)
    assert value.var().item() == pytest.approx(variance, rel=0.05)  # of 16,000 draws and more: 5 deviations
    assert abs(value.mean().item()) < 5 * math.sqrt(variance / value.numel())


def test_norms_and_biases_change_nothing():
    assert not drawn("layers.0.input_layernorm.weight", 8).any()
    assert not drawn("layers.0.mlp.up_proj.bias", 8).any()
    assert (drawn("vision_tower.post_layernorm.weight", 8) == 1).all()
    assert not drawn("vision_tower.post_layernorm.bias", 8).any()


def test_decays_are_distributed_as_published():
    """Quantiles of 100,000 draws of both."""
    ours = drawn("layers.0.recurrent.rg_lru.recurrent_param", 100_000)
    torch.manual_seed(1)
    theirs = layers.rnn_param_init(torch.empty(100_000), 0.9, 0.999)
    at = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    decay, theirs = (torch.exp(-torch.nn.functional.softplus(x)).quantile(at) for x in (ours, theirs))
    torch.testing.assert_close(decay, theirs, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-2-2b", "gemma-3-270m", "recurrentgemma-2b", "paligemma-3b-pt-224"])
def test_a_new_model_knows_nothing(name):
    """Its loss on random tokens is that of guessing, and some more: a tied table first says the same token again, whose
    logit is the part of the stream that the embedding still is, times the root of the width."""
    vision = replace(TOWER, placeholder=VOCAB - 2) if family.get(name).vision else None
    module = new_module(tiny(name), vision)
    ids = torch.randint(0, VOCAB, (200,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(module(Batch.of([ids]))[:-1].float(), ids[1:]).item()
    assert math.log(VOCAB) - 0.2 < loss < math.log(VOCAB) + 4
    again = new_module(tiny(name), vision)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    other = new_module(tiny(name), vision, seed=1)
    assert not torch.equal(module.decoder.embed_tokens.weight, other.decoder.embed_tokens.weight)
