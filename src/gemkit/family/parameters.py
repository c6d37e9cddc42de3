"""Name and shape of every parameter of a member, from its data alone: trees, costs and file formats build on it."""

from __future__ import annotations

from collections.abc import Iterator

from gemkit.family.schema import DecoderConfig, Modality, Recurrent, Vision

Parameters = Iterator[tuple[str, tuple[int, ...]]]


def parameters(decoder: DecoderConfig, vision: Modality | None = None) -> Parameters:
    """Name and shape of every parameter, in the order data meets them; the tied head is not repeated.

    The same list as the module's own `named_parameters()` (a test compares them), without torch. Linear weights are
    (out, in), convolutions (out, in, height, width). With an image tower the names are `vision_tower.*`,
    `multi_modal_projector.*` and `language_model.*`; a decoder alone has no prefix.
    """
    if vision is None:
        yield from _decoder(decoder)
        return
    for name, shape in _tower(vision.tower):
        yield "vision_tower." + name, shape
    yield from _affine("multi_modal_projector.linear", decoder.width, vision.tower.width, bias=vision.projection.bias)
    for name, shape in _decoder(decoder):
        yield "language_model." + name, shape


def _decoder(decoder: DecoderConfig) -> Parameters:
    d = decoder.width
    yield "embed_tokens.weight", (decoder.vocab_size, d)
    for i, layer in enumerate(decoder.layers):
        at, mixer, f = f"layers.{i}.", layer.mixer, layer.ffw.width
        yield at + "input_layernorm.weight", (d,)
        if isinstance(mixer, Recurrent):
            r, n = mixer.width, mixer.num_blocks
            yield from _affine(at + "recurrent.linear_x", r, d)
            yield from _affine(at + "recurrent.linear_y", r, d)
            yield from _affine(at + "recurrent.conv_1d", r, mixer.conv_width)
            yield at + "recurrent.rg_lru.recurrent_param", (r,)
            for gate in ("input_gate", "recurrent_gate"):
                yield at + f"recurrent.rg_lru.{gate}.weight", (n, r // n, r // n)
                yield at + f"recurrent.rg_lru.{gate}.bias", (n, r // n)
            yield from _affine(at + "recurrent.linear_out", d, r)
        else:
            q, kv = mixer.heads * mixer.head_dim, mixer.kv_heads * mixer.head_dim
            yield at + "self_attn.q_proj.weight", (q, d)
            yield at + "self_attn.k_proj.weight", (kv, d)
            yield at + "self_attn.v_proj.weight", (kv, d)
            if mixer.qk_norm:
                yield at + "self_attn.q_norm.weight", (mixer.head_dim,)
                yield at + "self_attn.k_norm.weight", (mixer.head_dim,)
            yield from _affine(at + "self_attn.o_proj", d, q, bias=decoder.biases)
        if decoder.post_norms:
            yield at + "post_attention_layernorm.weight", (d,)
        yield at + "pre_feedforward_layernorm.weight", (d,)
        yield from _affine(at + "mlp.gate_proj", f, d, bias=decoder.biases)
        yield from _affine(at + "mlp.up_proj", f, d, bias=decoder.biases)
        yield from _affine(at + "mlp.down_proj", d, f, bias=decoder.biases)
        if decoder.post_norms:
            yield at + "post_feedforward_layernorm.weight", (d,)
    yield "norm.weight", (d,)


def _tower(vision: Vision) -> Parameters:
    w, p = vision.width, vision.patch_size
    yield "embeddings.patch_embedding.weight", (w, 3, p, p)
    yield "embeddings.patch_embedding.bias", (w,)
    yield "embeddings.position_embedding.weight", (vision.num_patches, w)
    for i in range(vision.depth):
        at = f"encoder.layers.{i}."
        yield from _layer_norm(at + "layer_norm1", w)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _affine(at + f"self_attn.{name}", w, w)
        yield from _layer_norm(at + "layer_norm2", w)
        yield from _affine(at + "mlp.fc1", vision.mlp_width, w)
        yield from _affine(at + "mlp.fc2", w, vision.mlp_width)
    yield from _layer_norm("post_layernorm", w)


def _affine(name: str, out_width: int, in_width: int, bias: bool = True) -> Parameters:
    yield name + ".weight", (out_width, in_width)
    if bias:
        yield name + ".bias", (out_width,)


def _layer_norm(name: str, width: int) -> Parameters:
    yield name + ".weight", (width,)
    yield name + ".bias", (width,)
