// Every kernel, compiled for avx512 (the flags are in CMakeLists.txt).
#include "kernels.h"
#include "table.h"

namespace gk {

const Kernels *avx512_kernels() {
    static const Kernels kernels = avx512::kernels("avx512");
    return &kernels;
}

}  // namespace gk
