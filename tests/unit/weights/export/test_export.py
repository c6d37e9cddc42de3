"""Each format, read, written and read again, gives the same bits: the tables work in both directions."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gemkit import family
from gemkit.errors import ConfigError
from gemkit.ops import Quantized
from gemkit.text import Tokenizer
from gemkit.weights import config_gguf
from gemkit.weights.checkpoint import find
from gemkit.weights.export.gguf import save_gguf
from gemkit.weights.export.hf import save_hf
from gemkit.weights.export.torch_checkpoint import save_torch_checkpoint
from gemkit.weights.formats.gguf_blocks import block_bytes
from gemkit.weights.load import load_module
from gemkit.weights.maps import Layout, Part, name_map
from support.tiny import TOWER, load, reference, tiny
from support.vocabularies import small_model

TEXT = ["gemma-2b", "gemma-2-2b", "gemma-2-27b", "gemma-3-1b"]
DTYPES = [torch.float32, torch.bfloat16]


def same(ours, theirs):
    """Two modules with the same bits in every parameter."""
    mine, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    return mine.keys() == other.keys() and all(
        mine[name].dtype == other[name].dtype and torch.equal(mine[name], other[name]) for name in mine
    )


def same_tensors(ours, theirs):
    """Two dictionaries of tensors with the same names, dtypes, shapes and bits."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value.dtype, value.shape) == (theirs[name].dtype, theirs[name].shape), name
        assert torch.equal(value, theirs[name]), name


def as_members(monkeypatch, name, decoder):
    """Files without a configuration are read as the member of these shapes: the tiny one stands in for the real one."""
    members = tuple(replace(m, decoder=decoder) if m is family.get(name) else m for m in family.members())
    monkeypatch.setattr(family, "members", lambda: members)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*TEXT, "recurrentgemma-2b", "paligemma-3b-mix-224"])
def test_hugging_face(name, dtype, tmp_path):
    vision = TOWER if family.get(name).vision is not None else None
    model = reference(tiny(name), vision).to(dtype)
    model.save_pretrained(tmp_path / "theirs")
    read = load(tmp_path / "theirs")
    save_hf(read, tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    # this Transformers leaves out a level that the released files have
    same_tensors(ours, {name.replace("vision_tower.", "vision_tower.vision_model."): v for name, v in theirs.items()})
    assert same(load(tmp_path / "ours"), read)


def gemma_pytorch(decoder, dtype):
    """What google/gemma_pytorch's checkpoint of that architecture holds, with random weights."""
    first, ffw = decoder.attention[0], decoder.layers[0].ffw.width
    q, kv = first.heads * first.head_dim, first.kv_heads * first.head_dim
    norms = ["input_layernorm", "post_attention_layernorm"]
    if decoder.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    shapes = {"embedder.weight": (decoder.vocab_size, decoder.width), "model.norm.weight": (decoder.width,)}
    for i in range(len(decoder.layers)):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}.weight": (decoder.width,) for norm in norms}
        if first.qk_norm:
            shapes |= {f"{layer}self_attn.{side}_norm.weight": (first.head_dim,) for side in ("query", "key")}
        shapes |= {
            f"{layer}self_attn.qkv_proj.weight": (q + 2 * kv, decoder.width),
            f"{layer}self_attn.o_proj.weight": (decoder.width, q),
            f"{layer}mlp.gate_proj.weight": (ffw, decoder.width),
            f"{layer}mlp.up_proj.weight": (ffw, decoder.width),
            f"{layer}mlp.down_proj.weight": (decoder.width, ffw),
        }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TEXT)
def test_gemma_pytorch(name, dtype, tmp_path, monkeypatch):
    decoder = tiny(name)
    as_members(monkeypatch, name, decoder)
    state = gemma_pytorch(decoder, dtype)
    torch.save({"model_state_dict": state}, tmp_path / "theirs.ckpt")
    read = load(tmp_path / "theirs.ckpt")
    assert save_torch_checkpoint(read, tmp_path / "ours.ckpt") == tmp_path / "ours.ckpt"
    same_tensors(torch.load(tmp_path / "ours.ckpt", weights_only=True)["model_state_dict"], state)
    assert same(load(tmp_path / "ours.ckpt"), read)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deepminds_recurrentgemma(dtype, tmp_path, monkeypatch):
    from support.deepmind import Reference

    decoder = tiny("recurrentgemma-2b")
    as_members(monkeypatch, "recurrentgemma-2b", decoder)
    state = {name: value.to(dtype) for name, value in Reference(decoder).model.state_dict().items()}
    torch.save(state, tmp_path / "theirs.pt")
    read = load(tmp_path / "theirs.pt")
    save_torch_checkpoint(read, tmp_path / "ours.pt")
    same_tensors(torch.load(tmp_path / "ours.pt", weights_only=True), state)
    assert same(load(tmp_path / "ours.pt"), read)


def test_what_a_torch_checkpoint_has_no_place_for(tmp_path):
    reference(tiny("paligemma-3b-mix-224"), TOWER).save_pretrained(tmp_path / "image")
    with pytest.raises(ConfigError, match=r"ckpt files have no name for .*: save this model as safetensors"):
        save_torch_checkpoint(load(tmp_path / "image"), tmp_path / "x.ckpt")
    assert not (tmp_path / "x.ckpt").exists()


# ── GGUF ────────────────────────────────────────────────────────────────────────────────────────────────────────────

ARCHITECTURES = {"gemma-2b": "gemma", "gemma-2-2b": "gemma2", "gemma-3-1b": "gemma3"}
# K types have 256 numbers a block, the others 32; a row that no block divides stays dense in these
KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def wide(name):
    """The tiny member with rows of 256, which blocks of every type divide."""
    heads = {"heads": 4, "kv_heads": 4, "head_dim": 64, "scale": 64**-0.5}
    decoder = family.replace_layers(tiny(name), attention=heads, ffw={"width": 256})
    return replace(decoder, width=256, vocab_size=512)


def random_gguf(path, decoder, kind, vocabulary):
    """A GGUF of that architecture by the gguf package: random bytes as blocks, whose scales alone are sane."""
    generator = np.random.default_rng(0)
    keys = config_gguf.to_gguf(decoder)
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture"))
    for key, value in keys.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(key, value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(vocabulary.pieces))
    writer.add_token_scores(vocabulary.scores.tolist())
    writer.add_token_types(vocabulary.types.tolist())
    table = name_map("gguf", decoder)
    type_id = gguf.GGMLQuantizationType[kind]
    for name, shape in family.parameters(decoder):
        values = generator.standard_normal(shape, np.float32)
        if len(shape) == 1:
            writer.add_tensor(table.file_name(name), values + np.float32(1))
        elif kind.endswith("_K"):  # the package has no quantizer of these
            blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // 256 * block_bytes(kind)), np.uint8)
            writer.add_tensor(table.file_name(name), blocks, raw_dtype=type_id)
        else:
            writer.add_tensor(table.file_name(name), gguf.quants.quantize(values, type_id), raw_dtype=type_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored(path):
    """The tensors of a GGUF as the gguf package reads them: type, shape and bytes by name."""
    return {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gguf(name, kind, tmp_path):
    decoder = wide(name)
    tokenizer = Tokenizer.from_model(small_model())
    random_gguf(tmp_path / "theirs.gguf", decoder, kind, tokenizer.vocabulary)
    with find(tmp_path / "theirs.gguf") as theirs:
        module = load_module(theirs, dtype="float32")[0]
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind)  # in memory they are float32
        save_gguf(module, tmp_path / "ours.gguf", tokenizer=tokenizer, prompts=("complete", "chat"), dtype=dtype)
    mine, other = stored(tmp_path / "ours.gguf"), stored(tmp_path / "theirs.gguf")
    norms = {name for name in mine if "norm" in name}
    assert mine.keys() == other.keys()
    assert {name: mine[name] for name in mine.keys() - norms} == {name: other[name] for name in mine.keys() - norms}
    for name in norms:  # from 1/2 on, a step of 1 + w is one of w; below, w has no smaller ones
        near, far = (np.frombuffer(side[name][2], np.float32) for side in (mine, other))
        assert np.array_equal(near[far >= 0.5], far[far >= 0.5])
        assert np.abs(near - far).max() <= 2**-24
    with find(tmp_path / "ours.gguf") as ours:
        again = load_module(ours, dtype="float32")[0]
        assert (ours.decoder, ours.prompts) == (decoder, ("complete", "chat"))
        assert ours.tokenizer.vocabulary.pieces == tokenizer.vocabulary.pieces
    assert bits(again) == bits(module)


def bits(module):
    """Every weight's bytes, of quantized ones those of each plane."""
    found = {}
    for name, _ in family.parameters(module.config):
        value = module.get_param(name)
        planes = value.planes if isinstance(value, Quantized) else {"": value.detach()}
        found |= {(name, p): plane.contiguous().view(torch.uint8).numpy().tobytes() for p, plane in planes.items()}
    return found


def test_what_a_gguf_has_no_place_for(tmp_path):
    reference(tiny("paligemma-3b-mix-224"), TOWER).save_pretrained(tmp_path / "image")
    with pytest.raises(ConfigError, match="no place for an image tower"):
        save_gguf(load(tmp_path / "image"), tmp_path / "x.gguf")
    reference(tiny("recurrentgemma-2b")).save_pretrained(tmp_path / "recurrent")
    with pytest.raises(ConfigError, match="no GGUF architecture has the recurrence"):
        save_gguf(load(tmp_path / "recurrent"), tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("bound", [1.0, 2.0**-10, 2.0**-20])
def test_one_plus_a_weight_comes_back_to_the_bits_that_were_read(bound):
    """What `take` gives is a whole number of steps of 1 + w, so that adding 1 and taking it away changes nothing."""
    stored = 1 + bound * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    stored = torch.cat([stored, -stored, 16 * stored, torch.tensor([0.0, 1.0, -1.0, 0.5, 2**-30, -(2**-30)])])
    part = Part("x", "x", stored.shape, Layout(tuple(stored.shape), plus_one=True))
    for dtype in (torch.float32, torch.bfloat16):
        weight = part.take(stored).to(dtype)
        assert torch.equal(part.take(part.give(weight)).to(dtype), weight)
