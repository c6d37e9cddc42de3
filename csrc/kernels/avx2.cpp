// Every kernel, compiled for avx2 (the flags are in CMakeLists.txt).
#include "kernels.h"
#include "table.h"

namespace gk {

const Kernels *avx2_kernels() {
    static const Kernels kernels = avx2::kernels("avx2");
    return &kernels;
}

}  // namespace gk
