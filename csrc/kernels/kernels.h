// The table of kernels of whichever instruction set this is compiled for.
#pragma once

#include "linear.h"
// attention.h, elementwise.h and recurrence.h are included here, and their fields filled below.

namespace gk {
namespace GK_ISA {

inline Kernels kernels(const char *name) {
    Kernels k{};
    k.name = name;
    k.quantize = quantize;
    k.linear = any_linear;
    k.row = any_row;
    return k;
}

}  // namespace GK_ISA
}  // namespace gk
