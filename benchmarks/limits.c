// What one core computes at most, for `machine.Limits`: independent multiply-adds in registers, nothing from memory.
//
//     cc -O3 -march=native -shared -fPIC limits.c -o limits.so
//
// Each function runs `rounds` rounds and returns how many operations that was, a multiply and an add counting as two.
// 0 means that this processor's instruction is not known here. Integer: products of 8 bits in sums of 32 bits, as exact
// matrix products need them; sums of 16 bits, which 4-bit weights allow for a while, can be faster than this limit.

#include <stdint.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

// Twelve independent sums: latency times throughput is at most this on every core known so far, and with what else a
// round needs they fit into sixteen registers. Variables of their own, for an array would be kept in memory.
#define CHAINS 12
#define EACH(DO) DO(s0) DO(s1) DO(s2) DO(s3) DO(s4) DO(s5) DO(s6) DO(s7) DO(s8) DO(s9) DO(s10) DO(s11)

// Hides from the compiler what a register holds, so that no round can be skipped or merged with another.
#if defined(__AVX512F__)
#define OPAQUE(value) __asm__ volatile("" : "+v"(value));
#elif defined(__x86_64__)
#define OPAQUE(value) __asm__ volatile("" : "+x"(value));
#else
#define OPAQUE(value) __asm__ volatile("" : "+w"(value));
#endif

#if defined(__AVX512F__)
typedef float Floats __attribute__((vector_size(64)));
#elif defined(__AVX__)
typedef float Floats __attribute__((vector_size(32)));
#else
typedef float Floats __attribute__((vector_size(16)));
#endif

double limit_float32(int64_t rounds) {
    Floats a = {0}, b = {0};
    OPAQUE(a)
    OPAQUE(b)
#define START(sum) Floats sum = {0};
#define STEP(sum) sum += a * b; /* one fused multiply-add */ OPAQUE(sum)
    EACH(START)
    for (int64_t i = 0; i < rounds; i++) {
        EACH(STEP)
    }
#undef START
#undef STEP
    return (double)rounds * CHAINS * 2 * (sizeof(Floats) / sizeof(float));
}

#if defined(__AVX512VNNI__)
typedef __m512i Integers;
#define STEP(sum) sum = _mm512_dpbusd_epi32(sum, a, b); OPAQUE(sum)
#elif defined(__AVXVNNI__)
typedef __m256i Integers;
#define STEP(sum) sum = _mm256_dpbusd_avx_epi32(sum, a, b); OPAQUE(sum)
#elif defined(__AVX2__)
typedef __m256i Integers;
#define STEP(sum) \
    { \
        Integers pairs = _mm256_maddubs_epi16(a, b); \
        OPAQUE(pairs) \
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones)); \
        OPAQUE(sum) \
    }
#define ONES
#elif defined(__ARM_FEATURE_DOTPROD)
typedef int8x16_t Integers;
#define STEP(sum) sum = (Integers)vdotq_s32((int32x4_t)sum, a, b); OPAQUE(sum)
#endif

double limit_int8(int64_t rounds) {
#ifdef STEP
    Integers a = {0}, b = {0};
    OPAQUE(a)
    OPAQUE(b)
#ifdef ONES
    Integers ones = _mm256_set1_epi16(1);
    OPAQUE(ones)
#endif
#define START(sum) Integers sum = {0};
    EACH(START)
    for (int64_t i = 0; i < rounds; i++) {
        EACH(STEP)
    }
    return (double)rounds * CHAINS * 2 * sizeof(Integers);
#else
    (void)rounds;
    return 0;
#endif
}
