// Codes and their exact dot products, the same everywhere: 64 bytes are 16 rows of 4 columns (weights.h), a sum is one
// 32-bit integer a row. AVX-512 multiplies unsigned by signed bytes in one instruction; AVX2 adds pairs in 16 bits for as
// long as they cannot overflow, then widens.
#pragma once

#include "simd.h"

#if !defined(__AVX2__)
#define GK_UNROLL
#elif defined(__clang__)
#define GK_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define GK_UNROLL _Pragma("GCC unroll 16")
#else
#define GK_UNROLL
#endif

namespace gk {
namespace GK_ISA {

// What 32 columns of one token become: a cache line.
struct alignas(64) Group {
    int8_t codes[32];  // x = scale * code
    float scale;
    int32_t minus16[2], minus32;  // minus the sums of 16 and of all codes, for weights that count from a zero point
    float plus16[2], plus32;  // the same sums, for weights with minima
    int32_t unused;
};
static_assert(sizeof(Group) == 64);

// Of the 32 numbers of a group: the bits of the largest magnitude, which order floats by size, infinite and not a number
// above all; and their codes, rounded to nearest (ties to even) after a product with `inverse`, and the sum of each half.
#if defined(__AVX512F__)

inline uint32_t largest_bits(const float *x) {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    return _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_and_si512(_mm512_loadu_si512(x), magnitude),
                                                    _mm512_and_si512(_mm512_loadu_si512(x + 16), magnitude)));
}
inline void to_codes(const float *x, float inverse, int8_t *codes, int32_t *sums) {
    for (int i = 0; i < 2; i++) {
        const __m128i half = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(mul(load(x + 16 * i), all(inverse)).v));
        _mm_storeu_si128((__m128i *)(codes + 16 * i), half);
        const __m128i fours = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(1), half);
        const __m128i twos = _mm_add_epi32(fours, _mm_shuffle_epi32(fours, 0x4E));
        sums[i] = _mm_cvtsi128_si32(_mm_add_epi32(twos, _mm_shuffle_epi32(twos, 0xB1)));
    }
}

#else

inline uint32_t largest_bits(const float *x) {
    uint32_t most = 0;
    for (int i = 0; i < 32; i++) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        bits &= 0x7FFFFFFF;
        most = bits > most ? bits : most;
    }
    return most;
}
inline void to_codes(const float *x, float inverse, int8_t *codes, int32_t *sums) {
    alignas(64) float rounded[32];
    for (int half = 0; half < 2; half++) store(rounded + 16 * half, round(mul(load(x + 16 * half), all(inverse))));
    alignas(64) int32_t n[32];
    for (int i = 0; i < 32; i++) n[i] = (int32_t)rounded[i];
    sums[0] = sums[1] = 0;
    for (int i = 0; i < 16; i++) sums[0] += n[i];
    for (int i = 16; i < 32; i++) sums[1] += n[i];
    for (int i = 0; i < 32; i++) codes[i] = (int8_t)n[i];
}

#endif

#if defined(__AVX512F__)

struct B64 { __m512i v; };
struct I16 { __m512i v; };

inline B64 bytes(const uint8_t *p) { return {_mm512_loadu_si512(p)}; }
inline void put(uint8_t *p, B64 a) { _mm512_storeu_si512(p, a.v); }
inline B64 operator&(B64 a, uint8_t mask) { return {_mm512_and_si512(a.v, _mm512_set1_epi8((char)mask))}; }
inline B64 operator|(B64 a, B64 b) { return {_mm512_or_si512(a.v, b.v)}; }
inline B64 operator^(B64 a, uint8_t mask) { return {_mm512_xor_si512(a.v, _mm512_set1_epi8((char)mask))}; }
// Bits go over the borders of bytes: a mask must follow.
inline B64 operator>>(B64 a, int n) { return {_mm512_srli_epi16(a.v, (unsigned)n)}; }
inline B64 operator<<(B64 a, int n) { return {_mm512_slli_epi16(a.v, (unsigned)n)}; }

inline I16 no_sum() { return {_mm512_setzero_si512()}; }
inline I16 scaled(const int32_t &n, int shift) { return {_mm512_slli_epi32(_mm512_set1_epi32(n), (unsigned)shift)}; }
inline F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline F16 from_u8(const uint8_t *p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)))};
}
inline F16 from_i8(const uint8_t *p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)))};
}

// Multiplies unsigned by signed bytes alone: signed codes are decoded 128 higher, and dots counts from there.
constexpr int ABOVE = 128;

// The numbers that 16 codes stand for, ABOVE higher, and those of each code.
struct Table { __m512i v; };
inline Table table_of(const int8_t *values) {
    const __m128i signed_ones = _mm_loadu_si128((const __m128i *)values);
    return {_mm512_broadcast_i32x4(_mm_xor_si128(signed_ones, _mm_set1_epi8((char)ABOVE)))};
}
inline B64 look_up(Table table, B64 codes) { return {_mm512_shuffle_epi8(table.v, codes.v)}; }

// sums[t * R + r] += codes of chunks FIRST .. FIRST + CHUNKS of tile r times those of token t, for M tokens from x and R
// tiles, each `step` chunks after the one before. Codes have BITS bits.
template <int BITS, int FIRST, int CHUNKS, int M, int R> inline void dots(const B64 *w, int step, const Group *x, I16 *sums) {
    GK_UNROLL
    for (int c = FIRST; c < FIRST + CHUNKS; c++) {
        GK_UNROLL
        for (int t = 0; t < M; t++) {
            int32_t four;
            std::memcpy(&four, x[t].codes + 4 * c, 4);
            const __m512i all_four = _mm512_set1_epi32(four);
            GK_UNROLL
            for (int r = 0; r < R; r++) sums[t * R + r].v = _mm512_dpbusd_epi32(sums[t * R + r].v, w[r * step + c].v, all_four);
        }
    }
}

#elif defined(__AVX2__)

// Keeps a sum in its register here and now: gcc otherwise multiplies first, stores all products, and adds them later.
#define GK_KEEP(x) [&] { asm("" : "+x"(x)); }()

struct B64 { __m256i lo, hi; };
struct I16 { __m256i lo, hi; };

inline B64 bytes(const uint8_t *p) {
    return {_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)(p + 32))};
}
inline void put(uint8_t *p, B64 a) { _mm256_storeu_si256((__m256i *)p, a.lo), _mm256_storeu_si256((__m256i *)(p + 32), a.hi); }
inline B64 operator&(B64 a, uint8_t mask) {
    const __m256i m = _mm256_set1_epi8((char)mask);
    return {_mm256_and_si256(a.lo, m), _mm256_and_si256(a.hi, m)};
}
inline B64 operator|(B64 a, B64 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
inline B64 operator^(B64 a, uint8_t mask) {
    const __m256i m = _mm256_set1_epi8((char)mask);
    return {_mm256_xor_si256(a.lo, m), _mm256_xor_si256(a.hi, m)};
}
inline B64 operator>>(B64 a, int n) { return {_mm256_srli_epi16(a.lo, n), _mm256_srli_epi16(a.hi, n)}; }
inline B64 operator<<(B64 a, int n) { return {_mm256_slli_epi16(a.lo, n), _mm256_slli_epi16(a.hi, n)}; }

inline I16 no_sum() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I16 scaled(const int32_t &n, int shift) {
    const __m256i v = _mm256_slli_epi32(_mm256_set1_epi32(n), shift);
    return {v, v};
}
inline F16 to_float(I16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline F16 from_u8(const uint8_t *p) {
    const __m128i v = _mm_loadu_si128((const __m128i *)p);
    return to_float({_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))});
}
inline F16 from_i8(const uint8_t *p) {
    const __m128i v = _mm_loadu_si128((const __m128i *)p);
    return to_float({_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))});
}

constexpr int ABOVE = 0;  // signed codes stay as they are

struct Table { __m256i v; };
inline Table table_of(const int8_t *values) {
    return {_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)values))};
}
inline B64 look_up(Table table, B64 codes) {
    return {_mm256_shuffle_epi8(table.v, codes.lo), _mm256_shuffle_epi8(table.v, codes.hi)};
}

template <int BITS, int FIRST, int CHUNKS, int M, int R> inline void dots(const B64 *w, int, const Group *x, I16 *sums) {
    static_assert(R == 1, "the registers hold one tile");
    // A pair of products of codes of n bits by at most 127 stays below 2^(n + 8): this many pairs fit 16 bits.
    constexpr int FIT = BITS <= 4 ? 8 : BITS == 5 ? 4 : BITS == 6 ? 2 : 1;
    constexpr int RUN = FIT < CHUNKS ? FIT : CHUNKS;
    const __m256i ones = _mm256_set1_epi16(1);
    GK_UNROLL
    for (int run = FIRST; run < FIRST + CHUNKS; run += RUN) {
        I16 pairs[M];
        GK_UNROLL
        for (int c = run; c < run + RUN; c++) {
            __m256i lo = w[c].lo, hi = w[c].hi;
            if constexpr (BITS == 8) lo = _mm256_abs_epi8(lo), hi = _mm256_abs_epi8(hi);
            GK_UNROLL
            for (int t = 0; t < M; t++) {
                int32_t four;
                std::memcpy(&four, x[t].codes + 4 * c, 4);
                __m256i x_lo = _mm256_set1_epi32(four), x_hi = x_lo;
                if constexpr (BITS == 8) {  // |w| * (sign of w) x: 128 * 127 * 2 fits
                    x_lo = _mm256_sign_epi8(x_lo, w[c].lo), x_hi = _mm256_sign_epi8(x_hi, w[c].hi);
                }
                const __m256i p_lo = _mm256_maddubs_epi16(lo, x_lo), p_hi = _mm256_maddubs_epi16(hi, x_hi);
                pairs[t].lo = c == run ? p_lo : _mm256_add_epi16(pairs[t].lo, p_lo);
                pairs[t].hi = c == run ? p_hi : _mm256_add_epi16(pairs[t].hi, p_hi);
                GK_KEEP(pairs[t].lo), GK_KEEP(pairs[t].hi);
            }
        }
        GK_UNROLL
        for (int t = 0; t < M; t++) {
            sums[t].lo = _mm256_add_epi32(sums[t].lo, _mm256_madd_epi16(pairs[t].lo, ones));
            sums[t].hi = _mm256_add_epi32(sums[t].hi, _mm256_madd_epi16(pairs[t].hi, ones));
        }
    }
}

#else

struct B64 { uint8_t v[64]; };
struct I16 { int32_t v[LANES]; };

template <class Op> inline B64 each_byte(B64 a, Op op) {
    for (uint8_t &byte : a.v) byte = (uint8_t)op(byte);
    return a;
}
inline B64 bytes(const uint8_t *p) {
    B64 a;
    std::memcpy(a.v, p, 64);
    return a;
}
inline void put(uint8_t *p, B64 a) { std::memcpy(p, a.v, 64); }
inline B64 operator&(B64 a, uint8_t mask) {
    return each_byte(a, [mask](int x) { return x & mask; });
}
inline B64 operator|(B64 a, B64 b) {
    for (int i = 0; i < 64; i++) a.v[i] |= b.v[i];
    return a;
}
inline B64 operator^(B64 a, uint8_t mask) {
    return each_byte(a, [mask](int x) { return x ^ mask; });
}
inline B64 operator>>(B64 a, int n) {
    return each_byte(a, [n](int x) { return x >> n; });
}
inline B64 operator<<(B64 a, int n) {
    return each_byte(a, [n](int x) { return x << n; });
}

inline I16 no_sum() { return {}; }
inline I16 scaled(const int32_t &n, int shift) {
    I16 a;
    for (int32_t &lane : a.v) lane = n * (1 << shift);
    return a;
}
inline F16 to_float(I16 a) {
    F16 r;
    for (int i = 0; i < LANES; i++) r.v[i] = (float)a.v[i];
    return r;
}
inline F16 from_u8(const uint8_t *p) {
    F16 r;
    for (int i = 0; i < LANES; i++) r.v[i] = (float)p[i];
    return r;
}
inline F16 from_i8(const uint8_t *p) {
    F16 r;
    for (int i = 0; i < LANES; i++) r.v[i] = (float)(int8_t)p[i];
    return r;
}

constexpr int ABOVE = 128;  // bytes are unsigned here too

struct Table { const int8_t *values; };
inline Table table_of(const int8_t *values) { return {values}; }
inline B64 look_up(Table table, B64 codes) {
    return each_byte(codes, [table](int x) { return table.values[x] ^ ABOVE; });
}

template <int BITS, int FIRST, int CHUNKS, int M, int R> inline void dots(const B64 *w, int, const Group *x, I16 *sums) {
    static_assert(R == 1, "one tile at a time");
    for (int c = FIRST; c < FIRST + CHUNKS; c++)
        for (int t = 0; t < M; t++)
            for (int r = 0; r < LANES; r++)
                for (int j = 0; j < 4; j++) sums[t].v[r] += w[c].v[4 * r + j] * x[t].codes[4 * c + j];
}

#endif

}  // namespace GK_ISA
}  // namespace gk
