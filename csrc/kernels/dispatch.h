// Which kernels this machine runs.
#pragma once

#include "table.h"

namespace gk {

// "portable", "avx2" or "avx512"; null where the name is another, or the machine or the build lacks it.
const Kernels *kernels_named(const char *name);

// The fastest that the machine has, or those that the environment variable GEMKIT_ISA names; decided once. Null where
// it names what kernels_named has not: the caller reports it.
const Kernels *best_kernels();

}  // namespace gk
