"""The modules themselves: what they are called, how they print, how weights move, what compilation sees."""

import pytest
import torch

from gemkit import family, nn, ops
from gemkit.block_types import KINDS
from gemkit.errors import ConfigError
from gemkit.nn import Batch
from gemkit.ops.quantized import Quantized


def on_meta(name: str) -> nn.LanguageModel:
    with torch.device("meta"):
        return nn.build(family.get(name).decoder, family.get(name).vision)


RUNNABLE = [
    "gemma-2b",
    "gemma-7b",
    "gemma-2-2b",
    "gemma-2-9b",
    "gemma-2-27b",
    "gemma-3-270m",
    "gemma-3-1b",
    "gemma-3-27b",
    "recurrentgemma-2b",
    "recurrentgemma-9b",
    "paligemma-3b-pt-224",
    "paligemma2-10b-pt-896",
]


@pytest.mark.parametrize("name", RUNNABLE)
def test_parameters_are_those_of_the_data(name):
    found = [(n, tuple(p.shape)) for n, p in on_meta(name).named_parameters()]
    assert found == list(family.parameters(family.get(name).decoder, family.get(name).vision))


def test_the_tree_of_gemma_7b_reads_like_transformers():
    lines = [line.strip() for line in str(on_meta("gemma-7b")).splitlines()]
    for expected in (
        "(embed_tokens): Embedding(256000, 3072)",
        "(0-27): 28 x Block(",
        "(q_proj): Linear(in_features=3072, out_features=4096, bias=False)",
        "(o_proj): Linear(in_features=4096, out_features=3072, bias=False)",
        "(gate_proj): Linear(in_features=3072, out_features=24576, bias=False)",
        "(down_proj): Linear(in_features=24576, out_features=3072, bias=False)",
        "(lm_head): Head(in_features=3072, out_features=256000, tied to embed_tokens)",
    ):
        assert expected in lines


def test_the_head_is_the_embedding():
    module = nn.Decoder(tiny_config())
    assert module.lm_head.weight is module.embed_tokens.weight
    module.set_param("embed_tokens.weight", torch.nn.Parameter(torch.ones(64, 32)))
    assert module.lm_head.weight is module.embed_tokens.weight
    module.to(torch.bfloat16)
    assert module.lm_head.weight is module.embed_tokens.weight


GLOBAL = family.Global(heads=2, kv_heads=1, head_dim=32, scale=32**-0.5)


def tiny_config(**changes) -> family.DecoderConfig:
    settings = {
        "vocab_size": 64,
        "width": 32,
        "layers": layers(GLOBAL),
        "max_context": 64,
    }
    return family.DecoderConfig(**{**settings, **changes})


def layers(*mixers: family.Mixer) -> tuple[family.Layer, ...]:
    return family.repeat(*mixers, ffw=family.Mlp(64), total=len(mixers))


def quantized(rows: int, columns: int) -> Quantized:
    weight = Quantized.empty(KINDS["Q8_0"], (rows, columns))
    weight.planes["codes"].copy_(torch.randint(-127, 128, (rows, columns)))
    weight.planes["scales"].fill_(0.01)
    return weight


def test_quantized_weights_move_but_are_never_cast_nor_trained():
    module = nn.Decoder(tiny_config())
    weight = quantized(64, 32)
    module.set_param("embed_tokens.weight", weight)
    module.to(torch.bfloat16)
    assert module.lm_head.weight.planes["scales"].dtype == torch.float16
    assert "embed_tokens.weight" not in dict(module.named_parameters())
    assert module.to("meta").embed_tokens.weight.device.type == "meta"
    module.set_param("embed_tokens.weight", torch.nn.Parameter(torch.zeros(64, 32)))  # and back to a dense one
    assert "embed_tokens.weight" in dict(module.named_parameters())
    assert "Q8_0" in repr(_with(quantized(64, 32)))


def _with(weight: Quantized) -> nn.decoder.Linear:
    linear = nn.decoder.Linear(32, 64)
    linear.set_param("weight", weight)
    return linear


@pytest.mark.parametrize("rows", [1, 64, 40_000])  # 40,000 rows of 32 are more than one piece
def test_a_quantized_linear_equals_the_dense_one(rows):
    torch.manual_seed(0)
    weight, x = quantized(rows, 32), torch.randn(5, 32)
    dense = weight.dequantize()
    # float32 sums of 32 products, in another order
    torch.testing.assert_close(ops.linear(x, weight), x @ dense.T, rtol=1e-5, atol=1e-5)
    bias = torch.randn(rows)
    torch.testing.assert_close(ops.linear(x, weight, bias), x @ dense.T + bias, rtol=1e-5, atol=1e-5)
    ids = torch.tensor([0, rows - 1, 0])
    assert torch.equal(ops.embed(ids, weight, 2.0), dense[ids] * 2)
    assert ops.embed(ids, weight, 1.0, run_dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("width", "factor"), [(2048, 45.25), (3072, 55.5), (2560, 50.5), (640, 25.25)])
def test_the_embedding_scale_is_rounded_before_it_multiplies(width, factor):
    """Published values of sqrt(width) in bf16; RecurrentGemma rounds to bf16 whatever the run dtype."""
    table = torch.ones(1, 1, dtype=torch.bfloat16)
    ids = torch.zeros(1, dtype=torch.int64)
    assert ops.embed(ids, table, width**0.5).item() == factor
    assert ops.embed(ids, table.float(), width**0.5, "bfloat16").item() == factor
    assert ops.embed(ids, table.float(), width**0.5).item() == pytest.approx(width**0.5, rel=1e-7)


def test_rope_tells_neighbours_apart_at_the_end_of_the_context():
    """In bf16 the positions 8190 and 8191 are one number: positions must stay integers and angles float32."""
    table = ops.rope_table(torch.tensor([8190, 8191]), 256, 10_000.0)
    x = torch.ones(2, 1, 256, dtype=torch.bfloat16)
    turned = ops.rope(x, table)
    exact = torch.tensor([8190.0, 8191.0], dtype=torch.float64)
    assert not torch.equal(turned[0], turned[1])
    # float32 angles near 8191 are 5e-4 apart, so their cosines are that exact
    torch.testing.assert_close(table[0][:, 0], exact.cos().float(), rtol=0, atol=5e-4)


def test_partial_rope_leaves_the_rest_alone():
    x = torch.randn(3, 2, 16)
    turned = ops.rope(x, ops.rope_table(torch.arange(3), 8, 10_000.0))
    assert torch.equal(turned[..., 8:], x[..., 8:])
    torch.testing.assert_close(turned[..., :8].norm(dim=-1), x[..., :8].norm(dim=-1))  # a rotation


def test_attention_says_which_kernel_and_why():
    assert ops.attention_kernel(None)[0] == "sdpa"
    kernel, reason = ops.attention_kernel(50.0)
    assert kernel == "explicit"
    assert "soft-cap" in reason


def test_compiled_modules_give_the_same_numbers():
    """Attention and recurrence are opaque to compilation, and new boundaries are data to it."""
    torch.manual_seed(0)
    module = nn.Decoder(tiny_config(layers=layers(GLOBAL, family.Recurrent(32, num_blocks=2))))
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.2)
    compiled = torch.compile(module, backend="aot_eager")
    with torch.no_grad():
        for lengths in ([5, 3], [2, 6], [8]):
            batch = Batch.of([list(range(n)) for n in lengths])
            torch.testing.assert_close(compiled(batch), module(batch))


_TOWER = family.Vision(4, patch_size=2, width=8, depth=1, num_heads=2, mlp_width=8)
TINY_TOWER = family.Modality(_TOWER, placeholder=63)


def tiny_paligemma() -> nn.Multimodal:
    torch.manual_seed(0)
    module = nn.Multimodal(tiny_config(), TINY_TOWER)
    for p in module.parameters():
        torch.nn.init.normal_(p, 0, 0.3)
    return module


def test_a_compiled_image_model_gives_the_same_numbers():
    module = tiny_paligemma()
    compiled = torch.compile(module, backend="aot_eager")
    with torch.no_grad():
        for images, prefix in ((1, 5), (2, 9), (1, 4)):
            rows = range(4 * images)
            batch = Batch.of([[63] * len(rows) + [1, 2, 3]], spans=[(0, prefix)], image_rows=rows)
            pixels = torch.randn(images, 3, 4, 4)
            torch.testing.assert_close(compiled(batch, pixels_ICSS=pixels), module(batch, pixels_ICSS=pixels))


def test_image_features_are_where_the_batch_says_and_unscaled():
    """The input of the first layer: features as they are in the rows of the images, scaled embeddings elsewhere."""
    module = tiny_paligemma()
    got = []
    module.language_model.layers[0].register_forward_pre_hook(lambda _, args: got.append(args[0]))
    pixels = torch.randn(2, 3, 4, 4)
    rows = [5, 6, 7, 8, 0, 1, 2, 3]  # of the first image, which the second sequence shows, then of the second
    module(Batch.of([[63] * 4 + [7], [63] * 4 + [9]], spans=[(0, 5), (5, 10)], image_rows=rows), pixels_ICSS=pixels)
    assert torch.equal(got[0][rows], module.image_features(pixels))
    assert torch.equal(got[0][[4, 9]], module.language_model.embed_tokens(torch.tensor([7, 9])))


def test_what_an_image_model_refuses():
    module = tiny_paligemma()
    batch = Batch.of([[63] * 4], spans=[(0, 4)], image_rows=range(4))
    with pytest.raises(ConfigError, match=r"this tower sees \(images, 3, 4, 4\)"):
        module(batch, pixels_ICSS=torch.zeros(1, 3, 6, 6))
    with pytest.raises(ConfigError, match="8 image features for 4 image_rows"):
        module(batch, pixels_ICSS=torch.zeros(2, 3, 4, 4))
    with pytest.raises(ConfigError, match="0 image features for 4 image_rows"):
        module(batch)
    with pytest.raises(ConfigError, match="placeholder=63 is beyond the 63 rows"):
        nn.Multimodal(tiny_config(vocab_size=63), TINY_TOWER)
    recurrent = nn.Decoder(tiny_config(layers=layers(family.Recurrent(32, num_blocks=2))))
    with pytest.raises(ConfigError, match="a recurrent layer cannot see what comes after"):
        recurrent(Batch.of([[1, 2]], spans=[(0, 2)]))
