// What tests and benchmarks call of the kernels, by the name of an instruction set. Each returns 0 where that is missing.
#include "state.h"
#include <new>

#include "kernels/dispatch.h"
#include "weights.h"

#define GK_EXPORT extern "C" __attribute__((visibility("default")))

GK_EXPORT int gk_has_isa(const char *isa) { return gk::kernels_named(isa) != nullptr; }

// The name of the kernels in use, or null: GEMKIT_ISA asks for some that this machine or build has not.
GK_EXPORT const char *gk_isa() {
    const gk::Kernels *k = gk::best_kernels();
    return k ? k->name : nullptr;
}

GK_EXPORT size_t gk_activation_bytes(int32_t kind, int64_t tokens, int64_t cols) {
    return gk::activation_bytes((gk::Kind)kind, tokens, cols);
}

GK_EXPORT int gk_test_quantize(const char *isa, const float *x, int64_t tokens, int64_t cols, int64_t token0, int64_t token1,
                               uint8_t *quantized) {
    const gk::Kernels *k = gk::kernels_named(isa);
    if (k) k->quantize({tokens, cols, x, quantized}, token0, token1);
    return k != nullptr;
}

GK_EXPORT int gk_test_linear(const char *isa, int32_t kind, const uint8_t *packed, int64_t rows, int64_t cols, const float *x,
                             uint8_t *quantized, int64_t tokens, float *y, int64_t stride, int64_t tile0, int64_t tile1) {
    const gk::Kernels *k = gk::kernels_named(isa);
    if (k) k->linear({(gk::Kind)kind, rows, cols, packed}, tile0, tile1, {tokens, cols, x, quantized}, y, stride);
    return k != nullptr;
}

GK_EXPORT int gk_test_row(const char *isa, int32_t kind, const uint8_t *packed, int64_t rows, int64_t cols, int64_t row,
                          float *out) {
    const gk::Kernels *k = gk::kernels_named(isa);
    if (k) k->row({(gk::Kind)kind, rows, cols, packed}, row, out);
    return k != nullptr;
}

GK_EXPORT int gk_test_dense(const char *isa, int32_t kind, const gk::Planes *planes, int64_t row0, int64_t row1, int64_t cols,
                            float *out) {
    const gk::Kernels *k = gk::kernels_named(isa);
    if (k) k->dense((gk::Kind)kind, *planes, row0, row1, cols, out);
    return k != nullptr;
}

// Make an empty slot remember `length` tokens that nobody has computed: small random keys, values and states, for
// measurements at a depth that would take long to reach. False where memory ran out.
GK_EXPORT int gk_test_fill(gk::State *state, int64_t slot, int64_t length, int32_t layers) {
    if (!state->prepare(slot, length)) return 0;
    uint32_t noise = 1;
    const auto half = [&] {  // between -0.125 and 0.125
        noise = noise * 1664525u + 1013904223u;
        return (uint16_t)((noise >> 31) << 15 | 0x2C00u | (noise >> 8 & 0x3FFu));
    };
    for (int32_t i = 0; i < layers; i++) {
        const gk::Layer &layer = state->layer(i);
        if (layer.kind == 1) {
            float *cell = state->tail(i, slot);
            for (int64_t k = 0; k < (int64_t)layer.width * layer.taps; k++) cell[k] = (float)(half() & 0x3FF) / 8192.0f - 0.06f;
            continue;
        }
        for (int64_t page = 0; page * gk::PAGE < length; page++)
            for (int32_t head = 0; head < layer.kv_heads; head++)
                for (uint16_t *at : {state->keys(i, slot, page, head), state->values(i, slot, page, head)})
                    for (int64_t k = 0; k < (int64_t)gk::PAGE * layer.head_dim; k++) at[k] = half();
    }
    state->commit(slot, length);
    return 1;
}
