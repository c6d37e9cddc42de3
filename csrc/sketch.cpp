// Makes the coarse copy of a table that rows are screened with: rotates, rounds to 2 bits (kernels/sketch.h, executors/native/screening.py).
#include "kernels/sketch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/dispatch.h"
#include "sketch.h"

namespace gk {

namespace {

// The spacing of four levels that leaves the least of a normal variable, in its standard deviations
// (J. Max, Quantizing for minimum distortion, 1960, table II).
constexpr float SPACING = 0.9957f;

}  // namespace

void rotate(const float *x, const float *signs, int64_t cols, float *turned) {
    const int64_t block = cols & -cols;
    const float unit = 1 / std::sqrt((float)block);
    for (int64_t i = 0; i < cols; i++) turned[i] = x[i] * signs[i] * unit;
    for (int64_t width = 1; width < block; width *= 2)
        for (int64_t i = 0; i < cols; i += 2 * width)
            for (int64_t k = i; k < i + width; k++) {
                const float a = turned[k], b = turned[k + width];
                turned[k] = a + b, turned[k + width] = a - b;
            }
}

void make_sketch(const Weight &table, const float *signs, uint8_t *out, int64_t tile0, int64_t tile1) {
    const Kernels *kernels = best_kernels();
    const int64_t cols = table.cols, padded = (cols + 15) / 16 * 16;
    std::vector<float> row(cols), turned(padded);
    std::vector<uint8_t> codes(padded);
    for (int64_t tile = tile0; tile < tile1; tile++) {
        uint8_t *at = out + tile * sketch_tile_bytes(cols);
        std::memset(at, 0, sketch_tile_bytes(cols));
        for (int64_t r = 0; r < TILE && tile * TILE + r < table.rows; r++) {
            kernels->row(table, tile * TILE + r, row.data());
            rotate(row.data(), signs, cols, turned.data());
            double squares = 0;
            for (int64_t i = 0; i < cols; i++) squares += (double)turned[i] * turned[i];
            if (!(squares > 0)) continue;  // a row of zeros: scale and error are zero
            const float per_spacing = 1 / (SPACING * (float)std::sqrt(squares / (double)cols));
            double along = 0;
            for (int64_t i = 0; i < cols; i++) {
                codes[i] = (uint8_t)std::clamp(std::floor(turned[i] * per_spacing + 2.0f), 0.0f, 3.0f);
                along += (double)turned[i] * ((double)codes[i] - 1.5);
            }
            // Levels that are nearest to a row are shorter than it, and a product with what it points to comes out too small.
            // The scale that makes what is left orthogonal to the row itself does not err on the rows that matter.
            const uint16_t scale = portable::float_to_half((float)(squares / along));
            const float exact = portable::half_to_float(scale);
            double left = 0;
            for (int64_t i = 0; i < cols; i++) {
                const double rest = turned[i] - exact * ((double)codes[i] - 1.5);
                left += rest * rest;
                at[64 + i / 16 * 64 + 4 * r + i % 4] |= (uint8_t)(codes[i] << 2 * (i % 16 / 4));
            }
            // rounded up: a bound must not be too small
            const uint16_t error = portable::float_to_half((float)std::sqrt(left / (double)cols) * (1 + 0x1p-10f));
            std::memcpy(at + 2 * r, &scale, 2);
            std::memcpy(at + 32 + 2 * r, &error, 2);
        }
    }
}

}  // namespace gk

extern "C" __attribute__((visibility("default"))) int32_t gk_make_sketch(int32_t kind, const uint8_t *packed, int64_t rows,
                                                                        int64_t cols, const float *signs, uint8_t *out,
                                                                        int64_t tile0, int64_t tile1) {
    if (!gk::best_kernels()) return 0;
    gk::make_sketch({(gk::Kind)kind, rows, cols, packed}, signs, out, tile0, tile1);
    return 1;
}
