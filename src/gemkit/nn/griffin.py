"""The recurrent mixer of RecurrentGemma, from Griffin (arXiv:2402.19427): what stands in for attention in its layers.

    x ─┬─ linear_y ─ gelu ──────────────────┐
       └─ linear_x ─ conv_1d ─ rg_lru ────(mul)─ linear_out ─

    T  tokens of all sequences     D  residual width     R  channels of the recurrence     C  taps of the convolution

The convolution sees the last C tokens, the recurrence all of them, and neither keeps more of a sequence than C - 1
rows and one number a channel, however long it is.
"""

from __future__ import annotations

from torch.nn import Module, Parameter

from gemkit import family, ops
from gemkit.nn.batch import Batch
from gemkit.nn.layers import Linear, ParamModule


class CausalConv1d(ParamModule):
    """Each channel's own weighting of its last C inputs; the weight is (R, C), the current input's column last."""

    def __init__(self, width: int, taps: int):
        super().__init__()
        self.weight = Parameter(ops.new_weight(width, taps))
        self.bias = Parameter(ops.new_weight(width))

    def forward(self, x_TR, batch: Batch, memory: ops.RecurrentState | None):
        return ops.causal_conv1d(x_TR, self.weight, self.bias, batch, memory)

    def extra_repr(self):
        width, taps = self.weight.shape
        return f"{width}, taps={taps}"


class BlockDiagonal(ParamModule):
    """Projections side by side, each of its own channels; the weight is (blocks, in, out)."""

    def __init__(self, width: int, blocks: int):
        super().__init__()
        self.weight = Parameter(ops.new_weight(blocks, width // blocks, width // blocks))
        self.bias = Parameter(ops.new_weight(blocks, width // blocks))

    def forward(self, x_TR):
        return ops.block_linear(x_TR, self.weight, self.bias)

    def extra_repr(self):
        blocks, in_features, out_features = self.weight.shape
        return f"blocks={blocks}, in_features={in_features}, out_features={out_features}"


class RGLRU(ParamModule):
    """The real-gated linear recurrent unit: how much to forget and how much to take in depend on the input alone."""

    def __init__(self, layer: family.Recurrent):
        super().__init__()
        self.recurrent_param = Parameter(ops.new_weight(layer.width))
        self.input_gate = BlockDiagonal(layer.width, layer.num_blocks)
        self.recurrent_gate = BlockDiagonal(layer.width, layer.num_blocks)

    def forward(self, x_TR, batch: Batch, memory: ops.RecurrentState | None):
        input_TR, recurrent_TR = self.input_gate(x_TR), self.recurrent_gate(x_TR)
        return ops.rg_lru(x_TR, input_TR, recurrent_TR, self.recurrent_param, batch, memory)


class Recurrent(Module):
    """A gated branch beside a convolution and a recurrence."""

    def __init__(self, config: family.DecoderConfig, layer: family.Recurrent):
        super().__init__()
        self.linear_x = Linear(config.width, layer.width, bias=True)
        self.linear_y = Linear(config.width, layer.width, bias=True)
        self.conv_1d = CausalConv1d(layer.width, layer.conv_width)
        self.rg_lru = RGLRU(layer)
        self.linear_out = Linear(layer.width, config.width, bias=True)

    def forward(self, x_TD, batch: Batch, memory: ops.RecurrentState | None):
        gate_TR = ops.gelu(self.linear_y(x_TD))
        h_TR = self.rg_lru(self.conv_1d(self.linear_x(x_TD), batch, memory), batch, memory)
        return self.linear_out(ops.mul(h_TR, gate_TR))
