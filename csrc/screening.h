// The rotation that a sketch is made under, and its making.
#pragma once

#include "kernels/table.h"

namespace gk {

// Signs, then a Walsh-Hadamard transform of blocks whose length is the largest power of two that divides `cols`.
void rotate(const float *x, const float *signs, int64_t cols, float *turned);

// Tiles tile0 to tile1 of the sketch of a packed table.
void make_sketch(const Weight &table, const float *signs, uint8_t *out, int64_t tile0, int64_t tile1);

}  // namespace gk
