"""Adapters against PEFT: the same numbers through real folders, in both directions, for every kind of member."""

import json
import warnings

import peft
import pytest
import torch

from gemkit.adapters import lora, merge, registry, saved
from gemkit.nn import Batch
from gemkit.weights.maps import name_map
from support.tiny import TOWER, VOCAB, WINDOW, as_trained, assert_close, load, reference, save_reference, tiny, tokens

# PEFT asks Transformers for something by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NAMES = [
    "gemma-2b",  # MQA
    "gemma-2-2b",  # soft caps, four norms
    "gemma-3-270m",  # QK-norm
    "recurrentgemma-2b",  # other mixers, other published names
    "paligemma-3b-pt-224",  # an image tower whose modules have the same names
    "paligemma2-3b-pt-224",
]
TEXT = ["gemma-2b", "gemma-2-2b", "gemma-3-270m", "recurrentgemma-2b"]
LEAVES = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|linear_x|linear_y|linear_out"
PATCHES, PREFIX = TOWER.tokens, TOWER.tokens + 4
# Adapters lengthen every sum. Of an image model they come after the tower's: see test_paligemma.py.
TOLERANCE = 5e-5
OURS = {"base": "nowhere", "named": "nowhere"}


@pytest.fixture(params=NAMES)
def pair(request, tmp_path):
    return pair_of(request.param, tmp_path)


def pair_of(name, folder):
    """Ours and theirs, with the same weights."""
    theirs = reference(tiny(name), TOWER if name.startswith("pali") else None)
    ours = load(save_reference(theirs, folder / "base"))
    return ours, as_trained(theirs)


def given(ours) -> dict:
    """What both are asked: an image and a prompt, or a text."""
    ids = tokens(PREFIX + WINDOW if ours.vision else 2 * WINDOW + 3)[0] % (VOCAB - 2)
    if ours.vision is None:
        return {"ids": ids, "pixels": None}
    ids[:PATCHES] = TOWER.placeholder
    size = TOWER.tower.image_size
    return {"ids": ids, "pixels": torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1}


def our_logits(ours):
    asked = given(ours)
    if asked["pixels"] is None:
        return ours(Batch.of([asked["ids"]]))
    return ours(Batch.of([asked["ids"]], spans=[(0, PREFIX)], image_rows=range(PATCHES)), pixels_ICSS=asked["pixels"])


def their_logits(theirs, ours):
    asked = given(ours)
    if asked["pixels"] is None:
        return theirs(input_ids=asked["ids"][None]).logits[0]
    types = (torch.arange(len(asked["ids"])) >= PREFIX).long()[None]
    return theirs(input_ids=asked["ids"][None], pixel_values=asked["pixels"], token_type_ids=types).logits[0]


def of_decoder(leaves: str, ours) -> str:
    """A pattern of PEFT's for modules of the language model alone."""
    return rf".*\.language_model\..*\.({leaves})" if ours.vision else rf".*\.({leaves})"


def with_peft(theirs, **settings):
    """Their model with a random adapter: B too, which begins with zeros."""
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that adapters of tied tables need care: that is what is tested
        wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **settings}))
    randomize(wrapped)
    return wrapped.eval()


def randomize(module):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if ".lora_" in name:
                weight.normal_(0, 0.5 * weight.shape[-1] ** -0.5, generator=generator)


def stored(wrapped, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that tables are saved too
        wrapped.save_pretrained(folder)
    return folder


def opened(theirs, folder):
    """What PEFT makes of a folder of ours. It must not even warn."""
    return peft.PeftModel.from_pretrained(theirs, folder).eval()


def plain(theirs, ours):
    """That adapters have an effect, so that equal logits are not those of no adapter."""
    with torch.inference_mode():
        return their_logits(theirs, ours)


# ── theirs is read ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_theirs_computes_the_same_here(pair, tmp_path):
    """Logits, the gradients of every A and B, and the merged weights."""
    ours, theirs = pair
    without = plain(theirs, ours)
    wrapped = with_peft(theirs, target_modules=of_decoder(LEAVES, ours))
    account = saved.attach(ours, stored(wrapped, tmp_path / "adapter"), "x", trainable=True)
    recurrent = ours.vision is None and any("recurrent" in name for name in account.modules)
    assert len(account.modules) == sum(".lora_A." in n for n, _ in wrapped.named_parameters())
    assert {m.rpartition(".")[2] for m in account.modules} >= {"q_proj", "up_proj", *["linear_x"] * recurrent}
    got, expected = our_logits(ours), their_logits(wrapped, ours)
    assert (expected - without).abs().max() > 0.05 * without.abs().max()
    assert_close(got, expected, TOLERANCE)

    targets = given(ours)["ids"][1:]
    for logits in (got, expected):
        torch.nn.functional.cross_entropy(logits[-WINDOW:-1], targets[-WINDOW + 1 :]).backward()
    table = name_map("safetensors", ours.config, ours.vision)
    theirs_by_name = dict(wrapped.named_parameters())
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(account.modules)
    for name, parameter in trained.items():
        module, _, leaf = name.partition(".adapters.x.")
        twin = theirs_by_name[f"base_model.model.{table.module(module)}.{leaf.replace('.', '.default.')}"]
        assert_close(parameter.grad, twin.grad, 2e-4)  # a gradient is a longer chain of float32 sums than a logit

    merge.merge(ours)
    merged = wrapped.merge_and_unload()
    for name in account.modules:
        twin = merged.get_submodule(table.module(name)).weight
        torch.testing.assert_close(ours.get_submodule(name).weight, twin, rtol=1e-6, atol=1e-6)
    with torch.inference_mode():
        assert_close(our_logits(ours), expected, TOLERANCE)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_by_pattern(rslora, tmp_path):
    ours, theirs = pair_of("gemma-2-2b", tmp_path)
    patterns = {} if rslora else {"rank_pattern": {"layers.3.self_attn.q_proj": 7, r"layers\.\d+\.mlp\.up_proj": 2}}
    patterns |= {} if rslora else {"alpha_pattern": {"q_proj": 9, "^model.layers.1.mlp.(up|gate)_proj": 1.5}}
    wrapped = with_peft(theirs, target_modules=["q_proj", "up_proj", "gate_proj"], use_rslora=rslora, **patterns)
    account = saved.attach(ours, stored(wrapped, tmp_path / "adapter"))
    assert account.ranks == ((3,) if rslora else (2, 3, 7))
    with torch.inference_mode():
        assert_close(our_logits(ours), their_logits(wrapped, ours), TOLERANCE)
    saved.save(ours, tmp_path / "again", **OURS)  # and ours of the same says the same
    wrapped.unload()
    with torch.inference_mode():
        assert_close(their_logits(opened(theirs, tmp_path / "again"), ours), our_logits(ours), TOLERANCE)


def test_dropout_is_kept_and_only_while_training(tmp_path):
    ours, theirs = pair_of("gemma-2b", tmp_path)
    wrapped = with_peft(theirs, target_modules=["q_proj"], lora_dropout=0.5)
    saved.attach(ours, stored(wrapped, tmp_path / "adapter"), "x")
    with torch.inference_mode():
        assert_close(our_logits(ours), their_logits(wrapped, ours), TOLERANCE)
        ours.train()
        assert (our_logits(ours) - our_logits(ours)).abs().max() > 0
    assert ours.layers[0].self_attn.q_proj.adapters["x"].dropout == 0.5


@pytest.mark.parametrize("name", ["gemma-3-270m", "recurrentgemma-2b", "paligemma-3b-pt-224"])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_adapters_of_the_tied_table(name, target, tmp_path):
    """One of the embedding leaves the head alone and the other way about, in both directions. PEFT stores the table
    itself too, which must be the model's own."""
    ours, theirs = pair_of(name, tmp_path)
    wrapped = with_peft(theirs, target_modules=[target])
    saved.attach(ours, stored(wrapped, tmp_path / "adapter"), "x")
    with torch.inference_mode():
        expected = their_logits(wrapped, ours)
        assert_close(our_logits(ours), expected, TOLERANCE)
        saved.save(ours, tmp_path / "again", **OURS)
        wrapped.unload()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the tables are tied, and that a table could have been saved
            again = peft.PeftModel.from_pretrained(theirs, tmp_path / "again").eval()
        assert_close(their_logits(again, ours), expected, TOLERANCE)


# ── ours is read ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ours_computes_the_same_there(pair, tmp_path):
    ours, theirs = pair
    without = plain(theirs, ours)
    lora.enable_lora(ours, 3, 5)
    with torch.inference_mode():
        torch.testing.assert_close(our_logits(ours), without, rtol=0, atol=TOLERANCE * without.abs().max().item())
        randomize(ours)
        saved.save(ours, tmp_path / "adapter", **OURS)
        expected = our_logits(ours)
        assert (expected - without).abs().max() > 0.05 * without.abs().max()
        wrapped = opened(theirs, tmp_path / "adapter")
        assert sum(".lora_A." in n for n, _ in wrapped.named_parameters()) == len(registry.account(ours).modules)
        assert_close(their_logits(wrapped, ours), expected, TOLERANCE)
        bare = wrapped.unload()
        bare.load_adapter(str(tmp_path / "adapter"))  # Transformers' own way
        assert_close(their_logits(bare, ours), expected, TOLERANCE)


def test_the_rule_of_keras_is_an_ordinary_lora_to_others(pair, tmp_path):
    ours, theirs = pair
    lora.enable_lora(ours, 2, rule="keras", targets=["q_proj", "k_proj", "v_proj", "down_proj"])
    randomize(ours)
    saved.save(ours, tmp_path / "adapter", **OURS)
    with torch.inference_mode():
        expected = our_logits(ours)
        assert_close(their_logits(opened(theirs, tmp_path / "adapter"), ours), expected, TOLERANCE)
    before = {name: p.clone() for name, p in ours.named_parameters() if ".lora_" in name}
    heads = {path: adapter.heads for path, adapter in registry.adapters_of(ours, None).items()}
    assert set(heads.values()) == {1, ours.config.attention[0].heads, ours.config.attention[0].kv_heads}
    registry.remove(ours)
    saved.attach(ours, tmp_path / "adapter", "default")  # in its own form
    assert {path: adapter.heads for path, adapter in registry.adapters_of(ours, None).items()} == heads
    after = {name: p for name, p in ours.named_parameters() if ".lora_" in name}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.inference_mode():
        assert torch.equal(our_logits(ours), expected)


@pytest.mark.parametrize("targets", [["layers.1.self_attn.q_proj", "vision_tower.*.fc1"], ["multi_modal_projector.*"]])
def test_the_image_tower_if_asked(targets, tmp_path):
    ours, theirs = pair_of("paligemma-3b-pt-224", tmp_path)
    lora.enable_lora(ours, 2, targets=targets)
    randomize(ours)
    saved.save(ours, tmp_path / "adapter", **OURS)
    without = plain(theirs, ours)
    with torch.inference_mode():
        expected = our_logits(ours)
        assert (expected - without).abs().max() > 0.01 * without.abs().max()
        assert_close(their_logits(opened(theirs, tmp_path / "adapter"), ours), expected, TOLERANCE)


def test_names_of_older_files_are_read(tmp_path):
    """Transformers before 4.52 had the language model of PaliGemma elsewhere, and adapters of then say so."""
    from safetensors.torch import load_file, save_file

    ours, theirs = pair_of("paligemma-3b-pt-224", tmp_path)
    folder = stored(with_peft(theirs, target_modules=of_decoder("q_proj", ours)), tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    now = load_file(path)
    old = {name.replace("model.model.language_model.", "model.language_model.model."): v for name, v in now.items()}
    assert old.keys() != now.keys()
    save_file(old, path)
    saved.attach(ours, folder)
    with torch.inference_mode():
        got = our_logits(ours)
    registry.remove(ours)
    save_file(now, path)
    saved.attach(ours, folder)
    with torch.inference_mode():
        assert torch.equal(our_logits(ours), got)


def test_the_first_numbers_are_drawn_as_theirs(tmp_path):
    """Not the same numbers, but the same distribution: uniform within 1 / sqrt(in), whose deviation is 1 / sqrt(3 in).
    Of some 50,000 numbers the deviation is within 1 % of it (3 of its own deviations)."""
    ours, theirs = pair_of("gemma-2-2b", tmp_path)
    lora.enable_lora(ours, 4, targets="q_proj")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    width = ours.config.width
    for module in (ours, wrapped):
        drawn = torch.cat([p.flatten() for n, p in module.named_parameters() if "lora_A" in n])
        assert drawn.abs().max() <= width**-0.5
        assert drawn.std().item() == pytest.approx((3 * width) ** -0.5, rel=0.03)
        assert all(not p.any() for n, p in module.named_parameters() if "lora_B" in n)


def test_in_bfloat16_ours_is_no_worse_than_theirs(tmp_path):
    """Adapters stay float32 in both. The two round in other places; the float32 model is what both should compute."""
    ours, theirs = pair_of("gemma-2-2b", tmp_path)
    folder = stored(with_peft(theirs, target_modules=["q_proj", "up_proj"]), tmp_path / "adapter")
    saved.attach(ours, folder)
    half = load(tmp_path / "base", dtype="bfloat16")
    saved.attach(half, folder)
    adapter = half.layers[0].self_attn.q_proj.adapters
    assert next(adapter.parameters()).dtype == torch.float32
    their_half = peft.PeftModel.from_pretrained(as_trained(reference(tiny("gemma-2-2b")).bfloat16()), folder).eval()
    with torch.inference_mode():
        exact = our_logits(ours)
        ours_off = (our_logits(half).float() - exact).abs().mean()
        theirs_off = (their_logits(their_half, ours).float() - exact).abs().mean()
    assert ours_off <= 1.5 * theirs_off


def test_target_modules_are_short_where_they_can_be(pair, tmp_path):
    ours, _ = pair
    lora.enable_lora(ours, 2, targets=["q_proj", "up_proj"])
    saved.save(ours, tmp_path / "a", **OURS)
    targets = json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]
    assert targets == (["q_proj", "up_proj"] if ours.vision is None else r"(.*\.)?language_model\..*\.(q_proj|up_proj)")
