// A coarse copy of the output table: 2 bits a weight, read in full for every token, so that only the few rows that can
// still be wanted are computed from the real table (executor.cpp, `screen`).
//
// Rows and hidden state are turned by the same random rotation first, which leaves every product as it is and makes the
// coordinates of both alike, so that the error of a product behaves like a sum of many small independent terms.
//
//     w ~ scale * (code - 1.5), code in 0..3        x ~ step * q, q in -127..127
//     bound = scale * step * (sum code * q - 1.5 * sum q) + slack * error
//
// `error` is the length of what the code leaves of its row; `slack` is what the caller allows for it.
//
// A tile of 16 rows: 16 scales and 16 errors (float16), then for each 16 columns 64 bytes: byte 4 * row + j has the
// codes of columns j, 4 + j, 8 + j and 12 + j of that row, two bits each from the lowest up.
#pragma once

#include "simd.h"
#include "table.h"

namespace gk {

constexpr int64_t sketch_tile_bytes(int64_t cols) { return 64 + (cols + 15) / 16 * 64; }

namespace GK_ISA {

// The spacing of four levels that leaves the least of a normal variable, in its standard deviations
// (J. Max, Quantizing for minimum distortion, 1960, table II).
constexpr float SPACING = 0.9957f;

// `count` columns turned as `rotate` of screening.cpp turns a vector, two widths of it at a time.
inline void rotate_rows(float *at, const float *signs, int64_t count) {
    const float unit = 1 / std::sqrt((float)count);
    for (int64_t i = 0; i < count; i++) store(at + i * TILE, mul(load(at + i * TILE), all(signs[i] * unit)));
    const auto column = [&](int64_t i) { return at + i * TILE; };
    int64_t width = 1;
    for (; width * 2 < count; width *= 4)
        for (int64_t i = 0; i < count; i += 4 * width)
            for (int64_t k = i; k < i + width; k++) {
                const F16 a = load(column(k)), b = load(column(k + width));
                const F16 c = load(column(k + 2 * width)), d = load(column(k + 3 * width));
                const F16 ab = add(a, b), a_b = sub(a, b), cd = add(c, d), c_d = sub(c, d);
                store(column(k), add(ab, cd)), store(column(k + width), add(a_b, c_d));
                store(column(k + 2 * width), sub(ab, cd)), store(column(k + 3 * width), sub(a_b, c_d));
            }
    for (; width < count; width *= 2)
        for (int64_t k = 0; k < width; k++) {
            const F16 a = load(column(k)), b = load(column(k + width));
            store(column(k), add(a, b)), store(column(k + width), sub(a, b));
        }
}

// Of each of sixteen rows a sum over columns: in float32 over 16 of them, in float64 over these.
struct Sums {
    double of[TILE] = {};

    void add(F16 part) {
        alignas(64) float parts[TILE];
        store(parts, part);
        for (int r = 0; r < TILE; r++) of[r] += parts[r];
    }
};

// Sixteen rows side by side: every loop over them fills vectors, and each row's sums have one order.
inline void make_sketch(float *x, const float *signs, int64_t cols, uint8_t *out) {
    const int64_t block = cols & -cols;
    Sums squares, along, levels;  // of x * x, x * level and level * level
    for (int64_t first = 0; first < cols; first += block) rotate_rows(x + first * TILE, signs + first, block);
    for (int64_t first = 0; first < cols; first += 16) {
        F16 part = zero();
        for (int64_t i = first; i < first + 16 && i < cols; i++) part = fma(load(x + i * TILE), load(x + i * TILE), part);
        squares.add(part);
    }
    alignas(64) float per_spacing[TILE], scales[TILE], errors[TILE];
    for (int r = 0; r < TILE; r++) per_spacing[r] = 1 / (SPACING * (float)std::sqrt(squares.of[r] / (double)cols));
    const F16 spacing = load(per_spacing), two = all(2), three = all(3);
    for (int64_t first = 0; first < cols; first += 16) {
        alignas(64) uint32_t words[TILE] = {};
        F16 along_part = zero(), levels_part = zero();
        for (int64_t i = first; i < first + 16 && i < cols; i++) {
            const F16 at = load(x + i * TILE);
            const int shift = (int)(i % 4 * 8 + i % 16 / 4 * 2);
            alignas(64) float level[TILE];
            store(level, min(max(add(mul(at, spacing), two), zero()), three));
            for (int r = 0; r < TILE; r++) {
                const int32_t code = (int32_t)level[r];
                words[r] |= (uint32_t)code << shift;
                level[r] = (float)code - 1.5f;
            }
            along_part = fma(at, load(level), along_part), levels_part = fma(load(level), load(level), levels_part);
        }
        along.add(along_part), levels.add(levels_part);
        std::memcpy(out + 64 + first * 4, words, sizeof words);
    }
    // Levels that are nearest to a row are shorter than it, and a product with what it points to comes out too small. The
    // scale that makes what is left orthogonal to the row itself does not err on the rows that matter.
    for (int r = 0; r < TILE; r++) scales[r] = squares.of[r] > 0 ? (float)(squares.of[r] / along.of[r]) : 0.0f;
    to_half((uint16_t *)out, load(scales));
    store(scales, from_half((const uint16_t *)out));
    for (int r = 0; r < TILE; r++) {
        // the square of what is left is an eighth of the row's: the sums' rounding of 2^-20 is 2^-17 of it. The error is
        // rounded up by more than that: a bound must not be too small
        const double scale = scales[r], left = squares.of[r] - 2 * scale * along.of[r] + scale * scale * levels.of[r];
        errors[r] = left > 0 ? (float)std::sqrt(left / (double)cols) * (1 + 0x1p-10f) : 0.0f;
    }
    to_half((uint16_t *)(out + 32), load(errors));
}

// Of the rows of tiles tile0 .. tile1: bounds (16 a tile), and the largest of each tile. q is zero beyond `cols`, up to a
// multiple of 16. sum: of all q.
inline void sketch(const uint8_t *data, int64_t tile0, int64_t tile1, int64_t cols, const int8_t *q, int32_t sum, float step,
                   float slack, float *bounds, float *best) {
    const int64_t chunks = (cols + 15) / 16;
    for (int64_t tile = tile0; tile < tile1; tile++) {
        const uint8_t *at = data + tile * sketch_tile_bytes(cols);
        alignas(64) int32_t dots[TILE];
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
        const __m512i three = _mm512_set1_epi8(3);
        __m512i acc[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
        for (int64_t c = 0; c < chunks; c++) {
            const __m512i codes = _mm512_loadu_si512(at + 64 + c * 64);
            int32_t four[4];
            std::memcpy(four, q + 16 * c, 16);
            acc[0] = _mm512_dpbusd_epi32(acc[0], _mm512_and_si512(codes, three), _mm512_set1_epi32(four[0]));
            acc[1] = _mm512_dpbusd_epi32(acc[1], _mm512_and_si512(_mm512_srli_epi16(codes, 2), three), _mm512_set1_epi32(four[1]));
            acc[2] = _mm512_dpbusd_epi32(acc[2], _mm512_and_si512(_mm512_srli_epi16(codes, 4), three), _mm512_set1_epi32(four[2]));
            acc[3] = _mm512_dpbusd_epi32(acc[3], _mm512_and_si512(_mm512_srli_epi16(codes, 6), three), _mm512_set1_epi32(four[3]));
        }
        _mm512_store_si512(dots, _mm512_add_epi32(_mm512_add_epi32(acc[0], acc[1]), _mm512_add_epi32(acc[2], acc[3])));
#elif defined(__AVX2__)
        const __m256i three = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
        __m256i total[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        for (int64_t c = 0; c < chunks; c++) {
            int32_t four[4];
            std::memcpy(four, q + 16 * c, 16);
            for (int half = 0; half < 2; half++) {
                const __m256i codes = _mm256_loadu_si256((const __m256i *)(at + 64 + c * 64 + 32 * half));
                // four products of at most 3 * 127 * 2 each fit 16 bits many times over
                __m256i sum16 = _mm256_maddubs_epi16(_mm256_and_si256(codes, three), _mm256_set1_epi32(four[0]));
                sum16 = _mm256_add_epi16(sum16, _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(codes, 2), three), _mm256_set1_epi32(four[1])));
                sum16 = _mm256_add_epi16(sum16, _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(codes, 4), three), _mm256_set1_epi32(four[2])));
                sum16 = _mm256_add_epi16(sum16, _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(codes, 6), three), _mm256_set1_epi32(four[3])));
                total[half] = _mm256_add_epi32(total[half], _mm256_madd_epi16(sum16, ones));
            }
        }
        _mm256_store_si256((__m256i *)dots, total[0]);
        _mm256_store_si256((__m256i *)(dots + 8), total[1]);
#else
        for (int r = 0; r < TILE; r++) {
            dots[r] = 0;
            for (int64_t i = 0; i < 16 * chunks; i++) {
                const int shift = 2 * (int)(i % 16 / 4);
                dots[r] += (at[64 + i / 16 * 64 + 4 * r + i % 4] >> shift & 3) * q[i];
            }
        }
#endif
        alignas(64) float wide[TILE];
        for (int r = 0; r < TILE; r++) wide[r] = (float)(2 * dots[r] - 3 * sum);  // twice the sum of (code - 1.5) * q
        const F16 scale = from_half((const uint16_t *)at), error = from_half((const uint16_t *)(at + 32));
        const F16 bound = fma(error, all(slack), mul(mul(scale, all(0.5f * step)), load(wide)));
        store(bounds + tile * TILE, bound);
        best[tile] = largest(bound);
    }
}

}  // namespace GK_ISA
}  // namespace gk
