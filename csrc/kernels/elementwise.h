// What acts on each number or each row by itself. A result may take the place of an operand.
#pragma once

#include "functions.h"
#include "table.h"

namespace gk {
namespace GK_ISA {

// f(i, n) for whole registers and what is left: n of 16 numbers from i on.
template <class F> inline void in_lanes(int64_t n, F f) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) f(i, std::true_type(), LANES);
    if (i < n) f(i, std::false_type(), (int)(n - i));
}
inline F16 load(const float *p, std::true_type, int) { return load(p); }
inline F16 load(const float *p, std::false_type, int n) { return load_part(p, n); }
inline void store(float *p, F16 a, std::true_type, int) { store(p, a); }
inline void store(float *p, F16 a, std::false_type, int n) { store_part(p, a, n); }

// The sum of squares is kept in four registers in turn, whatever the instruction set; what is left goes to the first.
inline void rms_norm(const float *x, const float *weight, float eps, int64_t n, float *y) {
    F16 s[4] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int k = 0; k < 4; k++) {
            const F16 v = load(x + i + k * LANES);
            s[k] = fma(v, v, s[k]);
        }
    in_lanes(n - i, [&](int64_t j, auto whole, int left) {
        const F16 v = load(x + i + j, whole, left);
        s[0] = fma(v, v, s[0]);
    });
    const float mean = sum(add(add(s[0], s[1]), add(s[2], s[3]))) / (float)n;
    const F16 inverse = all(1.0f / std::sqrt(mean + eps)), one = all(1.0f);
    in_lanes(n, [&](int64_t j, auto whole, int left) {
        const F16 v = mul(load(x + j, whole, left), inverse);
        store(y + j, mul(v, add(one, load(weight + j, whole, left))), whole, left);
    });
}

// One token's heads, in place: dimension i turns with dimension i + half; those beyond 2 * half stay.
inline void rope(float *x, int64_t heads, int64_t head_dim, const float *cos, const float *sin, int64_t half) {
    for (int64_t h = 0; h < heads; h++, x += head_dim)
        in_lanes(half, [&](int64_t i, auto whole, int left) {
            const F16 c = load(cos + i, whole, left), s = load(sin + i, whole, left);
            const F16 a = load(x + i, whole, left), b = load(x + half + i, whole, left);
            store(x + i, sub(mul(a, c), mul(b, s)), whole, left);
            store(x + half + i, add(mul(b, c), mul(a, s)), whole, left);
        });
}

inline void gelu(const float *x, int64_t n, float *y) {
    in_lanes(n, [&](int64_t i, auto whole, int left) { store(y + i, gelu(load(x + i, whole, left)), whole, left); });
}

inline void geglu(const float *gate, const float *up, int64_t n, float *y) {
    in_lanes(n, [&](int64_t i, auto whole, int left) {
        store(y + i, mul(gelu(load(gate + i, whole, left)), load(up + i, whole, left)), whole, left);
    });
}

inline void softcap(float *x, float cap, int64_t n) {
    in_lanes(n, [&](int64_t i, auto whole, int left) {
        store(x + i, softcap(load(x + i, whole, left), all(cap)), whole, left);
    });
}

inline void add(const float *a, const float *b, int64_t n, float *y) {
    in_lanes(n, [&](int64_t i, auto whole, int left) {
        store(y + i, add(load(a + i, whole, left), load(b + i, whole, left)), whole, left);
    });
}

inline void mul(const float *a, const float *b, int64_t n, float *y) {
    in_lanes(n, [&](int64_t i, auto whole, int left) {
        store(y + i, mul(load(a + i, whole, left), load(b + i, whole, left)), whole, left);
    });
}

// The largest absolute value; infinity if one is infinite or not a number.
inline float magnitude(const float *x, int64_t n) {
    F16 most = zero(), spoilt = zero();  // 0 * x is 0 but for those two
    in_lanes(n, [&](int64_t i, auto whole, int left) {
        const F16 v = load(x + i, whole, left);
        most = max(absolute(v), most);
        spoilt = fma(v, zero(), spoilt);
    });
    return sum(spoilt) == 0 ? largest(most) : INFINITY;
}

// How many numbers from the start on are below `least`, by 64: n, or where the first 64 begin that are not all below it, or
// fewer than 64.
inline int64_t below(const float *x, float least, int64_t n) {
    const F16 floor = all(least), one = all(1.0f);
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        F16 met = zero();
        for (int k = 0; k < 4; k++) met = choose(less(load(x + i + k * LANES), floor), met, one);  // what is no number is met
        if (largest(met) != 0) break;
    }
    return i;
}

}  // namespace GK_ISA
}  // namespace gk
