"""The modules of adapters, which stand beside a weight: LoRA, DoRA, and rows of a table of their own.

    LoRA  (arXiv:2106.09685)   y + scale * (x A') B'                          A is (rank, in), B is (out, rank)
    DoRA  (arXiv:2402.09353)   m / |W + scale B A| * (y + scale * (x A') B')  m is (out,), the length is of rows
    TokenRows                  a few rows of the table of embeddings, in place of its own

The host hands over its result and its input, and an adapter returns the result as it changes it. B starts at zero and m
as the length of the weight's rows, so a new adapter changes nothing. Several change the result one after another.

An adapter's own weights are float32 whatever the run dtype: they are small, and what a step of training changes in them
is often less than bfloat16 can tell.

T  tokens     I  input channels     O  output channels     R  rank     V  vocabulary rows     D  residual width
N  rows of their own
"""

from __future__ import annotations

from typing import Any

from torch.nn import Module, Parameter

from gemkit import ops
from gemkit.nn.layers import Embedding, Linear


class Adapter(Module):
    """An adapter of one module."""

    strength = 1.0  # turns an adapter up and down, or off; it is not saved


class LowRank(Adapter):
    """The base of low-rank adapters: A and B, and what their product is multiplied by.

    Args:
        scale: alpha / rank in the paper.
    """

    heads = 1
    dropout = 0.0
    lora_A: Any  # a Linear, or of an embedding an Embedding
    lora_B: Linear

    def __init__(self, rank: int, scale: float):
        super().__init__()
        self.rank, self.scale = rank, scale
        self.magnitude: Any = None  # of a DoRA
        self.magnitude: Any = None  # of a DoRA

    @property
    def factor(self) -> float:
        """What the product of A and B counts."""
        return self.scale * self.strength

    def extra_repr(self):
        heads = f", heads={self.heads}" if self.heads > 1 else ""
        return f"rank={self.rank}, scale={self.scale:g}{heads}"


class LoRA(LowRank):
    """One adapter of one projection.

    Args:
        heads: 1 is the published rule. More cuts the outputs into so many heads, each with an A of its own, and one B
            for all of them: the rule of Keras' `EinsumDense`, A is (heads * rank, in) and B (out / heads, rank) then.
        dropout: share of the input that is dropped while training.
        bias: B has a bias of its own (PEFT's `lora_bias`), which `scale` multiplies too.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        *,
        heads: int = 1,
        dropout: float = 0.0,
        bias: bool = False,
    ):
        super().__init__(rank, scale)
        self.heads, self.dropout = heads, dropout
        self.per_head, self.biased = heads > 1, bias
        self.lora_A = Linear(in_features, heads * rank)
        self.lora_B = Linear(rank, out_features // heads, bias)

    def forward(self, y_TO, x_TI, weight_OI, bias_O):
        return ops.add(y_TO, self.change(self.dropped(x_TI)))

    def dropped(self, x_TI):
        """The input, of which a share is dropped while training."""
        return ops.dropout(x_TI, self.dropout) if self.dropout and self.training else x_TI

    def change(self, x_TI):
        """The low-rank product, (T, O)."""
        if self.biased:  # which is multiplied too
            return ops.scale(self.lora_B(self.lora_A(x_TI)), self.factor)
        low_TR = ops.scale(self.lora_A(x_TI), self.factor)
        if self.per_head:
            return ops.merge_heads(self.lora_B(ops.split_heads(low_TR, self.rank)))
        return self.lora_B(low_TR)


class DoRA(LoRA):
    """A LoRA of a projection whose changed weight has rows of a trained length.

    Args:
        magnitude: (out,) the lengths.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, *, dropout: float = 0.0):
        super().__init__(in_features, out_features, rank, scale, dropout=dropout)
        self.magnitude = Parameter(ops.new_weight(out_features))

    @property
    def factor(self) -> float:
        return self.scale  # its strength is the share of the whole change

    def forward(self, y_TO, x_TI, weight_OI, bias_O):
        base_TO = None
        if self.dropout and self.training:
            x_TI = self.dropped(x_TI)
            base_TO = ops.linear(x_TI, weight_OI)
        changed = weight_OI, self.lora_A.weight, self.lora_B.weight
        return ops.dora(y_TO, self.change(x_TI), self.magnitude, changed, self.scale, bias_O, self.strength, base_TO)


class EmbeddingLoRA(LowRank):
    """One adapter of an embedding, whose rows are scaled as the embedding's are. A is (V, rank), which PEFT turns.

    Args:
        embedding: that it stands beside.
    """

    def __init__(self, embedding: Embedding, rank: int, scale: float):
        super().__init__(rank, scale)
        rows, width = embedding.weight.shape
        self.lora_A = Embedding(rows, rank, embedding.scale, embedding.scale_dtype)
        self.lora_B = Linear(rank, width)

    def forward(self, x_TD, tokens_T, weight_VD):
        return ops.add(x_TD, ops.in_dtype_of(self.change(tokens_T), x_TD))

    def change(self, tokens_T):
        """The low-rank rows, (T, D)."""
        return self.lora_B(ops.scale(self.lora_A(tokens_T), self.factor))


class EmbeddingDoRA(EmbeddingLoRA):
    """A LoRA of an embedding whose changed table has columns of a trained length.

    Args:
        magnitude: (D,) the lengths, over all rows of the table.
    """

    def __init__(self, embedding: Embedding, rank: int, scale: float):
        super().__init__(embedding, rank, scale)
        self.magnitude = Parameter(ops.new_weight(embedding.weight.shape[1]))

    @property
    def factor(self) -> float:
        return self.scale

    def forward(self, x_TD, tokens_T, weight_VD):
        changed = weight_VD, self.lora_A.weight, self.lora_B.weight
        return ops.dora(
            x_TD, self.change(tokens_T), self.magnitude, changed, self.scale, None, self.strength, None, True
        )


class TokenRows(Adapter):
    """Rows of the table of embeddings for a few tokens, in place of its own.

    Args:
        ids: of those tokens, ascending.
        rows: (N, D): they are shared with the head's where the head is tied to the table.
        scale, scale_dtype: of the embedding.
    """

    def __init__(self, ids: tuple[int, ...], rows: Parameter, scale: float, scale_dtype: str):
        super().__init__()
        self.ids, self.scale, self.scale_dtype = ids, scale, scale_dtype
        self.rows = rows

    def forward(self, x_TD, tokens_T, weight_VD):
        return ops.replace_rows(x_TD, tokens_T, self.ids, self.rows, self.scale, self.scale_dtype, self.strength)

    def extra_repr(self):
        return f"tokens={len(self.ids)}"


class HeadRows(Adapter):
    """Rows of the output table for a few tokens, in place of its own.

    Args:
        ids: of those tokens, ascending.
        rows: (N, D).
    """

    def __init__(self, ids: tuple[int, ...], rows: Parameter):
        super().__init__()
        self.ids, self.rows = ids, rows

    def forward(self, y_TV, x_TD, weight_VD, bias_V):
        return ops.replace_columns(y_TV, ops.linear(x_TD, self.rows), self.ids, self.strength)

    def extra_repr(self):
        return f"tokens={len(self.ids)}"
