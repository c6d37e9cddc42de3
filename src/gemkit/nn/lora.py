"""A low-rank change of a projection, LoRA (arXiv:2106.09685): it is trained, and the weight beside it stays as it is.

y = x W' + scale * (x A') B'         A is (rank, in), B is (out, rank); B starts at zero, and so does the change

T  tokens     I  input channels     O  output channels     R  rank
"""

from __future__ import annotations

from torch.nn import Module

from gemkit import ops
from gemkit.nn.weighted import Linear


class LoRA(Module):
    """One adapter of one projection. `Projection.forward` adds what it returns.

    Args:
        heads: 1 is the published rule. More cuts the outputs into so many heads, each with an A of its own, and one B
            for all of them: the rule of Keras' `EinsumDense`, A is (heads * rank, in) and B (out / heads, rank) then.
        scale: what the change is multiplied by; alpha / rank in the paper.
        dropout: share of the input that is dropped while training.
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, scale: float, *, heads: int = 1, dropout: float = 0.0
    ):
        super().__init__()
        self.rank, self.scale, self.heads, self.dropout = rank, scale, heads, dropout
        self.per_head = heads > 1
        self.lora_A = Linear(in_features, heads * rank)
        self.lora_B = Linear(rank, out_features // heads)

    def forward(self, x_TI):
        if self.dropout and self.training:
            x_TI = ops.dropout(x_TI, self.dropout)
        low_TR = ops.scale(self.lora_A(x_TI), self.scale)
        if self.per_head:
            return ops.merge_heads(self.lora_B(ops.split_heads(low_TR, self.heads)))
        return self.lora_B(low_TR)

    def extra_repr(self):
        heads = f", heads={self.heads}" if self.per_head else ""
        return f"rank={self.rank}, scale={self.scale:g}{heads}"
