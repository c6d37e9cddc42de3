"""The files that are measured: the starter model, and exact 2B geometries with random weights from a seed.

Speed does not depend on what the weights are, only on how many there are and how they are stored. So no account is
needed, and the files are written here, once, into a cache: GGUF blocks with sane scales and random bits, in the mix of
types that llama.cpp's quantizer chooses, and Hugging Face folders for engines that read nothing else. Layers have
small weights, norms are 1, so that activations stay finite.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from worker import CACHE

from gemkit import family
from gemkit.family import DecoderConfig
from gemkit.files import DTYPES
from gemkit.text import Tokenizer
from gemkit.weights import config_hf, hub
from gemkit.weights.checkpoint import find
from gemkit.weights.maps import name_map

SEED = 0
DEVIATION = 0.02  # of weights: a row of 2,304 turns activations of 1 into ones of 1
ROWS = 1 << 20  # weights made at a time in a Hugging Face folder

Mix = Literal["Q4_K_M", "Q8_0"]
Type = gguf.GGMLQuantizationType
_FILE_TYPES = {"Q4_K_M": gguf.LlamaFileType.MOSTLY_Q4_K_M, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}


# ── the files, by name ──────────────────────────────────────────────────────────────────────────────────────────────


def starter() -> Path:
    """Real Gemma 3 270M, Q4_K_M."""
    return hub.starter()


def starter_q8_0() -> Path:
    """The starter's numbers, every matrix rounded again to Q8_0."""
    return _once(CACHE / "gemma-3-270m-q8_0.gguf", requantize_starter)


def gemma_2_2b(mix: Mix) -> Path:
    """Gemma 2 2B's geometry, random weights, as a GGUF."""
    decoder = family.get("gemma-2-2b").decoder
    name = f"gemma-2-2b-random-{mix.lower()}.gguf"
    return _once(CACHE / name, lambda path: write_gguf(path, decoder, mix))


def folder(member: str) -> Path:
    """A member's geometry, random bfloat16 weights, as a Hugging Face folder."""
    decoder = family.get(member).decoder
    return _once(CACHE / f"{member}-random", lambda path: write_folder(path, decoder))


def _once(path: Path, write: Callable[[Path], None]) -> Path:
    """The file or folder, written if it is not there yet. It has its name only when it is complete."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with _unfinished(path) as work:
            write(work)
            os.replace(work, path)
    return path


@contextmanager
def _unfinished(path: Path):
    place = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield place / path.name
    finally:
        shutil.rmtree(place, ignore_errors=True)


# ── GGUF ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def type_of(name: str, shape: tuple[int, ...], layers: int, mix: Mix) -> Type:
    """The type that llama.cpp's quantizer gives a tensor of a Gemma.

    Source: llama_tensor_get_type in src/llama-quant.cpp of llama.cpp, for an architecture whose output is its tied
    embedding: that table is Q6_K, and so are the values and the second feed-forward matrices of the first and last
    eighth of the layers and of every third between.
    """
    if len(shape) == 1:
        return Type.F32
    if mix == "Q8_0":
        return Type.Q8_0
    if name == "token_embd.weight":
        return Type.Q6_K
    _, number, stem, _ = name.split(".")
    layer, eighth = int(number), layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return Type.Q6_K if more and stem in ("attn_v", "ffn_down") else Type.Q4_K


def write_gguf(path: Path, decoder: DecoderConfig, mix: Mix, seed: int = SEED) -> None:
    """A Gemma 1 or 2 of random blocks, with the starter's vocabulary cut to `decoder.vocab_size` pieces.

    The member's widths must be multiples of 256 for Q4_K_M. One tensor is in memory at a time.
    """
    rng = np.random.default_rng(seed)
    kind = "gemma2" if decoder.post_norms else "gemma"
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name(f"{kind} {decoder.width} wide, random")
    writer.add_file_type(_FILE_TYPES[mix])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(decoder.max_context)
    writer.add_embedding_length(decoder.width)
    writer.add_block_count(len(decoder.layers))
    heads = decoder.attention[0]
    writer.add_feed_forward_length(decoder.layers[0].ffw.width)
    writer.add_head_count(heads.heads)
    writer.add_head_count_kv(heads.kv_heads)
    writer.add_key_length(heads.head_dim)
    writer.add_value_length(heads.head_dim)
    writer.add_layer_norm_rms_eps(decoder.norm_eps)
    if heads.softcap and decoder.final_softcap:
        writer.add_sliding_window(decoder.windows[0])
        writer.add_attn_logit_softcapping(heads.softcap)
        writer.add_final_logit_softcapping(decoder.final_softcap)
    with find(hub.starter()) as checkpoint:
        _copy(writer, checkpoint.reader.metadata, "tokenizer.", decoder.vocab_size)
    parts = name_map("gguf", decoder).parts(decoder, dict(family.parameters(decoder)))
    types = {part.file_name: type_of(part.file_name, part.shape, len(decoder.layers), mix) for part in parts}
    for part in parts:
        _announce(writer, part.file_name, part.shape, types[part.file_name])
    _write(writer, ((random_blocks(part.shape, types[part.file_name], rng)) for part in parts))


def requantize_starter(path: Path) -> None:
    """The starter with its matrices in Q8_0, by the gguf package's own quantizer; all else as it is."""
    with find(hub.starter()) as checkpoint:
        reader = checkpoint.reader
        writer = gguf.GGUFWriter(path, reader.metadata["general.architecture"])
        own = ("general.architecture", "general.file_type")
        _copy(writer, {key: value for key, value in reader.metadata.items() if key not in own})
        writer.add_file_type(_FILE_TYPES["Q8_0"])
        types = {name: type_of(name, entry.shape, 0, "Q8_0") for name, entry in reader.entries.items()}
        for name, entry in reader.entries.items():
            _announce(writer, name, entry.shape, types[name])

        def values(name: str) -> np.ndarray:
            stored: Any = reader.read(name)
            dense = stored if reader.entries[name].dtype in DTYPES else stored.dequantize()
            return gguf.quants.quantize(dense.float().numpy(), types[name])

        _write(writer, map(values, reader.entries))


def random_blocks(shape: tuple[int, ...], type: Type, rng: np.random.Generator) -> np.ndarray:
    """Valid blocks of a type, with weights of about `DEVIATION` around 0: every bit random but those of the scales.

    A vector is a norm, and those are 1.
    """
    if type == Type.F32:
        return np.ones(shape, np.float32)
    elements, size = gguf.GGML_QUANT_SIZES[type]
    assert shape[-1] % elements == 0, f"rows of {shape[-1]} cannot be cut into blocks of {elements}"
    count = prod(shape) // elements
    blocks = np.frombuffer(bytearray(rng.bytes(count * size)), np.uint8).reshape(count, size)
    if type == Type.Q8_0:  # d, 32 bytes: d * q
        blocks[:, :2] = _half(DEVIATION / 74)  # the deviation of a uniform byte
        signed = blocks[:, 2:].view(np.int8)
        np.maximum(signed, -127, out=signed)  # a quantizer never gives -128, and kernels may count on that
    elif type == Type.Q6_K:  # 128 low and 64 high bytes, 16 signed scales, d: d * scale * (q - 32)
        blocks[:, 192:208] = 32 + blocks[:, 192:208] % 65
        blocks[:, 208:] = _half(DEVIATION / (64 * 18.5))
    elif type == Type.Q4_K:  # d, dmin, 8 scales and 8 minima of 6 bits, 128 bytes: d * scale * q - dmin * minimum
        scale = 24 + blocks[:, 4:12] % 17  # the minimum is the same number, and dmin 7.5 d: around 0
        blocks[:, :2], blocks[:, 2:4] = _half(DEVIATION / (32 * 4.6)), _half(7.5 * DEVIATION / (32 * 4.6))
        low, high = scale[:, :4], scale[:, 4:]
        blocks[:, 4:8] = blocks[:, 8:12] = low | (high >> 4) << 6
        blocks[:, 12:16] = high & 15 | (high & 15) << 4
    else:
        raise ValueError(f"no random blocks of {type.name}")
    return blocks.reshape(*shape[:-1], -1)


def _half(value: float) -> np.ndarray:
    return np.array([value], np.float16).view(np.uint8)


def _announce(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], type: Type) -> None:
    """A tensor's entry in the header, before its data is there."""
    elements, size = gguf.GGML_QUANT_SIZES[type]
    nbytes = prod(shape) // elements * size
    if type == Type.F32:
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes)
        return
    stored = (*shape[:-1], shape[-1] // elements * size)
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), nbytes, raw_dtype=type)


def _write(writer: gguf.GGUFWriter, tensors: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor)
    writer.close()


def _copy(writer: gguf.GGUFWriter, metadata: Mapping[str, Any], prefix: str = "", pieces: int | None = None) -> None:
    """Metadata of another file under a prefix; lists of the vocabulary are cut to so many pieces."""
    for key, value in metadata.items():
        if not key.startswith(prefix):
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, [getattr(one, "item", lambda one=one: one)() for one in value[:pieces]])


# ── Hugging Face folders ────────────────────────────────────────────────────────────────────────────────────────────


def write_folder(path: Path, decoder: DecoderConfig, seed: int = SEED) -> None:
    """Configuration, vocabulary and one safetensors file of random bfloat16 weights, with little in memory."""
    path.mkdir()
    settings = {**config_hf.to_hf(decoder), "dtype": "bfloat16"}
    (path / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    _write_vocabulary(path, decoder.vocab_size)
    rng = np.random.default_rng(seed)
    parts = name_map("safetensors", decoder).parts(decoder, dict(family.parameters(decoder)))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        start, end = end, end + 2 * prod(part.layout.shape)
        header[part.file_name] = {"dtype": "BF16", "shape": part.layout.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            is_norm = "norm" in part.param_name
            left = prod(part.layout.shape)
            while left:
                count = min(left, ROWS)
                values = rng.standard_normal(count, np.float32) * np.float32(DEVIATION)
                if is_norm:  # offsets from 1
                    values[:] = 0
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())  # towards 0: they are random
                left -= count


def _write_vocabulary(path: Path, pieces: int) -> None:
    with find(hub.starter()) as checkpoint:
        columns = [checkpoint.reader.metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")]
    tokenizer = Tokenizer.from_pieces(*(column[:pieces] for column in columns))
    tokenizer.save(path / "tokenizer.model")
    names = {f"{role}_token": tokenizer.piece(getattr(tokenizer, role)) for role in ("bos", "eos", "pad")}
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "unk_token": "<unk>", **names}
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
