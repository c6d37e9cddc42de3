// Sixteen floats at a time, the same everywhere: one register of AVX-512, two of AVX2, an array in portable code.
//
// Every kernel is written once, against these, and compiled once for each instruction set; which one this file is
// compiled for is known from the compiler's own macros. Sums and products are spelled out one by one (the build turns
// contraction off), so that AVX2 and AVX-512 give the same bits: both multiply and add fused, in the same order.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)  // gcc 12 takes its own "undefined" registers for a mistake of ours
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#endif

#if defined(__AVX512F__)
#define GK_ISA avx512
#elif defined(__AVX2__)
#define GK_ISA avx2
#else
#define GK_ISA portable
#endif

namespace gk {
namespace GK_ISA {

constexpr int LANES = 16;

#if defined(__AVX512F__)

constexpr int LANES_A_REGISTER = 16;
struct F16 { __m512 v; };

inline F16 zero() { return {_mm512_setzero_ps()}; }
inline F16 all(float x) { return {_mm512_set1_ps(x)}; }
inline F16 load(const float *p) { return {_mm512_loadu_ps(p)}; }
inline void store(float *p, F16 a) { _mm512_storeu_ps(p, a.v); }
inline F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F16 sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline F16 sqrt(F16 a) { return {_mm512_sqrt_ps(a.v)}; }
inline F16 round(F16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F16 from_half(const uint16_t *p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p))}; }
inline void to_half(uint16_t *p, F16 a) {
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline F16 from_bytes(const int8_t *p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)))};
}
inline F16 from_bf16(const uint16_t *p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}

#elif defined(__AVX2__)

constexpr int LANES_A_REGISTER = 8;
struct F16 { __m256 lo, hi; };

inline F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F16 all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F16 load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float *p, F16 a) { _mm256_storeu_ps(p, a.lo), _mm256_storeu_ps(p + 8, a.hi); }
inline F16 add(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F16 sub(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F16 mul(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F16 div(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F16 fma(F16 a, F16 b, F16 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline F16 sqrt(F16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
inline F16 round(F16 a) {
    return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline F16 from_half(const uint16_t *p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + 8)))};
}
inline void to_half(uint16_t *p, F16 a) {
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline F16 from_bytes(const int8_t *p) {
    const __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline F16 from_bf16(const uint16_t *p) {
    const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    const __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p + 8)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}

#else

constexpr int LANES_A_REGISTER = 4;
struct F16 { float v[LANES]; };

template <class Op> inline F16 each(F16 a, F16 b, Op op) {
    F16 r;
    for (int i = 0; i < LANES; i++) r.v[i] = op(a.v[i], b.v[i]);
    return r;
}
inline F16 all(float x) {
    F16 r;
    for (float &lane : r.v) lane = x;
    return r;
}
inline F16 zero() { return all(0); }
inline F16 load(const float *p) {
    F16 r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
inline void store(float *p, F16 a) { std::memcpy(p, a.v, sizeof a.v); }
inline F16 add(F16 a, F16 b) { return each(a, b, [](float x, float y) { return x + y; }); }
inline F16 sub(F16 a, F16 b) { return each(a, b, [](float x, float y) { return x - y; }); }
inline F16 mul(F16 a, F16 b) { return each(a, b, [](float x, float y) { return x * y; }); }
inline F16 div(F16 a, F16 b) { return each(a, b, [](float x, float y) { return x / y; }); }
// As the instructions have it: where one is not a number, the second.
inline F16 max(F16 a, F16 b) { return each(a, b, [](float x, float y) { return x > y ? x : y; }); }
inline F16 min(F16 a, F16 b) { return each(a, b, [](float x, float y) { return x < y ? x : y; }); }
inline F16 fma(F16 a, F16 b, F16 c) {
    F16 r;
    for (int i = 0; i < LANES; i++) r.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
    return r;
}
inline F16 sqrt(F16 a) { return each(a, a, [](float x, float) { return std::sqrt(x); }); }
inline F16 round(F16 a) { return each(a, a, [](float x, float) { return std::nearbyint(x); }); }
inline float half_to_float(uint16_t h) {
    const uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
    uint32_t bits;
    if (exponent == 31) {
        bits = sign | 0x7F800000u | fraction << 13;
    } else if (exponent) {
        bits = sign | (exponent + 112) << 23 | fraction << 13;
    } else {  // zero, or below the normal numbers
        const float tiny = (float)fraction * 0x1p-24f;
        std::memcpy(&bits, &tiny, 4);
        bits |= sign;
    }
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline uint16_t float_to_half(float f) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
    if (size > 0x7F800000u) return (uint16_t)(sign | 0x7E00u);
    if (size >= 0x477FF000u) return (uint16_t)(sign | 0x7C00u);
    if (size < 0x38800000u) {
        float value;
        std::memcpy(&value, &size, 4);
        return (uint16_t)(sign | (uint32_t)std::nearbyint(value * 0x1p24f));
    }
    return (uint16_t)(sign | (size - 0x38000000u + 0xFFFu + (size >> 13 & 1)) >> 13);
}
inline F16 from_half(const uint16_t *p) {
    F16 r;
    for (int i = 0; i < LANES; i++) r.v[i] = half_to_float(p[i]);
    return r;
}
inline void to_half(uint16_t *p, F16 a) {
    for (int i = 0; i < LANES; i++) p[i] = float_to_half(a.v[i]);
}
inline F16 from_bytes(const int8_t *p) {
    F16 r;
    for (int i = 0; i < LANES; i++) r.v[i] = (float)p[i];
    return r;
}
inline F16 from_bf16(const uint16_t *p) {
    F16 r;
    for (int i = 0; i < LANES; i++) {
        const uint32_t bits = (uint32_t)p[i] << 16;
        std::memcpy(&r.v[i], &bits, 4);
    }
    return r;
}

#endif

// The sum of all lanes, and the largest, always in the same order: neighbours at a distance of 8, 4, 2, 1.
inline float sum(F16 a) {
    alignas(64) float v[LANES];
    store(v, a);
    for (int d = LANES / 2; d; d /= 2)
        for (int i = 0; i < d; i++) v[i] += v[i + d];
    return v[0];
}
inline float largest(F16 a) {
    alignas(64) float v[LANES];
    store(v, a);
    for (int d = LANES / 2; d; d /= 2)
        for (int i = 0; i < d; i++) v[i] = v[i] > v[i + d] ? v[i] : v[i + d];
    return v[0];
}

// ---- choices, signs, powers of two, and rows that end within a register ---------------------------------------------

#if defined(__AVX512F__)

struct Mask { __mmask16 v; };

inline Mask less(F16 a, F16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline F16 choose(Mask m, F16 a, F16 b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }  // a where m is set
inline F16 absolute(F16 a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v)}; }
inline F16 with_sign(F16 size, F16 sign) {  // size is not negative
    return {_mm512_or_ps(size.v, _mm512_and_ps(_mm512_set1_ps(-0.0f), sign.v))};
}
inline F16 ldexp(F16 a, F16 n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n rounded once; n whole, |n| <= 160

#elif defined(__AVX2__)

struct Mask { __m256 lo, hi; };

inline Mask less(F16 a, F16 b) { return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)}; }
inline F16 choose(Mask m, F16 a, F16 b) {
    return {_mm256_blendv_ps(b.lo, a.lo, m.lo), _mm256_blendv_ps(b.hi, a.hi, m.hi)};
}
inline F16 absolute(F16 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline F16 with_sign(F16 size, F16 sign) {
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return {_mm256_or_ps(size.lo, _mm256_and_ps(bit, sign.lo)), _mm256_or_ps(size.hi, _mm256_and_ps(bit, sign.hi))};
}
inline __m256 ldexp_half(__m256 a, __m256 n) {  // in two steps, of which only the second can round
    const __m256i whole = _mm256_cvtps_epi32(n), first = _mm256_srai_epi32(whole, 1), bias = _mm256_set1_epi32(127);
    const __m256i second = _mm256_sub_epi32(whole, first);
    a = _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(first, bias), 23)));
    return _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(second, bias), 23)));
}
inline F16 ldexp(F16 a, F16 n) { return {ldexp_half(a.lo, n.lo), ldexp_half(a.hi, n.hi)}; }

#else

struct Mask { bool v[LANES]; };

inline Mask less(F16 a, F16 b) {
    Mask m;
    for (int i = 0; i < LANES; i++) m.v[i] = a.v[i] < b.v[i];
    return m;
}
inline F16 choose(Mask m, F16 a, F16 b) {
    for (int i = 0; i < LANES; i++) a.v[i] = m.v[i] ? a.v[i] : b.v[i];
    return a;
}
inline F16 absolute(F16 a) { return each(a, a, [](float x, float) { return std::fabs(x); }); }
inline F16 with_sign(F16 size, F16 sign) { return each(size, sign, [](float x, float y) { return std::copysign(x, y); }); }
inline F16 ldexp(F16 a, F16 n) {
    return each(a, n, [](float x, float power) { return std::ldexp(x, power == power ? (int)power : 0); });
}

#endif

// The first n of sixteen, 0 <= n <= 16; the others are zeros, and not touched in memory.
inline F16 load_part(const float *p, int64_t n) {
    alignas(64) float v[LANES] = {};
    std::memcpy(v, p, (size_t)n * sizeof *p);
    return load(v);
}
inline void store_part(float *p, F16 a, int64_t n) {
    alignas(64) float v[LANES];
    store(v, a);
    std::memcpy(p, v, (size_t)n * sizeof *p);
}
inline F16 from_half_part(const uint16_t *p, int64_t n) {
    uint16_t v[LANES] = {};
    std::memcpy(v, p, (size_t)n * sizeof *p);
    return from_half(v);
}
inline void to_half_part(uint16_t *p, F16 a, int64_t n) {
    uint16_t v[LANES];
    to_half(v, a);
    std::memcpy(p, v, (size_t)n * sizeof *p);
}

// Ask for the line that holds p; any address will do.
inline void prefetch(const void *p) { __builtin_prefetch(p, 0, 2); }

}  // namespace GK_ISA
}  // namespace gk
