// The table of kernels of whichever instruction set this is compiled for.
#pragma once

#include "attention.h"
#include "dense.h"
#include "elementwise.h"
#include "encoder.h"
#include "linear.h"
#include "recurrence.h"
#include "sketch.h"

namespace gk {
namespace GK_ISA {

inline Kernels kernels(const char *name) {
    Kernels k{};
    k.name = name;
    k.quantize = quantize;
    k.linear = any_linear;
    k.row = any_row;
    k.dense = dense;
    k.make_sketch = make_sketch;
    k.sketch = sketch;
    k.rms_norm = rms_norm;
    k.rope = rope;
    k.gelu = gelu;
    k.geglu = geglu;
    k.softcap = softcap;
    k.add = add;
    k.mul = mul;
    k.magnitude = magnitude;
    k.below = below;
    k.put_key = put_key;
    k.put_value = put_value;
    k.attend = attend;
    k.merge = merge;
    k.finish = finish;
    k.layer_norm = layer_norm;
    k.attend_within = attend_within;
    k.conv1d = conv1d;
    k.block_linear = block_linear;
    k.rg_lru = rg_lru;
    return k;
}

}  // namespace GK_ISA
}  // namespace gk
