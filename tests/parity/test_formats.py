"""The other published formats: the same weights, the same numbers, whichever file they came from."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from gemkit import family
from gemkit.nn import Batch
from gemkit.ops import Quantized
from gemkit.weights.checkpoint import find
from gemkit.weights.load import load_module
from support.tiny import WINDOW, assert_close, load, reference, tiny, tokens

GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ARCHITECTURES = {"gemma-2b": "gemma", "gemma-2-2b": "gemma2", "gemma-3-1b": "gemma3"}


def write_gguf(model, config, architecture, path, kind):
    """The file that llama.cpp's converter writes: its names, norms plus one, `kind` for matrices. The gguf package
    quantizes; `model` is given the numbers that the file then means."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(len(config.layers))
    heads = config.attention[0]
    writer.add_feed_forward_length(config.layers[0].ffw.width)
    writer.add_head_count(heads.heads)
    writer.add_head_count_kv(heads.kv_heads)
    writer.add_key_length(heads.head_dim)
    writer.add_value_length(heads.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if architecture != "gemma":
        writer.add_sliding_window(config.windows[0])
    if heads.softcap:
        writer.add_attn_logit_softcapping(heads.softcap)
        writer.add_final_logit_softcapping(config.final_softcap)
    for name, weight in model.model.named_parameters():
        stem, values = name.removesuffix(".weight"), weight.detach().numpy()
        if "norm" in stem:
            writer.add_tensor(_gguf_name(stem, architecture), values + np.float32(1))
            with torch.no_grad():  # what is left of w after 1 + w was rounded
                weight.copy_(torch.from_numpy((values + np.float32(1)) - np.float32(1)))
            continue
        data = gguf.quants.quantize(values, kind)
        writer.add_tensor(_gguf_name(stem, architecture), data, raw_dtype=kind)
        with torch.no_grad():
            weight.copy_(torch.from_numpy(gguf.quants.dequantize(data, kind).reshape(values.shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(stem, architecture):
    if stem == "embed_tokens":
        return "token_embd.weight"
    if stem == "norm":
        return "output_norm.weight"
    _, number, leaf = stem.split(".", 2)
    norms = {
        "post_attention_layernorm": "ffn_norm" if architecture == "gemma" else "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    return f"blk.{number}.{ {**GGUF_NAMES, **norms}[leaf] }.weight"


KINDS = [gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q5_1")]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gguf(name, kind, tmp_path):
    config = tiny(name)
    if config.width % 32:  # blocks run over 32 numbers of a row; Gemma 3 1B has 4 heads, so 16 at this size
        config = replace(config, width=32)
    theirs = reference(config)
    path = tmp_path / "tiny.gguf"
    write_gguf(theirs, config, ARCHITECTURES[name], path, kind)
    ours = load(path, dtype="float32")
    assert ours.config == config  # metadata and implied settings give the same architecture
    if kind.name.startswith("Q"):
        assert isinstance(ours.layers[0].mlp.up_proj.weight, Quantized)
        assert ours.embed_tokens.weight is ours.lm_head.weight
    ids = tokens(3 * WINDOW + 5)[0]
    with torch.inference_mode():
        assert_close(ours(Batch.of([ids])), theirs(ids[None]).logits[0])
        dense = load(path, dtype="float32", quantized=False)
        assert not any(isinstance(m.weight, Quantized) for m in dense.modules() if hasattr(m, "weight"))
        assert_close(dense(Batch.of([ids])), theirs(ids[None]).logits[0])


@pytest.mark.parametrize("name", ["gemma-2b", "gemma-2-2b", "gemma-3-1b"])
def test_gemma_pytorch_checkpoint(name, tmp_path, monkeypatch):
    """google/gemma_pytorch: one file, q, k and v as rows of one matrix, rotary tables among the tensors, no config.

    The architecture follows from the shapes, so the tiny one stands in for the member in the registry."""
    config = tiny(name)
    theirs = reference(config)
    state = {}
    for key, value in theirs.model.state_dict().items():
        if ".q_proj" in key:
            parts = [theirs.model.state_dict()[key.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
            state["model." + key.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif key == "embed_tokens.weight":
            state["embedder.weight"] = value
        elif ".k_proj" not in key and ".v_proj" not in key:
            state["model." + key.replace("q_norm", "query_norm").replace("k_norm", "key_norm")] = value
    state["local_freqs_cis" if name == "gemma-3-1b" else "freqs_cis"] = torch.ones(4, 2, dtype=torch.complex64)
    torch.save({"model_state_dict": state}, tmp_path / "model.ckpt")

    members = tuple(replace(m, decoder=config) if m is family.get(name) else m for m in family.members())
    monkeypatch.setattr(family, "members", lambda: members)
    ours = load(tmp_path / "model.ckpt")
    assert ours.config == config
    ids = tokens(3 * WINDOW + 5)[0]
    with torch.inference_mode():
        assert_close(ours(Batch.of([ids])), theirs(ids[None]).logits[0])


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", ""])
def test_text_part_of_an_image_checkpoint(prefix, tmp_path):
    """Gemma 3 from 4B up is published with an image tower; its text decoder loads from old and new names."""
    import json

    from safetensors.torch import save_file

    theirs = reference(tiny("gemma-3-4b"))
    tensors = {prefix + k: v for k, v in theirs.model.state_dict().items()}
    tensors["vision_tower.vision_model.post_layernorm.weight"] = torch.ones(4)
    tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "gemma3", "text_config": theirs.config.to_dict(), "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with find(tmp_path) as checkpoint:
        ours, report = load_module(checkpoint)
    assert any("image tower" in note for note in report.notes)
    ids = tokens(3 * WINDOW)[0]
    with torch.inference_mode():
        assert_close(ours(Batch.of([ids])), theirs(ids[None]).logits[0])


def test_a_published_copy_of_the_tied_head_must_be_one(tmp_path):
    from safetensors.torch import load_file, save_file

    from gemkit.errors import WeightsError

    reference(tiny("gemma-2b")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    load(tmp_path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"lm_head\.weight differs from the embedding"):
        load(tmp_path)


def test_what_was_rounded_is_reported(tmp_path):
    reference(tiny("gemma-2b")).save_pretrained(tmp_path)
    with find(tmp_path) as checkpoint:
        assert load_module(checkpoint)[1].notes == []
        module, report = load_module(checkpoint, dtype="bfloat16")
    count = len(list(module.parameters()))
    assert report.notes == [f"{count} weights were rounded from float32 to bfloat16"]
    assert report.nbytes == sum(p.nbytes for p in module.parameters())
