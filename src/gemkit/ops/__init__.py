"""The vocabulary of operations: everything that a model of the family computes, each op defined once in plain torch.

The definitions are *the* definitions: differentiable, on any torch device, tested against published implementations.
Faster executors are tested against them. What may be here: functions of tensors and numbers. What may not: weights,
configurations of members by name, anything that remembers between calls (`attention` is handed what a layer remembers
and only appends to it and reads it).

Numerics, for every op: activations in the run dtype; norms, rotary embedding, soft caps and softmax in float32.
"""

from gemkit.ops.attention import Memory, attention, attention_kernel
from gemkit.ops.basic import (
    add,
    embed,
    geglu,
    linear,
    merge_heads,
    mul,
    new_weight,
    rms_norm,
    softcap,
    split_heads,
    take_rows,
)
from gemkit.ops.quantized import Quantized
from gemkit.ops.rope import rope, rope_table

__all__ = [
    "Memory",
    "Quantized",
    "add",
    "attention",
    "attention_kernel",
    "embed",
    "geglu",
    "linear",
    "merge_heads",
    "mul",
    "new_weight",
    "rms_norm",
    "rope",
    "rope_table",
    "softcap",
    "split_heads",
    "take_rows",
]
