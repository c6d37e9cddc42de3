"""Adapters by themselves: what they match, count, merge and refuse. What they compute is compared in parity/."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gemkit import family, nn
from gemkit.adapters import lora, merge, registry, saved
from gemkit.adapters.layers import LoRA
from gemkit.adapters.targets import owners_of
from gemkit.errors import ConfigError, WeightsError
from gemkit.nn import Batch
from gemkit.ops import Quantized
from gemkit.weights import quantize
from support.tiny import TOWER, tiny

IDS = [1, 5, 9, 2, 7]


def model(name: str = "gemma-2b", seed: int = 0) -> nn.LanguageModel:
    """A member at test size with random weights."""
    module = nn.build(tiny(name), TOWER if name.startswith("pali") else None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
    return module.requires_grad_(False).eval()


def train(module, seed: int = 1) -> None:
    """B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if ".lora_" in name:
                weight.normal_(0, 0.5 * weight.shape[-1] ** -0.5, generator=generator)


@torch.no_grad()
def logits(module):
    return module(Batch.of([IDS]))


def save(module, folder, **how):
    return saved.save(module, folder, **{"base": None, "named": "google/gemma-2b", **how})


def leaves(account) -> set[str]:
    return {path.rpartition(".")[2] for path in account.modules}


# ── what is matched and counted ─────────────────────────────────────────────────────────────────────────────────────


def test_the_published_counts_of_gemma_2b():
    """1,363,968 of 2,506,172,416 is what the Keras guide prints; 460,800 is 18 * 4 * (2048 + 2048 + 2048 + 256)."""
    with torch.device("meta"):
        module = nn.Decoder(family.get("gemma-2b").decoder)
    told = lora.enable_lora(module, 4, rule="keras")
    assert (told.trainable, told.before) == (1_363_968, 2_506_172_416)
    assert leaves(told) == {"q_proj", "v_proj"}
    assert str(told) == (
        "adapter default: rank 4 on 36 modules (q_proj 18, v_proj 18); of 2,506,172,416 parameters before, "
        "1,363,968 are trained now"
    )
    registry.remove(module)
    assert lora.enable_lora(module, 4, targets=["q_proj", "v_proj"]).trainable == 460_800
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == 460_800


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-2-2b", "gemma-3-270m", "recurrentgemma-2b", "paligemma-3b-pt-224"])
def test_default_targets_suit_every_member(name):
    module = model(name)
    told = lora.enable_lora(module, 2)
    attention, mlp = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
    recurrent = {"linear_x", "linear_y", "linear_out"} if name.startswith("recurrent") else set()
    assert leaves(told) == attention | mlp | recurrent
    assert not any("vision_tower" in path or "projector" in path for path in told.modules)
    adapted = sum(isinstance(m, LoRA) for m in module.modules())
    assert adapted == len(told.modules)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in module.named_parameters() if ".lora_" in n}


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("q_proj", 18),
        (["layers.3.mlp.up_proj"], 1),
        (["mlp.up_proj", "mlp.down_proj"], 36),
        (["layers.1*.q_proj"], 9),  # 1 and 10 to 17
        (["all-linear", "lm_head"], 18 * 7 + 1),
        ("model.layers.0.self_attn.q_proj", 1),  # the published name
    ],
)
def test_targets_are_ends_of_names(targets, count):
    assert len(lora.enable_lora(model(), 2, targets=targets).modules) == count


def test_published_names_are_targets_too():
    told = lora.enable_lora(model("recurrentgemma-2b"), 2, targets=["temporal_block.o_proj", "mlp_block.up_proj"])
    assert leaves(told) == {"o_proj", "up_proj"}


def test_the_image_tower_only_if_asked():
    told = lora.enable_lora(model("paligemma-3b-pt-224"), 2, targets=["vision_tower.*.q_proj"])
    assert len(told.modules) == TOWER.tower.depth
    told = lora.enable_lora(model("paligemma-3b-pt-224"), 2, targets=["q_proj"])
    assert not any(path.startswith("vision_tower") for path in told.modules)


def test_it_begins_with_no_change_and_a_seed_says_what_is_drawn():
    module = model()
    before = logits(module)
    lora.enable_lora(module, 4, seed=3)
    assert torch.equal(logits(module), before)
    first = module.layers[0].self_attn.q_proj.adapters["default"].lora_A.weight.clone()
    for seed, same in ((3, True), (4, False)):
        other = model()
        lora.enable_lora(other, 4, seed=seed)
        assert torch.equal(other.layers[0].self_attn.q_proj.adapters["default"].lora_A.weight, first) is same


def test_the_rule_of_keras_written_out():
    """Query kernels are (heads, width, head size): A is (heads, width, rank), B is (rank, head size), for all heads."""
    module = model("gemma-2-2b")
    config, heads = module.config, module.config.attention[0]
    lora.enable_lora(module, 3, 6.0, rule="keras")
    train(module)
    proj = module.layers[0].self_attn.q_proj
    adapter = proj.adapters["default"]
    kernel_A = adapter.lora_A.weight.unflatten(0, (heads.heads, 3)).transpose(1, 2)  # (N, D, rank)
    kernel_B = adapter.lora_B.weight.T  # (rank, H)
    assert kernel_A.shape == (heads.heads, config.width, 3)
    assert kernel_B.shape == (3, heads.head_dim)
    x_TD = torch.randn(5, config.width, generator=torch.Generator().manual_seed(2))
    plain = x_TD @ proj.weight.T
    change = torch.einsum("td,ndr,rh->tnh", x_TD, kernel_A, kernel_B).flatten(1) * 2.0
    torch.testing.assert_close(proj(x_TD), plain + change, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merge.delta(adapter), torch.einsum("ndr,rh->nhd", kernel_A, kernel_B).flatten(0, 1) * 2)
    bound = math.sqrt(6 / (heads.heads * config.width))  # he_uniform of such a kernel
    other = model("gemma-2-2b")
    lora.enable_lora(other, 3, rule="keras", targets="q_proj")
    drawn = torch.cat([p for n, p in other.named_parameters() if "lora_A" in n])
    assert 0.99 * bound < drawn.abs().max() <= bound


# ── several, stronger, weaker, merged ───────────────────────────────────────────────────────────────────────────────


def test_several_add_up_and_each_can_be_turned_down():
    module = model()
    plain = logits(module)
    lora.enable_lora(module, 2, name="one")
    lora.enable_lora(module, 4, targets=["q_proj", "lm_head"], name="two", seed=1)
    assert registry.names(module) == ["one", "two"]
    assert {n.split(".adapters.")[1].split(".")[0] for n, p in module.named_parameters() if p.requires_grad} == {"two"}
    train(module)
    both = logits(module)
    registry.set_strength(module, 0.0, "two")
    alone = logits(module)
    registry.remove(module, "two")
    assert torch.equal(logits(module), alone)
    assert not torch.equal(both, alone)
    registry.set_strength(module, 0)
    assert torch.equal(logits(module), plain)
    registry.remove(module)
    assert registry.names(module) == []
    assert all(owner.adapters is None for owner in owners_of(module).values())


def test_merge_computes_the_same_and_unmerge_is_exact():
    module = model("recurrentgemma-2b").bfloat16()
    before = {name: weight.clone() for name, weight in module.named_parameters()}
    lora.enable_lora(module, 2, name="one")
    lora.enable_lora(module, 3, rule="keras", name="two")
    train(module)
    told = logits(module)
    assert merge.merge(module) == registry.merged(module) == ["one", "two"]
    assert not any(".lora_" in name for name, _ in module.named_parameters())  # nothing beside the weights
    changed = [name for name, weight in module.named_parameters() if not torch.equal(weight, before[name])]
    assert len(changed) == len(registry.account(module, "one").modules)
    largest = told.float().abs().max()
    assert (logits(module).float() - told.float()).abs().max() < 0.1 * largest  # bfloat16 rounds in other places
    assert merge.unmerge(module) == ["one", "two"]
    assert torch.equal(logits(module), told)
    after = dict(module.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert registry.names(module) == ["one", "two"]


def test_one_of_several_is_merged_and_another_is_trained_on_top():
    module = model()
    lora.enable_lora(module, 2, name="one")
    lora.enable_lora(module, 2, name="two", seed=1)
    train(module)
    told = logits(module)
    merge.merge(module, "one")
    torch.testing.assert_close(logits(module), told, rtol=1e-4, atol=1e-4)
    lora.enable_lora(module, 2, targets="q_proj", name="three", seed=2)
    merge.unmerge(module)
    assert registry.names(module) == ["one", "two", "three"]
    assert torch.equal(logits(module), told)  # the third is zero


def test_bookkeeping_of_merges():
    module = model()
    with pytest.raises(ConfigError, match="the model has no adapter"):
        merge.merge(module)
    with pytest.raises(ConfigError, match="no adapter is merged"):
        merge.unmerge(module)
    lora.enable_lora(module, 2)
    merge.merge(module)
    with pytest.raises(ConfigError, match="default is merged already: unmerge first"):
        merge.merge(module)
    with pytest.raises(ConfigError, match="'default' is merged into the weights: unmerge first"):
        registry.remove(module)
    with pytest.raises(ConfigError, match="'default' is merged into the weights: unmerge first"):
        registry.set_strength(module, 0.5)
    merge.unmerge(module)
    with pytest.raises(ConfigError, match="no adapter is merged"):
        merge.unmerge(module)


@pytest.mark.parametrize(("target", "other"), [("lm_head", "embeddings"), ("embed_tokens", "logits")])
def test_the_tied_table_is_not_merged_into(target, other):
    module = model()
    table = module.decoder.embed_tokens.weight.clone()
    lora.enable_lora(module, 2, targets=[target, "q_proj"])
    train(module)
    with pytest.raises(ConfigError, match=f"{target} has an adapter, .* it would change the {other} too"):
        merge.merge(module)
    assert registry.merged(module) == []
    assert torch.equal(module.decoder.embed_tokens.weight, table)
    assert module.decoder.lm_head.weight is module.decoder.embed_tokens.weight


def test_an_adapter_of_the_head_never_changes_the_embedding_and_the_other_way_about():
    module, ids = model(), torch.tensor(IDS)
    embedded, x_TD = module.decoder.embed_tokens(ids), torch.randn(3, module.config.width)
    head = module.decoder.lm_head(x_TD)
    lora.enable_lora(module, 2, targets="lm_head")
    train(module)
    assert torch.equal(module.decoder.embed_tokens(ids), embedded)
    assert not torch.equal(module.decoder.lm_head(x_TD), head)
    registry.remove(module)
    lora.enable_lora(module, 2, targets="embed_tokens")
    assert torch.equal(module.decoder.embed_tokens(ids), embedded)  # A begins with zeros
    train(module)
    assert not torch.equal(module.decoder.embed_tokens(ids), embedded)
    assert torch.equal(module.decoder.lm_head(x_TD), head)


def test_a_sum_that_is_not_finite_changes_nothing():
    module = model()
    lora.enable_lora(module, 2, targets=["q_proj", "down_proj"])
    train(module)
    told = logits(module)
    bad = module.layers[5].mlp.down_proj.adapters["default"].lora_B.weight
    good = bad.clone()
    with torch.no_grad():
        bad[0, 0] = math.inf
    with pytest.raises(WeightsError, match=r"layers\.5\.mlp\.down_proj would have numbers that are not finite"):
        merge.merge(module)
    assert registry.merged(module) == []
    with torch.no_grad():
        bad.copy_(good)
    assert torch.equal(logits(module), told)


# ── over a quantized base ───────────────────────────────────────────────────────────────────────────────────────────


def quantized() -> nn.Decoder:
    module = model("gemma-2-2b")
    for name, weight in [*module.named_parameters()]:
        if weight.dim() == 2 and weight.shape[1] % 32 == 0:
            module.set_param(name, quantize.nearest(weight.detach(), quantize.INT4, name))
    return module


def test_qlora_trains_beside_codes():
    """Gradients are those beside the same weights made dense."""
    coded, dense = quantized(), quantized()
    for name, owner in owners_of(dense).items():
        if isinstance(owner.weight, Quantized) and name != "lm_head":
            dense.set_param(f"{name}.weight", torch.nn.Parameter(owner.weight.dequantize(), requires_grad=False))
    assert isinstance(coded.layers[0].self_attn.q_proj.weight, Quantized)
    assert isinstance(coded.decoder.lm_head.weight, Quantized)
    for module in (coded, dense):
        lora.enable_lora(module, 2, targets=["all-linear", "lm_head", "embed_tokens"])
        train(module)
        out = module(Batch.of([IDS]))
        torch.nn.functional.cross_entropy(out[:-1], torch.tensor(IDS[1:])).backward()
    theirs = dict(dense.named_parameters())
    for name, weight in coded.named_parameters():
        if weight.requires_grad:
            torch.testing.assert_close(weight.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)
            assert weight.grad.any(), name


def test_a_quantized_weight_is_not_merged_into():
    module = quantized()
    lora.enable_lora(module, 2)
    with pytest.raises(ConfigError, match=r"q_proj is quantized \(Q4_0\), .* load the model dense to merge"):
        merge.merge(module)


# ── settings ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0 must be a whole number"),
        ({"rank": 2.0}, "rank=2.0 must be a whole number"),
        ({"rank": 17}, r"rank=17 is larger than layers.0.self_attn.k_proj, which is 16 x 32"),
        ({"rank": 17, "rule": "keras"}, r"layers.0.self_attn.q_proj, which is 128 x 32, 16 rows a head"),
        ({"alpha": 0}, "alpha=0 must be more than 0"),
        ({"alpha": math.nan}, "alpha=nan must be more than 0"),
        ({"dropout": 1.0}, "dropout=1.0 must be from 0 to less than 1"),
        ({"rule": "dora"}, "rule='dora' is not one of lora, keras"),
        ({"name": "a.b"}, "name='a.b' cannot name an adapter"),
        ({"name": "keys"}, "name='keys' cannot name an adapter"),
        ({"targets": []}, "selects nothing"),
        ({"targets": ["q_proj", "query"]}, "target 'query' matches nothing; there is embed_tokens, q_proj, k_proj"),
        ({"targets": ["proj"]}, "target 'proj' matches nothing"),
        ({"targets": ["linear_x"]}, "target 'linear_x' matches nothing"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    module = model()
    with pytest.raises(ConfigError, match=message):
        lora.enable_lora(module, **{"rank": 2, **settings})
    assert registry.names(module) == []


def test_a_name_is_given_once():
    module = model()
    lora.enable_lora(module, 2)
    with pytest.raises(ConfigError, match="there is an adapter 'default' already"):
        lora.enable_lora(module, 2)
    lora.enable_lora(module, 2, name="other")
    with pytest.raises(ConfigError, match="the adapters default, other: say which"):
        registry.remove(module)
    with pytest.raises(ConfigError, match=r"there is no adapter 'othr'; did you mean other\?"):
        registry.remove(module, "othr")


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tmp_path):
    module = model()
    lora.enable_lora(module, 2, targets=["q_proj", "v_proj"])
    train(module)
    return save(module, tmp_path / "adapter", data=["letters/*.jsonl"])


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def test_what_is_saved(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 2, ["q_proj", "v_proj"])
    assert config["base_model_name_or_path"] == "google/gemma-2b"
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "gemkit.base": "the starter model"}
        assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in file.keys()  # noqa: SIM118
    readme = (folder / "README.md").read_text()
    assert 'base_model: "google/gemma-2b"' in readme
    assert 'license: "gemma"' in readme
    assert "- letters/*.jsonl" in readme
    assert "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms" in readme


def test_saving_and_reading_gives_the_same_bits(tmp_path):
    for name in ("gemma-3-270m", "recurrentgemma-2b"):
        module = model(name)
        lora.enable_lora(module, 3, 7, targets=["all-linear", "embed_tokens", "lm_head"])
        train(module)
        told = logits(module)
        save(module, tmp_path / name)
        other = model(name)
        account = saved.attach(other, tmp_path / name)
        assert account.name == name
        assert account.trainable == 0
        assert torch.equal(logits(other), told)
        assert saved.attach(other, tmp_path / name).name == f"{name}-2"


def test_a_folder_is_whole_or_not_there(folder, tmp_path, monkeypatch):
    module = model()
    saved.attach(module, folder)
    with pytest.raises(WeightsError, match="exists and is not empty"):
        save(module, folder)

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemkit.adapters.peft.write_safetensors", fails)
    with pytest.raises(WeightsError, match="No space left on device"):
        save(module, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    module = model()
    lora.enable_lora(module, 2)
    with torch.no_grad():
        module.layers[3].mlp.up_proj.adapters["default"].lora_B.weight[1, 1] = math.nan
    with pytest.raises(WeightsError, match=r"up_proj\.lora_B\.weight of the adapter has numbers that are not finite"):
        save(module, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, r"q_proj has rank 2 in lora_A and 2 in lora_B; adapter_config.json says 4"),
        ({"r": 0}, "r=0 must be a whole number from 1"),
        ({"r": "8"}, "r='8' must be a whole number from 1"),
        ({"lora_alpha": "x"}, "lora_alpha='x' must be a number"),
        ({"lora_dropout": 1.5}, "lora_dropout=1.5 must be from 0"),
        ({"peft_type": "IA3"}, "peft_type='IA3'; only LORA"),
        ({"use_dora": True}, "no lora_magnitude_vector to go with it"),
        ({"something_new": 3}, "something_new=3 is not implemented"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path=3 is no name"),
        ({"rank_pattern": {"(a+)+b": 2}}, "more than a pattern of a module's name"),
        ({"rank_pattern": {"(": 2}}, "is no regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern=.* must map names to numbers"),
    ],
)
def test_configurations_that_are_refused(changes, message, folder):
    edit(folder, **changes)
    module = model()
    with pytest.raises(WeightsError, match=message):
        saved.attach(module, folder)
    assert registry.names(module) == []


def first(tensors, end="q_proj.lora_A.weight"):
    return next(name for name in tensors if name.endswith(end))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if n != first(t)}, "and no lora_A to go with it"),
        (lambda t: t | {first(t): t[first(t)] * math.nan}, "lora_A.weight has numbers that are not finite"),
        (lambda t: t | {first(t): t[first(t)].long()}, "is no array of floats that fits"),
        (lambda t: t | {first(t): t[first(t)][0]}, "is no array of floats that fits"),
        (
            lambda t: t | {"base_model.model.x.lora_magnitude_vector": torch.ones(1)},
            "adapter changes x, and",
        ),
        (lambda t: t | {"optimizer.step": torch.ones(1)}, "optimizer.step is no part of an adapter"),
        (lambda t: {}, "changes nothing"),
        (
            lambda t: {n.replace("layers.17", "layers.18"): v for n, v in t.items()},
            "layers.18.self_attn.q_proj, of which the model has fewer: it belongs to another model; it was trained on "
            "google/gemma-2b",
        ),
        (
            lambda t: {n.replace("q_proj", "query"): v for n, v in t.items()},
            "changes model.layers.0.self_attn.query, and the model has down_proj, ",
        ),
    ],
)
def test_tensors_that_are_refused(change, message, folder):
    edit_tensors(folder, change)
    module = model()
    with pytest.raises(WeightsError, match=message):
        saved.attach(module, folder)
    assert registry.names(module) == []


def test_another_models_adapter_is_refused(folder):
    with pytest.raises(WeightsError, match="v_proj changes a matrix of 16 x 32, and here it is 64 x 32: it belongs to"):
        saved.attach(model("gemma-2-2b"), folder)


def test_files_that_are_not_there(folder, tmp_path):
    with pytest.raises(WeightsError, match="none is no folder, and no id of an adapter on the hub"):
        saved.attach(model(), tmp_path / "none")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(WeightsError, match=r"only adapter_model\.bin, a pickle, which is never opened"):
        saved.attach(model(), folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(WeightsError, match=r"is no adapter: cannot read adapter_config\.json"):
        saved.attach(model(), folder)


def test_a_truncated_file_is_refused(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(WeightsError, match="incomplete download"):
        saved.attach(model(), folder)


def test_a_table_that_was_trained_too_takes_the_models_place(folder):
    """As in PEFT, which loads it over the base's, and so over the head's; one of another size is refused."""
    module = model()
    key, own = "base_model.model.model.embed_tokens.weight", module.decoder.embed_tokens.weight.detach().clone()
    edit_tensors(folder, lambda t: t | {key: own})
    assert saved.attach(module, folder).replaced == ()
    registry.remove(module)
    edit_tensors(folder, lambda t: t | {key: own + 0.1})
    assert saved.attach(module, folder).replaced == ("embed_tokens.weight", "lm_head.weight")
    assert torch.equal(module.decoder.lm_head.weight, own + 0.1)
    assert module.decoder.lm_head.weight is module.decoder.embed_tokens.weight
    registry.remove(module)
    assert torch.equal(module.decoder.embed_tokens.weight, own)
    edit_tensors(folder, lambda t: t | {key: own[1:]})
    with pytest.raises(WeightsError, match="brings a embed_tokens of its own"):
        saved.attach(module, folder)


def test_a_shared_b_that_is_not_shared_is_refused(tmp_path):
    module = model()
    lora.enable_lora(module, 2, rule="keras")
    train(module)
    folder = save(module, tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    tensors = load_file(path)
    tensors[first(tensors, "q_proj.lora_B.weight")][0, 3] = 1.0
    save_file(tensors, path, metadata=notes)
    with pytest.raises(WeightsError, match="is said to share one B among 8 heads, and its lora_B does not"):
        saved.attach(model(), folder)
    save_file(tensors, path)  # an ordinary LoRA is what it is then
    saved.attach(model(), folder)
