"""The decoder of the whole family, from token ids to logits, in the order data meets it.

It reads a `family.DecoderConfig` and never asks for a name: what differs between members is data.

    T  tokens being computed, all sequences end to end     K  key/value heads
    S  positions attended to (remembered + new)            G  query heads per key/value head (N = K * G)
    D  residual width                                      H  size of one head
    N  query heads                                         F  feed-forward width (of one branch)
    B  sequences in the batch                              V  vocabulary rows
    R  channels of a recurrence

One block, twice the same figure (a norm, a branch, a sum):

    x ─ input_layernorm ─ mixer ─ [post_attention_layernorm] ─(+)─ pre_feedforward_layernorm ─ mlp ─ [post_feedforward_layernorm] ─(+)─
    └──────────────────────────────────────────────────────────┘ └──────────────────────────────────────────────────────────────────┘
    mixer = self_attn, or recurrent in two layers of three of RecurrentGemma (griffin.py)    [ ] = Gemma 2 and 3 only
"""  # noqa: E501

from __future__ import annotations

from typing import Any

from torch.nn import Module, ModuleList

from gemkit import family, ops
from gemkit.errors import ConfigError
from gemkit.nn.batch import Batch
from gemkit.nn.griffin import Recurrent
from gemkit.nn.layers import Embedding, Head, Linear, Recomputable, RMSNorm
from gemkit.nn.model import LanguageModel, Output
from gemkit.nn.state import State


class Attention(Module):
    """Attention with N query heads on K key/value heads: K = N is MHA, K = 1 is MQA, between them GQA."""

    def __init__(self, config: family.DecoderConfig, layer: family.Attention):
        super().__init__()
        d, h = config.width, layer.head_dim
        self.head_dim, self.scale, self.window, self.softcap = h, layer.score_scale, layer.visible, layer.softcap
        self.q_proj = Linear(d, layer.heads * h)  # not (d, d): head_dim is not width / heads
        self.k_proj = Linear(d, layer.kv_heads * h)
        self.v_proj = Linear(d, layer.kv_heads * h)
        self.q_norm = RMSNorm(h, config.norm_eps) if layer.qk_norm else None
        self.k_norm = RMSNorm(h, config.norm_eps) if layer.qk_norm else None
        self.o_proj = Linear(layer.heads * h, d, bias=config.biases)

    def forward(self, x_TD, batch: Batch, angles, memory: ops.Memory | None):
        q_TNH = ops.split_heads(self.q_proj(x_TD), self.head_dim)
        k_TKH = ops.split_heads(self.k_proj(x_TD), self.head_dim)
        v_TKH = ops.split_heads(self.v_proj(x_TD), self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_TNH, k_TKH = self.q_norm(q_TNH), self.k_norm(k_TKH)
        q_TNH, k_TKH = ops.rope(q_TNH, angles), ops.rope(k_TKH, angles)
        out_TNH = ops.attention(
            q_TNH, k_TKH, v_TKH, batch, memory, scale=self.scale, window=self.window, softcap=self.softcap
        )
        return self.o_proj(ops.merge_heads(out_TNH))

    def extra_repr(self):
        before, _ = self.window
        return "global" if before is None else f"sliding, window={before + 1}"


class MLP(Module):
    """The gated feed-forward: `down(gelu(gate(x)) * up(x))` (GeGLU, arXiv:2002.05202)."""

    def __init__(self, config: family.DecoderConfig, layer: family.Mlp):
        super().__init__()
        self.gate_proj = Linear(config.width, layer.width, config.biases)
        self.up_proj = Linear(config.width, layer.width, config.biases)
        self.down_proj = Linear(layer.width, config.width, config.biases)

    def forward(self, x_TD):
        return self.down_proj(ops.geglu(self.gate_proj(x_TD), self.up_proj(x_TD)))


class Block(Recomputable):
    """One layer: a mixer of positions, then a feed-forward, each added to the residual stream."""

    def __init__(self, config: family.DecoderConfig, layer: family.Layer):
        super().__init__()
        norm = (config.width, config.norm_eps)
        self.input_layernorm = RMSNorm(*norm)
        mixer = layer.mixer
        self.self_attn = Attention(config, mixer) if isinstance(mixer, family.Attention) else None
        self.recurrent = Recurrent(config, mixer) if isinstance(mixer, family.Recurrent) else None
        self.post_attention_layernorm = RMSNorm(*norm) if config.post_norms else None
        self.pre_feedforward_layernorm = RMSNorm(*norm)
        self.mlp = MLP(config, layer.ffw)
        self.post_feedforward_layernorm = RMSNorm(*norm) if config.post_norms else None

    def compute(self, x_TD, batch: Batch, angles, memory: Any):
        branch_TD = self.input_layernorm(x_TD)
        if self.self_attn is not None:
            branch_TD = self.self_attn(branch_TD, batch, angles, memory)
        if self.recurrent is not None:
            branch_TD = self.recurrent(branch_TD, batch, memory)
        if self.post_attention_layernorm is not None:
            branch_TD = self.post_attention_layernorm(branch_TD)
        x_TD = ops.add(x_TD, branch_TD)
        branch_TD = self.mlp(self.pre_feedforward_layernorm(x_TD))
        if self.post_feedforward_layernorm is not None:
            branch_TD = self.post_feedforward_layernorm(branch_TD)
        return ops.add(x_TD, branch_TD)


class Decoder(LanguageModel):
    """The text decoder: token ids to logits, for any member's `family.DecoderConfig`."""

    vision = None  # it sees no images itself: `multimodal.Multimodal` hands it their features

    def __init__(self, config: family.DecoderConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.width, config.embed_scale, config.embed_scale_dtype)
        self.layers = ModuleList(Block(config, layer) for layer in config.layers)
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.lm_head = Head(self.embed_tokens, config.final_softcap)
        self.score = None

    @property
    def decoder(self) -> Decoder:
        return self

    @property
    def blocks(self) -> list[Module]:
        return list(self.layers)

    def forward(
        self,
        batch: Batch | Any,
        state: State | None = None,
        rows=None,
        pixels_ICSS=None,
        *,
        features_ED=None,
        output: Output = "logits",
        loss: ops.ChunkedLoss | None = None,
    ):
        if pixels_ICSS is not None:
            features_ED = self.image_features(pixels_ICSS)
        if not isinstance(batch, Batch):
            flat = self.forward(Batch.rows(batch), state, rows, features_ED=features_ED, output=output, loss=loss)
            return flat.unflatten(0, batch.shape)
        x_RD = self._hidden(batch, state, rows, features_ED)
        match output:
            case "hidden":
                return x_RD
            case "loss":
                assert loss is not None
                return self.lm_head.loss(x_RD, loss)
            case "reward":
                if self.score is None:
                    raise ConfigError("the model has no reward head: `gemkit tune reward` trains one")
                return self.score(x_RD).flatten()
        return self.lm_head(x_RD)

    def _hidden(self, batch: Batch, state: State | None, rows, features_ED):
        """(R, D) or (T, D): the hidden state after the last norm."""
        sequences = list(batch.sequences())
        if self.config.longest is not None:
            self.config.check_length(max((end - first + offset for first, end, _, offset in sequences), default=0))
        if state is not None:
            state.expect(self.config, sequences)
        batch.expect_features(features_ED)
        if self.config.recurrent:
            batch.expect_causal()
        x_TD = self.embed_tokens(batch.tokens)
        if features_ED is not None:
            x_TD = ops.put_rows(x_TD, batch.image_rows, features_ED)
        angles = {
            rotation: ops.rope_table(batch.positions, *rotation)
            for rotation in dict.fromkeys(mixer.rotation for mixer in self.config.attention)
        }
        memories = [None] * len(self.layers) if state is None else state.layers
        for block, layer, memory in zip(self.layers, self.config.layers, memories, strict=True):
            table = angles[layer.mixer.rotation] if isinstance(layer.mixer, family.Attention) else None
            x_TD = block(x_TD, batch, table, memory)
        if state is not None:
            state.advance(sequences)
        if rows is not None:
            x_TD = ops.take_rows(x_TD, rows)
        return self.norm(x_TD)
