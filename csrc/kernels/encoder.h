// What an image tower computes and a decoder does not: layer norms, and attention of rows that all see one another.
#pragma once

#include "attention.h"
#include "elementwise.h"

namespace gk {
namespace GK_ISA {

// (x - mean) / std * weight + bias. Sums are kept in one register, in the order of the columns.
inline void layer_norm(const float *x, const float *weight, const float *bias, float eps, int64_t n, float *y) {
    F16 s = zero();
    in_lanes(n, [&](int64_t i, auto whole, int left) { s = add(s, load(x + i, whole, left)); });
    const F16 mean = all(sum(s) / (float)n);
    F16 squares = zero();
    in_lanes(n, [&](int64_t i, auto whole, int left) {
        alignas(64) float off[LANES] = {};  // lanes beyond the row must stay 0
        store(off, sub(load(x + i, whole, left), mean), whole, left);
        const F16 v = load(off);
        squares = fma(v, v, squares);
    });
    const F16 inverse = all(1.0f / std::sqrt(sum(squares) / (float)n + eps));
    in_lanes(n, [&](int64_t i, auto whole, int left) {
        const F16 v = mul(sub(load(x + i, whole, left), mean), inverse);
        store(y + i, fma(v, load(weight + i, whole, left), load(bias + i, whole, left)), whole, left);
    });
}

// The same for every instruction set: attend_within_scratch_bytes returns it.
inline size_t within_bytes(int64_t rows, int64_t head_dim) {
    const int64_t panels = up_to(rows, 16) * head_dim + PAGE * head_dim + PAGE * up_to(head_dim, LANES);
    return (size_t)(panels + PASS * (PAGE + 1) + rows * (2 + head_dim)) * sizeof(float) + 64;
}

// One head. Keys and values are put into panels once, 64 rows at a time in ascending order, and all queries pass over
// them: `attention.h` on floats that were never anything else.
inline void attend_within(const Within &w, void *scratch) {
    const int64_t rows = w.rows, head_dim = w.head_dim;
    float *q = (float *)(((uintptr_t)scratch + 63) / 64 * 64), *keys = q + up_to(rows, 16) * head_dim;
    float *values = keys + PAGE * head_dim, *scores = values + PAGE * up_to(head_dim, LANES);
    float *most = scores + PASS * (PAGE + 1);
    const Partial p{most, most + rows, most + 2 * rows};
    Attend a{};
    a.tokens = (int32_t)rows, a.group = 1, a.head_dim = w.head_dim, a.end = rows, a.before = a.after = ALL;
    const Rows all_rows = {&a, p, q, scores, scores + PASS * PAGE};
    for (int64_t row = 0; row < rows; row++) {
        float *to = q + row / ROWS * ROWS * head_dim + row % ROWS;
        for (int64_t h = 0; h < head_dim; h++) to[h * ROWS] = w.q[row * w.q_stride + h] * w.scale;
        p.most[row] = -INFINITY, p.total[row] = 0;
    }
    std::memset(p.sum, 0, (size_t)(rows * head_dim) * sizeof(float));
    const int64_t whole = head_dim / (WIDE * LANES) * WIDE, registers = (head_dim + LANES - 1) / LANES;
    for (int64_t first = 0; first < rows; first += PAGE) {
        const int64_t n = rows - first < PAGE ? rows - first : PAGE;
        for (int64_t slot = 0; slot < n; slot++) {
            const float *k = w.k + (first + slot) * w.k_stride, *v = w.v + (first + slot) * w.v_stride;
            const int64_t r = slot / LANES;
            float *to = keys + r / WIDE * WIDE * LANES * head_dim + r % WIDE * LANES + slot % LANES;
            for (int64_t h = 0; h < head_dim; h++) to[h * WIDE * LANES] = k[h];
            for (int64_t c = 0; c < registers; c++) {
                float *panel = values + (c < whole ? c / WIDE * WIDE : c) * LANES * PAGE;
                const int64_t left = head_dim - c * LANES;
                store(panel + (c < whole ? slot * WIDE + c % WIDE : slot) * LANES,
                      left < LANES ? load_part(v + c * LANES, left) : load(v + c * LANES));
            }
        }
        for (int64_t slot = n; slot < PAGE; slot++) {  // hidden, but multiplied with the last that are not
            const int64_t r = slot / LANES;
            float *to = keys + r / WIDE * WIDE * LANES * head_dim + r % WIDE * LANES + slot % LANES;
            for (int64_t h = 0; h < head_dim; h++) to[h * WIDE * LANES] = 0;
        }
        const Page<float> page = {{keys, LANES * head_dim, 0}, {values, LANES * PAGE, 0}, nullptr, nullptr, first};
        for (int64_t row = 0; row < rows; row += PASS) advance(all_rows, page, row, row + PASS < rows ? row + PASS : rows);
    }
    finish(p, rows, head_dim, w.out, w.out_stride, 1);
}

}  // namespace GK_ISA
}  // namespace gk
