"""PaliGemma against Transformers: the same random weights through the real files, both generations."""

from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from gemkit import family
from gemkit.errors import ConfigError, WeightsError
from gemkit.family import replace_layers
from gemkit.nn import Batch, Multimodal
from gemkit.weights import config_hf, config_vision
from gemkit.weights.export.hf import save_hf
from gemkit.weights.maps import name_map
from support.published_configs import PUBLISHED as PUBLISHED_CONFIGS
from support.tiny import TOWER, VOCAB, WINDOW, assert_close, load, reference, save_reference, tiny

NAMES = ["paligemma-3b-pt-224", "paligemma2-3b-pt-224", "paligemma2-28b-pt-224"]
PATCHES = TOWER.tokens
# The tower's layers come before the decoder's, so sums are longer: Transformers' float32 is 1.2e-5 off its float64.
TOLERANCE = 5e-5


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory):
    """Ours and theirs, with the same weights."""
    theirs = reference(tiny(request.param), TOWER)
    folder = save_reference(theirs, tmp_path_factory.mktemp(request.param))
    ours = load(folder)
    assert isinstance(ours, Multimodal)
    assert (ours.config, ours.vision) == (tiny(request.param), TOWER)  # their config.json says the same architecture
    assert PATCHES > WINDOW  # a window would cut the prefix, if it could
    return ours, theirs


def images(count: int, seed: int = 3) -> torch.Tensor:
    shape = (count, 3, TOWER.tower.image_size, TOWER.tower.image_size)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def ids(*lengths: int, shown: int = 1, seed: int = 1) -> list[torch.Tensor]:
    """Sequences of so many tokens after the placeholders of `shown` images."""
    generator = torch.Generator().manual_seed(seed)
    placeholders = torch.full((shown * PATCHES,), TOWER.placeholder)
    return [torch.cat([placeholders, torch.randint(0, VOCAB - 2, (n,), generator=generator)]) for n in lengths]


def one(sequence: torch.Tensor, prefix: int, shown: int = 1) -> Batch:
    return Batch.of([sequence], spans=[(0, prefix)] if prefix else [], image_rows=range(shown * PATCHES))


def logits_of(theirs, sequence, prefix, pixels):
    token_types = (torch.arange(len(sequence)) >= prefix).long()[None]
    return theirs(input_ids=sequence[None], pixel_values=pixels, token_type_ids=token_types).logits[0]


@torch.inference_mode()
def test_image_features_match(pair):
    ours, theirs = pair
    pixels = images(3)
    expected = theirs.get_image_features(pixels).pooler_output
    assert_close(ours.image_features(pixels), expected.flatten(0, 1), TOLERANCE)


@torch.inference_mode()
def test_prefix_and_suffix_match(pair):
    ours, theirs = pair
    (sequence,), pixels = ids(6 + 2 * WINDOW + 3), images(1)
    prefix = PATCHES + 6
    assert_close(
        ours(one(sequence, prefix), pixels_ICSS=pixels), logits_of(theirs, sequence, prefix, pixels), TOLERANCE
    )


@torch.inference_mode()
def test_two_images_in_one_prompt_match(pair):
    ours, theirs = pair
    (sequence,), pixels = ids(12, shown=2), images(2)
    prefix = 2 * PATCHES + 4
    assert_close(
        ours(one(sequence, prefix, 2), pixels_ICSS=pixels), logits_of(theirs, sequence, prefix, pixels), TOLERANCE
    )


@torch.inference_mode()
def test_a_ragged_batch_of_images_and_text_matches_each_alone(pair):
    """Two images with prompts of different lengths, and between them text that is causal throughout."""
    ours, theirs = pair
    (first, third), pixels = ids(5 + 7, 2 + WINDOW + 9), images(2)
    second = ids(2 * WINDOW + 1, shown=0)[0]
    at = len(first) + len(second)
    batch = Batch.of(
        [first, second, third],
        spans=[(0, PATCHES + 5), (at, at + PATCHES + 2)],
        image_rows=[*range(PATCHES), *range(at, at + PATCHES)],
    )
    got = ours(batch, pixels_ICSS=pixels).split([len(first), len(second), len(third)])
    expected = [
        logits_of(theirs, first, PATCHES + 5, pixels[:1]),
        logits_of(theirs, second, 0, None),
        logits_of(theirs, third, PATCHES + 2, pixels[1:]),
    ]
    for part, their_part in zip(got, expected, strict=True):
        assert_close(part, their_part, TOLERANCE)


@torch.inference_mode()
def test_cached_decode_matches(pair):
    """Two images and prompts at once, then a token at a time from what is remembered, theirs from their own cache."""
    ours, theirs = pair
    sequences, pixels = ids(5 + 2 * WINDOW, 2 + WINDOW + 3), images(2)
    prefixes = [PATCHES + 5, PATCHES + 2]
    expected = []
    for i, (sequence, prefix) in enumerate(zip(sequences, prefixes, strict=True)):
        types = torch.zeros(1, prefix, dtype=torch.int64)
        out = theirs(input_ids=sequence[None, :prefix], pixel_values=pixels[i : i + 1], token_type_ids=types)
        rows = [out.logits[0, -1]]
        for token in sequence[prefix:]:
            out = theirs(input_ids=token[None, None], past_key_values=out.past_key_values)
            rows.append(out.logits[0, -1])
        expected.append(torch.stack(rows))
    state = ours.new_state(2)
    shown = [*range(PATCHES), *range(prefixes[0], prefixes[0] + PATCHES)]
    spans = [(0, prefixes[0]), (prefixes[0], sum(prefixes))]
    batch = Batch.of([s[:p] for s, p in zip(sequences, prefixes, strict=True)], spans=spans, image_rows=shown)
    last = torch.tensor([prefixes[0] - 1, sum(prefixes) - 1])
    got = [[row] for row in ours(batch, state, last, images(2))]
    while live := [i for i, s in enumerate(sequences) if state.lengths[i] < len(s)]:
        offsets = [state.lengths[i] for i in live]
        step = Batch.of(
            [sequences[i][at : at + 1] for i, at in zip(live, offsets, strict=True)],
            offsets=offsets,
            slots=live,
        )
        for i, row in zip(live, ours(step, state), strict=True):
            got[i].append(row)
    for rows, their_rows in zip(got, expected, strict=True):
        assert_close(torch.stack(rows), their_rows, TOLERANCE)


@pytest.mark.parametrize("name", NAMES[:2])
def test_gradients_of_a_suffix_loss_match(name, tmp_path):
    """Every weight's gradient, the projection's and the tower's included, of a loss on the suffix alone."""
    theirs = reference(tiny(name), TOWER)
    ours = load(save_reference(theirs, tmp_path))
    ours.requires_grad_(True)
    (sequence,), pixels, prefix = ids(5 + WINDOW + 3), images(1), PATCHES + 5
    for logits in (ours(one(sequence, prefix), pixels_ICSS=pixels), logits_of(theirs, sequence, prefix, pixels)):
        torch.nn.functional.cross_entropy(logits[prefix - 1 : -1], sequence[prefix:]).backward()
    grads = {n: p.grad for n, p in theirs.named_parameters()}
    table = name_map("safetensors", ours.config, ours.vision)
    for n, p in ours.named_parameters():
        their_name = "model." + (n.split(".")[0] + "." + table.within(n))
        # a gradient is a longer chain of float32 sums than a logit. What is added to all keys of a query changes no
        # softmax, so the gradient of that bias is nothing but rounding
        if n.endswith("k_proj.bias"):
            assert p.grad.abs().max() < 1e-6
            continue
        assert_close(p.grad, grads[their_name], 2e-4)


def test_the_other_published_reading_is_a_field_away(tmp_path):
    """google-research/big_vision attends everywhere and has no final cap in training and prefill."""
    decoder = tiny("paligemma2-3b-pt-224")
    decoder = replace_layers(replace(decoder, final_softcap=None), attention={"window": None})
    theirs = reference(decoder, TOWER)
    ours = load(save_reference(theirs, tmp_path))
    assert ours.config == decoder
    (sequence,), pixels, prefix = ids(5 + 2 * WINDOW), images(1), PATCHES + 5
    with torch.inference_mode():
        got = ours(one(sequence, prefix), pixels_ICSS=pixels)
        assert_close(got, logits_of(theirs, sequence, prefix, pixels), TOLERANCE)


def test_bfloat16_agrees_within_its_rounding(tmp_path):
    """As of the text members: each rounds in other places, ours no worse than theirs."""
    theirs = reference(tiny("paligemma2-3b-pt-224"), TOWER).bfloat16()
    ours = load(save_reference(theirs, tmp_path))
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    (sequence,), pixels, prefix = ids(5 + 2 * WINDOW), images(1), PATCHES + 5
    with torch.inference_mode():
        exact = load(tmp_path, dtype="float32")(one(sequence, prefix), pixels_ICSS=pixels)
        ours_off = (ours(one(sequence, prefix), pixels_ICSS=pixels).float() - exact).abs().mean()
        theirs_off = (logits_of(theirs, sequence, prefix, pixels.bfloat16()).float() - exact).abs().mean()
    assert ours_off <= 1.5 * theirs_off


@pytest.mark.parametrize("change", ["causal prefix", "shorter prefix", "longer prefix", "scaled features", "tower eps"])
def test_the_tolerance_would_notice(change, pair):
    ours, theirs = pair
    (sequence,), pixels, prefix = ids(5 + WINDOW), images(1), PATCHES + 5
    told = {"causal prefix": 0, "shorter prefix": prefix - 1, "longer prefix": prefix + 1}.get(change, prefix)
    vision = replace(ours.vision, tower=replace(ours.vision.tower, norm_eps=2e-2))
    other = Multimodal(ours.config, vision if change == "tower eps" else ours.vision)
    other.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        features = other.image_features(pixels)
        if change == "scaled features":
            features = features * ours.config.embed_scale
        got = other.language_model(one(sequence, told), features_ED=features)
        with pytest.raises(AssertionError, match="of the largest logit"):
            assert_close(got, logits_of(theirs, sequence, prefix, pixels), 10 * TOLERANCE)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", NAMES)
def test_saved_folder_loads_in_transformers_bit_equal(name, tmp_path):
    theirs = reference(tiny(name), TOWER)
    ours = load(save_reference(theirs, tmp_path / "theirs"))
    save_hf(ours, tmp_path / "ours")
    again, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    (sequence,), pixels = ids(9), images(1)
    with torch.inference_mode():
        assert torch.equal(
            logits_of(again, sequence, PATCHES + 5, pixels), logits_of(theirs, sequence, PATCHES + 5, pixels)
        )
    mine = load(tmp_path / "ours")
    assert (mine.config, mine.vision) == (ours.config, ours.vision)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert (processor.size["height"], processor.resample, processor.image_seq_length) == (56, 3, PATCHES)


PUBLISHED = ("vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.")
NAMINGS = {
    "released": PUBLISHED,
    "Transformers 5": ("vision_tower.", "multi_modal_projector.", "language_model.model."),
    "its modules since 4.52": (
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
        "model.language_model.",
    ),
    "its modules in 5": ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model."),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_naming_is_read(naming, tmp_path):
    """With a copy of the tied head and SigLIP's unused pooling head, which some files carry."""
    ours = load(save_reference(reference(tiny(NAMES[1]), TOWER), tmp_path / "theirs"))
    folder = save_hf(ours, tmp_path / "ours")
    weights = load_file(folder / "model.safetensors")
    assert {name.split("embeddings")[0] for name in weights if "embeddings" in name} == {PUBLISHED[0]}
    renamed = {}
    for name, value in weights.items():
        old, new = next((o, n) for o, n in zip(PUBLISHED, NAMINGS[naming], strict=True) if name.startswith(o))
        renamed[new + name.removeprefix(old)] = value
    head = "lm_head.weight" if NAMINGS[naming][2].startswith("model.") else "language_model.lm_head.weight"
    renamed[head] = weights["language_model.model.embed_tokens.weight"].clone()
    renamed[NAMINGS[naming][0] + "head.probe"] = torch.zeros(1, 1, 36)
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    for name, value in load(folder).state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    renamed[head] += 1
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="differs from the embedding"):
        load(folder)


# config.json as released, and of paligemma2-28b-pt-896 as far as it says anything about the numbers
RELEASED_1 = PUBLISHED_CONFIGS["paligemma-3b-pt-224"]
RELEASED_2 = {
    **RELEASED_1,
    "projection_dim": 4608,
    "hidden_size": 4608,
    "text_config": {
        "hidden_size": 4608,
        "intermediate_size": 36864,
        "model_type": "gemma2",
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 144,
        "vocab_size": 257216,
    },
    "vision_config": {**RELEASED_1["vision_config"], "image_size": 896, "projection_dim": 4608},
}


@pytest.mark.parametrize(
    ("name", "released"), [("paligemma-3b-pt-224", RELEASED_1), ("paligemma2-28b-pt-896", RELEASED_2)]
)
def test_what_released_files_leave_out(name, released):
    member = family.get(name)
    assert config_vision.vision_from_hf(released, name) == member.vision
    read = config_hf.from_hf(released, name)
    scale = member.decoder.attention[0].scale
    assert replace_layers(read, attention={"scale": scale}) == member.decoder
    assert all(mixer.scale == pytest.approx(scale) for mixer in read.attention)
    written = config_hf.to_hf(member.decoder, member.vision)
    assert config_vision.vision_from_hf(written, name) == member.vision
    again = config_hf.from_hf(written, name)
    assert replace_layers(again, attention={"scale": read.attention[0].scale}) == read


@pytest.mark.parametrize(
    ("section", "change", "error", "message"),
    [
        ("vision_config", {"model_type": "clip_vision_model"}, ConfigError, "known: siglip_vision_model"),
        ("vision_config", {"hidden_act": "gelu"}, ConfigError, "'gelu_pytorch_tanh' is implemented"),
        ("vision_config", {"num_channels": 1}, ConfigError, "num_channels=1"),
        ("vision_config", {"image_size": [224, 224]}, WeightsError, "image_size=.* must be a whole number"),
        ("vision_config", {"image_size": 225}, ConfigError, "patch_size=14 does not divide image_size=225"),
        ("vision_config", {"layer_norm_eps": "small"}, WeightsError, "must be a number"),
        ("text_config", {"model_type": "llama"}, ConfigError, "known: gemma, gemma2"),
        ("text_config", {"vocab_size": 257_152}, ConfigError, "image_token_index=257152 has no row"),
        (None, {"text_config": None}, WeightsError, "'paligemma' without a text_config"),
        (None, {"vision_config": []}, WeightsError, "'paligemma' without a vision_config"),
        (None, {"image_token_index": None}, WeightsError, "image_token_id is missing"),
        (None, {"projection_dim": 1024}, ConfigError, "projection_dim=1024 is not the decoder's 2048"),
    ],
)
def test_configurations_that_are_refused(section, change, error, message):
    changed = (
        {**RELEASED_1, **change} if section is None else {**RELEASED_1, section: {**RELEASED_1[section], **change}}
    )
    with pytest.raises(error, match=message):
        _ = config_hf.from_hf(changed, "config.json"), config_vision.vision_from_hf(changed, "config.json")


def test_a_resolution_that_the_checkpoint_lacks(tmp_path):
    """A config.json of another resolution than the table of positions: named, with both shapes."""
    import json

    save_reference(reference(tiny(NAMES[0]), TOWER), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["image_size"] = 112
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        WeightsError, match=r"position_embedding.weight is \(16, 36\) in the file, \(64, 36\) in the model"
    ):
        load(tmp_path)
