// Exponential, hyperbolic tangent and their kin, sixteen at a time: range reduction and a polynomial.
//
// The coefficients are least-squares fits, reweighted until the largest relative error was level: 2.4e-10 for the
// exponential, 1.1e-10 for the logarithm, a hundredth of float32's rounding. What is not a number stays so.
#pragma once

#include "simd.h"

namespace gk {
namespace GK_ISA {

// x = n * log(2) + r with |r| <= log(2) / 2, and exp(r) - 1, for x within -150 log(2) .. 150 log(2).
struct Reduced { F16 n, growth; };

inline Reduced reduce(F16 x) {
    const F16 n = round(mul(x, all(0x1.715476p+0f)));
    F16 r = fma(n, all(-0x1.62e430p-1f), x);
    r = fma(n, all(0x1.05c610p-29f), r);  // what float32 leaves of log(2)
    F16 p = all(0.00019845877f);
    p = fma(p, r, all(0.0013940628f));
    p = fma(p, r, all(0.00833339f));
    p = fma(p, r, all(0.041666362f));
    p = fma(p, r, all(0.16666666f));
    p = fma(p, r, all(0.5f));
    return {n, fma(p, mul(r, r), r)};
}

inline F16 clamp(F16 x, float least, float most) { return min(all(most), max(all(least), x)); }  // NaN stays

// Within 1 ulp, down into the numbers below the normal ones; 0 and infinity beyond.
inline F16 exp(F16 x) {
    const Reduced e = reduce(clamp(x, -104.5f, 89.0f));  // exp of both ends is beyond float32
    return ldexp(add(e.growth, all(1.0f)), e.n);
}

// exp(x) - 1 for x <= 88, exact where x is near 0.
inline F16 expm1(F16 x) {
    const Reduced e = reduce(clamp(x, -104.5f, 88.0f));
    const F16 power = ldexp(all(1.0f), e.n);
    return fma(power, e.growth, sub(power, all(1.0f)));
}

inline F16 tanh(F16 x) {  // t / (t + 2) with t = exp(2 |x|) - 1: no small difference of large numbers anywhere
    const F16 t = expm1(mul(all(2.0f), min(all(10.0f), absolute(x))));  // it is 1 from 9.02 on
    return with_sign(div(t, add(t, all(2.0f))), x);
}

inline F16 sigmoid(F16 x) { return div(all(1.0f), add(all(1.0f), exp(sub(zero(), x)))); }

// log(1 + exp(x)) = max(x, 0) + log(1 + z) with z = exp(-|x|), and log(1 + z) = 2 atanh(z / (2 + z))
inline F16 softplus(F16 x) {
    const F16 z = exp(sub(zero(), absolute(x)));
    const F16 s = div(z, add(z, all(2.0f))), u = mul(s, s);
    F16 p = all(0.121504754f);
    p = fma(p, u, all(0.10713827f));
    p = fma(p, u, all(0.14308442f));
    p = fma(p, u, all(0.19999439f));
    p = fma(p, u, all(0.33333337f));
    const F16 half = fma(mul(p, u), s, s);
    return add(max(zero(), x), add(half, half));
}

inline F16 softcap(F16 x, F16 cap) { return mul(cap, tanh(div(x, cap))); }

// x * (1 + tanh(y)) / 2 = x / (1 + exp(-2 y)) with y = sqrt(2 / pi) * (x + 0.044715 x^3)
inline F16 gelu(F16 x) {
    const F16 cube = mul(mul(x, x), x);
    const F16 y = mul(all(-2.0f * 0.7978845608028654f), fma(all(0.044715f), cube, x));
    return div(x, add(all(1.0f), exp(y)));
}

}  // namespace GK_ISA
}  // namespace gk
