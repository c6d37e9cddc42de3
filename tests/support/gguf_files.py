"""GGUF files of tiny members, written by the `gguf` package as llama.cpp's converter writes them, and otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from gemkit.family import DecoderConfig
from gemkit.text import Tokenizer
from support.tiny import reference, tiny

ARCHITECTURES = {"gemma-2b": "gemma", "gemma-2-2b": "gemma2", "gemma-3-1b": "gemma3"}
_NAMES = {
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
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}

Kind = gguf.GGMLQuantizationType
F32 = Kind.F32


def small(name: str) -> DecoderConfig:
    """A tiny member whose rows are blocks of 32: Gemma 3 1B has 4 heads, so 16 numbers a row at the usual size."""
    config = tiny(name)
    return replace(config, width=32) if config.width % 32 else config


def write(
    path: Path,
    model: transformers.PreTrainedModel,
    config: DecoderConfig,
    architecture: str,
    kind: Kind | Callable[[str], Kind] = F32,
    *,
    tokenizer: Tokenizer | None = None,
    keys: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    tensors: Mapping[str, np.ndarray] | None = None,
    writer: gguf.GGUFWriter | None = None,
    instead: tuple[str, Mapping[str, np.ndarray]] = ("", {}),
) -> Path:
    """A file with the converter's names, norms plus one, `kind` for matrices. The gguf package quantizes; `model` is
    given the numbers that the file then means.

    Args:
        kind: one, or the kind of a tensor by its name.
        keys: metadata, to add or instead of what the converter writes; `{arch}.` stands for the architecture.
        without: metadata to leave out.
        tensors: further ones, by name, as they are.
        writer: of other settings than the usual.
        instead: a kind, and blocks of it in the place of these matrices; `model` keeps its own.
    """
    writer = writer or gguf.GGUFWriter(path, architecture)
    heads = config.attention[0]
    metadata: dict[str, Any] = {
        "{arch}.context_length": config.max_context,
        "{arch}.embedding_length": config.width,
        "{arch}.block_count": len(config.layers),
        "{arch}.feed_forward_length": config.layers[0].ffw.width,
        "{arch}.attention.head_count": heads.heads,
        "{arch}.attention.head_count_kv": heads.kv_heads,
        "{arch}.attention.key_length": heads.head_dim,
        "{arch}.attention.value_length": heads.head_dim,
        "{arch}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
    }
    if architecture != "gemma":
        metadata["{arch}.attention.sliding_window"] = config.windows[0]
    if architecture == "gemma3":
        metadata["{arch}.rope.freq_base"] = 1_000_000.0
    if heads.softcap:
        metadata["{arch}.attn_logit_softcapping"] = heads.softcap
        metadata["{arch}.final_logit_softcapping"] = config.final_softcap
    if tokenizer is not None:
        metadata |= vocabulary(tokenizer)
    metadata |= keys or {}
    for key, value in metadata.items():
        if key not in without:
            add(writer, key.replace("{arch}", architecture), value)
    for name, weight in model.model.named_parameters():
        stem, values = name.removesuffix(".weight"), weight.detach().numpy()
        if "norm" in stem:
            writer.add_tensor(name_of(stem, architecture), values + np.float32(1))
            with torch.no_grad():  # what is left of w after 1 + w was rounded
                weight.copy_(torch.from_numpy((values + np.float32(1)) - np.float32(1)))
            continue
        theirs = name_of(stem, architecture)
        if theirs in instead[1]:
            writer.add_tensor(theirs, instead[1][theirs], raw_dtype=Kind[instead[0]])
            continue
        as_kind = kind if isinstance(kind, Kind) else kind(theirs)
        data = gguf.quants.quantize(values, as_kind)
        writer.add_tensor(theirs, data, raw_dtype=as_kind)
        with torch.no_grad():
            weight.copy_(torch.from_numpy(gguf.quants.dequantize(data, as_kind).reshape(values.shape)))
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file(None if writer.split_max_tensors else path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A key with the type that the converter gives such a value."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, list(value))


def vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    """Metadata of a tokenizer."""
    vocabulary = tokenizer.vocabulary
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(vocabulary.pieces),
        "tokenizer.ggml.scores": [float(score) for score in vocabulary.scores],
        "tokenizer.ggml.token_type": [int(kind) for kind in vocabulary.types],
        "tokenizer.ggml.bos_token_id": tokenizer.bos,
        "tokenizer.ggml.eos_token_id": tokenizer.eos,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
    }


def name_of(stem: str, architecture: str) -> str:
    """Transformers' name of a weight, without its end, to that in a GGUF."""
    if stem == "embed_tokens":
        return "token_embd.weight"
    if stem == "norm":
        return "output_norm.weight"
    _, number, leaf = stem.split(".", 2)
    after = "ffn_norm" if architecture == "gemma" else "post_attention_norm"
    return f"blk.{number}.{ {**_NAMES, 'post_attention_layernorm': after}[leaf] }.weight"


def tiny_file(path: Path, name: str = "gemma-3-1b", kind: Any = F32, **settings: Any) -> transformers.PreTrainedModel:
    """Write a tiny member; Transformers' model of it."""
    config = small(name)
    if (tokenizer := settings.get("tokenizer")) is not None:
        config = replace(config, vocab_size=len(tokenizer))
    model = reference(config)
    write(path, model, config, ARCHITECTURES[name], kind, **settings)
    return model
