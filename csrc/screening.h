// The rotation that a sketch is made under, of one vector.
#pragma once

#include "kernels/table.h"

namespace gk {

// Signs, then a Walsh-Hadamard transform of blocks whose length is the largest power of two that divides `cols`.
void rotate(const float *x, const float *signs, int64_t cols, float *turned);

}  // namespace gk
