"""Adapters in the weights: the formulas written out, what PEFT's own merging gives, and what cannot be merged."""

import copy
import warnings
from dataclasses import replace

import peft
import pytest
import torch

from gemkit.adapters import merge, registry, saved
from gemkit.adapters.lora import enable_lora
from gemkit.errors import ConfigError
from gemkit.nn import Batch
from gemkit.weights.maps import name_map
from support.native_models import randomised
from support.tiny import load, reference, save_reference, tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]
IDS = [1, 5, 9, 2, 7]


@torch.no_grad()
def moved(module, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        if weight.requires_grad:
            spread = weight.std() if weight.numel() > 1 and weight.std() > 0 else 0.3
            weight.add_(0.5 * spread * torch.randn(weight.shape, generator=generator))


@torch.no_grad()
def logits(module):
    return module(Batch.of([IDS]))


def test_a_dora_after_a_lora_written_out():
    """W1 = W + s B A of the first; then m (W1 + s B A) / |W + s B A| by rows, as PEFT applies one after another."""
    module = randomised("gemma-2b", depth=1)
    host = module.layers[0].self_attn.q_proj
    own = host.weight.detach().clone()
    enable_lora(module, 2, 3.0, "q_proj", name="first")
    moved(module)
    enable_lora(module, 3, 2.0, "q_proj", name="second", use_dora=True, seed=1)
    moved(module, 2)
    told = logits(module)
    first, second = host.adapters["first"], host.adapters["second"]
    low = 2 / 3 * second.lora_B.weight @ second.lora_A.weight
    gain = second.magnitude / (own + low).norm(dim=1)
    expected = gain[:, None] * (own + 1.5 * first.lora_B.weight @ first.lora_A.weight + low)
    assert merge.merge(module) == ["first", "second"]
    torch.testing.assert_close(host.weight, expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(module), told, rtol=1e-4, atol=1e-4)
    merge.unmerge(module)
    assert torch.equal(host.weight, own)
    assert torch.equal(logits(module), told)
    with pytest.raises(ConfigError, match="has a DoRA, whose lengths are those of all its adapters together"):
        merge.merge(module, "first")


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True, "target_modules": "all-linear"},
        {"modules_to_save": ["norm"]},
        {"trainable_token_indices": [31, 3]},
        {"init_lora_weights": "pissa"},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_weights_are_those_of_peft(settings, tmp_path):
    config = tiny("gemma-2-2b")
    theirs = reference(replace(config, layers=config.layers[:2]))
    ours = load(save_reference(theirs, tmp_path / "base"))
    before = {name: weight.clone() for name, weight in ours.named_parameters()}
    torch.manual_seed(5)
    given = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(theirs), peft.LoraConfig(**given))
        moved(wrapped)
        wrapped.save_pretrained(tmp_path / "adapter")
        merged = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").merge_and_unload()
    saved.attach(ours, tmp_path / "adapter", "x")
    told = logits(ours)
    assert merge.merge(ours) == registry.merged(ours) == ["x"]
    table, twins = name_map("safetensors", ours.config, None), dict(merged.named_parameters())
    if settings.get("ensure_weight_tying"):  # PEFT adds the change of the one table twice, and so merges another model
        own, twice = before["embed_tokens.weight"], merged.get_input_embeddings().weight
        torch.testing.assert_close(twice - own, 2 * (ours.decoder.embed_tokens.weight - own), rtol=1e-4, atol=1e-5)
        twins["model.embed_tokens.weight"] = own + (twice - own) / 2
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight, twins[table.params(name)[0]], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(logits(ours), told, rtol=1e-4, atol=1e-4)
    assert ours.decoder.lm_head.weight is ours.decoder.embed_tokens.weight
    merge.unmerge(ours)
    assert torch.equal(logits(ours), told)
    registry.remove(ours)
    assert all(torch.equal(weight, before[name]) for name, weight in ours.named_parameters())


def test_two_tables_are_not_merged():
    """A table alone would part from the head, which is the same weight of every file."""
    module = randomised("gemma-2b", depth=1)
    enable_lora(module, 2, modules_to_save=["embed_tokens"])
    moved(module)
    with pytest.raises(ConfigError, match="they would be two tables"):
        merge.merge(module)
    registry.remove(module)
    enable_lora(module, 2, modules_to_save=["embed_tokens", "lm_head"])
    moved(module)
    told = logits(module)
    merge.merge(module)
    torch.testing.assert_close(logits(module), told, rtol=1e-4, atol=1e-4)
