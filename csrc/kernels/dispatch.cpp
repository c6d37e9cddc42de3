#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "encoder.h"

namespace gk {
namespace {

bool has(const char *name) {
#if defined(GK_X86)
    __builtin_cpu_init();
    if (!std::strcmp(name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c");
    if (!std::strcmp(name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return !std::strcmp(name, "portable");
}

}  // namespace

const Kernels *kernels_named(const char *name) {
    if (!has(name)) return nullptr;
#if defined(GK_X86)
    if (!std::strcmp(name, "avx512")) return avx512_kernels();
    if (!std::strcmp(name, "avx2")) return avx2_kernels();
#endif
    return portable_kernels();
}

const Kernels *best_kernels() {
    static const Kernels *const best = [] {
        const char *forced = std::getenv("GEMKIT_ISA");
        if (forced && *forced) return kernels_named(forced);
        for (const char *name : {"avx512", "avx2"})
            if (const Kernels *k = kernels_named(name)) return k;
        return portable_kernels();
    }();
    return best;
}

size_t attend_scratch_bytes(int32_t tokens, int32_t group, int32_t head_dim) {
    return portable::scratch_bytes(tokens, group, head_dim);
}

size_t attend_within_scratch_bytes(int64_t rows, int32_t head_dim) { return portable::within_bytes(rows, head_dim); }

#if !defined(GK_X86)
const Kernels *avx2_kernels() { return nullptr; }
const Kernels *avx512_kernels() { return nullptr; }
#endif

}  // namespace gk
