// Every kernel, compiled for portable (the flags are in CMakeLists.txt).
#include "kernels.h"
#include "table.h"

namespace gk {

const Kernels *portable_kernels() {
    static const Kernels kernels = portable::kernels("portable");
    return &kernels;
}

}  // namespace gk
