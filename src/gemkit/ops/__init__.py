"""The vocabulary of operations: everything that a model of the family computes, each op defined once in plain torch.

The definitions are *the* definitions: differentiable, on any torch device, tested against published implementations.
Faster executors are tested against them. What may be here: functions of tensors and numbers. What may not: weights,
configurations of members by name, anything that remembers between calls (`attention`, `causal_conv1d` and `rg_lru` are
handed what a layer remembers, and only read it and hand it on).

Numerics, for every op: activations in the run dtype; norms, rotary embedding, soft caps, softmax and the recurrence in
float32.
"""

from gemkit.ops.adapters import dora, replace_columns, replace_rows
from gemkit.ops.attention import Memory, attention, attention_kernel
from gemkit.ops.basic import (
    add,
    add_positions,
    dropout,
    embed,
    geglu,
    gelu,
    in_dtype_of,
    layer_norm,
    linear,
    merge_heads,
    mul,
    new_weight,
    patch_embed,
    put_rows,
    recomputed,
    rms_norm,
    scale,
    softcap,
    split_heads,
    take_rows,
)
from gemkit.ops.convolution import conv2d, conv_transpose2d, relu, to_grid
from gemkit.ops.linear_cross_entropy import ChunkedLoss, LogitsHead, RowLoss, linear_cross_entropy
from gemkit.ops.quantized import Quantized
from gemkit.ops.recurrence import RecurrentState, block_linear, causal_conv1d, linear_scan, rg_lru
from gemkit.ops.rope import rope, rope_frequencies, rope_table
from gemkit.ops.vocabulary import WHOLE, Vocabulary

__all__ = [
    "WHOLE",
    "ChunkedLoss",
    "LogitsHead",
    "Memory",
    "Quantized",
    "RecurrentState",
    "RowLoss",
    "Vocabulary",
    "add",
    "add_positions",
    "attention",
    "attention_kernel",
    "block_linear",
    "causal_conv1d",
    "conv2d",
    "conv_transpose2d",
    "dora",
    "dropout",
    "embed",
    "geglu",
    "gelu",
    "in_dtype_of",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_scan",
    "merge_heads",
    "mul",
    "new_weight",
    "patch_embed",
    "put_rows",
    "recomputed",
    "relu",
    "replace_columns",
    "replace_rows",
    "rg_lru",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_table",
    "scale",
    "softcap",
    "split_heads",
    "take_rows",
    "to_grid",
]
