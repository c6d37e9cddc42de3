"""Costs against published numbers, against what other people's libraries count, and against brute force."""

import itertools
from dataclasses import replace
from math import prod

import pytest

from gemkit.errors import ConfigError
from gemkit.family import Global, Mlp, Modality, Recurrent, Rope, Sliding, Vision, get, parameters, repeat
from gemkit.inspect import cost


def decoder_of(name):
    return get(name).decoder


def test_count_splits_as_the_reports_do():
    member = get("paligemma-3b-pt-224")
    count = cost.count(member.decoder, member.vision)
    assert count.embedding == 257_216 * 2048
    assert count.non_embedding == 1_981_884_416  # Gemma 1 2B
    assert count.vision == 412_442_352 + 1152 * 2048 + 2048
    assert count.total == 2_923_466_480


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("gemma-2b", 5.01), ("gemma-7b", 17.1), ("gemma-2-9b", 18.5), ("gemma-2-27b", 54.5)]
)
def test_released_weights_take_what_their_files_do(name, gigabytes):
    assert cost.weight_bytes(decoder_of(name)) / 1e9 == pytest.approx(gigabytes, abs=0.05)  # as many digits as said


def test_float32_is_four_bytes_a_parameter():
    member = get("paligemma-3b-pt-448")
    assert cost.weight_bytes(member.decoder, member.vision, "float32") == 4 * 2_924_351_216


@pytest.mark.parametrize(("dtype", "block_type"), [("int8", "Q8_0"), ("int4", "Q4_0")])
def test_blocks_take_what_gguf_gives_them(dtype, block_type):
    from gguf import GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    decoder = decoder_of("gemma-2-2b")
    expected = sum(
        prod(quant_shape_to_byte_shape(shape, GGMLQuantizationType[block_type])) if len(shape) == 2 else 2 * shape[0]
        for _, shape in parameters(decoder)
    )
    assert cost.weight_bytes(decoder, dtype=dtype) == expected


def test_image_tower_and_recurrence_stay_bfloat16_in_int4():
    member = get("paligemma-3b-pt-224")
    tower = cost.count(member.decoder, member.vision).vision
    with_tower = cost.weight_bytes(member.decoder, member.vision, "int4")
    assert with_tower - cost.weight_bytes(member.decoder, None, "int4") == 2 * tower
    decoder = decoder_of("recurrentgemma-2b")
    others = sum(prod(s) for name, s in parameters(decoder) if len(s) != 2 or "conv_1d" in name)
    linear = cost.count(decoder).total - others
    assert cost.weight_bytes(decoder, dtype="int4") == linear * 18 // 32 + 2 * others


def test_unknown_dtype():
    with pytest.raises(ConfigError, match="float8"):
        cost.weight_bytes(decoder_of("gemma-2b"), dtype="float8")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "per_token"),
    [
        ("gemma-2b", 18 * 1024),
        ("gemma-7b", 448 * 1024),
        ("gemma-2-2b", 106_496),
        ("gemma-2-9b", 344_064),
        ("gemma-2-27b", 376_832),
    ],
)
def test_cache_a_token(name, per_token):
    assert cost.cache_bytes_per_token(decoder_of(name)).total == per_token


def test_cache_a_token_by_kind():
    split = cost.cache_bytes_per_token(decoder_of("gemma-3-4b"))
    entry = 2 * 4 * 256 * 2  # a key and a value, 4 heads of 256, 2 bytes
    assert (split.global_attention, split.sliding_attention, split.recurrent) == (5 * entry, 29 * entry, 0)


def test_windows_bound_the_cache():
    decoder = decoder_of("gemma-2-2b")
    entry, layers = 2 * 4 * 256 * 2, 13
    at = cost.state_bytes(decoder, 8192)
    assert (at.global_attention, at.sliding_attention) == (layers * entry * 8192, layers * entry * 4096)
    assert cost.state_bytes(decoder, 4096).total == cost.cache_bytes_per_token(decoder).total * 4096
    assert cost.state_bytes(decoder, 4097).sliding_attention == cost.state_bytes(decoder, 4096).sliding_attention


def test_recurrent_state_is_constant():
    decoder = decoder_of("recurrentgemma-2b")
    recurrent = 18 * (2560 * 4 + 3 * 2560 * 2)  # float32 state, three inputs of the convolution in bfloat16
    assert {cost.state_bytes(decoder, n).recurrent for n in (0, 1, 100, 10**9)} == {recurrent}
    assert cost.state_bytes(decoder, 10**9).total == recurrent + 8 * 2 * 2049 * 256 * 2
    assert cost.state_bytes(decoder, 10**9).total / 1e6 == pytest.approx(17.2, abs=0.05)


def test_negative_context():
    with pytest.raises(ConfigError, match="-1"):
        cost.state_bytes(decoder_of("gemma-2b"), -1)


# ---------------------------------------------------------------- arithmetic, against what torch counts


def tiny(name):
    """A small decoder with everything that costs arithmetic, and the transformers configuration of the same."""
    import transformers as hf

    sizes = {"hidden_size": 96, "head_dim": 32, "num_attention_heads": 4, "vocab_size": 320, "num_hidden_layers": 6}
    base = replace(get(name).decoder, width=96, vocab_size=320)
    heads = {"heads": 4, "head_dim": 32, "scale": 32**-0.5}
    if name == "gemma-7b":
        decoder = replace(base, layers=repeat(Global(kv_heads=4, **heads), ffw=Mlp(256), total=6))
        return decoder, hf.GemmaConfig(**sizes, num_key_value_heads=4, intermediate_size=256)
    if name == "gemma-2-2b":
        pattern = Sliding(64, kv_heads=2, **heads), Global(kv_heads=2, **heads)
        decoder = replace(base, layers=repeat(*pattern, ffw=Mlp(256), total=6))
        config = hf.Gemma2Config(**sizes, num_key_value_heads=2, intermediate_size=256, sliding_window=64)
        return decoder, config
    recurrent = Recurrent(96, num_blocks=4)
    sliding = Sliding(65, rope=Rope(fraction=0.5), kv_heads=1, **heads)
    decoder = replace(base, layers=repeat(recurrent, recurrent, sliding, ffw=Mlp(256), total=6))
    config = hf.RecurrentGemmaConfig(
        **sizes, num_key_value_heads=1, intermediate_size=512, lru_width=96, attention_window_size=64
    )
    return decoder, config


@pytest.mark.parametrize("name", ["gemma-7b", "gemma-2-2b", "recurrentgemma-2b"])
def test_flops_are_those_that_torch_counts(name):
    import torch
    import transformers as hf
    from torch.utils.flop_counter import FlopCounterMode

    decoder, config = tiny(name)
    config._attn_implementation = "eager"
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    tokens = 48
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    # eager attention computes the whole square, so every token costs as much as one with `tokens` in its context;
    # besides, it multiplies rope's frequencies by positions, and pads its convolution by three places: below 1 %
    assert counter.get_total_flops() / tokens == pytest.approx(cost.decode_flops(decoder, tokens), rel=0.01)


def test_image_flops_are_those_that_torch_counts():
    import torch
    import transformers as hf
    from torch.utils.flop_counter import FlopCounterMode

    vision = Modality(Vision(image_size=112, width=96, depth=2, num_heads=4, mlp_width=160), placeholder=0)
    config = hf.SiglipVisionConfig(
        image_size=112,
        patch_size=14,
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=160,
        vision_use_head=False,
        attn_implementation="eager",
    )
    tower = hf.SiglipVisionModel(config).eval()
    decoder = tiny("gemma-7b")[0]
    project = torch.nn.Linear(96, decoder.width)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        project(tower(torch.zeros(1, 3, 112, 112)).last_hidden_state)
    assert counter.get_total_flops() == cost.image_flops(decoder, vision)


def test_flops_by_formula():
    decoder = decoder_of("gemma-2-2b")
    assert cost.decode_flops(decoder, 0) == 2 * (2_614_341_888 - (26 * 4 + 1) * 2304)  # norms do not multiply matrices
    attended = 13 * 8192 + 13 * 4096
    assert cost.decode_flops(decoder, 8192) - cost.decode_flops(decoder, 0) == 4 * 8 * 256 * attended


def test_a_token_reads_every_weight_and_the_state():
    decoder = decoder_of("gemma-2b")
    assert cost.decode_bytes(decoder, 1000) == 2 * 2_506_172_416 + 18 * 1024 * 1000


# ---------------------------------------------------------------- where memory curves cross


def scan(a, b, head_start, until):
    """Every context at which the other model begins to need less, by trying them all."""
    found, leader = [], 0
    for n in range(1, until):
        gap = cost.state_bytes(b, n).total + head_start - cost.state_bytes(a, n).total
        if gap * leader < 0:
            found.append(n)
        leader = gap or leader
    return found


@pytest.mark.parametrize(("a", "b"), list(itertools.permutations(("gemma-2b", "gemma-3-4b", "recurrentgemma-2b"), 2)))
@pytest.mark.parametrize("head_start", [0, 460_800, -3_000_000, 30_000_000])
def test_crossings_are_those_of_a_scan(a, b, head_start):
    a, b = decoder_of(a), decoder_of(b)
    within = [n for n in cost.crossings(a, b, head_start) if n < 4000]
    assert within == scan(a, b, head_start, 4000)


def test_recurrentgemma_needs_less_than_gemma_from():
    a, b = decoder_of("gemma-2b"), decoder_of("recurrentgemma-2b")
    assert cost.crossings(a, b) == [46]  # 460,800 B of recurrent state over (18 KiB - 8 KiB) a token is 45
    ahead = cost.weight_bytes(b) - cost.weight_bytes(a)
    state = cost.state_bytes(b, 10**6).total
    assert cost.crossings(a, b, ahead) == [(ahead + state) // (18 * 1024) + 1]


def test_a_model_does_not_cross_itself():
    assert cost.crossings(decoder_of("gemma-2-2b"), decoder_of("gemma-2-2b")) == []


def test_an_image_at_every_resolution():
    """A patch is 14 pixels; a token of Gemma 1 2B keeps a key and a value of 256 in each of 18 layers, in bfloat16."""
    member = get("paligemma-3b-mix-448")
    found = cost.images(member.decoder, member.vision)
    assert [(image.size, image.tokens) for image in found] == [(448, 1024), (224, 256), (896, 4096)]
    assert [image.state_bytes for image in found] == [tokens * 18 * 2 * 256 * 2 for tokens in (1024, 256, 4096)]
    assert found[0].flops == cost.image_flops(member.decoder, member.vision)
    assert found[1].flops < found[0].flops / 4 < found[2].flops / 16  # patches attend to one another
