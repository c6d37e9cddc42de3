// Griffin's recurrent block between its linears. Each channel is by itself and walks the rows in order, so that how a
// sequence is cut changes nothing.
#pragma once

#include "elementwise.h"
#include "product.h"

namespace gk {
namespace GK_ISA {

constexpr int64_t MOST_TAPS = 16;  // what conv1d can take

// x's rows are `stride` apart, those of tail and y `width`; weight is (width, taps), its last column the current row's.
inline void conv1d(const float *x, int64_t tokens, int64_t width, int64_t stride, const float *weight, const float *bias,
                   int64_t taps, float *tail, float *y, int64_t channel0, int64_t channel1) {
    const int64_t back = taps - 1;
    in_lanes(channel1 - channel0, [&](int64_t i, auto whole, int left) {
        const int64_t c = channel0 + i;
        alignas(64) float columns[MOST_TAPS][LANES] = {};
        for (int lane = 0; lane < left; lane++)
            for (int64_t k = 0; k < taps; k++) columns[k][lane] = weight[(c + lane) * taps + k];
        // a row before the first is in the tail
        const auto row = [&](int64_t t) {
            return load(t < 0 ? tail + (t + back) * width + c : x + t * stride + c, whole, left);
        };
        const F16 start = load(bias + c, whole, left);
        for (int64_t t = 0; t < tokens; t++) {
            F16 sum = start;
            for (int64_t k = 0; k < taps; k++) sum = fma(row(t - back + k), load(columns[k]), sum);
            store(y + t * width + c, sum, whole, left);
        }
        for (int64_t k = 0; k < back; k++) store(tail + k * width + c, row(tokens - back + k), whole, left);
    });
}

// The bias comes first, then the products in the order of the inputs.
inline void block_linear(const float *x, int64_t tokens, int64_t blocks, int64_t width, const float *weight,
                         const float *bias, float *y, int64_t block0, int64_t block1) {
    const int64_t stride = blocks * width;
    for (int64_t block = block0; block < block1; block++) {
        const float *w = weight + block * width * width, *first = bias + block * width;
        const auto columns = [&](int64_t column, auto wide) {
            constexpr int V = decltype(wide)::value;
            for (int64_t t = 0; t < tokens; t += ROWS)
                with_number(tokens - t < ROWS ? (int)(tokens - t) : ROWS, [&](auto rows) {
                    float *out = y + t * stride + block * width + column;
                    product<decltype(rows)::value, V>(
                        x + t * stride + block * width, stride, Number<1>(), w + column, width, width,
                        [&](int, int v) { return load(first + column + v * LANES); },
                        [&](int r, int v, F16 sum) { store(out + r * stride + v * LANES, sum); });
                });
        };
        int64_t column = 0;
        if (tokens == 1) {  // bound by memory: a few inputs at a time for all columns, while the next weights are fetched
            constexpr int64_t INPUTS = 16, COLUMNS = 4 * LANES;
            const float *in = x + block * width;
            float *out = y + block * width;
            for (int64_t i = 0; i < width; i += INPUTS)
                for (column = 0; column + COLUMNS <= width; column += COLUMNS) {
                    const float *next = w + (i + INPUTS < width ? i + INPUTS : i) * width + column * INPUTS;
                    product<1, 4>(
                        in + i, 0, Number<1>(), w + i * width + column, width, width - i < INPUTS ? width - i : INPUTS,
                        [&](int, int v) { return load((i ? out : first) + column + v * LANES); },
                        [&](int, int v, F16 sum) { store(out + column + v * LANES, sum); },
                        [&](int64_t k) {
                            for (int line = 0; line < 4; line++) prefetch(next + k * COLUMNS + line * LANES);
                        });
                }
        }
        for (; column + WIDE * LANES <= width; column += WIDE * LANES) columns(column, Number<WIDE>());
        for (; column + LANES <= width; column += LANES) columns(column, Number<1>());
        if (const int64_t left = width - column)
            for (int64_t t = 0; t < tokens; t++) {
                const float *in = x + t * stride + block * width;
                F16 sum = load_part(first + column, left);
                for (int64_t i = 0; i < width; i++) sum = fma(all(in[i]), load_part(w + i * width + column, left), sum);
                store_part(y + t * stride + block * width + column, sum, left);
            }
    }
}

// a = exp(-8 sigmoid(recurrent_gate) softplus(param)); h = a h + sqrt(1 - a^2) sigmoid(input_gate) x; in a sequence's
// first row as if a were 0. All are (tokens, width).
inline void rg_lru(const float *x, const float *input_gate, const float *recurrent_gate, const float *param,
                   int64_t tokens, int64_t width, bool first, float *hidden, float *y, int64_t channel0,
                   int64_t channel1) {
    in_lanes(channel1 - channel0, [&](int64_t i, auto whole, int left) {
        const int64_t c = channel0 + i;
        const F16 rate = mul(all(-8.0f), softplus(load(param + c, whole, left)));
        F16 h = first ? zero() : load(hidden + c, whole, left);
        for (int64_t t = 0; t < tokens; t++) {
            const int64_t at = t * width + c;
            const F16 taken = sigmoid(load(input_gate + at, whole, left)), in = load(x + at, whole, left);
            if (first && t == 0) {
                h = mul(taken, in);
            } else {
                const F16 log_a = mul(sigmoid(load(recurrent_gate + at, whole, left)), rate);
                const F16 free = sqrt(sub(zero(), expm1(add(log_a, log_a))));  // exact where a is near 1
                h = fma(exp(log_a), h, mul(mul(free, taken), in));
            }
            store(y + at, h, whole, left);
        }
        if (tokens) store(hidden + c, h, whole, left);
    });
}

}  // namespace GK_ISA
}  // namespace gk
