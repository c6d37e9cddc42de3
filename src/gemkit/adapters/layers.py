"""A low-rank change of a projection, LoRA (arXiv:2106.09685): it is trained, and the weight beside it stays as it is.

y = x W' + scale * (x A') B'         A is (rank, in), B is (out, rank); B starts at zero, and so does the change

An adapter's own weights are float32 whatever the run dtype: they are small, and what a step of training changes in them
is often less than bfloat16 can tell.

T  tokens     I  input channels     O  output channels     R  rank     V  vocabulary rows     D  residual width
"""

from __future__ import annotations

from typing import Any

from torch.nn import Module

from gemkit import ops
from gemkit.nn.layers import Embedding, Linear


class Adapter(Module):
    """One adapter of one module: A and B, and what their product is multiplied by.

    Args:
        scale: alpha / rank in the paper.
    """

    heads = 1
    lora_A: Any  # a Linear, or of an embedding an Embedding
    lora_B: Linear

    def __init__(self, rank: int, scale: float):
        super().__init__()
        self.rank, self.scale = rank, scale
        self.strength = 1.0  # turns an adapter up and down, or off; it is not saved

    @property
    def factor(self) -> float:
        """What the product of A and B counts."""
        return self.scale * self.strength


class LoRA(Adapter):
    """One adapter of one projection. `Projection.forward` adds what it returns.

    Args:
        heads: 1 is the published rule. More cuts the outputs into so many heads, each with an A of its own, and one B
            for all of them: the rule of Keras' `EinsumDense`, A is (heads * rank, in) and B (out / heads, rank) then.
        dropout: share of the input that is dropped while training.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, scale: float, *, heads: int = 1, dropout: float = 0.0
    ):
        super().__init__(rank, scale)
        self.heads, self.dropout = heads, dropout
        self.per_head = heads > 1
        self.lora_A = Linear(in_features, heads * rank)
        self.lora_B = Linear(rank, out_features // heads)

    def forward(self, x_TI):
        if self.dropout and self.training:
            x_TI = ops.dropout(x_TI, self.dropout)
        low_TR = ops.scale(self.lora_A(x_TI), self.factor)
        if self.per_head:
            return ops.merge_heads(self.lora_B(ops.split_heads(low_TR, self.rank)))
        return self.lora_B(low_TR)

    def extra_repr(self):
        heads = f", heads={self.heads}" if self.per_head else ""
        return f"rank={self.rank}, scale={self.scale:g}{heads}"


class EmbeddingLoRA(Adapter):
    """One adapter of an embedding, whose rows are scaled as the embedding's are. A is (V, rank), which PEFT turns.

    Args:
        embedding: that it stands beside.
    """

    dropout = 0.0  # a token's row has no inputs to drop

    def __init__(self, embedding: Embedding, rank: int, scale: float):
        super().__init__(rank, scale)
        rows, width = embedding.weight.shape
        self.lora_A = Embedding(rows, rank, embedding.scale, embedding.scale_dtype)
        self.lora_B = Linear(rank, width)

    def forward(self, tokens_T):
        return self.lora_B(ops.scale(self.lora_A(tokens_T), self.factor))

    def extra_repr(self):
        return f"rank={self.rank}, scale={self.scale:g}"
